"""From a run folder to files about its columns: `analyze_run`, `prune_run`. Plain torch and gymnasium, no Ray."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor

from rllib_pnn.analysis import plots
from rllib_pnn.analysis.fisher import average_fisher_sensitivity
from rllib_pnn.analysis.perturbation import average_perturbation_sensitivity
from rllib_pnn.analysis.prune import prune_laterals
from rllib_pnn.analysis.rollouts import Rollout, column_index, column_of, play
from rllib_pnn.analysis.runs import EXPERIMENT_FILE, find_columns, home_of, read_experiment, read_json
from rllib_pnn.analysis.sensitivity import METHODS, Sensitivity, agreement
from rllib_pnn.analysis.transfer import known_floor
from rllib_pnn.files import write_whole
from rllib_pnn.network import ColumnStore, Conv, ProgressiveNetwork

ANALYSIS_FOLDER = "analysis"
NUM_FILTERS = 6


def analyze_run(
    run: Path | str,
    methods: Sequence[str] = ("afs",),
    *,
    column: int | str = -1,
    out: Path | str | None = None,
    num_episodes: int = 10,
    num_states: int = 2048,
    actions: str = "sampled",
    floor: float | None = None,
    seed: int = 0,
    num_envs: int | None = None,
    map: Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]] = map,
) -> dict[str, Any]:
    """Where the policy of a run's column has its knowledge.

    Writes to `out`: `afs.json` and `aps.json` (see `Sensitivity.to_json`), `sensitivity.png` with what of both is
    there, and, where layer 1 is a convolution, the most used filters as `filters.json` and `filters.png`.

    Args:
        run: a run folder, with the columns in its `columns/`, or a column store.
        methods: of `afs` and `aps`.
        column: whose policy, by index or by its task's name.
        out: a folder; by default `analysis/column_NNN` in the run folder, where `write_report` looks.
        num_episodes: episodes of a score (APS), and those that the states come from.
        num_states: states for AFS and for the activations' variances.
        actions: `sampled` or `expected`, see `average_fisher_sensitivity`.
        floor: the game's lowest return, from which APS counts a drop; known for Pong, CartPole and the Atari games.
        seed: of everything random.
        num_envs: environments side by side.
        map: see `average_perturbation_sensitivity`.

    Returns:
        Run, column, task, mean return, the shares of each method, their agreement if both ran, and the files written.

    Raises:
        ValueError: with one line.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise ValueError(f"methods: expected one or more of {', '.join(METHODS)}, got {', '.join(unknown) or 'none'}")
    run = home_of(run)
    subject = _subject(run, column)
    network, k = subject.network, subject.column
    folder = Path(out) if out is not None else _inside(run, ANALYSIS_FOLDER, f"column_{k:03d}")
    found: dict[str, Sensitivity] = {}
    files: list[Path] = []
    if "aps" in methods and floor is None:  # before anything that takes minutes
        known = known_floor(subject.env, subject.env_config)
        if known is None:
            raise ValueError(f"{subject.env}: its lowest return is not known, and APS needs one: give the floor")
        floor = known.value
    rollout = subject.play(num_episodes, seed, num_states, num_envs)
    summary: dict[str, Any] = {
        "run": str(run),
        "column": k,
        "task": subject.tasks[k],
        "tasks": list(subject.tasks),
        "episode_return_mean": float(rollout.returns.mean()),
    }
    if "afs" in methods:
        found["afs"] = average_fisher_sensitivity(
            network, rollout, column=k, actions=actions, seed=seed, tasks=subject.tasks
        )
        files.append(_write_json(folder / "afs.json", found["afs"].to_json()))  # whatever becomes of APS
    if "aps" in methods:
        assert floor is not None
        found["aps"] = average_perturbation_sensitivity(
            network,
            subject.env,
            subject.env_config,
            floor=floor,
            column=k,
            num_episodes=num_episodes,
            num_states=num_states,
            seed=seed,
            num_envs=num_envs,
            normalize_actions=subject.normalize_actions,
            tasks=subject.tasks,
            map=map,
        )
        files.append(_write_json(folder / "aps.json", found["aps"].to_json()))
    drawn = _with_earlier(folder, found)
    files.append(plots.save(plots.plot_sensitivity(drawn), folder / "sensitivity.png"))
    if "afs" in found and (filters := most_used_filters(network, found["afs"])):
        files.append(_write_json(folder / "filters.json", filters))
        files.append(plots.save(plots.plot_filters(filters, subject.tasks), folder / "filters.png"))
    for method, result in found.items():
        summary[method] = result.to_json()
    if len(found) == 2:
        summary["agreement"] = {
            key: None if math.isnan(value) else value for key, value in agreement(found["afs"], found["aps"]).items()
        }
    summary["files"] = [str(file) for file in files]
    return summary


def prune_run(
    run: Path | str,
    *,
    column: int | str = -1,
    out: Path | str | None = None,
    max_kl: float = 3e-5,
    num_episodes: int = 30,
    num_states: int = 2048,
    floor: float | None = None,
    seed: int = 0,
    num_envs: int | None = None,
) -> dict[str, Any]:
    """Cuts the laterals of a run's column that carry nothing and plays it before and after, on the same new episodes.

    Writes a new column store with the columns up to the pruned one, and `prune.json` beside its manifest. The run's
    own store stays as it is.

    Args:
        run: a run folder or a column store.
        column: whose laterals, by index or by its task's name.
        out: folder of the new store, which must not exist; by default `pruned/column_NNN` in the run folder.
        max_kl: how far the policy may move, see `prune_laterals`.
        num_episodes: episodes that the states come from, and, other ones, for each of the two returns.
        num_states: states that decide what is cut.
        floor: the return from which a loss is counted; the games' known floors by default, else 0.
        seed: of everything random.
        num_envs: environments side by side.

    Returns:
        Parameters and returns before and after, what was cut in each lateral, and the new store's path.

    Raises:
        ValueError: with one line.
    """
    run = home_of(run)
    subject = _subject(run, column)
    k = subject.column
    folder = Path(out) if out is not None else _inside(run, "pruned", f"column_{k:03d}")
    if folder.exists():
        raise ValueError(f"{folder}: exists already; a store is never overwritten, give another folder")
    rollout = subject.play(num_episodes, seed, num_states, num_envs)
    pruning = prune_laterals(subject.network, rollout, column=k, max_kl=max_kl)
    before, after = (
        play(
            network,
            subject.env,
            subject.env_config,
            column=k,
            num_episodes=num_episodes,
            seed=seed + 1,
            num_envs=num_envs,
            normalize_actions=subject.normalize_actions,
        ).returns
        for network in (subject.network, pruning.network)
    )
    if floor is None:
        known = known_floor(subject.env, subject.env_config)
        floor = known.value if known is not None else 0.0
    gained = float(before.mean()) - floor
    summary: dict[str, Any] = {
        "run": str(run),
        "task": subject.tasks[k],
        **pruning.to_json(),
        "max_kl": max_kl,
        "num_episodes": num_episodes,
        "return_before": float(before.mean()),
        "return_before_sem": _standard_error(before),
        "return_after": float(after.mean()),
        "return_after_sem": _standard_error(after),
        "floor": floor,
        "return_loss": (float(before.mean()) - float(after.mean())) / gained if gained > 0 else None,
        "store": str(folder),
    }
    store = ColumnStore(folder)
    for index in range(k + 1):
        entry = subject.entries[index]
        extra = dict(entry.extra)
        if index == k:
            # What was measured on the unpruned column no longer holds for this one.
            extra = {"pruned_from": entry.fingerprint, "lateral_parameters_left": pruning.parameters_left}
        store.save_column(
            pruning.network,
            index,
            task=entry.task,
            env=entry.env,
            env_config=entry.env_config,
            score=float(after.mean()) if index == k else entry.score,
            num_env_steps=entry.num_env_steps,
            extra=extra,
        )
    _write_json(folder / "prune.json", summary)
    return summary


def most_used_filters(network: ProgressiveNetwork, sensitivity: Sensitivity) -> list[list[dict[str, Any]]]:
    """The `NUM_FILTERS` first-layer filters of each column with the most Fisher information, most first.

    Returns:
        For each column `{"feature", "share", "weights"}`: share of the layer's information over all columns, weights
        (C, h, w). [] if layer 1 is no convolution.
    """
    if not isinstance(column_of(network, 0).layout.spec.layers[0], Conv):
        return []
    total = sum(float(column.sum()) for column in sensitivity.raw[0]) or 1.0
    filters = []
    for j, fisher in enumerate(sensitivity.raw[0]):
        weight = cast(Tensor, column_of(network, j).layers[0].weight)
        order = np.argsort(-fisher, kind="stable")[:NUM_FILTERS]
        filters.append(
            [
                {
                    "feature": int(m),
                    "share": float(fisher[m]) / total,
                    "weights": np.round(np.asarray(weight[int(m)].detach().cpu(), dtype=float), 5).tolist(),
                }
                for m in order
            ]
        )
    return filters


@dataclass(frozen=True)
class _Subject:
    """A stored column with its environment."""

    network: ProgressiveNetwork
    column: int
    env: str
    env_config: dict[str, Any]
    tasks: tuple[str, ...]
    entries: tuple[Any, ...]
    normalize_actions: bool

    def play(self, num_episodes: int, seed: int, num_states: int, num_envs: int | None) -> Rollout:
        return play(
            self.network,
            self.env,
            self.env_config,
            column=self.column,
            num_episodes=num_episodes,
            num_states=num_states,
            seed=seed,
            num_envs=num_envs,
            normalize_actions=self.normalize_actions,
        )


def _subject(run: Path, column: int | str) -> _Subject:
    store = ColumnStore(find_columns(run))
    entries = store.entries
    if not entries:
        raise ValueError(f"{store.path}: no column is frozen yet")
    names = tuple(task_name(entry.task, entry.extra) for entry in entries)
    if isinstance(column, str):
        if column not in names:
            raise ValueError(f"{run}: no column of task {column!r}; there are {', '.join(names)}")
        column = len(names) - 1 - names[::-1].index(column)
    network = store.load()
    k = column_index(network, column)
    entry = entries[k]
    where = f"{run}: column {k} ({names[k]})"
    env = entry.env
    if env is None and (run / EXPERIMENT_FILE).is_file():
        env = read_experiment(run).get("env")
    if not env:
        raise ValueError(f"{where}: neither the store nor {EXPERIMENT_FILE} names its environment")
    refuse_module(where, env)
    return _Subject(network, k, env, dict(entry.env_config), names[: k + 1], tuple(entries), _normalizes_actions(run))


def _normalizes_actions(run: Path) -> bool:
    """RLlib's setting of that name as the run has it; its default where there are columns without an experiment."""
    if not (run / EXPERIMENT_FILE).exists():
        return True
    config = read_experiment(run).get("config") or {}
    return bool(config.get("normalize_actions", True)) if isinstance(config, dict) else True


def refuse_module(where: str, env: str) -> None:
    """Raises `ValueError` for an environment's id that would import a module: it may come from a stranger's file."""
    module = env.rpartition(":")[0]
    if module and module != "ale_py" and module not in sys.modules:
        raise ValueError(
            f"{where}: its environment {env!r} names a module, which making it would import; expected the id of a "
            "registered environment"
        )


def task_name(task: str, extra: dict[str, Any]) -> str:
    """A column's task; runs that start from another run's columns store those as `<store>:<task>`."""
    return task.partition(":")[2] or task if extra.get("source") else task


def _with_earlier(folder: Path, found: dict[str, Sensitivity]) -> list[Sensitivity]:
    """What was measured now, and what an earlier call left for the same column by the other method."""
    drawn = dict(found)
    like = next(iter(found.values()))
    for method in METHODS:
        file = folder / f"{method}.json"
        if method not in drawn and file.is_file():
            try:
                earlier = Sensitivity.from_json(read_json(file))
            except ValueError:
                continue  # it will be written anew when asked for
            if earlier.values.shape == like.values.shape and earlier.tasks == like.tasks:
                drawn[method] = earlier
    return [drawn[method] for method in METHODS if method in drawn]


def _write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, allow_nan=False) + "\n")
    return path


def _inside(run: Path, *parts: str) -> Path:
    """A folder in a run folder. Raises `ValueError` if a link there leads elsewhere."""
    folder = run
    for part in parts:
        folder /= part
        if folder.is_symlink():
            raise ValueError(f"{folder}: a symbolic link, refused; give another folder to write to")
    return folder


def _standard_error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
