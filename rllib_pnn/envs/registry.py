"""The package's env ids. Importing this module makes them known to gymnasium.

gymnasium has no plugin entry points since 1.0: a process knows an id once it has imported the module that
registers it. `gymnasium.make("rllib_pnn.envs.registry:rllib_pnn/PongSoup-v0")` does both.

Cheap to import on purpose: the env classes are named, not imported. No torch, no Ray.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import register, registry

from rllib_pnn.text import did_you_mean

ENV_IDS = (
    "rllib_pnn/PongSoup-v0",
    "rllib_pnn/Atari-v0",
    "rllib_pnn/Labyrinth-v0",
    "rllib_pnn/CartPoleSoup-v0",
)
"""Every id is both a `gymnasium.make` env and a native vector env with the same observations."""

# id -> module, single env class, vector env class, step limit that gymnasium enforces
_ENVS: dict[str, tuple[str, str, str, int | None]] = {
    ENV_IDS[0]: ("rllib_pnn.envs.pong_soup", "PongSoupEnv", "PongSoupVectorEnv", None),
    ENV_IDS[1]: ("rllib_pnn.envs.atari", "AtariGameEnv", "AtariGameVectorEnv", None),
    ENV_IDS[2]: ("rllib_pnn.envs.labyrinth", "LabyrinthEnv", "LabyrinthVectorEnv", None),
    ENV_IDS[3]: ("rllib_pnn.envs.cartpole_soup", "CartPoleSoupEnv", "CartPoleSoupVectorEnv", 500),
}


def register_envs() -> None:
    """Makes the ids of `ENV_IDS` known to gymnasium; does nothing for those that it knows already."""
    for env_id, (module, single, vector, max_episode_steps) in _ENVS.items():
        if env_id not in registry:
            register(
                env_id,
                entry_point=f"{module}:{single}",
                vector_entry_point=f"{module}:{vector}",
                max_episode_steps=max_episode_steps,
            )


def is_native_vector(env_id: str) -> bool:
    """Whether `gymnasium.make_vec` can make `env_id` with `vectorization_mode="vector_entry_point"`.

    Not what ale_py registers: its vector envs show other observations than its single ones.
    """
    spec = registry.get(env_id)
    return spec is not None and spec.vector_entry_point is not None and not _is_of_ale(env_id)


def vectorization_mode(env_id: str, *, vectorized: bool = False) -> str:
    """How a batch of `env_id` is made so that it shows what training saw.

    The package's own vector envs are like its single ones. A stranger's may differ: it is taken where training had it
    (`vectorized`, RLlib's mode `vector_entry_point`) or where there is no single one.
    """
    if not is_native_vector(env_id):
        return "sync"
    alone = registry[env_id].entry_point is None
    return "vector_entry_point" if vectorized or alone or env_id in ENV_IDS else "sync"


def full_id(env_id: str) -> str:
    """`env_id` as every process can make it: the ids of ale_py as `ale_py:ALE/Pong-v5`, others as they are.

    gymnasium knows those once ale_py is imported, which its `module:id` does and which this does for an id that is
    not known.
    """
    name = env_id.removeprefix("ale_py:")
    if name not in registry and ":" not in name:
        with contextlib.suppress(ImportError):
            importlib.import_module("ale_py")
    return f"ale_py:{name}" if _is_of_ale(name) else env_id


def _is_of_ale(env_id: str) -> bool:
    spec = registry.get(env_id)
    return spec is not None and str(spec.entry_point).startswith("ale_py.")


def unknown_id(env_id: str, error: Exception) -> str:
    """gymnasium's complaint about an id in one line, with the id that was meant if one is close."""
    without_namespace = {name.rpartition("/")[2]: name for name in ENV_IDS}
    mend = did_you_mean(env_id, registry, without_namespace, cutoff=0.75)
    return " ".join(str(error).split()).split(" Did you mean")[0].rstrip(".") + mend


def create_env(env_id: str, env_config: Mapping[str, Any] | None = None) -> gym.Env | gym.vector.VectorEnv:
    """Makes an env as RLlib's env creators do: a batch if the config names `num_envs`, a single env if not.

    `tune.register_env(env_id, functools.partial(create_env, env_id))` makes an id known to all EnvRunners of
    a Ray cluster: they import this module when they load the creator.

    Args:
        env_id: Any id that gymnasium knows.
        env_config: Options of the env; an RLlib `EnvContext` is one.

    Raises:
        ValueError: An option is unknown or its value is.
        gymnasium.error.UnregisteredEnv: The id is unknown.
    """
    options = dict(env_config or {})
    num_envs = options.pop("num_envs", None)
    if num_envs is None:
        return gym.make(env_id, **options)
    return gym.make_vec(env_id, num_envs, vectorization_mode="vector_entry_point", **options)


register_envs()
