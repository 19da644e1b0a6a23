"""The task-aware EnvRunner: what it remembers, what it says about episodes."""

import pytest
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

import rllib_pnn.envs.registry  # noqa: F401
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
