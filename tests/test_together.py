"""Columns evaluated together give each column's own bits, or are evaluated one by one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rllib_pnn.network import ProgressiveNetwork, together

SMALL = [{"conv": [12, 3, 2]}, {"conv": [4, 2]}, {"dense": 8}]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """One thread, as in every process of a training run; and no case met before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    together._verdicts.clear()
    yield
    together._verdicts.clear()
    torch.set_num_threads(threads)


def make(num_columns: int, spec: object = SMALL, shape: tuple[int, ...] = (4, 12, 11)) -> ProgressiveNetwork:
    network = ProgressiveNetwork(shape, 3, spec)
    for k in range(num_columns):
        network.add_column(input_shift=0.1 * k)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return network


def pixels(network: ProgressiveNetwork, batch: int) -> Tensor:
    shape = (batch, *network.given_observation_shape)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(batch), dtype=torch.uint8)


def everything(network: ProgressiveNetwork, obs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        output, sources = network.forward_with_sources(obs)
        return [t.clone() for t in (output.logits, output.value, *sources.values(), *network.sources(obs)[0].values())]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("batch", [1, 5, 16, 33])
@pytest.mark.parametrize(
    ("spec", "shape", "num_columns"),
    [(SMALL, (4, 12, 11), 5), ("atari", (4, 84, 84), 4), ("pong", (4, 84, 84), 2), ("labyrinth", (4, 84, 84), 4)],
)
def test_together_gives_the_bits_of_one_by_one(
    spec: object, shape: tuple[int, ...], num_columns: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make(num_columns, spec, shape)
    obs = pixels(network, batch)
    if network.is_recurrent:
        obs = obs.unsqueeze(1)
    with monkeypatch.context() as patch:
        patch.setattr(together, "_same_bits", lambda case: False)
        expected = everything(network, obs)
        patch.setattr(together, "_same_bits", lambda case: True)
        forced = everything(network, obs)
    # Forced or not: on the machines known so far the test before use always passes.
    assert equal(forced, expected)
    for _ in range(3):
        assert equal(everything(network, obs), expected)
    assert any(together._verdicts.values()), "nothing was evaluated together"


def test_a_case_is_only_tested_when_it_comes_back() -> None:
    network = make(4)
    everything(network, pixels(network, 3))
    assert set(together._verdicts.values()) == {None}
    everything(network, pixels(network, 3))
    assert set(together._verdicts.values()) == {True}


def test_where_bits_differ_columns_are_evaluated_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which a wider convolution adds in another order."""
    network = make(4)
    obs = pixels(network, 3)
    expected = everything(network, obs)
    real, calls = together._convolve, []

    def other_order(obs: Tensor, weights: list, biases: list, geometry: object) -> Tensor:
        calls.append(len(weights))
        out = real(obs, weights, biases, geometry)
        return out if len(weights) == 1 else out * (1 + 1e-6)

    monkeypatch.setattr(together, "_convolve", other_order)
    for _ in range(3):
        assert equal(everything(network, obs), expected)
    assert set(together._verdicts.values()) == {False}
    assert max(calls) == 4
    tested = len(calls)
    everything(network, obs)
    assert len(calls) == tested, "a refused case was tried again"


def test_together_only_where_it_saves_work() -> None:
    # 12 maps are computed as 16: two or three columns cost the same together, four cost three quarters.
    for num_columns, saves in ((2, False), (3, False), (4, True)):
        together._verdicts.clear()
        network = make(num_columns)
        everything(network, pixels(network, 3))
        assert bool(together._verdicts) == saves


def test_columns_of_other_kernels_are_evaluated_one_by_one() -> None:
    network = ProgressiveNetwork((4, 12, 12), 3, [{"conv": [4, 4, 2]}, {"dense": 8}])
    for kernel, padding in ((4, 0), (6, 1), (4, 0)):
        network.add_column([{"conv": [4, kernel, 2, padding]}, {"dense": 8}])
    everything(network, pixels(network, 3))
    assert not together._verdicts


def test_vectors_have_nothing_to_put_together() -> None:
    network = ProgressiveNetwork((6,), 3, "mlp")
    for _ in range(4):
        network.add_column()
    with torch.no_grad():
        network(torch.randn(3, 6))
    assert not together._verdicts


def test_odd_batches_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "_MAX_CASES", 5)
    network = make(4)
    for batch in range(1, 12):
        everything(network, pixels(network, batch))
        assert len(together._verdicts) <= 5


def test_another_number_of_threads_is_another_case() -> None:
    network = make(4)
    everything(network, pixels(network, 3))
    before = len(together._verdicts)
    torch.set_num_threads(2)
    everything(network, pixels(network, 3))
    assert len(together._verdicts) == 2 * before


def test_a_column_that_learns_is_evaluated_apart_and_its_gradient_is_the_same() -> None:
    network = make(4)
    obs = pixels(network, 6)
    sources, _ = network.sources(obs)
    gradients = []
    for given in (None, sources, sources):
        network.zero_grad(set_to_none=True)
        output = network(obs, sources=given)
        (output.logits.square().sum() + output.value.sum()).backward()
        gradients.append([p.grad.clone() for p in network.trainable_parameters()])
    assert equal(gradients[0], gradients[1]) and equal(gradients[1], gradients[2])


def test_a_transform_sees_and_changes_layers_that_were_computed_together() -> None:
    network = make(5)
    obs = pixels(network, 3)
    plain = everything(network, obs)
    everything(network, obs)

    def silence(column: int, layer: int, h: Tensor) -> Tensor:
        return h * 0 if (column, layer) == (1, 1) else h

    results = []
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            results.append(network(obs, transform=silence).logits.detach())
    torch.testing.assert_close(results[0], results[1])
    assert not torch.allclose(results[0], plain[0])
    assert equal(everything(network, obs), plain)
