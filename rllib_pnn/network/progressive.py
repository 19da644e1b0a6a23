"""The progressive network: columns that grow one by one and never change afterwards. Plain torch, no Ray.

Rusu et al. 2016 (arXiv 1606.04671), section 2. The equations stand in column.py and adapter.py; this file holds
what concerns all columns together: growth, freezing, inference through any column, and the activations of frozen
columns as data, so that a training loop computes them once per observation however often it learns from it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rllib_pnn.network.adapter import LATERALS
from rllib_pnn.network.column import (
    ALIGNMENT,
    HEADS,
    Column,
    ColumnLayout,
    ColumnOutput,
    Lower,
    LSTMState,
    Transform,
    check_source,
    layer_shapes,
)
from rllib_pnn.network.incremental import IncrementalLayers, KnownLayers, StepMaps
from rllib_pnn.network.repeats import ChangingMaps, common_depth, lower_layers, numbered_lower_layers
from rllib_pnn.network.spec import ColumnSpec
from rllib_pnn.network.together import Graph, SideBySide, first_layers


class ProgressiveNetwork(nn.Module):
    """A stack of columns, one per task; starts with none: call `add_column()` for the first.

    Args:
        observation_shape: (C, H, W), (H, W, C) with 1, 3 or 4 channels last, or (C,); without batch axes.
        num_outputs: A, the policy head's outputs: actions of a Discrete space, twice the dimensions of a Box.
        spec: what new columns are made of (see `ColumnSpec`).
        lateral: `"adapter"` (eq. 2), `"linear"` (eq. 1) or `"none"`.
        lateral_scale: initial alpha of eq. 2; the paper takes 1, 0.1 or 0.01.
        lateral_heads: whether policy and value heads have laterals (Rusu et al. 2016: yes, 2017: no).
        input_scale: factor on observations; None means 1/255 for image shapes (bytes) and 1 for vectors.
        seed: column k is initialised from (seed, k) alone: equal on all machines of a kind, whatever happened before.

    Raises:
        ValueError: with one line that names the argument.

    >>> net = ProgressiveNetwork((4, 84, 84), num_outputs=6)
    >>> net.add_column()
    0
    >>> fingerprint = net.freeze()
    >>> net.add_column()
    1
    >>> logits, value, _ = net(torch.zeros(2, 4, 84, 84, dtype=torch.uint8))
    """

    def __init__(
        self,
        observation_shape: Sequence[int],
        num_outputs: int,
        spec: Any = "atari",
        *,
        lateral: str = "adapter",
        lateral_scale: float = 0.1,
        lateral_heads: bool = True,
        input_scale: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        shape = tuple(int(n) for n in observation_shape)
        if len(shape) not in (1, 3) or min(shape, default=0) < 1:
            raise ValueError(f"observation_shape: expected (C, H, W), (H, W, C) or (C,), got {shape}")
        if num_outputs < 1:
            raise ValueError(f"num_outputs: expected at least 1, got {num_outputs}")
        if lateral not in LATERALS:
            raise ValueError(f"lateral: expected one of {', '.join(LATERALS)}, got {lateral!r}")
        for name, number in (("lateral_scale", lateral_scale), ("input_scale", input_scale)):
            if number is not None and not math.isfinite(number):
                raise ValueError(f"{name}: expected a finite number, got {number!r}")
        self.channels_last_input = len(shape) == 3 and shape[2] in (1, 3, 4) and shape[0] not in (1, 3, 4)
        self.given_observation_shape = shape
        self.observation_shape = (shape[2], shape[0], shape[1]) if self.channels_last_input else shape
        self.num_outputs = int(num_outputs)
        self.spec = ColumnSpec.parse(spec)
        layer_shapes(self.spec, self.observation_shape)
        self.lateral = lateral
        self.lateral_scale = float(lateral_scale)
        self.lateral_heads = bool(lateral_heads)
        self.input_scale = float(input_scale) if input_scale is not None else (1 / 255 if len(shape) == 3 else 1.0)
        self.seed = int(seed)
        self.columns: list[Column] = nn.ModuleList()  # type: ignore[assignment]

    # -- growth --------------------------------------------------------------------------------------------------

    @property
    def num_columns(self) -> int:
        return len(self.columns)

    @property
    def is_recurrent(self) -> bool:
        return any(column.state_width for column in self.columns) or self.spec.is_recurrent

    def add_column(
        self,
        spec: Any = None,
        *,
        lateral: str | None = None,
        copy_of: int | None = None,
        trains: str = "all",
        input_shift: float = 0.0,
    ) -> int:
        """Freezes all columns and adds one with laterals from each of them; returns its index.

        Args:
            spec: of the new column; None means the network's. Convolutions must stand in the same layers, with the
                same map sizes, as in earlier columns.
            lateral: None means the network's; `"none"` gives a column that ignores the earlier ones (baseline 1).
            copy_of: start from a copy of this column's parameters, its laterals included (baselines 2 and 3).
            trains: `"all"`, or `"heads"` for output-layer fine-tuning (baseline 2).
            input_shift: taken from every scaled observation by this column; a task's typical pixel (0 to 1), so that
                a plain background is 0 and does not drown what moves. A copy keeps the original's.

        Raises:
            ValueError: the specification does not fit the earlier columns; nothing is added then.
        """
        index = len(self.columns)
        if copy_of is not None:
            if spec is not None or lateral is not None:
                raise ValueError(
                    "copy_of: a copy has the original's layers and laterals; give neither spec nor lateral"
                )
            column = copy.deepcopy(self.columns[self._index(copy_of)])
            column.fingerprint = None
        else:
            generator = torch.Generator().manual_seed(_column_seed(self.seed, index))
            column = Column.initialised(self._next_layout(spec, lateral, input_shift), self.input_scale, generator)
        column.set_trained_part(trains)
        column.to(self.device)
        self.freeze()
        self.columns.append(column)
        return index

    def append_column(self, column: Column) -> int:
        """Freezes all columns and appends one that was built elsewhere (a store, a checkpoint); its layout must fit."""
        specs = tuple(c.layout.spec for c in self.columns)[: column.num_sources]
        layout = column.layout
        if (layout.observation_shape, layout.num_outputs) != (self.observation_shape, self.num_outputs):
            raise ValueError(
                f"column {len(self.columns)}: made for observations {layout.observation_shape} and "
                f"{layout.num_outputs} outputs, the network has {self.observation_shape} and {self.num_outputs}"
            )
        if layout.source_specs != specs:
            raise ValueError(
                f"column {len(self.columns)}: its laterals read {column.num_sources} columns "
                f"{[s.name for s in layout.source_specs]}, the network has {[s.name for s in specs]}"
            )
        column.to(self.device)
        self.freeze()
        self.columns.append(column)
        return len(self.columns) - 1

    def freeze(self) -> str | None:
        """Freezes every column and returns the newest one's fingerprint (None without columns)."""
        return [column.freeze() for column in self.columns][-1] if self.columns else None

    def fingerprints(self) -> list[str | None]:
        """SHA-256 of every frozen column as hex; None for one that still trains."""
        return [column.fingerprint for column in self.columns]

    def verify(self) -> None:
        """Raises `ValueError` naming the first frozen column whose parameters changed since its freezing."""
        for index, column in enumerate(self.columns):
            try:
                column.verify()
            except ValueError as error:
                raise ValueError(f"column {index}: {error}") from None

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that get gradients: those of the newest column, unless it is frozen."""
        return [p for p in self.parameters() if p.requires_grad]

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def _next_layout(self, spec: Any, lateral: str | None, input_shift: float) -> ColumnLayout:
        spec = self.spec if spec is None else ColumnSpec.parse(spec)
        lateral = self.lateral if lateral is None else lateral
        if lateral not in LATERALS:
            raise ValueError(f"lateral: expected one of {', '.join(LATERALS)}, got {lateral!r}")
        sources = () if lateral == "none" else tuple(column.layout.spec for column in self.columns)
        shapes = layer_shapes(spec, self.observation_shape)
        for j, source in enumerate(sources):
            try:
                check_source(shapes, j, layer_shapes(source, self.observation_shape))
            except ValueError as error:
                raise ValueError(f"column {len(self.columns)}: {error}") from None
        return ColumnLayout(
            self.observation_shape,
            self.num_outputs,
            spec,
            lateral,
            self.lateral_heads,
            self.lateral_scale,
            sources,
            float(input_shift),
        )

    def _index(self, column: int) -> int:
        if not -len(self.columns) <= column < len(self.columns):
            mend = "" if len(self.columns) else "; call add_column() first"
            raise ValueError(f"column {column}: the network has {len(self.columns)} columns{mend}")
        return range(len(self.columns))[column]

    # -- inference -----------------------------------------------------------------------------------------------

    def forward(
        self,
        obs: Tensor,
        column: int = -1,
        state: Mapping[str, Tensor] | None = None,
        sources: Mapping[int, Tensor] | None = None,
        *,
        resets: Tensor | None = None,
        transform: Transform | None = None,
        heads: Collection[str] = HEADS,
        incremental: IncrementalLayers | None = None,
        num_envs: int | None = None,
        patches: Sequence[Tensor] = (),
    ) -> ColumnOutput:
        """Policy and value of one column.

        Args:
            obs: (B, *observation_shape), or (B, T, *observation_shape) for recurrent networks; bytes or floats.
            column: which column; negative counts from the newest.
            state: LSTM states of **all** columns, `{"h": (B, S), "c": (B, S)}`, as `initial_state` gives them.
            sources: the result of `sources()` for the same obs, to skip computing earlier columns again; (T, N, ...)
                where `num_envs` is given. Layer 1's may be `StepMaps`, or `ChangingMaps` of T steps.
            resets: (B, T) bool, true where an episode starts (LSTM states are zeroed before that step).
            transform: `(column, layer, activation) -> activation` on every post-activation output.
            heads: `("policy",)` or `("value",)` where the other is of no use: with laterals from seven columns a head
                is a dense layer of 460,000 weights.
            incremental: the caller's, for observations that follow each other: what it has of the last ones is used
                where that changes no bit. Without effect where gradients are recorded.
            num_envs: obs are time steps of so many environments, time-major: obs[i] follows obs[i - num_envs]. Patches
                that they repeat are then computed once where gradients are recorded (see repeats.py).
            patches: their numbers by `number_patches`, of layer 1, 2, ... Those that repeat are computed once, the
                sources' layer 1 too, which `sources` need not hold where `reads_same_patches(column)`.

        Returns:
            `ColumnOutput`; the state has the shape that came in, columns above `column` unchanged.
        """
        return self._evaluate(
            obs, column, state, sources, resets, transform, heads, incremental, num_envs, patches, False
        )[0]

    def forward_with_sources(
        self,
        obs: Tensor,
        column: int = -1,
        state: Mapping[str, Tensor] | None = None,
        *,
        resets: Tensor | None = None,
        heads: Collection[str] = HEADS,
        incremental: IncrementalLayers | None = None,
    ) -> tuple[ColumnOutput, dict[int, Tensor]]:
        """`forward` and the activations that `sources` gives in one pass; less work than one after the other.

        With `incremental` those activations are valid until its next use, and layer 1's are `StepMaps` if it keeps
        changes and the network is not recurrent.
        """
        return self._evaluate(obs, column, state, None, resets, None, heads, incremental, None, (), True)

    def _evaluate(
        self,
        obs: Tensor,
        column: int,
        state: Mapping[str, Tensor] | None,
        given: Mapping[int, Any] | None,
        resets: Tensor | None,
        transform: Transform | None,
        heads: Collection[str],
        incremental: IncrementalLayers | None,
        num_envs: int | None,
        patches: Sequence[Tensor],
        with_sources: bool,
    ) -> tuple[ColumnOutput, dict[int, Any]]:
        k = self._index(column)
        obs, time_shape = self._prepare(obs)
        leading = time_shape or (len(obs),)
        states = self._split_state(state, time_shape)
        new_states = dict(states)
        learns = torch.is_grad_enabled() and not self.columns[k].is_frozen
        newest = self.columns[k]
        known: KnownLayers | None = None
        if incremental is not None and transform is None and not learns:
            known = incremental(obs, self._sources_of(newest), newest)
        steps = leading if num_envs is None else (len(obs) // num_envs, num_envs)
        if math.prod(steps) != len(obs):
            raise ValueError(f"num_envs: {len(obs)} observations are no time steps of {num_envs} environments")
        pixels: Tensor | None = None
        lower: Lower | None = None
        sources: dict[int, Any]
        if given is not None:
            unread = {1} if patches and transform is None and self.reads_same_patches(k) else set()
            sources = self._check_sources(given, k, steps, unread)
        else:
            found, first, pixels = self._compute_sources(
                obs, k, states, new_states, time_shape, resets, transform, known, with_first=not learns
            )
            sources = _unflattened(found, steps)
            lower = None if first is None else Lower(1, first)
        if known is not None:
            lower = known.lower[-1]
            if with_sources and known.sources is not None and 1 in newest.reads:
                sources[1] = self._first_of_sources(known.sources, incremental, time_shape)
        elif patches and transform is None:
            lower = numbered_lower_layers(obs, patches, newest, sources, self._sources_of(newest))
        elif num_envs is not None and learns and transform is None:
            lower = lower_layers(obs, num_envs, newest, sources, self._sources_of(newest))
        # What no layer to come reads need not be brought into shape.
        lowest = 0 if lower is None else lower.number + (lower.projected is not None)
        # Gradients of convolutions come faster on channels-last memory. Frozen columns, and a column that is only
        # asked, always see the default layout, so that freezing changes no bit of what is computed.
        layout = torch.channels_last if learns and obs.dim() == 4 else torch.contiguous_format
        if lower is not None:
            pixels = obs  # nothing reads them any more
        elif pixels is None or layout is torch.channels_last:
            pixels = self._to_float(obs, layout)
        logits, value, new_states[k] = newest(
            pixels,
            {n: _whole(source).flatten(0, len(steps) - 1) for n, source in sources.items() if n >= lowest},
            states.get(k),
            time_shape=time_shape,
            resets=resets,
            index=k,
            transform=transform,
            lower=lower,
            heads=heads,
        )
        absent = torch.empty(0, device=self.device)
        logits = absent if logits is None else logits.view(*leading, logits.shape[1])
        value = absent if value is None else value.view(leading)
        return ColumnOutput(logits, value, self._join_state(new_states)), dict(sorted(sources.items()))

    @torch.no_grad()
    def sources(
        self,
        obs: Tensor,
        column: int = -1,
        state: Mapping[str, Tensor] | None = None,
        *,
        resets: Tensor | None = None,
        incremental: IncrementalLayers | None = None,
    ) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        """Activations of the earlier columns that `column`'s laterals read, h^{<k} by layer, without gradient.

        Args:
            obs, column, state, resets, incremental: as in `forward`.

        Returns:
            `{layer: (B, sum of widths, ...)}` ((B, T, ...) if recurrent), to be passed to `forward(sources=...)`, layer
            1's as `StepMaps` if `incremental` keeps changes and the network is not recurrent; and the LSTM state after
            the last step, in which only the earlier columns have moved.
        """
        k = self._index(column)
        obs, time_shape = self._prepare(obs)
        states = self._split_state(state, time_shape)
        new_states = dict(states)
        columns = self._sources_of(self.columns[k])
        known = incremental(obs, columns) if incremental is not None and columns else None
        found, _, _ = self._compute_sources(
            obs, k, states, new_states, time_shape, resets, None, known, with_first=False
        )
        out: dict[int, Any] = _unflattened(found, time_shape or (len(obs),))
        if known is not None:  # what this gives stays valid
            out = {n: source.clone() for n, source in out.items()}
            if known.sources is not None and 1 in self.columns[k].reads:
                first = self._first_of_sources(known.sources, incremental, time_shape)
                out[1] = first.copy() if isinstance(first, StepMaps) else first
        return dict(sorted(out.items())), self._join_state(new_states)

    def activations(
        self,
        obs: Tensor,
        column: int = -1,
        state: Mapping[str, Tensor] | None = None,
        *,
        transform: Transform | None = None,
    ) -> tuple[list[list[Tensor]], ColumnOutput]:
        """Post-activation outputs h_1..h_L of every column up to `column`, with gradients all the way.

        Returns:
            `activations[j][i - 1]` is h_i of column j, (B, n, ...) ((B*T, n, ...) if recurrent), and `column`'s output.
        """
        collected: dict[tuple[int, int], Tensor] = {}

        def collect(j: int, layer: int, tensor: Tensor) -> Tensor:
            collected[j, layer] = tensor if transform is None else transform(j, layer, tensor)
            return collected[j, layer]

        output = self(obs, column, state, transform=collect)
        columns = sorted({j for j, _ in collected})
        return [[collected[j, i] for i in range(1, len(self.columns[j].layers) + 1)] for j in columns], output

    def initial_state(self, batch_size: int | None = None) -> dict[str, Tensor]:
        """Zero LSTM states of all columns: `{"h": (B, S), "c": (B, S)}`, without B if None; {} if feed-forward."""
        width = sum(column.state_width for column in self.columns)
        if width == 0:
            return {}
        shape = (width,) if batch_size is None else (batch_size, width)
        return {"h": torch.zeros(shape, device=self.device), "c": torch.zeros(shape, device=self.device)}

    def _prepare(self, obs: Tensor) -> tuple[Tensor, tuple[int, int] | None]:
        shape = self.given_observation_shape
        time_shape = None
        if self.is_recurrent:
            if obs.dim() != len(shape) + 2 or obs.shape[2:] != shape:
                raise ValueError(f"obs: expected (B, T, {', '.join(map(str, shape))}), got {tuple(obs.shape)}")
            time_shape = (obs.shape[0], obs.shape[1])
            obs = obs.flatten(0, 1)
        elif obs.dim() != len(shape) + 1 or obs.shape[1:] != shape:
            raise ValueError(f"obs: expected (B, {', '.join(map(str, shape))}), got {tuple(obs.shape)}")
        return obs.permute(0, 3, 1, 2) if self.channels_last_input else obs, time_shape

    def _to_float(self, obs: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        if layout == torch.channels_last and obs.dtype == torch.uint8 and obs.is_contiguous():
            obs = interleaved(obs)  # bytes first: four times less to reorder
        h = obs.to(self.device, torch.float32, memory_format=layout)
        return h.clone() if h.data_ptr() % ALIGNMENT else h

    def _first_of_sources(
        self, maps: StepMaps, incremental: IncrementalLayers | None, time_shape: tuple[int, int] | None
    ) -> Tensor | StepMaps:
        """h_1^{<k} as the caller wants it."""
        if incremental is not None and incremental.keeps_changes and time_shape is None:
            return maps
        return _unflattened({1: maps.whole()}, time_shape or maps.shape[:1])[1]

    def _sources_of(self, column: Column) -> list[Column]:
        """The columns that a column reads; a slice of a ModuleList is a new one, and takes ten times as long."""
        return [*self.columns][: column.num_sources]

    def _compute_sources(
        self,
        obs: Tensor,
        k: int,
        states: Mapping[int, LSTMState],
        new_states: dict[int, LSTMState],
        time_shape: tuple[int, int] | None,
        resets: Tensor | None,
        transform: Transform | None,
        known: KnownLayers | None,
        with_first: bool,
    ) -> tuple[dict[int, Tensor], Tensor | None, Tensor | None]:
        """h^{<k} of every layer that column k reads, h_1 of column k if it came along with theirs, and the observations
        as floats, in torch's default layout, if it took them.

        Columns are computed oldest first, each from the ones before. `known` is what is known of their first layers.
        """
        columns = self._sources_of(self.columns[k])
        read = {n for column in (*columns, self.columns[k]) for n in column.reads}
        if not columns:
            return {}, None, None
        # Without a transform nothing here depends on a parameter that trains.
        records = torch.is_grad_enabled() and transform is not None
        lower: list[Lower | None] = [None] * len(columns)
        first: Tensor | None = None
        if known is not None:
            h, together = obs, None
            lower[:] = known.lower[: len(columns)]
            if known.reads_sources and known.sources is not None:
                together = known.sources.whole()
            else:
                read.discard(1)
        else:
            h = self._to_float(obs)
            together = None if records else first_layers(h, [*columns, *([self.columns[k]] if with_first else [])])
            if together is not None:
                widths = [column.shapes[1][0] for column in columns]
                parts = together.split([*widths, together.shape[1] - sum(widths)], dim=1)
                # Copies: a convolution wants its maps in one piece, and a transform may write into them.
                lower[:] = [Lower(1, part.contiguous()) for part in parts[: len(columns)]]
                first = parts[-1].contiguous() if with_first else None
        given = together if transform is None else None  # a transform changes what lies side by side
        kept = Graph(columns, read) if records else SideBySide(columns, read, given)
        for j, column in enumerate(columns):
            # Nothing reads what lies below h_n where h_n is known.
            layers: list[Tensor] = [] if (one := lower[j]) is None else [one.activation] * (one.number - 1)
            with torch.set_grad_enabled(records):
                _, _, new_states[j] = column(
                    h,
                    kept.before(column.num_sources, read.intersection(column.reads)),
                    states.get(j),
                    time_shape=time_shape,
                    resets=resets,
                    index=j,
                    transform=transform,
                    activations=layers,
                    lower=one,
                    heads=(),
                )
                kept.add(layers)
        reads = read.intersection(self.columns[k].reads)
        return kept.before(len(columns), reads), first, None if known is not None else h

    def reads_same_patches(self, column: int = -1) -> bool:
        """Whether layer 1 of a column and of all that it reads takes the same patches of an image."""
        newest = self.columns[self._index(column)]
        return common_depth([*self._sources_of(newest), newest]) > 0

    def _check_sources(
        self, sources: Mapping[int, Any], k: int, leading: tuple[int, ...], unread: Collection[int]
    ) -> dict[int, Any]:
        """Those of the sources that a caller kept that column k reads, (*leading, ...) each; not the `unread` ones."""
        checked = {}
        for number in self.columns[k].reads:
            if number in unread:
                continue
            if number not in sources:
                raise ValueError(f"sources: layer {number} is missing; column {k} reads layers {self.columns[k].reads}")
            found, expected = tuple(sources[number].shape), (*leading, *self._source_shape(k, number))
            if found != expected:
                raise ValueError(f"sources: layer {number}: expected {expected}, got {found}")
            checked[number] = sources[number]
        return checked

    def _source_shape(self, k: int, number: int) -> tuple[int, ...]:
        """Shape of h^{<k} of one layer, without batch axes."""
        shapes = [column.shapes[number] for column in self.columns[: self.columns[k].num_sources]]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def _split_state(
        self, state: Mapping[str, Tensor] | None, time_shape: tuple[int, int] | None
    ) -> dict[int, LSTMState]:
        if time_shape is None:
            return {}
        if not state:
            state = self.initial_state(time_shape[0])
        width = sum(column.state_width for column in self.columns)
        if state["h"].shape != (time_shape[0], width):
            raise ValueError(f"state: expected h of shape ({time_shape[0]}, {width}), got {tuple(state['h'].shape)}")
        states, start = {}, 0
        for j, column in enumerate(self.columns):
            end = start + column.state_width
            states[j] = LSTMState(state["h"][:, start:end], state["c"][:, start:end])
            start = end
        return states

    def _join_state(self, states: Mapping[int, LSTMState | None]) -> dict[str, Tensor]:
        parts = [s for _, s in sorted(states.items()) if s is not None]
        if not parts:
            return {}
        return {"h": torch.cat([s.h for s in parts], dim=1), "c": torch.cat([s.c for s in parts], dim=1)}


def interleaved(planes: Tensor) -> Tensor:
    """Bytes (B, C, H, W) laid out channels last: twice as fast as `contiguous`."""
    return torch.stack(planes.unbind(1), dim=-1).permute(0, 3, 1, 2)


def _whole(source: Tensor | StepMaps | ChangingMaps) -> Tensor:
    return source if isinstance(source, Tensor) else source.whole()


def _unflattened(sources: Mapping[int, Tensor], leading: tuple[int, ...]) -> dict[int, Any]:
    """(B * T, ...) -> (*leading, ...)"""
    return {n: source.unflatten(0, leading) if len(leading) > 1 else source for n, source in sources.items()}


def _column_seed(seed: int, index: int) -> int:
    # Any injective mix serves; columns of neighbouring seeds must not share a stream.
    return (seed * 1_000_003 + index * 7_919 + 17) % 2**63
