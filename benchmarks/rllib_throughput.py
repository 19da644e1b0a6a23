"""Env-steps per second that PPO, IMPALA and APPO train on Pong: stock RLlib against the same with this package's parts.

How to run (a quiet machine; every run is a process of its own, and the variants take turns):

    python benchmarks/rllib_throughput.py --algorithms PPO IMPALA --seconds 30 --repeats 5 --output throughput.json

Variants, all with the 12-map Atari column, the same native vector env, EnvRunners, environments, batches and epochs:

- `stock`: RLlib's EnvRunner and Learner pipeline; the column written as anybody would (`PlainColumn`);
- `module`: the same with this package's module, K = 1;
- `array`: `PlainColumn` with `ArrayEnvRunner` and `use_array_pipeline`;
- `package`: `make_progressive`, which is both.

Results to expect are in docs/performance.md. Each run reports env-steps per second of wall clock and microseconds of
processor time per env-step (driver, EnvRunners and Ray's own processes), which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ray
import torch
from measuring import cpu_seconds, machine
from ray import tune
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor, nn

from rllib_pnn.envs.registry import create_env
from rllib_pnn.training.array_connectors import use_array_pipeline
from rllib_pnn.training.env_runner import ArrayEnvRunner
from rllib_pnn.training.progressive import make_progressive

ENV = "rllib_pnn/PongSoup-v0"
VARIANTS = ("stock", "module", "array", "package")
ALGORITHMS = ("PPO", "IMPALA", "APPO")


class PlainColumn(TorchRLModule, ValueFunctionAPI):
    """The 12-map Atari column as an ordinary RLModule: 3 convolutions, dense 256, two heads."""

    def setup(self) -> None:
        self.body = nn.Sequential(
            nn.Conv2d(4, 12, 8, 4),
            nn.ReLU(),
            nn.Conv2d(12, 12, 4, 2),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12 * 7 * 7, 256),
            nn.ReLU(),
        )
        self.policy = nn.Linear(256, int(self.action_space.n))
        self.value = nn.Linear(256, 1)

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {Columns.ACTION_DIST_INPUTS: self.policy(self._embed(batch))}

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        embeddings = self._embed(batch)
        return {Columns.ACTION_DIST_INPUTS: self.policy(embeddings), Columns.EMBEDDINGS: embeddings}

    def compute_values(self, batch: dict[str, Any], embeddings: Tensor | None = None) -> Tensor:
        return self.value(self._embed(batch) if embeddings is None else embeddings).squeeze(-1)

    def _embed(self, batch: dict[str, Any]) -> Tensor:
        return self.body(batch[Columns.OBS].float() / 255)


def config_of(algorithm: str, variant: str, *, num_env_runners: int, num_envs: int, lr: float) -> AlgorithmConfig:
    """The config of one variant; PPO's and IMPALA's settings are those of the reference measurements."""
    tune.register_env(ENV, lambda context: create_env(ENV, context))
    config: AlgorithmConfig
    if algorithm == "PPO":
        steps = 64
        config = PPOConfig().training(
            train_batch_size_per_learner=num_env_runners * num_envs * steps,
            minibatch_size=256,
            num_epochs=4,
            clip_param=0.1,
            lambda_=0.95,
            use_kl_loss=False,
            grad_clip=0.5,
        )
    else:
        steps = 20
        config = IMPALAConfig() if algorithm == "IMPALA" else APPOConfig()
        config.training(train_batch_size_per_learner=num_envs * steps, grad_clip=40.0)
        config.reporting(min_time_s_per_iteration=1)
    config.training(lr=lr, gamma=0.99, entropy_coeff=0.01)
    config.environment(ENV, env_config={"variant": "pong"})
    config.env_runners(
        num_env_runners=num_env_runners,
        num_envs_per_env_runner=num_envs,
        rollout_fragment_length=steps,
        gym_env_vectorize_mode="vector_entry_point",
    )
    config.learners(num_learners=0)
    config.debugging(seed=0, log_level="ERROR")
    spec = RLModuleSpec(module_class=PlainColumn)
    if variant in ("module", "package"):
        task = {"name": "pong", "env_config": {"variant": "pong"}, "until": {"num_env_steps": 10**12}}
        progressive = make_progressive(config, tasks=[task], column="atari", evaluation_episodes=0)
        if variant == "package":
            return progressive
        spec = progressive.rl_module_spec
    config.rl_module(rl_module_spec=spec)
    if variant == "array":
        config.env_runners(env_runner_cls=ArrayEnvRunner)
        use_array_pipeline(config)
    return config


def measure(algorithm: str, variant: str, *, seconds: float, warm_up: float, **settings: Any) -> dict[str, Any]:
    """Trains one variant in this process and returns its rates."""
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        algo = config_of(algorithm, variant, **settings).build_algo()
        result = _train_for(algo, warm_up)
        before, cpu, start = _steps(result), cpu_seconds(), time.perf_counter()
        result = _train_for(algo, seconds)
        wall = time.perf_counter() - start
        steps, cpu = _steps(result) - before, cpu_seconds() - cpu
        timers = result["timers"]
        algo.stop()
    finally:
        ray.shutdown()
    return {
        "algorithm": algorithm,
        "variant": variant,
        "env_steps_per_s": steps / wall,
        "cpu_us_per_env_step": cpu / steps * 1e6,
        "seconds": wall,
        "learner_threads": torch.get_num_threads(),
        "timers": {k: v for k, v in timers.items() if isinstance(v, float)},
        "settings": settings,
    }


def _train_for(algo: Any, seconds: float) -> dict[str, Any]:
    end = time.perf_counter() + seconds
    result = algo.train()
    while time.perf_counter() < end:
        result = algo.train()
    return result


def _steps(result: dict[str, Any]) -> float:
    """Env-steps sampled and trained on so far. RLlib counts each minibatch of PPO as a batch."""
    learners = result.get("learners", {}).get("__all_modules__", {})
    return min(
        result.get("env_runners", {}).get("num_env_steps_sampled_lifetime", 0.0),
        learners.get("num_env_steps_trained_lifetime", 0.0),
    )


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """All variants of all algorithms, taking turns, each in a fresh process."""
    runs = []
    for repeat in range(args.repeats):
        for algorithm in args.algorithms:
            for variant in args.variants:
                command = [sys.executable, __file__, "--one", algorithm, variant, *_passed_on(args)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{algorithm} {variant} failed:\n{done.stderr[-3000:]}")
                run = json.loads(done.stdout.splitlines()[-1])
                runs.append(run)
                print(
                    f"{repeat + 1}/{args.repeats} {algorithm:7} {variant:8} {run['env_steps_per_s']:7.0f} env-steps/s "
                    f"{run['cpu_us_per_env_step']:6.0f} us of processor time each",
                    flush=True,
                )
    return {
        "machine": machine() | {"ray": ray.__version__, "torch": torch.__version__},
        "command": " ".join(sys.argv),
        "summary": _summary(runs),
        "runs": runs,
    }


def _passed_on(args: argparse.Namespace) -> list[str]:
    names = ("seconds", "warm_up", "num_env_runners", "num_envs", "lr")
    return [part for n in names for part in (f"--{n.replace('_', '-')}", str(getattr(args, n)))]


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, lowest and highest of each variant, and ratios to `stock` within the same repeat."""
    summary: dict[str, Any] = {}
    for algorithm in dict.fromkeys(r["algorithm"] for r in runs):
        rates = {
            v: [r for r in runs if (r["algorithm"], r["variant"]) == (algorithm, v)]
            for v in dict.fromkeys(r["variant"] for r in runs)
        }
        summary[algorithm] = {}
        for variant, own in rates.items():
            values = [r["env_steps_per_s"] for r in own]
            entry = {
                "env_steps_per_s": {"median": statistics.median(values), "min": min(values), "max": max(values)},
                "cpu_us_per_env_step": statistics.median(r["cpu_us_per_env_step"] for r in own),
            }
            if "stock" in rates:
                ratios = [a / b["env_steps_per_s"] for a, b in zip(values, rates["stock"], strict=True)]
                entry["times_stock"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
            summary[algorithm][variant] = entry
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=["PPO", "IMPALA"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="measured, per run")
    parser.add_argument("--warm-up", type=float, default=5.0, help="seconds before the clock starts, per run")
    parser.add_argument("--num-env-runners", type=int, default=2)
    parser.add_argument("--num-envs", type=int, default=16, help="per EnvRunner")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--one", nargs=2, metavar=("ALGORITHM", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = {"num_env_runners": args.num_env_runners, "num_envs": args.num_envs, "lr": args.lr}
    if args.one:
        algorithm, variant = args.one
        print(json.dumps(measure(algorithm, variant, seconds=args.seconds, warm_up=args.warm_up, **settings)))
        return
    report = compare(args)
    print(json.dumps(report["summary"], indent=2))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
