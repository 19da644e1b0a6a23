"""The four algorithms with batches so small that a test sees several updates within a second."""

from __future__ import annotations

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.algorithms.ppo import PPOConfig

from rllib_pnn.training.a3c import A3CConfig

CONFIGS = {"PPO": PPOConfig, "APPO": APPOConfig, "IMPALA": IMPALAConfig, "A3C": A3CConfig}


def small_config(algorithm: str, *, num_learners: int = 0, gradients: int = 1) -> AlgorithmConfig:
    """Rollouts of 20 steps, updates of 40 to 80; `gradients` of A3C in an iteration."""
    made = CONFIGS[algorithm]()
    made.env_runners(num_cpus_per_env_runner=0.5, rollout_fragment_length=20)
    made.learners(num_learners=num_learners, num_cpus_per_learner=0.5)
    if algorithm == "PPO":
        made.training(train_batch_size_per_learner=80 // max(1, num_learners), minibatch_size=40, num_epochs=2)
    elif algorithm == "A3C":
        made.training(gradients_per_training_step=gradients)
    else:
        made.training(train_batch_size_per_learner=40)
    made.training(lr=1e-3)
    made.reporting(min_time_s_per_iteration=0.2 if algorithm in ("APPO", "IMPALA") else 0)
    return made
