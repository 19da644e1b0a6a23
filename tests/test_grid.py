"""Transfer experiments as data: which trials a file makes, what each says, and the folder that they share."""

import json
from pathlib import Path

import pytest

from rllib_pnn.experiment.errors import InputError
from rllib_pnn.experiment.folder import (
    RunFolder,
    check_transfer,
    make_folder,
    open_transfer,
    read_plan,
    transfer_folder,
)
from rllib_pnn.experiment.grid import Trial, grid_of
from rllib_pnn.experiment.spec import Experiment, Plan, choose, load_experiment, load_plans

FILE = """\
soup:
  run: PPO
  env: rllib_pnn/CartPoleSoup-v0
  num_samples: 2
  config: {lr: 1e-3, vf_clip_param: .inf, seed: 5}
  progressive:
    column: mlp
    tasks:
      - {name: plain, env_config: {variant: plain}, until: {episode_return_mean: 450, num_env_steps: 9000}}
      - {name: flipped, env_config: {variant: flipped}, until: {num_env_steps: 8000}}
      - {name: scaled, env_config: {variant: scaled}, until: {num_env_steps: 7000}}
  transfer:
    sources: [plain, [plain, flipped]]
    targets: [flipped, scaled]
"""


def plan_of(text: str, folder: Path) -> Plan:
    (folder / "file.yaml").write_text(text)
    (plan,) = load_plans(folder / "file.yaml")
    return plan


def changed(old: str, new: str) -> str:
    assert FILE.count(old) == 1
    return FILE.replace(old, new)


def test_every_trial_once_and_behind_the_one_that_it_waits_for() -> None:
    trials = grid_of([["a"], ["a", "b"], ["c", "a", "b"]], ["b", "d"], ["scratch", "finetune_all", "progressive"])
    assert [trial.name for trial in trials] == [
        "source_a",
        "source_c",
        "source_a+b",
        "source_c+a",
        "source_c+a+b",
        "b_scratch",
        "a_to_b_finetune_all",
        "a_to_b_progressive",
        "d_scratch",
        "a_to_d_finetune_all",
        "a_to_d_progressive",
        "a+b_to_d_progressive",
        "c+a+b_to_d_progressive",
    ]
    names = [trial.name for trial in trials]
    for trial in trials:
        assert trial.waits_for is None or names.index(trial.waits_for) < names.index(trial.name)
    assert trials[4] == Trial("source_c+a+b", "source", "b", "progressive", ("c", "a"), "source_c+a")
    assert trials[-1] == Trial("c+a+b_to_d_progressive", "target", "d", "progressive", ("c", "a", "b"), "source_c+a+b")


def test_sources_that_serve_nothing_are_not_trained() -> None:
    trials = grid_of([["a"], ["b"], ["a", "b"]], ["a"], ["scratch", "random_column", "finetune_heads"])
    assert [trial.name for trial in trials] == ["source_b", "a_scratch", "a_random_column", "b_to_a_finetune_heads"]
    trials = grid_of([["b"]], ["a"], ["scratch", "random_column"])
    assert [trial.name for trial in trials] == ["a_scratch", "a_random_column"]


def test_what_the_trials_of_a_file_say(tmp_path: Path) -> None:
    plan = plan_of(FILE, tmp_path)
    assert plan.is_transfer
    assert [name for name in plan.runs if name.startswith("source_")] == [
        "source_plain_seed_5",
        "source_plain+flipped_seed_5",
    ]
    # flipped: scratch, random and three from plain; scaled: the same and the chain. Two seeds each.
    assert len(plan.runs) == 2 + 2 * (5 + 6)

    def said(name: str) -> tuple:
        experiment = plan.runs[name]
        progressive, trial = experiment.progressive, experiment.trial
        (task,) = progressive.tasks
        return experiment.seed, progressive.architecture, progressive.source_tasks, trial.source_run, task.name

    assert said("source_plain_seed_5") == (5, "progressive", [], None, "plain")
    assert said("source_plain+flipped_seed_5") == (5, "progressive", ["plain"], "source_plain_seed_5", "flipped")
    assert said("scaled_random_column_seed_6") == (6, "random_column", [], None, "scaled")
    assert said("plain_to_scaled_finetune_heads_seed_6") == (
        6, "finetune_heads", ["plain"], "source_plain_seed_5", "scaled"
    )  # fmt: skip
    assert said("plain+flipped_to_scaled_progressive_seed_6") == (
        6, "progressive", ["plain", "flipped"], "source_plain+flipped_seed_5", "scaled"
    )  # fmt: skip
    assert plan.runs["plain_to_scaled_progressive_seed_5"].trial.sensitivity == ["afs"]
    assert plan.runs["plain_to_scaled_progressive_seed_6"].trial.sensitivity == []
    assert plan.runs["scaled_scratch_seed_5"].trial.sensitivity == []


def test_the_same_budget_for_all_architectures(tmp_path: Path) -> None:
    plan = plan_of(FILE + "    until: {num_env_steps: 3000}\n", tmp_path)
    budgets = {name: e.progressive.tasks[0].until for name, e in plan.runs.items()}
    for name, until in budgets.items():
        if name == "source_plain_seed_5":
            assert (until.episode_return_mean, until.num_env_steps) == (450, 9000)
        elif name.startswith("source_"):
            assert until.num_env_steps == 8000
        else:
            assert (until.episode_return_mean, until.num_env_steps) == (None, 3000)
    own = plan_of(FILE, tmp_path).runs
    assert {e.progressive.tasks[0].until.num_env_steps for n, e in own.items() if "scaled" in n} == {7000}


def test_a_source_for_each_seed(tmp_path: Path) -> None:
    plan = plan_of(FILE + "    sources_per_seed: true\n", tmp_path)
    assert {name for name in plan.runs if name.startswith("source_plain_")} == {
        "source_plain_seed_5",
        "source_plain_seed_6",
    }
    assert plan.runs["source_plain+flipped_seed_6"].trial.source_run == "source_plain_seed_6"
    assert plan.runs["plain_to_scaled_progressive_seed_6"].trial.source_run == "source_plain_seed_6"


def test_random_search(tmp_path: Path) -> None:
    text = changed("lr: 1e-3", "lr: {choice: [1e-3, 5e-4, 1e-4]}").replace("num_samples: 2", "num_samples: 25")
    text = text.replace("column: mlp", "column: mlp\n    lateral_scale: {choice: [1, 0.1, 0.01]}") + "    top: 3\n"
    plan = plan_of(text, tmp_path)
    drawn = {name: e.trial.searched for name, e in plan.runs.items()}
    # Sources serve all jobs and take the first values; job i draws the same whatever the architecture.
    assert drawn["source_plain_seed_5"] == {"lr": 1e-3, "lateral_scale": 1}
    jobs = [drawn[f"plain_to_scaled_progressive_seed_{seed}"] for seed in range(5, 30)]
    assert jobs == [drawn[f"scaled_scratch_seed_{seed}"] for seed in range(5, 30)]
    assert {job["lr"] for job in jobs} == {1e-3, 5e-4, 1e-4} and {job["lateral_scale"] for job in jobs} == {
        1,
        0.1,
        0.01,
    }
    for name, experiment in plan.runs.items():
        assert experiment.config["lr"] == drawn[name]["lr"]
        assert experiment.progressive.lateral_scale == drawn[name]["lateral_scale"]
        assert experiment.trial.top == 3
    assert {n: e.trial.searched for n, e in plan_of(text, tmp_path).runs.items()} == drawn


def test_chosen_trials(tmp_path: Path) -> None:
    plan = plan_of(FILE, tmp_path)
    (chosen,) = choose([plan], ["*_to_flipped_*_seed_6", "scaled_scratch_seed_5"])
    assert list(chosen.chosen) == [
        "plain_to_flipped_finetune_heads_seed_6",
        "plain_to_flipped_finetune_all_seed_6",
        "plain_to_flipped_progressive_seed_6",
        "scaled_scratch_seed_5",
    ]
    assert chosen.runs == plan.runs and not plan.chosen
    assert chosen.command(tmp_path / "runs" / "soup") == (
        f"rllib train -f {tmp_path}/file.yaml --storage {tmp_path}/runs "
        "--only '*_to_flipped_*_seed_6' --only scaled_scratch_seed_5"
    )


def test_chosen_trials_of_a_file_of_several_experiments(tmp_path: Path) -> None:
    text = FILE + FILE.replace("soup:", "other:").replace("seed: 5", "seed: 7") + "plain:\n  run: PPO\n  env: E\n"
    (tmp_path / "file.yaml").write_text(text)
    plans = load_plans(tmp_path / "file.yaml")
    (other,) = choose(plans, ["*_seed_8"])
    assert other.name == "other"
    assert [plan.name for plan in choose(plans, ["*_seed_8", "*_seed_5"])] == ["soup", "other"]


def test_a_trial_reads_back(tmp_path: Path) -> None:
    experiment = plan_of(FILE, tmp_path).runs["plain+flipped_to_scaled_progressive_seed_6"]
    (tmp_path / "experiment.json").write_text(json.dumps(experiment.model_dump(mode="json")))
    assert load_experiment(tmp_path / "experiment.json")[1] == experiment


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("sources:", "sorces:", ["file.yaml:13", "soup.transfer.sorces", "did you mean 'sources'?"]),
        ("[plain, [plain", "[plane, [plain", ["file.yaml:13", "sources[0]", "'plane'", "mean 'plain'?"]),
        ("[plain, flipped]]", "[plain, fliped]]", ["transfer.sources[1][1]", "'fliped'", "did you mean 'flipped'?"]),
        ("targets: [flipped, scaled]", "targets: [flipped, scald]", ["file.yaml:14", "targets[1]", "mean 'scaled'?"]),
        ("targets: [flipped, scaled]", "targets: []", ["soup.transfer.targets", "expected at least one"]),
        ("targets: [flipped, scaled]", "top: 3", ["soup.transfer.targets", "missing", "a list of tasks' names"]),
        ("targets: [flipped, scaled]", "targets: [scaled, scaled]", ["targets[1]", "there already"]),
        ("[plain, flipped]]", "[plain, plain]]", ["sources[1]", "every task once"]),
        ("sources: [plain, [plain, flipped]]", "top: 1", ["transfer.sources", "missing", "finetune_heads"]),
        ("targets: [flipped, scaled]", "targets: [scaled]\n    architectures: [scrach]", [
            "architectures[0]", "expected progressive, scratch", "did you mean 'scratch'?"]),
        ("targets: [flipped, scaled]", "targets: [scaled]\n    sensitivity: [asf]", ["[0]", "expected afs, aps"]),
        ("targets: [flipped, scaled]", "targets: [scaled]\n    until: {episode_return_mean: 3}", [
            "transfer.until", "num_env_steps", "same budget"]),
        ("until: {num_env_steps: 7000}", "until: {episode_return_mean: 7}", ["targets[1]", "num_env_steps"]),
        ("[plain, [plain, flipped]]", "[[plain, flipped]]", ["architectures[1]", "finetune_heads", "one column"]),
        ("column: mlp", "column: mlp\n    architecture: scratch", ["progressive.architecture", "transfer."]),
        ("column: mlp", "column: mlp\n    columns_from: x", ["progressive.columns_from", "transfer.sources"]),
        ("column: mlp", "column: mlp\n    source_tasks: [x]", ["progressive.source_tasks", "remove it"]),
        ("  num_samples: 2", "  trial: {role: source}\n  num_samples: 2", ["soup.trial", "remove it"]),
        ("lr: 1e-3", "lr: {grid_search: [1, 2]}", ["config.lr.grid_search", "expected choice"]),
        ("seed: 5", "seed: {choice: [1, 2]}", ["config.seed", "can't vary"]),
        ("num_samples: 2", "num_samples: 2000", ["soup.transfer", "makes 22002 trials", "at most 10000"]),
    ],
)  # fmt: skip
def test_mistakes(old: str, new: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        plan_of(changed(old, new), tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    position = 0
    for word in words:
        assert word in message[position:], (word, message)
        position = message.index(word, position)


def test_a_grid_in_which_nothing_is_left(tmp_path: Path) -> None:
    text = changed("[plain, [plain, flipped]]", "[plain]").replace("[flipped, scaled]", "[plain]")
    with pytest.raises(InputError, match="no trial is left"):
        plan_of(text + "    architectures: [progressive]\n", tmp_path)


# -- the folder --------------------------------------------------------------------------------------------------------


def opened(text: str, folder: Path) -> tuple[Path, Plan]:
    plan = plan_of(text, folder)
    path = transfer_folder(folder / "runs", plan)
    check_transfer(path, plan)
    open_transfer(make_folder(path), plan)
    return path, plan


def test_one_folder_whenever_the_file_is_trained(tmp_path: Path) -> None:
    path, plan = opened(FILE, tmp_path)
    assert path == tmp_path / "runs" / "soup" and read_plan(path).runs == list(plan.runs)
    RunFolder(path / "scaled_scratch_seed_5").set_status("finished")
    again, _ = opened(FILE, tmp_path)
    assert again == path and RunFolder(path / "scaled_scratch_seed_5").state.status == "finished"
    assert RunFolder(path / "source_plain_seed_5").experiment == plan.runs["source_plain_seed_5"]


def test_trials_that_are_new_in_the_file_join_and_none_is_lost(tmp_path: Path) -> None:
    path, plan = opened(changed("targets: [flipped, scaled]", "targets: [scaled]"), tmp_path)
    RunFolder(path / "scaled_scratch_seed_5").set_status("finished")
    _, more = opened(changed("targets: [flipped, scaled]", "targets: [flipped]"), tmp_path)
    assert set(read_plan(path).runs) == {*plan.runs, *more.runs}
    assert RunFolder(path / "scaled_scratch_seed_5").state.status == "finished"


def test_other_settings_than_those_of_a_trial_that_was_started(tmp_path: Path) -> None:
    path, _ = opened(FILE, tmp_path)
    opened(changed("lr: 1e-3", "lr: 2e-3"), tmp_path)  # nothing was started yet
    RunFolder(path / "scaled_scratch_seed_5").set_status("stopped")
    with pytest.raises(
        InputError, match=r"scaled_scratch_seed_5: was trained with config\.lr 0\.002, the file says 0\.001"
    ):
        opened(FILE, tmp_path)
    # What the report does with results is no matter of training.
    opened(changed("lr: 1e-3", "lr: 2e-3") + "    top: 1\n    sensitivity: []\n", tmp_path)
    assert RunFolder(path / "scaled_scratch_seed_5").experiment.trial.top == 1


def test_a_folder_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "runs" / "soup").mkdir(parents=True)
    opened(FILE, tmp_path)  # empty: as a kill right after its making leaves it
    other = changed("soup:", "other:")
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "runs" / "other" / "thesis.txt").touch()
    with pytest.raises(InputError, match=r"holds no plan\.json"):
        opened(other, tmp_path)


def test_an_ordinary_experiment_has_no_trial() -> None:
    assert Experiment(name="a", run="PPO", env="E").trial is None
