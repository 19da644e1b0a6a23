"""A learning curve of stock RLlib on Pong, to stand beside this package's in docs/results/pong_ppo.

How to run:

    python benchmarks/stock_curve.py --like docs/results/pong_ppo/pong.yaml --out runs/stock-ppo
    python benchmarks/stock_curve.py --like tuned_examples/pong_soup_impala.yaml --out runs/stock-impala

Takes algorithm, settings and first task of the file's experiment; RLlib's own EnvRunners, connectors and Learner train
the column as anybody would write it (`rllib_throughput.PlainColumn`) on the same native vector env, or with `--module
package` this package's module, with its initial weights and input shift, as `rllib train` would. Stops when the mean
return of the last `metrics_num_episodes_for_smoothing` episodes is that of the task's `until`, at its steps, or after
`--minutes`. The mean is taken here, over so many, as `rllib train` does; RLlib's own is that of the few episodes
that have ended in an iteration.

RLlib seeds neighbouring environments and neighbouring EnvRunners with neighbouring numbers: environment 2 of the
first and environment 1 of the second begin their episodes alike. With `--spread-seeds` EnvRunners are seeded as this
package's, far apart. `result.json` in `OUT/seed_N` has a line an iteration, which docs/make_pong_curves.py reads.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from rllib_throughput import PlainColumn

import rllib_pnn
from rllib_pnn.experiment.algorithm import Cluster, build_config
from rllib_pnn.experiment.run import make_config
from rllib_pnn.experiment.spec import load_plans
from rllib_pnn.training.task_env_runner import SEED_STRIDE

RETURNS = "ended_episode_returns"


class SpreadSeeds(SingleAgentEnvRunner):
    """RLlib's, with environments that are seeded like those of this package."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._seed = int(self.config.seed) + SEED_STRIDE * int(self.worker_index or 0)


def note_return(*, episode: Any, metrics_logger: Any, **kwargs: Any) -> None:
    """`on_episode_end` of the EnvRunners, whose episodes hold their last steps alone; the environment has the score."""
    metrics_logger.log_value(RETURNS, float(episode.get_infos(-1)["episode_score"]), reduce="item_series")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--like", type=Path, required=True, help="a tuned example of one environment with tasks")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--module", choices=("plain", "package"), default="plain")
    parser.add_argument("--spread-seeds", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="of training, at most")
    args = parser.parse_args()

    plan = load_plans(args.like)[0]
    first = next(iter(plan.runs.values()))
    experiment = plan.runs.get(f"seed_{args.seed}", first)  # initial weights come of its seed
    task = experiment.progressive.tasks[0]
    stock = experiment.model_copy(update={"progressive": None})
    rllib_pnn.register()
    folder = args.out / f"seed_{args.seed}"
    folder.mkdir(parents=True)

    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    config = build_config(plan, stock, Cluster.connected())
    config.environment(env_config=dict(task.env_config))
    config.env_runners(gym_env_vectorize_mode="vector_entry_point")
    spec = RLModuleSpec(module_class=PlainColumn)
    if args.module == "package":
        spec = make_config(plan, experiment, Cluster.connected()).rl_module_spec
    config.rl_module(rl_module_spec=spec)
    config.debugging(seed=args.seed, log_level="ERROR")
    config.callbacks(on_episode_end=note_return)
    if args.spread_seeds:
        config.env_runners(env_runner_cls=SpreadSeeds)
    algorithm = config.build_algo()
    over = False
    returns: deque[float] = deque(maxlen=config.metrics_num_episodes_for_smoothing)
    with (folder / "result.json").open("w") as file:
        while not over:
            result = algorithm.train()
            # RLlib's compile() makes a number of a series of one, and NaN of an empty one.
            returns.extend(r for r in np.atleast_1d(result["env_runners"].get(RETURNS, math.nan)) if not math.isnan(r))
            mean = sum(returns) / len(returns) if returns else math.nan
            _write(result, mean, file)
            enough = len(returns) == returns.maxlen and mean >= task.until.episode_return_mean
            over = enough or _is_over(result, task.until, args.minutes)
    algorithm.stop()
    ray.shutdown()


def _is_over(result: dict[str, Any], until: Any, minutes: float) -> bool:
    steps = result["env_runners"]["num_env_steps_sampled_lifetime"]
    return steps >= until.num_env_steps or result["time_total_s"] >= 60 * minutes


def _write(result: dict[str, Any], mean: float, file: Any) -> None:
    steps = result["env_runners"]["num_env_steps_sampled_lifetime"]
    row = {  # what of a result the figure needs, under RLlib's own keys
        "env_runners": {"num_env_steps_sampled_lifetime": steps, "episode_return_mean": mean},
        "time_total_s": result["time_total_s"],
    }
    file.write(json.dumps(row, default=float) + "\n")
    file.flush()
    print(row, flush=True)


if __name__ == "__main__":
    main()
