"""A3C's equations (Mnih et al. 2016, arXiv 1602.01783, section 4 and algorithm S3). Plain numpy and torch, no Ray.

Shapes: T rollout length, N envs, M = T * N transitions. A transition t goes from s_t with action a_t and reward r_t
to s_{t+1}; where an episode ends with it, s_{t+1} is that episode's last state, never the next episode's first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class A3CLoss(NamedTuple):
    """Scalars: `total = policy + vf_loss_coeff * value - entropy_coeff * entropy`."""

    total: Tensor
    policy: Tensor
    value: Tensor
    entropy: Tensor


def n_step_advantages(
    rewards: np.ndarray,
    values: np.ndarray,
    next_values: np.ndarray,
    terminated: np.ndarray,
    done: np.ndarray,
    *,
    gamma: float,
    lambda_: float = 1.0,
) -> np.ndarray:
    """Advantages A_t of n-step returns, or of GAE(lambda) (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

        delta_t = r_t + gamma * V(s_{t+1}) * [not terminated_t] - V(s_t)
        A_t = delta_t + gamma * lambda * [not done_t] * A_{t+1}

    With lambda = 1 this is A3C's R_t - V(s_t): rewards up to the rollout's or the episode's end, then V of the state
    reached there, which is 0 after a termination and V(s_{t+1}) after a truncation.

    Args:
        rewards, values, next_values: (T, N) float32; V(s_t) and V(s_{t+1}).
        terminated: (T, N) bool, the environment's own end.
        done: (T, N) bool, terminated or truncated.

    Returns:
        (T, N) float32; the returns are `advantages + values`.
    """
    advantages = np.empty_like(rewards)
    carry = np.zeros(rewards.shape[1:], dtype=rewards.dtype)
    gamma, decay = rewards.dtype.type(gamma), rewards.dtype.type(gamma * lambda_)
    deltas = rewards + gamma * next_values * ~terminated - values
    for t in reversed(range(len(rewards))):
        carry = deltas[t] + decay * ~done[t] * carry
        advantages[t] = carry
    return advantages


def a3c_loss(
    logp: Tensor,
    entropy: Tensor,
    values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    vf_loss_coeff: float,
    entropy_coeff: float,
) -> A3CLoss:
    """Policy gradient, value regression and entropy bonus, as **means** over the transitions in `mask`.

        policy  = mean(-log pi(a_t | s_t) * A_t)
        value   = mean(0.5 * (R_t - V(s_t))^2)
        entropy = mean(H(pi(. | s_t)))

    The paper accumulates sums; means keep the learning rate's meaning when T or N change.

    Args:
        logp, entropy, values: (M,) with gradient.
        advantages, returns: (M,) constants A_t and R_t.
        mask: (M,) float, 0 where there is nothing to learn from (the reset steps of NEXT_STEP autoreset).
    """
    weights = mask / mask.sum().clamp_min(1.0)
    policy = -(weights * logp * advantages).sum()
    value = 0.5 * (weights * torch.square(returns - values)).sum()
    mean_entropy = (weights * entropy).sum()
    total = policy + vf_loss_coeff * value - entropy_coeff * mean_entropy
    return A3CLoss(total, policy, value, mean_entropy)
