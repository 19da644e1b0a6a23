"""The `rllib` command: what it prints, its exit codes, and that it works from an installed wheel."""

import importlib.metadata
import json
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stored_columns import SOUP, soup_run

from rllib_pnn import __version__, cli
from rllib_pnn.experiment import run as run_module
from rllib_pnn.experiment.errors import RunFailed
from rllib_pnn.experiment.folder import RunFolder, create_experiment, edited, make_folder, open_transfer
from rllib_pnn.experiment.run import Outcome
from rllib_pnn.experiment.spec import Plan, load_plans
from rllib_pnn.network import ColumnStore
from rllib_pnn.training import evaluation

CHECKOUT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def rllib(capsys: pytest.CaptureFixture[str]):
    """Runs the command; returns its exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def test_help(rllib) -> None:
    code, out, _ = rllib("--help")
    assert code == 0 and "Train and examine Progressive Neural Networks" in out
    for command in ("train", "evaluate", "columns", "example"):
        assert re.search(rf"^\s*{command}\s", out, re.M), command


@pytest.mark.parametrize("installed", [True, False])
def test_version(installed: bool, rllib, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def others(name: str) -> str:
        if name == "rllib_pnn":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    if not installed:  # on PYTHONPATH
        monkeypatch.setattr(importlib.metadata, "version", others)
    code, out, _ = rllib("--version")
    assert code == 0 and re.fullmatch(r"rllib_pnn \S+, ray 2\.\S+, torch \S+, gymnasium \S+\n", out)
    assert out.startswith(f"rllib_pnn {__version__}, ")


def test_a_run_that_nothing_stops_is_told(rllib, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a:\n  run: PPO\n  env: CartPole-v1\n"
    monkeypatch.setattr(run_module, "train", lambda plans, **_: iter([]))
    (folder / "a.yaml").write_text(text)
    assert "a: has no `stop`: trains until Ctrl-C" in rllib("train", "-f", "a.yaml")[1]
    (folder / "a.yaml").write_text(text + "  stop: {training_iteration: 1}\n")
    assert "Ctrl-C" not in rllib("train", "-f", "a.yaml")[1]


@pytest.mark.parametrize(
    "arguments", [("-f", "soup.yaml"), ("--file", "soup.yaml"), ("file", "soup.yaml"), ("soup.yaml",)]
)
def test_ways_to_name_a_file(arguments: tuple[str, ...], rllib, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "soup.yaml").write_text(SOUP)
    asked: dict[str, Any] = {}

    def train(plans: list[Plan], **keywords: Any) -> Iterator[Outcome]:
        asked.update(keywords, plans=plans)
        return iter(())

    monkeypatch.setattr(run_module, "train", train)
    assert rllib("train", *arguments, "--storage", "x", "--ray-address", "auto")[0] == 0
    assert [plan.name for plan in asked["plans"]] == ["soup"]
    assert (asked["storage"], asked["ray_address"], asked["verbose"]) == (Path("x"), "auto", False)


@pytest.mark.parametrize(
    ("status", "stopped_by", "code", "last_line"),
    [
        ("finished", None, 0, r"Next:  rllib evaluate runs/soup_.*/seed_0"),
        ("failed", None, 1, r"Once that is mended:  rllib train --resume runs/soup_.*/seed_0"),
        ("stopped", signal.SIGINT, 130, r"Stopped. Go on with:  rllib train --resume runs/soup_.*/seed_0"),
    ],
)
def test_outcomes(
    status: Any, stopped_by: int | None, code: int, last_line: str, rllib, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = RunFolder(soup_run(folder))
    stored.set_status(status)
    monkeypatch.setattr(run_module, "train", lambda *_, **__: iter([Outcome(stored.path.parent, [stored], stopped_by)]))
    found, out, err = rllib("train", "-f", "soup.yaml")
    assert found == code
    assert re.fullmatch(last_line, out.splitlines()[-1])
    assert re.search(r"seed_0 +flipped +1 +- +- +[0-9a-f]{12}", out)
    assert ("error.txt" in err) == (status == "failed")


def test_chosen_trials(rllib, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transfer = "  transfer: {sources: [plain], targets: [flipped], architectures: [scratch, progressive]}\n"
    (folder / "soup.yaml").write_text(SOUP + transfer)
    path = folder / "runs" / "soup"
    (plan,) = load_plans("soup.yaml")
    open_transfer(make_folder(path), plan)
    source, scratch = (RunFolder(path / f"{name}_seed_0") for name in ("source_plain", "flipped_scratch"))
    go_on = "rllib train -f soup.yaml --storage runs --only '*scratch*' --only '*source*'"

    def last_lines(outcome: Outcome, code: int) -> list[str]:
        def train(plans: list[Plan], **_: Any) -> Iterator[Outcome]:
            assert [list(plan.chosen) for plan in plans] == [[source.path.name, scratch.path.name]]
            yield outcome

        monkeypatch.setattr(run_module, "train", train)
        found, out, _ = rllib("train", "-f", "soup.yaml", "--only", "*scratch*", "--only", "*source*")
        assert found == code
        return out.splitlines()

    assert last_lines(Outcome(path, [source, scratch], signal.SIGINT), 130) == [f"Stopped. Go on with:  {go_on}"]
    scratch.set_status("failed")
    assert last_lines(Outcome(path, [source, scratch]), 1) == [f"Once that is mended:  {go_on}"]
    scratch.set_status("finished")
    done, following = last_lines(Outcome(path, [source, scratch]), 0)
    assert done == "Done. Run folder: runs/soup" and following.startswith("Next:  rllib train --resume runs/soup  ")
    repeated = last_lines(Outcome(path, [source, scratch], finished_before=True), 0)
    assert "remove its folder" in repeated[0] and repeated[1].startswith("Finished before")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("soup:", "# changed\nsoup:", None),
        ("learner: 500", "learner: 600", "config.train_batch_size_per_learner is 600 there by now, here 500; "),
        ("      - {name: flipped", "#", "progressive.tasks[1] {'name': 'flipped', "),
        ("500}}\n", "500}}\n      - {name: third, until: {num_env_steps: 9}}\n", "tasks[2] {'name': 'third', "),
        ("config: {num", "config: {seed: 3, num", "config.seed is 3 there by now, here 0; "),
        ("  config: {", "  num_samples: 2\n  config: {", "seed_1 {"),
        ("column: mlp", "colum: mlp", "soup.progressive.colum: unknown key; did you mean 'column'?; "),
        ("column: mlp", "column: mlp\n    columns_from: x", "progressive.columns_from 'x' is new there; "),
        ("soup:", "other:", None),
    ],
)
def test_resuming_tells_what_was_edited(old: str, new: str, words: str | None, rllib, folder: Path) -> None:
    stored = soup_run(folder)
    RunFolder(stored).set_status("finished")
    text = new.join(SOUP.rsplit(old, 1))
    assert text != SOUP
    (folder / "soup.yaml").write_text(text)
    code, out, err = rllib("train", "--resume", stored.parent)
    *told, done, following = out.splitlines()
    assert (code, err) == (0, "")
    assert done.startswith("Finished before, nothing is left to train. Run folder: runs/soup_")
    assert following.startswith("Next:  rllib evaluate ")
    assert len(told) == (words is not None)
    if words is not None:
        assert told[0].startswith(f"{folder / 'soup.yaml'}:") and words in told[0]
        assert "the run keeps its own settings" in told[0]


def test_resuming_with_a_file(rllib, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = soup_run(folder)
    RunFolder(stored).set_status("finished")
    (folder / "mine.yaml").write_text(SOUP.replace("learner: 500", "learner: 600"))
    code, out, err = rllib("train", "-f", "mine.yaml", "--resume", stored)
    assert (code, err) == (0, "")
    assert out.startswith("mine.yaml: config.train_batch_size_per_learner is 600 there by now")
    assert rllib("train", "-f", "soup.yaml", "--resume", stored)[1].startswith("Finished before")
    # A run may be named as it is in the storage.
    assert rllib("train", "--storage", "runs", "--resume", stored.relative_to("runs"))[1].startswith("Finished before")


@pytest.mark.parametrize("arguments", [(), ("example",)])
def test_without_a_command_there_is_help(arguments: tuple[str, ...], rllib) -> None:
    code, out, err = rllib(*arguments)
    assert code == 2 and out == ""
    assert err.lstrip().startswith(" ".join(["Usage: rllib", *arguments])) and err.count("\n") > 5


def test_where_columns_came_from_is_no_edit(folder: Path) -> None:
    stored = soup_run(folder)
    for given in (stored, stored.parent, stored.absolute(), Path("..") / folder.name / stored):
        text = SOUP.replace("column: mlp", f"column: mlp\n    columns_from: {given}")
        (folder / "next.yaml").write_text(text)
        plan = run_module._with_sources(load_plans("next.yaml")[0])
        path = create_experiment(folder / "runs", plan)
        assert edited(path, plan) is None
        (folder / "next.yaml").write_text(text.replace(f"columns_from: {given}", "columns_from: elsewhere"))
        assert "progressive.columns_from is 'elsewhere' there by now, here '/" in str(edited(path, plan))


def test_a_run_that_can_not_start(rllib, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any, **__: Any) -> Iterator[Outcome]:
        raise RunFailed("Ray does not start: no ports left")

    monkeypatch.setattr(run_module, "train", train)
    (folder / "soup.yaml").write_text(SOUP)
    assert rllib("train", "-f", "soup.yaml") == (1, "", "rllib: error: Ray does not start: no ports left\n")


@pytest.mark.parametrize("part", ["", "seed_0", "seed_0/columns"])
def test_columns(part: str, rllib, folder: Path) -> None:
    stored = soup_run(folder)
    code, out, _ = rllib("columns", stored.parent / part)
    assert code == 0 and "2 columns, fingerprints verified" in out
    for index, entry in enumerate(ColumnStore(stored / "columns").entries):
        row = rf"^ +{index} +{entry.task} .*rllib_pnn/CartPoleSoup-v0 variant={entry.task} +{entry.fingerprint[:12]}"
        assert re.search(row, out, re.M)


def test_columns_of_runs_that_have_some(rllib, folder: Path) -> None:
    (folder / "soup.yaml").write_text(SOUP)
    stored = soup_run(folder)
    text = (stored.parent / "plan.json").read_text()
    (stored.parent / "plan.json").write_text(text.replace('"seed_0"', '"seed_0", "seed_1"'))
    shutil.copytree(stored, stored.parent / "seed_1", ignore=shutil.ignore_patterns("columns"))
    code, out, _ = rllib("columns", stored.parent)
    assert code == 0 and "seed_0/columns: 2 columns" in out and "seed_1" not in out
    shutil.rmtree(stored / "columns")
    code, _, err = rllib("columns", stored.parent)
    assert code == 2 and "no column is frozen yet" in err


def test_evaluate_columns_that_came_from_another_run(rllib, folder: Path) -> None:
    stored = soup_run(folder)
    manifest, experiment = stored / "columns" / "manifest.json", stored / "experiment.json"
    data, plan = json.loads(manifest.read_text()), json.loads(experiment.read_text())
    data["columns"][0] |= {"task": "elsewhere:plain", "extra": {"source": "elsewhere"}}
    manifest.write_text(json.dumps(data))
    tasks = plan["progressive"]["tasks"]
    tasks.remove(next(task for task in tasks if task["name"] == "plain"))
    experiment.write_text(json.dumps(plan))
    code, out, err = rllib("evaluate", stored, "--episodes", 2)
    assert (code, err) == (0, "")
    assert {task: k for task, (k, _) in _returns(out).items()} == {
        "plain": "0",
        "flipped": "1",
    }
    assert rllib("evaluate", stored, "--task", "plain", "--episodes", 2)[0] == 0
    tasks.append({"name": "plain", "env_config": {"variant": "permuted"}, "until": {"num_env_steps": 9}})
    experiment.write_text(json.dumps(plan))
    _, out, _ = rllib("evaluate", stored, "--episodes", 2)
    assert {task: k for task, (k, _) in _returns(out).items()} == {"elsewhere:plain": "0", "flipped": "1"}


def _returns(out: str) -> dict[str, tuple[str, float]]:
    """Column and return of every task in the table of `rllib evaluate`."""
    rows = [line.split() for line in out.splitlines()[1:]]
    return {row[0]: (row[1], float(row[3])) for row in rows}


def test_evaluate_every_column_on_its_own_task(rllib, folder: Path) -> None:
    stored = soup_run(folder)
    code, out, _ = rllib("evaluate", stored, "--episodes", 3)
    assert code == 0
    assert {task: column for task, (column, _) in _returns(out).items()} == {"plain": "0", "flipped": "1"}
    assert all(8 <= value <= 200 for _, value in _returns(out).values())  # untrained, but not nothing
    assert rllib("evaluate", stored.parent, "--episodes", 3)[1] == out
    assert rllib("evaluate", stored, "--episodes", 3, "--seed", 1)[1] != out


def test_evaluate_as_json_says_what_the_table_says(rllib, folder: Path) -> None:
    stored = soup_run(folder)
    _, table, _ = rllib("evaluate", stored, "--episodes", 3)
    code, out, err = rllib("evaluate", stored, "--episodes", 3, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "") and (found["seed"], found["deterministic"]) == (0, False)
    entries = ColumnStore(stored / "columns").entries
    for result, entry, (task, (column, mean)) in zip(found["results"], entries, _returns(table).items(), strict=True):
        assert (result["task"], str(result["column"]), result["fingerprint"]) == (task, column, entry.fingerprint)
        assert len(result["returns"]) == 3 and result["return_at_freezing"] == entry.score
        assert mean == pytest.approx(sum(result["returns"]) / 3, abs=0.005) == pytest.approx(result["return_mean"])
        assert result["lengths"] == [int(value) for value in result["returns"]]  # CartPole pays 1 a step


def test_columns_as_json(rllib, folder: Path) -> None:
    stored = soup_run(folder)
    columns = json.loads((stored / "columns" / "manifest.json").read_text())["columns"]
    code, out, err = rllib("columns", stored, "--json")
    (found,) = json.loads(out)["stores"]
    assert (code, err, found["store"]) == (0, "", str(stored / "columns"))
    assert [c | given for c, given in zip(found["columns"], columns, strict=True)] == found["columns"]
    column = stored / "columns" / columns[0]["file"]
    column.write_bytes(column.read_bytes()[:-1] + b"x")
    code, out, err = rllib("columns", stored, "--json")
    assert code == 2 and out == "" and "fingerprint" in err


def test_evaluate_any_column_on_any_task(rllib, folder: Path) -> None:
    stored = soup_run(folder)
    _, out, _ = rllib("evaluate", stored, "--task", "flipped", "--column", 0, "--episodes", 2)
    assert {task: column for task, (column, _) in _returns(out).items()} == {"flipped": "0"}
    _, out, _ = rllib("evaluate", stored, "--column", -1, "--episodes", 2, "--deterministic")
    assert {task: column for task, (column, _) in _returns(out).items()} == {"plain": "1", "flipped": "1"}


def test_evaluate_without_naming_the_task(rllib, folder: Path) -> None:
    stored = soup_run(folder)  # a store that knows nothing of observations
    code, out, _ = rllib("evaluate", stored, "--task", "auto", "--episodes", 5)
    announced, first, second, *_ = out.splitlines()
    assert code == 0 and announced.endswith("of column 0, 1: 16 episodes of each are played first")
    assert first.startswith("plain: ") and second.startswith("flipped: ") and second.endswith("1 are measured")
    assert re.search(r"^plain +5 +0 +100 ", out, re.M) and re.search(r"^flipped +0 +5 +100 ", out, re.M)
    assert "right in 10 of 10 episodes (100.0 %)" in out and "can't be told apart" not in out
    code, out, err = rllib("evaluate", stored, "--task", "auto", "--episodes", 5, "--json")
    found = json.loads(out)
    assert code == 0 and err.startswith("the store says nothing") and (found["right"], found["episodes"]) == (10, 10)
    assert [result["chosen"] for result in found["results"]] == [{"plain": 5, "flipped": 0}, {"plain": 0, "flipped": 5}]
    assert found["confused"] == []


def test_what_takes_long_is_announced_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation, "evaluate_column", lambda *_, **__: pytest.fail("plays"))
    with pytest.raises(pytest.fail.Exception, match="plays"):
        cli.main(["evaluate", str(soup_run(folder)), "--task", "auto"])
    assert "16 episodes of each are played first" in capsys.readouterr().out


def test_tasks_that_look_alike_are_said_to(rllib, folder: Path) -> None:
    stored = soup_run(folder)
    manifest = stored / "columns" / "manifest.json"
    alike = {"count": 9, "mean": "0 0 0 0", "std": "1 1 1 1"}
    data = json.loads(manifest.read_text())
    for entry in data["columns"]:
        entry["extra"]["first_observations"] = alike
    manifest.write_text(json.dumps(data))
    code, out, _ = rllib("evaluate", stored, "--task", "auto", "--episodes", 2)
    assert code == 0 and "measured" not in out
    assert "right in 2 of 4 episodes" in out
    assert "plain and flipped can't be told apart by their first observations" in out


def test_statistics_of_other_observations_are_measured_anew(rllib, folder: Path) -> None:
    stored = soup_run(folder)
    manifest = stored / "columns" / "manifest.json"
    data = json.loads(manifest.read_text())
    data["columns"][0]["extra"]["first_observations"] = {"count": 9, "mean": "0 0", "std": "1 1"}
    manifest.write_text(json.dumps(data))
    code, out, _ = rllib("evaluate", stored, "--task", "auto", "--episodes", 2)
    assert code == 0 and "of column 0, 1: 16 episodes of each" in out and "right in 4 of 4 episodes" in out


@pytest.mark.parametrize("wrong", [{"count": 9, "mean": "0 0"}, {"count": 9, "mean": "0 0", "std": "1"}, "nothing"])
def test_damaged_statistics_of_observations(wrong: Any, rllib, folder: Path) -> None:
    stored = soup_run(folder)
    manifest = stored / "columns" / "manifest.json"
    data = json.loads(manifest.read_text())
    data["columns"][0]["extra"]["first_observations"] = wrong
    manifest.write_text(json.dumps(data))
    code, _, err = rllib("evaluate", stored, "--task", "auto")
    assert code == 2 and err.count("\n") == 1 and "columns" in err


def test_auto_and_a_column_contradict(rllib, folder: Path) -> None:
    code, _, err = rllib("evaluate", soup_run(folder), "--task", "auto", "--column", 1)
    assert code == 2 and "--task auto chooses the column itself" in err


def test_a_single_episode_has_no_standard_error(rllib, folder: Path) -> None:
    code, out, _ = rllib("prune", soup_run(folder), "--column", "flipped", "--episodes", 1)
    assert code == 0 and re.search(r"^ *return over 1 episode +[0-9.]+ \+- - +[0-9.]+ \+- -\s*$", out, re.M), out


@pytest.fixture
def python_run(folder: Path) -> Path:
    """What `make_progressive(...).build_algo()` leaves: columns, and nothing of `rllib train`."""
    shutil.copytree(soup_run(folder) / "columns", folder / "python" / "columns")
    return Path("python")


@pytest.mark.parametrize("part", ["", "columns"])
def test_columns_of_a_run_from_python(part: str, rllib, folder: Path, python_run: Path) -> None:
    stored = next(Path("runs").glob("*/seed_0"))
    code, out, _ = rllib("columns", python_run / part)
    assert code == 0 and out.startswith("python/columns: 2 columns, fingerprints verified")
    evaluated = rllib("evaluate", python_run / part, "--episodes", 2)
    assert evaluated == rllib("evaluate", stored, "--episodes", 2) and evaluated[0] == 0
    code, out, _ = rllib("evaluate", python_run / part, "--task", "auto", "--episodes", 2)
    assert code == 0 and "right in 4 of 4 episodes" in out
    code, out, _ = rllib("analyze", python_run / part, "--episodes", 1)
    assert code == 0 and "wrote python/analysis/column_001/afs.json" in out
    code, out, _ = rllib("prune", python_run / part, "--episodes", 1)
    assert code == 0 and "wrote python/pruned/column_001" in out
    assert sorted(path.name for path in python_run.iterdir()) == ["analysis", "columns", "pruned"]


def test_a_store_of_another_name_keeps_what_is_made_of_it(rllib, folder: Path) -> None:
    shutil.copytree(soup_run(folder) / "columns", folder / "store")
    code, out, _ = rllib("analyze", "store", "--episodes", 1)
    assert code == 0 and "wrote store/analysis/column_001/afs.json" in out


def test_what_a_run_from_python_does_not_have(rllib, folder: Path, python_run: Path) -> None:
    code, _, err = rllib("report", python_run)
    assert code == 2 and "python: no experiment.json here or below, python/columns is a column store" in err
    code, _, err = rllib("train", "--resume", python_run)
    assert code == 2 and "python/columns is a column store, which `columns_from` of a new run takes" in err


@pytest.mark.parametrize("command", ["evaluate", "evaluate --task auto", "analyze", "prune"])
@pytest.mark.parametrize(
    ("env", "words"),
    [
        ("evil_module:CartPole-v1", "names a module"),
        ("mine/Mine-v0", "Namespace mine not found"),
        (None, "environment"),
    ],
)
def test_environments_that_the_command_can_not_make(
    env: str | None, words: str, command: str, rllib, folder: Path, python_run: Path
) -> None:
    manifest = python_run / "columns" / "manifest.json"
    data = json.loads(manifest.read_text())
    for entry in data["columns"]:
        entry["env"] = env
    manifest.write_text(json.dumps(data))
    name, *options = command.split()
    code, _, err = rllib(name, python_run, *options, "--episodes", 1)
    assert code == 2 and err.count("\n") == 1 and words in err, err


def test_several_runs_from_python(rllib, folder: Path, python_run: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(python_run, folder / "trials" / name)
    for command in ("columns", "evaluate", "analyze"):
        code, _, err = rllib(command, "trials")
        assert code == 2 and "trials: holds 2 runs, choose one: trials/a, trials/b" in err


def test_examples(rllib) -> None:
    code, out, _ = rllib("example", "list")
    assert code == 0
    for path in (CHECKOUT / "tuned_examples").glob("*.yaml"):
        assert re.search(rf"^{path.stem} +\w", out, re.M)
        assert rllib("example", "show", path.stem) == (0, path.read_text(), "")


def test_installed_wheel(folder: Path) -> None:
    """The package brings its examples along, every part of itself, and nothing else."""
    source = folder / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", "docs", "build", "*.egg-info")
    shutil.copytree(CHECKOUT, source, ignore=ignored)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.startswith(f"rllib_pnn-{__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(folder / "installed")
    expected = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "rllib_pnn").rglob("*.py")}
    expected |= {f"rllib_pnn/tuned_examples/{path.name}" for path in (CHECKOUT / "tuned_examples").glob("*.yaml")}
    assert {name for name in names if name.endswith((".py", ".yaml"))} == expected
    program = "import sys; sys.path.insert(0, 'installed'); from rllib_pnn import cli; print(cli.__file__); cli.main()"
    arguments = ["example", "show", "cartpole_soup"]
    shown = subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True, text=True)
    first, _, rest = shown.stdout.partition("\n")
    assert first.startswith(str(folder / "installed"))
    assert rest == (CHECKOUT / "tuned_examples" / "cartpole_soup.yaml").read_text()
