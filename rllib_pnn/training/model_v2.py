"""The progressive network as a model of RLlib's old API stack: `"progressive"` in the `ModelCatalog`.

For pipelines that have not moved to RLModules. One algorithm trains one column; a list of tasks is a list of
algorithms, each of which starts from the columns that the ones before it stored:

    rllib_pnn.register()
    config = (
        PPOConfig()
        .api_stack(enable_rl_module_and_learner=False, enable_env_runner_and_connector_v2=False)
        .environment("CartPole-v1")
        .resources(num_gpus=0)
        .training(model={
            "custom_model": "progressive",
            "custom_model_config": {"column": "mlp", "columns_from": "columns"},  # or without, for the first task
        })
    )
    algorithm = config.build_algo()
    algorithm.train()
    algorithm.get_policy().model.save_column("columns", task="cartpole")

The equations stand in rllib_pnn.network, the baselines in `rl_module.grow`; here are RLlib's hooks only. What the
new API stack has beyond it: tasks that follow each other in one algorithm, frozen activations computed once per
observation, evaluation of every column, the typical pixel found by itself.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium as gym
import torch
from ray.rllib.models.catalog import ModelCatalog
from ray.rllib.models.torch.torch_modelv2 import TorchModelV2
from ray.rllib.policy.rnn_sequencing import add_time_dimension
from ray.rllib.utils.annotations import override
from torch import Tensor, nn

from rllib_pnn.network.adapter import LATERALS
from rllib_pnn.network.progressive import ProgressiveNetwork
from rllib_pnn.network.store import ColumnEntry, ColumnStore
from rllib_pnn.text import did_you_mean
from rllib_pnn.training.progressive import check_choice, source_store
from rllib_pnn.training.rl_module import ARCHITECTURES, grow, input_scale_of, num_outputs_of, observation_shape_of

MODEL_NAME = "progressive"
FROZEN = "frozen_fingerprints"  # in the weights: (K - 1, 32) bytes, which frozen columns they belong to


class ProgressiveTorchModelV2(TorchModelV2, nn.Module):
    """A `ProgressiveNetwork` behind the old API stack's model interface; acts and learns through its newest column.

    For actor-critic policies that take a model as it is (PPO, APPO, IMPALA, MARWIL). The keyword arguments are the
    keys of `custom_model_config`; they mean what they mean to `make_progressive`. Attribute `network` is the
    `ProgressiveNetwork`.

    `parameters()`, from which old-stack policies make their optimizers, are those that train. The weights that RLlib
    copies between processes and into checkpoints are the newest column's; of the frozen ones they hold fingerprints,
    which are compared when they are loaded, since every process reads frozen columns from the store by itself.

    Args:
        obs_space, action_space, num_outputs, model_config, name: from RLlib. The space is the preprocessed one.
        column: what the new column is made of; see `ColumnSpec.parse`.
        lateral: `"adapter"` (eq. 2), `"linear"` (eq. 1) or `"none"`.
        lateral_scale: initial alpha of eq. 2.
        lateral_heads: laterals into policy and value head too.
        architecture: `"progressive"`, or a baseline; see `rl_module.grow`.
        columns_from: a run folder or column store whose columns stand frozen in front of the new one. It must be
            readable wherever an EnvRunner runs, and when a checkpoint is restored.
        num_columns: how many columns to take from there, None: all. Give it if the store may grow while this
            algorithm, or a checkpoint of it, is still in use.
        input_shift: taken from scaled observations by the new column; a task's typical pixel (0 to 1).
        seed: of the new column. Not the config's: all processes must make the same one.

    Raises:
        ValueError: one line that names the key, what was expected, what came and the mend.
    """

    def __init__(
        self,
        obs_space: gym.Space,
        action_space: gym.Space,
        num_outputs: int | None,
        model_config: Mapping[str, Any],
        name: str,
        *,
        column: Any = "atari",
        lateral: str = "adapter",
        lateral_scale: float = 0.1,
        lateral_heads: bool = True,
        architecture: str = "progressive",
        columns_from: str | os.PathLike[str] | None = None,
        num_columns: int | None = None,
        input_shift: float = 0.0,
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        nn.Module.__init__(self)
        TorchModelV2.__init__(self, obs_space, action_space, num_outputs, model_config, name)
        _check_unwrapped(type(self))
        shape = _observation_shape(obs_space)
        if num_outputs != num_outputs_of(action_space):
            raise ValueError(
                f"model '{MODEL_NAME}': the policy asks for {num_outputs} outputs, {action_space} has "
                f"{num_outputs_of(action_space)}; use an actor-critic algorithm (PPO, APPO, IMPALA) with RLlib's own "
                "action distribution"
            )
        try:
            # Unknown keys are caught here: to a TypeError RLlib's catalog answers by trying again without any.
            _reject_unknown(unknown)
            check_choice("lateral", lateral, LATERALS)
            check_choice("architecture", architecture, ARCHITECTURES)
            _check_number("lateral_scale", lateral_scale)
            _check_number("input_shift", input_shift)
            _check_whole("seed", seed)
            if not isinstance(lateral_heads, bool):
                raise ValueError(f"lateral_heads: expected true or false, got {lateral_heads!r}")
            self._entries, frozen = _read_columns(columns_from, num_columns)
            self.network = ProgressiveNetwork(
                shape,
                num_outputs,
                column,
                lateral=lateral,
                lateral_scale=lateral_scale,
                lateral_heads=lateral_heads,
                input_scale=input_scale_of(obs_space) if frozen is None else frozen.input_scale,
                seed=seed,
            )
            if frozen is not None:
                for each in frozen.columns:
                    self.network.append_column(each)
            grow(self.network, architecture, float(input_shift))
        except ValueError as error:
            raise ValueError(f"custom_model_config: {error}") from error
        self._value: Tensor | None = None

    # -- forward passes ------------------------------------------------------------------------------------------

    @override(TorchModelV2)
    def get_initial_state(self) -> list[Tensor]:
        return list(self.network.initial_state().values())

    @override(TorchModelV2)
    def forward(
        self, input_dict: Mapping[str, Any], state: list[Tensor], seq_lens: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Policy outputs of the newest column.

        Args:
            input_dict: `obs` (B, ...); recurrent: (B*T, ...), each sequence padded to T steps.
            state: LSTM states of all columns before the first step, h (B, S) and c (B, S); [] if feed-forward.
            seq_lens: (B,), for recurrent columns.

        Returns:
            logits (B, A) or (B*T, A), and the state after the last step.
        """
        obs = input_dict["obs"]
        if not isinstance(obs, Tensor):  # RLlib unpacks Dict and Tuple observations for models that want the parts
            obs = input_dict["obs_flat"]
        if not self.network.is_recurrent:
            logits, self._value, _ = self.network(obs)
            return logits, []
        obs = add_time_dimension(obs, seq_lens=seq_lens, framework="torch")
        output = self.network(obs, state=dict(zip(("h", "c"), state, strict=True)) if state else None)
        self._value = output.value.flatten()
        return output.logits.flatten(0, 1), [output.state["h"], output.state["c"]]

    @override(TorchModelV2)
    def value_function(self) -> Tensor:
        """V(s) of the observations that `forward` saw last, (B,) or (B*T,)."""
        if self._value is None:
            raise ValueError("value_function: there was no forward pass yet; call the model with observations first")
        return self._value

    # -- what trains, and what RLlib copies ----------------------------------------------------------------------

    @override(nn.Module)
    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters that train. `named_parameters()` and `variables()` give the frozen ones too."""
        return (p for p in super().parameters(recurse) if p.requires_grad)

    @override(TorchModelV2)
    def variables(self, as_dict: bool = False) -> list[nn.Parameter] | dict[str, nn.Parameter]:
        named = dict(self.named_parameters())
        return named if as_dict else list(named.values())

    @override(nn.Module)
    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        """The newest column's parameters, and the fingerprints of the frozen ones: no larger for more columns."""
        state: dict[str, Any] = super().state_dict(*args, prefix=prefix, **kwargs)
        for key in [key for key in state if self._is_frozen(key.removeprefix(prefix))]:
            del state[key]
        state[prefix + FROZEN] = self._fingerprints()
        return state

    @override(nn.Module)
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes weights from another process or a checkpoint.

        Raises:
            ValueError: they were trained behind other frozen columns; nothing is loaded then.
            RuntimeError: they are not of such a model.
        """
        state = dict(state_dict)
        if FROZEN in state:
            self._check_fingerprints(torch.as_tensor(state.pop(FROZEN)))
        elif strict:
            raise RuntimeError(f"weights: expected those of a model '{MODEL_NAME}', got some without '{FROZEN}'")
        result = super().load_state_dict(state, strict=False, assign=assign)
        missing = [key for key in result.missing_keys if not self._is_frozen(key)]
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(f"weights: missing {missing}, not expected {result.unexpected_keys}")
        return type(result)(missing, result.unexpected_keys)

    def _is_frozen(self, key: str) -> bool:
        parts = key.split(".")
        return parts[:2] == ["network", "columns"] and int(parts[2]) < self.network.num_columns - 1

    def _fingerprints(self) -> Tensor:
        digests = [bytes.fromhex(f) for f in self.network.fingerprints()[:-1] if f is not None]
        return torch.tensor([list(digest) for digest in digests], dtype=torch.uint8).view(-1, 32)

    def _check_fingerprints(self, given: Tensor) -> None:
        mine = self._fingerprints()
        given = given.cpu().round().to(torch.uint8)  # soft target updates mix all weights, these too, as floats
        if not torch.equal(given, mine):
            few = len(given) < len(mine) and torch.equal(given, mine[: len(given)])
            mend = (
                f"custom_model_config.num_columns: {len(given)} takes only the first"
                if few
                else "custom_model_config.columns_from must be the store that they were trained with"
            )
            raise ValueError(
                f"weights: trained behind frozen columns {_short(given)}, this model's are {_short(mine)}; {mend}"
            )

    # -- afterwards ----------------------------------------------------------------------------------------------

    def save_column(
        self,
        path: str | os.PathLike[str],
        *,
        task: str,
        env: str | None = None,
        env_config: dict[str, Any] | None = None,
        score: float | None = None,
        num_env_steps: int | None = None,
    ) -> ColumnEntry:
        """Stores the newest column as it is now, and the frozen ones before it unless they are there.

        The model itself goes on training; what is stored is frozen.

        Args:
            path: folder of a column store, new or the one that the columns came from.
            task: name of the task that the column learned.
            env, env_config, score, num_env_steps: noted with it; see `ColumnStore.save_column`.

        Returns:
            The column's entry in the store's manifest.

        Raises:
            ColumnStoreError: a frozen column has changed, the store holds other columns, or the disk refuses.
        """
        network = copy.deepcopy(self.network)
        network.freeze()
        store = ColumnStore(path)
        newest = network.num_columns - 1
        for k in range(newest):
            if k < len(self._entries):
                store.save_column(network, k, **self._entries[k].model_dump(include=_ABOUT))
            else:  # the column that `random_column` puts in front
                store.save_column(network, k, task="random", num_env_steps=0)
        return store.save_column(
            network, newest, task=task, env=env, env_config=env_config, score=score, num_env_steps=num_env_steps
        )


_ABOUT = {"task", "env", "env_config", "score", "num_env_steps", "extra"}


def register_model() -> None:
    """Makes `"progressive"` known to RLlib's `ModelCatalog`. May be called any number of times."""
    ModelCatalog.register_custom_model(MODEL_NAME, ProgressiveTorchModelV2)


def _observation_shape(space: gym.Space) -> tuple[int, ...]:
    try:
        return observation_shape_of(space)
    except ValueError:
        raise ValueError(
            f"model '{MODEL_NAME}': expected observations that are an image or a vector, got {space}; leave RLlib's "
            "preprocessors on, which flatten Dict, Tuple and Discrete spaces, or wrap the environment"
        ) from None


def _read_columns(
    path: str | os.PathLike[str] | None, num_columns: int | None
) -> tuple[list[ColumnEntry], ProgressiveNetwork | None]:
    """A store's (first) columns: their entries and their network, fingerprints verified."""
    if num_columns is not None:
        _check_whole("num_columns", num_columns)
    if path is None:
        if num_columns is not None:
            raise ValueError(f"num_columns: {num_columns} of what? Set columns_from too")
        return [], None
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"columns_from: expected the path of a run folder or a column store, got {path!r}")
    store = source_store(path)
    assert store is not None
    network = store.load(num_columns)
    return store.entries[: network.num_columns], network


def _check_unwrapped(model_class: type) -> None:
    ancestry = model_class.__mro__
    for outer in ancestry[: ancestry.index(ProgressiveTorchModelV2)]:
        if issubclass(outer, TorchModelV2) and not issubclass(outer, ProgressiveTorchModelV2):
            raise ValueError(
                f"model '{MODEL_NAME}': RLlib would wrap it into its {outer.__name__}, whose parameters no column "
                "holds; for memory put an lstm layer into `column` instead of use_lstm or use_attention, and use an "
                "actor-critic algorithm (PPO, APPO, IMPALA)"
            )


def _reject_unknown(unknown: Mapping[str, Any]) -> None:
    for key in unknown:
        parameters = inspect.signature(ProgressiveTorchModelV2).parameters.values()
        known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
        mend = did_you_mean(key, known) or f"; expected some of {', '.join(known)}"
        raise ValueError(f"unknown key '{key}'{mend}")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def _check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}: expected a whole number from 0, got {value!r}")


def _short(fingerprints: Tensor) -> str:
    return "[" + ", ".join(bytes(row.tolist()).hex()[:12] for row in fingerprints) + "]"
