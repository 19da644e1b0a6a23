"""Run folders as `rllib train` leaves them: Tune's files, experiment.json, columns/manifest.json."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Points = Sequence[tuple[float, float, float]]
"""(agent steps on this task at the end of the iteration, mean return of its episodes, their number)"""


def write_run(
    path: Path,
    curves: Mapping[str, Points],
    *,
    env: str = "rllib_pnn/PongSoup-v0",
    architecture: str = "progressive",
    source_tasks: Sequence[str] | None = None,
    columns_from: str | None = None,
    seed: int | None = 0,
    until: Mapping[str, Any] | None = None,
    finished: bool = True,
    smoothed: bool = False,
    env_configs: Mapping[str, Mapping[str, Any]] | None = None,
    column_results: Mapping[str, tuple[float, float]] | None = None,
    manifest_tasks: Sequence[str] | None = None,
    formats: Sequence[str] = ("json", "csv"),
) -> Path:
    """One trial folder with one list of points a task, in the tasks' order."""
    path.mkdir(parents=True)
    tasks = [
        {
            "name": name,
            "env_config": dict((env_configs or {}).get(name, {"variant": name})),
            "until": dict(until or {"num_env_steps": points[-1][0] if points else 1000}),
        }
        for name, points in curves.items()
    ]
    experiment: dict[str, Any] = {
        "name": "test",
        "run": "PPO",
        "env": env,
        "config": {"lr": 0.001, "seed": seed},
        "progressive": {
            "architecture": architecture,
            "column": "atari",
            "columns_from": columns_from,
            "tasks": tasks,
        },
    }
    if source_tasks is not None:
        experiment["progressive"]["source_tasks"] = list(source_tasks)
    (path / "experiment.json").write_text(json.dumps(experiment))

    results, total, iteration = [], 0.0, 0
    for index, (name, points) in enumerate(curves.items()):
        before = total
        for number, (steps, mean, episodes) in enumerate(points):
            iteration += 1
            total = before + steps
            progressive = {
                "task": name,
                "task_index": index,
                "num_tasks": len(curves),
                "column": index,
                "task_env_steps": steps,
                "episode_return_mean": mean,
                "task_over": (over := finished and number == len(points) - 1),
                "finished": over and index == len(curves) - 1,
            }
            if not smoothed:
                progressive |= {"num_episodes": episodes, "episode_return_sum": mean * episodes}
            result: dict[str, Any] = {
                "env_runners": {"episode_return_mean": mean, "num_episodes": episodes},
                "num_env_steps_sampled_lifetime": total,
                "training_iteration": iteration,
                "progressive": progressive,
                "config": {"model": {"fcnet_hiddens": [256, 256]}},
            }
            nan = float("nan")
            measured = (column_results or {}) if index == len(curves) - 1 else {}
            result["columns"] = {
                task: {
                    "episode_return_mean": measured.get(task, (nan, nan))[1],
                    "frozen_episode_return_mean": measured.get(task, (nan, nan))[0],
                    "num_episodes": 10 if task in measured else 0,
                }
                for task in curves
            }
            results.append(result)
    if "json" in formats:
        (path / "result.json").write_text("".join(json.dumps(result) + "\n" for result in results))
    if "csv" in formats:
        flat = [_flatten(result) for result in results]
        with open(path / "progress.csv", "w", newline="") as file:
            # As Tune does: the first result's keys are the header for good.
            writer = csv.DictWriter(file, list(flat[0]) if flat else ["training_iteration"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(flat)
    if manifest_tasks is not None:
        (path / "columns").mkdir()
        entries = [
            {"task": task if task in curves else f"columns:{task}", "env": env, "extra": {"source": task not in curves}}
            for task in manifest_tasks
        ]
        (path / "columns" / "manifest.json").write_text(json.dumps({"columns": entries}))
    return path


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= _flatten(item, f"{prefix}{key}/")
        else:
            flat[prefix + key] = item
    return flat
