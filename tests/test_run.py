"""Runs on Ray Tune: what they leave, how they stop, and how they go on."""

import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from rich.console import Console
from stored_columns import soup_run

from rllib_pnn.experiment.algorithm import Cluster, build_config
from rllib_pnn.experiment.environment import prepare_ray
from rllib_pnn.experiment.errors import InputError
from rllib_pnn.experiment.folder import CheckpointRecord, ResultLog, RunFolder, create_experiment
from rllib_pnn.experiment.progress import Display, RunProgress
from rllib_pnn.experiment.run import _StopAt, _with_sources, make_config, resume, train
from rllib_pnn.experiment.run import ray_session as connected
from rllib_pnn.experiment.spec import Plan, load_plans
from rllib_pnn.network import ColumnStore
from rllib_pnn.registration import register

# A process that was started in the background without a terminal ignores Ctrl-C, and the command respects that.
STOP = signal.SIGTERM if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else signal.SIGINT

SOUP = """\
soup:
  run: PPO
  env: rllib_pnn/CartPoleSoup-v0
  checkpoint_config: {checkpoint_frequency: 2, num_to_keep: 2}
  config:
    num_env_runners: 0
    num_envs_per_env_runner: 4
    train_batch_size_per_learner: 256
    minibatch_size: 128
    num_epochs: 1
  progressive:
    column: [{dense: 8}]
    evaluation_episodes: 2
    tasks:
      - {name: plain, env_config: {variant: plain}, until: {num_env_steps: 1000}}
      - {name: flipped, env_config: {variant: flipped}, until: {num_env_steps: 20000}}
"""


def plan_of(text: str, folder: Path) -> Plan:
    (folder / "file.yaml").write_text(text)
    (plan,) = load_plans(folder / "file.yaml")
    return plan


# -- how many EnvRunners ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "num_runs", "config", "expected"),
    [
        ([2], 1, "", (2, 0.9, 0.2)),
        ([1], 1, "", (1, 0.9, 0.1)),
        ([4], 1, "", (4, 0.9, 0.4)),
        ([8], 1, "", (7, 1, 1)),
        ([8], 2, "", (4, 0.9, 0.4)),  # side by side
        ([2], 5, "", (2, 0.9, 0.2)),  # one after the other
        ([2, 2], 1, "", (4, 0.9, 0.4)),
        ([16, 16], 1, ", num_learners: 2", (29, 1, 1)),
        ([8], 1, ", num_cpus_per_env_runner: 2", (3, 2, 1)),
        ([4], 1, ", num_cpus_for_main_process: 2", (2, 1, 2)),
        ([8], 1, ", evaluation_interval: 5, evaluation_num_env_runners: 2", (5, 1, 1)),
    ],
)
def test_auto_fits_the_cluster(
    nodes: list[int], num_runs: int, config: str, expected: tuple[float, ...], tmp_path: Path
) -> None:
    plan = plan_of(f"a: {{run: PPO, env: CartPole-v1, config: {{num_env_runners: auto{config}}}}}", tmp_path)
    (experiment,) = plan.runs.values()
    cluster = Cluster(tuple({"CPU": float(cpus)} for cpus in nodes))
    made = build_config(plan, experiment, cluster, num_runs=num_runs)
    assert (made.num_env_runners, made.num_cpus_per_env_runner, made.num_cpus_for_main_process) == expected
    request = made.algo_class.default_resource_request(made).required_resources["CPU"]
    assert request <= cluster.total("CPU") / min(num_runs, max(1, sum(nodes) // 4)) + 1e-6


def test_a_node_must_hold_each_part(tmp_path: Path) -> None:
    plan = plan_of(
        "a: {run: PPO, env: CartPole-v1, config: {num_env_runners: 1, num_cpus_per_env_runner: 3}}", tmp_path
    )
    with pytest.raises(InputError, match=r"asks for 3 CPUs in one place, the largest node has 2"):
        build_config(plan, plan.runs["seed_0"], Cluster(({"CPU": 2.0},) * 4))


def test_config_of_every_shipped_example_fits_two_cores() -> None:
    register()
    for path in sorted((Path(__file__).parent.parent / "tuned_examples").glob("*.yaml")):
        for plan in load_plans(path):
            configs = {json.dumps({**e.config, "seed": 0}, sort_keys=True): e for e in plan.runs.values()}
            for experiment in configs.values():
                build_config(plan, experiment, Cluster(({"CPU": 2.0},)), num_runs=len(plan.runs))


@pytest.mark.parametrize(
    ("env", "made"),
    [
        ("ALE/Pong-v5", "ale_py:ALE/Pong-v5"),
        ("ale_py:ALE/Pong-v5", "ale_py:ALE/Pong-v5"),
        ("PongNoFrameskip-v4", "ale_py:PongNoFrameskip-v4"),
        ("CartPole-v1", "CartPole-v1"),
        ("rllib_pnn/Atari-v0", "rllib_pnn/Atari-v0"),
        ("nowhere/Nothing-v0", "nowhere/Nothing-v0"),
    ],
)
def test_ids_are_such_as_every_process_can_make(env: str, made: str, tmp_path: Path) -> None:
    register()
    plan = plan_of(f"a: {{run: PPO, env: '{env}', config: {{num_env_runners: 1}}}}", tmp_path)
    assert build_config(plan, plan.runs["seed_0"], Cluster(({"CPU": 2.0},))).env == made


def test_policies(tmp_path: Path) -> None:
    text = "a: {run: PPO, env: CartPole-v1, config: {num_env_runners: 0, policies: {p0: [null, null, null, {}]}}}"
    plan = plan_of(text, tmp_path)
    made = build_config(plan, plan.runs["seed_0"], Cluster(({"CPU": 2.0},)))
    assert made.is_multi_agent and list(made.policies) == ["p0"]


def test_make_config_is_progressive(tmp_path: Path) -> None:
    register()
    plan = plan_of(SOUP, tmp_path)
    config = make_config(plan, plan.runs["seed_0"], Cluster(({"CPU": 2.0},)))
    assert config.seed == 0 and config.env_config == {"variant": "plain"}
    assert config.rl_module_spec.model_config["progressive"]["evaluation_episodes"] == 2


def test_what_a_run_starts_from_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of tasks for the report, and a path that holds from any working directory."""
    monkeypatch.chdir(tmp_path)
    stored = soup_run(tmp_path)
    text = SOUP.replace(
        "column: [{dense: 8}]", f"column: mlp\n    architecture: finetune_all\n    columns_from: {stored}"
    )
    (experiment,) = _with_sources(plan_of(text, tmp_path)).runs.values()
    assert experiment.progressive.source_tasks == ["plain", "flipped"]
    assert experiment.progressive.columns_from == str(tmp_path / stored)
    (whole,) = _with_sources(plan_of(text.replace(str(stored), str(stored.parent)), tmp_path)).runs.values()
    assert whole.progressive == experiment.progressive
    (same,) = _with_sources(plan_of(SOUP, tmp_path)).runs.values()
    assert same.progressive.source_tasks is None
    (tmp_path / stored / "columns" / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"file\.yaml:\d+: soup\.progressive\.columns_from: "):
        _with_sources(plan_of(text, tmp_path))


# -- results on disk -------------------------------------------------------------------------------------------


def _log(log: ResultLog, iteration: int, **row: object) -> None:
    row = {"training_iteration": iteration, **row}
    log.append(json.dumps(row), row)


def _rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((path / "progress.csv").read_text())))


def test_a_metric_that_appears_late_gets_its_column(tmp_path: Path) -> None:
    log = ResultLog(tmp_path)
    _log(log, 1, steps=10)
    _log(log, 2, steps=20, **{"columns/pong/forgetting": 0.0})
    _log(log, 3, steps=30)
    assert [row["columns/pong/forgetting"] for row in _rows(tmp_path)] == ["", "0.0", ""]
    assert [row["steps"] for row in _rows(tmp_path)] == ["10", "20", "30"]


def test_resuming_takes_rows_back(tmp_path: Path) -> None:
    log = ResultLog(tmp_path)
    for iteration in range(1, 6):
        _log(log, iteration, value=iteration)
    with (tmp_path / "result.json").open("a") as file:
        file.write('{"training_iteration": 6, "val')  # killed in the middle
    with (tmp_path / "progress.csv").open("a") as file:
        file.write("6,")
    log = ResultLog(tmp_path, 3)
    _log(log, 4, value=40)
    assert [json.loads(line)["value"] for line in (tmp_path / "result.json").read_text().splitlines()] == [1, 2, 3, 40]
    assert [row["value"] for row in _rows(tmp_path)] == ["1", "2", "3", "40"]


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    run = RunFolder(create_experiment(tmp_path, plan_of(SOUP, tmp_path)) / "seed_0")
    assert run.checkpoints == [] and run.state.status == "waiting"
    for index in range(3):
        (run.path / f"checkpoint_{index:06d}").mkdir()
        if index < 2:
            run.add_checkpoint(CheckpointRecord(folder=f"checkpoint_{index:06d}", training_iteration=index + 1))
    (run.path / "checkpoint_000000").rmdir()
    assert [record.folder for record in run.checkpoints] == ["checkpoint_000001"]


# -- what the user sees ----------------------------------------------------------------------------------------


def _result(steps: int, total: int, index: int = 0, mean: float = 20.0, **more: object) -> dict[str, object]:
    progressive = {
        "task": ["plain", "flipped"][index],
        "task_index": index,
        "num_tasks": 2,
        "column": index,
        "task_env_steps": steps,
        "episode_return_mean": mean,
        "task_over": False,
        **more,
    }
    return {"progressive": progressive, "num_env_steps_sampled_lifetime": total, "training_iteration": 1}


def test_progress(tmp_path: Path) -> None:
    now = [0.0]
    run = RunProgress("seed_0", plan_of(SOUP, tmp_path).runs["seed_0"], clock=lambda: now[0])
    assert run.line() == "seed_0  waiting"
    assert run.update(_result(200, 200)) is True
    assert math.isnan(run.steps_per_s) and math.isnan(run.eta_s)
    now[0] = 2.0
    assert run.update(_result(600, 600)) is False
    assert run.steps_per_s == 200
    assert run.eta_s == (400 + 20_000) / 200
    line = "seed_0  task 1/2 plain  column 0  600/1,000 steps  200 steps/s  return 20.0  ETA < 0:01:42"
    assert run.line() == line
    result = _result(1000, 1000, task_over=True)
    result["columns"] = {"plain": {"frozen_episode_return_mean": 31.25}}
    now[0] = 4.0
    assert run.update(result) is True
    assert run.frozen(result) == (
        "seed_0: task 1/2 plain is over after 1,000 steps; column 0 is frozen and returns 31.2"
    )
    now[0] = 6.0
    assert run.update(_result(400, 1400, index=1, mean=math.nan)) is True
    assert "task 2/2 flipped" in run.line() and "return -" in run.line()


def test_ordinary_progress(tmp_path: Path) -> None:
    text = "a: {run: PPO, env: E, stop: {episode_reward_mean: 150, timesteps_total: 1000}}"
    run = RunProgress("seed_0", plan_of(text, tmp_path).runs["seed_0"])
    run.update({"num_env_steps_sampled_lifetime": 500.0, "env_runners": {"episode_return_mean": 75.0}})
    assert run.line() == "seed_0  500/1,000 steps  - steps/s  return 75.0 (until 150)  ETA -"


def test_a_metric_that_no_result_has(tmp_path: Path) -> None:
    output = io.StringIO()
    display = Display(Console(file=output, width=200), "a", [])
    stop = _StopAt(
        {"reward_mean": 150, "env_runners/episode_return_mean": 150, "num_env_steps": 1e6, "date": 3}, display
    )
    for i in range(30):
        result = {"num_env_steps": i, "date": "today", "env_runners": {"episode_reward_mean": 10.0}}
        assert not stop("trial", result)
    first, second, third = output.getvalue().splitlines()
    assert first.endswith(
        "none of 10 results has reward_mean, so it ends nothing so far; did you mean 'episode_reward_mean'?"
    )
    assert second.endswith("none of 10 results has env_runners/episode_return_mean, so it ends nothing so far")
    assert "has date" in third
    assert stop("trial", {"env_runners": {"episode_return_mean": 150}})


@pytest.mark.parametrize("terminal", [True, False])
def test_display(terminal: bool, tmp_path: Path) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=110, color_system=None)
    run = RunProgress("seed_0", plan_of(SOUP, tmp_path).runs["seed_0"])
    with Display(console, "soup", [run, RunProgress("seed_1", plan_of(SOUP, tmp_path).runs["seed_0"])]) as display:
        run.update(_result(600, 600, mean=-3.5))
        display.changed(run, now=True)
        display.changed(run, now=False)  # within ten seconds: no second line
        table = Console(file=io.StringIO(), width=110, record=True)
        table.print(display.render())
    shown = table.export_text()
    for word in ("soup", "1/2 plain", "600 / 1,000", "-3.5", "seed_1", "waiting"):
        assert word in shown
    if not terminal:
        assert output.getvalue().count("\n") == 1 and "600/1,000 steps" in output.getvalue()


# -- real runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    prepare_ray(verbose=False)
    if ray.is_initialized():
        yield
        return
    with connected(None, verbose=False):
        yield


@pytest.fixture(scope="module")
def soup(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """A run that was stopped by Ctrl-C in its second task and then went on to its end."""
    folder = tmp_path_factory.mktemp("soup")
    text = SOUP.replace("num_env_steps: 20000", "num_env_steps: 2000")
    plan = plan_of(text, folder)

    def interrupt() -> None:
        while not list(folder.glob("runs/*/seed_0/columns/manifest.json")):
            time.sleep(0.05)
        os.kill(os.getpid(), STOP)

    threading.Thread(target=interrupt, daemon=True).start()
    output = io.StringIO()
    console = Console(file=output, width=200)
    (first,) = train([plan], storage=folder / "runs", console=console)
    run = first.runs[0]
    stopped = {
        "signal": first.stopped_by,
        "state": run.state,
        "columns": [entry.fingerprint for entry in ColumnStore(run.columns).entries],
        "iterations": len(_rows(run.path)),
    }
    second = resume(first.path, console=console)
    yield {"run": run, "stopped": stopped, "first": first, "second": second, "output": output.getvalue()}


def test_ctrl_c_takes_a_checkpoint(soup: dict) -> None:
    stopped = soup["stopped"]
    assert stopped["signal"] == STOP
    assert stopped["state"].status == "stopped"
    assert stopped["state"].checkpoints[-1].training_iteration == stopped["iterations"]
    assert len(stopped["columns"]) == 1
    assert "Stopping" in soup["output"] and f"goes on after iteration {stopped['iterations']}" in soup["output"]


def test_a_resumed_run_ends(soup: dict) -> None:
    run, second = soup["run"], soup["second"]
    assert second.stopped_by is None and not second.failed
    assert run.state.status == "finished"
    columns = [entry.fingerprint for entry in ColumnStore(run.columns).entries]
    assert len(columns) == 2 and columns[0] == soup["stopped"]["columns"][0]
    ColumnStore(run.columns).verify()


def test_what_a_run_leaves(soup: dict) -> None:
    path = soup["run"].path
    for name in ("experiment.json", "params.json", "progress.csv", "result.json", "state.json"):
        assert (path / name).is_file(), name
    assert list(path.glob("events.out.tfevents.*"))
    assert 1 <= len(list(path.glob("checkpoint_*"))) <= 2
    rows = _rows(path)
    iterations = [int(row["training_iteration"]) for row in rows]
    assert iterations == list(range(1, len(rows) + 1))
    assert [json.loads(line)["training_iteration"] for line in (path / "result.json").open()] == iterations
    assert rows[-1]["progressive/task"] == "flipped" and rows[-1]["done"] == "True"
    assert float(rows[-1]["columns/plain/forgetting"]) == 0
    assert json.loads((path / "experiment.json").read_text())["progressive"]["tasks"][1]["name"] == "flipped"


def test_a_finished_run_is_left_alone(soup: dict) -> None:
    before = (soup["run"].path / "state.json").stat().st_mtime_ns
    outcome = resume(soup["run"].path, console=Console(file=io.StringIO()))
    assert [run.path for run in outcome.runs] == [soup["run"].path] and outcome.stopped_by is None
    assert outcome.finished_before and not soup["second"].finished_before
    assert (soup["run"].path / "state.json").stat().st_mtime_ns == before


def test_a_run_whose_process_dies_is_restarted(cluster: None, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill() -> None:
        # Past the last checkpoint, so that there is something to take back.
        while not killed:
            time.sleep(0.02)
            run = RunFolder(next(iter(tmp_path.glob("runs/*/seed_0")), tmp_path))
            result = run.last_result()
            if run.checkpoints and result.get("training_iteration", 0) > run.checkpoints[-1].training_iteration:
                killed.append(result["pid"])
                os.kill(result["pid"], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    output = io.StringIO()
    plan = plan_of(SOUP.replace("num_env_steps: 20000", "num_env_steps: 1000"), tmp_path)
    (outcome,) = train([plan], storage=tmp_path / "runs", console=Console(file=output, width=200))
    assert killed and outcome.runs[0].state.status == "finished"
    assert "starting it again from its last checkpoint" in output.getvalue()
    rows = _rows(outcome.runs[0].path)
    assert [int(row["training_iteration"]) for row in rows] == list(range(1, len(rows) + 1))
    assert killed[0] not in {int(row["pid"]) for row in rows[-2:]}
    ColumnStore(outcome.runs[0].columns).verify()


def test_stop_and_failure(cluster: None, tmp_path: Path) -> None:
    """Two ordinary experiments in a file: one ends at its `stop`, the next one fails."""
    (tmp_path / "file.yaml").write_text(
        "good:\n"
        "  run: PPO\n"
        "  env: CartPole-v1\n"
        "  stop: {num_env_steps: 400}\n"
        "  config: &c {num_env_runners: 0, train_batch_size_per_learner: 200, minibatch_size: 100, num_epochs: 1}\n"
        "bad:\n"
        "  run: PPO\n"
        "  env: CartPole-v1\n"
        "  config: {<<: *c, model_config: {fcnet_hiddens: nonsense}}\n"
    )
    output = io.StringIO()
    good, bad = train(load_plans(tmp_path / "file.yaml"), storage=tmp_path / "runs", console=Console(file=output))
    assert good.runs[0].state.status == "finished" and not good.failed
    assert int(_rows(good.runs[0].path)[-1]["training_iteration"]) == 2
    assert bad.failed == bad.runs and bad.runs[0].state.status == "failed"
    assert (bad.runs[0].path / "error.txt").read_text()
    assert "failed: " in output.getvalue()


@pytest.mark.slow
def test_killed_run_goes_on(tmp_path: Path) -> None:
    """`kill -9` in the second task; the resumed run loses nothing that was finished and ends."""
    (tmp_path / "soup.yaml").write_text(SOUP.replace("num_env_runners: 0", "num_env_runners: auto"))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "rllib_pnn.cli", "train"]
    process = subprocess.Popen([*command, "-f", "soup.yaml"], cwd=tmp_path, env=environment, start_new_session=True)
    deadline = time.monotonic() + 240
    run: RunFolder | None = None
    while time.monotonic() < deadline and process.poll() is None:
        folders = list(tmp_path.glob("runs/*/seed_0"))
        run = RunFolder(folders[0]) if folders else None
        if run is not None and run.columns.is_dir() and len(run.checkpoints) == 2 and len(_rows(run.path)) > 8:
            break
        time.sleep(0.2)
    process.kill()
    process.wait()
    assert run is not None and run.state.status == "running"
    before = [entry.fingerprint for entry in ColumnStore(run.columns).entries]
    resumed = subprocess.run(
        [*command, "--resume", str(run.path)], cwd=tmp_path, env=environment, timeout=400, check=False
    )
    assert resumed.returncode == 0 and run.state.status == "finished"
    after = [entry.fingerprint for entry in ColumnStore(run.columns).entries]
    assert before and len(after) == 2 and after[: len(before)] == before
    iterations = [int(row["training_iteration"]) for row in _rows(run.path)]
    assert iterations == list(range(1, len(iterations) + 1))
