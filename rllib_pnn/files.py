"""Files in folders that may come from strangers: opened without surprises, written whole. Standard library only.

What is read is a regular file of at most so many bytes; links, pipes and devices are refused, unopened or at once.
What is written is there whole or not at all, and never goes through a link that somebody put there.
"""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class RefusedFile(ValueError):
    """A file that is no plain data file. One line that names it."""


def open_regular(path: Path, limit: int) -> BinaryIO:
    """Opens a regular file of at most `limit` bytes for reading; `fstat` of the result tells its size.

    Raises:
        FileNotFoundError: there is none.
        RefusedFile: a link, folder, pipe, device, too large or not to be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RefusedFile(f"{path}: {'a symbolic link, refused' if path.is_symlink() else error.strerror}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise RefusedFile(f"{path}: not a regular file")
        if status.st_size > limit:
            raise RefusedFile(f"{path}: {status.st_size} bytes, expected at most {limit}")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, limit: int) -> bytes:
    """The bytes of a file, as `open_regular` opens it."""
    with open_regular(path, limit) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def write_whole(path: Path, data: bytes | str) -> None:
    """Writes a file so that it is there whole or not at all, even if the machine stops. One process at a time.

    Raises:
        OSError: the disk refuses; what was there before is untouched.
    """
    # One name, not one a process: what a kill leaves behind is replaced by the next attempt.
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        # O_EXCL: a link that someone put there is not followed.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


_CLAIMED: dict[Path, int] = {}


def claim(path: Path, timeout_s: float) -> str | None:
    """Marks `path` as written to by this process until it ends. None, or who else holds it after `timeout_s`.

    A process may claim a path as often as it likes. The mark is a lock on the file `.<name>.lock` beside it, which
    the system takes back from a process that dies, however it dies.
    """
    key = path.absolute()
    if fcntl is None or key in _CLAIMED:
        return None
    key.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(
        key.with_name(f".{key.name}.lock"), os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666
    )
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
            os.close(descriptor)
            return holder or "another process"
        except OSError:
            os.close(descriptor)  # a file system without locks; then nobody is kept out
            return None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
        _CLAIMED[key] = descriptor
        return None
