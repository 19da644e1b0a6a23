"""Freed memory stays with the process where the C library is glibc, and nothing happens elsewhere."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from rllib_pnn.network import memory

PROBE = """
import resource, runpy, sys
keep_freed_memory = runpy.run_path(sys.argv[2])["keep_freed_memory"]
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    b"x" * 36_000_000  # freed at once
for _ in range(12):  # until the heap has its size
    work()
before = faults()
for _ in range(10):
    work()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_is_not_fetched_again() -> None:
    def page_faults(mode: str) -> int:
        command = [sys.executable, "-c", PROBE, mode, memory.__file__]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)

    default, kept = page_faults("default"), page_faults("keep")
    assert default > 10_000  # each of the 10 blocks is paid for in page faults
    assert kept < default / 10


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_elsewhere_nothing_changes(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def no_such_library(name: object) -> None:
        raise error

    monkeypatch.setattr(memory.ctypes, "CDLL", no_such_library)
    assert memory.keep_freed_memory() is False
