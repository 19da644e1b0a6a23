"""Settings of Ray that count when it is imported or started. Imports nothing of it."""

from __future__ import annotations

import os
import warnings

_ALWAYS = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # a run uses the Python that started it
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a tuned example mean the user's folder
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # `run` brings its own
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C checkpoints first
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_DEDUP_LOGS": "1",
}


def prepare_ray(*, verbose: bool) -> None:
    """Call before `ray` is imported. What the user has set stays; `verbose` leaves Ray's own output on."""
    for key, value in (_ALWAYS | ({} if verbose else _QUIET)).items():
        os.environ.setdefault(key, value)
    if not verbose:
        warnings.filterwarnings("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
