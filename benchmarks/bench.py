"""Runs all benchmarks one after the other and writes docs/performance.md's tables and the figures behind them.

    python benchmarks/bench.py [--quick] [--only growth a3c a3c_columns ppo_columns rllib afs labyrinth]

(or: make bench)

Every benchmark is a script of its own in this folder and can be run alone. Raw figures go to docs/results/bench/*.json
with the command; the tables of docs/performance.md stand between `<!-- NAME -->` and `<!-- /NAME -->` and are written
anew by this script, with the commit and the load of the machine. Figures of different tables don't compare; ratios
within one table do, because its contestants took turns. About half an hour on a quiet machine; `--quick` a third.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import labyrinth_throughput

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "docs" / "results" / "bench"


def spread(values: list[float], digits: int = 0) -> str:
    """`median (lowest-highest)`."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def growth_table(report: dict[str, Any]) -> str:
    cases: dict[tuple[str, int], dict[str, Any]] = {(r["case"], r["columns"]): r for r in report["results"]}
    counts = sorted({k for _, k in cases})
    best = {key: min(r["us"]) for key, r in cases.items()}
    rows = []
    for name in dict.fromkeys(name for name, _ in cases):
        row = [f"`{name}`"]
        for k in counts:
            grown, work = best[name, k] / best[name, counts[0]], cases[name, k]["kflop"]
            first_work = cases[name, counts[0]]["kflop"]
            times = f", x {grown:.2f}" if k != counts[0] and first_work else ""
            flops = f"; {work / first_work:.2f}" if k != counts[0] and first_work else ""
            row.append(f"{best[name, k]:.0f} us{times}{flops}")
        rows.append(row)
    return table(["case", *[f"K = {k}" for k in counts]], rows)


def a3c_table(report: dict[str, Any]) -> str:
    rows = []
    for name, turns in report["turns"].items():
        rates = [t["env_steps_per_s"] for t in turns]
        pairs = f"a3c / {name}", f"{name} / a3c_1"
        ratios = [report["ratios"].get(pair, {}).get("env_steps_per_s") for pair in pairs]
        rows.append(
            [
                f"`{name}`",
                spread(rates),
                f"{statistics.median(t['cpu_us_per_env_step'] for t in turns):.0f}",
                *(spread(ratio, 2) if ratio else "" for ratio in ratios),
            ]
        )
    costs = "us of processor time per env-step"
    return table(["contestant", "env-steps/s", costs, "A3C over it", "over `a3c_1`"], rows)


def a3c_columns_table(report: dict[str, Any]) -> str:
    parts = list(dict.fromkeys(figure["part"] for figure in report["figures"]))
    medians = {(f["part"], f["columns"]): statistics.median(f["us"]) for f in report["figures"]}
    rows = []
    for k, rate in report["rates"].items():
        rows.append([k, *[f"{medians[part, int(k)]:,.0f} us" for part in parts]])
        rows[-1].append(f"{rate['median']:.2f} ({rate['low']:.2f}-{rate['high']:.2f})")
    return table(["K", *[f"`{part}`" for part in parts], "rate of K = 1 (quartiles)"], rows)


def ppo_columns_table(report: dict[str, Any]) -> str:
    rows = []
    for k, ratio in report["ratios"].items():
        low, middle, high = statistics.quantiles(report["updates"][k][report["warm_up"] :], n=4)
        times = "{median:.2f} ({low:.2f}-{high:.2f})".format(**ratio)
        rows.append([k, f"{middle:.0f} ms ({low:.0f}-{high:.0f})", times])
    return table(["K", "an update of 1,024 steps (quartiles)", "times K = 1"], rows)


def rllib_table(report: dict[str, Any]) -> str:
    rows = []
    for algorithm, variants in report["summary"].items():
        for variant, found in variants.items():
            rate, ratio = found["env_steps_per_s"], found.get("times_stock")
            rows.append(
                [
                    f"{algorithm}, `{variant}`",
                    f"{rate['median']:,.0f} ({rate['min']:,.0f}-{rate['max']:,.0f})",
                    f"{found['cpu_us_per_env_step']:.0f}",
                    f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else "",
                ]
            )
    return table(["contestant", "env-steps/s", "us of processor time per env-step", "times stock"], rows)


def afs_table(report: dict[str, Any]) -> str:
    medians = {(r["case"], r["columns"]): statistics.median(r["us"]) for r in report["results"]}
    counts = sorted({k for _, k in medians})
    rows = []
    for name in dict.fromkeys(name for name, _ in medians):
        ratios = [medians[name, k] / medians["update", k] for k in counts]
        rows.append(
            [f"`{name}`", *[f"{medians[name, k]:.0f} us, {r:.1f} updates" for k, r in zip(counts, ratios, strict=True)]]
        )
    return table(["a state", *[f"K = {k}" for k in counts]], rows)


# name: (arguments, those of --quick, what makes the table of the report)
BENCHMARKS: dict[str, tuple[list[str], list[str], Callable[[dict[str, Any]], str]]] = {
    "growth": (["growth.py", "--rounds", "20"], ["growth.py", "--rounds", "6"], growth_table),
    "a3c": (
        ["a3c_throughput.py", "--rounds", "5", "--seconds", "20", "--rollout", "8"],
        ["a3c_throughput.py", "--rounds", "3", "--seconds", "10", "--rollout", "8"],
        a3c_table,
    ),
    "a3c_columns": (
        ["a3c_columns.py", "--rollouts", "120", "--envs", "32"],
        ["a3c_columns.py", "--rollouts", "40", "--envs", "32"],
        a3c_columns_table,
    ),
    "ppo_columns": (
        ["ppo_columns.py", "--rounds", "30"],
        ["ppo_columns.py"],
        ppo_columns_table,
    ),
    "rllib": (
        ["rllib_throughput.py", "--repeats", "5", "--seconds", "30"],
        ["rllib_throughput.py", "--repeats", "3", "--seconds", "15", "--variants", "stock", "module", "package"],
        rllib_table,
    ),
    "afs": (["afs_cost.py"], ["afs_cost.py", "--rounds", "2", "--states", "512"], afs_table),
    "labyrinth": (
        ["labyrinth_throughput.py", "--rounds", "3", "--seconds", "20"],
        ["labyrinth_throughput.py", "--rounds", "2", "--seconds", "8"],
        lambda report: labyrinth_throughput.table(report["turns"]),
    ),
}


def replaced(page: str, name: str, text: str) -> str:
    """The page with what stands between `<!-- name -->` and `<!-- /name -->` exchanged for `text`."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"{PAGE}: no place for '{name}': it needs the lines <!-- {name} --> and <!-- /{name} -->")
    return pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page)


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter turns")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        full, quick, make_table = BENCHMARKS[name]
        command = quick if args.quick else full
        output = RESULTS / f"{name}.json"
        load = os.getloadavg()[0]
        print(f"{name}: benchmarks/{' '.join(command)} (load {load:.1f})", flush=True)
        subprocess.run([sys.executable, str(FOLDER / command[0]), *command[1:], "--output", str(output)], check=True)
        report = json.loads(output.read_text())
        about = (
            f"`python benchmarks/{' '.join(command)}`, commit {commit()}, {date.today()}, {os.cpu_count()} cores "
            f"({platform.processor() or platform.machine()}), load {load:.1f} before:"
        )
        PAGE.write_text(replaced(PAGE.read_text(), name, f"{about}\n\n{make_table(report)}"))


if __name__ == "__main__":
    main()
