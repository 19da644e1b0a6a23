"""AFS: against slow references, on networks whose answer is known, and the identities that it must obey."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from rllib_pnn.analysis.fisher import average_fisher_sensitivity
from rllib_pnn.analysis.rollouts import Rollout, _within, play, sample_actions
from rllib_pnn.analysis.sensitivity import Sensitivity, feature_shares, layer_shares
from rllib_pnn.network import ProgressiveNetwork

torch.set_num_threads(1)  # threads of so small networks wait for one another

CONV = [{"conv": [3, 4, 2]}, {"conv": [3, 2, 1]}, {"dense": 6}]


def network_of(num_columns=2, shape=(5,), spec=({"dense": 4}, {"dense": 4}), outputs=3, **options):
    """Columns with loud random parameters, biases included, so that nothing is zero by accident."""
    network = ProgressiveNetwork(shape, outputs, list(spec), lateral_scale=0.7, **options)
    generator = torch.Generator().manual_seed(5)
    for _ in range(num_columns):
        network.add_column()
        with torch.no_grad():
            for name, parameter in network.columns[-1].named_parameters():
                if "scale" not in name:
                    scale = 0.3 if parameter.dim() == 1 else 1.2 / math.sqrt(parameter[0].numel())
                    parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return network


def zero(network, column, *prefixes):
    with torch.no_grad():
        for name, parameter in network.columns[column].named_parameters():
            if name.startswith(prefixes):
                parameter.zero_()


def vectors(n=64, width=5, seed=0):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


# -- references


def numpy_log_pi(p, x, replaced):
    """log pi of column 2 of a 2-column dense network with adapters, eq. 2 in the paper's symbols, float64.

    `replaced[k, i]` is added to h_i^k.
    """

    def relu(a):
        return np.maximum(a, 0)

    def lateral(i, h):
        alpha = p[f"1.laterals.{i}.scale"]
        V, b = p[f"1.laterals.{i}.project_layer.weight"], p[f"1.laterals.{i}.project_layer.bias"]
        return p[f"1.laterals.{i}.out.weight"] @ relu(V @ (alpha * h) + b)

    h = {}
    h[0, 1] = relu(p["0.layers.0.weight"] @ x + p["0.layers.0.bias"]) + replaced.get((0, 1), 0)
    h[0, 2] = relu(p["0.layers.1.weight"] @ h[0, 1] + p["0.layers.1.bias"]) + replaced.get((0, 2), 0)
    h[1, 1] = relu(p["1.layers.0.weight"] @ x + p["1.layers.0.bias"]) + replaced.get((1, 1), 0)
    pre = p["1.layers.1.weight"] @ h[1, 1] + p["1.layers.1.bias"] + lateral(2, h[0, 1])
    h[1, 2] = relu(pre) + replaced.get((1, 2), 0)
    logits = p["1.policy.weight"] @ h[1, 2] + p["1.policy.bias"] + lateral("policy", h[0, 2])
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max(), h


def test_agrees_with_finite_differences_of_the_papers_equations():
    network = network_of()
    p = {name: value.detach().double().numpy() for name, value in network.columns.named_parameters()}
    observations = vectors(40)
    fisher = {key: np.zeros(4) for key in [(0, 1), (0, 2), (1, 1), (1, 2)]}
    activations = {key: [] for key in fisher}
    for x in observations.astype(np.float64):
        log_pi, h = numpy_log_pi(p, x, {})
        for key, total in fisher.items():
            activations[key].append(h[key])
            for m in range(4):
                step = 1e-6 * np.eye(4)[m]
                up, down = (numpy_log_pi(p, x, {key: sign * step})[0] for sign in (1, -1))
                total[m] += np.exp(log_pi) @ ((up - down) / 2e-6) ** 2
    expected = {key: total / 40 * np.var(activations[key], axis=0) for key, total in fisher.items()}

    found = average_fisher_sensitivity(network, observations, actions="expected", batch_size=16)
    for (k, i), values in expected.items():
        np.testing.assert_allclose(found.raw[i - 1][k], values, rtol=2e-3, atol=1e-7)
    shares = [[expected[k, i] / (expected[0, i] + expected[1, i]) for k in (0, 1)] for i in (1, 2)]
    np.testing.assert_allclose(found.values, np.nanmean(shares, axis=2), rtol=2e-3)


def test_convolutions_agree_with_a_loop_over_samples():
    network = network_of(3, (2, 10, 10), CONV)
    observations = np.random.default_rng(1).integers(0, 255, (9, 2, 10, 10), dtype=np.uint8)
    with torch.no_grad():
        logits = network(torch.as_tensor(observations)).logits
    actions = sample_actions(logits, 3, torch.Generator().manual_seed(4))

    squares, values = {}, {}
    for obs, action in zip(observations, actions, strict=True):
        hidden, output = network.activations(
            torch.as_tensor(obs[None]), transform=lambda k, i, h: h if h.requires_grad else h.requires_grad_()
        )
        log_pi = output.logits.log_softmax(-1)[0, action]
        for k, column in enumerate(hidden):
            for i, h in enumerate(column):
                (gradient,) = torch.autograd.grad(log_pi, h, retain_graph=True)
                maps = gradient[0].reshape(len(gradient[0]), -1).sum(1).double()  # summed over pixels
                squares[k, i] = squares.get((k, i), 0) + maps.square().numpy()
                values.setdefault((k, i), []).append(h[0].detach().reshape(len(maps), -1).double().numpy())
    found = average_fisher_sensitivity(network, observations, batch_size=100, seed=4)
    for (k, i), square in squares.items():
        variance = np.concatenate(values[k, i], axis=1).var(axis=1)
        np.testing.assert_allclose(found.raw[i][k], square / 9 * variance, rtol=1e-4, atol=1e-12)
    assert found.values.shape == (3, 3)
    np.testing.assert_allclose(found.values.sum(axis=1), 1)


def test_recurrent_columns_agree_with_a_loop_over_sequences():
    network = network_of(2, (5,), [{"dense": 4}, {"lstm": 3}])
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(6, 7, 5)).astype(np.float32)
    resets = rng.random((6, 7)) < 0.3
    states = {key: rng.normal(size=(6, 6)).astype(np.float32) for key in "hc"}
    found = average_fisher_sensitivity(
        network, Rollout(np.ones(1), np.ones(1), observations, states, resets), batch_size=100, seed=2
    )
    with torch.no_grad():
        start = {key: torch.as_tensor(value) for key, value in states.items()}
        logits = network(torch.as_tensor(observations), -1, start, resets=torch.as_tensor(resets)).logits
    actions = sample_actions(logits.reshape(42, 3), 3, torch.Generator().manual_seed(2)).view(6, 7)
    squares, values = {}, {}
    for n in range(6):
        hidden = {}

        def collect(k, i, h, hidden=hidden):
            hidden[k, i] = h if h.requires_grad else h.requires_grad_()
            return h

        output = network(
            torch.as_tensor(observations[n : n + 1]),
            -1,
            {key: torch.as_tensor(value[n : n + 1]) for key, value in states.items()},
            resets=torch.as_tensor(resets[n : n + 1]),
            transform=collect,
        )
        log_pi = output.logits.log_softmax(-1)[0].gather(1, actions[n][:, None]).sum()
        for key, h in hidden.items():
            (gradient,) = torch.autograd.grad(log_pi, h, retain_graph=True)
            squares[key] = squares.get(key, 0) + gradient.double().square().sum(0).numpy()
            values.setdefault(key, []).append(h.detach().double().numpy())
    for (k, i), square in squares.items():
        np.testing.assert_allclose(
            found.raw[i - 1][k], square / 42 * np.concatenate(values[k, i]).var(axis=0), rtol=1e-3, atol=1e-10
        )


def test_a_gaussian_policy_agrees_with_its_closed_form():
    # One layer straight to the heads: d log pi / d h = W_mu' z / sigma + W_s' (z^2 - 1), z standard normal.
    # E = sum_d W_mu[d]^2 / sigma_d^2 + 2 W_s[d]^2.
    network = network_of(1, (5,), [{"dense": 4}], outputs=4)
    zero(network, 0, "policy.bias")
    with torch.no_grad():
        network.columns[0].policy.weight[2:].mul_(0.2)  # light tails
    observations = vectors(20_000)
    found = average_fisher_sensitivity(network, observations, continuous=True, batch_size=5000)
    weight = network.columns[0].policy.weight.detach().double()
    hidden = network.activations(torch.as_tensor(observations))[0][0][0].detach().double()
    log_std = hidden @ weight[2:].T
    inverse_variance = (-2 * log_std).exp().mean(0)
    fisher = inverse_variance @ weight[:2].square() + 2 * weight[2:].square().sum(0)
    np.testing.assert_allclose(found.raw[0][0], fisher * hidden.var(0, unbiased=False), rtol=0.05)


def test_the_expectation_is_the_limit_of_sampling():
    network, observations = network_of(), vectors(4000)
    sampled = average_fisher_sensitivity(network, observations, batch_size=4000)
    expected = average_fisher_sensitivity(network, observations, actions="expected", batch_size=4000)
    np.testing.assert_allclose(sampled.values, expected.values, atol=0.03)


# -- networks whose answer is known


@pytest.mark.parametrize("lateral", ["adapter", "linear"])
def test_a_cut_lateral_has_no_sensitivity(lateral):
    network = network_of(3, lateral=lateral)
    zero(network, 2, "laterals")
    values = average_fisher_sensitivity(network, vectors()).values
    np.testing.assert_array_equal(values, [[0, 0, 1], [0, 0, 1]])


def test_a_column_without_laterals_has_all_of_it():
    network = network_of(1)
    network.add_column(lateral="none")
    values = average_fisher_sensitivity(network, vectors(), actions="expected").values
    np.testing.assert_array_equal(values, [[0, 1], [0, 1]])


def test_a_policy_that_reads_the_first_column_only_has_all_of_it_there():
    network = network_of(2)
    zero(network, 1, "policy")
    np.testing.assert_array_equal(average_fisher_sensitivity(network, vectors()).values, [[1, 0], [1, 0]])


def test_a_lateral_of_one_layer_only():
    # The head's lateral is cut: column 1 counts in layer 1, from where layer 2 of column 2 reads, and not in layer 2.
    network = network_of(2)
    zero(network, 1, "laterals.policy")
    values = average_fisher_sensitivity(network, vectors()).values
    assert 0 < values[0, 0] < 1
    np.testing.assert_array_equal(values[1], [0, 1])


def test_earlier_columns_policies_can_be_looked_at():
    found = average_fisher_sensitivity(network_of(3), vectors(), column=0)
    np.testing.assert_array_equal(found.values, [[1], [1]])


# -- identities


def test_features_do_not_depend_on_their_units():
    # h -> c h in column 1, layer 1, undone in everything that reads it: the same function, and normalised activations.
    network = network_of(2)
    before = average_fisher_sensitivity(network, vectors(), actions="expected")
    with torch.no_grad():
        network.columns[0].layers[0].weight.mul_(50)
        network.columns[0].layers[0].bias.mul_(50)
        network.columns[0].layers[1].weight.div_(50)
        network.columns[1].laterals["2"].project_layer.weight.div_(50)
    after = average_fisher_sensitivity(network, vectors(), actions="expected")
    np.testing.assert_allclose(after.values, before.values, rtol=1e-4)


def test_batches_do_not_matter_and_the_network_stays_as_it_was():
    network = network_of()
    network.freeze()
    fingerprints = network.fingerprints()
    whole = average_fisher_sensitivity(network, vectors(50), actions="expected", batch_size=50)
    parts = average_fisher_sensitivity(network, vectors(50), actions="expected", batch_size=7)
    for a, b in zip(whole.raw, parts.raw, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)
    network.verify()
    assert network.fingerprints() == fingerprints
    assert all(parameter.grad is None for parameter in network.parameters())


def test_shares_by_hand():
    fisher = [np.array([1.0, 0, 0]), np.array([3.0, 2, 0])]
    np.testing.assert_allclose(feature_shares(fisher), [[0.25, 0, np.nan], [0.75, 1, np.nan]])
    np.testing.assert_allclose(layer_shares(fisher), [0.125, 0.875])
    # Other widths have no common feature m.
    np.testing.assert_allclose(layer_shares([np.array([1.0]), np.array([1.0, 2])]), [0.25, 0.75])
    assert np.isnan(layer_shares([np.zeros(2), np.zeros(2)])).all()


def test_json_round_trip():
    found = average_fisher_sensitivity(network_of(), vectors(), tasks=["pong", "zoom"])
    again = Sensitivity.from_json(found.to_json())
    np.testing.assert_allclose(again.values, found.values)
    np.testing.assert_allclose(again.features(0), found.features(0), rtol=1e-4)
    assert (again.layers, again.tasks, again.settings) == (found.layers, found.tasks, found.settings)
    assert found.layers == ("1: dense 4", "2: dense 4")
    for damage in (None, [], {}, found.to_json() | {"values": [[1]]}, found.to_json() | {"method": "x"}):
        with pytest.raises(ValueError, match="not a sensitivity"):
            Sensitivity.from_json(damage)


def test_bad_arguments_are_one_line():
    network = network_of()
    for options, message in [
        ({"actions": "all"}, "actions: expected one of sampled, expected"),
        ({"actions": "expected", "continuous": True}, "needs a feed-forward network with discrete actions"),
        ({"column": 2}, "column: 2 of a network with 2 columns"),
        ({"batch_size": 0}, "batch_size"),
    ]:
        with pytest.raises(ValueError, match=message):
            average_fisher_sensitivity(network, vectors(), **options)
    with pytest.raises(ValueError, match="at least 2"):
        average_fisher_sensitivity(network, vectors(1))


# -- rollouts


def test_a_rollout_is_the_same_for_the_same_seed_and_samples_whole_episodes():
    network = network_of(2, (4,), [{"dense": 4}], outputs=2)
    first, again, other = (
        play(network, "CartPole-v1", num_episodes=12, num_states=40, num_envs=5, seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.returns, again.returns)
    np.testing.assert_array_equal(first.observations, again.observations)
    assert not np.array_equal(first.observations, other.observations)
    assert len(first.returns) == 12
    assert first.observations.shape == (40, 4)
    np.testing.assert_array_equal(first.returns, first.lengths)  # CartPole pays 1 a step
    # Reset observations lie within 0.05; a uniform sample of whole episodes holds mostly others.
    assert (np.abs(first.observations).max(axis=1) > 0.05).mean() > 0.5


def test_a_recurrent_rollout_gives_sequences_and_the_states_before_them():
    network = network_of(2, (4,), [{"lstm": 3}], outputs=2)
    rollout = play(network, "CartPole-v1", num_episodes=6, num_states=64, sequence_length=8, num_envs=2)
    assert rollout.observations.shape == (8, 8, 4)
    assert rollout.states["h"].shape == (8, 6)
    assert rollout.resets.shape == (8, 8)
    # A sequence that starts an episode starts with a zero state.
    with torch.no_grad():
        whole = play(network, "CartPole-v1", num_episodes=1, num_states=200, sequence_length=4, num_envs=1)
        first, second = whole.observations[0], whole.states["h"][1]
        state = network(torch.as_tensor(first[None])).state
    np.testing.assert_allclose(state["h"][0].numpy(), second, rtol=1e-4)
    average_fisher_sensitivity(network, rollout)


def test_columns_of_different_depth():
    network = ProgressiveNetwork((5,), 2, [{"dense": 4}])
    network.add_column()
    network.add_column([{"dense": 4}, {"dense": 3}], lateral="none")
    found = average_fisher_sensitivity(network, vectors(20))
    np.testing.assert_array_equal(found.values, [[0, 1], [0, 1]])


def test_too_few_steps_for_two_sequences_is_told():
    network = network_of(2, (4,), [{"lstm": 3}], outputs=2)
    rollout = play(network, "CartPole-v1", num_episodes=2, num_states=40, num_envs=2)
    with pytest.raises(ValueError, match="at least 2 sequences \\(num_states counts their steps\\), got 1"):
        average_fisher_sensitivity(network, rollout)


def test_an_episode_that_does_not_end_counts_with_its_return_so_far(monkeypatch, caplog):
    monkeypatch.setattr("rllib_pnn.analysis.rollouts.MAX_EPISODE_STEPS", 5)
    rollout = play(network_of(1, (4,), [{"dense": 4}], outputs=2), "CartPole-v1", num_episodes=4, num_envs=2)
    assert rollout.returns.tolist() == [5] * 4
    assert "did not end" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # gymnasium's own destructor
def test_environments_that_do_not_fit_are_one_line():
    network = network_of(1, (4,), [{"dense": 4}], outputs=3)
    with pytest.raises(ValueError, match=r"CartPole-v1: observations .* the network was made for"):
        play(network, "CartPole-v1")
    with pytest.raises(ValueError, match="can't be made"):
        play(network, "NoSuchEnv-v0")
    with pytest.raises(ValueError, match="can't be made"):
        play(network, "CartPole-v1", {"nonsense": 1})


@pytest.mark.parametrize(("normalize", "low"), [(True, -1.5), (False, -0.5)])
def test_box_actions_are_scaled_if_the_policy_was_trained_so(normalize, low):
    space = gym.spaces.Box(np.array([-2.0], np.float32), np.array([0.0], np.float32))
    given = np.array([[-0.5], [3.0], [-9.0]], np.float32)
    np.testing.assert_allclose(_within(given, space, normalize), [[low], [0], [-2]])
