"""What can go wrong before and during a run, each with the exit code of the `rllib` command. No Ray, no torch."""

from __future__ import annotations

from rllib_pnn.text import one_line


class InputError(ValueError):
    """Bad input: one line that says where, what was expected, what came and the mend. Exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class RunFailed(RuntimeError):
    """A run that was started and failed. Exit code 1."""
