"""Walks a list of tasks inside any RLlib algorithm. Runs in the algorithm's own process.

At a task's end: the Learner freezes the column; the column is played and stored; a new column is added; the Learner's
state goes to every EnvRunner, which then switches its environments. The store is the record of what is finished: a
run that dies between storing a column and its next checkpoint finds the column there and goes on behind it.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from pyarrow.fs import FileSelector, FileType, LocalFileSystem, copy_files
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    EPISODE_RETURN_MEAN,
    EVALUATION_RESULTS,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
)
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger
from ray.tune.result import DONE, SHOULD_CHECKPOINT

from rllib_pnn.envs.score import EPISODE_SCORE
from rllib_pnn.network.progressive import ProgressiveNetwork
from rllib_pnn.network.store import ColumnStore, ColumnStoreError
from rllib_pnn.training.a3c import A3C
from rllib_pnn.training.evaluation import ColumnEvaluation, evaluate_shard, is_vectorized, shards
from rllib_pnn.training.learner import results_of
from rllib_pnn.training.recognition import KEY as FIRST_OBSERVATIONS
from rllib_pnn.training.rl_module import MODEL_CONFIG_KEY, ProgressiveRLModule, column_state, grow
from rllib_pnn.training.task_env_runner import EPISODE_METRICS
from rllib_pnn.training.tasks import Task, parse_tasks
from rllib_pnn.training.trouble import TrainingTrouble

logger = logging.getLogger(__name__)

_Job = tuple[int, dict[str, Any], int, int]  # column, env_config, episodes, seed: a part of an evaluation

TASK_RETURNS = "task_episode_returns"  # metric of the EnvRunners: returns of ended episodes by task index
MIN_EPISODES = 10  # finished on a task before its mean return can end it


class ProgressiveCallback(RLlibCallback):
    """Added by `make_progressive`; its settings stand in the module's `model_config["progressive"]`.

    Adds to every result of `algo.train()`:

    - `progressive/`: `task`, `task_index`, `num_tasks`, `column`, `task_env_steps`, `episode_return_mean` (of the
      last `metrics_num_episodes_for_smoothing` episodes of this task, NaN before the first), `num_episodes` and
      `episode_return_sum` (of those that ended in this iteration), `task_over`, `finished`;
    - `columns/<task>/`: `episode_return_mean` as played last, `frozen_episode_return_mean` as played at freezing,
      `forgetting` (their difference), `bit_equal` (1 if every policy output was the same), NaN before freezing.
    """

    # Of an episode's earlier chunks it reads the return only; ArrayEnvRunner then keeps no observations of them.
    needs_whole_chunks = False
    # By which a Learner knows that tasks will end.
    walks_tasks = True

    def __init__(self) -> None:
        super().__init__()
        self._ready = False
        self._last_progress: dict[str, Any] = {}
        self._scores: dict[str, dict[str, Any]] = {}
        self._returns: deque[float] = deque(maxlen=1)
        self._first_observations: dict[str, dict[str, Any]] = {}  # by task, for `rllib evaluate --task auto`

    # -- RLlib's hooks -------------------------------------------------------------------------------------------

    @override(RLlibCallback)
    def on_algorithm_init(self, *, algorithm: Algorithm, **kwargs: Any) -> None:
        self._settings: dict[str, Any] = algorithm.config.rl_module_spec.model_config[MODEL_CONFIG_KEY]
        self._tasks: tuple[Task, ...] = parse_tasks(
            [{k: t[k] for k in ("name", "env_config", "until")} for t in self._settings["tasks"]]
        )
        self._returns = deque(maxlen=algorithm.config.metrics_num_episodes_for_smoothing)
        self._store = self._open_store(algorithm)
        storage = getattr(algorithm, "_storage", None)
        if storage is not None:
            # Tune stages checkpoints in the system's temporary folder, where a killed process leaves half of one for
            # good; a folder beside its own goes with Ray's session.
            tempfile.tempdir = f"{storage.trial_working_directory}.staging"
            os.makedirs(tempfile.tempdir, exist_ok=True)
        if self._settings.get("columns_from"):
            self._store.claim()
            self._start_from(algorithm, ColumnStore(self._settings["columns_from"]))

    @override(RLlibCallback)
    def on_checkpoint_loaded(self, *, algorithm: Algorithm, **kwargs: Any) -> None:
        self._ready = False
        self._catch_up(algorithm)

    @override(RLlibCallback)
    def on_env_runners_recreated(
        self, *, algorithm: Algorithm, env_runner_group: EnvRunnerGroup, env_runner_indices: list[int], **kwargs: Any
    ) -> None:
        # RLlib syncs a restarted EnvRunner from the local one, which may lag behind; the Learner's word is last.
        self._broadcast(algorithm, env_runner_group, env_runner_indices)

    @override(RLlibCallback)
    def on_episode_end(
        self,
        *,
        episode: SingleAgentEpisode,
        prev_episode_chunks: Sequence[SingleAgentEpisode] = (),
        env_runner: Any,
        metrics_logger: MetricsLogger,
        **kwargs: Any,
    ) -> None:
        # On an EnvRunner. RLlib's own windows mix tasks and are empty in iterations in which no episode ended.
        infos = (episode.get_infos(-1) or {}) if len(episode.infos) else {}  # A3C's hold returns alone
        # Environments that clip rewards for learning report the unclipped return in their last info.
        episode_return = infos.get(EPISODE_SCORE)
        if episode_return is None:
            episode_return = sum(chunk.get_return() for chunk in (*prev_episode_chunks, episode))
        key = (TASK_RETURNS, str(getattr(env_runner, "task_index", 0)))
        metrics_logger.log_value(key, float(episode_return), reduce="item_series")

    @override(RLlibCallback)
    def on_train_result(self, *, algorithm: Algorithm, result: dict[str, Any], **kwargs: Any) -> None:
        trouble = next((t for t in _on_learners(algorithm, lambda learner: learner.find_trouble()) if t), None)
        if trouble is not None:
            raise TrainingTrouble(trouble)  # before a checkpoint of it could be taken
        self._ready = self._ready and self._progress(algorithm) == self._last_progress
        self._catch_up(algorithm)
        progress = self._progress(algorithm)
        task = self._tasks[progress["task_index"]]
        runners = result.setdefault(ENV_RUNNER_RESULTS, {})
        result.get(EVALUATION_RESULTS, {}).get(ENV_RUNNER_RESULTS, {}).pop(TASK_RETURNS, None)
        total_steps = int(result.get(NUM_ENV_STEPS_SAMPLED_LIFETIME) or 0)
        steps = total_steps - progress["task_start_env_steps"]
        ended = (runners.pop(TASK_RETURNS, None) or {}).get(str(progress["task_index"]), [])
        # RLlib's compile() makes a number of a series of one, and NaN of an empty one.
        ended = [value for value in (ended if isinstance(ended, list) else [ended]) if not math.isnan(value)]
        self._returns.extend(ended)
        mean = sum(self._returns) / len(self._returns) if self._returns else math.nan
        over = not progress["finished"] and task.is_over(
            mean if len(self._returns) >= min(MIN_EPISODES, self._returns.maxlen or 1) else math.nan, steps
        )
        column = progress["first_column"] + progress["task_index"]
        if over and not task.is_over(math.nan, steps) and not self._confirmed(algorithm, progress, task):
            over = False
            self._returns.clear()
        if over:
            progress = self._end_task(algorithm, progress, steps, total_steps)
            self._returns.clear()
            result[SHOULD_CHECKPOINT] = True
        self._last_progress = progress
        if progress["finished"]:
            result[DONE] = True
        # Keys are there from the first result on: Tune's CSV logger takes its columns from it.
        runners.setdefault(EPISODE_RETURN_MEAN, math.nan)
        result["progressive"] = {
            "task": task.name,
            "task_index": self._tasks.index(task),
            "num_tasks": len(self._tasks),
            "column": column,
            "task_env_steps": steps,
            "episode_return_mean": mean,
            "num_episodes": len(ended),
            "episode_return_sum": float(sum(ended)),
            "task_over": over,
            "finished": progress["finished"],
        }
        result["columns"] = {t.name: dict(self._scores.get(t.name, _NO_SCORE)) for t in self._tasks}

    # -- the walk ------------------------------------------------------------------------------------------------

    def _confirmed(self, algorithm: Algorithm, progress: dict[str, Any], task: Task) -> bool:
        """Whether the newest weights are as good as the episodes that would end the task.

        Those episodes are older than the weights, and one bad update is enough to lose a policy. Frozen for ever is
        what plays now, so it plays first. If its mean is below the task's by more than two standard errors, the task
        goes on until at least MIN_EPISODES more have ended, and ended well. (A3C's and IMPALA's Learner may apply a
        few more updates before it freezes.)
        """
        num_episodes, wanted = self._settings.get("evaluation_episodes", 10), task.until.get("episode_return_mean")
        if num_episodes <= 0 or wanted is None:
            return True
        self._broadcast(algorithm)
        state = _on_learners(algorithm, lambda learner: learner.module_state())[0]
        column = progress["first_column"] + progress["task_index"]
        played = _play(algorithm, self._network_from(algorithm, state), self._jobs(column, task))
        returns = np.asarray(ColumnEvaluation.merge(played).returns)
        error = returns.std() / math.sqrt(len(returns))
        if returns.mean() + 2 * error >= wanted:
            return True
        logger.warning(
            "task '%s': its last episodes reached %s, but the newest weights return %.4g +- %.2g over %d episodes; "
            "column %d goes on learning",
            task.name,
            wanted,
            returns.mean(),
            error,
            len(returns),
            column,
        )
        return False

    def _end_task(self, algorithm: Algorithm, progress: dict[str, Any], steps: int, total_steps: int) -> dict[str, Any]:
        index = progress["task_index"]
        states = _on_learners(algorithm, lambda learner: learner.freeze_columns())
        network = self._network_from(algorithm, states[0])
        network.verify()
        self._share(algorithm)
        if isinstance(algorithm, A3C):
            # What is reported from here on was done on the next task.
            algorithm.settle()
            lifetime = (ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME)
            total_steps = max(total_steps, int(algorithm.metrics.peek(lifetime, default=0)))
        self._broadcast(algorithm)
        self._play_all(algorithm, network, progress)
        for k in range(progress["first_column"] + index + 1):
            self._store_column(network, k, progress, steps)
        self._upload(algorithm)
        return self._go_on(algorithm, progress, total_steps)

    def _go_on(self, algorithm: Algorithm, progress: dict[str, Any], total_steps: int) -> dict[str, Any]:
        """To the next task, or to the end of the list."""
        progress = dict(progress)
        if progress["task_index"] + 1 == len(self._tasks):
            progress["finished"] = True
            _on_learners(
                algorithm, lambda learner, p=progress: setattr(learner.progressive_module, "progress", dict(p))
            )
        else:
            progress |= {"task_index": progress["task_index"] + 1, "task_start_env_steps": total_steps}
            _on_learners(algorithm, lambda learner, p=progress: learner.grow(p))
        self._broadcast(algorithm)
        self._forget_rollouts(algorithm)
        return progress

    def _catch_up(self, algorithm: Algorithm) -> None:
        """Once after building or restoring: goes on behind the columns that the store holds already."""
        if self._ready:
            return
        self._store.claim()  # not before: a checkpoint that is only played leaves a running training its store
        self._ready = True
        self._returns.clear()
        progress = self._progress(algorithm)
        entries = self._store.entries
        self._scores = {e.task: _score_of(e.score, e.extra.get("digest")) for e in entries if e.score is not None}
        first = progress["first_column"]
        done = len(entries) - first
        ended = progress["task_index"] + int(progress["finished"])
        for i, entry in enumerate(entries[first:]):
            if i >= len(self._tasks) or entry.task != self._tasks[i].name:
                raise ColumnStoreError(
                    f"{self._store.path}: column {first + i} is of task '{entry.task}', this run's is "
                    f"'{self._tasks[i].name if i < len(self._tasks) else 'none'}'; give the run a store of its own"
                )
        frozen = _on_learners(algorithm, lambda learner: learner.module_state(inference_only=True))[0]["columns"]
        for k in range(first + min(done, ended)):
            if entries[k].fingerprint != frozen[k]["fingerprint"]:
                raise ColumnStoreError(
                    f"{self._store.path}: column {k} is stored with fingerprint {entries[k].fingerprint[:12]}, the "
                    f"checkpoint's is {str(frozen[k]['fingerprint'])[:12]}: the checkpoint is another run's; "
                    "restore it with a column_store of its own"
                )
        if done > ended:
            logger.info("%s holds %d finished tasks; going on behind them", self._store.path, done)
            total = int(algorithm.metrics.peek((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME), default=0) or 0)
            network = self._store.load()
            progress |= {"task_index": done - 1}
            state = {"progress": progress, "columns": [column_state(c) for c in network.columns]}
            _on_learners(algorithm, lambda learner, s=state: learner.become(s))
            self._share(algorithm)
            self._go_on(algorithm, progress, total)
        elif ended > done:
            # The checkpoint knows more than the store (moved or lost files): every column goes in again.
            states = _on_learners(algorithm, lambda learner: learner.module_state())
            network = self._network_from(algorithm, states[0])
            for k in range(first + ended):
                self._store_column(network, k, progress, None)
            self._share(algorithm)
        else:
            self._share(algorithm)
        self._broadcast(algorithm)

    def _start_from(self, algorithm: Algorithm, source: ColumnStore) -> None:
        """Puts another run's frozen columns in front of the first task's column."""
        states = _on_learners(algorithm, lambda learner: learner.module_state())
        fresh = self._network_from(algorithm, states[0])
        network = source.load()
        given = (network.observation_shape, network.num_outputs)
        wanted = (fresh.observation_shape, fresh.num_outputs)
        if given != wanted:
            raise ColumnStoreError(
                f"columns_from: {source.path}: columns are for observations {given[0]} and {given[1]} policy outputs, "
                f"the tasks have {wanted[0]} and {wanted[1]}"
            )
        network.seed, network.spec = fresh.seed, fresh.spec
        network.lateral, network.lateral_heads = fresh.lateral, fresh.lateral_heads
        network.lateral_scale = fresh.lateral_scale
        first = network.num_columns
        shift = self._settings["tasks"][0].get("input_shift", 0.0)
        grow(network, self._settings.get("architecture", "progressive"), shift)
        progress = {"task_index": 0, "first_column": first, "task_start_env_steps": 0, "finished": False}
        state = {"progress": progress, "columns": [column_state(c) for c in network.columns]}
        _on_learners(algorithm, lambda learner, s=state: learner.become(s))
        for k, entry in enumerate(source.entries):
            self._store.save_column(
                network,
                k,
                task=entry.task if entry.extra.get("source") else f"{Path(source.path).name}:{entry.task}"[:200],
                env=entry.env,
                env_config=entry.env_config,
                score=entry.score,
                num_env_steps=entry.num_env_steps,
                extra=entry.extra | {"source": True},
            )
        self._share(algorithm)
        self._broadcast(algorithm)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _progress(self, algorithm: Algorithm) -> dict[str, Any]:
        return dict(_on_learners(algorithm, lambda learner: dict(learner.progressive_module.progress))[0])

    def _network_from(self, algorithm: Algorithm, state: dict[str, Any]) -> ProgressiveNetwork:
        """A copy of the Learner's network in this process."""
        module: ProgressiveRLModule = algorithm.config.get_rl_module_spec(
            spaces=algorithm.spaces, inference_only=True
        ).build()
        module.set_state(state)
        module.network.seed = algorithm.config.seed or 0  # as on the Learner
        return module.network

    def _share(self, algorithm: Algorithm) -> None:
        """Frozen columns into the object store, owned by this process, which outlives Learners and EnvRunners."""
        states = _on_learners(algorithm, lambda learner: learner.module_state(inference_only=True))
        references = {
            entry["fingerprint"]: entry.get("reference") or ray.put(entry)
            for entry in states[0]["columns"]
            if entry["fingerprint"] is not None
        }
        _on_learners(algorithm, lambda learner, r=references: learner.progressive_module.use_references(r))

    def _broadcast(
        self, algorithm: Algorithm, group: EnvRunnerGroup | None = None, indices: list[int] | None = None
    ) -> None:
        """The Learner's state to all EnvRunners, waited for."""
        state = _on_learners(algorithm, lambda learner: learner.module_state(inference_only=True))[0]
        reference = ray.put(state)
        groups = [group] if group is not None else [algorithm.env_runner_group, algorithm.eval_env_runner_group]
        for each in groups:
            if each is not None:
                each.foreach_env_runner(
                    lambda runner, r=reference: runner.follow(ray.get(r)),
                    remote_worker_ids=indices,
                    local_env_runner=indices is None and each.local_env_runner is not None,
                )

    def _forget_rollouts(self, algorithm: Algorithm) -> None:
        """Drops what was sampled on the old task and has not been learned from; the Learner drops what slips by."""
        if isinstance(getattr(algorithm, "_episode_packs_being_built", None), list):
            algorithm._episode_packs_being_built.clear()
        algorithm.env_runner_group.fetch_ready_async_reqs(tags=(), return_obj_refs=True)
        for metric in EPISODE_METRICS:
            algorithm.metrics.delete(ENV_RUNNER_RESULTS, metric, key_error=False)
            algorithm.metrics.delete(EVALUATION_RESULTS, ENV_RUNNER_RESULTS, metric, key_error=False)

    def _play_all(self, algorithm: Algorithm, network: ProgressiveNetwork, progress: dict[str, Any]) -> None:
        """Every column on its own task, in parallel on the EnvRunners; notes returns now and at freezing."""
        num_episodes = self._settings.get("evaluation_episodes", 10)
        if num_episodes <= 0:
            return
        first, last = progress["first_column"], progress["task_index"]
        jobs = [job for i in range(last + 1) for job in self._jobs(first + i, self._tasks[i])]
        played = _play(algorithm, network, jobs)
        for i in range(last + 1):
            parts = [part for job, part in zip(jobs, played, strict=True) if job[0] == first + i]
            evaluation = ColumnEvaluation.merge(parts)
            mean = evaluation.episode_return_mean
            seen = evaluation.first_steps.statistics() if evaluation.first_steps is not None else None
            if seen is not None:
                self._first_observations[self._tasks[i].name] = seen.to_json()
            score = self._scores.get(self._tasks[i].name) or _score_of(mean, evaluation.digest)
            before = score["frozen_episode_return_mean"]
            self._scores[self._tasks[i].name] = score | {
                "episode_return_mean": mean,
                "forgetting": before - mean,
                "num_episodes": len(evaluation.returns),
                "bit_equal": int(evaluation.digest == score["digest"]),
            }

    def _jobs(self, column: int, task: Task) -> list[_Job]:
        """The evaluation of a column on a task, in parts for `_play`."""
        parts = shards(self._settings.get("evaluation_episodes", 10), self._settings.get("evaluation_seed", 0))
        return [(column, dict(task.env_config), count, seed) for count, seed in parts]

    def _store_column(self, network: ProgressiveNetwork, k: int, progress: dict[str, Any], steps: int | None) -> None:
        entries = self._store.entries
        if k < len(entries):
            mine = str(network.columns[k].fingerprint)
            if entries[k].fingerprint != mine:
                raise ColumnStoreError(
                    f"{self._store.path}: column {k} is stored with fingerprint {entries[k].fingerprint[:12]}, this "
                    f"run's is {mine[:12]}: another process trained the same task; resume to go on from the stored one"
                )
            return
        i = k - progress["first_column"]
        task = self._tasks[i] if i >= 0 else None
        score = self._scores.get(task.name) if task else None
        extra: dict[str, Any] = {}
        if score:
            extra = {"digest": score["digest"], "num_episodes": score["num_episodes"]}
        if task is not None and task.name in self._first_observations:
            extra[FIRST_OBSERVATIONS] = self._first_observations[task.name]
        self._store.save_column(
            network,
            k,
            task=task.name if task else "random",
            env=self._settings.get("env") if task else None,
            env_config=dict(task.env_config) if task else {},
            score=None if score is None else score["frozen_episode_return_mean"],
            num_env_steps=steps if task else 0,
            extra=extra,
        )

    # -- where columns are stored --------------------------------------------------------------------------------

    def _open_store(self, algorithm: Algorithm) -> ColumnStore:
        if self._settings.get("column_store"):
            return ColumnStore(self._settings["column_store"])
        storage = getattr(algorithm, "_storage", None)
        if storage is not None and storage.trial_dir_name and isinstance(storage.storage_filesystem, LocalFileSystem):
            return ColumnStore(Path(storage.trial_fs_path) / "columns")
        store = ColumnStore(Path(algorithm.logdir) / "columns")
        if storage is not None and storage.trial_dir_name:
            remote = f"{storage.trial_fs_path}/columns"
            files = storage.storage_filesystem.get_file_info(FileSelector(remote, allow_not_found=True))
            if any(f.type == FileType.File for f in files):
                store.path.mkdir(parents=True, exist_ok=True)
                copy_files(remote, str(store.path), source_filesystem=storage.storage_filesystem)
        return store

    def _upload(self, algorithm: Algorithm) -> None:
        """To storage that is not a local path (S3, say): column files first, the manifest last."""
        storage = getattr(algorithm, "_storage", None)
        if (
            self._settings.get("column_store")
            or storage is None
            or not storage.trial_dir_name
            or isinstance(storage.storage_filesystem, LocalFileSystem)
        ):
            return
        remote = f"{storage.trial_fs_path}/columns"
        storage.storage_filesystem.create_dir(remote, recursive=True)
        for name in [*(e.file for e in self._store.entries), "manifest.json"]:
            copy_files(
                str(self._store.path / name), f"{remote}/{name}", destination_filesystem=storage.storage_filesystem
            )


_NO_SCORE = {
    "episode_return_mean": math.nan,
    "frozen_episode_return_mean": math.nan,
    "forgetting": math.nan,
    "num_episodes": 0,
    "bit_equal": math.nan,
    "digest": "",
}


def _score_of(mean: float, digest: str | None) -> dict[str, Any]:
    return _NO_SCORE | {"episode_return_mean": mean, "frozen_episode_return_mean": mean, "digest": digest or ""}


def _on_learners(algorithm: Algorithm, function: Any) -> list[Any]:
    """Results of `function(learner)` on every Learner; raises what a Learner raised."""
    return results_of(algorithm.learner_group.foreach_learner(function))


def _play(algorithm: Algorithm, network: ProgressiveNetwork, jobs: list[_Job]) -> list[ColumnEvaluation]:
    """Shares jobs among the EnvRunners; plays here, with `network`, what none of them did."""
    env, normalize = algorithm.config.env, bool(algorithm.config.normalize_actions)
    vectorized = is_vectorized(algorithm.config)
    results: dict[int, ColumnEvaluation] = {}

    def play_job(own: ProgressiveNetwork, job: _Job) -> ColumnEvaluation:
        column, env_config, count, seed = job
        return evaluate_shard(own, env, env_config, column, count, seed, False, normalize, vectorized=vectorized)

    def play(runner: Any, numbers: list[int]) -> dict[int, ColumnEvaluation]:
        return {n: play_job(runner.module.network, jobs[n]) for n in numbers}

    group = algorithm.env_runner_group
    ids = group.healthy_worker_ids()
    if ids:
        parts = group.foreach_env_runner(
            [functools.partial(play, numbers=list(range(i, len(jobs), len(ids)))) for i in range(len(ids))],
            remote_worker_ids=ids,
            local_env_runner=False,
        )
        for part in parts:
            results.update(part)
    for n, job in enumerate(jobs):
        if n not in results:
            results[n] = play_job(network, job)
    return [results[n] for n in range(len(jobs))]
