"""The progressive network as an RLModule. RLlib's hooks; the equations stand in rllib_pnn.network.

How growth travels: a module becomes whatever `set_state` names. The Learner grows its module, RLlib's own weight
sync carries the state to every EnvRunner, restarted ones too, and each of them grows by itself. A frozen column
travels once, as a reference into Ray's object store that all processes of a node read without copying; after that its
fingerprint stands for it.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import ray
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchMultiCategorical
from ray.rllib.core.rl_module.apis import TARGET_NETWORK_ACTION_DIST_INPUTS, TargetNetworkAPI, ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.utils.annotations import override
from ray.rllib.utils.typing import StateDict
from torch import Tensor, nn

from rllib_pnn.network.column import HEADS, Column, ColumnLayout, ColumnOutput
from rllib_pnn.network.incremental import IncrementalLayers
from rllib_pnn.network.numbering import number_patches
from rllib_pnn.network.progressive import ProgressiveNetwork, interleaved
from rllib_pnn.network.spec import ColumnSpec

ARCHITECTURES = ("progressive", "scratch", "finetune_heads", "finetune_all", "random_column")
MODEL_CONFIG_KEY = "progressive"  # under which all of this package's settings stand in RLlib's model_config
SOURCES = "sources/"  # prefix of batch columns that hold activations of frozen columns
PATCHES = "patches/"  # prefix of batch columns that number the patches which layers read
# In a batch: its rows are time steps of so many environments, time-major; `SOURCES` are then (T, N, ...).
NUM_ENVS = "num_envs"
_STATE_KEYS = ("h", "c")
_ACTING = ("frozen_features", "_evaluate", "_forward", "_forward_exploration")  # see forward_with_features
_LEARNING = ("_forward_train", "compute_values")


def num_outputs_of(space: gym.Space) -> int:
    """Policy outputs for an action space.

    Raises:
        ValueError: it has no default distribution here, or counts its actions from another number than 0.
    """
    if np.any(getattr(space, "start", 0)):
        # RLlib's EnvRunners send what the distribution drew, 0 to n - 1, and the environment would play something else.
        raise ValueError(
            f"action space: expected actions that count from 0, got {space}: RLlib's policies play 0 to n - 1; shift "
            "them in the environment, by gymnasium.wrappers.TransformAction for example"
        )
    if isinstance(space, gym.spaces.Discrete):
        return int(space.n)
    if isinstance(space, gym.spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return int(space.nvec.sum())
    if isinstance(space, gym.spaces.Box) and len(space.shape) == 1:
        return 2 * int(space.shape[0])  # mean and log standard deviation, as RLlib's diagonal Gaussian takes them
    raise ValueError(f"action space: expected Discrete, MultiDiscrete or a one-dimensional Box, got {space}")


def observation_shape_of(space: gym.Space) -> tuple[int, ...]:
    """(C, H, W), (H, W, C) or (C,). Raises `ValueError` for anything that is not an image or a vector."""
    if not isinstance(space, gym.spaces.Box) or len(space.shape) not in (1, 3):
        raise ValueError(
            f"observation space: expected a Box of an image or a vector, got {space}; "
            "flatten other spaces with gymnasium.wrappers.FlattenObservation"
        )
    return tuple(space.shape)


def input_scale_of(space: Any) -> float | None:
    """What images are multiplied with: None, the network's default (1/255), unless they are scaled already."""
    return None if 1 < np.max(space.high) < np.inf else 1.0


def grow(network: ProgressiveNetwork, architecture: str, input_shift: float = 0.0) -> int:
    """Adds the column for the next task as the architecture wants it (Rusu et al. 2016, section 4, baselines 1-4).

    `progressive` and `random_column` (baseline 4) add laterals; `scratch` (1) none; `finetune_heads` (2) and
    `finetune_all` (3) start from a copy of the newest column. The first column of `random_column` is a random one
    that never trains. Returns the new column's index.
    """
    if architecture == "random_column" and network.num_columns == 0:
        network.add_column(input_shift=input_shift)
    if architecture == "scratch":
        return network.add_column(lateral="none", input_shift=input_shift)
    if architecture in ("finetune_heads", "finetune_all") and network.num_columns:
        trains = "heads" if architecture == "finetune_heads" else "all"
        return network.add_column(copy_of=-1, trains=trains)
    return network.add_column(input_shift=input_shift)


class ProgressiveRLModule(TorchRLModule, ValueFunctionAPI):
    """A `ProgressiveNetwork` behind RLlib's RLModule interface; acts and learns through its newest column.

    Configured by `model_config["progressive"]`, which `make_progressive` writes. Attributes:

    - `network`: the `ProgressiveNetwork`;
    - `progress`: plain data that travels with the weights: `task_index`, `first_column` (columns that were there
      before the first task), `task_start_env_steps`, `finished`.
    """

    network: ProgressiveNetwork

    def train(self, mode: bool = True) -> ProgressiveRLModule:
        """RLlib asks for a mode at every step, and torch then walks all modules; no layer here depends on it."""
        return self if mode == self.training else super().train(mode)

    @override(RLModule)
    def setup(self) -> None:
        settings = dict(self.model_config[MODEL_CONFIG_KEY])
        space = self.action_space
        self.network = ProgressiveNetwork(
            observation_shape_of(self.observation_space),
            num_outputs_of(space),
            settings.get("column", "atari"),
            lateral=settings.get("lateral", "adapter"),
            lateral_scale=settings.get("lateral_scale", 0.1),
            lateral_heads=settings.get("lateral_heads", True),
            input_scale=input_scale_of(self.observation_space),
            seed=settings.get("seed") or 0,
        )
        self._grow(task_index=0)
        self.progress: dict[str, Any] = {
            "task_index": 0,
            "first_column": self.network.num_columns - 1,
            "task_start_env_steps": 0,
            "finished": False,
        }
        self._references: dict[str, ray.ObjectRef] = {}  # by fingerprint
        self._incremental: IncrementalLayers | None = None
        if isinstance(space, gym.spaces.MultiDiscrete):
            self.action_dist_cls = TorchMultiCategorical.get_partial_dist_cls(input_lens=[int(n) for n in space.nvec])
        self._columns_changed()

    @property
    def task_index(self) -> int:
        """Which task of the sequence the newest column learns."""
        return self.progress["task_index"]

    def grow(self, progress: Mapping[str, Any]) -> None:
        """Freezes all columns and adds one for the task that `progress` names."""
        self._grow(progress["task_index"])
        self.progress = dict(progress)
        self._columns_changed()

    def _grow(self, task_index: int) -> None:
        settings = self.model_config[MODEL_CONFIG_KEY]
        tasks = settings.get("tasks") or [{}]
        grow(self.network, settings.get("architecture", "progressive"), tasks[task_index].get("input_shift", 0.0))

    def _columns_changed(self) -> None:
        newest: Column = self.network.columns[-1]
        self._source_keys = {n: f"{SOURCES}{n}" for n in newest.reads} if newest.num_sources else {}
        self._patch_keys = [f"{PATCHES}{n}" for n in range(1, len(newest.layers) + 1)]
        self._reads_same_patches = self.network.reads_same_patches()
        self._frozen_width = sum(c.state_width for c in self.network.columns[:-1])
        self._is_stateful = None

    def follows_environments(self, *, keeps_changes: bool = False) -> None:
        """From now on this module is asked for one time step of the same environments after the other.

        It then computes less (see `IncrementalLayers`), and the features that `forward_with_features` gives are
        valid until its next forward pass. Other observations do no harm.

        Args:
            keeps_changes: features of layer 1 shall come as `StepMaps` where they can, to be recorded by a
                `ChangingMaps`, which forward passes take in their stead.
        """
        self._incremental = IncrementalLayers(keeps_changes=keeps_changes and not self._replaces(*_ACTING, *_LEARNING))

    def _replaces(self, *names: str) -> bool:
        """Whether a subclass has one of these methods of its own, which may know features as tensors only."""
        return any(getattr(type(self), name) is not getattr(ProgressiveRLModule, name) for name in names)

    # -- forward passes ------------------------------------------------------------------------------------------

    @override(RLModule)
    def get_initial_state(self) -> dict[str, np.ndarray]:
        return {key: value.numpy(force=True) for key, value in self.network.initial_state().items()}

    def frozen_features(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Activations of the frozen columns for a batch, as further batch columns; {} if nothing reads them.

        Computed once per observation; every forward pass uses them if they are in its batch, instead of evaluating
        the frozen columns again.

        Args:
            batch: `Columns.OBS` (B, ...) or (B, T, ...), and `Columns.STATE_IN` if recurrent.

        Returns:
            `{"sources/<layer>": (B, ...)}`, for recurrent modules (B, T, ...) and the frozen columns' LSTM state
            after the last step under `sources/h` and `sources/c`, (B, S).
        """
        if not self._source_keys:
            return {}
        sources, state = self.network.sources(
            batch[Columns.OBS], state=batch.get(Columns.STATE_IN), incremental=self._incremental
        )
        keys = self.feature_keys(batch)
        features = {self._source_keys[n]: tensor for n, tensor in sources.items() if self._source_keys[n] in keys}
        return features | {SOURCES + key: value for key, value in state.items()}

    def feature_keys(self, batch: Mapping[str, Any]) -> list[str]:
        """Columns of `frozen_features` that forward passes of this batch read: not layer 1 where patches are numbered,
        since it is computed from the distinct ones."""
        keys = self._source_keys.values()
        if self._reads_same_patches and self._patch_keys[0] in batch:
            return [key for key in keys if key != f"{SOURCES}1"]
        return list(keys)

    @property
    def frozen_fingerprint(self) -> str:
        """Of all frozen columns together: features of modules that have it in common are interchangeable. "" if nothing
        reads them."""
        if not self._source_keys:
            return ""
        parts = [column.fingerprint or "" for column in self.network.columns[:-1]]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest() if all(parts) else ""

    def patch_numbers(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Numbers for the patches that the newest column's layers read, as further batch columns.

        Forward passes that find them in their batch compute once what it repeats (see numbering.py and repeats.py).

        Args:
            batch: `Columns.OBS` (B, C, H, W), bytes.

        Returns:
            `{"patches/<layer>": (B, positions)}`, int32, from layer 1 up; {} where none can be numbered.
        """
        obs = batch[Columns.OBS]
        if obs.dim() != 4 or self.network.channels_last_input or self._replaces("_evaluate", *_LEARNING):
            return {}
        numbers = number_patches(obs, [*self.network.columns[-1].layers])
        return {f"{PATCHES}{n}": tensor for n, tensor in enumerate(numbers, start=1)}

    def training_layout(self, obs: Tensor) -> Tensor:
        """The same observations (B, C, H, W) laid out in memory as large batches are computed: channels last.

        Reordering bytes once costs less than reordering floats in every epoch.
        """
        if obs.dim() != 4 or self.network.channels_last_input:
            return obs
        if obs.dtype == torch.uint8:
            return interleaved(obs)
        return obs.contiguous(memory_format=torch.channels_last)

    def _evaluate(
        self,
        batch: Mapping[str, Any],
        heads: Collection[str] = HEADS,
        incremental: IncrementalLayers | None = None,
    ) -> ColumnOutput:
        sources = None
        if any(key in batch for key in self._source_keys.values()):
            sources = {n: batch[key] for n, key in self._source_keys.items() if key in batch}
        output = self.network(
            batch[Columns.OBS],
            state=batch.get(Columns.STATE_IN),
            sources=sources,
            heads=heads,
            incremental=incremental,
            num_envs=batch.get(NUM_ENVS),
            patches=[batch[key] for key in self._patch_keys if key in batch],
        )
        if output.state and sources is not None and SOURCES + "h" in batch:
            width = self._frozen_width
            moved = {k: torch.cat([batch[SOURCES + k][:, :width], output.state[k][:, width:]], 1) for k in _STATE_KEYS}
            output = output._replace(state=moved)
        return output

    def forward_with_features(self, batch: dict[str, Any], **kwargs: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """`forward_exploration` and `frozen_features` of one time step in one pass, which is less work than two.

        Returns:
            The outputs, and the features that a later training batch takes: those of `frozen_features` without the
            LSTM state, which has moved in the outputs.
        """
        if self._replaces(*_ACTING):
            features = self.frozen_features(batch)  # a subclass's own pass may know nothing of `with_features`
            return self.forward_exploration({**batch, **features}, **kwargs), features
        output = self.forward_exploration(batch, with_features=True, **kwargs)
        return output, {key: output.pop(key) for key in self._source_keys.values()}

    @override(RLModule)
    def _forward(self, batch: dict[str, Any], with_features: bool = False, **kwargs: Any) -> dict[str, Any]:
        sources: dict[int, Tensor] = {}
        if with_features:
            obs, state = batch[Columns.OBS], batch.get(Columns.STATE_IN)
            output, sources = self.network.forward_with_sources(
                obs, state=state, heads=("policy",), incremental=self._incremental
            )
        else:
            output = self._evaluate(batch, heads=("policy",), incremental=self._incremental)
        result: dict[str, Any] = {Columns.ACTION_DIST_INPUTS: output.logits}
        if output.state:
            result[Columns.STATE_OUT] = output.state
        return result | {self._source_keys[n]: tensor for n, tensor in sources.items()}

    @override(RLModule)
    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        output = self._evaluate(batch)
        # The value costs one row of the head, so it is computed here and handed to `compute_values` below.
        result: dict[str, Any] = {Columns.ACTION_DIST_INPUTS: output.logits, Columns.EMBEDDINGS: output.value}
        if output.state:
            result[Columns.STATE_OUT] = output.state
        return result

    @override(ValueFunctionAPI)
    def compute_values(self, batch: dict[str, Any], embeddings: Tensor | None = None) -> Tensor:
        """V(s), (B,) or (B, T); `embeddings` are what `_forward_train` returned under that key."""
        return self._evaluate(batch, heads=("value",)).value if embeddings is None else embeddings

    # -- state ---------------------------------------------------------------------------------------------------

    def use_references(self, references: Mapping[str, ray.ObjectRef]) -> None:
        """From now on broadcasts name these frozen columns, by fingerprint, as objects in Ray's store."""
        self._references.update(references)

    @override(RLModule)
    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        inference_only: bool = False,
        **kwargs: Any,
    ) -> StateDict:
        """All columns and the progress.

        Args:
            inference_only: the state for an EnvRunner: frozen columns by reference where they have been shared. Any
                other state holds everything, so that it can be saved and outlives this run.
        """
        columns = []
        for column in self.network.columns:
            reference = self._references.get(column.fingerprint) if inference_only and column.fingerprint else None
            if reference is None:
                columns.append(column_state(column))
            else:
                columns.append({"fingerprint": column.fingerprint, "reference": reference})
        return {"progress": dict(self.progress), "columns": columns}

    @override(RLModule)
    def set_state(self, state: StateDict) -> None:
        """Becomes what the state names: grows, shrinks, or takes the trainable column's new weights.

        Raises:
            ValueError: a frozen column that does not have its fingerprint; the module is then unchanged.
        """
        mine: list[Column] = list(self.network.columns)
        columns: list[Column] = []
        references = {}
        for k, entry in enumerate(state["columns"]):
            fingerprint = entry["fingerprint"]
            if fingerprint is not None and "reference" in entry:
                references[fingerprint] = entry["reference"]
            if k < len(mine) and fingerprint is not None and mine[k].fingerprint == fingerprint:
                columns.append(mine[k])
                continue
            if "reference" in entry:
                # Zero-copy views into this node's shared memory: frozen columns exist once a node.
                entry = ray.get(entry["reference"])
            if k < len(mine) and _load_in_place(mine[k], entry):
                columns.append(mine[k])
            else:
                columns.append(_column_from_state(entry, self.network.device))
        if len(columns) != len(mine) or any(a is not b for a, b in zip(columns, mine, strict=True)):
            self.network.columns = nn.ModuleList(columns)  # type: ignore[assignment]
            self._columns_changed()
        self._references.update(references)
        self.progress = dict(state["progress"])


class ProgressiveTargetRLModule(ProgressiveRLModule, TargetNetworkAPI):
    """With a target network, a lagging copy of the trainable column, for algorithms that want one (APPO)."""

    @override(TargetNetworkAPI)
    def make_target_networks(self) -> None:
        self._target_column = copy.deepcopy(self.network.columns[-1]).requires_grad_(False)

    @override(ProgressiveRLModule)
    def _columns_changed(self) -> None:
        super()._columns_changed()
        if hasattr(self, "_target_column"):
            self.make_target_networks()

    @override(TargetNetworkAPI)
    def get_target_network_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.network.columns[-1], self._target_column)]

    @override(TargetNetworkAPI)
    def forward_target(self, batch: dict[str, Any]) -> dict[str, Any]:
        network = self.network
        newest = network.columns[-1]
        network.columns[-1] = self._target_column
        try:
            with torch.no_grad():
                return {TARGET_NETWORK_ACTION_DIST_INPUTS: self._evaluate(batch, heads=("policy",)).logits}
        finally:
            network.columns[-1] = newest

    @override(ProgressiveRLModule)
    def get_state(self, *args: Any, inference_only: bool = False, **kwargs: Any) -> StateDict:
        state = super().get_state(*args, inference_only=inference_only, **kwargs)
        if hasattr(self, "_target_column") and not (inference_only or self.inference_only):
            state["target"] = _parameters(self._target_column)
        return state

    @override(ProgressiveRLModule)
    def set_state(self, state: StateDict) -> None:
        super().set_state(state)
        if "target" in state and hasattr(self, "_target_column"):
            _load(self._target_column, state["target"])


def _parameters(column: Column) -> dict[str, np.ndarray]:
    return {name: p.detach().cpu().numpy() for name, p in column.named_parameters()}


def column_state(column: Column) -> dict[str, Any]:
    return {
        "fingerprint": column.fingerprint,
        "trains": column.trains,
        "layout": column.layout.to_json(),
        "input_scale": column.input_scale,
        "parameters": _parameters(column),
    }


def _layout_from_state(entry: Mapping[str, Any]) -> ColumnLayout:
    layout = dict(entry["layout"])
    return ColumnLayout(
        **layout
        | {
            "observation_shape": tuple(layout["observation_shape"]),
            "spec": ColumnSpec.parse(layout["spec"]),
            "source_specs": tuple(ColumnSpec.parse(s) for s in layout["source_specs"]),
        }
    )


@torch.no_grad()
def _load(column: Column, parameters: Mapping[str, Any]) -> None:
    own = dict(column.named_parameters())
    if own.keys() != parameters.keys():
        differing = sorted(own.keys() ^ parameters.keys())
        raise ValueError(f"column state: parameters differ: {', '.join(differing[:3])}")
    for name, parameter in own.items():
        parameter.copy_(_tensor(parameters[name]))


def _load_in_place(column: Column, entry: Mapping[str, Any]) -> bool:
    """Takes new weights into a column that trains on both sides; keeps the optimizer's hold on its parameters."""
    if column.is_frozen or entry["fingerprint"] is not None or column.trains != entry["trains"]:
        return False
    own = dict(column.named_parameters())
    if own.keys() != entry["parameters"].keys() or column.layout.to_json() != entry["layout"]:
        return False
    _load(column, entry["parameters"])
    return True


def _column_from_state(entry: Mapping[str, Any], device: torch.device) -> Column:
    with torch.device("meta"):
        column = Column(_layout_from_state(entry), entry["input_scale"])
    frozen = entry["fingerprint"] is not None
    tensors = {n: _tensor(p) if frozen else _tensor(p).clone() for n, p in entry["parameters"].items()}
    column.load_state_dict(tensors, strict=True, assign=True)
    column.to(device)
    if not frozen:
        column.set_trained_part(entry["trains"])
    elif (found := column.freeze()) != entry["fingerprint"]:
        raise ValueError(f"column state: fingerprint {found[:12]}, expected {entry['fingerprint'][:12]}")
    return column


def _tensor(array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array
    with warnings.catch_warnings():
        # Read-only shared memory; nothing writes into a frozen column.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(array))
