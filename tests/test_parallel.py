"""The parallel map that `rllib analyze --method aps` searches with."""

import os
import time

import pytest
import torch

from rllib_pnn.experiment.parallel import over_ray
from rllib_pnn.experiment.run import ray_session


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with ray_session(None, verbose=False):
        yield


def test_results_come_in_order_from_other_processes():
    heard = []

    def look(number):
        time.sleep(0.2 * (number == 0))  # the first is done last
        return number, os.getpid(), torch.get_num_threads()

    found = over_ray(lambda done, total: heard.append((done, total)))(look, range(3))
    assert [number for number, _, _ in found] == [0, 1, 2]
    assert all(pid != os.getpid() and threads == 1 for _, pid, threads in found)
    assert heard == [(1, 3), (2, 3), (3, 3)]


def test_what_a_call_raised_is_raised():
    def fail(number):
        raise ValueError(f"number {number} is bad")

    with pytest.raises(ValueError, match="number 7 is bad"):
        over_ray(lambda done, total: None)(fail, [7])
