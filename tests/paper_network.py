"""Ground truth: a progressive network in slow numpy, one loop a symbol of Rusu et al. 2016. No torch.

Written from the paper's section 2 (PAPER.md 1) and not from the package, in float64 and for one observation at a time:

    h_i^k = f( W_i^k h_{i-1}^k + b_i^k + sum_{j<k} U_i^{k:j} h_{i-1}^j )                                  (eq. 1)
    h_i^k = f( W_i^k h_{i-1}^k + b_i^k + U_i^k g( sum_{j<k} V_i^{k:j} (alpha_i^{k:j} h_{i-1}^j) + c_i^k ) )   (eq. 2)

V_i^{k:j} is the block of V_i^k's columns that meets source column j. The only thing taken from the package are the
parameters' names, in `symbols`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray


def f(x: Array) -> Array:
    return np.maximum(x, 0.0)


g = f


def sigma(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def conv(W: Array, h: Array, stride: int, padding: int) -> Array:
    """Cross-correlation: W (maps, C, n, n), h (C, height, width)."""
    h = np.pad(h, ((0, 0), (padding, padding), (padding, padding)))
    n = W.shape[2]
    height, width = ((size - n) // stride + 1 for size in h.shape[1:])
    out = np.zeros((W.shape[0], height, width))
    for m in range(W.shape[0]):
        for y in range(height):
            for x in range(width):
                out[m, y, x] = np.sum(W[m] * h[:, y * stride : y * stride + n, x * stride : x * stride + n])
    return out


def apply(layer: Any, W: Array, h: Array) -> Array:
    """W h, where h is a stack of maps for a convolution and flattened for everything else."""
    if "kernel" in layer:
        return conv(W, h, layer["stride"], layer["padding"])
    return W @ h.reshape(-1)


def bias(layer: Any, b: Array) -> Array:
    return b[:, None, None] if "kernel" in layer else b


def symbols(parameters: dict[str, Array], k: int, i: int | str) -> dict[str, Array]:
    """W, b of layer (or head) i of column k, and what its lateral has of U, V, c, alpha."""
    own = f"columns.{k}.{i}." if isinstance(i, str) else f"columns.{k}.layers.{i - 1}."
    lateral = f"columns.{k}.laterals.{i}."
    names = {
        "W": own + "weight",
        "b": own + "bias",
        "W_ih": own + "weight_ih_l0",
        "W_hh": own + "weight_hh_l0",
        "b_ih": own + "bias_ih_l0",
        "b_hh": own + "bias_hh_l0",
        "U": lateral + "out.weight",
        "V": lateral + "project_layer.weight",
        "c": lateral + "project_layer.bias",
        "alpha": lateral + "scale",
    }
    return {s: np.asarray(parameters[n], np.float64) for s, n in names.items() if n in parameters}


def project(layer: Any, p: dict[str, Array], h_below: list[Array]) -> Array:
    """g(V (alpha * h^{<k})) of eq. 2; the sources side by side for eq. 1, which has no V."""
    flat = "kernel" not in layer
    h_below = [h.reshape(-1) if flat else h for h in h_below]
    if "V" not in p:
        return np.concatenate(h_below)
    total: Any = 0.0
    start = 0
    for j, h_j in enumerate(h_below):
        V_j = p["V"][:, start : start + len(h_j)]
        start += len(h_j)
        scaled = p["alpha"][j] * h_j
        total = total + (V_j @ scaled if flat else conv(V_j, scaled, 1, 0))
    assert start == p["V"].shape[1]
    return g(total + (p["c"] if flat else p["c"][:, None, None]))


def lateral(layer: Any, p: dict[str, Array], h_below: list[Array]) -> Array | float:
    """What eq. 1 or eq. 2 adds to the pre-activation."""
    if not h_below or "U" not in p:
        return 0.0
    if "V" in p:
        return apply(layer, p["U"], project(layer, p, h_below))
    total: Any = 0.0
    start = 0
    for h_j in h_below:
        h_j = h_j if "kernel" in layer else h_j.reshape(-1)
        total = total + apply(layer, p["U"][:, start : start + len(h_j)], h_j)
        start += len(h_j)
    return total


def lstm_cell(p: dict[str, Array], x: Array, h: Array, c: Array) -> tuple[Array, Array]:
    """One step: input, forget, cell and output gates, in this order in the stacked weights."""
    i, forget, cell, o = np.split(p["W_ih"] @ x + p["b_ih"] + p["W_hh"] @ h + p["b_hh"], 4)
    c = sigma(forget) * c + sigma(i) * np.tanh(cell)
    return sigma(o) * np.tanh(c), c


def network_step(
    parameters: dict[str, Array],
    specs: list[list[dict[str, Any]]],
    x: Array,
    K: int,
    states: list[dict[int, tuple[Array, Array]]],
) -> tuple[list[list[Array]], Array, float]:
    """All columns up to K (counted from 0) on one observation x = h_0, already scaled.

    Args:
        specs: for each column its layers as `{"kernel": .., "stride": .., "padding": ..}`, `{"units": ..}` or
            `{"cells": ..}`.
        states: for each column `{i: (h, c)}` of its LSTM layers, replaced in place.

    Returns:
        h[k][i] (i = 0 is the observation), column K's logits and value.
    """
    h: list[list[Array]] = []
    for k in range(K + 1):
        h.append([x])
        for i, layer in enumerate(specs[k], start=1):
            p = symbols(parameters, k, i)
            h_below = [h[j][i - 1] for j in range(k)] if i >= 2 else []
            if "cells" in layer:
                own = h[k][i - 1].reshape(-1)
                if p["W_ih"].shape[1] > len(own):  # the rest of the input weights is U
                    own = np.concatenate([own, project(layer, p, h_below)])
                states[k][i] = lstm_cell(p, own, *states[k][i])
                h[k].append(states[k][i][0])
            else:
                pre = apply(layer, p["W"], h[k][i - 1]) + bias(layer, p["b"]) + lateral(layer, p, h_below)
                h[k].append(f(pre))
    outputs = []
    for head in ("policy", "value"):
        p = symbols(parameters, K, head)
        h_below = [h[j][-1] for j in range(K)]
        outputs.append(p["W"] @ h[K][-1].reshape(-1) + p["b"] + lateral({}, p, h_below))
    return h, outputs[0], float(outputs[1][0])
