"""Keep freed memory with the process. glibc only; a no-op elsewhere. No torch, no Ray.

glibc hands every large block back to the kernel when it is freed, so that each fresh float batch of images is
paid for again in page faults: a convolutional update spends more time in the kernel than in arithmetic.
"""

from __future__ import annotations

import ctypes

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_KEEP_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Lets this process keep what it frees (up to 1 GiB at the heap's top) and never allocate by mmap.

    Call it once in a process that allocates large tensors in a loop (an EnvRunner, a Learner). Returns whether
    the C library took the settings: False on musl, macOS and Windows, where nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _KEEP_BYTES, _M_TOP_PAD: 64 * 2**20}
    return all(mallopt(parameter, value) == 1 for parameter, value in settings.items())
