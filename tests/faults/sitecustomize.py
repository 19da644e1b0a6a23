"""On PYTHONPATH of a test's processes: kills the command and itself, with SIGKILL, at the moment that a test names.

`RLLIB_PNN_TEST_FAULT` is "<module>:<function or Class.method>:<before|after>:<n>", the n-th call in a process. A file
named by `RLLIB_PNN_TEST_ONCE` is made first; where it exists already, nothing happens. `disk-full` instead of `before`
raises OSError as a full disk does, every time.
"""

import errno
import functools
import importlib.util
import os
import signal
import sys

_FAULT = os.environ.get("RLLIB_PNN_TEST_FAULT")
# The first process of a test is the command; all others descend from it.
_DRIVER = int(os.environ.setdefault("RLLIB_PNN_TEST_DRIVER", str(os.getpid())))


def _strike() -> None:
    try:
        os.close(os.open(os.environ["RLLIB_PNN_TEST_ONCE"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(_DRIVER, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _patch(module: object, name: str, when: str, nth: int) -> None:
    *owners, attribute = name.split(".")
    owner = module
    for part in owners:
        owner = getattr(owner, part)
    real = getattr(owner, attribute)
    calls = 0

    @functools.wraps(real)
    def faulty(*args, **kwargs):
        nonlocal calls
        calls += 1
        if when == "disk-full" and calls >= nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full")
        if when == "before" and calls == nth:
            _strike()
        result = real(*args, **kwargs)
        if when == "after" and calls == nth:
            _strike()
        return result

    setattr(owner, attribute, faulty)


class _Finder:
    """Patches a module as soon as it has been imported."""

    def __init__(self, module: str, *patch: object) -> None:
        self.module, self.patch = module, patch

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _patch(module, *self.patch)

        spec.loader.exec_module = exec_module
        return spec


if _FAULT:
    _module, _name, _when, _nth = _FAULT.split(":")
    sys.meta_path.insert(0, _Finder(_module, _name, _when, int(_nth)))
