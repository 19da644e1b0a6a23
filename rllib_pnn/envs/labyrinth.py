"""Labyrinth (Rusu et al. 2016, section 5.4): first-person 3D levels as a gymnasium environment and a vector.

The levels are those of `labyrinth_levels`; the engine is ViZDoom (`labyrinth_engine`), in place of DeepMind
Lab, which can't be pip-installed. Environment and vector give the same pixels for the same seed. No torch, no
Ray. Departures from DeepMind Lab: docs/labyrinth.md.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from rllib_pnn.envs.labyrinth_engine import RENDER_SIZE, TURN_PER_TIC, Engine
from rllib_pnn.envs.labyrinth_levels import LEVELS, TICS_PER_SECOND
from rllib_pnn.envs.options import check_choice, check_integer, check_number, reject_unknown

ENV_ID = "rllib_pnn/Labyrinth-v0"

# Name -> buttons of the engine (forward, back, strafe left, strafe right, degrees to the right per tic).
ACTIONS: dict[str, list[float]] = {
    "look_left": [0, 0, 0, 0, -TURN_PER_TIC],
    "look_right": [0, 0, 0, 0, TURN_PER_TIC],
    "forward": [1, 0, 0, 0, 0],
    "backward": [0, 1, 0, 0, 0],
    "strafe_left": [0, 0, 1, 0, 0],
    "strafe_right": [0, 0, 0, 1, 0],
}
_BUTTONS = list(ACTIONS.values())


class LabyrinthEnv(gym.Env[np.ndarray, np.int64]):
    """One level of the labyrinth.

    Observations are (size, size, 3) uint8 RGB frames, actions are the six of `ACTIONS` in their order, the
    reward of a step is +1 for every apple or strawberry and -1 for every lemon or mushroom collected in it.
    An episode terminates when all good items are collected and is truncated when its time is up. `info`
    counts what the episode has brought: `good_items`, `bad_items`.

    The first `reset` starts the engine. Same seed and actions, same frames, in any process.

    Args:
        level: A key of `labyrinth_levels.LEVELS`: track_1 ... track_4, avoid_1, avoid_2, maze_m, maze_y.
        frame_skip: For how many tics (1/35 s) each action is held.
        episode_seconds: Game time after which an episode is truncated.
        size: Width and height of an observation in pixels.
        render_mode: None, or "rgb_array": a second engine plays along to draw what `render` gives.

    Raises:
        ValueError: an argument is out of its range.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": TICS_PER_SECOND / 4}

    def __init__(
        self,
        level: str = "track_1",
        frame_skip: int = 4,
        episode_seconds: float = 60.0,
        size: int = 84,
        render_mode: str | None = None,
        **unknown: Any,
    ) -> None:
        reject_unknown(ENV_ID, unknown, type(self).__init__)
        self.level = LEVELS[check_choice(ENV_ID, "level", level, LEVELS)]
        self.frame_skip = check_integer(ENV_ID, "frame_skip", frame_skip, minimum=1)
        self.size = check_integer(ENV_ID, "size", size, minimum=1)
        # At least a tic, at most a day.
        seconds = check_number(ENV_ID, "episode_seconds", episode_seconds, low=1 / TICS_PER_SECOND, high=86_400.0)
        if render_mode is not None:
            check_choice(ENV_ID, "render_mode", render_mode, self.metadata["render_modes"])
        self.max_steps = math.ceil(seconds * TICS_PER_SECOND / self.frame_skip)
        self.render_mode = render_mode
        self.metadata = {**self.metadata, "render_fps": TICS_PER_SECOND / self.frame_skip}
        self.observation_space = gym.spaces.Box(0, 255, (self.size, self.size, 3), np.uint8)
        self.action_space = gym.spaces.Discrete(len(ACTIONS))
        self._engine: Engine | None = None
        self._render_engine: Engine | None = None
        self._num_steps = 0
        self._good = 0
        self._bad = 0

    def get_action_meanings(self) -> list[str]:
        """The name of every action."""
        return list(ACTIONS)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode; `options` are ignored."""
        super().reset(seed=seed)
        if self._engine is None:
            self._render_engine = None if self.render_mode is None else Engine(self.level, RENDER_SIZE)
            self._engine = Engine(self.level)
        episode_seed = int(self.np_random.integers(2**31))
        for engine in self._engines():
            engine.new_episode(episode_seed)
        self._num_steps = 0
        observation = self._observe()
        return observation, self._info()

    def step(self, action: np.int64 | int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Holds the action for `frame_skip` tics."""
        if self._engine is None:
            raise gym.error.ResetNeeded("LabyrinthEnv.step was called before reset; call reset() first")
        if not 0 <= action < len(_BUTTONS):
            raise ValueError(f"action: expected 0 <= action < {len(_BUTTONS)}, got {action!r}")
        for engine in self._engines():
            engine.act(_BUTTONS[action], self.frame_skip)
        self._num_steps += 1
        good, bad = self._good, self._bad
        observation = self._observe()
        reward = float(self._good - good - (self._bad - bad))
        terminated = self._good == self.level.num_good_items
        truncated = not terminated and self._num_steps >= self.max_steps
        return observation, reward, terminated, truncated, self._info()

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """The present view as a (480, 640, 3) uint8 RGB frame; None without a render mode."""
        if self.render_mode is None:
            return None
        if self._render_engine is None:
            raise gym.error.ResetNeeded("LabyrinthEnv.render was called before reset; call reset() first")
        frame, _, _ = self._render_engine.observe()
        return frame

    def close(self) -> None:
        """Ends the engines."""
        for engine in self._engines():
            engine.close()
        self._engine = self._render_engine = None

    def _engines(self) -> Iterable[Engine]:
        return [engine for engine in (self._engine, self._render_engine) if engine is not None]

    def _observe(self) -> np.ndarray:
        assert self._engine is not None
        frame, self._good, self._bad = self._engine.observe()
        return to_observation(frame, self.size)

    def _info(self) -> dict[str, Any]:
        return {"good_items": self._good, "bad_items": self._bad}


class LabyrinthVectorEnv(VectorEnv):
    """`num_envs` labyrinths that step side by side, one engine process and one thread each.

    Sub-environment i, seeded with s + i, gives exactly what a `LabyrinthEnv` seeded with s + i gives.
    Autoreset is gymnasium's `NEXT_STEP`: the step after an episode's last one ignores its action, resets, and
    returns the new episode's first observation with reward 0. Arrays that were handed out are never written
    to again.

    Args:
        num_envs: How many.
        **kwargs: Those of `LabyrinthEnv`, the same for every sub-environment.

    Raises:
        ValueError: an argument is out of its range.
    """

    _threads: ThreadPoolExecutor | None = None

    def __init__(
        self,
        num_envs: int = 1,
        level: str = "track_1",
        frame_skip: int = 4,
        episode_seconds: float = 60.0,
        size: int = 84,
        render_mode: str | None = None,
        **unknown: Any,
    ) -> None:
        reject_unknown(ENV_ID, unknown, type(self).__init__)
        self.num_envs = num_envs = check_integer(ENV_ID, "num_envs", num_envs, minimum=1)
        self.envs = [LabyrinthEnv(level, frame_skip, episode_seconds, size, render_mode) for _ in range(num_envs)]
        self.render_mode = render_mode
        self.autoreset_mode = AutoresetMode.NEXT_STEP
        self.metadata = {**self.envs[0].metadata, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = self.envs[0].observation_space
        self.single_action_space = self.envs[0].action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._over = np.zeros(num_envs, np.bool_)  # whose episode ended with the last step
        # A thread each: while an engine, a process of its own, is busy, its thread waits without the GIL.
        self._threads = ThreadPoolExecutor(num_envs, thread_name_prefix="labyrinth")
        side = self.envs[0].size
        self._observations = np.zeros((num_envs, side, side, 3), np.uint8)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode in every sub-environment.

        Args:
            seed: s seeds sub-environment i with s + i, a sequence has one seed for each, None goes on with
                the generators as they are.
            options: `{"reset_mask": mask}` with a (num_envs,) bool array resets those only; the others show
                what they showed last. Anything else is ignored.
        """
        seeds: Sequence[int | None]
        if seed is None:
            seeds = [None] * self.num_envs
        elif isinstance(seed, int | np.integer):
            seeds = [int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = seed
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed: expected one for each of {self.num_envs} sub-environments, got {len(seeds)}")
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, np.bool_))
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (self.num_envs,):
            raise ValueError(f"options['reset_mask']: expected a bool array of shape ({self.num_envs},), got {mask!r}")
        observations = self._observations.copy()

        def reset_one(i: int) -> None:
            observations[i], _ = self.envs[i].reset(seed=seeds[i])

        self._run(reset_one, np.flatnonzero(mask).tolist())
        self._over[mask] = False
        return self._handed_out(observations), self._infos(mask)

    def step(
        self, actions: np.ndarray | Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Steps every sub-environment, and resets those whose episode ended with the last step.

        Args:
            actions: (num_envs,) integers.

        Returns:
            Observations (num_envs, size, size, 3) uint8, rewards (num_envs,) float64, terminations and
            truncations (num_envs,) bool, and infos: arrays (num_envs,) with gymnasium's masks.
        """
        if len(actions) != self.num_envs:
            raise ValueError(f"actions: expected one for each of {self.num_envs} sub-environments, got {len(actions)}")
        observations = np.empty_like(self._observations)
        rewards = np.zeros(self.num_envs, np.float64)
        terminations = np.zeros(self.num_envs, np.bool_)
        truncations = np.zeros(self.num_envs, np.bool_)

        def step_one(i: int) -> None:
            if self._over[i]:
                observations[i], _ = self.envs[i].reset()
            else:
                observations[i], rewards[i], terminations[i], truncations[i], _ = self.envs[i].step(actions[i])

        self._run(step_one, range(self.num_envs))
        self._over = terminations | truncations
        infos = self._infos(np.ones(self.num_envs, np.bool_))
        return self._handed_out(observations), rewards, terminations, truncations, infos

    def render(self) -> tuple[np.ndarray | None, ...] | None:  # type: ignore[override]
        """What each sub-environment's `render` gives; None without a render mode."""
        return None if self.render_mode is None else tuple(env.render() for env in self.envs)

    def close_extras(self, **kwargs: Any) -> None:
        """Ends engines and threads."""
        if self._threads is not None:  # or the constructor has failed, and this is `__del__`
            self._threads.shutdown()
            for env in self.envs:
                env.close()

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of every sub-environment."""
        return tuple(env.np_random_seed for env in self.envs)

    @property  # type: ignore[misc]  # gymnasium's has a setter, its own vector environments have none either
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The generator of every sub-environment."""
        return tuple(env.np_random for env in self.envs)

    def _run(self, work: Callable[[int], None], indices: Iterable[int]) -> None:
        """Does the work for every index at the same time, waits for all and passes the first error on."""
        if self._threads is None or self.closed:
            raise gym.error.ClosedEnvironmentError("LabyrinthVectorEnv was used after close()")
        futures = [self._threads.submit(work, i) for i in indices]
        wait(futures)
        for future in futures:
            future.result()

    def _handed_out(self, observations: np.ndarray) -> np.ndarray:
        """The array to return; the next `reset` reads it, nothing writes to it."""
        self._observations = observations
        return observations

    def _infos(self, mask: np.ndarray) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        for key in ("good_items", "bad_items"):
            infos[key] = np.array(
                [env._info()[key] if there else 0 for env, there in zip(self.envs, mask, strict=True)]
            )
            infos[f"_{key}"] = mask.copy()
        return infos


def to_observation(frame: np.ndarray, size: int = 84) -> np.ndarray:
    """An engine's frame (height, width, 3) -> (size, size, 3): the whole view, squeezed from 4:3."""
    # Up to a factor of two, bilinear sampling still looks at every pixel. It costs half of an average over
    # areas, and OpenCV has a variant that is bit-exact on every processor.
    nearly_all = max(frame.shape) <= 2 * size
    how = cv2.INTER_LINEAR_EXACT if nearly_all else cv2.INTER_AREA
    return cv2.resize(frame, (size, size), interpolation=how)
