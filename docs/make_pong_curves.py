"""Learning curves of several runs in one figure: return against environment steps and against wall clock.

    python docs/make_pong_curves.py --out docs/results/pong_ppo LABEL=RUN/seed_0 LABEL=RUN/seed_1 ...

Reads `result.json` of every run folder, or, of another figure's `curves.csv`, the rows of that label; runs of one label
share a colour. Writes `curves.csv` (a row about every 10,000 steps) and `curves.png`; without runs, the figure alone,
from the CSV that is there.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FIELDS = ("label", "seed", "env_steps", "train_time_s", "episode_return_mean")
EVERY_STEPS = 10_000


def rows_of(label: str, run: Path) -> list[dict[str, Any]]:
    """A run's results, thinned out; the last one stays. Of a CSV file the rows as they are."""
    if run.suffix == ".csv":
        with open(run, newline="") as file:
            found = [row for row in csv.DictReader(file) if row["label"] == label]
        if not found:
            raise SystemExit(f"{run}: no row has the label {label!r}")
        return found
    seed = run.name.rpartition("_")[2]
    rows: list[dict[str, Any]] = []
    kept_at = -EVERY_STEPS
    results = [json.loads(line) for line in (run / "result.json").read_text().splitlines()]
    for result in results:
        steps = int(result["env_runners"]["num_env_steps_sampled_lifetime"])
        block = result.get("progressive") or result["env_runners"]  # stock runs have RLlib's window alone
        value = block.get("episode_return_mean")
        if value is None or not math.isfinite(value) or (steps - kept_at < EVERY_STEPS and result is not results[-1]):
            continue
        kept_at = steps
        numbers = (steps, round(result["time_total_s"], 1), round(value, 2))
        rows.append(dict(zip(FIELDS, (label, seed, *numbers), strict=True)))
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    labels = list(dict.fromkeys(row["label"] for row in rows))
    for label, seed in dict.fromkeys((row["label"], row["seed"]) for row in rows):
        curve = [row for row in rows if (row["label"], row["seed"]) == (label, seed)]
        returns = [float(row["episode_return_mean"]) for row in curve]
        first = seed == next(row["seed"] for row in rows if row["label"] == label)
        style = {"color": f"C{labels.index(label)}", "linewidth": 1.4, "label": label if first else None}
        panels[0].plot([int(row["env_steps"]) / 1e3 for row in curve], returns, **style)
        panels[1].plot([float(row["train_time_s"]) / 60 for row in curve], returns, **style)
    for panel, label in zip(panels, ("environment steps, thousands", "wall clock, minutes"), strict=True):
        panel.axhline(18, color="0.7", linewidth=0.8, linestyle="--")
        panel.set(xlabel=label, ylim=(-21.5, 21.5))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("return, mean of the last 50 episodes")
    figure.legend(
        handles=panels[0].get_legend_handles_labels()[0],
        loc="outside lower center",
        ncols=min(3 if max(map(len, labels)) < 30 else 2, len(labels)),
        frameon=False,
    )
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="LABEL=RUN")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    table = args.out / "curves.csv"
    if args.runs:
        pairs = [run.partition("=") for run in args.runs]
        rows = [row for label, _, folder in pairs for row in rows_of(label, Path(folder))]
        with open(table, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    with open(table, newline="") as file:
        draw(list(csv.DictReader(file)), args.out / "curves.png")


if __name__ == "__main__":
    main()
