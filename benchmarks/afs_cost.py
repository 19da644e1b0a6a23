"""What AFS costs: microseconds a state at K = 1, 2, 4, 8 columns, beside the network's forward and update.

    python benchmarks/afs_cost.py [--states 1024] [--rounds 5] [--output afs.json]

One thread, the Atari column, random states and untrained columns: AFS costs the same on trained ones. `forward` is the
newest column's output without gradients and `update` its forward and backward pass; AFS needs one backward pass
through all columns, each feature's gradients kept apart by state, so it can't be cheaper than `update`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rllib_pnn.analysis.fisher import average_fisher_sensitivity
from rllib_pnn.network import ProgressiveNetwork

BATCH = 256


def make_cases(num_columns: int, num_states: int) -> dict[str, Callable[[], Any]]:
    network = ProgressiveNetwork((4, 84, 84), 6, "atari")
    for _ in range(num_columns):
        network.add_column()
    generator = torch.Generator().manual_seed(0)
    states = torch.randint(0, 256, (num_states, 4, 84, 84), generator=generator, dtype=torch.uint8)

    @torch.no_grad()
    def forward() -> None:
        for batch in states.split(BATCH):
            network(batch)

    def update() -> None:
        for batch in states.split(BATCH):
            logits, value, _ = network(batch)
            (logits.square().mean() + value.square().mean()).backward()

    def afs() -> None:
        average_fisher_sensitivity(network, states, batch_size=BATCH)

    return {"forward": forward, "update": update, "afs": afs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="+", default=[1, 2, 4, 8], metavar="K")
    parser.add_argument("--states", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON with every round's figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    print(f"{'case':<10}{'K':>3}{'us a state':>12}{'times update':>14}")
    for k in args.columns:
        cases = make_cases(k, args.states)
        times: dict[str, list[float]] = {name: [] for name in cases}
        for number in range(args.rounds + 1):
            for name, action in cases.items():
                start = time.thread_time()
                action()
                if number:  # the first round warms up
                    times[name].append(1e6 * (time.thread_time() - start) / args.states)
        for name, found in times.items():
            ratio = statistics.median(found) / statistics.median(times["update"])
            print(f"{name:<10}{k:>3}{statistics.median(found):>12.0f}{ratio:>14.2f}", flush=True)
            results.append({"case": name, "columns": k, "us": found})
    if args.output:
        args.output.write_text(json.dumps({"states": args.states, "batch": BATCH, "results": results}))


if __name__ == "__main__":
    main()
