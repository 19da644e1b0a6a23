"""What messages quote is cut to what a reader can take in: it may come from a stranger's file."""

from __future__ import annotations


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
