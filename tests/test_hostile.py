"""Run folders from strangers are data: nothing in them runs, is followed elsewhere or fills the memory."""

import contextlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from ray.rllib.algorithms.ppo import PPOConfig
from run_folders import write_run
from stored_columns import SOUP, soup_run

from rllib_pnn import cli
from rllib_pnn.files import RefusedFile, open_regular
from rllib_pnn.network import ColumnStore
from rllib_pnn.registration import register
from rllib_pnn.training.callback import ProgressiveCallback
from rllib_pnn.training.progressive import make_progressive


class Bomb:
    def __reduce__(self) -> tuple:
        return (os.mkdir, (os.environ["RLLIB_PNN_TEST_CRATER"],))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("hostile")
    with contextlib.chdir(base):
        run = base / soup_run(base)
    curve = [(n * 100.0, 10.0 + n, 3.0) for n in range(1, 6)]
    made = write_run(base / "made", {"plain": curve, "flipped": curve}, env="rllib_pnn/CartPoleSoup-v0")
    for name in ("result.json", "progress.csv"):
        shutil.copy(made / name, run / name)
    return run


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original.parent, tmp_path / "experiment")) / original.name


@pytest.fixture
def crater(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "crater"
    monkeypatch.setenv("RLLIB_PNN_TEST_CRATER", str(path))
    yield path
    assert not path.exists(), "code from the folder ran"


def commands(run: Path) -> dict[str, list[str]]:
    return {
        "columns": ["columns", str(run)],
        "evaluate": ["evaluate", str(run), "--episodes", "1"],
        "analyze": ["analyze", str(run), "--episodes", "1", "--out", str(run.parent / "analysis out")],
        "prune": ["prune", str(run), "--episodes", "2", "--out", str(run.parent / "pruned out")],
        "report": ["report", str(run), "-o", str(run.parent / "report.html")],
    }


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, words: str) -> None:
    assert cli.main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line, line


# -- pickles -----------------------------------------------------------------------------------------------------------

_opened: list[str] | None = None


def _audit(event: str, arguments: tuple) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str):
        _opened.append(arguments[0])


sys.addaudithook(_audit)


@contextlib.contextmanager
def opened_files() -> Iterator[list[str]]:
    global _opened
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


def test_commands_unpickle_nothing(run: Path, crater: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "checkpoint_000001").mkdir()
    for path in (
        run / "checkpoint_000001" / "algorithm_state.pkl",
        run / "checkpoint_000001" / "class_and_ctor_args.pkl",
        run / "params.pkl",
        run / "error.pkl",
        run.parent / "tuner.pkl",
        run.parent / "searcher-state.pkl",
        run / "columns" / "column_002.pt",
    ):
        path.write_bytes(pickle.dumps(Bomb()))
    (run / "state.json").write_text(
        json.dumps({"status": "stopped", "checkpoints": [{"folder": "checkpoint_000001", "training_iteration": 1}]})
    )

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a file was unpickled")

    for module, name in ((pickle, "load"), (pickle, "Unpickler"), (torch, "load"), (torch.serialization, "load")):
        monkeypatch.setattr(module, name, never)
    register()
    for name, arguments in commands(run).items():
        with opened_files() as opened:
            assert cli.main(arguments) == 0, name
        inside = {Path(path).relative_to(run).as_posix() for path in opened if Path(path).is_relative_to(run)}
        assert inside, name
        assert not {path for path in inside if path.endswith((".pkl", ".pt")) or path.startswith("checkpoint")}
    tasks = [{"name": "third", "env_config": {"variant": "permuted"}, "until": {"num_env_steps": 100}}]
    config = PPOConfig().environment("rllib_pnn/CartPoleSoup-v0")
    with opened_files() as opened:
        made = make_progressive(config, tasks=tasks, column="mlp", columns_from=run)
    assert made.rl_module_spec.model_config["progressive"]["columns_from"] == str((run / "columns").resolve())
    assert {Path(path).suffix for path in opened if Path(path).is_relative_to(run)} == {".json", ".safetensors"}


# -- code --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["evaluate", "analyze", "train"])
def test_an_environment_that_names_a_module_is_refused(
    run: Path,
    crater: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    (tmp_path / "evil_module.py").write_text(f"import os; os.mkdir({str(crater)!r})")
    monkeypatch.syspath_prepend(tmp_path)
    evil = "evil_module:rllib_pnn/CartPoleSoup-v0"
    for file in (run / "experiment.json", run / "columns" / "manifest.json"):
        file.write_text(file.read_text().replace("rllib_pnn/CartPoleSoup-v0", evil))
    (tmp_path / "evil.yaml").write_text(SOUP.replace("rllib_pnn/CartPoleSoup-v0", evil))
    arguments = commands(run).get(name, ["train", "-f", str(tmp_path / "evil.yaml")])
    refused(capsys, *arguments, words="names a module")


# -- links, pipes, sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("experiment.json", "evaluate"),
        ("experiment.json", "report"),
        ("columns/manifest.json", "columns"),
        ("columns/manifest.json", "report"),
        ("columns/column_000.safetensors", "analyze"),
        ("result.json", "report"),
        ("../plan.json", "evaluate of all"),
    ],
)
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_links_and_pipes_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, name: str, kind: str
) -> None:
    path = run / file
    moved = path.rename(tmp_path / "moved")
    if kind == "link":
        path.symlink_to(moved)
    else:
        os.mkfifo(path)
    arguments = commands(run).get(name, ["evaluate", str(run.parent)])
    if kind == "pipe" and name == "report":
        assert cli.main(arguments) in (0, 2)  # the report does without what is no file, and does not wait for it
        return
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    if kind == "link":
        assert "symbolic link, refused" in line


def test_nothing_is_written_through_a_link(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (run / "analysis").mkdir()
    (run / "analysis" / "column_001").symlink_to(elsewhere)
    refused(capsys, "analyze", str(run), "--episodes", "1", words="symbolic link, refused")
    (run / "analysis" / "column_001").unlink()
    (run / "analysis" / "column_001").mkdir()
    for name in ("afs.json", "sensitivity.png", ".afs.json.tmp"):
        (run / "analysis" / "column_001" / name).symlink_to(victim)
    assert cli.main(["analyze", str(run), "--episodes", "1"]) == 0
    assert not (run / "analysis" / "column_001" / "afs.json").is_symlink()
    assert victim.read_text() == "precious"
    assert not list(elsewhere.iterdir())
    (run / "pruned").symlink_to(elsewhere)
    refused(capsys, "prune", str(run), "--episodes", "1", words="symbolic link, refused")
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    ("file", "size", "name"),
    [
        ("experiment.json", 5 * 2**20, "evaluate"),
        ("result.json", 2**31, "report"),
        ("experiment.json", 2**31, "report"),
    ],
)
def test_large_files_are_refused_unread(
    run: Path, capsys: pytest.CaptureFixture[str], file: str, size: int, name: str
) -> None:
    os.truncate(run / file, size)
    refused(capsys, *commands(run)[name], words=f"{size} bytes, expected at most")


def test_a_plan_does_not_lead_out_of_its_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = json.loads((run.parent / "plan.json").read_text())
    for name in ("../elsewhere", "/etc", "a/b", "..", ".", ""):
        (run.parent / "plan.json").write_text(json.dumps(plan | {"runs": [name]}))
        refused(capsys, "columns", str(run.parent), words="plan.json: damaged")


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    with open_regular(tmp_path / "file", 5) as file:
        assert file.read() == b"12345"
    with pytest.raises(RefusedFile, match="5 bytes, expected at most 4"):
        open_regular(tmp_path / "file", 4)
    with pytest.raises(RefusedFile, match="not a regular file"):
        open_regular(tmp_path, 4)
    with pytest.raises(RefusedFile, match="not a regular file"):
        open_regular(Path("/dev/zero"), 4)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none", 4)


# -- markup ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["<script>alert(1)</script>", "{{ 7*7 }}", "$\\frac$", "\ud800", "a\x00b", "'\"><b>"])
def test_the_report_shows_markup_as_text(run: Path, word: str) -> None:
    for file in (run / "result.json", run / "experiment.json"):
        file.write_text(file.read_text().replace("flipped", json.dumps(word)[1:-1]))
    assert cli.main(["report", str(run), "-o", str(run.parent / "report.html")]) == 0
    page = (run.parent / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<b>" not in page.replace("<b>Not read:</b>", "").replace("<b>above", "")
    assert ">49<" not in page


@pytest.mark.parametrize("word", ["[/]", "[bold]x", "\x1b]0;owned\x07", "\u202e", ":smile:", "a\nb"])
def test_the_terminal_shows_names_as_text(run: Path, capsys: pytest.CaptureFixture[str], word: str) -> None:
    file = run / "columns" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["columns"][0] |= {"task": word, "env_config": {word: word}}
    file.write_text(json.dumps(manifest))
    assert cli.main(["columns", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "".join(c if c.isprintable() else "?" for c in word) in shown
    assert shown.replace("\n", "").isprintable()
    assert cli.main(["analyze", str(run), "--column", f"no{word}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()


# -- storage that is no local folder -----------------------------------------------------------------------------------


def test_columns_go_to_other_storage_and_come_back(run: Path, tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    bucket = SubTreeFileSystem(str(tmp_path / "bucket"), LocalFileSystem())
    storage = SimpleNamespace(trial_dir_name="trial", storage_filesystem=bucket, trial_fs_path="runs/trial")

    def callback(logdir: Path) -> tuple[ProgressiveCallback, SimpleNamespace]:
        algorithm = SimpleNamespace(_storage=storage, logdir=str(logdir))
        made = ProgressiveCallback()
        made._settings = {}
        made._store = made._open_store(algorithm)
        return made, algorithm

    first, algorithm = callback(tmp_path / "first node")
    assert first._store.entries == []
    shutil.copytree(run / "columns", first._store.path)
    first._upload(algorithm)
    second, _ = callback(tmp_path / "second node")
    assert second._store.load().fingerprints() == ColumnStore(run / "columns").load().fingerprints()


def test_a_uri_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "soup.yaml").write_text(SOUP)
    with contextlib.chdir(tmp_path):
        refused(
            capsys,
            "train",
            "-f",
            "soup.yaml",
            "--storage",
            "s3://bucket/runs",
            words="s3:/bucket/runs: expected a folder",
        )
        assert not (tmp_path / "s3:").exists()
