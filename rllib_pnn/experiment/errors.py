"""What can go wrong before and during a run, each with the exit code of the `rllib` command. No Ray, no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from rllib_pnn.text import one_line


class InputError(ValueError):
    """Bad input: one line that says where, what was expected, what came and the mend. Exit code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class RunFailed(RuntimeError):
    """A run that was started and failed. Exit code 1."""


def did_you_mean(
    word: object, known: Iterable[str], aliases: dict[str, str] | None = None, *, cutoff: float = 0.6
) -> str:
    """ "; did you mean 'lr'?", or "" if nothing known is close.

    Args:
        word: what came.
        known: the words that would have been right.
        aliases: words from elsewhere, and the right word for each (`{"learning_rate": "lr"}`); a word close to an alias
            suggests what the alias stands for.
        cutoff: how close it must be, 1.0 for the same word.
    """
    aliases = aliases or {}
    known = list(known)
    text = str(word)
    if text in aliases:
        return f"; did you mean '{aliases[text]}'?"
    candidates = {name.lower(): name for name in (*aliases, *known)}
    close = difflib.get_close_matches(text.lower(), candidates, n=1, cutoff=cutoff)
    if not close:
        return ""
    match = candidates[close[0]]
    return f"; did you mean '{aliases.get(match, match)}'?"
