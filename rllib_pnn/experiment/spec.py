"""A tuned example as an experiment: YAML in, validated `Experiment` out. No Ray, no torch; nothing in the file is run.

The format is RLlib's (`run`, `env`, `stop`, `num_samples`, `config`) plus the `progressive` block; without that block
it is an ordinary RLlib experiment, and with a `transfer` block beside it a grid of them (see `TransferSpec`). Keys of
`config` are checked against the algorithm in `rllib_pnn.experiment.algorithm`, for only RLlib knows them; everything
else is checked here.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from rllib_pnn.experiment.errors import InputError
from rllib_pnn.experiment.grid import BASELINES_OF_ONE_COLUMN, Trial, grid_of
from rllib_pnn.experiment.source import KeyPath, Source, as_word, read_yaml
from rllib_pnn.text import did_you_mean, short

# What `run` may name: the algorithms of RLlib's registry and this package's own. The progressive ones learn by policy
# gradient on RLlib's new API stack, which is what a progressive module is made for.
ALGORITHMS = ("A3C", "APPO", "BC", "CQL", "DQN", "DreamerV3", "IMPALA", "IQL", "MARWIL", "PPO", "SAC")
PROGRESSIVE_ALGORITHMS = ("A3C", "APPO", "IMPALA", "PPO")

# `config: {training: {lr: ...}}` is `config: {lr: ...}`, as in `PPOConfig().training(lr=...)`.
SECTIONS = (
    "api_stack",
    "callbacks",
    "checkpointing",
    "debugging",
    "env_runners",
    "environment",
    "evaluation",
    "experimental",
    "fault_tolerance",
    "framework",
    "learners",
    "multi_agent",
    "offline_data",
    "reporting",
    "resources",
    "rl_module",
    "training",
)

# Names of metrics in older tuned examples, and what the new API stack calls them.
METRIC_NAMES = {
    "episode_reward_mean": "env_runners/episode_return_mean",
    "episode_return_mean": "env_runners/episode_return_mean",
    "sampler_results/episode_reward_mean": "env_runners/episode_return_mean",
    "env_runners/episode_reward_mean": "env_runners/episode_return_mean",
    "evaluation/episode_reward_mean": "evaluation/env_runners/episode_return_mean",
    "evaluation/sampler_results/episode_reward_mean": "evaluation/env_runners/episode_return_mean",
    "num_env_steps_sampled": "num_env_steps_sampled_lifetime",
    "num_env_steps": "num_env_steps_sampled_lifetime",
    "timesteps_total": "num_env_steps_sampled_lifetime",
    "episodes_total": "env_runners/num_episodes_lifetime",
}
# What `stop` usually names. Results hold more, but what is nearly one of these is that one, misspelt.
METRICS = (
    *METRIC_NAMES,
    *(
        f"{part}env_runners/{metric}"
        for part in ("", "evaluation/")
        for metric in (
            *(f"episode_{what}_{kind}" for what in ("return", "len") for kind in ("mean", "min", "max")),
            "episode_duration_sec_mean",
            "num_env_steps_sampled",
            "num_env_steps_sampled_lifetime",
            "num_episodes",
            "num_episodes_lifetime",
        )
    ),
    "num_env_steps_sampled_lifetime",
    "num_env_steps_trained_lifetime",
    "num_training_step_calls_per_iteration",
    "training_iteration",
    "iterations_since_restore",
    "time_since_restore",
    "time_this_iter_s",
    "time_total_s",
    "timestamp",
)

MAX_RUNS = 1000
MAX_TRIALS = 10_000  # of a transfer experiment: the paper's Atari grid has 6,915 with 25 jobs a cell
MAX_SEED = 2**31 - 1
MAX_NAME = 200  # of a run's folder; file systems take 255

Architecture = Literal["progressive", "scratch", "finetune_heads", "finetune_all", "random_column"]
Lateral = Literal["adapter", "linear", "none"]

SEARCHES = ("grid_search", "choice", "uniform", "loguniform", "randint")
_ALIASES = {
    "algorithm": "run",
    "algo": "run",
    "trainable": "run",
    "environment": "env",
    "env_id": "env",
    "stopping_criterion": "stop",
    "samples": "num_samples",
    "seeds": "num_samples",
    "steps": "num_env_steps",
    "timesteps_total": "num_env_steps",
    "num_steps": "num_env_steps",
    "episode_reward_mean": "episode_return_mean",
    "reward": "episode_return_mean",
    "alpha": "lateral_scale",
    "columns": "column",
    "sequence": "tasks",
    "id": "name",
    "stop": "until",
    "checkpoint_freq": "checkpoint_frequency",
    "keep_checkpoints_num": "num_to_keep",
    "source": "sources",
    "chains": "sources",
    "target": "targets",
    "architecture": "architectures",
    "baselines": "architectures",
    "target_until": "until",
    "analysis": "sensitivity",
    "analyze": "sensitivity",
    "top_k": "top",
}


# Tune's keys that older files have beside `run`, with the mend.
_ELSEWHERE = {
    "checkpoint_score_attr": "remove it: the last checkpoint_config.num_to_keep checkpoints are kept",
    "local_dir": "give the folder on the command line (`rllib train -f FILE --storage DIR`)",
    "max_failures": "remove it: lost processes are started again",
    "name": "remove it: the experiment's name is the key that this stands under",
    "resources_per_trial": "remove it: config says what a run takes (num_env_runners, num_gpus_per_learner, ...)",
    "restore": "go on with a run by `rllib train --resume RUN`",
    "storage_path": "give the folder on the command line (`rllib train -f FILE --storage DIR`)",
    "upload_dir": "give the folder on the command line (`rllib train -f FILE --storage DIR`)",
}


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        raise ValueError(f"expected a number, got {short(value)}")
    return value


def _is_finite(number: float) -> bool:
    """False for a whole number beyond all floats, too, at which `math.isfinite` raises."""
    return abs(number) <= sys.float_info.max


def _count(value: Any, least: int = 1) -> int:
    """A whole number; 4.0e+6 is one, as YAML has no other way to write four million shortly."""
    number = value if not isinstance(value, bool) and isinstance(value, int | float) else math.nan
    if not _is_finite(number) or number != int(number) or number < least:
        raise ValueError(f"expected a whole number of at least {least}, got {short(value)}")
    return int(number)


def _word(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected a name, got {short(value)}")
    return value


def _shift(value: Any) -> Any:
    if value == "auto":
        return value
    if isinstance(value, str):
        raise ValueError(f"expected a number or auto, got {short(value)}")
    return _number(value)


def _chain(value: Any) -> list[str]:
    """One task's name is a chain of one."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"expected a task's name or a list of names, got {short(value)}")
    if len(set(names)) < len(names):
        raise ValueError(f"expected every task once, got {short(value)}")
    return names


def _task_name(value: Any) -> str:
    # It becomes a part of metric names (`columns/<task>/...`) and of file names.
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", value):
        raise ValueError(f"expected a name of letters, digits, '_', '.' and '-', got {short(value)}")
    return value


Number = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[int, BeforeValidator(_count)]
Chain = Annotated[list[str], BeforeValidator(lambda value: _chain(value))]
NonNegative = Annotated[int, BeforeValidator(lambda value: _count(value, 0))]
Word = Annotated[str, BeforeValidator(_word)]
Mapped = dict[str, Any]
M = TypeVar("M", bound=BaseModel)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class UntilSpec(_Model):
    """When a task ends: at this mean return per episode (unclipped) or after this many env steps."""

    episode_return_mean: Number | None = None
    num_env_steps: Positive | None = None

    @model_validator(mode="after")
    def _ends(self) -> UntilSpec:
        if self.episode_return_mean is None and self.num_env_steps is None:
            raise ValueError(
                "expected episode_return_mean, num_env_steps or both, got neither: the task would never end"
            )
        return self


class TaskSpec(_Model):
    """One task of the sequence: its name, the `env_config` that makes the environment, and when it ends."""

    name: Annotated[str, BeforeValidator(_task_name)]
    env_config: Mapped = {}
    until: UntilSpec


class ProgressiveSpec(_Model):
    """The `progressive` block; its keys are the arguments of `rllib_pnn.make_progressive`."""

    column: str | list[Any] = "atari"
    lateral: Lateral = "adapter"
    lateral_scale: Number = 0.1
    lateral_heads: bool = True
    architecture: Architecture = "progressive"
    columns_from: Word | None = None
    source_tasks: list[str] | None = None  # what the columns of `columns_from` learned; `rllib train` fills it in
    input_shift: Annotated[float | Literal["auto"], BeforeValidator(_shift)] = "auto"
    evaluation_episodes: NonNegative = 10
    evaluation_seed: NonNegative = 0
    tasks: Annotated[list[TaskSpec], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_differ(self) -> ProgressiveSpec:
        first: dict[str, int] = {}
        for index, task in enumerate(self.tasks):
            if task.name in first:
                raise ValueError(
                    f"tasks[{index}].name: '{task.name}' names tasks[{first[task.name]}] already; "
                    "every task needs its own name"
                )
            first[task.name] = index
        return self


class TransferSpec(_Model):
    """The `transfer` block: one file is a whole grid of trials (Rusu et al. 2016, section 4).

    Every source is trained once (with `sources_per_seed` once a seed); then every architecture learns every target
    from every source, `num_samples` times, with the same budget of steps. `progressive.tasks` says what the tasks are.

    - `sources`: names of tasks, or lists of names: columns that are trained one after the other. A list shares its
      beginnings with other sources.
    - `targets`: names of tasks. A source that holds the target's own task is left out.
    - `architectures`: all five by default. `scratch` and `random_column` know no source and are trained once a target
      and seed. A source of several columns goes with `progressive` alone: the fine-tuning baselines have one column.
    - `until`: the targets' budget in place of each task's own `until`.
    - `top`: the report scores the best `top` jobs of each cell (the paper: 3 of 25).
    - `sensitivity`: what is measured before the report is written, on the first seed's progressive trials.
    """

    sources: list[Chain] = []
    targets: Annotated[list[Word], Field(min_length=1)]
    architectures: Annotated[list[Architecture], Field(min_length=1)] = [
        "scratch",
        "finetune_heads",
        "finetune_all",
        "random_column",
        "progressive",
    ]
    until: UntilSpec | None = None
    sources_per_seed: bool = False
    top: Positive | None = None
    sensitivity: list[Literal["afs", "aps"]] = ["afs"]

    @model_validator(mode="after")
    def _each_once(self) -> TransferSpec:
        for key in ("sources", "targets", "architectures", "sensitivity"):
            values = getattr(self, key)
            for index, value in enumerate(values):
                if value in values[:index]:
                    raise ValueError(f"{key}[{index}]: {short(value)} is there already")
        needing = [name for name in self.architectures if name not in ("scratch", "random_column")]
        if needing and not self.sources:
            raise ValueError(f"sources: missing, {needing[0]} starts from a source's columns")
        return self


class TrialSpec(_Model):
    """What a run is in a transfer experiment; `rllib train` writes it into the trial's `experiment.json`."""

    role: Literal["source", "target"]
    source_run: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_=.+-]*$")] | None = None
    """The trial beside this one whose columns it starts from."""
    searched: Mapped = {}
    """The hyper-parameters that were drawn for it."""
    top: Positive | None = None
    sensitivity: list[Literal["afs", "aps"]] = []


class CheckpointSpec(_Model):
    """Tune's `checkpoint_config`.

    `checkpoint_frequency` counts training iterations; 0 means once a minute. A progressive run also checkpoints at the
    end of every task.
    """

    checkpoint_frequency: NonNegative = 0
    num_to_keep: Positive = 3
    checkpoint_at_end: bool = True


class Experiment(_Model):
    """One run, of one seed: what `experiment.json` in the run folder holds."""

    name: Word
    run: Word
    env: Word | None = None
    stop: dict[str, Number] = {}
    config: Mapped = {}
    progressive: ProgressiveSpec | None = None
    trial: TrialSpec | None = None
    checkpoint_config: CheckpointSpec = CheckpointSpec()

    @model_validator(mode="after")
    def _fits_together(self) -> Experiment:
        if self.run not in ALGORITHMS:
            raise ValueError(
                f"run: unknown algorithm {short(self.run)}, known are {', '.join(ALGORITHMS)}"
                + did_you_mean(self.run, ALGORITHMS, {"A2C": "A3C"})
            )
        module = (self.env or "").rpartition(":")[0]
        if module and module != "ale_py" and module not in sys.modules:
            raise ValueError(
                f"env: {short(self.env)} names a module, which making it would import: a tuned example is data; "
                "expected the id of a registered environment (docs/tuned_examples.md says how to register your own)"
            )
        if self.progressive is not None:
            if self.run not in PROGRESSIVE_ALGORITHMS:
                raise ValueError(
                    f"run: {self.run} can't be progressive, expected one of {', '.join(PROGRESSIVE_ALGORITHMS)}"
                )
            if self.env is None:
                raise ValueError("env: missing, expected the id of an environment")
        for metric, value in self.stop.items():
            if (
                METRIC_NAMES.get(metric, metric).startswith(("num_env_steps", "training_iteration", "time_"))
                and value <= 0
            ):
                raise ValueError(f"stop.{metric}: expected a number above 0, got {value:g}")
        return self

    @property
    def seed(self) -> int | None:
        return self.config.get("seed")


@dataclass(frozen=True)
class Plan:
    """One experiment of a file: its runs (seeds and search values) and where each key stands in the file.

    `runs` maps the name of a run's folder to its experiment; `root` is where the experiment stands in the file.
    `is_transfer`: the runs are the trials of a transfer experiment, some of which wait for others' columns.
    `only`: glob patterns of the trials that are to be trained, with those that they wait for; all if there are none.
    """

    name: str
    source: Source
    runs: dict[str, Experiment]
    root: KeyPath = ()
    _sections: dict[str, str] = field(default_factory=dict)
    only: tuple[str, ...] = ()

    @property
    def is_transfer(self) -> bool:
        return any(experiment.trial is not None for experiment in self.runs.values())

    @property
    def chosen(self) -> dict[str, Experiment]:
        """The runs that `only` names."""
        return {
            name: experiment
            for name, experiment in self.runs.items()
            if any(fnmatchcase(name, pattern) for pattern in self.only)
        }

    def command(self, path: Path) -> str:
        """What goes on with these runs in the experiment's folder `path`."""
        if not self.only:
            return f"rllib train --resume {path}"
        patterns = [word for pattern in self.only for word in ("--only", pattern)]
        return shlex.join(["rllib", "train", "-f", str(self.source.path), "--storage", str(path.parent), *patterns])

    def error(self, where: KeyPath, message: str) -> InputError:
        """An `InputError` about the key path `where` of an `Experiment`, told in the file's own lines and keys."""
        if len(where) > 1 and where[0] == "config" and where[1] in self._sections:
            where = ("config", self._sections[str(where[1])], *where[1:])
        return self.source.error((*self.root, *where), message)

    def progressive_error(self, error: Exception) -> InputError:
        """A complaint of `make_progressive` (`tasks[2] ('h_flip'): ...`), told where in the file it belongs."""
        message = " ".join(str(error).split()) or type(error).__name__
        match = re.match(r"(\w+)(?:\[(\d+)\])?(?: \('[^']*'\))?(?:\.(\w+))?: ", message)
        if match and match[1] in ("config", "env"):
            where: KeyPath = (match[1], match[3]) if match[3] else (match[1],)
            return self.error(where, message[match.end() :])
        where = ("progressive",)
        if match and match[1] in ProgressiveSpec.model_fields:
            where += (match[1],) if match[2] is None else (match[1], int(match[2]))
            where += (match[3],) if match[3] else ()
            message = message[match.end() :]
        return self.error(where, message)


def load_plans(path: Path | str) -> list[Plan]:
    """Reads a tuned example: one `Plan` an experiment in the file.

    Raises:
        InputError: one line that names the file, the line, the key, what was expected, what came and the mend.
    """
    source = read_yaml(Path(path))
    if not isinstance(source.data, Mapping) or not source.data:
        raise source.error(
            (), f"expected experiments by name (`my-experiment: {{run: PPO, ...}}`), got {short(source.data)}"
        )
    if "run" in source.data and not isinstance(source.data["run"], Mapping):
        raise source.error(
            ("run",), "expected experiments by name; put the whole file under one (`my-experiment: {run: ...}`)"
        )
    return [_plan(source, name, body) for name, body in source.data.items()]


def choose(plans: Sequence[Plan], patterns: Sequence[str]) -> list[Plan]:
    """The transfer experiments of a file that have trials of such names (glob patterns), with those as their `only`.

    Raises:
        InputError: the file has no transfer experiment, or no trial of a pattern's name.
    """
    path = plans[0].source.path
    grids = [replace(plan, only=tuple(patterns)) for plan in plans if plan.is_transfer]
    names = [name for plan in grids for name in plan.runs]
    for pattern in patterns:
        if not grids:
            raise InputError(f"{path}: --only {pattern}: the file has no `transfer` block to choose from; leave it out")
        if not any(fnmatchcase(name, pattern) for name in names):
            mend = did_you_mean(pattern, names) or f"; its {len(names)} trials are {', '.join(names[:3])}, ..."
            raise InputError(f"{path}: --only {pattern}: no trial has such a name{mend}")
    return [plan for plan in grids if plan.chosen]


def load_experiment(path: Path) -> tuple[Source, Experiment]:
    """Reads the `experiment.json` of a run folder.

    Raises:
        InputError: it is missing or is not an experiment of this package.
    """
    source = read_yaml(path, follow_links=False)  # JSON is YAML
    return source, _validate(source, (), source.data, {})


# -- from raw data to experiments ------------------------------------------------------------------------------------


def _plan(source: Source, name: Any, body: Any) -> Plan:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_. -]{0,99}", name):
        raise source.error((as_word(name),), "expected an experiment's name of letters, digits, '_', '.' and '-'")
    if not isinstance(body, Mapping):
        raise source.error((name,), f"expected a mapping with run, env, config, ..., got {short(body)}")
    raw = {as_word(key): copy.deepcopy(value) for key, value in body.items()}
    num_samples = _checked(source, (name, "num_samples"), raw.pop("num_samples", 1))
    for key, mend in _ELSEWHERE.items():
        if key in raw:
            raise source.error((name, key), f"unknown key; {mend}")
    for key in ("progressive", "transfer"):
        if key in raw and raw[key] is None:
            raise source.error((name, key), "expected a mapping, got nothing; remove the key for an ordinary run")
    if isinstance(raw.get("env"), Mapping) and len(raw["env"]) == 1 and next(iter(raw["env"])) in SEARCHES:
        raise source.error((name, "env"), "expected one environment; write one experiment for each")
    raw["name"] = name
    sections = _flatten_config(source, name, raw)
    _old_checkpoint_keys(raw)
    for where, why in ((("trial",), "a transfer experiment"), (("progressive", "source_tasks"), "columns_from")):
        parent = raw.get(where[0]) if len(where) > 1 else raw
        if isinstance(parent, dict) and where[-1] in parent:
            raise source.error((name, *where), f"`rllib train` fills this in ({why}); remove it here")
    _check_stop(source, name, raw)
    if "transfer" in raw:
        return Plan(name, source, _transfer_runs(source, name, raw, num_samples, sections), (name,), sections)

    runs: dict[str, Experiment] = {}
    for folder, values in _variants(source, name, raw, num_samples):
        runs[folder] = _validate(source, (name,), values, sections)
    return Plan(name, source, runs, (name,), sections)


def _checked(source: Source, where: KeyPath, value: Any) -> int:
    try:
        return _count(value)
    except ValueError as error:
        raise source.error(where, str(error)) from None


def _flatten_config(source: Source, name: str, raw: dict[str, Any]) -> dict[str, str]:
    """`config: {training: {lr: 1}}` becomes `config: {lr: 1}`; returns the section of every key that had one."""
    config = raw.get("config")
    if config is None:
        raw["config"] = {}
        return {}
    if not isinstance(config, dict):
        raise source.error((name, "config"), f"expected a mapping of AlgorithmConfig keys, got {short(config)}")
    flat: dict[str, Any] = {}
    sections: dict[str, str] = {}
    for key, value in config.items():
        inner = value if key in SECTIONS and key != "callbacks" and isinstance(value, dict) else {key: value}
        for inner_key, inner_value in inner.items():
            if inner_key in flat:
                raise source.error(
                    (name, "config", key, inner_key) if inner is value else (name, "config", key),
                    f"'{inner_key}' is given twice, the other time "
                    + (f"in {sections[inner_key]}" if inner_key in sections else "directly in config"),
                )
            flat[as_word(inner_key)] = inner_value
            if inner is value:
                sections[as_word(inner_key)] = key
    if "env" in flat:
        if raw.get("env") not in (None, flat["env"]):
            raise source.error((name, "config", "env"), f"{short(flat['env'])} contradicts env: {short(raw['env'])}")
        raw["env"] = flat.pop("env")
    raw["config"] = flat
    return sections


def _old_checkpoint_keys(raw: dict[str, Any]) -> None:
    """Older files keep Tune's checkpoint settings beside `run`."""
    names = {
        "checkpoint_freq": "checkpoint_frequency",
        "keep_checkpoints_num": "num_to_keep",
        "checkpoint_at_end": None,
    }
    found = {new or old: raw.pop(old) for old, new in names.items() if old in raw}
    if found and isinstance(raw.get("checkpoint_config", {}), dict):
        raw["checkpoint_config"] = {**found, **raw.get("checkpoint_config", {})}


def _check_stop(source: Source, name: str, raw: dict[str, Any]) -> None:
    """A `stop` that would end a progressive run before its tasks, or that nothing reaches, is an error.

    Not of `Experiment`, for run folders of earlier versions hold such ones.
    """
    stop = raw.get("stop")
    if not isinstance(stop, dict) or not stop:
        return
    if raw.get("progressive") is not None:
        raise source.error((name, "stop"), "a progressive run ends by its tasks' `until`; remove stop")
    for metric in map(as_word, stop):
        # One that names more parts is another one: `env_runners/agent_episode_return_mean/0`.
        alike = [known for known in METRICS if known.count("/") == metric.count("/")]
        mend = "" if metric in alike else did_you_mean(metric, alike, cutoff=0.85)
        if mend:
            raise source.error((name, "stop", metric), f"no result has such a metric{mend}")


class _TransferFile(_Model):
    transfer: TransferSpec


def _validate(source: Source, root: KeyPath, values: Any, sections: dict[str, str]) -> Experiment:
    return _validated(Experiment, source, root, values, sections)


def _validated(model: type[M], source: Source, root: KeyPath, values: Any, sections: dict[str, str]) -> M:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        where, message = _explain(error)
        if len(where) > 1 and where[0] == "config" and where[1] in sections:
            where = ("config", sections[str(where[1])], *where[1:])
        raise source.error((*root, *where), message) from None


# -- transfer experiments --------------------------------------------------------------------------------------------


def _transfer_runs(
    source: Source, name: str, raw: dict[str, Any], num_samples: int, sections: dict[str, str]
) -> dict[str, Experiment]:
    """The trials of a transfer experiment by name, each after the ones that it waits for."""
    given = {"transfer": raw.pop("transfer")}
    transfer = _validated(_TransferFile, source, (name,), given, {}).transfer
    progressive = raw.get("progressive")
    if not isinstance(progressive, dict):
        raise source.error((name, "progressive"), "missing: a transfer experiment's tasks stand in progressive.tasks")
    for key, instead in (("architecture", "architectures"), ("columns_from", "sources")):
        if key in progressive:
            raise source.error((name, "progressive", key), f"remove it: transfer.{instead} says that here")
    searches = _transfer_searches(source, name, raw)
    first_seed = _first_seed(source, name, raw["config"].get("seed", 0), num_samples)

    plain = copy.deepcopy(raw)
    for where, choices in searches:
        _replace(plain, where, choices[0])
    base = _validate(source, (name,), plain, sections)
    assert base.progressive is not None
    tasks = {task.name: task for task in base.progressive.tasks}
    _check_tasks_of(source, name, transfer, tasks)

    grid = grid_of(transfer.sources, transfer.targets, transfer.architectures)
    if not any(trial.role == "target" for trial in grid):
        raise source.error((name, "transfer"), "no trial is left: every source holds every target's own task")
    count = sum(num_samples if t.role == "target" or transfer.sources_per_seed else 1 for t in grid)
    if count > MAX_TRIALS:
        raise source.error((name, "transfer"), f"makes {count} trials, expected at most {MAX_TRIALS}")

    runs: dict[str, Experiment] = {}
    for trial in grid:
        for sample in range(num_samples if trial.role == "target" or transfer.sources_per_seed else 1):
            # Job i has the same seed and the same draw in every cell, so that cells differ in their method alone.
            generator = random.Random(f"{name}/{first_seed}/{sample}")
            drawn = [(where, _draw("choice", choices, generator)) for where, choices in searches]
            if trial.role == "source" and not transfer.sources_per_seed:
                drawn = [(where, choices[0]) for where, choices in searches]  # what serves all jobs is not drawn
            values = copy.deepcopy(raw)
            for where, value in drawn:
                _replace(values, where, value)
            values["config"]["seed"] = first_seed + sample
            _make_trial(values, trial, transfer, tasks)
            values["trial"] |= {
                "source_run": None
                if trial.waits_for is None
                else f"{trial.waits_for}_seed_{first_seed + (sample if transfer.sources_per_seed else 0)}",
                "searched": {str(where[-1]): value for where, value in drawn},
            }
            if sample:
                values["trial"]["sensitivity"] = []
            run = f"{trial.name}_seed_{first_seed + sample}"
            if run in runs or len(run) > MAX_NAME:
                what = "the name of two trials" if run in runs else f"a longer name than {MAX_NAME} letters"
                raise source.error((name, "transfer"), f"{short(run)} is {what}; rename the tasks")
            runs[run] = _validate(source, (name,), values, sections)
    return runs


def _make_trial(values: dict[str, Any], trial: Trial, transfer: TransferSpec, tasks: Mapping[str, TaskSpec]) -> None:
    """Turns the file's values into one trial's: its task, its architecture and what it is in the grid."""
    task = tasks[trial.task]
    until = transfer.until if trial.role == "target" and transfer.until is not None else task.until
    values["progressive"] |= {
        "architecture": trial.architecture,
        "tasks": [{"name": task.name, "env_config": task.env_config, "until": until.model_dump(exclude_none=True)}],
        "source_tasks": list(trial.source),
    }
    values["trial"] = {
        "role": trial.role,
        "top": transfer.top,
        "sensitivity": transfer.sensitivity if trial.role == "target" and trial.architecture == "progressive" else [],
    }


def _transfer_searches(source: Source, name: str, raw: dict[str, Any]) -> list[tuple[KeyPath, list[Any]]]:
    found = []
    for part in ("config", "progressive"):
        for where, kind, argument in _find_searches(source, (name,), (part,), raw.get(part)):
            if where[:2] == ("progressive", "tasks") or where == ("config", "seed"):
                raise source.error((name, *where), f"{kind} can't vary this in a transfer experiment")
            if kind != "choice":
                raise source.error(
                    (name, *where, kind),
                    "expected choice in a transfer experiment: a source that serves all jobs takes its first value",
                )
            found.append((where, argument))
    return found


def _check_tasks_of(source: Source, name: str, transfer: TransferSpec, tasks: Mapping[str, TaskSpec]) -> None:
    named: list[tuple[KeyPath, str]] = [(("targets", i), target) for i, target in enumerate(transfer.targets)]
    for i, chain in enumerate(transfer.sources):
        raw_chain = source.data[name]["transfer"]["sources"][i]
        named += [(("sources", i) if isinstance(raw_chain, str) else ("sources", i, j), t) for j, t in enumerate(chain)]
    for where, task in named:
        if task not in tasks:
            raise source.error(
                (name, "transfer", *where),
                f"{short(task)} is no task of progressive.tasks, there are {', '.join(tasks)}"
                + did_you_mean(task, tasks),
            )
    for i, target in enumerate(transfer.targets):
        if (transfer.until or tasks[target].until).num_env_steps is None:
            raise source.error(
                (name, "transfer", "until") if transfer.until else (name, "transfer", "targets", i),
                f"'{target}' has no num_env_steps in its until; all architectures need the same budget of steps",
            )
    if transfer.sources and all(len(chain) > 1 for chain in transfer.sources):
        for i, architecture in enumerate(transfer.architectures):
            if architecture in BASELINES_OF_ONE_COLUMN:
                raise source.error(
                    (name, "transfer", "architectures", i),
                    f"{architecture} starts from one column, and every source has several; add one of a single task",
                )


# -- seeds and search values -----------------------------------------------------------------------------------------


def _variants(source: Source, name: str, raw: dict[str, Any], num_samples: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The runs of an experiment: every combination of `grid_search` values, `num_samples` times each."""
    searches = [
        (where, kind, argument)
        for part in ("config", "progressive")
        for where, kind, argument in _find_searches(source, (name,), (part,), raw.get(part))
    ]
    for where, kind, _ in searches:
        if where[0] == "progressive" and where[1] == "tasks":
            raise source.error((name, *where), f"{kind} can't vary the tasks; give them as one sequence")
    grids = [[(where, value) for value in argument] for where, kind, argument in searches if kind == "grid_search"]
    count = num_samples * math.prod(len(grid) for grid in grids)
    if count > MAX_RUNS:
        raise source.error((name,), f"num_samples and grid_search make {count} runs, expected at most {MAX_RUNS}")
    first_seed = raw["config"].get("seed", 0)
    seed_is_searched = any(where == ("config", "seed") for where, _, _ in searches)
    if not seed_is_searched and first_seed is not None:
        first_seed = _first_seed(source, name, first_seed, num_samples)

    folders: set[str] = set()
    for combination in itertools.product(*grids):
        for sample in range(num_samples):
            values = copy.deepcopy(raw)
            if not seed_is_searched and first_seed is not None:
                values["config"]["seed"] = first_seed + sample
            generator = random.Random(f"{name}/{first_seed}/{sample}")
            chosen = list(combination)
            chosen += [
                (where, _draw(kind, argument, generator)) for where, kind, argument in searches if kind != "grid_search"
            ]
            for where, value in chosen:
                _replace(values, where, value)
            folder = _folder_name(chosen, values["config"].get("seed"), sample if num_samples > 1 else None)
            if folder in folders:
                folder += f"_{len(folders)}"
            folders.add(folder)
            yield folder, values


def _first_seed(source: Source, name: str, value: Any, num_samples: int) -> int:
    try:
        seed = _count(value, 0)
        if seed + num_samples > MAX_SEED:
            raise ValueError(f"expected a seed below 2**31, got {seed}")
    except ValueError as error:
        raise source.error((name, "config", "seed"), str(error)) from None
    return seed


def _find_searches(
    source: Source, root: KeyPath, where: KeyPath, value: Any
) -> Iterator[tuple[KeyPath, str, list[Any]]]:
    if isinstance(value, dict):
        kind = next(iter(value)) if len(value) == 1 else None
        if kind in SEARCHES:
            argument = value[kind]
            try:
                _check_search(str(kind), argument)
            except ValueError as error:
                raise source.error((*root, *where, str(kind)), str(error)) from None
            yield where, str(kind), argument
            return
        for key, item in value.items():
            yield from _find_searches(source, root, (*where, key), item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _find_searches(source, root, (*where, index), item)


def _check_search(kind: str, argument: Any) -> None:
    if not isinstance(argument, list) or not argument:
        raise ValueError(f"expected a list of values, got {short(argument)}")
    if kind in ("uniform", "loguniform", "randint"):
        if len(argument) != 2:
            raise ValueError(f"expected [lowest, highest], got {short(argument)}")
        low, high = (_count(value, 0) if kind == "randint" else _number(value) for value in argument)
        if not low < high or (kind == "loguniform" and low <= 0):
            raise ValueError(
                f"expected [lowest, highest]{' above 0' if kind == 'loguniform' else ''}, got {short(argument)}"
            )


def _draw(kind: str, argument: list[Any], generator: random.Random) -> Any:
    if kind == "choice":
        return generator.choice(argument)
    if kind == "randint":
        return generator.randrange(int(argument[0]), int(argument[1]))
    if kind == "uniform":
        return generator.uniform(*argument)
    return math.exp(generator.uniform(*(math.log(bound) for bound in argument)))


def _replace(values: Any, where: KeyPath, value: Any) -> None:
    for part in where[:-1]:
        values = values[part]
    values[where[-1]] = copy.deepcopy(value)


def _folder_name(chosen: list[tuple[KeyPath, Any]], seed: Any, sample: int | None) -> str:
    parts = []
    for where, value in chosen:
        if where == ("config", "seed"):
            continue
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        parts.append(f"{where[-1]}={re.sub(r'[^A-Za-z0-9.+-]+', '-', text)[:40]}")
    if seed is not None:
        parts.append(f"seed_{seed}")
    elif sample is not None:
        parts.append(f"run_{sample}")
    return "_".join(parts)[:180] or "run_0"


# -- pydantic's errors as one line -----------------------------------------------------------------------------------

_EXPECTED = {
    "bool": "true or false",
    "dict": "a mapping",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "model": "a mapping",
    "string": "text",
}


def _explain(error: ValidationError) -> tuple[KeyPath, str]:
    """The key path and message of the first error, and how many more there are."""
    # A misspelt key is also a missing one; the spelling is what to mend.
    errors = sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
    first = errors[0]
    where = tuple(part for part in first["loc"] if not _is_type_tag(part))
    kind, value = str(first["type"]), first.get("input")
    message = str(first["msg"]).removeprefix("Value error, ")
    if kind == "missing":
        message = f"missing, expected {_DESCRIPTIONS.get(str(where[-1]), 'a value')}"
    elif kind == "extra_forbidden":
        known = _fields_at(where[:-1])
        aliases = {alias: key for alias, key in _ALIASES.items() if key in known}
        mend = did_you_mean(where[-1], known, aliases) or f"; known are {', '.join(known)}"
        message = f"unknown key{mend}"
    elif kind == "literal_error":
        choices = _literals_at(where)
        message = f"expected {', '.join(choices)}, got {short(value)}" + did_you_mean(value, choices)
    elif kind == "too_short":
        message = "expected at least one, got none"
    elif kind.removesuffix("_type").removesuffix("_parsing") in _EXPECTED:
        message = f"expected {_EXPECTED[kind.removesuffix('_type').removesuffix('_parsing')]}, got {short(value)}"
    elif kind == "value_error":
        inner = re.match(r"([a-z_]+(?:\[\d+\])?(?:\.[a-zA-Z_/]+)?): ", message)
        if inner:  # a check of a whole model that names the key at fault
            where = (*where, *_split(inner[1]))
            message = message[inner.end() :]
    # An alternative that failed too (`column` may be a name or a list) is not one more mistake.
    more = len({tuple(p for p in other["loc"] if not _is_type_tag(p)) for other in errors}) - 1
    return where, message + (f" (and {more} more)" if more > 0 else "")


_DESCRIPTIONS = {
    "run": "the name of an algorithm (PPO, A3C, ...)",
    "env": "the id of an environment",
    "tasks": "a list of tasks",
    "name": "a name",
    "until": "{episode_return_mean: ..., num_env_steps: ...}",
    "targets": "a list of tasks' names",
}


def _is_type_tag(part: str | int) -> bool:
    return isinstance(part, str) and (
        part in ("str", "float", "literal['auto']") or part.startswith(("list[", "function-"))
    )


def _split(text: str) -> KeyPath:
    parts: list[str | int] = []
    for word in text.split(".", 1):
        name, _, index = word.partition("[")
        parts.append(name)
        if index:
            parts.append(int(index.rstrip("]")))
    return tuple(parts)


_MODELS: dict[str, type[BaseModel]] = {
    "progressive": ProgressiveSpec,
    "transfer": TransferSpec,
    "trial": TrialSpec,
    "tasks": TaskSpec,
    "until": UntilSpec,
    "checkpoint_config": CheckpointSpec,
}


def _model_at(where: KeyPath) -> type[BaseModel]:
    names = [part for part in where if isinstance(part, str)]
    return _MODELS.get(names[-1], Experiment) if names else Experiment


def _fields_at(where: KeyPath) -> list[str]:
    fields = list(_model_at(where).model_fields)
    if not where:
        fields = [*(name for name in fields if name not in ("name", "trial")), "num_samples", "transfer"]
    return fields


def _literals_at(where: KeyPath) -> list[str]:
    parent, key = (where[:-2], where[-2]) if isinstance(where[-1], int) else (where[:-1], where[-1])
    choices = get_args(_model_at(parent).model_fields[str(key)].annotation)
    return [str(choice) for choice in (get_args(choices[0]) if isinstance(where[-1], int) else choices)]
