"""The Learner's threads: PPO's updates on the cores that nobody else uses."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from small_algorithms import small_config

from rllib_pnn.training import learner
from rllib_pnn.training.learner import free_threads
from rllib_pnn.training.progressive import make_progressive


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("num_env_runners", "threads"), [(0, 2), (1, 1)])
def test_ppo_without_env_runners_learns_on_all_cores(
    num_env_runners: int, threads: int, threads_as_before: None, tmp_path: Path
) -> None:
    config = small_config("PPO").environment("rllib_pnn/CartPoleSoup-v0").env_runners(num_env_runners=num_env_runners)
    made = make_progressive(config, tasks=[{"name": "a"}], column=[{"dense": 4}], column_store=tmp_path)
    runner = made.env_runner_cls(config=made, worker_index=1)
    spec = made.get_multi_rl_module_spec(spaces=runner.get_spaces(), inference_only=False)
    runner.stop()
    torch.set_num_threads(2)  # as in a user's process on two cores
    made.learner_class(config=made, module_spec=spec).build()
    assert torch.get_num_threads() == threads


def test_env_runners_that_wait_leave_their_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner.os, "cpu_count", lambda: 8)
    assert [free_threads(n) for n in (1, 3, 20)] == [1, 3, 8]


def test_a_trial_takes_the_cpus_that_ray_gave_it() -> None:
    """Trials without EnvRunners may run side by side."""

    class Trial:
        def threads(self) -> int:
            torch.set_num_threads(7)  # whatever the process had before
            return free_threads(0)

    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        trials = [ray.remote(Trial).options(num_cpus=n).remote() for n in (0.3, 2)]
        assert ray.get([trial.threads.remote() for trial in trials]) == [1, min(2, os.cpu_count() or 1)]
        before = torch.get_num_threads()
        assert free_threads(0) == before  # no trial, though Ray runs
    finally:
        ray.shutdown()
