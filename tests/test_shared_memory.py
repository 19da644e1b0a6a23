"""Shared memory of two processes: what crosses, and what is never opened."""

from __future__ import annotations

import dataclasses
import gc
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rllib_pnn.training.shared_memory import Mailbox, Recorder, RecordingReader

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memory without a name (Linux)")

OTHER_PROCESS = """
import pickle, sys
from rllib_pnn.training.shared_memory import Mailbox
slot = pickle.loads(bytes.fromhex(sys.argv[1]))
mailbox = Mailbox.open(slot)
mailbox.gradients[slot.index] = 2 * mailbox.weights[slot.index]
"""


def make(size: int = 5, num_slots: int = 2) -> Mailbox:
    mailbox = Mailbox.make(size, num_slots)
    assert mailbox is not None
    return mailbox


def test_another_process_reads_and_writes() -> None:
    mailbox = make()
    mailbox.weights[1] = np.arange(5)
    slot = pickle.dumps(mailbox.slot(1))
    assert len(slot) < 500
    subprocess.run([sys.executable, "-c", OTHER_PROCESS, slot.hex()], check=True)
    np.testing.assert_array_equal(mailbox.gradients, [np.zeros(5), 2 * np.arange(5)])
    np.testing.assert_array_equal(mailbox.weights, [np.zeros(5), np.arange(5)])


def test_both_ends_share_until_the_maker_is_gone() -> None:
    gc.collect()  # what other tests have left may hold some
    descriptors = len(os.listdir("/proc/self/fd"))
    mailbox = make()
    slot = mailbox.slot(0)
    other = Mailbox.open(slot)
    assert other is not None
    other.gradients[0] = 1.0
    mailbox.weights[0] = 2.0
    assert (mailbox.gradients[0] == 1.0).all() and (other.weights[0] == 2.0).all()
    del mailbox
    gc.collect()
    assert Mailbox.open(slot) is None
    assert (other.weights[0] == 2.0).all(), "what is mapped stays"
    del other
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_nothing_else_is_opened(tmp_path: Path) -> None:
    mailbox = make()
    slot = mailbox.slot(0)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    waiting = os.open(pipe, os.O_RDWR)  # to open it anew with nobody at the other end would wait for ever
    try:
        for changes in (
            {"fd": waiting},
            {"fd": 10**6},
            {"pid": 2**22 + 1},  # no process has that number
            {"name": make().slot(0).address.name},
            {"length": 10**6},
        ):
            changed = dataclasses.replace(slot, address=dataclasses.replace(slot.address, **changes))
            assert Mailbox.open(changed) is None, changes
    finally:
        os.close(waiting)
    assert Mailbox.open(slot) is not None


def test_where_there_is_no_such_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Mailbox.make(0, 1) is None
    assert Recorder.make({"a": (10, 10)}, max_bytes=64 + 399) is None
    assert Recorder.make({"a": (10, 10)}, max_bytes=64 + 448) is not None

    def refused(name: str) -> int:
        raise PermissionError("seccomp")

    monkeypatch.setattr(os, "memfd_create", refused)
    assert Mailbox.make(5, 1) is None
    monkeypatch.delattr(os, "memfd_create")
    assert Mailbox.make(5, 1) is None


OTHER_READER = """
import pickle, sys
from rllib_pnn.training.shared_memory import RecordingReader
recording = pickle.loads(bytes.fromhex(sys.argv[1]))
arrays = RecordingReader().arrays(recording)
assert {name: (a.shape, float(a.sum())) for name, a in arrays.items()} == {"a": ((2, 3), 6.0), "b": ((5,), 10.0)}
"""


def test_a_recording_counts_until_the_next_rollout_begins() -> None:
    recorder = Recorder.make({"a": (2, 3), "b": (5,)}, max_bytes=1000)
    recorder.arrays["a"][:] = 1.0
    recorder.arrays["b"][:] = 2.0
    assert all(array.ctypes.data % 64 == 0 for array in recorder.arrays.values())
    recorder.begin()
    recording = recorder.recording()
    subprocess.run([sys.executable, "-c", OTHER_READER, pickle.dumps(recording).hex()], check=True)
    reader = RecordingReader()
    arrays = reader.arrays(recording)
    assert arrays["a"].shape == (2, 3) and (arrays["b"] == 2.0).all() and reader.is_current(recording)
    recorder.begin()
    assert not reader.is_current(recording) and reader.arrays(recording) is None
    assert reader.arrays(recorder.recording()) is not None


def test_a_reader_lets_go_of_what_is_not_in_use() -> None:
    gc.collect()  # what other tests have left may hold some
    descriptors = len(os.listdir("/proc/self/fd"))
    reader = RecordingReader()
    recorders = [Recorder.make({"a": (3,)}, max_bytes=1000) for _ in range(2)]
    recordings = [recorder.recording() for recorder in recorders]
    assert all(reader.arrays(recording) is not None for recording in recordings)
    recorders.clear()
    gc.collect()
    reader.forget_all_but(recordings[:1])
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors + 1
    assert reader.arrays(recordings[0]) is not None and reader.arrays(recordings[1]) is None
