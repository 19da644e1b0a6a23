"""The network as a whole: eq. 1 and 2 (promise 3), frozen outputs (1), dependence (2), equal seeds (6), growth."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paper_network
import pytest
import torch
from torch import Tensor, nn

from rllib_pnn.network import ColumnSpec, ColumnStore, ProgressiveNetwork
from rllib_pnn.network.column import HEADS

ROOT = Path(__file__).parent.parent

SPECS: dict[str, tuple[list, tuple[int, ...]]] = {
    "dense": ([{"dense": 5}, {"dense": 4}, {"dense": 3}], (6,)),
    "convolutional": ([{"conv": [3, 3, 2]}, {"conv": [4, 3, 1, 1]}, {"conv": [2, 2]}], (2, 9, 8)),
    "dense on convolutions": ([{"conv": [3, 3, 2]}, {"conv": [2, 2]}, {"dense": 5}], (2, 9, 8)),
}
RECURRENT = [{"conv": [3, 3, 2]}, {"dense": 5}, {"lstm": 4}]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As in every process of a training run; two threads on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(
    num_columns: int, spec: Any = "mlp", shape: tuple[int, ...] = (6,), randomise: bool = True, **kwargs: Any
) -> ProgressiveNetwork:
    """A network whose parameters are all random, biases and alphas too; only the newest column trains."""
    network = ProgressiveNetwork(shape, 4, **{"spec": spec, "seed": 5, **kwargs})
    for k in range(num_columns):
        network.add_column()
        generator = torch.Generator().manual_seed(k)
        with torch.no_grad():
            for parameter in network.columns[k].parameters() if randomise else ():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return network


def observations(network: ProgressiveNetwork, batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, *([3] if network.is_recurrent else []), *network.given_observation_shape)
    if len(network.given_observation_shape) == 3:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return torch.randn(shape, generator=generator)


def train(network: ProgressiveNetwork, steps: int = 3, batch: int = 8, seed: int = 0) -> None:
    """Gradient steps by an optimizer that holds *all* parameters, with momentum and weight decay."""
    optimizer = torch.optim.RMSprop(network.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)
    for step in range(steps):
        logits, value, _ = network(observations(network, batch, seed + step))
        loss = (logits - 1).square().mean() + (value - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def paper_specs(network: ProgressiveNetwork) -> list[list[dict[str, Any]]]:
    names = {"Dense": "units", "LSTM": "cells"}
    return [
        [
            {"kernel": layer.kernel, "stride": layer.stride, "padding": layer.padding}
            if type(layer).__name__ == "Conv"
            else {names[type(layer).__name__]: layer.units}
            for layer in column.layout.spec.layers
        ]
        for column in network.columns
    ]


def check_against_paper(network: ProgressiveNetwork, batch: int = 3, samples: int = 3) -> None:
    obs = observations(network, batch)
    parameters = {n: p.detach().numpy() for n, p in network.named_parameters()}
    specs = paper_specs(network)
    for k in range(network.num_columns):
        collected, (logits, value, _) = network.activations(obs, k)
        # The same by the other ways: learning, asking, with sources from elsewhere.
        others = [network(obs, k), network(obs, k, sources=network.sources(obs, k)[0])]
        with torch.no_grad():
            others += [network(obs, k), network.forward_with_sources(obs, k)[0]]
        for other in others:
            torch.testing.assert_close(other.logits, logits)
            torch.testing.assert_close(other.value, value)
        for b in list(range(batch))[:: max(1, batch // samples)]:
            x = obs[b].double().numpy() * network.input_scale
            h, expected, expected_value = paper_network.network_step(parameters, specs, x, k, [{} for _ in specs])
            for j in range(k + 1):
                for i, tensor in enumerate(collected[j], start=1):
                    np.testing.assert_allclose(
                        tensor[b].detach().numpy(), h[j][i], rtol=1e-4, atol=1e-5, err_msg=f"column {j}, layer {i}"
                    )
            np.testing.assert_allclose(logits[b].detach().numpy(), expected, rtol=1e-4, atol=1e-5)
            assert value[b].item() == pytest.approx(expected_value, rel=1e-4, abs=1e-5)


# -- promise 3: the equations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_columns", [1, 2, 3, 5])
@pytest.mark.parametrize("lateral", ["adapter", "linear"])
@pytest.mark.parametrize("kind", SPECS)
def test_every_column_equals_the_paper(kind: str, lateral: str, num_columns: int) -> None:
    spec, shape = SPECS[kind]
    check_against_paper(make(num_columns, spec, shape, lateral=lateral))


@pytest.mark.parametrize("lateral", ["adapter", "linear"])
def test_heads_without_laterals_equal_the_paper(lateral: str) -> None:
    network = make(3, *SPECS["dense on convolutions"], lateral=lateral, lateral_heads=False)
    assert not any(key in column.laterals for column in network.columns for key in ("policy", "value"))
    check_against_paper(network)


@pytest.mark.parametrize("lateral", ["adapter", "linear"])
def test_columns_of_different_widths_equal_the_paper(lateral: str) -> None:
    network = ProgressiveNetwork((2, 9, 8), 4, SPECS["dense on convolutions"][0], lateral=lateral)
    for width in (3, 5, 2):
        network.add_column([{"conv": [width, 3, 2]}, {"conv": [width + 1, 2]}, {"dense": 2 * width}])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    check_against_paper(network)


def test_the_layout_for_large_batches_equals_the_paper() -> None:
    check_against_paper(make(3, *SPECS["dense on convolutions"]), batch=70)


def test_the_atari_column_equals_the_paper() -> None:
    network = make(2, "atari", (4, 84, 84), randomise=False)
    check_against_paper(network, batch=1)


# -- promise 1: frozen outputs -----------------------------------------------------------------------------------

FROZEN_CASES = [
    ("atari", (4, 84, 84), "adapter", (16, 64)),
    (SPECS["dense on convolutions"][0], (2, 9, 8), "adapter", (1, 3, 16, 64, 320)),
    (SPECS["convolutional"][0], (2, 9, 8), "linear", (1, 16, 320)),
    ("mlp", (6,), "adapter", (1, 16, 320)),
    (RECURRENT, (2, 9, 8), "adapter", (1, 16, 100)),
]


def outputs(network: ProgressiveNetwork, column: int, batches: tuple[int, ...]) -> list[Tensor]:
    """Everything a column computes: logits, values, activations, what later laterals read."""
    found = []
    with torch.no_grad():
        for batch in batches:
            obs = observations(network, batch, seed=batch)
            logits, value, _ = network(obs, column)
            activations, again = network.activations(obs, column)
            found += [logits, value, again.logits, again.value, *(a for layers in activations for a in layers)]
    return [tensor.clone() for tensor in found]


def network_and_inputs(
    kind: str, num_columns: int, batch: int = 5, **settings: Any
) -> tuple[ProgressiveNetwork, Tensor, dict[str, Tensor]]:
    """A network of a kind of `SPECS` or "recurrent", with observations and states for it."""
    spec, shape = SPECS.get(kind, (RECURRENT, (2, 9, 8)))
    network = make(num_columns, spec, shape, **settings)
    state = {key: torch.randn_like(h) for key, h in network.initial_state(batch).items()}
    return network, observations(network, batch), state


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def digest(tensors: list[Tensor]) -> str:
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()


@pytest.mark.parametrize("case", FROZEN_CASES, ids=lambda c: str(c[0])[:30])
def test_a_frozen_column_computes_the_same_bits_for_ever(case: tuple, tmp_path: Path) -> None:
    spec, shape, lateral, batches = case
    network = ProgressiveNetwork(shape, 4, spec, lateral=lateral)
    store = ColumnStore(tmp_path / "columns")
    frozen: list[list[Tensor]] = []
    for k in range(4):
        network.add_column()
        train(network, seed=10 * k)
        # Outputs of the newest column as they were when its training ended: before it is frozen.
        frozen.append(outputs(network, k, batches))
        assert [same(outputs(network, j, batches), frozen[j]) for j in range(k + 1)] == [True] * (k + 1)
    network.freeze()
    for k in range(4):
        store.save_column(network, k, task=f"task {k}")
    loaded = store.load()
    assert loaded.fingerprints() == network.fingerprints()
    for k in range(4):
        assert same(outputs(network, k, batches), frozen[k]), f"column {k} once frozen"
        assert same(outputs(loaded, k, batches), frozen[k]), f"column {k} loaded"
        assert same(outputs(store.load(num_columns=k + 1), k, batches), frozen[k]), f"column {k} as the newest"


FRESH_PROCESS = """
import sys, torch
from test_progressive_network import digest, outputs
from rllib_pnn.network import ColumnStore
torch.set_num_threads(1)
network = ColumnStore(sys.argv[1]).load()
for k in range(network.num_columns):
    print(digest(outputs(network, k, (1, 16, 80))))
"""


def test_a_fresh_process_computes_the_same_bits(tmp_path: Path) -> None:
    network = ProgressiveNetwork((4, 84, 84), 4, "atari")
    store = ColumnStore(tmp_path)
    for k in range(3):
        network.add_column()
        train(network, steps=1)
        network.freeze()
        store.save_column(network, k, task=f"task {k}")
    expected = [digest(outputs(network, k, (1, 16, 80))) for k in range(3)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", FRESH_PROCESS, str(tmp_path)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert found.stdout.split() == expected, found.stderr[-2000:]


def test_a_state_dict_that_would_change_a_frozen_column_is_refused() -> None:
    network = make(2)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(state)
    state["columns.1.value.bias"] += 1
    network.load_state_dict(state)
    state["columns.0.value.bias"] += 1
    with pytest.raises(ValueError, match=r"columns\.0\.value\.bias: a frozen column"):
        network.load_state_dict(state)
    network.verify()
    with torch.no_grad():
        network.columns[0].policy.bias += 1
    with pytest.raises(ValueError, match="column 0: a frozen column changed"):
        network.verify()


# -- promise 2: dependence ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lateral", ["adapter", "linear"])
@pytest.mark.parametrize("kind", [*SPECS, "recurrent"])
def test_a_column_depends_on_every_layer_of_every_earlier_column(kind: str, lateral: str) -> None:
    spec, shape = SPECS.get(kind, (RECURRENT, (2, 9, 8)))
    network = make(4, spec, shape, lateral=lateral)
    obs = observations(network, 16)
    for k in range(1, 4):
        plain = network(obs, k)
        for j in range(k):
            for layer in range(1, len(spec) + 1):

                def louder(column: int, number: int, h: Tensor, at: tuple = (j, layer)) -> Tensor:
                    if (column, number) != at:
                        return h
                    return h + 5 * torch.randn(h.shape, generator=torch.Generator().manual_seed(1))

                changed = network(obs, k, transform=louder)
                assert not torch.equal(changed.logits, plain.logits), f"column {k} ignores layer {layer} of column {j}"
                assert not torch.equal(changed.value, plain.value), f"column {k}: value ignores {layer} of {j}"


@pytest.mark.parametrize("kind", [*SPECS, "recurrent"])
def test_gradients_flow_from_a_column_to_every_earlier_activation(kind: str) -> None:
    spec, shape = SPECS.get(kind, (RECURRENT, (2, 9, 8)))
    network = make(3, spec, shape)
    leaves: dict[tuple[int, int], Tensor] = {}

    def leaf(column: int, layer: int, h: Tensor) -> Tensor:
        leaves[column, layer] = h if h.requires_grad else h.requires_grad_()
        return leaves[column, layer]

    activations, output = network.activations(observations(network, 4), 2, transform=leaf)
    assert [len(layers) for layers in activations] == [len(spec)] * 3
    wanted = [leaves[key] for key in sorted(leaves)]
    for gradient in torch.autograd.grad(output.logits.sum() + output.value.sum(), wanted):
        assert gradient.abs().sum() > 0


def test_columns_without_laterals_ignore_the_earlier_ones() -> None:
    network = make(2, lateral="none")
    obs = observations(network, 4)
    called = []

    def note(column: int, layer: int, h: Tensor) -> Tensor:
        called.append(column)
        return h

    network(obs, transform=note)
    assert set(called) == {1}
    assert network.columns[1].reads == []
    assert network.sources(obs)[0] == {}


@pytest.mark.parametrize(("lateral", "silent"), [("adapter", "alpha"), ("adapter", "U"), ("linear", "U")])
@pytest.mark.parametrize("kind", SPECS)
def test_with_zero_laterals_a_column_is_a_single_column(kind: str, lateral: str, silent: str) -> None:
    spec, shape = SPECS[kind]
    network = make(3, spec, shape, lateral=lateral)
    column = network.columns[2]
    with torch.no_grad():
        for part in column.laterals.values():
            if silent == "U":
                part.out.weight.zero_()
            else:
                part.scale.zero_()
                part.project_layer.bias.zero_()
    single = make(1, spec, shape)
    own = {f"columns.0.{n}": p for n, p in column.state_dict().items() if not n.startswith("laterals")}
    single.load_state_dict(own)
    for batch in (1, 5, 70):
        obs = observations(network, batch)
        assert torch.equal(network(obs).logits, single(obs).logits)
        assert torch.equal(network(obs).value, single(obs).value)


@pytest.mark.parametrize("kind", [*SPECS, "recurrent"])
def test_only_the_newest_column_gets_gradients(kind: str) -> None:
    spec, shape = SPECS.get(kind, (RECURRENT, (2, 9, 8)))
    network = make(3, spec, shape)
    logits, value, _ = network(observations(network, 4))
    (logits.square().sum() + value.sum()).backward()
    for k, column in enumerate(network.columns):
        for name, parameter in column.named_parameters():
            assert (parameter.grad is not None) == (k == 2), f"column {k}: {name}"
            assert k != 2 or parameter.grad.abs().sum() > 0 or "layers.0" in name, f"column {k}: {name}"
    newest = {id(p) for p in network.columns[2].parameters()}
    assert {id(p) for p in network.trainable_parameters()} == newest
    assert not network(observations(network, 4), 1).logits.requires_grad


# -- sources: frozen activations as data -------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 16, 70])
@pytest.mark.parametrize("lateral", ["adapter", "linear"])
@pytest.mark.parametrize("kind", [*SPECS, "recurrent"])
def test_sources_given_are_bit_equal_to_sources_computed(kind: str, lateral: str, batch: int) -> None:
    network, obs, state = network_and_inputs(kind, 4, batch, lateral=lateral)
    for k in range(4):
        plain = network(obs, k, state)
        sources, moved = network.sources(obs, k, state)
        assert not any(s.requires_grad for s in sources.values())
        assert set(sources) == set(network.columns[k].reads)
        reused = network(obs, k, moved, sources=sources)
        assert torch.equal(plain.logits, reused.logits)
        assert torch.equal(plain.value, reused.value)
        for key in plain.state:
            assert torch.equal(plain.state[key], reused.state[key])


@pytest.mark.parametrize("kind", [*SPECS, "recurrent"])
def test_outputs_and_sources_in_one_pass_are_bit_equal(kind: str) -> None:
    network, obs, state = network_and_inputs(kind, 4)
    with torch.no_grad():
        for k in range(4):
            output, sources = network.forward_with_sources(obs, k, state)
            expected = network(obs, k, state)
            assert same(
                [output.logits, output.value, *output.state.values()],
                [expected.logits, expected.value, *expected.state.values()],
            )
            wanted, _ = network.sources(obs, k, state)
            assert sources.keys() == wanted.keys()
            assert same(list(sources.values()), list(wanted.values()))


@pytest.mark.parametrize("kind", [*SPECS, "recurrent"])
def test_a_head_alone_is_bit_equal_and_the_other_is_not_computed(kind: str) -> None:
    network, obs, state = network_and_inputs(kind, 3)
    newest = network.columns[-1]
    called: list[nn.Module] = []
    for head in HEADS:
        getattr(newest, head).register_forward_hook(lambda module, *_: called.append(module))
        newest.laterals[head].register_forward_hook(lambda module, *_: called.append(module))
    both = network(obs, state=state)
    assert len(called) == 4
    for head in HEADS:
        for one_pass in (False, True):
            called.clear()
            if one_pass:
                output, _ = network.forward_with_sources(obs, state=state, heads=(head,))
            else:
                output = network(obs, state=state, heads=(head,))
            assert called == [getattr(newest, head), newest.laterals[head]]
            expected = both._replace(**{"value" if head == "policy" else "logits": torch.empty(0)})
            assert same([*output[:2], *output.state.values()], [*expected[:2], *expected.state.values()])


def test_a_frozen_column_computes_the_same_bits_with_and_without_gradients() -> None:
    network = ProgressiveNetwork((4, 84, 84), 4, "atari")
    for _ in range(3):
        network.add_column()
    obs = observations(network, 20)
    with torch.no_grad():
        before = network(obs)
    network.freeze()
    with torch.no_grad():
        assert torch.equal(network(obs).logits, before.logits)
    assert torch.equal(network(obs).logits, before.logits)
    for k in range(2):
        learning = network(obs, k)
        with torch.no_grad():
            assert torch.equal(network(obs, k).logits, learning.logits)


def test_sources_are_kept_by_layer_and_can_be_cut_into_minibatches() -> None:
    network = make(3, *SPECS["dense on convolutions"])
    obs = observations(network, 12)
    sources, _ = network.sources(obs)
    assert {layer: tuple(s.shape) for layer, s in sources.items()} == {
        1: (12, 6, 4, 3),
        2: (12, 4, 3, 2),
        3: (12, 10),
    }
    rows = torch.tensor([7, 2, 11])
    part = network(obs[rows], sources={layer: s[rows] for layer, s in sources.items()})
    torch.testing.assert_close(part.logits, network(obs).logits[rows])


def test_recurrent_sources_keep_batch_and_time_apart() -> None:
    network = make(3, RECURRENT, (2, 9, 8))
    sources, _ = network.sources(observations(network, 4))
    assert {layer: tuple(s.shape) for layer, s in sources.items()} == {
        1: (4, 3, 6, 4, 3),
        2: (4, 3, 10),
        3: (4, 3, 8),
    }


def test_recurrent_states_of_columns_above_the_one_computed_stay() -> None:
    network = make(3, RECURRENT, (2, 9, 8))
    obs = observations(network, 4)
    state = {key: torch.randn_like(h) for key, h in network.initial_state(4).items()}
    after = network(obs, 1, state).state
    for key in ("h", "c"):
        assert torch.equal(after[key][:, 8:], state[key][:, 8:])
        assert not torch.isclose(after[key][:, :8], state[key][:, :8]).any()


@pytest.mark.parametrize("wrong", ["missing", "shape"])
def test_sources_of_another_observation_or_column_are_refused(wrong: str) -> None:
    network = make(3, *SPECS["dense on convolutions"])
    obs = observations(network, 4)
    sources, _ = network.sources(obs)
    if wrong == "missing":
        del sources[2]
        words = r"sources: layer 2 is missing; column 2 reads layers \[1, 2, 3\]"
    else:
        sources = network.sources(obs, 1)[0]
        words = r"sources: layer 1: expected \(4, 6, 4, 3\), got \(4, 3, 4, 3\)"
    with pytest.raises(ValueError, match=words):
        network(obs, sources=sources)


# -- observations ------------------------------------------------------------------------------------------------


def test_maps_last_observations_equal_maps_first() -> None:
    first = make(2, SPECS["dense on convolutions"][0], (4, 9, 8))
    last = ProgressiveNetwork((9, 8, 4), 4, SPECS["dense on convolutions"][0], seed=5)
    last.add_column()
    last.add_column()
    for k in range(2):
        with torch.no_grad():
            for a, b in zip(last.columns[k].parameters(), first.columns[k].parameters(), strict=True):
                a.copy_(b)
    assert last.observation_shape == (4, 9, 8) and last.given_observation_shape == (9, 8, 4)
    for batch in (3, 70):
        obs = observations(first, batch)
        torch.testing.assert_close(last(obs.permute(0, 2, 3, 1)).logits, first(obs).logits)
        assert torch.equal(last(obs.permute(0, 2, 3, 1)).logits, last(obs.permute(0, 2, 3, 1).contiguous()).logits)


def test_a_column_that_learns_sees_the_same_pixels() -> None:
    """Bytes take another way into memory there."""
    network = make(2, *SPECS["dense on convolutions"])
    for batch in (1, 31, 70):
        obs = observations(network, batch)
        learned = network(obs).logits
        with torch.no_grad():
            torch.testing.assert_close(learned, network(obs).logits)
        assert torch.equal(learned, network(obs.float()).logits)


def test_bytes_are_scaled_to_one_and_vectors_are_not() -> None:
    image = make(1, *SPECS["convolutional"])
    assert image.input_scale == pytest.approx(1 / 255)
    scaled = make(1, *SPECS["convolutional"], input_scale=1.0)
    obs = observations(image, 3)
    torch.testing.assert_close(image(obs).logits, scaled(obs.float() / 255).logits)
    assert make(1).input_scale == 1.0
    vector = make(1, input_scale=0.25)
    obs = observations(vector, 3)
    torch.testing.assert_close(vector(obs).logits, make(1)(obs * 0.25).logits)


def test_observations_of_other_types_are_taken_as_numbers() -> None:
    network = make(2)
    obs = torch.arange(12).reshape(2, 6)
    assert torch.equal(network(obs.double()).logits, network(obs.float()).logits)
    assert torch.equal(network(obs).logits, network(obs.float()).logits)


@pytest.mark.parametrize("shape", [(2, 4, 9, 8), (2, 9, 8), (2, 3, 2, 9, 8)])
def test_observations_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    network = make(1, *SPECS["convolutional"])
    with pytest.raises(ValueError, match=r"obs: expected \(B, 2, 9, 8\), got \(2, "):
        network(torch.zeros(shape))


# -- growth ------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_columns_whatever_happened_before() -> None:
    def fingerprints(seed: int, disturb: bool) -> list[str | None]:
        network = ProgressiveNetwork((6,), 4, "mlp", seed=seed)
        for k in range(3):
            if disturb:
                torch.manual_seed(100 + k)
                torch.rand(k + 1)
            network.add_column()
        network.freeze()
        return network.fingerprints()

    state = torch.get_rng_state()
    assert fingerprints(3, False) == fingerprints(3, False)
    assert torch.equal(torch.get_rng_state(), state)
    assert fingerprints(3, False) == fingerprints(3, True)
    assert len({*fingerprints(3, False), *fingerprints(4, False)}) == 6


def test_columns_of_neighbouring_seeds_share_no_weights() -> None:
    weights = []
    for seed in range(4):
        network = ProgressiveNetwork((6,), 4, "mlp", seed=seed)
        for _ in range(4):
            network.add_column()
            weights.append(network.columns[-1].layers[0].weight.detach().numpy().tobytes())
    assert len(set(weights)) == 16


def test_a_later_task_does_not_change_how_a_column_starts() -> None:
    """Column 2 starts alike whatever columns 0 and 1 have learned."""
    trained, untrained = (ProgressiveNetwork((6,), 4, "mlp") for _ in range(2))
    for _ in range(2):
        trained.add_column()
        train(trained)
        untrained.add_column()
    trained.add_column()
    untrained.add_column()
    for a, b in zip(trained.columns[2].parameters(), untrained.columns[2].parameters(), strict=True):
        assert torch.equal(a, b)


def test_adding_freezes_and_counts() -> None:
    network = ProgressiveNetwork((6,), 4, "mlp")
    assert (network.num_columns, network.fingerprints(), network.freeze()) == (0, [], None)
    assert network.trainable_parameters() == []
    assert network.add_column() == 0
    assert network.fingerprints() == [None]
    assert network.add_column() == 1
    first, newest = network.fingerprints()
    assert first is not None and len(first) == 64 and newest is None
    assert network.freeze() == network.fingerprints()[1]
    assert network.trainable_parameters() == []


@pytest.mark.parametrize("column", [2, -3])
def test_a_column_that_is_not_there(column: int) -> None:
    with pytest.raises(ValueError, match=f"column {column}: the network has 2 columns"):
        make(2)(torch.zeros(1, 6), column)


def test_a_network_without_columns_says_so() -> None:
    with pytest.raises(ValueError, match=r"the network has 0 columns; call add_column\(\) first"):
        ProgressiveNetwork((6,), 4, "mlp")(torch.zeros(1, 6))


def test_baselines_2_and_3_start_from_a_copy_and_leave_the_original_alone() -> None:
    for trains in ("heads", "all"):
        network = make(1, *SPECS["dense on convolutions"])
        train(network)
        assert network.add_column(copy_of=0, trains=trains) == 1
        obs = observations(network, 5)
        assert torch.equal(network(obs, 1).logits, network(obs, 0).logits)
        assert network.columns[1].num_sources == 0
        original, before = network.fingerprints()[0], {n: p.clone() for n, p in network.columns[1].named_parameters()}
        train(network)
        network.verify()
        assert network.fingerprints() == [original, None]
        for name, parameter in network.columns[1].named_parameters():
            moved = not torch.equal(parameter, before[name])
            assert moved == (trains == "all" or name.startswith(("policy", "value"))), name


def test_a_copy_of_a_column_with_laterals_reads_the_same_columns() -> None:
    network = make(3)
    network.add_column(copy_of=1)
    assert network.columns[3].num_sources == 1
    obs = observations(network, 5)
    assert torch.equal(network(obs, 3).logits, network(obs, 1).logits)
    assert set(network.sources(obs)[0]) == set(network.sources(obs, 1)[0])


def test_baseline_4_reads_a_random_frozen_column() -> None:
    network = ProgressiveNetwork((6,), 4, "mlp")
    network.add_column()
    random = network.freeze()
    network.add_column()
    train(network)
    assert network.fingerprints()[0] == random
    obs = observations(network, 5)
    plain = network(obs).logits
    changed = network(obs, transform=lambda column, layer, h: h + (column == 0))
    assert not torch.equal(plain, changed.logits)


def test_columns_may_have_other_laterals_than_the_networks() -> None:
    network = make(2)
    network.add_column(lateral="none")
    network.add_column(lateral="linear")
    assert [column.num_sources for column in network.columns] == [0, 1, 0, 3]
    assert network(observations(network, 3)).logits.shape == (3, 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"spec": [{"dense": 8}]}, "the number of layers and the map sizes must agree"),
        ({"lateral": "adaptor"}, "lateral: expected one of adapter, linear, none, got 'adaptor'"),
        ({"copy_of": 7}, "column 7: the network has 1 columns"),
        ({"copy_of": 0, "lateral": "none"}, "give neither spec nor lateral"),
        ({"trains": "head"}, "trained part: expected 'all' or 'heads', got 'head'"),
    ],
)
def test_a_refused_column_leaves_the_network_as_it_was(arguments: dict, words: str) -> None:
    network = make(1)
    with pytest.raises(ValueError, match=words):
        network.add_column(**arguments)
    assert network.num_columns == 1
    assert network.fingerprints() == [None]
    assert network.trainable_parameters()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"observation_shape": (84, 84)}, "observation_shape: expected"),
        ({"observation_shape": (0,)}, "observation_shape: expected"),
        ({"observation_shape": ()}, "observation_shape: expected"),
        ({"num_outputs": 0}, "num_outputs: expected at least 1, got 0"),
        ({"lateral": "both"}, "lateral: expected one of"),
        ({"lateral_scale": float("nan")}, "lateral_scale: expected a finite number"),
        ({"input_scale": float("inf")}, "input_scale: expected a finite number"),
    ],
)
def test_arguments_of_the_network_are_checked(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ProgressiveNetwork(**{"observation_shape": (6,), "num_outputs": 4, "spec": "mlp", **arguments})


def test_a_column_from_elsewhere_must_fit() -> None:
    network = make(2)
    donor = make(3)
    donor.freeze()
    assert network.append_column(donor.columns[2]) == 2
    assert network.fingerprints()[2] == donor.fingerprints()[2]
    assert None not in network.fingerprints()
    assert network.trainable_parameters() == []
    with pytest.raises(ValueError, match=r"column 1: its laterals read 2 columns"):
        make(1).append_column(donor.columns[2])
    with pytest.raises(ValueError, match=r"column 1: made for observations \(6,\) and 4 outputs"):
        make(1, shape=(7,)).append_column(donor.columns[0])
    with pytest.raises(
        ValueError, match=r"column 1: its laterals read 1 columns \['mlp'\], the network has \['custom'\]"
    ):
        make(1, [{"dense": 8}, {"dense": 8}]).append_column(donor.columns[1])


def test_specs_of_the_network_are_parsed() -> None:
    network = ProgressiveNetwork((4, 84, 84), 4)
    assert network.spec == ColumnSpec.parse("atari")
    assert not network.is_recurrent
