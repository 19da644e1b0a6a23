"""What a column is made of (Rusu et al. 2016, section 4). Plain data, no torch.

A specification lists a column's hidden layers from the observation upwards; policy and value heads follow it by
themselves. Layers are numbered from 1 as in the paper: layer 1 reads the observation and has no laterals.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from rllib_pnn.text import did_you_mean

# Far above any sensible column; a specification read from a stranger's file must not allocate the machine away.
MAX_LAYERS = 64
MAX_WIDTH = 65_536
MAX_NAME = 200


@dataclass(frozen=True)
class Conv:
    """A 2-D convolution and ReLU: `channels` maps, a square `kernel`, its `stride` and zero `padding`, in pixels."""

    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0

    @property
    def width(self) -> int:
        return self.channels


@dataclass(frozen=True)
class Dense:
    """A fully connected layer of `units` ReLU units; on top of a convolution it reads the flattened maps."""

    units: int

    @property
    def width(self) -> int:
        return self.units


@dataclass(frozen=True)
class LSTM:
    """A layer of `units` LSTM cells (Rusu et al. 2017 use LSTM columns); its activation is the hidden state h."""

    units: int

    @property
    def width(self) -> int:
        return self.units


Layer = Conv | Dense | LSTM
_LAYERS: dict[str, type[Layer]] = {"conv": Conv, "dense": Dense, "lstm": LSTM}


@dataclass(frozen=True)
class ColumnSpec:
    """The hidden layers of a column.

    Presets (`ColumnSpec.parse("atari")`):

    - `atari`: three convolutions of 12 maps (8x8 stride 4, 4x4 stride 2, 3x3 stride 1) and 256 units (section 4.2);
    - `pong`: convolutions of 8 maps (8x8 stride 4) and 16 maps (4x4 stride 2), and 256 units (section 4.1);
    - `labyrinth`: the atari body with 256 LSTM cells on top (the A3C agent of Mnih et al. 2016);
    - `mlp`: two layers of 64 units, for vector observations.
    """

    layers: tuple[Layer, ...]  # or what `parse` takes
    name: str = "custom"

    def __post_init__(self) -> None:
        given: Any = self.layers
        if isinstance(given, str) or any(isinstance(layer, Mapping) for layer in given):
            parsed = ColumnSpec.parse(given)
            object.__setattr__(self, "layers", parsed.layers)
            object.__setattr__(self, "name", parsed.name if self.name == "custom" else self.name)
        if not self.layers:
            raise ValueError("column: a column needs at least one hidden layer, got an empty list")
        if len(self.layers) > MAX_LAYERS:
            raise ValueError(f"column: at most {MAX_LAYERS} layers, got {len(self.layers)}")
        if len(self.name) > MAX_NAME:
            raise ValueError(f"column: its name has at most {MAX_NAME} letters, got {len(self.name)}")
        seen_flat = False
        for number, layer in enumerate(self.layers, start=1):
            for field, value in asdict(layer).items():
                least = 0 if field == "padding" else 1
                if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_WIDTH:
                    raise ValueError(
                        f"column: layer {number}: {field} must be a whole number from {least} to {MAX_WIDTH}, "
                        f"got {_short(value)}"
                    )
            if isinstance(layer, Conv) and seen_flat:
                raise ValueError(f"column: layer {number}: a conv layer can't stand above a dense or lstm layer")
            seen_flat = seen_flat or not isinstance(layer, Conv)

    @property
    def is_recurrent(self) -> bool:
        return any(isinstance(layer, LSTM) for layer in self.layers)

    @classmethod
    def parse(cls, value: str | ColumnSpec | Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> ColumnSpec:
        """A `ColumnSpec` from a preset's name, a list of layers as a YAML file gives them, or a `to_json()` result.

        Args:
            value: `"atari"`, or `[{"conv": {"channels": 12, "kernel": 8, "stride": 4}}, {"dense": 256}, {"lstm": 256}]`
                (a conv may also be a list `[channels, kernel, stride, padding]`).

        Raises:
            ValueError: one line that names the layer, what was expected and what came.
        """
        if isinstance(value, ColumnSpec):
            return value
        if isinstance(value, str):
            if value not in _PRESETS:
                known = ", ".join(_PRESETS)
                raise ValueError(
                    f"column: unknown preset {_short(value)}, known are {known}{did_you_mean(value, _PRESETS)}"
                )
            return _PRESETS[value]
        if isinstance(value, Mapping):
            extra = set(value) - {"name", "layers"}
            if extra or "layers" not in value:
                raise ValueError(f"column: expected a preset's name or a list of layers, got {_short(dict(value))}")
            return cls(_parse_layers(value["layers"]), name=str(value.get("name", "custom")))
        return cls(_parse_layers(value))

    def to_json(self) -> dict[str, Any]:
        """Plain data that `parse` turns back into an equal specification."""
        names = {kind: name for name, kind in _LAYERS.items()}
        return {"name": self.name, "layers": [{names[type(layer)]: asdict(layer)} for layer in self.layers]}


def _parse_layers(layers: Any) -> tuple[Layer, ...]:
    if not isinstance(layers, Sequence) or isinstance(layers, str | bytes):
        raise ValueError(f"column: expected a preset's name or a list of layers, got {_short(layers)}")
    if len(layers) > MAX_LAYERS:
        raise ValueError(f"column: at most {MAX_LAYERS} layers, got {len(layers)}")
    return tuple(_parse_layer(number, layer) for number, layer in enumerate(layers, start=1))


def _parse_layer(number: int, layer: Any) -> Layer:
    if isinstance(layer, Conv | Dense | LSTM):
        return layer
    where = f"column: layer {number}"
    if not isinstance(layer, Mapping) or len(layer) != 1:
        raise ValueError(f"{where}: expected one of conv, dense, lstm as a key, got {_short(layer)}")
    kind, arguments = next(iter(layer.items()))
    if kind not in _LAYERS:
        raise ValueError(
            f"{where}: unknown kind {_short(kind)}, known are conv, dense, lstm{did_you_mean(kind, _LAYERS)}"
        )
    known = fields(_LAYERS[kind])
    names = [field.name for field in known]
    if isinstance(arguments, int | float):
        arguments = [arguments]
    if isinstance(arguments, Sequence) and not isinstance(arguments, str | bytes):
        if len(arguments) > len(names):
            raise ValueError(
                f"{where}: {kind}: at most {len(names)} numbers ({', '.join(names)}), got {len(arguments)}"
            )
        arguments = dict(zip(names, arguments, strict=False))
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}: {kind}: expected numbers, got {_short(arguments)}")
    for name in arguments:
        if name not in names:
            mend = did_you_mean(name, names)
            raise ValueError(f"{where}: {kind}: unknown key {_short(name)}, known are {', '.join(names)}{mend}")
    missing = [f.name for f in known if f.default is MISSING and f.name not in arguments]
    if missing:
        raise ValueError(f"{where}: {kind}: {' and '.join(missing)} missing; known are {', '.join(names)}")
    return _LAYERS[kind](**arguments)


def _short(value: Any) -> str:
    return " ".join(reprlib.repr(value).split())


_ATARI = (Conv(12, 8, 4), Conv(12, 4, 2), Conv(12, 3, 1), Dense(256))
_PRESETS = {
    "atari": ColumnSpec(_ATARI, "atari"),
    "pong": ColumnSpec((Conv(8, 8, 4), Conv(16, 4, 2), Dense(256)), "pong"),
    "labyrinth": ColumnSpec((*_ATARI, LSTM(256)), "labyrinth"),
    "mlp": ColumnSpec((Dense(64), Dense(64)), "mlp"),
}
