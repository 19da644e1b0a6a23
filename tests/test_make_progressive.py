"""make_progressive and ProgressiveCallback on real algorithms: growth, task switches, checkpoints, faults."""

import copy
import functools
import math
import re
import subprocess
import sys
import threading
import time

import gymnasium as gym
import numpy as np
import pytest
import ray
import torch
from ray import tune
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.utils import AggregatorActor
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core.learner.learner import Learner
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.models.catalog import MODEL_DEFAULTS
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    EPISODE_RETURN_MEAN,
    EVALUATION_RESULTS,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
)
from small_algorithms import CONFIGS, small_config

import rllib_pnn
from rllib_pnn.envs.cartpole_soup import CartPoleSoupVectorEnv
from rllib_pnn.network import ColumnStore
from rllib_pnn.network.store import ColumnStoreError
from rllib_pnn.training import callback
from rllib_pnn.training.evaluation import ColumnEvaluation, evaluate_column, make_vector_env
from rllib_pnn.training.learner import NUM_ENV_STEPS_DROPPED, note_task, task_of
from rllib_pnn.training.progressive import make_progressive
from rllib_pnn.training.rl_module import ProgressiveRLModule

VARIANTS = ("plain", "flipped", "permuted")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    rllib_pnn.register()
    yield
    ray.shutdown()


def tasks(count=2, steps=200):
    """``steps``: of every task, or a list of one number per task."""
    steps = steps if isinstance(steps, list) else [steps] * count
    return [
        {"name": v, "env_config": {"variant": v}, "until": {"num_env_steps": n}}
        for v, n in zip(VARIANTS[:count], steps, strict=True)
    ]


def config(algorithm="PPO", *, num_env_runners=0, num_learners=0):
    made = small_config(algorithm, num_learners=num_learners)
    made.environment("rllib_pnn/CartPoleSoup-v0")
    made.env_runners(num_env_runners=num_env_runners, num_envs_per_env_runner=2)
    return made.debugging(seed=7)


def progressive(tmp_path, algorithm="PPO", *, count=2, steps=200, **settings):
    runners = {k: settings.pop(k) for k in ("num_env_runners", "num_learners") if k in settings}
    settings = {"column": [{"dense": 8}, {"dense": 8}], "evaluation_episodes": 2, **settings}
    made = settings.pop("config", None) or config(algorithm, **runners)
    return make_progressive(made, tasks=tasks(count, steps), column_store=tmp_path / "columns", **settings)


def learner_module(algorithm):
    return _learner(algorithm).progressive_module


def _learner(algorithm):
    return algorithm.learner_group._learner


def train_until(algorithm, condition, limit=200):
    for _ in range(limit):
        result = algorithm.train()
        if condition(result):
            return result
    raise AssertionError("condition never met")


# -- the four algorithms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"gym_env_vectorize_mode": gym.VectorizeMode.SYNC}])
def test_environments_of_the_package_step_together(tmp_path, given):
    made = progressive(tmp_path, config=config().env_runners(**given)).build_algo()
    try:
        assert isinstance(made.env_runner.env.unwrapped, CartPoleSoupVectorEnv)
    finally:
        made.stop()


@pytest.mark.parametrize("mode", ["async", gym.VectorizeMode.ASYNC])
def test_another_way_to_step_environments_stays(tmp_path, mode):
    made = progressive(tmp_path, config=config().env_runners(gym_env_vectorize_mode=mode))
    assert made.gym_env_vectorize_mode == mode


@pytest.mark.parametrize("algorithm", ["PPO", "A3C"])
def test_a_seed_does_not_fill_new_tensors(tmp_path, algorithm):
    def memory_settings(_):  # a closure: pickled by value, for actors can't import this file
        from torch.utils import deterministic

        return torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory

    made = progressive(tmp_path, algorithm, num_env_runners=1, num_learners=1).build_algo()
    try:
        assert made.env_runner_group.foreach_env_runner(memory_settings, local_env_runner=False) == [(True, False)]
        learners = made.learner_group.foreach_learner(memory_settings)
        assert [learner.get() for learner in learners] == [(True, False)]
    finally:
        made.stop()


@pytest.mark.parametrize(
    ("algorithm", "num_env_runners", "num_learners"),
    [("PPO", 1, 0), ("PPO", 0, 2), ("APPO", 1, 0), ("IMPALA", 1, 1), ("A3C", 1, 0)],
)
def test_train_switch_train_checkpoint_restore_train(tmp_path, algorithm, num_env_runners, num_learners):
    # The second task is long: IMPALA and APPO take many batches per iteration, and the checkpoint has to lie within it.
    steps = [160, 2400 if algorithm in ("APPO", "IMPALA") else 480, 160]
    made = progressive(
        tmp_path, algorithm, count=3, num_env_runners=num_env_runners, num_learners=num_learners, steps=steps
    ).build_algo()
    try:
        first = train_until(made, lambda r: r["progressive"]["task_over"])
        assert first["progressive"]["task"] == "plain"
        assert not math.isnan(first["columns"]["plain"]["frozen_episode_return_mean"])
        train_until(made, lambda r: r["progressive"]["task"] == "flipped" and r["progressive"]["task_env_steps"] > 0)
        checkpoint = made.save_to_path(str(tmp_path / "checkpoint"))
    finally:
        made.stop()
    stored = [entry.fingerprint for entry in ColumnStore(tmp_path / "columns").entries]
    assert len(stored) == 1

    restored = Algorithm.from_checkpoint(checkpoint)
    try:
        result = restored.train()
        assert result["progressive"]["task"] == "flipped"
        last = train_until(restored, lambda r: r.get("done"), limit=400)
        assert last["progressive"]["finished"]
        # Promise 1: played again after two more tasks and a restore, the same episodes with bit-equal outputs.
        assert [last["columns"][v]["bit_equal"] for v in VARIANTS] == [1, 1, 1]
        assert [last["columns"][v]["forgetting"] for v in VARIANTS] == [0.0, 0.0, 0.0]
    finally:
        restored.stop()
    entries = ColumnStore(tmp_path / "columns").entries
    assert [e.task for e in entries] == list(VARIANTS)
    assert entries[0].fingerprint == stored[0]
    assert ColumnStore(tmp_path / "columns").load().num_columns == 3


# -- promises ----------------------------------------------------------------------------------------------------------


def test_only_the_new_column_trains_and_the_old_one_keeps_its_bits(tmp_path):
    made = progressive(tmp_path).build_algo()
    try:
        train_until(made, lambda r: r["progressive"]["task_over"])
        network = learner_module(made).network
        held = [
            p for group in next(iter(_learner(made)._named_optimizers.values())).param_groups for p in group["params"]
        ]
        assert {id(p) for p in held} == {id(p) for p in network.columns[-1].parameters()}
        before = [p.detach().clone() for p in network.columns[0].parameters()]
        newest = [p.detach().clone() for p in network.columns[1].parameters()]
        made.train()
        assert all(torch.equal(a, b) for a, b in zip(before, network.columns[0].parameters(), strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(newest, network.columns[1].parameters(), strict=True))
        network.verify()
    finally:
        made.stop()


def test_rollouts_of_another_task_train_nothing(tmp_path):
    made = progressive(tmp_path).build_algo()
    try:
        learner = _learner(made)

        def update(task_index):
            episodes = made.env_runner.sample(num_timesteps=80)
            for episode in episodes:
                episode.id_ = episode.id_.partition("/")[2]
                note_task(episode, task_index)
            before = [p.detach().clone() for p in learner.progressive_module.network.parameters()]
            results = made.learner_group.update(episodes=episodes, num_epochs=1, minibatch_size=40, timesteps={})
            after = learner.progressive_module.network.parameters()
            changed = not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            return changed, results[0]["__all_modules__"].get(NUM_ENV_STEPS_DROPPED)

        changed, dropped = update(task_index=0)
        assert changed
        assert dropped is None
        changed, dropped = update(task_index=1)
        assert not changed
        assert dropped.peek() >= 80
    finally:
        made.stop()


@pytest.mark.parametrize("num_aggregators", [0, 1])
def test_rollouts_of_another_task_train_nothing_whoever_batches_them(tmp_path, num_aggregators):
    base = config("IMPALA").learners(num_aggregator_actors_per_learner=num_aggregators)
    base = progressive(tmp_path, config=base)
    runner = base.env_runner_cls(config=base, worker_index=1)
    learner = base.build_learner(env=None, spaces=runner.get_spaces())
    try:
        for task_index in (0, 1):
            if task_index:
                learner.progressive_module.network.freeze()
                learner.grow({**learner.progressive_module.progress, "task_index": 1})
            episodes = [e for e in runner.sample(num_timesteps=40) if len(e)]  # all of task 0
            data = TrainingData(episodes=episodes)
            if num_aggregators:
                actor = AggregatorActor(base, learner._module_spec)
                batch = actor._learner_connector(episodes=episodes, rl_module=actor._module, metrics=actor.metrics)
                parts = {key: SampleBatch(part) for key, part in batch.items()}
                data = TrainingData(batch=MultiAgentBatch(parts, sum(map(len, episodes))))
            newest = list(learner.progressive_module.network.columns[-1].parameters())
            before = [p.detach().clone() for p in newest]
            # What IMPALA's thread calls.
            Learner.update(learner, training_data=data, timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: 0}, num_epochs=1)
            trained = not all(torch.equal(a, b) for a, b in zip(before, newest, strict=True))
            assert trained == (task_index == 0)
    finally:
        runner.stop()
        learner.shutdown()


def test_no_learner_updates_alone(tmp_path, monkeypatch):
    made = progressive(tmp_path, "PPO").build_algo()
    try:
        learner = _learner(made)
        newest = list(learner.progressive_module.network.columns[-1].parameters())
        monkeypatch.setattr(learner, "config", learner.config.copy(copy_frozen=False).learners(num_learners=2))
        says = 1.0  # what the other Learner has; this one would not skip
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda flag, op: flag.fill_(max(says, float(flag))))
        batch = learner._make_batch_if_necessary(
            TrainingData(episodes=[e for e in made.env_runner.sample(num_timesteps=40) if len(e)])
        )
        before = [p.detach().clone() for p in newest]
        assert learner._update(learner._convert_batch_type(batch).policy_batches) == ({}, {}, {})
        assert all(torch.equal(a, b) for a, b in zip(before, newest, strict=True))
        says = 0.0
        assert [learner._one_skips(own) for own in (False, True)] == [False, True]
    finally:
        made.stop()


def test_the_state_that_is_broadcast_is_taken_between_updates(tmp_path):
    made = progressive(tmp_path, "APPO").build_learner(env=gym.make("rllib_pnn/CartPoleSoup-v0"))
    module, taken = made.progressive_module, []
    other = copy.deepcopy(module.network.columns[-1])
    with torch.no_grad():
        other.policy.weight.add_(1.0)
    asking = threading.Thread(target=lambda: taken.append(made.module_state(inference_only=True)))
    with made._growth_lock:  # an update: APPO's target network stands in the newest column's place for a while
        newest, module.network.columns[-1] = module.network.columns[-1], other
        asking.start()
        asking.join(0.3)
        module.network.columns[-1] = newest
    asking.join()
    weight = taken[0]["columns"][-1]["parameters"]["policy.weight"]
    np.testing.assert_array_equal(weight, newest.policy.weight.detach().numpy())
    assert not np.shares_memory(weight, newest.policy.weight.detach().numpy())
    made.shutdown()


def test_a_learner_that_reports_does_not_meet_one_that_grows(tmp_path, monkeypatch):
    learner = progressive(tmp_path, "IMPALA").build_learner(env=gym.make("rllib_pnn/CartPoleSoup-v0"))
    inside, errors, get = threading.Event(), [], learner._get_optimizer_lr

    def slowly(optimizer):
        inside.set()
        time.sleep(0.2)
        return get(optimizer)

    monkeypatch.setattr(learner, "_get_optimizer_lr", slowly)

    def report():
        try:
            learner.after_gradient_based_update(timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: 5})
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=report)
    thread.start()
    assert inside.wait(10)
    learner.freeze_columns()  # takes the optimizer away
    thread.join()
    assert not errors
    learner.shutdown()


def test_windows_over_evaluation_episodes_do_not_mix_tasks(tmp_path):
    base = config().evaluation(evaluation_interval=1, evaluation_duration=2, evaluation_num_env_runners=0)
    made = progressive(tmp_path, config=base).build_algo()
    key = (EVALUATION_RESULTS, ENV_RUNNER_RESULTS, EPISODE_RETURN_MEAN)
    try:
        assert not made.train()["progressive"]["task_over"]
        assert not math.isnan(made.metrics.peek(key, default=math.nan))
        train_until(made, lambda r: r["progressive"]["task_over"])
        assert math.isnan(made.metrics.peek(key, default=math.nan))
    finally:
        made.stop()


def test_episodes_keep_their_task_when_cut_and_sliced(tmp_path):
    made = progressive(tmp_path).build_algo()
    try:
        episode = made.env_runner.sample(num_timesteps=10)[0]
        assert task_of(episode) == 0
        assert task_of(episode[1:3]) == 0
        assert task_of(copy.deepcopy(episode)) == 0
        assert task_of(episode.cut()) == 0
    finally:
        made.stop()


def test_every_env_runner_plays_the_new_task_a_restarted_one_too(tmp_path):
    base = config(num_env_runners=2)
    base.fault_tolerance(restart_failed_env_runners=True, env_runner_health_probe_timeout_s=5)
    made = progressive(tmp_path, config=base, steps=100).build_algo()
    try:
        train_until(made, lambda r: r["progressive"]["task_over"])

        def look(runner):
            return runner.worker_index, runner.task_index, runner.env.unwrapped.spec.kwargs.get("variant")

        group = made.env_runner_group
        seen = group.foreach_env_runner(look, local_env_runner=False)
        assert [s[1] for s in seen] == [1, 1]
        actor = group._worker_manager.actors()[1]
        ray.kill(actor, no_restart=False)
        for _ in range(30):
            made.train()
            seen = group.foreach_env_runner(look, local_env_runner=False)
            if len(seen) == 2:
                break
        assert sorted(s[:2] for s in seen) == [(1, 1), (2, 1)]
    finally:
        made.stop()


def test_late_weights_of_an_earlier_task_are_ignored(tmp_path):
    made = progressive(tmp_path).build_algo()
    try:
        early = copy.deepcopy(learner_module(made).get_state())
        train_until(made, lambda r: r["progressive"]["task_over"])
        runner = made.env_runner
        assert runner.task_index == 1
        runner.set_state({"rl_module": early})
        assert (runner.task_index, runner.module.network.num_columns) == (1, 2)
        runner.follow(early)  # said on purpose, after a restore
        assert (runner.task_index, runner.module.network.num_columns) == (0, 1)
    finally:
        made.stop()


def test_a_column_that_was_stored_is_never_trained_again(tmp_path):
    # Killed after storing column 0 and before the next checkpoint: the old checkpoint knows nothing of it.
    made = progressive(tmp_path, steps=200).build_algo()
    try:
        made.train()
        checkpoint = made.save_to_path(str(tmp_path / "checkpoint"))
        train_until(made, lambda r: r["progressive"]["task_over"])
    finally:
        made.stop()
    stored = ColumnStore(tmp_path / "columns").entries[0].fingerprint
    restored = Algorithm.from_checkpoint(checkpoint)
    try:
        result = restored.train()
        assert result["progressive"]["task"] == "flipped"
        assert learner_module(restored).network.fingerprints() == [stored, None]
        train_until(restored, lambda r: r.get("done"))
    finally:
        restored.stop()
    assert [e.task for e in ColumnStore(tmp_path / "columns").entries] == ["plain", "flipped"]


def test_every_episode_counts_one_that_ends_alone_too(tmp_path):
    """RLlib hands over a series of one as a number."""
    base = config()
    base.env_runners(num_envs_per_env_runner=1, rollout_fragment_length=10)
    base.training(train_batch_size_per_learner=10, minibatch_size=10)
    made = progressive(tmp_path, config=base, steps=10**6).build_algo()
    try:
        results = [made.train() for _ in range(30)]
    finally:
        made.stop()
    counts = [r["progressive"]["num_episodes"] for r in results]
    assert 1 in counts
    assert sum(counts) == results[-1]["env_runners"]["num_episodes_lifetime"]


def test_a_column_is_not_frozen_on_returns_that_its_newest_weights_do_not_reach(tmp_path, monkeypatch, caplog):
    """A bad last update must not be frozen for ever: the task ends by return only if that is played again."""
    played = []

    def play(algorithm, network, jobs):
        played.append([job[0] for job in jobs])
        value = 0.0 if len(played) == 1 else 100.0  # the first look finds a policy that is lost, the next one does not
        return [ColumnEvaluation((value,) * count, (1,) * count, f"digest {column}") for column, _, count, _ in jobs]

    monkeypatch.setattr(callback, "_play", play)
    made = make_progressive(
        config(),
        tasks=[
            {"name": "plain", "env_config": {"variant": "plain"}, "until": {"episode_return_mean": 5}},
            {"name": "flipped", "env_config": {"variant": "flipped"}, "until": {"num_env_steps": 10**9}},
        ],
        column_store=tmp_path / "columns",
        column=[{"dense": 8}],
        evaluation_episodes=4,
    ).build_algo()
    try:
        before = train_until(made, lambda r: played)
        assert not before["progressive"]["task_over"]
        assert not ColumnStore(tmp_path / "columns").entries
        assert "goes on learning" in caplog.text
        # A new window of episodes has to fill up before the next look.
        after = train_until(made, lambda r: len(played) > 1)
        assert after["progressive"]["task_env_steps"] > before["progressive"]["task_env_steps"]
        assert after["progressive"]["task_over"]
        assert after["columns"]["plain"]["frozen_episode_return_mean"] == 100.0
        assert [e.task for e in ColumnStore(tmp_path / "columns").entries] == ["plain"]
    finally:
        made.stop()


def test_the_same_seed_gives_the_same_columns(tmp_path):
    fingerprints = []
    for name in ("a", "b"):
        made = progressive(tmp_path / name, steps=100).build_algo()
        try:
            train_until(made, lambda r: r.get("done"))
        finally:
            made.stop()
        fingerprints.append([e.fingerprint for e in ColumnStore(tmp_path / name / "columns").entries])
    assert fingerprints[0] == fingerprints[1]


def test_schedules_start_anew_with_every_task(tmp_path):
    base = config()
    base.training(lr=[[0, 1e-3], [200, 1e-5]], entropy_coeff=[[0, 0.1], [200, 0.0]])
    made = progressive(tmp_path, config=base, steps=240).build_algo()
    try:
        rates = []
        for _ in range(6):
            result = made.train()
            rates.append((result["progressive"]["task_index"], _learner(made)._optimizer_parameters and _rate(made)))
        before = [r for i, r in rates if i == 0]
        after = [r for i, r in rates if i == 1]
        assert before[-1] < before[0]
        assert after[0] > before[-1]
    finally:
        made.stop()


def _rate(made):
    return next(iter(_learner(made)._named_optimizers.values())).param_groups[0]["lr"]


def test_columns_from_another_run_stand_in_front(tmp_path):
    made = progressive(tmp_path / "source", count=1, steps=100).build_algo()
    try:
        train_until(made, lambda r: r.get("done"))
    finally:
        made.stop()
    source = ColumnStore(tmp_path / "source" / "columns").entries[0].fingerprint
    target = progressive(tmp_path / "target", count=1, steps=100, columns_from=tmp_path / "source").build_algo()
    try:
        assert learner_module(target).network.fingerprints() == [source, None]
        result = train_until(target, lambda r: r.get("done"))
        assert result["progressive"]["column"] == 1
    finally:
        target.stop()
    entries = ColumnStore(tmp_path / "target" / "columns").entries
    assert entries[0].fingerprint == source
    assert entries[1].num_sources == 1


def test_columns_from_another_run_must_have_such_layers(tmp_path):
    network = rllib_pnn.ProgressiveNetwork((4,), 2, "mlp")
    network.add_column()
    network.freeze()
    ColumnStore(tmp_path / "source").save_column(network, 0, task="plain")
    given = {"columns_from": tmp_path / "source", "column": [{"dense": 32}]}
    with pytest.raises(ValueError, match=r"^columns_from: .*can't take laterals from column 0.*give `column`"):
        progressive(tmp_path, **given)
    progressive(tmp_path, **given, lateral="none")


def test_a_users_callbacks_and_config_stay(tmp_path):
    class Mine(RLlibCallback):
        pass

    base = config()
    base.callbacks(Mine)
    made = progressive(tmp_path, config=base)
    # Behind the package's own, so that it sees what that adds to results.
    assert made.callbacks_class == [callback.ProgressiveCallback, Mine]
    assert base.callbacks_class is Mine or base.callbacks_class == [Mine]
    assert base.rl_module_spec.module_class is not made.rl_module_spec.module_class
    assert progressive(tmp_path, config=made).callbacks_class == made.callbacks_class  # once


def test_callbacks_with_arguments_stay(tmp_path):
    class Mine(RLlibCallback):
        pass

    given = functools.partial(Mine)
    made = progressive(tmp_path, config=config().callbacks(given))
    assert made.callbacks_class == [callback.ProgressiveCallback, given]


class Plain(gym.Env):
    """Takes its options and nothing else, ends after so many steps."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

    def __init__(self, steps):
        self.steps = steps

    def reset(self, *, seed=None, options=None):
        self.left = self.steps
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(2, np.float32), 1.0, self.left == 0, False, {}


def test_a_users_subclass_of_the_walk_stays(tmp_path):
    class Mine(callback.ProgressiveCallback):
        pass

    for given in (Mine, [callback.ProgressiveCallback, Mine], functools.partial(Mine)):
        made = progressive(tmp_path, config=config().callbacks(given))
        assert made.callbacks_class == [given[-1] if isinstance(given, list) else given]


def test_callbacks_that_replace_the_walk_are_refused(tmp_path):
    made = progressive(tmp_path).callbacks(RLlibCallback)
    with pytest.raises(ValueError, match=r"ProgressiveCallback is missing.*call it before make_progressive\(\)"):
        made.build_algo()


def test_the_configs_seed_draws_the_columns_whenever_it_is_set(tmp_path):
    fingerprints = {}
    for when, seed in (("before", 3), ("after", 3), ("after", 4)):
        given = config().debugging(seed=3 if when == "before" else tune.grid_search([1, 2]))
        made = progressive(tmp_path / f"{when}{seed}", config=given).debugging(seed=seed).build_algo()
        try:
            module = learner_module(made)
            assert module.network.seed == seed
            module.network.freeze()
            fingerprints[when, seed] = module.network.fingerprints()[0]
        finally:
            made.stop()
    assert fingerprints["before", 3] == fingerprints["after", 3] != fingerprints["after", 4]


@pytest.mark.parametrize(
    ("low", "high", "dtype", "expected"),
    [
        (0, 255, np.uint8, 1 / 255),
        (0, 255, np.float32, 1 / 255),
        (0, 1, np.float32, 1.0),
        (-np.inf, np.inf, np.float32, 1.0),
    ],
)
def test_images_that_are_scaled_already_are_not_scaled_again(low, high, dtype, expected):
    space = gym.spaces.Box(low, high, (2, 8, 8), dtype)
    module = ProgressiveRLModule(
        observation_space=space,
        action_space=gym.spaces.Discrete(2),
        model_config={"progressive": {"column": [{"conv": [4, 3, 1]}, {"dense": 4}]}},
    )
    assert module.network.input_scale == expected


def test_an_env_runners_module_can_be_saved_and_read_elsewhere(tmp_path):
    made = progressive(tmp_path, steps=100).build_algo()
    try:
        train_until(made, lambda r: r["progressive"]["task_over"])
        mine = made.get_module()
        mine.save_to_path(str(tmp_path / "module"))
        fingerprints = mine.network.fingerprints()
        made.save_to_path(str(tmp_path / "checkpoint"))
    finally:
        made.stop()
    code = (
        "import sys; from ray.rllib.core.rl_module.rl_module import RLModule\n"
        "module = RLModule.from_checkpoint(sys.argv[1])\n"
        "module.network.verify(); print(module.network.fingerprints())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "module")], capture_output=True, text=True)
    assert done.stdout.strip() == str(fingerprints), done.stderr


@pytest.mark.parametrize("count", [1, 2])
def test_a_finished_run_fills_an_empty_store_with_all_its_columns(tmp_path, count):
    made = progressive(tmp_path, steps=100, count=count).build_algo()
    try:
        train_until(made, lambda r: r.get("done"))
        checkpoint = made.save_to_path(str(tmp_path / "checkpoint"))
    finally:
        made.stop()
    entries = ColumnStore(tmp_path / "columns").entries
    (tmp_path / "columns").rename(tmp_path / "moved")
    restored = Algorithm.from_checkpoint(checkpoint)
    try:
        restored.train()
    finally:
        restored.stop()
    again = ColumnStore(tmp_path / "columns").entries
    assert [e.fingerprint for e in again] == [e.fingerprint for e in entries] and len(again) == count


def test_a_checkpoint_that_is_only_played_leaves_the_store_to_its_run(tmp_path, monkeypatch):
    made = progressive(tmp_path, steps=100).build_algo()
    try:
        made.train()
        checkpoint = made.save_to_path(str(tmp_path / "checkpoint"))
    finally:
        made.stop()
    claims = []
    monkeypatch.setattr(ColumnStore, "claim", lambda store: claims.append(store.path))
    restored = Algorithm.from_checkpoint(checkpoint)
    try:
        assert not claims
        restored.train()
        assert set(claims) == {tmp_path / "columns"}
    finally:
        restored.stop()


def test_another_runs_checkpoint_is_refused_before_it_trains(tmp_path):
    checkpoints = {}
    for name, seed in (("a", 1), ("b", 2)):
        made = progressive(tmp_path / name, config=config().debugging(seed=seed), steps=100).build_algo()
        try:
            train_until(made, lambda r: r["progressive"]["task_over"])
            checkpoints[name] = made.save_to_path(str(tmp_path / f"checkpoint_{name}"))
        finally:
            made.stop()
    made = progressive(tmp_path / "a", config=config().debugging(seed=1), steps=100).build_algo()
    try:
        with pytest.raises(ColumnStoreError, match=r"column 0 .* the checkpoint is another run's"):
            made.restore_from_path(checkpoints["b"])
            made.train()
    finally:
        made.stop()


def test_what_is_sampled_can_be_written(tmp_path):
    base = config().offline_data(output=str(tmp_path / "out"), output_write_episodes=False)
    made = progressive(tmp_path, config=base).build_algo()
    try:
        made.train()
    finally:
        made.stop()
    assert list((tmp_path / "out").rglob("*.parquet"))


def test_a_strangers_vector_env_is_played_in_the_mode_of_training():
    gym.register("rllib_pnn_test/Two-v0", entry_point=Plain, vector_entry_point=lambda **_: 1 / 0)
    network = rllib_pnn.ProgressiveNetwork((2,), 2, [{"dense": 4}])
    network.add_column()
    play = {"column": 0, "num_episodes": 2}
    assert evaluate_column(network, "rllib_pnn_test/Two-v0", {"steps": 3}, **play).returns == (3.0, 3.0)
    with pytest.raises(ZeroDivisionError):
        evaluate_column(network, "rllib_pnn_test/Two-v0", {"steps": 3}, vectorized=True, **play)


def test_an_environment_of_the_users_is_trained_and_played(tmp_path):
    tune.register_env("rllib_pnn_test_plain", lambda context: Plain(**context))
    base = small_config("PPO").environment("rllib_pnn_test_plain")
    base.env_runners(num_env_runners=0, num_envs_per_env_runner=2)
    tasks = [{"name": str(n), "env_config": {"steps": n}, "until": {"num_env_steps": 80}} for n in (3, 5)]
    made = make_progressive(base, tasks=tasks, column="mlp", column_store=tmp_path, evaluation_episodes=2).build_algo()
    try:
        result = train_until(made, lambda r: r.get("done"))
    finally:
        made.stop()
    assert [result["columns"][name]["episode_return_mean"] for name in "35"] == [3.0, 5.0]


@pytest.mark.parametrize("which", ["env_to_module_connector", "module_to_env_connector"])
def test_connectors_that_columns_are_not_played_through_are_refused(tmp_path, which):
    base = config().env_runners(**{which: lambda *_: []})
    with pytest.raises(ValueError, match=f"^config: {which}: .*wrapper"):
        progressive(tmp_path, config=base)
    progressive(tmp_path, config=base, evaluation_episodes=0)


def test_evaluation_repeats_itself_bit_for_bit():
    network = rllib_pnn.ProgressiveNetwork((4,), 2, [{"dense": 8}])
    network.add_column()
    play = {"column": 0, "num_episodes": 10, "seed": 5}
    env = ("rllib_pnn/CartPoleSoup-v0", {"variant": "plain"})
    first, second = (evaluate_column(network, *env, **play) for _ in range(2))
    assert first == second
    assert len(first.returns) == 10
    assert first.returns == tuple(float(n) for n in first.lengths)  # CartPole pays 1 a step
    other = evaluate_column(network, *env, **play | {"seed": 6})
    assert other.digest != first.digest
    with torch.no_grad():
        network.columns[0].policy.bias.add_(torch.tensor([0.0, 1e-6]))
    assert evaluate_column(network, *env, **play).digest != first.digest


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, "at least one task"),
        ({"lateral": "adaptor"}, "did you mean 'adapter'"),
        ({"architecture": "finetune"}, "expected one of progressive, scratch"),
        ({"lateral_scale": "loud"}, "lateral_scale: expected a finite number"),
        ({"evaluation_episodes": -1}, "evaluation_episodes"),
        ({"input_shift": "none"}, "input_shift"),
        ({"evaluation_seed": -1}, "evaluation_seed: expected a whole number from 0"),
        ({"column": "atary"}, "did you mean 'atari'"),
        ({"column": "atari"}, "use the preset 'mlp'"),
        ({"columns_from": "/nowhere"}, "no such folder"),
        ({"tasks": [{"name": "a", "env_config": {"variant": "flippd"}}]}, r"tasks\[0\] \('a'\).*flipped"),
        ({"tasks": [{"name": "a", "env_config": {"n": np.int64(3)}}]}, r"tasks\[0\] .*env_config: .*int64.*plain data"),
        ({"tasks": [{"name": "a", "env_config": {"n": float("nan")}}]}, r"tasks\[0\] .*env_config: .*plain data"),
    ],
)
def test_bad_settings_give_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        make_progressive(config(), **{"tasks": tasks(), "column": "mlp", **settings})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PPOConfig(), "no environment"),
        (lambda: DQNConfig().environment("CartPole-v1"), "expected PPO, APPO, IMPALA or A3C, got DQNConfig"),
        (
            lambda: (
                PPOConfig()
                .environment("CartPole-v1")
                .api_stack(enable_rl_module_and_learner=False, enable_env_runner_and_connector_v2=False)
            ),
            "old API stack",
        ),
        (
            lambda: (
                PPOConfig()
                .environment("CartPole-v1")
                .multi_agent(policies={"a", "b"}, policy_mapping_fn=lambda *_: "a")
            ),
            "multi-agent",
        ),
        (lambda: PPOConfig().environment("CartPol-v1"), "^env: .*; did you mean 'CartPole-v1'"),
    ],
)
def test_configs_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make_progressive(make(), tasks=[{"name": "a"}], column="mlp")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config().resources(num_gpus=1), r"^config\.num_gpus: would .*'num_gpus_per_learner'"),
        (lambda: config().training(model={"fcnet_hiddens": [64]}), r"^config\.model: fcnet_hiddens would"),
        (lambda: config().training(model={"max_seq_len": 5}), r"^config\.model: max_seq_len .* model_config's"),
        (lambda: config().rl_module(model_config={"layers": 2}), r"^config\.model_config: layers .*`column` of make"),
        (lambda: config().rl_module(model_config=DefaultModelConfig(use_lstm=True)), "model_config: use_lstm would"),
    ],
)
def test_settings_that_nothing_reads_are_told(make, message, caplog):
    make_progressive(make(), tasks=[{"name": "a"}], column="mlp", check_spaces=False)
    assert [record for record in caplog.records if re.search(message, record.getMessage())]


@pytest.mark.parametrize("algorithm", CONFIGS)
def test_settings_of_networks_that_are_the_usual_ones_are_taken(algorithm):
    given = config(algorithm).training(model=copy.deepcopy(MODEL_DEFAULTS))
    given.rl_module(model_config=DefaultModelConfig(max_seq_len=5))
    given.validate()
    assert make_progressive(given, tasks=tasks(), column="mlp").rl_module_spec.model_config["max_seq_len"] == 5


def test_games_of_ale_can_be_made_in_every_process():
    given = PPOConfig().environment("ALE/Pong-v5", env_config={"obs_type": "ram"})
    made = make_progressive(given, tasks=[{"name": "a", "until": {"num_env_steps": 1}}], column="mlp")
    assert made.env == "ale_py:ALE/Pong-v5"
    env = make_vector_env(made.env, {"obs_type": "ram"}, 2)
    assert env.observation_space.shape == (2, 128)  # as its single environments, not ale_py's own vector env
    env.close()


class Wider(gym.Env):
    """An environment whose observations depend on its config."""

    def __init__(self, config):
        self.observation_space = gym.spaces.Box(-1, 1, (config.get("width", 3),), np.float32)
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, True, False, {}


def test_tasks_must_share_their_spaces():
    both = [{"name": "a"}, {"name": "b", "env_config": {"width": 4}}]
    with pytest.raises(ValueError, match=r"tasks\[1\] \('b'\): its observation space"):
        make_progressive(PPOConfig().environment(Wider), tasks=both, column="mlp")
