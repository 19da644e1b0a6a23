"""How fast is the labyrinth? Env-steps per second of the engine, the environment, the vector and of training.

    python benchmarks/labyrinth_throughput.py --rounds 3 --seconds 20 --output labyrinth.json

- `engine`: one ViZDoom process: an action held for 4 tics, the last one drawn, the frame fetched. Nothing of gymnasium.
- `env`: `rllib_pnn/Labyrinth-v0`, one environment: the same with frames squeezed to 84x84, rewards and episode ends.
- `vector`: its vector environment in one process, `--envs` engines side by side.
- `training`: A3C with the `labyrinth` column and `--runners` EnvRunners x `--envs` environments: steps that were acted
  on *and* learned from.
- `training_2`: the same for a second column, which reads a first one that is frozen.

All play random actions but the last two. The contestants run in turns, each in a process of its own, so that a machine
that gets slower or faster meanwhile treats them alike: compare the ratios. Prints a table; `--output` writes every
turn as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from measuring import WARM_UP_S, machine, rate_of, take_turns

CONTESTANTS = ("engine", "env", "vector", "training", "training_2")
FRAME_SKIP = 4


def run_engine(args: argparse.Namespace) -> tuple[float, float]:
    import numpy as np

    from rllib_pnn.envs.labyrinth import ACTIONS
    from rllib_pnn.envs.labyrinth_engine import Engine
    from rllib_pnn.envs.labyrinth_levels import LEVELS

    engine, buttons = Engine(LEVELS[args.level]), list(ACTIONS.values())
    rng, steps = np.random.default_rng(0), 0

    def go_on() -> float:
        nonlocal steps
        engine.new_episode(int(rng.integers(2**31)))
        for action in rng.integers(len(buttons), size=525):  # an episode's length
            engine.act(buttons[action], FRAME_SKIP)
            engine.observe()
            steps += 1
        return steps

    try:
        return rate_of(go_on, args.seconds)
    finally:
        engine.close()


def run_env(args: argparse.Namespace) -> tuple[float, float]:
    import gymnasium as gym

    import rllib_pnn  # noqa: F401  # registers the id

    env = gym.make("rllib_pnn/Labyrinth-v0", level=args.level, frame_skip=FRAME_SKIP)
    env.reset(seed=0)
    env.action_space.seed(0)
    steps = 0

    def go_on() -> float:
        nonlocal steps
        for _ in range(500):
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            steps += 1
            if terminated or truncated:
                env.reset()
        return steps

    try:
        return rate_of(go_on, args.seconds)
    finally:
        env.close()


def run_vector(args: argparse.Namespace) -> tuple[float, float]:
    import numpy as np

    from rllib_pnn.envs.labyrinth import LabyrinthVectorEnv

    envs = LabyrinthVectorEnv(args.envs, level=args.level, frame_skip=FRAME_SKIP)
    envs.reset(seed=0)
    rng, steps = np.random.default_rng(0), 0

    def go_on() -> float:
        nonlocal steps
        for _ in range(50):
            envs.step(rng.integers(envs.single_action_space.n, size=args.envs))
            steps += args.envs
        return steps

    try:
        return rate_of(go_on, args.seconds)
    finally:
        envs.close()


def run_training(args: argparse.Namespace, num_columns: int) -> tuple[float, float]:
    import ray

    import rllib_pnn
    from rllib_pnn.training.a3c import A3CConfig
    from rllib_pnn.training.progressive import make_progressive

    ray.init(num_cpus=args.runners + 1, include_dashboard=False, log_to_driver=False)
    rllib_pnn.register()
    config: Any = (
        A3CConfig()
        .environment("rllib_pnn/Labyrinth-v0", env_config={"level": args.level, "frame_skip": FRAME_SKIP})
        .env_runners(
            num_env_runners=args.runners, num_envs_per_env_runner=args.envs, rollout_fragment_length=args.rollout
        )
        .training(gradients_per_training_step=2 * args.runners)
        .reporting(min_time_s_per_iteration=1)
        .debugging(log_level="ERROR", seed=0)
    )
    with tempfile.TemporaryDirectory() as folder:
        # A first task that is over at once: what it leaves is frozen and read by the second column.
        until = {"num_env_steps": 1}
        tasks = [{"name": str(k), "until": until if k < num_columns - 1 else {}} for k in range(num_columns)]
        algo = make_progressive(
            config, tasks=tasks, column="labyrinth", column_store=folder, evaluation_episodes=0
        ).build_algo()

        def go_on() -> float:
            result = algo.train()
            if result["progressive"]["column"] < num_columns - 1:
                return 0
            return float(result.get("learners", {}).get("__all_modules__", {}).get("num_env_steps_trained_lifetime", 0))

        try:
            return rate_of(go_on, args.seconds, warm_up=2 * WARM_UP_S)
        finally:
            algo.stop()
            ray.shutdown()


def run(args: argparse.Namespace) -> tuple[float, float]:
    """One turn in this process."""
    if args.only == "training":
        return run_training(args, num_columns=1)
    if args.only == "training_2":
        return run_training(args, num_columns=2)
    return {"engine": run_engine, "env": run_env, "vector": run_vector}[args.only](args)


def table(turns: dict[str, list[dict[str, float]]]) -> str:
    """A Markdown table: medians over the rounds, ranges in parentheses."""
    lines = [
        "| | env-steps/s, median (range) | of `engine` | CPU per env-step, us |",
        "|---|---|---|---|",
    ]
    medians = {name: statistics.median(t["env_steps_per_s"] for t in rounds) for name, rounds in turns.items()}
    for name, rounds in turns.items():
        rates = [t["env_steps_per_s"] for t in rounds]
        cpu = statistics.median(t["cpu_us_per_env_step"] for t in rounds)
        ratio = f"{medians[name] / medians['engine']:.2f}" if "engine" in medians else "-"
        lines.append(f"| `{name}` | {medians[name]:.0f} ({min(rates):.0f}-{max(rates):.0f}) | {ratio} | {cpu:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=3)
    add("--seconds", type=float, default=20.0, help="measured per turn, after a warm-up")
    add("--runners", type=int, default=2)
    add("--envs", type=int, default=8, help="of the vector, and per EnvRunner")
    add("--rollout", type=int, default=20, help="A3C's rollout_fragment_length")
    add("--level", default="track_1")
    add("--output", type=Path, help="a JSON file for every turn's figures")
    add("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    add("--only", choices=CONTESTANTS, help="one turn of one contestant; prints JSON")
    args = parser.parse_args()
    if args.only:
        rate, cpu = run(args)
        print(json.dumps({"env_steps_per_s": rate, "cpu_us_per_env_step": 1e6 * cpu}))
        return

    keys = ("seconds", "runners", "envs", "rollout", "level")
    arguments = [part for key in keys for part in (f"--{key}", str(getattr(args, key)))]
    turns = take_turns(__file__, args.contestants, args.rounds, arguments)
    print(f"\n{args.runners} EnvRunners x {args.envs} environments, {args.level}, rollouts of {args.rollout} steps\n")
    print(table(turns))
    if args.output:
        settings = {key: getattr(args, key) for key in ("rounds", *keys)}
        report = {"settings": settings, "machine": machine(), "turns": turns}
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
