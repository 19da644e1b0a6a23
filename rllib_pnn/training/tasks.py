"""Tasks: what a progressive network learns, one after the other, and when each ends. Plain data, no torch, no Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rllib_pnn.text import did_you_mean

_UNTIL_KEYS = ("episode_return_mean", "num_env_steps")
_TASK_KEYS = ("name", "env_config", "until")


@dataclass(frozen=True)
class Task:
    """One task of a sequence.

    Args:
        name: unique in the sequence; names the task's column, metrics and files.
        env_config: what sets this task's environment apart, merged over the algorithm's own `env_config`.
        until: `{"episode_return_mean": r, "num_env_steps": n}`, either or both: the task ends when its last episodes
            (`metrics_num_episodes_for_smoothing` of them, or as many as there are from 10 on) return r on average, or
            after n environment steps on this task, whichever comes first. Empty: the task never ends by itself.

    Raises:
        ValueError: one line with the key and the mend.
    """

    name: str
    env_config: Mapping[str, Any] = field(default_factory=dict)
    until: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name: expected a non-empty string, got {self.name!r}")
        if any(c in self.name for c in "/\\\0\n") or self.name in (".", ".."):
            raise ValueError(f"name: {self.name!r} can't name files and metrics; use letters, digits, '_', '-'")
        if not isinstance(self.env_config, Mapping):
            raise ValueError(f"env_config: expected a mapping, got {self.env_config!r}")
        if not isinstance(self.until, Mapping):
            raise ValueError(f"until: expected a mapping of {' and '.join(_UNTIL_KEYS)}, got {self.until!r}")
        for key, value in self.until.items():
            if key not in _UNTIL_KEYS:
                raise ValueError(f"until: {_unknown(key, _UNTIL_KEYS)}")
            if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
                raise ValueError(f"until.{key}: expected a number, got {value!r}")
            if key == "num_env_steps" and value <= 0:
                raise ValueError(f"until.num_env_steps: expected more than 0, got {value!r}")

    @classmethod
    def parse(cls, value: Task | Mapping[str, Any]) -> Task:
        """A `Task` from a mapping with the keys `name`, `env_config`, `until`. Raises `ValueError`."""
        if isinstance(value, Task):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"expected a mapping with the keys {', '.join(_TASK_KEYS)}, got {value!r}")
        for key in value:
            if key not in _TASK_KEYS:
                raise ValueError(_unknown(key, _TASK_KEYS))
        if "name" not in value:
            raise ValueError("name: missing")
        return cls(value["name"], value.get("env_config") or {}, value.get("until") or {})

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "env_config": dict(self.env_config), "until": dict(self.until)}

    def is_over(self, episode_return_mean: float, num_env_steps: int) -> bool:
        """Whether the task ends, given the windowed mean return (NaN if unknown) and the steps taken on it."""
        wanted = self.until.get("episode_return_mean")
        if wanted is not None and episode_return_mean >= wanted:  # False for NaN
            return True
        steps = self.until.get("num_env_steps")
        return steps is not None and num_env_steps >= steps


def parse_tasks(tasks: Sequence[Task | Mapping[str, Any]]) -> tuple[Task, ...]:
    """A checked sequence of tasks. Raises `ValueError`: `tasks[2].until: ...`, one line."""
    if isinstance(tasks, str | Mapping) or not isinstance(tasks, Sequence):
        raise ValueError(f"tasks: expected a list of tasks, got {tasks!r}")
    if not tasks:
        raise ValueError("tasks: expected at least one task, got an empty list")
    parsed: list[Task] = []
    for i, task in enumerate(tasks):
        try:
            parsed.append(Task.parse(task))
        except ValueError as error:
            raise ValueError(f"tasks[{i}]: {error}") from None
        names = [t.name for t in parsed[:-1]]
        if parsed[-1].name in names:
            raise ValueError(
                f"tasks[{i}].name: '{parsed[-1].name}' is the name of tasks[{names.index(parsed[-1].name)}] too; "
                "names must be unique"
            )
    return tuple(parsed)


def _unknown(key: object, known: Sequence[str]) -> str:
    return f"unknown key '{key}'" + (did_you_mean(key, known) or f"; known are {', '.join(known)}")
