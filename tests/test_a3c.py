"""A3C: the update against its equations, refused gradients, lost EnvRunners, checkpoints, settings, learning."""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import ray
import torch
from ray import tune
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core import DEFAULT_MODULE_ID

from rllib_pnn.training.a3c import A3C, A3CConfig, A3CLearner, register_a3c
from rllib_pnn.training.a3c_env_runner import A3CEnvRunner, FlatParameters, GradientInfo, Weights
from rllib_pnn.training.progressive import make_progressive
from rllib_pnn.training.shared_memory import Slot

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a Learner actor can't import a test module


@pytest.fixture(scope="module", autouse=True)
def cluster():
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    yield
    ray.shutdown()


def make_config(num_env_runners: int = 0, **training: Any) -> A3CConfig:
    return (
        A3CConfig()
        .environment("CartPole-v1")
        .env_runners(
            num_env_runners=num_env_runners,
            num_envs_per_env_runner=4,
            gym_env_vectorize_mode="vector_entry_point",
        )
        .rl_module(model_config={"fcnet_hiddens": [16]})
        .training(**{"gradients_per_training_step": 10, **training})
        .reporting(min_time_s_per_iteration=0)
        .debugging(seed=0, log_level="ERROR")
    )


def make_learner(**training: Any) -> A3CLearner:
    learner = make_config(**training).build_learner(env=gym.make("CartPole-v1"))
    return learner


def stamp(learner: A3CLearner, **changes: Any) -> GradientInfo:
    weights = learner.current_weights()
    fields = {"signature": weights.signature, "version": weights.version, "num_env_steps": 20, **changes}
    return GradientInfo(**fields)


def random_gradients(learner: A3CLearner, count: int, scale: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    size = learner.current_weights().values.size
    gradients = [(scale * rng.normal(size=size)).astype(np.float32) for _ in range(count)]
    for gradient in gradients:
        gradient.setflags(write=False)  # as they come out of Ray's object store
    return gradients


def module_of(algo: A3C) -> Any:
    return algo.learner_group._learner.module[DEFAULT_MODULE_ID]


def flat(module: Any) -> np.ndarray:
    return FlatParameters(module.named_parameters()).read().copy()


def learner_result(result: dict[str, Any]) -> dict[str, Any]:
    return result["learners"][DEFAULT_MODULE_ID]


def gradients_taken(learner: dict[str, Any]) -> int:
    """Applied, or (the fewer) too old to be when their EnvRunner had to wait; none dropped for another reason."""
    dropped = {key: value for key, value in learner.items() if key.startswith("num_gradients_dropped_")}
    stale = dropped.pop("num_gradients_dropped_stale_lifetime")
    assert len(dropped) == 3 and not any(dropped.values()), dropped
    applied = learner["num_gradients_applied_lifetime"]
    assert applied > stale
    return int(applied + stale)


# -- the update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rmsprop", "rmsprop_tf"])
def test_rmsprop_update_equals_the_equations(kind: str) -> None:
    learner = make_learner(lr=0.01, grad_clip=2.0, optimizer={"type": kind, "alpha": 0.9, "eps": 1e-3})
    theta = learner.current_weights().values.astype(np.float64)
    average = np.full_like(theta, float(kind == "rmsprop_tf"))  # TensorFlow begins with 1, torch with 0
    for scale in (1.0, 1e-3):  # the first kind is clipped, the second is not
        for gradient in random_gradients(learner, 3, scale):
            weights = learner.apply_gradient(stamp(learner), gradient)
            g = gradient.astype(np.float64)
            g = g * min(1.0, 2.0 / np.linalg.norm(g))
            average = 0.9 * average + 0.1 * g**2
            root = np.sqrt(average + 1e-3) if kind == "rmsprop_tf" else np.sqrt(average) + 1e-3
            theta = theta - 0.01 * g / root
            np.testing.assert_allclose(weights.values, theta, rtol=1e-4, atol=1e-6)
    assert weights.version == 6


@pytest.mark.parametrize("grad_clip_by", ["value", "norm"])
def test_other_ways_to_clip_are_rllibs(grad_clip_by: str) -> None:
    learner = make_learner(lr=1.0, grad_clip=0.5, grad_clip_by=grad_clip_by, optimizer={"type": "rmsprop", "eps": 1e6})
    layout = learner._get_layout()
    (gradient,) = random_gradients(learner, 1)
    before = learner.current_weights().values.astype(np.float64)
    after = learner.apply_gradient(stamp(learner), gradient).values
    parts = [part.double().numpy() for part in layout.split(torch.from_numpy(gradient.copy()))]
    if grad_clip_by == "value":
        clipped = [part.clip(-0.5, 0.5) for part in parts]
    else:
        clipped = [part * min(1.0, 0.5 / np.linalg.norm(part)) for part in parts]
    # With an epsilon this large, RMSProp divides by it alone.
    step = np.concatenate([part.ravel() for part in clipped]) / 1e6
    np.testing.assert_allclose(before - after, step, atol=1e-7)


def test_adam_update_equals_the_equations() -> None:
    learner = make_learner(lr=0.01, grad_clip=None, optimizer={"type": "adam", "betas": (0.8, 0.95), "eps": 1e-3})
    theta = learner.current_weights().values.astype(np.float64)
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for step, gradient in enumerate(random_gradients(learner, 4), start=1):
        weights = learner.apply_gradient(stamp(learner), gradient)
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient.astype(np.float64) ** 2
        theta = theta - 0.01 * (m / (1 - 0.8**step)) / (np.sqrt(v / (1 - 0.95**step)) + 1e-3)
        np.testing.assert_allclose(weights.values, theta, rtol=1e-4, atol=1e-6)


def test_schedules_follow_env_steps() -> None:
    learner = make_learner(lr=[[0, 0.1], [100, 0.0]], entropy_coeff=[[0, 1.0], [50, 0.5]])
    assert learner.current_weights().entropy_coeff == 1.0
    optimizer = learner.get_optimizer(DEFAULT_MODULE_ID)
    (gradient,) = random_gradients(learner, 1)
    for steps, lr, entropy in [(25, 0.075, 0.75), (25, 0.05, 0.5), (100, 0.0, 0.5)]:
        weights = learner.apply_gradient(stamp(learner, num_env_steps=steps), gradient)
        assert weights.entropy_coeff == pytest.approx(entropy)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)
    assert weights.num_env_steps == 150


def test_refused_gradients_change_nothing_and_are_counted() -> None:
    learner = make_learner(max_gradient_staleness=2)
    good, bad = random_gradients(learner, 2)
    for _ in range(3):
        learner.apply_gradient(stamp(learner), good)
    before = learner.current_weights().values.copy()
    optimizer_before = {k: v.clone() for k, v in _square_averages(learner).items()}
    with_nan = bad.copy()
    with_nan[5] = np.nan
    refused = [
        (stamp(learner, version=0), bad),  # 3 updates old
        (stamp(learner, task_index=1), bad),
        (stamp(learner, signature="another"), bad),
        (stamp(learner), bad[:-1]),
        (stamp(learner), with_nan),
    ]
    for info, gradient in refused:
        weights = learner.apply_gradient(info, gradient)
        np.testing.assert_array_equal(weights.values, before)
        assert weights.version == 3
    for name, average in _square_averages(learner).items():
        assert torch.equal(average, optimizer_before[name])
    learner.apply_gradient(stamp(learner, version=1), good)  # 2 updates old
    metrics = learner.get_metrics()[DEFAULT_MODULE_ID]
    peek = {name: value.peek() for name, value in metrics.items()}
    assert peek["num_gradients_dropped_stale_lifetime"] == 1
    assert peek["num_gradients_dropped_other_task_lifetime"] == 1
    assert peek["num_gradients_dropped_other_layout_lifetime"] == 2
    assert peek["num_gradients_dropped_not_finite_lifetime"] == 1
    assert peek["num_gradients_applied_lifetime"] == 4
    assert peek["gradient_staleness_max"] == 2
    assert peek["diff_num_grad_updates_vs_sampler_policy"] == pytest.approx(2 / 4)


def _square_averages(learner: A3CLearner) -> dict[int, torch.Tensor]:
    state = learner.get_optimizer(DEFAULT_MODULE_ID).state
    return {i: s["square_avg"] for i, s in enumerate(state.values())}


def test_layout_follows_a_growing_module() -> None:
    learner = make_learner()
    first = learner.current_weights()
    module = learner.module[DEFAULT_MODULE_ID]
    for parameter in module.encoder.parameters():
        parameter.requires_grad_(False)
    module.task_index = 1
    # What growth does: a new optimizer of what trains now.
    optimizer = learner.get_optimizer(DEFAULT_MODULE_ID)
    learner._module_optimizers[DEFAULT_MODULE_ID].clear()
    learner._named_optimizers.clear()
    del learner._optimizer_parameters[optimizer]
    learner.configure_optimizers_for_module(DEFAULT_MODULE_ID, learner.config)
    second = learner.current_weights()
    assert second.signature != first.signature
    assert second.values.size == sum(p.numel() for p in module.parameters() if p.requires_grad) < first.values.size
    encoder = [p.clone() for p in module.encoder.parameters()]
    learner.apply_gradient(stamp(learner, task_index=1), np.ones(second.values.size, np.float32))
    assert learner.current_weights().version == 1
    assert all(torch.equal(a, b) for a, b in zip(encoder, module.encoder.parameters(), strict=True))


# -- the algorithm ---------------------------------------------------------------------------------------------------


def test_results_without_env_runner_actors_and_the_same_seed_twice() -> None:
    weights = []
    for _ in range(2):
        algo = make_config().build_algo()
        result = algo.train()
        result = algo.train()
        weights.append(flat(module_of(algo)))
        np.testing.assert_array_equal(weights[-1], flat(algo.env_runner.module))
        algo.stop()
    np.testing.assert_array_equal(*weights)
    env_runners, learner = result["env_runners"], learner_result(result)
    assert 300 < env_runners["num_env_steps_sampled_lifetime"] <= 400
    assert env_runners["num_env_steps_sampled_lifetime"] == result["num_env_steps_sampled_lifetime"]
    all_modules = result["learners"]["__all_modules__"]
    assert all_modules["num_env_steps_trained_lifetime"] == env_runners["num_env_steps_sampled_lifetime"]
    assert 5 < env_runners["episode_return_mean"] < 200
    assert learner["num_gradients_applied_lifetime"] == 20
    assert learner["diff_num_grad_updates_vs_sampler_policy"] == 0
    assert learner["default_optimizer_learning_rate"] == pytest.approx(7e-4)
    assert 0.6 < learner["entropy"] < 0.7
    for key in (
        "policy_loss",
        "vf_loss",
        "total_loss",
        "gradients_default_optimizer_global_norm",
        "curr_entropy_coeff",
    ):
        assert np.isfinite(learner[key]), key


@pytest.fixture(scope="module")
def asynchronous(cluster: None):
    """A running algorithm with two EnvRunners, each with two requests on their way."""
    config = make_config(num_env_runners=2)
    config.env_runners(max_requests_in_flight_per_env_runner=2)
    algo = config.build_algo()
    yield algo
    algo.stop()


def test_env_runners_do_not_wait_for_one_another(asynchronous: A3C) -> None:
    for _ in range(3):
        result = asynchronous.train()
    learner = learner_result(result)
    assert gradients_taken(learner) >= 30
    assert 0 < learner["diff_num_grad_updates_vs_sampler_policy"] <= learner["gradient_staleness_max"]
    assert result["env_runners"]["num_env_steps_sampled_lifetime"] > 0
    # What users take from the algorithm is the Learner's newest.
    np.testing.assert_array_equal(flat(asynchronous.get_module()), flat(module_of(asynchronous)))


def test_a_killed_env_runner_is_replaced_and_no_gradient_applied_twice(asynchronous: A3C) -> None:
    algo = asynchronous
    learner, seen, staleness, sent = algo.learner_group._learner, [], [], []
    apply_gradient, take_request = learner.take_gradient, algo._take_gradient
    applied_before, stale_before = learner.current_weights().version, learner._num_dropped["stale"]

    def take(ref: ray.ObjectRef) -> bool:
        sent.append(algo._requests[ref].weights.version)
        return take_request(ref)

    def record(info: GradientInfo, gradient: np.ndarray) -> None:
        seen.append((info.num_env_steps, gradient.tobytes()))
        assert info.version == sent[-1], "not of the weights that the EnvRunner was sent"
        staleness.append(learner.current_weights().version - info.version)
        apply_gradient(info, gradient)

    algo._take_gradient, learner.take_gradient = take, record
    victim = ray.get(algo.env_runner_group._worker_manager._actors[1].apply.remote(lambda runner: os.getpid()))
    os.kill(victim, signal.SIGKILL)
    num_train_calls, deadline = 0, time.monotonic() + 90
    while time.monotonic() < deadline:
        result = algo.train()
        num_train_calls += 1
        if result["fault_tolerance"]["num_remote_worker_restarts"]:
            break
    assert result["fault_tolerance"]["num_remote_worker_restarts"] == 1
    assert len(seen) > 30, "the other EnvRunner was held up"
    for _ in range(3):
        result = algo.train()
    del learner.take_gradient, algo._take_gradient
    assert result["fault_tolerance"]["num_healthy_workers"] == 2
    # The new one works, with the Learner's weights.
    states = algo.env_runner_group.foreach_env_runner(lambda r: r.has_learner_state, local_env_runner=False)
    assert states == [True, True]
    assert {request.actor_id for request in algo._requests.values()} == {1, 2}
    assert len(set(seen)) == len(seen)
    counted = {k: v for k, v in learner_result(result).items() if k.startswith("num_gradients_")}
    # One of the two may have waited for a core while the other went on: its gradients, and no others, are dropped.
    stale = sum(age > algo.config.effective_max_gradient_staleness for age in staleness)
    assert counted.pop("num_gradients_dropped_stale_lifetime") == stale_before + stale
    assert counted.pop("num_gradients_applied_lifetime") == applied_before + len(seen) - stale
    assert len(counted) == 3 and not any(counted.values()), counted


def test_settling_bears_the_loss_of_an_env_runner_with_two_requests() -> None:
    config = make_config(num_env_runners=2).fault_tolerance(restart_failed_env_runners=True)
    algo = config.env_runners(max_requests_in_flight_per_env_runner=2).build_algo()
    try:
        algo.train()
        victim = algo.env_runner_group._worker_manager._actors[1]
        assert sorted(request.actor_id for request in algo._requests.values()) == [1, 1, 2, 2]
        victim.apply.remote(lambda runner: time.sleep(60))
        algo._requests = {ref: request for ref, request in algo._requests.items() if request.actor_id == 2}
        algo._fill(1)  # behind what it is busy with, so that neither is done when it dies
        ray.kill(victim)
        algo.settle()
        assert not algo._requests
        for _ in range(3):
            result = algo.train()
        assert gradients_taken(learner_result(result)) >= 30
    finally:
        algo.stop()


def test_gradients_on_their_way_do_not_survive_a_restore(asynchronous: A3C, tmp_path: Path) -> None:
    algo = asynchronous
    algo.train()
    path = algo.save(str(tmp_path / "checkpoint")).checkpoint.path
    saved = learner_result(algo.train())["num_gradients_applied_lifetime"]
    assert len(algo._requests) == 4
    algo.restore_from_path(path)
    assert not algo._requests
    assert learner_result(algo.train())["num_gradients_applied_lifetime"] <= saved


class FarEnvRunner(A3CEnvRunner):
    """Sees no other process's memory."""

    def load_weights(self, weights: Weights) -> bool:
        return not isinstance(weights.values, Slot) and super().load_weights(weights)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memory without a name (Linux)")
def test_env_runners_of_another_machine_get_arrays(asynchronous: A3C, tmp_path: Path) -> None:
    asynchronous.train()
    boxes = {request.mailbox for request in asynchronous._requests.values()}
    assert boxes == set(asynchronous._mailboxes.values()) and len(boxes) == 2, "one for each EnvRunner here"
    slots = {(request.actor_id, request.slot) for request in asynchronous._requests.values()}
    assert slots == {(1, 0), (1, 1), (2, 0), (2, 1)}, "no two requests in the same place"

    config = make_config(num_env_runners=2).env_runners(env_runner_cls=FarEnvRunner)
    algo = config.env_runners(max_requests_in_flight_per_env_runner=2).build_algo()
    try:
        before = flat(module_of(algo))
        for _ in range(2):
            result = algo.train()
        assert gradients_taken(learner_result(result)) >= 20
        assert not np.array_equal(before, flat(module_of(algo)))
        assert not algo._mailboxes and not any(request.mailbox for request in algo._requests.values())
        algo.restore_from_path(algo.save(str(tmp_path / "checkpoint")).checkpoint.path)
        algo.train()
        assert not algo._mailboxes, "once is enough to find out"
    finally:
        algo.stop()


def test_learner_actor() -> None:
    config = make_config(num_env_runners=1).learners(num_learners=1)
    algo = config.build_algo()
    try:
        before = flat(algo.get_module())
        for _ in range(2):
            result = algo.train()
        assert 19 <= learner_result(result)["num_gradients_applied_lifetime"] <= 20
        assert learner_result(result)["diff_num_grad_updates_vs_sampler_policy"] == 0
        assert not np.array_equal(before, flat(algo.get_module()))
    finally:
        algo.stop()


class FailingLearner(A3CLearner):
    def before_gradient_based_update(self, **kwargs: Any) -> None:
        raise RuntimeError("device-side assert")


def test_an_exception_of_the_learner_actor_is_not_taken_for_an_env_runners() -> None:
    config = make_config(num_env_runners=1).learners(num_learners=1, learner_class=FailingLearner)
    algo = config.build_algo()
    try:
        with pytest.raises(RuntimeError, match="device-side assert"):
            for _ in range(3):
                algo.train()
    finally:
        algo.stop()


def test_without_restarts_the_others_go_on_and_the_last_ones_loss_ends_training() -> None:
    config = make_config(num_env_runners=2).fault_tolerance(
        restart_failed_env_runners=False, ignore_env_runner_failures=True
    )
    algo = config.build_algo()
    try:
        algo.train()
        first, second = algo.env_runner_group._worker_manager._actors.values()
        ray.kill(first)
        for _ in range(3):
            result = algo.train()
        assert result["fault_tolerance"]["num_healthy_workers"] == 1
        ray.kill(second)
        with pytest.raises(RuntimeError, match="all 2 EnvRunners are gone"):
            for _ in range(3):
                algo.train()
    finally:
        algo.stop()


def test_checkpoint_restores_everything(tmp_path: Path) -> None:
    config = make_config(lr=[[0, 1e-2], [10_000, 0.0]], entropy_coeff=[[0, 0.1], [10_000, 0.0]])
    algo = config.build_algo()
    for _ in range(3):
        algo.train()
    path = algo.save(str(tmp_path / "checkpoint")).checkpoint.path
    learner = algo.learner_group._learner
    saved = learner.current_weights()
    saved.values = saved.values.copy()
    counters = learner.get_state()["a3c_counters"]
    averages = {k: v.clone() for k, v in _square_averages(learner).items()}
    lr = learner.get_optimizer(DEFAULT_MODULE_ID).param_groups[0]["lr"]
    assert 0 < lr < 1e-2 and 0 < saved.entropy_coeff < 0.1

    algo.train()
    assert not np.array_equal(learner.current_weights().values, saved.values)
    algo.restore_from_path(path)  # back in time
    for case, restored in [("the same process", algo), ("another process", A3C.from_checkpoint(path))]:
        fresh = restored.learner_group._learner
        weights = fresh.current_weights()
        np.testing.assert_array_equal(weights.values, saved.values, case)
        assert (weights.version, weights.num_env_steps) == (saved.version, saved.num_env_steps), case
        assert weights.entropy_coeff == pytest.approx(saved.entropy_coeff), case
        for name, average in _square_averages(fresh).items():
            assert torch.equal(average, averages[name]), case
        assert fresh.get_optimizer(DEFAULT_MODULE_ID).param_groups[0]["lr"] == pytest.approx(lr), case
        assert fresh.get_state()["a3c_counters"] == counters, case
        result = restored.train()
        assert learner_result(result)["num_gradients_applied_lifetime"] == saved.version + 10, case
        assert learner_result(result)["default_optimizer_learning_rate"] < lr, case
        steps = result["learners"]["__all_modules__"]["num_env_steps_trained_lifetime"]
        assert steps == result["env_runners"]["num_env_steps_sampled_lifetime"] > saved.num_env_steps, case
        restored.stop()


@pytest.mark.parametrize("evaluation_num_env_runners", [0, 1])
def test_evaluation(evaluation_num_env_runners: int) -> None:
    config = make_config().evaluation(
        evaluation_interval=1,
        evaluation_duration=4,
        evaluation_num_env_runners=evaluation_num_env_runners,
        evaluation_config={"explore": False},
    )
    algo = config.build_algo()
    try:
        result = algo.train()
        evaluated = result["evaluation"]["env_runners"]
        assert evaluated["num_episodes"] >= 4
        assert 5 < evaluated["episode_return_mean"] <= 500
        algo.train()  # rollouts go on afterwards
    finally:
        algo.stop()


def test_rllibs_lstm_and_a_box_action_space_train() -> None:
    lstm = make_config().rl_module(
        model_config={"use_lstm": True, "lstm_cell_size": 8, "max_seq_len": 5, "fcnet_hiddens": [8]}
    )
    box = make_config().environment("Pendulum-v1").env_runners(gym_env_vectorize_mode="sync")
    for config in (lstm, box):
        algo = config.build_algo()
        before = flat(module_of(algo))
        result = algo.train()
        assert learner_result(result)["num_gradients_applied_lifetime"] == 10
        assert np.isfinite(learner_result(result)["policy_loss"])
        assert not np.array_equal(before, flat(module_of(algo)))
        algo.stop()


def test_tune_knows_the_name() -> None:
    register_a3c()
    register_a3c()
    assert tune.registry.get_trainable_cls("A3C") is A3C


def two_tasks(tmp_path: Path, *, gradients_per_training_step: int, evaluation_episodes: int) -> A3CConfig:
    """One EnvRunner, columns of eight units, 300 steps a task."""
    return make_progressive(
        make_config(num_env_runners=1, gradients_per_training_step=gradients_per_training_step),
        tasks=[{"name": name, "until": {"num_env_steps": 300}} for name in ("first", "second")],
        column=[{"dense": 8}],
        column_store=tmp_path / "columns",
        evaluation_episodes=evaluation_episodes,
    )


def test_a_sequence_of_tasks_grows_columns(tmp_path: Path) -> None:
    config = two_tasks(tmp_path, gradients_per_training_step=5, evaluation_episodes=1)
    config.env_runners(max_requests_in_flight_per_env_runner=2)
    algo = config.build_algo()
    try:
        results = []
        while not (results and results[-1].get("done")):
            results.append(algo.train())
            assert len(results) < 100
        assert {r["progressive"]["task"] for r in results} == {"first", "second"}
        assert any(r["progressive"]["num_episodes"] for r in results)
        assert results[-1]["columns"]["first"]["bit_equal"] == 1
        network = module_of(algo).network
        assert network.num_columns == 2
        network.verify()
        switch = next(r for r in results if r["progressive"]["task_over"])
        assert (
            learner_result(results[-1])["num_gradients_applied_lifetime"]
            > learner_result(switch)["num_gradients_applied_lifetime"]
        )
        # Requests that were on their way when the column was frozen brought gradients that trained nothing.
        assert learner_result(results[-1])["num_gradients_dropped_other_layout_lifetime"] >= 1
    finally:
        algo.stop()


def test_what_was_done_on_a_task_is_counted_to_it(tmp_path: Path) -> None:
    """An EnvRunner reports once a training step; what it did since comes late at a switch."""
    config = two_tasks(tmp_path, gradients_per_training_step=40, evaluation_episodes=0)
    algo = config.build_algo()
    try:
        for _ in range(10):
            if algo.train()["progressive"]["task_over"]:
                break
        done = algo.learner_group._learner._num_env_steps
        assert done >= 40 * 4 * 5
        assert module_of(algo).progress["task_start_env_steps"] == done
        result = algo.train()["progressive"]
        assert (result["task"], result["task_env_steps"] % 20) == ("second", 0)
        assert result["task_env_steps"] < algo.learner_group._learner._num_env_steps - done + 20 * 20
    finally:
        algo.stop()


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.learners(num_learners=2), "num_learners"),
        (lambda c: c.env_runners(rollout_fragment_length="auto"), "rollout_fragment_length"),
        (lambda c: c.env_runners(batch_mode="complete_episodes"), "batch_mode"),
        (lambda c: c.env_runners(explore=False), "explore"),
        (lambda c: c.offline_data(output="out", output_write_episodes=False), "output"),
        (lambda c: c.env_runners(env_runner_cls=gym.Env), "env_runner_cls"),
        (lambda c: c.env_runners(env_to_module_connector=lambda env, spaces, device: []), "env_to_module_connector"),
        (lambda c: c.training(learner_connector=lambda obs, act: []), "learner_connector"),
        (lambda c: c.training(num_epochs=2), "num_epochs"),
        (lambda c: c.training(minibatch_size=8), "minibatch_size"),
        (lambda c: c.training(lambda_=1.5), "lambda_"),
        (lambda c: c.training(vf_loss_coeff=-1.0), "vf_loss_coeff"),
        (lambda c: c.training(entropy_coeff=[[5, 0.1], [10, 0.0]]), "entropy_coeff"),
        (lambda c: c.training(optimizer={"type": "sgd"}), "'rmsprop' or 'rmsprop_tf' or 'adam'"),
        (lambda c: c.training(optimizer={"type": "rmsprop_tf", "epsilon": 0.1}), "'epsilon'"),
        (lambda c: c.training(optimizer={"type": "rmsprop", "eps": -1}), "epsilon value: -1"),
        (lambda c: c.training(optimizer={"type": "rmsprop_tf", "alpha": 1.0}), "rmsprop_tf: expected .* 1.0"),
        (lambda c: c.training(max_gradient_staleness=-1), "max_gradient_staleness"),
        (
            lambda c: c.training(optimizer={"type": "adam", "foreach": True, "fused": True}),
            "refused by its class: `fused`",
        ),
        (lambda c: c.training(gradients_per_training_step=0), "gradients_per_training_step"),
        (lambda c: c.training(gradients_per_rollout=0), r"`gradients_per_rollout` \(0\)"),
        (
            lambda c: c.training(gradients_per_rollout=c.num_envs_per_env_runner + 1),
            "`num_envs_per_env_runner` .* divides into parts",
        ),
        (lambda c: c.learners(num_aggregator_actors_per_learner=1), "num_aggregator_actors_per_learner"),
        (lambda c: c.multi_agent(policies={"a", "b"}, policy_mapping_fn=lambda *a, **k: "a"), "single-agent"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    config = make_config()
    config.validate()
    with pytest.raises(ValueError, match=message):
        change(config)
        config.validate()


@pytest.mark.parametrize("how", ["foreach", "differentiable", "fused"])
@pytest.mark.parametrize("kind", ["rmsprop", "adam"])
def test_how_an_optimizer_computes_may_be_said(kind: str, how: str) -> None:
    if (kind, how) == ("rmsprop", "fused"):
        pytest.skip("torch has none")
    make_config().training(optimizer={"type": kind, how: True}).validate()


def test_automatic_settings() -> None:
    config = A3CConfig().env_runners(num_env_runners=16, max_requests_in_flight_per_env_runner=2)
    assert config.effective_max_gradient_staleness == 128
    assert config.effective_gradients_per_training_step == 128
    config.training(max_gradient_staleness=0, gradients_per_training_step=3)
    assert (config.effective_max_gradient_staleness, config.effective_gradients_per_training_step) == (0, 3)


def test_per_episode_callbacks_are_announced_as_uncalled(caplog: pytest.LogCaptureFixture) -> None:
    class Counts(RLlibCallback):
        def on_episode_end(self, **kwargs: Any) -> None:
            pass

        def on_episode_step(self, **kwargs: Any) -> None:
            pass

        def on_sample_end(self, **kwargs: Any) -> None:
            pass

    for given in (Counts, functools.partial(Counts)):
        caplog.clear()
        make_config().callbacks(given).validate()
        assert "on_episode_step" in caplog.text and "on_sample_end" in caplog.text
        assert "on_episode_end" not in caplog.text


# -- learning --------------------------------------------------------------------------------------------------------


class Corridor(gym.vector.VectorEnv):
    """Right (1) brings 1, left (0) nothing; 10 steps an episode. Learned within seconds."""

    def __init__(self, num_envs: int) -> None:
        self.metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
        self.num_envs = num_envs
        self.single_observation_space = gym.spaces.Box(0, 1, (2,), np.float32)
        self.single_action_space = gym.spaces.Discrete(2)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.time = np.zeros(self.num_envs, int)
        return np.ones((self.num_envs, 2), np.float32), {}

    def step(self, actions: np.ndarray):
        resets = self.time == 10
        self.time = np.where(resets, 0, self.time + 1)
        rewards = np.where(resets, 0.0, actions)
        done = self.time == 10
        return np.ones((self.num_envs, 2), np.float32), rewards, done, np.zeros_like(done), {}


def test_learns_quickly() -> None:
    tune.register_env("a3c_corridor", lambda ctx: Corridor(ctx["num_envs"]))
    config = make_config(lr=0.01).environment("a3c_corridor")
    algo = config.build_algo()
    try:
        for _ in range(30):
            result = algo.train()
            if result["env_runners"].get("episode_return_mean", 0) > 9:
                break
        assert result["env_runners"]["episode_return_mean"] > 9
    finally:
        algo.stop()


@pytest.mark.slow
def test_solves_cartpole() -> None:
    """At least 450 of 500 over 100 episodes, within 400,000 env-steps (97,000 to 178,000 in five runs)."""
    config = (
        A3CConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=2, gym_env_vectorize_mode="vector_entry_point")
        .training(lr=[[0, 1e-3], [200_000, 3e-4], [400_000, 5e-5]], entropy_coeff=[[0, 0.01], [150_000, 1e-3]])
        .debugging(seed=0)
    )
    algo = config.build_algo()
    try:
        best, steps = 0.0, 0
        while best < 450 and steps < 400_000:
            result = algo.train()
            best = max(best, result["env_runners"].get("episode_return_mean", 0.0))
            steps = result["env_runners"].get("num_env_steps_sampled_lifetime", 0)
        assert best >= 450
    finally:
        algo.stop()
