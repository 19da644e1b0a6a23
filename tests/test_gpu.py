"""On a GPU: networks as on the CPU, and every algorithm with its Learner, or A3C's EnvRunners, there.

Skipped without one; `pytest tests/test_gpu.py -n 14` on a machine with one and 16 cores takes two minutes.
"""

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import tree
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from small_algorithms import small_config

import rllib_pnn
from rllib_pnn.analysis.fisher import average_fisher_sensitivity
from rllib_pnn.analysis.perturbation import average_perturbation_sensitivity
from rllib_pnn.network import ColumnStore, ProgressiveNetwork
from rllib_pnn.training.a3c_env_runner import LEARNER_STAMP
from rllib_pnn.training.progressive import make_progressive
from rllib_pnn.training.rl_module import ProgressiveRLModule

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

VARIANTS = ("plain", "flipped")
RECURRENT = [{"dense": 8}, {"lstm": 6}]
COLUMNS = {"mlp": "mlp", "lstm": RECURRENT}


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    rllib_pnn.register()
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def exact_products():
    """Convolutions in float32 rather than TF32, which is what comparisons are made with."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


# -- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "shape", "time"),
    [("atari", (84, 84, 4), ()), ("labyrinth", (84, 84, 3), (5,)), ("mlp", (7,), ()), (RECURRENT, (7,), (5,))],
    ids=["atari", "labyrinth", "mlp", "lstm"],
)
def test_outputs_and_gradients_are_the_cpus(tmp_path, column, shape, time):
    generator = torch.Generator().manual_seed(0)
    networks = [ProgressiveNetwork(shape, 4, column, seed=3) for _ in range(2)]
    for network in networks:
        network.add_column()
        network.freeze()
    networks[1].to("cuda")  # columns added from here on go where it is
    for network in networks:
        network.add_column()
        network.freeze()
        network.add_column()
    assert networks[0].fingerprints() == networks[1].fingerprints()
    assert networks[1].device.type == "cuda"
    size = (6, *time, *shape)
    if len(shape) == 3:
        obs = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    else:
        obs = torch.randn(size, generator=generator)
    results = []
    for network in networks:
        out = network(obs.to(network.device))
        parameters = network.trainable_parameters()
        gradients = torch.autograd.grad(out.logits.square().mean() + out.value.square().mean(), parameters)
        results.append([t.detach().cpu() for t in (out.logits, out.value, *gradients)])
    for on_cpu, on_gpu in zip(*results, strict=True):
        scale = float(on_cpu.abs().max()) + 1e-6
        torch.testing.assert_close(on_gpu / scale, on_cpu / scale, rtol=1e-3, atol=1e-4)
    networks[1].verify()
    # A store knows no devices.
    store = ColumnStore(tmp_path)
    for k in range(2):
        store.save_column(networks[1], k, task=str(k))
    assert store.load().fingerprints() == networks[0].fingerprints()[:2]


def test_analyses_run_where_the_network_is():
    network = ProgressiveNetwork((4,), 2, "mlp", seed=3)
    for _ in range(2):
        network.add_column()
    obs = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    on_cpu = average_fisher_sensitivity(network, obs, actions="expected")
    network.to("cuda")
    on_gpu = average_fisher_sensitivity(network, obs, actions="expected")
    np.testing.assert_allclose(on_gpu.values, on_cpu.values, rtol=1e-3, atol=1e-5)
    found = average_perturbation_sensitivity(
        network, "rllib_pnn/CartPoleSoup-v0", {"variant": "plain"}, floor=0.0, num_episodes=4, num_states=64
    )
    assert found.values.shape == (len(found.layers), 2)


# -- algorithms ------------------------------------------------------------------------------------------------------


def base_config(algorithm: str) -> AlgorithmConfig:
    config = small_config(algorithm)
    config.environment("rllib_pnn/CartPoleSoup-v0")
    config.env_runners(num_env_runners=1, num_envs_per_env_runner=4, gym_env_vectorize_mode="vector_entry_point")
    return config.debugging(seed=7)


def build(config: AlgorithmConfig, column, store: Path) -> Algorithm:
    tasks = [
        {"name": v, "env_config": {"variant": v}, "until": {"num_env_steps": n}}
        for v, n in zip(VARIANTS, (400, 1_000_000), strict=True)
    ]
    return make_progressive(config, tasks=tasks, column=column, column_store=store, evaluation_episodes=2).build_algo()


def train_until_second_task(algorithm):
    for _ in range(2000):
        result = algorithm.train()
        if result["progressive"]["task"] == "flipped" and result["progressive"]["task_env_steps"] > 100:
            return result
    raise AssertionError("the second task never began")


def save(algorithm, folder: Path) -> dict:
    """Writes a checkpoint; returns the module's state in it, for IMPALA and APPO go on to learn in a thread."""
    algorithm.save_to_path(folder)
    return pickle.loads((folder / "learner_group/learner/rl_module/default_policy/module_state.pkl").read_bytes())


def assert_equal(one, other) -> None:
    tree.assert_same_structure(one, other)
    for mine, its in zip(tree.flatten(one), tree.flatten(other), strict=True):
        np.testing.assert_array_equal(mine, its)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("algorithm", "num_learners", "column"),
    [
        ("A3C", 0, "mlp"),
        ("A3C", 1, "lstm"),
        ("PPO", 0, "mlp"),
        ("PPO", 1, "lstm"),
        ("APPO", 1, "mlp"),
        ("IMPALA", 0, "mlp"),
        ("IMPALA", 1, "lstm"),
    ],
)
def test_a_learner_on_the_gpu(tmp_path, algorithm, num_learners, column):
    """Two tasks; the first column stays as it was frozen, and a restored algorithm goes on."""

    def config():
        made = base_config(algorithm)
        return made.learners(num_learners=num_learners, num_gpus_per_learner=1)

    made = build(config(), COLUMNS[column], tmp_path / "columns")
    try:
        train_until_second_task(made)
        devices = made.learner_group.foreach_learner(
            lambda learner: {p.device.type for p in learner.module["default_policy"].parameters()}
        )
        assert [d.get() for d in devices] == [{"cuda"}]
        saved = save(made, tmp_path / "checkpoint")
    finally:
        made.stop()
    store = ColumnStore(tmp_path / "columns")
    frozen = store.load()
    frozen.verify()
    assert frozen.num_columns == 1
    again = build(config(), COLUMNS[column], tmp_path / "columns")
    try:
        again.restore_from_path(tmp_path / "checkpoint")
        assert_equal(save(again, tmp_path / "again"), saved)
        result = again.train()
        assert result["progressive"]["task"] == "flipped"
        again.train()
        module = again.learner_group.foreach_learner(
            lambda learner: learner.module["default_policy"].unwrapped().network.fingerprints()
        )
        assert [m.get()[0] for m in module] == [frozen.fingerprints()[0]]
    finally:
        again.stop()


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("algorithm", "column"), [("A3C", "mlp"), ("A3C", "lstm"), ("PPO", "mlp")])
def test_env_runners_on_the_gpu(tmp_path, algorithm, column):
    config = base_config(algorithm)
    config.env_runners(num_gpus_per_env_runner=0.5)
    config.learners(num_gpus_per_learner=0.5 if algorithm == "A3C" else 0)
    made = build(config, COLUMNS[column], tmp_path / "columns")
    try:
        train_until_second_task(made)
        devices = made.env_runner_group.foreach_env_runner(
            lambda r: {p.device.type for p in r.module.parameters()}, local_env_runner=False
        )
        assert devices == [{"cuda"}]
    finally:
        made.stop()
    ColumnStore(tmp_path / "columns").load().verify()


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("column", COLUMNS)
def test_a3cs_gradient_is_the_cpus(column):
    """The same rollout, moved."""
    config = base_config("A3C")
    tasks = [{"name": v, "env_config": {"variant": v}} for v in VARIANTS]
    made = make_progressive(config, tasks=tasks, column=COLUMNS[column], evaluation_episodes=0)
    runner = made.env_runner_cls(config=made)
    module: ProgressiveRLModule = runner.module
    module.grow({**module.progress, "task_index": 1})
    runner.set_state({"rl_module": module.get_state(), LEARNER_STAMP: 1})
    rollout = runner.collect_rollout()
    assert rollout.features  # of the frozen column
    expected, stats = runner.rollout_gradient(rollout)
    device = torch.device("cuda")

    def moved(part):
        return tree.map_structure(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, part)

    runner._device = device
    module.to(device)
    runner._forget_layout()
    there = type(rollout)(**{f.name: moved(getattr(rollout, f.name)) for f in dataclasses.fields(rollout)})
    got, got_stats = runner.rollout_gradient(there)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)
    assert got_stats == pytest.approx(stats, rel=1e-3, abs=1e-5)


# -- the command -----------------------------------------------------------------------------------------------------

PONG = """\
pong:
  run: {run}
  env: rllib_pnn/PongSoup-v0
  config:
    num_env_runners: 2
    num_envs_per_env_runner: 8
    num_gpus_per_learner: 1
    {more}
  progressive:
    column: atari
    evaluation_episodes: 0
    tasks:
      - {{name: pong, env_config: {{variant: pong}}, until: {{num_env_steps: 2000}}}}
      - {{name: noisy, env_config: {{variant: noisy}}, until: {{num_env_steps: 2000}}}}
"""


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        ("PPO", "train_batch_size_per_learner: 512\n    minibatch_size: 256\n    num_epochs: 2"),
        ("A3C", "rollout_fragment_length: 16"),
    ],
)
def test_rllib_train_with_a_gpu(tmp_path, algorithm, more):
    (tmp_path / "pong.yaml").write_text(PONG.format(run=algorithm, more=more))
    done = subprocess.run(
        [sys.executable, "-m", "rllib_pnn.cli", "train", "-f", "pong.yaml", "--storage", str(tmp_path / "runs")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    (result,) = (tmp_path / "runs").glob("*/seed_0/result.json")
    last = json.loads(result.read_text().splitlines()[-1])
    assert last["progressive"]["task"] == "noisy"
    network = ColumnStore(result.parent / "columns").load()
    network.verify()
    assert network.num_columns == 2
