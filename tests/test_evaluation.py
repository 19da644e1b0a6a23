"""Playing a column: the environments it is played in, episodes that do not end, scores that were clipped."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from ray import tune
from ray.rllib.env.env_context import EnvContext
from ray.tune.registry import ENV_CREATOR, _global_registry

from rllib_pnn.envs.cartpole_soup import CartPoleSoupVectorEnv
from rllib_pnn.envs.registry import create_env
from rllib_pnn.envs.score import episode_scores
from rllib_pnn.network import ProgressiveNetwork
from rllib_pnn.training import evaluation
from rllib_pnn.training.evaluation import evaluate_column, make_vector_env


class Clipping(gym.Env):
    """Three steps of reward 1; the unclipped return is told in the end."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, length: int | None = 3) -> None:
        self.length = length

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        self.step_count = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple:
        self.step_count += 1
        ended = self.step_count == self.length
        return np.zeros(2, np.float32), 1.0, ended, False, {"episode_score": 30.0} if ended else {}


def network() -> ProgressiveNetwork:
    made = ProgressiveNetwork((2,), 2, [{"dense": 4}])
    made.add_column()
    made.freeze()
    return made


@pytest.fixture
def name() -> Iterator[str]:
    yield "rllib_pnn_test_creator"
    _global_registry.unregister(ENV_CREATOR, "rllib_pnn_test_creator")


@pytest.mark.parametrize("registered", [False, True])
def test_creators_of_single_environments_get_their_config_and_nothing_else(name: str, registered: bool) -> None:
    seen: list[EnvContext] = []

    def create(context: EnvContext) -> gym.Env:
        seen.append(context)
        return gym.make("CartPole-v1", **context)

    tune.register_env(name, create)
    envs = make_vector_env(name if registered else create, {"sutton_barto_reward": True}, 3)
    assert envs.num_envs == 3
    assert all(dict(context) == {"sutton_barto_reward": True} and context.worker_index == 0 for context in seen)
    envs.close()


def test_creators_of_vector_envs_hear_how_many(name: str) -> None:
    def create(context: EnvContext) -> gym.vector.VectorEnv:
        assert context.worker_index == 0
        return create_env("CartPole-v1", context)

    tune.register_env(name, create)
    envs = make_vector_env(name, {"sutton_barto_reward": True}, 3, vectorized=True)
    assert envs.num_envs == 3 and isinstance(envs, gym.vector.VectorEnv)
    envs.close()


def test_the_packages_ids_are_their_native_vector_envs_registered_or_not() -> None:
    env_id = "rllib_pnn/CartPoleSoup-v0"
    had = _global_registry.contains(ENV_CREATOR, env_id)
    tune.register_env(env_id, functools.partial(create_env, env_id))
    try:
        assert isinstance(make_vector_env(env_id, {}, 2).unwrapped, CartPoleSoupVectorEnv)
    finally:
        if not had:
            _global_registry.unregister(ENV_CREATOR, env_id)


def test_an_episode_that_does_not_end_counts_as_it_stands(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(evaluation, "MAX_EPISODE_STEPS", 12)
    played = evaluate_column(network(), lambda context: Clipping(None), {}, column=0, num_episodes=2)
    assert played.returns == (12.0, 12.0) and played.lengths == (12, 12)
    assert "12 steps did not end" in caplog.text


def test_an_episode_of_exactly_the_limit_ends_by_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(evaluation, "MAX_EPISODE_STEPS", 3)
    assert evaluate_column(network(), lambda context: Clipping(), {}, column=0, num_episodes=2).returns == (30.0, 30.0)
    assert "did not end" not in caplog.text


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_returns_are_unclipped_whatever_the_autoreset_mode(mode: AutoresetMode) -> None:
    def create(context: EnvContext) -> gym.vector.VectorEnv:
        lengths = [3, 5][: context["num_envs"]]
        return gym.vector.SyncVectorEnv([functools.partial(Clipping, n) for n in lengths], autoreset_mode=mode)

    played = evaluate_column(network(), create, {}, column=0, num_episodes=2, vectorized=True)
    assert played.returns == (30.0, 30.0) and played.lengths == (3, 5)


def test_scores_are_of_episodes_that_end_and_tell_one() -> None:
    ended = np.array([True, True, False, False])
    infos = {"episode_score": np.array([7.0, 8.0, 9.0, 0.0]), "_episode_score": np.array([True, False, True, False])}
    for given in (infos, {"final_info": infos, "_final_info": ended}):
        told, scores = episode_scores(given, ended)
        assert told.tolist() == [True, False, False, False] and scores[0] == 7.0
    assert not episode_scores({"other": 1}, ended)[0].any()
