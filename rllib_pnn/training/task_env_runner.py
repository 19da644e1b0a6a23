"""EnvRunners that play the task that their module is trained on. Mixed into whatever EnvRunner class a config uses.

The task travels with the weights (`ProgressiveRLModule.progress`), so an EnvRunner that is restarted or lags behind
switches its environments by itself as soon as it hears from the Learner, and every episode says which task it was
played on.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import ray
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import (
    EPISODE_DURATION_SEC_MEAN,
    EPISODE_LEN_MAX,
    EPISODE_LEN_MEAN,
    EPISODE_LEN_MIN,
    EPISODE_RETURN_MAX,
    EPISODE_RETURN_MEAN,
    EPISODE_RETURN_MIN,
)
from ray.rllib.utils.typing import StateDict

import rllib_pnn.envs.registry  # noqa: F401  # an EnvRunner's process has to know the ids
from rllib_pnn.network.memory import lean_memory
from rllib_pnn.training.learner import note_task
from rllib_pnn.training.rl_module import MODEL_CONFIG_KEY, ProgressiveRLModule

SEED_STRIDE = 100_000  # between EnvRunners; above the number of environments that one of them has
# Windows over episodes; those of an old task say nothing about the new one.
EPISODE_METRICS = (
    EPISODE_RETURN_MEAN,
    EPISODE_RETURN_MIN,
    EPISODE_RETURN_MAX,
    EPISODE_LEN_MEAN,
    EPISODE_LEN_MIN,
    EPISODE_LEN_MAX,
    EPISODE_DURATION_SEC_MEAN,
    "agent_episode_return_mean",
    "module_episode_return_mean",
)


class TaskEnvRunnerMixin(SingleAgentEnvRunner):
    """Put in front of a SingleAgentEnvRunner class by `task_env_runner_class`.

    `task_index` is the task that its environments play.
    """

    task_index = 0
    config: AlgorithmConfig
    module: ProgressiveRLModule
    _own_env_config: dict[str, Any]
    _seed: int | None

    @override(SingleAgentEnvRunner)
    def __init__(self, **kwargs: Any) -> None:
        lean_memory()
        super().__init__(**kwargs)
        # What an evaluation config says of the environments beside the task; it holds on all of them.
        self._own_env_config = _difference(self.config.env_config, self._task_env_config(0))
        if self._seed is not None:
            # RLlib's seeds of neighbouring EnvRunners differ by one, and so do those of environments within one.
            self._seed = int(self.config.seed) + SEED_STRIDE * (self.worker_index or 0)
            self._seed += SEED_STRIDE // 2 * bool(self.config.in_evaluation)

    @override(SingleAgentEnvRunner)
    def _new_episode(self, env_index: int, episodes: list[SingleAgentEpisode] | None = None) -> None:
        super()._new_episode(env_index, episodes)
        # Before anything is filed under its id: RLlib looks earlier chunks up by it.
        note_task((self._ongoing_episodes if episodes is None else episodes)[env_index], self.task_index)

    @override(SingleAgentEnvRunner)
    def set_state(self, state: StateDict) -> None:
        """Takes weights and with them the task; weights of an earlier task, late at a switch, are ignored."""
        module_state = state.get(COMPONENT_RL_MODULE)
        if module_state is not None:
            if isinstance(module_state, ray.ObjectRef):
                module_state = ray.get(module_state)
            module_state = module_state.get(DEFAULT_MODULE_ID, module_state)
            state = {**state, COMPONENT_RL_MODULE: module_state}
            if module_state["progress"]["task_index"] < self.task_index:
                del state[COMPONENT_RL_MODULE]
        super().set_state(state)
        if self.module is not None and self.module.task_index != self.task_index:
            self.switch_task(self.module.task_index)

    def follow(self, module_state: StateDict) -> None:
        """Takes a module's state whatever it names, an earlier task too (after a restore, say)."""
        self.module.set_state(module_state)
        if self.module.task_index != self.task_index:
            self.switch_task(self.module.task_index)

    def _task_env_config(self, task_index: int) -> dict[str, Any]:
        return dict(self.config.rl_module_spec.model_config[MODEL_CONFIG_KEY]["tasks"][task_index]["env_config"])

    def switch_task(self, task_index: int) -> None:
        """Closes all environments and makes those of another task; unfinished episodes are forgotten."""
        self.task_index = task_index
        config = self.config.copy(copy_frozen=False)
        # Not by `environment()`, which keeps what is there: keys of earlier tasks.
        config.env_config = _laid_over(self._task_env_config(task_index), self._own_env_config)
        config.freeze()
        self.config = config
        for metric in EPISODE_METRICS:
            self.metrics.delete(metric, key_error=False)
        self._done_episodes_for_metrics.clear()
        self._ongoing_episodes_for_metrics.clear()
        if self.env is not None:
            self.make_env()


def _difference(given: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be laid over `base` to get `given`."""
    found = {}
    for key, value in given.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), Mapping):
            if inner := _difference(value, base[key]):
                found[key] = inner
        elif key not in base or base[key] != value:
            found[key] = value
    return found


def _laid_over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `own`, mappings in them merged likewise."""
    return {**base} | {
        key: _laid_over(base[key], value)
        if isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        else value
        for key, value in own.items()
    }


@functools.cache  # one class object each, so that equal configs compare equal
def task_env_runner_class(env_runner_class: type[SingleAgentEnvRunner]) -> type[SingleAgentEnvRunner]:
    """`env_runner_class` with `TaskEnvRunnerMixin` in front; itself if that is there already."""
    if issubclass(env_runner_class, TaskEnvRunnerMixin):
        return env_runner_class
    return type(f"Task{env_runner_class.__name__}", (TaskEnvRunnerMixin, env_runner_class), {})
