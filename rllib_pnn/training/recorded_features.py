"""What frozen columns made of a rollout: written down where it was acted on, read where it is learned from.

PPO's EnvRunners evaluate the frozen columns to act, and its Learner needs the same activations, 26 KB a step and Atari
column. Through Ray they would cost more than they save; on one machine they stand in shared memory, and each episode
brings a note of where (`RECORD` in its `custom_data`). What the Learner can't reach, on another machine for example, or
what the next rollout has overwritten, it computes itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from torch import Tensor

from rllib_pnn.training.shared_memory import Recorder, Recording, RecordingReader

RECORD = "frozen_features"
MAX_BYTES = 2**29  # of an EnvRunner


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """Where the activations for an episode's (or chunk's) observations stand."""

    recording: Recording
    columns: str  # the frozen columns' fingerprint
    env: int
    first: int  # step of the rollout that saw the observation at `t_started`
    t_started: int  # of the episode; a slice of it has another
    end: int  # steps of the rollout that are written down


class FeatureRecorder:
    """The EnvRunner's side. `begin`, then `forward` for every step, then `sign`."""

    def __init__(self) -> None:
        self._recorder: Recorder | None = None
        self._columns = ""
        self._step = self._num_steps = 0

    def stop(self) -> None:
        """What was recorded counts no more, and nothing is until `begin`."""
        self._columns = ""
        if self._recorder is not None:
            self._recorder.begin()

    def begin(self, columns: str, num_steps: int) -> None:
        """A new rollout, of about so many steps; earlier ones count no more.

        Args:
            columns: fingerprint of the module's frozen columns; "" if there is nothing to record.
        """
        self.stop()
        self._columns, self._num_steps, self._step = columns, num_steps, 0

    @property
    def is_on(self) -> bool:
        return bool(self._columns)

    def forward(self, module: Any, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """The outputs of `module.forward_exploration(batch, **kwargs)`; the features are written down."""
        step, self._step = self._step, self._step + 1
        outputs, features = module.forward_with_features(batch, **kwargs)
        if step == 0:
            shapes = {key: (self._num_steps, *feature.shape) for key, feature in features.items()}
            if self._recorder is None or self._recorder.shapes != shapes:
                self._recorder = Recorder.make(shapes, MAX_BYTES)
        if self._recorder is not None and step < self._num_steps:
            for key, array in self._recorder.arrays.items():
                torch.from_numpy(array[step]).copy_(features[key])
        return outputs

    def sign(self, episode: SingleAgentEpisode, env: int, first: int) -> None:
        """Notes in an episode where its observations' features stand; `first` counts the rollout's steps."""
        episode.custom_data.pop(RECORD, None)
        if self._columns and self._recorder is not None:
            end = min(self._step, self._num_steps)
            episode.custom_data[RECORD] = EpisodeRecord(
                self._recorder.recording(), self._columns, env, first, episode.t_started, end
            )


def recorded_features(
    episodes: Sequence[SingleAgentEpisode],
    rows: np.ndarray,
    columns: str,
    reader: RecordingReader,
    keys: Collection[str] | None = None,
) -> tuple[dict[str, Tensor], np.ndarray]:
    """The Learner's side: what is found written down for a train batch.

    Args:
        episodes: whose steps, each with the observation after the last one, are the batch's rows.
        rows: rows of each episode; their sum is R.
        columns: fingerprint of the Learner's frozen columns. Records of others are not used.
        keys: names of the features wanted; None: of all.

    Returns:
        Features (R, ...) by name, {} if nothing was found, and (R,) bool: the rows that are not filled in.
    """
    features: dict[str, Tensor] = {}
    missing = np.ones(int(rows.sum()), bool)
    used: list[Recording] = []
    starts = np.cumsum(rows) - rows
    for episode, start, count in zip(episodes, starts.tolist(), rows.tolist(), strict=True):
        record = episode.custom_data.get(RECORD)
        if not isinstance(record, EpisodeRecord) or record.columns != columns:
            continue
        arrays = reader.arrays(record.recording)
        if arrays is not None and keys is not None:
            arrays = {key: array for key, array in arrays.items() if key in keys}
        first = record.first + episode.t_started - record.t_started
        count = min(count, record.end - first)
        if arrays is None or first < record.first or count <= 0 or not _agree(arrays, features):
            continue
        for key, array in arrays.items():
            if key not in features:
                features[key] = torch.empty((len(missing), *array.shape[2:]))
            features[key][start : start + count] = torch.from_numpy(array[first : first + count, record.env])
        missing[start : start + count] = False
        used.append(record.recording)
    reader.forget_all_but(used)
    if not all(reader.is_current(recording) for recording in used):  # overwritten while it was read
        return {}, np.ones_like(missing)
    return features, missing


def _agree(arrays: Mapping[str, np.ndarray], features: Mapping[str, Tensor]) -> bool:
    """Whether these belong into the same columns of a batch."""
    return not features or {k: a.shape[2:] for k, a in arrays.items()} == {
        k: tuple(f.shape[1:]) for k, f in features.items()
    }
