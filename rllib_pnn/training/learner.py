"""What a Learner needs to train a module that grows. Mixed into whatever Learner class an algorithm uses.

- The optimizer holds trainable parameters only and is rebuilt when the module's columns change.
- Rollouts of another task than the module's current one are dropped before they reach a loss.
- Schedules (learning rate, entropy) start anew with every task.
- A loss or gradient that is not finite trains nothing. The Learner notes it as its trouble rather than raise: IMPALA's
  updates in a thread, whose death nobody would notice. `ProgressiveCallback` asks for it and raises `TrainingTrouble`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import queue
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core import ALL_MODULES, DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner import Learner
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchDDPRLModule
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils import force_list
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME
from ray.rllib.utils.typing import EpisodeType, ParamDict, StateDict

from rllib_pnn.network.memory import lean_memory
from rllib_pnn.training.a3c_env_runner import callback_class
from rllib_pnn.training.rl_module import MODEL_CONFIG_KEY, ProgressiveRLModule

logger = logging.getLogger(__name__)

TASK_INDEX = "task_index"  # batch column: the task that a row was played on
NUM_ENV_STEPS_DROPPED = "num_env_steps_of_old_task_dropped_lifetime"
SCHEDULES = "progressive_schedules"  # key of a Learner's state: where the task's schedules are
# What RLlib's PPO and IMPALA Learners keep of every module; their states leave it out.
_ENTROPY_SCHEDULES, _KL_COEFFS = "entropy_coeff_schedulers_per_module", "curr_kl_coeffs_per_module"
NUM_UPDATES_SKIPPED = "num_updates_not_finite_skipped_lifetime"  # with torch_skip_nan_gradients


def note_task(episode: SingleAgentEpisode, task_index: int) -> None:
    """Writes into an episode which task it was played on.

    Into its id, the one thing that RLlib keeps when it cuts, slices and shards episodes.
    """
    if task_of(episode) is None:
        episode.id_ = f"task-{task_index}/{episode.id_}"


def task_of(episode: SingleAgentEpisode) -> int | None:
    """The task that `note_task` wrote; None if it was never called."""
    head, _, rest = str(episode.id_).partition("/")
    return int(head.removeprefix("task-")) if rest and head.startswith("task-") else None


def free_threads(num_env_runners: int) -> int:
    """How many torch threads PPO's Learner may use in the algorithm's process, while no EnvRunner works.

    A process of the user's keeps torch's number, which is all cores unless the user said otherwise. In an actor (a
    trial of Tune) Ray has set it to 1: EnvRunners wait for the Learner, so that their cores are free; without any, it
    takes the CPUs that Ray gave it, for other trials may have the rest.
    """
    context = ray.get_runtime_context() if ray.is_initialized() else None
    if context is None or context.get_actor_id() is None:
        return torch.get_num_threads()
    threads = num_env_runners or int(context.get_assigned_resources().get("CPU", 1))
    return max(1, min(os.cpu_count() or 1, threads))


def total_norm(tensors: Iterable[torch.Tensor]) -> float:
    """The norm of all tensors as of one vector; NaN or infinite if anything in them is."""
    with torch.no_grad():
        return float(torch.nn.utils.get_total_norm([t for t in tensors if t is not None]))


def use_fused_adam(optimizer: torch.optim.Optimizer) -> None:
    """Lets a plain Adam, as RLlib makes it, update each parameter in one pass over memory; the same to rounding.

    On a CPU torch does not choose that by itself. Left as it is: other optimizers, one whose implementation somebody
    chose, and parameters that are not CPU float32.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        chosen = group["foreach"] is not None or group["fused"] is not None
        kinds = {(p.device.type, p.dtype) for p in group["params"]}
        if not (chosen or group["capturable"] or group["differentiable"]) and kinds == {("cpu", torch.float32)}:
            group["fused"] = True


class AddTaskIndex(ConnectorV2):
    """Learner connector: notes for every row of a batch which task it was played on (see `note_task`).

    Stands at the pipeline's end, where the batch is complete.
    """

    @override(ConnectorV2)
    def __call__(
        self,
        *,
        rl_module: RLModule,
        batch: dict[str, Any],
        episodes: list[EpisodeType],
        explore: bool | None = None,
        shared_data: dict | None = None,
        **kwargs: Any,
    ) -> Any:
        indices = {task_of(episode) for episode in episodes}
        # One number serves the whole batch: rows of two tasks in one batch happen only around a switch, and such a
        # batch is not learned from at all (-1), nor is one that no task-aware EnvRunner sampled.
        index = indices.pop() if len(indices) == 1 else None
        value = -1 if index is None else index
        for module_batch in batch.values():
            first = next(iter(module_batch.values())) if module_batch else ()
            if isinstance(first, np.ndarray):
                module_batch[TASK_INDEX] = np.full(len(first), value, dtype=np.int32)
            else:
                module_batch[TASK_INDEX] = torch.full((len(first),), value, dtype=torch.int32)
        return batch


class ThenTaskIndex:
    """The `learner_connector` setting of AggregatorActors: another one's connectors, then `AddTaskIndex`.

    Where they batch, Learners have no pipeline of their own to put it into.
    """

    def __init__(self, connectors: Callable[..., Any]) -> None:
        self._connectors = connectors

    def __call__(self, *spaces: Any) -> list[ConnectorV2]:
        return [*force_list(self._connectors(*spaces)), AddTaskIndex()]


class DropOldStates(ConnectorV2):
    """Learner connector: takes the LSTM states from episodes of another task than the module's.

    They are of as many columns as there were then, so that they fit no batch of today's module. An episode without
    states is batched with initial ones; the batch it is in is refused as a whole, by its `TASK_INDEX`. Such episodes
    come late at a switch, or from an EnvRunner that has just restarted. Stands at the pipeline's beginning.
    """

    @override(ConnectorV2)
    def __call__(
        self,
        *,
        rl_module: Any,
        batch: dict[str, Any],
        episodes: list[EpisodeType],
        explore: bool | None = None,
        shared_data: dict | None = None,
        **kwargs: Any,
    ) -> Any:
        module: ProgressiveRLModule = rl_module[DEFAULT_MODULE_ID].unwrapped()
        for episode in episodes:
            if task_of(episode) != module.task_index:
                episode.extra_model_outputs.pop(Columns.STATE_OUT, None)
        return batch


class ProgressiveLearnerMixin(Learner):
    """Put in front of a TorchLearner class by `progressive_learner_class`."""

    @override(Learner)
    def build(self) -> None:
        lean_memory()
        # Guards the module's columns and optimizer: IMPALA's Learner updates in a thread of its own.
        self._growth_lock = threading.RLock()
        self._task_env_steps = 0
        self._trouble: str | None = None
        if not any(getattr(callback_class(c), "walks_tasks", False) for c in force_list(self.config.callbacks_class)):
            raise ValueError(
                "config: ProgressiveCallback is missing, without which no task ends: `config.callbacks(...)` replaces "
                "all callbacks; call it before make_progressive(), which keeps them"
            )
        super().build()
        if (
            self.config.num_learners == 0
            and isinstance(self.config, PPOConfig)
            and not isinstance(self.config, IMPALAConfig)
        ):
            torch.set_num_threads(free_threads(self.config.num_env_runners))
        if self._learner_connector is not None:
            self._learner_connector.prepend(DropOldStates())
            self._learner_connector.append(AddTaskIndex())

    @override(Learner)
    def _make_module(self) -> MultiRLModule:
        # make_progressive noted the seed of its time; `config.debugging(seed=...)` or a Tuner may have set another.
        specs = getattr(self._module_spec, "rl_module_specs", self._module_spec)
        for spec in specs.values() if isinstance(specs, Mapping) else [specs]:
            if spec is not None:
                settings = {**spec.model_config[MODEL_CONFIG_KEY], "seed": self.config.seed or 0}
                spec.model_config = {**spec.model_config, MODEL_CONFIG_KEY: settings}
        return super()._make_module()

    @property
    def progressive_module(self) -> ProgressiveRLModule:
        return self.module[DEFAULT_MODULE_ID].unwrapped()

    @override(Learner)
    def get_parameters(self, module: RLModule) -> Sequence[torch.nn.Parameter]:
        return [p for p in super().get_parameters(module) if p.requires_grad]

    @override(Learner)
    def register_optimizer(self, *, optimizer: torch.optim.Optimizer, **kwargs: Any) -> None:
        use_fused_adam(optimizer)
        super().register_optimizer(optimizer=optimizer, **kwargs)

    # -- growth --------------------------------------------------------------------------------------------------

    def freeze_columns(self) -> StateDict:
        """Ends training of the newest column; returns the module's whole state."""
        with self._growth_lock:
            self.progressive_module.network.freeze()
            self._rebuild_optimizer()
            return self.module_state()

    def module_state(self, *, inference_only: bool = False) -> StateDict:
        """The module's state between two updates; what still trains is a copy."""
        with self._growth_lock:
            state = self.progressive_module.get_state(inference_only=inference_only)
            for entry in state["columns"]:
                if entry["fingerprint"] is None:
                    entry["parameters"] = {name: np.array(p) for name, p in entry["parameters"].items()}
            if "target" in state:
                state["target"] = {name: np.array(p) for name, p in state["target"].items()}
            return state

    def grow(self, progress: Mapping[str, Any]) -> None:
        """Adds the next task's column and gives it a fresh optimizer and fresh schedules."""
        with self._growth_lock:
            self.progressive_module.grow(progress)
            self._rebuild_optimizer()
            for schedulers in (_ENTROPY_SCHEDULES, _KL_COEFFS):
                getattr(self, schedulers, {}).clear()
            restart = getattr(super(), "restart_schedules", None)  # A3C's own
            if restart is not None:
                restart()

    def become(self, state: StateDict) -> None:
        """Takes columns and progress from a state (columns read from a store, say)."""
        with self._growth_lock:
            self.progressive_module.set_state(state)
            self._rebuild_optimizer()

    def _rebuild_optimizer(self) -> None:
        """Forgets the old optimizer and registers one for what trains now, if that changed."""
        self._forget_broadcasts()
        module = self.module[DEFAULT_MODULE_ID]
        trainable = self.get_parameters(module.unwrapped())
        held = [p for params in self._optimizer_parameters.values() for p in params]
        if len(held) == len(trainable) and all(a is b for a, b in zip(held, trainable, strict=True)):
            return
        for name in self._module_optimizers.pop(DEFAULT_MODULE_ID, []):
            optimizer = self._named_optimizers.pop(name)
            self._optimizer_name_to_module.pop(name, None)
            self._optimizer_lr_schedules.pop(optimizer, None)
            for reference in self._optimizer_parameters.pop(optimizer):
                self._params.pop(reference, None)
        if self._lr_schedulers:
            self._lr_schedulers.clear()
        if not trainable:
            return
        if isinstance(module, TorchDDPRLModule):
            # DDP registers parameters when it is built.
            wrapped = TorchDDPRLModule(module.unwrapped(), **self.config.torch_ddp_kwargs)
            self.module.add_module(DEFAULT_MODULE_ID, wrapped, override=True)
        self.configure_optimizers_for_module(
            module_id=DEFAULT_MODULE_ID, config=self.config.get_config_for_module(DEFAULT_MODULE_ID)
        )

    def _forget_broadcasts(self) -> None:
        """Weights that IMPALA's Learner thread left for the next broadcast may be those of an earlier task."""
        if hasattr(self, "_learner_state_queue"):
            with self._learner_state_lock, contextlib.suppress(queue.Empty):
                self._learner_state = None
                self._learner_state_queue.get_nowait()

    # -- updates -------------------------------------------------------------------------------------------------

    @override(Learner)
    def _update(self, batch: dict[str, Any], **kwargs: Any) -> tuple[Any, Any, Any]:
        with self._growth_lock:
            try:
                if self._one_skips(self._has_nothing_to_learn_from(batch)):
                    return {}, {}, {}
                return super()._update(batch, **kwargs)
            except Exception as error:
                if not isinstance(self.config, IMPALAConfig):
                    raise
                # Its thread would die, and RLlib wait for it for ever.
                logger.exception("update failed")
                self._trouble = f"{self.position()}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                return {}, {}, {}

    def _has_nothing_to_learn_from(self, batch: Mapping[str, Any]) -> bool:
        """Whether a batch is of another task, or nothing trains here any more."""
        indices = batch[DEFAULT_MODULE_ID].get(TASK_INDEX)
        if indices is None:
            raise ValueError(
                "learner_connector: batches come without the task they were played on; set the config's connectors "
                "and aggregators before make_progressive(), which adds it"
            )
        if bool((indices != self.progressive_module.task_index).any()):
            mask = batch[DEFAULT_MODULE_ID].get(Columns.LOSS_MASK)
            steps = int(np.prod(indices.shape)) if mask is None else int(mask.sum())
            self.metrics.log_value((ALL_MODULES, NUM_ENV_STEPS_DROPPED), steps, reduce="lifetime_sum")
            return True
        return self.progressive_module.network.columns[-1].is_frozen or self._trouble is not None

    def _one_skips(self, skips: bool) -> bool:
        """Whether any Learner skips this update. The others would wait for its gradients for ever."""
        if self.config.num_learners < 2:
            return skips
        flag = torch.tensor(float(skips), device=self._device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag)

    @override(Learner)
    def compute_gradients(self, loss_per_module: dict[str, torch.Tensor], **kwargs: Any) -> ParamDict:
        gradients = super().compute_gradients(loss_per_module, **kwargs)
        self._gradients_are_finite = True
        if gradients:
            norm = total_norm(gradients.values())
            loss = sum(float(loss.detach()) for loss in loss_per_module.values())
            if not (math.isfinite(norm) and math.isfinite(loss)):
                self._gradients_are_finite = False
                if self.config.torch_skip_nan_gradients:
                    self.metrics.log_value((ALL_MODULES, NUM_UPDATES_SKIPPED), 1, reduce="lifetime_sum")
                else:
                    self._note_not_finite(f"the loss is {loss:g}, its gradient's norm {norm:g}")
        return gradients

    @override(Learner)
    def apply_gradients(self, gradients_dict: ParamDict) -> None:
        # RLlib would put 0 for NaN and go on; Adam's averages would remember the infinite ones for ever.
        if not self._gradients_are_finite:
            return
        # Their norm is finite, so they are: the first of RLlib's two looks at each is left out.
        for parameter, gradient in gradients_dict.items():
            self._params[parameter].grad = gradient
        super().apply_gradients({})

    _gradients_are_finite = True  # of the newest update; A3C's Learner looks at its gradients itself

    # -- trouble -------------------------------------------------------------------------------------------------

    def position(self) -> str:
        """Where training stands, in words."""
        progress = self.progressive_module.progress
        tasks = self.progressive_module.model_config[MODEL_CONFIG_KEY]["tasks"]
        index = progress["task_index"]
        return (
            f"task '{tasks[index]['name']}' ({index + 1} of {len(tasks)}), column {progress['first_column'] + index}, "
            f"after {int(self._task_env_steps):,} env steps on it"
        )

    def find_trouble(self) -> str | None:
        """Why this Learner no longer trains, in one line; None if all is well. Looks at the weights too."""
        with self._growth_lock:
            if self._trouble is None:
                trained = self.get_parameters(self.progressive_module)
                norm = total_norm(trained) if trained else 0.0
                if not math.isfinite(norm):
                    self._note_not_finite(f"the norm of its weights is {norm:g}")
            own = getattr(super(), "find_trouble", None)  # A3C's Learner has another eye on its gradients
            return self._trouble or (own() if own is not None else None)

    def _note_not_finite(self, what: str) -> None:
        if self._trouble is None:
            self._trouble = (
                f"{self.position()}: {what}; lower lr, set grad_clip, or look for observations and rewards that are "
                "not finite"
            )

    @override(Learner)
    def _create_iterator_if_necessary(
        self, *, training_data: Any, num_total_minibatches: int = 0, minibatch_size: int | None = None, **kwargs: Any
    ) -> Any:
        if self.config.num_learners > 1 and minibatch_size:
            # Shares of a batch differ in length from Learner to Learner. Each must do as many gradient steps as
            # the one with the most, or the others wait for it for ever.
            training_data = TrainingData(batch=self._make_batch_if_necessary(training_data=training_data))
            rows = len(training_data.batch[DEFAULT_MODULE_ID])
            steps = torch.tensor(math.ceil(kwargs.get("num_epochs", 1) * rows / minibatch_size), device=self._device)
            torch.distributed.all_reduce(steps, op=torch.distributed.ReduceOp.MAX)
            num_total_minibatches = int(steps)
        return super()._create_iterator_if_necessary(
            training_data=training_data,
            num_total_minibatches=num_total_minibatches,
            minibatch_size=minibatch_size,
            **kwargs,
        )

    def _task_timesteps(self, timesteps: Mapping[str, Any] | None) -> dict[str, Any]:
        timesteps = dict(timesteps or {})
        if NUM_ENV_STEPS_SAMPLED_LIFETIME in timesteps:
            start = self.progressive_module.progress["task_start_env_steps"]
            self._task_env_steps = max(0, timesteps[NUM_ENV_STEPS_SAMPLED_LIFETIME] - start)
            timesteps[NUM_ENV_STEPS_SAMPLED_LIFETIME] = self._task_env_steps
        return timesteps

    @override(Learner)
    def before_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        with self._growth_lock:
            super().before_gradient_based_update(timesteps=self._task_timesteps(timesteps))

    @override(Learner)
    def after_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        with self._growth_lock:
            super().after_gradient_based_update(timesteps=self._task_timesteps(timesteps))

    # -- state ---------------------------------------------------------------------------------------------------

    @override(Learner)
    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        **kwargs: Any,
    ) -> StateDict:
        with self._growth_lock:
            state = super().get_state(components, not_components=not_components, **kwargs)
            if self._check_component(SCHEDULES, components, not_components):
                coeffs = getattr(self, _KL_COEFFS, {})
                state[SCHEDULES] = {
                    "task_env_steps": self._task_env_steps,
                    "kl_coeffs": {module_id: float(coeff) for module_id, coeff in coeffs.items()},
                }
            return state

    @override(Learner)
    def set_state(self, state: StateDict) -> None:
        with self._growth_lock:
            super().set_state(state)
            self._rebuild_optimizer()
            if SCHEDULES in state:
                self._task_env_steps = state[SCHEDULES]["task_env_steps"]
                if hasattr(self, _ENTROPY_SCHEDULES):
                    getattr(self, _ENTROPY_SCHEDULES)[DEFAULT_MODULE_ID].update(self._task_env_steps)
                for module_id, coeff in state[SCHEDULES]["kl_coeffs"].items():
                    getattr(self, _KL_COEFFS)[module_id].data.fill_(coeff)

    @override(Learner)
    def _set_optimizer_state(self, state: StateDict) -> None:
        # The module was restored first and may have grown: an optimizer for its columns has to take the state.
        self._rebuild_optimizer()
        super()._set_optimizer_state(state)
        for optimizer in self._named_optimizers.values():
            use_fused_adam(optimizer)  # a checkpoint says how its optimizer was computed, too


def results_of(answers: Iterable[Any]) -> list[Any]:
    """What `LearnerGroup.foreach_learner` brought, of every Learner. Raises what a Learner raised, and if none is left.

    RLlib hands exceptions back as if they were results, and leaves out Learners that it knows to be dead.
    """
    results = []
    for answer in answers:
        if not answer.ok:
            raise answer.get()
        results.append(answer.get())
    if not results:
        raise RuntimeError("no Learner is alive")
    return results


@functools.cache  # one class object each, so that equal configs compare equal
def progressive_learner_class(learner_class: type[Learner]) -> type[Learner]:
    """`learner_class` with `ProgressiveLearnerMixin` in front; itself if that is there already."""
    if issubclass(learner_class, ProgressiveLearnerMixin):
        return learner_class
    return type(f"Progressive{learner_class.__name__}", (ProgressiveLearnerMixin, learner_class), {})
