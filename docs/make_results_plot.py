"""Draws curve*.png from curve*.csv in docs/results/pong_soup and docs/results/cartpole_soup: return against steps."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"
# table: episodes of the mean, the return that was aimed at, the axis
TABLES = {
    "pong_soup/curve.csv": (32, 18, (-21.5, 21.5)),
    "pong_soup/curve_before.csv": (32, 15, (-21.5, 21.5)),
    "cartpole_soup/curve.csv": (30, 450, (0, 510)),
}


def draw(table: Path, window: int, aim: float, limits: tuple[float, float]) -> None:
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for task in dict.fromkeys(row["task"] for row in rows):
        points = [
            (int(row["task_env_steps"]), float(row["episode_return_mean"]))
            for row in rows
            if row["task"] == task and row["episode_return_mean"] not in ("", "nan")
        ]
        axes.plot([x / 1e3 for x, _ in points], [y for _, y in points], label=task, linewidth=1.5)
    axes.axhline(aim, color="0.7", linewidth=0.8, linestyle="--")
    axes.set(
        xlabel="environment steps on the task, thousands", ylabel=f"return of the last {window} episodes", ylim=limits
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(table.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    for name, settings in TABLES.items():
        draw(RESULTS / name, *settings)
