"""Pruning: what is known to carry nothing goes, constants are folded in, nothing stored changes."""

import numpy as np
import pytest
import torch
from test_fisher import CONV, network_of, vectors, zero

from rllib_pnn.analysis.prune import _cut, _rank, _recorded, _Unit, prune_laterals
from rllib_pnn.analysis.rollouts import Rollout


def states(observations, **recurrent):
    return Rollout(
        np.ones(1), np.ones(1), observations, recurrent.get("states", {}), recurrent.get("resets", np.empty((0, 0)))
    )


def images(n=40):
    return np.random.default_rng(1).integers(0, 255, (n, 2, 10, 10), dtype=np.uint8)


def lateral_parameters(network, column):
    module = network.columns[column]
    total = sum(p.numel() for p in module.laterals.parameters())
    for number, layer in enumerate(module.layers, start=1):
        if isinstance(layer, torch.nn.LSTM) and str(number) in module.laterals:
            total += layer.weight_ih_l0.shape[0] * module.laterals[str(number)].projected_width
    return total


@pytest.mark.parametrize("lateral", ["adapter", "linear"])
def test_dead_sources_go_and_nothing_else_changes(lateral):
    network = network_of(2, lateral=lateral)
    # Units 0 and 1 of layer 1 are dead in the first column.
    with torch.no_grad():
        network.columns[0].layers[0].bias[:2] = -1e3
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = prune_laterals(network, states(vectors()), max_kl=1e-12)
    cut = {c.lateral: c for c in found.laterals}
    assert cut["2"].cut_inputs == 2
    assert cut["value"].cut_inputs == 0
    assert found.parameters == lateral_parameters(network, 1)
    assert found.parameters_left < found.parameters
    obs = torch.as_tensor(vectors(seed=9))
    torch.testing.assert_close(found.network(obs).logits, network(obs).logits)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_cut_units_are_replaced_by_their_mean():
    # Features that are constant carry nothing, however loud: their mean must go into the next bias.
    network = network_of(2)
    with torch.no_grad():
        network.columns[0].layers[0].weight[:2] = 0
        network.columns[0].layers[0].bias[:2] = 3.0
    found = prune_laterals(network, states(vectors()), max_kl=1e-9)
    assert {c.lateral: c.cut_inputs for c in found.laterals}["2"] >= 2
    obs = torch.as_tensor(vectors(seed=9))
    torch.testing.assert_close(found.network(obs).logits, network(obs).logits, rtol=1e-3, atol=1e-3)
    weight = found.network.columns[1].laterals["2"].project_layer.weight
    assert (weight[:, :2] == 0).all()


def test_everything_goes_where_the_policy_ignores_the_laterals():
    network = network_of(2)
    zero(network, 1, "laterals.2.out", "laterals.policy.out")
    found = prune_laterals(network, states(vectors()), max_kl=0.0)
    assert [c.parameters_left for c in found.laterals if c.lateral != "value"] == [0, 0]
    value = next(c for c in found.laterals if c.lateral == "value")
    assert value.parameters_left == value.parameters
    assert found.kl == 0


@pytest.mark.parametrize(
    "network",
    [network_of(3, (2, 10, 10), CONV), network_of(3, (2, 10, 10), CONV, lateral="linear"), network_of(3)],
    ids=["conv", "conv-linear", "dense"],
)
def test_the_budget_holds_and_more_budget_cuts_more(network):
    observations = images() if network.given_observation_shape != (5,) else vectors(40)
    everything = prune_laterals(network, states(observations), max_kl=np.inf, batch_size=16)
    assert all(c.parameters_left == 0 for c in everything.laterals if c.lateral != "value")
    budgets = 0.1 * everything.kl, 0.6 * everything.kl
    small, large = (prune_laterals(network, states(observations), max_kl=b, batch_size=16) for b in budgets)
    assert 0 <= small.kl <= budgets[0] < large.kl <= budgets[1]
    assert large.parameters_left < small.parameters_left < small.parameters
    assert small.parameters == lateral_parameters(network, 2)
    # The KL as stated, by hand.
    obs = torch.as_tensor(observations)
    with torch.no_grad():
        old, new = network(obs).logits.log_softmax(-1), large.network(obs).logits.log_softmax(-1)
    assert large.kl == pytest.approx(float((old.exp() * (old - new)).sum(-1).mean()), rel=1e-4)


def test_recurrent_columns():
    network = network_of(2, (5,), [{"dense": 4}, {"lstm": 3}, {"dense": 3}])
    rng = np.random.default_rng(0)
    rollout = states(
        rng.normal(size=(12, 7, 5)).astype(np.float32),
        states={key: np.zeros((12, 6), dtype=np.float32) for key in "hc"},
        resets=np.zeros((12, 7), dtype=bool),
    )
    found = prune_laterals(network, rollout, max_kl=0.05)
    assert found.parameters == lateral_parameters(network, 1)
    assert 0 < found.share_removed < 1
    assert found.kl <= 0.05
    # Lateral 2 feeds the LSTM, whose input weights hold U.
    assert {c.lateral for c in found.laterals} == {"2", "3", "policy", "value"}


def test_the_ranking_is_the_squared_effect_of_a_cut_to_first_order():
    network = network_of(2)
    observations = vectors(30)
    batch = {"obs": torch.as_tensor(observations)}
    units = {(u.lateral, u.is_input, u.index): u for u in _rank(network, 1, [batch], False)}
    laterals = dict(network.columns[1].laterals.items())
    with torch.no_grad(), _recorded(laterals) as seen:
        log_pi = network(batch["obs"]).logits.log_softmax(-1)
    sources = seen["2", True]
    step = 1e-3
    for m in range(4):
        moved = sources.clone()
        moved[:, m] += step * (sources[:, m].mean() - sources[:, m])
        with torch.no_grad():
            new = network(batch["obs"], sources={1: moved, 2: seen["policy", True]}).logits.log_softmax(-1)
        effect = ((new - log_pi) / step).double()
        expected = (log_pi.double().exp() * effect.square()).sum(-1).mean()
        assert units["2", True, m].fisher == pytest.approx(float(expected), rel=0.05, abs=1e-4)
        assert units["2", True, m].mean == pytest.approx(float(sources[:, m].mean()), rel=1e-5)


def test_a_pruned_network_can_be_stored_and_is_another_column(tmp_path):
    from rllib_pnn.network import ColumnStore

    network = network_of(2)
    network.freeze()
    pruned = prune_laterals(network, states(vectors()), max_kl=0.05).network
    assert pruned.fingerprints()[0] == network.fingerprints()[0]
    assert pruned.fingerprints()[1] != network.fingerprints()[1]
    store = ColumnStore(tmp_path)
    for index in range(2):
        store.save_column(pruned, index, task=str(index))
    obs = torch.as_tensor(vectors())
    torch.testing.assert_close(store.load()(obs).logits, pruned(obs).logits)


def test_an_adapter_with_nothing_coming_in_is_folded_away_whole():
    network = network_of(2)
    cut = _cut(network, 1, [_Unit("2", True, m, 0.0, 0.5) for m in range(4)])
    lateral = cut.columns[1].laterals["2"]
    assert all((p == 0).all() for p in (lateral.project_layer.weight, lateral.project_layer.bias, lateral.out.weight))


def test_an_earlier_column_is_pruned_without_the_later_ones():
    found = prune_laterals(network_of(3), states(vectors()), column=1)
    assert found.network.num_columns == 2
    assert found.column == 1


def test_bad_arguments_are_one_line():
    network = network_of(2)
    with pytest.raises(ValueError, match="column 0 has no laterals"):
        prune_laterals(network, states(vectors()), column=0)
    with pytest.raises(ValueError, match="max_kl"):
        prune_laterals(network, states(vectors()), max_kl=-1)
    with pytest.raises(ValueError, match="at least 2 states"):
        prune_laterals(network, states(vectors(1)))
