"""One self-contained `report.html` from run folders. Neither torch nor Ray.

Pictures are data URIs, so that the file opens anywhere and offline. Names from run folders are somebody's data: the
template escapes all of them, and the page forbids itself scripts and the network.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from rllib_pnn.analysis import plots
from rllib_pnn.analysis.page import PAGE
from rllib_pnn.analysis.runs import Run, RunError, TaskRun, read_json, read_runs
from rllib_pnn.analysis.sensitivity import METHODS, Sensitivity, agreement
from rllib_pnn.analysis.transfer import (
    PAPER,
    Floor,
    Interval,
    TransferError,
    TransferTable,
    forward_transfer,
    known_ceiling,
    method_label,
    task_curve,
    transfer_tables,
)

ANALYSIS_FOLDER = "analysis"
MAX_CHAINS = 12
MAX_ANALYSES = 60
DASH = "–"


def write_report(
    runs: Sequence[Path | str],
    out: Path | str,
    *,
    title: str = "Progressive networks: report",
    floor: float | Mapping[str, float] | None = None,
    horizon: float | None = None,
    num_points: int = 50,
    top: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes the report on all run folders at or below `runs`.

    Beside `report.html` it writes `report.json` with every number (see `TransferTable.to_json`) and the pictures as PNG
    in `report_files/`, all named after `out`.

    Args:
        runs: run folders, or folders that hold some.
        out: the HTML file.
        floor, horizon, num_points, top, confidence, seed: see `transfer_tables`; without `top`, what the runs'
            experiment files say (`transfer: {top: 3}`), if all say the same.

    Returns:
        `html`, `json` and `pictures`, the paths written; `num_runs`, `problems` (runs that could not be read, a line
        each) and `notes`; `tables`, for each suite its name and rows of Table 1.

    Raises:
        ValueError: no run could be read, or `out` can't be written; one line.
    """
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"{out}: a folder, expected a file; did you mean {out / 'report.html'}?")
    read, problems = read_runs(runs)
    names = _names(read, out)
    if top is None:
        asked = {task.top for run in read for task in run.tasks if not task.is_source}
        top = asked.pop() if len(asked) == 1 else None
    tables = transfer_tables(
        read, floor=floor, horizon=horizon, num_points=num_points, top=top, confidence=confidence, seed=seed
    )
    pictures = _Pictures(out.with_name(out.stem + "_files"))
    chains = [run for run in read if len(run.tasks) > 1]
    notes = [note for run in read for note in run.notes]
    if len(chains) > MAX_CHAINS:
        notes.append(f"{len(chains) - MAX_CHAINS} more runs of several tasks are in the list of runs only")
    analysed = [run for run in read if (run.path / ANALYSIS_FOLDER).is_dir()]
    if len(analysed) > MAX_ANALYSES:
        notes.append(f"the sensitivities of {len(analysed) - MAX_ANALYSES} more runs are not shown")
    analyses = [
        analysis for run in analysed[:MAX_ANALYSES] for analysis in _analyses(run, names[run.path], pictures, notes)
    ]
    tasks = [task for run in read for task in run.tasks]
    context = {
        "title": title,
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "version": _version(),
        "num_runs": len(read),
        "num_curves": len(tasks),
        "problems": problems,
        "paper": PAPER,
        "suites": [_suite(table, pictures) for table in tables],
        "chains": [_chain(run, names[run.path], tables, pictures) for run in chains[:MAX_CHAINS]],
        "analyses": analyses,
        "run_rows": [_run_row(task, names[task.run]) for task in tasks],
        "searched": any(task.searched for task in tasks),
        "smoothed": sum(task.smoothed for task in tasks),
        "notes": notes,
    }
    html = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(PAGE).render(context)
    data = {"format": "rllib_pnn.report/1", "problems": problems, "tables": [table.to_json() for table in tables]}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        pictures.write()
        _write(out.with_suffix(".json"), json.dumps(data, allow_nan=False) + "\n")
        _write(out, html)
    except OSError as error:
        raise ValueError(f"{error.filename or out}: {error.strerror or error}") from error
    return {
        "html": str(out),
        "json": str(out.with_suffix(".json")),
        "pictures": [str(path) for path in pictures.paths],
        "num_runs": len(read),
        "problems": problems,
        "notes": [*notes, *(note for table in tables for note in table.notes)],
        "tables": [
            {
                "suite": table.suite,
                "rows": [
                    {"method": row.label, "mean": row.mean.value, "median": row.median.value, "runs": row.num_seeds}
                    for row in table.rows
                ],
            }
            for table in tables
        ],
    }


class _Pictures:
    """Figures as data URIs for the page and as files beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, bytes] = {}

    def add(self, name: str, figure: Figure, alt: str, caption: str) -> dict[str, str]:
        data = plots.png(figure)
        base = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_").lower() or "picture"
        name, number = f"{base}.png", 2
        while name in self._files:
            name, number = f"{base}_{number}.png", number + 1
        self._files[name] = data
        return {
            "source": f"data:image/png;base64,{base64.b64encode(data).decode()}",
            "alt": alt,
            "caption": caption,
            # In the browser's 96 dots an inch, so that letters have one size in all pictures.
            "width": str(round(96 * figure.get_figwidth())),
        }

    @property
    def paths(self) -> list[Path]:
        return [self._folder / name for name in self._files]

    def write(self) -> None:
        if self._files:
            self._folder.mkdir(parents=True, exist_ok=True)
        for name, data in self._files.items():
            (self._folder / name).write_bytes(data)


# -- sections --------------------------------------------------------------------------------------------------------


def _suite(table: TransferTable, pictures: _Pictures) -> dict[str, Any]:
    drawn = [target for target in table.targets if target.curves]
    figures = []
    floors: dict[Floor, list[str]] = {}
    for target in table.targets:
        if target.floor is not None:
            floors.setdefault(target.floor, []).append(target.target)
    if drawn:
        horizons = {f"{target.grid[-1]:,.0f}" for target in drawn}
        figures.append(
            pictures.add(
                f"{table.suite} learning curves",
                plots.plot_learning_curves(table),
                f"Learning curves of {', '.join(target.target for target in drawn)}",
                f"Average return of the episodes that ended in each of {len(drawn[0].grid)} windows of steps. "
                "Thick: the mean of a method over its sources and seeds; thin: single runs (from 10 runs on, a band "
                f"from the 10th to the 90th percentile). Areas are taken over {' or '.join(sorted(horizons))} agent "
                "steps; a run that ended early because its return was good enough holds its last point.",
            )
        )
    if any(row.method != "scratch" for row in table.rows):
        figures.insert(
            0,
            pictures.add(
                f"{table.suite} transfer table",
                plots.plot_transfer_table(table),
                "Transfer scores of each method with intervals, beside the paper's",
                "The table as a picture."
                + (
                    " Hollow marks: the paper's figures, from other budgets and hyper-parameters."
                    if any(row.paper for row in table.rows)
                    else ""
                ),
            ),
        )
        figures.append(
            pictures.add(
                f"{table.suite} transfer matrix",
                plots.plot_transfer_matrix(table),
                "Transfer scores by source and target, a matrix for each method",
                "Transfer score of every source (rows) and target (columns). White is scratch (100), green is positive "
                "and brown negative transfer; a dash was not run.",
            )
        )
    return {
        "name": table.suite,
        "anchor": "suite-" + re.sub(r"[^A-Za-z0-9]+", "-", table.suite).strip("-").lower(),
        "top": table.top,
        "confidence": f"{table.confidence:.0%}",
        "single": any(math.isnan(row.mean.low) for row in table.rows),
        "has_paper": any(row.paper for row in table.rows),
        "floors": [
            {"value": f"{floor.value:g}", "why": floor.why, "targets": ", ".join(targets)}
            for floor, targets in floors.items()
        ],
        "rows": [
            {
                "label": row.label,
                "statistics": [_statistic(value) for value in (row.mean, row.median, row.iqm)],
                "cells": len(row.cells),
                "runs": row.num_seeds,
                "paper_mean": f"{row.paper[0]:.0f}" if row.paper else DASH,
                "paper_median": f"{row.paper[1]:.0f}" if row.paper else DASH,
            }
            for row in table.rows
        ],
        "cells": [
            {
                "method": row.label,
                "source": cell.source or DASH,
                "target": cell.target,
                "score": _statistic(cell.score),
                "mean_return": f"{cell.mean_return:.2f}",
                "seeds": ", ".join(f"{score:.0f}" for score in sorted(cell.seed_scores, reverse=True)) or DASH,
            }
            for row in table.rows
            for cell in row.cells
        ],
        "figures": figures,
        "notes": list(table.notes),
    }


def _chain(run: Run, name: str, tables: Sequence[TransferTable], pictures: _Pictures) -> dict[str, Any]:
    measured = {result.task: result for result in run.column_results}
    rows = []
    for task in run.tasks:
        result = measured.get(task.task)
        rows.append(
            {
                "task": task.task,
                "steps": f"{task.last_step:,.0f}",
                "last": _last_return(task),
                "frozen": f"{result.frozen_return:.2f}" if result else DASH,
                "later": f"{result.later_return:.2f}" if result else DASH,
                "forgetting": f"{result.forgetting:.2f}" if result else DASH,
                "forward": _forward_transfer(task, tables),
            }
        )
    caption = "Average return of the episodes that ended in each of 60 windows of a task."
    figure = pictures.add(f"{run.name} tasks", plots.plot_run(run), f"Return of {run.name} over its tasks", caption)
    return {"name": name, "rows": rows, "figure": figure}


def _forward_transfer(task: TaskRun, tables: Sequence[TransferTable]) -> str:
    ceiling = known_ceiling(task.env, task.env_config)
    for table in tables:
        for target in table.targets:
            baselines = [curves for (method, _), curves in target.curves.items() if method == "scratch"]
            used = any(task is run for runs in target.runs.values() for run in runs)
            if task.sources and used and baselines and target.floor is not None and ceiling is not None:
                try:
                    value = forward_transfer(
                        task_curve(task, target.grid),
                        np.concatenate(baselines),
                        floor=target.floor.value,
                        ceiling=ceiling,
                    )
                except TransferError:
                    return DASH
                return f"{value:.2f}"
    return DASH


def _analyses(run: Run, name: str, pictures: _Pictures, notes: list[str]) -> list[dict[str, Any]]:
    """What `rllib analyze` left in the run folder; a damaged file is a note."""
    found = []
    for folder in sorted((run.path / ANALYSIS_FOLDER).glob("column_*")):
        sensitivities: dict[str, Sensitivity] = {}
        for method in METHODS:
            file = folder / f"{method}.json"
            if file.is_file():
                try:
                    sensitivities[method] = Sensitivity.from_json(read_json(file))
                except RunError as error:
                    notes.append(str(error))
                except ValueError as error:
                    notes.append(f"{file}: {error}")
        if not sensitivities:
            continue
        first = next(iter(sensitivities.values()))
        task = first.tasks[-1] if first.tasks else f"column {first.column}"
        caption = "; ".join(_settings(s) for s in sensitivities.values()) + "."
        if len(sensitivities) == 2 and sensitivities["afs"].values.shape == sensitivities["aps"].values.shape:
            alike = agreement(*sensitivities.values())
            if math.isfinite(alike["correlation"]):
                caption += (
                    f" AFS and APS correlate at {alike['correlation']:.2f} over layers and columns; the largest "
                    f"difference of a share is {alike['largest_difference']:.2f}."
                )
        figures = [
            pictures.add(
                f"{run.name} {folder.name} sensitivity",
                plots.plot_sensitivity(list(sensitivities.values())),
                f"Sensitivity of the policy of {task} to each layer and column",
                caption,
            )
        ]
        figures += _filters(run, folder, first.tasks, pictures, notes)
        found.append(
            {
                "name": f"{name}: policy of {task}",
                "figures": figures,
                "notes": [note for s in sensitivities.values() for note in s.notes],
            }
        )
    return found


def _filters(
    run: Run, folder: Path, tasks: Sequence[str], pictures: _Pictures, notes: list[str]
) -> list[dict[str, str]]:
    file = folder / "filters.json"
    if not file.is_file():
        return []
    try:
        figure = plots.plot_filters(read_json(file), tasks)
    except RunError as error:
        notes.append(str(error))
        return []
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        notes.append(f"{file}: not filters: {type(error).__name__}: {error}")
        return []
    return [
        pictures.add(
            f"{run.name} {folder.name} filters",
            figure,
            "First-layer filters with the most Fisher information in each column",
            "First-layer filters with the most Fisher information, most first, with their share of the layer's over "
            "all columns. The tiles are the input's channels: stacked frames, oldest first, or red, green, blue; "
            "orange is negative, purple positive.",
        )
    ]


def _settings(sensitivity: Sensitivity) -> str:
    settings = sensitivity.settings
    if sensitivity.method == "afs":
        return f"AFS over {settings.get('num_samples', '?')} states, {settings.get('actions', '?')} actions"
    score, floor = settings.get("score"), settings.get("floor")
    numbers = isinstance(score, int | float) and isinstance(floor, int | float)
    level = f" from {score:.1f}, floor {floor:g}" if numbers else ""
    return f"APS over {settings.get('num_episodes', '?')} episodes a score{level}"


def _run_row(task: TaskRun, name: str) -> dict[str, str]:
    reached = "ended by its return" if task.ended_by_return else "ended by its steps"
    return {
        "run": name,
        "task": task.task,
        "method": "(trains a source)" if task.is_source else method_label(task.method),
        "searched": ", ".join(f"{key} {_plain(value)}" for key, value in task.searched.items()),
        "source": task.source or DASH,
        "algorithm": task.algorithm,
        "seed": DASH if task.seed is None else str(task.seed),
        "steps": f"{task.last_step:,.0f}",
        "last": _last_return(task),
        "state": reached if task.finished else "unfinished",
    }


# -- parts -----------------------------------------------------------------------------------------------------------


def _names(runs: Sequence[Run], out: Path) -> dict[Path, str]:
    """What a reader may call each run: its path, from the page's folder on if it is below that."""
    folder = out.absolute().parent
    return {
        run.path: str(run.path.absolute().relative_to(folder))
        if run.path.absolute().is_relative_to(folder)
        else str(run.path)
        for run in runs
    }


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _statistic(interval: Interval) -> dict[str, str]:
    known = not math.isnan(interval.low)
    return {
        "value": DASH if math.isnan(interval.value) else f"{interval.value:.0f}",
        "interval": f"[{interval.low:.0f}, {interval.high:.0f}]" if known else "",
    }


def _last_return(task: TaskRun) -> str:
    """Over the last twentieth of the steps, for single iterations are few episodes."""
    late = task.steps >= 0.95 * task.steps[-1]
    return f"{task.return_sums[late].sum() / task.episodes[late].sum():.2f}"


def _version() -> str:
    try:
        return version("rllib_pnn")
    except PackageNotFoundError:
        return "(not installed)"


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a report that is open in a browser is never half a page."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")  # JSON may hold half a character
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
