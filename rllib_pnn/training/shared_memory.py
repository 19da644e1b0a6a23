"""Memory that two processes of one machine share: what large arrays travel through. No Ray, no RLlib.

A hand-over through Ray's object store costs several times what copying the numbers costs: an object is made, sealed,
announced, fetched, counted and freed, by four processes. Where both ends run on one machine, the numbers can stand in
memory that both have mapped, and only a note of where travels.

The memory has no name in any file system and needs no cleaning up: the kernel frees it with the last process that has
it mapped, however that ends. (That of `multiprocessing.shared_memory` has a name that somebody has to unlink, and
before Python 3.13 whichever process ends first unlinks it for all.) Linux only; elsewhere, or where the other process
can't be seen, `open` finds nothing and the caller goes another way.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

_ITEM = np.dtype(np.float32).itemsize
_LINE = 64  # bytes; arrays begin at multiples of it


@dataclass(frozen=True, slots=True)
class Address:
    """Where another process finds the memory. Means nothing on another machine."""

    pid: int  # of the process that made it
    fd: int  # there
    name: str  # so that another machine's process of the same number is not taken for it
    length: int  # bytes


class SharedMemory:
    """A piece of memory, `buffer`, made by one process and opened by others.

    Nothing here waits or locks: who may write when is agreed by messages.
    """

    def __init__(self, buffer: mmap.mmap, address: Address) -> None:
        self.buffer, self.address = buffer, address

    @classmethod
    def make(cls, length: int) -> SharedMemory | None:
        """Memory of zeros; None where the system has none of this kind to give."""
        if not hasattr(os, "memfd_create") or length < 1:
            return None
        name = f"rllib_pnn_{secrets.token_hex(16)}"
        try:
            fd = os.memfd_create(name)
        except OSError:
            return None
        try:
            os.ftruncate(fd, length)
            memory = cls(mmap.mmap(fd, length), Address(os.getpid(), fd, name, length))
        except OSError:
            os.close(fd)
            return None
        weakref.finalize(memory, os.close, fd)  # others find it through this number as long as it is offered
        return memory

    @classmethod
    def open(cls, address: Address) -> SharedMemory | None:
        """The memory at an address; None if it can't be reached from here: another machine, container or user, or it is
        gone."""
        path = f"/proc/{address.pid}/fd/{address.fd}"
        try:
            # Looked at before it is opened: it might be anything of another process's.
            if os.readlink(path) != f"/memfd:{address.name} (deleted)":
                return None
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return cls(mmap.mmap(fd, address.length), address)
        except (OSError, ValueError):
            return None
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Slot:
    """One pair of vectors in a mailbox, for the other process."""

    address: Address
    size: int
    num_slots: int
    index: int


class Mailbox:
    """Pairs of vectors that two processes read and write, one for each direction.

    A request allows its receiver to read `weights` and to write `gradients` of a slot; its answer, the other way round.

    Attributes:
        weights, gradients: (num_slots, size) float32.
    """

    def __init__(self, memory: SharedMemory, size: int, num_slots: int) -> None:
        self._memory = memory  # alive as long as this
        self.size, self.num_slots = size, num_slots
        self.weights, self.gradients = np.frombuffer(memory.buffer, np.float32).reshape(2, num_slots, size)

    @classmethod
    def make(cls, size: int, num_slots: int) -> Mailbox | None:
        """A mailbox of zeros, or None: see `SharedMemory.make`."""
        memory = SharedMemory.make(2 * num_slots * size * _ITEM)
        return None if memory is None else cls(memory, size, num_slots)

    @classmethod
    def open(cls, slot: Slot) -> Mailbox | None:
        """The mailbox that `slot` is in, or None: see `SharedMemory.open`."""
        memory = SharedMemory.open(slot.address)
        return None if memory is None else cls(memory, slot.size, slot.num_slots)

    def slot(self, index: int) -> Slot:
        """What another process finds the pair by, as long as this object lives."""
        return Slot(self._memory.address, self.size, self.num_slots, index)

    def holds(self, slot: Slot) -> bool:
        return slot.address.name == self._memory.address.name


@dataclass(frozen=True, slots=True)
class Recording:
    """Where a rollout's arrays stand, for the other process."""

    address: Address
    shapes: Mapping[str, tuple[int, ...]]  # (T, N, ...)
    number: int  # of the rollout


class Recorder:
    """Arrays of a rollout, (T, N, ...) float32 by name, overwritten by the next rollout.

    A reader knows by the rollout's number whether what it has read is still what it was told of: it looks before and
    after (`RecordingReader`).

    Attributes:
        arrays: by name.
    """

    def __init__(self, memory: SharedMemory, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._memory = memory
        self.shapes = dict(shapes)
        self._number = np.frombuffer(memory.buffer, np.int64, 1)
        self.arrays, end = {}, _LINE
        for name, shape in self.shapes.items():
            count = math.prod(shape)
            self.arrays[name] = np.frombuffer(memory.buffer, np.float32, count, end).reshape(shape)
            end += _lines(count * _ITEM)

    @classmethod
    def make(cls, shapes: Mapping[str, tuple[int, ...]], max_bytes: int) -> Recorder | None:
        """Memory for arrays of these shapes; None if that is more than `max_bytes`, or see `SharedMemory.make`."""
        length = _LINE + sum(_lines(math.prod(shape) * _ITEM) for shape in shapes.values())
        memory = SharedMemory.make(length) if length <= max_bytes else None
        return None if memory is None else cls(memory, shapes)

    def begin(self) -> None:
        """From now on what was recorded counts no more."""
        self._number += 1

    def recording(self) -> Recording:
        """What another process finds this rollout's arrays by."""
        return Recording(self._memory.address, self.shapes, int(self._number[0]))


class RecordingReader:
    """Opens recordings, and keeps them open for the next rollouts."""

    def __init__(self) -> None:
        self._open: dict[str, Recorder | None] = {}  # None: out of reach

    def arrays(self, recording: Recording) -> dict[str, np.ndarray] | None:
        """The arrays; None if they can't be reached from here or belong to another rollout by now."""
        name = recording.address.name
        if name not in self._open:
            memory = SharedMemory.open(recording.address)
            self._open[name] = None if memory is None else Recorder(memory, recording.shapes)
        recorder = self._open[name]
        return recorder.arrays if recorder is not None and self.is_current(recording) else None

    def is_current(self, recording: Recording) -> bool:
        """Whether the arrays still are those of the rollout that was told of."""
        recorder = self._open.get(recording.address.name)
        return recorder is not None and int(recorder._number[0]) == recording.number

    def forget_all_but(self, recordings: Iterable[Recording]) -> None:
        """Lets go of memory that is not in use any more."""
        names = {recording.address.name for recording in recordings}
        self._open = {name: recorder for name, recorder in self._open.items() if name in names}


def _lines(num_bytes: int) -> int:
    return -(-num_bytes // _LINE) * _LINE
