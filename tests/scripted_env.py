"""A vector environment, a module and a config to try runners and pipelines on. Shared by tests."""

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchMultiCategorical
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule

torch.set_num_threads(1)  # the models are tiny, and the machine may be busy

OBSERVATIONS = {
    "image": gym.spaces.Box(0, 255, (2, 6, 6), np.uint8),
    "vector": gym.spaces.Box(-1.0, 1.0, (3,), np.float64),
    "discrete": gym.spaces.Discrete(5),
    "dict": gym.spaces.Dict({"a": gym.spaces.Box(-1.0, 1.0, (2,), np.float32), "b": gym.spaces.Discrete(3)}),
}
ACTIONS = {
    "discrete": gym.spaces.Discrete(4),
    "multi_discrete": gym.spaces.MultiDiscrete([3, 2]),
    "box": gym.spaces.Box(np.array([-3.0, 0.0], np.float32), np.array([1.0, 0.5], np.float32)),
}


class ScriptedVectorEnv(gym.vector.VectorEnv):
    """A native vector environment with random observations, rewards that depend on the action, and episodes
    of 1 to 12 steps.
    """

    def __init__(
        self,
        num_envs=3,
        observation="vector",
        action="discrete",
        autoreset="next_step",
        fails_at=(),
        reuses_arrays=False,
        longest=12,
        whole_rewards=0,  # steps at first whose rewards are whole numbers by type
    ):
        self.num_envs = num_envs
        self.single_observation_space = OBSERVATIONS[observation]
        self.single_action_space = ACTIONS[action]
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.same_step = autoreset == "same_step"
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP if self.same_step else AutoresetMode.NEXT_STEP}
        self.fails_at = fails_at
        self.reused = self.observation_space.sample() if reuses_arrays else None
        self.longest = longest
        self.whole_rewards = whole_rewards

    def _observe(self):
        observation = self.observation_space.sample()
        if self.reused is not None:
            self.reused[...] = observation
            return self.reused
        return observation

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.random = np.random.default_rng(seed)
            self.observation_space.seed(seed)
            self.action_space.seed(seed)
        self.left = self.random.integers(1, self.longest + 1, self.num_envs)
        self.resetting = np.zeros(self.num_envs, bool)
        return self._observe(), {"kind": np.full(self.num_envs, "reset")}

    def step(self, actions):
        assert self.action_space.contains(np.asarray(actions, self.action_space.dtype)), actions
        if self.fails_at:
            self.fails_at[0] -= 1  # shared by the environments that are built after a failure
            if self.fails_at[0] == 0:
                self.fails_at.pop(0)
                raise RuntimeError("scripted failure")
        kinds = np.where(self.resetting, "reset", "step")
        flat = np.asarray(actions, np.float64).reshape(self.num_envs, -1).sum(1)
        rewards = np.where(self.resetting, 0.0, flat + self.random.random(self.num_envs))
        if self.whole_rewards:
            self.whole_rewards -= 1
            rewards = rewards.astype(int)
        self.left = np.where(self.resetting, self.random.integers(1, self.longest + 1, self.num_envs), self.left - 1)
        done = ~self.resetting & (self.left == 0)
        terminated = done & (self.random.random(self.num_envs) < 0.5)
        if self.same_step:
            self.left = np.where(done, self.random.integers(1, self.longest + 1, self.num_envs), self.left)
        else:
            self.resetting = done
        return self._observe(), rewards, terminated, done & ~terminated, {"kind": kinds, "reward": rewards}


class LinearModule(TorchRLModule, ValueFunctionAPI):
    """Any spaces, extra outputs and, if told so, a state."""

    def setup(self):
        self.stateful = self.model_config.get("stateful", False)
        size = sum(int(np.prod(s.shape or (1,))) for s in _leaves(self.observation_space))
        space = self.action_space
        if isinstance(space, gym.spaces.Box):
            num_outputs = 2 * space.shape[0]
        else:
            num_outputs = int(space.nvec.sum() if isinstance(space, gym.spaces.MultiDiscrete) else space.n)
        self.layer = torch.nn.Linear(size, num_outputs)
        self.value = torch.nn.Linear(size, 1)
        if isinstance(space, gym.spaces.MultiDiscrete):
            self.action_dist_cls = TorchMultiCategorical.get_partial_dist_cls(input_lens=list(space.nvec))

    def is_stateful(self):
        return self.stateful

    def get_initial_state(self):
        return {"h": torch.full((2,), 0.5), "c": torch.zeros(1)} if self.stateful else {}

    def _forward(self, batch, t=0, **kwargs):
        x = self._flat(batch)
        logits = self.layer(x / 10)
        out = {Columns.VF_PREDS: x.sum(-1) + t}
        if self.stateful:
            state = batch[Columns.STATE_IN]
            logits = logits + state["h"].sum(-1)[:, None, None] * torch.linspace(-1, 1, logits.shape[-1])
            out[Columns.STATE_OUT] = {
                "h": torch.tanh(state["h"] + x.mean((1, 2))[:, None]),
                "c": state["c"] + 1,
            }
        out[Columns.ACTION_DIST_INPUTS] = logits
        return out

    def compute_values(self, batch, embeddings=None):
        return self.value(self._flat(batch)).squeeze(-1)

    def _flat(self, batch):
        obs = batch[Columns.OBS]
        leaves = list(obs.values()) if isinstance(obs, dict) else [obs]
        lead = 2 if self.stateful else 1
        return torch.cat([o.float().reshape(*o.shape[:lead], -1) for o in leaves], -1)


def _leaves(space):
    return list(space.spaces.values()) if isinstance(space, gym.spaces.Dict) else [space]


def config_for(env=None, *, stateful=False, num_envs=3, config_class=PPOConfig, **env_runner_settings):
    env = env or {}
    return (
        config_class()
        .environment(lambda context: ScriptedVectorEnv(context["num_envs"], **env))
        .env_runners(
            num_env_runners=0,
            num_envs_per_env_runner=num_envs,
            gym_env_vectorize_mode="vector_entry_point",
            rollout_fragment_length=7,
            **env_runner_settings,
        )
        .rl_module(
            rl_module_spec=RLModuleSpec(
                module_class=LinearModule, model_config={"stateful": stateful, "max_seq_len": 4}
            )
        )
        .debugging(seed=3)
    )
