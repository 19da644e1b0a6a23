"""How much of the machine does A3C turn into training? A3C against stock IMPALA and against a loop without Ray.

Pong, the `atari` column, 2 EnvRunners x 16 environments (one process per core for the loop). What counts are env-steps
per second that were acted on *and* learned from. The contestants run in turns, each in a process of its own, so that
a machine that gets slower or faster meanwhile treats them alike; compare the ratios, not the figures of two runs.

    python benchmarks/a3c_throughput.py --rounds 5 --seconds 20 --rollout 20

- `env`: the emulator alone, one process: a core's share of what all others spend on it.
- `bare`: benchmarks/bare_loop.py, synchronous A2C with averaged gradients: the limit.
- `a3c`: rllib_pnn's A3C with a first column, its module given by hand as IMPALA's is.
- `a3c_1`, `a3c_2`, `a3c_4`, `a3c_8`: under `make_progressive`, the last of so many columns; compare these with a3c_1.
- `impala`: RLlib's IMPALA as it comes, with the same module and batches of 320.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import cpu_seconds, machine, rate_of, take_turns

CONTESTANTS = ("env", "bare", "a3c", "impala", "a3c_1", "a3c_2", "a3c_4", "a3c_8")
WARM_UP_S = 5.0


def run_bare(args: argparse.Namespace) -> tuple[float, float]:
    """Runs bare_loop.py for a while and reads its log."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bare.csv"
        command = [sys.executable, str(Path(__file__).with_name("bare_loop.py")), "--algo", "a2c", "--out", str(out)]
        command += ["--processes", str(args.runners), "--envs", str(args.envs), "--rollout", str(args.rollout)]
        command += ["--optimizer", "rmsprop", "--no-normalize", "--lam", "1.0", "--log-every", "1000"]
        process = subprocess.Popen([*command, "--steps", str(10**9)], start_new_session=True)
        try:
            first: tuple[float, int, float] | None = None
            while process.poll() is None:
                time.sleep(0.5)
                rows = list(csv.DictReader(out.open())) if out.exists() else []
                rows = [row for row in rows if None not in row.values()]
                if not rows or float(rows[-1]["wall_s"]) < WARM_UP_S:
                    continue
                last = (float(rows[-1]["wall_s"]), int(rows[-1]["env_steps"]), cpu_seconds(process.pid))
                first = first or last
                seconds, steps, cpu = (b - a for a, b in zip(first, last, strict=True))
                if seconds >= args.seconds:
                    return steps / seconds, cpu / steps
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    raise RuntimeError(f"bare_loop.py ended with exit code {process.returncode}")


def run_rllib(args: argparse.Namespace) -> tuple[float, float]:
    """Trains for a while in this process."""
    # Imported here so that the parent process stays small.
    import ray
    from ale_py.vector_env import AtariVectorEnv
    from ray import tune
    from ray.rllib.algorithms.impala import IMPALAConfig
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec

    import rllib_pnn
    from rllib_pnn.training.a3c import A3CConfig
    from rllib_pnn.training.rl_module import ProgressiveRLModule

    ray.init(num_cpus=args.runners + 1, include_dashboard=False, log_to_driver=False)
    tune.register_env("pong", lambda ctx: AtariVectorEnv("pong", ctx["num_envs"], num_threads=1))
    num_columns = int(args.only.partition("_")[2] or 0)  # of make_progressive
    config: Any
    if args.only == "impala":
        config = IMPALAConfig().training(train_batch_size_per_learner=320, lr=5e-4)
        config.env_runners(rollout_fragment_length=20)
    else:
        config = A3CConfig().training(lambda_=1.0, gradients_per_rollout=args.parts)
        config.env_runners(rollout_fragment_length=args.rollout, max_requests_in_flight_per_env_runner=args.in_flight)
    config = (
        config.environment("pong")
        .env_runners(
            num_env_runners=args.runners,
            num_envs_per_env_runner=args.envs,
            gym_env_vectorize_mode="vector_entry_point",
        )
        .reporting(min_time_s_per_iteration=1)
        .debugging(log_level="ERROR")
    )
    with tempfile.TemporaryDirectory() as folder:
        if num_columns == 0:
            progressive = {"column": "atari", "tasks": [{}]}
            config.rl_module(
                rl_module_spec=RLModuleSpec(module_class=ProgressiveRLModule, model_config={"progressive": progressive})
            )
        else:
            # Tasks that are over at once: what they leave is frozen and read by the last column.
            until = {"num_env_steps": 1}
            tasks = [{"name": str(k), "until": until if k < num_columns - 1 else {}} for k in range(num_columns)]
            config = rllib_pnn.make_progressive(
                config, tasks=tasks, column="atari", column_store=folder, evaluation_episodes=0
            )
        algo = config.build_algo()

        def go_on() -> float:
            result = algo.train()
            if num_columns and result["progressive"]["column"] < num_columns - 1:
                return 0
            return float(result.get("learners", {}).get("__all_modules__", {}).get("num_env_steps_trained_lifetime", 0))

        try:
            return rate_of(go_on, args.seconds, WARM_UP_S)
        finally:
            algo.stop()
            ray.shutdown()


def run_env(args: argparse.Namespace) -> tuple[float, float]:
    """The emulator alone, in one process, with random actions."""
    import numpy as np
    from ale_py.vector_env import AtariVectorEnv

    envs, rng, steps = AtariVectorEnv("pong", args.envs, num_threads=1), np.random.default_rng(0), 0
    envs.reset(seed=0)

    def go_on() -> float:
        nonlocal steps
        envs.step(rng.integers(envs.single_action_space.n, size=args.envs))
        steps += args.envs
        return steps

    return rate_of(go_on, args.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=3)
    add("--seconds", type=float, default=20.0, help="measured per turn, after a warm-up")
    add("--runners", type=int, default=2)
    add("--envs", type=int, default=16, help="per EnvRunner")
    add("--rollout", type=int, default=20, help="T of A3C and the bare loop")
    add("--in-flight", type=int, default=1, help="A3C's max_requests_in_flight_per_env_runner")
    add("--parts", type=int, default=1, help="A3C's gradients_per_rollout")
    add("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    add("--output", type=Path, help="JSON with every turn")
    add("--only", choices=CONTESTANTS, help="one turn of one contestant; prints JSON")
    args = parser.parse_args()
    if args.only:
        rate, cpu = {"env": run_env, "bare": run_bare}.get(args.only, run_rllib)(args)
        print(json.dumps({"env_steps_per_s": rate, "cpu_us_per_env_step": 1e6 * cpu}))
        return

    keys = ("seconds", "runners", "envs", "rollout", "in_flight", "parts")
    arguments = [part for key in keys for part in (f"--{key.replace('_', '-')}", str(getattr(args, key)))]
    turns = take_turns(__file__, args.contestants, args.rounds, arguments)
    all_ratios: dict[str, dict[str, list[float]]] = {}  # by pair
    pairs = [("a3c", other) for other in ("env", "bare", "impala")]
    pairs += [(f"a3c_{k}", "a3c_1") for k in (2, 4, 8)]
    for one, other in pairs:
        if one not in turns or other not in turns:
            continue
        for key in ("env_steps_per_s", "cpu_us_per_env_step"):
            ratios = sorted(a[key] / b[key] for a, b in zip(turns[one], turns[other], strict=True))
            all_ratios.setdefault(f"{one} / {other}", {})[key] = ratios
            print(
                f"{one} / {other}, {key}: median {statistics.median(ratios):.2f} "
                f"(min {ratios[0]:.2f}, max {ratios[-1]:.2f}, {args.rounds} rounds, T = {args.rollout})"
            )
    if args.output:
        args.output.write_text(
            json.dumps({"command": " ".join(sys.argv), "machine": machine(), "turns": turns, "ratios": all_ratios})
        )


if __name__ == "__main__":
    main()
