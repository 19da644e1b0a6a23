"""Progressive Neural Networks (Rusu et al. 2016, arXiv 1606.04671) for Ray RLlib.

The public names below are imported when first used, so that `import rllib_pnn` costs nothing and each floor
(plain torch, environments, RLlib) can be used without the others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import rllib_pnn.envs.registry  # noqa: F401  # makes the env ids known to gymnasium in every process

if TYPE_CHECKING:
    from rllib_pnn.analysis.fisher import average_fisher_sensitivity
    from rllib_pnn.analysis.perturbation import average_perturbation_sensitivity
    from rllib_pnn.analysis.transfer import transfer_score
    from rllib_pnn.network import ColumnSpec, ColumnStore, ColumnStoreError, ProgressiveNetwork
    from rllib_pnn.registration import register
    from rllib_pnn.training.a3c import A3C, A3CConfig
    from rllib_pnn.training.callback import ProgressiveCallback
    from rllib_pnn.training.env_runner import ArrayEnvRunner
    from rllib_pnn.training.progressive import make_progressive
    from rllib_pnn.training.rl_module import ProgressiveRLModule
    from rllib_pnn.training.tasks import Task

__version__ = "0.1.0"

_MODULES = {
    "A3C": "rllib_pnn.training.a3c",
    "A3CConfig": "rllib_pnn.training.a3c",
    "ArrayEnvRunner": "rllib_pnn.training.env_runner",
    "ColumnSpec": "rllib_pnn.network",
    "ColumnStore": "rllib_pnn.network",
    "ColumnStoreError": "rllib_pnn.network",
    "ProgressiveCallback": "rllib_pnn.training.callback",
    "ProgressiveNetwork": "rllib_pnn.network",
    "ProgressiveRLModule": "rllib_pnn.training.rl_module",
    "Task": "rllib_pnn.training.tasks",
    "average_fisher_sensitivity": "rllib_pnn.analysis.fisher",
    "average_perturbation_sensitivity": "rllib_pnn.analysis.perturbation",
    "make_progressive": "rllib_pnn.training.progressive",
    "register": "rllib_pnn.registration",
    "transfer_score": "rllib_pnn.analysis.transfer",
}

__all__ = [
    "A3C",
    "A3CConfig",
    "ArrayEnvRunner",
    "ColumnSpec",
    "ColumnStore",
    "ColumnStoreError",
    "ProgressiveCallback",
    "ProgressiveNetwork",
    "ProgressiveRLModule",
    "Task",
    "average_fisher_sensitivity",
    "average_perturbation_sensitivity",
    "make_progressive",
    "register",
    "transfer_score",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'rllib_pnn' has no attribute '{name}'")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
