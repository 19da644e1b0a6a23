"""Parts of messages. What they quote is cut to what a reader can take in: it may come from a stranger's file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def printable(text: str) -> str:
    """Control sequences of a terminal become question marks."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def one_line(message: object, limit: int = 1400) -> str:
    """White space is one space each; of a text longer than `limit` characters, its beginning and its end."""
    text = printable(" ".join(str(message).split()))
    tail = limit // 5
    return text if len(text) <= limit else f"{text[: limit - tail - 5]} ... {text[-tail:]}"


def short(value: object, limit: int = 60) -> str:
    """A value's `repr` as one line of at most `limit` characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


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
    text = str(word)[:100]
    if text in aliases:
        return f"; did you mean '{aliases[text]}'?"
    candidates = {name.lower(): name for name in (*aliases, *known)}
    close = difflib.get_close_matches(text.lower(), candidates, n=1, cutoff=cutoff)
    if not close:
        return ""
    match = candidates[close[0]]
    return f"; did you mean '{aliases.get(match, match)}'?"
