"""Goes on from a checkpoint with other settings, to see in minutes what would have helped a run that is stuck.

How to run:

    python benchmarks/branch.py docs/results/pong_a3c/pong_one_gradient.yaml RUN/seed_0/checkpoint_000002 \\
        --steps 400000 --set "{lr: 1.0e-3, entropy_coeff: 1.0e-4}"

Takes the file's experiment with `--set` in its config, restores everything from the checkpoint (weights, optimizer,
counters) and trains the task for so many steps more. Schedules in `--set` count from the task's start, not from the
checkpoint. Prints a line every `--every` seconds and one of JSON at the end. Reads RLlib's checkpoint, which is a
pickle: only of runs that you trust.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
import time
from pathlib import Path

import ray
import yaml

import rllib_pnn
from rllib_pnn.experiment.algorithm import Cluster
from rllib_pnn.experiment.run import make_config
from rllib_pnn.experiment.spec import load_plans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="of the run: one experiment, one task to go on with")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--set", type=yaml.safe_load, default={}, help="YAML: settings in place of the file's")
    parser.add_argument("--steps", type=float, default=400_000)
    parser.add_argument("--every", type=float, default=30.0)
    args = parser.parse_args()

    document = yaml.safe_load(args.file.read_text())
    (experiment,) = document.values()
    experiment["num_samples"] = 1
    experiment["config"] |= args.set
    experiment["progressive"]["tasks"][0]["until"] = {"num_env_steps": 10**9}
    rllib_pnn.register()
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / args.file.name
        changed.write_text(yaml.safe_dump(document))
        (plan,) = load_plans(changed)
        algorithm = make_config(plan, next(iter(plan.runs.values())), Cluster.connected()).build_algo()
    algorithm.restore_from_path(args.checkpoint.resolve())
    begin, shown, first, returns = time.monotonic(), 0.0, None, []
    while True:
        result = algorithm.train()
        steps = result["num_env_steps_sampled_lifetime"]
        first = steps if first is None else first
        mean = result["progressive"]["episode_return_mean"]
        if not math.isnan(mean):
            returns.append(mean)
        seconds = time.monotonic() - begin
        over = steps - first >= args.steps
        if over or seconds - shown >= args.every:
            shown = seconds
            print(f"{seconds:5.0f} s  {steps - first:9,.0f} steps  return {mean:.1f}", flush=True)
        if over:
            break
    last = returns[-max(1, len(returns) // 3) :]
    summary = {
        "set": args.set,
        "from": args.checkpoint.name,
        "num_env_steps": steps - first,
        "return_of_last_third": round(sum(last) / len(last), 2) if last else None,
        "env_steps_per_s": round((steps - first) / seconds),
    }
    print(json.dumps(summary))
    algorithm.stop()
    ray.shutdown()


if __name__ == "__main__":
    main()
