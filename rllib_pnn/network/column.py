"""One column of a progressive network (Rusu et al. 2016, section 2). Plain torch, no Ray.

    h_i^k = f( W_i^k h_{i-1}^k + lateral_i^k(h_{i-1}^{<k}) ),   f = ReLU,   lateral: see adapter.py

Layer 1 reads the observation and has no lateral; layers 2..L and the policy and value heads have one each.
Axes: B batch, T time, C channels or maps, H height, W width, A policy outputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rllib_pnn.network.adapter import Adapter, Lateral, LinearLateral
from rllib_pnn.network.spec import LSTM, ColumnSpec, Conv, Dense

HEADS = ("policy", "value")
ALIGNMENT = 64  # bytes; torch's own for tensors on the CPU

Transform = Callable[[int, int, Tensor], Tensor]
"""`(column, layer, activation) -> activation`: replaces a post-activation output, layer counted from 1."""


class LSTMState(NamedTuple):
    """Hidden and cell state of a column's LSTM layers side by side, each (B, S_k)."""

    h: Tensor
    c: Tensor


class ColumnOutput(NamedTuple):
    """What a column computes: policy `logits` (B, A), `value` (B,), the state after the last step.

    Recurrent columns give (B, T, A) and (B, T). A head that was not asked for has no numbers, (0,).
    """

    logits: Tensor
    value: Tensor
    state: dict[str, Tensor]


class Lower(NamedTuple):
    """What is known of a column's lower layers: h_n of layer n = `number`, so that layers up to n need not be computed;
    and maybe what layer n + 1's adapter makes of the sources, g(V(alpha h_n^{<k}))."""

    number: int
    activation: Tensor
    projected: Tensor | None = None


@dataclass(frozen=True)
class ColumnLayout:
    """All that determines a column's parameters' shapes; with them it makes a column out of a file again."""

    observation_shape: tuple[int, ...]  # (C, H, W) or (C,)
    num_outputs: int
    spec: ColumnSpec
    lateral: str
    lateral_heads: bool
    lateral_scale: float
    source_specs: tuple[ColumnSpec, ...]  # of the earlier columns it reads, oldest first
    input_shift: float = 0.0  # taken from every observation after scaling

    def to_json(self) -> dict[str, Any]:
        return {
            "observation_shape": list(self.observation_shape),
            "num_outputs": self.num_outputs,
            "spec": self.spec.to_json(),
            "lateral": self.lateral,
            "lateral_heads": self.lateral_heads,
            "lateral_scale": self.lateral_scale,
            "source_specs": [spec.to_json() for spec in self.source_specs],
            "input_shift": self.input_shift,
        }


def layer_shapes(spec: ColumnSpec, observation_shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes of h_0 (the observation) to h_L, without batch axes.

    Raises:
        ValueError: a convolution on a vector, or a kernel larger than what it reads.
    """
    shapes: list[tuple[int, ...]] = [tuple(observation_shape)]
    for number, layer in enumerate(spec.layers, start=1):
        below = shapes[-1]
        if isinstance(layer, Conv):
            if len(below) != 3:
                raise ValueError(
                    f"column: layer {number} is a convolution but reads a vector of shape {below}; "
                    "use the preset 'mlp' or dense layers for vector observations"
                )
            height, width = ((n + 2 * layer.padding - layer.kernel) // layer.stride + 1 for n in below[1:])
            if height < 1 or width < 1:
                raise ValueError(
                    f"column: layer {number}: a {layer.kernel}x{layer.kernel} kernel does not fit into "
                    f"{below[1]}x{below[2]} pixels"
                )
            shapes.append((layer.channels, height, width))
        else:
            shapes.append((layer.units,))
    return shapes


def check_source(shapes: Sequence[tuple[int, ...]], j: int, others: Sequence[tuple[int, ...]]) -> None:
    """Raises `ValueError` unless a column of layers `shapes` can take laterals from column `j` with layers `others`."""
    if len(others) != len(shapes) or any(a[1:] != b[1:] for a, b in zip(others, shapes, strict=True)):
        raise ValueError(
            f"layers of shapes {[*shapes[1:]]} can't take laterals from column {j} with {[*others[1:]]}: the number of "
            "layers and the map sizes must agree"
        )


class Column(nn.Module):
    """A column with its laterals. Built by `ProgressiveNetwork.add_column`.

    Args:
        layout: shapes and kinds of everything in it.
        input_scale: factor on the observation (1/255 for bytes), folded into layer 1's weights because scaling
            28,224 pixels a step costs more than scaling 3,072 weights a batch.
    """

    def __init__(self, layout: ColumnLayout, input_scale: float = 1.0) -> None:
        super().__init__()
        self.layout = layout
        self.input_scale = input_scale
        self.fingerprint: str | None = None  # set when frozen
        self.trains = "all"  # or "heads" (baseline 2), or "none" once frozen
        spec = layout.spec
        self.shapes = shapes = layer_shapes(spec, layout.observation_shape)  # of h_0 .. h_L, without batch axes
        source_shapes = [layer_shapes(s, layout.observation_shape) for s in layout.source_specs]
        for j, others in enumerate(source_shapes):
            check_source(shapes, j, others)
        self._state_widths = [layer.units for layer in spec.layers if isinstance(layer, LSTM)]

        self.layers: list[nn.Conv2d | nn.Linear | nn.LSTM] = nn.ModuleList()  # type: ignore[assignment]
        # Keyed by layer number, "policy" and "value".
        self.laterals: dict[str, Lateral] = nn.ModuleDict()  # type: ignore[assignment]
        for number, layer in enumerate(spec.layers, start=1):
            below = shapes[number - 1]
            lateral = self._make_lateral(number, layer, below, [s[number - 1] for s in source_shapes])
            if lateral is not None:
                self.laterals[str(number)] = lateral
            self.layers.append(_make_layer(layer, below, lateral))
        top = [math.prod(s[-1]) for s in source_shapes]
        self.policy = nn.Linear(math.prod(shapes[-1]), layout.num_outputs)
        self.value = nn.Linear(math.prod(shapes[-1]), 1)
        if top and layout.lateral != "none" and layout.lateral_heads:
            for head in HEADS:
                out_features = getattr(self, head).out_features
                self.laterals[head] = self._dense_lateral(top, math.prod(shapes[-1]), out_features)

    @property
    def num_sources(self) -> int:
        return len(self.layout.source_specs)

    @property
    def is_frozen(self) -> bool:
        return self.fingerprint is not None

    @property
    def state_width(self) -> int:
        """S_k: LSTM cells in this column."""
        return sum(self._state_widths)

    @property
    def reads(self) -> list[int]:
        """Layers whose activations in earlier columns this column's laterals read, counted from 1."""
        top = len(self.layers)
        numbers = {top if key in HEADS else int(key) - 1 for key in self.laterals}
        return sorted(numbers)

    def _make_lateral(
        self, number: int, layer: Conv | Dense | LSTM, below: tuple[int, ...], sources: list[tuple[int, ...]]
    ) -> Lateral | None:
        if number == 1 or not sources or self.layout.lateral == "none":
            return None
        if isinstance(layer, Conv):
            widths = [s[0] for s in sources]
            adapter = self.layout.lateral == "adapter"
            width = min(below[0], layer.channels)
            in_maps = width if adapter else sum(widths)
            out = nn.Conv2d(in_maps, layer.channels, layer.kernel, layer.stride, layer.padding, bias=False)
            if adapter:
                return Adapter(widths, width, out, scale=self.layout.lateral_scale, convolutional=True)
            return LinearLateral(widths, out)
        out_features = None if isinstance(layer, LSTM) else layer.units
        width = min(math.prod(below), layer.units)
        return self._dense_lateral([math.prod(s) for s in sources], width, out_features)

    def _dense_lateral(self, widths: list[int], width: int, out_features: int | None) -> Lateral:
        adapter = self.layout.lateral == "adapter"
        in_features = width if adapter else sum(widths)
        out = None if out_features is None else nn.Linear(in_features, out_features, bias=False)
        if adapter:
            return Adapter(widths, width, out, scale=self.layout.lateral_scale, convolutional=False)
        return LinearLateral(widths, out)

    @classmethod
    def initialised(cls, layout: ColumnLayout, input_scale: float, generator: torch.Generator) -> Column:
        """A column with fresh parameters, drawn from `generator` alone; no global random state is read or moved."""
        with torch.device("meta"):  # torch's own initialisation, which would draw from the global generator
            column = cls(layout, input_scale)
        column.to_empty(device="cpu")
        with _one_thread():
            column.reset_parameters(generator)
        return column

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Orthogonal weights (gain sqrt 2; 0.01 for the policy head, 1 for the value head), zero biases.

        Laterals start with the gain of the layer they feed; alpha alone sets how loud they are at first.
        """

        def fill(weight: Tensor, gain: float) -> None:
            nn.init.orthogonal_(weight, gain, generator=generator)

        gain = math.sqrt(2.0)
        for name, parameter in self.named_parameters():
            if "bias" in name:
                parameter.zero_()
        for layer in self.layers:
            if isinstance(layer, nn.LSTM):
                for weight in (p for name, p in layer.named_parameters() if "weight" in name):
                    fill(weight, 1.0)
            else:
                fill(layer.weight, gain)
        for head, head_gain in zip(HEADS, (0.01, 1.0), strict=True):
            fill(getattr(self, head).weight, head_gain)
        for key, lateral in self.laterals.items():
            if isinstance(lateral, Adapter):
                fill(lateral.project_layer.weight, gain)
                lateral.scale.fill_(self.layout.lateral_scale)
            if lateral.out is not None:
                fill(lateral.out.weight, {"policy": 0.01, "value": 1.0}.get(key, gain))

    def forward(
        self,
        obs: Tensor,
        sources: Mapping[int, Tensor],
        state: LSTMState | None = None,
        *,
        time_shape: tuple[int, int] | None = None,
        resets: Tensor | None = None,
        index: int = 0,
        transform: Transform | None = None,
        activations: list[Tensor] | None = None,
        lower: Lower | None = None,
        heads: Collection[str] = HEADS,
    ) -> tuple[Tensor | None, Tensor | None, LSTMState | None]:
        """Computes the column.

        Args:
            obs: h_0, (B*T, C, H, W) or (B*T, C), float.
            sources: for every layer in `reads`, h^{<k} of that layer: (B*T, sum of widths, ...).
            state: LSTM state before the first step, each (B, S_k).
            time_shape: (B, T) for recurrent columns.
            resets: (B, T) bool, true where the state is zeroed before the step.
            index: this column's number, handed to `transform`.
            transform: replaces post-activation outputs (perturbation analysis).
            activations: a list that collects h_1 .. h_L.
            lower: what is known already (together.py, incremental.py, repeats.py), of layer 1 alone where `transform`
                or `activations` are given. `sources` need not hold what those layers read.
            heads: which of "policy" and "value" to compute; none where a frozen column's activations alone are wanted.

        Returns:
            logits (B*T, A), value (B*T,), state after the last step; None for a head that is not computed.
        """
        done, h, projected = lower or Lower(0, obs)
        states: list[tuple[Tensor, Tensor]] = []
        for number, layer in enumerate(self.layers, start=1):
            if number < done:
                continue
            lateral = self.lateral(str(number))
            source = None if lateral is None else sources.get(number - 1)
            if number == done:
                pass
            elif isinstance(layer, nn.Conv2d):
                pre = F.conv2d(h, *self._affine(number, layer), layer.stride, layer.padding)
                if lateral is not None:
                    pre.add_(lateral(source, layout=_layout(h), projected=projected if number == done + 1 else None))
                h = pre.relu_()
            elif isinstance(layer, nn.Linear):
                pre = F.linear(h.flatten(1), *self._affine(number, layer))
                h = (pre if lateral is None else pre.add_(lateral(source))).relu_()
            else:
                h = h.flatten(1)
                if number == 1:
                    h = h * self.input_scale - self.layout.input_shift
                if lateral is not None and source is not None:
                    h = torch.cat([h, lateral.project(source)], dim=1)
                if state is None or time_shape is None:
                    raise ValueError("a recurrent column needs obs of shape (B, T, ...) and a state; got none")
                start = sum(n.shape[1] for n, _ in states)
                before = (
                    state.h[:, start : start + layer.hidden_size],
                    state.c[:, start : start + layer.hidden_size],
                )
                h, after = _run_lstm(layer, h.view(*time_shape, -1), before, resets)
                states.append(after)
                h = h.flatten(0, 1)
            if transform is not None:
                h = transform(index, number, h)
            if activations is not None:
                activations.append(h)
        state_out = LSTMState(*(torch.cat(parts, dim=1) for parts in zip(*states, strict=True))) if states else None
        outputs: dict[str, Tensor] = {}
        for head in heads:
            out = getattr(self, head)(h.flatten(1))
            if head in self.laterals:
                out = out.add_(self.laterals[head](sources[len(self.layers)]))
            outputs[head] = out
        value = outputs.get("value")
        return outputs.get("policy"), None if value is None else value.squeeze(1), state_out

    def lateral(self, key: str) -> Lateral | None:
        """Of a layer, by its number, or of "policy" or "value"."""
        return self.laterals[key] if key in self.laterals else None  # noqa: SIM401 (a ModuleDict has no get)

    @property
    def map_adapter(self) -> Adapter | None:
        """Layer 2's, if it reads maps."""
        lateral = self.lateral("2")
        return lateral if isinstance(lateral, Adapter) and lateral.convolutional else None

    def first_affine(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of layer 1 with the input's scale and shift in them."""
        layer = self.layers[0]
        assert not isinstance(layer, nn.LSTM)
        return self._affine(1, layer)

    def _affine(self, number: int, layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight and bias; those of layer 1 include the scale s and shift m of its input: W(sx - m) = (sW)x - mW1."""
        weight: Tensor = layer.weight
        bias: Tensor = layer.bias  # type: ignore[assignment]  # every layer here has one
        if number == 1:
            if self.layout.input_shift != 0.0:
                bias = bias - self.layout.input_shift * weight.flatten(1).sum(1)
            if self.input_scale != 1.0:
                weight = weight * self.input_scale
        return weight, bias

    def freeze(self) -> str:
        """Ends training of this column for good and returns its fingerprint."""
        if self.fingerprint is None:
            self.requires_grad_(False)
            # An optimizer that still holds these parameters would move them by a gradient left over.
            self.zero_grad(set_to_none=True)
            self._align()
            self.trains = "none"
            self.fingerprint = self.compute_fingerprint()
        return self.fingerprint

    def _align(self) -> None:
        """Where a matrix starts in memory decides how its product is rounded: at a multiple of 64 bytes for all."""
        for parameter in self.parameters():
            if not parameter.is_meta and parameter.data_ptr() % ALIGNMENT:
                parameter.data = parameter.data.clone()

    def set_trained_part(self, part: str) -> None:
        """`"all"` parameters get gradients, or only the `"heads"` (baseline 2: output-layer fine-tuning)."""
        if part not in ("all", "heads"):
            raise ValueError(f"trained part: expected 'all' or 'heads', got {part!r}")
        if self.is_frozen:
            raise ValueError("a frozen column can't be trained again; add a column instead")
        self.trains = part
        for name, parameter in self.named_parameters():
            in_heads = name.split(".")[0] in HEADS or name.split(".")[:2] in [["laterals", h] for h in HEADS]
            parameter.requires_grad_(part == "all" or in_heads)

    def compute_fingerprint(self) -> str:
        """SHA-256 over the layout and every parameter's name, shape and bytes (float32, little endian), as hex."""
        digest = hashlib.sha256(json.dumps(self.layout.to_json(), sort_keys=True).encode())
        digest.update(repr(float(self.input_scale)).encode())
        for name, parameter in sorted(self.named_parameters()):
            array = parameter.detach().to("cpu", torch.float32).contiguous().numpy()
            digest.update(f"\n{name} {array.shape}\n".encode())
            digest.update(array.astype("<f4", copy=False).tobytes())
        return digest.hexdigest()

    def verify(self) -> None:
        """Raises `ValueError` if a frozen column's parameters are not those that were frozen."""
        if self.fingerprint is not None and (found := self.compute_fingerprint()) != self.fingerprint:
            raise ValueError(
                f"a frozen column changed: its fingerprint was {self.fingerprint[:12]} when frozen, is {found[:12]} now"
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # Reached for the column itself before its children: refuse whatever would write into frozen parameters.
        if self.is_frozen:
            for name, parameter in self.named_parameters():
                value = state_dict.get(prefix + name)
                if value is not None and not torch.equal(torch.as_tensor(value).to(parameter.device), parameter):
                    raise ValueError(f"{prefix}{name}: a frozen column's parameters can't be overwritten")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _layout(maps: Tensor) -> torch.memory_format:
    return torch.contiguous_format if maps.is_contiguous() else torch.channels_last


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """QR decompositions round differently on more threads; a seed must give the same column on all of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _make_layer(
    layer: Conv | Dense | LSTM, below: tuple[int, ...], lateral: Lateral | None
) -> nn.Conv2d | nn.Linear | nn.LSTM:
    if isinstance(layer, Conv):
        return nn.Conv2d(below[0], layer.channels, layer.kernel, layer.stride, layer.padding)
    features = math.prod(below)
    if isinstance(layer, Dense):
        return nn.Linear(features, layer.units)
    # W and U share the LSTM's input weights: W [h, z] = W_own h + U z, for all four gates at once.
    return nn.LSTM(features + (lateral.projected_width if lateral is not None else 0), layer.units, batch_first=True)


def _run_lstm(
    layer: nn.LSTM, inputs: Tensor, state: tuple[Tensor, Tensor], resets: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """inputs (B, T, n), state each (B, H) -> outputs (B, T, H), state after T.

    Zeroes a sequence's state before every step at which `resets` (B, T) is true.
    """
    h, c = (part.unsqueeze(0).clone() for part in state)  # aligned, wherever in the joint state they lie
    if resets is None or not bool(resets.any()):
        out, (h, c) = layer(inputs, (h, c))
        return out, (h.squeeze(0), c.squeeze(0))
    # One kernel call per stretch of time in which no sequence of the batch is reset.
    cuts = [int(t) for t in resets.any(0).nonzero().flatten()]
    bounds = sorted({0, *cuts, inputs.shape[1]})
    outputs = []
    for start, end in itertools.pairwise(bounds):
        keep = (~resets[:, start]).to(inputs.dtype).view(1, -1, 1)
        out, (h, c) = layer(inputs[:, start:end].contiguous(), (h * keep, c * keep))
        outputs.append(out)
    return torch.cat(outputs, dim=1), (h.squeeze(0), c.squeeze(0))
