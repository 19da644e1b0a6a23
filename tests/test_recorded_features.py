"""What EnvRunners write down of frozen columns and the Learner reads: the same numbers, computed once."""

import copy
import dataclasses
import os

import numpy as np
import pytest
import ray
import torch
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule

from rllib_pnn.network.column import Column
from rllib_pnn.training.array_connectors import AddFrozenFeatures, columns_of, frozen_features
from rllib_pnn.training.progressive import make_progressive
from rllib_pnn.training.recorded_features import RECORD, recorded_features
from rllib_pnn.training.shared_memory import RecordingReader, SharedMemory

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memory without a name (Linux)")

ENVS, STEPS = 4, 60


def make_config(config_class=PPOConfig, num_env_runners=0, tasks=3, **env_runners):
    config = config_class().environment("rllib_pnn/CartPoleSoup-v0")
    config.env_runners(num_env_runners=num_env_runners, num_envs_per_env_runner=ENVS, **env_runners)
    config.training(train_batch_size_per_learner=ENVS * STEPS)
    if config_class is PPOConfig:
        config.training(minibatch_size=ENVS * STEPS, num_epochs=1)
    config.reporting(min_time_s_per_iteration=0).debugging(seed=0, log_level="ERROR")
    until = {"num_env_steps": 1}
    tasks = [{"name": str(k), "until": until if k < tasks - 1 else {}} for k in range(tasks)]
    return make_progressive(config, tasks=tasks, column=[{"dense": 16}, {"dense": 16}], evaluation_episodes=0)


def make_runner(config, num_columns=3):
    runner = config.env_runner_cls(config=config, worker_index=0)
    for k in range(1, num_columns):
        runner.module.grow({**runner.module.progress, "task_index": k})
    return runner


def batch_of(episodes):
    columns, rows = columns_of(episodes)
    return {Columns.OBS: torch.from_numpy(columns[Columns.OBS])}, rows


def check(module, episodes, reader=None, least=0.9):
    """Reads the features and compares with computed ones; returns which rows were missing."""
    batch, rows = batch_of(episodes)
    found, missing = recorded_features(episodes, rows, module.frozen_fingerprint, reader or RecordingReader())
    expected = frozen_features(module, batch)
    assert found.keys() == expected.keys() and len(found) >= 2
    assert 1 - missing.mean() >= least
    for key, feature in found.items():
        assert feature.shape == expected[key].shape
        torch.testing.assert_close(feature[~missing], expected[key][~missing])
    return missing


@pytest.fixture(scope="module")
def runner():
    return make_runner(make_config())


def test_features_are_those_of_the_observations(runner):
    for _ in range(4):  # episodes end in it, begin in it and go through
        episodes = runner.sample(num_timesteps=ENVS * STEPS)
        missing = check(runner.module, episodes)
        # Nobody has acted on the observations that the rollout ends with; no other is missing.
        ends = np.cumsum([len(e) + 1 for e in episodes]) - 1
        assert set(np.flatnonzero(missing)) <= set(ends)
        assert missing.sum() <= ENVS
    assert any(e.is_done for e in episodes) and any(not e.is_done for e in episodes)


def test_features_are_of_the_newest_columns_after_growth():
    runner = make_runner(make_config(), num_columns=2)
    episodes = runner.sample(num_timesteps=ENVS * STEPS)
    check(runner.module, episodes)
    before = runner.module.frozen_fingerprint
    runner.module.grow({**runner.module.progress, "task_index": 2})
    assert runner.module.frozen_fingerprint != before
    _, rows = batch_of(episodes)
    found, missing = recorded_features(episodes, rows, runner.module.frozen_fingerprint, RecordingReader())
    assert not found and missing.all()
    check(runner.module, runner.sample(num_timesteps=ENVS * STEPS))


def test_slices_of_episodes_have_their_own_features(runner):
    episodes = runner.sample(num_timesteps=ENVS * STEPS)
    sliced = []
    for episode in episodes:
        for part in (episode[: len(episode) // 2], episode[len(episode) // 2 :]):
            part.custom_data[RECORD] = episode.custom_data[RECORD]  # Ray 2.60 leaves it behind
            sliced += [part] if len(part) > 0 else []
    assert len(sliced) > len(episodes)
    check(runner.module, sliced)
    # One of which the note is a later part's, as after a concatenation.
    longer = copy.deepcopy(episodes[0])
    record = longer.custom_data[RECORD]
    longer.custom_data[RECORD] = dataclasses.replace(record, t_started=record.t_started + 5)
    _, rows = batch_of([longer])
    assert not recorded_features([longer], rows, runner.module.frozen_fingerprint, RecordingReader())[0]


def test_what_the_next_rollout_has_overwritten_is_not_used(runner, monkeypatch):
    episodes, reader = runner.sample(num_timesteps=ENVS * STEPS), RecordingReader()
    fingerprint = runner.module.frozen_fingerprint
    _, rows = batch_of(episodes)
    assert recorded_features(episodes, rows, fingerprint, reader)[0]
    is_current = reader.is_current
    looks = iter([True] * len(episodes) + [False] * len(episodes))  # overwritten while it was read
    monkeypatch.setattr(reader, "is_current", lambda recording: next(looks) and is_current(recording))
    assert not recorded_features(episodes, rows, fingerprint, reader)[0]
    monkeypatch.undo()
    newer = runner.sample(num_timesteps=ENVS * STEPS)
    assert not recorded_features(episodes, rows, fingerprint, reader)[0]
    check(runner.module, newer, reader)
    # Both in one batch, as with a fragment shorter than the train batch.
    both = episodes + newer
    missing = check(runner.module, both, reader, least=0.4)
    assert missing[: len(missing) // 3].all()


def test_a_rollout_of_the_parents_loop_makes_no_use_of_an_older_one(runner, monkeypatch):
    older = runner.sample(num_timesteps=ENVS * STEPS)[0].custom_data[RECORD]
    monkeypatch.setattr(runner, "_reason_for_single_steps", lambda: "a test says so")
    episodes = runner.sample(num_timesteps=ENVS * STEPS)
    for episode in episodes:
        episode.custom_data[RECORD] = dataclasses.replace(older, t_started=episode.t_started)
    _, rows = batch_of(episodes)
    assert not recorded_features(episodes, rows, runner.module.frozen_fingerprint, RecordingReader())[0]


def test_memory_out_of_reach_is_computed(runner, monkeypatch):
    episodes = runner.sample(num_timesteps=ENVS * STEPS)
    monkeypatch.setattr(SharedMemory, "open", lambda address: None)
    _, rows = batch_of(episodes)
    assert not recorded_features(episodes, rows, runner.module.frozen_fingerprint, RecordingReader())[0]
    monkeypatch.setattr(SharedMemory, "make", lambda length: None)
    other = make_runner(make_config())
    assert not any(RECORD in e.custom_data for e in other.sample(num_timesteps=ENVS * STEPS))


def test_nothing_is_recorded_where_nobody_reads_it(runner):
    assert not any(RECORD in e.custom_data for e in runner.sample(num_timesteps=STEPS, explore=False))
    first = make_runner(make_config(), num_columns=1)
    assert not any(RECORD in e.custom_data for e in first.sample(num_timesteps=STEPS))
    # Asynchronous: the next rollout is on its way before this one is learned from.
    other = make_runner(make_config(APPOConfig))
    assert not any(RECORD in e.custom_data for e in other.sample(num_timesteps=STEPS))
    config = make_config().copy(copy_frozen=False)
    config.in_evaluation = True
    assert not any(RECORD in e.custom_data for e in make_runner(config).sample(num_timesteps=STEPS))


def test_the_connector_computes_what_is_missing_alone(runner, monkeypatch):
    episodes = runner.sample(num_timesteps=ENVS * STEPS)
    batch, rows = batch_of(episodes)
    expected = frozen_features(runner.module, batch)
    computed = []
    forward = Column.forward

    def count(column, obs, *args, **kwargs):
        computed.append(len(obs))
        return forward(column, obs, *args, **kwargs)

    monkeypatch.setattr(Column, "forward", count)
    connector = AddFrozenFeatures()
    module = MultiRLModule(rl_module_specs={})
    module.add_module(DEFAULT_MODULE_ID, runner.module)
    out = connector(
        rl_module=module, batch={DEFAULT_MODULE_ID: batch}, episodes=episodes, shared_data={"rows_of_episodes": rows}
    )[DEFAULT_MODULE_ID]
    assert sum(computed) <= 2 * ENVS  # two frozen columns
    for key, feature in expected.items():
        torch.testing.assert_close(out[key], feature)


def test_env_runner_actors_and_the_learner_share_it():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    algo = make_config(num_env_runners=1, tasks=2).build_algo()
    try:
        algo.train()  # ends the first task
        learner = algo.learner_group._learner
        frozen = learner.progressive_module.network.columns[0]
        rows = []
        frozen.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
        result = algo.train()
        steps = result["learners"][DEFAULT_MODULE_ID]["num_module_steps_trained"]
        assert steps >= ENVS * STEPS and 0 < sum(rows) <= ENVS
    finally:
        algo.stop()
        ray.shutdown()
