"""Writes docs/results/labyrinth: curves of runs as CSV, and curve.png drawn from them.

How to run: python docs/make_labyrinth_results.py [NAME=RUN ...]

`NAME=RUN` (such as `track_2_scratch=runs/.../seed_0`) writes NAME.csv from a run folder's progress.csv first; without
any the picture alone is drawn again.
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from rllib_pnn.envs.labyrinth_levels import LEVELS

FOLDER = Path(__file__).parent / "results" / "labyrinth"
COLUMNS = ("task", "column", "task_env_steps", "episode_return_mean", "num_episodes", "episode_return_sum")
PANELS = {
    "Track 1, from pixels": {"track_1": "one column"},
    "Track 2": {"track_2_progressive": "second column after Track 1", "track_2_scratch": "from scratch"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="NAME=RUN", help="a curve's name and a run folder")
    for name, _, run in (argument.partition("=") for argument in parser.parse_args().runs):
        keep_curve(Path(run), FOLDER / f"{name}.csv")
    draw(FOLDER / "curve.png")


def keep_curve(run: Path, path: Path) -> None:
    """One row for each iteration of a run."""
    names = ["training_iteration", *(f"progressive/{name}" for name in COLUMNS)]
    with open(run / "progress.csv", newline="") as file:
        rows = [[row[name] for name in names] for row in csv.DictReader(file)]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["iteration", *COLUMNS])
        writer.writerows(rows)


def read_curve(path: Path) -> tuple[str, list[tuple[int, float]]]:
    """The level, and (env-steps, mean return) wherever an episode has ended yet."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    points = [
        (int(row["task_env_steps"]), float(row["episode_return_mean"]))
        for row in rows
        if row["episode_return_mean"] not in ("", "nan")
    ]
    return rows[0]["task"], points


def draw(path: Path) -> None:
    figure, axes = plt.subplots(1, len(PANELS), figsize=(9, 3.4), layout="constrained")
    for axis, (title, curves) in zip(axes, PANELS.items(), strict=True):
        level = ""
        for name, label in curves.items():
            if not (FOLDER / f"{name}.csv").exists():
                continue
            level, points = read_curve(FOLDER / f"{name}.csv")
            axis.plot([x / 1e3 for x, _ in points], [y for _, y in points], label=label, linewidth=1.5)
            items = LEVELS[level].num_good_items
        axis.axhline(items, color="0.7", linewidth=0.8)
        axis.axhline(0.8 * items, color="0.7", linewidth=0.8, linestyle="--")
        axis.set(title=title, xlabel="env-steps on the level, thousands", ylim=(0, items * 1.05))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="lower right")
    axes[0].set_ylabel("items in an episode, last 32")
    figure.savefig(path, dpi=130, metadata={"Software": None})
    print(path)


if __name__ == "__main__":
    main()
