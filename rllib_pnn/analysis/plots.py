"""Pictures of what runs learned and where. matplotlib on its file backend, neither torch nor Ray.

Every function returns a `Figure`; `save` and `png` turn it into a file or bytes. Colours are Okabe and Ito's, which
colour-blind readers can tell apart; a method has the same colour in every picture.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, TwoSlopeNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rllib_pnn.analysis.runs import Run
from rllib_pnn.analysis.sensitivity import Sensitivity
from rllib_pnn.analysis.transfer import (
    Interval,
    TargetCurves,
    TransferError,
    TransferTable,
    learning_curve,
    method_label,
    method_order,
    step_grid,
)
from rllib_pnn.files import write_whole

DPI = 144
INK = "#222222"
GREY = "#767676"

_COLOURS = {
    "scratch": "#444444",
    "finetune_heads": "#D55E00",
    "finetune_all": "#E69F00",
    "random_column": "#56B4E9",
    "progressive_2": "#009E73",
    "progressive_3": "#0072B2",
    "progressive_4": "#CC79A7",
}
_WIDE, _HIGH = 0.74, 0.52  # a layer's box; columns and layers are 1 apart
_NAMES = 1.25  # room for the layers' names
_MANY_RUNS = 10  # from here on single curves hide one another, and a band shows their spread


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure as PNG; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, png(figure))
    return path


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    for text in figure.findobj(Text):
        # Names come from somebody's files: a dollar is no formula, and fonts know no control characters.
        text.set_parse_math(False)
        text.set_text("".join(c if c.isprintable() or c == "\n" else "?" for c in text.get_text()))
    buffer = io.BytesIO()
    # No date and no version inside: equal data gives equal bytes.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def plot_learning_curves(table: TransferTable) -> Figure:
    """One panel a target: every run thin, the mean of each method (over sources and seeds) thick.

    Targets of one floor share the y axis; different ones are games whose returns have nothing in common.
    """
    columns = min(3, len(table.targets))
    rows = math.ceil(len(table.targets) / columns)
    figure = Figure(figsize=(max(6.0, 4.4 * columns), 3.2 * rows + 0.9), layout="constrained")
    figure.set_layout_engine("constrained", w_pad=0.12)
    floors = {target.floor.value if target.floor else None for target in table.targets}
    alike = len(floors) == 1 and None not in floors
    axes = figure.subplots(rows, columns, squeeze=False, sharey=alike)
    methods: dict[str, Any] = {}
    for axis, target in zip(axes.flat, table.targets, strict=False):
        methods |= _draw_target(axis, target)
    for axis in list(axes.flat)[len(table.targets) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("return per episode")
    ordered = sorted(methods, key=method_order)
    figure.legend(
        [methods[m] for m in ordered],
        [method_label(m) for m in ordered],
        loc="outside lower center",
        ncols=min(len(ordered), 3 if columns > 1 else 2),
        frameon=False,
        fontsize=9,
    )
    return figure


def plot_transfer_table(table: TransferTable) -> Figure:
    """Table 1's rows as points: mean and median with their bootstrap intervals, the paper's as hollow marks."""
    _needs_scores(table)
    figure = Figure(figsize=(7.6, 0.62 * len(table.rows) + 1.5), layout="constrained")
    axis = figure.subplots()
    kinds: tuple[tuple[str, float, str, int], ...] = (("mean", -0.13, "o", 0), ("median", 0.13, "D", 1))
    for y, row in enumerate(table.rows):
        colour = _colour(row.method)
        for name, offset, marker, position in kinds:
            interval: Interval = getattr(row, name)
            if not math.isnan(interval.low):
                axis.plot([interval.low, interval.high], [y + offset] * 2, color=colour, lw=2.2, alpha=0.55, zorder=2)
            axis.plot(interval.value, y + offset, marker, color=colour, ms=7, zorder=3)
            if row.paper:
                axis.plot(row.paper[position], y + offset, marker, mfc="white", mec=GREY, mew=1.3, ms=7, zorder=1)
    for name, _, marker, _ in kinds:
        axis.plot([], [], marker, color=INK, ms=7, label=name)
        if any(row.paper for row in table.rows):
            axis.plot([], [], marker, mfc="white", mec=GREY, mew=1.3, ms=7, label=f"{name}, Rusu et al. 2016")
    axis.axvline(100, color=GREY, lw=1, ls=":")
    axis.set_yticks(range(len(table.rows)), [row.label for row in table.rows])
    axis.invert_yaxis()
    highest = axis.get_xlim()[1]
    axis.set_xlim(min(0.0, axis.get_xlim()[0]), max(highest, 110.0))
    axis.set_xlabel("transfer score, % of scratch")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    _tidy(axis)
    axis.grid(axis="y", visible=False)
    return figure


def plot_transfer_matrix(table: TransferTable) -> Figure:
    """One matrix a method, sources down and targets across; white is `scratch`, green above it, brown below."""
    _needs_scores(table)
    rows = [row for row in table.rows if row.method != "scratch"]
    matrices = [table.matrix(row.method) for row in rows]
    highest = max([200.0, *(float(np.nanmax(scores)) for _, _, scores in matrices)])
    norm = TwoSlopeNorm(vmin=0, vcenter=100, vmax=highest)
    columns = min(len(rows), 3)
    lines = math.ceil(len(rows) / columns)
    deepest = max(len(sources) for sources, _, _ in matrices)
    widest = max(len(targets) for _, targets, _ in matrices)
    longest = max(len(name) for _, targets, _ in matrices for name in targets)
    slanted = longest > 7
    colours = colormaps["BrBG"]
    below = 0.045 * max(0, longest - 10)  # what slanted names take from the matrix above them
    wrapped = [textwrap.wrap(source, 22) for sources, _, _ in matrices for source in sources if source]
    beside = 0.075 * max([0, *(len(line) - 10 for name in wrapped for line in name)])
    row_height = max([0.55, *(0.17 * len(name) for name in wrapped)])
    panel = max(1.2 + 0.6 * widest, 2.4) + beside
    size = (panel * columns + 1.1, (1.1 + row_height * deepest + below) * lines + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis, row, (sources, targets, scores) in zip(axes.flat, rows, matrices, strict=False):
        axis.imshow(scores, cmap="BrBG", norm=norm, aspect="auto")
        for (y, x), score in np.ndenumerate(scores):
            text = "–" if math.isnan(score) else f"{score:.0f}"
            dark = not math.isnan(score) and float(np.dot(colours(norm(score))[:3], (0.299, 0.587, 0.114))) < 0.5
            axis.text(x, y, text, ha="center", va="center", color="white" if dark else INK, fontsize=10)
        turned = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
        axis.set_xticks(range(len(targets)), targets, **turned)
        axis.set_yticks(range(len(sources)), [textwrap.fill(source, 22) or "none" for source in sources])
        axis.set_title(row.label, fontsize=10, loc="left")
        axis.tick_params(length=0, labelsize=9)
        for side in axis.spines.values():
            side.set_visible(False)
    for axis in list(axes.flat)[len(rows) :]:
        axis.set_axis_off()
    figure.supxlabel("target", fontsize=10)
    figure.supylabel("source", fontsize=10)
    bar = figure.colorbar(ScalarMappable(norm, "BrBG"), ax=axes, shrink=0.85, aspect=18)
    bar.set_label("transfer score,\n% of scratch", fontsize=9)  # two lines fit beside a single row
    bar.ax.set_yscale("linear")
    return figure


def plot_run(run: Run, num_points: int = 60) -> Figure:
    """The return of one run over its tasks, one after the other."""
    if not run.tasks:
        raise ValueError(f"{run.path}: no task has a finished episode yet")
    figure = Figure(figsize=(7.6, 3.0), layout="constrained")
    axis = figure.subplots()
    start = 0.0
    palette = [*list(_COLOURS.values())[4:], *list(_COLOURS.values())[1:4]]
    for number, task in enumerate(run.tasks):
        grid = step_grid(task.last_step, num_points)
        curve = learning_curve(task.steps, task.return_sums, task.episodes, grid)
        axis.plot(start + grid, curve, color=palette[number % len(palette)], lw=1.8)
        axis.annotate(
            task.task, (start, 1), xycoords=("data", "axes fraction"), xytext=(4, 3), textcoords="offset points",
            fontsize=9, color=palette[number % len(palette)],
        )  # fmt: skip
        axis.axvline(start, color=GREY, lw=0.8, ls=":")
        start += task.last_step
    _steps_axis(axis, start, "agent steps of the run")
    axis.set_ylabel("return per episode")
    _tidy(axis)
    return figure


def plot_sensitivity(sensitivities: Sequence[Sensitivity]) -> Figure:
    """The network, columns side by side, every layer's box shaded by its share (Rusu et al. 2016, figures 4 to 6)."""
    if not sensitivities:
        raise ValueError("no sensitivities to draw")
    layers = max(len(s.layers) for s in sensitivities)
    width = sum(1.35 * s.values.shape[1] + 0.5 for s in sensitivities) + 2.3
    figure = Figure(figsize=(max(width, 4.6), 0.8 * layers + 2.1), layout="constrained")
    ratios = [s.values.shape[1] - 1 + _WIDE + 0.1 + (0.1 if n else _NAMES) for n, s in enumerate(sensitivities)]
    axes = figure.subplots(1, len(sensitivities), squeeze=False, width_ratios=ratios)[0]
    for number, (axis, sensitivity) in enumerate(zip(axes, sensitivities, strict=True)):
        _draw_network(axis, sensitivity, names=number == 0)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), "YlGnBu"), ax=axes, shrink=0.7, aspect=16, pad=0.02)
    bar.set_label("share of the layer's sensitivity", fontsize=9)
    return figure


def plot_filters(filters: Sequence[Sequence[Mapping[str, Any]]], tasks: Sequence[str] = ()) -> Figure:
    """The most used first-layer filters of every column, most used first.

    Args:
        filters: for each column its filters, each with `weights` (C, h, w), `feature` and `share` of the layer's Fisher
            information over all columns. The C tiles of a filter are the input's channels: stacked frames, oldest
            first, or red, green and blue.
    """
    shown = max((len(column) for column in filters), default=0)
    if shown == 0:
        raise ValueError("no filters to draw: the first layer is no convolution")
    channels = max(len(f["weights"]) for column in filters for f in column)
    figure = Figure(
        figsize=(max(4.0, (0.55 * channels + 1.0) * len(filters)), 0.66 * shown + 0.9), layout="constrained"
    )
    axes = figure.subplots(shown, len(filters), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for j, column in enumerate(filters):
        axes[0, j].set_title(_column_title(j, tasks), fontsize=9, loc="left")
        for i, entry in enumerate(column):
            tiles = np.asarray(entry["weights"], dtype=float)
            gap = np.full((tiles.shape[1], 1), np.nan)
            strip = np.concatenate([part for tile in tiles for part in (tile, gap)][:-1], axis=1)
            limit = float(np.abs(tiles).max()) or 1.0
            axes[i, j].imshow(strip, cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest")
            axes[i, j].text(
                strip.shape[1] + 0.6, tiles.shape[1] / 2, f"{entry['share']:.0%}", va="center", fontsize=8, color=INK
            )  # fmt: skip
    return figure


# -- parts -----------------------------------------------------------------------------------------------------------


def _colour(method: str) -> str:
    if method in _COLOURS or not method.startswith("progressive_"):
        return _COLOURS.get(method, "#0072B2")
    # Five columns and more: one hue from light to dark, so that their order shows.
    columns = int(method.removeprefix("progressive_"))
    return to_hex(colormaps["Purples"](min(0.45 + 0.08 * (columns - 5), 1.0)))


def _needs_scores(table: TransferTable) -> None:
    if not any(row.method != "scratch" for row in table.rows):
        raise TransferError(f"{table.suite}: no scores to draw: " + ("; ".join(table.notes) or "no method but scratch"))


def _draw_target(axis: Axes, target: TargetCurves) -> dict[str, Any]:
    """Returns a line of each method for the legend."""
    lines: dict[str, Any] = {}
    by_method: dict[str, list[np.ndarray]] = {}
    for (method, _), curves in target.curves.items():
        by_method.setdefault(method, []).append(curves)
    for method, parts in sorted(by_method.items(), key=lambda item: method_order(item[0])):
        curves = np.concatenate(parts)
        colour = _colour(method)
        if len(curves) >= _MANY_RUNS:
            low, high = np.percentile(curves, [10, 90], axis=0)
            axis.fill_between(target.grid, low, high, color=colour, alpha=0.15, lw=0)
        elif len(curves) > 1:
            axis.plot(target.grid, curves.T, color=colour, lw=0.7, alpha=0.35)
        (lines[method],) = axis.plot(target.grid, curves.mean(axis=0), color=colour, lw=2)
    if target.floor is not None:
        axis.axhline(target.floor.value, color=GREY, lw=1, ls=":")
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        text = f"floor {target.floor.value:g}"
        place |= {"xytext": (-2, -2), "ha": "right", "va": "top"}
        axis.annotate(text, (1, target.floor.value), fontsize=8, color=GREY, **place)
        axis.margins(y=0.09)
    runs = sum(len(curves) for curves in target.curves.values())
    axis.set_title(f"{target.target}  ({runs} run{'s' if runs != 1 else ''})", fontsize=10, loc="left")
    _steps_axis(axis, target.grid[-1], "agent steps on the target")
    _tidy(axis)
    return lines


def _draw_network(axis: Axes, sensitivity: Sensitivity, *, names: bool) -> None:
    num_layers, num_columns = sensitivity.values.shape
    colours = colormaps["YlGnBu"]
    last = num_columns - 1
    laterals = sensitivity.settings.get("laterals") or [["policy", *map(str, range(2, num_layers + 1))]] * num_columns
    for (layer, j), share in np.ndenumerate(sensitivity.values):
        y, known = layer + 1, not math.isnan(share)
        _box(axis, j, j, y, colours(share) if known else "white", INK)
        ink = "white" if known and share > 0.55 else INK
        axis.text(j, y, f"{share:.2f}" if known else "–", ha="center", va="center", fontsize=10, color=ink, zorder=4)
        _arrow(axis, (j, y - 1 + _HIGH / 2), (j, y - _HIGH / 2))
        for earlier in range(j) if str(y) in laterals[j] else ():
            _lateral_arrow(axis, (earlier, y - 1), (j, y))
    _box(axis, 0, last, 0, "#F2F2F2", GREY, "observation")
    _box(axis, last, last, num_layers + 1, "#F2F2F2", GREY, "policy")
    _arrow(axis, (last, num_layers + _HIGH / 2), (last, num_layers + 1 - _HIGH / 2))
    for earlier in range(last) if "policy" in laterals[last] else ():
        _lateral_arrow(axis, (earlier, num_layers), (last, num_layers + 1))
    for j in range(num_columns):
        axis.text(j, -0.42, _column_title(j, sensitivity.tasks), ha="center", va="top", fontsize=9, color=INK)
    if names:
        for layer, name in enumerate(sensitivity.layers):
            axis.text(-_WIDE / 2 - 0.1, layer + 1, name, ha="right", va="center", fontsize=9, color=INK)
    axis.text(last / 2, num_layers + 1.55, sensitivity.title, ha="center", fontsize=10, color=INK)
    axis.set_xlim(-_WIDE / 2 - (_NAMES if names else 0.1), last + _WIDE / 2 + 0.1)
    axis.set_ylim(-1.0, num_layers + 1.8)
    axis.set_axis_off()


def _box(axis: Axes, left: float, right: float, y: float, fill: Any, edge: str, text: str = "") -> None:
    """A layer's box around columns `left` to `right`."""
    axis.add_patch(
        FancyBboxPatch(
            (left - _WIDE / 2, y - _HIGH / 2),
            right - left + _WIDE,
            _HIGH,
            boxstyle="round,pad=0,rounding_size=0.07",
            facecolor=fill,
            edgecolor=edge,
            lw=0.8,
            zorder=3,
        )
    )
    axis.text((left + right) / 2, y, text, ha="center", va="center", fontsize=9, color=INK, zorder=4)


def _lateral_arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """From the top of one box to the bottom of one in a later column."""
    begin = (start[0] + _WIDE / 2 - 0.06, start[1] + _HIGH / 2)
    _arrow(axis, begin, (end[0] - _WIDE / 2 + 0.1, end[1] - _HIGH / 2), lateral=True)


def _arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], *, lateral: bool = False) -> None:
    axis.annotate(
        "", end, start, zorder=1 if lateral else 2,
        arrowprops={"arrowstyle": "-|>", "color": "#B0B0B0" if lateral else GREY, "lw": 0.8, "shrinkA": 0, "shrinkB": 0,
                    "mutation_scale": 8},
    )  # fmt: skip


def _column_title(index: int, tasks: Sequence[str]) -> str:
    return f"column {index}" + (f"\n{tasks[index]}" if index < len(tasks) and tasks[index] else "")


def _steps_axis(axis: Axes, last: float, label: str) -> None:
    unit, name = (1e6, ", millions") if last >= 1e6 else (1e3, ", thousands") if last >= 1e4 else (1.0, "")
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
    axis.set_xlim(0, last)
    axis.set_xlabel(label + name, fontsize=9)


def _tidy(axis: Axes) -> None:
    axis.grid(color="#E6E6E6", lw=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
