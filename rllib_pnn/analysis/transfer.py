"""Transfer scores (Rusu et al. 2016, section 4), forgetting and forward transfer. Neither torch nor Ray.

A learning curve is put on a fixed grid of agent steps; its area above the game's floor is compared with that of
`scratch`, one column trained from nothing (the paper's baseline 1). The paper does not say how negative returns enter
the ratio: here every return is measured from a floor, the game's lowest return or a random agent's score, and the
floor goes wherever a score goes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from rllib_pnn.analysis.runs import Run, TaskRun, number
from rllib_pnn.envs.labyrinth_levels import LEVELS, Level

PAPER = "Rusu et al. 2016, arXiv 1606.04671v4, Table 1"

PAPER_TABLE_1: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "Pong Soup": {
        "scratch": (100, 100),
        "finetune_heads": (35, 7),
        "finetune_all": (181, 160),
        "random_column": (134, 131),
        "progressive_2": (209, 169),
        "progressive_3": (222, 183),
    },
    "Atari": {
        "scratch": (100, 100),
        "finetune_heads": (41, 21),
        "finetune_all": (133, 110),
        "random_column": (96, 95),
        "progressive_2": (132, 112),
        "progressive_3": (140, 111),
        "progressive_4": (141, 116),
    },
    "Labyrinth": {
        "scratch": (100, 100),
        "finetune_heads": (88, 85),
        "finetune_all": (235, 112),
        "random_column": (185, 108),
        "progressive_2": (491, 115),
    },
}
"""(mean, median) transfer score in percent, by suite and method. Rusu et al. 2016, Table 1."""

METHOD_LABELS: Mapping[str, str] = {
    "scratch": "Baseline 1: scratch",
    "finetune_heads": "Baseline 2: fine-tune heads",
    "finetune_all": "Baseline 3: fine-tune all",
    "random_column": "Baseline 4: random column",
}

_SUITES = {
    "rllib_pnn/PongSoup-v0": "Pong Soup",
    "rllib_pnn/Atari-v0": "Atari",
    "rllib_pnn/Labyrinth-v0": "Labyrinth",
    "rllib_pnn/CartPoleSoup-v0": "CartPole Soup",
}

# Score per episode of a uniformly random agent: Mnih et al. 2015 (Nature 518), Extended Data Table 2.
_ATARI_RANDOM_SCORES = {
    "alien": 227.8,
    "asterix": 210.0,
    "boxing": 0.1,
    "centipede": 2090.9,
    "gopher": 257.6,
    "hero": 1027.0,
    "jamesbond": 29.0,
    "krull": 1598.0,
    "riverraid": 1338.5,
    "roadrunner": 11.5,
    "robotank": 2.2,
    "seaquest": 68.4,
    "stargunner": 664.0,
    "wizardofwor": 563.5,
}


class Floor(NamedTuple):
    """The return that counts as nothing learned, and where that number is from."""

    value: float
    why: str


class Interval(NamedTuple):
    """A value with its bootstrap interval; the bounds are NaN where one seed leaves nothing to resample."""

    value: float
    low: float
    high: float


class TransferError(ValueError):
    """Scores cannot be computed from what was given. The message is one line."""


# -- curves --------------------------------------------------------------------------------------------------------


def step_grid(horizon: float, num_points: int = 50) -> np.ndarray:
    """(num_points,) right edges of equal windows of agent steps that cover (0, horizon]."""
    if not (math.isfinite(horizon) and horizon > 0):
        raise TransferError(f"horizon: expected a positive number of steps, got {horizon!r}")
    if num_points < 1:
        raise TransferError(f"num_points: expected at least 1, got {num_points!r}")
    return horizon * np.arange(1, num_points + 1) / num_points


def learning_curve(steps: Any, return_sums: Any, episodes: Any, grid: np.ndarray) -> np.ndarray:
    """Average return of the episodes that ended in each window of steps (Rusu et al. 2016, section 4).

    A window in which no episode ended takes the last point before it (the first point after it, at the start); beyond
    the run's end the last point holds.

    Args:
        steps: (N,) agent steps at which the N batches of episodes had ended.
        return_sums: (N,) sum of the returns of each batch.
        episodes: (N,) number of episodes in each batch.
        grid: (G,) right edges of the windows, ascending; the first window starts at 0.

    Returns:
        (G,) return per episode, unclipped.
    """
    steps, sums, counts = (np.asarray(x, dtype=float) for x in (steps, return_sums, episodes))
    if not steps.shape == sums.shape == counts.shape or steps.ndim != 1:
        raise TransferError(
            f"steps, return_sums, episodes: expected one length, got {steps.shape}, {sums.shape}, {counts.shape}"
        )
    window = np.searchsorted(grid, steps, side="left")  # window i holds grid[i - 1] < steps <= grid[i]
    inside = (window < len(grid)) & (counts > 0)
    if not inside.any():
        raise TransferError(f"no episode ended within {grid[-1]:,.0f} steps")
    total = np.bincount(window[inside], weights=sums[inside], minlength=len(grid))
    count = np.bincount(window[inside], weights=counts[inside], minlength=len(grid))
    filled = np.flatnonzero(count)
    last_filled = np.maximum(np.searchsorted(filled, np.arange(len(grid)), side="right") - 1, 0)
    return (total[filled] / count[filled])[last_filled]


def task_curve(task: TaskRun, grid: np.ndarray) -> np.ndarray:
    """(G,) `learning_curve` of one task of one run."""
    try:
        return learning_curve(task.steps, task.return_sums, task.episodes, grid)
    except TransferError as error:
        raise TransferError(f"{task.run}: task {task.task!r}: {error}") from None


def area_under_curve(curves: Any, floor: float) -> np.ndarray:
    """Average height of learning curves above `floor`: (..., G) -> (...)."""
    return np.asarray(curves, dtype=float).mean(axis=-1) - floor


# -- scores --------------------------------------------------------------------------------------------------------


def transfer_score(target_curves: Any, baseline_curves: Any, *, floor: float, top: int | None = None) -> float:
    """Transfer score in percent: area under the target's curves over the baseline's (Rusu et al. 2016, section 4).

    100 is the baseline; both areas are averaged over seeds before the ratio is taken.

    Args:
        target_curves: (S, G) or (G,) learning curves of S runs that started from earlier columns.
        baseline_curves: (S', G) or (G,) curves of `scratch` on the same target and the same grid.
        floor: the return that counts as nothing learned (Pong: -21). Areas are measured from it.
        top: use only the best `top` runs of each side, by area (the paper: 3 of 25); None uses all.

    Raises:
        TransferError: the grids differ, or the baseline's area is not above the floor, so no ratio exists.
    """
    target, baseline = (np.atleast_2d(np.asarray(curves, dtype=float)) for curves in (target_curves, baseline_curves))
    if target.shape[-1] != baseline.shape[-1]:
        raise TransferError(
            f"curves are on different grids: {target.shape[-1]} points for the target, "
            f"{baseline.shape[-1]} for the baseline"
        )
    for name, curves in (("target", target), ("baseline", baseline)):
        if curves.ndim > 2 or not np.isfinite(curves).all():
            raise TransferError(f"{name}_curves: expected finite returns of shape (S, G) or (G,), got {curves.shape}")
    areas = area_under_curve(target, floor), area_under_curve(baseline, floor)
    return _ratio(_seed_mean(areas[0], top), _seed_mean(areas[1], top))


def transfer_interval(
    target_curves: Any,
    baseline_curves: Any,
    *,
    floor: float,
    top: int | None = None,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """`transfer_score` with a percentile bootstrap interval over the seeds of both sides."""
    value = transfer_score(target_curves, baseline_curves, floor=floor, top=top)
    areas = {"": area_under_curve(np.atleast_2d(target_curves), floor)}
    baselines = {"": area_under_curve(np.atleast_2d(baseline_curves), floor)}
    drawn, base = _resample(areas, baselines, num_resamples, seed)
    return _interval(value, 100 * _seed_mean(drawn[""], top) / _above_floor(_seed_mean(base[""], top)), confidence)


def interquartile_mean(scores: Any) -> float:
    """Mean of the middle half of `scores`, all seeds and tasks together (Agarwal et al. 2021, arXiv 2108.13264)."""
    return float(stats.trim_mean(np.ravel(scores), 0.25))


def forward_transfer(target_curves: Any, baseline_curves: Any, *, floor: float, ceiling: float) -> float:
    """Normalised gain in area over `scratch` (Wolczyk et al. 2021, Continual World, arXiv 2105.10919, section 4).

    `(AUC - AUC_b) / (1 - AUC_b)` with returns scaled so that `floor` is 0 and `ceiling` is 1; 0 is no transfer, 1 the
    most possible, negative is harm.

    Args:
        target_curves, baseline_curves: (S, G) or (G,), as for `transfer_score`.
        floor, ceiling: lowest and highest return of the game.
    """
    if not ceiling > floor:
        raise TransferError(f"ceiling ({ceiling}) must be above the floor ({floor})")
    area, baseline = (
        float(np.mean(area_under_curve(curves, floor))) / (ceiling - floor)
        for curves in (target_curves, baseline_curves)
    )
    if baseline >= 1:
        raise TransferError(f"the baseline is at the ceiling ({ceiling}) from the start: nothing is left to gain")
    return (area - baseline) / (1 - baseline)


def forgetting(performance: Any) -> np.ndarray:
    """How much worse each task is at the end than when its own training ended (Wolczyk et al. 2021, section 4).

    Args:
        performance: (K, K) return on task j after training on task i; entries above the diagonal (j > i) are ignored.

    Returns:
        (K - 1,) `performance[j, j] - performance[-1, j]` of every task but the last; 0 for frozen columns.
    """
    table = np.asarray(performance, dtype=float)
    if table.ndim != 2 or table.shape[0] != table.shape[1]:
        raise TransferError(f"performance: expected (K, K), got {table.shape}")
    return (np.diag(table) - table[-1])[:-1]


# -- what is known of the games ------------------------------------------------------------------------------------


def suite_of(env: str) -> str:
    """The suite of games that an environment id is (a column of the paper's Table 1, mostly); else the id itself."""
    return _SUITES.get(env, env)


def known_floor(env: str, env_config: Mapping[str, Any]) -> Floor | None:
    """A game's lowest return (a random agent's score on Atari other than Pong); None if unknown."""
    if _is_pong(env, env_config):
        return Floor(-21.0, "Pong's lowest return")
    game = str(env_config.get("game", "")).lower().replace("_", "")
    if env == "rllib_pnn/Atari-v0" and game in _ATARI_RANDOM_SCORES:
        return Floor(_ATARI_RANDOM_SCORES[game], "random agent, Mnih et al. 2015")
    if _is_cartpole(env, env_config):
        return Floor(0.0, "CartPole's lower bound")
    if level := _labyrinth_level(env, env_config):
        return Floor(float(-level.num_bad_items), "the level's lowest return")
    return None


def known_ceiling(env: str, env_config: Mapping[str, Any]) -> float | None:
    """A game's highest return, None if it has none or it is unknown."""
    if _is_pong(env, env_config):
        return 21.0
    if _is_cartpole(env, env_config):
        steps = number(env_config.get("max_episode_steps", 200 if env == "CartPole-v0" else 500))
        return None if math.isnan(steps) else steps
    if level := _labyrinth_level(env, env_config):
        return float(level.num_good_items)
    return None


def _is_pong(env: str, env_config: Mapping[str, Any]) -> bool:
    return env == "rllib_pnn/PongSoup-v0" or (env == "rllib_pnn/Atari-v0" and env_config.get("game", "pong") == "pong")


def _is_cartpole(env: str, env_config: Mapping[str, Any]) -> bool:
    """With gymnasium's reward, +1 a step."""
    return env in ("rllib_pnn/CartPoleSoup-v0", "CartPole-v0", "CartPole-v1") and not env_config.get(
        "sutton_barto_reward"
    )


def _labyrinth_level(env: str, env_config: Mapping[str, Any]) -> Level | None:
    """Its items are worth +1 or -1 each."""
    if env != "rllib_pnn/Labyrinth-v0":
        return None
    level = env_config.get("level", "track_1")
    return LEVELS.get(level) if isinstance(level, str) else None


def method_label(method: str) -> str:
    """`progressive_3` -> `Progressive, 3 columns`; baselines by the paper's numbers."""
    if method.startswith("progressive_"):
        return f"Progressive, {method.removeprefix('progressive_')} columns"
    return METHOD_LABELS.get(method, method)


def method_order(method: str) -> tuple[int, str]:
    """Sort key: Table 1's order of rows."""
    baselines = list(METHOD_LABELS)
    if method in baselines:
        return baselines.index(method), ""
    return len(baselines), method.removeprefix("progressive_").zfill(3)


# -- tables --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One method from one source (or none) to one target."""

    source: str
    target: str
    score: Interval
    seed_scores: tuple[float, ...]
    """Score of every seed against the mean of all the baseline's, whatever `top` is; empty if that is at the floor."""
    seeds: tuple[int | None, ...]
    mean_return: float
    """Average return per episode over the curve, unclipped and without the floor taken off."""

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "target": self.target,
            "score": _json_interval(self.score),
            "seed_scores": list(self.seed_scores),
            "seeds": list(self.seeds),
            "mean_return": self.mean_return,
        }


@dataclass(frozen=True)
class MethodRow:
    """One row of Table 1: a method over all its sources and targets."""

    method: str
    cells: tuple[Cell, ...]
    mean: Interval
    median: Interval
    iqm: Interval
    """Over `Cell.seed_scores`, so that it does not depend on `top`; NaN if all of them are empty."""
    paper: tuple[float, float] | None
    """The paper's (mean, median), None where it has none."""

    @property
    def label(self) -> str:
        return method_label(self.method)

    @property
    def num_seeds(self) -> int:
        return sum(len(cell.seeds) for cell in self.cells)

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "mean": _json_interval(self.mean),
            "median": _json_interval(self.median),
            "iqm": _json_interval(self.iqm),
            "paper_mean_median": list(self.paper) if self.paper else None,
            "cells": [cell.to_json() for cell in self.cells],
        }


@dataclass(frozen=True)
class TargetCurves:
    """All curves of one target on one grid, by method and source."""

    target: str
    grid: np.ndarray
    floor: Floor | None
    runs: Mapping[tuple[str, str], tuple[TaskRun, ...]]
    """(method, source) -> its runs."""
    curves: Mapping[tuple[str, str], np.ndarray]
    """(method, source) -> (S, G) curves, in the order of the runs."""


@dataclass(frozen=True)
class TransferTable:
    """Table 1's column for one suite of games, with everything that it was computed from."""

    suite: str
    targets: tuple[TargetCurves, ...]
    rows: tuple[MethodRow, ...]
    """Empty if no target has both a baseline and a floor."""
    top: int | None
    confidence: float
    notes: tuple[str, ...]
    """What was left out and why, one line each."""

    def row(self, method: str) -> MethodRow:
        for row in self.rows:
            if row.method == method:
                return row
        raise TransferError(f"{self.suite}: no scores for {method!r}; there are {[row.method for row in self.rows]}")

    def matrix(self, method: str) -> tuple[list[str], list[str], np.ndarray]:
        """Sources, targets and (sources, targets) scores in percent of one method; NaN where nothing was run."""
        cells = self.row(method).cells
        sources = list(dict.fromkeys(cell.source for cell in cells))
        targets = [target.target for target in self.targets if any(c.target == target.target for c in cells)]
        scores = np.full((len(sources), len(targets)), np.nan)
        for cell in cells:
            scores[sources.index(cell.source), targets.index(cell.target)] = cell.score.value
        return sources, targets, scores

    def to_json(self) -> dict[str, Any]:
        return {
            "suite": self.suite,
            "top": self.top,
            "confidence": self.confidence,
            "rows": [row.to_json() for row in self.rows],
            "targets": [
                {
                    "target": target.target,
                    "floor": target.floor.value if target.floor else None,
                    "floor_from": target.floor.why if target.floor else None,
                    "steps": target.grid.tolist(),
                    "curves": [
                        {"method": method, "source": source, "returns": curves.tolist()}
                        for (method, source), curves in target.curves.items()
                    ],
                }
                for target in self.targets
            ],
            "notes": list(self.notes),
        }


def transfer_tables(
    runs: Iterable[Run],
    *,
    floor: float | Mapping[str, float] | None = None,
    horizon: float | None = None,
    num_points: int = 50,
    top: int | None = None,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> list[TransferTable]:
    """One table a suite of games (Pong Soup, Atari, ...), from run folders.

    Args:
        runs: from `read_runs`. Every task of every run gives one curve, but those trials of a transfer experiment
            that only trained a source: their steps and seeds are not those of the trials that are scored.
        floor: overrides `known_floor`, for all targets or by target.
        horizon: agent steps over which areas are taken. By default, for each target, the shortest run that was not
            stopped early by a good return; runs shorter than half of the longest are left out and noted.
        num_points: windows of the step grid.
        top: score only the best `top` runs of each cell (the paper: 3 of 25); all seeds stay in `Cell.seed_scores`.
        confidence, num_resamples, seed: of the bootstrap over seeds, stratified by cell.
    """
    if top is not None and top < 1:
        raise TransferError(f"top: expected at least 1, got {top!r}")
    if not 0 < confidence < 1:
        raise TransferError(f"confidence: expected a number between 0 and 1, got {confidence!r}")
    by_target: dict[tuple[str, str], list[TaskRun]] = {}
    for run in runs:
        for task in run.tasks:
            if task.is_source:
                continue
            by_target.setdefault((suite_of(task.env), task.task), []).append(task)

    tables = []
    for suite in dict.fromkeys(suite for suite, _ in by_target):
        notes: list[str] = []
        targets = [
            _target_curves(target, tasks, _floor_of(target, tasks, floor), horizon, num_points, notes)
            for (of, target), tasks in by_target.items()
            if of == suite
        ]
        rows = _method_rows(suite, targets, top, confidence, num_resamples, seed, notes)
        tables.append(TransferTable(suite, tuple(targets), tuple(rows), top, confidence, tuple(notes)))
    return tables


def _floor_of(target: str, tasks: Sequence[TaskRun], floor: float | Mapping[str, float] | None) -> Floor | None:
    if isinstance(floor, Mapping):
        if target in floor:
            return Floor(float(floor[target]), "given")
    elif floor is not None:
        return Floor(float(floor), "given")
    return known_floor(tasks[0].env, tasks[0].env_config)


def _target_curves(
    target: str,
    tasks: Sequence[TaskRun],
    floor: Floor | None,
    horizon: float | None,
    num_points: int,
    notes: list[str],
) -> TargetCurves:
    longest = max(task.last_step for task in tasks)
    needed = 0.5 * longest if horizon is None else horizon
    used = []
    for task in tasks:
        # One iteration's overshoot or shortfall is no reason to leave a run out.
        if task.ended_by_return or task.last_step >= 0.98 * needed:
            used.append(task)
        else:
            notes.append(
                f"{task.run}: task {target!r} left out: "
                f"it has {task.last_step:,.0f} of {max(needed, longest):,.0f} steps"
            )
    notes.extend(_mixtures(target, used))
    if horizon is None:
        horizon = min((task.last_step for task in used if not task.ended_by_return), default=longest)
    grid = step_grid(horizon, num_points)
    grouped: dict[tuple[str, str], list[TaskRun]] = {}
    curves: dict[tuple[str, str], list[np.ndarray]] = {}
    for task in sorted(used, key=lambda task: (method_order(task.method), task.source)):
        try:
            curve = task_curve(task, grid)
        except TransferError as error:
            notes.append(str(error))
            continue
        grouped.setdefault((task.method, task.source), []).append(task)
        curves.setdefault((task.method, task.source), []).append(curve)
    return TargetCurves(
        target,
        grid,
        floor,
        {key: tuple(value) for key, value in grouped.items()},
        {key: np.stack(value) for key, value in curves.items()},
    )


def _mixtures(target: str, tasks: Sequence[TaskRun]) -> list[str]:
    """Notes on what makes the runs of one target hard to compare."""
    algorithms = sorted({task.algorithm or "unknown" for task in tasks})
    configs = {json.dumps(dict(task.env_config), sort_keys=True, default=str) for task in tasks}
    notes = []
    if len(algorithms) > 1:
        notes.append(f"{target}: runs of different algorithms ({', '.join(algorithms)}) are scored together")
    if len(configs) > 1:
        notes.append(f"{target}: runs with {len(configs)} different env_configs are scored together")
    return notes


def _method_rows(
    suite: str,
    targets: Sequence[TargetCurves],
    top: int | None,
    confidence: float,
    num_resamples: int,
    seed: int,
    notes: list[str],
) -> list[MethodRow]:
    baselines: dict[str, np.ndarray] = {}
    for target in targets:
        if target.floor is None:
            notes.append(
                f"{target.target}: no score: its floor is not known; give one (a random agent's return per episode)"
            )
            continue
        scratch = [curves for (method, _), curves in target.curves.items() if method == "scratch"]
        if not scratch:
            notes.append(f"{target.target}: no score: no scratch run to compare with")
            continue
        areas = area_under_curve(np.concatenate(scratch), target.floor.value)
        if _seed_mean(areas, top) <= 0:
            notes.append(f"{target.target}: no score: scratch stays at or below the floor of {target.floor.value:g}")
            continue
        if areas.mean() <= 0:
            notes.append(
                f"{target.target}: not in the IQM: all scratch runs together stay at or below the floor of "
                f"{target.floor.value:g}"
            )
        baselines[target.target] = areas

    # (method, source, target) -> (S,) areas above the floor
    areas_of: dict[str, dict[tuple[str, str], np.ndarray]] = {}
    task_runs: dict[tuple[str, str, str], tuple[TaskRun, ...]] = {}
    for target in targets:
        if target.target not in baselines or target.floor is None:
            continue
        for (method, source), curves in target.curves.items():
            areas_of.setdefault(method, {})[source, target.target] = area_under_curve(curves, target.floor.value)
            task_runs[method, source, target.target] = target.runs[method, source]

    floors = {target.target: target.floor.value for target in targets if target.floor is not None}
    if set(areas_of) == {"scratch"}:
        return []
    return [
        _method_row(suite, method, areas_of[method], baselines, floors, task_runs, top, confidence, num_resamples, seed)
        for method in sorted(areas_of, key=method_order)
    ]


def _method_row(
    suite: str,
    method: str,
    areas_of: Mapping[tuple[str, str], np.ndarray],
    baselines: Mapping[str, np.ndarray],
    floors: Mapping[str, float],
    runs_of: Mapping[tuple[str, str, str], tuple[TaskRun, ...]],
    top: int | None,
    confidence: float,
    num_resamples: int,
    seed: int,
) -> MethodRow:
    used = {target: baselines[target] for _, target in areas_of}
    drawn, drawn_base = _resample(areas_of, used, num_resamples, seed)
    if method == "scratch":
        # 100 by definition; the interval shows the spread of its own seeds, which drawing both sides would double.
        drawn_base = {target: np.tile(areas, (num_resamples, 1)) for target, areas in used.items()}
    base = {target: _above_floor(_seed_mean(areas, top)) for target, areas in drawn_base.items()}
    draws = {cell: 100 * _seed_mean(areas, top) / base[cell[1]] for cell, areas in drawn.items()}
    # The IQM is over every seed of every cell on both sides, whatever `top` is: choosing runs first would defeat it.
    every = {target: float(areas.mean()) for target, areas in used.items() if areas.mean() > 0}
    cells = []
    for (source, target), areas in areas_of.items():
        baseline = _seed_mean(baselines[target], top)
        cells.append(
            Cell(
                source,
                target,
                _interval(_ratio(_seed_mean(areas, top), baseline), draws[source, target], confidence),
                tuple(float(100 * area / every[target]) for area in areas) if target in every else (),
                tuple(run.seed for run in runs_of[method, source, target]),
                float(areas.mean() + floors[target]),
            )
        )
    scores = [cell.score.value for cell in cells]
    all_draws = np.stack(list(draws.values()))
    pooled = [
        100 * areas / _above_floor(drawn_base[target].mean(axis=1))[:, None]
        for (_, target), areas in drawn.items()
        if target in every
    ]
    return MethodRow(
        method,
        tuple(cells),
        mean=_interval(float(np.mean(scores)), all_draws.mean(axis=0), confidence),
        median=_interval(float(np.median(scores)), np.median(all_draws, axis=0), confidence),
        iqm=_interval(
            interquartile_mean([score for cell in cells for score in cell.seed_scores]),
            stats.trim_mean(np.concatenate(pooled, axis=1), 0.25, axis=1),
            confidence,
        )
        if pooled
        else Interval(math.nan, math.nan, math.nan),
        paper=PAPER_TABLE_1.get(suite, {}).get(method),
    )


# -- statistics ----------------------------------------------------------------------------------------------------


def _ratio(area: float, baseline: float) -> float:
    if not baseline > 0:
        raise TransferError(
            f"the baseline's area above the floor is {baseline:.4g}: no ratio exists; "
            "is the floor the game's lowest return?"
        )
    return 100.0 * area / baseline


def _seed_mean(areas: np.ndarray, top: int | None) -> Any:
    """Mean over the last axis, of the `top` largest only if given: (..., S) -> (...)."""
    if top is not None:
        areas = np.sort(areas, axis=-1)[..., -top:]
    return areas.mean(axis=-1)


def _above_floor(means: np.ndarray) -> np.ndarray:
    """NaN where a baseline's mean area is not above the floor, so that no ratio exists."""
    return np.where(means > 0, means, np.nan)


def _draws(areas: np.ndarray, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """(S,) -> (R, S) bootstrap samples of the seeds."""
    return areas[rng.integers(len(areas), size=(num_resamples, len(areas)))]


def _resample(
    cells: Mapping[Any, np.ndarray], baselines: Mapping[Any, np.ndarray], num_resamples: int, seed: int
) -> tuple[dict[Any, np.ndarray], dict[Any, np.ndarray]]:
    """Stratified bootstrap: seeds are drawn within each cell, and once within each target's baseline.

    Returns:
        (R, S) areas of each cell, and of each baseline.
    """
    rng = np.random.default_rng(seed)
    base = {key: _draws(areas, num_resamples, rng) for key, areas in baselines.items()}
    return {key: _draws(areas, num_resamples, rng) for key, areas in cells.items()}, base


def _interval(value: float, draws: np.ndarray, confidence: float) -> Interval:
    """Percentile interval of (R,) bootstrap values; NaN bounds where resampling changes nothing (one seed a cell)."""
    draws = draws[np.isfinite(draws)]
    if len(draws) == 0 or np.ptp(draws) == 0:
        return Interval(value, math.nan, math.nan)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Interval(value, float(low), float(high))


def _json_interval(interval: Interval) -> list[float | None]:
    """JSON knows no NaN."""
    return [None if math.isnan(x) else float(x) for x in interval]
