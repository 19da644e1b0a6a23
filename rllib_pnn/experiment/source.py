"""YAML as data, with the line of every key. No Ray, no torch.

Only plain YAML is read (PyYAML's safe loader): a tag that would build a Python object is an error, and so are a key
given twice, of which YAML would silently take the second, and a file whose aliases unfold beyond reason.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rllib_pnn.experiment.errors import InputError
from rllib_pnn.files import RefusedFile, read_regular
from rllib_pnn.text import short

MAX_BYTES = 4 * 2**20
MAX_NODES = 200_000
MAX_DEPTH = 64

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Source:
    """A YAML file's content and where each part of it stands.

    `lines` maps a key path such as `("pong-soup", "config", "lr")` to its line, counted from 1.
    """

    path: Path
    data: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def error(self, where: KeyPath, message: str) -> InputError:
        """An `InputError` that opens with file, line and key path."""
        line = next((self.lines[where[:n]] for n in range(len(where), -1, -1) if where[:n] in self.lines), None)
        position = str(self.path) if line is None else f"{self.path}:{line}"
        key = key_path(where)
        return InputError(f"{position}: {key}: {message}" if key else f"{position}: {message}")


def key_path(where: KeyPath) -> str:
    """`("a", "tasks", 1, "until")` as `a.tasks[1].until`."""
    text = ""
    for part in where:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def read_yaml(path: Path, *, follow_links: bool = True) -> Source:
    """Reads a YAML file.

    Args:
        path: the file.
        follow_links: False for a file in a folder that may come from a stranger.

    Raises:
        InputError: the file is missing, unreadable, not YAML, or holds more than plain data.
    """
    try:
        if path.is_dir():
            raise InputError(f"{path}: a folder, expected a YAML file")
        if follow_links:
            with path.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
        else:
            content = read_regular(path, MAX_BYTES)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except RefusedFile as error:
        raise InputError(str(error)) from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    if len(content) > MAX_BYTES:
        raise InputError(f"{path}: larger than {MAX_BYTES // 2**20} MiB, expected a tuned example")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}), expected a YAML file") from None

    lines: dict[KeyPath, int] = {}
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise InputError(f"{path}: empty, expected at least one experiment")
            _mark(path, node, (), lines, [0])
            data = loader.construct_document(node)
        finally:
            loader.dispose()
    except InputError:
        raise
    except yaml.YAMLError as error:
        raise InputError(_yaml_message(path, error)) from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply") from None
    except (ValueError, OverflowError, AttributeError, TypeError, LookupError) as error:
        # PyYAML's own for a day that no month has, a number of thousands of digits, a !!timestamp that is none.
        raise InputError(f"{path}: holds a value that is none: {short(str(error), 120)}") from None
    return Source(path, data, lines)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, reading 1e-4 as the number that YAML 1.2 says it is (YAML 1.1 wants 1.0e-4).

    Infinity and NaN too, as Python writes them into an `experiment.json`.
    """

    def construct_yaml_float(self, node: Any) -> float:
        value = str(self.construct_scalar(node))
        if value.endswith(("Infinity", "NaN")) and not value.startswith("."):
            return float(value)
        return float(super().construct_yaml_float(node))


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)|-?Infinity|NaN)$"
    ),
    list("-+0123456789.IN"),
)


def _mark(path: Path, node: yaml.Node, where: KeyPath, lines: dict[KeyPath, int], count: list[int]) -> None:
    """Notes the line of every key below `node`; aliases count each time that they are used."""
    count[0] += 1
    if count[0] > MAX_NODES:
        raise InputError(f"{path}: its aliases unfold to more than {MAX_NODES} values")
    if len(where) > MAX_DEPTH:
        raise InputError(f"{path}:{node.start_mark.line + 1}: nested more than {MAX_DEPTH} levels deep")
    lines.setdefault(where, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _mark(path, item, (*where, index), lines, count)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise InputError(f"{path}:{line}: a key must be a word, got a {key.id}")
            if key.tag == "tag:yaml.org,2002:merge":
                _mark(path, value, where, lines, count)
                continue
            inner = (*where, key.value)
            if lines.get(inner) is not None and _own_key_twice(node, key.value):
                first = _first_line(node, key.value)
                raise InputError(f"{path}:{line}: {key_path(inner)}: given twice (first in line {first})")
            lines[inner] = line
            _mark(path, value, inner, lines, count)


def _own_key_twice(node: yaml.MappingNode, name: str) -> bool:
    return sum(isinstance(key, yaml.ScalarNode) and key.value == name for key, _ in node.value) > 1


def _first_line(node: yaml.MappingNode, name: str) -> int:
    return next(key.start_mark.line + 1 for key, _ in node.value if key.value == name)


def _yaml_message(path: Path, error: yaml.YAMLError) -> str:
    """PyYAML's several lines as one."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    if "could not determine a constructor for the tag" in problem:
        tag = problem.split("'")[1].replace("tag:yaml.org,2002:", "!!")
        problem = f"the tag {tag} is not plain data, and a tuned example holds plain data only"
    elif problem.startswith("found character '\\t'"):
        problem = "a tab in the indentation; YAML wants spaces"
    else:
        context = getattr(error, "context", None)
        problem = f"not YAML: {problem}" + (f" ({context})" if context else "")
    position = f"{path}:{mark.line + 1}" if mark is not None else str(path)
    return f"{position}: {problem}"


def as_word(key: Hashable) -> str:
    """A mapping's key as text; YAML allows numbers and booleans there (`on:` is True)."""
    return key if isinstance(key, str) else short(key)
