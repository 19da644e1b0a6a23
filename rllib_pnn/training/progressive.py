"""`make_progressive`: any PPO, APPO, IMPALA or A3C config becomes one that learns a list of tasks, a column each.

This is the one call that an existing pipeline needs:

    config = PPOConfig().environment("rllib_pnn/PongSoup-v0")
    config = make_progressive(config, tasks=[{"name": "pong", "env_config": {"variant": "pong"}, ...}, ...])
    algorithm = config.build_algo()
    while not algorithm.train()["done"]: ...
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.env_context import EnvContext
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.models.catalog import MODEL_DEFAULTS
from ray.rllib.offline.offline_env_runner import OfflineSingleAgentEnvRunner
from ray.rllib.utils import force_list
from ray.tune.registry import ENV_CREATOR, _global_registry

from rllib_pnn.analysis.runs import RunError, find_columns
from rllib_pnn.envs.registry import ENV_IDS, full_id, unknown_id
from rllib_pnn.network.adapter import LATERALS
from rllib_pnn.network.column import check_source, layer_shapes
from rllib_pnn.network.progressive import ProgressiveNetwork
from rllib_pnn.network.spec import ColumnSpec
from rllib_pnn.network.store import ColumnStore
from rllib_pnn.text import did_you_mean
from rllib_pnn.training.a3c import A3CConfig
from rllib_pnn.training.a3c_env_runner import callback_class
from rllib_pnn.training.array_connectors import use_array_pipeline
from rllib_pnn.training.callback import ProgressiveCallback
from rllib_pnn.training.env_runner import ArrayEnvRunner
from rllib_pnn.training.evaluation import is_vectorized, make_vector_env
from rllib_pnn.training.learner import ThenTaskIndex, progressive_learner_class
from rllib_pnn.training.rl_module import (
    ARCHITECTURES,
    MODEL_CONFIG_KEY,
    ProgressiveRLModule,
    ProgressiveTargetRLModule,
    num_outputs_of,
    observation_shape_of,
)
from rllib_pnn.training.task_env_runner import task_env_runner_class
from rllib_pnn.training.tasks import Task, parse_tasks

logger = logging.getLogger(__name__)

MAX_SEQ_LEN = 20  # steps of a sequence in train batches of recurrent columns; RLlib's own default
OLD_GPUS = "would be ignored: the old API stack alone reads it; did you mean 'num_gpus_per_learner'?"
_DEFAULTS = AlgorithmConfig()
# Where a config has RLlib's defaults: with those, an EnvRunner whose node is lost costs 30 s in every iteration, and an
# exception in an environment 60 s, which all others wait for.
_FAULT_TOLERANCE = {"env_runner_health_probe_timeout_s": 2.0, "delay_between_env_runner_restarts_s": 1.0}


def make_progressive(
    config: AlgorithmConfig,
    *,
    tasks: Sequence[Task | Mapping[str, Any]],
    column: Any = "atari",
    lateral: str = "adapter",
    lateral_scale: float = 0.1,
    lateral_heads: bool = True,
    architecture: str = "progressive",
    columns_from: str | os.PathLike[str] | None = None,
    column_store: str | os.PathLike[str] | None = None,
    input_shift: float | str = "auto",
    evaluation_episodes: int = 10,
    evaluation_seed: int = 0,
    check_spaces: bool = True,
) -> AlgorithmConfig:
    """Turns an `AlgorithmConfig` into a progressive one; the config that is passed in stays as it is.

    Args:
        config: PPO, APPO, IMPALA or A3C on the new API stack, single-agent, with its environment set. For columns with
            LSTM layers, PPO, APPO and IMPALA cut episodes into sequences of `model_config`'s `max_seq_len` steps (20);
            A3C's are its rollouts. Columns are drawn from its `seed`, 0 if it has none.
        tasks: what to learn, in order; see `Task`. Each task's `env_config` is merged over the config's own.
        column: what a column is made of; see `ColumnSpec.parse`.
        lateral: `"adapter"` (eq. 2), `"linear"` (eq. 1) or `"none"`.
        lateral_scale: initial alpha of eq. 2.
        lateral_heads: laterals into policy and value head too.
        architecture: `"progressive"`, or a baseline: `"scratch"` (1), `"finetune_heads"` (2), `"finetune_all"` (3),
            `"random_column"` (4); see `rl_module.grow`.
        columns_from: a run folder, the folder of an experiment of one run, or a column store, whose columns stand in
            front of the first task's.
        column_store: where columns are stored; None: `columns/` in the trial's folder.
        input_shift: taken from scaled observations by each new column. `"auto"`: the task's typical pixel (median
            over some frames of random play) for images, so that a plain background is 0; 0 for vectors.
        evaluation_episodes: episodes that every column plays on its own task at each task's end; 0: none.
        evaluation_seed: seed of those episodes.
        check_spaces: make every task's environment once, compare its spaces and look at its pixels; False saves
            the time, and `"auto"` then means 0.

    Returns:
        A new config. `build_algo().train()` results then have the keys that `ProgressiveCallback` documents; the
        last one has `done=True`.

    Raises:
        ValueError: one line that names the argument, what was expected, what came and the mend.
    """
    parsed = parse_tasks(tasks)
    check_choice("lateral", lateral, LATERALS)
    check_choice("architecture", architecture, ARCHITECTURES)
    if (
        isinstance(lateral_scale, bool)
        or not isinstance(lateral_scale, int | float)
        or not abs(lateral_scale) <= sys.float_info.max
    ):
        raise ValueError(f"lateral_scale: expected a finite number, got {lateral_scale!r}")
    if isinstance(evaluation_episodes, bool) or not isinstance(evaluation_episodes, int) or evaluation_episodes < 0:
        raise ValueError(f"evaluation_episodes: expected a whole number from 0, got {evaluation_episodes!r}")
    if isinstance(evaluation_seed, bool) or not isinstance(evaluation_seed, int) or evaluation_seed < 0:
        raise ValueError(f"evaluation_seed: expected a whole number from 0, got {evaluation_seed!r}")
    _check_config(config)
    for key, why in ignored_settings(config).items():
        logger.warning(f"config.{key}: {why}")

    for name in ("env_to_module_connector", "module_to_env_connector"):
        if evaluation_episodes and getattr(config, f"_{name}") is not None:
            raise ValueError(
                f"config: {name}: a column is played as it is frozen, without connectors, which may change after it; "
                "put the transformation into an environment wrapper (gymnasium.wrappers), or set evaluation_episodes=0"
            )

    base_env_config = dict(config.env_config)
    merged = [Task(t.name, base_env_config | dict(t.env_config), t.until) for t in parsed]
    for i, task in enumerate(merged):
        try:  # now, for with its column it goes into the store when the task ends
            json.dumps(dict(task.env_config), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"tasks[{i}] ('{task.name}'): env_config: {' '.join(str(error).split())}; expected plain data "
                "(numbers, strings, lists, dicts), which is stored with the column; name anything else and let the "
                "environment look it up"
            ) from None
    if input_shift != "auto" and (isinstance(input_shift, bool) or not isinstance(input_shift, int | float)):
        raise ValueError(f"input_shift: expected a number or 'auto', got {input_shift!r}")
    network: ProgressiveNetwork | None = None
    shifts = [0.0 if input_shift == "auto" else float(input_shift)] * len(merged)
    if check_spaces:
        observation_space, action_space, typical = _look_at_tasks(config, merged)
        if input_shift == "auto":
            shifts = typical
        network = ProgressiveNetwork(
            observation_shape_of(observation_space), num_outputs_of(action_space), column, lateral=lateral
        )
    if ColumnSpec.parse(column).is_recurrent and config.num_aggregator_actors_per_learner:
        raise ValueError(
            f"config: num_aggregator_actors_per_learner ({config.num_aggregator_actors_per_learner}) must be 0 with "
            "LSTM columns: AggregatorActors know the first column alone, and so not the length of the states"
        )
    source = source_store(columns_from)
    if source is not None and network is not None:
        shared = source.manifest.network
        if shared.observation_shape != network.given_observation_shape or shared.num_outputs != network.num_outputs:
            raise ValueError(
                f"columns_from: {source.path}: its columns take observations {shared.observation_shape} and give "
                f"{shared.num_outputs} policy outputs, the tasks have {network.given_observation_shape} and "
                f"{network.num_outputs}"
            )
        if architecture in ("progressive", "random_column") and lateral != "none":
            shapes = layer_shapes(network.spec, network.observation_shape)
            for j, entry in enumerate(source.entries):
                try:
                    check_source(shapes, j, layer_shapes(ColumnSpec.parse(entry.spec), network.observation_shape))
                except ValueError as error:
                    raise ValueError(f"columns_from: {source.path}: {error}; give `column` such layers") from None

    settings = {
        "tasks": [t.to_json() | {"input_shift": m} for t, m in zip(merged, shifts, strict=True)],
        "env": config.env if isinstance(config.env, str) else None,
        "column": column,
        "lateral": lateral,
        "lateral_scale": float(lateral_scale),
        "lateral_heads": bool(lateral_heads),
        "architecture": architecture,
        "columns_from": None if source is None else str(source.path.resolve()),
        "column_store": None if column_store is None else str(Path(column_store).resolve()),
        "evaluation_episodes": evaluation_episodes,
        "evaluation_seed": evaluation_seed,
        "seed": config.seed if isinstance(config.seed, int) else 0,  # the Learner takes the config's own, see there
    }
    progressive = config.copy(copy_frozen=False)
    # Not by `environment()`, which lays it over what is there, in place.
    progressive.env_config = copy.deepcopy(dict(merged[0].env_config))
    if isinstance(config.env, str) and not _global_registry.contains(ENV_CREATOR, config.env):
        progressive.environment(full_id(config.env))
    module_class = ProgressiveTargetRLModule if isinstance(config, APPOConfig) else ProgressiveRLModule
    progressive.rl_module(
        rl_module_spec=RLModuleSpec(
            module_class=module_class,
            # RLlib asks every recurrent module for the length of the sequences in its batches.
            model_config={MODEL_CONFIG_KEY: settings, "max_seq_len": _max_seq_len(config)},
        )
    )
    if isinstance(config, PPOConfig | IMPALAConfig) and config.add_default_connectors_to_learner_pipeline:
        use_array_pipeline(progressive)
    if config.num_aggregator_actors_per_learner and not isinstance(progressive._learner_connector, ThenTaskIndex):
        if progressive._learner_connector is None:
            raise ValueError(
                "config: `add_default_connectors_to_learner_pipeline` is False and there is no `learner_connector`, so "
                "that nothing makes the batches"
            )
        progressive.learners(learner_connector=ThenTaskIndex(progressive._learner_connector))
    learner_class: Any = progressive.learner_class
    progressive.learners(learner_class=progressive_learner_class(learner_class))
    env_runner_class: Any = _env_runner_class(config)
    progressive.env_runners(env_runner_cls=task_env_runner_class(env_runner_class))
    if config.env in ENV_IDS and gym.VectorizeMode(config.gym_env_vectorize_mode) is gym.VectorizeMode.SYNC:
        # The same observations, all environments of an EnvRunner stepped together.
        # (By name: RLlib's runner that writes what it samples knows no other.)
        progressive.env_runners(gym_env_vectorize_mode="vector_entry_point")
    for name, seconds in _FAULT_TOLERANCE.items():
        if getattr(config, name) == getattr(_DEFAULTS, name):
            progressive.fault_tolerance(**{name: seconds})
    given = force_list(config.callbacks_class)
    own = [c for c in given if issubclass(callback_class(c), ProgressiveCallback)]
    others = [c for c in given if c not in own]
    walker = max(own, key=lambda c: len(callback_class(c).__mro__), default=ProgressiveCallback)  # a user's subclass
    progressive.callbacks([walker, *others])  # first: the others see what it adds to results
    return progressive


def _max_seq_len(config: AlgorithmConfig) -> int:
    given = config.model_config.get("max_seq_len", MAX_SEQ_LEN)
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f"model_config: max_seq_len: expected a whole number from 1, got {given!r}")
    return given


def _env_runner_class(config: AlgorithmConfig) -> type[SingleAgentEnvRunner]:
    cls = config.env_runner_cls
    if cls is None and config.output:
        return OfflineSingleAgentEnvRunner  # as RLlib chooses it: it writes what it samples
    if cls is None:
        return ArrayEnvRunner if config.env in ENV_IDS else SingleAgentEnvRunner
    if not isinstance(cls, type) or not issubclass(cls, SingleAgentEnvRunner):
        raise ValueError(f"env_runner_cls: expected a subclass of SingleAgentEnvRunner, got {cls!r}")
    return cls


def _check_config(config: AlgorithmConfig) -> None:
    if not isinstance(config, AlgorithmConfig):
        raise ValueError(f"config: expected an AlgorithmConfig, got {type(config).__name__}")
    if not (config.enable_rl_module_and_learner and config.enable_env_runner_and_connector_v2):
        raise ValueError(
            "config: the old API stack is switched on; remove the call of `config.api_stack(...)`, or use the model "
            "'progressive' of the ModelCatalog (see rllib_pnn/training/model_v2.py)"
        )
    if not isinstance(config, PPOConfig | IMPALAConfig | A3CConfig):
        raise ValueError(f"config: expected PPO, APPO, IMPALA or A3C, got {type(config).__name__}")
    if config.is_multi_agent:
        raise ValueError("config: a progressive network has one agent; multi-agent configs are not supported")
    if config.env is None:
        raise ValueError("config: no environment; call `config.environment('rllib_pnn/PongSoup-v0')` first")


def ignored_settings(config: AlgorithmConfig, *, progressive: bool = True) -> dict[str, str]:
    """Why, of each setting that RLlib's new API stack, or a progressive network, does not read.

    `rllib train` refuses them; `make_progressive` warns, since a pipeline that it is put into has them for other uses.
    """
    found = {}
    if config.num_gpus != type(config)().num_gpus:  # IMPALA's own is 1
        found["num_gpus"] = OLD_GPUS
    instead = "the new API stack reads `model_config`"
    networks = [("model", config.model, MODEL_DEFAULTS, "vf_share_layers")]
    if progressive:
        instead = (
            "`progressive.column` (`column` of make_progressive) says what the network is; model_config's max_seq_len "
            "alone is read"
        )
        given = config._model_config
        given = given if isinstance(given, Mapping) else dataclasses.asdict(given)
        networks.append(("model_config", given, dataclasses.asdict(DefaultModelConfig()), "max_seq_len"))
    # RLlib itself sets what begins with "_", and PPO vf_share_layers.
    for name, settings, usual, fine in networks:
        other = [
            key
            for key, value in settings.items()
            if key != fine and not key.startswith("_") and (key not in usual or usual[key] != value)
        ]
        if other:
            found[name] = f"{', '.join(other)} would be ignored: {instead}"
    return found


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        mend = did_you_mean(value, choices)
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}{mend}")


def _look_at_tasks(config: AlgorithmConfig, tasks: Sequence[Task]) -> tuple[gym.Space, gym.Space, list[float]]:
    """The spaces that all tasks share, and each task's typical pixel.

    Raises:
        ValueError: naming the first task whose environment differs or can't be made.
    """
    common: tuple[gym.Space, gym.Space] | None = None
    pixels = []
    for i, task in enumerate(tasks):
        try:
            env = _make_env(config, task)
            try:
                spaces = (
                    getattr(env, "single_observation_space", env.observation_space),
                    getattr(env, "single_action_space", env.action_space),
                )
                pixels.append(_typical_pixel(env, spaces[0]))
            finally:
                env.close()
        except (gym.error.UnregisteredEnv, gym.error.DeprecatedEnv) as error:
            raise ValueError(f"env: {unknown_id(str(config.env), error)}") from error
        except (ValueError, TypeError, KeyError, gym.error.Error) as error:
            raise ValueError(f"tasks[{i}] ('{task.name}'): {' '.join(str(error).split())}") from error
        if common is None:
            common = spaces
        for kind, first, this in zip(("observation", "action"), common, spaces, strict=True):
            if first != this:
                raise ValueError(
                    f"tasks[{i}] ('{task.name}'): its {kind} space is {this}, that of '{tasks[0].name}' is {first}; "
                    "all tasks of a progressive network share both spaces"
                )
    assert common is not None
    return *common, pixels


def _make_env(config: AlgorithmConfig, task: Task) -> Any:
    creator: Any = config.env
    if isinstance(creator, str) and _global_registry.contains(ENV_CREATOR, creator):
        creator = _global_registry.get(ENV_CREATOR, creator)
    if isinstance(creator, str):
        return gym.make(full_id(creator), **dict(task.env_config))
    if is_vectorized(config):
        return make_vector_env(creator, task.env_config, 1, vectorized=True)
    return creator(EnvContext(dict(task.env_config), worker_index=0))


def _typical_pixel(env: Any, space: gym.Space, num_steps: int = 32) -> float:
    """Median over some frames of random play, as a part of 255; 0 for anything that is not an image of bytes."""
    if not isinstance(space, gym.spaces.Box) or space.dtype != np.uint8 or len(space.shape) != 3:
        return 0.0
    env.action_space.seed(0)
    frames = [np.asarray(env.reset(seed=0)[0])]
    while len(frames) <= num_steps:
        obs, _, terminated, truncated, _ = env.step(env.action_space.sample())
        frames.append(np.asarray(obs))
        if np.any(terminated) or np.any(truncated):
            break
    return float(np.median(np.stack(frames))) / 255


def source_store(path: str | os.PathLike[str] | None) -> ColumnStore | None:
    """The store that a path names, verified. Raises `ValueError`."""
    if path is None:
        return None
    try:
        store = ColumnStore(find_columns(path))
    except RunError as error:
        raise ValueError(f"columns_from: {error}") from None
    if not store.entries:
        raise ValueError(f"columns_from: {path}: holds no columns; expected a run folder or a column store")
    store.verify()
    return store
