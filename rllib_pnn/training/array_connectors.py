"""From episodes to train batches with array operations: RLlib's Learner pipeline without its walk over single items.

`use_array_pipeline(config)` gives PPO, APPO and IMPALA a pipeline that makes the batches that the stock one makes,
column by column and row by row, but copies every observation once instead of three times, computes values in chunks
without a graph, and looks up frozen columns' activations once per observation for all epochs (`AddFrozenFeatures`).

RLlib's own pieces stay in use where they are needed: for modules with a state (zero-padding), and around connectors
of the user's. Episodes are left as they came; the stock pipeline lengthens and renames them.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import tree
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.learner import (
    AddColumnsFromEpisodesToTrainBatch,
    AddObservationsFromEpisodesToBatch,
    AddOneTsToEpisodesAndTruncate,
    AddStatesFromEpisodesToBatch,
    AddTimeDimToBatchAndZeroPad,
    BatchIndividualItems,
    GeneralAdvantageEstimation,
    NumpyToTensor,
)
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner import Learner
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils import force_list
from ray.rllib.utils.annotations import override
from ray.rllib.utils.numpy import convert_to_numpy
from ray.rllib.utils.typing import EpisodeType
from torch import Tensor

from rllib_pnn.network.memory import lean_memory
from rllib_pnn.network.numbering import distinct_share
from rllib_pnn.network.repeats import MAX_DISTINCT_NUMBERED, MAX_DISTINCT_NUMBERED_ABOVE
from rllib_pnn.training.recorded_features import recorded_features
from rllib_pnn.training.rl_module import PATCHES
from rllib_pnn.training.shared_memory import RecordingReader

logger = logging.getLogger(__name__)

ROWS_PER_CHUNK = 256  # of a train batch, in forward passes without gradients
_MAX_WAIT = 256  # batches between two looks whether frames repeat enough
SAMPLER_PAUSE_S = 0.01  # short beside a rollout, which takes tenths of a second or more on image tasks
_ROWS_OF_EPISODES = "rows_of_episodes"  # key of `shared_data`; set if the batch was made of arrays


def use_array_pipeline(config: AlgorithmConfig) -> AlgorithmConfig:
    """Makes a PPO, APPO or IMPALA config build its train batches from arrays; changes and returns `config`.

    Works with any episodes and pays most with those of `ArrayEnvRunner`. Call it after `config.training(...)` or
    before: settings are read when the Learner is built. A `learner_connector` that is set already keeps its place among
    RLlib's own connectors, which are then used instead of the array version. IMPALA's and APPO's driver gets a pause
    between its looks for new samples where it had none (`timeout_s_sampler_manager`): else it takes a core from the
    Learner and the EnvRunners by asking.

    Raises:
        ValueError: the algorithm is another one, there are several agents, or the default connectors are switched off.
    """
    if not isinstance(config, PPOConfig | IMPALAConfig):
        raise ValueError(f"config: expected PPO, APPO or IMPALA, got {type(config).__name__}")
    if config.is_multi_agent:
        raise ValueError("config: expected a single agent, got a multi-agent config; its batches need RLlib's pipeline")
    if isinstance(config._learner_connector, _ArrayConnectors):
        return config
    if not config.add_default_connectors_to_learner_pipeline:
        raise ValueError(
            "config: `add_default_connectors_to_learner_pipeline` is False, so that there is nothing to replace; "
            "leave it True, or put `BatchEpisodes()` into your own pipeline"
        )
    if isinstance(config, IMPALAConfig) and config.timeout_s_sampler_manager == 0.0:
        config.training(timeout_s_sampler_manager=SAMPLER_PAUSE_S)
    config.learners(
        learner_class=array_learner_class(config.learner_class),
        learner_connector=_ArrayConnectors(config._learner_connector),
        add_default_connectors_to_learner_pipeline=False,
    )
    return config


def reads_recorded_features(config: AlgorithmConfig) -> bool:
    """Whether the Learner looks for what EnvRunners write down, before they write the next rollout over it.

    Not on a GPU, to which it would have to be copied.
    """
    on_cpu = not config.num_gpus_per_learner
    return isinstance(config, PPOConfig) and isinstance(config._learner_connector, _ArrayConnectors) and on_cpu


class BatchEpisodes(ConnectorV2):
    """Learner connector that turns episodes into the arrays of a train batch.

    Stands for RLlib's `AddOneTsToEpisodesAndTruncate`, `AddObservationsFromEpisodesToBatch`,
    `AddColumnsFromEpisodesToTrainBatch` and `BatchIndividualItems`: every episode of length T gives T + 1 rows, the
    last one a copy of its last step with the observation after it and a reward of 0, masked out of the loss, where the
    value function bootstraps.

    For a module with a state, or episodes or a batch that are no plain arrays, RLlib's pieces do the work.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._stock = _stock_connectors([])

    @override(ConnectorV2)
    def __call__(
        self,
        *,
        rl_module: RLModule,
        batch: dict[str, Any],
        episodes: list[EpisodeType],
        explore: bool | None = None,
        shared_data: dict | None = None,
        **kwargs: Any,
    ) -> Any:
        shared_data = {} if shared_data is None else shared_data
        if not batch and _is_plain(rl_module) and _are_arrays(episodes):
            columns, lengths = columns_of(episodes)
            shared_data[_ROWS_OF_EPISODES] = lengths
            shared_data["_added_loss_mask_for_valid_episode_ts"] = True
            return {DEFAULT_MODULE_ID: columns}
        for connector in self._stock:
            batch = connector(
                rl_module=rl_module, batch=batch, episodes=episodes, explore=explore, shared_data=shared_data, **kwargs
            )
        return batch


def columns_of(episodes: Sequence[SingleAgentEpisode]) -> tuple[dict[str, Any], np.ndarray]:
    """The train batch's columns, of R rows, and how many rows each episode has.

    Args:
        episodes: numpy'ized, not empty, of lengths T_1, T_2, ...; R = sum(T_i + 1).
    """
    steps = np.array([len(e) for e in episodes])
    rows = steps + 1
    ends = np.cumsum(rows)  # one behind each episode's additional row
    loss_mask = np.ones(ends[-1], bool)
    loss_mask[ends - 1] = False
    terminateds, truncateds = np.zeros((2, ends[-1]), bool)
    # The flag belongs to the last real step. An episode that is merely cut counts as truncated.
    terminateds[ends - 2] = [bool(e.is_terminated) for e in episodes]
    truncateds[ends - 2] = [bool(e.is_truncated) or not e.is_done for e in episodes]
    # Concatenated columns without the additional rows -> rows of the batch.
    with_last_repeated = np.repeat(np.arange(len(loss_mask) - len(rows)), _repeats(steps))
    rewards = _concatenate([e.rewards for e in episodes])
    padded_rewards = np.zeros(ends[-1], np.result_type(rewards.dtype, np.float64))
    padded_rewards[loss_mask] = rewards
    columns = {
        Columns.LOSS_MASK: loss_mask,
        Columns.TERMINATEDS: terminateds,
        Columns.TRUNCATEDS: truncateds,
        Columns.OBS: _concatenate([e.observations for e in episodes]),
        Columns.ACTIONS: _take(_concatenate([e.actions for e in episodes]), with_last_repeated),
        Columns.REWARDS: padded_rewards,
    }
    for key in episodes[0].extra_model_outputs:
        if key not in (*columns, Columns.STATE_IN, Columns.STATE_OUT):
            values = _concatenate([e.extra_model_outputs[key] for e in episodes])
            columns[key] = _take(values, with_last_repeated)
    return columns, rows


def _repeats(steps: np.ndarray) -> np.ndarray:
    """How often each step of episodes of these lengths becomes a row: once, the last one of each episode twice."""
    repeats = np.ones(steps.sum(), int)
    repeats[np.cumsum(steps) - 1] = 2
    return repeats


def _concatenate(buffers: Sequence[InfiniteLookbackBuffer]) -> Any:
    """The buffers' data one after another, without what they look back on."""
    structs = [
        b.data if b.lookback == 0 else tree.map_structure(lambda a, b=b: a[b.lookback :], b.data) for b in buffers
    ]
    if isinstance(structs[0], np.ndarray):
        return np.concatenate(structs)
    return tree.map_structure(lambda *arrays: np.concatenate(arrays), *structs)


def _take(struct: Any, rows: np.ndarray) -> Any:
    return tree.map_structure(lambda array: array[rows], struct)


class AddFrozenFeatures(ConnectorV2):
    """Learner connector: what frozen columns make of each observation, computed once for the whole train batch.

    Stands behind the conversion to tensors and before values are computed. Adds the columns of
    `module.frozen_features(batch)` (see `ProgressiveRLModule`); a module without that method, or without anything
    frozen, gets nothing. What EnvRunners of this machine have written down is not computed again.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._reader = RecordingReader()

    @override(ConnectorV2)
    def __call__(
        self,
        *,
        rl_module: RLModule,
        batch: dict[str, Any],
        episodes: list[EpisodeType],
        explore: bool | None = None,
        shared_data: dict | None = None,
        **kwargs: Any,
    ) -> Any:
        rows = (shared_data or {}).get(_ROWS_OF_EPISODES)
        for module_id, module_batch in batch.items():
            if module_id in rl_module:
                module = rl_module[module_id]
                columns = getattr(module.unwrapped(), "frozen_fingerprint", "")
                if rows is None or not columns or module_batch[Columns.OBS].device.type != "cpu":
                    features = frozen_features(module, module_batch)
                else:
                    features = self._found_or_computed(module, module_batch, episodes, rows, columns)
                module_batch.update(features)
        return batch

    def _found_or_computed(
        self, module: RLModule, batch: Mapping[str, Any], episodes: Any, rows: np.ndarray, columns: str
    ) -> dict[str, Tensor]:
        keys = module.unwrapped().feature_keys(batch)
        found, is_missing = recorded_features(episodes, rows, columns, self._reader, keys)
        if not found:
            return frozen_features(module, batch)
        if is_missing.any():
            missing = torch.from_numpy(np.flatnonzero(is_missing))
            computed = frozen_features(module, {Columns.OBS: batch[Columns.OBS][missing]})
            for key, features in found.items():
                features[missing] = computed[key]
        return found


class NumberPatches(ConnectorV2):
    """Learner connector: which patches of the observations repeat each other, looked up once for all epochs.

    Asks the module's `patch_numbers(batch)`, whose columns its forward passes use (see `ProgressiveRLModule`); a no-op
    for modules without it. Where a minibatch would hold too many distinct patches nothing is added, and it is tried
    again after a while.

    Args:
        minibatch_size: rows of a minibatch; None: all.
    """

    def __init__(self, *args: Any, minibatch_size: int | None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._minibatch_size = minibatch_size
        self._skip = self._wait = 0

    @override(ConnectorV2)
    def __call__(self, *, rl_module: MultiRLModule, batch: dict[str, Any], **kwargs: Any) -> Any:
        module_batch = batch.get(DEFAULT_MODULE_ID)
        if module_batch is None or not isinstance(module_batch.get(Columns.OBS), Tensor):
            return batch
        function = getattr(rl_module[DEFAULT_MODULE_ID].unwrapped(), "patch_numbers", None)
        if function is None:
            return batch
        if self._skip:
            self._skip -= 1
            return batch
        for number, (key, numbers) in enumerate(function(module_batch).items()):
            limit = MAX_DISTINCT_NUMBERED_ABOVE if number else MAX_DISTINCT_NUMBERED
            if distinct_share(numbers, self._minibatch_size or len(numbers)) > limit:
                if number == 0:
                    self._skip = self._wait = min(2 * self._wait + 1, _MAX_WAIT)
                break
            self._wait = 0
            module_batch[key] = numbers
        return batch


class LayOutObservations(ConnectorV2):
    """Learner connector: observations in the memory layout that the module trains fastest on, once for all epochs.

    Asks the module's `training_layout(obs) -> obs`, which changes no value; a no-op for modules without it, and where
    patches are numbered, which are read from the default layout.
    """

    @override(ConnectorV2)
    def __call__(self, *, rl_module: MultiRLModule, batch: dict[str, Any], **kwargs: Any) -> Any:
        for module_id, module_batch in batch.items():
            function = getattr(rl_module[module_id].unwrapped(), "training_layout", None)
            is_image = isinstance(module_batch.get(Columns.OBS), Tensor)
            if function is not None and is_image and not has_numbered_patches(module_batch):
                module_batch[Columns.OBS] = function(module_batch[Columns.OBS])
        return batch


def has_numbered_patches(batch: Mapping[str, Any]) -> bool:
    """Whether `NumberPatches` added something."""
    return any(key.startswith(PATCHES) for key in batch)


def frozen_features(module: RLModule, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """`module.frozen_features(batch)` in chunks of rows and without gradients; {} if the module has no such method."""
    function = getattr(module.unwrapped(), "frozen_features", None)
    if function is None:
        return {}
    keys = [k for k in batch if k in (Columns.OBS, Columns.STATE_IN, Columns.SEQ_LENS) or k.startswith(PATCHES)]
    return _in_chunks(function, {k: batch[k] for k in keys})


class ArrayGeneralAdvantageEstimation(GeneralAdvantageEstimation):
    """RLlib's GAE with values computed in chunks without a graph, and all episodes' recursions side by side."""

    @override(GeneralAdvantageEstimation)
    def __call__(
        self,
        *,
        rl_module: MultiRLModule,
        episodes: list[EpisodeType],
        batch: dict[str, Any],
        shared_data: dict | None = None,
        **kwargs: Any,
    ) -> Any:
        rows = (shared_data or {}).get(_ROWS_OF_EPISODES)
        if rows is None:
            with torch.no_grad():
                return super().__call__(
                    rl_module=rl_module, episodes=episodes, batch=batch, shared_data=shared_data, **kwargs
                )
        module, module_batch = rl_module[DEFAULT_MODULE_ID].unwrapped(), batch[DEFAULT_MODULE_ID]
        if not isinstance(module, ValueFunctionAPI):
            return batch

        def values_of(chunk: dict[str, Any]) -> dict[str, Tensor]:
            return {"values": module.compute_values(chunk)}

        # The more rows, the more of their patches repeat.
        rows_per_chunk = 4 * ROWS_PER_CHUNK if has_numbered_patches(module_batch) else ROWS_PER_CHUNK
        values = _in_chunks(values_of, module_batch, rows_per_chunk)["values"]
        targets, advantages = generalized_advantages(
            convert_to_numpy(values),
            convert_to_numpy(module_batch[Columns.REWARDS]),
            convert_to_numpy(module_batch[Columns.TERMINATEDS]),
            rows,
            gamma=self.gamma,
            lambda_=self.lambda_,
        )
        advantages = (advantages - advantages.mean()) / max(1e-4, advantages.std())
        module_batch[Postprocessing.ADVANTAGES] = torch.from_numpy(advantages).to(values.device)
        module_batch[Postprocessing.VALUE_TARGETS] = torch.from_numpy(targets).to(values.device)
        return batch


def generalized_advantages(
    values: np.ndarray,
    rewards: np.ndarray,
    terminateds: np.ndarray,
    rows: np.ndarray,
    *,
    gamma: float,
    lambda_: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Value targets and advantages (Schulman et al. 2016, eq. 16) of episodes that lie one behind the other, float32.

    Args:
        values, rewards, terminateds: (R,), as `columns_of` lays them out: the last row of each episode holds the value
            of the state that its last step led to.
        rows: rows of each episode, at least 2; their sum is R.

    The additional rows' own advantages mean nothing and are masked out of every loss, but RLlib's normalisation counts
    them. They are therefore those that RLlib's recursion over the whole batch arrives at.
    """
    ends = np.cumsum(rows)
    starts = ends - rows
    next_values = np.append(values[1:], 0.0)
    residuals = rewards + gamma * (1.0 - terminateds) * next_values - values
    running = np.zeros(len(values))
    # Step by step from each episode's end, all episodes at once: those that have so many steps.
    by_length = np.argsort(-rows, kind="stable")
    num_longer = np.searchsorted(-rows[by_length], -np.arange(rows.max() + 1), side="right")
    last = ends - 2
    running[last] = residuals[last]
    for back in range(1, rows.max() - 1):
        step = last[by_length[: num_longer[back + 2]]] - back
        running[step] = residuals[step] + gamma * lambda_ * running[step + 1]
    phantom = ends - 1
    running[phantom] = residuals[phantom]
    running[phantom[:-1]] += gamma * lambda_ * running[starts[1:]]
    targets = (running.astype(np.float32) + values).astype(np.float32)
    return targets, targets - values


def _in_chunks(
    function: Callable[[dict[str, Any]], Mapping[str, Tensor]],
    batch: Mapping[str, Any],
    rows_per_chunk: int = ROWS_PER_CHUNK,
) -> dict[str, Tensor]:
    """`function` of a batch, some rows at a time: what it works with stays small, and in the processor's caches."""
    num_rows = len(tree.flatten(batch[Columns.OBS])[0])
    results: dict[str, Tensor] = {}
    with torch.no_grad():
        for start in range(0, num_rows, rows_per_chunk):
            rows = slice(start, start + rows_per_chunk)
            part = function({k: tree.map_structure(lambda a, r=rows: a[r], v) for k, v in batch.items()})
            for key, value in part.items():
                if key not in results:
                    results[key] = value.new_empty((num_rows, *value.shape[1:]))
                results[key][rows] = value
    return results


class ArrayLearnerMixin(Learner):
    """Put in front of a TorchLearner class by `array_learner_class`."""

    @override(Learner)
    def build(self) -> None:
        lean_memory()
        threads = spare_threads(self.config)
        if threads is not None:
            torch.set_num_threads(threads)
        super().build()
        if not isinstance(self.config._learner_connector, _ArrayConnectors) or self._learner_connector is None:
            return
        self._learner_connector.append(NumpyToTensor(as_learner_connector=True, device=self._device))
        self._learner_connector.append(NumberPatches(minibatch_size=self.config.minibatch_size))
        if self._uses_rows_repeatedly:
            self._learner_connector.append(AddFrozenFeatures())
        if isinstance(self.config, PPOConfig):
            self._learner_connector.append(
                ArrayGeneralAdvantageEstimation(gamma=self.config.gamma, lambda_=self.config.lambda_)
            )
        if self._uses_rows_repeatedly:
            # Last: what is computed once, without gradients, is computed on the layout that observations come in.
            self._learner_connector.append(LayOutObservations())

    @property
    def _uses_rows_repeatedly(self) -> bool:
        config = self.config
        return (
            isinstance(config, PPOConfig)
            or config.num_epochs > 1
            or (getattr(config, "use_circular_buffer", False) and config.circular_buffer_iterations_per_batch > 1)
        )

    @override(Learner)
    def _make_batch_if_necessary(self, training_data: Any) -> MultiAgentBatch:
        batch = super()._make_batch_if_necessary(training_data)
        module_batch = batch.policy_batches.get(DEFAULT_MODULE_ID)
        if module_batch is None:
            return batch
        module = self.module[DEFAULT_MODULE_ID]
        if self._learner_connector is None and self._uses_rows_repeatedly:
            # An AggregatorActor made the batch. Its module is never updated, ours knows the columns.
            module_batch.update(frozen_features(module, module_batch))
        if not module.is_stateful():
            batch.policy_batches[DEFAULT_MODULE_ID] = _TensorBatch(dict(module_batch))
            if training_data.episodes is not None:
                batch.count = len(module_batch)  # as if the episodes were as long as their rows
        return batch


def spare_threads(config: AlgorithmConfig) -> int | None:
    """How many torch threads a Learner may use that shares the machine's cores with busy EnvRunners; None: torch's
    default.

    An asynchronous algorithm's local Learner works while all EnvRunners do. A thread more than there are cores makes
    all others wait for it at every operator. Remote Learners have CPUs of their own, and PPO's EnvRunners rest
    meanwhile.
    """
    if not isinstance(config, IMPALAConfig) or config.num_learners > 0 or "OMP_NUM_THREADS" in os.environ:
        return None
    taken = config.num_env_runners * config.num_cpus_per_env_runner
    return max(1, int(len(os.sched_getaffinity(0)) - taken)) if hasattr(os, "sched_getaffinity") else None


@functools.cache  # one class object each, so that equal configs compare equal
def array_learner_class(learner_class: type[Learner]) -> type[Learner]:
    """`learner_class` with `ArrayLearnerMixin` in front; itself if that is there already."""
    if issubclass(learner_class, ArrayLearnerMixin):
        return learner_class
    return type(f"Array{learner_class.__name__}", (ArrayLearnerMixin, learner_class), {})


class _TensorBatch(SampleBatch):
    """A SampleBatch of tensors that is shuffled by drawing an order; rows are copied when a minibatch is cut.

    Frozen activations are 26 KB a row and column. So each is copied once an epoch, shortly before it is read, and not
    at all for the first epoch, which has the batch's own order, and for the shuffle that RLlib does after the last one.
    """

    _order: Tensor | None = None

    @override(SampleBatch)
    def shuffle(self) -> SampleBatch:
        columns = dict(self)
        if not all(isinstance(leaf, Tensor) for leaf in tree.flatten(columns)):
            return super().shuffle()
        permutation = torch.from_numpy(np.random.permutation(self.count))
        self._order = permutation if self._order is None else self._order[permutation]
        return self

    @override(SampleBatch)
    def _slice(self, slice_: slice) -> SampleBatch:
        if self._order is None:
            return super()._slice(slice_)
        rows = self._order[slice_]
        columns = tree.map_structure(lambda a: _take_rows(a, rows.to(a.device)), dict(self))
        return SampleBatch(
            columns,
            _is_training=self.is_training,
            _time_major=self.time_major,
            _num_grad_updates=self.num_grad_updates,
        )


def _take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        # `index_select` returns the default layout whatever it gets.
        return tensor.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return tensor.index_select(0, rows)


class _ArrayConnectors:
    """The `learner_connector` setting: builds the pipeline up to numpy arrays, in Learners and AggregatorActors.

    Args:
        user_connectors: the setting that was there before.
    """

    def __init__(self, user_connectors: Callable | None):
        self._user_connectors = user_connectors

    def __call__(self, *spaces: Any) -> list[ConnectorV2]:
        if self._user_connectors is None:
            return [BatchEpisodes()]
        logger.info(
            "use_array_pipeline: there is a `learner_connector`, so that RLlib's own connectors make the batches."
        )
        return _stock_connectors(force_list(self._user_connectors(*spaces)))


def _stock_connectors(user_connectors: Sequence[ConnectorV2]) -> list[ConnectorV2]:
    """RLlib's default pieces for PPO, APPO and IMPALA, up to numpy arrays, with a user's where RLlib puts them."""
    return [
        AddOneTsToEpisodesAndTruncate(),
        *user_connectors,
        AddObservationsFromEpisodesToBatch(as_learner_connector=True),
        AddColumnsFromEpisodesToTrainBatch(),
        AddTimeDimToBatchAndZeroPad(as_learner_connector=True),
        AddStatesFromEpisodesToBatch(as_learner_connector=True),
        BatchIndividualItems(multi_agent=False),
    ]


def _is_plain(rl_module: RLModule | None) -> bool:
    """One module without a state."""
    return (
        isinstance(rl_module, MultiRLModule)
        and list(rl_module.keys()) == [DEFAULT_MODULE_ID]
        and not rl_module[DEFAULT_MODULE_ID].is_stateful()
    )


def _are_arrays(episodes: Sequence[EpisodeType]) -> bool:
    """Numpy'ized episodes of one agent, all with steps and with the same columns."""
    return bool(episodes) and all(
        isinstance(e, SingleAgentEpisode)
        and e.agent_id is None
        and e.is_numpy
        and len(e) > 0
        and e.extra_model_outputs.keys() == episodes[0].extra_model_outputs.keys()
        for e in episodes
    )
