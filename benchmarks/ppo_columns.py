"""What a further column costs PPO where it counts: whole updates of the Learner, K columns in turns.

How to run: `python benchmarks/ppo_columns.py [--columns 1 2 4] [--rounds 12] [--threads 2] [--output FILE]`. One
process, an algorithm for each K on Pong with the `atari` column, 1,024 steps an update, 4 epochs in minibatches of 256,
as in `tuned_examples/pong_soup.yaml`; they take turns update by update. An update is everything between episodes and
new weights: the batch, frozen columns' activations, values, advantages, 17 minibatches.

Wall time in milliseconds an update, median and quartiles, and as a multiple of the first K's in the same round.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import ray
import torch
from measuring import machine
from ray.rllib.algorithms.ppo import PPOConfig

import rllib_pnn

ENVS, STEPS = 64, 1024
WARM_UP = 2  # rounds


def make_algorithm(num_columns: int) -> Any:
    """A PPO whose newest column is the last of so many."""
    config = PPOConfig().environment("rllib_pnn/PongSoup-v0")
    config.env_runners(num_env_runners=0, num_envs_per_env_runner=ENVS)
    config.training(train_batch_size_per_learner=STEPS, minibatch_size=256, num_epochs=4, use_kl_loss=False, lr=5e-4)
    config.debugging(seed=0, log_level="ERROR")
    tasks = [{"name": str(k), "until": {"num_env_steps": 1}} for k in range(num_columns - 1)]
    tasks.append({"name": "last", "until": {"num_env_steps": 10**9}})
    config = rllib_pnn.make_progressive(config, tasks=tasks, column="atari", evaluation_episodes=0)
    algorithm = config.build_algo()
    for _ in range(num_columns - 1):  # every task ends with its first iteration
        algorithm.train()
    return algorithm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="+", default=[1, 2, 4], metavar="K")
    parser.add_argument("--rounds", type=int, default=12, help="updates of each K; the first two warm up")
    parser.add_argument("--threads", type=int, default=2, help="torch's, for the Learner")
    parser.add_argument("--output", type=Path, help="JSON with every update's time")
    arguments = parser.parse_args()
    rllib_pnn.register()
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)

    spent: dict[int, list[float]] = {k: [] for k in arguments.columns}
    algorithms = {}
    for k in arguments.columns:
        algorithms[k] = make_algorithm(k)
        module = algorithms[k].learner_group._learner.progressive_module
        if module.network.num_columns != k:
            raise RuntimeError(f"expected {k} columns, got {module.network.num_columns}")
        update = algorithms[k].learner_group.update

        def timed(*args: Any, update: Any = update, k: int = k, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return update(*args, **kwargs)
            finally:
                spent[k].append(1e3 * (time.perf_counter() - start))

        algorithms[k].learner_group.update = timed
    torch.set_num_threads(arguments.threads)
    for _ in range(arguments.rounds):
        for algorithm in algorithms.values():
            algorithm.train()

    first = arguments.columns[0]
    print(f"{STEPS} steps an update, torch {torch.__version__}, {arguments.threads} threads, ms of wall time")
    print("  K    update (quartiles)        times K = " + str(first))
    ratios = {}
    for k in arguments.columns:
        times = spent[k][WARM_UP:]
        low, middle, high = statistics.quantiles(times, n=4)
        turns = [b / a for a, b in zip(spent[first][WARM_UP:], times, strict=True)]
        ratios[k] = dict(zip(("low", "median", "high"), statistics.quantiles(turns, n=4), strict=True))
        spread = "{median:.2f} ({low:.2f}-{high:.2f})".format(**ratios[k])
        print(f"{k:>3}    {middle:4.0f} ({low:.0f}-{high:.0f})    {spread}")
    if arguments.output:
        about = {"command": " ".join(sys.argv), "machine": machine(), "unit": "milliseconds an update, wall time"}
        arguments.output.write_text(json.dumps(about | {"warm_up": WARM_UP, "ratios": ratios, "updates": spent}))
    for algorithm in algorithms.values():
        algorithm.stop()


if __name__ == "__main__":
    main()
