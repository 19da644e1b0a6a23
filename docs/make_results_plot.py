"""Draws docs/results/pong_soup/curve.png from curve.csv beside it: return against steps, a line a task."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent / "results" / "pong_soup"


def main() -> None:
    with open(FOLDER / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for task in dict.fromkeys(row["task"] for row in rows):
        points = [
            (int(row["task_env_steps"]), float(row["episode_return_mean"]))
            for row in rows
            if row["task"] == task and row["episode_return_mean"] not in ("", "nan")
        ]
        axes.plot([x / 1e6 for x, _ in points], [y for _, y in points], label=task, linewidth=1.5)
    axes.axhline(15, color="0.7", linewidth=0.8, linestyle="--")
    axes.set(
        xlabel="environment steps on the task, millions", ylabel="return of the last 32 episodes", ylim=(-21.5, 21.5)
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(FOLDER / "curve.png", dpi=130)


if __name__ == "__main__":
    main()
