"""Atari as single and vector env: the same game, seeding (promise 6), unclipped scores, errors."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from ale_py.vector_env import AtariVectorEnv
from gymnasium.error import ClosedEnvironmentError, ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import rllib_pnn.envs.registry  # noqa: F401  (makes the ids known)
from rllib_pnn.envs.atari import ATARI_SOURCES, ATARI_TARGETS, AtariGameEnv, AtariGameVectorEnv

STICKY = {"game": "riverraid", "repeat_action_probability": 0.25, "max_episode_frames": 240}


def actions_of(num_steps: int, num_envs: int, num_actions: int = 18) -> np.ndarray:
    return np.random.default_rng(0).integers(0, num_actions, (num_steps, num_envs))


def digest(env: AtariGameVectorEnv, seed: int | None, num_steps: int = 70) -> str:
    """Hash of all that a batch returns after a reset; its episodes last 60 steps with STICKY."""
    sha = hashlib.sha256(env.reset(seed=seed)[0].tobytes())
    for action in actions_of(num_steps, env.num_envs):
        for part in env.step(action)[:4]:
            sha.update(np.ascontiguousarray(part).tobytes())
    return sha.hexdigest()


def test_single_envs_and_batch_play_the_same_episodes():
    batch = AtariGameVectorEnv(3, **STICKY)
    singles = [AtariGameEnv(**STICKY) for _ in range(3)]
    observations, _ = batch.reset(seed=11)
    for i, single in enumerate(singles):
        np.testing.assert_array_equal(single.reset(seed=11 + i)[0], observations[i])
    ended = [False] * 3
    num_ends = 0
    for action in actions_of(200, 3):
        observations, rewards, terminated, truncated, infos = batch.step(action)
        for i, single in enumerate(singles):
            if ended[i]:
                observation, info = single.reset()
                reward, end = 0.0, (False, False)
            else:
                observation, reward, *end, info = single.step(action[i])
            np.testing.assert_array_equal(observation, observations[i])
            assert (reward, *end) == (rewards[i], terminated[i], truncated[i])
            ended[i] = any(end)
            num_ends += ended[i]
            assert ("episode_score" in info) == ended[i]
            if ended[i]:
                assert info["episode_score"] == infos["episode_score"][i]
                assert infos["_episode_score"][i]
    assert num_ends >= 9


def test_frames_are_those_of_ale_py():
    ours = AtariGameVectorEnv(2, game="seaquest", max_episode_frames=200)
    theirs = AtariVectorEnv(
        "seaquest",
        2,
        full_action_space=True,
        reward_clipping=False,
        num_threads=1,
        max_num_frames_per_episode=200,
    )
    # Frames from before an episode are black in theirs and its first one in ours.
    missing, ended, num_starts = np.full(2, 3), np.zeros(2, bool), 0
    mine, other = ours.reset(seed=5)[0], theirs.reset(seed=5)[0]
    for action in actions_of(120, 2):
        for i, count in enumerate(missing):
            np.testing.assert_array_equal(mine[i, count:], other[i, count:])
            assert not other[i, :count].any()
            assert (mine[i, :count] == mine[i, count]).all()
            num_starts += count == 3
        (mine, *rest), (other, *expected) = ours.step(action)[:4], theirs.step(action)[:4]
        for got, wanted in zip(rest, expected, strict=True):
            np.testing.assert_array_equal(got, wanted)
        missing = np.where(ended, 3, np.maximum(missing - 1, 0))
        ended = rest[1] | rest[2]
    assert num_starts > 4


def test_a_seed_names_the_episodes_whatever_was_played_before_and_with_any_number_of_threads():
    env = AtariGameVectorEnv(2, **STICKY)
    first = digest(env, seed=7)
    assert digest(env, seed=7) == first
    assert digest(AtariGameVectorEnv(2, num_threads=2, **STICKY), seed=7) == first
    assert digest(env, seed=8) != first


def test_a_seed_names_the_same_episodes_in_another_process():
    code = (
        "from tests.test_atari import *; "
        "print(*(digest(AtariGameVectorEnv(2, **STICKY), seed=seed) for seed in (3, 4)))"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    env = {**os.environ, "PYTHONPATH": root, "PYTHONHASHSEED": "1"}
    output = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True)
    here = [digest(AtariGameVectorEnv(2, **STICKY), seed=seed) for seed in (3, 4)]
    assert output.stdout.split() == here


def test_a_list_of_seeds_seeds_each_env():
    batch = AtariGameVectorEnv(2, **STICKY)

    def frames(seed: int | list[int]) -> np.ndarray:
        batch.reset(seed=seed)
        for action in actions_of(20, 1):
            observations, *_ = batch.step(action.repeat(2))
        return observations

    in_order = frames(21)
    assert (in_order[0] != in_order[1]).any()
    np.testing.assert_array_equal(frames([21, 22]), in_order)
    np.testing.assert_array_equal(frames([22, 21]), in_order[::-1])
    with pytest.raises(ValueError, match="3 seeds for 2 envs"):
        batch.reset(seed=[1, 2, 3])


def test_seeds_beyond_the_emulators_range_are_seeds_too():
    env = AtariGameVectorEnv(2, **STICKY)
    assert digest(env, seed=2**31 - 1, num_steps=5) == digest(env, seed=2**31 - 1, num_steps=5)


def test_reset_without_a_seed_goes_on_with_the_stream():
    def episodes() -> list[str]:
        env = AtariGameVectorEnv(1, **STICKY)
        env.reset(seed=5)
        return [digest(env, seed=None, num_steps=20) for _ in range(4)]

    played = episodes()
    assert played == episodes()
    assert len(set(played)) == 4


def test_unseeded_envs_differ():
    # In ale_py alone, sticky actions are alike in envs that are made at the same moment.
    env = AtariGameVectorEnv(4, game="pong", noop_max=0, repeat_action_probability=0.5)
    env.reset()
    for action in actions_of(100, 1, 6):
        observations, *_ = env.step(action.repeat(4))
    assert len({observation.tobytes() for observation in observations}) == 4


def test_an_unseeded_reset_draws_its_seed_from_the_envs_generator():
    def episode(generator_seed: int) -> str:
        env = AtariGameVectorEnv(1, **STICKY)
        env.np_random = np.random.default_rng(generator_seed)
        return digest(env, seed=None, num_steps=20)

    assert episode(1) == episode(1) != episode(2)


def test_rewards_are_clipped_on_request_and_the_score_is_not():
    raw, clipped = (AtariGameVectorEnv(2, reward_clipping=clip, **STICKY) for clip in (False, True))
    raw.reset(seed=0)
    clipped.reset(seed=0)
    returns, clipped_returns, scores = np.zeros(2), np.zeros(2), []
    for action in actions_of(150, 2):
        _, rewards, *_, raw_infos = raw.step(action)
        _, small_rewards, *_, infos = clipped.step(action)
        np.testing.assert_array_equal(small_rewards, rewards.clip(-1, 1))
        returns += rewards
        clipped_returns += small_rewards
        if infos:
            for i in np.flatnonzero(infos["_episode_score"]):
                assert infos["episode_score"][i] == raw_infos["episode_score"][i] == returns[i]
                scores.append((returns[i], clipped_returns[i]))
                returns[i] = clipped_returns[i] = 0.0
    assert len(scores) >= 4
    assert any(score > clipped_return > 0 for score, clipped_return in scores)


def test_infos_are_empty_within_episodes():
    env = AtariGameVectorEnv(2, **STICKY)
    assert env.reset(seed=0)[1] == {}
    num_ends = 0
    for action in actions_of(130, 2):
        *_, terminated, truncated, infos = env.step(action)
        ended = terminated | truncated
        num_ends += ended.sum()
        assert bool(infos) == ended.any()
        if infos:
            np.testing.assert_array_equal(infos["_episode_score"], ended)
    assert num_ends == 4


def test_observations_are_new_arrays_that_the_caller_may_keep_and_change():
    env, twin = AtariGameVectorEnv(2, game="pong"), AtariGameVectorEnv(2, game="pong")
    kept = [env.reset(seed=0)[0]]
    twin.reset(seed=0)
    copies = [kept[0].copy()]
    for action in actions_of(30, 2):
        kept.append(env.step(action)[0])
        copies.append(kept[-1].copy())
        changed = twin.step(action)[0]
        np.testing.assert_array_equal(changed, kept[-1])
        changed[:] = 77
    for observation, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(observation, copy)


def test_in_place_of_frames_from_before_the_episode_stands_its_first_and_the_stack_moves_by_one():
    env = AtariGameVectorEnv(1, game="pong", frame_stack=3, max_episode_frames=40)
    observation, _ = env.reset(seed=0)
    assert (observation[0] == observation[0, -1]).all() and observation[0].any()
    ended, num_resets = False, 0
    for action in actions_of(30, 1):
        previous = observation
        observation, _, terminated, truncated, _ = env.step(action)
        if ended:
            num_resets += 1
            assert (observation[0] == observation[0, -1]).all() and observation[0].any()
        else:
            np.testing.assert_array_equal(observation[0, :2], previous[0, 1:])
        ended = bool(terminated[0] | truncated[0])
    assert num_resets == 2


@pytest.mark.parametrize("game", [*ATARI_SOURCES, *ATARI_TARGETS])
def test_the_papers_games_share_their_spaces(game: str):
    env = AtariGameVectorEnv(1, game=game)
    assert env.single_action_space == gym.spaces.Discrete(18)
    assert env.single_observation_space == gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    observations, _ = env.reset(seed=0)
    assert observations in env.observation_space
    for action in (2, 17):
        observations, *_ = env.step(np.array([action]))
    assert len(np.unique(observations[0, -1])) > 1


def test_a_games_own_actions_on_request():
    env = AtariGameVectorEnv(1, game="pong", full_action_space=False)
    assert env.single_action_space == gym.spaces.Discrete(6)


def test_episodes_are_truncated_at_max_episode_frames():
    env = AtariGameEnv(game="pong", max_episode_frames=100, frameskip=5, noop_max=0)
    env.reset(seed=0)
    ends = [env.step(0)[2:4] for _ in range(20)]
    assert ends == [(False, False)] * 19 + [(False, True)]


@pytest.mark.filterwarnings("error")
def test_stagger_cuts_one_episode_of_each_env_and_the_next_step_resets_it():
    """Beside a batch without it, whose envs play the same until they are cut."""
    envs, plain = (AtariGameVectorEnv(6, game="pong", stagger=stagger) for stagger in (40, 0))
    (observations, _), _ = envs.reset(seed=3), plain.reset(seed=3)
    envs.stagger_episodes(seed=0)
    plain.stagger_episodes(seed=0)
    cut_at = np.zeros(6, int)
    for step, action in enumerate(actions_of(60, 6), start=1):
        before = envs.cut
        observations, rewards, terminated, truncated, infos = envs.step(action)
        expected = plain.step(action)
        uncut = cut_at == 0
        np.testing.assert_array_equal(observations[uncut], expected[0][uncut])
        np.testing.assert_array_equal(rewards[uncut], expected[1][uncut])
        assert not terminated.any() and not infos and plain.cut is None
        np.testing.assert_array_equal(truncated, np.zeros(6, bool) if envs.cut is None else envs.cut)
        for i in np.flatnonzero(truncated):
            assert cut_at[i] == 0, "cut twice"
            cut_at[i] = step
        for i in [] if before is None else np.flatnonzero(before):
            # The reset step: an episode's first observation, its frame in all places of the stack, and no reward.
            assert (observations[i] == observations[i, -1:]).all() and rewards[i] == 0 and not truncated[i]
            assert not np.array_equal(observations[i], expected[0][i])
    assert cut_at.min() >= 1 and cut_at.max() <= 40 and len(set(cut_at)) > 3
    assert envs.cut is None


def test_stagger_leaves_alone_what_ends_by_itself_and_never_cuts_a_reset_step():
    envs = AtariGameVectorEnv(64, game="pong", stagger=12, max_episode_frames=20, noop_max=0)
    envs.reset(seed=0)
    envs.stagger_episodes(seed=1)
    lengths, ended, cuts = np.zeros(64, int), np.zeros(64, bool), 0
    for action in actions_of(40, 64):
        _, _, terminated, truncated, infos = envs.step(action)
        assert not (truncated & ended).any(), "the step after an end is a reset"
        lengths = np.where(ended, 0, lengths + 1)
        ended = terminated | truncated
        cut = np.zeros(64, bool) if envs.cut is None else envs.cut
        assert (lengths[ended & ~cut] == 5).all() and (lengths[cut] < 5).all() and (lengths[cut] > 0).all()
        # A score is told of whole episodes alone.
        told = infos.get("_episode_score", np.zeros(64, bool))
        np.testing.assert_array_equal(told, ended & ~cut)
        cuts += cut.sum()
    assert 20 < cuts < 64


def test_a_reset_forgets_what_was_to_be_cut():
    envs = AtariGameVectorEnv(4, game="pong", stagger=10)
    envs.reset(seed=0)
    envs.stagger_episodes(seed=0)
    envs.reset(seed=0)
    assert not any(envs.step(action)[3].any() for action in actions_of(20, 4))


def test_gymnasiums_checker_has_nothing_to_say():
    check_env(gym.make("rllib_pnn/Atari-v0", game="boxing", render_mode="rgb_array").unwrapped)


def test_render_shows_what_the_agent_sees():
    env = AtariGameVectorEnv(2, game="pong", render_mode="rgb_array")
    with pytest.raises(ResetNeeded, match="before the first reset"):
        env.render()
    observations, _ = env.reset(seed=0)
    frames = env.render()
    assert len(frames) == 2 and frames[1].shape == (336, 336, 3) and frames[1].dtype == np.uint8
    for channel in range(3):
        np.testing.assert_array_equal(frames[1][::4, ::4, channel], observations[1, -1])


def test_metadata_is_the_envs_own(monkeypatch):
    monkeypatch.setattr(gym.vector.VectorEnv, "metadata", {})
    env = AtariGameVectorEnv(1, game="pong", frameskip=2)
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert env.metadata["render_fps"] == 30
    # ale_py on its own writes there, and every vector env of the process would claim NEXT_STEP.
    assert gym.vector.VectorEnv.metadata == {}


def test_close_ends_the_emulators_threads():
    def num_threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before = num_threads()
    env = AtariGameVectorEnv(4, game="pong", num_threads=3)
    env.reset(seed=0)
    assert num_threads() > before
    env.close()
    env.close()
    assert num_threads() == before
    with pytest.raises(ClosedEnvironmentError, match="closed"):
        env.step(np.zeros(4, int))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"game": "road_runer"}, "game is 'road_runer'; did you mean 'road_runner'?"),
        ({"game": "RiverRaid"}, "did you mean 'riverraid'?"),
        ({"game": "nothing_like_it"}, "none of the 1.. known names is close"),
        ({"gmae": "pong"}, "unknown option 'gmae'; did you mean 'game'?"),
        ({"frame_stack": 0}, "frame_stack must be a whole number >= 1, got 0"),
        ({"frame_stack": 2.5}, "frame_stack must be a whole number >= 1, got 2.5"),
        ({"frameskip": True}, "frameskip must be a whole number >= 1, got True"),
        ({"noop_max": -1}, "noop_max must be a whole number >= 0, got -1"),
        ({"max_episode_frames": "many"}, "max_episode_frames must be a whole number"),
        ({"num_threads": None}, "num_threads must be a whole number >= 1, got None"),
        ({"repeat_action_probability": 1.5}, "must be a number from 0 to 1, got 1.5"),
        ({"reward_clipping": "false"}, "reward_clipping must be true or false, got 'false'"),
        ({"full_action_space": 1}, "full_action_space must be true or false, got 1"),
        ({"render_mode": "human"}, "render_mode is 'human'; expected one of rgb_array"),
    ],
)
@pytest.mark.parametrize("make", [AtariGameEnv, AtariGameVectorEnv])
def test_bad_options_end_in_one_line(make, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**options)
    assert str(error.value).startswith("rllib_pnn/Atari-v0: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([0, 18], r"actions run from 0 to 17, got \[0, 18\]"),
        ([-1, 0], "actions run from 0 to 17"),
        ([0], r"expected 2 whole numbers as actions, got int64 of shape \(1,\)"),
        ([0.5, 1.0], "expected 2 whole numbers as actions, got float64"),
    ],
)
def test_bad_actions_are_errors(actions, message):
    # ale_py would wait for ever at an action that the game lacks.
    env = AtariGameVectorEnv(2, game="pong")
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(actions)


def test_steps_out_of_turn_are_errors():
    env = AtariGameEnv(game="pong", max_episode_frames=4)
    with pytest.raises(ResetNeeded, match="before the first reset"):
        env.step(0)
    env.reset(seed=0)
    assert env.step(0)[3]
    with pytest.raises(ResetNeeded, match="the episode has ended"):
        env.step(0)
    with pytest.raises(ValueError, match="reset_mask is not supported"):
        AtariGameVectorEnv(2).reset(options={"reset_mask": np.ones(2, bool)})
