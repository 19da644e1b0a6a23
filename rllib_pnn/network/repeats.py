"""The lower layers of a column that learns: what a batch's frames repeat is computed once, in both directions.

With index(p) the distinct patch that stands at position p of the batch, and X the distinct ones, row by row,

    h_1[p] = H_1[index(p)],    H_1 = g(X W^T + b),    dL/dH_1[u] = sum of dL/dh_1[p] over all p with index(p) = u,

so that layer 1 and its gradient take as many rows as there are distinct patches. Layer 2's adapter reads the sources
at the same positions. Layer 2 again has distinct patches, of H_1 and of the adapter's features; above it little is
repeated, and maps are spread out for convolutions.

Two ways to know index(p). In a rollout observations follow each other, and most of a frame is the frame before
(`StepRepeats`): in Pong one patch of six is new, for 17 steps, and two of five in layer 2. In a batch of any order
patches were numbered before, once for all epochs (`NumberedRepeats`, numbering.py): in 256 steps of Pong one patch of
twenty is distinct, and one of six in layer 2.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csc_matrix
from torch import Tensor, nn

from rllib_pnn.network.adapter import Adapter
from rllib_pnn.network.column import Column, Lower
from rllib_pnn.network.incremental import StepMaps, common_convolution
from rllib_pnn.network.patches import any_in_patch, changed_patches, is_supported, patches_at, row_starts

# Of all positions; with more of them an ordinary convolution is faster (docs/performance.md).
MAX_DISTINCT = 0.3  # in layer 1
MAX_DISTINCT_ABOVE = 0.5
# The same for batches with numbered patches, whose learner has more threads, which convolutions use better.
MAX_DISTINCT_NUMBERED = 0.15
MAX_DISTINCT_NUMBERED_ABOVE = 0.4


class Repeats(abc.ABC):
    """Where the distinct values of a batch's maps stand.

    Args:
        rows: (U,) indices into the shape, flattened: for each distinct value a position at which it stands.
        shape: (..., H, W), the batch's axes in front; B is their product.
    """

    def __init__(self, rows: np.ndarray, shape: tuple[int, ...]) -> None:
        self.rows = rows
        self.shape = shape

    @property
    def share(self) -> float:
        """Of all positions, those that are distinct."""
        return len(self.rows) / math.prod(self.shape)

    @abc.abstractmethod
    def spread(self, values: np.ndarray) -> np.ndarray:
        """(U, M) -> (B * H * W, M): what stands at each position."""

    @abc.abstractmethod
    def gather(self, values: np.ndarray) -> np.ndarray:
        """(B * H * W, M) -> (U, M): sums over all positions at which each stands. The adjoint of `spread`."""

    @abc.abstractmethod
    def above(self, kernel: int, stride: int) -> tuple[Repeats, np.ndarray] | None:
        """The repeats of a layer that reads these maps without padding, and what of them it reads.

        Returns:
            Its repeats, U' rows, and for each of them the rows of this layer in its patch, (U', kernel * kernel); None
            where it repeats little, or where that is not known.
        """

    def by_offset(self, stride: int) -> tuple[np.ndarray, list[int]]:
        """The rows ordered by their pixels' (y, x) modulo the stride, and how many there are of each."""
        y, x = np.divmod(self.rows % (self.shape[-2] * self.shape[-1]), self.shape[-1])
        offset = (y % stride * stride + x % stride).astype(np.uint16)
        return np.argsort(offset, kind="stable"), np.bincount(offset, minlength=stride * stride).tolist()


class StepRepeats(Repeats):
    """Of T steps of N environments, time-major: values stay where they are until others take their place.

    Args:
        rows: sorted; where something stands that did not stand there in the step before; all positions of the first
            step among them.
        shape: T, N, H, W.
    """

    def __init__(self, rows: np.ndarray, shape: tuple[int, int, int, int]) -> None:
        super().__init__(rows, shape)
        steps, width = shape[0], shape[1] * shape[2] * shape[3]
        ends = np.searchsorted(rows, np.arange(1, steps + 1) * width).tolist()
        # Of every step: which of the rows, and where they stand in it.
        self._steps = [
            (slice(start, end), rows[start:end] - t * width)
            for t, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
        ]

    def spread(self, values: np.ndarray) -> np.ndarray:
        out = np.empty((self.shape[0], math.prod(self.shape[1:]), values.shape[1]), values.dtype)
        for t, (rows, where) in enumerate(self._steps):
            if t:
                out[t] = out[t - 1]
            out[t, where] = values[rows]
        return out.reshape(-1, values.shape[1])

    def gather(self, values: np.ndarray) -> np.ndarray:
        values = values.reshape(self.shape[0], -1, values.shape[1])
        out = np.empty((len(self.rows), values.shape[2]), values.dtype)
        later = np.zeros(values.shape[1:], values.dtype)
        for step, (rows, where) in zip(values[::-1], reversed(self._steps), strict=True):
            later += step
            out[rows] = later[where]
            later[where] = 0.0
        return out

    def above(self, kernel: int, stride: int) -> tuple[StepRepeats, np.ndarray] | None:
        steps, num_envs, height, width = self.shape
        high, wide = (height - kernel) // stride + 1, (width - kernel) // stride + 1
        is_new = np.zeros(self.shape, bool)
        is_new.reshape(-1)[self.rows] = True
        upper = StepRepeats(np.flatnonzero(any_in_patch(is_new, kernel, stride)), (steps, num_envs, high, wide))
        if upper.share > MAX_DISTINCT_ABOVE:
            return None
        positions = np.arange(num_envs * height * width).reshape(self.shape[1:])
        patches = np.lib.stride_tricks.sliding_window_view(positions, (kernel, kernel), (1, 2))[:, ::stride, ::stride]
        patches = patches.reshape(-1, kernel * kernel)
        now = np.empty(positions.size, np.int64)  # the row that stands at each position
        read = np.empty((len(upper.rows), kernel * kernel), np.int64)
        for (rows, where), (upper_rows, upper_where) in zip(self._steps, upper._steps, strict=True):
            now[where] = np.arange(rows.start, rows.stop)
            read[upper_rows] = now[patches[upper_where]]
        return upper, read


class NumberedRepeats(Repeats):
    """Of B observations in any order, whose patches are numbered.

    Args:
        numbers: for this layer and some above it, (B, H * W) each, integers from 0 on; where two at one position are
            equal, the same patch stands there. See numbering.py.
        size: H, W.
    """

    def __init__(self, numbers: Sequence[np.ndarray], size: tuple[int, int]) -> None:
        self._above = numbers[1:]
        flat = numbers[0].reshape(-1)
        first = np.full(int(flat.max()) + 1, -1, np.int32)
        first[flat[::-1]] = np.arange(len(flat) - 1, -1, -1, dtype=np.int32)  # the first one is the last one written
        used = np.flatnonzero(first >= 0)
        row = np.empty(len(first), np.int32)
        row[used] = np.arange(len(used), dtype=np.int32)
        self.index = row[flat]  # (B * H * W,): the row that stands at each position
        super().__init__(first[used].astype(np.int64), (len(numbers[0]), *size))

    def spread(self, values: np.ndarray) -> np.ndarray:
        return values.take(self.index, axis=0)

    def gather(self, values: np.ndarray) -> np.ndarray:
        count = len(self.index)
        entries = np.ones(count, values.dtype), self.index, np.arange(count + 1, dtype=np.int32)
        return csc_matrix(entries, (len(self.rows), count)) @ values

    def above(self, kernel: int, stride: int) -> tuple[NumberedRepeats, np.ndarray] | None:
        batch, height, width = self.shape
        size = (height - kernel) // stride + 1, (width - kernel) // stride + 1
        if not self._above or self._above[0].shape != (batch, math.prod(size)):
            return None
        upper = NumberedRepeats(self._above, size)
        image, position = np.divmod(upper.rows, math.prod(size))
        starts = row_starts((height, width), kernel, stride)[position] + (image * (height * width))[:, None]
        read = self.index[starts[:, :, None] + np.arange(kernel)]
        return upper, read.reshape(len(read), -1)


class ChangingMaps:
    """Maps (T, N, M, H, W) of which every step keeps what differs from the one before: h_1 of the sources, recorded.

    >>> maps = ChangingMaps()
    >>> for obs in rollout:
    ...     sources, _ = net.sources(obs, incremental=incremental)  # an `IncrementalLayers(keeps_changes=True)`
    ...     maps.append(sources[1])
    """

    def __init__(self) -> None:
        self._steps: list[tuple[np.ndarray, Tensor]] = []  # positions in (N, H, W), flattened and sorted; rows (n, M)
        self._step_shape: tuple[int, ...] = ()
        self._number: int | None = None

    def append(self, maps: StepMaps | Tensor) -> None:
        """The next step's, (N, M, H, W)."""
        self._step_shape = tuple(maps.shape)
        previous, self._number = self._number, None if isinstance(maps, Tensor) else maps.number
        if isinstance(maps, Tensor):
            rows = maps.permute(0, 2, 3, 1).flatten(0, 2)
        elif maps.changes is not None and maps.follows == previous:
            self._steps.append(maps.changes)
            return
        else:
            rows = torch.cat(maps.parts, 1)
        self._steps.append((np.arange(len(rows)), rows))

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self._steps), *self._step_shape)

    def of_envs(self, part: slice) -> ChangingMaps:
        """The same for some of the environments."""
        num_envs, maps, height, width = self._step_shape
        start, stop, _ = part.indices(num_envs)
        found = ChangingMaps()
        found._step_shape = (stop - start, maps, height, width)
        bounds = [start * height * width, stop * height * width]
        for positions, rows in self._steps:
            low, high = np.searchsorted(positions, bounds).tolist()
            found._steps.append((positions[low:high] - bounds[0], rows[low:high]))
        return found

    def repeats(self) -> StepRepeats:
        steps, num_envs, _, height, width = self.shape
        size = num_envs * height * width
        rows = np.concatenate([positions + t * size for t, (positions, _) in enumerate(self._steps)])
        return StepRepeats(rows, (steps, num_envs, height, width))

    def rows(self) -> Tensor:
        """(U, M): what stands at the rows of `repeats`."""
        return torch.cat([rows for _, rows in self._steps])

    def whole(self) -> Tensor:
        """(T, N, M, H, W), a new tensor."""
        steps, num_envs, _, height, width = self.shape
        flat = torch.from_numpy(self.repeats().spread(self.rows().numpy()))
        return flat.view(steps, num_envs, height, width, -1).permute(0, 1, 4, 2, 3).contiguous()


class _Spread(torch.autograd.Function):
    """(U, M) -> (B, M, H, W), channels last in memory."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, repeats: Repeats) -> Tensor:
        ctx.repeats = repeats
        flat = torch.from_numpy(repeats.spread(values.numpy()))
        return flat.view(-1, *repeats.shape[-2:], values.shape[1]).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat = gradients[0].permute(0, 2, 3, 1).contiguous().flatten(0, 2)
        return torch.from_numpy(ctx.repeats.gather(flat.numpy())), None


class _Convolution(torch.autograd.Function):
    """Rows (U, M) of the maps below, weight (M', M, k, k) -> rows W x + b of the layer above, (U', M').

    `read` is what `Repeats.above` gives for k and `stride`, `below` the repeats of the rows.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor, bias: Tensor, read: np.ndarray, stride: int, below: Repeats
    ) -> Tensor:
        patches = torch.from_numpy(values.numpy().take(read.reshape(-1), axis=0)).view(len(read), -1)
        ctx.save_for_backward(patches, weight)
        ctx.read, ctx.stride, ctx.below = read, stride, below
        return torch.addmm(bias.unsqueeze(1), weight.permute(0, 2, 3, 1).flatten(1), patches.t()).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        patches, weight = ctx.saved_tensors
        gradient = gradients[0]
        for_values = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_values = _transposed(gradient.contiguous(), weight, ctx.read, ctx.stride, ctx.below)
        if ctx.needs_input_grad[1]:
            out, maps, kernel, _ = weight.shape
            for_weight = (gradient.t() @ patches).view(out, kernel, kernel, maps).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[2]:
            for_bias = gradient.sum(0)
        return for_values, for_weight, for_bias, None, None, None


def _transposed(gradient: Tensor, weight: Tensor, read: np.ndarray, stride: int, below: Repeats) -> Tensor:
    """The gradient of the rows below, (U, M), from that of the rows above, (U', M').

    A pixel meets the kernel at offsets that are equal modulo the stride, ceil(k / s) ** 2 of the k * k. For each of
    these its gradients are added up first; then one product does the rest for all pixels that meet the same offsets.
    """
    out, maps, kernel, _ = weight.shape
    span = -(-kernel // stride)
    order, counts = below.by_offset(stride)
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    y, x = np.divmod(np.arange(kernel * kernel, dtype=np.int32), kernel)
    slots = place[read] * span**2 + (y // stride * span + x // stride)
    ends = np.arange(0, slots.size + 1, kernel * kernel, dtype=np.int32)
    entries = np.ones(slots.size, np.float32), slots.reshape(-1), ends
    summed = torch.from_numpy(csc_matrix(entries, (len(order) * span**2, len(read))) @ gradient.numpy())
    padded = F.pad(weight, (0, span * stride - kernel) * 2).view(out, maps, span, stride, span, stride)
    weights = padded.permute(3, 5, 2, 4, 0, 1).reshape(stride * stride, span * span * out, maps)
    parts = summed.view(len(order), -1).split(counts)
    products = torch.cat([part @ one for part, one in zip(parts, weights, strict=True)])
    return torch.from_numpy(products.numpy().take(place, axis=0))


def find_repeats(obs: Tensor, num_envs: int, layer: nn.Module) -> StepRepeats | None:
    """The repeats of a rollout for this layer 1, or None where there are few, or the ordinary way is the only one.

    Args:
        obs: (T * N, C, H, W) bytes, time-major.
        num_envs: N.
    """
    steps = len(obs) // num_envs
    if steps < 2 or not isinstance(layer, nn.Conv2d) or not is_supported(obs, layer):
        return None
    kernel, stride = layer.kernel_size[0], layer.stride[0]
    pixels = obs.numpy()
    changed = changed_patches(pixels[num_envs:], pixels[:-num_envs], kernel, stride)
    high, wide = ((n - kernel) // stride + 1 for n in obs.shape[2:])
    first = np.arange(num_envs * high * wide)
    repeats = StepRepeats(np.concatenate([first, len(first) + changed]), (steps, num_envs, high, wide))
    return repeats if repeats.share <= MAX_DISTINCT else None


def lower_layers(
    obs: Tensor,
    num_envs: int,
    column: Column,
    sources: Mapping[int, Tensor | ChangingMaps],
    source_columns: Sequence[Column],
) -> Lower | None:
    """The lower layers of a column that learns from a rollout, as far up as patches repeat, with gradients.

    Args:
        obs: (T * N, C, H, W) bytes, time-major.
        num_envs: N.
        sources: h_i^{<k} of the layers that laterals read, (T, N, sum of source widths, ...). Of layer 1 maybe as
            recorded while these observations came.
        source_columns: the columns that they are of.

    Returns:
        None where frames repeat little, or layer 1 is not supported.
    """
    layer, recorded = column.layers[0], sources.get(1)
    if not isinstance(layer, nn.Conv2d) or not is_supported(obs, layer):
        return None
    depth = common_depth([*source_columns, column])
    if isinstance(recorded, ChangingMaps) and (repeats := recorded.repeats()).share <= MAX_DISTINCT:
        return _lower_layers(_patches(obs, repeats, layer), repeats, column, sources, recorded.rows(), depth)
    found = find_repeats(obs, num_envs, layer)
    return None if found is None else _lower_layers(_patches(obs, found, layer), found, column, sources, None, depth)


def numbered_lower_layers(
    obs: Tensor,
    numbers: Sequence[Tensor],
    column: Column,
    sources: Mapping[int, Tensor],
    source_columns: Sequence[Column],
) -> Lower | None:
    """The lower layers of a column, as far up as patches are numbered, with gradients for their parameters.

    Args:
        obs: (B, C, H, W) bytes.
        numbers: of layer 1, 2, ..., (B, H_i * W_i) integers (see numbering.py).
        sources: h_i^{<k} of the layers that laterals read, (B, sum of source widths, ...). Layer 1's is computed from
            the patches if it is missing, which takes a `common_depth` of 1.
        source_columns: the columns that they are of.

    Raises:
        ValueError: the numbers are not of these observations.
    """
    layer = column.layers[0]
    if not isinstance(layer, nn.Conv2d) or not is_supported(obs, layer):
        raise ValueError("patches: this column's layer 1 can't read numbered ones; see number_patches")
    high, wide = ((n - layer.kernel_size[0]) // layer.stride[0] + 1 for n in obs.shape[2:])
    if numbers[0].shape != (len(obs), high * wide):
        raise ValueError(f"patches: layer 1: expected {(len(obs), high * wide)}, got {tuple(numbers[0].shape)}")
    repeats = NumberedRepeats([n.numpy() for n in numbers], (high, wide))
    patches = _patches(obs, repeats, layer)
    first: Tensor | None = None
    if 1 in column.reads and 1 not in sources:
        with torch.no_grad():
            weights, biases = zip(*(source.first_affine() for source in source_columns), strict=True)
            first = _product(patches, torch.cat(weights).flatten(1), torch.cat(biases)).relu_()
    return _lower_layers(patches, repeats, column, sources, first, common_depth([*source_columns, column]))


def common_depth(columns: Sequence[Column]) -> int:
    """How many layers of all columns, from the lowest up, read an image alike: what repeats in one repeats in all."""
    return next(n for n in itertools.count() if common_convolution(columns, n + 1) is None)


def _patches(obs: Tensor, repeats: Repeats, layer: nn.Conv2d) -> Tensor:
    """(U, C * k * k): the distinct patches."""
    return patches_at(obs.numpy(), repeats.rows, layer.kernel_size[0], layer.stride[0]).flatten(1)


def _lower_layers(
    patches: Tensor, repeats: Repeats, column: Column, sources: Mapping[int, Any], first: Tensor | None, depth: int
) -> Lower:
    """`first`: layer 1 of the sources at the repeats' rows, if it is known; else it is looked up in `sources`. `depth`:
    layers up to which they repeat where the column does."""
    weight, bias = column.first_affine()
    values = _product(patches, weight.flatten(1), bias)  # h_n before its ReLU, (U, M)
    number = 1
    while True:
        lateral, above = _lateral(column, number + 1), _convolution(column, number + 1)
        features = None  # what the lateral of the layer above convolves, (U, M), maybe before its ReLU
        if lateral is not None and number > depth:
            break
        if lateral is not None:
            features = first if number == 1 and first is not None else _rows(sources[number], repeats)
            if isinstance(lateral, Adapter):
                features = _product(features, *lateral.map_affine())
        if above is None:
            break
        kernel: Tensor = above.weight
        if lateral is not None and features is not None:
            # W h + U z as one convolution of both.
            values = torch.cat([values, features], 1)
            kernel = torch.cat([kernel, lateral.out.weight], 1)
        values = _rectified(values)
        found = repeats.above(above.kernel_size[0], above.stride[0])
        number += 1
        if found is None:
            maps = _Spread.apply(values, repeats)
            return Lower(number, F.conv2d(maps, kernel, above.bias, above.stride).relu_())
        upper, read = found
        values = _Convolution.apply(values, kernel, above.bias, read, above.stride[0], repeats)
        repeats = upper
    projected = None
    if features is not None and isinstance(lateral, Adapter):
        projected = _Spread.apply(_rectified(features), repeats)
    return Lower(number, _Spread.apply(_rectified(values), repeats), projected)


def _convolution(column: Column, number: int) -> Any:
    """Layer `number`, an `nn.Conv2d` without padding, or None."""
    layer = column.layers[number - 1] if number <= len(column.layers) else None
    return layer if isinstance(layer, nn.Conv2d) and layer.padding in (0, (0, 0)) else None


def _lateral(column: Column, number: int) -> Any:
    """Layer `number`'s, if it convolves maps, or None."""
    lateral = column.lateral(str(number))
    return lateral if lateral is not None and isinstance(lateral.out, nn.Conv2d) else None


def _product(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b, (U, M), as the transposed product, which is faster where M is small."""
    return torch.addmm(bias.unsqueeze(1), weight, inputs.t()).t()


def _rectified(values: Tensor) -> Tensor:
    """ReLU, in one piece: so is its gradient, which takes three times as long in pieces (of `cat`, transposed)."""
    return values.contiguous().relu()


def _rows(sources: Tensor | ChangingMaps, repeats: Repeats) -> Tensor:
    """(T, N, M, H, W) or (B, M, H, W) at the distinct positions, (U, M)."""
    if isinstance(sources, ChangingMaps):
        sources = sources.whole()
    image, position = np.divmod(repeats.rows, math.prod(sources.shape[-2:]))
    maps = sources.flatten(-2).numpy()  # (..., M, H * W)
    at: tuple[Any, ...] = np.unravel_index(image, maps.shape[:-2])
    return torch.from_numpy(maps[(*at, slice(None), position)])
