"""Keeps freed memory inside the process instead of giving it back to the kernel. Plain ctypes.

Networks allocate and free the same large tensors over and over. glibc serves blocks above some 128 KB with a
fresh `mmap` and unmaps them on `free`, so that every reuse pays a page fault per 4 KB: more than the
arithmetic of a small column.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD = -1  # <malloc.h>
_M_MMAP_MAX = -4
_NEVER_TRIM = 2**31 - 1  # bytes: `mallopt` takes a C int


def keep_freed_memory() -> bool:
    """Makes glibc keep freed blocks for reuse: no `mmap` per large block, no trimming of the heap.

    Acts on the whole process, from now on, and costs resident memory: what the process used at its peak stays
    with it. Calling it again changes nothing.

    Returns:
        True if the allocator took both settings; False where there is no glibc (musl, macOS, Windows) or it
        refused, in which case nothing is wrong, only slower.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018  other libcs have a `mallopt` that does nothing
    except (OSError, AttributeError):
        return False
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    mallopt.restype = ctypes.c_int
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM))
