"""Spreading a batch of environments over the game: what EnvRunners that train ask of a vector env that can do it.

Such an env has `stagger_episodes(seed)`, which truncates one episode of each environment early, and `cut`, (N,) bool,
which environments the last step has cut (None: none). See `AtariGameVectorEnv`. A cut episode is learned from like any
that is truncated, and counts in no metric: its return says nothing of how well the policy plays.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def stagger_episodes(env: Any, seed: int | None) -> None:
    """Asks `env` to spread its environments; nothing where it can't, or its `stagger` is 0."""
    spread = getattr(env.unwrapped, "stagger_episodes", None)
    if callable(spread):
        spread(seed)


def cut_now(env: Any) -> np.ndarray | None:
    """(N,) bool, the environments whose episode the last step has cut; None if there is none."""
    return getattr(env.unwrapped, "cut", None)
