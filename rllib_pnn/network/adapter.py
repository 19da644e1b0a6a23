"""Lateral connections (Rusu et al. 2016, eq. 1 and eq. 2). Plain torch, no Ray.

A lateral connection brings the activations of all earlier columns, `h_{i-1}^{<k}`, into layer i of column k:

    linear    sum_{j<k} U_i^{k:j} h_{i-1}^j                              (eq. 1)
    adapter   U_i^k g( V_i^k (alpha_{i-1}^{<k} * h_{i-1}^{<k}) )          (eq. 2)

| here | in the paper |
|---|---|
| `sources` | h_{i-1}^{<k}, the concatenation over columns j < k |
| `scale` | alpha_{i-1}^{<k}, one learned scalar a source column |
| `project` | V_i^k with g = ReLU, to the smaller of n_{i-1} and n_i features |
| `out` | U_i^k, whose result is added to the layer's own pre-activation |

The paper gives V's width twice: its text says "an n_i dimensional subspace", so that laterals have parameters of the
order of a column's own, its formula R^{n_{i-1} x n_{i-1}^{<k}}. They differ most where a dense layer reads flattened
maps (588 to 256 in the `atari` column): n_{i-1} would make V alone more than twice a whole column a source. Heads have
too few outputs to be a width: there it is n_{i-1}.

Both end in a linear map U, so they share one interface: `project(sources, layout)` gives what U reads, maps laid out in
memory as `layout` says. An LSTM layer takes that into its own input weights (U then has one row block a gate), every
other layer calls the lateral itself.

Departure from the paper's text, which omits biases: V has one, U has none (the layer's own bias serves).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATERALS = ("adapter", "linear", "none")


class _Lateral(nn.Module):
    """A lateral connection: what `project` makes of the sources, through U."""

    out: nn.Conv2d | nn.Linear | None

    def project(self, sources: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        raise NotImplementedError

    def forward(
        self,
        sources: Tensor,
        layout: torch.memory_format = torch.contiguous_format,
        projected: Tensor | None = None,
    ) -> Tensor:
        """What is added to the layer's pre-activation.

        Args:
            sources: (B, sum of source widths, ...).
            layout: of the layer's own input.
            projected: what `project(sources)` gives, where it is known.
        """
        assert self.out is not None
        return self.out(self.project(sources, layout) if projected is None else projected)


class LinearLateral(_Lateral):
    """Eq. 1: U_i^{k:j} of all sources side by side, so that the sum over columns is one product.

    Args:
        source_widths: features (maps, where `out` is a convolution) of layer i-1 of every earlier column.
        out: U, a bias-free map from all sources to this layer's pre-activation; None where an LSTM owns U.
    """

    def __init__(self, source_widths: Sequence[int], out: nn.Conv2d | nn.Linear | None) -> None:
        super().__init__()
        self.out = out
        self.projected_width = sum(source_widths)

    def project(self, sources: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        """(B, sum of source widths, ...) unchanged (flattened for a dense U): eq. 1 has no V."""
        return sources.contiguous(memory_format=layout) if isinstance(self.out, nn.Conv2d) else sources.flatten(1)


class ScaledProduct(torch.autograd.Function):
    """V(alpha * h) + c for vectors, with the gradients of V and alpha from one product.

    Autograd would take the gradient of alpha from that of h, (B, out) x (out, in), a third of the layer's arithmetic.
    With M = G^T h, which V's gradient needs anyway: dV = alpha * M, and dalpha_j is the sum of V * M over j's block.
    """

    @staticmethod
    def forward(
        ctx: Any, sources: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, widths: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(sources, scale, weight)
        ctx.widths = widths
        return _scaled_product(sources, scale, weight, bias, widths)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        sources, scale, weight = ctx.saved_tensors
        widths = ctx.widths
        for_sources = for_scale = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_sources = _by_column(gradient @ weight, scale, widths)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            for_weight = gradient.t() @ sources
            for_scale = torch.empty_like(scale)
            # Block by block: each fits the cache.
            blocks = zip(for_weight.split(widths, dim=1), weight.split(widths, dim=1), strict=True)
            for j, (product, own) in enumerate(blocks):
                for_scale[j] = (product * own).sum()
                product.mul_(scale[j])
        if ctx.needs_input_grad[3]:
            for_bias = gradient.sum(0)
        return for_sources, for_scale, for_weight, for_bias, None


class ChannelsLastProduct(torch.autograd.Function):
    """g(W h + c) for maps h (B, C, P) of P pixels, W (M, C), g = ReLU: (B, P, M), which is channels last in memory.

    Products of matrices with a side of a few maps are faster with the pixels as the other side, in both directions,
    than the transposed product that would lie so by itself (docs/performance.md).
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        products = torch.baddbmm(bias.view(1, -1, 1), weight.expand(len(maps), -1, -1), maps).transpose(1, 2)
        out = torch.clamp_min(products, 0.0, out=products.new_empty(products.shape))
        ctx.save_for_backward(maps, weight, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight, out = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(gradients[0], out, 0.0).transpose(1, 2)  # (B, M, P)
        for_maps = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_maps = weight.t() @ gradient
        if ctx.needs_input_grad[1]:
            for_weight = torch.bmm(gradient, maps.transpose(1, 2)).sum(0)
        if ctx.needs_input_grad[2]:
            for_bias = gradient.sum((0, 2))
        return for_maps, for_weight, for_bias


def _scaled_product(
    sources: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, widths: tuple[int, ...]
) -> Tensor:
    return F.linear(_by_column(sources, scale, widths), weight, bias)


def _by_column(features: Tensor, scale: Tensor, widths: tuple[int, ...]) -> Tensor:
    """(B, sum of widths) times one number a column."""
    if len(set(widths)) == 1:
        return (features.unflatten(1, (len(widths), widths[0])) * scale.view(1, -1, 1)).flatten(1)
    return torch.cat([part * scale[j] for j, part in enumerate(features.split(widths, dim=1))], dim=1)


def adapted(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """g(W h + c) for maps h (B, C, P), W (M, C): (B, M, P)."""
    return torch.baddbmm(bias.view(1, -1, 1), weight.expand(len(maps), -1, -1), maps).relu_()


class Adapter(_Lateral):
    """Eq. 2: a single hidden layer adapter on the concatenation of all earlier columns.

    Args:
        source_widths: features of layer i-1 of every earlier column; maps where V is a 1x1 convolution.
        width: features that V projects to.
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

    @property
    def num_features(self) -> int:
        """Of all sources together."""
        return sum(self._widths)

    def feature_scale(self) -> Tensor:
        """alpha for every source feature, (sum of source widths,)."""
        if len(set(self._widths)) == 1:
            return self.scale.repeat_interleave(self._widths[0])
        return torch.cat([self.scale[j].expand(width) for j, width in enumerate(self._widths)])

    def project(self, sources: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        """g(V(alpha * h)): (B, sum of source widths, ...) -> (B, width, ...)."""
        layer = self.project_layer
        if not self.convolutional:
            operands = (sources.flatten(1), self.scale, layer.weight, layer.bias, self._widths)
            # The same numbers; outside of training without autograd's bookkeeping.
            apply = ScaledProduct.apply if torch.is_grad_enabled() else _scaled_product
            return apply(*operands).relu_()
        # A 1x1 convolution is one product of matrices an image, which reads sources where they lie: in all layouts,
        # and as the first maps of a wider tensor. alpha * V are a few numbers, alpha * h a pass over all maps.
        weight, bias = self.map_affine()
        maps, size = sources.flatten(2), sources.shape[2:]
        if layout == torch.channels_last:
            return ChannelsLastProduct.apply(maps, weight, bias).unflatten(1, size).permute(0, 3, 1, 2)
        return adapted(maps, weight, bias).unflatten(2, size)

    def map_affine(self) -> tuple[Tensor, Tensor]:
        """alpha * V, (width, sum of source widths), and c of an adapter over maps."""
        weight, bias = self.project_layer.weight.flatten(1), self.project_layer.bias
        return _by_column(weight, self.scale, self._widths), bias  # type: ignore[return-value]  # made with one


Lateral = LinearLateral | Adapter
