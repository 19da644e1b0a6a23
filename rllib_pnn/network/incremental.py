"""Layer 1 of columns on the frames of a game: only where a frame differs from the one before is it computed again.

From one step to the next most pixels of most games stay as they were (in Pong, a kernel of layer 1 meets a changed one
at 8 of 100 positions), and so does what reads them: layer 1, most of a column's arithmetic when it acts, and what the
adapters of layer 2 project of it.

The patches that changed are put side by side into one long image, which an ordinary convolution then reads. That gives
exactly the bits that the whole image would give; it was seen to, on this machine, for this shape, or it is not done
(promise 1 of DESIGN.md; together.py says why shapes decide).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rllib_pnn.network.adapter import adapted
from rllib_pnn.network.column import Column
from rllib_pnn.network.together import first_layers

MAX_CHANGED = 0.4  # of all positions; with more of them all are computed
_MAX_WAIT = 256  # calls
_STRIP = 256  # patches; strips are filled up to a multiple, so that few shapes are met
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_MAX_CASES = 1024
_verdicts: dict[Hashable, bool] = {}

_Affine = tuple[Tensor, Tensor]  # weight and bias


class FirstLayers(NamedTuple):
    """h_1 of columns and what layer 2's adapters make of it. Valid until the next call of what gave it."""

    sources: Tensor | None  # (B, sum of maps, H_1, W_1), h_1 of those that others read, side by side
    each: list[Tensor]  # h_1 of every column, in one piece
    projected: list[Tensor | None]  # g(V(alpha h_1^{<k})) of every column that has such an adapter


@dataclass
class _Known:
    """A column whose maps are kept, and the weights that made them."""

    column: Column
    affine: _Affine
    projection: _Affine | None
    parameters: list[tuple[Tensor, Tensor]]  # of a column that trains: those that both are made of, and copies
    is_current: bool = True  # whether the maps belong to the observation seen last

    @classmethod
    def of(cls, column: Column) -> _Known:
        adapter = column.map_adapter
        parts = [column.layers[0], *([adapter.project_layer] if adapter else [])]
        used = [] if column.is_frozen else [p for part in parts for p in part.parameters()]
        if adapter and not column.is_frozen:
            used.append(adapter.scale)
        affine, projection = column.first_affine(), adapter.map_affine() if adapter else None
        kept = [(p.detach(), p.detach().clone()) for p in used]
        return cls(column, _copies(affine), _copies(projection) if projection else None, kept)

    def is_usable(self) -> bool:
        """Whether the maps are what the column would make of the observation seen last."""
        return self.is_current and all(torch.equal(now, then) for now, then in self.parameters)

    @property
    def width(self) -> int:
        return len(self.affine[1])


class IncrementalFirstLayer:
    """Layer 1 of columns for observation after observation of the same environments, without gradient.

    Nothing has to be announced: observations are compared with the last ones, and weights of columns that train with
    those used last. So it is right, if of no use, for observations that have nothing to do with each other. Where most
    of an image changes it gives up and tries again after a while.

    >>> incremental = IncrementalFirstLayer()
    >>> net = ProgressiveNetwork((4, 84, 84), num_outputs=6)
    >>> logits, value, _ = net(obs, incremental=incremental)
    """

    def __init__(self) -> None:
        self._seen: np.ndarray | None = None  # (B, C, H, W) bytes
        self._known: list[_Known] = []
        self._kept = FirstLayers(None, [], [])
        self._ends = [0]  # where each column's maps end in `sources`
        self._operands: tuple[list[_Known], _Affine, _Affine | None] | None = None
        self._skip = self._wait = 0

    @torch.no_grad()
    def __call__(self, obs: Tensor, sources: Sequence[Column], newest: Column | None = None) -> FirstLayers | None:
        """h_1 of these columns.

        Args:
            obs: (B, C, H, W) bytes in torch's default layout.
            sources: columns that others read, oldest first.
            newest: a column that reads them and is read by none.

        Returns:
            None where the ordinary way is the better or the only one: other observations, layers of several shapes, an
            image most of which has changed.
        """
        columns = [*sources, *([] if newest is None else [newest])]
        layer = _common_layer(columns)
        if layer is None or not is_supported(obs, layer):
            return None
        if self._skip:
            self._skip -= 1
            return None
        pixels = obs.numpy()
        if self._seen is None or self._seen.shape != pixels.shape or not self._knows(columns):
            return self._begin(obs, columns, len(sources))
        kernel, stride = layer.kernel_size[0], layer.stride[0]
        changed = changed_patches(pixels, self._seen, kernel, stride)
        if len(changed) > MAX_CHANGED * len(pixels) * self._num_positions:
            self._seen = None
            self._skip = self._wait = min(2 * self._wait + 1, _MAX_WAIT)
            return None
        self._wait = 0
        # The first that has no use ends the row: it is the newest as a rule, and the last.
        usable = list(itertools.takewhile(_Known.is_usable, self._known[: len(columns)]))
        if len(changed) and usable and not self._update(pixels, changed, usable, kernel, stride):
            return self._begin(obs, columns, len(sources))
        np.copyto(self._seen, pixels)
        for later in self._known[len(columns) :]:
            later.is_current = False
        if len(usable) < len(columns):
            self._renew(obs, range(len(usable), len(columns)))
        count = len(columns)
        return FirstLayers(self._kept.sources, self._kept.each[:count], self._kept.projected[:count])

    @property
    def _num_positions(self) -> int:
        return self._kept.each[0][0, 0].numel()

    def _knows(self, columns: Sequence[Column]) -> bool:
        """Also without the newest that was there before."""
        known = [k.column for k in self._known[: len(columns)]]
        return len(self._known) - len(columns) in (0, 1) and _same_items(known, columns)

    def _begin(self, obs: Tensor, columns: Sequence[Column], num_sources: int) -> FirstLayers:
        """Computes all of it and remembers it."""
        h = obs.to(torch.float32)
        joint = first_layers(h, columns)
        if joint is None:
            joint = torch.cat([_convolved(h, column) for column in columns], 1)
        self._known = [_Known.of(column) for column in columns]
        self._ends = [0, *itertools.accumulate(known.width for known in self._known)]
        self._seen = obs.numpy().copy()
        each = [part.contiguous() for part in joint.split([known.width for known in self._known], 1)]
        sources = each[0] if num_sources == 1 else None
        if num_sources > 1:
            sources = joint[:, : self._ends[num_sources]].contiguous()
        self._kept = FirstLayers(sources, each, [_projected(column, sources) for column in columns])
        return self._kept

    def _update(self, pixels: np.ndarray, changed: np.ndarray, known: list[_Known], kernel: int, stride: int) -> bool:
        """Computes the changed positions of the first columns anew; False, changing nothing, where bits forbid it."""
        strip = strip_of_patches(pixels, changed, kernel, stride)
        threads = torch.get_num_threads()
        widths = tuple(k.width for k in known)
        reads = tuple((k.column.num_sources, len(k.projection[1])) for k in known if k.projection is not None)
        case = (pixels.shape, kernel, stride, strip.shape[3] // kernel, threads, widths)
        positions = (len(pixels), self._num_positions, strip.shape[3] // kernel, threads, widths, reads)
        if not _verdict(_strip_agrees, case) or (reads and not _verdict(_projection_agrees, positions)):
            return False
        affine, projection = self._get_operands(known)
        found = _read_strip(strip, affine).relu_()
        parts = [*zip(self._kept.each, found.split(widths), strict=False)]
        if self._kept.sources is not None and self._kept.sources is not self._kept.each[0]:
            parts.append((self._kept.sources, found[: self._kept.sources.shape[1]]))
        if projection is not None:
            products = torch.addmm(projection[1].unsqueeze(1), projection[0], found[: projection[0].shape[1]]).relu_()
            targets = [p for p in self._kept.projected[: len(known)] if p is not None]
            parts += zip(targets, products.split([width for _, width in reads]), strict=True)
        image, position = np.divmod(changed, self._num_positions)
        for target, source in parts:  # a source that has not kept up leaves the joint maps to `_renew`
            target.flatten(2).numpy()[image, : len(source), position] = source.numpy()[:, : len(changed)].T
        return True

    def _get_operands(self, known: list[_Known]) -> tuple[_Affine, _Affine | None]:
        if self._operands is None or not _same_items(self._operands[0], known):
            weights, biases = zip(*(k.affine for k in known), strict=True)
            affines = [k.projection for k in known if k.projection is not None]
            projection = None
            if affines:
                projection = _staircase([weight for weight, _ in affines]), torch.cat([bias for _, bias in affines])
            self._operands = known, (torch.cat(weights), torch.cat(biases)), projection
        return self._operands[1:]

    def _renew(self, obs: Tensor, which: Iterable[int]) -> None:
        """Computes these columns' maps as a whole."""
        h = obs.to(torch.float32)
        for j in which:
            column = self._known[j].column
            self._known[j] = _Known.of(column)
            each, sources = self._kept.each, self._kept.sources
            each[j].copy_(_convolved(h, column))
            if sources is not None and sources is not each[0] and self._ends[j + 1] <= sources.shape[1]:
                sources[:, self._ends[j] : self._ends[j + 1]] = each[j]
            self._kept.projected[j] = _projected(column, self._kept.sources)


def changed_patches(pixels: np.ndarray, before: np.ndarray, kernel: int, stride: int) -> np.ndarray:
    """Where a convolution without padding reads a pixel that is another than before.

    Args:
        pixels, before: (B, C, H, W) bytes, contiguous. `kernel` is a multiple of `stride`, W too, and `stride` 1, 2, 4
            or 8.

    Returns:
        Indices into its (B, H_1, W_1) outputs, flattened and sorted.
    """
    batch, channels, height, width = pixels.shape
    blocks, span = (height - kernel) // stride + kernel // stride, kernel // stride
    word = _WORDS[stride]
    differs = pixels.view(word) != before.view(word)  # (B, C, H, W / stride)
    rows = functools.reduce(np.bitwise_or, (differs[:, c, : blocks * stride] for c in range(channels)))
    rows = rows.reshape(batch, blocks, stride, width // stride)
    block = functools.reduce(np.bitwise_or, (rows[:, :, r] for r in range(stride)))
    high, wide = (n - span + 1 for n in block.shape[1:])
    across = functools.reduce(np.bitwise_or, (block[:, :, x : x + wide] for x in range(span)))
    return np.flatnonzero(functools.reduce(np.bitwise_or, (across[:, y : y + high] for y in range(span))))


def strip_of_patches(pixels: np.ndarray, where: np.ndarray, kernel: int, stride: int) -> Tensor:
    """The patches that a convolution reads at `where`, side by side: (1, C, kernel, kernel * N) floats.

    Args:
        pixels: (B, C, H, W) bytes, contiguous.
        where: indices into (B, H_1, W_1), flattened; N is their number, filled up to a multiple of 256 with zeros.
    """
    windows, (image, y, x) = _windows(pixels, kernel, stride), _coordinates(pixels, where, kernel, stride)
    strip = np.zeros((pixels.shape[1], kernel, -(-len(where) // _STRIP) * _STRIP), windows.dtype)
    strip[:, :, : len(where)] = windows.transpose(3, 4, 0, 1, 2)[:, :, image, y, x]
    return torch.from_numpy(strip.view(np.uint8)).unsqueeze(0).to(torch.float32)


def patches_at(pixels: np.ndarray, where: np.ndarray, kernel: int, stride: int) -> Tensor:
    """The same patches one by one, (N, C, kernel, kernel) floats; N is not filled up."""
    windows, (image, y, x) = _windows(pixels, kernel, stride), _coordinates(pixels, where, kernel, stride)
    patches = np.ascontiguousarray(windows[image, y, x])  # (N, C, kernel) rows
    return torch.from_numpy(patches.view(np.uint8)).view(*patches.shape, kernel).to(torch.float32)


def _windows(pixels: np.ndarray, kernel: int, stride: int) -> np.ndarray:
    """All patches without copying one, (B, H_1, W_1, C, kernel); a row of a patch is one item, wherever it starts."""
    batch, channels, height, width = pixels.shape
    row = np.dtype(_WORDS.get(kernel, f"V{kernel}"))
    return np.lib.stride_tricks.as_strided(
        pixels.reshape(-1)[:kernel].view(row),
        (batch, (height - kernel) // stride + 1, (width - kernel) // stride + 1, channels, kernel),
        (channels * height * width, stride * width, stride, height * width, width),
        writeable=False,
    )


def _coordinates(
    pixels: np.ndarray, where: np.ndarray, kernel: int, stride: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    high, wide = ((n - kernel) // stride + 1 for n in pixels.shape[2:])
    image, position = np.divmod(where, high * wide)
    return image, position // wide, position % wide


def _read_strip(strip: Tensor, affine: _Affine) -> Tensor:
    """What layer 1 makes of the patches, (sum of maps, N), before its ReLU."""
    return F.conv2d(strip, *affine, stride=strip.shape[2])[0, :, 0]


def _convolved(obs: Tensor, column: Column) -> Tensor:
    layer = column.layers[0]
    assert isinstance(layer, nn.Conv2d)
    return F.conv2d(obs, *column.first_affine(), layer.stride, layer.padding).relu_()


def _projected(column: Column, sources: Tensor | None) -> Tensor | None:
    adapter = column.map_adapter
    return None if adapter is None or sources is None else adapter.project(sources[:, : adapter.num_features])


def _copies(affine: _Affine) -> _Affine:
    weight, bias = affine
    return weight.detach().clone(), bias.detach().clone()


def _same_items(a: Sequence[object], b: Sequence[object]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _staircase(weights: Sequence[Tensor]) -> Tensor:
    """One matrix below the other, each filled up with zeros to the widest: a product with it adds nothing but zeros."""
    width = max(weight.shape[1] for weight in weights)
    return torch.cat([F.pad(weight, (0, width - weight.shape[1])) for weight in weights])


def _common_layer(columns: Sequence[Column]) -> nn.Conv2d | None:
    """The first column's layer 1 if all columns' are of its shape, but for the number of maps."""
    first = columns[0].layers[0]
    if not isinstance(first, nn.Conv2d):
        return None
    geometry = (first.kernel_size, first.stride, first.padding)
    for column in columns[1:]:
        layer = column.layers[0]
        if not isinstance(layer, nn.Conv2d) or (layer.kernel_size, layer.stride, layer.padding) != geometry:
            return None
    return first


def is_supported(obs: Tensor, layer: nn.Conv2d) -> bool:
    """Whether patches can be compared: bytes on the CPU, no padding, kernel and width multiples of the stride."""
    (kernel, wide), (stride, _) = layer.kernel_size, layer.stride
    return (
        obs.device.type == layer.weight.device.type == "cpu"
        and obs.dtype == torch.uint8
        and obs.is_contiguous()
        and layer.padding in (0, (0, 0))
        and kernel == wide
        and stride in _WORDS
        and kernel % stride == 0
        and obs.shape[3] % stride == 0
    )


def _verdict(agrees: Callable[..., bool], case: tuple[Hashable, ...]) -> bool:
    """Whether two ways give the same bits for operands of these shapes; compared once a process."""
    key = (agrees, case)
    if key not in _verdicts:
        if len(_verdicts) >= _MAX_CASES:
            _verdicts.clear()
        _verdicts[key] = agrees(*case)
    return _verdicts[key]


def _strip_agrees(
    shape: tuple[int, ...], kernel: int, stride: int, patches: int, threads: int, widths: tuple[int, ...]
) -> bool:
    """A strip of so many patches for all columns together with the whole images (`shape`) for each column alone."""
    generator = torch.Generator().manual_seed(0)
    obs = torch.randint(0, 256, (1, *shape[1:]), dtype=torch.uint8, generator=generator).repeat(shape[0], 1, 1, 1)
    weights = [torch.randn(width, shape[1], kernel, kernel, generator=generator) for width in widths]
    biases = [torch.randn(width, generator=generator) for width in widths]
    wanted = [F.conv2d(obs.to(torch.float32), *wb, stride=stride) for wb in zip(weights, biases, strict=True)]
    where = _some(wanted[0][:, 0].numel(), patches, generator)
    found = _read_strip(strip_of_patches(obs.numpy(), where, kernel, stride), (torch.cat(weights), torch.cat(biases)))
    return torch.equal(found[:, : len(where)], torch.cat([_at(maps, where) for maps in wanted]))


def _projection_agrees(
    batch: int, positions: int, patches: int, threads: int, widths: tuple[int, ...], reads: tuple[tuple[int, int], ...]
) -> bool:
    """One product for the adapters of all columns at so many positions with one product an image and adapter."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(batch, sum(widths), positions, generator=generator).relu_()
    weights = [torch.randn(width, sum(widths[:count]), generator=generator) for count, width in reads]
    biases = [torch.randn(len(weight), generator=generator) for weight in weights]
    wanted = [adapted(maps[:, : w.shape[1]], w, c) for w, c in zip(weights, biases, strict=True)]
    where = _some(batch * positions, patches, generator)
    stairs = _staircase(weights)
    found = torch.zeros(stairs.shape[1], patches)
    found[:, : len(where)] = _at(maps[:, : len(found)], where)
    products = torch.addmm(torch.cat(biases).unsqueeze(1), stairs, found).relu_()
    return torch.equal(products[:, : len(where)], torch.cat([_at(z, where) for z in wanted]))


def _some(count: int, most: int, generator: torch.Generator) -> np.ndarray:
    return np.sort(torch.randperm(count, generator=generator)[:most].numpy())


def _at(maps: Tensor, where: np.ndarray) -> Tensor:
    """(B, M, ...) at indices into (B, ...), flattened: (M, N)."""
    return maps.transpose(0, 1).flatten(1)[:, torch.from_numpy(where)]
