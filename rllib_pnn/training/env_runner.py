"""`ArrayEnvRunner`: RLlib's `SingleAgentEnvRunner` with rollouts kept as arrays instead of lists of single
steps.

The stock runner appends every step of every environment to a Python list, walks two connector pipelines over
single items per step, and stacks everything again at the end. On a vector environment all of that is one
array operation per step: this runner writes the batch that the environment returns into one row of
preallocated arrays (environment, time, ...), feeds the same batch to the module, and cuts the arrays into
`SingleAgentEpisode`s at the end of `sample()`.

Boundary: it replaces the sampling loop (`_sample`) and nothing else. Environment, module, connectors,
metrics, seeds, faults and callbacks are the parent's, and the episodes equal the parent's. Where a user's
setup needs the single steps (own connectors, an `on_episode_step` callback, ...) the parent's loop runs
instead.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
import tree
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.connectors.common.add_observations_from_episodes_to_batch import (
    AddObservationsFromEpisodesToBatch,
)
from ray.rllib.connectors.common.add_states_from_episodes_to_batch import AddStatesFromEpisodesToBatch
from ray.rllib.connectors.common.add_time_dim_to_batch_and_zero_pad import AddTimeDimToBatchAndZeroPad
from ray.rllib.connectors.common.batch_individual_items import BatchIndividualItems
from ray.rllib.connectors.common.numpy_to_tensor import NumpyToTensor
from ray.rllib.connectors.common.tensor_to_numpy import TensorToNumpy
from ray.rllib.connectors.module_to_env import (
    GetActions,
    ListifyDataForVectorEnv,
    NormalizeAndClipActions,
    RemoveSingleTsTimeRankFromBatch,
    UnBatchToIndividualItems,
)
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from ray.rllib.env.env_runner import ENV_STEP_FAILURE
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer
from ray.rllib.utils import force_list
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import (
    ENV_TO_MODULE_CONNECTOR,
    MODULE_TO_ENV_CONNECTOR,
    RLMODULE_INFERENCE_TIMER,
    WEIGHTS_SEQ_NO,
)
from ray.rllib.utils.numpy import convert_to_numpy
from ray.rllib.utils.spaces.space_utils import batch as batch_items
from ray.rllib.utils.spaces.space_utils import clip_action, unsquash_action
from ray.rllib.utils.spaces.space_utils import unbatch as unbatch_items
from ray.rllib.utils.torch_utils import convert_to_torch_tensor

from rllib_pnn.envs.stagger import cut_now, stagger_episodes
from rllib_pnn.network.memory import lean_memory
from rllib_pnn.training.array_connectors import reads_recorded_features
from rllib_pnn.training.recorded_features import FeatureRecorder

logger = logging.getLogger(__name__)

DEFAULT_ENV_TO_MODULE = (
    AddObservationsFromEpisodesToBatch,
    AddTimeDimToBatchAndZeroPad,
    AddStatesFromEpisodesToBatch,
    BatchIndividualItems,
    NumpyToTensor,
)
DEFAULT_MODULE_TO_ENV = (
    GetActions,
    TensorToNumpy,
    UnBatchToIndividualItems,
    RemoveSingleTsTimeRankFromBatch,
    NormalizeAndClipActions,
    ListifyDataForVectorEnv,
)
_ARRAY_SPACES = (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)
_EPISODE_STEPS_PER_BLOCK = 64  # when sampling whole episodes, whose lengths nobody knows beforehand


class ArrayEnvRunner(SingleAgentEnvRunner):
    """Drop-in replacement for RLlib's `SingleAgentEnvRunner` that is fast on vector environments.

        config.env_runners(env_runner_cls=ArrayEnvRunner, gym_env_vectorize_mode="vector_entry_point")

    `sample()` returns what the parent would have returned from the same seed and weights: the same
    observations, actions, rewards, model outputs, flags, infos, chunks, ids and metrics. Three things differ,
    none of them in the data:

    - the single connectors run (and are timed) once per `sample()` instead of once per step;
    - without an `on_episode_end` callback, chunks of unfinished episodes are remembered for the metrics as length,
      return and duration instead of with all their observations. A callback class that is content with these three of
      its `prev_episode_chunks` says so by the attribute `needs_whole_chunks = False`;
    - a remote runner uses one torch thread per CPU it was given and keeps freed memory (`lean_memory`).

    Anything that needs the single steps falls back to the parent's loop and says so once in the log:
    connectors of one's own, an `on_episode_step` callback, `episodes_to_numpy=False`, observation or action
    spaces that are no arrays.

    With a SAME_STEP environment RLlib's loop, and so this one, records the next episode's first observation
    as the last one of the episode that ended, and drops the new episode's first transition. Prefer NEXT_STEP,
    gymnasium's default.
    """

    # RLlib types these as optional or as their base classes; while sampling they are what the names say.
    module: Any
    _needs_initial_reset: bool
    _cached_to_module: Any
    _env_to_module: Any
    _module_to_env: Any
    _ongoing_episodes: list[Any]
    _ongoing_episodes_for_metrics: Any

    @override(SingleAgentEnvRunner)
    def __init__(self, *, config: AlgorithmConfig, **kwargs: Any):
        super().__init__(config=config, **kwargs)
        self._logged_fallback: str | None = None
        self._features = FeatureRecorder()
        # The local runner shares its process with the Learner, whose business threads and memory are.
        if self.worker_index:
            torch.set_num_threads(max(1, int(self.config.num_cpus_per_env_runner)))
            lean_memory()

    @override(SingleAgentEnvRunner)
    def _sample(
        self,
        *,
        num_timesteps: int | None = None,
        num_episodes: int | None = None,
        explore: bool,
        random_actions: bool = False,
        force_reset: bool = False,
    ) -> list[SingleAgentEpisode]:
        self._features.stop()  # whatever runs, what was recorded is of an earlier rollout now
        reason = self._reason_for_single_steps()
        if reason is not None and reason != self._logged_fallback:
            self._logged_fallback = reason
            logger.info("ArrayEnvRunner: %s, so that RLlib's own sampling loop runs.", reason)
        # Nothing to gain in the rest: random actions need no model, and without steps there are no arrays.
        if reason is not None or random_actions or num_timesteps == 0 or num_episodes == 0:
            return super()._sample(
                num_timesteps=num_timesteps,
                num_episodes=num_episodes,
                explore=explore,
                random_actions=random_actions,
                force_reset=force_reset,
            )

        # Without a cached batch, an error ended the previous call halfway.
        if force_reset or num_episodes is not None or self._needs_initial_reset or self._cached_to_module is None:
            self._reset_envs_and_episodes(explore)
            self._stagger(num_episodes)
        if num_episodes is not None:
            self._needs_initial_reset = True
        # The last batch of the previous call, made by the env-to-module pipeline.
        to_module, self._cached_to_module = self._cached_to_module, None

        # RLlib switches to evaluation mode and back at every step, which costs as much as a small column's forward
        # pass.
        was_training = self.module.training
        self.module.eval()
        initial_state = self._initial_states() if self.module.is_stateful() else None
        lists_at_end = self._overrides_callback("on_episode_end")
        done_episodes: list[SingleAgentEpisode] = []
        cut_episodes: list[SingleAgentEpisode] = []
        rollout = self._new_rollout(num_timesteps)
        self._record_features(rollout, explore)
        finished: list[tuple[SingleAgentEpisode, int, int]] = []  # with its environment and its first step here
        num_steps = num_done = 0  # env steps since the last (forced) reset, episodes that ended
        first = True

        while True:
            outputs, actions_for_env = self._act(
                to_module, explore=explore, num_steps=num_steps, through_pipeline=first
            )
            first = False
            results = self._try_env_step(actions_for_env)
            if isinstance(results, str) and results == ENV_STEP_FAILURE:
                # The environments were built anew: what the unfinished episodes held is lost, as in the
                # parent's loop.
                num_steps = 0
                self._reset_envs_and_episodes(explore)
                self._stagger(num_episodes)
                to_module, self._cached_to_module = self._cached_to_module, None
                rollout = self._new_rollout(num_timesteps)
                self._record_features(rollout, explore)
                finished.clear()
                continue

            observations, rewards, terminateds, truncateds, infos = results
            # An environment whose episode ended in the step before was only reset by this one.
            was_reset = rollout.unstarted
            actions = outputs.pop(Columns.ACTIONS)
            outputs[WEIGHTS_SEQ_NO] = np.full(self.num_envs, self._weights_seq_no)
            rollout.add(
                observations,
                actions,
                np.asarray(rewards),
                infos,
                np.asarray(terminateds),
                np.asarray(truncateds),
                outputs,
            )
            num_steps += self.num_envs - len(was_reset)
            done = rollout.done_now()
            cut = cut_now(self.env) if done else None

            collected, wanted = (
                (num_steps, num_timesteps) if num_episodes is None else (num_done + len(done), num_episodes)
            )
            last = collected >= wanted  # type: ignore[operator]
            if last:
                for index in range(self.num_envs):
                    rollout.fill_episode(index)
                # One pass through the pipeline: the next call, or the parent's loop, continues from it.
                self._cached_to_module = self._env_to_module(
                    episodes=self._ongoing_episodes,
                    batch={},
                    explore=explore,
                    rl_module=self.module,
                    shared_data=self._shared_data,
                    metrics=self.metrics,
                    metrics_prefix_key=(ENV_TO_MODULE_CONNECTOR,),
                )

            for index in sorted({*was_reset, *done}):
                if index in was_reset:
                    self._make_on_episode_callback("on_episode_start", index, self._ongoing_episodes)
                    continue
                began = rollout.step_of_start(index)
                if cut is not None and cut[index]:
                    # Learned from, and no more: for metrics and callbacks it did not end.
                    cut_episodes.append(rollout.finish_episode(index))
                    self._ongoing_episodes_for_metrics.pop(cut_episodes[-1].id_, None)
                    finished.append((cut_episodes[-1], index, began))
                else:
                    num_done += 1
                    if lists_at_end:
                        rollout.fill_episode(index)
                    self._make_on_episode_callback("on_episode_end", index, self._ongoing_episodes)
                    done_episodes.append(
                        # A callback may have changed what it was given.
                        self._ongoing_episodes[index].to_numpy() if lists_at_end else rollout.finish_episode(index)
                    )
                    finished.append((done_episodes[-1], index, began))
                self._new_episode(index, self._ongoing_episodes)
                rollout.forget_episode(index)
                if num_episodes is not None and num_done >= num_episodes:
                    break
            if last:
                break

            to_module = self._batch_for_module(observations, outputs, initial_state, was_reset)

        self.module.train(was_training)
        self._done_episodes_for_metrics.extend(done_episodes)
        ongoing_episodes = []
        if num_timesteps is not None:
            ongoing = self._cut_ongoing_episodes(rollout)
            ongoing_episodes = [episode for episode, _ in ongoing]
            finished += [(episode, index, rollout.step_of_start(index)) for episode, index in ongoing]
        for episode, index, began in finished:
            self._features.sign(episode, index, began)
        self._log_env_steps(metric=self._metrics_num_env_steps_sampled, num_steps=num_steps)
        self._increase_sampled_metrics(num_steps, len(done_episodes))
        return done_episodes + cut_episodes + ongoing_episodes

    @override(SingleAgentEnvRunner)
    def make_env(self) -> None:
        super().make_env()
        self._env_is_new = True

    @override(SingleAgentEnvRunner)
    def make_module(self) -> None:
        super().make_module()
        if hasattr(self.module, "follows_environments"):
            self.module.follows_environments()

    def _stagger(self, num_episodes: int | None) -> None:
        """Once for environments that are new, and for training alone: evaluation counts whole episodes."""
        if self._env_is_new and num_episodes is None and not self.config.in_evaluation:
            stagger_episodes(self.env, self._seed)
        self._env_is_new = False

    @override(SingleAgentEnvRunner)
    def _reset_envs_and_episodes(self, explore: bool) -> None:
        super()._reset_envs_and_episodes(explore)
        # Some environments write the next observation into the array that they returned last.
        for episode in self._ongoing_episodes:
            _own_copies(episode)

    def _new_rollout(self, num_timesteps: int | None) -> "_Rollout":
        if num_timesteps is None:
            return _Rollout(self._ongoing_episodes, _EPISODE_STEPS_PER_BLOCK)
        num_rows = math.ceil(num_timesteps / self.num_envs)
        # Steps that only reset an environment take a row but do not count: leave room for some.
        return _Rollout(self._ongoing_episodes, num_rows + num_rows // 4 + 2)

    def _act(
        self, to_module: dict[str, Any], *, explore: bool, num_steps: int, through_pipeline: bool
    ) -> tuple[dict[str, Any], Any]:
        """Asks the module for the next actions of all environments.

        Returns:
            The columns to store (numpy, first axis: environment; the actions among them), and what to send to
            the environment: the actions unsquashed or clipped to the action space.
        """
        with torch.no_grad():
            with self.metrics.log_time(RLMODULE_INFERENCE_TIMER):
                if explore:
                    num_env_runners = self.config.num_env_runners or 1
                    steps = (self.num_env_steps_sampled_lifetime // num_env_runners + num_steps) * num_env_runners
                    if self._features.is_on:
                        outputs = self._features.forward(self.module, to_module, t=steps)
                    else:
                        outputs = self._forward("exploration")(to_module, t=steps)
                else:
                    outputs = self._forward("inference")(to_module)

            if through_pipeline:
                outputs = self._module_to_env(
                    rl_module=self.module,
                    batch=outputs,
                    episodes=self._ongoing_episodes,
                    explore=explore,
                    shared_data=self._shared_data,
                    metrics=self.metrics,
                    metrics_prefix_key=(MODULE_TO_ENV_CONNECTOR,),
                )
                actions_for_env = outputs.pop(Columns.ACTIONS_FOR_ENV, outputs[Columns.ACTIONS])
                return (
                    {k: batch_items(v) if isinstance(v, list) else v for k, v in outputs.items()},
                    actions_for_env,
                )

            outputs = dict(outputs)
            if Columns.ACTIONS not in outputs:
                self._sample_actions(outputs, explore)
        outputs = cast(dict[str, Any], convert_to_numpy(outputs))
        if self.module.is_stateful():
            # The module saw one time step per environment: (N, 1, ...) -> (N, ...).
            outputs = {
                k: v if k == Columns.STATE_OUT else tree.map_structure(lambda a: a.squeeze(1), v)
                for k, v in outputs.items()
            }
        actions_for_env = outputs.pop(Columns.ACTIONS_FOR_ENV, outputs[Columns.ACTIONS])
        piece = self._module_to_env.connectors[DEFAULT_MODULE_TO_ENV.index(NormalizeAndClipActions)]
        if piece.normalize_actions:
            actions_for_env = unsquash_action(deepcopy(outputs[Columns.ACTIONS]), piece._action_space_struct)
        elif piece.clip_actions:
            actions_for_env = clip_action(deepcopy(outputs[Columns.ACTIONS]), piece._action_space_struct)
        return outputs, actions_for_env

    def _record_features(self, rollout: "_Rollout", explore: bool) -> None:
        """Begins to write down what frozen columns compute, where a Learner will look for it."""
        config, module = self.config, self.module
        wanted = explore and not config.in_evaluation and reads_recorded_features(config) and not module.is_stateful()
        columns = getattr(module, "frozen_fingerprint", "") if wanted else ""
        self._features.begin(columns, rollout.num_steps)

    def _forward(self, phase: str) -> Callable[..., dict[str, Any]]:
        name = f"forward_{phase}"
        # RLlib's own public method only switches modes around the private one; a module's own does what it does.
        if getattr(type(self.module), name) is getattr(TorchRLModule, name):
            return getattr(self.module, f"_{name}")
        return getattr(self.module, name)

    def _sample_actions(self, outputs: dict[str, Any], explore: bool) -> None:
        """What `GetActions` does, operation by operation, so that the random stream is the same."""
        module = self.module
        if Columns.ACTION_DIST_INPUTS not in outputs:
            raise ValueError(
                f"{type(module).__name__} returned the columns {sorted(outputs)}: expected "
                f"`{Columns.ACTIONS}` or `{Columns.ACTION_DIST_INPUTS}` among them. Return one of the two "
                "from its forward methods."
            )
        if explore:
            distribution = module.get_exploration_action_dist_cls().from_logits(outputs[Columns.ACTION_DIST_INPUTS])
        else:
            distribution = (
                module.get_inference_action_dist_cls()
                .from_logits(outputs[Columns.ACTION_DIST_INPUTS])
                .to_deterministic()
            )
        outputs[Columns.ACTIONS] = distribution.sample()
        if Columns.ACTION_LOGP not in outputs:
            outputs[Columns.ACTION_LOGP] = distribution.logp(outputs[Columns.ACTIONS])

    def _batch_for_module(
        self, observations: Any, outputs: dict[str, Any], initial_state: Any, was_reset: list[int]
    ) -> dict[str, Any]:
        """What the default env-to-module pipeline makes of the same step: tensors, and states if the module
        has them.
        """
        batch = {Columns.OBS: tree.map_structure(np.ascontiguousarray, observations)}
        if initial_state is not None:
            batch[Columns.OBS] = tree.map_structure(lambda a: a[:, None], batch[Columns.OBS])
            state = outputs.get(Columns.STATE_OUT)
            if state is None:
                state = initial_state
            elif was_reset:

                def begin_anew(state: np.ndarray, initial: np.ndarray) -> np.ndarray:
                    state = state.copy()
                    state[was_reset] = initial[was_reset]
                    return state

                state = tree.map_structure(begin_anew, state, initial_state)
            batch[Columns.STATE_IN] = state
        return convert_to_torch_tensor(batch, device=self._device)

    def _initial_states(self) -> Any:
        """The module's initial state, once per environment: leaves (N, ...)."""
        return batch_items([convert_to_numpy(self.module.get_initial_state())] * self.num_envs)

    def _cut_ongoing_episodes(self, rollout: "_Rollout") -> list[tuple[SingleAgentEpisode, int]]:
        """Replaces the ongoing episodes by successors; returns what they hold as arrays, with their environments."""
        chunks = self._ongoing_episodes
        # Made from lists, before the arrays go in: a successor grows step by step should the parent's loop
        # take over.
        self._ongoing_episodes = [_own_copies(e.cut(self.config.episode_lookback_horizon)) for e in chunks]
        keep_whole = self._remembers_chunks_whole()
        to_return = []
        for index, chunk in enumerate(chunks):
            if chunk.t == 0:  # just created or just reset
                continue
            chunk.validate()
            rollout.finish_episode(index)
            self._ongoing_episodes_for_metrics[chunk.id_].append(chunk if keep_whole else _ChunkForMetrics(chunk))
            to_return.append((chunk, index))
        return to_return

    def _overrides_callback(self, name: str) -> bool:
        return bool(force_list(getattr(self.config, f"callbacks_{name}"))) or bool(self._callbacks_with(name))

    def _callbacks_with(self, name: str) -> list[RLlibCallback]:
        return [c for c in self._callbacks if getattr(type(c), name, None) is not getattr(RLlibCallback, name)]

    def _remembers_chunks_whole(self) -> bool:
        """Whether some callback may ask `prev_episode_chunks` for more than return, length and duration."""
        return bool(force_list(self.config.callbacks_on_episode_end)) or any(
            getattr(c, "needs_whole_chunks", True) for c in self._callbacks_with("on_episode_end")
        )

    def _reason_for_single_steps(self) -> str | None:
        """Why the parent's loop has to run; None if arrays will do."""
        if self.module is None:
            return "there is no RLModule"
        if not isinstance(self.module, TorchRLModule) or isinstance(self.module, MultiRLModule):
            return f"{type(self.module).__name__} is no (single) TorchRLModule"
        if not self.episodes_to_numpy:
            return "`episodes_to_numpy` is False"
        if self._overrides_callback("on_episode_step"):
            return "there is an `on_episode_step` callback"
        if tuple(type(c) for c in self._env_to_module.connectors) != DEFAULT_ENV_TO_MODULE:
            return "the env-to-module pipeline is not the default one"
        if tuple(type(c) for c in self._module_to_env.connectors) != DEFAULT_MODULE_TO_ENV:
            return "the module-to-env pipeline is not the default one"
        for name in ("single_observation_space", "single_action_space"):
            if not _is_array_space(getattr(self.env, name)):
                return f"`{name}` has parts that are no arrays"
        return None


class _Column:
    """One column of a rollout: arrays (environment, time, ...) in blocks of a fixed number of time steps.

    Nested structures of arrays are kept as they come. A block is allocated at the first write into it and
    never written again once full, so that episodes can hold views of it.

    Args:
        carried: Per environment, the items that its episode brings along from before the rollout.
        first: Time position of the first write. The carried items lie before it, right-aligned.
    """

    def __init__(self, carried: Sequence[Iterable[Any]], first: int, steps_per_block: int):
        self._carried = [list(items) for items in carried]
        self._first = first
        self._steps_per_block = steps_per_block
        self._blocks: list[Any] = []  # leaves (N, steps_per_block, ...); None once released
        self._carried_fit = True

    def write(self, position: int, values: Any) -> None:
        """Stores the values of all environments, leaves (N, ...), at a time position."""
        number, offset = divmod(position, self._steps_per_block)
        if number == len(self._blocks):
            self._blocks.append(tree.map_structure(self._allocate, values))
            if number == 0:
                self._write_carried()
        block = self._blocks[number]
        if isinstance(block, np.ndarray):
            if values.dtype != block.dtype:  # an environment's rewards, say, that are whole numbers at first
                block = self._blocks[number] = block.astype(np.result_type(block, values), copy=False)
            block[:, offset] = values
        else:
            tree.map_structure(lambda b, v: b.__setitem__((slice(None), offset), v), block, values)

    def array(self, index: int, start: int, stop: int) -> Any:
        """The values of an environment from `start` up to `stop`, leaves (stop - start, ...).

        A `start` before the rollout asks for what the environment's episode brought along. One block's worth
        is a view.
        """
        if start < self._first:
            if not self._carried_fit:
                return batch_items(self.items(index, start, stop))
            start = self._first - len(self._carried[index])
        size = self._steps_per_block
        pieces = [
            tree.map_structure(
                lambda b, i=i: b[index, max(start - i * size, 0) : min(stop - i * size, size)],
                self._blocks[i],
            )
            for i in range(start // size, (stop - 1) // size + 1)
        ]
        return pieces[0] if len(pieces) == 1 else tree.map_structure(lambda *p: np.concatenate(p), *pieces)

    def items(self, index: int, start: int, stop: int) -> list[Any]:
        """The same values as a list of single ones."""
        if start < self._first:
            return self._carried[index] + self.items(index, self._first, stop)
        array = self.array(index, start, stop)
        return list(array) if isinstance(array, np.ndarray) else unbatch_items(array)

    def release(self, position: int) -> None:
        """Forgets whole blocks before a time position."""
        for i in range(min(position // self._steps_per_block, len(self._blocks))):
            self._blocks[i] = None

    def _allocate(self, values: np.ndarray) -> np.ndarray:
        return np.empty((len(values), self._steps_per_block, *values.shape[1:]), values.dtype)

    def _write_carried(self) -> None:
        """Puts the carried items before the first ones, so that the two make one array.

        Values may have changed their type since, for instance the log-probabilities of actions when
        exploration ends.
        """
        flat_block = tree.flatten(self._blocks[0])
        for index, items in enumerate(self._carried):
            for i, item in enumerate(items):
                flat_item = [np.asarray(leaf) for leaf in tree.flatten(item)]
                self._carried_fit &= [(x.dtype, x.shape) for x in flat_item] == [
                    (b.dtype, b.shape[2:]) for b in flat_block
                ]
                if not self._carried_fit:
                    return
                for block, leaf in zip(flat_block, flat_item, strict=True):
                    block[index, self._first - len(items) + i] = leaf


class _Rollout:
    """What one call of `sample()` collects, and where each environment's current episode lies in it.

    Time positions count from the left end of the longest lookback that the episodes bring along. Observation
    p is followed by action, reward and model outputs p, which lead to observation p + 1. The episode of
    environment n starts at `starts[n]`.
    """

    def __init__(self, episodes: list[SingleAgentEpisode], num_rows: int):
        self._episodes = episodes
        first = max(len(e.actions.data) for e in episodes)
        self._first = self._now = first
        self._num_rows = first + num_rows
        self._starts = [first - len(e.actions.data) for e in episodes]
        self.unstarted = [n for n, e in enumerate(episodes) if not e.is_reset]
        self._just_reset: set[int] = set()
        # The newest observation counts as carried, like those that it follows.
        self._observations = _Column([e.observations.data for e in episodes], first + 1, self._num_rows)
        self._actions = _Column([e.actions.data for e in episodes], first, self._num_rows)
        self._rewards = _Column([e.rewards.data for e in episodes], first, self._num_rows)
        self._outputs: dict[str, _Column] = {}
        self._infos: list[list[dict]] = [[{}] * len(episodes) for _ in range(first + 1)]
        for n, episode in enumerate(episodes):
            for position, info in enumerate(episode.infos.data, self._starts[n]):
                self._infos[position][n] = info
        self._times: list[float] = []
        self._terminateds = self._truncateds = np.zeros(len(episodes), bool)

    @property
    def num_steps(self) -> int:
        """About how many will be added."""
        return self._num_rows - self._first

    def step_of_start(self, index: int) -> int:
        """The first step, counted from 0, whose observation belongs to the environment's episode."""
        return max(self._starts[index], self._first) - self._first

    def add(
        self,
        observations: Any,
        actions: Any,
        rewards: np.ndarray,
        infos: list[dict],
        terminateds: np.ndarray,
        truncateds: np.ndarray,
        outputs: dict[str, Any],
    ) -> None:
        """Adds a step of all environments. For those in `unstarted` it is their episode's reset."""
        now = self._now
        self._actions.write(now, actions)
        self._rewards.write(now, rewards)
        for key, values in outputs.items():
            if key not in self._outputs:
                buffers = [e.extra_model_outputs.get(key) for e in self._episodes]
                self._outputs[key] = _Column([[] if b is None else b.data for b in buffers], now, self._num_rows)
            self._outputs[key].write(now, values)
        self._observations.write(now + 1, observations)
        self._infos.append(infos)
        self._times.append(time.perf_counter())
        self._terminateds, self._truncateds = terminateds, truncateds
        self._now = now + 1
        self._just_reset = set(self.unstarted)
        for n in self.unstarted:
            self._starts[n] = now + 1
            self._episodes[n].add_env_reset(
                observation=self._observations.items(n, now + 1, now + 2)[0], infos=infos[n]
            )
        self.unstarted = []

    def done_now(self) -> list[int]:
        """The environments whose episode the last step ended."""
        return [int(n) for n in np.flatnonzero(self._terminateds | self._truncateds) if n not in self._just_reset]

    def fill_episode(self, index: int) -> None:
        """Puts what was collected into the episode as lists of single steps, as the parent's loop would
        have.
        """
        self._fill(index, _Column.items)

    def finish_episode(self, index: int) -> SingleAgentEpisode:
        """Puts what was collected into the episode as arrays, as `to_numpy()` would have."""
        self._fill(index, _Column.array)
        episode = self._episodes[index]
        for buffer in (
            episode.observations,
            episode.actions,
            episode.rewards,
            *episode.extra_model_outputs.values(),
        ):
            buffer.finalized = True
        return episode

    def forget_episode(self, index: int) -> None:
        """The environment's next step resets it."""
        self.unstarted.append(index)
        self._starts[index] = self._now + 1  # nothing before belongs to it any more
        earliest = min(self._now, *self._starts)
        for column in (self._observations, self._actions, self._rewards, *self._outputs.values()):
            column.release(earliest)

    def _fill(self, index: int, take: Callable[[_Column, int, int, int], Any]) -> None:
        start, stop = self._starts[index], self._now
        num_steps = stop - max(start, self._first)
        if num_steps <= 0:
            return  # just reset: the episode holds its first observation already
        episode: Any = self._episodes[index]  # whose private attributes RLlib does not type
        episode.observations.data = take(self._observations, index, start, stop + 1)
        episode.infos.data = [row[index] or {} for row in self._infos[start : stop + 1]]
        episode.actions.data = take(self._actions, index, start, stop)
        episode.rewards.data = take(self._rewards, index, start, stop)
        for key, column in self._outputs.items():
            if key not in episode.extra_model_outputs:
                episode.extra_model_outputs[key] = InfiniteLookbackBuffer()
            episode.extra_model_outputs[key].data = take(column, index, start, stop)
        episode.t = episode.t_started + num_steps
        episode.is_terminated = self._terminateds[index]
        episode.is_truncated = self._truncateds[index]
        episode._last_added_observation = self._observations.items(index, stop, stop + 1)[0]
        episode._last_added_infos = episode.infos.data[-1]
        episode._last_step_time = self._times[-1]
        if episode._start_time is None:
            episode._start_time = self._times[-num_steps]


class _ChunkForMetrics:
    """What `get_metrics()` asks of an earlier chunk of an episode, without the chunk's observations."""

    __slots__ = ("_duration_s", "_length", "_return")

    def __init__(self, chunk: SingleAgentEpisode):
        self._length = len(chunk)
        self._return = chunk.get_return()
        self._duration_s = chunk.get_duration_s()

    def __len__(self) -> int:
        return self._length

    def get_return(self) -> float:
        return self._return

    def get_duration_s(self) -> float:
        return self._duration_s


def _own_copies(episode: SingleAgentEpisode) -> SingleAgentEpisode:
    """Gives an episode of single steps arrays of its own, not views of its predecessor's or the
    environment's.
    """
    for buffer in (
        episode.observations,
        episode.actions,
        episode.rewards,
        *episode.extra_model_outputs.values(),
    ):
        buffer.data = [
            tree.map_structure(lambda a: a.copy() if isinstance(a, np.ndarray) else a, i) for i in buffer.data
        ]
    return episode


def _is_array_space(space: gym.Space) -> bool:
    if isinstance(space, gym.spaces.Dict):
        return all(_is_array_space(s) for s in space.spaces.values())
    if isinstance(space, gym.spaces.Tuple):
        return all(_is_array_space(s) for s in space.spaces)
    return isinstance(space, _ARRAY_SPACES)
