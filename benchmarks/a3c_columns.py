"""What a further column costs A3C where it counts: whole rollouts and their gradients, env and all, K columns in turns.

How to run: `python benchmarks/a3c_columns.py [--columns 1 2 4 8] [--envs 16] [--rollout 8] [--parts 1] [--rollouts 60]
[--output FILE]`. One process, one thread, an EnvRunner for each K on Pong with the `atari` column; they take turns
rollout by rollout, so that a machine that gets slower meanwhile treats them alike (whole trainings, one after the
other, differ by a quarter from one turn to the next: see `a3c_throughput.py`). What travels between processes is not
in it.

Wall time in microseconds an env-step, medians: `env` the emulator, `act` all columns acting, the frozen ones'
activations kept, `gradient` a rollout's gradients, `all` with everything between. `rate` is that of the first K over
it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from measuring import machine

import rllib_pnn
from rllib_pnn.network.memory import lean_memory
from rllib_pnn.training.a3c import A3CConfig

PARTS = ("env", "act", "gradient", "all")


def make_runner(num_columns: int, envs: int, length: int) -> Any:
    """An A3C EnvRunner whose module has that many columns."""
    config = A3CConfig().environment("rllib_pnn/PongSoup-v0")
    config.env_runners(num_env_runners=0, num_envs_per_env_runner=envs, rollout_fragment_length=length)
    tasks = [{"name": str(k), "until": {"num_env_steps": 1}} for k in range(num_columns)]
    config = rllib_pnn.make_progressive(config, tasks=tasks, column="atari")
    runner = config.env_runner_cls(config=config, worker_index=0)
    for k in range(1, num_columns):
        runner.module.grow({**runner.module.progress, "task_index": k})
    return runner


def move_weights(runner: Any) -> None:
    """As a Learner does between two rollouts: what was computed with the old ones is of no use."""
    with torch.no_grad():
        for parameter in runner.module.network.trainable_parameters():
            parameter.mul_(1.0001)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="+", default=[1, 2, 4, 8], metavar="K")
    parser.add_argument("--envs", type=int, default=16)
    parser.add_argument("--rollout", type=int, default=8, help="T")
    parser.add_argument("--parts", type=int, default=1, help="gradients of a rollout, each of its share of the envs")
    parser.add_argument("--rollouts", type=int, default=60, help="of each K; the first tenth warms up")
    parser.add_argument("--output", type=Path, help="JSON with every rollout's figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lean_memory()
    rllib_pnn.register()

    spent: dict[tuple[str, int], list[float]] = defaultdict(list)  # microseconds an env-step, one figure a rollout
    per_step = 1e6 / (arguments.envs * arguments.rollout)

    def time_calls(owner: Any, method: str, key: tuple[str, int]) -> None:
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                spent[key][-1] += (time.perf_counter() - start) * per_step

        setattr(owner, method, timed)

    runners = {k: make_runner(k, arguments.envs, arguments.rollout) for k in arguments.columns}
    for k, runner in runners.items():
        time_calls(runner, "_step_env", ("env", k))
        time_calls(runner, "_act", ("act", k))
    for _ in range(arguments.rollouts):
        for k, runner in runners.items():
            for part in ("env", "act"):
                spent[part, k].append(0.0)
            move_weights(runner)
            start = time.perf_counter()
            rollout = runner.collect_rollout()
            middle = time.perf_counter()
            for part in rollout.divide(arguments.parts):
                runner.rollout_gradient(part)
            end = time.perf_counter()
            spent["gradient", k].append((end - middle) * per_step)
            spent["all", k].append((end - start) * per_step)

    first, warm = arguments.columns[0], arguments.rollouts // 10
    print(f"{arguments.envs} envs x {arguments.rollout} steps, torch {torch.__version__}, us of wall time an env-step")
    print("  K" + "".join(f"{part:>10}" for part in PARTS) + "      rate (quartiles)")
    rates = {}
    for k in arguments.columns:
        medians = [statistics.median(spent[part, k][warm:]) for part in PARTS]
        turns = zip(spent["all", first][warm:], spent["all", k][warm:], strict=True)
        low, middle, high = statistics.quantiles([a / b for a, b in turns], n=4)
        rates[k] = {"low": low, "median": middle, "high": high}
        print(
            f"{k:>3}" + "".join(f"{median:>10.0f}" for median in medians) + f"      {middle:.2f} ({low:.2f}-{high:.2f})"
        )
    if arguments.output:
        figures = [
            {"part": part, "columns": k, "us": spent[part, k][warm:]} for k in arguments.columns for part in PARTS
        ]
        about = {"command": " ".join(sys.argv), "machine": machine(), "unit": "microseconds an env-step, wall time"}
        arguments.output.write_text(json.dumps(about | {"rates": rates, "figures": figures}))


if __name__ == "__main__":
    main()
