"""Pictures: that they draw what they were given, and refuse what cannot be drawn. How they look was looked at."""

import numpy as np
import pytest
from run_folders import write_run

from rllib_pnn.analysis import plots
from rllib_pnn.analysis.runs import read_runs
from rllib_pnn.analysis.sensitivity import Sensitivity
from rllib_pnn.analysis.transfer import TransferError, transfer_tables


def flat(level):
    return [(step, level, 1) for step in (100, 200, 300, 400)]


def sensitivity(method="afs", values=((0.25, 0.75), (np.nan, np.nan)), **settings):
    values = np.array(values)
    raw = tuple(tuple(np.ones(1) for _ in row) for row in values)
    names = tuple(f"{i}: dense 4" for i in range(1, len(values) + 1))
    return Sensitivity(method, values.shape[1] - 1, names, values, raw, ("pong", "zoom"), settings=settings)


@pytest.fixture
def table(tmp_path):
    for seed in range(2):
        write_run(tmp_path / f"s{seed}", {"zoom": flat(-11 + seed)}, architecture="scratch", seed=seed)
        write_run(tmp_path / f"p{seed}", {"zoom": flat(-1 + seed)}, source_tasks=["pong"], seed=seed)
    return transfer_tables(read_runs([tmp_path])[0])[0]


def texts(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def test_learning_curves_show_every_run_and_each_methods_mean(table):
    figure = plots.plot_learning_curves(table)
    (axis,) = figure.axes
    ends = sorted(float(line.get_ydata()[-1]) for line in axis.lines)
    # Two runs and a mean for each method, and the floor.
    assert ends == pytest.approx([-21, -11, -10.5, -10, -1, -0.5, 0])
    assert axis.get_title(loc="left") == "zoom  (4 runs)"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["Baseline 1: scratch", "Progressive, 2 columns"]


def test_many_runs_become_a_band(tmp_path):
    for seed in range(10):
        write_run(tmp_path / str(seed), {"zoom": flat(seed)}, architecture="scratch")
    (axis,) = plots.plot_learning_curves(transfer_tables(read_runs([tmp_path])[0])[0]).axes
    assert len(axis.lines) == 2 and len(axis.collections) == 1


@pytest.mark.parametrize(
    ("env", "key", "targets", "shared"),
    [
        ("PongSoup", "variant", ("zoom", "noisy"), True),
        ("Atari", "game", ("hero", "robotank"), False),
        ("Labyrinth", "level", ("track_1", "track_2"), True),
        ("Labyrinth", "level", ("track_1", "avoid_1"), False),
        ("Strange", "level", ("a", "b"), False),  # floors are not known
    ],
)
def test_targets_of_one_floor_share_the_y_axis(tmp_path, env, key, targets, shared):
    configs = {target: {key: target} for target in targets}
    curves = {targets[0]: flat(2000), targets[1]: flat(2)}
    write_run(tmp_path / "a", curves, env=f"rllib_pnn/{env}-v0", env_configs=configs, architecture="scratch")
    first, second = plots.plot_learning_curves(transfer_tables(read_runs([tmp_path])[0])[0]).axes
    assert first.get_shared_y_axes().joined(first, second) == shared
    assert (second.get_ylim()[1] > 1000) == shared


def test_transfer_table_shows_ours_and_the_papers(table):
    (axis,) = plots.plot_transfer_table(table).axes
    single = [line for line in axis.lines if len(line.get_xdata()) == 1]
    points = {(round(float(line.get_xdata()[0]), 3), line.get_marker()) for line in single}
    mean = round(table.row("progressive_2").mean.value, 3)
    assert {(mean, "o"), (mean, "D"), (209, "o"), (169, "D")} <= points


def test_transfer_matrix_shows_the_scores(table):
    figure = plots.plot_transfer_matrix(table)
    assert f"{table.row('progressive_2').mean.value:.0f}" in texts(figure)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["pong"]


@pytest.mark.parametrize("name", ["zoom", "wizard_of_wor", "a_target_with_a_long_name"])
def test_the_bars_label_fits_beside_a_single_row(tmp_path, name):
    write_run(tmp_path / "s", {name: flat(-11)}, architecture="scratch")
    write_run(tmp_path / "p", {name: flat(-1)}, source_tasks=["pong"])
    figure = plots.plot_transfer_matrix(transfer_tables(read_runs([tmp_path])[0])[0])
    plots.png(figure)
    label = figure.axes[-1].yaxis.label.get_window_extent()
    assert label.y0 > 0 and label.y1 < figure.bbox.height


@pytest.mark.filterwarnings("error:constrained_layout not applied")
def test_a_chain_of_eight_tasks_has_its_matrices_side_by_side(tmp_path):
    names = ["pong", "noisy", "black", "white", "zoom", "v_flip", "h_flip", "vh_flip"]
    write_run(tmp_path / "chain", {name: flat(-1) for name in names})
    for name in names:
        write_run(tmp_path / f"scratch_{name}", {name: flat(-11)}, architecture="scratch")
    table = transfer_tables(read_runs([tmp_path])[0])[0]
    figure = plots.plot_transfer_matrix(table)
    figure.draw_without_rendering()
    panels = [axis for axis in figure.axes if axis.get_title(loc="left")]
    assert len(panels) == 7
    for axis in panels:  # no source's name reaches into a panel beside it
        others = [other.get_window_extent() for other in panels if other is not axis]
        for label in axis.get_yticklabels():
            assert not any(label.get_window_extent().overlaps(box) for box in others)
    methods = [row.method for row in table.rows]
    assert len({plots._colour(method) for method in methods}) == len(methods) == 8


def test_a_suite_without_scores_is_refused_in_one_line(tmp_path):
    write_run(tmp_path / "a", {"track_1": flat(3)}, env="Strange-v0")
    table = transfer_tables(read_runs([tmp_path])[0])[0]
    plots.plot_learning_curves(table)
    for draw in (plots.plot_transfer_table, plots.plot_transfer_matrix):
        with pytest.raises(TransferError, match="floor is not known"):
            draw(table)


def test_a_run_of_several_tasks(tmp_path):
    write_run(tmp_path / "a", {"pong": flat(1), "zoom": flat(2)})
    figure = plots.plot_run(read_runs([tmp_path])[0][0])
    assert texts(figure) == ["pong", "zoom"]
    assert figure.axes[0].get_xlim() == (0, 800)


def test_sensitivities_are_written_into_the_boxes():
    figure = plots.plot_sensitivity([sensitivity(), sensitivity("aps", ((0.1, 0.9), (0.5, 0.5)))])
    shown = texts(figure)
    assert {"0.25", "0.75", "–", "0.10", "0.90", "0.50"} <= set(shown)
    assert shown.count("1: dense 4") == 1
    assert shown.count("column 1\nzoom") == 2
    darkness = {}
    for patch in figure.axes[1].patches:
        x, y = patch.get_x() + patch.get_width() / 2, patch.get_y() + patch.get_height() / 2
        darkness[round(x), round(y)] = sum(patch.get_facecolor()[:3])
    assert darkness[1, 1] < darkness[0, 2] < darkness[0, 1]


def test_only_existing_laterals_are_drawn():
    def arrows(**settings):
        axis = plots.plot_sensitivity([sensitivity(**settings)]).axes[0]
        return sum(getattr(text, "arrow_patch", None) is not None for text in axis.texts)

    # 4 up the columns, 1 to the policy, then the laterals into layer 2 and the policy.
    assert arrows() == 7
    assert arrows(laterals=[[], ["2", "value"]]) == 6
    assert arrows(laterals=[[], []]) == 5


def test_filters():
    weights = np.arange(2 * 3 * 3, dtype=float).reshape(2, 3, 3).tolist()
    figure = plots.plot_filters([[{"weights": weights, "feature": 0, "share": 0.4}], []], ["pong", "zoom"])
    assert "40%" in texts(figure)
    with pytest.raises(ValueError, match="no convolution"):
        plots.plot_filters([[], []])


def test_equal_data_gives_equal_bytes(table, tmp_path):
    first, second = (plots.png(plots.plot_transfer_matrix(table)) for _ in range(2))
    assert first == second
    assert plots.save(plots.plot_transfer_matrix(table), tmp_path / "new" / "m.png").read_bytes() == first
