"""Plays a column on a task and measures it. Used at every task's end and by `rllib evaluate`.

Everything random is seeded, so that the same column on the same task plays the same episodes with bit-equal policy
outputs: forgetting is measured by playing again, not assumed to be zero.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.env.env_context import EnvContext
from ray.tune.registry import ENV_CREATOR, _global_registry

from rllib_pnn.envs.registry import ENV_IDS, full_id, vectorization_mode
from rllib_pnn.envs.score import MAX_EPISODE_STEPS, episode_scores
from rllib_pnn.network.progressive import ProgressiveNetwork
from rllib_pnn.training.recognition import FIRST_STEPS, FirstSteps, Recogniser, features_of

logger = logging.getLogger(__name__)

EPISODES_PER_SHARD = 8  # environments that one process plays side by side


@dataclass(frozen=True)
class ColumnEvaluation:
    """What a column did on a task.

    Args:
        returns: return of every episode, unclipped; of the first `MAX_EPISODE_STEPS` steps if it does not end.
        lengths: steps of every episode.
        digest: SHA-256 over all policy outputs in order; equal digests mean bit-equal behaviour.
        first_steps: what the episodes' first steps showed.
        chosen: the column that played each episode; empty unless it was chosen from the observations.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    digest: str
    first_steps: FirstSteps | None = field(default=None, compare=False)
    chosen: tuple[int, ...] = ()

    @property
    def episode_return_mean(self) -> float:
        return float(np.mean(self.returns)) if self.returns else float("nan")

    @classmethod
    def merge(cls, parts: Sequence[ColumnEvaluation]) -> ColumnEvaluation:
        digest = hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest()
        first_steps: FirstSteps | None = None
        for part in parts:
            if part.first_steps is not None:
                first_steps = part.first_steps if first_steps is None else first_steps.merge(part.first_steps)
        return cls(
            tuple(r for part in parts for r in part.returns),
            tuple(n for part in parts for n in part.lengths),
            digest if len(parts) != 1 else parts[0].digest,
            first_steps,
            tuple(k for part in parts for k in part.chosen),
        )


def shards(num_episodes: int, seed: int) -> list[tuple[int, int]]:
    """Splits an evaluation into independent parts: `(episodes, seed)` each, the same whoever plays them."""
    parts = [min(EPISODES_PER_SHARD, num_episodes - i) for i in range(0, num_episodes, EPISODES_PER_SHARD)]
    return [(count, seed + 10_000 * i) for i, count in enumerate(parts)]


def make_vector_env(
    env: str | Callable[[EnvContext], Any], env_config: Mapping[str, Any], num_envs: int, *, vectorized: bool = False
) -> Any:
    """A vector env of a gymnasium id, of a name registered with Tune, or of an env creator.

    Args:
        env: the package's own ids are made as their native vector env.
        env_config: what the environment is made with.
        vectorized: whether training's mode is `vector_entry_point`: other ids are made as their native vector env,
            too, and a creator makes a vector env, of the `num_envs` in its config. If not it makes single environments.
    """
    creator = _global_registry.get(ENV_CREATOR, env) if _is_registered(env) else env
    if callable(creator):
        if vectorized:
            return creator(EnvContext({**env_config, "num_envs": num_envs}, worker_index=0))
        context = EnvContext(dict(env_config), worker_index=0)
        return gym.vector.SyncVectorEnv([lambda: creator(context)] * num_envs)
    name = full_id(str(env))
    mode = vectorization_mode(name, vectorized=vectorized)
    return gym.make_vec(name, num_envs=num_envs, vectorization_mode=mode, **dict(env_config))


def is_vectorized(config: AlgorithmConfig) -> bool:
    """Whether env creators make vector envs. RLlib takes names, which its default is, and gymnasium's enumeration."""
    return gym.VectorizeMode(config.gym_env_vectorize_mode) is gym.VectorizeMode.VECTOR_ENTRY_POINT


def _is_registered(env: Any) -> bool:
    return isinstance(env, str) and env not in ENV_IDS and _global_registry.contains(ENV_CREATOR, env)


def evaluate_column(
    network: ProgressiveNetwork,
    env: str | Callable[[EnvContext], Any],
    env_config: Mapping[str, Any],
    *,
    column: int,
    num_episodes: int,
    seed: int = 0,
    deterministic: bool = False,
    normalize_actions: bool = True,
    vectorized: bool = False,
) -> ColumnEvaluation:
    """Plays `num_episodes` episodes with a column's policy.

    Args:
        network: holds the column.
        env, env_config, vectorized: the task's environment, see `make_vector_env`.
        column: index of the column; its earlier columns are computed with it.
        seed: of environments and action sampling; episode i of equal calls is the same episode.
        deterministic: the most probable action instead of a sample of the policy.
        normalize_actions: Box policies act in [-1, 1], scaled to the space (RLlib's default).
    """
    return ColumnEvaluation.merge(
        [
            evaluate_shard(
                network,
                env,
                env_config,
                column,
                count,
                shard_seed,
                deterministic,
                normalize_actions,
                vectorized=vectorized,
            )
            for count, shard_seed in shards(num_episodes, seed)
        ]
    )


def evaluate_recognised(
    network: ProgressiveNetwork,
    env: str | Callable[[EnvContext], Any],
    env_config: Mapping[str, Any],
    *,
    columns: Sequence[int],
    recogniser: Recogniser,
    num_episodes: int,
    seed: int = 0,
    deterministic: bool = False,
    normalize_actions: bool = True,
) -> ColumnEvaluation:
    """Plays without being told which column to play with.

    In the first steps of an episode the column that fits best so far acts, then the one that fits best. A recurrent
    column that takes over starts with an empty memory.

    Args:
        columns: those that may play, in the recogniser's order.
        recogniser: made of their statistics.
    """
    return ColumnEvaluation.merge(
        [
            evaluate_shard(
                network, env, env_config, -1, count, shard_seed, deterministic, normalize_actions, (columns, recogniser)
            )
            for count, shard_seed in shards(num_episodes, seed)
        ]
    )


@torch.no_grad()
def evaluate_shard(
    network: ProgressiveNetwork,
    env: str | Callable[[EnvContext], Any],
    env_config: Mapping[str, Any],
    column: int,
    num_episodes: int,
    seed: int,
    deterministic: bool,
    normalize_actions: bool,
    recognise: tuple[Sequence[int], Recogniser] | None = None,
    *,
    vectorized: bool = False,
) -> ColumnEvaluation:
    """One episode in each of `num_episodes` environments; `recognise` chooses the column of each."""
    envs = make_vector_env(env, env_config, num_episodes, vectorized=vectorized)
    try:
        space = envs.single_action_space
        generator = torch.Generator().manual_seed(seed)
        digest = hashlib.sha256()
        returns, lengths = np.zeros(num_episodes), np.zeros(num_episodes, dtype=int)
        playing = np.ones(num_episodes, dtype=bool)
        state = network.initial_state(num_episodes)
        first_steps = FirstSteps(
            int(space.n) if isinstance(space, gym.spaces.Discrete) else None,
            len(envs.single_observation_space.shape) > 1,
        )
        fit = np.zeros((num_episodes, len(recognise[0]) if recognise else 0))
        players = np.full(num_episodes, column)
        before: np.ndarray | None = None
        actions: Any = None
        step = 0
        obs, _ = envs.reset(seed=seed)
        # An environment whose episode ended plays on unheard (whatever its autoreset mode) until all have ended.
        while playing.any():
            if step < FIRST_STEPS:
                features = features_of(obs, network.channels_last_input)
                taken = None if actions is None else np.asarray(actions) - int(getattr(space, "start", 0))
                first_steps.add(
                    features[playing],
                    None if before is None else before[playing],
                    None if taken is None else taken[playing],
                )
                if recognise is not None:
                    fit += recognise[1].log_likelihood(features, before, taken)
                    chosen = np.asarray(recognise[0])[fit.argmax(1)]
                    for value in state.values():
                        value[torch.from_numpy(chosen != players)] = 0.0
                    players = np.where(playing, chosen, players)
                before = features
            step += 1
            batch = torch.as_tensor(np.asarray(obs))
            if network.is_recurrent:
                batch = batch.unsqueeze(1)
            if recognise is None:
                logits, _, state = network(batch, column, state or None)
            else:
                logits, state = _each_its_column(network, batch, players, state)
            logits = (logits.squeeze(1) if network.is_recurrent else logits).cpu()
            digest.update(logits[torch.from_numpy(playing)].numpy().tobytes())
            actions = _act(logits, space, generator, deterministic, normalize_actions)
            obs, rewards, terminated, truncated, infos = envs.step(actions)
            returns[playing] += rewards[playing]
            lengths[playing] += 1
            ended = playing & (terminated | truncated)
            told, scores = episode_scores(infos, ended)
            returns[told] = scores[told]
            playing &= ~ended
            if step == MAX_EPISODE_STEPS and playing.any():
                logger.warning(
                    "%s: an episode of %d steps did not end; it counts with its return so far", env, MAX_EPISODE_STEPS
                )
                break
        return ColumnEvaluation(
            tuple(map(float, returns)),
            tuple(map(int, lengths)),
            digest.hexdigest(),
            first_steps,
            () if recognise is None else tuple(map(int, players)),
        )
    finally:
        envs.close()


def _each_its_column(
    network: ProgressiveNetwork, batch: torch.Tensor, players: np.ndarray, state: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Policy outputs of row i by column `players[i]`, and all rows' new states."""
    parts = []
    state = {key: value.clone() for key, value in state.items()}
    for k in np.unique(players):
        rows = torch.from_numpy(players == k)
        logits, _, after = network(batch[rows], int(k), {key: value[rows] for key, value in state.items()} or None)
        for key, value in after.items():
            state[key][rows] = value
        parts.append((rows, logits))
    joined = parts[0][1].new_zeros((len(batch), *parts[0][1].shape[1:]))
    for rows, logits in parts:
        joined[rows] = logits
    return joined, state


def _act(
    logits: torch.Tensor, space: gym.Space, generator: torch.Generator, deterministic: bool, normalize: bool
) -> np.ndarray:
    if isinstance(space, gym.spaces.Box):
        mean, log_std = logits.chunk(2, dim=-1)
        noise = torch.zeros_like(mean) if deterministic else torch.randn(mean.shape, generator=generator)
        actions = (mean + log_std.exp() * noise).numpy()
        if normalize and np.isfinite(space.low).all() and np.isfinite(space.high).all():
            actions = space.low + (np.clip(actions, -1.0, 1.0) + 1.0) * (space.high - space.low) / 2.0
        return np.clip(actions, space.low, space.high).astype(space.dtype)
    sizes = [int(n) for n in space.nvec] if isinstance(space, gym.spaces.MultiDiscrete) else [logits.shape[-1]]
    parts = []
    for part in logits.split(sizes, dim=-1):
        if deterministic:
            parts.append(part.argmax(-1))
        else:
            parts.append(torch.multinomial(part.softmax(-1), 1, generator=generator).squeeze(-1))
    actions = torch.stack(parts, dim=-1).numpy()
    if isinstance(space, gym.spaces.MultiDiscrete):
        return actions.astype(space.dtype)
    return actions[:, 0] + int(getattr(space, "start", 0))
