"""What AFS and APS give: one number a layer and column. Plain data, neither torch nor Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

METHODS = {"afs": "Average Fisher sensitivity", "aps": "Average perturbation sensitivity"}


@dataclass(frozen=True)
class Sensitivity:
    """How much a policy depends on each layer of each column (Rusu et al. 2016, section 3).

    I is the number of layers, K that of the columns up to the one whose policy is looked at.
    """

    method: str
    """`afs` or `aps`."""
    column: int
    """Index of the column whose policy it is."""
    layers: tuple[str, ...]
    """Names of the I layers, from the observation upwards."""
    values: np.ndarray
    """(I, K): AFS(i, k) or APS(i, k). A row sums to 1; it is NaN if the policy depends on no column in this layer."""
    raw: tuple[tuple[np.ndarray, ...], ...]
    """`raw[i][k]`: AFS: (n,) diagonal Fisher information of every feature; APS: (1,) the noise precision L_i^k."""
    tasks: tuple[str, ...] = ()
    """What each of the K columns was trained on, if known."""
    notes: tuple[str, ...] = ()
    """Limits of this measurement, one line each."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What it was computed with (samples, seed, ...)."""

    @property
    def title(self) -> str:
        return METHODS.get(self.method, self.method)

    def features(self, layer: int) -> np.ndarray:
        """(K, n) AFS(i, k, m), the share of every column in feature m; NaN where feature m is dead in all columns."""
        return feature_shares(self.raw[layer])

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "column": self.column,
            "layers": list(self.layers),
            "values": [[None if math.isnan(x) else x for x in row] for row in self.values.tolist()],
            "raw": [[[float(f"{x:.6g}") for x in column] for column in layer] for layer in self.raw],
            "tasks": list(self.tasks),
            "notes": list(self.notes),
            "settings": dict(self.settings),
        }

    @classmethod
    def from_json(cls, data: Any) -> Sensitivity:
        """Reads `to_json` back. Raises `ValueError` with one line if `data` is something else."""
        try:
            values = np.array([[math.nan if x is None else float(x) for x in row] for row in data["values"]])
            raw = tuple(tuple(np.array(column, dtype=float) for column in layer) for layer in data["raw"])
            layers = tuple(map(str, data["layers"]))
            tasks, notes = tuple(map(str, data.get("tasks", []))), tuple(map(str, data.get("notes", [])))
            method, column = str(data["method"]), int(data["column"])
            settings = dict(data.get("settings", {}))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"not a sensitivity: {type(error).__name__}: {str(error)[:200]}") from None
        shape = (len(layers), column + 1)
        if (
            method not in METHODS
            or values.shape != shape
            or [len(layer) for layer in raw] != [shape[1]] * shape[0]
            or len(tasks) not in (0, shape[1])
            or not _are_laterals(settings.get("laterals"), shape[1])
        ):
            raise ValueError(
                f"not a sensitivity: expected {shape} values of a known method, got {values.shape} {method[:40]!r}"
            )
        return cls(method, column, layers, values, raw, tasks, notes, settings)


def _are_laterals(value: Any, num_columns: int) -> bool:
    """Whether `settings.laterals` is what the pictures read: None, or a list of names for each column."""
    return value is None or (
        isinstance(value, list) and len(value) == num_columns and all(isinstance(names, list) for names in value)
    )


def agreement(first: Sensitivity, second: Sensitivity) -> dict[str, float]:
    """How alike two measurements of one policy are, over all layers and columns that both could measure.

    Returns:
        `correlation` (Pearson; NaN for fewer than 3 shares or without any spread) and `largest_difference` of a share.
    """
    if first.values.shape != second.values.shape:
        raise ValueError(f"sensitivities of {first.values.shape} and {second.values.shape} layers and columns")
    both = np.isfinite(first.values) & np.isfinite(second.values)
    a, b = first.values[both], second.values[both]
    if len(a) == 0:
        return {"correlation": math.nan, "largest_difference": math.nan}
    spread = len(a) > 2 and np.ptp(a) > 0 and np.ptp(b) > 0
    return {
        "correlation": float(np.corrcoef(a, b)[0, 1]) if spread else math.nan,
        "largest_difference": float(np.abs(a - b).max()),
    }


def feature_shares(fisher: Sequence[np.ndarray]) -> np.ndarray:
    """AFS(i, k, m) = F_i^k(m, m) / sum_k F_i^k(m, m) of one layer.

    Args:
        fisher: K arrays (n,), equally wide.

    Returns:
        (K, n), columns sum to 1; NaN where the sum is 0.
    """
    table = np.stack([np.asarray(column, dtype=float) for column in fisher])
    total = table.sum(axis=0, keepdims=True)
    return np.divide(table, total, out=np.full_like(table, np.nan), where=total > 0)


def layer_shares(fisher: Sequence[np.ndarray]) -> np.ndarray:
    """(K,) AFS(i, k) = sum_m AFS(i, k, m), scaled by the number of features so that it sums to 1 over columns.

    Features that are dead in every column count for none. Columns of different widths have no common feature m: then
    the layer's summed Fisher information is shared out instead.
    """
    if len({len(column) for column in fisher}) == 1:
        shares = feature_shares(fisher)
        alive = np.isfinite(shares).all(axis=0)
        return shares[:, alive].mean(axis=1) if alive.any() else np.full(len(fisher), np.nan)
    sums = np.array([float(np.sum(column)) for column in fisher])
    return sums / sums.sum() if sums.sum() > 0 else np.full(len(sums), np.nan)


def layer_name(layer: Mapping[str, Any], number: int) -> str:
    """`{"conv": {...}}` of a column specification in JSON -> `1: conv 12 @ 8x8/4`."""
    kind = next(iter(layer), "")
    value = layer.get(kind)
    if kind == "conv" and isinstance(value, Mapping):
        kernel = value.get("kernel", "?")
        return f"{number}: conv {value.get('channels', '?')} @ {kernel}x{kernel}/{value.get('stride', 1)}"
    width = value.get("units", "?") if isinstance(value, Mapping) else value
    return f"{number}: {kind} {width}"
