"""The Learner's threads, and what its state says of schedules."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import ray
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME
from small_algorithms import CONFIGS, small_config

from rllib_pnn.training import learner
from rllib_pnn.training.learner import free_threads, use_fused_adam
from rllib_pnn.training.progressive import make_progressive


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("num_env_runners", [0, 1])
def test_ppo_leaves_the_threads_of_a_users_process_alone(
    num_env_runners: int, threads_as_before: None, tmp_path: Path
) -> None:
    config = small_config("PPO").environment("rllib_pnn/CartPoleSoup-v0").env_runners(num_env_runners=num_env_runners)
    made = make_progressive(config, tasks=[{"name": "a"}], column=[{"dense": 4}], column_store=tmp_path)
    runner = made.env_runner_cls(config=made, worker_index=1)
    spec = made.get_multi_rl_module_spec(spaces=runner.get_spaces(), inference_only=False)
    runner.stop()
    torch.set_num_threads(2)  # as in a user's process on two cores
    made.learner_class(config=made, module_spec=spec).build()
    assert torch.get_num_threads() == 2


def test_a_trial_takes_the_cores_of_its_env_runners_or_the_cpus_that_ray_gave_it() -> None:
    """EnvRunners wait for the Learner; trials without any may run side by side."""

    class Trial:
        def threads(self) -> list[int]:
            torch.set_num_threads(7)  # whatever the process had before
            learner.os.cpu_count = lambda: 8
            return [free_threads(n) for n in (0, 1, 3, 20)]

    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        trials = [ray.remote(Trial).options(num_cpus=n).remote() for n in (0.3, 2)]
        assert ray.get([trial.threads.remote() for trial in trials]) == [[1, 1, 3, 8], [2, 1, 3, 8]]
        before = torch.get_num_threads()
        assert [free_threads(n) for n in (0, 1)] == [before, before]  # no trial, though Ray runs
    finally:
        ray.shutdown()


def scheduled(algorithm: str, folder: Path, environment: gym.Env) -> Any:
    config = CONFIGS[algorithm]().environment("CartPole-v1").env_runners(num_env_runners=0)
    config.training(entropy_coeff=[[0, 0.01], [1000, 0.0]], lr=[[0, 1e-3], [1000, 1e-4]])
    tasks = [{"name": name, "until": {"num_env_steps": 2000}} for name in "ab"]
    made = make_progressive(config, tasks=tasks, column=[{"dense": 4}], column_store=folder, check_spaces=False)
    return made.build_learner(env=environment)


def after(made: Any, env_steps: int) -> None:
    """As an update leaves its schedules."""
    made.before_gradient_based_update(timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: env_steps})
    made.after_gradient_based_update(timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: env_steps})


def entropy_cost(made: Any) -> float:
    if hasattr(made, "current_weights"):
        return made.current_weights().entropy_coeff
    return float(made.entropy_coeff_schedulers_per_module[DEFAULT_MODULE_ID].get_current_value())


@pytest.mark.parametrize("algorithm", ["PPO", "IMPALA", "APPO", "A3C"])
def test_a_restored_learner_is_where_its_schedules_were(algorithm: str, tmp_path: Path) -> None:
    environment = gym.make("CartPole-v1")
    trained = scheduled(algorithm, tmp_path / "1", environment)
    after(trained, 500)
    coeffs = getattr(trained, "curr_kl_coeffs_per_module", None)
    if coeffs is not None:
        coeffs[DEFAULT_MODULE_ID].data = torch.tensor(1.5)
    restored = scheduled(algorithm, tmp_path / "2", environment)
    assert entropy_cost(restored) == pytest.approx(0.01)
    restored.set_state(trained.get_state())
    assert entropy_cost(restored) == pytest.approx(entropy_cost(trained)) == pytest.approx(0.005)
    if coeffs is not None:
        assert float(restored.curr_kl_coeffs_per_module[DEFAULT_MODULE_ID]) == 1.5
    assert restored.position() == trained.position() and "500 env steps" in trained.position()


@pytest.mark.parametrize("algorithm", ["PPO", "A3C"])
def test_the_entropy_cost_starts_anew_before_a_tasks_first_update(algorithm: str, tmp_path: Path) -> None:
    made = scheduled(algorithm, tmp_path, gym.make("CartPole-v1"))
    after(made, 2000)
    assert entropy_cost(made) == 0.0
    made.freeze_columns()
    made.grow({"task_index": 1, "first_column": 0, "task_start_env_steps": 2000, "finished": False})
    assert entropy_cost(made) == pytest.approx(0.01)


def adam_of(made: Any) -> torch.optim.Optimizer:
    return made.get_optimizer(DEFAULT_MODULE_ID)


def test_adam_runs_fused_and_moves_weights_as_the_plain_one_does(tmp_path: Path) -> None:
    environment = gym.make("CartPole-v1")
    made = scheduled("PPO", tmp_path / "1", environment)
    copies = [p.detach().clone().requires_grad_() for p in made._params.values()]
    plain = torch.optim.Adam(copies, lr=1e-3, foreach=False)
    generator = torch.Generator().manual_seed(0)

    def step_both(made: Any) -> None:
        gradients = {ref: torch.randn(p.shape, generator=generator) for ref, p in made._params.items()}
        made.apply_gradients(gradients)
        for copy, gradient in zip(copies, gradients.values(), strict=True):
            copy.grad = gradient.clone()
        plain.step()
        for copy, parameter in zip(copies, made._params.values(), strict=True):
            torch.testing.assert_close(parameter.detach(), copy.detach(), rtol=1e-5, atol=1e-7)

    for _ in range(5):
        step_both(made)
    assert [group["fused"] for group in adam_of(made).param_groups] == [True]
    # A checkpoint of before says that its optimizer was not fused: this one goes on from it, and is.
    state = made.get_state()
    for entry in state["optimizer"].values():
        for group in entry["state"]["param_groups"]:
            group["fused"] = None
    restored = scheduled("PPO", tmp_path / "2", environment)
    restored.set_state(state)
    assert [group["fused"] for group in adam_of(restored).param_groups] == [True]
    for _ in range(3):
        step_both(restored)
    restored.freeze_columns()
    restored.grow({"task_index": 1, "first_column": 0, "task_start_env_steps": 0, "finished": False})
    assert [group["fused"] for group in adam_of(restored).param_groups] == [True]


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adam(p, foreach=True),
        lambda p: torch.optim.Adam(p, fused=False),
        lambda p: torch.optim.Adam(p, capturable=True),
        lambda p: torch.optim.RMSprop(p),
        lambda p: torch.optim.Adam([torch.nn.Parameter(x.detach().to("meta")) for x in p]),
        lambda p: torch.optim.Adam([torch.nn.Parameter(x.detach().bfloat16()) for x in p]),
    ],
)
def test_an_optimizer_that_somebody_chose_is_left_alone(optimizer: Any) -> None:
    made = optimizer([torch.nn.Parameter(torch.zeros(3))])
    before = [dict(group) for group in made.param_groups]
    use_fused_adam(made)
    assert [{**group, "params": 0} for group in made.param_groups] == [{**group, "params": 0} for group in before]
