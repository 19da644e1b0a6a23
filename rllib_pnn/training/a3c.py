"""A3C, asynchronous advantage actor-critic (Mnih et al. 2016, arXiv 1602.01783), on RLlib's new API stack.

Every EnvRunner computes the gradient of its own short rollout (a3c_env_runner.py); the Learner applies gradients in
the order in which they arrive and answers each with the newest weights. EnvRunners never wait for one another. Per
gradient one flat float32 vector travels in each direction, through memory that both processes have mapped where they
run on one machine (shared_memory.py), through Ray elsewhere; full module states travel only to EnvRunners that start,
restart, or whose module has grown.

    from rllib_pnn.training.a3c import A3CConfig
    algo = A3CConfig().environment("CartPole-v1").env_runners(num_env_runners=2).build_algo()
    algo.train()

Departures from the paper: workers are processes with a vector of environments each, so a gradient averages over
`num_envs_per_env_runner` rollouts, or over a part of them (`gradients_per_rollout`: from the second part on the weights
have moved since they acted, by the gradients before); the loss is a mean, not a sum, over transitions; RMSProp adds
epsilon outside the square root, as torch does; gradients older than `max_gradient_staleness` updates are dropped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray import tune
from ray.exceptions import ActorDiedError, ObjectLostError, RayActorError, RayError
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig, NotProvided
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.core import (
    COMPONENT_LEARNER,
    COMPONENT_RL_MODULE,
    DEFAULT_MODULE_ID,
)
from ray.rllib.core.learner.learner import DEFAULT_OPTIMIZER, Learner
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import (
    ALL_MODULES,
    APPLY_GRADS_TIMER,
    DIFF_NUM_GRAD_UPDATES_VS_SAMPLER_POLICY,
    ENV_RUNNER_RESULTS,
    GRAD_WAIT_TIMER,
    LEARNER_RESULTS,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    NUM_ENV_STEPS_TRAINED,
    NUM_ENV_STEPS_TRAINED_LIFETIME,
    NUM_MODULE_STEPS_TRAINED,
    NUM_MODULE_STEPS_TRAINED_LIFETIME,
    NUM_SYNCH_WORKER_WEIGHTS,
    TIMERS,
    WEIGHTS_SEQ_NO,
)
from ray.rllib.utils.schedules.scheduler import Scheduler
from ray.rllib.utils.typing import ParamDict, ResultDict, StateDict

from rllib_pnn.training.a3c_env_runner import (
    LEARNER_STAMP,
    A3CEnvRunner,
    FlatParameters,
    GradientInfo,
    Weights,
    episode_callbacks,
)
from rllib_pnn.training.learner import results_of
from rllib_pnn.training.rmsprop import RMSPropTF
from rllib_pnn.training.shared_memory import Mailbox
from rllib_pnn.training.trouble import TrainingTrouble

logger = logging.getLogger(__name__)

OPTIMIZERS = {"rmsprop": torch.optim.RMSprop, "rmsprop_tf": RMSPropTF, "adam": torch.optim.Adam}
# These change how torch computes the update, not what; they exclude each other.
IMPLEMENTATIONS = ("foreach", "fused", "differentiable", "capturable")
OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "rmsprop": {"alpha": 0.99, "eps": 1e-5, "foreach": True},
    "rmsprop_tf": {"alpha": 0.99, "eps": 1e-5},
    "adam": {"eps": 1e-5, "fused": True},
}
_UNSET: Any = NotProvided  # RLlib's "not given", typed so that signatures can say what is expected
DROP_REASONS = ("stale", "other_task", "other_layout", "not_finite")
# Seconds between two looks at an EnvRunner that restarts.
PROBE_INTERVAL_S = 1.0
LEARNER_COUNTERS = "a3c_counters"


class A3CConfig(AlgorithmConfig):
    """Configures A3C. Rollouts are `rollout_fragment_length` steps of `num_envs_per_env_runner` environments.

    >>> config = A3CConfig().environment("CartPole-v1").training(lr=7e-4, entropy_coeff=0.01)
    >>> config.rollout_fragment_length, config.num_envs_per_env_runner
    (5, 16)
    """

    uses_values_in_exploration = False  # asked by make_progressive(): modules need not emit VF_PREDS when acting

    # RLlib's annotations are narrower than what it takes.
    env_runner_cls: Any
    grad_clip: Any
    min_time_s_per_iteration: Any

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or A3C)
        self.env_runner_cls = A3CEnvRunner
        self.num_env_runners = 2
        self.num_envs_per_env_runner = 16
        self.rollout_fragment_length = 5
        self.lr = 7e-4
        self.grad_clip = 0.5
        self.grad_clip_by = "global_norm"
        self.optimizer = {"type": "rmsprop"}
        self.lambda_ = 1.0
        self.vf_loss_coeff = 1.0
        self.entropy_coeff: float | list[list[float]] = 0.01
        self.max_gradient_staleness: int | str = "auto"
        self.gradients_per_training_step: int | str = "auto"
        self.gradients_per_rollout = 1
        self.min_time_s_per_iteration = 5
        # Weights travel with every request; RLlib's own broadcast after each iteration would only repeat them.
        self._dont_auto_sync_env_runner_states = True

    @override(AlgorithmConfig)
    def training(
        self,
        *,
        lambda_: float = _UNSET,
        vf_loss_coeff: float = _UNSET,
        entropy_coeff: float | list[list[float]] = _UNSET,
        max_gradient_staleness: int | str = _UNSET,
        gradients_per_training_step: int | str = _UNSET,
        gradients_per_rollout: int = _UNSET,
        **kwargs: Any,
    ) -> A3CConfig:
        """Sets what training depends on.

        Args:
            lambda_: GAE's lambda; 1 gives A3C's n-step returns.
            vf_loss_coeff: c_v of `-log pi * A + c_v * 0.5 * (R - V)^2 - entropy_coeff * H`.
            entropy_coeff: a number, or a schedule `[[env_step, value], ...]` that starts at 0; `lr` likewise.
            max_gradient_staleness: a gradient is dropped if more than this many updates have been applied since its
                weights were sent. `"auto"`: 4 for every gradient that can be on its way.
            gradients_per_training_step: gradients awaited by one `training_step()`; an iteration (`train()`) repeats
                those until `min_time_s_per_iteration` has passed. `"auto"`: 8 per EnvRunner, at least 64.
            gradients_per_rollout: parts that the environments of an EnvRunner are divided into, with a gradient each.
                Many environments act fast together, and small gradients learn from fewer steps: the second part's
                gradient is taken at the weights that the first one's has moved, and so on. The Learner's metric
                `rollout_age`: updates between the weights that acted and those that were differentiated.
            kwargs: those of `AlgorithmConfig.training`, among them `lr`, `gamma`, `grad_clip`, `grad_clip_by` and
                `optimizer`: `{"type": "rmsprop", "alpha": 0.99, "eps": 1e-5}` or `{"type": "adam", "eps": 1e-5}`
                plus any keyword of torch's class, or `{"type": "rmsprop_tf", "alpha": 0.99, "eps": 1e-5}`: epsilon
                inside the root, as in the paper (`RMSPropTF`).
        """
        super().training(**kwargs)
        if lambda_ is not NotProvided:
            self.lambda_ = lambda_
        if vf_loss_coeff is not NotProvided:
            self.vf_loss_coeff = vf_loss_coeff
        if entropy_coeff is not NotProvided:
            self.entropy_coeff = entropy_coeff
        if max_gradient_staleness is not NotProvided:
            self.max_gradient_staleness = max_gradient_staleness
        if gradients_per_training_step is not NotProvided:
            self.gradients_per_training_step = gradients_per_training_step
        if gradients_per_rollout is not NotProvided:
            self.gradients_per_rollout = gradients_per_rollout
        return self

    @property
    def effective_max_gradient_staleness(self) -> int:
        """`max_gradient_staleness` with "auto" resolved, in updates."""
        if self.max_gradient_staleness == "auto":
            return 4 * max(1, self.num_env_runners) * self.max_requests_in_flight_per_env_runner
        return int(self.max_gradient_staleness)

    @property
    def effective_gradients_per_training_step(self) -> int:
        """`gradients_per_training_step` with "auto" resolved."""
        if self.gradients_per_training_step == "auto":
            return max(64, 8 * self.num_env_runners)
        return int(self.gradients_per_training_step)

    @property
    def optimizer_type(self) -> str:
        return self.optimizer.get("type", "rmsprop")

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """Keywords for torch's optimizer class, without the learning rate."""
        given = {key: value for key, value in self.optimizer.items() if key != "type"}
        defaults = OPTIMIZER_DEFAULTS[self.optimizer_type]
        if any(key in given for key in IMPLEMENTATIONS):
            defaults = {key: value for key, value in defaults.items() if key not in IMPLEMENTATIONS}
        return {**defaults, **given}

    @override(AlgorithmConfig)
    def get_default_rl_module_spec(self) -> RLModuleSpec:
        return RLModuleSpec(module_class=DefaultPPOTorchRLModule)

    @override(AlgorithmConfig)
    def get_default_learner_class(self) -> type[Learner]:
        return A3CLearner

    @property
    @override(AlgorithmConfig)
    def _model_config_auto_includes(self) -> dict[str, Any]:
        return super()._model_config_auto_includes | {"vf_share_layers": False}

    @override(AlgorithmConfig)
    def validate(self) -> None:
        super().validate()
        # RLlib changes some of these in evaluation configs, where nothing is trained.
        if self.in_evaluation or not self._validate_config:
            return
        if not (self.enable_rl_module_and_learner and self.enable_env_runner_and_connector_v2):
            self._value_error("A3C runs on RLlib's new API stack only; leave `config.api_stack()` at its defaults.")
        if self.framework_str != "torch":
            self._value_error(f"`framework` ({self.framework_str}) must be 'torch'.")
        if self.is_multi_agent:
            self._value_error("A3C is single-agent; `config.multi_agent()` can't be used with it.")
        if self.num_learners > 1:
            self._value_error(
                f"`num_learners` ({self.num_learners}) must be 0 or 1. In A3C, gradients are applied one after the "
                "other as they arrive, so there is nothing to divide among Learners."
            )
        if self.num_aggregator_actors_per_learner:
            self._value_error(
                f"`num_aggregator_actors_per_learner` ({self.num_aggregator_actors_per_learner}) must be 0. In A3C, "
                "EnvRunners send gradients, not episodes."
            )
        if not (isinstance(self.env_runner_cls, type) and issubclass(self.env_runner_cls, A3CEnvRunner)):
            self._value_error(f"`env_runner_cls` ({self.env_runner_cls}) must be a subclass of A3CEnvRunner.")
        if not self.explore:
            self._value_error(
                "`explore` must be True: A3C learns from actions that its policy has drawn. For greedy evaluation, "
                "`config.evaluation(evaluation_config={'explore': False})`."
            )
        if self.output:
            self._value_error("`output` can't be used: A3C's EnvRunners keep gradients, not episodes.")
        if self.batch_mode != "truncate_episodes":
            self._value_error(
                f"`batch_mode` ('{self.batch_mode}') must be 'truncate_episodes'. In A3C, rollouts have "
                "`rollout_fragment_length` steps whether episodes end in them or not."
            )
        if not isinstance(self.rollout_fragment_length, int) or self.rollout_fragment_length < 1:
            self._value_error(
                f"`rollout_fragment_length` ({self.rollout_fragment_length}) must be an integer >= 1: A3C's t_max, "
                "often 5 or 20."
            )
        if self.num_epochs != 1 or self.minibatch_size is not None:
            self._value_error(
                f"`num_epochs` ({self.num_epochs}) must be 1 and `minibatch_size` ({self.minibatch_size}) None. In "
                "A3C, every transition is learned from once; `gradients_per_rollout` divides a rollout."
            )
        for name in ("_env_to_module_connector", "_module_to_env_connector", "_learner_connector"):
            if getattr(self, name) is not None:
                self._value_error(
                    f"`{name[1:]}` can't be used: A3C keeps rollouts as arrays and runs no connectors on them. Put "
                    "the transformation into an environment wrapper or into the RLModule."
                )
        if not 0.0 <= self.lambda_ <= 1.0:
            self._value_error(f"`lambda_` ({self.lambda_}) must be in [0, 1].")
        if self.vf_loss_coeff < 0:
            self._value_error(f"`vf_loss_coeff` ({self.vf_loss_coeff}) must be >= 0.")
        Scheduler.validate(
            fixed_value_or_schedule=self.entropy_coeff,
            setting_name="entropy_coeff",
            description="entropy coefficient",
        )
        if self.optimizer_type not in OPTIMIZERS:
            self._value_error(
                f"`optimizer` ({self.optimizer}) must have 'type' {' or '.join(map(repr, OPTIMIZERS))}, got "
                f"{self.optimizer_type!r}."
            )
        try:
            OPTIMIZERS[self.optimizer_type]([torch.zeros(1)], lr=0.0, **self.optimizer_arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            self._value_error(f"`optimizer` ({self.optimizer}) is refused by its class: {error}.")
        self._check_count("max_gradient_staleness", least=0)
        self._check_count("gradients_per_training_step", least=1)
        parts, envs = self.gradients_per_rollout, self.num_envs_per_env_runner
        if not isinstance(parts, int) or not 1 <= parts <= envs:
            self._value_error(
                f"`gradients_per_rollout` ({parts!r}) must be an integer from 1 to `num_envs_per_env_runner` ({envs}), "
                "which it divides into parts."
            )
        if uncalled := [name for name in episode_callbacks(self) if name != "on_episode_end"]:
            logger.warning(
                f"A3C's training rollouts hold no episodes: {', '.join(uncalled)} will be called in evaluation only."
            )

    def _check_count(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value != "auto" and (not isinstance(value, int) or value < least):
            self._value_error(f"`{name}` ({value!r}) must be 'auto' or an integer >= {least}.")


class A3CLearner(TorchLearner):
    """Holds the module and the optimizer that all EnvRunners share, and applies their gradients one by one."""

    config: Any
    _module: Any

    @override(TorchLearner)
    def build(self) -> None:
        self._layout: FlatParameters | None = None
        self._layout_key: tuple[Any, ...] = ()
        self._gradient_buffer = self._flat_gradient = torch.empty(0)  # in host memory; on the device
        self._gradient_norm = 0.0  # of the newest gradient, before the clip
        self._num_env_steps = 0  # that came with gradients, dropped ones included; what schedules run on
        self._num_dropped = dict.fromkeys(DROP_REASONS, 0)
        self._num_not_finite_unreported = 0
        self._only_not_finite = False  # whether that holds for all gradients between the last two get_metrics()
        # Since the last get_metrics():
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)  # a rollout of equal returns has no explained variance
        self._num_applied_unreported = self._num_steps_unreported = self._max_staleness = 0
        self._apply_seconds = 0.0
        self._entropy_schedule = Scheduler(fixed_value_or_schedule=self.config.entropy_coeff)
        self.restart_schedules()
        super().build()

    @override(TorchLearner)
    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        config = config or self.config
        parameters = [p for p in self.get_parameters(self._module[module_id]) if p.requires_grad]
        # lr is set by register_optimizer() below; 0 until then.
        optimizer = OPTIMIZERS[config.optimizer_type](parameters, lr=0.0, **config.optimizer_arguments)
        self.register_optimizer(
            module_id=module_id, optimizer=optimizer, params=parameters, lr_or_lr_schedule=config.lr
        )

    @override(TorchLearner)
    def compute_loss_for_module(self, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "A3CLearner computes no losses: its EnvRunners do, and send gradients for `apply_gradient()`; see "
            "rllib_pnn.training.a3c_loss"
        )

    def apply_gradient(self, info: GradientInfo, gradient: np.ndarray) -> Weights:
        """`take_gradient()`, and the newest weights."""
        self.take_gradient(info, gradient)
        return self.current_weights()

    def take_gradient(self, info: GradientInfo, gradient: np.ndarray) -> None:
        """Applies an EnvRunner's gradient, unless there is a reason not to.

        Args:
            info: the gradient's stamp.
            gradient: (size,) float32; may be read-only, and is else clipped where it stands.
        """
        start = time.perf_counter()
        layout = self._get_layout()
        self._num_env_steps += info.num_env_steps
        reason = self._reason_to_drop(info, gradient, layout)
        if reason is None:
            if gradient.flags.writeable:
                host = torch.from_numpy(gradient)
            else:  # torch has no read-only tensors and warns of them
                host = self._gradient_buffer
                np.copyto(host.numpy(), gradient)
            self._flat_gradient = host.to(self._device)
            self._gradient_norm = float(torch.linalg.vector_norm(self._flat_gradient))
            reason = None if np.isfinite(self._gradient_norm) else "not_finite"
        if reason is not None:
            self._num_dropped[reason] += 1
            self._num_not_finite_unreported += reason == "not_finite"
        else:
            self._note(info)
            self._update_parameters(layout)
        self._apply_seconds += time.perf_counter() - start

    @property
    def vector_size(self) -> int:
        """Numbers in a gradient and in the weights."""
        return self._get_layout().size

    def current_weights(self, out: np.ndarray | None = None) -> Weights:
        """What a rollout needs; the parameters in `out`, or in an array that the next call reuses."""
        layout = self._get_layout()
        return Weights(
            values=layout.read(out),
            signature=layout.signature,
            version=self._weights_seq_no,
            entropy_coeff=self._entropy_coeff,
            num_env_steps=self._num_env_steps,
        )

    def _reason_to_drop(self, info: GradientInfo, gradient: np.ndarray, layout: FlatParameters) -> str | None:
        if info.task_index != int(getattr(self._single_module, "task_index", 0)):
            return "other_task"
        if info.signature != layout.signature or gradient.shape != (layout.size,):
            return "other_layout"
        if self._weights_seq_no - info.version > self.config.effective_max_gradient_staleness:
            return "stale"
        return None

    def _update_parameters(self, layout: FlatParameters) -> None:
        timesteps = {NUM_ENV_STEPS_SAMPLED_LIFETIME: self._num_env_steps}
        self.before_gradient_based_update(timesteps=timesteps)
        gradients: ParamDict = dict(zip(layout.parameters, layout.split(self._flat_gradient), strict=True))
        self.apply_gradients(self.postprocess_gradients(gradients))
        self._weights_seq_no += 1
        self.after_gradient_based_update(timesteps=timesteps)

    @override(TorchLearner)
    def postprocess_gradients(self, gradients_dict: ParamDict) -> ParamDict:
        if self.config.grad_clip is not None and self.config.grad_clip_by != "global_norm":
            return super().postprocess_gradients(gradients_dict)
        # As RLlib does it, but on the vector whose parts the gradients are, and with the norm that is known already.
        if self.config.grad_clip is not None and self._gradient_norm > self.config.grad_clip:
            self._flat_gradient.mul_(self.config.grad_clip / (self._gradient_norm + 1e-6))
        return gradients_dict

    @override(TorchLearner)
    def apply_gradients(self, gradients_dict: ParamDict) -> None:
        if self._grad_scalers is not None or self._lr_scheduler_classes is not None:
            super().apply_gradients(gradients_dict)
            return
        # RLlib looks twice for infinite numbers in every tensor, which costs more than the update; the norm has told.
        for parameter, gradient in gradients_dict.items():
            parameter.grad = gradient
        for _, optimizer in self.get_optimizers_for_module(DEFAULT_MODULE_ID):
            optimizer.step()

    @override(TorchLearner)
    def after_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        super().after_gradient_based_update(timesteps=timesteps)
        self._entropy_coeff = float(self._entropy_schedule.update(timesteps[NUM_ENV_STEPS_SAMPLED_LIFETIME]))

    def restart_schedules(self) -> None:
        """Puts the entropy cost to its schedule's beginning, for a new task's first rollouts."""
        self._entropy_coeff = float(self._entropy_schedule.update(0))

    def _note(self, info: GradientInfo) -> None:
        staleness = self._weights_seq_no - info.version
        for name, value in (
            *info.stats.items(),
            (f"gradients_{DEFAULT_OPTIMIZER}_global_norm", self._gradient_norm),
            (DIFF_NUM_GRAD_UPDATES_VS_SAMPLER_POLICY, staleness),
        ):
            self._sums[name] += value
            self._counts[name] += 1
        self._max_staleness = max(self._max_staleness, staleness)
        self._num_applied_unreported += 1
        self._num_steps_unreported += info.num_env_steps

    def get_metrics(self) -> ResultDict:
        """Means over the gradients applied since the last call, and counters."""
        self._log_trainable_parameters()
        log = self.metrics.log_value
        applied = self._num_applied_unreported
        for name, total in self._sums.items():
            log((DEFAULT_MODULE_ID, name), total / self._counts[name], window=1)
        if applied:
            log((DEFAULT_MODULE_ID, "gradient_staleness_max"), self._max_staleness, window=1)
            log((ALL_MODULES, APPLY_GRADS_TIMER), self._apply_seconds / applied, window=1)
        steps = self._num_steps_unreported
        log((ALL_MODULES, NUM_ENV_STEPS_TRAINED), steps, reduce="sum")
        log((ALL_MODULES, NUM_ENV_STEPS_TRAINED_LIFETIME), steps, reduce="lifetime_sum", with_throughput=True)
        log((DEFAULT_MODULE_ID, NUM_MODULE_STEPS_TRAINED), steps, reduce="sum")
        log((DEFAULT_MODULE_ID, NUM_MODULE_STEPS_TRAINED_LIFETIME), steps, reduce="lifetime_sum")
        log((DEFAULT_MODULE_ID, "num_gradients_applied_lifetime"), self._weights_seq_no, window=1)
        for reason, count in self._num_dropped.items():
            log((DEFAULT_MODULE_ID, f"num_gradients_dropped_{reason}_lifetime"), count, window=1)
        log((DEFAULT_MODULE_ID, "curr_entropy_coeff"), self._entropy_coeff, window=1)
        log((DEFAULT_MODULE_ID, WEIGHTS_SEQ_NO), self._weights_seq_no, window=1)
        self._only_not_finite = self._num_not_finite_unreported > 0 and not applied
        self._num_not_finite_unreported = 0
        self._sums.clear()
        self._counts.clear()
        self._num_applied_unreported = self._num_steps_unreported = self._max_staleness = 0
        self._apply_seconds = 0.0
        return self.metrics.reduce()

    def position(self) -> str:
        """Where training stands, in words."""
        return f"after {self._num_env_steps:,} env steps"

    def find_trouble(self) -> str | None:
        """Why going on makes no sense, in one line; None if all is well.

        A single gradient that is not finite is dropped and counted; when no other kind comes, nothing is learned.
        """
        if not self._only_not_finite:
            return None
        return (
            f"{self.position()}: no gradient is finite any more; lower lr, set grad_clip, or look for observations and "
            "rewards that are not finite"
        )

    @property
    def _single_module(self) -> Any:
        return self.module[DEFAULT_MODULE_ID].unwrapped()

    def _get_layout(self) -> FlatParameters:
        """The layout of what the optimizer trains now; made anew when the module has grown or the task changed."""
        task_index = int(getattr(self._single_module, "task_index", 0))
        groups = [group for _, o in self.get_optimizers_for_module(DEFAULT_MODULE_ID) for group in o.param_groups]
        key = (task_index, *(id(p) for group in groups for p in group["params"]))
        if self._layout is None or key != self._layout_key:
            self._layout = FlatParameters(self._single_module.named_parameters(), task_index)
            self._layout_key = key
            self._gradient_buffer = torch.empty(self._layout.size)
        return self._layout

    @override(TorchLearner)
    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        **kwargs: Any,
    ) -> StateDict:
        state = super().get_state(components, not_components=not_components, **kwargs)
        if self._check_component(LEARNER_COUNTERS, components, not_components):
            state[LEARNER_COUNTERS] = {
                "num_env_steps": self._num_env_steps,
                "num_dropped": dict(self._num_dropped),
                "entropy_coeff": self._entropy_coeff,
            }
        return state

    @override(TorchLearner)
    def set_state(self, state: StateDict) -> None:
        if COMPONENT_RL_MODULE in state:
            # RLlib skips weights that look older than the present ones, but a restore means to go back.
            self._weights_seq_no = 0
        super().set_state(state)
        self._layout = None
        if LEARNER_COUNTERS in state:
            counters = state[LEARNER_COUNTERS]
            self._num_env_steps = counters["num_env_steps"]
            self._num_dropped = {**self._num_dropped, **counters["num_dropped"]}
            self._entropy_coeff = counters["entropy_coeff"]


@dataclass(slots=True)
class _Request:
    """A gradient that an EnvRunner actor works on; kept under the ref of its `GradientInfo`."""

    actor_id: int
    gradient: ray.ObjectRef
    weights: Any  # those it was sent: `Weights`, or the ref of what a Learner actor answers
    mailbox: Mailbox | None = None  # that the weights stand in and the gradient is written to
    slot: int = 0  # there


def _compute_gradient(
    env_runner: A3CEnvRunner, weights: Weights, report: bool, state: StateDict | None
) -> tuple[GradientInfo, np.ndarray | None]:
    """Runs on the EnvRunner, through RLlib's `apply()` and so with its rules for exceptions."""
    if state is not None:
        env_runner.set_state(state)
    info, gradient = env_runner.compute_gradient(weights, report=report)
    if state is not None and info.needs_state:
        raise RuntimeError(
            f"EnvRunner {env_runner.worker_index}: expected the module to have the Learner's trainable parameters "
            f"({weights.signature}) after taking its state, got {info.signature}; the module's set_state() must make "
            "both agree"
        )
    return info, gradient


class A3C(Algorithm):
    """Asynchronous advantage actor-critic.

    A training step awaits `gradients_per_training_step` gradients. As soon as one arrives, it is applied (here, or in
    the Learner actor if `num_learners=1`) and its EnvRunner gets the next request with the newest weights. With
    `max_requests_in_flight_per_env_runner=2` an EnvRunner goes on with its previous weights meanwhile, which hides
    the way of a gradient at the cost of one more update of staleness.
    """

    # RLlib declares these as optional; `setup()` sets them.
    config: Any
    env_runner_group: Any
    learner_group: Any
    metrics: Any

    @classmethod
    @override(Algorithm)
    def get_default_config(cls) -> A3CConfig:
        return A3CConfig()

    @override(Algorithm)
    def setup(self, config: Any) -> None:
        self._requests: dict[ray.ObjectRef, _Request] = {}
        self._probes: dict[ray.ObjectRef, int] = {}  # pings of EnvRunners that failed
        self._next_probe: dict[int, float] = {}  # when to ping again, by time.monotonic()
        self._answered: set[int] = set()
        self._has_state: set[int] = set()  # EnvRunners that were sent the Learner's full module state
        self._reported: set[int] = set()  # asked for metrics in this training step
        self._mailboxes: dict[int, Mailbox] = {}  # of EnvRunners
        self._far: set[int] = set()  # EnvRunners that reach no mailbox: on another machine, for example
        super().setup(config)

    # -- training ------------------------------------------------------------------------------------------------

    @override(Algorithm)
    def training_step(self) -> None:
        self._reported.clear()
        # An update is a few short vector operations; more threads would wait for cores that EnvRunners keep busy.
        with _torch_threads(1):
            if self.config.num_env_runners == 0:
                self._train_here()
            else:
                self._train_on_env_runners()
            self._take_learner_results()

    def _train_here(self) -> None:
        """No EnvRunner actors: rollouts, gradients and updates take turns in this process."""
        weights = self._current_weights()
        state = None if self.env_runner.has_learner_state else self._get_module_state()
        for _ in range(self.config.effective_gradients_per_training_step):
            info, gradient = _compute_gradient(self.env_runner, weights, False, state)
            if info.needs_state:
                state = self._get_module_state()
                continue
            state = None
            if self.learner_group.is_local:
                weights = self._learner.apply_gradient(info, gradient)
            else:
                weights = ray.get(self._learner.apply_gradient.remote(info, gradient))
        self.metrics.aggregate([self.env_runner.get_metrics()], key=ENV_RUNNER_RESULTS)

    def _train_on_env_runners(self) -> None:
        manager = self.env_runner_group._worker_manager
        for actor_id in manager.actor_ids():
            if manager.is_actor_healthy(actor_id):
                self._fill(actor_id)
            elif actor_id not in self._probes.values() and actor_id not in self._answered:
                self._next_probe.setdefault(actor_id, 0.0)

        awaited = self.config.effective_gradients_per_training_step
        waited = 0.0
        while awaited > 0:
            self._send_probes()
            if not self._requests and not self._probes and not self._next_probe:
                if self._answered:
                    break  # to be restored before the next training step
                raise RuntimeError(
                    f"all {self.config.num_env_runners} EnvRunners are gone and none may restart; see "
                    "config.fault_tolerance(restart_failed_env_runners=..., max_num_env_runner_restarts=...)"
                )
            start = time.perf_counter()
            ready = self._wait()
            waited += time.perf_counter() - start
            for ref in ready:
                if ref in self._probes:
                    self._take_probe(ref)
                else:
                    awaited -= self._take_gradient(ref)
            if self._answered:
                break  # RLlib restores EnvRunners between training steps
        self.metrics.log_value((TIMERS, GRAD_WAIT_TIMER), waited)

    def _wait(self) -> list[ray.ObjectRef]:
        """The longest-standing request or probe that is done; none if it is time to ping instead."""
        open_refs = [*self._requests, *self._probes]
        if not open_refs:
            time.sleep(PROBE_INTERVAL_S)
            return []
        return ray.wait(open_refs, timeout=PROBE_INTERVAL_S if self._next_probe else None)[0]

    def _take_gradient(self, ref: ray.ObjectRef, *, go_on: bool = True) -> bool:
        """Handles a finished request and, to `go_on`, sends its EnvRunner the next; returns whether it brought a
        gradient."""
        request = self._requests.pop(ref)  # a gradient is known by its request alone: none can be applied twice
        try:
            info = ray.get(ref)
            gradient = None
            if request.mailbox is not None:
                gradient = request.mailbox.gradients[request.slot]
            elif self.learner_group.is_local:
                gradient = ray.get(request.gradient)
        except RayError as error:
            _raise_what_failed(request.weights)
            self._lose(request.actor_id, error)
            return False
        if info.metrics is not None:
            self.metrics.aggregate([info.metrics], key=ENV_RUNNER_RESULTS)
        if info.needs_state or info.needs_arrays:
            if info.needs_state:
                self._has_state.discard(request.actor_id)
            if info.needs_arrays:
                self._far.add(request.actor_id)
                self._mailboxes.pop(request.actor_id, None)
            if go_on:
                self._fill(request.actor_id)
            return False
        weights = None
        if self.learner_group.is_local:
            self._learner.take_gradient(info, gradient)
        else:
            # Refs all the way: the gradient goes to the Learner and the weights to the EnvRunner without passing here.
            weights = self._learner.apply_gradient.remote(ref, request.gradient)
        if go_on:
            self._fill(request.actor_id, weights)
        return True

    def settle(self) -> None:
        """Waits for the gradients on their way and for what EnvRunners have not reported yet; sends no new requests.

        What is counted afterwards belongs to what the EnvRunners do next. `ProgressiveCallback` calls this between
        freezing a column and adding the next, when the Learner takes no gradient any more.
        """
        while self._requests:  # a lost EnvRunner takes all of its own along
            self._take_gradient(next(iter(self._requests)), go_on=False)
        if self.config.num_env_runners > 0:
            late = self.env_runner_group.foreach_env_runner(lambda runner: runner.get_metrics(), local_env_runner=False)
            self.metrics.aggregate(late, key=ENV_RUNNER_RESULTS)

    def _fill(self, actor_id: int, weights: ray.ObjectRef | None = None) -> None:
        """Sends requests to an EnvRunner until as many as allowed are on their way.

        Args:
            weights: what a Learner actor will answer; None: the newest.
        """
        open_requests = sum(r.actor_id == actor_id for r in self._requests.values())
        actor = self.env_runner_group._worker_manager._actors[actor_id]
        for _ in range(self.config.max_requests_in_flight_per_env_runner - open_requests):
            state = None
            if actor_id not in self._has_state:
                state = ray.put(self._get_module_state())
                self._has_state.add(actor_id)
            report = actor_id not in self._reported
            self._reported.add(actor_id)
            sent: Any = weights
            mailbox, slot = None, 0
            if self.learner_group.is_local:
                sent, mailbox, slot = self._weights_for(actor_id)
            elif weights is None:
                sent = weights = self._learner.current_weights.remote()
            info, gradient = actor.apply.options(num_returns=2).remote(_compute_gradient, sent, report, state)
            self._requests[info] = _Request(actor_id, gradient, sent, mailbox, slot)

    def _weights_for(self, actor_id: int) -> tuple[Weights, Mailbox | None, int]:
        """The local Learner's newest weights for a request, and where they stand if that is in shared memory."""
        mailbox, size = self._mailboxes.get(actor_id), self._learner.vector_size
        if mailbox is None or mailbox.size != size:
            num_slots = self.config.max_requests_in_flight_per_env_runner
            mailbox = None if actor_id in self._far else Mailbox.make(size, num_slots)
            if mailbox is None:
                return self._learner.current_weights(), None, 0
            self._mailboxes[actor_id] = mailbox
        taken = {r.slot for r in self._requests.values() if r.mailbox is mailbox}
        slot = min(set(range(mailbox.num_slots)) - taken)
        weights = self._learner.current_weights(out=mailbox.weights[slot])
        return dataclasses.replace(weights, values=mailbox.slot(slot)), mailbox, slot

    def _take_learner_results(self) -> None:
        results = self.learner_group.foreach_learner(
            func=lambda learner: (learner.get_metrics(), learner.find_trouble())
        )
        metrics, troubles = zip(*results_of(results), strict=True)
        self.metrics.aggregate(list(metrics), key=LEARNER_RESULTS)
        for trouble in filter(None, troubles):
            raise TrainingTrouble(trouble)
        # `algo.get_module()` and checkpoints read the local EnvRunner's module.
        local = self.env_runner
        if local is not None and not (local.has_learner_state and local.load_weights(self._current_weights())):
            local.set_state(self._get_module_state())

    @property
    def _learner(self) -> Any:
        """The Learner, or its actor's handle."""
        group = self.learner_group
        return group._learner if group.is_local else group._workers[0]

    def _current_weights(self) -> Weights:
        if self.learner_group.is_local:
            return self._learner.current_weights()
        return ray.get(self._learner.current_weights.remote())

    def _get_module_state(self) -> StateDict:
        """The Learner's complete module state, for EnvRunners that start, restart, or whose module must grow."""
        self.metrics.log_value(NUM_SYNCH_WORKER_WEIGHTS, 1, reduce="sum")
        # What an inference-only state leaves out, like a critic, is needed for gradients. Modules without that API
        # decide themselves what their broadcast holds.
        complete = issubclass(self.config.get_rl_module_spec(spaces=self.spaces).module_class, InferenceOnlyAPI)
        state = self.learner_group.get_state(
            components=f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}", inference_only=not complete
        )[COMPONENT_LEARNER]
        return {COMPONENT_RL_MODULE: state[COMPONENT_RL_MODULE], LEARNER_STAMP: state[WEIGHTS_SEQ_NO]}

    # -- failed EnvRunners ---------------------------------------------------------------------------------------

    def _lose(self, actor_id: int, error: RayError) -> None:
        """Takes an EnvRunner out of service; what it was working on is lost."""
        if not self.learner_group.is_local:
            # The same error arrives if it was the Learner that failed; this raises then.
            for result in self.learner_group.foreach_learner(func=lambda learner: learner.node):
                if not result.ok:
                    raise result.get()
        if not (self.config.restart_failed_env_runners or self.config.ignore_env_runner_failures):
            raise error
        self._requests = {ref: r for ref, r in self._requests.items() if r.actor_id != actor_id}
        self._has_state.discard(actor_id)
        self._far.discard(actor_id)  # it may come back on another machine
        self._mailboxes.pop(actor_id, None)
        self.env_runner_group._worker_manager.set_actor_state(actor_id, healthy=False)
        self._next_probe[actor_id] = 0.0

    def _send_probes(self) -> None:
        # RLlib pings failed EnvRunners and waits; the others would starve meanwhile.
        now = time.monotonic()
        for actor_id in [i for i, when in self._next_probe.items() if when <= now]:
            del self._next_probe[actor_id]
            actor = self.env_runner_group._worker_manager._actors[actor_id]
            self._probes[actor.ping.remote()] = actor_id

    def _take_probe(self, ref: ray.ObjectRef) -> None:
        actor_id = self._probes.pop(ref)
        try:
            ray.get(ref)
        except ActorDiedError:
            return  # for good
        except RayError:
            self._next_probe[actor_id] = time.monotonic() + PROBE_INTERVAL_S
        else:
            self._answered.add(actor_id)

    @override(Algorithm)
    def restore_env_runners(self, env_runner_group: EnvRunnerGroup) -> list[int]:
        """Brings back EnvRunners that have answered since their failure. They get the module's state with their next
        request, so nothing is sent here; those that still restart are not waited for."""
        if env_runner_group is not self.env_runner_group or self.config.num_env_runners == 0:
            return super().restore_env_runners(env_runner_group)
        if not self._answered:
            return []
        answered, self._answered = sorted(self._answered), set()
        results = env_runner_group._worker_manager.foreach_actor(
            lambda env_runner: env_runner.ping(),
            remote_actor_ids=answered,
            healthy_only=False,
            mark_healthy=True,
            timeout_seconds=self.config.env_runner_health_probe_timeout_s,
        )
        restored = [result.actor_id for result in results if result.ok]
        self._counters["total_num_restored_workers"] += len(restored)
        return restored

    # -- restoring -----------------------------------------------------------------------------------------------

    @override(Algorithm)
    def set_state(self, state: StateDict) -> None:
        super().set_state(state)
        self._forget_requests()

    @override(Algorithm)
    def restore_from_path(self, path: Any, *args: Any, **kwargs: Any) -> None:
        super().restore_from_path(path, *args, **kwargs)
        self._forget_requests()

    def _forget_requests(self) -> None:
        """Gradients on their way belong to the weights before the restore."""
        self._requests.clear()
        self._has_state.clear()
        self._mailboxes.clear()  # EnvRunners may still read and write them


def _raise_what_failed(weights: Any) -> None:
    """Raises the Learner's exception if that is why there are no weights.

    Ray passes an exception on to every task that takes its result as an argument, so that it looks like an EnvRunner's.
    """
    if isinstance(weights, ray.ObjectRef):
        with contextlib.suppress(RayActorError, ObjectLostError):  # `_lose` looks whether the Learner is alive
            ray.get(weights)


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def register_a3c() -> None:
    """Makes `A3C` known to Tune by name: `tune.Tuner("A3C")`, `run: A3C`. Idempotent."""
    tune.register_trainable("A3C", A3C)
