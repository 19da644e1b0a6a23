"""CartPole Soup: the physics of CartPole-v1, single and in a batch, seen through fixed linear changes."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from rllib_pnn.envs.cartpole_soup import VARIANTS, CartPoleSoupEnv, CartPoleSoupVectorEnv
from rllib_pnn.envs.registry import create_env

ENV_ID = "rllib_pnn/CartPoleSoup-v0"


def test_plain_is_cartpole_to_the_bit():
    ours, theirs = gym.make(ENV_ID), gym.make("CartPole-v1")
    rng = np.random.default_rng(0)
    for episode in range(5):
        seed = 3 if episode == 0 else None
        np.testing.assert_array_equal(ours.reset(seed=seed)[0], theirs.reset(seed=seed)[0])
        ended = False
        while not ended:
            action = int(rng.integers(2))
            observation, *outcome, _ = ours.step(action)
            expected, *expected_outcome, _ = theirs.step(action)
            np.testing.assert_array_equal(observation, expected)
            assert outcome == expected_outcome
            ended = outcome[1] or outcome[2]


@pytest.mark.parametrize("variant", VARIANTS)
def test_single_envs_and_batch_play_the_same_episodes(variant: str):
    options = {"variant": variant, "max_episode_steps": 25}
    batch = create_env(ENV_ID, {"num_envs": 3, **options})
    singles = [create_env(ENV_ID, options) for _ in range(3)]
    observations, _ = batch.reset(seed=5)
    for i, single in enumerate(singles):
        np.testing.assert_array_equal(single.reset(seed=5 + i)[0], observations[i])
    rng = np.random.default_rng(0)
    ended, kinds = [False] * 3, set()
    for step in range(200):
        if step == 150:  # in the midst of episodes, on with the streams
            observations, _ = batch.reset()
            for i, single in enumerate(singles):
                np.testing.assert_array_equal(single.reset()[0], observations[i])
            ended = [False] * 3
        actions = rng.integers(0, 2, 3)
        observations, rewards, terminated, truncated, _ = batch.step(actions)
        assert observations.dtype == np.float32 and observations in batch.observation_space
        for i, single in enumerate(singles):
            if ended[i]:
                observation, _ = single.reset()
                outcome = [0.0, False, False]
            else:
                observation, *outcome, _ = single.step(actions[i])
            np.testing.assert_array_equal(observation, observations[i])
            assert outcome == [rewards[i], terminated[i], truncated[i]]
            ended[i] = outcome[1] or outcome[2]
            kinds.add(tuple(outcome[1:]))
    assert {(True, False), (False, True)} <= kinds


def test_variants_change_what_is_seen_and_nothing_else():
    seen = {}
    for variant in VARIANTS:
        env = CartPoleSoupVectorEnv(2, variant=variant)
        rng = np.random.default_rng(0)
        steps = [env.reset(seed=1)[0]]
        outcomes = []
        for _ in range(60):
            observations, *outcome, _ = env.step(rng.integers(0, 2, 2))
            steps.append(observations)
            outcomes.append(outcome)
        seen[variant] = np.stack(steps), np.array(outcomes)
        np.testing.assert_array_equal(seen[variant][1], seen["plain"][1])
    x = seen["plain"][0]
    np.testing.assert_array_equal(seen["flipped"][0], -x)
    np.testing.assert_array_equal(seen["permuted"][0], np.stack([x[..., i] for i in (2, 3, 1, 0)], -1))
    np.testing.assert_array_equal(seen["scaled"][0], x * np.float32([2, 0.5, 5, 0.25]))
    np.testing.assert_array_equal(seen["shifted"][0], x + np.float32([1, -1, 0.5, -0.5]))


def test_a_seed_names_the_starts_and_none_goes_on():
    def starts(seed: int | None) -> list[list[float]]:
        env = CartPoleSoupVectorEnv(2)
        return [env.reset(seed=seed)[0].tolist(), env.reset()[0].tolist()]

    assert starts(4) == starts(4) != starts(5)
    assert starts(4)[0] != starts(4)[1]
    assert starts(None) != starts(None)


def test_one_carts_starts_do_not_depend_on_the_others():
    # In gymnasium's own batch they do: all carts draw from one stream.
    def second_start(first_action: int) -> np.ndarray:
        env = CartPoleSoupVectorEnv(2)
        env.reset(seed=0)
        for step in range(60):
            observations, *_ = env.step(np.array([first_action if first_action < 2 else step % 2, 1]))
        return observations[1]

    np.testing.assert_array_equal(second_start(0), second_start(2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_balanced_pole_lasts_500_steps(variant: str):
    env = gym.make(ENV_ID, variant=variant)
    order = [3, 2, 0, 1] if variant == "permuted" else [0, 1, 2, 3]
    gain = {"flipped": [-1] * 4, "scaled": [2, 0.5, 5, 0.25]}.get(variant, [1] * 4)
    offset = [1, -1, 0.5, -0.5] if variant == "shifted" else [0] * 4
    observation, _ = env.reset(seed=0)
    score, ended = 0.0, False
    while not ended:
        x, v, angle, spin = ((observation - np.array(offset)) / np.array(gain))[order]
        action = int(0.05 * x + 0.1 * v + angle + 0.3 * spin > 0)
        observation, reward, terminated, ended, _ = env.step(action)
        score += reward
        assert not terminated
    assert score == 500


def test_spaces_and_metadata():
    for variant in VARIANTS:
        env = CartPoleSoupVectorEnv(4, variant=variant)
        assert env.single_observation_space == gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        assert env.single_action_space == gym.spaces.Discrete(2)
        assert env.observation_space.shape == (4, 4)
        assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert create_env(ENV_ID, {"num_envs": 2}).max_episode_steps == 500


@pytest.mark.filterwarnings("error", "ignore:.*A Box observation space m....um value is -?infinity")
def test_gymnasiums_checker_has_nothing_else_to_say():
    check_env(gym.make(ENV_ID, variant="scaled").unwrapped, skip_render_check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "fliped"}, "variant is 'fliped'; did you mean 'flipped'?"),
        ({"variant": 1}, "variant is 1; expected one of plain, flipped, permuted, scaled, shifted"),
        ({"variants": "plain"}, "unknown option 'variants'; did you mean 'variant'?"),
        ({"sutton_barto_reward": "no"}, "sutton_barto_reward must be true or false, got 'no'"),
    ],
)
@pytest.mark.parametrize("make", [CartPoleSoupEnv, CartPoleSoupVectorEnv])
def test_bad_options_end_in_one_line(make, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make(**options)
    assert str(error.value).startswith(f"{ENV_ID}: ") and "\n" not in str(error.value)
