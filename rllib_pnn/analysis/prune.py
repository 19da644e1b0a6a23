"""Pruning of lateral connections, beyond the paper. Plain torch and gymnasium, no Ray.

Rusu et al. 2016 (section 5) see that only a fraction of the new capacity is used as columns are added, and name pruning
as an answer. Here the Fisher information of AFS, taken where a column's laterals read, says what carries nothing:

- a source feature m of layer i-1 (column m of V; of U in eq. 1),
- an adapter unit r (row r of V and its bias, column r of U).

What is cut is replaced by its mean over the policy's states, folded into the next bias, so that only what varies is
lost. To first order that changes log pi(a|s) by (mean - h) d log pi / d h, summed over pixels; its expected square is
the unit's Fisher information (Theis et al. 2018, arXiv 1801.05787, with the mean in the place of zero). Units are cut
from the least on, as many as keep the measured KL(pi || pi_pruned) within a budget. Nothing is trained afterwards. The
value head's lateral stays: no action depends on it, so nothing here could tell what it needs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from rllib_pnn.analysis.fisher import log_likelihoods
from rllib_pnn.analysis.rollouts import Rollout, column_index, column_of
from rllib_pnn.network import ProgressiveNetwork
from rllib_pnn.network.adapter import Adapter, Lateral
from rllib_pnn.network.column import HEADS, Column

KEPT = ("value",)


@dataclass(frozen=True)
class LateralCut:
    """What was cut from one lateral."""

    lateral: str
    """Layer number, or `policy`."""
    num_inputs: int
    cut_inputs: int
    """Source features: maps below a convolution, else units."""
    num_units: int
    cut_units: int
    """Adapter units; 0 of 0 for linear laterals."""
    parameters: int
    parameters_left: int

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Pruning:
    """A pruned network and what it cost."""

    network: ProgressiveNetwork
    """A new network of the columns up to the pruned one, all frozen; the given one is as it was."""
    column: int
    laterals: tuple[LateralCut, ...]
    kl: float
    """Mean KL(pi || pi_pruned) over the given states, nats."""

    @property
    def parameters(self) -> int:
        """Lateral parameters of the column before, the value head's included."""
        return sum(cut.parameters for cut in self.laterals)

    @property
    def parameters_left(self) -> int:
        return sum(cut.parameters_left for cut in self.laterals)

    @property
    def share_removed(self) -> float:
        return 1 - self.parameters_left / self.parameters

    def to_json(self) -> dict[str, Any]:
        return {
            "column": self.column,
            "lateral_parameters_before": self.parameters,
            "lateral_parameters_after": self.parameters_left,
            "share_removed": self.share_removed,
            "kl": self.kl,
            "laterals": [cut.to_json() for cut in self.laterals],
        }


def prune_laterals(
    network: ProgressiveNetwork,
    rollout: Rollout,
    *,
    column: int = -1,
    max_kl: float = 3e-5,
    batch_size: int = 256,
) -> Pruning:
    """Cuts the lateral inputs and adapter units of `column` that its policy does not need.

    Args:
        network: not changed.
        rollout: with states of the column's policy on its task (`play(..., num_states=...)`).
        column: whose laterals; negative counts from the newest.
        max_kl: how far the policy may move on those states, mean KL in nats. A uniform policy over 6 actions is within
            1.8 of any other.
        batch_size: states (sequences) in memory at once.

    Raises:
        ValueError: the column has no laterals, there are no states, or `max_kl` is negative.
    """
    k = column_index(network, column)
    if not column_of(network, k).laterals:
        raise ValueError(f"column {k} has no laterals: nothing to prune")
    if not max_kl >= 0:
        raise ValueError(f"max_kl: expected 0 or more, got {max_kl}")
    if len(rollout.observations) < 2:
        raise ValueError(f"rollout: expected at least 2 states, got {len(rollout.observations)}")
    continuous = rollout.continuous
    batches = _batches(network, rollout, batch_size)
    units = _rank(network, k, batches, continuous)
    reference = [_policy(network, k, batch) for batch in batches]

    def divergence(count: int) -> float:
        candidate = _cut(network, k, units[:count])
        total = sum(
            float(_kl(old, _policy(candidate, k, batch), continuous).sum())
            for old, batch in zip(reference, batches, strict=True)
        )
        return total / sum(map(len, reference))

    # More cuts cost more, nearly always: bisection finds the last count within the budget along its path.
    low, high, kl = 0, len(units), 0.0
    while low < high:
        middle = (low + high + 1) // 2
        found = divergence(middle)
        if found <= max_kl:
            low, kl = middle, found
        else:
            high = middle - 1
    pruned = _cut(network, k, units[:low])
    return Pruning(pruned, k, tuple(_count(network, k, units[:low])), kl)


# -- ranking -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unit:
    lateral: str
    is_input: bool
    """A source feature; else an adapter unit."""
    index: int
    fisher: float
    mean: float
    """Over the policy's states (and pixels)."""


_Batch = Mapping[str, Any]


def _batches(network: ProgressiveNetwork, rollout: Rollout, batch_size: int) -> list[_Batch]:
    batches: list[_Batch] = []
    for start in range(0, len(rollout.observations), batch_size):
        part = slice(start, start + batch_size)
        batch: dict[str, Any] = {"obs": torch.as_tensor(rollout.observations[part])}
        if network.is_recurrent:
            batch["state"] = {k: torch.as_tensor(v[part]).to(network.device) for k, v in rollout.states.items()}
            batch["resets"] = torch.as_tensor(rollout.resets[part]).to(network.device)
        batches.append(batch)
    return batches


@torch.no_grad()
def _policy(network: ProgressiveNetwork, column: int, batch: _Batch) -> Tensor:
    return network(column=column, **batch).logits.reshape(-1, network.num_outputs)


def _kl(old: Tensor, new: Tensor, continuous: bool) -> Tensor:
    """(B,) KL(old || new)."""
    if continuous:
        (mean, log_std), (new_mean, new_log_std) = old.chunk(2, -1), new.chunk(2, -1)
        variances = (2 * (log_std - new_log_std)).exp() + ((mean - new_mean) * (-new_log_std).exp()).square()
        return (0.5 * variances - 0.5 + new_log_std - log_std).sum(-1)
    log_old = old.log_softmax(-1)
    return (log_old.exp() * (log_old - new.log_softmax(-1))).sum(-1)


def _rank(network: ProgressiveNetwork, column: int, batches: list[_Batch], continuous: bool) -> list[_Unit]:
    """All prunable units of a column, least Fisher information first."""
    laterals = {key: lateral for key, lateral in _laterals(column_of(network, column)).items() if key not in KEPT}
    means: dict[tuple[str, bool], Tensor] = {}
    with torch.no_grad():
        num_states = sum(len(batch["obs"]) for batch in batches)
        for batch in batches:
            with _recorded(laterals) as seen:
                network(column=column, **batch)
            for key, tensor in seen.items():
                mean = _features(tensor).mean((0, 2)) * (len(batch["obs"]) / num_states)
                means[key] = means.get(key, torch.zeros_like(mean)) + mean

    fisher: dict[tuple[str, bool], Tensor] = {}
    count = 0
    actions = "sampled" if continuous or network.is_recurrent else "expected"
    generator = torch.Generator(device=network.device).manual_seed(0)
    for batch in batches:
        with torch.enable_grad(), _recorded(laterals) as seen:
            logits = network(column=column, **batch).logits.reshape(-1, network.num_outputs)
            tensors = list(seen.values())
            num_actions = None if continuous else network.num_outputs
            for log_pi, weight in log_likelihoods(logits, num_actions, actions, generator):
                gradients = torch.autograd.grad(log_pi.sum(), tensors, retain_graph=True, allow_unused=True)
                for (key, tensor), gradient in zip(seen.items(), gradients, strict=True):
                    if gradient is None:
                        continue
                    moved = _features(tensor.detach()) - means[key].view(1, -1, 1)
                    effect = (moved * _features(gradient)).sum(2).double()  # (B, n), summed over pixels
                    square = (effect.square() * weight.unsqueeze(1)).sum(0)
                    fisher[key] = fisher.get(key, torch.zeros_like(square)) + square
        count += len(logits)
    units = [
        _Unit(key[0], key[1], index, float(value) / count, float(means[key][index]))
        for key, values in fisher.items()
        for index, value in enumerate(values)
    ]
    return sorted(units, key=lambda unit: unit.fisher)


def _laterals(column: Column) -> dict[str, Lateral]:
    return {key: cast(Lateral, lateral) for key, lateral in column.laterals.items()}


def _features(tensor: Tensor) -> Tensor:
    """(B, n) or (B, n, H, W) -> (B, n, pixels)."""
    return tensor.flatten(2) if tensor.dim() > 2 else tensor.unsqueeze(2)


@contextmanager
def _recorded(laterals: Mapping[str, Lateral]) -> Iterator[dict[tuple[str, bool], Tensor]]:
    """What laterals read (`key, True`) and what their adapters' units give (`key, False`) in the forward pass within.

    Sources are cut off from what lies below: their gradient then is that of the lateral path alone.
    """
    seen: dict[tuple[str, bool], Tensor] = {}

    def record(key: str, lateral: Lateral) -> None:
        project = lateral.project

        def recording(sources: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
            features = sources if isinstance(lateral.out, nn.Conv2d) else sources.flatten(1)
            leaf = seen[key, True] = features.detach().requires_grad_(torch.is_grad_enabled())
            if not isinstance(lateral, Adapter):
                return leaf
            seen[key, False] = project(leaf, layout)
            return seen[key, False]

        # An attribute of the instance comes before the method of its class.
        vars(lateral)["project"] = recording

    for key, lateral in laterals.items():
        record(key, lateral)
    try:
        yield seen
    finally:
        for lateral in laterals.values():
            del vars(lateral)["project"]


# -- cutting -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _cut(network: ProgressiveNetwork, column: int, units: list[_Unit]) -> ProgressiveNetwork:
    """A copy of the network up to `column` with these units replaced by their means; all columns frozen."""
    pruned = copy.deepcopy(network)
    pruned.columns = pruned.columns[: column + 1]
    target = column_of(pruned, column)
    target.fingerprint = None
    for key, lateral in _laterals(target).items():
        inputs = [unit for unit in units if unit.lateral == key and unit.is_input]
        adapter_units = [unit for unit in units if unit.lateral == key and not unit.is_input]
        weight, bias = _next_weights(target, key, lateral)
        if not isinstance(lateral, Adapter):
            _fold(weight, bias, inputs)
            continue
        project, constant = lateral.project_layer, cast(Tensor, lateral.project_layer.bias)
        scale = lateral.feature_scale().view(1, -1, *[1] * (project.weight.dim() - 2))
        scaled = project.weight * scale
        _fold(scaled, constant, inputs)
        project.weight[:, [unit.index for unit in inputs]] = 0
        if inputs and len(inputs) == project.weight.shape[1]:
            # Nothing comes in any more: every unit gives a constant, which the next bias can hold exactly.
            adapter_units = [_Unit(key, False, r, 0.0, max(0.0, float(b))) for r, b in enumerate(constant)]
        _fold(weight, bias, adapter_units)
        rows = [unit.index for unit in adapter_units]
        project.weight[rows] = 0
        constant[rows] = 0
    pruned.freeze()
    return pruned


def _next_weights(column: Column, key: str, lateral: Lateral) -> tuple[Tensor, Tensor]:
    """U (out, in, ...) as a view to write into, and the bias of the layer that it feeds."""
    layer = cast(nn.Module, getattr(column, key) if key in HEADS else column.layers[int(key) - 1])
    if isinstance(layer, nn.LSTM):
        own = layer.input_size - lateral.projected_width
        return cast(Tensor, layer.weight_ih_l0).data[:, own:], cast(Tensor, layer.bias_ih_l0).data
    assert lateral.out is not None
    return cast(Tensor, lateral.out.weight).data, cast(Tensor, layer.bias).data


def _fold(weight: Tensor, bias: Tensor, units: list[_Unit]) -> None:
    """Zeroes the weights from `units` and adds what they gave on average to `bias`."""
    if not units:
        return
    index = [unit.index for unit in units]
    means = torch.tensor([unit.mean for unit in units], dtype=weight.dtype, device=weight.device)
    # Every position of a kernel sees the map's mean.
    bias += weight[:, index].flatten(2).sum(2) @ means if weight.dim() > 2 else weight[:, index] @ means
    weight[:, index] = 0


def _count(network: ProgressiveNetwork, column: int, units: list[_Unit]) -> Iterator[LateralCut]:
    target = column_of(network, column)
    for key, lateral in _laterals(target).items():
        inputs = {unit.index for unit in units if unit.lateral == key and unit.is_input}
        rows = {unit.index for unit in units if unit.lateral == key and not unit.is_input}
        weight, _ = _next_weights(target, key, lateral)
        fan_out = weight[:, :1].numel()  # parameters of U a unit
        width = weight.shape[1]
        if not isinstance(lateral, Adapter):
            before, after = width * fan_out, (width - len(inputs)) * fan_out
            yield LateralCut(key, width, len(inputs), 0, 0, before, after)
            continue
        num_inputs = lateral.project_layer.weight.shape[1]
        if len(inputs) == num_inputs or len(rows) == width:
            inputs, rows = set(range(num_inputs)), set(range(width))
        edges = np.cumsum([0, *lateral._widths]).tolist()
        # alpha of a source column goes with the last of its features.
        sources_left = sum(not inputs.issuperset(range(start, end)) for start, end in pairwise(edges))
        before = len(edges) - 1 + width * (num_inputs + 1 + fan_out)
        left = width - len(rows)
        after = sources_left + left * (num_inputs - len(inputs) + 1 + fan_out)
        yield LateralCut(key, num_inputs, len(inputs), width, len(rows), before, after)
