"""The chaos run notices what it looks for. (The run itself is `make chaos`.)"""

import argparse
import contextlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from run_folders import write_run
from stored_columns import soup_run

ROOT = Path(__file__).parent.parent
TASKS = ["plain", "flipped"]


@pytest.fixture(scope="module")
def chaos() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chaos", ROOT / "benchmarks" / "chaos.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chaos"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(chaos: ModuleType, tmp_path: Path) -> SimpleNamespace:
    with contextlib.chdir(tmp_path):
        folder = tmp_path / soup_run(tmp_path)
    curve = [(n * 100.0, 10.0, 3.0) for n in range(1, 4)]
    shutil.copy(write_run(tmp_path / "made", dict.fromkeys(TASKS, curve)) / "result.json", folder)
    made = chaos.Round(0, folder, TASKS)
    rows = made.rows()
    for row in rows:
        for task in TASKS:
            row["columns"][task]["bit_equal"] = 1
    (folder / "result.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made.look(0)
    return made


def test_a_good_run_has_no_problems(run: SimpleNamespace) -> None:
    assert run.problems() == []
    assert run.last_row() == run.rows()[-1]
    with (run.path / "result.json").open("a") as file:
        file.write('{"half')
    assert run.last_row() == run.rows()[-1]


def test_a_changed_column(run: SimpleNamespace) -> None:
    file = run.path / "columns" / "column_000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    run.look(7)
    assert run.changed == ["column 0 of list 0 changed after kill 7"]


def test_a_lost_column(run: SimpleNamespace) -> None:
    file = run.path / "columns" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["columns"][1]
    file.write_text(json.dumps(manifest))
    problems = run.problems()
    assert problems[0] == "list 0 had 2 columns, has 1" and "expected columns of" in problems[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows.pop(2), "gaps"),
        (lambda rows: rows[4]["progressive"].update(task_index=0), "gone back to"),
        (lambda rows: rows[-1]["columns"]["plain"].update(bit_equal=0), "did not play as when frozen"),
    ],
)
def test_results_that_tell_of_a_loss(run: SimpleNamespace, change, words: str) -> None:
    rows = run.rows()
    change(rows)
    (run.path / "result.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (problem,) = run.problems()
    assert words in problem


def test_a_kill_that_cost_too_much_and_the_table(chaos: ModuleType, run: SimpleNamespace, tmp_path: Path) -> None:
    kills = [
        chaos.Kill(1, "driver", "random", 0, 0, 10, 5120, 0, 3, 1536, 12.0, -9),
        chaos.Kill(2, "node", "freezing", 0, 1, 20, 10240, 1, 4, 2048, 3.0),
    ]
    arguments = argparse.Namespace(kills=2, seed=0)
    summary = chaos.summary_of(SimpleNamespace(kills=kills, rounds=[run]), [], [], 60.0, arguments)
    assert summary["problems"] == ["kill 2 (node) cost 4 iterations, a checkpoint is taken every 3"]
    assert summary["tasks"] == summary["tasks_finished_exactly_once"] == 2
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- chaos: begin -->\nold\n<!-- chaos: end -->\nafter\n")
    chaos.put_table(page, chaos.table_of(summary))
    text = page.read_text()
    assert "old" not in text and text.startswith("before") and text.endswith("after\n")
    assert "| all | 2 | 1 | 0 | 1 | 4 | 2,048 | 3,584 | 12.0 |" in text


def test_what_is_left_behind(chaos: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(chaos.MARK, "some mark")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (tmp_path / "tmpabc").mkdir()
        (tmp_path / "ray").mkdir()
        left = chaos.residue(tmp_path, "some mark", chaos._shared(), patience_s=0.0)
        assert any(line.startswith(f"process {child.pid}") for line in left)
        assert str(tmp_path / "tmpabc") in left and str(tmp_path / "ray") not in left
    finally:
        child.kill()
        child.wait()
