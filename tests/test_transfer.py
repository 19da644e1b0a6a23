"""Run folders and transfer scores: cases worked out by hand, identities, damaged files."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from run_folders import write_run

from rllib_pnn.analysis import transfer
from rllib_pnn.analysis.runs import RunError, find_runs, read_run, read_runs
from rllib_pnn.analysis.transfer import (
    TransferError,
    forgetting,
    forward_transfer,
    interquartile_mean,
    known_ceiling,
    known_floor,
    learning_curve,
    step_grid,
    transfer_interval,
    transfer_score,
    transfer_tables,
)
from rllib_pnn.envs.labyrinth_levels import ITEMS, LEVELS


def flat(level, steps=(100, 200, 300, 400), episodes=1):
    return [(step, level, episodes) for step in steps]


# -- curves


def test_a_point_is_the_average_over_the_episodes_that_ended_in_its_window():
    # (0, 100]: 2 episodes of -20 and 1 of -14 -> -18. (100, 200]: 1 of 4. A step on an edge belongs below.
    curve = learning_curve([50, 100, 150], [-40, -14, 4], [2, 1, 1], np.array([100.0, 200.0]))
    np.testing.assert_allclose(curve, [-18, 4])


def test_windows_without_an_episode_take_the_point_before_or_the_first_one():
    grid = np.array([10.0, 20, 30, 40, 50])
    np.testing.assert_allclose(learning_curve([15, 35], [1, 5], [1, 1], grid), [1, 1, 1, 5, 5])


def test_what_ended_after_the_horizon_does_not_count():
    np.testing.assert_allclose(learning_curve([5, 11], [1, 100], [1, 1], np.array([10.0])), [1])
    with pytest.raises(TransferError, match="no episode ended within 10 steps"):
        learning_curve([11], [1], [1], np.array([10.0]))


def test_step_grid():
    np.testing.assert_allclose(step_grid(100, 4), [25, 50, 75, 100])
    with pytest.raises(TransferError, match="horizon"):
        step_grid(float("nan"))


# -- scores


def test_transfer_score_by_hand():
    # Areas above -21: target (11 + 31) / 2 = 21, baseline (1 + 11) / 2 = 6; 21 / 6 = 350 %.
    assert transfer_score([-10, 10], [-20, -10], floor=-21) == pytest.approx(350)
    # Seeds are averaged before the ratio: (21 + 7) / 2 over (6 + 8) / 2 = 200 %.
    assert transfer_score([[-10, 10], [-14, -14]], [[-20, -10], [-13, -13]], floor=-21) == pytest.approx(200)


def test_a_curve_against_itself_is_100_percent_and_the_floor_matters():
    curve = np.array([[-19.0, -3, 12]])
    assert transfer_score(curve, curve, floor=-21) == pytest.approx(100)
    with pytest.raises(TransferError, match="floor"):
        transfer_score(curve, curve, floor=0)


def test_top_keeps_the_best_runs_of_both_sides():
    target = [[9.0], [1], [3], [5]]
    baseline = [[2.0], [1], [4], [0]]
    assert transfer_score(target, baseline, floor=0, top=2) == pytest.approx(100 * 7 / 3)
    assert transfer_score(target, baseline, floor=0) == pytest.approx(100 * 4.5 / 1.75)


def test_curves_on_other_grids_are_refused():
    with pytest.raises(TransferError, match="3 points for the target, 2 for the baseline"):
        transfer_score([1, 2, 3], [1, 2], floor=0)


@pytest.mark.parametrize(
    ("curves", "words"), [([1.0, math.nan], "target_curves: expected finite"), ([[[1.0, 2.0]]], r"got \(1, 1, 2\)")]
)
def test_curves_that_are_none_are_refused(curves, words):
    with pytest.raises(TransferError, match=words):
        transfer_score(curves, [1.0, 1.0], floor=0.0)


def test_interval_agrees_with_scipy_and_is_seeded():
    from scipy import stats

    rng = np.random.default_rng(3)
    target, baseline = rng.normal(5, 1, (12, 4)), rng.normal(3, 1, (15, 4))
    found = transfer_interval(target, baseline, floor=0, num_resamples=4000, seed=1)
    assert found == transfer_interval(target, baseline, floor=0, num_resamples=4000, seed=1)
    reference = stats.bootstrap(
        (target.mean(1), baseline.mean(1)),
        lambda a, b, axis: 100 * a.mean(axis) / b.mean(axis),
        paired=False,
        vectorized=True,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert found.low < found.value < found.high
    assert found.low == pytest.approx(reference.low, rel=0.02)
    assert found.high == pytest.approx(reference.high, rel=0.02)


def test_one_seed_has_no_interval():
    interval = transfer_interval([5.0], [2.0], floor=0)
    assert interval.value == pytest.approx(250)
    assert np.isnan([interval.low, interval.high]).all()


def test_interquartile_mean():
    assert interquartile_mean([0, 10, 20, 1000]) == pytest.approx(15)


def test_forward_transfer_by_hand():
    # Normalised to [0, 1] over 42: area 0.75, baseline 0.5: (0.75 - 0.5) / (1 - 0.5) = 0.5.
    assert forward_transfer([10.5, 10.5], [0, 0], floor=-21, ceiling=21) == pytest.approx(0.5)
    assert forward_transfer([0.0], [0.0], floor=-21, ceiling=21) == 0
    with pytest.raises(TransferError, match="nothing is left to gain"):
        forward_transfer([21.0], [21.0], floor=-21, ceiling=21)


def test_forgetting_by_hand():
    performance = [[10, 0, 0], [8, 20, 0], [3, 21, 5]]
    np.testing.assert_allclose(forgetting(performance), [7, -1])


def test_known_floors():
    assert known_floor("rllib_pnn/PongSoup-v0", {"variant": "noisy"}).value == -21
    assert known_floor("rllib_pnn/Atari-v0", {"game": "pong"}).value == -21
    assert known_floor("rllib_pnn/Atari-v0", {"game": "road_runner"}).value == 11.5
    assert known_floor("rllib_pnn/Atari-v0", {}).value == -21  # its game is Pong by default
    assert known_floor("rllib_pnn/Labyrinth-v0", {"level": "avoid_1"}).value == -18
    assert known_floor("rllib_pnn/Labyrinth-v0", {}).value == 0
    assert known_floor("rllib_pnn/Labyrinth-v0", {"level": ["odd"]}) is None
    assert known_floor("MyCartPole-v0", {}) is None
    assert known_floor("CartPole-v1", {"sutton_barto_reward": True}) is None  # returns are at most 0


def test_known_ceilings():
    assert known_ceiling("rllib_pnn/Atari-v0", {}) == 21
    assert known_ceiling("rllib_pnn/Atari-v0", {"game": "hero"}) is None
    assert known_ceiling("rllib_pnn/CartPoleSoup-v0", {"variant": "plain"}) == 500
    assert known_ceiling("rllib_pnn/CartPoleSoup-v0", {"max_episode_steps": 200}) == 200
    assert known_ceiling("rllib_pnn/CartPoleSoup-v0", {"max_episode_steps": "odd"}) is None


def test_what_is_known_of_labyrinth_is_what_its_levels_hold():
    returns = {
        "track_1": (0, 16),
        "track_2": (0, 22),
        "track_3": (0, 7),
        "track_4": (0, 7),
        "avoid_1": (-18, 18),
        "avoid_2": (-18, 18),
        "maze_m": (0, 6),
        "maze_y": (0, 6),
    }
    assert returns.keys() == LEVELS.keys()
    for name, (lowest, highest) in returns.items():
        env, config = "rllib_pnn/Labyrinth-v0", {"level": name}
        assert known_ceiling(env, config) == highest
        assert f"{known_floor(env, config).value:g}" == str(lowest)  # no -0
        rewards = [ITEMS[item.kind][0] for item in LEVELS[name].items]
        rewards += [ITEMS[kind][0] for flip in LEVELS[name].flips for kind in (flip.good, flip.bad)]
        assert (sum(min(r, 0) for r in rewards), sum(max(r, 0) for r in rewards)) == (lowest, highest)


# -- run folders


def test_reading_a_run(tmp_path):
    run = read_run(
        write_run(
            tmp_path / "a",
            {"pong": [(100, -20, 2), (200, -10, 2)], "h_flip": flat(-5)},
            column_results={"pong": (-8.0, -9.0)},
            seed=7,
        )
    )
    pong, h_flip = run.tasks
    assert (pong.method, pong.source, pong.seed) == ("scratch", "", 7)
    assert (h_flip.method, h_flip.source, h_flip.sources) == ("progressive_2", "pong", ("pong",))
    np.testing.assert_allclose(pong.return_sums, [-40, -20])
    np.testing.assert_allclose(h_flip.steps, [100, 200, 300, 400])
    assert not pong.smoothed and pong.finished and not pong.ended_by_return
    assert run.column_results[0].forgetting == pytest.approx(1.0)


def test_the_csv_serves_where_the_json_is_missing(tmp_path):
    curves = {"pong": [(100, -20, 2), (200, -10, 3)]}
    by_json = read_run(write_run(tmp_path / "json", curves, formats=["json"])).tasks[0]
    by_csv = read_run(write_run(tmp_path / "csv", curves, formats=["csv"])).tasks[0]
    for name in ("steps", "return_sums", "episodes"):
        np.testing.assert_allclose(getattr(by_csv, name), getattr(by_json, name))
    assert by_csv.finished and by_csv.task == "pong"


def test_a_run_without_episode_sums_is_read_from_its_running_average(tmp_path):
    task = read_run(write_run(tmp_path / "a", {"pong": [(100, -20, 2), (200, -10, 0)]}, smoothed=True)).tasks[0]
    assert task.smoothed
    np.testing.assert_allclose(task.steps, [100])  # no episode ended in the second iteration


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("scratch", ("scratch", ())),
        ("random_column", ("random_column", ())),
        ("finetune_heads", ("finetune_heads", ("noisy",))),
        ("finetune_all", ("finetune_all", ("noisy",))),
        ("progressive", ("progressive_3", ("pong", "noisy"))),
    ],
)
def test_sources_of_each_architecture(tmp_path, architecture, expected):
    curves = {"pong": flat(0), "noisy": flat(0)}
    origin = write_run(tmp_path / "source", curves, manifest_tasks=["pong", "noisy"])
    run = read_run(write_run(tmp_path / "a", {"zoom": flat(0)}, architecture=architecture, columns_from=str(origin)))
    assert (run.tasks[0].method, run.tasks[0].sources) == expected


def test_the_end_of_a_task_is_known_before_the_end_of_the_run(tmp_path):
    run = read_run(write_run(tmp_path / "a", {"pong": flat(0), "zoom": flat(0)}, until={"num_env_steps": 900}))
    assert [task.ended_by_return for task in run.tasks] == [True, True]
    run = read_run(write_run(tmp_path / "b", {"pong": flat(0)}, until={"num_env_steps": 900}, finished=False))
    assert not run.tasks[0].finished


def test_steps_in_which_no_episode_ended_count(tmp_path):
    until = {"episode_return_mean": 18, "num_env_steps": 900}
    points = [(300, -20, 2), (600, -18, 2), (910, -18, 0)]
    (task,) = read_run(write_run(tmp_path / "a", {"pong": points}, until=until)).tasks
    assert task.finished and not task.ended_by_return
    assert task.last_step == 910
    np.testing.assert_allclose(task.steps, [300, 600])
    # Areas are taken over what the agent learned from, and the run is no shorter than the others.
    write_run(tmp_path / "b", {"pong": flat(-15, (300, 600, 910))}, until=until)
    (table,) = transfer_tables(read_runs([tmp_path])[0])
    assert table.targets[0].grid[-1] == 910 and table.notes == ()


def test_an_ordinary_rllib_run_is_one_curve(tmp_path):
    path = write_run(tmp_path / "a", {"pong": flat(5)})
    (path / "experiment.json").write_text('{"name": "plain", "run": "PPO", "env": "CartPole-v1", "progressive": null}')
    lines = [json.loads(line) for line in (path / "result.json").read_text().splitlines()]
    for line in lines:
        del line["progressive"], line["columns"]
    (path / "result.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (task,) = read_run(path).tasks
    assert (task.task, task.method, task.env, task.smoothed) == ("plain", "scratch", "CartPole-v1", True)
    np.testing.assert_allclose(task.steps, [100, 200, 300, 400])


def test_sources_survive_a_move(tmp_path):
    path = write_run(tmp_path / "a", {"zoom": flat(0)}, columns_from="/gone/columns", manifest_tasks=["pong", "zoom"])
    assert read_run(path).tasks[0].sources == ("pong",)


def test_rows_that_a_resume_took_back_are_dropped(tmp_path):
    path = write_run(tmp_path / "a", {"pong": flat(-20)}, formats=["json"])
    lines = (path / "result.json").read_text().splitlines()
    again = json.loads(lines[2])
    again["progressive"]["episode_return_sum"] = 5.0
    (path / "result.json").write_text("\n".join([*lines, json.dumps(again)]) + "\n")
    np.testing.assert_allclose(read_run(path).tasks[0].return_sums, [-20, -20, 5])


def test_a_line_cut_short_by_a_kill_is_left_out_and_told(tmp_path):
    path = write_run(tmp_path / "a", {"pong": flat(-20)}, formats=["json"])
    file = path / "result.json"
    whole = file.read_text()
    file.write_text(whole[:-40])
    run = read_run(path)
    assert len(run.tasks[0].steps) == 3
    assert "result.json: the last line is incomplete" in run.notes[0]
    # The resumed trial appends to that half line.
    file.write_text(whole[:-40] + whole.splitlines()[-1] + "\n")
    assert len(read_run(path).tasks[0].steps) == 4


def test_a_csv_line_cut_short_is_left_out_and_told(tmp_path):
    path = write_run(tmp_path / "a", {"pong": flat(-20)}, formats=["csv"])
    file = path / "progress.csv"
    file.write_text(file.read_text()[:-8])
    run = read_run(path)
    assert len(run.tasks[0].steps) == 3 and "incomplete" in run.notes[0]


DAMAGE = {
    "result.json": ["not json\n{}\n", "[1, 2]\n[3]\n", "\udcff", "{\n", '{"training_iteration": 1}\nzzz\n{}\n'],
    "experiment.json": ["", "{", "[]", '{"env": 3}', '{"env": "E", "progressive": 3}', '{"env": "E", "progressive": '
    '{"architecture": "progresive"}}', '{"env": "E", "progressive": {"tasks": [1]}}', '{"env": "E", "progressive": '
    '{"tasks": [{"name": "pong", "until": 3}]}}'],
    "columns/manifest.json": ["", "3", "{}", '{"columns": {}}', '{"columns": [3]}'],
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in DAMAGE.items() for text in texts])
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, name, text):
    path = write_run(tmp_path / "a", {"pong": flat(-20)}, manifest_tasks=["pong"])
    (path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RunError) as caught:
        read_run(path)
    assert str(path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_csv_is_one_line_that_names_it(tmp_path):
    path = write_run(tmp_path / "a", {"pong": flat(-20)}, formats=["csv"])
    for text in ("", "a,b\n1,2\n", "training_iteration,b\n1\n2,3\n", "training_iteration\n\0\n", "x\n"):
        (path / "progress.csv").write_text(text)
        with pytest.raises(RunError, match=r"^\S*(progress\.csv|result\.json): [^\n]+$"):
            read_run(path)


def test_missing_folders_and_files(tmp_path):
    with pytest.raises(RunError, match="no such folder"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(RunError, match=r"no experiment\.json here or below"):
        find_runs([tmp_path])
    path = write_run(tmp_path / "a", {"pong": flat(-20)})
    (path / "experiment.json").unlink()
    with pytest.raises(RunError, match=r"experiment\.json: no such file"):
        read_run(path)


def test_a_run_that_is_named_twice_counts_once(tmp_path, monkeypatch):
    run = write_run(tmp_path / "runs" / "a", {"pong": flat(-20)})
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    assert find_runs(["runs", tmp_path / "runs", run, tmp_path / "link"]) == [Path("runs/a")]


def test_one_damaged_run_does_not_hide_the_others(tmp_path):
    write_run(tmp_path / "trials" / "good", {"pong": flat(-20)})
    bad = write_run(tmp_path / "trials" / "bad", {"pong": flat(-20)})
    (bad / "experiment.json").write_text("{")
    runs, problems = read_runs([tmp_path / "trials"])
    assert [run.name for run in runs] == ["good"]
    assert len(problems) == 1 and str(bad) in problems[0]
    with pytest.raises(RunError, match="bad"):
        read_runs([bad])


# -- tables


@pytest.fixture
def experiment(tmp_path):
    """Pong -> h_flip and zoom. Heights above -21: scratch 10 and 20; progressive 20 and 30; heads 5 (h_flip only)."""
    for seed, wobble in enumerate((-1, 1)):
        for target, scratch, progressive in (("h_flip", -11, -1), ("zoom", -1, 9)):
            write_run(
                tmp_path / f"scratch_{target}_{seed}",
                {target: flat(scratch + wobble)},
                architecture="scratch",
                seed=seed,
            )
            write_run(
                tmp_path / f"progressive_{target}_{seed}",
                {target: flat(progressive + wobble)},
                source_tasks=["pong"],
                seed=seed,
            )
    write_run(tmp_path / "heads", {"h_flip": flat(-16)}, architecture="finetune_heads", source_tasks=["pong"], seed=0)
    return tmp_path


def test_table_by_hand(experiment):
    (table,) = transfer_tables(read_runs([experiment])[0])
    assert table.suite == "Pong Soup"
    assert [row.method for row in table.rows] == ["scratch", "finetune_heads", "progressive_2"]
    progressive = table.row("progressive_2")
    assert {cell.target: cell.score.value for cell in progressive.cells} == pytest.approx({"h_flip": 200, "zoom": 150})
    assert progressive.mean.value == pytest.approx(175)
    assert progressive.median.value == pytest.approx(175)
    # Seed scores 190, 210, 145, 155: the middle half is 155 and 190.
    assert progressive.iqm.value == pytest.approx(172.5)
    assert progressive.paper == (209, 169)
    assert progressive.mean.low < 175 < progressive.mean.high
    cell = progressive.cells[0]
    assert sorted(cell.seed_scores) == pytest.approx([190, 210])
    assert cell.mean_return == pytest.approx(-1)
    assert table.row("finetune_heads").mean.value == pytest.approx(50)
    assert table.row("scratch").mean.value == pytest.approx(100)
    json.dumps(table.to_json(), allow_nan=False)


def test_matrix(experiment):
    (table,) = transfer_tables(read_runs([experiment])[0])
    sources, targets, scores = table.matrix("progressive_2")
    assert sources == ["pong"] and sorted(targets) == ["h_flip", "zoom"]
    assert scores[0, targets.index("zoom")] == pytest.approx(150)


def test_top_seeds_with_all_seeds_beside(experiment):
    (table,) = transfer_tables(read_runs([experiment])[0], top=1)
    cell = next(c for c in table.row("progressive_2").cells if c.target == "h_flip")
    assert cell.score.value == pytest.approx(100 * 21 / 11)
    assert len(cell.seed_scores) == 2


@pytest.mark.parametrize("top", [1, 2, 3])
def test_the_iqm_is_over_all_seeds_of_both_sides_whatever_top_is(tmp_path, top):
    # Areas above -21, alike on both sides: 1, 2, 3, 14, a mean of 5. Scores 20, 40, 60, 280, the middle half 40 and 60.
    for seed, level in enumerate((-20, -19, -18, -7)):
        write_run(tmp_path / f"s{seed}", {"zoom": flat(level)}, architecture="scratch", seed=seed)
        write_run(tmp_path / f"p{seed}", {"zoom": flat(level)}, source_tasks=["pong"], seed=seed)
    runs = read_runs([tmp_path])[0]
    (every,), (best,) = transfer_tables(runs), transfer_tables(runs, top=top)
    for row in best.rows:
        assert row.mean.value == pytest.approx(100)
        assert row.iqm.value == pytest.approx(50)
        assert row.iqm == every.row(row.method).iqm
        assert sorted(row.cells[0].seed_scores) == pytest.approx([20, 40, 60, 280])


def test_a_baseline_that_only_its_best_seeds_lift_above_the_floor_gives_no_iqm(tmp_path):
    atari = {"env": "rllib_pnn/Atari-v0", "env_configs": {"gopher": {"game": "gopher"}}}
    for seed, level in enumerate((57.6, 157.6, 267.6)):  # -200, -100 and 10 from the floor
        write_run(tmp_path / f"s{seed}", {"gopher": flat(level)}, architecture="scratch", seed=seed, **atari)
    write_run(tmp_path / "p", {"gopher": flat(277.6)}, source_tasks=["pong"], **atari)
    (table,) = transfer_tables(read_runs([tmp_path])[0], top=1)
    row = table.row("progressive_2")
    assert row.mean.value == pytest.approx(200)
    assert np.isnan(row.iqm).all() and row.cells[0].seed_scores == () and row.num_seeds == 1
    assert any("gopher: not in the IQM" in note for note in table.notes)
    json.dumps(table.to_json(), allow_nan=False)


def test_floor_can_be_given(experiment):
    (table,) = transfer_tables(read_runs([experiment])[0], floor={"h_flip": -31})
    scores = {cell.target: cell.score.value for cell in table.row("progressive_2").cells}
    assert scores == pytest.approx({"h_flip": 150, "zoom": 150})


def test_no_floor_no_baseline_no_score_but_curves(tmp_path):
    write_run(tmp_path / "a", {"track_1": flat(3), "track_2": flat(4)}, env="Strange-v0")
    write_run(tmp_path / "b", {"zoom": flat(3)}, source_tasks=["pong"])
    strange, pong = transfer_tables(read_runs([tmp_path])[0])
    assert strange.rows == () and pong.rows == ()
    assert len(strange.targets) == 2
    assert any("floor is not known" in note for note in strange.notes)
    assert any("no scratch run" in note for note in pong.notes)


def test_labyrinth_has_the_papers_column_of_table_1(tmp_path):
    write_run(tmp_path / "a", {"track_2": flat(4)}, env="rllib_pnn/Labyrinth-v0", architecture="scratch")
    write_run(tmp_path / "b", {"track_2": flat(6)}, env="rllib_pnn/Labyrinth-v0", source_tasks=["track_1"])
    (table,) = transfer_tables(read_runs([tmp_path])[0])
    row = table.row("progressive_2")
    # `write_run` gives the level's name as `variant`: the default level's floor is 0, too.
    assert (row.mean.value, row.paper) == (pytest.approx(150), (491, 115))


def test_runs_that_are_not_alike_are_told(tmp_path):
    paths = [
        write_run(tmp_path / "a", {"zoom": flat(-11)}, architecture="scratch"),
        write_run(tmp_path / "b", {"zoom": flat(-1)}, source_tasks=["pong"]),
    ]
    assert transfer_tables(read_runs(paths)[0])[0].notes == ()
    file = paths[1] / "experiment.json"
    file.write_text(
        file.read_text().replace('"PPO"', '"A3C"').replace('"variant": "zoom"', '"variant": "zoom", "x": 1')
    )
    notes = transfer_tables(read_runs(paths)[0])[0].notes
    assert any("zoom: runs of different algorithms (A3C, PPO)" in note for note in notes)
    assert any("zoom: runs with 2 different env_configs" in note for note in notes)


def test_columns_without_laterals_are_scratch(tmp_path):
    path = write_run(tmp_path / "a", {"pong": flat(-20), "zoom": flat(-11)})
    file = path / "experiment.json"
    experiment = json.loads(file.read_text())
    experiment["progressive"]["lateral"] = "none"
    file.write_text(json.dumps(experiment))
    assert [(task.method, task.sources) for task in read_run(path).tasks] == [("scratch", ())] * 2


def test_a_run_that_ended_by_its_return_holds_it_and_a_short_one_is_left_out(tmp_path):
    until = {"episode_return_mean": 18, "num_env_steps": 800}
    write_run(tmp_path / "slow", {"zoom": flat(-11, (200, 400, 600, 800))}, architecture="scratch", until=until)
    write_run(tmp_path / "fast", {"zoom": [(200, -1, 1), (390, 19, 1)]}, source_tasks=["pong"], until=until)
    write_run(
        tmp_path / "dead", {"zoom": flat(-21, (100,))}, source_tasks=["pong"], until=until, finished=False, seed=1
    )
    (table,) = transfer_tables(read_runs([tmp_path])[0], num_points=4)
    np.testing.assert_allclose(table.targets[0].curves["progressive_2", "pong"], [[-1, 19, 19, 19]])
    assert table.row("progressive_2").mean.value == pytest.approx(350)  # (20 + 3 * 40) / 4 = 35 over 10
    assert any("dead" in note and "100 of 800 steps" in note for note in table.notes)


def test_scores_do_not_depend_on_the_order_of_the_runs(experiment):
    runs = read_runs([experiment])[0]
    forward, backward = transfer_tables(runs)[0], transfer_tables(runs[::-1])[0]
    assert forward.row("progressive_2").mean.value == pytest.approx(backward.row("progressive_2").mean.value)


def test_transfer_imports_neither_torch_nor_ray():
    code = (
        "import sys, rllib_pnn.analysis.transfer, rllib_pnn.analysis.runs; print({'torch', 'ray'} & set(sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "set()"
    )


def test_the_papers_table_has_every_method_label():
    for suite in transfer.PAPER_TABLE_1.values():
        assert all(transfer.method_label(method) != method for method in suite)


# -- trials of a transfer experiment -----------------------------------------------------------------------------------


def as_trial(path, **trial):
    experiment = json.loads((path / "experiment.json").read_text())
    (path / "experiment.json").write_text(json.dumps({**experiment, "trial": {"role": "target", **trial}}))
    return path


def test_runs_that_only_train_a_source_are_not_scored(tmp_path):
    write_run(tmp_path / "a", {"pong": [(100, -11.0, 1)]}, architecture="scratch")
    as_trial(write_run(tmp_path / "b", {"pong": [(100, 19.0, 1)]}, architecture="progressive"), role="source")
    runs, _ = read_runs([tmp_path])
    assert [task.is_source for run in runs for task in run.tasks] == [False, True]
    (table,) = transfer_tables(runs)
    (target,) = table.targets
    assert [len(curves) for curves in target.curves.values()] == [1]
    assert np.allclose(target.curves["scratch", ""], -11.0)


def test_what_a_trial_drew(tmp_path):
    path = as_trial(write_run(tmp_path / "a", {"pong": [(100, 1.0, 1)]}), searched={"lr": 0.001}, top=3)
    (task,) = read_run(path).tasks
    assert (task.searched, task.top) == ({"lr": 0.001}, 3)
    (tmp_path / "a" / "experiment.json").write_text(
        (tmp_path / "a" / "experiment.json").read_text().replace('{"lr": 0.001}', "[1]")
    )
    with pytest.raises(RunError, match=r"experiment\.json: trial\.searched: expected a mapping"):
        read_run(path)


def test_trials_that_wait_are_one_line(tmp_path):
    write_run(tmp_path / "g" / "a", {"pong": [(100, 1.0, 1)]})
    for name in ("b", "c"):
        as_trial(write_run(tmp_path / "g" / name, {"pong": [(100, 1.0, 1)]}))
        for file in ("result.json", "progress.csv"):
            (tmp_path / "g" / name / file).unlink()
    runs, problems = read_runs([tmp_path])
    assert [run.name for run in runs] == ["a"]
    assert problems == [f"{tmp_path / 'g'}: 2 trials have no result yet"]
