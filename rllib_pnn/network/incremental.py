"""The lower layers of columns on the frames of a game: only what differs from the frame before is computed again.

From one step to the next most pixels of most games stay as they were (in Pong, a kernel of layer 1 meets a changed one
at 8 of 100 positions, one of layer 2 at 26), and so does what reads them: layers 1 and 2, most of a column's arithmetic
when it acts, and what the adapters of layer 2 project.

The patches of layer 1 that changed are put side by side into one long image, which an ordinary convolution then reads;
those of layer 2 are rows of a matrix. That gives exactly the bits that whole images would give; it was seen to, on this
machine, for this shape, or it is not done (promise 1 of DESIGN.md; together.py says why shapes decide).

Maps are kept as rows, (B * H * W, M): a position's numbers are in one piece, and so is a patch's row of pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rllib_pnn.network.adapter import adapted
from rllib_pnn.network.column import Column, Lower
from rllib_pnn.network.patches import changed_patches, is_supported, positions_above, row_starts, strip_of_patches
from rllib_pnn.network.together import first_layers

MAX_CHANGED_ABOVE = 0.5  # of all positions of layer 2; with more of them all are computed
_MAX_WAIT = 256  # calls
_FILLED = 128  # patches of layer 2; filled up to a multiple, so that few shapes are met
_MAX_CASES = 1024
_verdicts: dict[Hashable, bool] = {}

_Affine = tuple[Tensor, Tensor]  # weight and bias
_Size = tuple[int, int]  # H, W
_Read = tuple[int, int]  # kernel, stride


def pays(changed: int, total: int, num_columns: int) -> bool:
    """Whether it takes less time to compute so many positions of layer 1 than all of them, and what lies above.

    Microseconds of one core (Zen 4, the `atari` column; docs/performance.md), of which the ratios matter: every call
    has a fixed cost, which few environments of a single column do not make up for.
    """
    return 500 + changed * (0.2 + 0.24 * num_columns) <= total * (0.145 * num_columns - 0.06)


class StepMaps(NamedTuple):
    """h_1 of columns side by side, (B, M, H, W), for one step: as a whole, and what differs from the step before."""

    parts: list[Tensor]  # (B * H * W, M_j) of every column
    shape: tuple[int, int, int, int]
    number: int  # of the step; the same as long as nothing changes
    follows: int = -1  # the step that differs by `changes` from this one
    changes: tuple[np.ndarray, Tensor] | None = None  # (n,) sorted indices into (B, H, W), flattened; (n, M) there

    def whole(self) -> Tensor:
        """(B, M, H, W), a new tensor."""
        out = self.parts[0].new_empty(self.shape)
        batch, _, height, width = self.shape
        for target, part in zip(out.split([p.shape[1] for p in self.parts], 1), self.parts, strict=True):
            target.copy_(part.view(batch, height, width, -1).permute(0, 3, 1, 2))
        return out

    def copy(self) -> StepMaps:
        """One that stays valid."""
        return self._replace(parts=[part.clone() for part in self.parts])


class KnownLayers(NamedTuple):
    """What is known of columns' lower layers. Valid until the next call of what gave it."""

    lower: list[Lower]  # of every column
    sources: StepMaps | None  # h_1 of those that others read

    @property
    def reads_sources(self) -> bool:
        """Whether a layer that is not known may read h_1 of the sources."""
        return any(lower.number == 1 and lower.projected is None for lower in self.lower)


class _Upper(NamedTuple):
    """Layer 2 as matrices that read patches pixel by pixel, (M_2, k * k * M); `lateral` reads what the adapter made."""

    weight: Tensor
    bias: Tensor
    lateral: Tensor | None

    @classmethod
    def of(cls, column: Column) -> _Upper:
        layer, adapter = column.layers[1], column.map_adapter
        assert isinstance(layer, nn.Conv2d) and layer.bias is not None
        lateral = None if adapter is None or adapter.out is None else _matrix(adapter.out.weight)
        return cls(_matrix(layer.weight), layer.bias.detach().clone().unsqueeze(1), lateral)


class _Known:
    """A column whose maps are kept, and the weights that made them.

    Args:
        obs: (B, C, H, W) floats, of which its maps are computed.
        sources: (B, sum of maps, H_1, W_1), h_1 of the columns that it reads.
        first: its own h_1 if that is known.
        with_upper: whether layer 2 is kept, too.
    """

    def __init__(
        self, column: Column, obs: Tensor, sources: Tensor | None, first: Tensor | None, with_upper: bool
    ) -> None:
        self.column = column
        adapter = column.map_adapter
        parts: list[nn.Module] = [column.layers[0]]
        if with_upper:
            parts.append(column.layers[1])
        if adapter is not None:
            parts += [adapter.project_layer, *([adapter.out] if with_upper and adapter.out is not None else [])]
        used = [] if column.is_frozen else [p for part in parts for p in part.parameters()]
        if adapter is not None and not column.is_frozen:
            used.append(adapter.scale)
        self._parameters = [(p.detach(), p.detach().clone()) for p in used]
        self.affine = _copies(column.first_affine())
        self.projection = None if adapter is None else _copies(adapter.map_affine())
        self.upper = _Upper.of(column) if with_upper else None
        self.is_current = True  # whether the maps belong to the observation seen last

        if first is None:
            first = _convolved(obs, column)
        projected = None if adapter is None or sources is None else adapter.project(sources[:, : adapter.num_features])
        self.size: _Size = (first.shape[2], first.shape[3])
        self.rows = _rows(first)
        self.projected = None if projected is None else _rows(projected)
        self.above = _above(column, first, projected) if with_upper else None  # h_2, (B, M_2, H_2, W_2)

    @property
    def width(self) -> int:
        return len(self.affine[1])

    def is_usable(self) -> bool:
        """Whether the maps are what the column would make of the observation seen last."""
        return self.is_current and all(torch.equal(now, then) for now, then in self._parameters)

    def maps(self, batch: int) -> Tensor:
        return _planar(self.rows, batch, self.size)

    def projected_maps(self, batch: int) -> Tensor | None:
        return None if self.projected is None else _planar(self.projected, batch, self.size)

    def lower(self, batch: int) -> Lower:
        if self.above is not None:
            return Lower(2, self.above)
        return Lower(1, self.maps(batch), self.projected_maps(batch))


class IncrementalLayers:
    """The lower layers of columns for observation after observation of the same environments, without gradient.

    Nothing has to be announced: observations are compared with the last ones, and weights of columns that train with
    those used last. So it is right, if of no use, for observations that have nothing to do with each other. Where too
    much of an image changes it gives up and tries again after a while.

    Args:
        keeps_changes: networks shall give h_1 of the sources as `StepMaps`, for `ChangingMaps` to record.

    >>> incremental = IncrementalLayers()
    >>> net = ProgressiveNetwork((4, 84, 84), num_outputs=6)
    >>> logits, value, _ = net(obs, incremental=incremental)
    """

    def __init__(self, *, keeps_changes: bool = False) -> None:
        self.keeps_changes = keeps_changes
        self._seen: np.ndarray | None = None  # (B, C, H, W) bytes
        self._known: list[_Known] = []
        self._above: _Read | None = None  # how layer 2 reads; None where it is left alone
        self._operands: tuple[list[_Known], _Affine, _Affine | None] | None = None
        self._number = self._skip = self._wait = 0

    @torch.no_grad()
    def __call__(self, obs: Tensor, sources: Sequence[Column], newest: Column | None = None) -> KnownLayers | None:
        """h_1 or h_2 of these columns.

        Args:
            obs: (B, C, H, W) bytes in torch's default layout.
            sources: columns that others read, oldest first.
            newest: a column that reads them and is read by none.

        Returns:
            None where the ordinary way is the better or the only one: other observations, layers of several shapes, an
            image much of which has changed, few environments (see `pays`).
        """
        columns = [*sources, *([] if newest is None else [newest])]
        if self._skip:
            self._skip -= 1
            return None
        total = len(obs) * math.prod(columns[0].shapes[1][1:])  # positions
        layer = common_convolution(columns, 1) if pays(0, total, len(columns)) else None
        if layer is None or not is_supported(obs, layer):
            self._seen = None
            return None
        pixels = obs.numpy()
        if self._seen is None or self._seen.shape != pixels.shape or not self._knows(columns):
            return self._begin(obs, columns, len(sources))
        read = layer.kernel_size[0], layer.stride[0]
        changed = changed_patches(pixels, self._seen, *read)
        if not pays(len(changed), total, len(columns)):
            self._seen = None
            self._skip = self._wait = min(2 * self._wait + 1, _MAX_WAIT)
            return None
        self._wait = 0
        # The first that has no use ends the row: it is the newest as a rule, and the last.
        usable = list(itertools.takewhile(_Known.is_usable, self._known[: len(columns)]))
        rows = torch.empty(0, sum(known.width for known in usable))
        if len(changed) and usable:
            found = self._update(pixels, changed, usable, read)
            if found is None:
                return self._begin(obs, columns, len(sources))
            rows = found
        np.copyto(self._seen, pixels)
        follows = self._number
        self._number += bool(len(changed))
        for later in self._known[len(columns) :]:
            later.is_current = False
        if len(usable) < len(columns):
            self._renew(obs.to(torch.float32), columns, len(usable))
        changes = (changed, rows) if len(usable) >= len(sources) else None
        return self._layers(columns, len(sources), follows, changes)

    def _knows(self, columns: Sequence[Column]) -> bool:
        """Also without the newest that was there before."""
        known = [k.column for k in self._known[: len(columns)]]
        return len(self._known) - len(columns) in (0, 1) and _same_items(known, columns)

    def _layers(
        self,
        columns: Sequence[Column],
        num_sources: int,
        follows: int = -1,
        changes: tuple[np.ndarray, Tensor] | None = None,
    ) -> KnownLayers:
        assert self._seen is not None
        batch, known = len(self._seen), self._known[: len(columns)]
        if not num_sources:
            return KnownLayers([k.lower(batch) for k in known], None)
        parts = [k.rows for k in known[:num_sources]]
        width = sum(part.shape[1] for part in parts)
        if changes is not None:
            changes = changes[0], changes[1][:, :width]
        maps = StepMaps(parts, (batch, width, *known[0].size), self._number, follows, changes)
        return KnownLayers([k.lower(batch) for k in known], maps)

    def _begin(self, obs: Tensor, columns: Sequence[Column], num_sources: int) -> KnownLayers:
        """Computes all of it and remembers it."""
        h, firsts = obs.to(torch.float32), None
        joint = first_layers(h, columns)
        if joint is not None:
            firsts = [part.contiguous() for part in joint.split([column.shapes[1][0] for column in columns], 1)]
        self._seen = obs.numpy().copy()
        self._number += 1
        self._known = []
        self._above = _reading_of_layer_2(columns)
        self._renew(h, columns, 0, firsts)
        return self._layers(columns, num_sources)

    def _renew(self, obs: Tensor, columns: Sequence[Column], first: int, maps: Sequence[Tensor] | None = None) -> None:
        """Computes the maps of columns from the `first` on as a whole. `obs` are floats, `maps` their h_1 if known."""
        sources = [known.maps(len(obs)) for known in self._known[:first]] if columns[-1].map_adapter else []
        for j in range(first, len(columns)):
            column = columns[j]
            before = torch.cat(sources[: column.num_sources], 1) if column.map_adapter else None
            known = _Known(column, obs, before, None if maps is None else maps[j], self._above is not None)
            self._known[j : j + 1] = [known]
            if j + 1 < len(columns):
                sources.append(known.maps(len(obs)))

    def _update(self, pixels: np.ndarray, changed: np.ndarray, known: list[_Known], read: _Read) -> Tensor | None:
        """Computes the changed positions of the first columns anew.

        Returns:
            h_1 of these columns there, (n, sum of maps). None, changing nothing, where bits forbid it.
        """
        strip = strip_of_patches(pixels, changed, *read)
        count, positions = strip.shape[3] // read[0], len(known[0].rows) // len(pixels)
        threads = torch.get_num_threads()
        widths = tuple(k.width for k in known)
        reads = tuple((k.column.num_sources, len(k.projection[1])) for k in known if k.projection is not None)
        if not _verdict(_strip_agrees, (pixels.shape, *read, count, threads, widths)):
            return None
        if reads and not _verdict(_projection_agrees, (len(pixels), positions, count, threads, widths, reads)):
            return None
        affine, projection = self._get_operands(known)
        found = _read_strip(strip, affine).relu_()
        rows = found.t().contiguous()[: len(changed)]
        for k, part in zip(known, rows.split(widths, 1), strict=True):
            k.rows.numpy()[changed] = part.numpy()
        if projection is not None:
            products = torch.addmm(projection[1].unsqueeze(1), projection[0], found[: projection[0].shape[1]]).relu_()
            parts = products.t().contiguous()[: len(changed)].split([width for _, width in reads], 1)
            targets = [k.projected for k in known if k.projected is not None]
            for target, part in zip(targets, parts, strict=True):
                target.numpy()[changed] = part.numpy()
        if self._above is not None:
            self._update_above(len(pixels), changed, known, self._above)
        return rows

    def _update_above(self, batch: int, changed: np.ndarray, known: list[_Known], read: _Read) -> None:
        """Layer 2 of the first columns, where it reads what changed in layer 1; as a whole where bits forbid it."""
        size = known[0].size
        image, position = positions_above(changed, batch, size, *read)
        above = known[0].above
        assert above is not None
        count = -(-len(image) // _FILLED) * _FILLED
        starts = None
        if len(image) <= MAX_CHANGED_ABOVE * batch * above[0, 0].numel():
            starts = _starts(image, position, count, size, *read)
        for k in known:
            assert k.above is not None and k.upper is not None
            if starts is None or not self._may_read_rows(batch, size, k, read, count):
                k.above = _above(k.column, k.maps(batch), k.projected_maps(batch))
                continue
            products = _read_rows(k.rows, starts, read[0], k.upper.weight, k.upper.bias)
            if k.upper.lateral is not None and k.projected is not None:
                products.add_(_read_rows(k.projected, starts, read[0], k.upper.lateral))
            products.relu_()
            k.above.flatten(2).numpy()[image, :, position] = products.numpy()[:, : len(image)].T

    @staticmethod
    def _may_read_rows(batch: int, size: _Size, known: _Known, read: _Read, count: int) -> bool:
        assert known.upper is not None
        case = (batch, size, read, count, torch.get_num_threads(), len(known.upper.bias))
        if not _verdict(_rows_agree, (*case, known.width, True)):
            return False
        return known.projected is None or _verdict(_rows_agree, (*case, known.projected.shape[1], False))

    def _get_operands(self, known: list[_Known]) -> tuple[_Affine, _Affine | None]:
        if self._operands is None or not _same_items(self._operands[0], known):
            weights, biases = zip(*(k.affine for k in known), strict=True)
            affines = [k.projection for k in known if k.projection is not None]
            projection = None
            if affines:
                projection = _staircase([weight for weight, _ in affines]), torch.cat([bias for _, bias in affines])
            self._operands = known, (torch.cat(weights), torch.cat(biases)), projection
        return self._operands[1:]


def _read_strip(strip: Tensor, affine: _Affine) -> Tensor:
    """What layer 1 makes of the patches, (sum of maps, N), before its ReLU."""
    return F.conv2d(strip, *affine, stride=strip.shape[2])[0, :, 0]


def _starts(image: np.ndarray, position: np.ndarray, count: int, size: _Size, kernel: int, stride: int) -> Tensor:
    """(count * kernel,): the first pixel of every row of these patches, among rows (B * H * W, M).

    `position` counts a convolution's outputs; what is missing in `count` is filled up with any.
    """
    starts = np.zeros((count, kernel), np.int64)
    first = row_starts(size, kernel, stride)[position]
    np.add(first, (image * (size[0] * size[1]))[:, None], out=starts[: len(image)])
    return torch.from_numpy(starts.reshape(-1))


def _read_rows(rows: Tensor, starts: Tensor, kernel: int, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b for the patches whose rows start there, (M', N).

    Args:
        rows: (B * H * W, M).
        starts: (N * kernel,).
        weight: (M', kernel * kernel * M). bias: (M', 1).
    """
    maps = rows.shape[1]
    runs = rows.as_strided((len(rows) - kernel + 1, kernel * maps), (maps, 1))  # of `kernel` pixels; they overlap
    patches = runs.index_select(0, starts).view(-1, kernel * kernel * maps).t()
    return weight @ patches if bias is None else torch.addmm(bias, weight, patches)


def _convolved(obs: Tensor, column: Column) -> Tensor:
    layer = column.layers[0]
    assert isinstance(layer, nn.Conv2d)
    return F.conv2d(obs, *column.first_affine(), layer.stride, layer.padding).relu_()


def _above(column: Column, first: Tensor, projected: Tensor | None) -> Tensor:
    """h_2 of whole maps, as the column computes it."""
    layer, adapter = column.layers[1], column.map_adapter
    assert isinstance(layer, nn.Conv2d)
    pre = F.conv2d(first, layer.weight, layer.bias, layer.stride, layer.padding)
    if adapter is not None and projected is not None:
        assert adapter.out is not None
        pre.add_(adapter.out(projected))
    return pre.relu_()


def _matrix(weight: Tensor) -> Tensor:
    """A convolution's weight (M', M, k, k) for patches that lie pixel by pixel, (M', k * k * M); a copy."""
    return weight.detach().permute(0, 2, 3, 1).flatten(1).clone()


def _rows(maps: Tensor) -> Tensor:
    """(B, M, H, W) -> (B * H * W, M), a copy."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2).clone(memory_format=torch.contiguous_format)


def _planar(rows: Tensor, batch: int, size: _Size) -> Tensor:
    """(B * H * W, M) -> (B, M, H, W), a copy."""
    return rows.view(batch, *size, -1).permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)


def _copies(affine: _Affine) -> _Affine:
    weight, bias = affine
    return weight.detach().clone(), bias.detach().clone()


def _same_items(a: Sequence[object], b: Sequence[object]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _staircase(weights: Sequence[Tensor]) -> Tensor:
    """One matrix below the other, each filled up with zeros to the widest: a product with it adds nothing but zeros."""
    width = max(weight.shape[1] for weight in weights)
    return torch.cat([F.pad(weight, (0, width - weight.shape[1])) for weight in weights])


def common_convolution(columns: Sequence[Column], number: int) -> nn.Conv2d | None:
    """The first column's layer of this number if all columns' are of its shape, but for the number of maps."""
    layers = [column.layers[number - 1] if len(column.layers) >= number else None for column in columns]
    first = layers[0]
    if not isinstance(first, nn.Conv2d):
        return None
    geometry = (first.kernel_size, first.stride, first.padding)
    for layer in layers[1:]:
        if not isinstance(layer, nn.Conv2d) or (layer.kernel_size, layer.stride, layer.padding) != geometry:
            return None
    return first


def _reading_of_layer_2(columns: Sequence[Column]) -> _Read | None:
    """Kernel and stride of layer 2, if in all columns it reads nothing but maps of their own and an adapter's."""
    layer = common_convolution(columns, 2)
    if layer is None or layer.padding not in (0, (0, 0)):
        return None
    if any(column.lateral("2") is not column.map_adapter for column in columns):
        return None
    return layer.kernel_size[0], layer.stride[0]


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


def _rows_agree(
    batch: int, size: _Size, read: _Read, patches: int, threads: int, out: int, maps: int, with_bias: bool
) -> bool:
    """A product of so many patches with an ordinary convolution of whole maps."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, maps, *size, generator=generator).relu_()
    weight = torch.randn(out, maps, read[0], read[0], generator=generator)
    bias = torch.randn(out, generator=generator) if with_bias else None
    wanted = F.conv2d(images, weight, bias, read[1])
    where = _some(wanted[:, 0].numel(), patches, generator)
    starts = _starts(*np.divmod(where, wanted[0, 0].numel()), patches, size, *read)
    column = None if bias is None else bias.unsqueeze(1)
    found = _read_rows(_rows(images), starts, read[0], _matrix(weight), column)
    return torch.equal(found[:, : len(where)], _at(wanted, where))


def _some(count: int, most: int, generator: torch.Generator) -> np.ndarray:
    return np.sort(torch.randperm(count, generator=generator)[:most].numpy())


def _at(maps: Tensor, where: np.ndarray) -> Tensor:
    """(B, M, ...) at indices into (B, ...), flattened: (M, N)."""
    return maps.transpose(0, 1).flatten(1)[:, torch.from_numpy(where)]
