"""The task-aware EnvRunner: what it remembers, what it says about episodes."""

import gymnasium as gym
import numpy as np
import pytest
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

import rllib_pnn.envs.registry  # noqa: F401
from rllib_pnn.training.a3c import A3CConfig
from rllib_pnn.training.env_runner import ArrayEnvRunner
from rllib_pnn.training.learner import task_of
from rllib_pnn.training.progressive import make_progressive
from rllib_pnn.training.task_env_runner import TaskEnvRunnerMixin, task_env_runner_class


@pytest.fixture(params=[SingleAgentEnvRunner, ArrayEnvRunner])
def runner(request, tmp_path):
    config = PPOConfig().environment("rllib_pnn/CartPoleSoup-v0").debugging(seed=0)
    config.env_runners(num_env_runners=0, num_envs_per_env_runner=3, env_runner_cls=request.param)
    tasks = [{"name": v, "env_config": {"variant": v}} for v in ("plain", "flipped")]
    config = make_progressive(config, tasks=tasks, column="mlp", column_store=tmp_path)
    made = config.env_runner_cls(config=config, worker_index=1)
    yield made
    made.stop()


def test_chunks_of_ended_episodes_are_forgotten(runner):
    # Episodes of CartPole span several of these samples; what is remembered must not grow with their number.
    for _ in range(12):
        runner.sample(num_timesteps=30)
        runner.get_metrics()
    assert len(runner._ongoing_episodes_for_metrics) <= runner.num_envs


def test_lengths_count_all_chunks_of_an_episode(runner):
    for _ in range(6):
        episodes = runner.sample(num_timesteps=15)
    metrics = runner.get_metrics()
    # With 5 steps a chunk, the last chunks alone would be at most 5 long; a random CartPole episode has about 20.
    assert metrics["episode_len_mean"].peek() > 8
    assert {task_of(e) for e in episodes} == {0}


def test_a_switch_forgets_unfinished_episodes(runner):
    runner.sample(num_timesteps=30)
    runner.switch_task(1)
    assert {task_of(e) for e in runner.sample(num_timesteps=30)} == {1}
    assert runner.env.unwrapped.spec.kwargs["variant"] == "flipped"
    assert runner.config.env_config["variant"] == "flipped"


def test_a_task_has_its_own_env_config_whatever_came_before(tmp_path):
    tasks = [
        {"name": "a", "env_config": {"variant": "plain"}},
        {"name": "b", "env_config": {"variant": "flipped", "sutton_barto_reward": True}},
        {"name": "c", "env_config": {"variant": "permuted"}},
    ]
    config = PPOConfig().environment("rllib_pnn/CartPoleSoup-v0").debugging(seed=0)
    config = make_progressive(config, tasks=tasks, column="mlp", column_store=tmp_path)
    walked, restarted = (config.env_runner_cls(config=config, worker_index=i) for i in (1, 2))
    try:
        walked.switch_task(1)
        walked.switch_task(2)
        restarted.switch_task(2)
        for runner in (walked, restarted):
            assert runner.config.env_config == {"variant": "permuted"}
            assert "sutton_barto_reward" not in runner.env.unwrapped.spec.kwargs
    finally:
        walked.stop()
        restarted.stop()


class Optioned(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

    def __init__(self, options):
        self.options = options


def test_a_task_has_its_own_options_where_they_are_nested(tmp_path):
    tasks = [{"name": str(n), "env_config": {"options": {"level": n}}} for n in range(2)]
    config = PPOConfig().environment(lambda context: Optioned(context["options"]))
    config.environment(env_config={"options": {"size": 1, "level": 7}}).env_runners(num_envs_per_env_runner=1)
    config = make_progressive(config, tasks=tasks, column="mlp", column_store=tmp_path, check_spaces=False)
    in_evaluation = config.copy(copy_frozen=False).environment(env_config={"options": {"shows": True}})
    for made, own in ((config, {}), (in_evaluation, {"shows": True})):
        runner = made.env_runner_cls(config=made, worker_index=1)
        for n in range(2):
            if n:
                runner.switch_task(n)
            # As everywhere, a task's keys replace the config's own.
            assert runner.env.unwrapped.envs[0].unwrapped.options == {"level": n, **own}
        runner.stop()


def test_evaluation_keeps_its_env_config_on_every_task(tmp_path):
    config = PPOConfig().environment("rllib_pnn/CartPoleSoup-v0", env_config={"sutton_barto_reward": True})
    config.evaluation(evaluation_interval=1, evaluation_config={"env_config": {"sutton_barto_reward": False}})
    tasks = [{"name": v, "env_config": {"variant": v}} for v in ("plain", "flipped")]
    config = make_progressive(config, tasks=tasks, column="mlp", column_store=tmp_path)
    config = config.get_evaluation_config_object()
    runner = config.env_runner_cls(config=config, worker_index=1)
    try:
        for index, variant in enumerate(("plain", "flipped")):
            if index:
                runner.switch_task(index)
            assert runner.config.env_config == {"variant": variant, "sutton_barto_reward": False}
    finally:
        runner.stop()


@pytest.mark.parametrize("config_class", [A3CConfig, PPOConfig])
def test_returns_are_those_before_rewards_were_clipped(config_class, tmp_path):
    config = config_class().environment(
        "rllib_pnn/Atari-v0", env_config={"reward_clipping": True, "max_episode_frames": 400}
    )
    config.env_runners(num_env_runners=0, num_envs_per_env_runner=2).debugging(seed=0)
    tasks = [{"name": "alien", "env_config": {"game": "alien"}}]
    config = make_progressive(config, tasks=tasks, column=[{"conv": [4, 8, 8]}, {"dense": 8}], column_store=tmp_path)
    runner = config.env_runner_cls(config=config, worker_index=1)
    told, step = [], runner.env.unwrapped.step

    def listen(actions):
        result = step(actions)
        infos = result[4]
        if "episode_score" in infos:
            told.extend(np.asarray(infos["episode_score"])[np.asarray(infos["_episode_score"])].tolist())
        return result

    runner.env.unwrapped.step = listen
    try:
        while len(told) < 4:
            runner.collect_rollout() if config_class is A3CConfig else runner.sample(num_timesteps=20)
        assert runner.get_metrics()["task_episode_returns"]["0"].peek() == told
        assert max(told) > 10, "points of Alien come in tens"
    finally:
        runner.stop()


def test_environments_of_neighbouring_runners_share_no_seed(runner):
    other = type(runner)(config=runner.config, worker_index=2)
    try:
        seeds = [{r._seed + i for i in range(r.num_envs)} for r in (runner, other)]
        assert not seeds[0] & seeds[1]
    finally:
        other.stop()


def test_the_mixin_goes_in_once():
    once = task_env_runner_class(SingleAgentEnvRunner)
    assert issubclass(once, TaskEnvRunnerMixin)
    assert task_env_runner_class(once) is once
    assert task_env_runner_class(SingleAgentEnvRunner) is once
