"""What the throughput benchmarks share: processor time of a process and all below it, and contestants taking turns."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil

WARM_UP_S = 3.0


def cpu_seconds(pid: int | None = None) -> float:
    """User and system time of a process (this one) and its descendants so far."""
    total = 0.0
    process = psutil.Process(pid)
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = each.cpu_times()
            total += times.user + times.system
    return total


def rate_of(total_steps: Callable[[], float], seconds: float, warm_up: float = WARM_UP_S) -> tuple[float, float]:
    """Calls `total_steps`, which goes on a little and says how many steps were done so far, for a while.

    Returns:
        Env-steps per second and CPU seconds per env-step, after a warm-up.
    """
    begin, first = time.monotonic(), None
    while True:
        steps = total_steps()
        now = (time.monotonic(), steps)
        if first is None:
            if now[0] - begin >= warm_up and steps > 0:
                first = (*now, cpu_seconds())
        elif now[0] - first[0] >= seconds:
            done = now[1] - first[1]
            return done / (now[0] - first[0]), (cpu_seconds() - first[2]) / done


def take_turns(
    script: str, contestants: Sequence[str], rounds: int, arguments: Sequence[str]
) -> dict[str, list[dict[str, float]]]:
    """Runs `script --only CONTESTANT ARGUMENTS`, a process each, round after round; the last line each prints is JSON.

    Returns:
        The rounds' figures (`env_steps_per_s`, `cpu_us_per_env_step`) by contestant.
    """
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for number in range(1, rounds + 1):
        for name in contestants:
            command = [sys.executable, script, "--only", name, *arguments]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            turn = json.loads(done.stdout.splitlines()[-1])
            turns[name].append(turn)
            print(
                f"round {number}: {name} {turn['env_steps_per_s']:.0f} env-steps/s, "
                f"{turn['cpu_us_per_env_step']:.0f} us of CPU time each",
                flush=True,
            )
    return turns


def machine() -> dict[str, Any]:
    """What a figure depends on: the processor and how busy it is."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }
