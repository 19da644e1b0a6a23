"""A run that ends at the worst moment goes on where it was: no column lost, none trained twice, none skipped."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import pytest
import ray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.ppo import PPOConfig
from small_algorithms import small_config

import rllib_pnn
from rllib_pnn import files
from rllib_pnn.experiment.folder import RunFolder
from rllib_pnn.network import ColumnStore, ColumnStoreError, ProgressiveNetwork
from rllib_pnn.training.callback import ProgressiveCallback
from rllib_pnn.training.learner import ProgressiveLearnerMixin
from rllib_pnn.training.progressive import make_progressive

TESTS = Path(__file__).parent
VARIANTS = ("plain", "flipped")


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    rllib_pnn.register()
    yield
    ray.shutdown()


def soup(tmp_path: Path) -> Any:
    config = PPOConfig().environment("rllib_pnn/CartPoleSoup-v0")
    config.env_runners(num_env_runners=0, num_envs_per_env_runner=2)
    config.training(train_batch_size_per_learner=80, minibatch_size=40, num_epochs=1, lr=1e-3)
    config.debugging(seed=3)
    tasks = [{"name": v, "env_config": {"variant": v}, "until": {"num_env_steps": 240}} for v in VARIANTS]
    return make_progressive(
        config, tasks=tasks, column=[{"dense": 4}], column_store=tmp_path / "columns", evaluation_episodes=1
    )


def dying(real: Callable, when: str, nth: int = 1) -> Callable:
    calls = 0

    def function(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if when == "before" and calls == nth:
            raise Killed
        result = real(*args, **kwargs)
        if when == "after" and calls == nth:
            raise Killed
        return result

    return function


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("owner", "name", "nth"),
    [
        (ProgressiveLearnerMixin, "freeze_columns", 1),
        (ProgressiveCallback, "_play_all", 1),
        (ColumnStore, "save_column", 1),
        (files.os, "replace", 1),  # the column's file
        (files.os, "replace", 2),  # the manifest
        (ProgressiveLearnerMixin, "grow", 1),
        (ProgressiveCallback, "_forget_rollouts", 1),
        (ColumnStore, "save_column", 2),  # the last task's
        (ProgressiveCallback, "_forget_rollouts", 2),
    ],
)
def test_a_switch_is_atomic(cluster, tmp_path, monkeypatch, owner, name, nth, when):
    made = soup(tmp_path).build_algo()
    try:
        made.train()
        checkpoint = made.save_to_path(str(tmp_path / "checkpoint"))
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying(getattr(owner, name), when, nth))
            with pytest.raises(Killed):
                for _ in range(10):
                    made.train()
    finally:
        made.stop()
    stored = [entry.fingerprint for entry in ColumnStore(tmp_path / "columns").entries]
    assert len(stored) <= nth
    restored = Algorithm.from_checkpoint(checkpoint)
    try:
        first = result = restored.train()
        # Either the old task goes on or the next one starts.
        assert first["progressive"]["task_index"] == min(len(stored), 1)
        assert first["progressive"]["finished"] == (len(stored) == 2)
        for _ in range(10):
            if result.get("done"):
                break
            result = restored.train()
        played = [result["columns"][v]["bit_equal"] for v in VARIANTS]
        assert played == [1, 1] or len(stored) == 2  # they were played and stored before
    finally:
        restored.stop()
    entries = ColumnStore(tmp_path / "columns").entries
    assert [entry.task for entry in entries] == list(VARIANTS)
    assert [entry.fingerprint for entry in entries][: len(stored)] == stored
    assert ColumnStore(tmp_path / "columns").load().fingerprints() == [entry.fingerprint for entry in entries]


def test_a_column_that_another_process_stored_meanwhile_is_not_taken_for_its_own(cluster, tmp_path):
    made = soup(tmp_path).build_algo()
    try:
        made.train()
        other = ProgressiveNetwork((4,), 2, [{"dense": 4}], seed=99)
        other.add_column()
        other.freeze()
        ColumnStore(tmp_path / "columns").save_column(other, 0, task="plain")
        with pytest.raises(ColumnStoreError, match=r"column 0 is stored with fingerprint .* another process trained"):
            for _ in range(10):
                made.train()
    finally:
        made.stop()


# -- one writer a store ------------------------------------------------------------------------------------------------

CLAIM = """
import sys, time
from pathlib import Path
from rllib_pnn.network import ColumnStore
ColumnStore(sys.argv[1]).claim(0.0)
print("claimed", flush=True)
time.sleep(60)
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TESTS.parent), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", **more}


def test_two_processes_do_not_write_to_one_store(tmp_path):
    path = tmp_path / "columns"
    other = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(path)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "claimed\n"
        with pytest.raises(ColumnStoreError, match=rf"columns: written to by process {other.pid} on .*; stop it first"):
            ColumnStore(path).claim(0.2)
        other.send_signal(signal.SIGKILL)
        ColumnStore(path).claim(30.0)  # a lock does not outlive its process
        ColumnStore(path).claim(0.0)  # nor does a process stand in its own way
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


# -- a full disk -------------------------------------------------------------------------------------------------------

FULL = """
import resource, signal, sys
from rllib_pnn.network import ColumnStore, ColumnStoreError, ProgressiveNetwork
network = ProgressiveNetwork((4,), 2, [{"dense": 64}])
store = ColumnStore(sys.argv[1])
for k in range(2):
    network.add_column()
    network.freeze()
    if k:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    store.save_column(network, k, task=f"task {k}")
"""


def test_a_store_on_a_full_disk_keeps_its_columns(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "columns")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode != 0
    last = result.stderr.splitlines()[-1]
    assert "ColumnStoreError" in last and os.strerror(errno.EFBIG) in last
    store = ColumnStore(tmp_path / "columns")
    store.verify()
    assert [entry.task for entry in store.entries] == ["task 0"]
    assert sorted(path.name for path in store.path.iterdir()) == ["column_000.safetensors", "manifest.json"]


@pytest.mark.parametrize("call", ["open", "fdopen", "fsync", "replace"])
def test_a_file_on_a_full_disk_keeps_its_old_content(tmp_path, monkeypatch, call):
    files.write_whole(tmp_path / "state.json", "old")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, full)
        with pytest.raises(OSError, match="No space left"):
            files.write_whole(tmp_path / "state.json", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


# -- the command, killed for real --------------------------------------------------------------------------------------

SOUP = """\
soup:
  run: PPO
  env: rllib_pnn/CartPoleSoup-v0
  checkpoint_config: {checkpoint_frequency: 2, num_to_keep: 1}
  config:
    num_env_runners: 0
    num_envs_per_env_runner: 4
    train_batch_size_per_learner: 256
    minibatch_size: 128
    num_epochs: 1
  progressive:
    column: [{dense: 8}]
    evaluation_episodes: 1
    tasks:
      - {name: plain, env_config: {variant: plain}, until: {num_env_steps: 1280}}
      - {name: flipped, env_config: {variant: flipped}, until: {num_env_steps: 1280}}
"""


def command(folder: Path, *arguments: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    more = {
        "RLLIB_PNN_TEST_FAULT": fault,
        "RLLIB_PNN_TEST_ONCE": str(folder / "struck"),
        "PYTHONPATH": os.pathsep.join([str(TESTS / "faults"), str(TESTS.parent)]),
    }
    return subprocess.run(
        [sys.executable, "-m", "rllib_pnn.cli", "train", *arguments],
        cwd=folder,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        start_new_session=True,
    )


def rows_of(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "result.json").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        "ray.rllib.algorithms.ppo.ppo:PPO.training_step:after:5",
        "ray.rllib.algorithms.algorithm:Algorithm.save_checkpoint:before:2",
        "ray.train._internal.storage:_pyarrow_fs_copy_files:before:2",
        "ray.train._internal.storage:_pyarrow_fs_copy_files:after:2",
        "rllib_pnn.experiment.folder:RunFolder.add_checkpoint:before:2",
        "rllib_pnn.experiment.folder:RunFolder.add_checkpoint:after:2",
        "rllib_pnn.experiment.folder:ResultLog.append:before:6",
        "rllib_pnn.training.learner:ProgressiveLearnerMixin.freeze_columns:after:1",
        "rllib_pnn.network.store:write_whole:before:2",
        "rllib_pnn.network.store:write_whole:after:2",
        "rllib_pnn.training.learner:ProgressiveLearnerMixin.grow:after:1",
        "rllib_pnn.training.callback:ProgressiveCallback._forget_rollouts:after:1",
    ],
)
def test_kill_9_at_a_nasty_moment(tmp_path, fault):
    (tmp_path / "soup.yaml").write_text(SOUP)
    killed = command(tmp_path, "-f", "soup.yaml", fault=fault)
    assert (tmp_path / "struck").exists(), killed.stderr
    assert killed.returncode == -signal.SIGKILL
    (path,) = tmp_path.glob("runs/*/seed_0")
    run = RunFolder(path)
    before = [entry.fingerprint for entry in ColumnStore(run.columns).entries]
    kept = run.checkpoints[-1].training_iteration if run.checkpoints else 0
    done = len(rows_of(run)) if (path / "result.json").exists() else 0
    assert done - kept <= 2, "more than a checkpoint interval would be lost"
    time.sleep(0.5)
    resumed = command(tmp_path, "--resume", str(path), fault=fault)
    assert resumed.returncode == 0, resumed.stderr
    if kept:
        assert f"goes on after iteration {kept}" in resumed.stdout
    store = ColumnStore(run.columns)
    store.verify()
    assert [entry.task for entry in store.entries] == list(VARIANTS)
    assert [entry.fingerprint for entry in store.entries][: len(before)] == before
    rows = rows_of(run)
    assert [row["training_iteration"] for row in rows] == list(range(1, len(rows) + 1))
    indices = [row["progressive"]["task_index"] for row in rows]
    assert indices == sorted(indices)
    assert all(rows[-1]["columns"][v]["bit_equal"] == 1 for v in VARIANTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        "ray.rllib.algorithms.algorithm:Algorithm.save_checkpoint:disk-full:2",
        "ray.train._internal.storage:_pyarrow_fs_copy_files:disk-full:2",
        "rllib_pnn.network.store:write_whole:disk-full:2",
        "rllib_pnn.experiment.folder:RunFolder.add_checkpoint:disk-full:2",
        "rllib_pnn.experiment.folder:ResultLog.append:disk-full:4",
        "rllib_pnn.experiment.folder:write_whole:disk-full:8",
    ],
)
def test_a_full_disk_ends_the_run_with_one_line(tmp_path, fault):
    (tmp_path / "soup.yaml").write_text(SOUP)
    failed = command(tmp_path, "-f", "soup.yaml", fault=fault)
    assert failed.returncode == 1, failed.stderr
    (line,) = failed.stderr.splitlines()
    assert line.startswith("rllib: error: ") and "No space left on device" in line
    assert "--resume" in failed.stdout + line
    (path,) = tmp_path.glob("runs/*/seed_0")
    run = RunFolder(path)
    assert run.checkpoints
    if (run.columns / "manifest.json").exists():  # not when the first column is what the disk had no room for
        ColumnStore(run.columns).verify()
    resumed = command(tmp_path, "--resume", str(path))
    assert resumed.returncode == 0, resumed.stderr
    assert [entry.task for entry in ColumnStore(run.columns).entries] == list(VARIANTS)


@pytest.mark.slow
def test_a_killed_learner(tmp_path):
    halves = "num_cpus_per_env_runner: 0.5\n    num_cpus_per_learner: 0.5"
    text = SOUP.replace("num_env_runners: 0", f"num_env_runners: 1\n    num_learners: 1\n    {halves}")
    (tmp_path / "soup.yaml").write_text(text.replace("{num_env_steps: 1280}", "{num_env_steps: 5120}"))
    process = subprocess.Popen(
        [sys.executable, "-m", "rllib_pnn.cli", "train", "-f", "soup.yaml"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        files = list(tmp_path.glob("runs/*/seed_0/columns/manifest.json"))
        if files and len(RunFolder(files[0].parent.parent).checkpoints):
            break
        time.sleep(0.05)
    learners = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::_WrappedExecutable")  # RLlib's Learner actors
    ]
    assert len(learners) == 1
    learners[0].kill()
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    assert "starting it again from its last checkpoint" in out
    (path,) = tmp_path.glob("runs/*/seed_0")
    rows = rows_of(RunFolder(path))
    assert [row["training_iteration"] for row in rows] == list(range(1, len(rows) + 1))
    assert [entry.task for entry in ColumnStore(path / "columns").entries] == list(VARIANTS)
    ColumnStore(path / "columns").verify()


class Brittle(gym.Env):
    """Breaks in one of two hundred steps."""

    def __init__(self, config):
        self.observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
        self.action_space = gym.spaces.Discrete(2)
        self.random = random.Random(os.getpid())
        self.t = 0

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        if self.random.random() < 0.005:
            raise RuntimeError("the simulator crashed")
        self.t += 1
        return np.full(3, 0.1 * self.t, np.float32), 1.0, self.t == 10, False, {}


@pytest.mark.slow
def test_an_environment_that_raises_at_random(tmp_path):
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    rllib_pnn.register()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config = PPOConfig().environment(Brittle)
    config.env_runners(num_env_runners=2, num_cpus_per_env_runner=0.5, rollout_fragment_length=40)
    config.training(train_batch_size_per_learner=80, minibatch_size=40, num_epochs=1)
    tasks = [{"name": name, "until": {"num_env_steps": 1000}} for name in ("first", "second")]
    made = make_progressive(
        config,
        tasks=tasks,
        column=[{"dense": 4}],
        column_store=tmp_path / "columns",
        evaluation_episodes=0,
        check_spaces=False,
    ).build_algo()
    try:
        result = {}
        for _ in range(400):
            result = made.train()
            if result.get("done"):
                break
        assert result["progressive"]["finished"]
        assert made.env_runner_group.num_remote_worker_restarts() > 0
    finally:
        made.stop()
        ray.shutdown()
    assert [entry.task for entry in ColumnStore(tmp_path / "columns").entries] == ["first", "second"]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["A3C", "PPO"])
def test_an_object_store_that_others_have_filled(tmp_path, algorithm):
    """What no longer fits goes to disk, frozen columns that EnvRunners fetch by reference among it."""
    ray.init(
        num_cpus=3,
        object_store_memory=80 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        ignore_reinit_error=True,
    )
    rllib_pnn.register()
    config = small_config(algorithm).environment("rllib_pnn/CartPoleSoup-v0").env_runners(num_env_runners=2)
    tasks = [
        {"name": variant, "env_config": {"variant": variant}, "until": {"num_env_steps": 400}} for variant in VARIANTS
    ]
    column = [{"dense": 1024}, {"dense": 1024}]  # 4 MB and more: too large to travel within a message
    made = make_progressive(
        config, tasks=tasks, column=column, column_store=tmp_path / "columns", evaluation_episodes=1
    ).build_algo()
    try:
        others = [ray.put(np.full(20 * 2**20, n, np.uint8)) for n in range(8)]  # twice the store
        result = {}
        for n in range(400):
            result = made.train()
            others[n % 8] = ray.put(np.full(20 * 2**20, n % 256, np.uint8))
            if result.get("done"):
                break
        assert result["progressive"]["finished"]
        assert all(result["columns"][variant]["bit_equal"] == 1 for variant in VARIANTS)
    finally:
        made.stop()
        ray.shutdown()
    store = ColumnStore(tmp_path / "columns")
    store.verify()
    assert [entry.task for entry in store.entries] == list(VARIANTS)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_checkpoints_and_says_how_to_go_on(tmp_path, number):
    (tmp_path / "soup.yaml").write_text(SOUP.replace("{num_env_steps: 1280}", "{num_env_steps: 100000}"))
    process = subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
         "import sys; from rllib_pnn.cli import main; sys.exit(main(['train', '-f', 'soup.yaml']))"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if [p for p in tmp_path.glob("runs/*/seed_0/result.json") if len(p.read_text().splitlines()) >= 3]:
            break
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    (path,) = tmp_path.glob("runs/*/seed_0")
    run = RunFolder(path)
    assert process.returncode == 128 + number, err
    assert "Stopped. Go on with:  rllib train --resume runs/" in out
    assert run.state.status == "stopped"
    assert run.checkpoints[-1].training_iteration == len(rows_of(run))
