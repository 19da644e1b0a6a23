"""The array pipeline against RLlib's own: the same episodes give the same batches and the same updates."""

import copy
import pickle

import numpy as np
import pytest
import torch
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.utils import AggregatorActor
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.minibatch_utils import MiniBatchCyclicIterator
from ray.rllib.utils.postprocessing.value_predictions import compute_value_targets
from scripted_env import LinearModule, config_for

from rllib_pnn.training import array_connectors
from rllib_pnn.training.array_connectors import (
    AddFrozenFeatures,
    ArrayGeneralAdvantageEstimation,
    ArrayLearnerMixin,
    BatchEpisodes,
    _TensorBatch,
    frozen_features,
    generalized_advantages,
    spare_threads,
    use_array_pipeline,
)
from rllib_pnn.training.env_runner import ArrayEnvRunner


class FeaturesModule(LinearModule):
    """Has frozen columns, as far as a pipeline can tell, and refuses to evaluate them twice for one observation."""

    evaluated = 0

    def frozen_features(self, batch):
        assert not torch.is_grad_enabled()
        FeaturesModule.evaluated += len(batch[Columns.OBS])
        return {"sources/a": self._flat(batch) * 3, "sources/b": self._flat(batch).sum(-1)}

    def compute_values(self, batch, embeddings=None):
        torch.testing.assert_close(batch["sources/a"], self._flat(batch) * 3)
        return super().compute_values(batch) + batch["sources/b"]

    def _forward_train(self, batch, **kwargs):
        torch.testing.assert_close(batch["sources/a"], self._flat(batch) * 3)
        return super()._forward_train(batch, **kwargs)


class LaidOutModule(LinearModule):
    """Trains on another memory layout than it evaluates on without gradients."""

    phases: list[str] = []

    def training_layout(self, obs):
        return obs.contiguous(memory_format=torch.channels_last)

    def frozen_features(self, batch):
        return self._note("features", batch, trains=False)

    def compute_values(self, batch, embeddings=None):
        self._note("values", batch, trains=torch.is_grad_enabled())
        return super().compute_values(batch)

    def _forward_train(self, batch, **kwargs):
        self._note("train", batch, trains=True)
        return super()._forward_train(batch, **kwargs)

    def _note(self, phase, batch, *, trains):
        layout = torch.channels_last if trains else torch.contiguous_format
        assert batch[Columns.OBS].is_contiguous(memory_format=layout), phase
        LaidOutModule.phases.append(phase)
        return {}


class RewardsOfOne(ConnectorV2):
    """What a user's connector may do: change episodes, and add a column."""

    def __call__(self, *, episodes, batch, **kwargs):
        for episode in episodes:
            episode.rewards.data[:] = 1.0
            self.add_n_batch_items(batch, "ones", np.ones(len(episode)), len(episode), episode)
        return batch


def sample_episodes(config, num_samples=3):
    runner = ArrayEnvRunner(config=config.copy(copy_frozen=False), worker_index=None)
    samples = [runner.sample(num_timesteps=20) for _ in range(num_samples)]
    runner.stop()
    episodes = [e for s in samples for e in s]
    assert {(bool(e.is_terminated), bool(e.is_truncated)) for e in episodes} >= {(0, 0), (1, 0), (0, 1)}
    assert any(e.t_started for e in episodes)
    return episodes


def learner_of(config):
    runner = ArrayEnvRunner(config=config.copy(copy_frozen=False), worker_index=None)
    spec = config.get_multi_rl_module_spec(spaces=runner.get_spaces(), inference_only=False)
    runner.stop()
    torch.manual_seed(5)
    learner = config.learner_class(config=config, module_spec=spec)
    learner.build()
    return learner


def batch_of(learner, episodes):
    return learner._make_batch_if_necessary(TrainingData(episodes=copy.deepcopy(episodes)))


def assert_same_batch(a, b):
    a_columns, b_columns = dict(a[DEFAULT_MODULE_ID]), dict(b[DEFAULT_MODULE_ID])
    assert list(a_columns) == list(b_columns)
    computed = (Postprocessing.ADVANTAGES, Postprocessing.VALUE_TARGETS)
    for key, column in a_columns.items():
        exact = {} if key in computed else {"rtol": 0, "atol": 0}
        for x, y in zip(*(_leaves(c) for c in (column, b_columns[key])), strict=True):
            assert x.dtype == y.dtype and x.device == y.device, key
            torch.testing.assert_close(y, x, **exact, msg=lambda m, key=key: f"{key}: {m}")
    assert a.count == b.count and len(a[DEFAULT_MODULE_ID]) == len(b[DEFAULT_MODULE_ID])
    assert a[DEFAULT_MODULE_ID].zero_padded == b[DEFAULT_MODULE_ID].zero_padded


def _leaves(column):
    return list(column.values()) if isinstance(column, dict) else [column]


def both(config):
    return learner_of(config.copy(copy_frozen=False)), learner_of(use_array_pipeline(config.copy(copy_frozen=False)))


@pytest.mark.parametrize("config_class", [PPOConfig, IMPALAConfig, APPOConfig])
@pytest.mark.parametrize("env", [{"observation": "image"}, {"observation": "dict", "action": "multi_discrete"}])
def test_same_batch(config_class, env):
    if config_class is APPOConfig:
        env = env | {"observation": "vector"}
    config = config_for(env, config_class=config_class)
    if config_class is APPOConfig:
        config.rl_module(model_config={"fcnet_hiddens": [8]})
        config._rl_module_spec = None
    stock, array = both(config)
    episodes = sample_episodes(config)
    assert not isinstance(stock, ArrayLearnerMixin) and isinstance(array, ArrayLearnerMixin)
    assert_same_batch(batch_of(stock, episodes), batch_of(array, episodes))
    for learner in (stock, array):
        learner.shutdown()


def test_observations_stay_bytes():
    config = config_for({"observation": "image"})
    batch = batch_of(learner_of(use_array_pipeline(config)), sample_episodes(config))
    assert batch[DEFAULT_MODULE_ID][Columns.OBS].dtype == torch.uint8


@pytest.mark.parametrize("config_class", [PPOConfig, IMPALAConfig])
def test_same_batch_with_states(config_class):
    config = config_for(stateful=True, config_class=config_class)
    stock, array = both(config)
    episodes = sample_episodes(config)
    batches = [batch_of(learner, episodes) for learner in (stock, array)]
    assert_same_batch(*batches)
    assert batches[1][DEFAULT_MODULE_ID][Columns.OBS].shape[1] == 4
    for learner in (stock, array):
        learner.shutdown()


@pytest.mark.parametrize("lookback", [0, 3])
def test_same_batch_of_read_only_episodes_that_look_back(lookback):
    """Ray hands out arrays that can't be written."""
    config = config_for(episode_lookback_horizon=lookback)
    stock, array = both(config)
    episodes = sample_episodes(config)
    expected = batch_of(stock, episodes)
    for episode in episodes:
        for buffer in (episode.observations, episode.actions, episode.rewards, *episode.extra_model_outputs.values()):
            buffer.data.flags.writeable = False
    before = pickle.dumps(episodes)
    batch = array._make_batch_if_necessary(TrainingData(episodes=episodes))
    assert_same_batch(expected, batch)
    assert pickle.dumps(episodes) == before, "episodes stay as they were"


def test_same_batch_of_episodes_of_single_steps():
    config = config_for(episodes_to_numpy=False)
    stock, array = both(config)
    episodes = sample_episodes(config)
    assert not episodes[0].is_numpy
    assert_same_batch(batch_of(stock, episodes), batch_of(array, episodes))


def test_connectors_of_ones_own_keep_working():
    config = config_for().learners(learner_connector=lambda *_: RewardsOfOne())
    stock, array = both(config)
    episodes = sample_episodes(config)
    batches = [batch_of(learner, episodes) for learner in (stock, array)]
    assert_same_batch(*batches)
    assert "ones" in batches[1][DEFAULT_MODULE_ID]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_epochs": 3, "minibatch_size": 16, "shuffle_batch_per_epoch": True},
        {"num_epochs": 2, "minibatch_size": None},
        {"num_epochs": 1, "minibatch_size": None},
    ],
)
def test_same_update(settings):
    config = config_for({"observation": "image"})
    episodes = sample_episodes(config)
    weights, steps = [], []
    for learner in both(config):
        np.random.seed(7)
        results = learner.update(episodes=copy.deepcopy(episodes), timesteps={}, **settings)
        weights.append(learner.module[DEFAULT_MODULE_ID].state_dict())
        steps.append(results["__all_modules__"]["num_env_steps_trained"].peek())
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-6)
    assert steps[0] == steps[1] > 0


def test_aggregator_actor_gives_the_same_arrays():
    config = config_for(config_class=IMPALAConfig).learners(num_aggregator_actors_per_learner=1)
    episodes = sample_episodes(config)
    runner = ArrayEnvRunner(config=config.copy(copy_frozen=False), worker_index=None)
    spec = config.get_multi_rl_module_spec(spaces=runner.get_spaces(), inference_only=False)
    runner.stop()
    batches = []
    for c in (config, use_array_pipeline(config.copy(copy_frozen=False))):
        actor = AggregatorActor(c, spec)
        batches.append(
            actor._learner_connector(episodes=copy.deepcopy(episodes), rl_module=actor._module, metrics=actor.metrics)
        )
    stock, array = (b[DEFAULT_MODULE_ID] for b in batches)
    assert list(stock) == list(array)
    for key in stock:
        assert isinstance(array[key], np.ndarray) and stock[key].dtype == array[key].dtype, key
        np.testing.assert_array_equal(stock[key], array[key], err_msg=key)


@pytest.mark.parametrize(("gamma", "lambda_"), [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0)])
def test_advantages_equal_the_step_by_step_recursion(gamma, lambda_):
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = rng.integers(2, 9, rng.integers(1, 6))
        size = rows.sum()
        values, rewards = rng.normal(size=(2, size)).astype(np.float32)
        terminateds, truncateds = np.zeros((2, size), bool)
        last = np.cumsum(rows) - 2
        terminateds[last] = rng.random(len(rows)) < 0.5
        truncateds[last] = ~terminateds[last]
        expected = compute_value_targets(values, rewards, terminateds, truncateds, gamma, lambda_)
        targets, advantages = generalized_advantages(values, rewards, terminateds, rows, gamma=gamma, lambda_=lambda_)
        np.testing.assert_array_equal(targets, expected)
        np.testing.assert_array_equal(advantages, expected - values)


def test_advantages_by_hand():
    # One episode of two steps that ended, one of one step that was cut; gamma 0.5, lambda 1.
    targets, _ = generalized_advantages(
        values=np.array([1.0, 2.0, 9.0, 4.0, 8.0], np.float32),
        rewards=np.array([1.0, 3.0, 0.0, 1.0, 0.0], np.float32),
        terminateds=np.array([False, True, False, False, False]),
        rows=np.array([3, 2]),
        gamma=0.5,
        lambda_=1.0,
    )
    np.testing.assert_allclose(targets[[0, 1, 3]], [1 + 0.5 * 3, 3, 1 + 0.5 * 8])


def features_config(config_class=PPOConfig):
    return config_for(config_class=config_class).rl_module(
        rl_module_spec=RLModuleSpec(module_class=FeaturesModule, model_config={})
    )


def test_frozen_features_once_per_observation(monkeypatch):
    monkeypatch.setattr(array_connectors, "ROWS_PER_CHUNK", 7)
    config = use_array_pipeline(features_config())
    learner = learner_of(config)
    episodes = sample_episodes(config)
    FeaturesModule.evaluated = 0
    learner.update(episodes=episodes, timesteps={}, num_epochs=3, minibatch_size=16, shuffle_batch_per_epoch=True)
    assert FeaturesModule.evaluated == sum(len(e) + 1 for e in episodes)


def test_minibatches_have_the_rows_that_rllib_draws():
    columns = {
        "a": torch.arange(40.0),
        "maps": torch.arange(40.0 * 2 * 3 * 3).reshape(40, 2, 3, 3).contiguous(memory_format=torch.channels_last),
        "nested": {"b": torch.arange(80).reshape(40, 2)},
    }
    minibatches = []
    for made in (SampleBatch(columns), _TensorBatch(columns)):
        np.random.seed(3)
        iterator = MiniBatchCyclicIterator(
            MultiAgentBatch({DEFAULT_MODULE_ID: made}, 40), num_epochs=3, minibatch_size=16
        )
        minibatches.append([batch[DEFAULT_MODULE_ID] for batch in iterator])
    stock, own = minibatches
    assert len(stock) == len(own) == 8
    for a, b in zip(stock, own, strict=True):
        assert torch.equal(a["a"], b["a"]) and torch.equal(a["nested"]["b"], b["nested"]["b"])
        assert torch.equal(a["maps"], b["maps"]) and b["maps"].is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(own[-1]["a"].sort().values, own[-1]["a"])


def test_observations_are_laid_out_for_training_alone():
    spec = RLModuleSpec(module_class=LaidOutModule, model_config={})
    config = use_array_pipeline(config_for({"observation": "image"}).rl_module(rl_module_spec=spec))
    LaidOutModule.phases = []
    learner_of(config).update(
        episodes=sample_episodes(config), timesteps={}, num_epochs=2, minibatch_size=16, shuffle_batch_per_epoch=True
    )
    assert LaidOutModule.phases[:2] == ["features", "values"] and "train" in LaidOutModule.phases


def test_frozen_features_of_batches_from_aggregator_actors():
    config = features_config(IMPALAConfig).learners(num_aggregator_actors_per_learner=1).training(num_epochs=2)
    use_array_pipeline(config)
    learner = learner_of(config)
    actor = AggregatorActor(config, learner._module_spec)
    episodes = sample_episodes(config)
    batch = actor._learner_connector(episodes=episodes, rl_module=actor._module)
    assert not any(key.startswith("sources/") for key in batch[DEFAULT_MODULE_ID])
    batch = array_connectors.MultiAgentBatch(
        {k: array_connectors.SampleBatch(v) for k, v in batch.items()}, sum(map(len, episodes))
    )
    result = learner._make_batch_if_necessary(TrainingData(batch=batch))
    assert isinstance(result[DEFAULT_MODULE_ID]["sources/b"], torch.Tensor)
    assert result.count == sum(map(len, episodes))
    learner.shutdown()


def test_nothing_frozen_adds_nothing():
    config = use_array_pipeline(config_for())
    learner = learner_of(config)
    batch = batch_of(learner, sample_episodes(config))
    before = list(batch[DEFAULT_MODULE_ID])
    AddFrozenFeatures()(rl_module=learner.module, batch=batch.policy_batches, episodes=[])
    assert list(batch[DEFAULT_MODULE_ID]) == before
    assert frozen_features(learner.module[DEFAULT_MODULE_ID], batch[DEFAULT_MODULE_ID]) == {}


def test_threads_of_a_learner_that_shares_the_machine(monkeypatch):
    monkeypatch.setattr(array_connectors.os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def threads(config, num_env_runners, **learners):
        return spare_threads(config.env_runners(num_env_runners=num_env_runners).learners(**learners))

    assert [threads(IMPALAConfig(), n, num_learners=0) for n in (0, 3, 8, 20)] == [8, 5, 1, 1]
    assert threads(IMPALAConfig(), 3, num_learners=1) is None
    assert threads(PPOConfig(), 3) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert threads(IMPALAConfig(), 3, num_learners=0) is None


def test_settings_are_read_when_the_learner_is_built():
    config = use_array_pipeline(config_for()).training(gamma=0.5, lambda_=0.1)
    pieces = learner_of(config)._learner_connector.connectors
    (gae,) = [p for p in pieces if isinstance(p, ArrayGeneralAdvantageEstimation)]
    assert (gae.gamma, gae.lambda_) == (0.5, 0.1)


def test_calling_it_twice_changes_nothing_and_configs_survive_pickling():
    config = use_array_pipeline(config_for())
    connector, learner_class = config._learner_connector, config.learner_class
    use_array_pipeline(config)
    assert (connector, learner_class) == (config._learner_connector, config.learner_class)
    assert pickle.loads(pickle.dumps(connector))() is not None
    pieces = config.build_learner_connector(None, None).connectors
    assert [type(p) for p in pieces] == [BatchEpisodes]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: DQNConfig(), "expected PPO, APPO or IMPALA, got DQNConfig"),
        (lambda: PPOConfig().multi_agent(policies={"a", "b"}, policy_mapping_fn=lambda *_: "a"), "single agent"),
        (lambda: PPOConfig().learners(add_default_connectors_to_learner_pipeline=False), "nothing to replace"),
    ],
)
def test_configs_that_it_can_not_serve(config, words):
    with pytest.raises(ValueError, match=words) as error:
        use_array_pipeline(config())
    assert "\n" not in str(error.value)
