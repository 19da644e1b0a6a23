"""Activations of many frozen columns at once: layer 1 as one convolution, every layer side by side in one tensor.

A column's bits must not depend on how many columns stand above it (promise 1 of DESIGN.md), and the same sum in
another order has other bits. So layer 1 of several columns is only computed as one convolution where that was seen to
give, on this machine, for this shape, exactly the bits of one convolution a column.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rllib_pnn.network.column import Column

# Kernel size, stride and padding of a convolution as torch keeps them.
_Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | str]
# Shape of the observations, maps of every column, geometry, threads.
_Case = tuple[tuple[int, ...], tuple[int, ...], _Geometry, int]
_MAX_CASES = 256
_verdicts: dict[_Case, bool | None] = {}


class SideBySide:
    """h^{<k} by layer, filled column by column: what column j reads is the first part of what a later one reads.

    Args:
        columns: all columns that will be added, oldest first.
        layers: which layers to keep, counted from 1.
        first: layer 1 of at least these columns, already side by side; it is then not copied again.
    """

    def __init__(self, columns: Sequence[Column], layers: Collection[int], first: Tensor | None = None) -> None:
        self._layers = sorted(layers)
        self._ends = {n: [0, *accumulate(column.shapes[n][0] for column in columns)] for n in self._layers}
        self._kept: dict[int, Tensor] = {} if first is None or 1 not in self._ends else {1: first}
        self._given = frozenset(self._kept)
        self._count = 0

    def add(self, activations: Sequence[Tensor]) -> None:
        """The next column's h_1 .. h_L."""
        for n in self._layers:
            if n in self._given:
                continue
            h, ends = activations[n - 1], self._ends[n]
            if len(ends) == 2:
                self._kept[n] = h
                continue
            if n not in self._kept:
                self._kept[n] = h.new_empty((h.shape[0], ends[-1], *h.shape[2:]))
            self._kept[n][:, ends[self._count] : ends[self._count + 1]] = h
        self._count += 1

    def before(self, num: int, layers: Collection[int]) -> dict[int, Tensor]:
        """h^{<num} of these layers, (B, sum of widths, ...); views."""
        return {n: self._kept[n][:, : self._ends[n][num]] for n in layers}


class Graph(SideBySide):
    """The same where gradients flow through the activations: autograd wants new tensors, not filled ones."""

    def add(self, activations: Sequence[Tensor]) -> None:
        for n in self._layers:
            h = activations[n - 1]
            self._kept[n] = torch.cat([self._kept[n], h], dim=1) if n in self._kept else h


def first_layers(obs: Tensor, columns: Sequence[Column]) -> Tensor | None:
    """h_1 of these columns side by side, (B, sum of maps, H, W), or None where one by one is the way.

    Args:
        obs: (B, C, H, W) float, contiguous. No gradient is recorded.
    """
    layers = [column.layers[0] for column in columns]
    first = layers[0]
    if len(layers) < 2 or obs.device.type != "cpu" or not isinstance(first, nn.Conv2d):
        return None
    geometry: _Geometry = (first.kernel_size, first.stride, first.padding)
    widths = []
    for layer in layers:
        if not isinstance(layer, nn.Conv2d) or (layer.kernel_size, layer.stride, layer.padding) != geometry:
            return None
        widths.append(layer.out_channels)
    if _padded(sum(widths)) >= sum(map(_padded, widths)):
        return None
    if not _same_bits((tuple(obs.shape), tuple(widths), geometry, torch.get_num_threads())):
        return None
    weights, biases = zip(*(column.first_affine() for column in columns), strict=True)
    with torch.no_grad():
        return _convolve(obs, weights, biases, geometry).relu_()


def _padded(maps: int) -> int:
    """Maps that a convolution computes: kernels work on 16 at a time, so 4 x 12 together cost 3/4 of 12 four times."""
    return -(-maps // 16) * 16


def _convolve(obs: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], geometry: _Geometry) -> Tensor:
    _, stride, padding = geometry
    return F.conv2d(obs, torch.cat(tuple(weights)), torch.cat(tuple(biases)), stride, padding)


def _same_bits(case: _Case) -> bool:
    """Whether one convolution for all columns gives each column's own bits; no, the first time a case is met.

    Which kernel runs, and so in which order it adds, follows from shapes and threads and not from values: random
    operands decide for all. A case met once (the odd last batch of an epoch) is not worth the test.
    """
    if case not in _verdicts:
        if len(_verdicts) >= _MAX_CASES:
            _verdicts.clear()
        _verdicts[case] = None
        return False
    if _verdicts[case] is None:
        _verdicts[case] = _compare(case)
    return bool(_verdicts[case])


@torch.no_grad()
def _compare(case: _Case) -> bool:
    shape, widths, geometry, _ = case
    generator = torch.Generator().manual_seed(0)
    obs = torch.rand(1, *shape[1:], generator=generator).repeat(shape[0], 1, 1, 1)
    weights = [torch.randn(width, shape[1], *geometry[0], generator=generator) for width in widths]
    biases = [torch.randn(width, generator=generator) for width in widths]
    found = _convolve(obs, weights, biases, geometry).split(widths, dim=1)
    each = zip(found, weights, biases, strict=True)
    return all(torch.equal(part, _convolve(obs, [w], [b], geometry)) for part, w, b in each)
