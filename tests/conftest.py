"""Whatever the tests do, they leave nothing behind: no process, no shared-memory file, no temporary folder."""

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

MARK = "RLLIB_PNN_TESTS"  # in the environment of every process that descends from this one

# Before Ray is imported, which keeps its sessions there: apart from other clusters on this machine, and soon gone.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
_FOLDER = Path(tempfile.mkdtemp(prefix="t"))  # short: paths of sockets may have 107 letters
os.environ |= {"TMPDIR": str(_FOLDER), MARK: str(_FOLDER), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
tempfile.tempdir = None
_CACHES = ("ray", "torchinductor_")  # Ray keeps its sessions' logs, torch an empty folder for compiled code


def _processes() -> list[str]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            marked = process.environ().get(MARK) == str(_FOLDER)
            if marked and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"process {process.pid}: {' '.join(process.cmdline())[:100]}")
    return found


def _shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    found = set()
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            if path.stat().st_uid == os.getuid():
                found.add(str(path))
    return found


def _in_use() -> str:
    """What any process maps, as one text."""
    texts = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            texts.append(maps.read_text(errors="replace"))
    return "\n".join(texts)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As in every process of a training run; two threads on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def few_positions_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Incremental evaluation also for networks so small that it takes longer."""
    from rllib_pnn.network import incremental

    monkeypatch.setattr(incremental, "pays", lambda changed, total, num_columns: changed <= 0.4 * total)


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Looks once more after all tests and their fixtures."""
    shared_before = _shared_memory()
    yield
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    # The labyrinth's guard lives as long as its owner, this process; as at its end, it has to tidy up and go.
    engine = sys.modules.get("rllib_pnn.envs.labyrinth_engine")
    if engine is not None and engine._guard is not None:
        engine._guard.forget()
        engine._guard = None
    deadline = time.monotonic() + 60
    while (left := _processes()) and time.monotonic() < deadline:
        time.sleep(0.2)
    # Those of other programs on this machine are in use by them.
    fresh = _shared_memory() - shared_before
    mapped = _in_use() if fresh else ""
    left += [name for name in sorted(fresh) if name not in mapped and os.path.exists(name)]
    left += [str(path) for path in sorted(_FOLDER.iterdir()) if not path.name.startswith(_CACHES)]
    shutil.rmtree(_FOLDER, ignore_errors=True)
    assert not left, "the tests left behind:\n" + "\n".join(left)
