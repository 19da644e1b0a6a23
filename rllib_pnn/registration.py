"""One call that makes everything of this package known by name: environments, algorithms, the old stack's model."""

from __future__ import annotations

import functools

from ray import tune

from rllib_pnn.envs.registry import ENV_IDS, create_env, register_envs
from rllib_pnn.training.a3c import register_a3c
from rllib_pnn.training.model_v2 import register_model


def register() -> None:
    """Registers env ids with gymnasium, `"A3C"` with Tune, and `"progressive"` with RLlib's `ModelCatalog`.

    May be called any number of times, in any process.
    """
    register_envs()
    for env_id in ENV_IDS:  # EnvRunners in other processes learn of an id through Tune
        tune.register_env(env_id, functools.partial(create_env, env_id))
    register_a3c()
    register_model()
