"""What each further column costs: time of inference and update at K = 1, 2, 4, 8 beside the arithmetic they need.

How to run: `python benchmarks/growth.py [--rounds 20] [--output growth.json]`. One thread. All cases take turns in
every round, so that a busy machine disturbs all alike; time is this thread's on the processor, the best round counts.

| case | microseconds an observation for |
|---|---|
| `inference` | earlier columns and the newest column's outputs, batch 16, no gradient: an evaluation's step |
| `step` | the same, the earlier columns' activations kept for the update: an A3C or PPO EnvRunner's step |
| `own` | the newest column alone, batch 16, its sources given |
| `update` | forward and backward of the newest column, sources given, batch 320, without the optimizer |
| `features` | sources at batch 320: what a Learner pays once an observation where the EnvRunner did not keep them |
| `optimizer` | one RMSProp step for the newest column, spread over the batch of 320 |

Two ratios follow. An A3C worker spends `--env-us` (ALE's emulation) + step + update on an observation; its rate at K
columns is given relative to K = 1, as is the cost of a PPO update of 4 epochs, features computed once.
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
EPOCHS = 4

Case = tuple[int, Callable[[], Any]]  # batch, action


def make_cases(spec: str, num_columns: int) -> dict[str, Case]:
    network = ProgressiveNetwork((4, 84, 84), 18, spec)
    for _ in range(num_columns):
        network.add_column()
    generator = torch.Generator().manual_seed(0)
    few, many = (
        torch.randint(0, 256, (batch, 4, 84, 84), generator=generator, dtype=torch.uint8)
        for batch in (INFERENCE_BATCH, UPDATE_BATCH)
    )
    few_sources, _ = network.sources(few)
    many_sources, _ = network.sources(many)
    parameters = network.trainable_parameters()
    optimizer = torch.optim.RMSprop(parameters, lr=0.0, alpha=0.99)

    def update() -> None:
        logits, value, _ = network(many, sources=many_sources)
        (logits.square().mean() + value.square().mean()).backward()

    update()  # gradients for the optimizer's case
    no_grad = torch.no_grad()
    return {
        "inference": (INFERENCE_BATCH, no_grad(lambda: network(few))),
        "step": (INFERENCE_BATCH, no_grad(lambda: network.forward_with_sources(few))),
        "own": (INFERENCE_BATCH, no_grad(lambda: network(few, sources=few_sources))),
        "update": (UPDATE_BATCH, update),
        "features": (UPDATE_BATCH, no_grad(lambda: network.sources(many))),
        "optimizer": (UPDATE_BATCH, optimizer.step),
    }


def measure(cases: dict[Any, Case], rounds: int, repeat_s: float) -> dict[Any, list[float]]:
    """Microseconds an observation, one figure a round; every case runs for at least `repeat_s` in every round."""
    times: dict[Any, list[float]] = {key: [] for key in cases}
    for number in range(rounds + 2):
        for key, (batch, action) in cases.items():
            count, start = 0, time.thread_time()
            while True:
                action()
                count += 1
                elapsed = time.thread_time() - start
                if elapsed >= repeat_s:
                    break
            if number >= 2:  # two rounds to warm up: see together.py
                times[key].append(1e6 * elapsed / (count * batch))
    return times


def kflop(case: Case) -> float:
    """Thousand floating-point operations an observation (a multiplication and an addition are two)."""
    batch, action = case
    for _ in range(2):  # past what a first call does once
        action()
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops() / batch / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="+", default=[1, 2, 4, 8], metavar="K")
    parser.add_argument("--spec", default="atari", help="a preset for images without LSTM (default: atari)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeat-ms", type=float, default=4.0, help="least time a case and round (default: 4)")
    parser.add_argument("--env-us", type=float, default=530.0, help="an env step, for A3C (default: 530, Pong)")
    parser.add_argument("--output", type=Path, help="JSON with every round's figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()

    by_columns = {k: make_cases(arguments.spec, k) for k in arguments.columns}
    cases = {(name, k): by_columns[k][name] for name in by_columns[arguments.columns[0]] for k in arguments.columns}
    work = {key: kflop(case) for key, case in cases.items()}
    times = measure(cases, arguments.rounds, arguments.repeat_ms / 1e3)
    best = {key: min(rounds) for key, rounds in times.items()}

    base = arguments.columns[0]
    print(f"{arguments.spec}, torch {torch.__version__}, one thread, {arguments.rounds} rounds, us an observation")
    print(f"{'case':<10}{'K':>3}{'best':>9}{'median':>9}{'growth':>8}{'kFLOP':>8}{'growth':>8}{'GFLOP/s':>9}")
    for name, k in cases:
        us, flops, first_flops = best[name, k], work[name, k], work[name, base]
        print(
            f"{name:<10}{k:>3}{us:>9.1f}{statistics.median(times[name, k]):>9.1f}{us / best[name, base]:>8.2f}"
            f"{flops:>8.0f}{flops / first_flops if first_flops else 0:>8.2f}{flops / us:>9.1f}"
        )
    ratios = {}
    for k in arguments.columns:
        a3c = [arguments.env_us + best["step", n] + best["update", n] for n in (base, k)]
        ppo = [EPOCHS * best["update", n] + (best["features", n] if n > 1 else 0.0) for n in (base, k)]
        ratios[k] = {"a3c_rate": a3c[0] / a3c[1], "ppo_update_cost": ppo[1] / ppo[0]}
        rate, cost = ratios[k].values()
        print(f"K = {k}: A3C rate {rate:.2f} of K = {base}, PPO update {cost:.2f}")
    if arguments.output:
        results = [
            {"case": name, "columns": k, "batch": batch, "kflop": work[name, k], "us": times[name, k]}
            for (name, k), (batch, _) in cases.items()
        ]
        about = {"spec": arguments.spec, "torch": torch.__version__, "machine": platform.processor(), "threads": 1}
        unit = "microseconds an observation, processor time"
        arguments.output.write_text(json.dumps({**about, "unit": unit, "results": results, "ratios": ratios}))


if __name__ == "__main__":
    main()
