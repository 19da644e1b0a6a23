"""Runs experiments on Ray Tune: `Experiment` -> `AlgorithmConfig` -> Tune -> run folder.

Tune schedules the runs, restarts a run whose process dies from its last checkpoint, and keeps the last few checkpoints.
What a run leaves is written here (see `rllib_pnn.experiment.folder`), and a killed run goes on from that alone:
`Tuner.restore` would need Tune's own snapshot, which may be stale or half written, holds pickled code, and asks for the
CPUs of the old cluster.

The trials of a transfer experiment go to one Tune run too. A trial whose columns come from another one is handed to
Tune once that one has finished, so that everything that can run does.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import ray
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.utils.annotations import override
from ray.train._internal.session import _TrainingResult
from ray.tune import Callback, Checkpoint, CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.experiment import Trial
from ray.tune.logger import TBXLoggerCallback
from ray.tune.result import SHOULD_CHECKPOINT, TIME_TOTAL_S, TRAINING_ITERATION
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper
from ray.tune.utils import flatten_dict
from ray.tune.utils.util import SafeFallbackEncoder
from rich.console import Console

from rllib_pnn.analysis.analyze import task_name
from rllib_pnn.analysis.runs import RunError, find_columns
from rllib_pnn.experiment.algorithm import Cluster, build_config, check_env, complaint
from rllib_pnn.experiment.conclude import Conclusion, conclude
from rllib_pnn.experiment.errors import InputError, RunFailed
from rllib_pnn.experiment.folder import (
    ERROR_FILE,
    CheckpointRecord,
    ResultLog,
    RunFolder,
    check_storage,
    check_transfer,
    create_experiment,
    edited,
    find_experiment,
    last_exception,
    lock,
    make_folder,
    open_transfer,
    read_plan,
    transfer_folder,
    write_whole,
)
from rllib_pnn.experiment.progress import Display, RunProgress
from rllib_pnn.experiment.spec import METRIC_NAMES, METRICS, Experiment, Plan, load_experiment, load_plans
from rllib_pnn.network.store import ColumnStore, ColumnStoreError
from rllib_pnn.registration import register
from rllib_pnn.text import did_you_mean, printable
from rllib_pnn.training.progressive import make_progressive
from rllib_pnn.training.trouble import TrainingTrouble

CHECKPOINT_EVERY_S = 60.0
# A run whose process dies goes on from its last checkpoint, this many times before it must have got to another; one
# that dies before its first checkpoint would only die again.
MAX_RESTARTS = 3
# Signs in a traceback that it would only die again.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_HOPELESS = (f"{TrainingTrouble.__name__}: ", *map(os.strerror, _DISK_ERRORS))
# A metric of `stop` that so many results do not have is worth a word: the run may go on for ever.
RESULTS_WITHOUT_METRIC = 10


@dataclass(frozen=True)
class Outcome:
    """What became of an experiment: its folder and the folders of its runs.

    `conclusion`: what a transfer experiment's trials amount to; None for other experiments, for stopped ones and for
    chosen trials (`Plan.only`) while others are not finished.
    `finished_before`: there was nothing to train.
    """

    path: Path
    runs: list[RunFolder]
    stopped_by: int | None = None
    conclusion: Conclusion | None = None
    finished_before: bool = False

    @property
    def failed(self) -> list[RunFolder]:
        return [run for run in self.runs if run.state.status == "failed"]


def train(
    plans: list[Plan], *, storage: Path, console: Console, ray_address: str | None = None, verbose: bool = False
) -> Iterator[Outcome]:
    """Runs the experiments of a tuned example, one after the other.

    Every call makes a new folder, but that of a transfer experiment goes on in the folder of its name: what is
    finished there is not repeated, and with `Plan.only` the others of its trials are left as they are.

    Args:
        plans: what to run; all are checked before the first one starts.
        storage: where the experiments' folders go.
        console: shows progress.
        ray_address: a cluster to join; None: a local one, or the one that `RAY_ADDRESS` names.
        verbose: Ray's and Tune's own output too.

    Raises:
        InputError: something can't run. Nothing was started or written then.
    """
    check_storage(storage)
    for plan in plans:
        if plan.is_transfer:
            check_transfer(transfer_folder(storage.absolute(), plan), plan)
    plans = [_with_sources(plan) for plan in plans]
    with ray_session(ray_address, verbose):
        configs = [_configs(plan) for plan in plans]
        for plan, config in zip(plans, configs, strict=True):
            if plan.is_transfer:
                path = make_folder(transfer_folder(storage.absolute(), plan))
                with lock(path):
                    open_transfer(path, plan)
                    outcome = _run(plan, path, config, console, verbose)
            else:
                path = create_experiment(storage.absolute(), plan)
                with lock(path):
                    outcome = _run(plan, path, config, console, verbose)
            yield outcome
            if outcome.stopped_by is not None:
                return


def resume(
    path: Path, *, console: Console, file: Path | None = None, ray_address: str | None = None, verbose: bool = False
) -> Outcome:
    """Goes on with the unfinished runs of an experiment, or with the one run that `path` is, from the last checkpoints.

    Their settings are those that they were started with; if their file says something else by now, that is told.

    Args:
        file: the tuned example to compare with; the one that they came from if None.

    Raises:
        InputError: `path` is no experiment or run folder, `file` does not describe it, or it can't run here. Nothing
            was changed then.
    """
    path, names = find_experiment(path)
    experiments = {name: load_experiment(path / name / "experiment.json") for name in names}
    source = next(iter(experiments.values()))[0]
    plan = Plan(read_plan(path).name, source, {name: experiment for name, (_, experiment) in experiments.items()})
    if file is not None and plan.name not in (given := [found.name for found in load_plans(file)]):
        raise InputError(f"{file}: describes {', '.join(given)}, but {path} is of '{plan.name}'")
    change = edited(path, plan, file)
    if change is not None:
        console.print(printable(change), markup=False, highlight=False, soft_wrap=True)
    if plan.is_transfer:
        plan = _with_what_it_waits_for(plan, path)
    with lock(path):
        unfinished = {name: e for name, e in plan.runs.items() if RunFolder(path / name).state.status != "finished"}
        if not unfinished and not plan.is_transfer:
            return Outcome(path, [RunFolder(path / name) for name in names], finished_before=True)
        if not plan.is_transfer:
            plan = Plan(plan.name, source, unfinished)
        with ray_session(ray_address, verbose):
            outcome = _run(plan, path.absolute(), _configs(plan), console, verbose)
    return replace(outcome, path=path, runs=[RunFolder(path / name) for name in names])


def make_config(
    plan: Plan, experiment: Experiment, cluster: Cluster, *, num_runs: int = 1, columns_from: Path | None = None
) -> AlgorithmConfig:
    """The config of one run, progressive if the experiment is.

    Args:
        plan, experiment, cluster, num_runs: see `build_config`.
        columns_from: in place of the experiment's own: the run that a trial starts from.

    Raises:
        InputError: one line that says where in the file, what was expected, what came and the mend.
    """
    config = build_config(plan, experiment, cluster, num_runs=num_runs)
    progressive = experiment.progressive
    if progressive is None:
        if config.is_online and config.env is None:
            raise plan.error(("env",), "missing, expected the id of an environment")
        if experiment.env is not None and config.is_online and not config.is_multi_agent:
            check_env(plan, experiment)
        return config
    arguments = progressive.model_dump(exclude={"tasks", "source_tasks"})
    if columns_from is not None:
        arguments["columns_from"] = str(columns_from)
    tasks = [task.model_dump(exclude_none=True) for task in progressive.tasks]
    try:
        return make_progressive(config, tasks=tasks, **arguments)
    except ColumnStoreError as error:
        raise plan.error(("progressive", "columns_from"), str(error)) from None
    except Exception as error:  # an environment's constructor may raise anything
        raise plan.progressive_error(error) from None


# -- Ray -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ray_session(address: str | None, verbose: bool) -> Iterator[None]:
    """Connected to a cluster; one that is there already is used and left as it is.

    Raises:
        InputError: no cluster at this address.
        RunFailed: Ray does not start.
    """
    if ray.is_initialized():
        register()
        with _quiet(verbose):
            yield
        return
    if address is not None and address.startswith("ray://"):
        raise InputError(
            f"--ray-address {address}: the Ray client protocol would run Tune elsewhere, away from this terminal; "
            "start the command on a node of the cluster, with 'auto' or HOST:PORT"
        )
    try:
        ray.init(
            address=address,
            include_dashboard=None if address else False,
            log_to_driver=verbose,
            logging_level="INFO" if verbose else "CRITICAL",
        )
    except Exception as error:  # Ray raises bare ones too
        if address is None:
            raise RunFailed(f"Ray does not start: {complaint(error)}") from error
        raise InputError(f"--ray-address {address}: {complaint(error)}") from None
    try:
        register()
        with _quiet(verbose):
            yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Without log messages of Ray, Tune and RLlib in this process, unless verbose; what counts is shown otherwise."""
    before = logging.root.manager.disable
    logging.disable(before if verbose else logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _configs(plan: Plan) -> dict[str, AlgorithmConfig]:
    """Every run's config, all checked. Of a transfer experiment's trials only those that differ in more than a seed.

    A trial's config is made when it starts, for it needs the columns that it starts from.
    """
    cluster = Cluster.connected()
    if not plan.is_transfer:
        return {name: make_config(plan, e, cluster, num_runs=len(plan.runs)) for name, e in plan.runs.items()}
    configs: dict[str, AlgorithmConfig] = {}
    seen: set[str] = set()
    for name, experiment in plan.runs.items():
        assert experiment.progressive is not None
        parts = {
            json.dumps({key: value for key, value in experiment.config.items() if key != "seed"}, sort_keys=True),
            json.dumps([task.model_dump() for task in experiment.progressive.tasks], sort_keys=True),
        }
        if not parts <= seen:
            configs[name] = make_config(plan, experiment, cluster, num_runs=len(plan.runs))
            seen |= parts
    return configs


def _with_sources(plan: Plan) -> Plan:
    """The plan with what its runs' `columns_from` hold, and with where that is whatever the working directory."""
    runs = {}
    for name, experiment in plan.runs.items():
        progressive = experiment.progressive
        if progressive is not None and progressive.columns_from is not None:
            given = Path(progressive.columns_from)
            try:
                store = find_columns(given)
                names = [task_name(entry.task, entry.extra) for entry in ColumnStore(store).entries]
            except (ColumnStoreError, RunError) as error:
                raise plan.error(("progressive", "columns_from"), str(error)) from None
            if store != given:
                given = store.parent  # of an experiment's folder the run in it: others may come to stand beside it
            update = {"source_tasks": names, "columns_from": str(given.absolute())}
            experiment = experiment.model_copy(update={"progressive": progressive.model_copy(update=update)})
        runs[name] = experiment
    return replace(plan, runs=runs)


def _with_what_it_waits_for(plan: Plan, path: Path) -> Plan:
    """The plan of some trials with the unfinished trials that they wait for, each before those that wait."""
    runs: dict[str, Experiment] = {}

    def add(name: str, experiment: Experiment) -> None:
        waits_for = experiment.trial.source_run if experiment.trial else None
        if waits_for is not None and waits_for not in plan.runs and waits_for not in runs:
            source = load_experiment(path / waits_for / "experiment.json")[1]
            if RunFolder(path / waits_for).state.status != "finished":
                add(waits_for, source)
        runs[name] = experiment

    for name, experiment in plan.runs.items():
        add(name, experiment)
    return replace(plan, runs=runs)


def _run(plan: Plan, path: Path, configs: dict[str, AlgorithmConfig], console: Console, verbose: bool) -> Outcome:
    """Runs the runs of one experiment until all are finished, failed or stopped by a signal."""
    grid = plan
    if plan.only:
        plan = _with_what_it_waits_for(replace(plan, runs=plan.chosen), path)
    folders = {name: RunFolder(path / name) for name in plan.runs}
    display = Display(console, plan.name, [RunProgress(name, e) for name, e in plan.runs.items()])
    for run in display.runs:
        if folders[run.name].state.status == "finished":
            run.phase = "finished"
    config = next(iter(configs.values()))
    display.say(_headline(plan, config, path))
    stopped_by = None
    unfinished = any(run.phase != "finished" for run in display.runs)
    if unfinished:
        stopped_by = _fit(plan, path, configs, display, verbose)
    conclusion = None
    trials = [RunFolder(path / name) for name in grid.runs]
    is_over = not plan.only or all(trial.state.status == "finished" for trial in trials)
    if plan.is_transfer and stopped_by is None and is_over:
        conclusion = conclude(path, trials, display.say)
    return Outcome(path, list(folders.values()), stopped_by, conclusion, finished_before=not unfinished)


def _fit(plan: Plan, path: Path, configs: dict[str, AlgorithmConfig], display: Display, verbose: bool) -> int | None:
    """Gives the unfinished runs to Tune; returns the signal that stopped them, if one did."""
    folders = {run.name: RunFolder(path / run.name) for run in display.runs if run.phase != "finished"}
    first = next(iter(plan.runs.values()))
    config = next(iter(configs.values()))
    checkpoints = first.checkpoint_config
    cluster = Cluster.connected()

    def config_of(name: str) -> dict[str, Any]:
        experiment = plan.runs[name]
        if not plan.is_transfer:
            return configs[name].to_dict()
        source = experiment.trial.source_run if experiment.trial else None
        columns_from = None if source is None else path / source
        made = make_config(plan, experiment, cluster, num_runs=len(plan.runs), columns_from=columns_from)
        return made.to_dict()

    hopeless: set[str] = set()  # runs that would only fail again
    assert config.algo_class is not None
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_StopSignal(display))
        stack.enter_context(_RayWatch(display, stop, plan.command(path)))
        waits_for = {name: e.trial.source_run for name, e in plan.runs.items() if e.trial is not None}
        searcher = _Runs(folders, waits_for, config_of, stop, display)
        tuner = Tuner(
            config.algo_class,
            tune_config=TuneConfig(
                num_samples=len(folders),
                search_alg=searcher,
                scheduler=_StoppableScheduler(folders, searcher.names, stop, hopeless),
                trial_dirname_creator=lambda trial: searcher.names[trial.trial_id],
                trial_name_creator=lambda trial: searcher.names[trial.trial_id],
            ),
            run_config=RunConfig(
                name=path.name,
                storage_path=str(path.parent),
                stop=_StopAt({METRIC_NAMES.get(key, key): value for key, value in first.stop.items()}, display),
                failure_config=FailureConfig(max_failures=0),
                checkpoint_config=CheckpointConfig(
                    num_to_keep=checkpoints.num_to_keep,
                    checkpoint_frequency=checkpoints.checkpoint_frequency,
                    checkpoint_at_end=checkpoints.checkpoint_at_end,
                ),
                callbacks=[
                    _TensorBoard(),
                    _RunFolderCallback(
                        folders,
                        display,
                        searcher,
                        hopeless,
                        every_s=0 if checkpoints.checkpoint_frequency else CHECKPOINT_EVERY_S,
                    ),
                ],
                verbose=1 if verbose else 0,
            ),
        )
        stack.enter_context(display)
        try:
            tuner.fit()
        except Exception as error:
            cause = _disk_error(error)
            if cause is None:
                raise
            raise RunFailed(
                f"{cause.filename or path}: {cause.strerror or complaint(cause)}; the last checkpoints and all stored "
                f"columns are intact. Once that is mended:  {plan.command(path)}"
            ) from error
    return stop.signal


def _disk_error(error: BaseException | None) -> OSError | None:
    """The refusal of a disk that an exception came from, if it did."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            return error
        error = error.__cause__ or error.__context__
    return None


def _headline(plan: Plan, config: AlgorithmConfig, path: Path) -> str:
    experiment = next(iter(plan.runs.values()))
    tasks = experiment.progressive.tasks if experiment.progressive else []
    sources = sum(e.trial is not None and e.trial.role == "source" for e in plan.runs.values())
    trials = len(plan.runs) - sources
    over = sum(RunFolder(path / name).state.status == "finished" for name in plan.runs)
    where = path if len(plan.runs) > 1 else path / next(iter(plan.runs))
    with contextlib.suppress(ValueError):
        where = where.relative_to(Path.cwd())
    return (
        f"{plan.name}: {experiment.run} on {experiment.env}"
        + (f", {len(tasks)} task{'s' if len(tasks) != 1 else ''}" if tasks and not plan.is_transfer else "")
        + (f", {sources} source{'s' if sources != 1 else ''}" if plan.is_transfer else "")
        + (f", {trials} trial{'s' if trials != 1 else ''}" if plan.is_transfer else "")
        + (f", {len(plan.runs)} runs" if len(plan.runs) > 1 and not plan.is_transfer else "")
        + (f", {over} of all finished before" if over and plan.is_transfer else "")
        + f", {config.num_env_runners} env runners x {config.num_envs_per_env_runner} environments"
        + f"\nrun folder: {where}"
    )


# -- Tune's pieces ---------------------------------------------------------------------------------------------------


class _Runs(Searcher):
    """Hands Tune the runs' configs, one a trial, those that wait for nothing first.

    `names` maps Tune's trial ids to the names of the runs.

    Args:
        folders: the runs that are to be run, in order.
        waits_for: the run that must have finished before another one starts.
        config_of: makes a run's config.
        stop: nothing is handed out any more once a signal came.
        display: hears of runs that can't start.
    """

    def __init__(
        self,
        folders: Mapping[str, RunFolder],
        waits_for: Mapping[str, str | None],
        config_of: Callable[[str], dict[str, Any]],
        stop: _StopSignal,
        display: Display,
    ) -> None:
        super().__init__()
        self.names: dict[str, str] = {}
        self._left = list(folders)
        self._folders = folders
        self._waits_for = waits_for
        self._config_of = config_of
        self._stop = stop
        self._display = display
        self._open = set(folders)  # not over yet
        self._failed: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its searcher, and the run folders hold everything."""
        return {}

    @override(Searcher)
    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        while self._stop.signal is None:
            name = next((name for name in self._left if self._is_ready(name)), None)
            if name is None:
                return None if any(self._will_be_ready(name) for name in self._left) else Searcher.FINISHED
            self._left.remove(name)
            try:
                config = self._config_of(name)
            except InputError as error:  # its source's columns are damaged, say
                self._fails(name, error)
                continue
            self.names[trial_id] = name
            return config
        return Searcher.FINISHED

    def next_to_start(self, waiting: list[str]) -> str | None:
        """Which of the waiting runs comes next: one that Tune has already, else the first that is ready."""
        handed_out = set(self.names.values())
        return next((n for n in waiting if n in handed_out), next((n for n in waiting if self._is_ready(n)), None))

    def _is_ready(self, name: str) -> bool:
        source = self._waits_for.get(name)
        return source is None or (source not in self._open and source not in self._failed)

    def _will_be_ready(self, name: str) -> bool:
        source = self._waits_for.get(name)
        return source is None or (source not in self._failed and self._will_be_ready(source))

    def _fails(self, name: str, error: InputError) -> None:
        self._failed.add(name)
        write_whole(self._folders[name].path / ERROR_FILE, f"{error}\n")
        self._folders[name].set_status("failed")
        run = next(run for run in self._display.runs if run.name == name)
        self._display.say(f"{name}: failed: {error}")
        self._display.ended(run, "failed")

    @override(Searcher)
    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._open.discard(self.names[trial_id])
        if error:
            self._failed.add(self.names[trial_id])

    @override(Searcher)
    def save(self, checkpoint_path: str) -> None:
        pass  # the run folders hold everything

    @override(Searcher)
    def restore(self, checkpoint_path: str) -> None:
        pass


class _StopAt(Stopper):
    """Ends a run whose result reaches one of the metrics in `stop` (keys like `env_runners/episode_return_mean`).

    `display` hears once of the metrics that no result has had so far.
    """

    def __init__(self, stop: Mapping[str, float], display: Display) -> None:
        self._stop = dict(stop)
        self._display = display
        self._missing = list(stop)
        self._num_results = 0

    @override(Stopper)
    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        flat: dict[str, Any] = {k: v for k, v in flatten_dict(result).items() if isinstance(v, Real)}
        self._missing = [key for key in self._missing if key not in flat]
        self._num_results += 1
        if self._missing and self._num_results == RESULTS_WITHOUT_METRIC:
            self._tell_missing(flat)
        return any(key in flat and flat[key] >= bound for key, bound in self._stop.items())

    def _tell_missing(self, flat: Mapping[str, Any]) -> None:
        for key in self._missing:
            mend = "" if key in METRICS else did_you_mean(key, [*flat, *METRIC_NAMES])
            self._display.say(f"stop: none of {self._num_results} results has {key}, so it ends nothing so far{mend}")

    @override(Stopper)
    def stop_all(self) -> bool:
        return False


class _StopSignal:
    """Catches SIGINT, SIGTERM and SIGHUP: the first asks for a checkpoint and an end, the second ends at once."""

    def __init__(self, display: Display) -> None:
        self.signal: int | None = None
        self._display = display
        self._old: dict[int, Any] = {}

    def __enter__(self) -> _StopSignal:
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._old[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame: object) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        self._display.say("Stopping: each run ends its iteration and writes a checkpoint (once more to stop without).")


class _RayWatch:
    """Ends this process if the Ray that it started dies (killed with the whole process group, out of memory).

    Ray would print its own obituary a minute later and leave no word of how to go on, which `command` does.
    """

    def __init__(self, display: Display, stop: _StopSignal, command: str) -> None:
        self._display = display
        self._stop = stop
        self._command = command
        self._over = threading.Event()
        self._node: Any = getattr(ray._private.worker, "_global_node", None)

    def __enter__(self) -> None:
        if self._node is not None:
            threading.Thread(target=self._watch, name="ray-watch", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            dead = [name for name, _ in self._node.dead_processes()]
            if dead and not self._over.wait(1.0):
                self._display.__exit__()
                self._display.say(f"Ray died ({', '.join(dead)}). Go on with:  {self._command}")
                os._exit(1 if self._stop.signal is None else 128 + self._stop.signal)


class _StoppableScheduler(FIFOScheduler):
    """Runs trials in order. Starts one from its last checkpoint if it has one, and pauses all once a signal came.

    Tune's own handling of SIGINT saves the state of the experiment but takes no checkpoint of its trials.
    """

    def __init__(
        self, folders: Mapping[str, RunFolder], names: Mapping[str, str], stop: _StopSignal, hopeless: set[str]
    ) -> None:
        super().__init__()
        self._folders = folders
        self._names = names
        self._stop = stop
        self._hopeless = hopeless

    @override(FIFOScheduler)
    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        if trial.checkpoint is not None:
            return  # a restart within this session; Tune knows the checkpoint itself
        folder = self._folders[self._names[trial.trial_id]]
        for record in folder.checkpoints:
            trial.storage.current_checkpoint_index = record.index - 1  # `on_checkpoint` counts it up
            metrics = {TRAINING_ITERATION: record.training_iteration, TIME_TOTAL_S: record.time_total_s}
            trial.on_checkpoint(_TrainingResult(Checkpoint.from_directory(str(folder.path / record.folder)), metrics))
        # A kill may have left a checkpoint half written; the next one takes its place.
        known = {record.folder for record in folder.checkpoints}
        for path in folder.path.glob("checkpoint_*"):
            if path.is_dir() and path.name not in known:
                shutil.rmtree(path, ignore_errors=True)
        if trial.checkpoint is not None:
            trial.max_failures = MAX_RESTARTS

    @override(FIFOScheduler)
    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        return TrialScheduler.PAUSE if self._stop.signal is not None else TrialScheduler.CONTINUE

    @override(FIFOScheduler)
    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        for trial in tune_controller.get_trials():
            # Tune has put it into its queue again, to be started from its last checkpoint.
            if self._names.get(trial.trial_id) in self._hopeless and not trial.is_finished():
                tune_controller.stop_trial(trial)
        if self._stop.signal is None:
            return super().choose_trial_to_run(tune_controller)
        if not any(trial.status == Trial.RUNNING for trial in tune_controller.get_trials()):
            signal.raise_signal(signal.SIGUSR1)  # ends Tune's loop; it listens to this one always
        return None


class _TensorBoard(TBXLoggerCallback):
    """Writes event files into the run folder itself rather than into Tune's staging folder."""

    @override(TBXLoggerCallback)
    def log_trial_start(self, trial: Trial) -> None:
        if trial in self._trial_writer:
            self._trial_writer[trial].close()
        self._trial_writer[trial] = self._summary_writer_cls(trial.path, flush_secs=30)
        self._trial_result[trial] = {}


class _RunFolderCallback(Callback):
    """Keeps the run folders and the display up to date, and asks for checkpoints by the clock."""

    def __init__(
        self, folders: Mapping[str, RunFolder], display: Display, runs: _Runs, hopeless: set[str], *, every_s: float
    ) -> None:
        self._folders = folders
        self._refused: OSError | None = None  # by the disk, to note a checkpoint
        self._hopeless = hopeless
        self._display = display
        self._runs = runs
        self._progress = {run.name: run for run in display.runs}
        self._every_s = every_s
        self._logs: dict[str, ResultLog] = {}
        self._last_checkpoint: dict[str, float] = {}
        self._start_next()

    @override(Callback)
    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name = str(trial)
        folder = self._folders[name]
        checkpoint = trial.latest_checkpoint_result
        done = int(checkpoint.metrics.get(TRAINING_ITERATION, 0)) if checkpoint else 0
        self._logs[name] = ResultLog(folder.path, done)
        write_whole(
            folder.path / "params.json",
            json.dumps(trial.config, cls=SafeFallbackEncoder, indent=2, sort_keys=True),
        )
        (folder.path / ERROR_FILE).unlink(missing_ok=True)
        folder.set_status("running")
        self._last_checkpoint[name] = time.monotonic()
        self._display.started(self._progress[name], "resuming" if checkpoint else "starting")
        if checkpoint:
            self._display.say(f"{name}: goes on after iteration {done}, from {Path(checkpoint.checkpoint.path).name}")

    @override(Callback)
    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        name = str(trial)
        kept = {key: value for key, value in result.items() if key != "config"}  # params.json has it
        flat = flatten_dict(kept)
        row = {
            key: value for key, value in flat.items() if isinstance(value, str | int | float) or hasattr(value, "item")
        }
        self._logs[name].append(json.dumps(kept, cls=SafeFallbackEncoder), row)
        now = self._progress[name].update(result)
        frozen = self._progress[name].frozen(result)
        if frozen:
            self._display.say(frozen)
        if self._every_s and time.monotonic() - self._last_checkpoint[name] >= self._every_s:
            result[SHOULD_CHECKPOINT] = True
        self._display.changed(self._progress[name], now=now)

    @override(Callback)
    def on_checkpoint(
        self, iteration: int, trials: list[Trial], trial: Trial, checkpoint: Checkpoint, **info: Any
    ) -> None:
        result = trial.last_result
        record = CheckpointRecord(
            folder=Path(checkpoint.path).name,
            training_iteration=int(result.get(TRAINING_ITERATION, 0)),
            time_total_s=float(result.get(TIME_TOTAL_S, 0.0)),
        )
        try:
            self._folders[str(trial)].add_checkpoint(record)
        except OSError as error:
            self._refused = error
            raise  # Tune then keeps the checkpoints before this one, logs the error and goes on: see `on_step_end`
        self._last_checkpoint[str(trial)] = time.monotonic()
        # A run of days may die more often than that, as long as it gets on in between.
        trial.max_failures = trial.num_failures + MAX_RESTARTS

    @override(Callback)
    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        if self._refused is not None:
            raise self._refused

    @override(Callback)
    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if str(trial) in self._hopeless:
            self._failed(trial)
            return
        self._folders[str(trial)].set_status("finished")
        self._display.ended(self._progress[str(trial)], "finished")
        self._start_next()

    @override(Callback)
    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._keep_error(trial)
        text = self._error_text(trial)
        if any(sign in text for sign in _HOPELESS):
            self._hopeless.add(str(trial))
            return
        self._display.say(f"{trial}: died ({last_exception(text)}); starting it again from its last checkpoint")

    @override(Callback)
    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._keep_error(trial)
        self._failed(trial)

    def _failed(self, trial: Trial) -> None:
        folder = self._folders[str(trial)]
        folder.set_status("failed")
        self._display.say(f"{trial}: failed: {folder.failure()}")
        self._display.ended(self._progress[str(trial)], "failed")
        self._start_next()

    @override(Callback)
    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        for name in self._logs:
            if self._folders[name].state.status == "running":
                self._folders[name].set_status("stopped")

    def _start_next(self) -> None:
        """Tune starts runs in order and tells only when one has started, seconds later."""
        waiting = [run.name for run in self._display.runs if run.phase == "waiting"]
        name = self._runs.next_to_start(waiting)
        if name is not None:
            self._progress[name].phase = "starting"

    def _keep_error(self, trial: Trial) -> None:
        if trial.error_file and Path(trial.error_file).is_file():
            write_whole(self._folders[str(trial)].path / ERROR_FILE, self._error_text(trial))

    @staticmethod
    def _error_text(trial: Trial) -> str:
        """The traceback of a run's newest failure."""
        with contextlib.suppress(OSError, TypeError):
            text = Path(str(trial.error_file)).read_text(encoding="utf-8", errors="replace")
            return text[max(0, text.rfind("Failure # ")) :]
        return ""
