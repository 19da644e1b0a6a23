"""Checks of the options that an env is made with: a typing error in a YAML file ends in one clear line."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from rllib_pnn.text import did_you_mean


def reject_unknown(env_id: str, unknown: Mapping[str, Any], constructor: Any) -> None:
    """Raises ValueError if `unknown` (what `**unknown` of `constructor` caught) holds anything."""
    if not unknown:
        return
    known = [
        name
        for name, parameter in inspect.signature(constructor).parameters.items()
        if name not in ("self", "num_envs") and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    name = next(iter(unknown))
    raise ValueError(f"{env_id}: unknown option {name!r}; {_suggestion(name, known)}")


def check_choice(env_id: str, name: str, value: Any, choices: Iterable[str]) -> str:
    """`value` if it is one of `choices`; ValueError with the nearest of them otherwise."""
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{env_id}: {name} is {value!r}; {_suggestion(value, known)}")
    return value


def check_integer(env_id: str, name: str, value: Any, *, minimum: int) -> int:
    """`value` as an int if it is a whole number of at least `minimum`; ValueError otherwise."""
    # bool is an int to Python, but `frame_stack: yes` in a YAML file is a mistake.
    whole = not isinstance(value, bool) and hasattr(value, "__index__")
    if not whole or value < minimum:
        raise ValueError(f"{env_id}: {name} must be a whole number >= {minimum}, got {value!r}")
    return int(value)


def check_number(env_id: str, name: str, value: Any, *, low: float, high: float) -> float:
    """`value` as a float if it lies in `[low, high]`; ValueError otherwise."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise ValueError(f"{env_id}: {name} must be a number from {low:g} to {high:g}, got {value!r}")
    return float(value)


def check_flag(env_id: str, name: str, value: Any) -> bool:
    """`value` if it is a bool; ValueError otherwise (the string "false" would count as true)."""
    if not isinstance(value, bool):
        raise ValueError(f"{env_id}: {name} must be true or false, got {value!r}")
    return value


def _suggestion(value: Any, known: list[str]) -> str:
    mend = did_you_mean(value, known)
    if mend:
        return mend.removeprefix("; ")
    if len(known) > 30:
        return f"none of the {len(known)} known names is close (such as {', '.join(known[:3])})"
    return f"expected one of {', '.join(known)}"
