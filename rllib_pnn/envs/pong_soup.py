"""Pong Soup: Atari Pong and seven visual variants of it (Rusu et al. 2016, section 4.1). No torch, no Ray.

The game is the same in all of them; only what the agent sees differs. `docs/pong_soup.md` shows the eight
side by side and says which figures the paper leaves open.

A variant is a function of single grey frames `(N, 84, 84)`, uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

from rllib_pnn.envs.atari import FRAME_SIZE, AtariGameEnv, AtariGameVectorEnv
from rllib_pnn.envs.options import check_choice, check_integer, check_number, reject_unknown

VARIANTS = ("pong", "noisy", "black", "white", "zoom", "v_flip", "h_flip", "vh_flip")
"""The eight tasks of the paper, section 4.1."""

BACKGROUND = 87
"""Grey value of Pong's background. All objects are brighter."""

PADDLE = 147
"""Grey value of the paddles and the points, Pong's darkest objects. Ball and walls have 236."""

ZOOMED_SIZE = FRAME_SIZE * 3 // 4
"""Rows and columns of the picture within a zoomed frame: 75 %."""

NOISE_STD = 12.0
ZOOM_OFFSET = (14, 7)

FrameTransform = Callable[[np.ndarray], np.ndarray]


class PongSoupVectorEnv(AtariGameVectorEnv):
    """A batch of N games of one Pong Soup variant: `rllib_pnn/PongSoup-v0`.

    Observations, seeding, autoreset and infos are `AtariGameVectorEnv`'s; Pong's own 6 actions.

    Args:
        num_envs: N.
        variant: One of `VARIANTS`.
        noise_std: Standard deviation of `noisy`, in grey levels (0 to 255).
        noise_seed: The noise of `noisy` is drawn once from it: the same in all frames, envs and processes.
        zoom_offset: Rows and columns of background above and left of the picture of `zoom`, 0 to 21 each.
        **options: `frame_stack`, `frameskip`, `repeat_action_probability`, `noop_max`, `max_episode_frames`,
            `reward_clipping`, `stagger`, `num_threads`, `render_mode` of `AtariGameVectorEnv`.

    Raises:
        ValueError: An option is unknown or out of range.
    """

    env_id = "rllib_pnn/PongSoup-v0"

    def __init__(
        self,
        num_envs: int = 1,
        *,
        variant: str = "pong",
        noise_std: float = NOISE_STD,
        noise_seed: int = 0,
        zoom_offset: Sequence[int] = ZOOM_OFFSET,
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
        reject_unknown(self.env_id, unknown, type(self).__init__)
        super().__init__(
            num_envs,
            game="pong",
            full_action_space=False,
            frame_stack=frame_stack,
            frameskip=frameskip,
            repeat_action_probability=repeat_action_probability,
            noop_max=noop_max,
            max_episode_frames=max_episode_frames,
            reward_clipping=reward_clipping,
            stagger=stagger,
            num_threads=num_threads,
            render_mode=render_mode,
        )
        self._as_variant = frame_transform(variant, noise_std=noise_std, noise_seed=noise_seed, zoom_offset=zoom_offset)
        self.variant = variant

    def _transform(self, frames: np.ndarray) -> np.ndarray:
        return self._as_variant(frames)


class PongSoupEnv(AtariGameEnv):
    """One game of a Pong Soup variant as a plain gymnasium env: the same pixels as `PongSoupVectorEnv`.

    Observations are uint8 `(S, 84, 84)`. Options are those of `PongSoupVectorEnv`.
    """

    vector_class = PongSoupVectorEnv


def frame_transform(
    variant: str,
    *,
    noise_std: float = NOISE_STD,
    noise_seed: int = 0,
    zoom_offset: Sequence[int] = ZOOM_OFFSET,
) -> FrameTransform:
    """The function that turns grey frames of Pong, uint8 `(N, 84, 84)`, into those of `variant`.

    It may write to the frames that it is given, and may return a view of them. They must be contiguous.
    """
    env_id = PongSoupVectorEnv.env_id
    check_choice(env_id, "variant", variant, VARIANTS)
    std = check_number(env_id, "noise_std", noise_std, low=0.0, high=255.0)
    seed = check_integer(env_id, "noise_seed", noise_seed, minimum=0)
    rows, columns = _checked_offset(zoom_offset)
    transforms: dict[str, FrameTransform] = {
        "pong": lambda frames: frames,
        "noisy": _add_noise(frozen_noise(std, seed)),
        "black": _look_up(_ON_BLACK),
        "white": _look_up(_ON_WHITE),
        "zoom": _zoom(rows, columns),
        "v_flip": lambda frames: frames[:, ::-1],
        "h_flip": lambda frames: frames[:, :, ::-1],
        "vh_flip": lambda frames: frames[:, ::-1, ::-1],
    }
    return transforms[variant]


def frozen_noise(std: float, seed: int) -> np.ndarray:
    """The noise of the variant `noisy`: int16 `(84, 84)`, in grey levels."""
    # RandomState, because numpy promises that its streams never change: a column that was frozen years ago
    # meets the noise that it was trained on.
    noise = np.random.RandomState(seed).normal(0.0, std, (FRAME_SIZE, FRAME_SIZE))
    return np.rint(noise).clip(-255, 255).astype(np.int16)


def _add_noise(noise: np.ndarray) -> FrameTransform:
    # x + noise cut to 0..255 without leaving uint8, which is far quicker than wider integers: make room below
    # 255 for the positive part, then above 0 for the negative part.
    positive = noise.clip(0).astype(np.uint8)
    negative = (-noise).clip(0).astype(np.uint8)
    room = 255 - positive

    def transform(frames: np.ndarray) -> np.ndarray:
        np.minimum(frames, room, out=frames)
        np.add(frames, positive, out=frames)
        np.maximum(frames, negative, out=frames)
        return np.subtract(frames, negative, out=frames)

    return transform


# Black in place of the background, while objects keep their grey values. At their edges the resized frame
# blends them with the background; up to the paddles' grey, these become the same blends with black. What is
# darker than the background (a mark of 5 pixels in the corner) becomes background.
_ON_BLACK = np.rint(
    np.interp(np.arange(256), [0, BACKGROUND, PADDLE, 255], [0, 0, PADDLE, 255]),
).astype(np.uint8)

# Nothing can be brighter than white, and Pong's ball nearly is white: so objects are dark, as on a negative.
_ON_WHITE = 255 - _ON_BLACK


def _look_up(table: np.ndarray) -> FrameTransform:
    def transform(frames: np.ndarray) -> np.ndarray:
        # One row a frame: OpenCV's images have two axes.
        return cv2.LUT(frames.reshape(len(frames), -1), table).reshape(frames.shape)

    return transform


def _zoom(rows: int, columns: int) -> FrameTransform:
    inside = (slice(rows, rows + ZOOMED_SIZE), slice(columns, columns + ZOOMED_SIZE))

    def transform(frames: np.ndarray) -> np.ndarray:
        zoomed = np.full(frames.shape, BACKGROUND, np.uint8)
        # Frame by frame: in one call on all rows of the batch, OpenCV's rounding would depend on a frame's
        # place in the batch.
        for frame, canvas in zip(frames, zoomed, strict=True):
            canvas[inside] = cv2.resize(frame, (ZOOMED_SIZE, ZOOMED_SIZE), interpolation=cv2.INTER_LINEAR)
        return zoomed

    return transform


def _checked_offset(offset: Sequence[int]) -> tuple[int, int]:
    most = FRAME_SIZE - ZOOMED_SIZE
    if isinstance(offset, str) or not isinstance(offset, Sequence) or len(offset) != 2:
        raise ValueError(f"{PongSoupVectorEnv.env_id}: zoom_offset must be [rows, columns], got {offset!r}")
    for value in offset:
        check_integer(PongSoupVectorEnv.env_id, "zoom_offset", value, minimum=0)
        if value > most:
            raise ValueError(
                f"{PongSoupVectorEnv.env_id}: zoom_offset {list(offset)} leaves no room for the picture; "
                f"at most {most} rows and columns"
            )
    return int(offset[0]), int(offset[1])
