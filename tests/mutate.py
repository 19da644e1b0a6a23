"""Seeded damage to files: bytes, and values of JSON. Shared by tests."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

TOKENS: tuple[bytes, ...] = (
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\n",
    b"\r",
    b"\t",
    b'"',
    b"'",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b"#",
    b"&a ",
    b"*a",
    b"<<: *a",
    b"- ",
    b"? ",
    b"|",
    b"---\n",
    b"%YAML 9.9\n",
    b"!!python/object/apply:os.abort []",
    b"!!binary x",
    b"!!timestamp 2001-01-01",
    b"!!set {a}",
    b"null",
    b"~",
    b"true",
    b"NaN",
    b"-Infinity",
    b".inf",
    b"-1",
    b"1e999",
    b"0x1p9",
    b"1_000",
    b"0o7",
    b"12:30:45",
    b"2001-13-45",
    b"9" * 5000,
    b"[" * 3000,
    b'{"a":' * 3000,
    b"../../../etc/passwd",
    b"\\u0000",
    b"\\ud800",
    b"$\\frac",
    b"<script>alert(1)</script>",
    b"{{ 7*7 }}",
)


class Raw(str):
    """JSON text that stands for itself: nesting that would be too deep for Python's own functions."""


def odd_value(rng: random.Random, depth: int = 0) -> Any:
    """Something that a file of ours would not hold at that place, or hardly."""
    simple: list[Any] = [
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        -(2**63) - 1,
        Raw("1" + "0" * 400),
        Raw("-" + "9" * 5000),
        0.5,
        -0.0,
        1e308,
        -1e308,
        5e-324,
        float("nan"),
        float("inf"),
        "",
        " ",
        "0",
        "nan",
        "x" * 5000,
        "a\nb",
        "a\x00b",
        "\ud800",
        "\u202e",
        "../..",
        "/etc/passwd",
        "$\\frac",
        "$x$",
        "_^{",
        "<script>alert(1)</script>",
        "{{ 7*7 }}",
        "os:system",
        "os.system",
        [],
        {},
        [[]],
        {"": {}},
    ]
    roll = rng.random()
    if roll < 0.8 or depth > 2:
        return rng.choice(simple)
    if roll < 0.87:
        return [odd_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if roll < 0.94:
        return {str(odd_value(rng, 3))[:20]: odd_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    depth = rng.choice([50, 900, 3000])
    return Raw('{"a":' * depth + "0" + "}" * depth if rng.random() < 0.5 else "[" * depth + "0" + "]" * depth)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything below a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def damaged_json(rng: random.Random, value: Any) -> bytes:
    """JSON text of a value in which up to three places are something else, missing, renamed or repeated."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        paths = list(places(value))
        if not paths:
            value = odd_value(rng)
            break
        path = rng.choice(paths)
        at = value
        for key in path[:-1]:
            at = at[key]
        action = rng.random()
        if action < 0.7:
            at[path[-1]] = odd_value(rng)
        elif action < 0.8:
            del at[path[-1]]
        elif isinstance(at, dict):
            at[str(odd_value(rng, 3))[:30]] = at.pop(path[-1]) if action < 0.9 else odd_value(rng)
        else:
            at.extend([copy.deepcopy(at[path[-1]])] * rng.choice([1, 2, 50]))
    return _dumps(value).encode("utf-8", "surrogatepass")


def _dumps(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{_dumps(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_dumps, value)) + "]"
    return json.dumps(value)


def damaged_bytes(rng: random.Random, data: bytes, head: int | None = None) -> bytes:
    """Bytes with up to four edits, half of them within the first `head`."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        limit = max(1, len(damaged) if head is None or rng.random() < 0.5 else min(head, len(damaged)))
        start = rng.randrange(limit)
        stop = min(len(damaged), start + rng.choice([0, 1, 1, 2, 8, 100]))
        edit = rng.random()
        if edit < 0.25:
            damaged[start:stop] = rng.choice(TOKENS)
        elif edit < 0.5:
            damaged[start:stop] = rng.randbytes(rng.randrange(9))
        elif edit < 0.65:
            del damaged[start:stop]
        elif edit < 0.8:
            damaged[start:start] = damaged[start:stop] * rng.choice([1, 2, 30])
        elif edit < 0.95:
            if damaged:
                damaged[start % len(damaged)] ^= 1 << rng.randrange(8)
        else:
            del damaged[start:]
    return bytes(damaged)
