"""APS: bisection against closed forms, networks whose answer is known, seeding and parallel maps."""

import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import gymnasium as gym
import numpy as np
import pytest
import torch

from rllib_pnn.analysis.perturbation import (
    activation_deviations,
    average_perturbation_sensitivity,
    find_critical_noise,
)
from rllib_pnn.network import ProgressiveNetwork

torch.set_num_threads(1)  # threads of so small networks wait for one another

ENV = "rllib_pnn_test/Sign-v0"


class SignEnv(gym.Env):
    """One observation of +-1 a step for 40 steps; naming its sign pays 1, the other name -1. Chance level: 0."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        reward = 1.0 if action == self.sign else -1.0
        self.steps += 1
        return self._observe(), reward, self.steps == 40, False, {}

    def _observe(self):
        self.sign = int(self.np_random.integers(2))
        value = 2 * self.sign - 1
        return np.array([value, -value], dtype=np.float32)


if ENV not in gym.registry:
    gym.register(ENV, entry_point=SignEnv)


def sign_network(own, lateral):
    """Two columns of two units, [relu(x), relu(-x)]; the policy reads its own by `own` and the first's by `lateral`."""
    network = ProgressiveNetwork((2,), 2, [{"dense": 2}], lateral="linear")
    for _ in range(2):
        network.add_column()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        for column in network.columns:
            column.layers[0].weight.copy_(torch.eye(2))
        # logits: unit 0 is on for +1 (action 1), unit 1 for -1 (action 0).
        swap = torch.tensor([[0.0, 1], [1, 0]])
        network.columns[1].policy.weight.copy_(own * swap)
        network.columns[1].laterals["policy"].out.weight.copy_(lateral * swap)
    network.freeze()
    return network


# -- bisection


@pytest.mark.parametrize("critical", [0.03, 0.5, 7.0, 60.0])
def test_bisection_finds_a_known_crossing(critical):
    # score = exp(-(sigma / c)^2 ln 2) is a half at sigma = c.
    def score(sigma):
        return math.exp(-((sigma / critical) ** 2) * math.log(2))

    found = find_critical_noise(score, 0.5, tolerance=0.01)
    assert found.crossing == "found"
    assert found.sigma == pytest.approx(critical, rel=0.01)
    assert found.precision == pytest.approx(critical**-2, rel=0.02)
    assert found.num_evaluations <= 14  # log2(ln(1e4) / ln(1.01)) = 10 and the two bounds


def test_bisection_beyond_its_bounds():
    never = find_critical_noise(lambda sigma: 1.0, 0.5)
    assert (never.crossing, never.precision, never.num_evaluations) == ("above", 0, 1)
    always = find_critical_noise(lambda sigma: 0.0, 0.5, lowest=0.1)
    assert (always.crossing, always.sigma) == ("below", 0.1)


def test_a_score_at_the_threshold_has_dropped():
    assert find_critical_noise(lambda sigma: 1.0 if sigma < 1 else 0.5, 0.5, tolerance=1e-3).sigma == pytest.approx(
        1, rel=0.01
    )


# -- networks whose answer is known


def test_a_policy_that_reads_one_column_has_all_of_it_there():
    own = average_perturbation_sensitivity(sign_network(own=20.0, lateral=0.0), ENV, floor=0)
    np.testing.assert_array_equal(own.values, [[0, 1]])
    assert any("column 0, layer 1: the highest noise (100)" in note for note in own.notes)
    first = average_perturbation_sensitivity(sign_network(own=0.0, lateral=20.0), ENV, floor=0)
    np.testing.assert_array_equal(first.values, [[1, 0]])


def test_the_critical_noise_agrees_with_the_normal_distribution():
    # Units are 0 or 1 with deviation 1/2; the sign is misread if noise of deviation sqrt(2) sigma/2 exceeds 1.
    # Score 2 p - 1 = 1/2 at p = 3/4: 1 / (sigma / sqrt 2) = 0.6745, sigma = 2.097.
    found = average_perturbation_sensitivity(
        sign_network(own=1000.0, lateral=0.0), ENV, floor=0, num_episodes=64, tolerance=0.01
    )
    assert found.raw[0][1][0] == pytest.approx(2.097**-2, rel=0.08)
    assert found.settings["score"] == 40


def test_a_column_that_is_read_more_loudly_is_more_sensitive():
    found = average_perturbation_sensitivity(sign_network(own=100.0, lateral=300.0), ENV, floor=0, num_episodes=32)
    # The signal is 400; the lateral's noise counts 300, the column's own 100: precisions as 9 to 1.
    np.testing.assert_allclose(found.values, [[0.9, 0.1]], atol=0.04)


def test_the_drop_is_measured_above_the_floor():
    # Floor -40 instead of 0: half of the way down is a score of 0, which noise only reaches when it decides alone.
    network = sign_network(own=1000.0, lateral=0.0)
    shallow = average_perturbation_sensitivity(network, ENV, floor=0)
    deep = average_perturbation_sensitivity(network, ENV, floor=-40)
    assert deep.raw[0][1][0] < 0.25 * shallow.raw[0][1][0]


# -- seeds and maps


def test_the_same_seed_gives_the_same_result_through_any_map():
    network = sign_network(own=30.0, lateral=20.0)
    serial = average_perturbation_sensitivity(network, ENV, floor=0, num_episodes=4, seed=3)
    again = average_perturbation_sensitivity(network, ENV, floor=0, num_episodes=4, seed=3)
    np.testing.assert_array_equal(serial.values, again.values)
    with ThreadPoolExecutor(2) as pool:
        parallel = average_perturbation_sensitivity(network, ENV, floor=0, num_episodes=4, seed=3, map=pool.map)
    np.testing.assert_array_equal(serial.values, parallel.values)


def test_what_the_map_gets_can_go_to_another_process():
    def pickled(function, items):
        return [function(pickle.loads(pickle.dumps(item))) for item in items]

    network = sign_network(own=30.0, lateral=20.0)
    plain = average_perturbation_sensitivity(network, ENV, floor=0, num_episodes=4)
    sent = average_perturbation_sensitivity(network, ENV, floor=0, num_episodes=4, map=pickled)
    np.testing.assert_array_equal(plain.values, sent.values)


def test_noise_is_proportional_to_each_features_deviation():
    network = ProgressiveNetwork((2, 10, 10), 3, [{"conv": [3, 4, 2]}, {"dense": 5}])
    network.add_column()
    observations = np.random.default_rng(0).integers(0, 255, (30, 2, 10, 10), dtype=np.uint8)
    found = activation_deviations(network, observations, {}, np.empty((0, 0), dtype=bool), 0, batch_size=7)
    hidden = network.activations(torch.as_tensor(observations))[0][0]
    torch.testing.assert_close(found[0, 1], hidden[0].std((0, 2, 3), unbiased=False))
    torch.testing.assert_close(found[0, 2], hidden[1].std(0, unbiased=False))


def test_bad_arguments_are_one_line():
    network = sign_network(own=30.0, lateral=0.0)
    for options, message in [
        ({"floor": 41}, "not above the floor of 41"),
        ({"floor": 0, "drop": 1.5}, "drop: expected a share"),
        ({"floor": 0, "lowest": 2, "highest": 1}, "lowest"),
        ({"floor": 0, "column": 5}, "column: 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            average_perturbation_sensitivity(network, ENV, **options)
