"""From an `Experiment` to the `AlgorithmConfig` that runs it, every key checked before anything starts.

Source: RLlib 2.60's `AlgorithmConfig`, whose `update_from_dict` sets unknown keys silently. Here a key of a tuned
example must be a parameter of one of the config's methods (`training`, `env_runners`, ...), its value must have the
parameter's type, and what the run asks for must fit the cluster.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import math
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import ray
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from ray._common.deprecation import DEPRECATED_VALUE
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.registry import ALGORITHMS as RLLIB_ALGORITHMS
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.env.env_context import EnvContext
from ray.tune.registry import ENV_CREATOR, _global_registry

from rllib_pnn.envs.registry import full_id, unknown_id
from rllib_pnn.experiment.errors import InputError
from rllib_pnn.experiment.source import KeyPath
from rllib_pnn.experiment.spec import PROGRESSIVE_ALGORITHMS, SEARCHES, SECTIONS, Experiment, Plan
from rllib_pnn.text import did_you_mean, one_line, short
from rllib_pnn.training.progressive import OLD_GPUS, ignored_settings

AUTO = "auto"

# What the main process takes of every EnvRunner's CPU on a small cluster. Not nothing: RLlib counts on its bundle.
MAIN_SHARE = 0.1

# Algorithms beyond RLlib's registry: where their `Algorithm` is.
OWN_ALGORITHMS = {"A3C": ("rllib_pnn.training.a3c", "A3C")}

# What other libraries and older versions of RLlib call it, and what RLlib 2.60 calls it.
RENAMED = {
    "clip_rewards_to": "clip_rewards",
    "create_env_on_driver": "create_env_on_local_worker",
    "custom_eval_function": "custom_evaluation_function",
    "custom_resources_per_worker": "custom_resources_per_env_runner",
    "delay_between_worker_restarts_s": "delay_between_env_runner_restarts_s",
    "discount": "gamma",
    "entropy_cost": "entropy_coeff",
    "evaluation_num_episodes": "evaluation_duration",
    "evaluation_num_workers": "evaluation_num_env_runners",
    "framework_str": "framework",
    "gae_lambda": "lambda",
    "ignore_worker_failures": "ignore_env_runner_failures",
    "learning_rate": "lr",
    "max_grad_norm": "grad_clip",
    "max_num_worker_restarts": "max_num_env_runner_restarts",
    "max_requests_in_flight_per_sampler_worker": "max_requests_in_flight_per_env_runner",
    "metrics_smoothing_episodes": "metrics_num_episodes_for_smoothing",
    "min_iter_time_s": "min_time_s_per_iteration",
    "min_time_s_per_reporting": "min_time_s_per_iteration",
    "model_config_dict": "model_config",
    "num_cpus_for_driver": "num_cpus_for_main_process",
    "num_cpus_for_local_worker": "num_cpus_for_main_process",
    "num_cpus_per_learner_worker": "num_cpus_per_learner",
    "num_cpus_per_worker": "num_cpus_per_env_runner",
    "num_envs_per_worker": "num_envs_per_env_runner",
    "num_gpus_per_learner_worker": "num_gpus_per_learner",
    "num_gpus_per_worker": "num_gpus_per_env_runner",
    "num_learner_workers": "num_learners",
    "num_rollout_workers": "num_env_runners",
    "num_sgd_iter": "num_epochs",
    "num_workers": "num_env_runners",
    "recreate_failed_env_runners": "restart_failed_env_runners",
    "recreate_failed_workers": "restart_failed_env_runners",
    "sgd_minibatch_size": "minibatch_size",
    "validate_workers_after_construction": "validate_env_runners_after_construction",
    "worker_health_probe_timeout_s": "env_runner_health_probe_timeout_s",
    "worker_restore_timeout_s": "env_runner_restore_timeout_s",
}

# What older files have and RLlib 2.60 has no setting for, with the mend.
GONE = {
    "enable_connectors": "remove it, connectors are always on",
    "horizon": "remove it; a TimeLimit belongs to the environment (`max_episode_steps` where it has such an option)",
    "no_done_at_end": "remove it, truncated episodes are told from terminated ones",
    "soft_horizon": "remove it",
}

# What the old API stack alone reads, so that it would be ignored without a word, with the mend.
OLD_STACK_ALONE = {
    "clip_rewards": "clip in the environment (Pong Soup and Atari: `env_config: {reward_clipping: true}`)",
    "compress_observations": "remove it",
    "observation_filter": "normalise in the environment, with a wrapper of gymnasium's",
    "preprocessor_pref": "preprocess in the environment, with wrappers of gymnasium's",
}

# Keys whose spelling in Python differs, because the word is taken there.
_SPELLING = {"lambda": "lambda_", "input": "input_", "callbacks": "callbacks_class"}

# The least value that makes sense, for numbers that RLlib itself does not check at once.
_AT_LEAST: dict[str, float] = {
    "lr": 0,
    "gamma": 0,
    "grad_clip": 0,
    "metrics_num_episodes_for_smoothing": 1,
    "minibatch_size": 1,
    "num_envs_per_env_runner": 1,
    "num_epochs": 1,
    "rollout_fragment_length": 1,
    "train_batch_size": 1,
    "train_batch_size_per_learner": 1,
}
_AT_MOST: dict[str, float] = {"gamma": 1, "lambda": 1, "lambda_": 1}


@dataclass(frozen=True)
class Cluster:
    """What each node of a cluster has in total, e.g. `[{"CPU": 2.0, "memory": 1.6e10}]`."""

    nodes: tuple[Mapping[str, float], ...]

    @classmethod
    def connected(cls) -> Cluster:
        """The cluster that this process is connected to (`ray.init` was called)."""
        return cls(tuple(node["Resources"] for node in ray.nodes() if node["Alive"]))

    def total(self, resource: str) -> float:
        return sum(node.get(resource, 0.0) for node in self.nodes)

    def largest(self, resource: str) -> float:
        return max((node.get(resource, 0.0) for node in self.nodes), default=0.0)


@dataclass(frozen=True)
class _Parameter:
    section: str
    annotation: Any


def algorithm_class(name: str) -> type[Algorithm]:
    """The `Algorithm` that a tuned example's `run` names."""
    if name in OWN_ALGORITHMS:
        module, attribute = OWN_ALGORITHMS[name]
        return getattr(importlib.import_module(module), attribute)
    return RLLIB_ALGORITHMS[name]()[0]


def build_config(plan: Plan, experiment: Experiment, cluster: Cluster, *, num_runs: int = 1) -> AlgorithmConfig:
    """The validated config of one run, not yet progressive.

    Args:
        plan: where the experiment comes from, for errors.
        experiment: the run.
        cluster: what it will run on; `num_env_runners: auto` is resolved against it.
        num_runs: how many runs share the cluster.

    Raises:
        InputError: an unknown key, a value of the wrong type, what RLlib refuses, or more than the cluster has.
    """
    algorithm = algorithm_class(experiment.run)
    config = algorithm.get_default_config()
    parameters = _parameters(config)
    sections: dict[str, dict[str, Any]] = {}
    for key, value in experiment.config.items():
        where: KeyPath = ("config", key)
        name = _SPELLING.get(key, key)
        if name not in parameters:
            known = [*parameters, *_SPELLING]
            if key in GONE:
                raise plan.error(where, f"{type(config).__name__} has no such setting any more; {GONE[key]}")
            mend = did_you_mean(
                key, known, {old: new for old, new in RENAMED.items() if _SPELLING.get(new, new) in parameters}
            )
            raise plan.error(where, f"unknown key, {type(config).__name__} has no such setting{mend}")
        if key == "num_env_runners" and value == AUTO:
            continue
        sections.setdefault(parameters[name].section, {})[name] = _checked(plan, where, value, parameters[name])
    _refuse_code(plan, experiment)

    for section in sorted(sections, key=SECTIONS.index):
        try:
            getattr(config, section)(**sections[section])
        except (ValueError, TypeError, KeyError, ImportError) as error:
            raise _config_error(plan, experiment, error) from None
    config.environment(env=None if experiment.env is None else _env_id(experiment.env))
    if experiment.config.get("num_env_runners") == AUTO:
        _resolve_auto(plan, experiment, config, cluster, num_runs)
    try:
        config.validate()
    except (ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
        raise _config_error(plan, experiment, error) from None
    _refuse_ignored(plan, experiment, config)
    check_fits(plan, config, cluster)
    return config


def _refuse_ignored(plan: Plan, experiment: Experiment, config: AlgorithmConfig) -> None:
    """Raises `InputError` at a setting that RLlib's new API stack or a progressive network does not read."""
    if not (config.enable_rl_module_and_learner and config.enable_env_runner_and_connector_v2):
        return
    usual = algorithm_class(experiment.run).get_default_config()
    for key, mend in OLD_STACK_ALONE.items():
        read_by_own = key == "clip_rewards" and experiment.run in OWN_ALGORITHMS
        if getattr(config, key) != getattr(usual, key) and not read_by_own:
            raise plan.error(("config", key), f"would be ignored: the old API stack alone reads it; {mend}")
    ignored = ignored_settings(config, progressive=experiment.progressive is not None)
    if experiment.config.get("num_gpus"):  # also where it is what the algorithm has by itself
        ignored = {"num_gpus": OLD_GPUS, **ignored}
    if ignored:
        key, why = next(iter(ignored.items()))
        raise plan.error(("config", key), why)
    if experiment.progressive is not None:
        return
    given = experiment.config.get("model_config")
    if experiment.run in (*PROGRESSIVE_ALGORITHMS, "BC", "MARWIL") and isinstance(given, Mapping):
        known = [field.name for field in dataclasses.fields(DefaultModelConfig)]
        for key in given:
            if key not in known:
                mend = did_you_mean(key, known)
                raise plan.error(("config", "model_config", key), f"unknown key{mend or '; nothing reads it'}")


def check_fits(plan: Plan, config: AlgorithmConfig, cluster: Cluster) -> None:
    """Raises `InputError` if a run of `config` asks for more than `cluster` has in total, or for too much in one place.

    Tune would leave such a run pending for ever.
    """
    assert config.algo_class is not None
    request = config.algo_class.default_resource_request(config)
    for resource in ("CPU", *sorted({key for bundle in request.bundles for key in bundle} - {"CPU"})):
        asked = [bundle.get(resource, 0.0) for bundle in request.bundles]
        where: KeyPath = ("config", "num_env_runners") if resource == "CPU" else ("config",)
        what = f"{resource}s" if resource in ("CPU", "GPU") else f"of '{resource}'"
        parts, mend = "", ""
        if resource == "CPU":
            parts = f" ({_parts(config)})"
            mend = "; lower num_env_runners or set it to auto" if config.num_env_runners else ""
        if sum(asked) > cluster.total(resource) + 1e-6:
            has = cluster.total(resource)
            raise plan.error(where, f"asks for {sum(asked):g} {what}{parts}, the cluster has {has:g}{mend}")
        if max(asked) > cluster.largest(resource) + 1e-6:
            has = cluster.largest(resource)
            raise plan.error(where, f"asks for {max(asked):g} {what} in one place, the largest node has {has:g}")


def _parts(config: AlgorithmConfig) -> str:
    """Who asks for CPUs."""
    parts = (
        [f"{config.num_env_runners} env runners x {config.num_cpus_per_env_runner:g}"] if config.num_env_runners else []
    )
    if config.num_learners:
        parts.append(f"{config.num_learners} learners")
    if config.evaluation_num_env_runners and config.evaluation_interval:
        parts.append(f"{config.evaluation_num_env_runners} evaluation runners")
    return " and ".join([", ".join(parts), "the main process"] if parts else ["the main process"])


def _env_id(env: str) -> str:
    """An environment's id as every process of a cluster can make it. What Tune knows by that name comes first."""
    return env if _global_registry.contains(ENV_CREATOR, env) else full_id(env)


def check_env(plan: Plan, experiment: Experiment) -> None:
    """Makes the environment of an ordinary experiment once. Raises `InputError` if it can't be made."""
    name, env_config = _env_id(str(experiment.env)), experiment.config.get("env_config", {})
    try:
        if _global_registry.contains(ENV_CREATOR, name):
            env = _global_registry.get(ENV_CREATOR, name)(EnvContext(dict(env_config), worker_index=0))
        else:
            env = gym.make(name, **env_config)
    except (gym.error.UnregisteredEnv, gym.error.DeprecatedEnv, ModuleNotFoundError) as error:
        raise plan.error(("env",), unknown_id(name, error)) from None
    except Exception as error:  # whatever an environment's constructor may raise
        raise plan.error(("config", "env_config"), f"{name} can't be made: {complaint(error)}") from None
    env.close()


# -- keys and values -------------------------------------------------------------------------------------------------


def _parameters(config: AlgorithmConfig) -> dict[str, _Parameter]:
    """Every current parameter of the config's methods, by name; deprecated ones are left out."""
    found: dict[str, _Parameter] = {}
    for section in SECTIONS:
        for cls in type(config).__mro__:
            method = cls.__dict__.get(section)
            if method is None:
                continue
            for name, parameter in _signature(method).parameters.items():
                if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or name == "self":
                    continue
                # `-1` is DEPRECATED_VALUE; a real parameter that is annotated may have it as its default.
                deprecated = parameter.default == DEPRECATED_VALUE and parameter.annotation is inspect.Parameter.empty
                if not deprecated and not name.startswith("_"):
                    found.setdefault(name, _Parameter(section, parameter.annotation))
    found.pop("env", None)
    return found


def _signature(method: Callable[..., Any]) -> inspect.Signature:
    """A method's signature, its annotations as types where they can be resolved."""
    try:
        return inspect.signature(method, eval_str=True)
    except (NameError, TypeError):
        return inspect.signature(method)


def _checked(plan: Plan, where: KeyPath, value: Any, parameter: _Parameter) -> Any:
    """The value as the parameter's type, or an `InputError`."""
    key = str(where[-1])
    annotation, is_callback = parameter.annotation, parameter.section == "callbacks"
    if key.startswith(("num_cpus_", "num_gpus_")) and annotation == typing.Optional[int]:  # noqa: UP045  RLlib's own spelling
        annotation = float | None  # RLlib takes fractions of a CPU, whatever it says
    if key == "entropy_coeff" and isinstance(value, list):
        annotation = list[list[int | float]]  # a schedule, which RLlib's Learners take although it says float
    if is_callback or _holds_code(annotation):
        raise plan.error(where, "takes a class or a function, which a tuned example can't hold; set it from Python")
    adapter = _adapter(annotation)
    if adapter is not None:
        try:
            value = adapter.validate_python(value)
        except ValidationError:
            raise plan.error(
                where, f"expected {_describe(annotation)}, got {short(value)}{_meant_a_search(value)}"
            ) from None
        except PydanticUserError:
            pass  # a type within it is known in its module alone
    least = _AT_LEAST.get(key, 0 if key.startswith(("num_", "evaluation_num_")) else -math.inf)
    if isinstance(value, int | float) and not isinstance(value, bool) and not value >= least:
        raise plan.error(where, f"expected at least {least:g}, got {short(value)}")
    if isinstance(value, int | float) and value > _AT_MOST.get(key, math.inf):
        raise plan.error(where, f"expected at most {_AT_MOST[key]:g}, got {short(value)}")
    return value


def _meant_a_search(value: Any) -> str:
    """The mend for `{grid_serch: [1, 2]}` and `tune.grid_search([1, 2])`."""
    if isinstance(value, str) and (found := re.fullmatch(r"(?:ray\.)?tune\.(\w+)\(.*\)", value)):
        word = found[1]
    elif isinstance(value, Mapping) and len(value) == 1:
        word = str(next(iter(value)))
    else:
        return ""
    close = difflib.get_close_matches(word, SEARCHES, n=1)
    return f"; did you mean {{{close[0]}: [...]}}?" if close else ""


def _adapter(annotation: Any) -> TypeAdapter[Any] | None:
    """A checker for an annotation of RLlib's; None for one that can't be checked (only its module knows its names)."""
    if annotation is inspect.Parameter.empty:
        return None
    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True, strict=False))
    except (PydanticUserError, TypeError, NameError):
        pass
    try:
        return TypeAdapter(annotation)  # a type that may not be given a config
    except (PydanticUserError, TypeError, NameError):
        return None


def _alternatives(annotation: Any) -> list[Any]:
    arguments = typing.get_args(annotation)
    is_union = typing.get_origin(annotation) is typing.Union or type(annotation).__name__ == "UnionType"
    return [a for a in arguments if a is not type(None)] if is_union else [annotation]


def _holds_code(annotation: Any) -> bool:
    """Whether a parameter takes nothing but classes, functions and objects."""
    kinds = [typing.get_origin(a) or a for a in _alternatives(annotation)]
    if isinstance(annotation, str):
        return False  # a name that only its module knows
    plain = {bool, int, float, str, list, dict, tuple, typing.Any, inspect.Parameter.empty}
    return not any(
        kind in plain or (getattr(kind, "__module__", "") == "collections.abc" and kind is not Callable)
        for kind in kinds
    )


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def _describe(annotation: Any) -> str:
    words = [_WORDS.get(typing.get_origin(a) or a) for a in _alternatives(annotation)]
    return " or ".join(dict.fromkeys(word for word in words if word)) or "another type"


def _refuse_code(plan: Plan, experiment: Experiment) -> None:
    """A tuned example is data: no path in it may make RLlib import and call something."""
    env = experiment.env
    if env and "." in env and env not in gym.registry and not _global_registry.contains(ENV_CREATOR, env):
        raise plan.error(("env",), f"{short(env)} is a path to code, expected the id of a registered environment")
    for key in ("exploration_config", "replay_buffer_config", "model"):
        section = experiment.config.get(key)
        for inner in ("type", "custom_model", "custom_action_dist"):
            value = section.get(inner) if isinstance(section, Mapping) else None
            if isinstance(value, str) and "." in value:
                raise plan.error(
                    ("config", key, inner), f"{short(value)} is a path to code, expected a registered name"
                )
    policies = experiment.config.get("policies")
    for policy, spec in policies.items() if isinstance(policies, Mapping) else ():
        if isinstance(spec, list) and any(part is not None for part in spec[:3]):
            raise plan.error(
                ("config", "policies", policy),
                "its class and its spaces are objects, which a tuned example can't hold; expected "
                f"[null, null, null, {{...}}], got {short(spec)}",
            )


def _config_error(plan: Plan, experiment: Experiment, error: Exception) -> InputError:
    """RLlib's complaint about a config, at the first key of the file that it names."""
    message = complaint(error)
    named = [key for key in re.findall(r"`(?:config\.)?(\w+)", message) if key in experiment.config]
    return plan.error(("config", named[0]) if named else ("config",), message)


def complaint(error: BaseException) -> str:
    """An error's message as one line, without RLlib's advice on how to switch its checks off."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = text.split("\nTo suppress all validation errors")[0]
    return one_line(text, 400) or type(error).__name__


# -- the cluster -----------------------------------------------------------------------------------------------------


def _resolve_auto(plan: Plan, experiment: Experiment, config: AlgorithmConfig, cluster: Cluster, num_runs: int) -> None:
    """As many EnvRunners as the cluster carries beside the learners.

    Up to 4 cores a run are all given to EnvRunners, and the main process, which learns, takes a tenth of each: it is
    idle while they sample and they while it learns (PPO), or it takes what they leave (the asynchronous ones), which
    measured fastest on 2 cores. With more, one core is kept for it. Several runs go side by side if each can have 4
    cores, else one after the other.
    """
    cpus = cluster.total("CPU")
    side_by_side = max(1, min(num_runs, int(cpus // 4)))
    share = cpus / side_by_side
    given = experiment.config.keys() & {"num_cpus_for_main_process", "num_cpus_per_env_runner"}
    per_runner = config.num_cpus_per_env_runner
    if per_runner <= 0:
        raise plan.error(("config", "num_cpus_per_env_runner"), "num_env_runners: auto needs a number above 0")
    if config.num_learners == 0 and config.num_cpus_per_learner == AUTO:
        config.learners(num_cpus_per_learner=0)  # a local learner runs in the main process and shares its CPU

    # Tune refuses a request for nothing at all, so ask with one EnvRunner and take it away again.
    probe = config.copy(copy_frozen=False).env_runners(num_env_runners=1).experimental(_validate_config=False)
    assert probe.algo_class is not None
    beside = probe.algo_class.default_resource_request(probe).required_resources.get("CPU", 0.0) - per_runner
    shares_main = share <= 4 and not given
    if shares_main:
        beside -= config.num_cpus_for_main_process
    whole = sum(math.floor(node.get("CPU", 0.0) / per_runner) for node in cluster.nodes)
    runners = min(math.floor((share - beside) / per_runner), whole // side_by_side)
    if runners < 1:
        raise plan.error(
            ("config", "num_env_runners"),
            f"auto finds no room: the cluster has {cpus:g} CPUs, learners and the main process ask for {beside:g} "
            f"and one env runner for {per_runner:g}",
        )
    if shares_main:
        config.resources(num_cpus_for_main_process=round(MAIN_SHARE * runners, 3))
        config.env_runners(num_cpus_per_env_runner=1 - MAIN_SHARE)
    config.env_runners(num_env_runners=runners)
