"""Losses and gradients that are not finite: said where, nothing poisoned, no column touched."""

import io
import json
import math
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import ray
import torch
from ray.rllib.utils.actor_manager import ResultOrError
from rich.console import Console
from small_algorithms import small_config

import rllib_pnn
from rllib_pnn import cli
from rllib_pnn.experiment.folder import RunFolder, last_exception
from rllib_pnn.experiment.run import train
from rllib_pnn.experiment.spec import load_plans
from rllib_pnn.network import ColumnStore
from rllib_pnn.training.learner import NUM_UPDATES_SKIPPED, AddTaskIndex, results_of, total_norm
from rllib_pnn.training.progressive import make_progressive
from rllib_pnn.training.trouble import TrainingTrouble

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # EnvRunners can't import a test module


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    rllib_pnn.register()
    yield
    ray.shutdown()


class Poisoned(gym.Env):
    """Episodes of ten steps; from step `poison` of each on, the reward is not a number."""

    def __init__(self, config):
        self.observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
        self.action_space = gym.spaces.Discrete(2)
        self.poison = config.get("poison", math.inf)
        self.t = 0

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.t += 1
        reward = math.nan if self.t >= self.poison else 1.0
        return np.full(3, 0.1 * self.t, np.float32), reward, self.t == 10, False, {}


def poisoned(tmp_path, algorithm, *, num_env_runners=0, num_learners=0):
    made = small_config(algorithm, num_learners=num_learners, gradients=4)
    made.environment(Poisoned).env_runners(num_env_runners=num_env_runners).debugging(seed=0)
    tasks = [
        {"name": "good", "until": {"num_env_steps": 100}},
        {"name": "bad", "env_config": {"poison": 7}, "until": {"num_env_steps": 100_000}},
    ]
    return make_progressive(
        made,
        tasks=tasks,
        column=[{"dense": 4}],
        column_store=tmp_path / "columns",
        evaluation_episodes=0,
        check_spaces=False,
    )


@pytest.mark.parametrize(
    ("algorithm", "num_env_runners", "num_learners"),
    [("PPO", 0, 0), ("PPO", 0, 1), ("APPO", 1, 0), ("IMPALA", 1, 1), ("A3C", 0, 0), ("A3C", 1, 1)],
)
def test_a_loss_that_is_not_a_number_ends_training(tmp_path, algorithm, num_env_runners, num_learners):
    made = poisoned(tmp_path, algorithm, num_env_runners=num_env_runners, num_learners=num_learners).build_algo()

    def look(learner):
        network = learner.progressive_module.network
        return [p.detach().clone() for p in network.parameters()], network.fingerprints()

    try:
        for _ in range(300):
            if made.train()["progressive"]["task_over"]:
                break
        stored = ColumnStore(tmp_path / "columns").entries[0].fingerprint
        with pytest.raises(
            TrainingTrouble, match=r"task 'bad' \(2 of 2\), column 1, after [\d,]+ env steps on it: "
        ) as caught:
            for _ in range(300):
                made.train()
        assert "nan" in str(caught.value) or "no gradient is finite" in str(caught.value)
        assert "lower lr" in str(caught.value) and "\n" not in str(caught.value)
        parameters, fingerprints = next(iter(r.get() for r in made.learner_group.foreach_learner(look)))
        assert all(torch.isfinite(p).all() for p in parameters)
        assert fingerprints == [stored, None]
        with pytest.raises(TrainingTrouble):  # and again, rather than going on with what is left
            for _ in range(300):
                made.train()
    finally:
        made.stop()
    ColumnStore(tmp_path / "columns").verify()


def test_updates_are_skipped_where_the_user_asked_for_it(tmp_path):
    config = poisoned(tmp_path, "PPO")
    config.framework(torch_skip_nan_gradients=True)
    made = config.build_algo()
    try:
        for _ in range(8):
            result = made.train()
        assert result["progressive"]["task"] == "bad"
        assert result["learners"]["__all_modules__"][NUM_UPDATES_SKIPPED] > 0
        learner = made.learner_group._learner
        assert all(torch.isfinite(p).all() for p in learner.progressive_module.network.parameters())
    finally:
        made.stop()


def test_weights_that_are_not_finite_end_training(tmp_path):
    made = poisoned(tmp_path, "PPO").build_algo()
    try:
        made.train()
        with torch.no_grad():
            next(iter(made.learner_group._learner.progressive_module.network.columns[-1].parameters())).mul_(math.inf)
        with pytest.raises(TrainingTrouble, match=r"task 'good' \(1 of 2\), column 0, .*(weights|loss) is"):
            made.train()
    finally:
        made.stop()


def test_an_exception_in_impalas_thread_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    made = poisoned(tmp_path, "IMPALA", num_env_runners=1).build_algo()
    try:
        made.train()
        learner = made.learner_group._learner
        monkeypatch.setattr(learner, "compute_losses", lambda **_: 1 / 0)
        with pytest.raises(TrainingTrouble, match=r"task 'good' .*: ZeroDivisionError: division by zero"):
            for _ in range(50):
                made.train()
    finally:
        made.stop()


def test_batches_that_do_not_name_their_task_end_training(tmp_path, monkeypatch):
    made = poisoned(tmp_path, "IMPALA", num_env_runners=1).build_algo()
    try:
        monkeypatch.setattr(AddTaskIndex, "__call__", lambda self, *, batch, **_: batch)
        with pytest.raises(TrainingTrouble, match="batches come without the task they were played on"):
            for _ in range(50):
                made.train()
    finally:
        made.stop()


def test_a_dead_learner_is_no_result():
    error = ray.exceptions.ActorDiedError()
    good, bad = ResultOrError(result=1), ResultOrError(error=error)
    assert results_of([good, good]) == [1, 1]
    with pytest.raises(ray.exceptions.ActorDiedError):
        results_of([good, bad])
    with pytest.raises(RuntimeError, match="no Learner is alive"):
        results_of([])


def test_total_norm():
    assert total_norm([torch.tensor([3.0]), None, torch.tensor([[4.0]])]) == 5.0
    assert math.isnan(total_norm([torch.ones(3), torch.tensor([math.nan])]))
    assert math.isinf(total_norm([torch.ones(3), torch.tensor([-math.inf])]))


@pytest.mark.parametrize(
    ("traceback", "expected"),
    [
        ("", "unknown"),
        ("Failure # 1\nray::PPO.train()\n  File x\nValueError: no\nsuch luck", "ValueError: no such luck"),
        ("ValueError: a\n\nduring that\n\n  File\na.b.KeyError: 'c'\n", "KeyError: 'c'"),
        ("x\nrllib_pnn.training.trouble.TrainingTrouble: task 'a': nan", "task 'a': nan"),
        (
            "Failure # 1\nThe actor died before finishing.\n\tpid: 3\nIt never ran.\n",
            "The actor died before finishing.",
        ),
        ("OSError: " + "x" * 900, "OSError: " + "x" * 488 + "..."),
    ],
)
def test_last_exception(traceback, expected):
    assert last_exception(traceback) == expected


DIVERGES = """\
soup:
  run: PPO
  env: rllib_pnn/CartPoleSoup-v0
  checkpoint_config: {checkpoint_frequency: 1}
  config:
    num_env_runners: 0
    num_envs_per_env_runner: 4
    train_batch_size_per_learner: 256
    minibatch_size: 128
    num_epochs: 1
    lr: [[0, 0.001], [768, 0.001], [769, 1.0e+30], [1000000, 1.0e+30]]
  progressive:
    column: [{dense: 8}]
    evaluation_episodes: 0
    tasks:
      - {name: short, env_config: {variant: plain}, until: {num_env_steps: 512}}
      - {name: long, env_config: {variant: flipped}, until: {num_env_steps: 100000}}
"""


def test_the_run_ends_with_one_line_and_its_last_good_checkpoint(tmp_path: Path, capsys) -> None:
    (tmp_path / "file.yaml").write_text(DIVERGES)
    output = io.StringIO()
    console = Console(file=output, width=300)
    (outcome,) = train(load_plans(tmp_path / "file.yaml"), storage=tmp_path / "runs", console=console)
    (run,) = outcome.failed
    assert run.state.status == "failed"
    assert cli._report(Console(file=io.StringIO()), outcome) == 1
    (line,) = capsys.readouterr().err.splitlines()
    last = run.checkpoints[-1]
    for words in ("seed_0: failed: task 'long' (2 of 2), column 1, after ", f"checkpoint: {last.folder} of iteration"):
        assert words in line
    assert "starting it again" not in output.getvalue()  # it would only diverge again
    rows = [json.loads(row) for row in (run.path / "result.json").read_text().splitlines()]
    assert last.training_iteration == rows[-1]["training_iteration"]
    assert "progressive" in rows[-1]
    ColumnStore(run.columns).verify()
    assert len(ColumnStore(run.columns).entries) == 1
    assert RunFolder(run.path).failure() in line
