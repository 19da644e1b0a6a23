"""What a transfer experiment ends in: sensitivities of its progressive trials, and the report on all of them.

Sensitivities are measured in parallel on the cluster; what an earlier call left is not measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from rllib_pnn.analysis.analyze import ANALYSIS_FOLDER, analyze_run
from rllib_pnn.analysis.report import write_report
from rllib_pnn.experiment.folder import RunFolder
from rllib_pnn.network.store import ColumnStore, ColumnStoreError

REPORT_FILE = "report.html"
EPISODES = 10  # of a score, where the file asks for no evaluation episodes


@dataclass(frozen=True)
class Conclusion:
    """The report, its transfer table, and in one line each what could not be had."""

    report: Path | None
    tables: list[dict[str, Any]] = field(default_factory=list)
    """For each suite its name and `rows`: method, mean and median in percent, number of trials."""
    problems: list[str] = field(default_factory=list)


def conclude(path: Path, runs: Sequence[RunFolder], say: Callable[[str], None]) -> Conclusion:
    """Measures what is asked for and still missing, and writes the report.

    Args:
        path: the experiment's folder; the report goes there.
        runs: its trials.
        say: hears a line about every trial that was measured.
    """
    problems = []
    jobs = {
        _analyze.remote(str(run.path), methods, episodes): run for run in runs for methods, episodes in _missing(run)
    }
    if jobs:
        say(f"measuring the sensitivity of {len(jobs)} polic{'ies' if len(jobs) > 1 else 'y'}")
    waiting = list(jobs)
    while waiting:
        (ready, *_), waiting = ray.wait(waiting)
        try:
            error = ray.get(ready)
        except ray.exceptions.RayError as died:
            error = str(died).splitlines()[0]
        if error is not None:
            problems.append(f"{jobs[ready].path}: {error}")
        say(f"{jobs[ready].path.name}: {'sensitivity measured' if error is None else error}")
    if not any(run.state.status == "finished" for run in runs):
        return Conclusion(None, problems=problems)
    try:
        written = write_report([path], path / REPORT_FILE, title=f"{path.name}: transfer")
    except ValueError as error:
        return Conclusion(None, problems=[*problems, str(error)])
    return Conclusion(path / REPORT_FILE, written["tables"], [*problems, *written["problems"], *written["notes"]])


def _missing(run: RunFolder) -> list[tuple[tuple[str, ...], int]]:
    """The methods that a trial's file asks for and that were not applied to its newest column yet."""
    if run.state.status != "finished":
        return []
    experiment = run.experiment
    if experiment.trial is None or experiment.progressive is None or not experiment.trial.sensitivity:
        return []
    try:
        newest = len(ColumnStore(run.columns).entries) - 1
    except ColumnStoreError:
        newest = -1  # `analyze_run` will say what is wrong with it
    folder = run.path / ANALYSIS_FOLDER / f"column_{newest:03d}"
    methods = tuple(m for m in experiment.trial.sensitivity if not (folder / f"{m}.json").is_file())
    return [(methods, experiment.progressive.evaluation_episodes or EPISODES)] if methods else []


@ray.remote(num_cpus=1)
def _analyze(path: str, methods: tuple[str, ...], episodes: int) -> str | None:
    """On a node of the cluster; returns what went wrong, in one line."""
    import torch

    torch.set_num_threads(1)
    try:
        analyze_run(path, methods, num_episodes=episodes)
    except Exception as error:  # a measurement that fails must not hide the report
        return " ".join(str(error).split())[:400] or type(error).__name__
    return None
