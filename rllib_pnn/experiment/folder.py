"""The folders that `rllib train` leaves. No Ray, no torch.

    runs/pong-soup_2026-01-31_12-00-00/       an experiment: plan.json, which names its runs
        seed_0/                               a run, which is Tune's trial folder
            experiment.json                   what runs here: environment, algorithm, config, tasks
            state.json                        its status and its complete checkpoints
            result.json, progress.csv         one row a training iteration
            events.out.tfevents.*             the same for TensorBoard
            params.json                       the whole AlgorithmConfig
            checkpoint_000007/ ...            RLlib's checkpoints, the last few
            columns/                          the frozen columns (a ColumnStore)
            analysis/                         sensitivities, from `rllib analyze`
    runs/pong-soup-transfer/                  a transfer experiment: one folder, whenever its file is trained
        source_pong_seed_0/                   a trial whose columns others start from
        pong_to_noisy_progressive_seed_0/     a trial that is scored
        report.html                           what `rllib report` makes of all of them

What a killed run leaves is enough to go on from: every file is moved into place whole, and a checkpoint counts once
`state.json` names it.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rllib_pnn.experiment.errors import InputError
from rllib_pnn.experiment.spec import Experiment, Plan, load_experiment, load_plans
from rllib_pnn.files import RefusedFile, read_regular, write_whole
from rllib_pnn.text import short

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PLAN_FILE = "plan.json"
EXPERIMENT_FILE = "experiment.json"
STATE_FILE = "state.json"
LOCK_FILE = ".lock"
ERROR_FILE = "error.txt"
MAX_JSON_BYTES = 4 * 2**20
MAX_RESULT_BYTES = 2**30
RESULT_FILE = "result.json"
PROGRESS_FILE = "progress.csv"
COLUMNS_FOLDER = "columns"

Status = Literal["waiting", "running", "stopped", "failed", "finished"]
Iteration = Annotated[int, Field(ge=0)]


class CheckpointRecord(BaseModel):
    """A complete checkpoint and the training iteration that it was taken after."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Annotated[str, Field(pattern=r"^checkpoint_[0-9]+$")]
    training_iteration: Iteration
    time_total_s: float = 0.0

    @property
    def index(self) -> int:
        return int(self.folder.rpartition("_")[2])


class RunState(BaseModel):
    """`state.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    status: Status = "waiting"
    checkpoints: list[CheckpointRecord] = []


class PlanFile(BaseModel):
    """`plan.json`: the experiment's name, the file that it came from and its runs' folders."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["rllib_pnn.plan/1"] = "rllib_pnn.plan/1"
    name: str
    source: str
    runs: Annotated[list[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_=.+-]*$")]], Field(min_length=1)]


class RunFolder:
    """One run's folder.

    Args:
        path: the folder; it holds `experiment.json`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def experiment(self) -> Experiment:
        return load_experiment(self.path / EXPERIMENT_FILE)[1]

    @property
    def columns(self) -> Path:
        """The folder of the run's column store; it exists once a column is frozen."""
        return self.path / COLUMNS_FOLDER

    @property
    def state(self) -> RunState:
        """Raises `InputError` if `state.json` is damaged; a run that never started has none."""
        file = self.path / STATE_FILE
        try:
            return RunState.model_validate_json(read_regular(file, MAX_JSON_BYTES))
        except FileNotFoundError:
            return RunState()
        except RefusedFile as error:
            raise InputError(str(error)) from None
        except (OSError, ValidationError) as error:
            raise InputError(f"{file}: damaged: {_first_line(error)}") from None

    @property
    def checkpoints(self) -> list[CheckpointRecord]:
        """The complete checkpoints that are still there, oldest first."""
        folders = [(record, self.path / record.folder) for record in self.state.checkpoints]
        return [record for record, folder in folders if folder.is_dir() and not folder.is_symlink()]

    def set_status(self, status: Status) -> None:
        write_json(self.path / STATE_FILE, self.state.model_copy(update={"status": status}).model_dump())

    def add_checkpoint(self, record: CheckpointRecord) -> None:
        """Notes a checkpoint that is complete on disk, and forgets those that were deleted."""
        kept = [old for old in self.checkpoints if old.index < record.index]
        write_json(self.path / STATE_FILE, self.state.model_copy(update={"checkpoints": [*kept, record]}).model_dump())

    def failure(self) -> str:
        """Why the run failed and what is left of it, in one line: the exception that ends `error.txt`."""
        try:
            text = read_regular(self.path / ERROR_FILE, MAX_JSON_BYTES).decode("utf-8", "replace")
        except (OSError, RefusedFile):
            text = ""
        checkpoints = self.checkpoints
        last = (
            f"last good checkpoint: {checkpoints[-1].folder} of iteration {checkpoints[-1].training_iteration}"
            if checkpoints
            else "there is no checkpoint yet"
        )
        return f"{last_exception(text)}; {last}"

    def last_result(self) -> dict[str, Any]:
        """The last complete row of `result.json`; {} if there is none."""
        try:
            lines = read_regular(self.path / RESULT_FILE, MAX_RESULT_BYTES).decode("utf-8").splitlines()
        except (FileNotFoundError, UnicodeDecodeError, RefusedFile):
            return {}
        for line in reversed(lines):
            try:
                return dict(json.loads(line))
            except (ValueError, TypeError, RecursionError):
                continue
        return {}


def last_exception(traceback: str, limit: int = 500) -> str:
    """The last exception that a traceback names, in one line; "unknown" if there is none."""
    lines = [line.strip() for line in traceback.splitlines() if line.strip() and not line.startswith("Failure # ")]
    named = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt|Trouble)\b")
    found = [i for i, line in enumerate(lines) if named.match(line)]
    # A process that was killed leaves no exception; what Ray says first about it is the best of many words.
    message = " ".join(lines[found[-1] :]) if found else lines[0] if lines else "unknown"
    name, colon, rest = message.partition(": ")
    if name.endswith("TrainingTrouble"):
        message = rest  # it says all
    elif colon:
        message = f"{name.rpartition('.')[2]}: {rest}"
    return message if len(message) <= limit else message[: limit - 3] + "..."


def create_experiment(storage: Path, plan: Plan) -> Path:
    """Makes the folder of an experiment and of each of its runs; returns the experiment's.

    Raises:
        InputError: `storage` can't be written to. Nothing is left then.
    """
    try:
        storage.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
        for attempt in range(1000):
            path = storage / (f"{plan.name.replace(' ', '-')}_{stamp}" + (f"_{attempt}" if attempt else ""))
            try:
                path.mkdir()
                break
            except FileExistsError:
                continue
        for name, experiment in plan.runs.items():
            (path / name).mkdir()
            write_json(path / name / EXPERIMENT_FILE, experiment.model_dump(mode="json"))
        (path / LOCK_FILE).touch()
        contents = PlanFile(name=plan.name, source=str(plan.source.path.absolute()), runs=list(plan.runs))
        write_json(path / PLAN_FILE, contents.model_dump())
    except OSError as error:
        raise InputError(f"--storage {storage}: {error.filename or storage}: {error.strerror or error}") from None
    return path


def transfer_folder(storage: Path, plan: Plan) -> Path:
    """Where a transfer experiment lives in `storage`, whenever it is trained: what is finished there is kept."""
    return storage / plan.name.replace(" ", "-")


def check_transfer(path: Path, plan: Plan) -> None:
    """Raises `InputError` if a trial was started in `path` with other settings than the plan's. Writes nothing."""
    if not path.exists():
        return
    if not (path / PLAN_FILE).is_file() and any(not file.name.startswith(".") for file in path.iterdir()):
        raise InputError(f"{path}: holds no {PLAN_FILE}, so it is no transfer experiment; choose another --storage")
    for name, experiment in plan.runs.items():
        run = RunFolder(path / name)
        if not (run.path / EXPERIMENT_FILE).is_file() or run.state.status == "waiting":
            continue
        key, old, new = _difference(_settings(run.experiment), _settings(experiment)) or ("", None, None)
        if key:
            raise InputError(
                f"{run.path}: was trained with {key} {short(old)}, the file says {short(new)}; change it back, choose "
                "another --storage, or remove what is to be trained anew"
            )


def make_folder(path: Path) -> Path:
    """Raises `InputError` if it can't be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--storage {path.parent}: {error.filename or path}: {error.strerror or error}") from None
    return path


def open_transfer(path: Path, plan: Plan) -> None:
    """Writes the plan of a transfer experiment into its folder, or adds the trials that are new in the file.

    Trials that the file has no more stay.

    Raises:
        InputError: the folder can't be written to.
    """
    try:
        known = read_plan(path).runs if (path / PLAN_FILE).is_file() else []
        # The plan first: its trials need not be there yet, and a folder without a plan would be nobody's.
        runs = list(dict.fromkeys([*known, *plan.runs]))
        contents = PlanFile(name=plan.name, source=str(plan.source.path.absolute()), runs=runs)
        write_json(path / PLAN_FILE, contents.model_dump())
        for name, experiment in plan.runs.items():
            (path / name).mkdir(exist_ok=True)
            write_json(path / name / EXPERIMENT_FILE, experiment.model_dump(mode="json"))
    except OSError as error:
        raise InputError(f"--storage {path.parent}: {error.filename or path}: {error.strerror or error}") from None


def _settings(experiment: Experiment) -> dict[str, Any]:
    """What a trial's result depends on."""
    settings = experiment.model_dump(mode="json", exclude={"name", "checkpoint_config"})
    settings["trial"] = {key: (settings["trial"] or {}).get(key) for key in ("role", "source_run")}
    return settings


def edited(path: Path, plan: Plan, source: Path | None = None) -> str | None:
    """What the tuned example of an experiment says otherwise by now, in one line; None if nothing or it is gone.

    Args:
        path: the experiment's folder.
        plan: its runs, or some of them, as they were started.
        source: the tuned example; the file that the experiment came from if None.
    """
    source = source or Path(read_plan(path).source)
    if not source.is_file():
        return None
    keeps = "the run keeps its own settings"
    try:
        now = next((found for found in load_plans(source) if found.name == plan.name), None)
    except InputError as error:
        return f"{error}; {keeps}"
    if now is None:
        return None
    started, given = plan.runs, now.runs
    if len(started) < len(read_plan(path).runs):
        given = {name: experiment for name, experiment in given.items() if name in started}
    if len(started) == len(given) == 1:  # its seed may be another one, and so its name
        given = dict(zip(started, given.values(), strict=True))
    old = {name: _filed(experiment) for name, experiment in started.items()}
    new = {name: _filed(experiment, started.get(name)) for name, experiment in given.items()}
    found = _difference(old, new)
    if found is None:
        return None
    key, before, after = found
    if len(old) == 1:
        key = key.removeprefix(f"{next(iter(old))}.")
    if before is None or after is None:
        what = f"{key} {short(before or after)} is {'new' if before is None else 'no longer'} there"
    else:
        what = f"{key} is {short(after)} there by now, here {short(before)}"
    is_progressive = any(experiment.progressive is not None for experiment in plan.runs.values())
    return f"{source}: {what}; {keeps}" + ("; new tasks: a new run with columns_from" if is_progressive else "")


def _filed(experiment: Experiment, started: Experiment | None = None) -> dict[str, Any]:
    """An experiment's settings as its file has them; of `columns_from` as it was `started` if that may be the same."""
    settings = experiment.model_dump(mode="json", exclude={"name"})
    progressive = settings["progressive"]
    if progressive is not None:
        del progressive["source_tasks"]  # `rllib train` fills it in
        given = progressive["columns_from"]
        before = started.progressive.columns_from if started is not None and started.progressive is not None else None
        if given is not None and before is not None and _ends_with(Path(before), Path(given)):
            progressive["columns_from"] = before
    return settings


def _ends_with(path: Path, given: Path) -> bool:
    """Whether `given`, from whatever working directory, may be `path` or the folder that `path` is the only run of."""
    end = tuple(part for part in given.parts if part != "..")
    return any(place.parts[-len(end) :] == end for place in (path, path.parent) if end)


def _difference(old: Any, new: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """Key path of the first difference, and both values; None is what is missing."""
    if isinstance(old, list) and isinstance(new, list):
        for index, (a, b) in enumerate(itertools.zip_longest(old, new)):
            found = _difference(a, b, f"{where}[{index}]")
            if found:
                return found
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            found = _difference(old.get(key), new.get(key), f"{where}.{key}" if where else key)
            if found:
                return found
        return None
    return None if old == new else (where, old, new)


def check_storage(storage: Path) -> None:
    """Raises `InputError` unless folders can be made in `storage`. Makes nothing."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(storage)):  # Path() makes one slash of two
        raise InputError(
            f"--storage {storage}: expected a folder that all nodes see (NFS, EFS, a mounted bucket), got a URI; from "
            "Python, Tune's own storage_path takes one, and columns are uploaded there (see docs/cluster.md)"
        )
    ancestor = storage.absolute()
    while not os.path.lexists(ancestor):
        ancestor = ancestor.parent
    if not ancestor.is_dir():
        raise InputError(f"--storage {storage}: {ancestor} is not a folder")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise InputError(
            f"--storage {storage}: no permission to write to {ancestor}; choose another folder with --storage DIR"
        )


def find_runs(path: Path, *, expected: str = "a run folder of `rllib train`") -> list[RunFolder]:
    """The run folders that `path` names: itself, or those of an experiment.

    Args:
        expected: what the complaint asks for.

    Raises:
        InputError: it is neither.
    """
    if (path / EXPERIMENT_FILE).is_file():
        return [RunFolder(path)]
    if (path / PLAN_FILE).is_file():
        return [RunFolder(path / name) for name in read_plan(path).runs]
    if not path.exists():
        raise InputError(f"{path}: no such folder, expected {expected}")
    if not path.is_dir():
        raise InputError(f"{path}: a file, expected {expected}")
    below = sorted(file.parent for file in path.glob(f"*/{PLAN_FILE}"))
    mend = f"; did you mean {below[-1]}?" if below else ""
    stores = [store for store in (path, path / COLUMNS_FOLDER) if (store / "manifest.json").is_file()]
    if stores:
        mend = f"; {stores[0]} is a column store, which `columns_from` of a new run takes"
    raise InputError(f"{path}: holds neither {EXPERIMENT_FILE} nor {PLAN_FILE}, expected {expected}{mend}")


def find_experiment(path: Path) -> tuple[Path, list[str]]:
    """The experiment folder that `path` names, and the runs in it that are meant: all, or the one that `path` is."""
    find_runs(path)
    if (path / PLAN_FILE).is_file():
        return path, read_plan(path).runs
    parent = path.absolute().parent
    if not (parent / PLAN_FILE).is_file():
        raise InputError(f"{parent}: holds no {PLAN_FILE}, so the run in {path} can't be resumed there")
    return parent, [path.absolute().name]


def read_plan(path: Path) -> PlanFile:
    """Reads `plan.json`. Raises `InputError` if it is damaged."""
    file = path / PLAN_FILE
    try:
        return PlanFile.model_validate_json(read_regular(file, MAX_JSON_BYTES))
    except RefusedFile as error:
        raise InputError(str(error)) from None
    except (OSError, ValidationError) as error:
        raise InputError(f"{file}: damaged: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def lock(path: Path) -> IO[str]:
    """Keeps other processes from writing to an experiment's folder until the returned file is closed.

    Raises:
        InputError: another process holds it.
    """
    file = (path / LOCK_FILE).open("a+", encoding="utf-8")
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise InputError(f"{path}: in use by {holder}; stop it first") from None
    file.truncate(0)
    file.write(f"process {os.getpid()}")
    file.flush()
    return file


def write_json(path: Path, data: Any) -> None:
    """Writes a file so that it is there whole or not at all."""
    write_whole(path, json.dumps(data, indent=2) + "\n")


def _iteration(value: Any) -> float:
    """A row's training iteration; infinite, and so not kept, for a damaged row."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.inf


class ResultLog:
    """Appends training results to `result.json` and `progress.csv`.

    Unlike Tune's own loggers it writes into the run folder itself rather than copying a staging folder every so often,
    gives `progress.csv` a column for every metric whenever it first appears (Tune fixes them at the first result, when
    no episode has ended and no column is frozen), and takes back the rows after the checkpoint that a run resumes from.

    Args:
        path: the run folder.
        training_iteration: the iteration that the run (re)starts after; later rows are taken back.
    """

    def __init__(self, path: Path, training_iteration: int = 0) -> None:
        self._result_file = path / RESULT_FILE
        self._progress_file = path / PROGRESS_FILE
        rows = self._rewind(training_iteration)
        self._header = list(dict.fromkeys(key for row in rows for key in row))
        self._write_csv(rows)

    def append(self, line: str, row: Mapping[str, Any]) -> None:
        """Args: line: the result as JSON, in one line. row: its numbers and words, by "a/b" keys."""
        with self._result_file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        new = [key for key in row if key not in self._header]
        if new:
            old = self._read_csv()
            self._header += new
            self._write_csv([*old, row])
        else:
            with self._progress_file.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self._header).writerow(row)

    def _rewind(self, training_iteration: int) -> list[dict[str, Any]]:
        try:
            text = read_regular(self._result_file, MAX_RESULT_BYTES).decode("utf-8", "replace")
        except FileNotFoundError:
            text = ""
        except RefusedFile as error:
            raise InputError(str(error)) from None
        kept = []
        for line in text.split("\n"):
            try:
                iteration = _iteration(json.loads(line)["training_iteration"])
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # the half line of a killed run
            if iteration <= training_iteration:
                kept.append(line)
        if kept or text:
            write_whole(self._result_file, "".join(line + "\n" for line in kept))
        return [row for row in self._read_csv() if _iteration(row.get("training_iteration")) <= training_iteration]

    def _read_csv(self) -> list[dict[str, Any]]:
        try:
            text = read_regular(self._progress_file, MAX_RESULT_BYTES).decode("utf-8", "replace")
        except FileNotFoundError:
            return []
        except RefusedFile as error:
            raise InputError(str(error)) from None
        whole = text[: text.rfind("\n") + 1]
        return [{k: v for k, v in row.items() if k and v} for row in csv.DictReader(io.StringIO(whole, newline=""))]

    def _write_csv(self, rows: list[Any]) -> None:
        if not self._header:
            self._progress_file.unlink(missing_ok=True)
            return
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, self._header)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self._progress_file, buffer.getvalue())
