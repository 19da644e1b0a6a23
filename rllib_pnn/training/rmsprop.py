"""RMSProp as A3C's paper has it (Mnih et al. 2016, arXiv 1602.01783, section 4). Plain torch, no Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class RMSPropTF(Optimizer):
    """Non-centered RMSProp with epsilon **inside** the root, as in the paper, and g = 1 at first, as in TensorFlow:

        g <- alpha * g + (1 - alpha) * d^2,    theta <- theta - lr * d / sqrt(g + eps)

    torch's own has `sqrt(g) + eps` and begins with g = 0. The first difference matters where gradients are small: at
    eps = 1e-5 a parameter whose gradient is 1e-4 moves by lr / 30 here and by lr / 1.1 there, noise or not. The second
    matters for the first 1 / (1 - alpha) updates: from g = 0 the first of them moves every parameter by lr / sqrt(1 -
    alpha), ten times lr, which can leave a policy sure of one action; from 1 they begin small and grow.

    Args:
        params: as any torch optimizer's.
        lr: learning rate.
        alpha: decay of the mean square g.
        eps: the paper's was 0.1, with gradients summed over a rollout; 1e-5 is usual where they are averaged.

    Raises:
        ValueError: lr or eps below 0, alpha outside [0, 1).
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float, alpha: float = 0.99, eps: float = 1e-5
    ) -> None:
        if not (lr >= 0 and eps >= 0 and 0 <= alpha < 1):
            raise ValueError(f"rmsprop_tf: expected lr and eps >= 0, alpha in [0, 1), got {lr}, {eps}, {alpha}")
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alpha, eps, lr = group["alpha"], group["eps"], group["lr"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["square_avg"] = torch.ones_like(parameter)
                mean_square = state["square_avg"].mul_(alpha).addcmul_(gradient, gradient, value=1 - alpha)
                parameter.addcdiv_(gradient, (mean_square + eps).sqrt_(), value=-float(lr))
        return loss
