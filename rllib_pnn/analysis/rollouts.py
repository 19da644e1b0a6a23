"""Plays a network in a gymnasium environment: scores and visited states for AFS, APS and pruning. No Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rllib_pnn.envs.registry import full_id, register_envs, vectorization_mode
from rllib_pnn.envs.score import MAX_EPISODE_STEPS, episode_scores
from rllib_pnn.network import ProgressiveNetwork
from rllib_pnn.network.column import Column, Transform

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollout:
    """What one column did in its environment."""

    returns: np.ndarray
    """(E,) return per episode, unclipped; of the first `MAX_EPISODE_STEPS` steps if it does not end."""
    lengths: np.ndarray
    """(E,) agent steps of each episode."""
    observations: np.ndarray
    """(N, ...) visited observations, or (N, T, ...) sequences for recurrent networks; empty unless asked for."""
    states: dict[str, np.ndarray]
    """Recurrent networks: LSTM states {"h": (N, S), "c": (N, S)} before each sequence; else {}."""
    resets: np.ndarray
    """(N, T) true where an episode starts, recurrent networks only; else empty."""
    continuous: bool = False
    """The actions are a Box."""


def column_index(network: ProgressiveNetwork, column: int) -> int:
    """A column's index counted from 0. Raises `ValueError` if the network has no such column."""
    if not -network.num_columns <= column < network.num_columns:
        raise ValueError(f"column: {column} of a network with {network.num_columns} columns")
    return range(network.num_columns)[column]


def column_of(network: ProgressiveNetwork, column: int) -> Column:
    """A column's module, typed."""
    return cast(Column, network.columns[column])


def discrete_actions(network: ProgressiveNetwork, env: gym.vector.VectorEnv, env_id: str) -> int | None:
    """Number of actions; None for a Box. Raises `ValueError` if the network was not made for this environment."""
    space = env.single_action_space
    if isinstance(space, gym.spaces.Discrete):
        wanted, actions = int(space.n), int(space.n)
    elif isinstance(space, gym.spaces.Box):
        wanted, actions = 2 * int(np.prod(space.shape)), None
    else:
        raise ValueError(f"{env_id}: actions of type {type(space).__name__}; expected Discrete or Box")
    shape = tuple(env.single_observation_space.shape or ())
    if (shape, wanted) != (network.given_observation_shape, network.num_outputs):
        raise ValueError(
            f"{env_id}: observations {shape} and {wanted} outputs; the network was made for "
            f"{network.given_observation_shape} and {network.num_outputs}"
        )
    return actions


@torch.no_grad()
def play(
    network: ProgressiveNetwork,
    env: str,
    env_config: Mapping[str, Any] | None = None,
    *,
    column: int = -1,
    num_episodes: int = 10,
    num_states: int = 0,
    sequence_length: int = 32,
    seed: int = 0,
    num_envs: int | None = None,
    transform: Transform | None = None,
    normalize_actions: bool = True,
) -> Rollout:
    """Plays episodes with actions sampled from the policy; the same seed gives the same rollout.

    Every environment contributes a fixed number of episodes, so that short ones are not over-represented.

    Args:
        network, column: whose policy plays.
        env, env_config: gymnasium id and keyword arguments of the environment.
        num_episodes: episodes to finish.
        num_states: keep so many observations, drawn uniformly from these episodes (fewer if there are fewer); recurrent
            networks keep whole sequences of `sequence_length` steps, `num_states` steps in all.
        num_envs: environments side by side; None takes one an episode, 16 at most.
        transform: replaces activations (see `ProgressiveNetwork.forward`).
        normalize_actions: Box policies act in [-1, 1], scaled to the space (RLlib's default).

    Raises:
        ValueError: the environment can't be made, or the network was made for another one.
    """
    if num_episodes < 1 or num_states < 0 or sequence_length < 1:
        raise ValueError(
            f"num_episodes ({num_episodes}) and sequence_length ({sequence_length}) must be at least 1, "
            f"num_states ({num_states}) at least 0"
        )
    envs = make_envs(env, env_config, num_envs or min(num_episodes, 16))
    try:
        actions = discrete_actions(network, envs, env)
        chunk = sequence_length if network.is_recurrent else 1
        kept = _Reservoir(num_states // chunk, np.random.default_rng(seed))
        returns, lengths = _play(
            network, envs, actions, column, num_episodes, chunk, kept, seed, transform, normalize_actions
        )
        return _rollout(returns, lengths, kept.items, network.is_recurrent, actions is None)
    finally:
        envs.close()


def make_envs(env: str, env_config: Mapping[str, Any] | None, num_envs: int) -> gym.vector.VectorEnv:
    """`gymnasium.make_vec`, with one-line `ValueError`s."""
    register_envs()
    try:
        name = full_id(env)
        mode = vectorization_mode(name)
        return gym.make_vec(name, num_envs=num_envs, vectorization_mode=mode, **dict(env_config or {}))
    except (gym.error.Error, TypeError, ValueError, ImportError, OSError) as error:
        raise ValueError(
            f"{env}: can't be made with {dict(env_config or {})}: {' '.join(str(error).split())}"
        ) from error


def sample_actions(logits: Tensor, actions: int | None, generator: torch.Generator) -> Tensor:
    """Actions drawn from the policy: (B,) for a Discrete space, (B, A / 2) of a diagonal Gaussian for a Box."""
    if actions is not None:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    mean, log_std = logits.chunk(2, dim=-1)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    return mean + log_std.exp() * noise


class Moments:
    """Running variance of every feature over samples (and pixels), in double precision."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int], tuple[Tensor, Tensor, int]] = {}

    def add(self, key: tuple[int, int], tensor: Tensor) -> None:
        """Adds activations (B, n, ...) of `(column, layer)`."""
        values = tensor.double().flatten(2).movedim(1, -1).flatten(0, 1) if tensor.dim() > 2 else tensor.double()
        total, square, count = values.sum(0), values.square().sum(0), len(values)
        if key in self._sums:
            before = self._sums[key]
            total, square, count = total + before[0], square + before[1], count + before[2]
        self._sums[key] = (total, square, count)

    @property
    def keys(self) -> list[tuple[int, int]]:
        return list(self._sums)

    def variance(self, key: tuple[int, int]) -> Tensor:
        """(n,) population variance."""
        total, square, count = self._sums[key]
        return (square / count - (total / count).square()).clamp_min(0)


def _within(actions: np.ndarray, space: gym.spaces.Box, normalize: bool) -> np.ndarray:
    """[-1, 1] -> a bounded Box, as RLlib's `normalize_actions` does; else, and for unbounded ones, clipped alone."""
    if not normalize or not space.is_bounded() or not np.issubdtype(space.dtype, np.floating):
        return actions.astype(space.dtype).clip(space.low, space.high)
    return (space.low + (actions + 1) * (space.high - space.low) / 2).clip(space.low, space.high)


class _Reservoir:
    """A uniform sample of a stream of unknown length (Vitter 1985, algorithm R)."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.items: list[dict[str, np.ndarray]] = []
        self._size = size
        self._rng = rng
        self._offered = 0

    def offer(self, make: Callable[[], dict[str, np.ndarray]]) -> None:
        self._offered += 1
        if len(self.items) < self._size:
            self.items.append(make())
        elif self._size and (place := int(self._rng.integers(self._offered))) < self._size:
            self.items[place] = make()


def _play(
    network: ProgressiveNetwork,
    envs: gym.vector.VectorEnv,
    actions: int | None,
    column: int,
    num_episodes: int,
    chunk: int,
    kept: _Reservoir,
    seed: int,
    transform: Transform | None,
    normalize_actions: bool,
) -> tuple[list[float], list[int]]:
    n = envs.num_envs
    recurrent = network.is_recurrent
    mode = envs.metadata.get("autoreset_mode", gym.vector.AutoresetMode.NEXT_STEP)
    same_step = mode == gym.vector.AutoresetMode.SAME_STEP
    generator = torch.Generator(device=network.device).manual_seed(seed)
    obs, _ = envs.reset(seed=seed)
    state = network.initial_state(n)
    quota = np.array([num_episodes // n + (i < num_episodes % n) for i in range(n)])
    reward_sum, length = np.zeros(n), np.zeros(n, dtype=int)
    just_reset = np.ones(n, dtype=bool)  # this observation starts an episode
    dead = np.zeros(n, dtype=bool)  # NEXT_STEP: the coming step only resets; its action and reward mean nothing
    returns: list[float] = []
    lengths: list[int] = []
    steps: list[dict[str, np.ndarray]] = []  # the current chunk of steps, each (n, ...)
    before: dict[str, np.ndarray] = {}

    while (quota > 0).any():
        if state and just_reset.any():
            keep = torch.as_tensor(~just_reset, dtype=torch.float32, device=network.device).unsqueeze(1)
            state = {key: value * keep for key, value in state.items()}
        if not steps:
            before = {key: value.cpu().numpy() for key, value in state.items()}
            counted = (quota > 0) & ~dead
        # Native vector environments may reuse their buffers.
        steps.append({"obs": np.array(obs), "resets": just_reset})
        if len(steps) == chunk:
            for i in np.flatnonzero(counted).tolist():
                kept.offer(partial(_sequence, steps, before, i))
            steps = []
        batch = torch.as_tensor(np.asarray(obs))
        output = network(batch.unsqueeze(1) if recurrent else batch, column, state or None, transform=transform)
        state = output.state
        chosen = sample_actions(output.logits.reshape(n, -1), actions, generator).cpu().numpy()
        space = envs.single_action_space
        if isinstance(space, gym.spaces.Box):
            chosen = _within(chosen.reshape(n, *space.shape), space, normalize_actions)
        elif isinstance(space, gym.spaces.Discrete):
            chosen = chosen + space.start
        obs, rewards, terminated, truncated, infos = envs.step(chosen)
        reward_sum[~dead] += np.asarray(rewards)[~dead]
        length[~dead] += 1
        ended = ~dead & (terminated | truncated)
        told, scores = episode_scores(infos, ended)
        endless = ~ended & (length >= MAX_EPISODE_STEPS)
        for i in np.flatnonzero(ended | endless).tolist():
            if quota[i] > 0:
                quota[i] -= 1
                returns.append(float(scores[i] if told[i] else reward_sum[i]))
                lengths.append(int(length[i]))
                if endless[i]:
                    logger.warning(
                        "an episode of %d steps did not end; it counts with its return so far", MAX_EPISODE_STEPS
                    )
            reward_sum[i], length[i] = 0.0, 0
        just_reset, dead = (ended, dead) if same_step else (dead, ended)
    return returns, lengths


def _sequence(
    steps: Sequence[Mapping[str, np.ndarray]], before: Mapping[str, np.ndarray], i: int
) -> dict[str, np.ndarray]:
    """What environment i saw in a chunk of steps, and its LSTM state before."""
    return {
        "obs": np.stack([step["obs"][i] for step in steps]),
        "resets": np.array([step["resets"][i] for step in steps]),
        **{key: value[i] for key, value in before.items()},
    }


def _rollout(
    returns: Sequence[float],
    lengths: Sequence[int],
    items: Sequence[Mapping[str, np.ndarray]],
    recurrent: bool,
    continuous: bool,
) -> Rollout:
    def stack(key: str) -> np.ndarray:
        return np.stack([item[key] for item in items]) if items else np.empty((0, 0))

    observations = stack("obs")
    states = {key: stack(key) for key in ("h", "c")} if recurrent else {}
    resets = stack("resets").astype(bool) if recurrent else np.empty((0, 0), dtype=bool)
    return Rollout(
        np.array(returns),
        np.array(lengths),
        observations if recurrent else observations.reshape(-1, *observations.shape[2:]),
        states,
        resets,
        continuous,
    )
