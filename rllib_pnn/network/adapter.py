"""Lateral connections (Rusu et al. 2016, eq. 1 and eq. 2). Plain torch, no Ray.

A lateral connection brings the activations of all earlier columns, `h_{i-1}^{<k}`, into layer i of column k:

    linear    sum_{j<k} U_i^{k:j} h_{i-1}^j                              (eq. 1)
    adapter   U_i^k g( V_i^k (alpha_{i-1}^{<k} * h_{i-1}^{<k}) )          (eq. 2)

| here | in the paper |
|---|---|
| `sources` | h_{i-1}^{<k}, the concatenation over columns j < k |
| `scale` | alpha_{i-1}^{<k}, one learned scalar a source column |
| `project` | V_i^k with g = ReLU, to the width of one column |
| `out` | U_i^k, whose result is added to the layer's own pre-activation |

Both end in a linear map U, so they share one interface: `project(sources)` gives what U reads. An LSTM layer takes
that into its own input weights (U then has one row block a gate), every other layer calls the lateral itself.

Departure from the paper's text, which omits biases: V has one, U has none (the layer's own bias serves).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATERALS = ("adapter", "linear", "none")


class LinearLateral(nn.Module):
    """Eq. 1: U_i^{k:j} of all sources side by side, so that the sum over columns is one product.

    Args:
        source_widths: features (maps, where `out` is a convolution) of layer i-1 of every earlier column.
        out: U, a bias-free map from all sources to this layer's pre-activation; None where an LSTM owns U.
    """

    def __init__(self, source_widths: Sequence[int], out: nn.Conv2d | nn.Linear | None) -> None:
        super().__init__()
        self.out = out
        self.projected_width = sum(source_widths)

    def project(self, sources: Tensor) -> Tensor:
        """(B, sum of source widths, ...) unchanged (flattened for a dense U): eq. 1 has no V."""
        return sources if isinstance(self.out, nn.Conv2d) else sources.flatten(1)

    def forward(self, sources: Tensor) -> Tensor:
        assert self.out is not None
        return self.out(self.project(sources))


class Adapter(nn.Module):
    """Eq. 2: a single hidden layer adapter on the concatenation of all earlier columns.

    Args:
        source_widths: features of layer i-1 of every earlier column; maps where V is a 1x1 convolution.
        width: features that V projects to, those of layer i-1 of the new column.
        out: U, a bias-free map from `width` features to this layer's pre-activation; None where an LSTM owns U.
        scale: initial alpha, the same for every source column.
        convolutional: V is a 1x1 convolution over maps (B, C, H, W) instead of a dense map over (B, C).
    """

    def __init__(
        self,
        source_widths: Sequence[int],
        width: int,
        out: nn.Conv2d | nn.Linear | None,
        *,
        scale: float,
        convolutional: bool,
    ) -> None:
        super().__init__()
        total = sum(source_widths)
        self.projected_width = width
        self.scale = nn.Parameter(torch.full((len(source_widths),), float(scale)))  # alpha in eq. 2
        self.project_layer = nn.Conv2d(total, width, 1) if convolutional else nn.Linear(total, width)  # V
        self.out = out
        self.convolutional = convolutional
        self._widths = tuple(source_widths)
        self._uniform = self._widths[0] if len(set(self._widths)) == 1 else None

    def feature_scale(self) -> Tensor:
        """alpha for every source feature, (sum of source widths,)."""
        if self._uniform is not None:
            return self.scale.unsqueeze(1).expand(-1, self._uniform).reshape(-1)
        return torch.cat([self.scale[j].expand(width) for j, width in enumerate(self._widths)])

    def project(self, sources: Tensor) -> Tensor:
        """g(V(alpha * h)): (B, sum of source widths, ...) -> (B, width, ...)."""
        scale = self.feature_scale()
        layer = self.project_layer
        if self.convolutional:
            # alpha * h costs a pass over all maps, alpha * V a few numbers: the same product.
            return F.conv2d(sources, layer.weight * scale.view(1, -1, 1, 1), layer.bias).relu_()
        return F.linear(sources.flatten(1) * scale, layer.weight, layer.bias).relu_()

    def forward(self, sources: Tensor) -> Tensor:
        assert self.out is not None
        return self.out(self.project(sources))


Lateral = LinearLateral | Adapter
