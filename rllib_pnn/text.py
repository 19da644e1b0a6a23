"""What messages quote is cut to what a reader can take in: it may come from a stranger's file."""

from __future__ import annotations


def one_line(message: object, limit: int = 1400) -> str:
    """White space is one space each; of a text longer than `limit` characters, its beginning and its end."""
    text = " ".join(str(message).split())
    return text if len(text) <= limit else f"{text[: limit - 300]} ... {text[-295:]}"


def short(value: object, limit: int = 60) -> str:
    """A value's `repr` as one line of at most `limit` characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
