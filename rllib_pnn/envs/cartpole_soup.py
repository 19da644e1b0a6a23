"""CartPole Soup: CartPole-v1 and four changes of what the agent sees. No torch, no Ray.

A suite in the spirit of Pong Soup that learns in minutes on a CPU; it is not in Rusu et al. 2016. Physics,
rewards, actions and episode ends are gymnasium's CartPole-v1; the variant `plain` is CartPole-v1 to the bit.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleEnv, CartPoleVectorEnv
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from rllib_pnn.envs.options import check_choice, check_flag, check_integer, reject_unknown

# observation = state[order] * gain + offset, of the state (position, velocity, angle, angular velocity).
_TRANSFORMS: dict[str, tuple[list[int], list[float], list[float]]] = {
    "plain": ([0, 1, 2, 3], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]),
    "flipped": ([0, 1, 2, 3], [-1.0, -1.0, -1.0, -1.0], [0.0, 0.0, 0.0, 0.0]),
    "permuted": ([2, 3, 1, 0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]),
    "scaled": ([0, 1, 2, 3], [2.0, 0.5, 5.0, 0.25], [0.0, 0.0, 0.0, 0.0]),
    "shifted": ([0, 1, 2, 3], [1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 0.5, -0.5]),
}

VARIANTS = tuple(_TRANSFORMS)
"""The tasks of the suite."""

ENV_ID = "rllib_pnn/CartPoleSoup-v0"


class CartPoleSoupEnv(CartPoleEnv):
    """CartPole-v1 as one variant shows it. Observations are float32 `(4,)`, in one space for all variants.

    Args:
        variant: One of `VARIANTS`: `plain`, `flipped` (all signs turned), `permuted` (angle, angular
            velocity, velocity, position), `scaled` (by 2, 0.5, 5, 0.25), `shifted` (by 1, -1, 0.5, -0.5).
        sutton_barto_reward: As in CartPole-v1.
        render_mode: None, `"rgb_array"` or `"human"`.

    Raises:
        ValueError: An option is unknown or its value is.
    """

    def __init__(
        self,
        *,
        variant: str = "plain",
        sutton_barto_reward: bool = False,
        render_mode: str | None = None,
        **unknown: Any,
    ):
        reject_unknown(ENV_ID, unknown, type(self).__init__)
        check_flag(ENV_ID, "sutton_barto_reward", sutton_barto_reward)
        self.view = _View(variant)
        self.variant = variant
        super().__init__(sutton_barto_reward=sutton_barto_reward, render_mode=render_mode)
        self.observation_space = _observation_space()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """As `CartPoleEnv.reset`, seen through the variant."""
        state, info = super().reset(seed=seed, options=options)
        return self.view(state), info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """As `CartPoleEnv.step`, seen through the variant."""
        state, reward, terminated, truncated, info = super().step(action)
        return self.view(state), float(reward), bool(terminated), bool(truncated), info


class CartPoleSoupVectorEnv(CartPoleVectorEnv):
    """A batch of N carts under one variant; observations float32 `(N, 4)`, autoreset NEXT_STEP.

    Env i of a batch that was reset with seed s plays what `CartPoleSoupEnv` plays with seed s + i.
    (gymnasium's own batch draws all starts from one stream, so that they depend on what the other carts do.)

    Args:
        num_envs: N.
        variant, sutton_barto_reward: As in `CartPoleSoupEnv`.
        max_episode_steps: Steps after which an episode is truncated.
        render_mode: None or `"rgb_array"`.

    Raises:
        ValueError: An option is unknown or its value is.
    """

    metadata = {
        "render_modes": ["rgb_array"],
        "render_fps": 50,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }
    state: Any  # float64 (4, N); gymnasium's annotation is None
    screens: Any = None  # read by close(), also of an env that could not be made

    def __init__(
        self,
        num_envs: int = 1,
        *,
        variant: str = "plain",
        max_episode_steps: int = 500,
        sutton_barto_reward: bool = False,
        render_mode: str | None = None,
        **unknown: Any,
    ):
        reject_unknown(ENV_ID, unknown, type(self).__init__)
        check_flag(ENV_ID, "sutton_barto_reward", sutton_barto_reward)
        self.view = _View(variant)
        self.variant = variant
        super().__init__(
            num_envs=check_integer(ENV_ID, "num_envs", num_envs, minimum=1),
            max_episode_steps=check_integer(ENV_ID, "max_episode_steps", max_episode_steps, minimum=1),
            render_mode=render_mode,
            sutton_barto_reward=sutton_barto_reward,
        )
        self.single_observation_space = _observation_space()
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self._starts: list[np.random.Generator] = []  # the random stream of each cart

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts a new episode in every env; env i gets `seed + i`, None goes on with each env's stream."""
        super().reset(seed=seed, options=options)
        if seed is not None:
            self._starts = [gym.utils.seeding.np_random(seed + i)[0] for i in range(self.num_envs)]
        elif not self._starts:
            self._starts = self.np_random.spawn(self.num_envs)
        self._restart(range(self.num_envs))
        return self.view(self.state.T.astype(np.float32)), {}

    def step(self, action: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Steps every env; `action` is N times 0 or 1."""
        restarting = np.flatnonzero(self.prev_done)
        states, rewards, terminated, truncated, infos = super().step(np.asarray(action, dtype=np.int64))
        if restarting.size:
            self._restart(restarting)
            states = self.state.T.astype(np.float32)
        return self.view(states), rewards, terminated, truncated, infos

    def _restart(self, indices: Any) -> None:
        for i in indices:
            self.state[:, i] = self._starts[i].uniform(self.low, self.high, size=4)


class _View:
    """What the agent sees of CartPole's state, float32 `(..., 4)`: always a new array."""

    def __init__(self, variant: str):
        order, gain, offset = _TRANSFORMS[check_choice(ENV_ID, "variant", variant, VARIANTS)]
        self._order = order
        self._gain = np.array(gain, np.float32)
        self._offset = np.array(offset, np.float32)

    def __call__(self, states: np.ndarray) -> np.ndarray:
        return states[..., self._order] * self._gain + self._offset


def _observation_space() -> gym.spaces.Box:
    # The same for every variant, so that the columns of a progressive network share it.
    return gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
