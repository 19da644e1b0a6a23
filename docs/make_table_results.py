"""What stays of a transfer experiment's trials: small files that `rllib report` reads like the run folders themselves.

    python docs/make_table_results.py runs/pong-soup-table --out docs/results/pong_soup/table

Of every finished trial `OUT/runs/TRIAL` keeps `experiment.json`, the columns of `progress.csv` that scores are made of
and its sensitivities, of a source its column store, too: a copy of `OUT/runs` under `runs/` goes on where it stood, and
its trials start from the very same column. `trials.csv`
has a row a trial: steps, minutes of training, mean return of the last tenth of its curve, and the fingerprints of the
column it started from and of its own. `curves.csv` has the learning curves, 50 points each.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from rllib_pnn.analysis.analyze import ANALYSIS_FOLDER
from rllib_pnn.analysis.runs import Run, read_run
from rllib_pnn.analysis.transfer import step_grid, task_curve

OF_TASK = ("task", "task_index", "task_env_steps", "num_episodes", "episode_return_sum", "task_over", "finished")
KEPT = ("training_iteration", "time_total_s", *(f"progressive/{key}" for key in OF_TASK))


def keep(trial: Path, folder: Path) -> None:
    """The small copy of one run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(trial / "experiment.json", folder)
    state = json.loads((trial / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"checkpoints": []}, indent=2) + "\n")
    with open(trial / "progress.csv", newline="") as source, open(folder / "progress.csv", "w", newline="") as target:
        writer = csv.DictWriter(target, KEPT, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in csv.DictReader(source):
            writer.writerow(row | {"time_total_s": f"{float(row['time_total_s']):.1f}"})
    for file in trial.glob(f"{ANALYSIS_FOLDER}/*/*.json"):
        copy = folder / file.relative_to(trial)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    if trial.name.startswith("source_"):
        shutil.copytree(trial / "columns", folder / "columns", dirs_exist_ok=True)


def rows_of(run: Run) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Rows of `trials.csv` and of `curves.csv`."""
    (task,) = run.tasks
    names = {"target": task.task, "architecture": "source" if task.is_source else task.method, "seed": task.seed}
    with open(run.path / "progress.csv", newline="") as file:
        *_, last = csv.DictReader(file)
    grid = step_grid(task.step_budget or task.last_step)
    curve = task_curve(task, grid)
    prints = [entry["fingerprint"][:12] for entry in run.columns]
    started = run.columns[0]["extra"].get("source") if run.columns else None
    summary = names | {
        "env_steps": int(task.last_step),
        "minutes": round(float(last["time_total_s"]) / 60, 1),
        "last_tenth": round(float(np.mean(curve[-5:])), 2),
        "source_fingerprint": prints[0] if started else "",
        "fingerprint": prints[-1] if prints else "",
    }
    return summary, [
        names | {"env_steps": round(float(step)), "episode_return_mean": round(float(value), 2)}
        for step, value in zip(grid, curve, strict=True)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="the folder of its trials")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    trials, curves = [], []
    (args.out / "runs").mkdir(parents=True, exist_ok=True)
    plan = json.loads((args.experiment / "plan.json").read_text())
    plan["source"] = f"tuned_examples/{Path(plan['source']).name}"
    (args.out / "runs" / "plan.json").write_text(json.dumps(plan, indent=2) + "\n")
    for trial in sorted(path.parent for path in args.experiment.glob("*/state.json")):
        if json.loads((trial / "state.json").read_text())["status"] == "finished":
            keep(trial, args.out / "runs" / trial.name)
            summary, curve = rows_of(read_run(trial))
            trials.append(summary)
            curves += curve
    write(args.out / "trials.csv", trials)
    write(args.out / "curves.csv", curves)


if __name__ == "__main__":
    main()
