"""Memory that two processes of one machine share: what A3C's gradients and weights travel through. No Ray, no RLlib.

A hand-over through Ray's object store costs several times what copying the numbers costs: an object is made, sealed,
announced, fetched, counted and freed, by four processes. Where both ends run on one machine, the numbers can stand in
memory that both have mapped, and only a note of where travels.

The memory has no name in any file system and needs no cleaning up: the kernel frees it with the last process that has
it mapped, however that ends. Linux only; elsewhere, or where the other process can't be seen, `open` finds nothing and
the caller goes another way.
"""

from __future__ import annotations

import mmap
import os
import secrets
import weakref
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one pair of vectors stands, for the other process. Small, and means nothing on another machine."""

    pid: int  # of the process that made the mailbox
    fd: int  # there
    name: str  # of the memory, so that another machine's process of the same number is not taken for it
    size: int
    num_slots: int
    index: int


class Mailbox:
    """Pairs of vectors that two processes read and write: one for each direction.

    Nothing here waits or locks: who may write when is agreed by messages (a request: `weights` may be read and
    `gradients` written; its answer: the other way round).

    Attributes:
        weights, gradients: (num_slots, size) float32.
    """

    def __init__(self, memory: mmap.mmap, name: str, size: int, num_slots: int, fd: int = -1, pid: int = -1) -> None:
        self.name, self.size, self.num_slots = name, size, num_slots
        self._fd, self._pid = fd, pid
        self.weights, self.gradients = np.frombuffer(memory, np.float32).reshape(2, num_slots, size)

    @classmethod
    def make(cls, size: int, num_slots: int) -> Mailbox | None:
        """A mailbox of zeros; None where the system has no such memory to give."""
        if not hasattr(os, "memfd_create") or size < 1:
            return None
        name = f"rllib_pnn_{secrets.token_hex(16)}"
        try:
            fd = os.memfd_create(name)
        except OSError:
            return None
        try:
            length = 2 * num_slots * size * np.dtype(np.float32).itemsize
            os.ftruncate(fd, length)
            mailbox = cls(mmap.mmap(fd, length), name, size, num_slots, fd, os.getpid())
        except OSError:
            os.close(fd)
            return None
        weakref.finalize(mailbox, os.close, fd)  # others find it through this number as long as it is offered
        return mailbox

    def slot(self, index: int) -> Slot:
        """What another process finds the pair by, as long as this object lives. Of the maker only."""
        return Slot(self._pid, self._fd, self.name, self.size, self.num_slots, index)

    @classmethod
    def open(cls, slot: Slot) -> Mailbox | None:
        """The mailbox that `slot` is in; None if it can't be reached from here: another machine, container or user, or
        it is gone."""
        path = f"/proc/{slot.pid}/fd/{slot.fd}"
        try:
            # Looked at before it is opened: it might be anything of another process's.
            if os.readlink(path) != f"/memfd:{slot.name} (deleted)":
                return None
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            length = 2 * slot.num_slots * slot.size * np.dtype(np.float32).itemsize
            return cls(mmap.mmap(fd, length), slot.name, slot.size, slot.num_slots)
        except (OSError, ValueError):
            return None
        finally:
            os.close(fd)
