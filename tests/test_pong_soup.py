"""Pong Soup: eight views of one game, against a slow formula; frozen noise (promise 6); visible objects."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import rllib_pnn.envs.registry  # noqa: F401  (makes the ids known)
from rllib_pnn.envs.pong_soup import (
    BACKGROUND,
    NOISE_STD,
    VARIANTS,
    ZOOM_OFFSET,
    PongSoupEnv,
    PongSoupVectorEnv,
    frame_transform,
    frozen_noise,
)

FIELD = (slice(14, 77), slice(14, 70))  # rows between the walls, columns between the paddles


def play(env: PongSoupVectorEnv, num_steps: int, seed: int = 0) -> list[tuple[np.ndarray, ...]]:
    """Observations, rewards, terminated, truncated of every step under fixed random actions."""
    rng = np.random.default_rng(0)
    observations, _ = env.reset(seed=seed)
    steps = [(observations, np.zeros(env.num_envs), np.zeros(env.num_envs), np.zeros(env.num_envs))]
    steps += [env.step(rng.integers(0, 6, env.num_envs))[:4] for _ in range(num_steps)]
    return steps


@pytest.fixture(scope="module")
def game() -> np.ndarray:
    """120 moments of a game of Pong, uint8 (120, 84, 84), ball and paddles in play."""
    steps = play(PongSoupVectorEnv(2), 160)
    return np.concatenate([observations[:, -1] for observations, *_ in steps[-60:]])


def slowly(variant: str, frame: np.ndarray) -> np.ndarray:
    """What `variant` makes of one frame (84, 84), pixel by pixel or as the words say; floats."""
    rows, columns = ZOOM_OFFSET
    noise = frozen_noise(NOISE_STD, 0)
    out = np.zeros((84, 84))
    for y in range(84):
        for x in range(84):
            v = float(frame[y, x])
            if variant == "pong":
                out[y, x] = v
            elif variant == "noisy":
                out[y, x] = min(255.0, max(0.0, v + noise[y, x]))
            elif variant in ("black", "white"):
                # Background to 0, from the paddles' 147 on unchanged, blends of the two in proportion.
                on_black = v if v >= 147 else max(0.0, v - 87) * 147 / 60
                out[y, x] = on_black if variant == "black" else 255 - on_black
            elif variant == "zoom":
                out[y, x] = 87.0
                if rows <= y < rows + 63 and columns <= x < columns + 63:
                    # Bilinear between the centres of the four nearest pixels.
                    sy, sx = (y - rows + 0.5) / 0.75 - 0.5, (x - columns + 0.5) / 0.75 - 0.5
                    y0, x0 = int(sy), int(sx)
                    square = frame[y0 : y0 + 2, x0 : x0 + 2].astype(float)
                    out[y, x] = [1 - sy + y0, sy - y0] @ square @ [1 - sx + x0, sx - x0]
            else:
                out[y, x] = frame[83 - y if "v" in variant else y, 83 - x if "h_" in variant else x]
    return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_frames_agree_with_a_slow_formula(variant: str, game: np.ndarray):
    transform = frame_transform(variant)
    frames = game[::40]
    got = transform(frames.copy())
    assert got.dtype == np.uint8 and got.shape == frames.shape
    for frame, picture in zip(frames, got, strict=True):
        np.testing.assert_allclose(picture, slowly(variant, frame), atol=1.0 if variant == "zoom" else 0.5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_frame_looks_the_same_wherever_it_is_in_a_batch(variant: str, game: np.ndarray):
    transform = frame_transform(variant)
    together = transform(game.copy())
    alone = [transform(frame[None].copy())[0] for frame in game]
    np.testing.assert_array_equal(together, alone)


def test_saturated_pixels_stay_in_range_under_noise():
    transform = frame_transform("noisy", noise_std=200.0)
    noise = frozen_noise(200.0, 0).astype(int)
    for level in (0, 3, 128, 252, 255):
        frame = np.full((1, 84, 84), level, np.uint8)
        np.testing.assert_array_equal(transform(frame.copy())[0], (level + noise).clip(0, 255))


def test_variants_are_the_same_game_seen_differently():
    options = {"max_episode_frames": 160, "repeat_action_probability": 0.25}
    expected = play(PongSoupVectorEnv(2, **options), 90, seed=4)
    assert any(truncated.any() for *_, truncated in expected)
    assert any(rewards.any() for _, rewards, *_ in play(PongSoupVectorEnv(2), 60, seed=4))
    for variant in VARIANTS:
        transform = frame_transform(variant)
        got = play(PongSoupVectorEnv(2, variant=variant, **options), 90, seed=4)
        for (picture, *outcome), (plain, *plain_outcome) in zip(got, expected, strict=True):
            np.testing.assert_array_equal(outcome, plain_outcome)
            for k in range(4):
                seen = transform(np.ascontiguousarray(plain[:, k]))
                # Where there was no frame yet, there is none in any variant.
                seen = np.where(plain[:, k].any(axis=(1, 2))[:, None, None], seen, 0)
                np.testing.assert_array_equal(picture[:, k], seen)


@pytest.mark.parametrize("variant", ["pong", "noisy", "white", "zoom", "vh_flip"])
def test_single_envs_and_batch_play_the_same_episodes(variant: str):
    options = {"variant": variant, "max_episode_frames": 120}
    batch = PongSoupVectorEnv(2, **options)
    single = gym.make("rllib_pnn/PongSoup-v0", **options)
    steps = play(batch, 70, seed=8)
    actions = np.random.default_rng(0).integers(0, 6, (70, 2))[:, 1]
    observation, _ = single.reset(seed=9)
    np.testing.assert_array_equal(observation, steps[0][0][1])
    ended, num_resets = False, 0
    for action, (observations, *outcome) in zip(actions, steps[1:], strict=True):
        if ended:
            num_resets += 1
            observation, _ = single.reset()
            ended, got = False, (0.0, False, False)
        else:
            observation, *got, _ = single.step(action)
            ended = got[1] or got[2]
        np.testing.assert_array_equal(observation, observations[1])
        assert list(got) == [part[1] for part in outcome]
    assert num_resets == 2


def test_noise_is_frozen_by_its_seed_in_every_process():
    def fingerprint() -> str:
        frames = play(PongSoupVectorEnv(2, variant="noisy", noise_seed=6), 10, seed=1)[-1][0]
        noise = frozen_noise(NOISE_STD, 6)
        return hashlib.sha256(frames.tobytes() + noise.tobytes()).hexdigest()

    code = (
        "import hashlib, numpy as np\n"
        "from rllib_pnn.envs.pong_soup import PongSoupVectorEnv, frozen_noise\n"
        "env = PongSoupVectorEnv(2, variant='noisy', noise_seed=6)\n"
        "env.reset(seed=1)\n"
        "rng = np.random.default_rng(0)\n"
        "for _ in range(10): frames = env.step(rng.integers(0, 6, 2))[0]\n"
        f"noise = frozen_noise({NOISE_STD}, 6)\n"
        "print(hashlib.sha256(frames.tobytes() + noise.tobytes()).hexdigest())\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    env = {**os.environ, "PYTHONPATH": root}
    output = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == fingerprint()


def test_noise_never_changes():
    # A column that was frozen on another machine, or years ago, meets the noise that it was trained on.
    noise = frozen_noise(12.0, 0)
    assert noise[0, :6].tolist() == [21, 5, 12, 27, 22, -12]
    assert abs(noise.mean()) < 0.5 and abs(noise.std() - 12.0) < 0.3
    assert (frozen_noise(12.0, 1) != noise).mean() > 0.9


@pytest.mark.parametrize("variant", VARIANTS)
def test_ball_and_paddles_stay_visible(variant: str, game: np.ndarray):
    """What a variant shows of one object alone differs from what it shows of an empty field (grey levels)."""
    empty = np.full((1, 84, 84), BACKGROUND, np.uint8)
    transform = frame_transform(variant)
    background = transform(empty.copy()).astype(int)[0]
    num_seen = {55: 0, 100: 0}  # paddles, balls
    for frame in game:
        for columns, full in ((slice(0, 14), 55), (FIELD[1], 100), (slice(70, 84), 55)):
            only = empty.copy()
            only[0, FIELD[0], columns] = frame[FIELD[0], columns]
            if only.max() - BACKGROUND < full:  # not there, or just the edge of it
                continue
            num_seen[full] += 1
            contrast = np.abs(transform(only).astype(int)[0] - background).max()
            # A ball is about one pixel large, less at 75 %.
            assert contrast >= (30 if variant == "zoom" else full)
            assert variant != "noisy" or contrast >= 4 * NOISE_STD
            assert variant not in ("black", "white") or contrast >= 130
    assert min(num_seen.values()) > 20


def test_flips_leave_the_actions_alone():
    # Action 2 moves the right paddle up in Pong. In h_flip it is on the left, and still goes up on the
    # screen; in v_flip it goes down on the screen.
    def row_of_the_paddle(variant: str, column: int, action: int) -> float:
        rows = slice(7, 70) if variant.startswith("v") else FIELD[0]
        env = PongSoupVectorEnv(1, variant=variant)
        env.reset(seed=0)
        for move in [0] * 25 + [action] * 6:
            observations, *_ = env.step(np.array([move]))
        strip = observations[0, -1, rows, column - 2 : column + 3]
        return float(np.flatnonzero(strip.max(axis=1) > BACKGROUND + 10).mean())

    for variant, column, rises in (("pong", 74, 1), ("h_flip", 9, 1), ("v_flip", 74, -1), ("vh_flip", 9, -1)):
        up, down = (row_of_the_paddle(variant, column, action) for action in (2, 3))
        assert (down - up) * rises > 5


def test_options_move_the_picture_and_the_noise():
    env = PongSoupVectorEnv(1, variant="zoom", zoom_offset=(0, 21))
    observations, _ = env.reset(seed=0)
    assert (observations[0, -1, 63:] == BACKGROUND).all() and (observations[0, -1, :, :21] == BACKGROUND).all()
    assert (observations[0, -1, 58:63, 21:] > BACKGROUND).all()  # the lower wall
    np.testing.assert_array_equal(
        play(PongSoupVectorEnv(1, variant="noisy", noise_std=0.0), 3)[-1][0],
        play(PongSoupVectorEnv(1), 3)[-1][0],
    )


def test_all_variants_share_their_spaces():
    for variant in VARIANTS:
        env = PongSoupVectorEnv(3, variant=variant)
        assert env.single_observation_space == gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        assert env.single_action_space == gym.spaces.Discrete(6)
        assert env.observation_space.shape == (3, 4, 84, 84) and env.action_space.shape == (3,)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("variant", ["noisy", "vh_flip"])
def test_gymnasiums_checker_has_nothing_to_say(variant: str):
    env = gym.make("rllib_pnn/PongSoup-v0", variant=variant, render_mode="rgb_array")
    check_env(env.unwrapped, skip_render_check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "hflip"}, "variant is 'hflip'; did you mean 'h_flip'?"),
        ({"variant": "Black"}, "did you mean 'black'?"),
        ({"variant": None}, "variant is None; expected one of pong, noisy, black, white, zoom"),
        ({"varient": "black"}, "unknown option 'varient'; did you mean 'variant'?"),
        ({"game": "boxing"}, "unknown option 'game'; expected one of variant, noise_std"),
        ({"noise_std": -1}, "noise_std must be a number from 0 to 255, got -1"),
        ({"noise_std": "12"}, "noise_std must be a number from 0 to 255, got '12'"),
        ({"noise_seed": 1.5}, "noise_seed must be a whole number >= 0, got 1.5"),
        ({"zoom_offset": 7}, r"zoom_offset must be \[rows, columns\], got 7"),
        ({"zoom_offset": [14, 22]}, r"zoom_offset \[14, 22\] leaves no room for the picture; at most 21"),
        ({"zoom_offset": [-1, 2]}, "zoom_offset must be a whole number >= 0, got -1"),
    ],
)
@pytest.mark.parametrize("make", [PongSoupEnv, PongSoupVectorEnv])
def test_bad_options_end_in_one_line(make, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**options)
    assert str(error.value).startswith("rllib_pnn/PongSoup-v0: ") and "\n" not in str(error.value)
