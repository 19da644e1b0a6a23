"""Memory of processes that allocate large tensors in a loop: keep what is freed, write nothing twice. No Ray.

glibc hands every large block back to the kernel when it is freed, so that each fresh float batch of images is
paid for again in page faults: a convolutional update spends more time in the kernel than in arithmetic.
"""

from __future__ import annotations

import ctypes

import torch

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_KEEP_BYTES = 2**30


def lean_memory() -> None:
    """Call it once in a process that allocates large tensors in a loop (an EnvRunner, a Learner).

    A config's seed makes RLlib turn torch's deterministic algorithms on, which also fill every new tensor with NaN
    before it is written. That finds code that reads memory it has not written, costs a pass over all memory, and
    changes no result otherwise; so it is off.
    """
    keep_freed_memory()
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a module of properties


def keep_freed_memory() -> bool:
    """Lets this process keep what it frees (up to 1 GiB at the heap's top) and never allocate by mmap.

    glibc only. Returns whether the C library took the settings: False on musl, macOS and Windows, where nothing is
    changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _KEEP_BYTES, _M_TOP_PAD: 64 * 2**20}
    return all(mallopt(parameter, value) == 1 for parameter, value in settings.items())
