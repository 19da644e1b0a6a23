"""Run folders as data: what a Tune trial of this package leaves on disk, read back. Neither torch nor Ray.

A run folder is a Tune trial folder with `experiment.json` (the validated experiment) beside Tune's own `result.json`
and `progress.csv`, and, once a column is frozen, `columns/manifest.json`. `result.json` is read first: Tune fixes the
header of `progress.csv` at the first result, so every metric that appears later (all of `columns/*`) is missing there.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rllib_pnn.files import RefusedFile, read_regular
from rllib_pnn.text import one_line, short

EXPERIMENT_FILE = "experiment.json"
RESULT_FILE = "result.json"
PROGRESS_FILE = "progress.csv"
MANIFEST_FILE = "columns/manifest.json"
MAX_JSON_BYTES = 64 * 2**20
MAX_RESULT_BYTES = 2**30

_INCOMPLETE = "{file}: the last line is incomplete (the run was killed while writing it) and was left out"

ARCHITECTURES = ("scratch", "finetune_heads", "finetune_all", "random_column", "progressive")


class RunError(ValueError):
    """A run folder or a file in it cannot be read. The message is one line that names the file."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


@dataclass(frozen=True)
class TaskRun:
    """One task of one run: the rows of its learning curve and what trained it.

    The arrays have one entry a training iteration in which an episode ended, N in all, in the order of `steps`.
    """

    run: Path
    """The run folder."""
    env: str
    env_config: Mapping[str, Any]
    task: str
    task_index: int
    architecture: str
    """One of `ARCHITECTURES`. A first column trained from nothing is `scratch` whatever the run's architecture."""
    sources: tuple[str, ...]
    """Tasks of the columns that training started from, first column first; empty for `scratch` and `random_column`."""
    seed: int | None
    steps: np.ndarray
    """(N,) agent steps spent on this task at the end of each iteration."""
    return_sums: np.ndarray
    """(N,) sum of the unclipped returns of the episodes that ended in each iteration."""
    episodes: np.ndarray
    """(N,) number of those episodes."""
    smoothed: bool
    """True if the run logged only RLlib's running average, which then stands in for each iteration's own average."""
    finished: bool
    """True if the task ended by its own `until`, False if the run was stopped or is still going."""
    step_budget: float | None
    """`until.num_env_steps`, None if the task has none."""
    algorithm: str = ""
    is_source: bool = False
    """It trained a column that a transfer experiment's trials start from; its score is not asked for."""
    searched: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters that were drawn for it."""
    top: int | None = None
    """How many jobs of a cell its experiment file wants scored."""
    steps_spent: float | None = None
    """Agent steps spent on this task in all, later iterations without an ended episode too; None: the last of `steps`.
    """

    @property
    def last_step(self) -> float:
        return float(self.steps[-1]) if self.steps_spent is None else self.steps_spent

    @property
    def ended_by_return(self) -> bool:
        """The task was left early because its return was good enough, so its curve goes on at that level."""
        return self.finished and (self.step_budget is None or self.last_step < self.step_budget)

    @property
    def method(self) -> str:
        """Row of the paper's Table 1: the architecture, with the number of columns if progressive."""
        if self.architecture == "progressive":
            return f"progressive_{len(self.sources) + 1}"
        return self.architecture

    @property
    def source(self) -> str:
        return " + ".join(self.sources)


@dataclass(frozen=True)
class ColumnResult:
    """How the column of one task did when it was measured again after later tasks."""

    task: str
    steps: float
    """Agent steps of the whole run when it was measured."""
    frozen_return: float
    """Return per episode when the column was frozen."""
    later_return: float
    """Return per episode when measured again."""

    @property
    def forgetting(self) -> float:
        return self.frozen_return - self.later_return


@dataclass(frozen=True)
class Run:
    """Everything that the analysis reads from one run folder."""

    path: Path
    experiment: Mapping[str, Any]
    tasks: tuple[TaskRun, ...]
    columns: tuple[Mapping[str, Any], ...]
    """Entries of the column store's manifest; empty before the first column is frozen."""
    column_results: tuple[ColumnResult, ...]
    """The last measurement of every frozen column."""
    notes: tuple[str, ...] = field(default=())
    """What was odd but not fatal, one line each."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def algorithm(self) -> str:
        return str(self.experiment.get("run", ""))


def find_runs(paths: Iterable[Path | str]) -> list[Path]:
    """Run folders among `paths` and below them, sorted, each once.

    Raises:
        RunError: a path does not exist, or there is no run folder at or below it.
    """
    found: dict[Path, Path] = {}  # a run that is named twice, or through a link, counts once
    for path in map(Path, paths):
        if not path.is_dir():
            raise RunError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}; expected a run folder")
        if (path / EXPERIMENT_FILE).is_file():
            found.setdefault(path.resolve(), path)
            continue
        below = sorted(file.parent for file in path.rglob(EXPERIMENT_FILE))
        if not below:
            stores = [
                file.parent
                for name in ("manifest.json", MANIFEST_FILE, f"*/{MANIFEST_FILE}")
                for file in path.glob(name)
            ]
            found_instead = f", {stores[0]} is a column store, which has no learning curve" if stores else ""
            raise RunError(
                f"{path}: no {EXPERIMENT_FILE} here or below{found_instead}; expected a run folder of `rllib train`"
            )
        for folder in below:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def find_columns(path: str | os.PathLike[str]) -> Path:
    """The column store that `path` names: itself, that of a run, or that of the only run in an experiment's folder.

    Raises:
        RunError: there is none, or there are several.
    """
    path = Path(path)
    if not os.path.isdir(path):
        what = "not a folder" if os.path.lexists(path) else "no such folder"
        raise RunError(f"{path}: {what}; expected a run folder or a column store")
    if os.path.lexists(path / Path(MANIFEST_FILE).name):
        return path
    runs = [path] if _is_run(path) else [folder for folder in sorted(path.iterdir()) if _is_run(folder)]
    if len(runs) > 1:
        raise RunError(f"{path}: holds {len(runs)} runs, choose one: {', '.join(map(str, runs))}")
    if not runs:
        raise RunError(f"{path}: holds no columns; expected a run folder or a column store")
    manifest = runs[0] / MANIFEST_FILE
    if not os.path.lexists(manifest):
        raise RunError(f"{runs[0]}: no column is frozen yet (there is no {MANIFEST_FILE})")
    return manifest.parent


def home_of(path: str | os.PathLike[str]) -> Path:
    """The folder around the column store that `path` names, where a run keeps what is made of its columns.

    A store that is not called `columns` is its own. Raises `RunError` as `find_columns` does.
    """
    store = find_columns(path)
    return store.parent if store.name == Path(MANIFEST_FILE).parent.name else store


def _is_run(path: Path) -> bool:
    """Of `rllib train`, or what an algorithm that was built in Python leaves."""
    return any(os.path.lexists(path / name) for name in (EXPERIMENT_FILE, MANIFEST_FILE))


def read_run(path: Path | str) -> Run:
    """Reads one run folder.

    Raises:
        RunError: a file is missing or damaged. A last line that a killed run left half written is a note, not an error.
    """
    path = Path(path)
    experiment = read_experiment(path)
    notes: list[str] = []
    rows = _rewound(_read_rows(path, notes))
    columns = _read_manifest(path / MANIFEST_FILE) if (path / MANIFEST_FILE).is_file() else ()
    progressive = _section(experiment, "progressive", path / EXPERIMENT_FILE)
    source_names = _source_names(path, experiment, progressive, columns)

    tasks = []
    by_task: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(str(row.get("progressive/task", experiment.get("name", path.name))), []).append(row)
    for index, (task, task_rows) in enumerate(by_task.items()):
        curve = _task_run(path, experiment, progressive, task, index, task_rows, source_names)
        if curve is None:
            notes.append(f"{path}: task {task!r} has no finished episode yet")
        else:
            tasks.append(curve)
    return Run(path, experiment, tuple(tasks), columns, _column_results(rows), tuple(notes))


def read_runs(paths: Iterable[Path | str]) -> tuple[list[Run], list[str]]:
    """Reads every run folder at or below `paths`; the second list says in one line each which could not be read.

    Trials of a transfer experiment that wait for their turn are one line together.

    Raises:
        RunError: none could be read.
    """
    runs: list[Run] = []
    problems: list[str] = []
    waiting: dict[Path, int] = {}
    for path in find_runs(paths):
        if _waits(path):
            waiting[path.parent] = waiting.get(path.parent, 0) + 1
            continue
        try:
            runs.append(read_run(path))
        except RunError as error:
            problems.append(str(error))
    for folder, count in waiting.items():
        problems.append(f"{folder}: {count} trial{'s have' if count > 1 else ' has'} no result yet")
    if not runs:
        raise RunError(problems[0] if problems else "no run folders given")
    return runs, problems


def read_experiment(run: Path | str) -> Mapping[str, Any]:
    """`experiment.json` of a run folder as a dict. Raises `RunError` if it is missing or damaged."""
    file = Path(run) / EXPERIMENT_FILE
    experiment = read_json(file)
    if not isinstance(experiment, dict):
        raise RunError(f"{file}: expected a JSON object, got {type(experiment).__name__}")
    if not isinstance(experiment.get("env") or "", str):
        raise RunError(f"{file}: env: expected an environment id, got {short(experiment['env'])}")
    return experiment


def experiment_tasks(run: Path | str, experiment: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """`progressive.tasks` of an experiment, checked: dicts with a name and, as dicts, `env_config` and `until`."""
    file = Path(run) / EXPERIMENT_FILE
    tasks = _section(experiment, "progressive", file).get("tasks", [])
    if not isinstance(tasks, list) or not all(isinstance(t, dict) and isinstance(t.get("name"), str) for t in tasks):
        raise RunError(f"{file}: progressive.tasks: expected a list of tasks with a name each, got {short(tasks)}")
    for task in tasks:
        for key in ("env_config", "until"):
            _section(task, key, file, f"progressive.tasks[{task['name']}].")
    return tasks


def read_json(file: Path) -> Any:
    """A JSON file's value. Raises `RunError` with one line if it is missing, unreadable or not JSON."""
    text = _read_text(file, MAX_JSON_BYTES)
    try:
        return json.loads(text)
    except RecursionError:
        raise RunError(f"{file}: nested too deeply") from None
    except ValueError as error:
        raise RunError(f"{file}: not JSON: {error}") from error


def _read_text(file: Path, limit: int) -> str:
    try:
        return read_regular(file, limit).decode("utf-8")
    except FileNotFoundError:
        raise RunError(f"{file}: no such file") from None
    except RefusedFile as error:
        raise RunError(str(error)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{file}: cannot be read: {error}") from error


def number(value: Any) -> float:
    """A logged value as a float; NaN for anything that is no number (Tune writes NaN as null or "null")."""
    if isinstance(value, bool) or value is None:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _section(parent: Mapping[str, Any], key: str, file: Path, where: str = "") -> Mapping[str, Any]:
    value = parent.get(key) or {}
    if not isinstance(value, dict):
        raise RunError(f"{file}: {where}{key}: expected a mapping, got {short(value)}")
    return value


def _waits(path: Path) -> bool:
    """A trial of a transfer experiment that has not got to its first result."""
    if (path / RESULT_FILE).is_file() or (path / PROGRESS_FILE).is_file():
        return False
    try:
        return isinstance(read_experiment(path).get("trial"), dict)
    except RunError:
        return False


# -- rows ----------------------------------------------------------------------------------------------------------


def _read_rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Rows of `result.json` (of `progress.csv` if that is missing), flattened to "a/b" keys."""
    for name, reader in ((RESULT_FILE, _json_rows), (PROGRESS_FILE, _csv_rows)):
        file = path / name
        if not file.is_file():
            continue
        text = _read_text(file, MAX_RESULT_BYTES)
        rows = list(reader(file, text, notes))
        if rows:
            return rows
        if text.strip():
            raise RunError(f"{file}: no complete result in it")
    raise RunError(f"{path / RESULT_FILE}: no results yet (neither {RESULT_FILE} nor {PROGRESS_FILE} has a row)")


def _json_rows(file: Path, text: str, notes: list[str]) -> Iterator[dict[str, Any]]:
    lines = text.split("\n")
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        result = _parse_line(line)
        if result is None and index == len(lines) - 1:
            notes.append(_INCOMPLETE.format(file=file))
        elif result is None:
            raise RunError(f"{file}: line {index + 1} is damaged: {short(line)}")
        else:
            flat = {key: value for key, value in result.items() if not isinstance(value, dict)}
            for section in ("progressive", "columns", "env_runners"):
                flat.update(_flatten(result.get(section), section))
            yield flat


def _parse_line(line: str) -> dict[str, Any] | None:
    """A result, or None. A resumed trial appends to the half line of the killed one; the tail is then the result."""
    start = line.find("{")
    while start >= 0:
        try:
            result = json.loads(line[start:])
        except RecursionError:
            return None
        except ValueError:
            # A nested object never parses here, for it is followed by the rest of the object around it.
            start = line.find("{", start + 1)
            continue
        return result if isinstance(result, dict) and "training_iteration" in result else None
    return None


def _flatten(value: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {} if value is None else {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flatten(item, f"{prefix}/{key}"))
    return flat


def _csv_rows(file: Path, text: str, notes: list[str]) -> Iterator[dict[str, Any]]:
    if "\0" in text:
        raise RunError(f"{file}: damaged: it contains NUL bytes")
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        header = reader.fieldnames or []
        if "training_iteration" not in header:
            raise RunError(f"{file}: the header has no column training_iteration; expected Tune's progress.csv")
        rows = list(reader)
    except csv.Error as error:
        raise RunError(f"{file}: damaged CSV: {error}") from error
    if not text.endswith("\n"):
        notes.append(_INCOMPLETE.format(file=file))
        rows = rows[:-1]
    for index, row in enumerate(rows):
        if None in row.values() or None in row:
            raise RunError(f"{file}: row {index + 1} does not have the header's {len(header)} values")
        yield {key: value for key, value in row.items() if value != ""}


def _rewound(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without those that a resume took back: it starts again at the checkpoint's iteration and appends."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        iteration = number(row.get("training_iteration"))
        while kept and number(kept[-1].get("training_iteration")) >= iteration:
            kept.pop()
        kept.append(row)
    return kept


# -- tasks ---------------------------------------------------------------------------------------------------------


def _task_run(
    path: Path,
    experiment: Mapping[str, Any],
    progressive: Mapping[str, Any],
    task: str,
    index: int,
    rows: Sequence[Mapping[str, Any]],
    source_names: tuple[str, ...],
) -> TaskRun | None:
    """The curve of one task; None if no episode of it has ended yet."""
    specs = experiment_tasks(path, experiment)
    names = [spec["name"] for spec in specs]
    position = names.index(task) if task in names else int(number(rows[0].get("progressive/task_index", index)))
    spec: Mapping[str, Any] = specs[position] if task in names else {}

    steps = np.array([_first(row, "progressive/task_env_steps", "num_env_steps_sampled_lifetime") for row in rows])
    exact = any("progressive/episode_return_sum" in row for row in rows)
    if exact:
        episodes = np.array([number(row.get("progressive/num_episodes")) for row in rows])
        sums = np.array([number(row.get("progressive/episode_return_sum")) for row in rows])
    else:
        means = np.array(
            [_first(row, "progressive/episode_return_mean", "env_runners/episode_return_mean") for row in rows]
        )
        episodes = np.array([_first(row, "progressive/num_episodes", "env_runners/num_episodes") for row in rows])
        episodes[np.isnan(episodes)] = 1
        # RLlib repeats its running average in iterations where no episode ended; those say nothing new.
        sums = means * episodes
    seen = np.isfinite(steps) & np.isfinite(sums) & (episodes > 0)
    if not seen.any():
        return None
    config = experiment.get("config") or {}
    seed = config.get("seed", experiment.get("seed")) if isinstance(config, dict) else None
    architecture = str(progressive.get("architecture", "progressive" if progressive else "scratch"))
    if architecture not in ARCHITECTURES:
        raise RunError(
            f"{path / EXPERIMENT_FILE}: progressive.architecture: expected one of {', '.join(ARCHITECTURES)}, "
            f"got {architecture!r}"
        )
    earlier = (*source_names, *names[:position])
    if architecture in ("scratch", "random_column"):
        earlier = ()
    elif architecture.startswith("finetune"):
        earlier = earlier[-1:]
    if architecture == "progressive" and progressive.get("lateral") == "none":
        earlier = ()  # columns that read nothing are baseline 1, each
    if not earlier and architecture != "random_column":
        architecture = "scratch"
    trial = _section(experiment, "trial", path / EXPERIMENT_FILE)
    top = trial.get("top")
    until = _section(spec, "until", path / EXPERIMENT_FILE)
    budget = number(until.get("num_env_steps"))
    return TaskRun(
        run=path,
        env=str(experiment.get("env") or (config.get("env") if isinstance(config, dict) else None) or "unknown"),
        env_config={**_env_config(config), **_section(spec, "env_config", path / EXPERIMENT_FILE)},
        task=task,
        task_index=position,
        architecture=architecture,
        sources=earlier,
        seed=seed if isinstance(seed, int) and not isinstance(seed, bool) else None,
        steps=steps[seen],
        return_sums=sums[seen],
        episodes=episodes[seen],
        smoothed=not exact,
        finished=any(str(rows[-1].get(f"progressive/{key}")).lower() == "true" for key in ("task_over", "finished")),
        step_budget=None if math.isnan(budget) else budget,
        algorithm=str(experiment.get("run", "")),
        is_source=trial.get("role") == "source",
        searched=_section(trial, "searched", path / EXPERIMENT_FILE, "trial."),
        top=top if isinstance(top, int) and not isinstance(top, bool) and top > 0 else None,
        steps_spent=float(steps[np.isfinite(steps)][-1]),
    )


def _env_config(config: Any) -> dict[str, Any]:
    value = config.get("env_config") if isinstance(config, dict) else None
    return dict(value) if isinstance(value, dict) else {}


def _first(row: Mapping[str, Any], *keys: str) -> float:
    for key in keys:
        value = number(row.get(key))
        if not math.isnan(value):
            return value
    return math.nan


def _source_names(
    path: Path, experiment: Mapping[str, Any], progressive: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]
) -> tuple[str, ...]:
    """Tasks of the columns that the run started from (`columns_from`), first column first."""
    stated = progressive.get("source_tasks")
    if isinstance(stated, list):
        return tuple(map(str, stated))
    origin = progressive.get("columns_from")
    if not origin:
        return ()
    # A run copies the columns that it starts from into its own store, under "<store>:<task>".
    copied = [
        str(entry.get("task")).partition(":")[2] or str(entry.get("task"))
        for entry in columns
        if isinstance(entry.get("extra"), dict) and entry["extra"].get("source")
    ]
    if copied:
        return tuple(copied)
    for folder in (Path(str(origin)), path / str(origin), path.parent / str(origin)):
        for file in (folder / MANIFEST_FILE, folder / "manifest.json"):
            if _is_file(file):
                return tuple(str(entry.get("task", f"column {i}")) for i, entry in enumerate(_read_manifest(file)))
    return (Path(str(origin)).name,)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than a file system takes
        return False


def _read_manifest(file: Path) -> tuple[Mapping[str, Any], ...]:
    manifest = read_json(file)
    entries = manifest.get("columns") if isinstance(manifest, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise RunError(f"{file}: columns: expected a list of column entries, got {short(entries)}")
    return tuple(entries)


def _column_results(rows: Sequence[Mapping[str, Any]]) -> tuple[ColumnResult, ...]:
    """The last `columns/<task>/*` of each task. A task's name may hold slashes, a metric's does not."""
    latest: dict[str, ColumnResult] = {}  # NaN until a column is frozen
    for row in rows:
        for key, value in row.items():
            if key.startswith("columns/") and key.endswith("/frozen_episode_return_mean"):
                task = key.removeprefix("columns/").removesuffix("/frozen_episode_return_mean")
                later = number(row.get(f"columns/{task}/episode_return_mean"))
                if not (math.isnan(later) or math.isnan(number(value))):
                    steps = number(row.get("num_env_steps_sampled_lifetime"))
                    latest[task] = ColumnResult(task, steps, number(value), later)
    return tuple(latest.values())
