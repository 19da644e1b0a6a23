"""Average Fisher sensitivity (Rusu et al. 2016, section 3). Plain torch and gymnasium, no Ray.

    F_i^k = E_rho(s,a)[ (d log pi(a|s) / d h^_i^k) (d log pi(a|s) / d h^_i^k)^T ]
    AFS(i, k, m) = F_i^k(m, m) / sum_k F_i^k(m, m)
    AFS(i, k) = sum_m AFS(i, k, m), scaled so that a layer sums to 1 over columns

h^ are activations divided by their standard deviation, rho is the state-action distribution of the trained policy on
its task. A convolutional map is one feature: its gradient is summed over pixels, its deviation taken over samples and
pixels.

Samples of a batch do not see one another, so the gradient of the batch's summed log-likelihood with respect to an
activation holds every sample's own gradient: one backward pass a batch (one an action for the exact expectation).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rllib_pnn.analysis.rollouts import Moments, Rollout, column_index, column_of, sample_actions
from rllib_pnn.analysis.sensitivity import Sensitivity, layer_name, layer_shares
from rllib_pnn.network import ProgressiveNetwork

ACTIONS = ("sampled", "expected")


def average_fisher_sensitivity(
    network: ProgressiveNetwork,
    observations: np.ndarray | Tensor | Rollout,
    *,
    column: int = -1,
    actions: str = "sampled",
    continuous: bool = False,
    batch_size: int = 256,
    seed: int = 0,
    tasks: Sequence[str] = (),
) -> Sensitivity:
    """How much the policy of `column` depends on every feature of every layer of every column up to it.

    The derivatives are total: an early layer counts through all that reads it, laterals and its own column's layers.

    Recurrent networks: an activation's effect on later actions counts too, for the gradient is that of the whole
    sequence's likelihood. The score of a later action has mean 0 given the past, so the expected square is the sum of
    the squares of the single actions'.

    Args:
        network: not changed.
        observations: (N, ...) states that the policy visits on its task, (N, T, ...) sequences for a recurrent network,
            or a `Rollout` with them (see `play`), which also knows the LSTM states before each sequence.
        column: whose policy; negative counts from the newest.
        actions: `"sampled"` draws one action a state from the policy, as in the paper; `"expected"` sums over all
            actions of a Discrete space with their probabilities: the same expectation without the noise, at one
            backward pass an action.
        continuous: the policy is a diagonal Gaussian (a Box space): outputs are means and log standard deviations.
            A `Rollout` knows by itself.
        batch_size: states (sequences) in memory at once.
        seed: of the sampled actions.
        tasks: names of the tasks of the columns, for the pictures.

    Raises:
        ValueError: with one line that names the argument.
    """
    k = column_index(network, column)
    recurrent = network.is_recurrent
    continuous = continuous or (isinstance(observations, Rollout) and observations.continuous)
    if actions not in ACTIONS:
        raise ValueError(f"actions: expected one of {', '.join(ACTIONS)}, got {actions!r}")
    if actions == "expected" and (continuous or recurrent):
        kind = "a recurrent network" if recurrent else "a continuous policy"
        raise ValueError(f"actions: 'expected' needs a feed-forward network with discrete actions; this is {kind}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    states: Mapping[str, Tensor] = {}
    resets: Tensor | None = None
    if isinstance(observations, Rollout):
        if recurrent:
            states = {key: torch.as_tensor(value) for key, value in observations.states.items()}
            resets = torch.as_tensor(observations.resets)
        observations = observations.observations
    if len(observations) < 2:
        what = "sequences (num_states counts their steps)" if recurrent else "observations"
        raise ValueError(f"observations: expected at least 2 {what}, got {len(observations)}")

    generator = torch.Generator(device=network.device).manual_seed(seed)
    num_actions = None if continuous else network.num_outputs
    moments = Moments()
    squares: dict[tuple[int, int], Tensor] = {}
    num_samples = 0
    for start in range(0, len(observations), batch_size):
        part = slice(start, start + batch_size)
        obs = torch.as_tensor(observations[part])
        state = {key: value[part].to(network.device) for key, value in states.items()}
        hidden: dict[tuple[int, int], Tensor] = {}

        def collect(j: int, layer: int, tensor: Tensor, hidden: dict[tuple[int, int], Tensor] = hidden) -> Tensor:
            # Below the first trainable or probed tensor nothing is recorded: the lowest layers become leaves here.
            hidden[j, layer] = tensor if tensor.requires_grad else tensor.requires_grad_()
            return hidden[j, layer]

        with torch.enable_grad():
            output = network(
                obs,
                k,
                state or None,
                resets=None if resets is None else resets[part].to(network.device),
                transform=collect,
            )
            logits = output.logits.reshape(-1, network.num_outputs)
            weighted = log_likelihoods(logits, num_actions, actions, generator)
            keys, tensors = list(hidden), list(hidden.values())
            for index, (log_likelihood, weight) in enumerate(weighted):
                gradients = torch.autograd.grad(
                    log_likelihood.sum(), tensors, retain_graph=index < len(weighted) - 1, allow_unused=True
                )
                for key, tensor, gradient in zip(keys, tensors, gradients, strict=True):
                    total = torch.zeros_like(tensor) if gradient is None else gradient
                    per_feature = total.flatten(2).sum(2) if total.dim() > 2 else total  # (B, n)
                    square = (per_feature.double().square() * weight.unsqueeze(1)).sum(0)
                    squares[key] = squares.get(key, torch.zeros_like(square)) + square
        for key, tensor in hidden.items():
            moments.add(key, tensor.detach())
        num_samples += len(logits)

    specs = [column_of(network, j).layout.spec for j in range(k + 1)]
    raw = tuple(
        tuple(
            (squares[j, i] / num_samples * moments.variance((j, i))).cpu().numpy()
            if (j, i) in squares
            else np.zeros(specs[j].layers[i - 1].width if i <= len(specs[j].layers) else 0)
            for j in range(k + 1)
        )
        for i in range(1, len(specs[k].layers) + 1)
    )
    return Sensitivity(
        method="afs",
        column=k,
        layers=layer_names(network, k),
        values=np.stack([layer_shares(layer) for layer in raw]),
        raw=raw,
        tasks=tuple(tasks),
        settings={
            "num_samples": num_samples,
            "actions": actions,
            "seed": seed,
            "laterals": lateral_keys(network, k),
        },
    )


def layer_names(network: ProgressiveNetwork, column: int) -> tuple[str, ...]:
    """Names of a column's layers, from the observation upwards."""
    layers = column_of(network, column).layout.spec.to_json()["layers"]
    return tuple(layer_name(layer, number) for number, layer in enumerate(layers, start=1))


def lateral_keys(network: ProgressiveNetwork, column: int) -> list[list[str]]:
    """What has a lateral in each column up to `column`: layer numbers, `policy`, `value`. For the pictures."""
    return [list(column_of(network, j).laterals.keys()) for j in range(column + 1)]


def log_likelihoods(
    logits: Tensor, num_actions: int | None, actions: str, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of log pi(a|s) (B,) with gradient and its weight (B,) in the expectation over a."""
    ones = torch.ones(len(logits), dtype=torch.float64, device=logits.device)
    if num_actions is None:
        mean, log_std = logits.chunk(2, dim=-1)
        action = sample_actions(logits.detach(), None, generator)
        z = (action - mean) * torch.exp(-log_std)
        return [((-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1), ones)]
    log_pi = logits.log_softmax(-1)
    if actions == "expected":
        return [(log_pi[:, a], log_pi[:, a].detach().double().exp()) for a in range(num_actions)]
    action = sample_actions(logits.detach(), num_actions, generator)
    return [(log_pi.gather(1, action.unsqueeze(1)).squeeze(1), ones)]
