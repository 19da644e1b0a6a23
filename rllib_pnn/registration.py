"""One call that makes everything of this package known by name: environments, algorithms, the old stack's model."""

from __future__ import annotations

from rllib_pnn.envs.registry import register_envs
from rllib_pnn.training.a3c import register_a3c


def register() -> None:
    """Registers env ids with gymnasium, `"A3C"` with Tune, and `"progressive"` with RLlib's `ModelCatalog`.

    May be called any number of times, in any process.
    """
    register_envs()
    register_a3c()
