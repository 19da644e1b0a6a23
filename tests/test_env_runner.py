"""`ArrayEnvRunner` side by side with RLlib's `SingleAgentEnvRunner`: same seed, same weights, same
everything.
"""

import logging
import pickle

import numpy as np
import pytest
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer
from scripted_env import ACTIONS, OBSERVATIONS, LinearModule, config_for

import rllib_pnn.envs.registry  # noqa: F401  (makes the ids known)
from rllib_pnn.training import env_runner as env_runner_module
from rllib_pnn.training.env_runner import ArrayEnvRunner


class RecordingCallback(RLlibCallback):
    """Notes every call, and marks and changes episodes as users' callbacks do."""

    calls: list

    def __init__(self):
        super().__init__()
        self.calls = []

    def on_environment_created(self, *, env, **kwargs):
        self.calls.append(("environment", type(env).__name__))

    def on_episode_created(self, *, episode, env_index, **kwargs):
        episode.custom_data["task"] = env_index
        self.calls.append(("created", env_index, len(episode), episode.is_reset))

    def on_episode_start(self, *, episode, env_index, metrics_logger, **kwargs):
        self.calls.append(("start", env_index, np.asarray(episode.get_observations(-1)).sum(), episode.get_infos(-1)))
        metrics_logger.log_value("starts", 1, reduce="sum")

    def on_episode_end(self, *, episode, env_index, prev_episode_chunks, **kwargs):
        assert not episode.is_numpy
        rewards = episode.get_rewards()
        self.calls.append(("end", env_index, list(rewards), len(prev_episode_chunks), episode.custom_data))
        self.calls.append([np.asarray(c.get_observations()).sum() for c in prev_episode_chunks])
        episode.set_rewards(new_data=rewards[-1] + 100.0, at_indices=-1)

    def on_sample_end(self, *, samples, **kwargs):
        self.calls.append(("sample", [len(e) for e in samples]))


class StepCallback(RLlibCallback):
    def on_episode_step(self, *, episode, **kwargs):
        episode.custom_data["last_action"] = episode.get_actions(-1)


def record(cls, config, calls):
    """Builds a runner and makes the calls, each a dict of arguments for `sample()` or a function of the
    runner.
    """
    torch.manual_seed(0)
    runner = cls(config=config.copy(copy_frozen=False), worker_index=None)
    samples, metrics = [], []
    for call in calls:
        if callable(call):
            call(runner)
            continue
        samples.append(runner.sample(**call))
        metrics.append(runner.get_metrics())
    runner.stop()
    return runner, samples, metrics


def assert_same_data(a, b, where):
    if all(isinstance(x, int | np.generic | np.ndarray) and np.ndim(x) == 0 for x in (a, b)):
        a, b = np.asarray(a), np.asarray(b)  # 3, np.int64(3) and np.array(3) are the same once stacked
    assert type(a) is type(b), (where, type(a), type(b))
    if isinstance(a, dict):
        assert list(a) == list(b), (where, list(a), list(b))
        for key in a:
            assert_same_data(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), (where, len(a), len(b))
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_data(x, y, f"{where}[{i}]")
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and a.shape == b.shape, (where, a.dtype, b.dtype, a.shape, b.shape)
        np.testing.assert_array_equal(a, b, err_msg=where)
    else:
        assert a == b or (a != a and b != b), (where, a, b)


def assert_same_episode(a, b, ids, where):
    assert ids.setdefault(a.id_, b.id_) == b.id_, f"{where}: chunks are linked differently"
    names = ["observations", "actions", "rewards", "infos", *a.extra_model_outputs]
    assert set(a.extra_model_outputs) == set(b.extra_model_outputs), where
    for name in names:
        x, y = (e.extra_model_outputs.get(name, getattr(e, name, None)) for e in (a, b))
        assert isinstance(y, InfiniteLookbackBuffer)
        assert (x.lookback, x.finalized, x.space) == (y.lookback, y.finalized, y.space), f"{where}: {name}"
        assert_same_data(x.data, y.data, f"{where}: {name}")
    for name in (
        "t",
        "t_started",
        "is_terminated",
        "is_truncated",
        "custom_data",
        "is_numpy",
        "agent_id",
        "module_id",
    ):
        assert_same_data(getattr(a, name), getattr(b, name), f"{where}: {name}")
    assert_same_data(a._last_added_observation, b._last_added_observation, f"{where}: last observation")
    assert_same_data(a._last_added_infos, b._last_added_infos, f"{where}: last infos")
    for name in ("_start_time", "_last_step_time"):
        assert (getattr(a, name) is None) == (getattr(b, name) is None), f"{where}: {name}"
    assert b.get_duration_s() >= 0.0
    b.validate()


def metric_keys(metrics, prefix=()):
    if not isinstance(metrics, dict):
        return {prefix}
    return {k for key, value in metrics.items() for k in metric_keys(value, (*prefix, key))}


def assert_same(config, calls, *, expect_arrays=True):
    single, single_samples, single_metrics = record(SingleAgentEnvRunner, config, calls)
    array, array_samples, array_metrics = record(ArrayEnvRunner, config, calls)
    assert (array._logged_fallback is None) == expect_arrays, array._logged_fallback

    ids: dict = {}
    for i, (a, b) in enumerate(zip(single_samples, array_samples, strict=True)):
        assert len(a) == len(b), f"sample {i}"
        for j, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_episode(x, y, ids, f"sample {i}, episode {j}")
    assert len(set(ids.values())) == len(ids)
    for i, (x, y) in enumerate(zip(single._ongoing_episodes, array._ongoing_episodes, strict=True)):
        assert_same_episode(x, y, ids, f"ongoing episode {i}")

    for i, (a, b) in enumerate(zip(single_metrics, array_metrics, strict=True)):
        assert metric_keys(a) == metric_keys(b), f"sample {i}"
        for key, stats in a.items():
            if (
                key.startswith(("episode_", "num_", "agent_ep", "module_ep", "weights", "starts"))
                and "duration" not in key
            ):
                assert_same_data(*(_peek(s[key]) for s in (a, b)), f"metrics {i}: {key}")
                assert stats is not None
    for x, y in zip(single._callbacks, array._callbacks, strict=True):
        if isinstance(x, RecordingCallback):
            assert_same_data(x.calls, y.calls, "callbacks")
    # The random streams have not drifted apart either.
    assert single.num_env_steps_sampled_lifetime == array.num_env_steps_sampled_lifetime
    return single_samples, array_samples, array


def _peek(stats):
    if isinstance(stats, dict):
        return {k: _peek(v) for k, v in stats.items()}
    return stats.peek() if hasattr(stats, "peek") else stats


TWICE = [{}, {}, {}, {}]


@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize("autoreset", ["next_step", "same_step"])
def test_episodes_of_every_kind_of_observation(observation, autoreset):
    _, samples, _ = assert_same(config_for({"observation": observation, "autoreset": autoreset}), TWICE)
    ends = [e.is_terminated + 2 * e.is_truncated for s in samples for e in s]
    assert set(ends) == {0, 1, 2}, "the script has to end episodes in every way"
    assert any(e.t_started > 0 for s in samples for e in s)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("explore", [True, False])
def test_actions(action, explore):
    assert_same(config_for({"action": action}, explore=explore), TWICE)


@pytest.mark.parametrize(("normalize", "clip"), [(True, False), (False, True)])
def test_box_actions_reach_the_environment_within_its_bounds(normalize, clip):
    config = config_for({"action": "box"})
    config.normalize_actions, config.clip_actions = normalize, clip
    samples, _, _ = assert_same(config, TWICE)
    raw = np.concatenate([e.get_actions() for s in samples for e in s])
    assert not all(ACTIONS["box"].contains(a) for a in raw), "episodes keep the module's own actions"


@pytest.mark.parametrize("autoreset", ["next_step", "same_step"])
@pytest.mark.parametrize("explore", [True, False])
def test_recurrent_modules(autoreset, explore):
    config = config_for({"autoreset": autoreset}, stateful=True, explore=explore)
    _, samples, _ = assert_same(config, TWICE)
    assert any(e.get_extra_model_outputs(Columns.STATE_OUT)["c"][-1, 0] > 1 for s in samples for e in s if len(e))


def test_stock_recurrent_module():
    config = config_for()
    config._rl_module_spec = None
    config.rl_module(model_config=DefaultModelConfig(use_lstm=True, lstm_cell_size=8, max_seq_len=5, fcnet_hiddens=[8]))
    assert_same(config, TWICE)


@pytest.mark.parametrize(
    "calls",
    [
        [{"num_timesteps": 1}, {"num_timesteps": 5}, {"num_timesteps": 100}, {}],
        [{"num_episodes": 1}, {"num_episodes": 8}, {}, {"num_episodes": 3}],
        [{}, {"force_reset": True}, {}, {"num_timesteps": 9, "force_reset": True}],
        [{"random_actions": True, "force_reset": True}, {"force_reset": True}, {}],
        [{}, {"explore": False, "force_reset": True}, {"explore": True, "force_reset": True}],
        [{}, {"num_timesteps": 0}, {}],
        [{"num_episodes": 0}, {}],
    ],
    ids=["timesteps", "episodes", "force_reset", "random_actions", "explore", "no_timesteps", "no_episodes"],
)
@pytest.mark.parametrize("stateful", [False, True])
def test_arguments_of_sample(calls, stateful):
    assert_same(config_for(stateful=stateful), calls)


def test_exploration_may_end_within_an_episode():
    """RLlib's log-probabilities are floats while exploring and integers (zeros) after."""
    assert_same(config_for(), [{}, {"explore": False}, {"explore": True}])


@pytest.mark.parametrize("lookback", [0, 1, 4])
def test_lookback(lookback):
    config = config_for(stateful=lookback > 0, episode_lookback_horizon=lookback)
    _, samples, _ = assert_same(config, [{"num_timesteps": n} for n in (3, 6, 30, 3, 3, 9)])
    assert max(e.rewards.lookback for s in samples for e in s) == lookback


def test_complete_episodes():
    config = config_for(batch_mode="complete_episodes")
    _, samples, _ = assert_same(config, TWICE)
    assert all(e.is_done for s in samples for e in s)


def test_episodes_longer_than_a_block(monkeypatch):
    monkeypatch.setattr(env_runner_module, "_EPISODE_STEPS_PER_BLOCK", 3)
    assert_same(config_for({"observation": "dict"}), [{"num_episodes": 9}, {"num_timesteps": 20}])
    # Nearly every second step only resets: more rows than the runner reckons with.
    assert_same(config_for({"longest": 1}, num_envs=1), [{"num_timesteps": 40}, {}])


def test_callbacks_and_metrics():
    config = config_for().callbacks(RecordingCallback)
    _, samples, runner = assert_same(config, [{"num_timesteps": 6}] * 6)
    assert {c[0] for c in runner._callbacks[0].calls if isinstance(c, tuple)} == {
        "environment",
        "created",
        "start",
        "end",
        "sample",
    }
    assert any(len(c) > 1 for c in runner._callbacks[0].calls if isinstance(c, list))
    assert any(e.rewards.data[-1] > 100 for s in samples for e in s), "the callback's change has to arrive"


def test_callback_functions():
    ends = []
    config = config_for().callbacks(on_episode_end=lambda *, episode, **kwargs: ends.append(len(episode)))
    assert_same(config, TWICE)
    assert ends and ends[: len(ends) // 2] == ends[len(ends) // 2 :]


class ReturnsCallback(RLlibCallback):
    needs_whole_chunks = False
    returns: list = []

    def on_episode_end(self, *, episode, prev_episode_chunks, **kwargs):
        self.returns.append(sum(c.get_return() + len(c) for c in (*prev_episode_chunks, episode)))


@pytest.mark.parametrize("callback", [None, ReturnsCallback])
def test_runner_forgets_observations_of_earlier_chunks_that_nobody_asks_for(callback):
    config = config_for({"longest": 1000})
    if callback:
        config.callbacks(callback)
    runner, _, _ = record(ArrayEnvRunner, config, TWICE)
    assert runner._ongoing_episodes_for_metrics
    for chunks in runner._ongoing_episodes_for_metrics.values():
        assert chunks and not any(hasattr(c, "observations") for c in chunks)


def test_callback_that_needs_no_observations_of_earlier_chunks():
    ReturnsCallback.returns = []
    assert_same(config_for().callbacks(ReturnsCallback), TWICE)
    returns = ReturnsCallback.returns
    assert returns and returns[: len(returns) // 2] == returns[len(returns) // 2 :]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.callbacks(StepCallback), "on_episode_step"),
        (lambda c: c.env_runners(env_to_module_connector=lambda *_: MeanStdFilter()), "env-to-module"),
        (lambda c: c.env_runners(episodes_to_numpy=False), "episodes_to_numpy"),
    ],
)
def test_falls_back_to_single_steps_and_says_why_once(change, reason, caplog):
    config = change(config_for())
    with caplog.at_level(logging.INFO, logger=env_runner_module.__name__):
        assert_same(config, TWICE, expect_arrays=False)
    messages = [r.getMessage() for r in caplog.records if r.name == env_runner_module.__name__]
    assert len(messages) == 1 and reason in messages[0]


@pytest.mark.parametrize("stateful", [False, True])
def test_loops_can_take_turns(stateful):
    """An operator may add a connector to a living pipeline, and remove it."""

    def add(runner):
        runner._env_to_module.prepend(MeanStdFilter())

    def remove(runner):
        runner._env_to_module.remove("MeanStdFilter")

    config = config_for(stateful=stateful)
    assert_same(config, [{}, add, {}, remove, {}, {}], expect_arrays=False)


def test_failing_environment_is_restarted():
    fails_at: list[int] = []
    config = config_for({"fails_at": fails_at}).fault_tolerance(restart_failed_sub_environments=True)
    assert_same(config, [lambda _: fails_at.extend([5, 3]), {"num_timesteps": 24}, {}])


def test_failing_environment_raises():
    config = config_for({"fails_at": [5]})
    runner = ArrayEnvRunner(config=config, worker_index=None)
    with pytest.raises(RuntimeError):
        runner.sample(num_timesteps=30)
    assert sum(len(e) for e in runner.sample(num_timesteps=6)) >= 6
    runner.stop()


def test_weights_sequence_number_and_lifetime_steps():
    def new_weights(runner):
        state = runner.get_state()
        state["weights_seq_no"] = 7
        state["num_env_steps_sampled_lifetime"] = 1000
        runner.set_state(state)

    _, samples, _ = assert_same(config_for(), [{}, new_weights, {}])
    assert {int(n) for e in samples[1] for n in e.get_extra_model_outputs("weights_seq_no")} == {7}
    assert samples[1][0].get_extra_model_outputs(Columns.VF_PREDS).min() > 900  # the module sees `t`


def test_rewards_that_are_whole_numbers_at_first():
    config = config_for({"whole_rewards": 4, "longest": 60})
    single, array = (record(cls, config, [{}, {}])[1] for cls in (SingleAgentEnvRunner, ArrayEnvRunner))
    for sample, same in zip(single, array, strict=True):
        for a, b in zip(sample, same, strict=True):
            np.testing.assert_array_equal(a.get_rewards(), b.get_rewards())
    assert any(reward % 1 for reward in array[0][0].get_rewards())


def test_environment_that_reuses_its_arrays():
    """The stock runner records such an environment wrongly; here it makes no difference."""
    _, expected, _ = record(ArrayEnvRunner, config_for(), TWICE)
    _, samples, _ = record(ArrayEnvRunner, config_for({"reuses_arrays": True}), TWICE)
    ids: dict = {}
    for a, b in zip(expected, samples, strict=True):
        for x, y in zip(a, b, strict=True):
            assert_same_episode(x, y, ids, "reused arrays")


def test_samples_share_no_memory_with_what_the_runner_goes_on_with():
    _, clean, _ = record(ArrayEnvRunner, config_for(stateful=True), TWICE)

    runner = ArrayEnvRunner(config=config_for(stateful=True), worker_index=None)
    torch.manual_seed(0)
    runner.stop()
    torch.manual_seed(0)
    runner = ArrayEnvRunner(config=config_for(stateful=True), worker_index=None)
    for expected in clean:
        samples = runner.sample()
        ids: dict = {}
        for x, y in zip(expected, samples, strict=True):
            assert_same_episode(x, y, ids, "overwritten samples")
        for episode in samples:
            for buffer in (episode.observations, episode.actions, episode.rewards):
                buffer.data[...] = 0
            for leaf in episode.extra_model_outputs[Columns.STATE_OUT].data.values():
                leaf[...] = 0
    runner.stop()


def test_samples_are_contiguous_and_survive_pickling():
    _, samples, _ = record(ArrayEnvRunner, config_for({"observation": "image"}), [{"num_timesteps": 60}])
    for episode in samples[0]:
        assert episode.observations.data.flags.c_contiguous and episode.observations.data.dtype == np.uint8
    back = pickle.loads(pickle.dumps(samples[0], protocol=5))
    for x, y in zip(samples[0], back, strict=True):
        assert_same_episode(x, y, {}, "pickled")


def test_gymnasium_environments():
    config = config_for().environment("CartPole-v1").env_runners(gym_env_vectorize_mode="sync")
    assert_same(config, [{"num_timesteps": 40}] * 4)
    config = config_for().environment("Pendulum-v1").env_runners(gym_env_vectorize_mode="sync")
    assert_same(config, [{"num_timesteps": 30}] * 2)


@pytest.mark.parametrize("callback", [None, RecordingCallback])
@pytest.mark.parametrize("asked", ["training", "evaluation", "whole episodes"])
def test_cut_episodes_are_learned_from_and_count_in_no_metric(asked, callback):
    """Episodes of ten steps, one of each environment cut within eight."""
    config = PPOConfig().environment(
        "rllib_pnn/PongSoup-v0", env_config={"stagger": 8, "max_episode_frames": 40, "noop_max": 0}
    )
    config.env_runners(num_envs_per_env_runner=8, num_env_runners=0).debugging(seed=0)
    config.env_runners(gym_env_vectorize_mode="vector_entry_point")
    config.rl_module(rl_module_spec=RLModuleSpec(module_class=LinearModule))
    if callback:
        config.callbacks(callback)
    config.in_evaluation = asked == "evaluation"
    calls = [{"num_episodes": 8}] if asked == "whole episodes" else [{"num_timesteps": 8 * n} for n in (5, 20)]
    runner, samples, metrics = record(ArrayEnvRunner, config, calls)
    assert runner._logged_fallback is None
    lengths: dict[str, int] = {}
    ended = {}
    for episode in (episode for sample in samples for episode in sample):
        lengths[episode.id_] = lengths.get(episode.id_, 0) + len(episode)
        ended[episode.id_] = episode.is_truncated
    done = [lengths[id_] for id_ in lengths if ended[id_]]
    cut = [length for length in done if length < 10]
    assert len(cut) == (8 if asked == "training" else 0) and done.count(10) >= 8
    assert sum(m["num_episodes"].peek() for m in metrics if "num_episodes" in m) == done.count(10)
    for key in ("episode_len_min", "episode_len_max", "episode_len_mean"):
        assert metrics[-1][key].peek() == 10
    assert not runner._done_episodes_for_metrics
    assert set(runner._ongoing_episodes_for_metrics) <= {e.id_ for e in runner._ongoing_episodes}
    if callback:
        (recorder,) = runner._callbacks
        assert sum(call[0] == "end" for call in recorder.calls if isinstance(call, tuple)) == done.count(10)
