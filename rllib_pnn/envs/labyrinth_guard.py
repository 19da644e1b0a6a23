"""Cleans up after a process that started ViZDoom engines, however that process ended. Standard library only.

Run as a script by `labyrinth_engine`, one guard per owner (a process that starts engines): it outlives an
owner that is killed. It makes the folder that the owner's engines run in, prints its path, detaches, and then
listens on its standard input, whose other end only the owner holds:

    starting TOKEN      an engine is about to be started
    started TOKEN ID    it runs, and its shared memory files are named after ID
    closed TOKEN        it is gone, or never came up

The end of the input is the end of the owner, SIGKILL included. Then it kills the engines that still run in
the folder, unlinks their shared memory and removes the folder. It finds engines through `/proc`, so it is for
Linux only.
"""

import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_PREFIXES = ("ViZDoomMQCtr", "ViZDoomMQDoom", "ViZDoomSM")
LAUNCHER = "engine"  # the executable in the folder through which the owner starts every engine
_PATIENCE = 30.0  # seconds to wait for killed engines to be gone and for unknown names to be free


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="rllib_pnn-labyrinth-"))
    if os.fork() > 0:
        # The owner waits for this process only. The guard is no child of it, so whoever kills an owner
        # together with its children (Ray does) leaves the guard alone.
        print(folder, flush=True)
        os._exit(0)
    os.setsid()
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    engines: dict[str, str] = {}  # token -> id, or "" before the engine has told its id
    since = time.time()
    for line in sys.stdin:
        event, token, *rest = line.split()
        if event == "starting":
            engines[token] = ""
        elif event == "started":
            engines[token] = rest[0]
        else:
            engines.pop(token, None)
    clean_up(folder, engines, since)


def clean_up(folder: Path, engines: dict[str, str], since: float) -> None:
    """Ends the engines of `folder`, removes their shared memory files and the folder.

    Args:
        folder: Where the engines run.
        engines: Of every engine that wasn't closed, the id, or "" if its start was not over.
        since: When the first engine can have been started (seconds since the epoch).
    """
    # Without its launcher no further engine of this owner can start: a child that the owner forked and that
    # has not yet read the launcher ends by itself, and every other one shows the folder in its command line.
    (folder / LAUNCHER).unlink(missing_ok=True)
    ids = {engine for engine in engines.values() if engine}
    deadline = time.monotonic() + _PATIENCE
    while running := list(_engines_in(folder)):
        for pid, engine in running:
            ids.add(engine)
            _kill(pid)
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    for engine in ids - {""}:
        for prefix in SHARED_MEMORY_PREFIXES:
            (SHARED_MEMORY / (prefix + engine)).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    # An owner that dies between making an engine's message queues and starting the engine leaves names that
    # nobody has told. They are recognised by their age and by no living process using them.
    if "" in engines.values():
        _unlink_unused(since, deadline)


def _processes() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def _engines_in(folder: Path) -> Iterator[tuple[int, str]]:
    """The processes (pid, engine id or "") that were started from `folder` or have their settings there."""
    inside = os.fsencode(folder) + b"/"
    for pid in _processes():
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # ended meanwhile
        if any(argument.startswith(inside) for argument in arguments):
            _, _, after = b"\0".join(arguments).partition(b"+viz_instance_id\0")
            yield pid, after.split(b"\0")[0].decode()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _unlink_unused(since: float, deadline: float) -> None:
    """Unlinks ViZDoom's shared memory files of this user, made after `since`, that no process uses.

    A file that is made has been open or mapped in a living process from its first moment on, which is looked
    up after the list of names: files of engines that start or run elsewhere are never touched.
    """
    pause = 0.1
    while names := {path for path in SHARED_MEMORY.glob("ViZDoom*") if _is_ours(path, since)}:
        used = _shared_memory_in_use()
        for path in names:
            if str(path) not in used:
                path.unlink(missing_ok=True)
        # A forked child of the owner that is yet to find the launcher gone still maps its names: come back.
        if used.isdisjoint(map(str, names)) or time.monotonic() > deadline:
            return
        time.sleep(pause)
        pause = min(2 * pause, 2.0)


def _is_ours(path: Path, since: float) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and status.st_ctime >= since - 1.0


def _shared_memory_in_use() -> set[str]:
    used: set[str] = set()
    for pid in _processes():
        try:
            # In this order: a process opens a file, maps it and closes it, so it is seen in one of the two.
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                try:
                    used.add(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
                except OSError:
                    continue
            used.update(re.findall(r"/dev/shm/ViZDoom\w+", Path(f"/proc/{pid}/maps").read_text()))
        except OSError:
            continue
    return used


if __name__ == "__main__":
    main()
