"""What each further column costs: time of inference and update at K = 1, 2, 4, 8 beside the arithmetic they need.

How to run: `python benchmarks/growth.py [--rounds 30] [--output growth.json]`. One thread; all cases take turns in each
round, so that a busy machine disturbs all alike. Reported are the fastest round (what the code costs) and the median.

| column of the table | what is timed, microseconds an observation |
|---|---|
| `inference` | an EnvRunner's step: the frozen columns' activations and the newest column's outputs, batch 16 |
| `sources` | the part of `inference` that earlier columns take: what an EnvRunner pays and may pass on |
| `own` | the newest column alone, its sources given |
| `update` | forward, backward with sources given, batch 320, without the optimizer's step |
| `features` | sources at batch 320: what a Learner pays once an observation if the EnvRunner did not pass them on |
| `optimizer` | one RMSProp step for the newest column and a zeroing of gradients, spread over the batch of 320 |
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from rllib_pnn.network import ProgressiveNetwork
from rllib_pnn.network.memory import keep_freed_memory

INFERENCE_BATCH = 16
UPDATE_BATCH = 320


def make_cases(spec: str, num_columns: int) -> dict[str, tuple[int, Callable[[], Any]]]:
    """`{name: (batch, action)}` for one network."""
    network = ProgressiveNetwork((4, 84, 84), 18, spec)
    for _ in range(num_columns):
        network.add_column()
    generator = torch.Generator().manual_seed(0)
    step = torch.randint(0, 256, (INFERENCE_BATCH, 4, 84, 84), generator=generator, dtype=torch.uint8)
    rollout = torch.randint(0, 256, (UPDATE_BATCH, 4, 84, 84), generator=generator, dtype=torch.uint8)
    step_sources, _ = network.sources(step)
    rollout_sources, _ = network.sources(rollout)
    parameters = network.trainable_parameters()
    optimizer = torch.optim.RMSprop(parameters, lr=0.0, alpha=0.99)

    def update() -> None:
        logits, value, _ = network(rollout, sources=rollout_sources)
        (logits.square().mean() + value.square().mean()).backward()

    def optimize() -> None:
        optimizer.step()
        for parameter in parameters:
            parameter.grad.zero_()

    def without_gradient(action: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return action()

        return run

    update()
    return {
        "inference": (INFERENCE_BATCH, without_gradient(lambda: network(step))),
        "sources": (INFERENCE_BATCH, without_gradient(lambda: network.sources(step))),
        "own": (INFERENCE_BATCH, without_gradient(lambda: network(step, sources=step_sources))),
        "update": (UPDATE_BATCH, update),
        "features": (UPDATE_BATCH, without_gradient(lambda: network.sources(rollout))),
        "optimizer": (UPDATE_BATCH, optimize),
    }


def measure(cases: dict[Any, tuple[int, Callable[[], Any]]], rounds: int, repeat_s: float) -> dict[Any, list[float]]:
    """Microseconds an observation, one figure a round; every case runs for at least `repeat_s` in every round."""
    times: dict[Any, list[float]] = {key: [] for key in cases}
    for number in range(rounds + 1):
        for key, (batch, action) in cases.items():
            count, start = 0, time.thread_time()
            while True:
                action()
                count += 1
                elapsed = time.thread_time() - start
                if elapsed >= repeat_s:
                    break
            if number > 0:  # the first round warms up
                times[key].append(1e6 * elapsed / (count * batch))
    return times


def flops(action: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--columns", type=int, nargs="+", default=[1, 2, 4, 8], metavar="K")
    parser.add_argument("--spec", default="atari", help="a preset for images (default: atari)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeat-ms", type=float, default=4.0, help="least time a case and round")
    parser.add_argument("--only", nargs="+", help="cases to time")
    parser.add_argument("--output", type=Path, help="JSON with every round's figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()

    cases = {
        (name, k): case
        for k in arguments.columns
        for name, case in make_cases(arguments.spec, k).items()
        if not arguments.only or name in arguments.only
    }
    kilo_flops = {key: flops(action) / batch / 1e3 for key, (batch, action) in cases.items()}
    times = measure(cases, arguments.rounds, arguments.repeat_ms / 1e3)

    base = arguments.columns[0]
    print(f"{arguments.spec}, torch {torch.__version__}, one thread, {arguments.rounds} rounds; us an observation")
    print(
        f"{'case':<10}{'K':>3}{'best':>9}{'median':>9}{'x K=' + str(base):>9}{'kFLOP':>9}{'x K=' + str(base):>9}{'GFLOP/s':>9}"  # noqa: E501
    )
    for (name, k), rounds in sorted(times.items(), key=lambda item: list(cases).index(item[0])):
        best, first = min(rounds), min(times[name, base])
        work, first_work = kilo_flops[name, k], kilo_flops[name, base]
        print(
            f"{name:<10}{k:>3}{best:>9.1f}{statistics.median(rounds):>9.1f}{best / first:>9.2f}{work:>9.0f}"
            f"{work / first_work if first_work else 0:>9.2f}{work / best / 1e3:>9.2f}"
        )
    if arguments.output:
        results = [
            {"case": name, "columns": k, "batch": cases[name, k][0], "kflop": kilo_flops[name, k], "us": rounds}
            for (name, k), rounds in times.items()
        ]
        about = {"spec": arguments.spec, "torch": torch.__version__, "machine": platform.processor(), "threads": 1}
        arguments.output.write_text(json.dumps({**about, "unit": "microseconds an observation", "results": results}))


if __name__ == "__main__":
    main()
