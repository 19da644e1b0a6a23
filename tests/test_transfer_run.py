"""A transfer experiment end to end on CartPole Soup: stopped, gone on with, done again, and one whose source fails."""

import io
import json
import os
import re
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import ray
from rich.console import Console

from rllib_pnn.analysis.runs import read_run
from rllib_pnn.experiment import run as run_module
from rllib_pnn.experiment.environment import prepare_ray
from rllib_pnn.experiment.errors import InputError
from rllib_pnn.experiment.folder import ResultLog, RunFolder, find_runs
from rllib_pnn.experiment.run import ray_session as connected
from rllib_pnn.experiment.run import resume, train
from rllib_pnn.experiment.spec import Plan, choose, load_plans
from rllib_pnn.network import ColumnStore
from rllib_pnn.training.recognition import Statistics

# A process that was started in the background without a terminal ignores Ctrl-C, and the command respects that.
STOP = signal.SIGTERM if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else signal.SIGINT

FILE = """\
soup:
  run: PPO
  env: rllib_pnn/CartPoleSoup-v0
  checkpoint_config: {checkpoint_frequency: 1, num_to_keep: 1}
  config:
    num_env_runners: 0
    num_envs_per_env_runner: 4
    train_batch_size_per_learner: 128
    minibatch_size: 128
    num_epochs: 1
  progressive:
    column: [{dense: 8}]
    evaluation_episodes: 2
    tasks:
      - {name: plain, env_config: {variant: plain}, until: {num_env_steps: 256}}
      - {name: flipped, env_config: {variant: flipped}, until: {num_env_steps: 512}}
      - {name: scaled, env_config: {variant: scaled}, until: {num_env_steps: 512}}
  transfer:
    sources: [[plain, flipped]]
    targets: [scaled]
    architectures: [scratch, progressive]
"""
TRIALS = [
    "source_plain_seed_0",
    "source_plain+flipped_seed_0",
    "scaled_scratch_seed_0",
    "plain+flipped_to_scaled_progressive_seed_0",
]
TARGET = TRIALS[-1]


def plan_of(text: str, folder: Path) -> Plan:
    (folder / "file.yaml").write_text(text)
    (plan,) = load_plans(folder / "file.yaml")
    return plan


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    prepare_ray(verbose=False)
    if ray.is_initialized():
        yield
        return
    with connected(None, verbose=False):
        yield


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "result.json").read_text().splitlines()]


@pytest.fixture(scope="module")
def soup(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Stopped in the middle of the chain's second column, then the same again, and again."""
    folder = tmp_path_factory.mktemp("transfer")
    plan, path = plan_of(FILE, folder), folder / "runs" / "soup"
    append, stopping = ResultLog.append, []

    def interrupt(log: ResultLog, line: str, row: Mapping) -> None:
        append(log, line, row)
        if row["progressive/task"] == "flipped" and not stopping:
            stopping.append(True)
            os.kill(os.getpid(), STOP)

    def once() -> tuple[run_module.Outcome, str]:
        output = io.StringIO()
        (outcome,) = train([plan], storage=folder / "runs", console=Console(file=output, width=200))
        return outcome, output.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResultLog, "append", interrupt)
        stopped, stopped_output = once()
    states = {run.path.name: run.state.status for run in stopped.runs}
    before = {
        name: (path / name / "result.json").read_bytes() for name in TRIALS if (path / name / "result.json").exists()
    }
    report_at_stop = (path / "report.html").exists()
    second, second_output = once()
    after = {name: (path / name / "result.json").read_bytes() for name in TRIALS}
    third_time, third_output = once()
    return {
        "path": path, "stopped": stopped, "states": states, "before": before, "report_at_stop": report_at_stop,
        "second": second, "after": after, "third": third_time,
        "outputs": (stopped_output, second_output, third_output),
    }  # fmt: skip


def test_a_stopped_grid_says_where_it_stands(soup: dict) -> None:
    stopped, states, output = soup["stopped"], soup["states"], soup["outputs"][0]
    assert stopped.stopped_by == STOP and stopped.conclusion is None and not soup["report_at_stop"]
    # Whether scratch, which waits for nothing, is over by then depends on how many CPUs there are.
    assert states.pop("scaled_scratch_seed_0") in ("finished", "stopped", "waiting")
    assert states == {TRIALS[0]: "finished", TRIALS[1]: "stopped", TARGET: "waiting"}
    assert "2 sources, 2 trials" in output
    assert re.search(r"[23]/4  source_plain\+flipped_seed_0 ", output) and re.search(
        r"[12] of 4 finished, < \d", output
    )


def test_nothing_finished_is_repeated_and_a_half_done_trial_goes_on(soup: dict) -> None:
    for name, before in soup["before"].items():
        after = soup["after"][name]
        if name == TRIALS[1]:
            assert after.startswith(before) and len(after) > len(before)
            assert f"{name}: goes on after iteration" in soup["outputs"][1]
        if name == TRIALS[0]:
            assert after == before and f"  {name} " not in soup["outputs"][1]
    for name in TRIALS:
        iterations = [row["training_iteration"] for row in rows(soup["path"] / name)]
        assert iterations == list(range(1, len(iterations) + 1))
    assert "of all finished before" in soup["outputs"][1]
    assert all(run.state.status == "finished" for run in soup["second"].runs)


def test_the_same_again_when_all_is_done_trains_nothing(soup: dict) -> None:
    assert {name: (soup["path"] / name / "result.json").read_bytes() for name in TRIALS} == soup["after"]
    assert soup["third"].conclusion.report == soup["path"] / "report.html"
    assert "sensitivity" in soup["outputs"][1] and "sensitivity" not in soup["outputs"][2]


def test_a_source_has_one_fingerprint_throughout(soup: dict) -> None:
    path = soup["path"]
    columns = {name: ColumnStore(path / name / "columns").entries for name in TRIALS}
    fingerprints = [entry.fingerprint for entry in columns[TARGET]]
    assert len(set(fingerprints)) == 3
    assert [e.fingerprint for e in columns["source_plain+flipped_seed_0"]] == fingerprints[:2]
    assert [e.fingerprint for e in columns["source_plain_seed_0"]] == fingerprints[:1]
    assert [(e.task, bool(e.extra.get("source"))) for e in columns[TARGET]] == [
        ("columns:plain", True), ("columns:flipped", True), ("scaled", False),
    ]  # fmt: skip
    assert len(columns["scaled_scratch_seed_0"]) == 1
    for entry in columns[TARGET]:  # noted at freezing, and taken along
        assert Statistics.from_json(entry.extra["first_observations"]).mean.shape == (4,)


def test_what_the_report_makes_of_it(soup: dict) -> None:
    path, conclusion = soup["path"], soup["second"].conclusion
    assert conclusion.problems == []
    (table,) = conclusion.tables
    assert [(row["method"], row["runs"]) for row in table["rows"]] == [
        ("Baseline 1: scratch", 1),
        ("Progressive, 3 columns", 1),
    ]
    assert (path / TARGET / "analysis" / "column_002" / "afs.json").is_file()
    (data,) = json.loads((path / "report.json").read_text())["tables"]
    assert [target["target"] for target in data["targets"]] == ["scaled"]  # sources are not scored
    text = (path / "report.html").read_text()
    assert "plain + flipped" in text and str(path) not in text
    (task,) = read_run(path / TARGET).tasks
    assert (task.method, task.sources) == ("progressive_3", ("plain", "flipped"))


def test_one_trial_alone(soup: dict) -> None:
    """A cell is repeated by removing its folder's state and resuming it."""
    run = RunFolder(soup["path"] / TARGET)
    outcome = resume(run.path, console=Console(file=io.StringIO()))
    assert [r.path.name for r in outcome.runs] == [TARGET] and outcome.conclusion is not None
    assert len(find_runs(soup["path"])) == 4


def test_other_settings_are_refused_before_anything_starts(soup: dict, tmp_path: Path) -> None:
    plan = plan_of(FILE.replace("num_epochs: 1", "num_epochs: 2"), tmp_path)
    with pytest.raises(InputError, match=r"was trained with config\.num_epochs 1, the file says 2"):
        list(train([plan], storage=soup["path"].parent, console=Console(file=io.StringIO())))


def test_chosen_trials_leave_the_others_as_they_are(cluster: None, tmp_path: Path) -> None:
    plan = plan_of(FILE.replace("512", "128").replace("256", "128"), tmp_path)
    path = tmp_path / "runs" / "soup"

    def once(*patterns: str) -> tuple[run_module.Outcome, dict[str, str], str]:
        output = io.StringIO()
        plans = choose([plan], patterns) if patterns else [plan]
        (outcome,) = train(plans, storage=path.parent, console=Console(file=output, width=200))
        assert outcome.stopped_by is None and not outcome.failed
        return outcome, {name: RunFolder(path / name).state.status for name in TRIALS}, output.getvalue()

    source, chain, scratch, target = TRIALS
    outcome, states, output = once("*+flipped_seed_0")
    assert states == {source: "finished", chain: "finished", scratch: "waiting", target: "waiting"}
    assert [run.path.name for run in outcome.runs] == [source, chain]  # one that it waits for comes first
    assert "2 sources, 0 trials" in output and "2 of 2 finished" in output
    assert outcome.conclusion is None and not (path / "report.html").exists()
    before = {name: (path / name / "result.json").read_bytes() for name in (source, chain)}

    outcome, states, output = once("*_scratch_*")
    assert states == {source: "finished", chain: "finished", scratch: "finished", target: "waiting"}
    assert [run.path.name for run in outcome.runs] == [scratch]
    assert outcome.conclusion is None and not outcome.finished_before
    again, _, _ = once("*_scratch_*")
    assert again.finished_before and again.conclusion is None

    outcome, states, output = once()  # the whole file goes on
    assert set(states.values()) == {"finished"} and "3 of all finished before" in output
    assert outcome.conclusion is not None and (path / "report.html").exists()
    assert {name: (path / name / "result.json").read_bytes() for name in before} == before
    repeated, _, _ = once(target)
    assert repeated.conclusion is not None and repeated.conclusion.problems == []  # of all, for all are finished


def test_what_waits_for_a_failed_source_is_not_started(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source's config can't be made any more when its turn comes; scratch is trained all the same."""
    make = run_module.make_config
    calls: list[str] = []

    def fails(plan: Plan, experiment, *arguments, **keywords):  # type: ignore[no-untyped-def]
        calls.append(experiment.progressive.tasks[0].name)
        if calls.count("plain") == 2:  # the first is the check before the start
            calls.append("plain")
            raise InputError("file.yaml:1: no such thing")
        return make(plan, experiment, *arguments, **keywords)

    monkeypatch.setattr(run_module, "make_config", fails)
    output = io.StringIO()
    plan = plan_of(FILE.replace("512", "128").replace("256", "128"), tmp_path)
    (outcome,) = train([plan], storage=tmp_path / "runs", console=Console(file=output, width=200))
    assert {run.path.name: run.state.status for run in outcome.runs} == {
        "source_plain_seed_0": "failed",
        "source_plain+flipped_seed_0": "waiting",
        "scaled_scratch_seed_0": "finished",
        TARGET: "waiting",
    }
    assert "source_plain_seed_0: failed: file.yaml:1: no such thing" in output.getvalue()
    assert "no such thing" in (tmp_path / "runs" / "soup" / "source_plain_seed_0" / "error.txt").read_text()
    assert outcome.conclusion is not None and outcome.conclusion.report is not None
