"""Every file of a folder that may come from a stranger, damaged in many ways: read, or refused in one clear line.

A few hundred inputs for each loader in the fast suite; `make fuzz` takes 10,000 of each. What was found once is kept
at the end of this file.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mutate import damaged_bytes, damaged_json, odd_value
from run_folders import write_run
from stored_columns import SOUP, soup_run

from rllib_pnn.analysis.report import write_report
from rllib_pnn.analysis.runs import RunError, read_json, read_run
from rllib_pnn.analysis.sensitivity import Sensitivity
from rllib_pnn.analysis.transfer import transfer_tables
from rllib_pnn.experiment.errors import InputError
from rllib_pnn.experiment.folder import ResultLog, RunFolder, find_experiment, find_runs
from rllib_pnn.experiment.spec import load_experiment, load_plans
from rllib_pnn.network import ColumnStore, ColumnStoreError

FAST, FULL = 250, 10_000
LIMIT_S = 10  # of this process's own time, for one input
MEMORY = 2 * 2**30  # that reading one may add


# -- what must not happen ----------------------------------------------------------------------------------------------

_watched: list[str] | None = None  # what code that ran would have to do, while a loader runs
_SUSPICIOUS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.")


def _audit(event: str, arguments: tuple) -> None:
    if _watched is not None and event.startswith(_SUSPICIOUS):
        _watched.append(event)


sys.addaudithook(_audit)


@contextlib.contextmanager
def harmless() -> Iterator[None]:
    """No code, no hang, no huge allocation."""
    global _watched

    def too_long(*_: object) -> None:
        raise TimeoutError(f"took more than {LIMIT_S} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    old = signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    _watched = []
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
        assert not _watched, f"did {_watched}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        _watched = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


def clear(error: Exception) -> None:
    """A refusal is one line that a terminal can show."""
    message = str(error)
    assert message and len(message) < 1500, message[:200]
    assert len(message.splitlines()) == 1, message
    message.encode("utf-8")


# -- loaders -----------------------------------------------------------------------------------------------------------


class Loader:
    """A file, how it is damaged and how it is read.

    Args:
        file: relative to the folder.
        read: given the folder; may raise one of `refusals`.
        as_json: damage values too, not bytes alone.
    """

    def __init__(
        self, file: str, read: Callable[[Path], Any], refusals: tuple[type[Exception], ...], *, as_json: bool = True
    ) -> None:
        self.file, self.read, self.refusals, self.as_json = file, read, refusals, as_json

    def damaged(self, rng: random.Random, original: bytes) -> bytes:
        if not self.as_json or rng.random() < 0.4:
            return damaged_bytes(rng, original, head=1200)
        if self.file == "result.json":  # a value a line
            lines = original.splitlines()
            n = rng.randrange(len(lines))
            lines[n] = damaged_json(rng, json.loads(lines[n]))
            return b"\n".join(lines) + b"\n"
        if self.file.endswith(".safetensors"):
            length = int.from_bytes(original[:8], "little")
            header = damaged_json(rng, json.loads(original[8 : 8 + length]))
            size = len(header) if rng.random() < 0.8 else rng.choice([0, 1, length, 2**31, 2**63, 2**64 - 1])
            return size.to_bytes(8, "little") + header + original[8 + length :]
        return damaged_json(rng, json.loads(original))


def read_store(folder: Path) -> None:
    store = ColumnStore(folder / "columns")
    network = store.load()
    assert network.fingerprints() == [entry.fingerprint for entry in store.entries]


def read_state(folder: Path) -> None:
    run = RunFolder(folder)
    assert run.state.status and run.checkpoints is not None
    run.failure()
    run.last_result()


def read_plan_file(folder: Path) -> None:
    for run in find_runs(folder.parent):
        assert run.path.parent == folder.parent
    find_experiment(folder.parent)


def read_results(folder: Path) -> None:
    RunFolder(folder).last_result()
    run = read_run(folder)
    transfer_tables([run], floor=0.0)


def rewind(folder: Path) -> None:
    ResultLog(folder, 2).append('{"training_iteration": 3}', {"training_iteration": 3})


def read_sensitivity(folder: Path) -> None:
    Sensitivity.from_json(read_json(folder / "analysis" / "column_001" / "afs.json"))


def read_yaml_file(folder: Path) -> None:
    for plan in load_plans(folder / "soup.yaml"):
        assert plan.runs


LOADERS = {
    "manifest": Loader("columns/manifest.json", read_store, (ColumnStoreError,)),
    "manifest, for the report": Loader("columns/manifest.json", read_run, (RunError,)),
    "safetensors": Loader("columns/column_001.safetensors", read_store, (ColumnStoreError,)),
    "tuned example": Loader("soup.yaml", read_yaml_file, (InputError,), as_json=False),
    "tuned example, as JSON": Loader("soup.yaml", read_yaml_file, (InputError,)),
    "experiment.json": Loader("experiment.json", lambda f: load_experiment(f / "experiment.json"), (InputError,)),
    "experiment.json, for the report": Loader("experiment.json", read_results, (ValueError,)),
    "plan.json": Loader("../plan.json", read_plan_file, (InputError,)),
    "state.json": Loader("state.json", read_state, (InputError,)),
    "result.json": Loader("result.json", read_results, (ValueError,)),
    "result.json, to resume": Loader("result.json", rewind, ()),
    "progress.csv": Loader("progress.csv", read_results, (ValueError,), as_json=False),
    "progress.csv, to resume": Loader("progress.csv", rewind, (), as_json=False),
    "error.txt": Loader("error.txt", lambda f: RunFolder(f).failure(), (), as_json=False),
    "afs.json": Loader("analysis/column_001/afs.json", read_sensitivity, (ValueError,)),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment folder with one complete run."""
    base = tmp_path_factory.mktemp("fuzz")
    with contextlib.chdir(base):
        run = base / soup_run(base)
    curve = [(n * 100.0, 10.0 + n, 3.0) for n in range(1, 6)]
    made = write_run(
        base / "made",
        {"plain": curve, "flipped": curve},
        env="rllib_pnn/CartPoleSoup-v0",
        column_results={"plain": (14.0, 14.0), "flipped": (13.0, 13.0)},
    )
    for name in ("result.json", "progress.csv"):
        shutil.copy(made / name, run / name)
    (run / "soup.yaml").write_text(SOUP)
    for number in (1, 2):
        (run / f"checkpoint_{number:06d}").mkdir()
    records = [{"folder": f"checkpoint_{n:06d}", "training_iteration": n, "time_total_s": 1.5} for n in (1, 2)]
    (run / "state.json").write_text(json.dumps({"status": "stopped", "checkpoints": records}))
    (run / "error.txt").write_text("Failure # 1\nray::PPO.train()\n  File\nValueError: a\n")
    (run / "analysis" / "column_001").mkdir(parents=True)
    sensitivity = {
        "method": "afs",
        "column": 1,
        "layers": ["layer 1", "layer 2"],
        "values": [[0.25, 0.75], [None, 1.0]],
        "raw": [[[1.0, 2.0], [0.5]], [[1.0], [2.0]]],
        "tasks": ["plain", "flipped"],
        "notes": [],
        "settings": {"num_samples": 100, "actions": "sampled"},
    }
    (run / "analysis" / "column_001" / "afs.json").write_text(json.dumps(sensitivity))
    return run


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original.parent, tmp_path / "experiment")) / original.name


def fuzz(loader: Loader, folder: Path, count: int, seed: int) -> int:
    """Reads `count` damaged files; returns how many were refused."""
    file = folder / loader.file
    if loader.file == "progress.csv" and loader.refusals:
        (folder / "result.json").unlink()  # which is read first
    text = file.read_bytes()
    if loader.as_json and file.suffix == ".yaml":
        (plan,) = load_plans(file)
        text = json.dumps({"soup": {"run": "PPO", **_plain(plan)}}).encode()
    refused = 0
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        data = loader.damaged(rng, text)
        file.write_bytes(data)
        try:
            with harmless():
                loader.read(folder)
        except loader.refusals as error:
            clear(error)
            refused += 1
        except BaseException as error:
            raise AssertionError(f"input {seed}/{number}: {type(error).__name__}: {error}\n{data[:3000]!r}") from error
    return refused


def _plain(plan: Any) -> dict[str, Any]:
    experiment = next(iter(plan.runs.values())).model_dump(mode="json", exclude_none=True)
    return {key: value for key, value in experiment.items() if key not in ("name", "run")}


@pytest.mark.parametrize("name", LOADERS)
def test_a_few_hundred(folder: Path, name: str) -> None:
    loader = LOADERS[name]
    refused = fuzz(loader, folder, FAST, seed=0)
    assert (refused > FAST // 20) == bool(loader.refusals)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", LOADERS)
def test_ten_thousand(folder: Path, name: str) -> None:
    fuzz(LOADERS[name], folder, FULL, seed=int(os.environ.get("RLLIB_PNN_FUZZ_SEED", "1")))


def report_on(folder: Path, rng: random.Random) -> None:
    """Damages one of the report's inputs in values that a page would show, and writes the page."""
    file = folder / rng.choice(["result.json", "experiment.json", "analysis/column_001/afs.json", "state.json"])
    text = file.read_bytes()
    if file.name == "result.json":
        lines = text.splitlines()
        for n in rng.sample(range(len(lines)), 3):
            lines[n] = damaged_json(rng, json.loads(lines[n]))
        file.write_bytes(b"\n".join(lines) + b"\n")
    else:
        file.write_bytes(damaged_json(rng, json.loads(text)))
    out = folder.parent.parent / "report.html"
    try:
        with harmless():
            write_report([folder], out, floor=0.0)
    except ValueError as error:
        clear(error)
    else:
        page = out.read_text(encoding="utf-8")
        assert "<script" not in page and "{{" not in page.replace("{{ 7*7 }}", "")
    finally:
        file.write_bytes(text)


@pytest.mark.parametrize("seed", range(6))
def test_reports_of_damaged_runs(folder: Path, seed: int) -> None:
    for number in range(2):
        report_on(folder, random.Random(f"{seed}/{number}"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(100, 104))
def test_more_reports_of_damaged_runs(folder: Path, seed: int) -> None:
    for number in range(250):
        report_on(folder, random.Random(f"{seed}/{number}"))


def test_the_damage_is_the_same_every_time() -> None:
    for number in range(50):
        first, second = (damaged_json(random.Random(number), {"a": [1, {"b": 2}]}) for _ in range(2))
        assert first == second
        assert damaged_bytes(random.Random(number), b"abc" * 9) == damaged_bytes(random.Random(number), b"abc" * 9)
    assert len({repr(odd_value(random.Random(number))) for number in range(300)}) > 30


# -- found by fuzzing, and kept ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [1, 3, 4])
def test_columns_of_different_depths_in_a_manifest(folder: Path, num_layers: int) -> None:
    file = folder / "columns" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["columns"][1]["spec"]["layers"] = [{"dense": {"units": 64}}] * num_layers
    file.write_text(json.dumps(manifest))
    with pytest.raises(ColumnStoreError, match=r"columns.1: .*the number of layers and the map sizes must agree"):
        read_store(folder)


@pytest.mark.parametrize(
    "value",
    ["9" * 5000, "2001-13-45", "!!int x", "!!float x", "0x", "1:99:99.5:3", "!!timestamp 2001lp", "*" + "a" * 5000],
)
def test_yaml_values_that_are_none(tmp_path: Path, value: str) -> None:
    (tmp_path / "file.yaml").write_text(f"a: {{run: PPO, env: CartPole-v1, config: {{lr: {value}}}}}\n")
    try:
        load_plans(tmp_path / "file.yaml")
    except InputError as error:
        clear(error)


@pytest.mark.parametrize(
    "value",
    ["1" + "0" * 400, "-" + "9" * 5000, '"' + "x" * 5000 + '"', '{"a":' * 3000 + "0" + "}" * 3000, "[1, 2]", "{}"],
)
def test_sensitivities_that_are_no_numbers(folder: Path, value: str) -> None:
    file = folder / "analysis" / "column_001" / "afs.json"
    file.write_text(file.read_text().replace("0.25", value))
    with pytest.raises(ValueError) as error:
        read_sensitivity(folder)
    clear(error.value)


@pytest.mark.parametrize("value", ["[" * 3000 + "]" * 3000, '"flipped"', "null", "NaN", "1" + "0" * 400, "{}"])
def test_rows_without_an_iteration_are_taken_back(folder: Path, value: str) -> None:
    lines = (folder / "result.json").read_text().splitlines()
    lines[0] = f'{{"training_iteration": {value}}}'
    (folder / "result.json").write_text("\n".join(lines) + "\n")
    rewind(folder)
    kept = [json.loads(line)["training_iteration"] for line in (folder / "result.json").read_text().splitlines()]
    assert kept == [2, 3]


def test_a_table_without_an_iteration_is_taken_back(folder: Path) -> None:
    text = (folder / "progress.csv").read_text().splitlines()
    place = text[0].split(",").index("training_iteration")
    cells = text[1].split(",")
    cells[place] = "flipped"
    (folder / "progress.csv").write_text("\n".join([text[0], ",".join(cells), *text[2:]]) + "\n")
    rewind(folder)
    assert len((folder / "progress.csv").read_text().splitlines()) == 3  # header, iterations 2 and 3


@pytest.mark.parametrize("key", ["lateral_scale", "evaluation_episodes", "evaluation_seed", "input_shift"])
def test_numbers_beyond_all_floats(tmp_path: Path, key: str) -> None:
    tasks = "[{name: a, until: {num_env_steps: 10}}]"
    (tmp_path / "file.yaml").write_text(
        f"a: {{run: PPO, env: CartPole-v1, progressive: {{{key}: 1{'0' * 400}, tasks: {tasks}}}}}\n"
    )
    with pytest.raises(InputError, match=key) as error:
        load_plans(tmp_path / "file.yaml")
    clear(error.value)


def test_a_source_of_a_name_longer_than_a_file_system_takes(folder: Path) -> None:
    file = folder / "experiment.json"
    experiment = json.loads(file.read_text())
    experiment["progressive"] |= {"columns_from": "1" + "0" * 400, "source_tasks": None}
    file.write_text(json.dumps(experiment))
    assert read_run(folder).tasks


def test_an_architecture_of_thousands_of_letters(folder: Path) -> None:
    file = folder / "experiment.json"
    experiment = json.loads(file.read_text())
    experiment["progressive"]["architecture"] = "[" * 3000
    file.write_text(json.dumps(experiment))
    with pytest.raises(RunError, match="architecture") as error:
        read_run(folder)
    clear(error.value)
