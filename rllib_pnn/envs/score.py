"""The return that an episode is reported with, and what counts for one that does not end.

An environment that clips rewards for learning puts the unclipped return into an episode's last info, under
`episode_score`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

EPISODE_SCORE = "episode_score"
MAX_EPISODE_STEPS = 50_000  # after which an episode counts as it stands; Atari's own limit is 27,000


def episode_scores(infos: Mapping[str, Any], ended: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the episodes that end in a vector env's step tell their score, and the scores.

    Args:
        infos: of the step. An env that resets in the same step (SAME_STEP) has the last infos under `final_info`.
        ended: (N,) bool.

    Returns:
        (N,) bool, and (N,) scores, meaningful where the first is true.
    """
    last = infos.get("final_info", infos)
    if EPISODE_SCORE not in last:
        return np.zeros_like(ended), np.zeros(len(ended))
    told = ended & np.asarray(last.get(f"_{EPISODE_SCORE}", ended), bool)
    return told, np.where(told, np.asarray(last[EPISODE_SCORE]), 0.0)
