"""The gradient of A3CEnvRunner against A3C written slowly from the equations, one environment and step at a time."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core import COMPONENT_RL_MODULE
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from scripted_env import LinearModule
from torch import Tensor, nn

from rllib_pnn.training.a3c import A3CConfig
from rllib_pnn.training.a3c_env_runner import LEARNER_STAMP, A3CEnvRunner, FlatParameters, Weights
from rllib_pnn.training.a3c_loss import a3c_loss, n_step_advantages
from rllib_pnn.training.rl_module import ProgressiveRLModule
from rllib_pnn.training.shared_memory import Mailbox

OBS_SIZE = 6
# Per environment, episode after episode: length and how it ends. Chosen so that within rollouts of 5 steps there are
# terminations, truncations, ends at a rollout's last step, episodes of one step, and an env without any end.
SCRIPTS = [
    [(2, "terminated"), (4, "truncated"), (3, "terminated")],
    [(5, "truncated"), (1, "terminated"), (1, "truncated")],
    [(100, "terminated")],
    [(3, "truncated"), (2, "truncated")],
]
LENGTH = 5


class ScriptedEnv(gym.vector.VectorEnv):
    """Random observations and rewards, episodes as in SCRIPTS; keeps a log of what really happened."""

    def __init__(self, autoreset: AutoresetMode, action_space: gym.Space | None = None, image: bool = False) -> None:
        self.metadata = {"autoreset_mode": autoreset}
        self.next_step = autoreset == AutoresetMode.NEXT_STEP
        self.num_envs = len(SCRIPTS)
        self.single_observation_space = (
            gym.spaces.Box(0, 255, (OBS_SIZE,), np.uint8) if image else gym.spaces.Box(-9, 9, (OBS_SIZE,), np.float32)
        )
        self.single_action_space = action_space or gym.spaces.Discrete(3)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, self.num_envs)
        self.rng = np.random.default_rng(0)
        self.log: list[list[dict[str, Any]]] = []  # log[t][n]
        self.actions_seen: list[np.ndarray] = []

    def _observe(self) -> np.ndarray:
        if self.single_observation_space.dtype == np.uint8:
            return self.rng.integers(0, 256, OBS_SIZE).astype(np.uint8)
        return self.rng.normal(size=OBS_SIZE).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.episode = [0] * self.num_envs
        self.age = [0] * self.num_envs
        self.over = [False] * self.num_envs
        self.obs = [self._observe() for _ in range(self.num_envs)]
        self.fresh = [True] * self.num_envs
        return np.stack(self.obs), {}

    def step(self, actions: np.ndarray):
        self.actions_seen.append(np.array(actions))
        row: list[dict[str, Any]] = []
        rewards = np.zeros(self.num_envs)
        terminated = np.zeros(self.num_envs, bool)
        truncated = np.zeros(self.num_envs, bool)
        final = np.full(self.num_envs, None, dtype=object)
        for n in range(self.num_envs):
            if self.over[n]:  # NEXT_STEP: this step only resets
                self.episode[n] += 1
                self.age[n], self.over[n], self.fresh[n] = 0, False, True
                row.append({"real": False, "obs": self.obs[n], "starts": False})
                self.obs[n] = self._observe()
                continue
            length, end = SCRIPTS[n][self.episode[n] % len(SCRIPTS[n])]
            self.age[n] += 1
            ended = self.age[n] == length
            after = self._observe()
            rewards[n] = self.rng.normal()
            terminated[n], truncated[n] = ended and end == "terminated", ended and end == "truncated"
            row.append(
                {
                    "real": True,
                    "obs": self.obs[n],
                    "action": actions[n],
                    "reward": rewards[n],
                    "after": after,
                    "terminated": terminated[n],
                    "ended": ended,
                    "starts": self.fresh[n],
                }
            )
            self.fresh[n] = False
            self.obs[n] = after
            if ended and self.next_step:
                self.over[n] = True
            elif ended:
                final[n] = after
                self.episode[n] += 1
                self.age[n], self.fresh[n] = 0, True
                self.obs[n] = self._observe()
        ended_here = np.array([f is not None for f in final])
        infos = {"final_obs": final, "_final_obs": ended_here} if ended_here.any() else {}
        self.log.append(row)
        return np.stack(self.obs), rewards, terminated, truncated, infos


class SmallModule(TorchRLModule, ValueFunctionAPI):
    """A tanh layer, shared by two heads, that reads the observation and a frozen layer."""

    def setup(self) -> None:
        torch.manual_seed(1)
        outputs = 3 if isinstance(self.action_space, gym.spaces.Discrete) else 2 * self.action_space.shape[0]
        self.frozen = nn.Linear(OBS_SIZE, 5).requires_grad_(False)
        self.num_frozen_rows = 0
        self.body = nn.Linear(OBS_SIZE + 5, 8)
        self.pi = nn.Linear(8, outputs)
        self.vf = nn.Linear(8, 1)

    def _source(self, obs: Tensor) -> Tensor:
        self.num_frozen_rows += len(obs)
        return torch.tanh(self.frozen(obs.float()))

    def _embed(self, batch: dict[str, Any]) -> Tensor:
        obs = batch[Columns.OBS].float()
        source = batch["sources/1"] if "sources/1" in batch else self._source(obs)
        return torch.tanh(self.body(torch.cat([obs, source], dim=-1)))

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        embedding = self._embed(batch)
        return {Columns.ACTION_DIST_INPUTS: self.pi(embedding), Columns.EMBEDDINGS: embedding}

    def compute_values(self, batch: dict[str, Any], embeddings: Tensor | None = None) -> Tensor:
        return self.vf(self._embed(batch) if embeddings is None else embeddings).squeeze(-1)


class SmallModuleWithFeatures(SmallModule):
    def frozen_features(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"sources/1": self._source(batch[Columns.OBS])}


class RecurrentModule(TorchRLModule, ValueFunctionAPI):
    def setup(self) -> None:
        torch.manual_seed(2)
        self.lstm = nn.LSTM(OBS_SIZE, 4, batch_first=True)
        self.pi = nn.Linear(4, 3)
        self.vf = nn.Linear(4, 1)

    def get_initial_state(self) -> dict[str, Tensor]:
        # Other than zero, so that forgetting it shows.
        return {"h": torch.full((4,), 0.5), "c": torch.zeros(4)}

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        state = batch[Columns.STATE_IN]
        out, (h, c) = self.lstm(batch[Columns.OBS], (state["h"][None].contiguous(), state["c"][None].contiguous()))
        return {
            Columns.ACTION_DIST_INPUTS: self.pi(out),
            Columns.EMBEDDINGS: out,
            Columns.STATE_OUT: {"h": h[0], "c": c[0]},
        }

    def compute_values(self, batch: dict[str, Any], embeddings: Tensor | None = None) -> Tensor:
        if embeddings is None:
            embeddings = self._forward(batch)[Columns.EMBEDDINGS]
        return self.vf(embeddings).squeeze(-1)


def make_config(
    module: type = SmallModule,
    autoreset: AutoresetMode = AutoresetMode.NEXT_STEP,
    *,
    action_space: gym.Space | None = None,
    image: bool = False,
    model_config: dict[str, Any] | None = None,
    **training: Any,
) -> A3CConfig:
    return (
        A3CConfig()
        .environment(lambda ctx: ScriptedEnv(autoreset, action_space, image))
        .env_runners(
            num_env_runners=0,
            num_envs_per_env_runner=len(SCRIPTS),
            rollout_fragment_length=LENGTH,
            gym_env_vectorize_mode="vector_entry_point",
        )
        .rl_module(rl_module_spec=RLModuleSpec(module_class=module, model_config=model_config or {}))
        .training(**{"gamma": 0.9, "vf_loss_coeff": 0.7, "entropy_coeff": 0.05, **training})
        .debugging(seed=0)
    )


def make_runner(*args: Any, **kwargs: Any) -> A3CEnvRunner:
    runner = A3CEnvRunner(config=make_config(*args, **kwargs))
    runner._entropy_coeff = runner.config.entropy_coeff
    return runner


def env_of(runner: A3CEnvRunner) -> ScriptedEnv:
    return runner.env.unwrapped


def slow_loss(runner: A3CEnvRunner, start: int) -> Tensor:
    """A3C's loss of env steps [start, start + LENGTH), from the env's own log, one environment and step at a time."""
    config, module, log = runner.config, runner.module, env_of(runner).log
    recurrent = module.is_stateful()

    def initial_state() -> dict[str, Tensor] | None:
        return {k: torch.as_tensor(v)[None] for k, v in module.get_initial_state().items()} if recurrent else None

    def see(obs: np.ndarray, state: Any) -> tuple[Tensor, Tensor, Any]:
        """(logits, value, next state) of one observation."""
        tensor = torch.as_tensor(obs)[None]
        batch = {Columns.OBS: tensor[None] if recurrent else tensor, Columns.STATE_IN: state}
        out = module._forward_train(batch)
        value = module.compute_values(batch, embeddings=out[Columns.EMBEDDINGS])
        return out[Columns.ACTION_DIST_INPUTS].flatten(), value.flatten()[0], out.get(Columns.STATE_OUT)

    terms = []
    for n in range(len(SCRIPTS)):
        state = initial_state()
        steps: list[dict[str, Any]] = []
        for t in range(start + LENGTH):
            entry = log[t][n]
            if t == start and recurrent:
                state = {k: v.detach() for k, v in state.items()}  # no gradient into the previous rollout
            if not entry["real"]:
                continue
            if entry["starts"]:
                state = initial_state()
            logits, value, state = see(entry["obs"], state)
            if t >= start:
                after = see(entry["after"], state)[1].item()
                steps.append({**entry, "t": t, "logits": logits, "value": value, "after_value": after})

        for i, step in enumerate(steps):
            advantage, factor = 0.0, 1.0
            for later in steps[i:]:
                after = 0.0 if later["terminated"] else config.gamma * later["after_value"]
                advantage += factor * (later["reward"] + after - later["value"].item())
                factor *= config.gamma * config.lambda_
                if later["ended"]:
                    break
            target = advantage + step["value"].item()
            if isinstance(module.action_space, gym.spaces.Discrete):
                logp_all = step["logits"] - torch.log(torch.exp(step["logits"]).sum())
                logp = logp_all[int(step["action"])]
                entropy = -(torch.exp(logp_all) * logp_all).sum()
            else:
                mean, log_std = step["logits"].chunk(2)
                z = (torch.as_tensor(step["raw_action"]) - mean) / torch.exp(log_std)
                logp = (-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)).sum()
                entropy = (0.5 + 0.5 * math.log(2 * math.pi) + log_std).sum()
            terms.append(
                -logp * advantage
                + config.vf_loss_coeff * 0.5 * (target - step["value"]) ** 2
                - config.entropy_coeff * entropy
            )
    return sum(terms) / len(terms)


def slow_gradient(runner: A3CEnvRunner, start: int) -> np.ndarray:
    parameters = [p for p in runner.module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(slow_loss(runner, start), parameters)
    return torch.cat([g.flatten() for g in gradients]).numpy()


@pytest.mark.parametrize("autoreset", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("module", [SmallModule, SmallModuleWithFeatures, RecurrentModule])
@pytest.mark.parametrize("lambda_", [1.0, 0.8])
def test_gradient_equals_the_slow_equations(autoreset: AutoresetMode, module: type, lambda_: float) -> None:
    runner = make_runner(module, autoreset, lambda_=lambda_)
    for rollout in range(4):
        collected = runner.collect_rollout()
        gradient, stats = runner.rollout_gradient(collected)
        expected = slow_gradient(runner, start=LENGTH * rollout)
        assert np.abs(expected).max() > 1e-2
        np.testing.assert_allclose(gradient, expected, rtol=2e-4, atol=2e-6, err_msg=f"rollout {rollout}")
        assert stats["total_loss"] == pytest.approx(slow_loss(runner, LENGTH * rollout).item(), rel=1e-4)
    has_reset_steps = any(not entry["real"] for row in env_of(runner).log for entry in row)
    assert has_reset_steps == (autoreset == AutoresetMode.NEXT_STEP)


@pytest.mark.parametrize("column", [[{"dense": 7}, {"dense": 5}], [{"dense": 7}, {"lstm": 5}]])
def test_gradient_of_a_progressive_module_with_frozen_columns(column: list[dict[str, int]]) -> None:
    """Columns 0 and 1 are frozen; the slow equations evaluate them anew, the EnvRunner once per observation."""
    runner = make_runner(ProgressiveRLModule, model_config={"progressive": {"column": column, "tasks": [{}] * 3}})
    module = runner.module
    for task_index in (1, 2):
        module.grow({**module.progress, "task_index": task_index})
    runner.set_state({COMPONENT_RL_MODULE: module.get_state(), LEARNER_STAMP: 1})
    rows = [0, 0]  # that each frozen column computed for the EnvRunner

    def count(k: int, obs: Tensor) -> None:
        rows[k] += len(obs)

    for rollout in range(3):
        hooks = [
            c.register_forward_pre_hook(lambda _, inputs, k=k: count(k, inputs[0]))
            for k, c in enumerate(module.network.columns[:2])
        ]
        gradient, _ = runner.rollout_gradient(runner.collect_rollout())
        for hook in hooks:
            hook.remove()
        # The last observation's frozen activations serve the next rollout too.
        assert rows == [((rollout + 1) * LENGTH + 1) * len(SCRIPTS)] * 2
        np.testing.assert_allclose(gradient, slow_gradient(runner, LENGTH * rollout), rtol=5e-4, atol=2e-6)
    # Frozen all over, there is nothing to compute.
    module.network.freeze()
    runner.set_state({COMPONENT_RL_MODULE: module.get_state(), LEARNER_STAMP: 2})
    gradient, _ = runner.rollout_gradient(runner.collect_rollout())
    assert gradient.shape == (0,)


@pytest.mark.parametrize("autoreset", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("module", [SmallModuleWithFeatures, RecurrentModule])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_parts_of_a_rollout_make_up_its_gradient(autoreset: AutoresetMode, module: type, count: int) -> None:
    runner = make_runner(module, autoreset, lambda_=0.8)
    for _ in range(4):  # ends, truncations and resets fall into other parts and steps each time
        rollout = runner.collect_rollout()
        whole, _ = runner.rollout_gradient(rollout)
        parts = rollout.divide(count)
        assert [part.rewards.shape[1] for part in parts] == {1: [4], 2: [2, 2], 3: [1, 1, 2], 4: [1] * 4}[count]
        steps = np.array([part.valid.sum() for part in parts])
        gradients = [runner.rollout_gradient(part)[0] for part in parts]
        mean = sum(n * gradient for n, gradient in zip(steps, gradients, strict=True)) / steps.sum()
        np.testing.assert_allclose(mean, whole, rtol=2e-4, atol=2e-6)
        assert count == 1 or max(np.abs(gradient - whole).max() for gradient in gradients) > 1e-2


@pytest.mark.parametrize("column", [[{"dense": 7}, {"dense": 5}], [{"dense": 7}, {"lstm": 5}]])
def test_parts_take_the_frozen_columns_activations_along(column: list[dict[str, int]]) -> None:
    runner = make_runner(ProgressiveRLModule, model_config={"progressive": {"column": column, "tasks": [{}] * 2}})
    runner.module.grow({**runner.module.progress, "task_index": 1})
    runner.set_state({COMPONENT_RL_MODULE: runner.module.get_state(), LEARNER_STAMP: 1})
    rows = []
    runner.module.network.columns[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for _ in range(3):
        rollout = runner.collect_rollout()
        whole, _ = runner.rollout_gradient(rollout)
        rows.clear()
        parts = rollout.divide(2)
        gradients = [part.valid.sum() * runner.rollout_gradient(part)[0] for part in parts]
        np.testing.assert_allclose(sum(gradients) / rollout.valid.sum(), whole, rtol=5e-4, atol=2e-6)
        assert not rows, "a frozen column was computed again"


def test_every_part_is_differentiated_at_the_weights_it_is_given() -> None:
    runner = make_runner(gradients_per_rollout=2)
    runner.set_state({COMPONENT_RL_MODULE: runner.module.get_state(), LEARNER_STAMP: 1})
    kept, collect = [], runner.collect_rollout

    def collect_and_keep() -> Any:
        kept.append(collect())
        return kept[-1]

    runner.collect_rollout = collect_and_keep  # type: ignore[method-assign]
    infos, gradients = [], []
    for version, fill, part in ((5, 0.1, 0), (7, 0.3, 1), (8, 0.2, 0)):
        info, gradient = runner.compute_gradient(weights_for(runner, fill, version))
        assert all((p == np.float32(fill)).all() for p in runner.module.parameters() if p.requires_grad)
        expected, _ = runner.rollout_gradient(kept[-1].divide(2)[part])
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)
        infos.append(info)
        gradients.append(gradient)
    assert np.abs(gradients[0] - gradients[1]).max() > 1e-2
    assert len(kept) == 2 and len(env_of(runner).log) == 2 * LENGTH, "the third call begins a rollout"
    assert [info.version for info in infos] == [5, 7, 8]
    assert [info.stats["rollout_age"] for info in infos] == [0, 2, 0]
    assert infos[0].num_env_steps + infos[1].num_env_steps == kept[0].valid.sum()


def test_parts_that_wait_are_forgotten_with_what_they_were_played_on() -> None:
    runner = make_runner(gradients_per_rollout=4)
    state = {COMPONENT_RL_MODULE: runner.module.get_state(), LEARNER_STAMP: 1}

    def played_anew() -> bool:
        before = len(env_of(runner).log)
        runner.compute_gradient(weights_for(runner, 0.1))
        return len(env_of(runner).log) > before

    runner.set_state(state)
    assert [played_anew() for _ in range(2)] == [True, False]
    runner.set_state(state)  # a Learner that was restored, a module that has grown
    assert [played_anew() for _ in range(2)] == [True, False]
    runner.make_env()  # another task
    assert [played_anew() for _ in range(2)] == [True, False]
    runner.sample(num_episodes=1)
    assert [played_anew() for _ in range(4)] == [True, False, False, False]


def test_gradient_of_box_actions_and_their_scaling() -> None:
    space = gym.spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([4.0, 1.0], np.float32))
    runner = make_runner(action_space=space)
    for rollout in range(2):
        collected = runner.collect_rollout()
        raw = collected.actions.numpy()
        for t, row in enumerate(env_of(runner).log[LENGTH * rollout :]):
            for n, entry in enumerate(row):
                entry["raw_action"] = raw[t, n]
        gradient, _ = runner.rollout_gradient(collected)
        np.testing.assert_allclose(gradient, slow_gradient(runner, LENGTH * rollout), rtol=2e-4, atol=2e-6)
        # -1..1 spans the space; beyond it actions are clipped.
        sent = np.stack(env_of(runner).actions_seen[LENGTH * rollout :])
        scaled = np.clip(space.low + (raw + 1) / 2 * (space.high - space.low), space.low, space.high)
        np.testing.assert_allclose(sent, scaled, rtol=1e-5)


def test_frozen_features_are_computed_once_per_observation() -> None:
    runner = make_runner(SmallModuleWithFeatures, image=True)
    for rollout in range(1, 4):
        collected = runner.collect_rollout()
        runner.rollout_gradient(collected)
        assert collected.obs.dtype == torch.uint8
        # One per observation, the bootstrap's included, which the next rollout does not repeat.
        assert runner.module.num_frozen_rows == (rollout * LENGTH + 1) * len(SCRIPTS)


def test_n_step_advantages_by_hand() -> None:
    rewards = np.array([[1.0], [2.0], [4.0]], np.float32)
    values = np.array([[10.0], [20.0], [30.0]], np.float32)
    next_values = np.array([[20.0], [30.0], [40.0]], np.float32)
    no, yes = np.array([[False]] * 3), np.array([[False], [True], [False]])
    # R_0 = 1 + .5 * 2 + .25 * 4 + .125 * 40 = 8, R_1 = 2 + .5 * 4 + .25 * 40 = 14, R_2 = 4 + .5 * 40 = 24
    got = n_step_advantages(rewards, values, next_values, no, no, gamma=0.5)
    np.testing.assert_allclose(got[:, 0], [8 - 10, 14 - 20, 24 - 30])
    # A termination after step 1: R_0 = 1 + .5 * 2 = 2, R_1 = 2.
    got = n_step_advantages(rewards, values, next_values, yes, yes, gamma=0.5)
    np.testing.assert_allclose(got[:, 0], [2 - 10, 2 - 20, 24 - 30])
    # A truncation there bootstraps: R_1 = 2 + .5 * 30 = 17, R_0 = 1 + .5 * 17 = 9.5.
    got = n_step_advantages(rewards, values, next_values, no, yes, gamma=0.5)
    np.testing.assert_allclose(got[:, 0], [9.5 - 10, 17 - 20, 24 - 30])
    # GAE: deltas are 1 + 10 - 10, 2 + 15 - 20, 4 + 20 - 30; lambda 0 gives just those.
    got = n_step_advantages(rewards, values, next_values, no, no, gamma=0.5, lambda_=0.0)
    np.testing.assert_allclose(got[:, 0], [1, -3, -6])


def test_loss_by_hand() -> None:
    tensor = torch.tensor
    loss = a3c_loss(
        logp=tensor([-1.0, -2.0, -9.0]),
        entropy=tensor([0.5, 0.7, 9.0]),
        values=tensor([1.0, 3.0, 9.0]),
        advantages=tensor([2.0, -0.5, 9.0]),
        returns=tensor([3.0, 2.0, 8.0]),
        mask=tensor([1.0, 1.0, 0.0]),
        vf_loss_coeff=0.5,
        entropy_coeff=0.1,
    )
    assert loss.policy.item() == pytest.approx((2.0 - 1.0) / 2)
    assert loss.value.item() == pytest.approx((0.5 * 4 + 0.5 * 1) / 2)
    assert loss.entropy.item() == pytest.approx(0.6)
    assert loss.total.item() == pytest.approx(0.5 + 0.5 * 1.25 - 0.1 * 0.6)


def test_metrics_count_real_steps_and_raw_returns() -> None:
    runner = make_runner()
    runner.config.clip_rewards = 0.1
    steps = 0
    for _ in range(4):
        rollout = runner.collect_rollout()
        assert np.abs(rollout.rewards).max() <= np.float32(0.1)
        steps += int(rollout.valid.sum())
    log = env_of(runner).log
    assert steps == sum(entry["real"] for row in log for entry in row) < 4 * LENGTH * len(SCRIPTS)
    returns, lengths = [], []
    for n in range(len(SCRIPTS)):
        total, length = 0.0, 0
        for entry in (row[n] for row in log if row[n]["real"]):
            total, length = total + entry["reward"], length + 1
            if entry["ended"]:
                returns.append(total)
                lengths.append(length)
                total, length = 0.0, 0
    metrics = runner.get_metrics()
    assert metrics["num_env_steps_sampled"].peek() == steps
    assert metrics["num_episodes"].peek() == len(returns)
    assert metrics["episode_return_mean"].peek() == pytest.approx(np.mean(returns), rel=1e-5)
    assert metrics["episode_len_mean"].peek() == pytest.approx(np.mean(lengths))


@pytest.mark.parametrize("stagger", [0, 8])
def test_cut_episodes_are_learned_from_and_count_in_no_metric(stagger: int) -> None:
    """Pong in episodes of ten steps, one of each environment cut within eight."""

    class Notes(RLlibCallback):
        def on_episode_end(self, *, episode: Any, env_runner: Any, **kwargs: Any) -> None:
            env_runner.notes.append(len(episode))

    config = A3CConfig().environment(
        "rllib_pnn/PongSoup-v0", env_config={"stagger": stagger, "max_episode_frames": 40, "noop_max": 0}
    )
    config.env_runners(num_envs_per_env_runner=8, num_env_runners=0, rollout_fragment_length=6)
    config.env_runners(gym_env_vectorize_mode="vector_entry_point").callbacks(Notes).debugging(seed=0)
    config.rl_module(rl_module_spec=RLModuleSpec(module_class=LinearModule))
    runner = A3CEnvRunner(config=config)
    runner.notes = []
    rollouts = [runner.collect_rollout() for _ in range(2)]  # the buffer of observations is the next rollout's, too
    rollouts += [runner.collect_rollout() for _ in range(3)]
    done, valid = (np.concatenate([getattr(r, key) for r in rollouts]) for key in ("done", "valid"))
    cut = 0
    for n in range(8):
        ends = np.flatnonzero(done[:, n])
        cut += len(ends) > 0 and ends[0] < 9
        assert not valid[ends[:-1] + 1, n].any() and valid[ends, n].all()
    assert cut == (8 if stagger else 0)
    assert runner.notes == [10] * (int(done.sum()) - cut)
    metrics = runner.get_metrics()
    assert metrics["num_episodes"].peek() == len(runner.notes) > 0
    assert metrics["episode_len_min"].peek() == 10
    # Once for new environments: rollouts that begin anew, after an evaluation say, are cut no more.
    runner.notes.clear()
    runner._restart_rollouts = True
    runner.collect_rollout(), runner.collect_rollout()
    assert runner.notes == [10] * 8


def test_on_episode_end_gets_a_summary() -> None:
    class Notes(RLlibCallback):
        def on_episode_end(self, *, episode: Any, env_runner: Any, env_index: int, **kwargs: Any) -> None:
            env_runner.notes.append((env_index, len(episode), episode.get_return(), episode.is_terminated))

    runner = A3CEnvRunner(config=make_config().callbacks(functools.partial(Notes)))
    runner.notes = []
    runner.collect_rollout()
    runner.collect_rollout()
    rows = env_of(runner).log
    assert [(n, length, terminated) for n, length, _, terminated in runner.notes if n == 0] == [
        (0, 2, True),
        (0, 4, False),
    ]
    # Steps 0 and 1 make env 0's first episode, step 2 is a reset, steps 3 to 6 make its second.
    returns = [total for n, _, total, _ in runner.notes if n == 0]
    expected = [sum(rows[t][0]["reward"] for t in steps) for steps in (range(2), range(3, 7))]
    np.testing.assert_allclose(returns, expected)


@pytest.mark.parametrize("autoreset", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_on_episode_end_hears_the_unclipped_return(autoreset: AutoresetMode) -> None:
    class Notes(RLlibCallback):
        def on_episode_end(self, *, episode: Any, env_runner: Any, **kwargs: Any) -> None:
            env_runner.notes.append(episode.get_infos(-1)["episode_score"])

    class Clipping(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
            self.left = 3
            return np.zeros(2, np.float32), {}

        def step(self, action: Any) -> tuple:
            self.left -= 1
            return np.zeros(2, np.float32), 1.0, not self.left, False, {} if self.left else {"episode_score": 30.0}

    config = A3CConfig().callbacks(Notes)
    config.environment(lambda context: gym.vector.SyncVectorEnv([Clipping] * 2, autoreset_mode=autoreset))
    config.env_runners(gym_env_vectorize_mode="vector_entry_point", num_envs_per_env_runner=2)
    runner = A3CEnvRunner(config=config.env_runners(num_env_runners=0, rollout_fragment_length=8))
    runner.notes = []
    runner.collect_rollout()
    assert runner.notes == [30.0] * 4


def weights_for(runner: A3CEnvRunner, fill: float, version: int = 3) -> Weights:
    layout = FlatParameters(runner.module.named_parameters())
    return Weights(np.full(layout.size, fill, np.float32), layout.signature, version, 0.0, 0)


def test_asks_for_a_full_state_until_it_has_the_learners() -> None:
    runner = make_runner()
    weights = weights_for(runner, 0.1)
    assert runner.compute_gradient(weights)[0].needs_state
    # A broadcast of RLlib's own may be incomplete, so it does not count.
    runner.set_state({COMPONENT_RL_MODULE: runner.module.get_state()})
    assert runner.compute_gradient(weights)[0].needs_state
    assert not env_of(runner).log, "acted without the Learner's weights"
    runner.set_state({COMPONENT_RL_MODULE: runner.module.get_state(), LEARNER_STAMP: 2})
    info, gradient = runner.compute_gradient(weights)
    real = sum(entry["real"] for row in env_of(runner).log for entry in row)
    assert (info.needs_state, info.version, info.num_env_steps) == (False, 3, real)
    assert gradient.shape == weights.values.shape and gradient.dtype == np.float32
    assert all((p == 0.1).all() for p in runner.module.parameters() if p.requires_grad)
    # A module of another shape, or of another task, can't use these weights.
    runner.module.task_index = 1
    runner.set_state({COMPONENT_RL_MODULE: runner.module.get_state(), LEARNER_STAMP: 2})
    info, gradient = runner.compute_gradient(weights)
    assert info.needs_state and gradient is None and info.task_index == 1


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memory without a name (Linux)")
def test_weights_and_gradients_in_shared_memory_are_those_of_arrays() -> None:
    apart, shared = make_runner(), make_runner()
    state = {COMPONENT_RL_MODULE: apart.module.get_state(), LEARNER_STAMP: 2}
    for runner in (apart, shared):
        runner.set_state(state)
    weights = weights_for(apart, 0.1)
    mailbox = Mailbox.make(weights.values.size, 2)
    for version, index in ((3, 0), (4, 1), (5, 1)):
        mailbox.weights[index] = weights.values + version
        torch.manual_seed(version)
        _, expected = apart.compute_gradient(dataclasses.replace(weights, values=weights.values + version))
        torch.manual_seed(version)
        sent = dataclasses.replace(weights, version=version, values=mailbox.slot(index))
        info, gradient = shared.compute_gradient(sent)
        assert gradient is None and not info.needs_state and not info.needs_arrays and info.version == version
        np.testing.assert_array_equal(mailbox.gradients[index], expected)
    slot = mailbox.slot(0)
    del mailbox
    # A new memory that this process doesn't reach, as on another machine: nothing is done.
    steps = len(env_of(shared).log)
    elsewhere = dataclasses.replace(
        weights,
        version=6,
        values=dataclasses.replace(slot, address=dataclasses.replace(slot.address, name="elsewhere")),
    )
    info, gradient = shared.compute_gradient(elsewhere)
    assert info.needs_arrays and not info.needs_state and gradient is None
    assert len(env_of(shared).log) == steps and shared._weights_seq_no == 5


def test_a_restored_learner_may_go_back_to_older_weights() -> None:
    runner = make_runner()
    state = {k: np.full_like(v, 0.25) for k, v in runner.module.get_state().items()}
    runner._weights_seq_no = 100
    runner.set_state({COMPONENT_RL_MODULE: state, LEARNER_STAMP: 7, "weights_seq_no": 7})
    assert all((p == 0.25).all() for p in runner.module.parameters())
    assert runner._weights_seq_no == 7


def test_a_new_env_starts_new_episodes() -> None:
    runner = make_runner()
    runner.collect_rollout()
    runner.make_env()
    rollout = runner.collect_rollout()
    assert len(env_of(runner).log) == LENGTH
    np.testing.assert_array_equal(rollout.obs[0], np.stack([entry["obs"] for entry in env_of(runner).log[0]]))


def test_rllibs_sample_and_rollouts_take_turns() -> None:
    runner = make_runner()
    runner.collect_rollout()
    assert len(runner.sample(num_episodes=3)) == 3
    steps = len(env_of(runner).log)
    rollout = runner.collect_rollout()
    np.testing.assert_array_equal(rollout.obs[0], np.stack([e["obs"] for e in env_of(runner).log[steps]]))
    assert all(entry["starts"] for entry in env_of(runner).log[steps])


def test_failed_envs_are_made_anew_if_the_config_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner()
    fails = iter([False, False, True])
    step = ScriptedEnv.step

    def flaky(self: ScriptedEnv, actions: np.ndarray) -> Any:
        if next(fails, False):
            raise OSError("lost connection")
        return step(self, actions)

    monkeypatch.setattr(ScriptedEnv, "step", flaky)
    with pytest.raises(RuntimeError, match="restart_failed_sub_environments"):
        runner.collect_rollout()
    fails = iter([False, False, True])
    runner.config.restart_failed_sub_environments = True
    rollout = runner.collect_rollout()
    assert len(rollout.rewards) == len(env_of(runner).log) == LENGTH


def test_flat_parameters() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1).requires_grad_(False), nn.Conv2d(1, 2, 2))
    module[2].to(memory_format=torch.channels_last)
    layout = FlatParameters(module.named_parameters())
    assert layout.size == 9 + 10
    values = np.arange(19, dtype=np.float32)
    values.setflags(write=False)
    before = module[1].weight.clone()
    layout.write(values)
    np.testing.assert_array_equal(layout.read(), values)
    assert torch.equal(module[1].weight, before)
    assert torch.equal(module[0].weight, torch.arange(6.0).view(3, 2))
    same, other_task = (FlatParameters(module.named_parameters(), task) for task in (0, 1))
    assert same.signature == layout.signature != other_task.signature
    module[1].requires_grad_(True)
    assert FlatParameters(module.named_parameters()).signature != layout.signature


def test_env_and_module_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="DISABLED"):
        make_runner(autoreset=AutoresetMode.DISABLED)

    class NoValues(TorchRLModule):
        pass

    with pytest.raises(ValueError, match=r"ValueFunctionAPI.*NoValues"):
        make_runner(NoValues)
    pairs = gym.spaces.Tuple((gym.spaces.Discrete(2), gym.spaces.Discrete(3)))
    with pytest.raises(ValueError, match=r"action space, got Tuple\("):
        make_runner(action_space=pairs)
    runner = make_runner(autoreset=AutoresetMode.SAME_STEP)
    with pytest.raises(ValueError, match="NEXT_STEP"):
        runner.sample(num_episodes=1)
