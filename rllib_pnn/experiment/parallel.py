"""A function applied to a list on all cores of a Ray cluster, for measurements of minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import ray


def over_ray(say: Callable[[int, int], None]) -> Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]]:
    """A parallel `map` on the cluster that this process is connected to.

    Args:
        say: hears how many items are done, and of how many, each time one is.

    Returns:
        `map(function, items)`: results in the items' order, the first exception raised. Each call has one CPU and
        one torch thread. Function and items can be pickled.
    """

    def apply(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        calls = [_call.remote(function, item) for item in items]
        waiting = calls
        while waiting:
            (ready, *_), waiting = ray.wait(waiting)
            ray.get(ready)  # raises what it raised, without waiting for the others
            say(len(calls) - len(waiting), len(calls))
        return ray.get(calls)

    return apply


@ray.remote(num_cpus=1)
def _call(function: Callable[[Any], Any], item: Any) -> Any:
    import torch

    from rllib_pnn.registration import register

    register()
    torch.set_num_threads(1)
    return function(item)
