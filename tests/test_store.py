"""The column store: whole or not at all (promise 5), the same bits (1), and data from strangers stays data (8)."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_save

from rllib_pnn.network import ColumnStore, ColumnStoreError, ProgressiveNetwork, store

# A long search now and then: RLLIB_PNN_FUZZ=20000 pytest tests/test_store.py -k fuzz
FUZZ = int(os.environ.get("RLLIB_PNN_FUZZ", "60"))

fuzzed = settings(max_examples=FUZZ, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make(num_columns: int = 2, **kwargs: Any) -> ProgressiveNetwork:
    network = ProgressiveNetwork(**{"observation_shape": (6,), "num_outputs": 3, "spec": "mlp", **kwargs})
    for _ in range(num_columns):
        network.add_column()
    network.freeze()
    return network


def save(network: ProgressiveNetwork, path: Path) -> ColumnStore:
    columns = ColumnStore(path)
    for k in range(network.num_columns):
        columns.save_column(network, k, task=f"task {k}")
    return columns


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "columns"
    save(make(), path)
    return path


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A store of two columns that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "columns"))


def edit(folder: Path, change: Callable[[dict], Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refused(folder: Path, *words: str, file: str = "manifest.json") -> str:
    """The store refuses to load with one short line that names the file; nothing else is raised."""
    with pytest.raises(ColumnStoreError) as caught:
        ColumnStore(folder).load()
    message = str(caught.value)
    assert str(folder / file) in message
    assert message.isprintable() and len(message) < 600, message
    for word in words:
        assert word in message, message
    return message


# -- what a store keeps ------------------------------------------------------------------------------------------


def test_everything_about_a_column_survives(tmp_path: Path) -> None:
    network = ProgressiveNetwork((9, 8, 4), 5, [{"conv": [3, 3, 2]}, {"lstm": 8}], lateral="linear", seed=7)
    network.add_column()
    network.add_column([{"conv": [5, 3, 2]}, {"lstm": 6}], lateral="adapter")
    network.add_column(lateral="none")
    network.add_column(copy_of=1)
    network.freeze()
    columns = ColumnStore(tmp_path / "run" / "columns")
    assert not columns.exists() and columns.entries == []
    for k in range(4):
        entry = columns.save_column(
            network,
            k,
            task=f"Täsk {k}",
            env="rllib_pnn/PongSoup-v0",
            env_config={"variant": "h_flip", "level": [1, {"deep": None}]},
            score=18.5,
            num_env_steps=4_000_000,
            extra={"seed": 3},
        )
        assert entry == columns.entries[k]
    assert columns.exists()
    assert columns.entries[3].env_config == {"variant": "h_flip", "level": [1, {"deep": None}]}
    assert (columns.entries[3].score, columns.entries[3].num_env_steps) == (18.5, 4_000_000)
    assert [entry.num_sources for entry in columns.entries] == [0, 1, 0, 1]
    assert sorted(p.name for p in columns.path.iterdir()) == [f"column_00{k}.safetensors" for k in range(4)] + [
        "manifest.json"
    ]
    columns.verify()
    loaded = columns.load()
    assert loaded.fingerprints() == network.fingerprints()
    for name in ("given_observation_shape", "num_outputs", "spec", "lateral", "lateral_scale", "lateral_heads", "seed"):
        assert getattr(loaded, name) == getattr(network, name), name
    assert [c.layout for c in loaded.columns] == [c.layout for c in network.columns]
    assert all(c.is_frozen for c in loaded.columns) and loaded.trainable_parameters() == []
    for (name, a), (other, b) in zip(network.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)
    network.add_column()
    loaded.add_column()
    network.freeze()
    loaded.freeze()
    assert loaded.fingerprints() == network.fingerprints()


def test_a_loaded_network_grows_on_into_the_same_store(folder: Path) -> None:
    columns = ColumnStore(folder)
    network = columns.load()
    network.add_column()
    network.freeze()
    columns.save_column(network, 2, task="third")
    assert [entry.task for entry in columns.entries] == ["task 0", "task 1", "third"]
    assert columns.load().fingerprints() == network.fingerprints()
    assert columns.load(num_columns=1).fingerprints() == network.fingerprints()[:1]
    assert columns.load(num_columns=0).num_columns == 0
    for wrong in (4, -1):
        with pytest.raises(ColumnStoreError, match=f"holds 3 columns, {wrong} were asked for"):
            columns.load(num_columns=wrong)


def test_parameters_lie_aligned_in_memory_after_loading(original: Path) -> None:
    for parameter in ColumnStore(original).load().parameters():
        assert parameter.data_ptr() % 64 == 0


def test_storing_a_column_twice_changes_nothing(folder: Path) -> None:
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    columns = ColumnStore(folder)
    network = columns.load()
    assert columns.save_column(network, 0, task="another name").task == "task 0"
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()} == before


def test_a_score_that_was_not_measured_is_none(tmp_path: Path) -> None:
    columns = ColumnStore(tmp_path)
    assert columns.save_column(make(1), 0, task="t", score=float("nan")).score is None
    assert columns.entries[0].score is None


def test_what_can_not_be_stored(folder: Path, tmp_path: Path) -> None:
    columns = ColumnStore(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def no(words: str, network: ProgressiveNetwork, index: int, at: ColumnStore = columns, **kwargs: Any) -> None:
        with pytest.raises(ColumnStoreError, match=words):
            at.save_column(network, index, **{"task": "t", **kwargs})

    trains = columns.load()
    trains.add_column()
    no("column 2 still trains; freeze", trains, 2)
    no("no column 3 in a network of 3", trains, 3)
    no("no column -1 in a network of 3", trains, -1)
    no("column 1 is stored with fingerprint", make(seed=1), 1)
    no("holds 2 columns, column 3 can't be next", make(4), 3)
    no(r"holds columns of observation_shape \(6,\), not \(7,\)", make(3, observation_shape=(7,)), 2)
    no("holds columns of num_outputs 3, not 4", make(3, num_outputs=4), 2)
    no("holds columns of input_scale 1.0, not 0.5", make(3, input_scale=0.5), 2)
    changed = make(3)
    with torch.no_grad():
        changed.columns[2].value.bias += 1
    no("column 2: a frozen column changed", changed, 2)
    odd = make(3)
    odd.columns[2] = make(3, input_scale=0.5).columns[2]
    no("column 2 scales observations by 0.5, the network by 1.0", odd, 2)
    new = ColumnStore(tmp_path / "new")
    no("can't be described as JSON: .*set", make(1), 0, new, env_config={"a": {1}})
    no("can't be described as JSON: .*float", make(1), 0, new, env_config={"a": float("nan")})
    no("can't be described as JSON: task", make(1), 0, new, task="t" * 300)
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    no("can't be described as JSON|nested too deeply", make(1), 0, new, extra=deep)
    assert not new.exists()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


# -- whole or not at all -----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process at some call."""


@pytest.mark.parametrize("what", ["killed", "disk full"])
@pytest.mark.parametrize("call", ["open", "fsync", "replace", "fdopen"])
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_an_interrupted_save_leaves_the_store_without_or_with_the_column(
    folder: Path, monkeypatch: pytest.MonkeyPatch, what: str, call: str, nth: int
) -> None:
    columns = ColumnStore(folder)
    network = columns.load()
    network.add_column()
    network.freeze()
    count = 0
    real = getattr(os, call)

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == nth:
            raise Killed if what == "killed" else OSError(28, "No space left on device", str(args[0]))
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        # Reading the manifest first is no part of the write.
        manifest = columns.manifest
        patch.setattr(ColumnStore, "manifest", manifest)
        patch.setattr(store.os, call, failing)
        try:
            columns.save_column(network, 2, task="third")
        except ColumnStoreError as error:
            assert what == "disk full" and "No space left on device" in str(error)
        except Killed:
            assert what == "killed"
    held = columns.load()
    assert held.fingerprints() == network.fingerprints()[: held.num_columns]
    assert held.num_columns in (2, 3)
    assert not list(folder.glob(".*")), "a temporary file was left"
    columns.save_column(network, 2, task="third")
    assert columns.load().fingerprints() == network.fingerprints()


SAVER = """
import sys
from pathlib import Path
from test_store import make
from rllib_pnn.network import ColumnStore
network = make(6)
print("ready", flush=True)
for attempt in range(10_000):
    store = ColumnStore(Path(sys.argv[1]) / str(attempt))
    for k in range(6):
        store.save_column(network, k, task=str(k))
        print(attempt, k, flush=True)
"""


def test_a_store_survives_kill_9_at_any_moment(tmp_path: Path) -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
    finally:
        process.send_signal(signal.SIGKILL)
        reported = process.stdout.read().split("\n")
        process.wait(timeout=30)
    done = [tuple(map(int, line.split())) for line in reported if line.count(" ") == 1 and line[-1].isdigit()]
    assert done
    expected = make(6)
    for folder in tmp_path.iterdir():
        columns = ColumnStore(folder)
        if not columns.exists():
            continue
        network = columns.load()
        assert network.fingerprints() == expected.fingerprints()[: network.num_columns]
        # What was reported as stored is there.
        assert network.num_columns >= 1 + max((k for a, k in done if str(a) == folder.name), default=-1)
        # And what a kill left behind does not stand in the way.
        for k in range(6):
            columns.save_column(expected, k, task=str(k))
        assert columns.load().num_columns == 6
        assert not list(folder.glob(".*"))


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "columns"
    folder.mkdir()
    for name in ("column_000.safetensors", ".column_000.safetensors.tmp", ".manifest.json.tmp"):
        (folder / name).symlink_to(victim)
    ColumnStore(folder).save_column(make(1), 0, task="t")
    assert victim.read_text() == "precious"
    assert ColumnStore(folder).load().num_columns == 1


def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ColumnStoreError, match="file"):
        ColumnStore(tmp_path / "file" / "columns").save_column(make(1), 0, task="t")


# -- damaged and foreign files -----------------------------------------------------------------------------------


def test_a_folder_without_a_store(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no such file", "expected a column store")
    (tmp_path / "manifest.json").mkdir()
    refused(tmp_path, "not a regular file")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "Not a directory")


def test_every_cut_of_a_column_file_is_refused(folder: Path) -> None:
    path = folder / "column_001.safetensors"
    whole = path.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, 1000, len(whole) // 2, len(whole) - 4, len(whole) - 1]:
        path.write_bytes(whole[:size])
        refused(folder, file=path.name)
    path.write_bytes(whole + b"\0")
    refused(folder, "bytes, expected", file=path.name)
    path.unlink()
    refused(folder, "no such file", file=path.name)


def test_every_flipped_bit_is_noticed(folder: Path) -> None:
    path = folder / "column_000.safetensors"
    whole = path.read_bytes()
    for position in [0, 3, 8, 20, len(whole) // 3, len(whole) // 2, len(whole) - 1]:
        for bit in (1, 128):
            damaged = bytearray(whole)
            damaged[position] ^= bit
            path.write_bytes(damaged)
            refused(folder, file=path.name)
    path.write_bytes(whole)
    ColumnStore(folder).verify()


def test_a_cut_manifest_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for size in [0, 1, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        refused(folder, "not a manifest")


def test_a_column_of_another_store_is_refused(folder: Path, tmp_path: Path) -> None:
    other = save(make(seed=9), tmp_path / "other").path
    shutil.copy(other / "column_000.safetensors", folder)
    refused(folder, "its fingerprint is", "belongs to another store", file="column_000.safetensors")


def test_swapped_columns_are_refused(folder: Path) -> None:
    a, b = (folder / f"column_00{k}.safetensors" for k in range(2))
    data = a.read_bytes()
    b.replace(a)
    b.write_bytes(data)
    refused(folder, "expected shape", file="column_000.safetensors")


def tensors_of(network: ProgressiveNetwork, k: int) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in network.columns[k].named_parameters()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({"policy.bias": torch.zeros(4)}), ["policy.bias: expected shape (3,), got (4,)"]),
        (lambda t: t.pop("policy.bias"), ["policy.bias: expected shape (3,), got none"]),
        (lambda t: t.update(more=torch.zeros(1)), ["more: expected shape none, got (1,)"]),
        (lambda t: t.update({k: v.double() for k, v in t.items()}), ["expected float32 tensors (F32), got F64"]),
        (lambda t: t.update({"policy.bias": torch.zeros(3).half()}), ["got F16, F32"]),
        (lambda t: t.update({"policy.bias": torch.zeros(3).int()}), ["got F32, I32"]),
        (lambda t: t.update({"a\x1b[31m\nb": torch.zeros(1)}), ["expected shape none"]),
        (lambda t: t.clear(), ["expected shape"]),
    ],
)
def test_tensors_that_are_not_the_columns_are_refused(folder: Path, change: Callable, words: list[str]) -> None:
    tensors = tensors_of(ColumnStore(folder).load(), 0)
    change(tensors)
    (folder / "column_000.safetensors").write_bytes(safetensors_save(tensors))
    refused(folder, *words, file="column_000.safetensors")


def with_header(path: Path, change: Callable[[dict], Any]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    changed = change(header)
    text = (changed if isinstance(changed, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["policy.bias"].update(shape=[3.0]),
        lambda h: h["policy.bias"].update(shape="3"),
        lambda h: h["policy.bias"].update(shape=[-3]),
        lambda h: h["policy.bias"].update(shape=[10**30]),
        lambda h: h["policy.bias"].update(dtype=["F32"]),
        lambda h: h["policy.bias"].update(dtype="X"),
        lambda h: h["policy.bias"].update(data_offsets=[0, 12]),
        lambda h: h["policy.bias"].update(data_offsets=[0, 2**62]),
        lambda h: h["policy.bias"].update(data_offsets=[-12, 0]),
        lambda h: h["policy.bias"].update(data_offsets="ab"),
        lambda h: h["policy.bias"].pop("data_offsets"),
        lambda h: h.update({"policy.bias": 3}),
        lambda h: "[]",
        lambda h: "3",
        lambda h: "NaN",
        lambda h: "[" * 200_000,
        lambda h: '{"a":' * 200_000,
        lambda h: json.dumps(h)[:-1] + ', "policy.bias": ' + json.dumps(h["policy.bias"]) + "}",
        lambda h: json.dumps(h) + " " * 2**21,
        lambda h: "\udcff".encode("utf-8", "surrogatepass").decode("latin-1"),
    ],
)
def test_a_damaged_header_is_refused(folder: Path, change: Callable[[dict], Any]) -> None:
    path = folder / "column_000.safetensors"
    with_header(path, change)
    refused(folder, file=path.name)


def test_offsets_that_swap_two_tensors_are_noticed(folder: Path) -> None:
    def swap(header: dict) -> None:
        a, b = header["layers.0.bias"], header["layers.1.bias"]
        a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]

    path = folder / "column_000.safetensors"
    network = ColumnStore(folder).load()
    with torch.no_grad():
        network.columns[0].layers[0].bias.fill_(1.0)
    path.write_bytes(safetensors_save(tensors_of(network, 0)))
    with_header(path, swap)
    refused(folder, "its fingerprint is", file=path.name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format="rllib_pnn.columns/2"), ["format", "rllib_pnn.columns/1"]),
        (lambda m: m.update(formats=1), ["formats", "Extra inputs"]),
        (lambda m: m.pop("network"), ["network", "required"]),
        (lambda m: m["network"].update(num_outputs="3"), ["network.num_outputs", "integer"]),
        (lambda m: m["network"].update(num_outputs=True), ["network.num_outputs", "integer"]),
        (lambda m: m["network"].update(num_outputs=0), ["network.num_outputs"]),
        (lambda m: m["network"].update(observation_shape=[]), ["network.observation_shape"]),
        (lambda m: m["network"].update(observation_shape=[6, 6]), ["network: observation_shape"]),
        (lambda m: m["network"].update(observation_shape=[2**31] * 3), ["columns.0"]),
        (lambda m: m["network"].update(observation_shape=[7]), ["layers.0.weight: expected shape (64, 7)"]),
        (lambda m: m["network"].update(spec={"layers": [{"dens": 1}]}), ["network: column: layer 1", "dense"]),
        (lambda m: m["network"].update(lateral="both"), ["network.lateral", "adapter"]),
        (lambda m: m["columns"][0].update(fingerprint="0" * 63), ["columns.0.fingerprint"]),
        (lambda m: m["columns"][0].update(fingerprint="0" * 64), ["its fingerprint is"]),
        (lambda m: m["columns"][0].update(spec={"layers": []}), ["columns.0: column:"]),
        (
            lambda m: m["columns"][0].update(spec={"layers": [{"dense": 8}, {"dense": 64}]}),
            ["layers.0.bias: expected shape (8,), got (64,)"],
        ),
        (lambda m: m["columns"][0].update(num_sources=1), ["columns.0.num_sources: expected at most 0, got 1"]),
        (lambda m: m["columns"][1].update(num_sources=0), ["laterals.2.out.weight", "expected shape none"]),
        (lambda m: m["columns"][1].update(lateral="linear"), ["laterals.2.project_layer.bias: expected shape none"]),
        (lambda m: m["columns"][1].update(lateral_scale=0.2), ["its fingerprint is"]),
        (lambda m: m["columns"][1].update(task=3), ["columns.1.task", "string"]),
        (lambda m: m["columns"][1].update(file="column_000.safetensors"), ["columns.1.file: expected column_001"]),
        (lambda m: m["columns"][1].update(file="../column_001.safetensors"), ["columns.1.file"]),
        (lambda m: m["columns"][1].update(file="/etc/passwd"), ["columns.1.file"]),
        (lambda m: m["columns"][1].update(file="column_001.safetensors\n"), ["columns.1.file"]),
        (lambda m: m["columns"][1].update(file="column_٠٠١.safetensors"), ["columns.1.file"]),
        (lambda m: m["columns"].append(m["columns"][1]), ["columns.2.file: expected column_002"]),
        (lambda m: m["columns"].extend(m["columns"][:1] * 10_000), ["columns", "at most 10000"]),
    ],
)
def test_a_manifest_that_does_not_describe_the_files_is_refused(
    folder: Path, change: Callable[[dict], Any], words: list[str]
) -> None:
    edit(folder, change)
    with pytest.raises(ColumnStoreError) as caught:
        ColumnStore(folder).load()
    message = str(caught.value)
    assert str(folder) in message and message.isprintable() and len(message) < 600
    for word in words:
        assert word in message


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("key", ["lateral_scale", "score"])
def test_numbers_that_are_none_are_refused(folder: Path, key: str, number: str) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["columns"][0][key] = "HERE"
    path.write_text(json.dumps(manifest).replace('"HERE"', number))
    refused(folder)


def test_numbers_that_are_none_are_refused_where_anything_goes(folder: Path) -> None:
    edit(folder, lambda m: m["columns"][0].update(env_config={"noise": float("nan")}))
    refused(folder, "NaN is not JSON")


def test_a_key_that_occurs_twice_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"task":', '"task": "another", "task":', 1))
    refused(folder, "a key occurs twice")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000 + "]" * 200_000,
        '{"format":' * 100_000 + "1" + "}" * 100_000,
        '{"format": "rllib_pnn.columns/1", "format": "rllib_pnn.columns/1"}',
        '{"format": ' + "9" * 10_000 + "}",
        '{"format": "\\ud800"}',
        "null",
        "\ufeff{}",
    ],
    ids=lambda text: text[:20],
)
def test_odd_json_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    refused(folder)


def test_a_manifest_of_any_bytes_is_refused(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"\xff\xfe\x00{")
    refused(folder)


# -- files that are no files, and sizes --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["manifest.json", "column_000.safetensors"])
def test_links_are_refused(folder: Path, name: str) -> None:
    (folder / name).rename(folder / "elsewhere")
    (folder / name).symlink_to(folder / "elsewhere")
    refused(folder, "a symbolic link, refused", file=name)


@pytest.mark.parametrize("name", ["manifest.json", "column_000.safetensors"])
def test_pipes_and_devices_are_refused_without_waiting(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, "not a regular file", file=name)


def allocated(action: Callable[[], Any]) -> int:
    """Peak of what Python allocated during `action`, bytes; torch's part shows in `empty` calls, see below."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_huge_sparse_file_is_refused_before_it_is_read(folder: Path) -> None:
    for name, size in (("column_000.safetensors", 2**33), ("column_000.safetensors", 2**31), ("manifest.json", 2**31)):
        with open(folder / name, "r+b") as file:
            file.truncate(size)
        assert allocated(lambda name=name: refused(folder, "bytes", file=name)) < 2**22


def test_declared_sizes_are_refused_before_anything_is_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest and a header that agree on 16 GiB, in a file of a few bytes."""
    wide = {"layers": [{"dense": 65_536}, {"dense": 65_536}], "name": "wide"}

    def widen(manifest: dict) -> None:
        manifest["columns"] = manifest["columns"][:1]
        manifest["columns"][0]["spec"] = wide

    edit(folder, widen)
    shapes = {
        "layers.0.weight": [65_536, 6],
        "layers.0.bias": [65_536],
        "layers.1.weight": [65_536, 65_536],
        "layers.1.bias": [65_536],
        "policy.weight": [3, 65_536],
        "policy.bias": [3],
        "value.weight": [1, 65_536],
        "value.bias": [1],
    }
    header, start = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(torch.tensor(shape).prod())
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    path = folder / "column_000.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("tensors were made")

    monkeypatch.setattr(store, "safetensors_load", never)
    assert allocated(lambda: refused(folder, "bytes, expected 17", file=path.name)) < 2**22


def test_a_huge_header_is_refused_before_it_is_read(folder: Path) -> None:
    path = folder / "column_000.safetensors"
    for length in (2**63, 2**30, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        with open(path, "r+b") as file:
            file.truncate(2**31)
        assert allocated(lambda: refused(folder, "a header of", file=path.name)) < 2**22


# -- no code from a store ----------------------------------------------------------------------------------------


@pytest.fixture
def no_pickle(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, never)
    monkeypatch.setattr(torch.serialization, "load", never)
    yield


@pytest.mark.usefixtures("no_pickle")
def test_nothing_is_unpickled(folder: Path) -> None:
    columns = ColumnStore(folder)
    network = columns.load()
    network.add_column()
    network.freeze()
    columns.save_column(network, 2, task="third")
    columns.verify()


class Bomb:
    def __reduce__(self) -> tuple:
        return (os.mkdir, (os.environ["RLLIB_PNN_TEST_BOMB"],))


def test_a_pickle_in_place_of_a_file_is_refused_and_not_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crater = tmp_path / "crater"
    monkeypatch.setenv("RLLIB_PNN_TEST_BOMB", str(crater))
    for name in ("column_000.safetensors", "manifest.json"):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        refused(folder, file=name)
        torch.save({"x": Bomb()}, folder / name)
        refused(folder, file=name)
        (folder / name).write_bytes(kept)
    assert not crater.exists()


# -- fuzz --------------------------------------------------------------------------------------------------------


def loads_or_is_refused(folder: Path, expected: list[str | None]) -> None:
    """Damage either shows as a ColumnStoreError or did not touch what the columns compute."""
    try:
        network = ColumnStore(folder).load()
    except ColumnStoreError as error:
        assert str(error).isprintable() and len(str(error)) < 600
    else:
        assert network.fingerprints() == expected[: network.num_columns]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)


def paths_of(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths_of(inner, (*path, key))


@fuzzed
@given(data=st.data())
def test_fuzz_values_of_the_manifest(original: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed values"
    shutil.copytree(original, folder, dirs_exist_ok=True)
    manifest = json.loads((original / "manifest.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([p for p in paths_of(manifest) if p]))
        at = manifest
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = data.draw(VALUES)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    loads_or_is_refused(folder, ColumnStore(original).load().fingerprints())


@fuzzed
@given(name=st.sampled_from(["manifest.json", "column_000.safetensors"]), data=st.data())
def test_fuzz_bytes_of_either_file(
    original: Path, tmp_path_factory: pytest.TempPathFactory, name: str, data: Any
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed bytes"
    shutil.copytree(original, folder, dirs_exist_ok=True)
    damaged = bytearray((original / name).read_bytes())
    head = min(len(damaged), 1200)  # where the header is
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, head - 1) | st.integers(0, len(damaged) - 1))
        damaged[start : start + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    (folder / name).write_bytes(damaged)
    loads_or_is_refused(folder, ColumnStore(original).load().fingerprints())


@fuzzed
@given(data=st.data())
def test_fuzz_values_of_the_header(original: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed header"
    shutil.copytree(original, folder, dirs_exist_ok=True)

    def change(header: dict) -> None:
        path = data.draw(st.sampled_from([p for p in paths_of(header) if p]))
        at: Any = header
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = data.draw(VALUES | st.integers(-20, 20))

    with_header(folder / "column_000.safetensors", change)
    loads_or_is_refused(folder, ColumnStore(original).load().fingerprints())
