"""Every kind of bad input gives one line on stderr and exit code 2, and leaves nothing behind."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import ray
from stored_columns import SOUP, soup_run

from rllib_pnn import cli
from rllib_pnn.experiment import run
from rllib_pnn.experiment.algorithm import Cluster
from rllib_pnn.experiment.folder import lock
from rllib_pnn.registration import register

REAL_RAY = run.ray_session

CARTPOLE = """\
cartpole:
  run: PPO
  env: CartPole-v1
  stop: {num_env_steps: 1000}
  config:
    num_env_runners: 1
    train_batch_size_per_learner: 500
    minibatch_size: 100
"""


def changed(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{old!r} is not once in the file"
    return text.replace(old, new)


class SizedEnv(gym.Env):
    """Observations of `size` numbers; two actions, or with `pair` a pair of them."""

    def __init__(self, size: int = 3, pair: bool = False) -> None:
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (size,), np.float32)
        action = gym.spaces.Discrete(2)
        self.action_space = gym.spaces.Tuple([action, action]) if pair else action


gym.register("tests/Sized-v0", entry_point=SizedEnv)
gym.register("tests/Tuple-v0", entry_point=lambda: SizedEnv(pair=True))

# name: (file, words of the message in order)
FILES = {
    "not YAML": (CARTPOLE + "  stop: [1,\n", ["bad.yaml:", "not YAML"]),
    "a tab": (changed(CARTPOLE, "  env:", "\tenv:"), ["bad.yaml:3", "tab", "spaces"]),
    "a Python object": (
        changed(CARTPOLE, "CartPole-v1", "!!python/object/apply:os.system ['true']"),
        ["bad.yaml:3", "!!python/object/apply:os.system", "plain data"],
    ),
    "a key twice": (CARTPOLE + "  run: PPO\n", ["bad.yaml:9", "cartpole.run", "given twice", "line 2"]),
    "aliases without end": (
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(
            f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdef", "bcdefg", strict=True)
        ),
        ["bad.yaml", "aliases"],
    ),
    **{
        f"of the old API stack alone: {key}": (
            changed(CARTPOLE, "num_env_runners: 1", f"num_env_runners: 0\n    {key}: {value}"),
            [f"bad.yaml:7: cartpole.config.{where or key}: ", *words],
        )
        for key, value, where, words in [
            ("observation_filter", "MeanStdFilter", "", ["would be ignored", "wrapper"]),
            ("clip_rewards", "true", "", ["would be ignored", "environment"]),
            ("num_gpus", "1", "", ["would be ignored", "num_gpus_per_learner"]),
            ("model", "{fcnet_hiddens: [32]}", "", ["fcnet_hiddens would be ignored", "model_config"]),
            ("model_config", "{fcnet_hidens: [32]}", "model_config.fcnet_hidens", ["did you mean 'fcnet_hiddens'?"]),
            ("enable_connectors", "true", "", ["remove it"]),
            ("horizon", "200", "", ["TimeLimit"]),
        ]
    },
    "of the old API stack alone, beside progressive": (
        changed(SOUP, "minibatch_size: 100", "clip_rewards: true"),
        ["bad.yaml:4: soup.config.clip_rewards: ", "would be ignored"],
    ),
    "of the old API stack alone, as IMPALA has it by itself": (
        changed(changed(CARTPOLE, "minibatch_size: 100", "num_gpus: 1"), "PPO", "IMPALA"),
        ["bad.yaml:8: cartpole.config.num_gpus: ", "did you mean 'num_gpus_per_learner'?"],
    ),
    "a search misspelt": (
        changed(CARTPOLE, "minibatch_size: 100", "minibatch_size: {grid_serch: [1, 2]}"),
        ["bad.yaml:8: cartpole.config.minibatch_size: ", "did you mean {grid_search: [...]}?"],
    ),
    "a search as Python": (
        changed(CARTPOLE, "minibatch_size: 100", "minibatch_size: tune.choice([1, 2])"),
        ["bad.yaml:8: cartpole.config.minibatch_size: ", "did you mean {choice: [...]}?"],
    ),
    "environments searched": (
        changed(CARTPOLE, "env: CartPole-v1", "env: {grid_search: [CartPole-v1, Acrobot-v1]}"),
        ["bad.yaml:3: cartpole.env: ", "one experiment for each"],
    ),
    "A2C": (changed(CARTPOLE, "run: PPO", "run: A2C"), ["cartpole.run: ", "did you mean 'A3C'?"]),
    "no episode to smooth over": (
        changed(CARTPOLE, "minibatch_size: 100", "metrics_num_episodes_for_smoothing: 0"),
        ["cartpole.config.metrics_num_episodes_for_smoothing: ", "expected at least 1, got 0"],
    ),
    "progressive, but empty": (
        CARTPOLE + "  progressive:\n",
        ["cartpole.progressive: ", "expected a mapping, got nothing", "remove the key"],
    ),
    "a name beside run": (CARTPOLE + "  name: other\n", ["bad.yaml:9: cartpole.name: ", "remove it"]),
    "a folder beside run": (CARTPOLE + "  local_dir: /tmp\n", ["bad.yaml:9: cartpole.local_dir: ", "--storage DIR"]),
    "restore beside run": (CARTPOLE + "  restore: /tmp\n", ["bad.yaml:9: cartpole.restore: ", "--resume RUN"]),
    "an input shift misspelt": (
        changed(SOUP, "column: mlp", "column: mlp\n    input_shift: automatic"),
        ["soup.progressive.input_shift: ", "expected a number or auto, got 'automatic'"],
    ),
    "empty": ("# nothing\n", ["bad.yaml", "empty"]),
    "not text": (b"\xff\xfe\x00", ["bad.yaml", "UTF-8"]),
    "no experiment's name": ("run: PPO\nenv: CartPole-v1\n", ["bad.yaml:1", "under one"]),
    "a list": ("- run: PPO\n", ["bad.yaml", "experiments by name"]),
    "run missing": (changed(CARTPOLE, "  run: PPO\n", ""), ["bad.yaml:1", "cartpole.run", "missing"]),
    "unknown key": (changed(CARTPOLE, "  stop:", "  stopp:"), ["bad.yaml:4", "cartpole.stopp", "did you mean 'stop'?"]),
    "unknown key in progressive": (
        changed(SOUP, "column: mlp", "colum: mlp"),
        ["bad.yaml:6", "soup.progressive.colum", "did you mean 'column'?"],
    ),
    "unknown key in a task": (
        changed(SOUP, "{name: flipped, env_config", "{name: flipped, env_confg"),
        ["bad.yaml:9", "tasks[1].env_confg", "did you mean 'env_config'?"],
    ),
    "unknown key in until": (
        changed(SOUP, "{variant: flipped}, until: {num_env_steps", "{variant: flipped}, until: {num_steps"),
        ["bad.yaml:9", "tasks[1].until.num_steps", "did you mean 'num_env_steps'?"],
    ),
    "unknown key in config": (
        changed(CARTPOLE, "minibatch_size", "lerning_rate"),
        ["bad.yaml:8", "cartpole.config.lerning_rate", "did you mean 'lr'?"],
    ),
    "unknown key in a section of config": (
        changed(CARTPOLE, "    minibatch_size: 100", "    training: {minibatch_sice: 100}"),
        ["bad.yaml:8", "cartpole.config.training.minibatch_sice", "did you mean 'minibatch_size'?"],
    ),
    "an old name in config": (
        changed(CARTPOLE, "num_env_runners", "num_workers"),
        ["bad.yaml:6", "config.num_workers", "did you mean 'num_env_runners'?"],
    ),
    "wrong type": (CARTPOLE + "  num_samples: two\n", ["bad.yaml:9", "num_samples", "whole number", "'two'"]),
    "wrong type in config": (
        changed(CARTPOLE, "minibatch_size: 100", "lr: fast"),
        ["bad.yaml:8", "config.lr", "a number", "'fast'"],
    ),
    "wrong type in until": (
        changed(SOUP, "{variant: flipped}, until: {num_env_steps: 500}", "{variant: flipped}, until: 500"),
        ["bad.yaml:9", "tasks[1].until", "a mapping", "500"],
    ),
    "negative steps": (
        changed(
            SOUP, "{variant: flipped}, until: {num_env_steps: 500}", "{variant: flipped}, until: {num_env_steps: -5}"
        ),
        ["bad.yaml:9", "tasks[1].until.num_env_steps", "at least 1", "-5"],
    ),
    "negative number in config": (
        changed(CARTPOLE, "num_env_runners: 1", "num_env_runners: -1"),
        ["bad.yaml:6", "config.num_env_runners", "at least 0", "-1"],
    ),
    "a task without an end": (
        changed(SOUP, "{variant: flipped}, until: {num_env_steps: 500}", "{variant: flipped}, until: {}"),
        ["bad.yaml:9", "tasks[1].until", "never end"],
    ),
    "a stop beside tasks": (
        changed(SOUP, "  config:", "  stop: {num_env_steps: 100}\n  config:"),
        ["bad.yaml:4: soup.stop: ", "tasks' `until`", "remove stop"],
    ),
    "a stop beside trials": (
        changed(SOUP, "  config:", "  transfer: {sources: [plain], targets: [flipped]}\n  stop: {a: 1}\n  config:"),
        ["bad.yaml:5: soup.stop: ", "tasks' `until`", "remove stop"],
    ),
    "a metric that is misspelt": (
        changed(CARTPOLE, "num_env_steps: 1000", "episode_reward_meen: 150"),
        ["bad.yaml:4: cartpole.stop.episode_reward_meen: ", "did you mean 'episode_reward_mean'?"],
    ),
    "no tasks": (
        SOUP[: SOUP.index("    tasks:")] + "    tasks: []\n",
        ["bad.yaml:7", "progressive.tasks", "at least one"],
    ),
    "duplicate task names": (
        changed(SOUP, "name: flipped", "name: plain"),
        ["bad.yaml:9", "tasks[1].name", "'plain'", "tasks[0]"],
    ),
    "unknown algorithm": (
        changed(CARTPOLE, "PPO", "PPPO"),
        ["bad.yaml:2", "cartpole.run", "PPPO", "did you mean 'PPO'?"],
    ),
    "an algorithm that can't be progressive": (changed(SOUP, "PPO", "DQN"), ["bad.yaml:2", "soup.run", "DQN", "PPO"]),
    "unknown environment": (
        changed(CARTPOLE, "CartPole-v1", "CartPol-v1"),
        ["bad.yaml:3", "env", "CartPol", "CartPole-v1"],
    ),
    "unknown environment of tasks": (
        changed(SOUP, "rllib_pnn/CartPoleSoup-v0", "PongSoup-v0"),
        ["bad.yaml:3: soup.env: ", "PongSoup", "; did you mean 'rllib_pnn/PongSoup-v0'?"],
    ),
    "unknown environment of tasks, close to nothing": (
        changed(SOUP, "rllib_pnn/CartPoleSoup-v0", "NotThere-v0"),
        ["bad.yaml:3: soup.env: ", "NotThere", "doesn't exist\n"],
    ),
    "unknown game": (
        changed(SOUP, "rllib_pnn/CartPoleSoup-v0", "ALE/Pog-v5"),
        ["bad.yaml:3: soup.env: ", "Pog", "; did you mean 'ALE/Pong-v5'?"],
    ),
    "unknown namespace": (
        changed(CARTPOLE, "CartPole-v1", "rllib_pn/PongSoup-v0"),
        ["bad.yaml:3: cartpole.env: ", "rllib_pn", "; did you mean 'rllib_pnn/PongSoup-v0'?"],
    ),
    "an environment of an old version": (
        changed(CARTPOLE, "CartPole-v1", "CartPole-v9"),
        ["bad.yaml:3: cartpole.env: ", "v9", "did you mean 'CartPole-v1'?"],
    ),
    "an environment that is code": (
        changed(CARTPOLE, "CartPole-v1", "os.system"),
        ["bad.yaml:3", "env", "path to code"],
    ),
    "a policy that is code": (
        changed(CARTPOLE, "minibatch_size: 100", "policies: {p0: [os.system, null, null, {}]}"),
        ["bad.yaml:8", "config.policies.p0", "[null, null, null, {...}]", "os.system"],
    ),
    "a class in config": (
        changed(CARTPOLE, "minibatch_size: 100", "callbacks_class: os.system"),
        ["bad.yaml:8", "config.callbacks_class", "set it from Python"],
    ),
    "unknown variant": (
        changed(SOUP, "variant: flipped", "variant: fliped"),
        ["bad.yaml:9", "tasks[1]", "fliped", "flipped"],
    ),
    "unknown option of the environment": (
        changed(CARTPOLE, "minibatch_size: 100", "env_config: {variant: plain}"),
        ["bad.yaml:8", "env_config", "variant"],
    ),
    "wrong observation space": (
        changed(
            changed(SOUP, "rllib_pnn/CartPoleSoup-v0", "Blackjack-v1").replace("{variant: plain}", "{}"),
            "{variant: flipped}",
            "{}",
        ),
        ["bad.yaml:", "progressive", "Box"],
    ),
    "wrong action space": (
        changed(SOUP, "rllib_pnn/CartPoleSoup-v0", "tests/Tuple-v0")
        .replace("{variant: plain}", "{}")
        .replace("{variant: flipped}", "{}"),
        ["bad.yaml:", "progressive", "action", "Tuple"],
    ),
    "tasks of different spaces": (
        changed(changed(SOUP, "rllib_pnn/CartPoleSoup-v0", "tests/Sized-v0"), "{variant: plain}", "{size: 3}").replace(
            "{variant: flipped}", "{size: 4}"
        ),
        ["bad.yaml:9", "tasks[1]", "observation space"],
    ),
    "a convolution on a vector": (changed(SOUP, "column: mlp", "column: atari"), ["bad.yaml:", "progressive", "conv"]),
    "unknown column": (
        changed(SOUP, "column: mlp", "column: mpl"),
        ["bad.yaml:6", "progressive.column", "did you mean 'mlp'?"],
    ),
    "unknown lateral": (
        changed(SOUP, "column: mlp", "lateral: adaptor"),
        ["bad.yaml:6", "progressive.lateral", "'adaptor'", "did you mean 'adapter'?"],
    ),
    "too few CPUs": (
        changed(CARTPOLE, "num_env_runners: 1", "num_env_runners: 64"),
        ["bad.yaml:6", "num_env_runners", "65 CPUs", "has 2", "auto"],
    ),
    "no room for auto": (
        changed(CARTPOLE, "num_env_runners: 1", "num_env_runners: auto\n    num_cpus_per_env_runner: 3"),
        ["bad.yaml:6", "num_env_runners", "the cluster has 2 CPUs"],
    ),
    "too few GPUs": (
        changed(CARTPOLE, "num_env_runners: 1", "num_env_runners: 0\n    num_gpus_per_learner: 1"),
        ["bad.yaml:", "1 GPU", "has 0"],
    ),
    "numbers that contradict each other": (
        changed(CARTPOLE, "minibatch_size: 100", "minibatch_size: 1000"),
        ["bad.yaml:8", "config.minibatch_size", "1000", "500"],
    ),
    "a framework that is not installed": (
        changed(CARTPOLE, "minibatch_size: 100", "framework: tf2"),
        ["bad.yaml:8: cartpole.config.framework: ", "TensorFlow", "no installation was found"],
    ),
    "columns from nowhere": (
        changed(SOUP, "column: mlp", "column: mlp\n    columns_from: no/such/run"),
        ["bad.yaml:7", "progressive.columns_from: no/such/run: no such folder"],
    ),
    "columns from a folder without": (
        changed(SOUP, "column: mlp", "column: mlp\n    columns_from: ."),
        ["bad.yaml:7", "progressive.columns_from: .: holds no columns"],
    ),
    "a model beside columns": (
        changed(SOUP, "minibatch_size: 100", "model: {fcnet_hiddens: [64]}"),
        ["bad.yaml:4: soup.config.model: fcnet_hiddens", "`progressive.column`", "says what the network is"],
    ),
    "a model of the new stack beside columns": (
        changed(SOUP, "minibatch_size: 100", "rl_module: {model_config: {max_seq_len: 5, head_fcnet_hiddens: [8]}}"),
        ["bad.yaml:4: soup.config.rl_module.model_config: head_fcnet_hiddens would", "`progressive.column`"],
    ),
    "a GPU of the old stack": (
        changed(SOUP, "minibatch_size: 100", "num_gpus: 1"),
        ["bad.yaml:4: soup.config.num_gpus: ", "did you mean 'num_gpus_per_learner'?"],
    ),
    "a GPU of the old stack, which IMPALA has by itself": (
        changed(changed(SOUP, "minibatch_size: 100", "num_gpus: 1"), "PPO", "IMPALA"),
        ["bad.yaml:4: soup.config.num_gpus: ", "did you mean 'num_gpus_per_learner'?"],
    ),
    "a search without values": (
        changed(CARTPOLE, "minibatch_size: 100", "lr: {grid_search: 3}"),
        ["bad.yaml:8", "config.lr", "list of values"],
    ),
    "more than all of the future": (changed(SOUP, "minibatch_size: 100", "gamma: 2.0"), ["config.gamma", "at most 1"]),
    "no environment": (changed(CARTPOLE, "  env: CartPole-v1\n", ""), ["bad.yaml:", "env: missing"]),
    "too many runs": (CARTPOLE + "  num_samples: 1.0e+6\n", ["bad.yaml:", "1000000 runs", "1000"]),
    "an experiment's name that leaves the folder": (changed(CARTPOLE, "cartpole:", "../x:"), ["bad.yaml:1", "name"]),
}


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of 2 CPUs that need not be started, for what is refused never runs."""

    @contextlib.contextmanager
    def connected(address: str | None, verbose: bool) -> Iterator[None]:
        register()
        with run._quiet(verbose):
            yield

    monkeypatch.setattr(run, "ray_session", connected)
    monkeypatch.setattr(Cluster, "connected", lambda: Cluster(({"CPU": 2.0},)))
    monkeypatch.setattr(run, "_run", lambda *arguments: pytest.fail("was not refused"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refuse(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which `rllib arguments` is refused."""
    before = sorted(Path.cwd().rglob("*"))
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    assert code == 2, captured
    assert captured.err.startswith("rllib: error: ") and captured.err.count("\n") == 1, captured.err
    assert captured.out == ""
    assert sorted(Path.cwd().rglob("*")) == before, "a refusal left something behind"
    return captured.err


def contains_in_order(line: str, words: list[str]) -> bool:
    position = 0
    for word in words:
        position = line.find(word, position)
        if position < 0:
            return False
        position += len(word)
    return True


@pytest.mark.parametrize("name", FILES)
def test_bad_file(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, words = FILES[name]
    (folder / "bad.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refuse(capsys, "train", "-f", "bad.yaml")
    assert contains_in_order(line, words), line


GRID = """\
grid:
  run: PPO
  env: rllib_pnn/CartPoleSoup-v0
  progressive:
    column: mlp
    tasks:
      - {name: plain, env_config: {variant: plain}, until: {num_env_steps: 500}}
      - {name: scaled, env_config: {variant: scaled}, until: {num_env_steps: 500}}
  transfer: {sources: [plain], targets: [scaled], architectures: [scratch, progressive]}
"""
ARGUMENTS = {
    "no such file": (["train", "-f", "missing.yaml"], ["missing.yaml", "no such file"]),
    "an example that is not here": (
        ["train", "-f", "tuned/pong_soup.yaml"],
        ["tuned/pong_soup.yaml", "no such file", "rllib example show pong_soup"],
    ),
    "a folder as a file": (["train", "-f", "."], [".", "a folder"]),
    "nothing to train": (["train"], ["-f FILE", "--resume RUN"]),
    "two files": (["train", "a.yaml", "-f", "b.yaml"], ["one tuned example", "a.yaml", "b.yaml"]),
    "a run of another file": (["train", "-f", "other.yaml", "--resume", "RUN"], ["describes other", "is of 'soup'"]),
    "chosen trials of an ordinary file": (
        ["train", "-f", "soup.yaml", "--only", "x*"],
        ["soup.yaml", "--only x*: ", "transfer"],
    ),
    "a misspelt trial": (
        ["train", "-f", "grid.yaml", "--only", "*scaled*", "--only", "plain_to_scaled_progresive"],
        ["grid.yaml: --only plain_to_scaled_progresive: ", "did you mean 'plain_to_scaled_progressive_seed_0'?"],
    ),
    "no trial of a name": (
        ["train", "-f", "grid.yaml", "--only", "*zoom*"],
        ["grid.yaml: --only *zoom*: no trial", "its 3 trials are source_plain_seed_0, scaled_scratch_seed_0, "],
    ),
    "chosen trials of a run": (["train", "--resume", "RUN", "--only", "x*"], ["--only x*", "-f FILE", "RUN/TRIAL"]),
    "no such option": (["train", "--storrage", "x"], ["rllib train", "--storrage", "--storage"]),
    "no such command": (["trian"], ["rllib", "trian", "train"]),
    "a storage that is a file": (
        ["train", "-f", "soup.yaml", "--storage", "soup.yaml/x"],
        ["--storage", "not a folder"],
    ),
    "no such run": (["train", "--resume", "nowhere"], ["nowhere", "no such folder"]),
    "a run that is none": (["train", "--resume", "."], ["experiment.json", "run folder"]),
    "a folder that is neither run nor store": (["columns", "empty"], ["empty", "run folder", "or a column store"]),
    "a folder for a report": (["report", "RUN", "-o", "empty"], ["empty: a folder", "did you mean empty/report.html?"]),
    "a floor that is no number": (["report", "RUN", "--floor", "inf"], ["--floor inf: expected a finite number"]),
    "no such example": (["example", "show", "pong_sop"], ["pong_sop", "did you mean 'pong_soup'?"]),
    "no such cluster": (["train", "-f", "soup.yaml", "--ray-address", "nowhere:1"], ["--ray-address nowhere:1"]),
    "a Ray client's address": (["train", "-f", "soup.yaml", "--ray-address", "ray://x:1"], ["ray://x:1", "HOST:PORT"]),
    "no such task": (
        ["evaluate", "RUN", "--task", "flip"],
        ["--task flip", "plain, flipped", "did you mean 'flipped'?"],
    ),
    "no such column": (["evaluate", "RUN", "--column", "7"], ["--column 7", "2 columns"]),
    "no episodes": (["evaluate", "RUN", "--episodes", "0"], ["rllib evaluate", "--episodes", "1"]),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_arguments(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, words = ARGUMENTS[name]
    stored = str(soup_run(folder))
    (folder / "other.yaml").write_text(SOUP.replace("soup:", "other:"))
    (folder / "grid.yaml").write_text(GRID)
    (folder / "empty").mkdir()
    if "--ray-address" in arguments:
        monkeypatch.setattr(run, "ray_session", REAL_RAY)
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", lambda address, **_: (_ for _ in ()).throw(ConnectionError("unreachable")))
    line = refuse(capsys, *[stored if word == "RUN" else word for word in arguments])
    assert contains_in_order(line, words), line


def test_unwritable_storage(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "soup.yaml").write_text(SOUP)
    (folder / "locked").mkdir(mode=0o500)
    if os.access(folder / "locked", os.W_OK):  # root may write anywhere
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder / "locked")
    assert "locked" in refuse(capsys, "train", "-f", "soup.yaml", "--storage", "locked/runs")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda store: (store / "manifest.json").write_text("{"), ["manifest.json"]),
        (lambda store: (store / "column_001.safetensors").unlink(), ["column_001.safetensors", "no such file"]),
        (lambda store: _flip_byte(store / "column_000.safetensors"), ["column_000.safetensors", "fingerprint"]),
        (lambda store: _truncate(store / "column_001.safetensors"), ["column_001.safetensors", "damaged"]),
    ],
    ids=["manifest", "missing", "changed", "truncated"],
)
def test_damaged_store(damage, words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = soup_run(folder)
    damage(stored / "columns")
    for command in (["columns", str(stored)], ["evaluate", str(stored)]):
        assert contains_in_order(refuse(capsys, *command), words)
    (folder / "next.yaml").write_text(changed(SOUP, "column: mlp", f"column: mlp\n    columns_from: {stored}"))
    line = refuse(capsys, "train", "-f", "next.yaml")
    assert contains_in_order(line, ["next.yaml:7", "progressive.columns_from", *words]), line


def test_columns_for_other_observations(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = soup_run(folder)
    text = changed(SOUP, "column: mlp", f"column: mlp\n    columns_from: {stored}")
    text = text.replace("{variant: plain}", "{}").replace("{variant: flipped}", "{}")
    (folder / "next.yaml").write_text(changed(text, "rllib_pnn/CartPoleSoup-v0", "tests/Sized-v0"))
    assert contains_in_order(
        refuse(capsys, "train", "-f", "next.yaml"), ["next.yaml:7", "columns_from", "(4,)", "(3,)"]
    )


def test_columns_from_an_experiment_of_several_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = soup_run(folder).parent
    (experiment / "seed_1").mkdir()
    (experiment / "seed_1" / "experiment.json").write_text("{}")  # it has no column yet
    (folder / "next.yaml").write_text(changed(SOUP, "column: mlp", f"column: mlp\n    columns_from: {experiment}"))
    line = refuse(capsys, "train", "-f", "next.yaml")
    assert contains_in_order(line, ["next.yaml:7", "columns_from", "2 runs", "choose one", "seed_0", "seed_1"]), line


@pytest.mark.parametrize("file", ["experiment.json", "plan.json", "state.json"])
def test_damaged_run_folder(file: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = soup_run(folder)
    path = stored.parent / file if file == "plan.json" else stored / file
    path.write_text('{"name": ')
    line = refuse(capsys, "train", "--resume", str(stored.parent))
    assert contains_in_order(line, [file]), line


def test_run_in_use(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = soup_run(folder)
    with lock(stored.parent):
        assert f"in use by process {os.getpid()}" in refuse(capsys, "train", "--resume", str(stored))


@pytest.mark.parametrize("name", ["unknown key", "a Python object"])
def test_as_a_process(name: str, folder: Path) -> None:
    content, words = FILES[name]
    (folder / "bad.yaml").write_text(str(content))
    package = Path(cli.__file__).parent.parent
    process = subprocess.run(
        [sys.executable, "-m", "rllib_pnn.cli", "train", "-f", "bad.yaml"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(package)},
        check=False,
    )
    assert process.returncode == 2
    assert process.stdout == "" and process.stderr.count("\n") == 1
    assert contains_in_order(process.stderr, words)
    assert sorted(p.name for p in folder.iterdir()) == ["bad.yaml"]


def _flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])
