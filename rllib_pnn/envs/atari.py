"""Atari games as the paper's suite uses them (Rusu et al. 2016, section 4.2), one alone or many in a batch.

The emulator, frame skip, max-pooling over flickering frames, grey scale and resizing are ale_py's vector env
in C++ (preprocessing of Mnih et al. 2015). The rest is here: frame stack, clipped rewards beside unclipped
scores, seeding without gaps, checked options and actions. No torch, no Ray.

Axes: N envs of the batch, S stacked frames (oldest first), 84 rows, 84 columns.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from ale_py import roms
from ale_py.vector_env import AtariVectorEnv
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from rllib_pnn.envs.options import check_choice, check_flag, check_integer, check_number, reject_unknown

ATARI_SOURCES = ("pong", "riverraid", "seaquest")
"""Source games of the paper, section 4.2."""

ATARI_TARGETS = (
    "alien",
    "asterix",
    "boxing",
    "centipede",
    "gopher",
    "hero",
    "jamesbond",
    "krull",
    "robotank",
    "road_runner",
    "star_gunner",
    "wizard_of_wor",
)
"""Target games of the paper, section 4.2."""

FRAME_SIZE = 84
"""Rows and columns of a frame."""

_EMULATOR_FPS = 60
_RENDER_SCALE = 4
_SEED_RANGE = 2**31  # ale_py takes seeds as C ints


class AtariGameVectorEnv(VectorEnv):
    """A batch of N copies of one Atari game, stepped by ale_py's threads: `rllib_pnn/Atari-v0`.

    Observations are uint8 `(N, S, 84, 84)`, new arrays at every call. In place of frames from before an episode's
    start stands its first one. (ale_py has black ones there, which, to a network that takes a task's background for 0,
    differ more from it than anything in the game.) Env i of a batch that was reset with seed s plays what
    `AtariGameEnv` plays with seed s + i.

    Autoreset is NEXT_STEP: the step after the last one of an episode ignores its action, returns the first
    observation of the next episode and reward 0, and is no transition to learn from.

    Environments that are reset together stay together for long: their episodes begin at the same time, and those of a
    policy that loses every point are of one length. Short rollouts of such a batch see one moment of the game at a
    time. `stagger` spreads them over the game, for EnvRunners that ask for it (`stagger_episodes`).

    The infos name one key, and only where an episode ended: `infos["episode_score"][i]` is the unclipped sum
    of its rewards, valid where `infos["_episode_score"][i]`. In an RLlib callback's `on_episode_end`:
    `episode.get_infos(-1)["episode_score"]`.

    Args:
        num_envs: N.
        game: ROM id of ale_py in snake_case, such as `"riverraid"` or `"road_runner"`.
        full_action_space: All 18 actions, so that columns for different games share a head. False: only those
            that the game uses.
        frame_stack: S.
        frameskip: Emulator frames per step; the action is repeated, the last two frames are max-pooled.
        repeat_action_probability: Probability that a frame repeats the previous action ("sticky actions").
        noop_max: An episode starts after idle frames, a seeded number of them: 0 to `noop_max` - 1, one fewer where
            the game's actions include FIRE, which is then the last of them (all games with `full_action_space`).
        max_episode_frames: Emulator frames after the idle ones at which an episode is truncated.
        reward_clipping: Rewards to [-1, 1], for learning. `episode_score` stays unclipped.
        stagger: Steps within which `stagger_episodes` cuts one episode of each env short; about as many as an episode
            of a beginner has. 0: none.
        num_threads: Emulator threads of this batch.
        render_mode: None or `"rgb_array"`: what the agent sees last, enlarged.

    Raises:
        ValueError: An option is unknown or out of range.
    """

    env_id = "rllib_pnn/Atari-v0"

    def __init__(
        self,
        num_envs: int = 1,
        *,
        game: str = "pong",
        full_action_space: bool = True,
        frame_stack: int = 4,
        frameskip: int = 4,
        repeat_action_probability: float = 0.0,
        noop_max: int = 30,
        max_episode_frames: int = 108_000,
        reward_clipping: bool = False,
        stagger: int = 0,
        num_threads: int = 1,
        render_mode: str | None = None,
        **unknown: Any,
    ):
        env_id = self.env_id
        reject_unknown(env_id, unknown, type(self).__init__)
        if render_mode is not None:
            check_choice(env_id, "render_mode", render_mode, ["rgb_array"])
        self.num_envs = check_integer(env_id, "num_envs", num_envs, minimum=1)
        self.game = check_choice(env_id, "game", game, roms.get_all_rom_ids())
        self.render_mode = render_mode
        self._reward_clipping = check_flag(env_id, "reward_clipping", reward_clipping)
        self._stack_size = check_integer(env_id, "frame_stack", frame_stack, minimum=1)
        skip = check_integer(env_id, "frameskip", frameskip, minimum=1)
        self.stagger = check_integer(env_id, "stagger", stagger, minimum=0)

        self._emulator: AtariVectorEnv | None = _Emulator(
            self.game,
            self.num_envs,
            full_action_space=check_flag(env_id, "full_action_space", full_action_space),
            # The stack is kept here, so that a frame is transformed once, not in every stack that it is in.
            stack_num=1,
            frameskip=skip,
            repeat_action_probability=check_number(
                env_id, "repeat_action_probability", repeat_action_probability, low=0.0, high=1.0
            ),
            noop_max=check_integer(env_id, "noop_max", noop_max, minimum=0),
            max_num_frames_per_episode=check_integer(env_id, "max_episode_frames", max_episode_frames, minimum=1),
            # Clipped here, where the unclipped reward is still known.
            reward_clipping=False,
            num_threads=check_integer(env_id, "num_threads", num_threads, minimum=1),
            thread_affinity_offset=-1,
            autoreset_mode=AutoresetMode.NEXT_STEP,
        )
        # An instance's own dict: others may write to it, and the frame rate depends on the frame skip.
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": _EMULATOR_FPS / skip,
            "autoreset_mode": AutoresetMode.NEXT_STEP,
        }
        shape = (self._stack_size, FRAME_SIZE, FRAME_SIZE)
        self.single_observation_space = gym.spaces.Box(0, 255, shape, np.uint8)
        self.single_action_space = self._emulator.single_action_space
        self._num_actions = len(self._emulator.ale.get_action_set())
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

        self._seeded = False
        self._stacks: np.ndarray | None = None  # (N, S, 84, 84), never handed out
        self._scores = np.zeros(self.num_envs)
        self._ended = np.zeros(self.num_envs, bool)
        self._steps_to_cut: np.ndarray | None = None  # (N,), 0 where there is nothing to cut any more
        self.cut: np.ndarray | None = None  # (N,), envs whose episode the last step has cut; None: none

    def stagger_episodes(self, seed: int | None = None) -> None:
        """Truncates, once, the episode of each env that runs after a number of steps drawn from 1 to `stagger`.

        `cut` tells these from other truncations; their scores stand in no info, for they say nothing of how an agent
        plays. A reset forgets what has not been cut yet.
        """
        if self.stagger:
            rng = np.random.default_rng(seed)
            self._steps_to_cut = rng.integers(1, self.stagger, self.num_envs, endpoint=True)

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts a new episode in every env.

        Args:
            seed: Env i is seeded with `seed + i`, or with `seed[i]`. None goes on with each env's random
                stream; the first reset without a seed draws one from the operating system.
            options: `reset_mask` is not supported, other keys are ignored.

        Returns:
            Observations `(N, S, 84, 84)` and empty infos.
        """
        if options and "reset_mask" in options:
            raise ValueError(f"{self.env_id}: reset_mask is not supported; episodes that ended reset themselves")
        emulator = self._open_emulator()
        super().reset(seed=None if seed is None or isinstance(seed, list) else int(seed))
        if seed is None and not self._seeded:
            # ale_py would seed sticky actions from the clock: alike in all envs made at the same moment.
            seed = int(self.np_random.integers(_SEED_RANGE))
        self._seeded = True
        frames: np.ndarray
        frames, _ = emulator.reset(seed=self._emulator_seeds(seed))
        self._ended[:] = False
        self._scores[:] = 0.0
        self._steps_to_cut = self.cut = None
        # (A transform may return a view of what it was given: `repeat` copies.)
        self._stacks = self._transform(frames[:, 0])[:, None].repeat(self._stack_size, axis=1)
        return self._stacks.copy(), {}

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Steps every env; `actions` are N whole numbers.

        Returns:
            Observations uint8 `(N, S, 84, 84)`; rewards float32, terminated and truncated bool, each `(N,)`;
            infos.
        """
        emulator = self._open_emulator()
        if self._stacks is None:
            raise ResetNeeded(f"{self.env_id}: step() before the first reset()")
        frames: np.ndarray
        frames, rewards, terminated, truncated, _ = emulator.step(self._checked(actions))
        if self.cut is not None:
            # The emulator knows nothing of it and has gone on.
            begun: np.ndarray
            begun, _ = emulator.reset(options={"reset_mask": self.cut})
            frames = np.where(self.cut[:, None, None, None], begun, frames)
            rewards = np.where(self.cut, 0, rewards)
            terminated, truncated = terminated & ~self.cut, truncated & ~self.cut

        stacks = np.empty_like(self._stacks)
        stacks[:, :-1] = self._stacks[:, 1:]
        stacks[:, -1] = self._transform(frames[:, 0])
        if self._ended.any():
            stacks[self._ended] = stacks[self._ended, -1:]
            self._scores[self._ended] = 0.0
        self._stacks = stacks

        self._scores += rewards
        was_reset, self._ended = self._ended, terminated | truncated
        infos = {}
        # Nothing otherwise: RLlib keeps and sends an info dict for every step.
        if self._ended.any():
            infos = {"episode_score": self._scores.copy(), "_episode_score": self._ended.copy()}
        self.cut = None
        if self._steps_to_cut is not None:
            truncated = self._cut_episodes(truncated, was_reset)
        if self._reward_clipping:
            rewards = np.clip(rewards, -1, 1)
        return stacks.copy(), rewards.astype(np.float32), terminated, truncated, infos

    def _cut_episodes(self, truncated: np.ndarray, was_reset: np.ndarray) -> np.ndarray:
        """`truncated` with the episodes that are due, which it notes in `cut`."""
        assert self._steps_to_cut is not None
        due = self._steps_to_cut == 1
        # An episode has at least a step; one that ends now by itself needs no cutting.
        self._steps_to_cut -= (self._steps_to_cut > 0) & ~(due & was_reset)
        cut = due & ~was_reset & ~self._ended
        if not self._steps_to_cut.any():
            self._steps_to_cut = None
        if not cut.any():
            return truncated
        self.cut = cut
        self._ended = self._ended | cut
        return truncated | cut

    def render(self) -> tuple[Any, ...] | None:
        """The newest frame of every env as the agent sees it: N times RGB uint8 `(336, 336, 3)`."""
        if self.render_mode is None:
            gym.logger.warn(f'{self.env_id}: render() needs an env made with render_mode="rgb_array"')
            return None
        if self._stacks is None:
            raise ResetNeeded(f"{self.env_id}: render() before the first reset()")
        large = self._stacks[:, -1].repeat(_RENDER_SCALE, axis=1).repeat(_RENDER_SCALE, axis=2)
        return tuple(np.repeat(large[..., None], 3, axis=-1))

    def close_extras(self, **kwargs: Any) -> None:
        """Ends the emulator's threads."""
        self._emulator = None

    def _transform(self, frames: np.ndarray) -> np.ndarray:
        """What the agent sees of new frames `(N, 84, 84)`, which may be written to."""
        return frames

    def _open_emulator(self) -> AtariVectorEnv:
        if self._emulator is None:
            raise ClosedEnvironmentError(f"{self.env_id}: this env is closed")
        return self._emulator

    def _emulator_seeds(self, seed: int | list[int] | None) -> np.ndarray | None:
        if seed is None:
            return None
        seeds = seed if isinstance(seed, list) else [int(seed) + i for i in range(self.num_envs)]
        if len(seeds) != self.num_envs:
            raise ValueError(f"{self.env_id}: {len(seeds)} seeds for {self.num_envs} envs; give one each, or one")
        return np.array([int(s) % _SEED_RANGE for s in seeds], dtype=np.int64)

    def _checked(self, actions: Any) -> np.ndarray:
        """Actions as ale_py wants them. It hangs, rather than raises, at an action that the game lacks."""
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or actions.dtype.kind not in "iu":
            raise ValueError(
                f"{self.env_id}: expected {self.num_envs} whole numbers as actions, "
                f"got {actions.dtype} of shape {actions.shape}"
            )
        if actions.min() < 0 or actions.max() >= self._num_actions:
            last = self._num_actions - 1
            raise ValueError(f"{self.env_id}: actions run from 0 to {last}, got {actions.tolist()}")
        return actions.astype(np.int64, copy=False)


class AtariGameEnv(gym.Env):
    """One Atari game as a plain gymnasium env: pixels, rewards and episode ends of `AtariGameVectorEnv`.

    Observations are uint8 `(S, 84, 84)`. The last info of an episode holds `episode_score`, the unclipped sum
    of its rewards. Options are those of `AtariGameVectorEnv`.
    """

    vector_class: type[AtariGameVectorEnv] = AtariGameVectorEnv
    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(self, *, render_mode: str | None = None, **options: Any):
        self._batch = self.vector_class(1, render_mode=render_mode, **options)
        self.metadata = {key: self._batch.metadata[key] for key in ("render_modes", "render_fps")}
        self.render_mode = render_mode
        self.observation_space = self._batch.single_observation_space
        self.action_space = self._batch.single_action_space
        self._ended = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts a new episode; returns its first observation `(S, 84, 84)` and an empty info."""
        super().reset(seed=seed)
        self._ended = False
        observations, _ = self._batch.reset(seed=seed, options=options)
        return observations[0], {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One step: observation `(S, 84, 84)`, reward, terminated, truncated, info."""
        if self._ended:
            raise ResetNeeded(f"{self._batch.env_id}: the episode has ended; call reset() before step()")
        observations, rewards, terminated, truncated, infos = self._batch.step([action])
        self._ended = bool(terminated[0] or truncated[0])
        info = {"episode_score": float(infos["episode_score"][0])} if self._ended else {}
        return observations[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0]), info

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """The newest frame as the agent sees it, RGB uint8 `(336, 336, 3)`."""
        frames = self._batch.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        """Ends the emulator's thread."""
        self._batch.close()


class _Emulator(AtariVectorEnv):
    # ale_py writes the autoreset mode into `metadata`, which without this is shared by all gymnasium envs.
    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
