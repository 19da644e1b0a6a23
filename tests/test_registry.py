"""The env ids: cheap to know, the same for gymnasium and for RLlib, errors that help."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.metadata import entry_points

import gymnasium as gym
import numpy as np
import pytest
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.env.env_context import EnvContext
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

import rllib_pnn
from rllib_pnn.envs.registry import ENV_IDS, create_env, is_native_vector, register_envs


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_registry_is_enough_and_cheap():
    output = run_python(
        "import sys, gymnasium, rllib_pnn.envs.registry\n"
        "heavy = {'torch', 'ray', 'cv2', 'ale_py', 'vizdoom', 'matplotlib'} & set(sys.modules)\n"
        "ids = [i for i in gymnasium.registry if i.startswith('rllib_pnn/')]\n"
        "print(sorted(heavy), *ids)\n"
    )
    assert output.split() == ["[]", *ENV_IDS]


def test_public_names_cost_nothing_until_they_are_used():
    output = run_python(
        "import sys, rllib_pnn\n"
        "heavy = {'torch', 'ray', 'ale_py', 'matplotlib', 'rllib_pnn.analysis', 'rllib_pnn.network'}\n"
        "print(sorted(heavy & set(sys.modules)), set(rllib_pnn.__all__) == set(rllib_pnn._MODULES))\n"
        "rllib_pnn.transfer_score\n"
        "print(sorted({'torch', 'ray'} & set(sys.modules)))\n"
    )
    assert output.split() == ["[]", "True", "[]"]


@pytest.mark.parametrize("name", rllib_pnn.__all__)
def test_every_public_name_is_there(name: str):
    assert getattr(rllib_pnn, name).__name__ == name


def test_gymnasium_imports_the_registry_on_request():
    output = run_python(
        "import gymnasium\n"
        "env = gymnasium.make('rllib_pnn.envs.registry:rllib_pnn/CartPoleSoup-v0', variant='flipped')\n"
        "print(env.unwrapped.variant)\n"
    )
    assert output.strip() == "flipped"


def test_the_entry_point_registers_the_ids():
    (entry,) = (e for e in entry_points(group="gymnasium.envs") if e.value.startswith("rllib_pnn."))
    assert entry.load() is register_envs


def test_registering_again_changes_nothing(recwarn):
    before = {env_id: gym.registry[env_id] for env_id in ENV_IDS}
    register_envs()
    register_envs()
    assert all(gym.registry[env_id] is spec for env_id, spec in before.items())
    assert not recwarn.list


def test_ids_of_ale_do_not_depend_on_what_was_imported():
    output = run_python(
        "import gymnasium, sys\n"
        "from rllib_pnn.envs.registry import full_id, is_native_vector\n"
        "print(full_id('CartPole-v1'), 'ale_py' in sys.modules)\n"
        "print(full_id('ALE/Pong-v5'), is_native_vector('ALE/Pong-v5'))\n"
        "env = gymnasium.make('ALE/Pong-v5', obs_type='ram')\n"
        "print(env.observation_space.shape)\n"
    )
    assert output.split() == ["CartPole-v1", "False", "ale_py:ALE/Pong-v5", "False", "(128,)"]


@pytest.mark.parametrize("env_id", ENV_IDS)
def test_every_id_names_classes_that_exist(env_id: str):
    spec = gym.registry[env_id]
    for entry_point, base in ((spec.entry_point, gym.Env), (spec.vector_entry_point, gym.vector.VectorEnv)):
        module = entry_point.split(":")[0]
        if module.endswith("labyrinth") and not (
            importlib.util.find_spec("vizdoom") and importlib.util.find_spec(module)
        ):
            pytest.skip("needs the extra `labyrinth`")
        assert issubclass(gym.envs.registration.load_env_creator(entry_point), base)


def test_native_vector_envs_are_told_apart():
    assert all(is_native_vector(env_id) for env_id in ENV_IDS)
    assert is_native_vector("CartPole-v1")
    assert not is_native_vector("Acrobot-v1")
    assert not is_native_vector("nowhere/Nothing-v0")


@pytest.mark.parametrize(
    ("env_id", "options"),
    [
        ("rllib_pnn/PongSoup-v0", {"variant": "black"}),
        ("rllib_pnn/Atari-v0", {"game": "seaquest"}),
        ("rllib_pnn/CartPoleSoup-v0", {"variant": "scaled"}),
    ],
)
def test_one_config_makes_single_envs_and_batches(env_id: str, options: dict):
    single = create_env(env_id, EnvContext(options, worker_index=1))
    batch = create_env(env_id, EnvContext(options, worker_index=1) | {"num_envs": 2})
    assert isinstance(single, gym.Env) and isinstance(batch, gym.vector.VectorEnv)
    assert batch.num_envs == 2
    assert single.observation_space == batch.single_observation_space
    assert single.action_space == batch.single_action_space
    np.testing.assert_array_equal(single.reset(seed=1)[0], batch.reset(seed=0)[0][1])
    assert batch.spec.id == single.spec.id == env_id
    assert all(batch.spec.kwargs[key] == value for key, value in options.items())
    single.close()
    batch.close()


def test_errors_name_the_mend_whichever_way_an_env_is_made():
    for num_envs in ({}, {"num_envs": 2}):
        with pytest.raises(ValueError, match="did you mean 'vh_flip'"):
            create_env("rllib_pnn/PongSoup-v0", {"variant": "vhflip", **num_envs})
        with pytest.raises(gym.error.UnregisteredEnv, match="PongSoup"):
            create_env("rllib_pnn/PongSuop-v0", num_envs)


@pytest.mark.parametrize("mode", ["vector_entry_point", "sync"])
def test_rllib_samples_whole_episodes_and_their_scores(mode: str):
    config = (
        PPOConfig()
        .environment(
            "rllib_pnn/Atari-v0",
            env_config={"game": "riverraid", "max_episode_frames": 240, "reward_clipping": True},
        )
        .env_runners(num_env_runners=0, num_envs_per_env_runner=2, gym_env_vectorize_mode=mode)
        .debugging(seed=0)
    )
    runner = SingleAgentEnvRunner(config=config, worker_index=0)
    episodes = [e for e in runner.sample(num_timesteps=130, random_actions=True) if e.is_done]
    runner.stop()
    assert len(episodes) == 2
    for episode in episodes:
        assert len(episode) == 60 and episode.is_truncated
        assert episode.get_observations(0).shape == (4, 84, 84)
        assert set(np.unique(episode.get_rewards())) <= {-1.0, 0.0, 1.0}
        # How a callback reads the unclipped score.
        assert episode.get_infos(-1)["episode_score"] > episode.get_return() > 0
        assert all(info == {} for info in episode.get_infos(slice(0, -1)))
