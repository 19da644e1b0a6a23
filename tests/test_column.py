"""A single column: its layers against slow numpy, LSTM states over time, freezing and initialisation."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import paper_network
import pytest
import torch

from rllib_pnn.network import ColumnSpec, ProgressiveNetwork
from rllib_pnn.network.column import Column, ColumnLayout, layer_shapes


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As in every process of a training run; two threads on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layout(spec: str | list = "mlp", shape: tuple[int, ...] = (6,), sources: int = 0) -> ColumnLayout:
    parsed = ColumnSpec.parse(spec)
    return ColumnLayout(shape, 3, parsed, "adapter", True, 0.1, (parsed,) * sources)


def fresh(column_layout: ColumnLayout, seed: int = 0) -> Column:
    return Column.initialised(column_layout, 1.0, torch.Generator().manual_seed(seed))


def test_the_atari_column_has_the_papers_shapes() -> None:
    spec = ColumnSpec.parse("atari")
    assert layer_shapes(spec, (4, 84, 84)) == [(4, 84, 84), (12, 20, 20), (12, 9, 9), (12, 7, 7), (256,)]
    shapes = {name: tuple(p.shape) for name, p in fresh(layout("atari", (4, 84, 84), sources=2)).named_parameters()}
    assert shapes == {
        "layers.0.weight": (12, 4, 8, 8),
        "layers.0.bias": (12,),
        "layers.1.weight": (12, 12, 4, 4),
        "layers.1.bias": (12,),
        "layers.2.weight": (12, 12, 3, 3),
        "layers.2.bias": (12,),
        "layers.3.weight": (256, 588),
        "layers.3.bias": (256,),
        "policy.weight": (3, 256),
        "policy.bias": (3,),
        "value.weight": (1, 256),
        "value.bias": (1,),
        # alpha one a source column, V from the concatenation to the narrower of two layers, U like the layer itself.
        "laterals.2.scale": (2,),
        "laterals.2.project_layer.weight": (12, 24, 1, 1),
        "laterals.2.project_layer.bias": (12,),
        "laterals.2.out.weight": (12, 12, 4, 4),
        "laterals.3.scale": (2,),
        "laterals.3.project_layer.weight": (12, 24, 1, 1),
        "laterals.3.project_layer.bias": (12,),
        "laterals.3.out.weight": (12, 12, 3, 3),
        "laterals.4.scale": (2,),
        "laterals.4.project_layer.weight": (256, 1176),
        "laterals.4.project_layer.bias": (256,),
        "laterals.4.out.weight": (256, 256),
        "laterals.policy.scale": (2,),
        "laterals.policy.project_layer.weight": (256, 512),
        "laterals.policy.project_layer.bias": (256,),
        "laterals.policy.out.weight": (3, 256),
        "laterals.value.scale": (2,),
        "laterals.value.project_layer.weight": (256, 512),
        "laterals.value.project_layer.bias": (256,),
        "laterals.value.out.weight": (1, 256),
    }


@pytest.mark.parametrize(
    ("spec", "width"),
    [
        ([{"conv": [6, 3]}, {"conv": [4, 3]}], 4),
        ([{"conv": [4, 3]}, {"conv": [6, 3]}], 4),
        ([{"dense": 6}, {"dense": 4}], 4),
        ([{"dense": 4}, {"dense": 6}], 4),
        ([{"dense": 6}, {"lstm": 4}], 4),
        ([{"dense": 4}, {"lstm": 6}], 4),
        ([{"conv": [2, 3]}, {"dense": 100}], 72),  # 2 maps of 6 x 6
    ],
)
def test_v_projects_to_the_narrower_of_two_layers(spec: list, width: int) -> None:
    column = fresh(layout(spec, (1, 8, 8) if "conv" in spec[0] else (5,), sources=3))
    lateral = column.laterals["2"]
    assert lateral.projected_width == width
    assert len(lateral.project_layer.weight) == width
    reads = column.layers[1].input_size if "lstm" in spec[1] else lateral.out.weight.shape[1]
    assert reads == width + (spec[0]["dense"] if "lstm" in spec[1] else 0)


@pytest.mark.parametrize(
    ("spec", "shape", "words"),
    [
        ("atari", (6,), ["layer 1", "convolution", "vector", "mlp"]),
        ("atari", (4, 20, 84), ["layer 3", "3x3", "1x9"]),
        ([{"conv": [3, 9]}], (1, 8, 8), ["layer 1", "9x9", "8x8"]),
    ],
)
def test_a_specification_that_does_not_fit_the_observation_is_refused(
    spec: str | list, shape: tuple[int, ...], words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        ProgressiveNetwork(shape, 3, spec)
    for word in words:
        assert word in str(caught.value)


def test_initial_weights_are_orthogonal_and_biases_zero() -> None:
    column = fresh(layout([{"dense": 32}, {"dense": 16}, {"lstm": 8}], sources=2))
    for name, parameter in column.named_parameters():
        if "bias" in name:
            assert not parameter.any(), name
        elif name.endswith("scale"):
            assert torch.equal(parameter, torch.full((2,), 0.1)), name
    for name, gain in {
        "layers.0.weight": math.sqrt(2),
        "layers.1.weight": math.sqrt(2),
        "layers.2.weight_hh_l0": 1.0,
        "laterals.2.project_layer.weight": math.sqrt(2),
        "laterals.2.out.weight": math.sqrt(2),
        "policy.weight": 0.01,
        "value.weight": 1.0,
    }.items():
        weight = column.get_parameter(name).detach()
        weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
        torch.testing.assert_close(weight @ weight.T, gain**2 * torch.eye(len(weight)), atol=1e-4, rtol=0)


def test_initialisation_neither_reads_nor_moves_global_random_state_and_ignores_threads() -> None:
    before = torch.get_num_threads()
    spec = layout("atari", (4, 84, 84), sources=1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        one = fresh(spec)
        torch.set_num_threads(2)
        two = fresh(spec)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.compute_fingerprint() == two.compute_fingerprint() != fresh(spec, seed=1).compute_fingerprint()


def lstm_network(num_columns: int, spec: list, lateral: str = "adapter", shape: tuple[int, ...] = (6,)):
    network = ProgressiveNetwork(shape, 3, spec, lateral=lateral, input_scale=0.5)
    for _ in range(num_columns):
        network.add_column()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return network


LSTM_SPECS = {
    "dense, lstm": [{"dense": 5}, {"lstm": 4}],
    "lstm, lstm, dense": [{"lstm": 4}, {"lstm": 3}, {"dense": 5}],
    "conv, dense, lstm": [{"conv": [3, 3, 2]}, {"dense": 5}, {"lstm": 4}],
    "conv, lstm": [{"conv": [3, 3, 2]}, {"lstm": 4}],
}


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("lateral", ["adapter", "linear"])
@pytest.mark.parametrize("num_columns", [1, 2, 3])
@pytest.mark.parametrize("kind", LSTM_SPECS)
def test_lstm_columns_equal_slow_numpy_over_time(kind: str, num_columns: int, lateral: str, with_resets: bool) -> None:
    spec = LSTM_SPECS[kind]
    shape = (2, 6, 5) if "conv" in kind else (6,)
    network = lstm_network(num_columns, spec, lateral, shape)
    B, T = 3, 5
    generator = torch.Generator().manual_seed(4)
    obs = torch.randn(B, T, *shape, generator=generator)
    resets = (torch.rand(B, T, generator=generator) < 0.4) if with_resets else torch.zeros(B, T, dtype=torch.bool)
    if with_resets:
        assert resets.any() and not resets.all()
    width = sum(column.state_width for column in network.columns)
    state = {key: torch.randn(B, width, generator=generator) for key in ("h", "c")}
    logits, value, after = network(obs, state=state, resets=resets if with_resets else None)

    paper_spec = []
    for layer in ColumnSpec.parse(spec).layers:
        paper_spec.append(
            {"kernel": layer.kernel, "stride": layer.stride, "padding": layer.padding}
            if hasattr(layer, "kernel")
            else {"cells" if type(layer).__name__ == "LSTM" else "units": layer.units}
        )
    parameters = {n: p.detach().numpy() for n, p in network.named_parameters()}
    lstms = [(i, layer["cells"]) for i, layer in enumerate(paper_spec, start=1) if "cells" in layer]
    for b in range(B):
        states, start = [], 0
        for _ in range(num_columns):
            states.append({})
            for i, cells in lstms:
                cut = slice(start, start := start + cells)
                states[-1][i] = tuple(state[key][b, cut].double().numpy() for key in ("h", "c"))
        for t in range(T):
            if resets[b, t]:
                states = [{i: (0 * h, 0 * c) for i, (h, c) in column.items()} for column in states]
            x = obs[b, t].double().numpy() * 0.5
            _, expected, expected_value = paper_network.network_step(
                parameters, [paper_spec] * num_columns, x, num_columns - 1, states
            )
            np.testing.assert_allclose(logits[b, t].detach().numpy(), expected, rtol=1e-4, atol=1e-5)
            assert value[b, t].item() == pytest.approx(expected_value, rel=1e-4, abs=1e-5)
        for n, key in enumerate(("h", "c")):
            expected_state = np.concatenate([column[i][n] for column in states for i, _ in lstms])
            np.testing.assert_allclose(after[key][b].detach().numpy(), expected_state, rtol=1e-4, atol=1e-5)


def test_a_rollout_step_by_step_equals_the_whole_sequence() -> None:
    network = lstm_network(2, LSTM_SPECS["dense, lstm"])
    obs = torch.randn(3, 6, 6)
    logits, _, after = network(obs)
    state = network.initial_state(3)
    for t in range(6):
        step, _, state = network(obs[:, t : t + 1], state=state)
        torch.testing.assert_close(step[:, 0], logits[:, t])
    torch.testing.assert_close(state, after)


def test_gradients_reach_back_through_time_but_not_across_a_reset() -> None:
    network = lstm_network(1, LSTM_SPECS["dense, lstm"])
    obs = torch.randn(1, 5, 6, requires_grad=True)
    resets = torch.zeros(1, 5, dtype=torch.bool)
    resets[0, 3] = True
    network(obs, resets=resets).logits[0, 4].sum().backward()
    reached = obs.grad[0].abs().sum(1) > 0
    assert reached.tolist() == [False, False, False, True, True]


def test_initial_states() -> None:
    network = lstm_network(3, LSTM_SPECS["lstm, lstm, dense"])
    state = network.initial_state(2)
    assert {k: v.shape for k, v in state.items()} == {"h": (2, 21), "c": (2, 21)}
    assert not state["h"].any()
    assert network.initial_state()["c"].shape == (21,)
    vector = ProgressiveNetwork((6,), 3, "mlp")
    vector.add_column()
    assert vector.initial_state(2) == {}


def test_a_recurrent_network_says_which_shape_it_wants() -> None:
    network = lstm_network(1, LSTM_SPECS["dense, lstm"])
    with pytest.raises(ValueError, match=r"obs: expected \(B, T, 6\), got \(2, 6\)"):
        network(torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"state: expected h of shape \(2, 4\), got \(2, 5\)"):
        network(torch.zeros(2, 3, 6), state={"h": torch.zeros(2, 5), "c": torch.zeros(2, 5)})


# -- freezing ----------------------------------------------------------------------------------------------------


def test_freezing_ends_training_and_drops_left_over_gradients() -> None:
    column = fresh(layout())
    logits, value, _ = column(torch.randn(4, 6), {})
    (logits.sum() + value.sum()).backward()
    optimizer = torch.optim.SGD(column.parameters(), lr=1.0)
    fingerprint = column.freeze()
    optimizer.step()
    assert column.compute_fingerprint() == fingerprint == column.freeze()
    assert column.is_frozen and column.trains == "none"
    assert not any(p.requires_grad for p in column.parameters())
    with pytest.raises(ValueError, match="can't be trained again"):
        column.set_trained_part("all")


def test_the_fingerprint_sees_every_parameter_and_the_layout() -> None:
    column = fresh(layout("mlp", sources=1))
    fingerprint = column.compute_fingerprint()
    for name, parameter in column.named_parameters():
        with torch.no_grad():
            kept = parameter.flatten()[0].clone()
            parameter.view(-1)[0] = torch.nextafter(kept, torch.tensor(9.0))
            assert column.compute_fingerprint() != fingerprint, name
            parameter.view(-1)[0] = kept
    assert column.compute_fingerprint() == fingerprint
    other = copy.deepcopy(column)
    other.input_scale = 0.5
    assert other.compute_fingerprint() != fingerprint
    changed = Column(ColumnLayout((6,), 3, ColumnSpec.parse("mlp"), "adapter", True, 0.2, (ColumnSpec.parse("mlp"),)))
    changed.load_state_dict(column.state_dict())
    assert changed.compute_fingerprint() != fingerprint


def test_a_changed_frozen_column_is_noticed_and_a_load_into_it_refused() -> None:
    column = fresh(layout())
    column.freeze()
    column.verify()
    same = {name: p.clone() for name, p in column.state_dict().items()}
    column.load_state_dict(same)
    same["layers.0.weight"][0, 0] += 1
    with pytest.raises(ValueError, match=r"layers\.0\.weight: a frozen column's parameters can't be overwritten"):
        column.load_state_dict(same)
    column.verify()
    with torch.no_grad():
        column.value.bias += 1
    with pytest.raises(ValueError, match="a frozen column changed"):
        column.verify()


def test_only_the_heads_train_in_baseline_2() -> None:
    column = fresh(layout("mlp", sources=1))
    column.set_trained_part("heads")
    trained = {n for n, p in column.named_parameters() if p.requires_grad}
    heads = {f"{h}.{p}" for h in ("policy", "value") for p in ("weight", "bias")}
    parts = ("scale", "project_layer.weight", "project_layer.bias", "out.weight")
    assert trained == heads | {f"laterals.{h}.{p}" for h in ("policy", "value") for p in parts}
    column.set_trained_part("all")
    assert all(p.requires_grad for p in column.parameters())
    with pytest.raises(ValueError, match="expected 'all' or 'heads', got 'some'"):
        column.set_trained_part("some")


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """An equal tensor that starts 8 bytes past a multiple of 64, as small arrays do in Ray's object store."""
    memory = torch.empty(tensor.numel() + 32)
    start = (-memory.data_ptr() // 4) % 16 + 2
    moved = memory[start : start + tensor.numel()].view(tensor.shape)
    assert moved.data_ptr() % 64 == 8
    return moved.copy_(tensor)


def test_where_parameters_and_observations_lie_in_memory_changes_no_bit() -> None:
    """How a product is rounded depends on where its operands start, and arrays from other processes start anywhere."""
    network = ProgressiveNetwork((6,), 3, [{"dense": 33}, {"dense": 31}])
    network.add_column()
    network.add_column()
    network.freeze()
    moved = copy.deepcopy(network)
    for column in moved.columns:
        for parameter in column.parameters():
            parameter.data = misaligned(parameter.data)
        fingerprint, column.fingerprint = column.fingerprint, None
        assert column.freeze() == fingerprint
        assert all(parameter.data_ptr() % 64 == 0 for parameter in column.parameters())
    for batch in (1, 2, 3, 5):
        obs = torch.randn(batch, 6)
        for k in range(2):
            for seen in (obs, misaligned(obs)):
                assert torch.equal(moved(seen, k).logits, network(obs, k).logits)
                assert torch.equal(moved(seen, k).value, network(obs, k).value)


def test_where_a_recurrent_state_lies_in_memory_changes_no_bit() -> None:
    network = lstm_network(2, [{"dense": 5}, {"lstm": 61}])
    network.freeze()
    obs = torch.randn(1, 3, 6)
    state = {key: torch.randn(1, 122) for key in ("h", "c")}
    moved = {key: misaligned(value) for key, value in state.items()}
    for k in range(2):
        assert torch.equal(network(obs, k, moved).logits, network(obs, k, state).logits)
