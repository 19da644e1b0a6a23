"""Which task is this? Statistics of every task's first steps, and the column whose statistics fit. numpy, no Ray.

A progressive network needs to be told which task it plays (Rusu et al. 2016, section 6, name this as its limit). Here
each stored column keeps what its task looked like in the first steps of an episode: mean and standard deviation of the
newest frame, pooled to at most 21 x 21, or of a vector's entries; and for vectors the same of their change after each
action, because tasks may show the same observations and answer differently (a view with all signs turned). An episode's
first steps are compared with all columns' statistics.

Axes: N environments, K columns, D features, A actions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FIRST_STEPS = 16
"""Steps of an episode that statistics are of, and that decide."""

KEY = "first_observations"
"""Where a store's column entry keeps its statistics, in `extra`."""

MAX_SIDE = 21
MAX_FEATURES = 4096
MAX_ACTIONS = 64
MIN_CHANGES = 5  # after an action, before its changes count
TAIL = 3.0  # degrees of freedom of the Student distribution that features are taken to have: outliers decide little
# A standard deviation is taken to be no less than this part of the feature's over all columns, and a grey level.
LEAST_PART, LEAST_GREY = 0.02, 1.0


def features_of(observations: Any, channels_last: bool = False) -> np.ndarray:
    """(N, D) of observations (N, ...): an image's newest frame pooled to at most 21 x 21, a vector as it is.

    An image is (C, H, W), or (H, W, C) if told so (`ProgressiveNetwork.channels_last_input`), and its last channel the
    newest frame.
    """
    batch = np.asarray(observations)
    if batch.ndim < 3:
        return batch.reshape(len(batch), -1).astype(np.float64)
    if batch.ndim == 4:
        batch = batch[..., -1] if channels_last else batch[:, -1]
    frames = batch.astype(np.float64)
    for axis in (1, 2):
        size = frames.shape[axis]
        if size > MAX_SIDE:
            edges = np.arange(MAX_SIDE) * size // MAX_SIDE
            widths = np.diff(np.append(edges, size))
            shape = [1, 1, 1]
            shape[axis] = MAX_SIDE
            frames = np.add.reduceat(frames, edges, axis=axis) / widths.reshape(shape)
    return frames.reshape(len(frames), -1)


class FirstSteps:
    """Adds up what environments show in their episodes' first steps.

    Args:
        num_actions: of a discrete action space; None for others, whose changes are not looked at.
        is_image: then changes are not looked at either.
    """

    def __init__(self, num_actions: int | None, is_image: bool) -> None:
        self.num_actions = 0 if is_image or num_actions is None or num_actions > MAX_ACTIONS else num_actions
        self._seen: list[np.ndarray] = [np.zeros(0)] * 3  # count (1,), sum and sum of squares (1, D)
        self._changed: list[np.ndarray] = [np.zeros(0)] * 3  # the same by action: (A,), (A, D), (A, D)

    def add(self, features: np.ndarray, before: np.ndarray | None = None, actions: np.ndarray | None = None) -> None:
        """Args: features: (N, D). before, actions: (N, D) and (N,), what came before them."""
        size = features.shape[1]
        if not self._seen[0].size:
            self._seen = _empty(1, size)
            self._changed = _empty(self.num_actions, size)
        _add(self._seen, np.zeros(len(features), dtype=int), features)
        if self.num_actions and before is not None and actions is not None:
            _add(self._changed, actions.astype(int), features - before)

    def merge(self, other: FirstSteps) -> FirstSteps:
        merged = FirstSteps(None, True)
        merged.num_actions = self.num_actions
        merged._seen, merged._changed = (
            [a + b if a.size else b.copy() for a, b in zip(mine, theirs, strict=True)]
            for mine, theirs in ((self._seen, other._seen), (self._changed, other._changed))
        )
        return merged

    def statistics(self) -> Statistics | None:
        """None if nothing was added."""
        if not self._seen[0].size or not self._seen[0][0]:
            return None
        mean, std = _moments(self._seen)
        change_mean, change_std = _moments(self._changed)
        return Statistics(int(self._seen[0][0]), mean[0], std[0], self._changed[0].astype(int), change_mean, change_std)


@dataclass(frozen=True)
class Statistics:
    """What a task looks like in the first steps of its episodes.

    Args:
        count: observations that went in.
        mean, std: (D,).
        change_counts: (A,) changes after each action; A is 0 where changes are not looked at.
        change_mean, change_std: (A, D).
    """

    count: int
    mean: np.ndarray
    std: np.ndarray
    change_counts: np.ndarray
    change_mean: np.ndarray
    change_std: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Numbers as text in one line each, so that a manifest stays readable."""
        data: dict[str, Any] = {"count": self.count, "mean": _text(self.mean), "std": _text(self.std)}
        if self.change_counts.size:
            data["changes"] = [
                {"count": int(count), "mean": _text(mean), "std": _text(std)}
                for count, mean, std in zip(self.change_counts, self.change_mean, self.change_std, strict=True)
            ]
        return data

    @classmethod
    def from_json(cls, data: Any) -> Statistics:
        """Raises `ValueError` with one line if it is none."""
        try:
            mean, std = _numbers(data["mean"]), _numbers(data["std"], least=0.0)
            changes = data.get("changes", [])
            if not isinstance(changes, list) or len(changes) > MAX_ACTIONS:
                raise ValueError(f"changes: expected a list of at most {MAX_ACTIONS}")
            counts = np.array([int(change["count"]) for change in changes], dtype=int)
            shape = (len(changes), len(mean))
            change_mean, change_std = (
                np.array([_numbers(change[key]) for change in changes]) if changes else np.zeros(shape)
                for key in ("mean", "std")
            )
            if std.shape != mean.shape or change_mean.shape != shape or change_std.shape != shape:
                raise ValueError("mean and std differ in length")
            return cls(int(data["count"]), mean, std, counts, change_mean, change_std)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"not statistics of first observations: {reason}") from None


class Recogniser:
    """Compares first steps with the statistics of several columns.

    Args:
        statistics: of K columns.
        is_image: the features are grey levels.

    Raises:
        ValueError: they are of observations of different sizes.
    """

    def __init__(self, statistics: Sequence[Statistics], is_image: bool) -> None:
        sizes = {len(s.mean) for s in statistics}
        if len(sizes) != 1:
            raise ValueError(f"the columns' statistics are of {sorted(sizes)} features, expected one number")
        self._is_image = is_image
        self._mean, self._std = self._floored([s.mean for s in statistics], [s.std for s in statistics])
        num_actions = min(len(s.change_counts) for s in statistics)
        self._changes: dict[int, tuple[np.ndarray, np.ndarray]] = {
            action: self._floored(
                [s.change_mean[action] for s in statistics], [s.change_std[action] for s in statistics]
            )
            for action in range(num_actions)
            if min(s.change_counts[action] for s in statistics) >= MIN_CHANGES
        }

    def log_likelihood(
        self, features: np.ndarray, before: np.ndarray | None = None, actions: np.ndarray | None = None
    ) -> np.ndarray:
        """(N, K) of one step of N environments; the arguments are those of `FirstSteps.add`."""
        total = _student(features, self._mean, self._std)
        if before is not None and actions is not None:
            for action, (mean, std) in self._changes.items():
                rows = actions == action
                total[rows] += _student(features[rows] - before[rows], mean, std)
        return total

    def _floored(self, means: list[np.ndarray], stds: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(K, D) each; no standard deviation so small that rounding or a rare event decides."""
        mean, std = np.stack(means), np.stack(stds)
        overall = np.sqrt((std**2).mean(0) + mean.var(0))
        least = np.maximum(LEAST_PART * overall, LEAST_GREY if self._is_image else 1e-6 + 1e-6 * np.abs(mean).max(0))
        return mean, np.maximum(std, least)


def _student(values: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Log-likelihood up to a constant, of independent features: (N, D), (K, D) -> (N, K)."""
    z = (values[:, None] - mean) / std
    return -(0.5 * (TAIL + 1) * np.log1p(z**2 / TAIL) + np.log(std)).sum(-1)


def _empty(rows: int, size: int) -> list[np.ndarray]:
    return [np.zeros(rows), np.zeros((rows, size)), np.zeros((rows, size))]


def _add(sums: list[np.ndarray], rows: np.ndarray, values: np.ndarray) -> None:
    np.add.at(sums[0], rows, 1)
    np.add.at(sums[1], rows, values)
    np.add.at(sums[2], rows, values**2)


def _moments(sums: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    count = np.maximum(sums[0], 1)[:, None]
    mean = sums[1] / count
    return mean, np.sqrt(np.maximum(sums[2] / count - mean**2, 0.0))


def _text(values: np.ndarray) -> str:
    return " ".join(f"{value:.5g}" for value in values)


def _numbers(text: Any, least: float = -np.inf) -> np.ndarray:
    if not isinstance(text, str) or len(text) > 32 * MAX_FEATURES:
        raise ValueError("expected numbers in a text")
    values = np.array(text.split(), dtype=np.float64)
    if not 0 < len(values) <= MAX_FEATURES or not np.isfinite(values).all() or values.min() < least:
        raise ValueError(f"expected 1 to {MAX_FEATURES} finite numbers")
    return values


def confused_pairs(confusion: Mapping[tuple[str, str], int], tasks: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of tasks that are taken for each other about as often as not: their observations do not tell them apart.

    Args:
        confusion: episodes by (task, task of the chosen column).
        tasks: in order.
    """
    pairs = []
    for i, first in enumerate(tasks):
        for second in tasks[i + 1 :]:
            right = confusion.get((first, first), 0) + confusion.get((second, second), 0)
            wrong = confusion.get((first, second), 0) + confusion.get((second, first), 0)
            if wrong and wrong >= 0.5 * right:
                pairs.append((first, second))
    return pairs
