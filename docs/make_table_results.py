"""What stays of a transfer experiment's trials: small files that `rllib report` reads like the run folders themselves.

    python docs/make_table_results.py runs/pong-soup-table --out docs/results/pong_soup/table

Of every finished trial `OUT/runs/TRIAL` keeps `experiment.json`, the columns of `progress.csv` that scores are made of
and its sensitivities, of a source its column store, too: a copy of `OUT/runs` under `runs/` goes on where it stood, and
its trials start from the very same column. `trials.csv`
has a row a trial: steps, minutes of training, mean return of the last tenth of its curve, and the fingerprints of the
column it started from and of its own. `curves.csv` has the learning curves, 50 points each, `curves.png` shows them.

Tables are written anew between marks: in `OUT/README.md` `<!-- scores -->`, `<!-- budgets -->`, `<!-- trials -->`
and `<!-- afs -->`, with the seeds that are finished, `<!-- laterals -->`, of the `OUT/laterals.json` that
`benchmarks/laterals.py` wrote, and in the page given by `--readme` `<!-- table -->`, with the targets that are whole.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from rllib_pnn.analysis.analyze import ANALYSIS_FOLDER
from rllib_pnn.analysis.report import write_report
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


FLOOR = -21.0  # the lowest return of Pong: where areas begin
# The paper's order (Table 1, Pong Soup) and names.
ROWS = {
    "finetune_heads": "B2, fine-tune heads",
    "scratch": "B1, scratch",
    "random_column": "B4, random column",
    "finetune_all": "B3, fine-tune all",
    "progressive_2": "progressive, 2 columns",
}


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def targets_of(runs: list[str], finished: set[tuple[str, str, int]]) -> tuple[list[str], list[str]]:
    """Targets of a plan's trials, in its order: those with a finished trial of theirs, and those with all of them."""
    pattern = re.compile(rf"(?:.+_to_)?(.+)_({'|'.join(map(_short, ROWS))})_seed_(\d+)")
    names = [pattern.fullmatch(run) for run in runs]
    wanted = [(match[1], match[2], int(match[3])) for match in names if match]
    have = {(target, _short(method), seed) for target, method, seed in finished}
    targets = list(dict.fromkeys(target for target, _, _ in wanted))
    begun = [t for t in targets if any(cell in have for cell in wanted if cell[0] == t)]
    return begun, [t for t in begun if all(cell in have for cell in wanted if cell[0] == t)]


def _short(method: str) -> str:
    """As it stands in a trial's name."""
    return "progressive" if method.startswith("progressive") else method


def score_table(table: dict[str, Any], targets: list[str]) -> str:
    """Scores by architecture and target as `mean (each seed)`; the mean over targets where all are there."""
    rows = []
    for method, title in ROWS.items():
        row = next((row for row in table["rows"] if row["method"] == method), None)
        cells = {cell["target"]: cell["seed_scores"] for cell in row["cells"]} if row else {}
        found = [cells[target] for target in targets if target in cells]
        means = [np.mean(values) for values in found]
        paper = row["paper_mean_median"] if row else ("", "")
        ours = f"**{np.mean(means):.0f}** ({np.median(means):.0f})" if found and len(found) == len(targets) else ""
        texts = [
            f"**{np.mean(cells[target]):.0f}** ({', '.join(f'{v:.0f}' for v in cells[target])})"
            if target in cells
            else ""
            for target in targets
        ]
        rows.append([title, f"{paper[0]} ({paper[1]})" if row else "", ours, *texts])
    head = ["percent of scratch", "paper: mean (median)", "ours: mean (median)", *(f"`{t}` (seeds)" for t in targets)]
    return markdown(head, rows)


def trial_table(trials: list[dict[str, Any]], curves: list[dict[str, Any]], targets: list[str]) -> str:
    """What each cell's trials did, a figure a seed."""
    rows = []
    for method, title in ROWS.items():
        cells = [title]
        for target in targets:
            found = [t for t in trials if (t["target"], t["architecture"]) == (target, method)]
            returns = [c["episode_return_mean"] for c in curves if (c["target"], c["architecture"]) == (target, method)]
            last = ", ".join(f"{t['last_tenth']:.1f}" for t in found)
            minutes = ", ".join(f"{t['minutes']:.0f}" for t in found)
            cells.append(f"{np.mean(returns):.1f}; {last}; {minutes}" if found else "")
        rows.append(cells)
    return markdown(["return: mean; last tenth of each seed; minutes", *(f"`{t}`" for t in targets)], rows)


def budget_table(curves: list[dict[str, Any]], targets: list[str], floor: float) -> str:
    """What the scores would be, had training ended sooner, and with the areas of all targets added before dividing."""
    grid = sorted({row["env_steps"] for row in curves if row["architecture"] != "source"})
    budgets = [grid[len(grid) * part // 4 - 1] for part in (2, 3, 4)]
    area = {
        (budget, target, method): float(
            np.mean(
                [
                    row["episode_return_mean"] - floor
                    for row in curves
                    if (row["target"], row["architecture"]) == (target, method) and row["env_steps"] <= budget
                ]
                or [np.nan]
            )
        )
        for budget in budgets
        for target in targets
        for method in ROWS
    }

    def scores(budget: int, method: str) -> list[float]:
        return [100 * area[budget, target, method] / area[budget, target, "scratch"] for target in targets]

    rows = []
    for method, title in ROWS.items():
        cells = [f"{np.mean(s):.0f} ({np.median(s):.0f})" for s in (scores(budget, method) for budget in budgets)]
        ours, scratch = (sum(area[budgets[-1], target, m] for target in targets) for m in (method, "scratch"))
        rows.append([title, *cells, f"{100 * ours / scratch:.0f}"])
    head = [f"mean (median) at {budget // 1000:,}k steps" for budget in budgets]
    return markdown(["percent of scratch", *head, "areas added up"], rows)


def afs_table(runs: Path, targets: list[str]) -> str:
    """The source column's share of the average Fisher sensitivity of every layer, a figure a seed."""
    rows, layers = [], ["layer"]
    for target in targets:
        found = [
            json.loads(path.read_text())
            for path in sorted(runs.glob(f"*_to_{target}_progressive_seed_*/{ANALYSIS_FOLDER}/column_001/afs.json"))
        ]
        if found:
            layers = found[0]["layers"]
            shares = zip(*([values[0] for values in entry["values"]] for entry in found), strict=True)
            rows.append([f"`{target}`", *(", ".join(f"{v:.2f}" for v in layer) for layer in shares)])
    return markdown(["source column's share of AFS", *layers], rows)


def laterals_table(entries: list[dict[str, Any]]) -> str:
    """What the lateral adds to a layer, over the layer's own share, and alpha, of each seed."""
    found: dict[tuple[str, str], list[dict[str, dict[str, Any]]]] = {}
    for entry in entries:
        kind = "random column" if "random_column" in entry["store"] else "progressive"
        found.setdefault((entry["task"], kind), []).append({layer["layer"]: layer for layer in entry["trained"]})
    layers = ["2", "3", "4", "policy"]

    def cell(layer: dict[str, Any]) -> str:
        return f"{layer['lateral'] / layer['own']:.2f} ({np.mean(layer['alpha']):.2f})"

    rows = [
        [f"`{task}`, {kind}", *(", ".join(cell(seed[layer]) for seed in seeds) for layer in layers)]
        for (task, kind), seeds in found.items()
    ]
    return markdown(["lateral / own (alpha)", "2: conv", "3: conv", "4: dense", "policy"], rows)


def replace(page: Path, name: str, text: str) -> None:
    """Puts `text` between the page's two marks."""
    before = page.read_text()
    after, count = re.subn(
        rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: f"{m[1]}{text}\n{m[2]}", before, flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(f"{page}: expected one place between <!-- {name} --> and <!-- /{name} -->, found {count}")
    page.write_text(after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="the folder of its trials")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--readme", type=Path, help="a page that shows the scores, too")
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
    with tempfile.TemporaryDirectory() as folder:
        write_report([args.out / "runs"], Path(folder) / "report.html")
        (table,) = json.loads((Path(folder) / "report.json").read_text())["tables"]
        shutil.copy(Path(folder) / "report_files" / "pong_soup_learning_curves.png", args.out / "curves.png")
    begun, whole = targets_of(plan["runs"], {(t["target"], t["architecture"], t["seed"]) for t in trials})
    replace(args.out / "README.md", "scores", score_table(table, begun))
    replace(args.out / "README.md", "trials", trial_table(trials, curves, begun))
    replace(args.out / "README.md", "budgets", budget_table(curves, whole, FLOOR))
    replace(args.out / "README.md", "afs", afs_table(args.out / "runs", begun))
    laterals = args.out / "laterals.json"
    replace(args.out / "README.md", "laterals", laterals_table(json.loads(laterals.read_text())))
    if args.readme:
        replace(args.readme, "table", score_table(table, whole))


if __name__ == "__main__":
    main()
