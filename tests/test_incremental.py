"""Layers 1 and 2 where an observation differs from the last one: the bits of the ordinary way, and less work."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import SHAPE, SMALL, make
from torch import Tensor

from rllib_pnn.network import ProgressiveNetwork, incremental
from rllib_pnn.network.incremental import IncrementalLayers, pays
from rllib_pnn.network.patches import any_in_patch, changed_patches, positions_above, row_starts, strip_of_patches

pytestmark = pytest.mark.usefixtures("one_thread", "few_positions_pay")


def frames(count: int, batch: int = 6, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    """Of a game: something moves over what stays; now and then an environment shows something new."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (batch, *shape), dtype=np.uint8)
    found = []
    for t in range(count):
        images = images.copy()
        for n in range(batch):
            y, x = rng.integers(0, shape[1] - 2), rng.integers(0, shape[2] - 2)
            images[n, rng.integers(0, shape[0]), y : y + 2, x : x + 2] = rng.integers(0, 256, (2, 2))
        if t % 5 == 4:
            images[t % batch] = rng.integers(0, 256, shape)
        found.append(torch.from_numpy(images))
    return found


def everything(network: ProgressiveNetwork, obs: Tensor, use: IncrementalLayers | None) -> list[Tensor]:
    with torch.no_grad():
        obs = obs.unsqueeze(1) if network.is_recurrent else obs
        output, sources = network.forward_with_sources(obs, incremental=use)
        return [t.clone() for t in (output.logits, output.value, *sources.values())]


def agree(network: ProgressiveNetwork, obs: Tensor, use: IncrementalLayers) -> bool:
    pairs = zip(everything(network, obs, use), everything(network, obs, None), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def nudge(network: ProgressiveNetwork) -> None:
    with torch.no_grad():
        for parameter in network.trainable_parameters():
            parameter.add_(0.01)


class Counter:
    """How often layers 1 and 2 were computed as a whole, and at how many positions otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.whole, self.positions = 0, 0
        self.whole_above, self.positions_above = 0, 0
        convolved, strip = incremental._convolved, incremental.strip_of_patches
        above, starts = incremental._above, incremental._starts

        def count_whole(*args: Any) -> Tensor:
            self.whole += 1
            return convolved(*args)

        def count_positions(pixels: Any, where: Any, *args: Any) -> Tensor:
            self.positions += len(where)
            return strip(pixels, where, *args)

        def count_whole_above(*args: Any) -> Tensor:
            self.whole_above += 1
            return above(*args)

        def count_positions_above(image: Any, *args: Any) -> Tensor:
            self.positions_above += len(image)
            return starts(image, *args)

        monkeypatch.setattr(incremental, "_convolved", count_whole)
        monkeypatch.setattr(incremental, "strip_of_patches", count_positions)
        monkeypatch.setattr(incremental, "_above", count_whole_above)
        monkeypatch.setattr(incremental, "_starts", count_positions_above)


@pytest.mark.parametrize(
    ("spec", "shape", "num_columns"),
    [
        (SMALL, SHAPE, 1),
        (SMALL, SHAPE, 4),
        ("atari", (4, 84, 84), 3),
        ("labyrinth", (4, 84, 84), 2),
        ([{"conv": [4, 2, 1]}, {"conv": [4, 2]}], (1, 9, 7), 3),  # not a multiple of anything
        ([{"conv": [4, 16, 8]}, {"dense": 8}], (2, 41, 40), 3),  # layer 2 projects vectors
    ],
)
@pytest.mark.parametrize("lateral", ["adapter", "linear", "none"])
def test_bits_are_those_of_the_ordinary_way(spec: Any, shape: tuple[int, ...], num_columns: int, lateral: str) -> None:
    network = make(num_columns, spec, shape, lateral=lateral)
    use = IncrementalLayers()
    for t, obs in enumerate(frames(12, shape=shape)):
        if t % 4 == 3:
            nudge(network)
        assert agree(network, obs, use), t


def test_only_what_changed_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    network, use = make(3), IncrementalLayers()
    obs = frames(1)[0]
    everything(network, obs, use)
    counter = Counter(monkeypatch)
    everything(network, obs.clone(), use)
    assert (counter.whole, counter.positions, counter.whole_above, counter.positions_above) == (0, 0, 0, 0)
    moved = obs.clone()
    moved[2, 1, 13, 17] += 1  # read by the four kernels at rows 2 and 3, columns 3 and 4
    everything(network, moved, use)  # verdicts, which are found now, compute some more
    counter.positions = counter.positions_above = 0
    moved[2, 1, 13, 17] += 1
    everything(network, moved, use)
    assert (counter.whole, counter.positions) == (0, 4)
    # Those are read by layer 2's kernels at rows 0 to 3, columns 1 to 4.
    assert (counter.whole_above, counter.positions_above) == (0, 16)
    assert agree(network, moved, use)


def test_layer_2_is_computed_as_a_whole_where_most_of_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    network, use = make(2), IncrementalLayers()
    obs = frames(1)[0]
    everything(network, obs, use)
    counter = Counter(monkeypatch)
    moved = obs.clone()
    moved[:, 0, 13:22:8, 13:22:8] += 1  # 16 of 64 positions of layer 1, all of layer 2
    everything(network, moved, use)
    assert (counter.whole, counter.whole_above, counter.positions_above) == (0, 2, 0)
    assert counter.positions >= 16 * len(obs)
    assert agree(network, moved, use)


def test_new_weights_of_the_newest_column_cost_its_own_layer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    network, use = make(3), IncrementalLayers()
    first, second = frames(2)
    everything(network, first, use)
    counter = Counter(monkeypatch)
    nudge(network)
    assert agree(network, second, use)
    assert counter.whole == 1


@pytest.mark.parametrize(
    "name",
    ["weight", "bias", "project_weight", "project_bias", "scale", "weight_above", "bias_above", "lateral_above"],
)
def test_every_parameter_that_counts_is_looked_at(name: str) -> None:
    network, use = make(2), IncrementalLayers()
    obs = frames(1)[0]
    everything(network, obs, use)
    column = network.columns[-1]
    adapter = column.laterals["2"]
    parameter = {
        "weight": column.layers[0].weight,
        "bias": column.layers[0].bias,
        "project_weight": adapter.project_layer.weight,
        "project_bias": adapter.project_layer.bias,
        "scale": adapter.scale,
        "weight_above": column.layers[1].weight,
        "bias_above": column.layers[1].bias,
        "lateral_above": adapter.out.weight,
    }[name]
    parameter.data.add_(0.5)  # which torch does not count as a change
    assert agree(network, obs, use)


def test_a_column_that_was_trained_before_it_froze() -> None:
    network, use = make(2), IncrementalLayers()
    first, second = frames(2)
    everything(network, first, use)
    nudge(network)
    network.freeze()
    assert agree(network, second, use)


def test_growth_and_another_number_of_environments() -> None:
    network, use = make(1), IncrementalLayers()
    for t, obs in enumerate(frames(12)):
        if t in (4, 8):
            network.add_column()
        assert agree(network, obs[: 6 - t % 3], use), t


def test_sources_alone_and_then_the_newest_column_again(monkeypatch: pytest.MonkeyPatch) -> None:
    network, use = make(3), IncrementalLayers()
    counter = Counter(monkeypatch)
    for t, obs in enumerate(frames(9)):
        if t % 3 == 2:
            found, _ = network.sources(obs, incremental=use)
            wanted, _ = network.sources(obs)
            assert all(torch.equal(found[n], wanted[n]) for n in wanted)
        assert agree(network, obs, use), t
    # At the start (or as one) and after `sources`, which the newest column has missed.
    assert counter.whole <= 3 + 3


def test_what_sources_gives_stays_valid() -> None:
    network, use = make(3), IncrementalLayers()
    first, second = frames(2)
    everything(network, first, use)
    given, _ = network.sources(first, incremental=use)
    kept = {n: tensor.clone() for n, tensor in given.items()}
    everything(network, second, use)
    assert all(torch.equal(given[n], kept[n]) for n in kept)


def test_given_sources_are_used() -> None:
    network, use = make(2), IncrementalLayers()
    first, second = frames(2)
    everything(network, first, use)
    given, _ = network.sources(second)
    with torch.no_grad():
        found = network(second, sources=given, incremental=use).logits
        assert torch.equal(found, network(second).logits)
        zeros = {n: torch.zeros_like(tensor) for n, tensor in given.items()}
        # Layer 2's adapter has read what it knows of the sources by itself.
        assert not torch.equal(network(second, sources=zeros, incremental=use).logits, found)


def test_noise_is_given_up_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    network, use = make(2), IncrementalLayers()
    rng = np.random.default_rng(0)
    counter = Counter(monkeypatch)
    asked = 40
    looked = []
    monkeypatch.setattr(
        incremental, "changed_patches", lambda *args: looked.append(changed_patches(*args)) or looked[-1]
    )
    for _ in range(asked):
        assert agree(network, torch.from_numpy(rng.integers(0, 256, (6, *SHAPE), dtype=np.uint8)), use)
    assert counter.positions == 0 and 1 < len(looked) < asked / 6
    for obs in frames(80):
        assert agree(network, obs, use)
    assert counter.positions > 0


def test_it_is_done_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = 400  # of layer 1 of the `atari` column
    assert pays(int(0.09 * 32 * positions), 32 * positions, 1)  # Pong
    assert not pays(int(0.15 * 32 * positions), 32 * positions, 1)
    assert pays(int(0.2 * 32 * positions), 32 * positions, 2)
    assert not pays(int(0.3 * 32 * positions), 32 * positions, 2)
    assert pays(int(0.4 * 32 * positions), 32 * positions, 8)
    assert not pays(int(0.6 * 32 * positions), 32 * positions, 8)
    assert not pays(0, 8 * positions, 1)
    # Where it can't, nothing is compared or kept.
    monkeypatch.setattr(incremental, "pays", pays)
    monkeypatch.setattr(incremental, "changed_patches", None)
    network, use = make(1), IncrementalLayers()
    assert all(agree(network, obs, use) for obs in frames(3))
    assert use._seen is None


def test_where_bits_differ_it_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    network, use = make(2), IncrementalLayers()
    monkeypatch.setattr(incremental, "_verdict", lambda *_: False)
    monkeypatch.setattr(incremental, "_read_strip", None)
    assert all(agree(network, obs, use) for obs in frames(3))


def test_where_bits_of_layer_2_differ_it_is_computed_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    network, use = make(2), IncrementalLayers()
    verdict = incremental._verdict
    monkeypatch.setattr(
        incremental, "_verdict", lambda agrees, case: agrees is not incremental._rows_agree and verdict(agrees, case)
    )
    monkeypatch.setattr(incremental, "_read_rows", None)
    counter = Counter(monkeypatch)
    assert all(agree(network, obs, use) for obs in frames(3))
    assert counter.whole == 2 and counter.whole_above == 6


def test_verdicts_are_no_formality(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, case = (3, *SHAPE), (8, 4, 256, 1, (12, 5))
    assert incremental._strip_agrees(shape, *case)
    assert incremental._projection_agrees(3, 64, 256, 1, (12, 5, 4), ((1, 12), (2, 7)))
    read, staircase = incremental._read_strip, incremental._staircase
    monkeypatch.setattr(incremental, "_read_strip", lambda *args: read(*args) * (1 + 2**-23))
    assert not incremental._strip_agrees(shape, *case)
    monkeypatch.setattr(incremental, "_staircase", lambda weights: staircase(weights) * (1 + 2**-23))
    assert not incremental._projection_agrees(3, 64, 256, 1, (12, 5, 4), ((1, 12), (2, 7)))
    matrix = incremental._matrix
    for with_bias in (False, True):
        monkeypatch.setattr(incremental, "_matrix", matrix)
        assert incremental._rows_agree(6, (20, 20), (4, 2), 128, 1, 12, 12, with_bias)
        monkeypatch.setattr(incremental, "_matrix", lambda weight: matrix(weight) * (1 + 2**-23))
        assert not incremental._rows_agree(6, (20, 20), (4, 2), 128, 1, 12, 12, with_bias)


@pytest.mark.parametrize(
    "obs",
    [
        torch.rand(2, 4, 36, 36),
        torch.zeros(2, 36, 36, 4, dtype=torch.uint8).permute(0, 3, 1, 2),
        torch.zeros(2, 4, 36, 38, dtype=torch.uint8),
    ],
    ids=["floats", "channels_last", "width"],
)
def test_what_is_not_supported_goes_the_ordinary_way(obs: Tensor) -> None:
    network = make(2, shape=tuple(obs.shape[1:]))
    use = IncrementalLayers()
    assert use(obs, network.columns[:1], network.columns[1]) is None
    assert agree(network, obs, use)


@pytest.mark.parametrize("spec", [[{"dense": 4}, {"dense": 4}], [{"conv": [4, 3, 2]}], [{"conv": [4, 4, 2, 1]}]])
def test_layers_that_are_not_supported(spec: Any) -> None:
    network, use = make(2, spec), IncrementalLayers()
    obs = frames(1)[0]
    assert use(obs, network.columns[:1], network.columns[1]) is None
    assert agree(network, obs, use)


def test_no_effect_where_gradients_are_recorded() -> None:
    network, use = make(2), IncrementalLayers()

    def gradients(obs: Tensor, use: IncrementalLayers | None) -> tuple[Tensor, ...]:
        output = network(obs, incremental=use)
        return torch.autograd.grad(output.logits.sum() + output.value.sum(), network.trainable_parameters())

    for obs in frames(3):
        everything(network, obs, use)
        assert all(torch.equal(a, b) for a, b in zip(gradients(obs, use), gradients(obs, None), strict=True))


@pytest.mark.parametrize(("kernel", "stride"), [(8, 4), (4, 2), (3, 1), (8, 8), (16, 8), (2, 1)])
def test_changed_patches_against_a_loop(kernel: int, stride: int) -> None:
    rng = np.random.default_rng(kernel)
    before = rng.integers(0, 256, (3, 2, 19, 24), dtype=np.uint8)
    pixels = before.copy()
    for _ in range(4):
        pixels[tuple(rng.integers(0, n) for n in pixels.shape)] += 1
    high, wide = (19 - kernel) // stride + 1, (24 - kernel) // stride + 1
    wanted = [
        (n * high + y) * wide + x
        for n in range(3)
        for y in range(high)
        for x in range(wide)
        if (pixels != before)[n, :, y * stride : y * stride + kernel, x * stride : x * stride + kernel].any()
    ]
    assert changed_patches(pixels, before, kernel, stride).tolist() == wanted


@pytest.mark.parametrize(("kernel", "stride"), [(8, 4), (3, 1), (5, 2)])
def test_a_strip_holds_the_patches(kernel: int, stride: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 19, 24), dtype=np.uint8)
    unfolded = F.unfold(torch.from_numpy(pixels).float(), kernel, stride=stride)  # (B, C * kernel * kernel, positions)
    where = np.array([0, 7, unfolded.shape[2], 3 * unfolded.shape[2] - 1])
    strip = strip_of_patches(pixels, where, kernel, stride)
    assert strip.shape == (1, 2, kernel, kernel * 256)
    for i, index in enumerate(where):
        patch = unfolded[index // unfolded.shape[2], :, index % unfolded.shape[2]].view(2, kernel, kernel)
        assert torch.equal(strip[0, :, :, i * kernel : (i + 1) * kernel], patch)
    assert not strip[..., len(where) * kernel :].any()


@pytest.mark.parametrize(("kernel", "stride"), [(4, 2), (3, 1), (3, 2), (2, 3), (5, 5), (1, 1)])
def test_positions_above_against_a_convolution(kernel: int, stride: int) -> None:
    rng = np.random.default_rng(kernel)
    flags = rng.random((3, 9, 7)) < 0.05
    wanted = F.conv2d(torch.from_numpy(flags).float().unsqueeze(1), torch.ones(1, 1, kernel, kernel), stride=stride)
    wanted = wanted[:, 0].numpy() > 0
    assert np.array_equal(any_in_patch(flags, kernel, stride), wanted)
    image, position = positions_above(np.flatnonzero(flags), 3, (9, 7), kernel, stride)
    assert np.array_equal(image * wanted[0].size + position, np.flatnonzero(wanted))
    starts = row_starts((9, 7), kernel, stride)
    pixels = torch.arange(63.0).view(1, 1, 9, 7)
    patches = F.unfold(pixels, kernel, stride=stride)[0].view(kernel, kernel, -1)
    assert np.array_equal(starts, patches[:, 0].T.numpy())
