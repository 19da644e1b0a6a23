"""A3C's EnvRunner: acts on a vector env and computes the gradient of its rollout where it acted.

Source: Mnih et al. 2016 (arXiv 1602.01783), algorithm S3, with a vector of environments per worker. Boundary: this
file knows environments, an RLModule and flat vectors; who applies gradients and when is a3c.py's business.

Rollouts are arrays (T, N, ...): T steps of N environments, no episode objects, so RLlib's connectors take no part in
training rollouts, and of its per-episode callbacks only `on_episode_end` is called, with an `EpisodeSummary`.
Evaluation goes through RLlib's own `sample()`.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tree
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import DictInfoToList
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.callbacks.utils import make_callback
from ray.rllib.core import COMPONENT_RL_MODULE
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.distribution import Distribution
from ray.rllib.core.distribution.torch.torch_distribution import TorchCategorical
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.env.env_errors import StepFailedRecreateEnvError
from ray.rllib.env.env_runner import NUM_ENV_STEP_FAILURES_LIFETIME
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils import force_list
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import (
    COMPUTE_GRADS_TIMER,
    ENV_STEP_TIMER,
    SAMPLE_TIMER,
    WEIGHTS_SEQ_NO,
)
from ray.rllib.utils.spaces.space_utils import clip_action, unsquash_action
from ray.rllib.utils.typing import ResultDict, StateDict
from torch import Tensor, nn

from rllib_pnn.envs.score import EPISODE_SCORE, episode_scores
from rllib_pnn.envs.stagger import cut_now, stagger_episodes
from rllib_pnn.network.incremental import StepMaps
from rllib_pnn.network.memory import lean_memory
from rllib_pnn.network.repeats import ChangingMaps
from rllib_pnn.training.a3c_loss import a3c_loss, n_step_advantages
from rllib_pnn.training.rl_module import NUM_ENVS, SOURCES
from rllib_pnn.training.shared_memory import Mailbox, Slot

logger = logging.getLogger(__name__)

# A module state that carries this key comes from A3C's Learner and is complete; others (RLlib's own broadcasts) may
# lack what `inference_only` modules do without.
LEARNER_STAMP = "a3c_learner_stamp"


EPISODE_CALLBACKS = ("on_episode_created", "on_episode_start", "on_episode_step", "on_episode_end", "on_sample_end")


def callback_class(given: Any) -> type[RLlibCallback]:
    """The class of an entry of `callbacks_class`: RLlib takes a `functools.partial` of one too."""
    return getattr(given, "func", given)


def episode_callbacks(config: Any) -> list[str]:
    """Names of the callbacks on episodes that an `AlgorithmConfig` sets."""
    classes = [callback_class(c) for c in force_list(config.callbacks_class)]
    return [
        name
        for name in EPISODE_CALLBACKS
        if getattr(config, f"callbacks_{name}", None)
        or any(getattr(c, name) is not getattr(RLlibCallback, name) for c in classes)
    ]


def _sampled(distribution: type[Distribution], logits: Tensor) -> Tensor:
    """A sample of every row."""
    if distribution is TorchCategorical:  # the same numbers without its checks, which take longer
        return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
    return distribution.from_logits(logits).sample()


class FlatParameters:
    """A module's trainable parameters as one float32 vector: what travels instead of dicts of tensors.

    Args:
        named_parameters: name and parameter, in a fixed order; those with `requires_grad` are taken.
        task_index: part of the signature, so that vectors of two tasks never mix even if their shapes agree.

    Attributes:
        signature: equal on both sides exactly if names, shapes, order and task are.
        size: number of floats.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], task_index: int = 0) -> None:
        named = [(name, p) for name, p in named_parameters if p.requires_grad]
        self.parameters = [p for _, p in named]
        self.size = sum(p.numel() for p in self.parameters)
        described = ";".join(f"{name}{tuple(p.shape)}" for name, p in named)
        digest = hashlib.sha256(described.encode()).hexdigest()[:16]
        self.signature = f"task {task_index}, {len(named)} parameters, {digest}"
        self._buffer = torch.empty(self.size)
        self._parts = self.split(self._buffer)

    @torch.no_grad()
    def read(self, out: np.ndarray | None = None) -> np.ndarray:
        """The parameters' values, (size,) float32: in `out`, or in an array that the next call reuses."""
        parts = self._parts if out is None else self.split(torch.from_numpy(out))
        for parameter, part in zip(self.parameters, parts, strict=True):
            part.copy_(parameter)
        return self._buffer.numpy() if out is None else out

    @torch.no_grad()
    def write(self, values: np.ndarray) -> None:
        """Sets the parameters; `values` may be read-only."""
        parts = self._parts
        if values.flags.writeable:
            parts = self.split(torch.from_numpy(values))
        else:  # torch has no read-only tensors and warns of them
            np.copyto(self._buffer.numpy(), values)
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.copy_(part)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a (size,) vector in the parameters' shapes."""
        parts = flat.split([p.numel() for p in self.parameters])
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]


@dataclass(slots=True)
class Weights:
    """What an EnvRunner needs for its next gradient. Arrays are valid until their owner's next call."""

    values: np.ndarray | Slot  # (size,) float32, or where they stand and the gradient is expected
    signature: str  # of the FlatParameters that `values` fits
    version: int  # updates applied so far
    entropy_coeff: float
    num_env_steps: int  # sampled by all EnvRunners so far


@dataclass(slots=True)
class GradientInfo:
    """The stamp of a gradient: what the Learner needs to accept or refuse it, and what the rollout showed.

    `needs_state` says that the EnvRunner could not use the weights it was sent (it restarted, or the module grew) and
    has done nothing: it wants a full module state first. `needs_arrays`: it has done nothing either, because it can't
    reach the memory that the weights stand in.
    """

    signature: str
    version: int = 0  # of the weights that were differentiated
    task_index: int = 0
    num_env_steps: int = 0
    needs_state: bool = False
    needs_arrays: bool = False
    stats: dict[str, float] = field(default_factory=dict)
    metrics: ResultDict | None = None


@dataclass(slots=True)
class Rollout:
    """T steps of N environments. Tensors are on the module's device; states have the environments as first axis."""

    observations: Tensor  # (T + 1, N, ...), the env's dtype; reused by the next rollout
    actions: Tensor  # (T, N, ...)
    rewards: np.ndarray  # (T, N) float32, clipped if the config says so
    terminated: np.ndarray  # (T, N) bool
    done: np.ndarray  # (T, N) bool
    valid: np.ndarray  # (T, N) bool, false on reset steps (NEXT_STEP)
    resets: np.ndarray  # (T, N) bool, true where this step ended with a reset: the next one starts an episode
    state: Any  # before the first step; None if feed-forward
    last_state: Any
    features: dict[str, Any]  # (T + 1, N, ...), the module's `frozen_features`; tensors are reused by the next rollout
    last_features: dict[str, Tensor]  # of last_obs, as a recurrent module gave them, LSTM states among them
    # SAME_STEP: (t, n, obs, state) of truncations, whose last observation the env has replaced.
    final: list[tuple[int, int, Tensor, Any]]

    @property
    def obs(self) -> Tensor:
        """(T, N, ...): what was acted on."""
        return self.observations[:-1]

    @property
    def last_obs(self) -> Tensor:
        """(N, ...): what the last step led to."""
        return self.observations[-1]

    def divide(self, count: int) -> list[Rollout]:
        """The same transitions as `count` rollouts of N / count environments each, as equal as can be; views."""
        if count == 1:
            return [self]
        num_envs = self.rewards.shape[1]
        bounds = [num_envs * i // count for i in range(count + 1)]
        return [self._of_envs(slice(a, b)) for a, b in itertools.pairwise(bounds)]

    def _of_envs(self, part: slice) -> Rollout:
        def first(state: Any) -> Any:  # its first axis
            return None if state is None else tree.map_structure(lambda leaf: leaf[part], state)

        return Rollout(
            observations=self.observations[:, part],
            actions=self.actions[:, part],
            rewards=self.rewards[:, part],
            terminated=self.terminated[:, part],
            done=self.done[:, part],
            valid=self.valid[:, part],
            resets=self.resets[:, part],
            state=first(self.state),
            last_state=first(self.last_state),
            features={
                key: feature.of_envs(part) if isinstance(feature, ChangingMaps) else feature[:, part]
                for key, feature in self.features.items()
            },
            last_features={key: feature[part] for key, feature in self.last_features.items()},
            final=[(t, n - part.start, *rest) for t, n, *rest in self.final if part.start <= n < part.stop],
        )


class EpisodeSummary(SingleAgentEpisode):
    """What a rollout keeps of an episode that ended, for `on_episode_end`: return, length, duration and, of the last
    info, `episode_score`; no steps."""

    def __init__(
        self, length: int, episode_return: float, seconds: float, info: dict[str, Any], *, terminated: bool
    ) -> None:
        super().__init__(terminated=terminated, truncated=not terminated)
        self.infos.append(info)
        self.t = length
        self._return = episode_return
        self._seconds = seconds

    @override(SingleAgentEpisode)
    def get_return(self) -> float:
        return self._return

    @override(SingleAgentEpisode)
    def get_duration_s(self) -> float:
        return self._seconds


class A3CEnvRunner(SingleAgentEnvRunner):
    """Computes gradients on request: `compute_gradient(weights)` acts for T steps and differentiates.

    Works with any TorchRLModule that has `ValueFunctionAPI`. A module that also has
    `frozen_features(batch) -> dict[str, Tensor]` gets them computed once per observation; they are passed back under
    the same keys in every batch that holds this observation. With `forward_with_features(batch, t=...)` it may give
    them along with the outputs of `forward_exploration`, in one pass. A module that has
    `follows_environments(keeps_changes=True)` is told so that its batches are steps of the same environments; it may
    then give features as `StepMaps`, and finds a rollout's as `ChangingMaps` beside `NUM_ENVS` in its train batch.
    """

    # RLlib declares these as optional or by their bases; they are set before use.
    config: Any
    env: Any
    module: Any

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        if kwargs.get("worker_index"):
            # A process of its own: other EnvRunners have the other cores.
            torch.set_num_threads(1)
            lean_memory()
        self._vector_env: Any = None
        self._next_step_reset = True
        self._layout: FlatParameters | None = None
        self._pending: list[Rollout] = []  # parts of the last rollout that have given no gradient yet
        self._acted_version = 0  # of the weights that acted in it
        self._mailbox: Mailbox | None = None
        self._has_learner_state = False
        self._restart_rollouts = self._env_is_new = True
        self._obs_buffer: Tensor | None = None
        self._feature_buffers: dict[str, Tensor] = {}  # (T + 1, N, ...), as `_obs_buffer` reused by the next rollout
        # Where the next rollout goes on: observations and recurrent states (N, ...), and which envs reset next (N,).
        self._obs: np.ndarray = np.empty(0)
        self._state: Any = None
        self._is_reset_step: np.ndarray = np.empty(0, dtype=bool)
        self._last_features: dict[str, Tensor] | None = None
        self._entropy_coeff = 0.0
        self._num_env_steps_unreported = 0
        self._num_rollouts_unreported = 0
        self._finished: list[tuple[int, float, float]] = []  # length, return, seconds
        self._task_of_episodes = 0
        self._seconds = {SAMPLE_TIMER: 0.0, ENV_STEP_TIMER: 0.0, COMPUTE_GRADS_TIMER: 0.0}
        super().__init__(config=config, **kwargs)
        self._calls_episode_end = "on_episode_end" in episode_callbacks(self.config)

    # -- RLlib's EnvRunner ---------------------------------------------------------------------------------------

    @override(SingleAgentEnvRunner)
    def make_env(self) -> None:
        super().make_env()
        # RLlib's wrapper turns infos into a dict per env and step; rollouts need none.
        self._vector_env = self.env.env if isinstance(self.env, DictInfoToList) else self.env
        mode = AutoresetMode(self._vector_env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        if mode == AutoresetMode.DISABLED:
            raise ValueError(
                "env: expected a vector env that resets by itself (NEXT_STEP or SAME_STEP), got autoreset mode DISABLED"
            )
        self._next_step_reset = mode == AutoresetMode.NEXT_STEP
        actions = self.env.single_action_space
        if isinstance(actions, gym.spaces.Tuple | gym.spaces.Dict):
            raise ValueError(
                f"env: A3C keeps actions in one array and needs a Box, Discrete or MultiDiscrete action space, got "
                f"{actions}"
            )
        space = self.env.single_observation_space
        if not isinstance(space, gym.spaces.Box):
            raise ValueError(
                f"env: A3C keeps observations in one array and needs a Box observation space, got {space}; wrap the "
                "env in gymnasium.wrappers.FlattenObservation"
            )
        self._restart_rollouts = self._env_is_new = True

    @override(SingleAgentEnvRunner)
    def make_module(self) -> None:
        if self.config.in_evaluation:
            super().make_module()
            return
        env = self.env.unwrapped if self.env is not None else None
        # With its value function: this EnvRunner differentiates.
        self.module = self.config.get_rl_module_spec(env=env, spaces=self.get_spaces(), inference_only=False).build()
        if not isinstance(self.module, ValueFunctionAPI):
            raise ValueError(
                f"rl_module_spec: A3C needs an RLModule with `ValueFunctionAPI`, got {type(self.module).__name__}"
            )
        self.module.to(self._device)
        if hasattr(self.module, "follows_environments"):
            self.module.follows_environments(keeps_changes=True)
        self._forget_layout()

    @override(SingleAgentEnvRunner)
    def sample(self, **kwargs: Any) -> Any:
        if not self._next_step_reset:
            raise ValueError(
                "env: RLlib's sample(), which evaluation uses, reads NEXT_STEP autoreset only, got a SAME_STEP env; "
                "evaluate with config.evaluation(evaluation_config={'env_config': ...}) that gives a NEXT_STEP env"
            )
        self._restart_rollouts = True
        return super().sample(**kwargs)

    @override(SingleAgentEnvRunner)
    def set_state(self, state: StateDict) -> None:
        stamp = state.get(LEARNER_STAMP)
        if stamp is not None:
            # A restored Learner may count fewer updates than this EnvRunner has seen; RLlib would ignore its weights.
            state = {**state, WEIGHTS_SEQ_NO: 0}
        super().set_state(state)
        if COMPONENT_RL_MODULE in state and not self.config.in_evaluation:
            self._forget_layout()
            self._has_learner_state = stamp is not None
            if (task_index := self._module_task()) != self._task_of_episodes:
                self._task_of_episodes = task_index
                self._finished.clear()
            if stamp is not None:
                self._weights_seq_no = stamp

    @override(SingleAgentEnvRunner)
    def get_metrics(self) -> ResultDict:
        if self._num_rollouts_unreported:
            steps = self._num_env_steps_unreported
            self._log_env_steps(metric=self._metrics_num_env_steps_sampled, num_steps=steps)
            self._increase_sampled_metrics(steps, len(self._finished))
            for length, episode_return, seconds in self._finished:
                self._log_episode_metrics(length, episode_return, seconds)
            for name, seconds in self._seconds.items():
                self.metrics.log_value(name, seconds / self._num_rollouts_unreported)
                self._seconds[name] = 0.0
            self.metrics.log_value(WEIGHTS_SEQ_NO, self._weights_seq_no, window=1)
            self._num_env_steps_unreported = self._num_rollouts_unreported = 0
            self._finished.clear()
        return super().get_metrics()

    # -- the request ---------------------------------------------------------------------------------------------

    def compute_gradient(self, weights: Weights, *, report: bool = False) -> tuple[GradientInfo, np.ndarray | None]:
        """Takes `weights`, acts for `rollout_fragment_length` steps and differentiates A3C's loss.

        With `gradients_per_rollout` n the environments of a rollout are divided into n parts: the first call acts and
        differentiates the first part, the next n - 1 differentiate the others, each at the weights it is given.

        Args:
            weights: of the Learner's module.
            report: attach this EnvRunner's metrics since the last report.

        Returns:
            The stamp and the gradient, (size,) float32; None where it stands in the slot that the weights were in, and
            with `needs_state` or `needs_arrays`.
        """
        layout, task_index = self._get_layout(), self._module_task()
        needs_state = not self._has_learner_state or weights.signature != layout.signature
        if needs_state or not self.load_weights(weights):
            info = GradientInfo(
                layout.signature, task_index=task_index, needs_state=needs_state, needs_arrays=not needs_state
            )
            info.metrics = self.get_metrics() if report else None
            return info, None
        if not self._pending or self._restart_rollouts:
            self._pending = self.collect_rollout().divide(self.config.gradients_per_rollout)
            self._acted_version = weights.version
        rollout = self._pending.pop(0)
        out = None
        if isinstance(weights.values, Slot):
            assert self._mailbox is not None
            out = self._mailbox.gradients[weights.values.index]
        gradient, stats = self.rollout_gradient(rollout, out)
        stats["rollout_age"] = float(weights.version - self._acted_version)
        num_env_steps = int(rollout.valid.sum())
        info = GradientInfo(
            signature=layout.signature,
            version=weights.version,
            task_index=int(getattr(self, "task_index", task_index)),
            num_env_steps=num_env_steps,
            stats=stats,
        )
        if report:
            info.metrics = self.get_metrics()
        return info, gradient if out is None else None

    def load_weights(self, weights: Weights) -> bool:
        """Sets the trainable parameters; returns False, changing nothing, if they do not fit this module or stand where
        this process can't read them."""
        layout = self._get_layout()
        if weights.signature != layout.signature:
            return False
        values = weights.values
        if isinstance(values, Slot):
            if self._mailbox is None or not self._mailbox.holds(values):
                self._mailbox = Mailbox.open(values)
            if self._mailbox is None:
                return False
            values = self._mailbox.weights[values.index]
        layout.write(values)
        self._weights_seq_no = weights.version
        self._entropy_coeff = weights.entropy_coeff
        self.num_env_steps_sampled_lifetime = weights.num_env_steps
        return True

    @property
    def has_learner_state(self) -> bool:
        """Whether the module's frozen parameters and buffers are the Learner's, too."""
        return self._has_learner_state

    def _get_layout(self) -> FlatParameters:
        if self._layout is None:
            self._layout = FlatParameters(self.module.named_parameters(), self._module_task())
        return self._layout

    def _module_task(self) -> int:
        """Of a module that learns tasks one after the other; 0 for any other."""
        return int(getattr(self.module, "task_index", 0))

    def _forget_layout(self) -> None:
        self._layout = None
        self._pending.clear()
        self._feature_buffers = {}
        self._last_features = None
        self._has_learner_state = False

    # -- acting --------------------------------------------------------------------------------------------------

    def collect_rollout(self) -> Rollout:
        """Acts for T steps with the current weights, going on where the last rollout ended."""
        start = time.perf_counter()
        while (rollout := self._collect()) is None:
            # The env failed and was made anew: what the aborted rollout held is not learned from.
            pass
        self._seconds[SAMPLE_TIMER] += time.perf_counter() - start
        return rollout

    @torch.no_grad()
    def _collect(self) -> Rollout | None:
        if self.env is None:
            raise ValueError(f"{self} has no env and can't collect a rollout")
        if self._restart_rollouts:
            self._reset()
        module, num_envs, length = self.module, self.num_envs, self._rollout_length
        module.eval()
        recurrent = self._state is not None
        distribution: Any = module.get_exploration_action_dist_cls()

        assert self._obs_buffer is not None
        obs = self._obs_buffer
        rewards = np.empty((length, num_envs), dtype=np.float32)
        terminated = np.empty((length, num_envs), dtype=bool)
        done = np.empty((length, num_envs), dtype=bool)
        valid = np.empty((length, num_envs), dtype=bool)
        resets = np.empty((length, num_envs), dtype=bool)
        actions: list[Tensor] = []
        features: dict[str, Any] = {}
        final: list[tuple[int, int, Tensor, Any]] = []
        first_state = self._state

        for t in range(length):
            obs[t].copy_(torch.from_numpy(self._obs))
            out, step_features = self._act(self._make_batch(obs[t], self._state))
            for key, feature in step_features.items():
                self._record(features, key, t, feature)
            logits = out[Columns.ACTION_DIST_INPUTS]
            action = _sampled(distribution, logits.squeeze(1) if recurrent else logits)
            actions.append(action)

            step_start = time.perf_counter()
            result = self._step_env(self._actions_for_env(action.cpu().numpy()))
            if result is None:
                return None
            self._seconds[ENV_STEP_TIMER] += time.perf_counter() - step_start
            next_obs, reward, terminated[t], truncated, infos = result
            done[t] = terminated[t] | truncated
            valid[t] = ~self._is_reset_step
            resets[t] = self._is_reset_step if self._next_step_reset else done[t]
            rewards[t] = reward
            self._obs = self._as_obs(next_obs)
            if recurrent:
                state = out[Columns.STATE_OUT]
                self._state = self._reset_states(state, resets[t])
            else:
                state = None
            if not self._next_step_reset:
                final.extend(self._final_states(t, truncated & ~terminated[t], infos, state))
            self._count(reward, done[t], valid[t], terminated[t], infos)
            # What comes next in this env is a reset, its action ignored.
            self._is_reset_step = done[t] if self._next_step_reset else self._is_reset_step
            self._last_features = None

        last_obs = obs[length].copy_(torch.from_numpy(self._obs))
        last_batch = self._make_batch(last_obs, self._state)
        self._last_features = last_features = self._frozen_features(last_batch)
        for key, feature in self._per_step(last_features, recurrent).items():
            self._record(features, key, length, feature)
        self._num_rollouts_unreported += 1
        return Rollout(
            observations=obs,
            actions=torch.stack(actions),
            rewards=self._clip_rewards(rewards),
            terminated=terminated,
            done=done,
            valid=valid,
            resets=resets,
            state=first_state,
            last_state=self._state,
            features=features,
            last_features=last_features if recurrent else {},
            final=final,
        )

    def _record(self, features: dict[str, Any], key: str, t: int, feature: Any) -> None:
        """Keeps a feature of step t, (N, ...), in an array of all steps, or by what changes from step to step."""
        if t == 0:
            features[key] = ChangingMaps() if isinstance(feature, StepMaps) else self._feature_buffer(key, feature)
        if isinstance(features[key], ChangingMaps):
            features[key].append(feature)
        else:
            features[key][t].copy_(feature.whole() if isinstance(feature, StepMaps) else feature)

    def _feature_buffer(self, key: str, feature: Tensor) -> Tensor:
        if key not in self._feature_buffers:
            self._feature_buffers[key] = feature.new_empty((self._rollout_length + 1, *feature.shape))
        return self._feature_buffers[key]

    @property
    def _rollout_length(self) -> int:
        return self.config.get_rollout_fragment_length(self.worker_index or 0)

    def _reset(self) -> None:
        observations, _ = self._try_env_reset(seed=self._seed if self._env_is_new else None, options=None)
        if self._env_is_new:
            stagger_episodes(self.env, self._seed)
        self._env_is_new = False
        self._obs = self._as_obs(observations)
        shape = (self._rollout_length + 1, *self._obs.shape)
        dtype = torch.from_numpy(self._obs).dtype
        if self._obs_buffer is None or self._obs_buffer.shape != shape or self._obs_buffer.dtype != dtype:
            self._obs_buffer = torch.empty(shape, dtype=dtype, device=self._device)
        self._is_reset_step = np.zeros(self.num_envs, dtype=bool)
        self._episode_returns = np.zeros(self.num_envs)
        self._episode_lengths = np.zeros(self.num_envs, dtype=np.int64)
        self._episode_starts = np.full(self.num_envs, time.perf_counter())
        self._state = self._initial_states(self.num_envs) if self.module.is_stateful() else None
        self._last_features = None
        self._feature_buffers = {}
        self._restart_rollouts = False
        # RLlib's sample() must not go on from where rollouts are.
        self._needs_initial_reset = True

    def _as_obs(self, observations: Any) -> np.ndarray:
        array = np.asarray(observations)
        return array.astype(np.float32) if array.dtype == np.float64 else np.ascontiguousarray(array)

    def _step_env(self, actions: np.ndarray) -> tuple[Any, ...] | None:
        """Steps all envs; None if that failed and the envs were made anew (RLlib's rules and settings)."""
        try:
            return self._vector_env.step(actions)
        except Exception as error:
            self.metrics.log_value(NUM_ENV_STEP_FAILURES_LIFETIME, 1, reduce="lifetime_sum")
            if not self.config.restart_failed_sub_environments:
                raise RuntimeError(
                    f"env: stepping failed with {error!r}; "
                    "config.fault_tolerance(restart_failed_sub_environments=True) makes failed environments anew"
                ) from error
            if not isinstance(error, StepFailedRecreateEnvError):
                logger.exception("Stepping the envs failed; they are made anew and all of them reset.")
            self.make_env()
            return None

    def _actions_for_env(self, actions: np.ndarray) -> np.ndarray:
        if not isinstance(self.env.single_action_space, gym.spaces.Box):
            return actions
        if self.config.normalize_actions:
            return unsquash_action(actions, self.env.single_action_space)
        if self.config.clip_actions:
            return clip_action(actions, self.env.single_action_space)
        return actions

    def _clip_rewards(self, rewards: np.ndarray) -> np.ndarray:
        if self.config.clip_rewards is True:
            return np.sign(rewards)
        if self.config.clip_rewards:
            limit = float(self.config.clip_rewards)
            return rewards.clip(-limit, limit)
        return rewards

    def _count(
        self,
        reward: np.ndarray,
        done: np.ndarray,
        valid: np.ndarray,
        terminated: np.ndarray,
        infos: Mapping[str, Any],
    ) -> None:
        """Episode statistics, of the env's rewards; Python objects only where an episode ends."""
        self._episode_returns += reward * valid
        self._episode_lengths += valid
        self._num_env_steps_unreported += int(valid.sum())
        ended = done & valid
        if not ended.any():
            return
        told, scores = episode_scores(infos, ended)
        cut = cut_now(self.env)
        for n in np.flatnonzero(ended):
            now = time.perf_counter()
            length, episode_return = int(self._episode_lengths[n]), float(self._episode_returns[n])
            seconds = now - self._episode_starts[n]
            self._episode_returns[n] = self._episode_lengths[n] = 0
            self._episode_starts[n] = now
            if cut is not None and cut[n]:
                continue
            self._finished.append((length, episode_return, seconds))
            if self._calls_episode_end:
                info = {EPISODE_SCORE: float(scores[n])} if told[n] else {}
                summary = EpisodeSummary(length, episode_return, seconds, info, terminated=bool(terminated[n]))
                self._call_episode_end(summary, int(n))

    def _call_episode_end(self, episode: EpisodeSummary, env_index: int) -> None:
        make_callback(
            "on_episode_end",
            callbacks_objects=self._callbacks,
            callbacks_functions=self.config.callbacks_on_episode_end,
            kwargs={
                "episode": episode,
                "prev_episode_chunks": [],
                "env_runner": self,
                "metrics_logger": self.metrics,
                "env": self.env.unwrapped,
                "rl_module": self.module,
                "env_index": env_index,
            },
        )

    # -- recurrent states and frozen features --------------------------------------------------------------------

    def _initial_states(self, count: int) -> Any:
        def repeat(leaf: Any) -> Tensor:
            leaf = torch.as_tensor(leaf, device=self._device)
            return leaf.unsqueeze(0).repeat(count, *[1] * leaf.dim())

        return tree.map_structure(repeat, self.module.get_initial_state())

    def _reset_states(self, state: Any, where: np.ndarray) -> Any:
        if not where.any():
            return state
        mask = torch.from_numpy(where).to(self._device)

        def choose(old: Tensor, fresh: Tensor) -> Tensor:
            return torch.where(mask.view(-1, *[1] * (old.dim() - 1)), fresh, old)

        return tree.map_structure(choose, state, self._initial_states(len(where)))

    def _make_batch(self, obs: Tensor, state: Any) -> dict[str, Any]:
        """One time step: obs (B, ...), with a time axis of 1 if recurrent."""
        if state is None:
            return {Columns.OBS: obs}
        return {Columns.OBS: obs.unsqueeze(1), Columns.STATE_IN: state}

    def _act(self, batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The module's outputs for one time step and its frozen features, (B, ...), to be kept for the gradient.

        Features of the last rollout's last step are not computed again.
        """
        module, steps, recurrent = self.module, self.num_env_steps_sampled_lifetime, self._state is not None
        if self._last_features is None and hasattr(module, "forward_with_features"):
            out, features = module.forward_with_features(batch, t=steps)
        else:
            features = self._frozen_features(batch) if self._last_features is None else self._last_features
            out = module.forward_exploration({**batch, **features}, t=steps)
        return out, self._per_step(features, recurrent)

    def _frozen_features(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return dict(self.module.frozen_features(batch)) if hasattr(self.module, "frozen_features") else {}

    @staticmethod
    def _per_step(features: Mapping[str, Tensor], recurrent: bool) -> dict[str, Tensor]:
        """(B, ...) of each feature. Recurrent ones come as (B, 1, ...); what has no time axis is a state, of use in
        acting only."""
        if not recurrent:
            return dict(features)
        return {key: feature.squeeze(1) for key, feature in features.items() if feature.dim() > 2}

    def _final_states(
        self, t: int, truncated: np.ndarray, infos: Mapping[str, Any], state: Any
    ) -> list[tuple[int, int, Tensor, Any]]:
        """SAME_STEP: what truncated episodes last showed, which `obs[t + 1]` no longer has."""
        found = []
        for n in np.flatnonzero(truncated):
            if "final_obs" not in infos:
                raise ValueError(
                    f"env: a SAME_STEP vector env must put the last observation of an episode into infos['final_obs'], "
                    f"got infos with {sorted(infos)}"
                )
            obs = torch.from_numpy(self._as_obs(infos["final_obs"][n])).to(self._device)
            last_state = None if state is None else tree.map_structure(lambda s, n=n: s[n], state)
            found.append((t, int(n), obs, last_state))
        return found

    # -- learning ------------------------------------------------------------------------------------------------

    def rollout_gradient(self, rollout: Rollout, out: np.ndarray | None = None) -> tuple[np.ndarray, dict[str, float]]:
        """Gradient of A3C's loss on a rollout with respect to the trainable parameters.

        Returns:
            (size,) float32, in `out` if that is given, and the loss terms.
        """
        start = time.perf_counter()
        layout = self._get_layout()
        final_values = self._final_values(rollout)
        logits, values, last_values = self._forward(rollout)
        values_np = values.detach().cpu().numpy().reshape(rollout.rewards.shape)
        # NEXT_STEP envs show an episode's last state as the next step's, so it needs no special treatment there.
        next_values = np.concatenate([values_np[1:], last_values[None]])
        for (t, n, _, _), value in zip(rollout.final, final_values, strict=True):
            next_values[t, n] = value
        advantages = n_step_advantages(
            rollout.rewards,
            values_np,
            next_values,
            rollout.terminated,
            rollout.done,
            gamma=self.config.gamma,
            lambda_=self.config.lambda_,
        )
        returns = advantages + values_np

        def flat(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array.reshape(-1)).to(self._device, torch.float32)

        distribution: Any = self.module.get_train_action_dist_cls().from_logits(logits)
        loss = a3c_loss(
            distribution.logp(rollout.actions.flatten(0, 1)),
            distribution.entropy(),
            values,
            flat(advantages),
            flat(returns),
            flat(rollout.valid),
            vf_loss_coeff=self.config.vf_loss_coeff,
            entropy_coeff=self._entropy_coeff,
        )
        gradient = np.empty(layout.size, dtype=np.float32) if out is None else out
        if layout.parameters:  # none while everything is frozen
            gradients = torch.autograd.grad(loss.total, layout.parameters, allow_unused=True, materialize_grads=True)
            for part, one in zip(layout.split(torch.from_numpy(gradient)), gradients, strict=True):
                part.copy_(one)
        names = ("total_loss", "policy_loss", "vf_loss", "entropy")
        stats = dict(zip(names, torch.stack([term.detach() for term in loss]).tolist(), strict=True))
        spread = returns[rollout.valid].var() if rollout.valid.any() else 0.0
        if spread > 0:
            stats["vf_explained_var"] = float(1.0 - advantages[rollout.valid].var() / spread)
        self._seconds[COMPUTE_GRADS_TIMER] += time.perf_counter() - start
        return gradient, stats

    @torch.no_grad()
    def _final_values(self, rollout: Rollout) -> np.ndarray:
        """V of the states in `rollout.final`, (len(final),)."""
        if not rollout.final:
            return np.empty(0, dtype=np.float32)
        obs = torch.stack([obs for _, _, obs, _ in rollout.final])
        state = None
        if rollout.state is not None:
            state = tree.map_structure(lambda *leaves: torch.stack(leaves), *[s for _, _, _, s in rollout.final])
        return self._values(obs, state, None)

    def _values(self, obs: Tensor, state: Any, features: Mapping[str, Tensor] | None) -> np.ndarray:
        self.module.eval()
        batch = self._make_batch(obs, state)
        if features is None:
            features = self._frozen_features(batch)
        batch.update(features)
        return self.module.compute_values(batch).reshape(len(obs)).cpu().numpy()

    def _forward(self, rollout: Rollout) -> tuple[Tensor, Tensor, np.ndarray]:
        """Action distribution inputs (M, A) and values (M,) of all M = T * N transitions, time-major, with gradient.

        And V(s_T) of every environment, (N,).
        """
        if rollout.state is not None:
            return self._forward_sequences(rollout)
        # The last observations go along: a pass of their own takes longer.
        batch: dict[str, Any] = {Columns.OBS: rollout.observations.flatten(0, 1)}
        follows = hasattr(self.module, "follows_environments")
        if follows:
            batch[NUM_ENVS] = rollout.rewards.shape[1]
        for key, feature in rollout.features.items():
            batch[key] = feature if follows and key.startswith(SOURCES) else feature.flatten(0, 1)
        out = self.module.forward_train(batch)
        values = self.module.compute_values(batch, embeddings=out.get(Columns.EMBEDDINGS))
        count = rollout.rewards.size
        return out[Columns.ACTION_DIST_INPUTS][:count], values[:count], values[count:].detach().cpu().numpy()

    def _forward_sequences(self, rollout: Rollout) -> tuple[Tensor, Tensor, np.ndarray]:
        """The same of a recurrent module."""
        with torch.no_grad():
            last_values = self._values(rollout.last_obs, rollout.last_state, rollout.last_features)
        columns = {Columns.OBS: rollout.obs, **{key: feature[:-1] for key, feature in rollout.features.items()}}
        batch, order = self._episode_sequences(rollout, columns)
        out = self.module.forward_train(batch)
        values = self.module.compute_values(batch, embeddings=out.get(Columns.EMBEDDINGS))
        return out[Columns.ACTION_DIST_INPUTS].flatten(0, 1)[order], values.flatten()[order], last_values

    def _episode_sequences(self, rollout: Rollout, columns: Mapping[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
        """Cuts the rollout where episodes start, because a recurrent module runs each sequence from one state.

        Returns:
            The batch: columns (S, L, ...) for S sequences, padded to the longest's length L, and `STATE_IN` (S, ...);
            and for each of the M transitions, time-major, its place in the flattened (S, L).
        """
        T, N = rollout.rewards.shape
        pieces: list[tuple[int, int, int]] = []  # env, first step, end
        for n in range(N):
            bounds = [0, *(np.flatnonzero(rollout.resets[:-1, n]) + 1), T]
            pieces.extend((n, int(a), int(b)) for a, b in itertools.pairwise(bounds))
        pieces.sort(key=lambda piece: piece[1] > 0)  # first those that go on from the rollout's first state
        length = max(b - a for _, a, b in pieces)
        order = np.empty((T, N), dtype=np.int64)
        source = np.zeros((len(pieces), length), dtype=np.int64)  # padding repeats transition 0 and is never read
        for row, (n, a, b) in enumerate(pieces):
            order[a:b, n] = row * length + np.arange(b - a)
            source[row, : b - a] = np.arange(a, b) * N + n
        index = torch.from_numpy(source).to(self._device)
        batch: dict[str, Any] = {key: column.flatten(0, 1)[index] for key, column in columns.items()}
        fresh = len(pieces) - N
        batch[Columns.STATE_IN] = rollout.state
        if fresh:
            batch[Columns.STATE_IN] = tree.map_structure(
                lambda old, new: torch.cat([old, new]), rollout.state, self._initial_states(fresh)
            )
        return batch, torch.from_numpy(order.reshape(-1)).to(self._device)
