"""A small convolutional network and its observations' shape, for tests of the first layers."""

from __future__ import annotations

from typing import Any

from rllib_pnn.network import ProgressiveNetwork

SHAPE = (4, 36, 36)
SMALL = [{"conv": [12, 8, 4]}, {"conv": [5, 3]}, {"dense": 8}]


def make(num_columns: int, spec: Any = SMALL, shape: tuple[int, ...] = SHAPE, **kwargs: Any) -> ProgressiveNetwork:
    network = ProgressiveNetwork(shape, 3, spec, **kwargs)
    for k in range(num_columns):
        network.add_column(input_shift=0.1 * k)
    return network
