"""Average perturbation sensitivity (Rusu et al. 2016, section 3). Plain torch and gymnasium, no Ray.

Gaussian noise is added to the post-activation outputs of one layer of one column, fresh at every forward pass, with a
variance proportional to each feature's own variance. The noise is raised until the policy's score has dropped by half;
the precision at that point, L_i^k = 1 / sigma^2, says how sensitive the policy is there:

    APS(i, k) = L_i^k / sum_k L_i^k

Departures and readings: a drop is measured above the game's lowest return (see transfer.py), for half of a negative
score would be a rise. Every evaluation draws the same random numbers: the score is a function of sigma alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rllib_pnn.analysis.fisher import lateral_keys, layer_names
from rllib_pnn.analysis.rollouts import Moments, column_index, column_of, play
from rllib_pnn.analysis.sensitivity import Sensitivity
from rllib_pnn.network import ProgressiveNetwork

LOWEST_NOISE = 1e-2
HIGHEST_NOISE = 1e2


class CriticalNoise(NamedTuple):
    """Where a score falls below a threshold."""

    sigma: float
    """Noise in standard deviations of the activation; a bound of the search if there is no crossing within it."""
    crossing: str
    """`found`; `below` if the lowest noise is too much already, `above` if the highest does not suffice."""
    num_evaluations: int

    @property
    def precision(self) -> float:
        """L = 1 / sigma^2; 0 where no noise of the search suffices."""
        return 0.0 if self.crossing == "above" else 1.0 / self.sigma**2


def average_perturbation_sensitivity(
    network: ProgressiveNetwork,
    env: str,
    env_config: Mapping[str, Any] | None = None,
    *,
    floor: float,
    column: int = -1,
    num_episodes: int = 10,
    drop: float = 0.5,
    seed: int = 0,
    num_states: int = 2048,
    lowest: float = LOWEST_NOISE,
    highest: float = HIGHEST_NOISE,
    tolerance: float = 0.1,
    num_envs: int | None = None,
    normalize_actions: bool = True,
    tasks: Sequence[str] = (),
    map: Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]] = map,
) -> Sensitivity:
    """How little noise in each layer of each column up to `column` halves the policy's score on its task.

    Args:
        network: not changed.
        env, env_config: gymnasium id and keyword arguments of the task.
        floor: the game's lowest return (Pong: -21); the score counts from there.
        column: whose policy; negative counts from the newest.
        num_episodes: episodes a score is the mean of.
        drop: the share of the score above the floor that has to go.
        seed: of the environments, the actions and the noise.
        num_states: states from which the activations' variances are taken.
        lowest, highest: the search for sigma, in standard deviations of the activations.
        tolerance: relative width of the interval in which the search for sigma ends.
        num_envs: environments side by side; None takes one an episode, 16 at most.
        normalize_actions: see `play`.
        tasks: names of the tasks of the columns, for the pictures.
        map: applies a function to a list; layers and columns are searched independently, so a parallel map (Ray,
            multiprocessing) gives the same result. Function and items can be pickled.

    Raises:
        ValueError: an argument is out of range, or the undisturbed score is not above the floor.
    """
    k = column_index(network, column)
    if not 0 < drop < 1:
        raise ValueError(f"drop: expected a share between 0 and 1, got {drop}")
    if not 0 < lowest < highest or not tolerance > 0:
        raise ValueError(f"expected 0 < lowest ({lowest}) < highest ({highest}) and tolerance ({tolerance}) above 0")
    play_it = partial(
        play, network, env, env_config, column=k, seed=seed, num_envs=num_envs, normalize_actions=normalize_actions
    )
    undisturbed = play_it(num_episodes=num_episodes, num_states=num_states)
    score = float(undisturbed.returns.mean())
    if not score > floor:
        raise ValueError(
            f"{env}: column {k} scores {score:.4g}, not above the floor of {floor:.4g}: nothing to disturb"
        )
    deviations = activation_deviations(network, undisturbed.observations, undisturbed.states, undisturbed.resets, k)
    searches = [
        _Search(
            network,
            env,
            dict(env_config or {}),
            k,
            num_episodes,
            num_envs,
            normalize_actions,
            seed,
            floor + (1 - drop) * (score - floor),
            (lowest, highest, tolerance),
            layer,
            j,
            deviations[j, layer],
        )
        for layer in range(1, len(column_of(network, k).layout.spec.layers) + 1)
        for j in range(k + 1)
        if (j, layer) in deviations
    ]
    found = dict(zip([(s.layer, s.source) for s in searches], map(_run_search, searches), strict=True))

    names = layer_names(network, k)
    precision = np.zeros((len(names), k + 1))
    notes = []
    for (layer, j), critical in found.items():
        precision[layer - 1, j] = critical.precision
        if critical.crossing == "below":
            notes.append(
                f"column {j}, layer {layer}: the lowest noise ({lowest:g}) already costs more than {drop:.0%}; "
                "its sensitivity is a lower bound"
            )
        elif critical.crossing == "above":
            notes.append(
                f"column {j}, layer {layer}: the highest noise ({highest:g}) costs less than {drop:.0%}; taken as 0"
            )
    total = precision.sum(axis=1, keepdims=True)
    return Sensitivity(
        method="aps",
        column=k,
        layers=names,
        values=np.divide(precision, total, out=np.full_like(precision, np.nan), where=total > 0),
        raw=tuple(tuple(np.array([value]) for value in row) for row in precision),
        tasks=tuple(tasks),
        notes=tuple(notes),
        settings={
            "score": score,
            "floor": floor,
            "drop": drop,
            "num_episodes": num_episodes,
            "seed": seed,
            "laterals": lateral_keys(network, k),
            "num_evaluations": 1 + sum(critical.num_evaluations for critical in found.values()),
        },
    )


def find_critical_noise(
    score_at: Callable[[float], float],
    threshold: float,
    *,
    lowest: float = LOWEST_NOISE,
    highest: float = HIGHEST_NOISE,
    tolerance: float = 0.1,
) -> CriticalNoise:
    """The noise at which a falling score crosses `threshold`, by bisection on log sigma.

    Args:
        score_at: sigma -> score.
        tolerance: the search ends when the interval's ends differ by less than this share.
    """
    if score_at(highest) > threshold:
        return CriticalNoise(highest, "above", 1)
    if score_at(lowest) <= threshold:
        return CriticalNoise(lowest, "below", 2)
    low, high, count = math.log(lowest), math.log(highest), 2
    while high - low > math.log1p(tolerance):
        middle = (low + high) / 2
        count += 1
        if score_at(math.exp(middle)) > threshold:
            low = middle
        else:
            high = middle
    return CriticalNoise(math.exp((low + high) / 2), "found", count)


@torch.no_grad()
def activation_deviations(
    network: ProgressiveNetwork,
    observations: np.ndarray,
    states: Mapping[str, np.ndarray],
    resets: np.ndarray,
    column: int,
    batch_size: int = 256,
) -> dict[tuple[int, int], Tensor]:
    """`{(column, layer): (n,)}` standard deviation of every feature that `column`'s policy can depend on."""
    moments = Moments()
    for start in range(0, len(observations), batch_size):
        part = slice(start, start + batch_size)

        def collect(j: int, layer: int, tensor: Tensor) -> Tensor:
            moments.add((j, layer), tensor)
            return tensor

        network(
            torch.as_tensor(observations[part]),
            column,
            {key: torch.as_tensor(value[part]) for key, value in states.items()} or None,
            resets=torch.as_tensor(resets[part]) if states else None,
            transform=collect,
        )
    return {key: moments.variance(key).sqrt().float() for key in moments.keys}


@dataclass(frozen=True)
class _Search:
    """Everything that one search needs, so that it can run in another process."""

    network: ProgressiveNetwork
    env: str
    env_config: dict[str, Any]
    column: int
    num_episodes: int
    num_envs: int | None
    normalize_actions: bool
    seed: int
    threshold: float
    bounds: tuple[float, float, float]
    layer: int
    source: int
    deviation: Tensor

    def score_at(self, sigma: float) -> float:
        generator = torch.Generator(device=self.network.device).manual_seed(self.seed)

        def disturb(j: int, layer: int, tensor: Tensor) -> Tensor:
            if (j, layer) != (self.source, self.layer):
                return tensor
            scale = (sigma * self.deviation).view(1, -1, *[1] * (tensor.dim() - 2))
            return tensor + scale * torch.randn(tensor.shape, generator=generator, device=tensor.device)

        rollout = play(
            self.network,
            self.env,
            self.env_config,
            column=self.column,
            num_episodes=self.num_episodes,
            seed=self.seed,
            num_envs=self.num_envs,
            transform=disturb,
            normalize_actions=self.normalize_actions,
        )
        return float(rollout.returns.mean())


def _run_search(search: _Search) -> CriticalNoise:
    lowest, highest, tolerance = search.bounds
    return find_critical_noise(search.score_at, search.threshold, lowest=lowest, highest=highest, tolerance=tolerance)
