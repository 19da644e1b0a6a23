"""Laterals against eq. 1 and eq. 2 written out by hand and in slow numpy (promise 3)."""

from __future__ import annotations

import numpy as np
import paper_network
import pytest
import torch
from torch import Tensor, nn

from rllib_pnn.network.adapter import Adapter, ChannelsLastProduct, LinearLateral, ScaledProduct


def parameters_of(module: nn.Module) -> dict[str, np.ndarray]:
    """A lateral's parameters under the names that `paper_network.symbols` looks for, as layer 2 of column 1."""
    return {f"columns.1.laterals.2.{n}": p.detach().numpy() for n, p in module.named_parameters()}


def randomise(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)


def side_by_side(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, dim=1)


def test_linear_lateral_worked_out_by_hand() -> None:
    lateral = LinearLateral([2, 1], nn.Linear(3, 2, bias=False))
    lateral.out.weight.data = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 10.0]])
    # Sources [1, 2] and [4]: U [1, 2, 4] = [1 + 4 + 12, -2 + 40].
    torch.testing.assert_close(lateral(torch.tensor([[1.0, 2.0, 4.0]])), torch.tensor([[17.0, 38.0]]))


def test_adapter_worked_out_by_hand() -> None:
    adapter = Adapter([2, 1], 2, nn.Linear(2, 1, bias=False), scale=1.0, convolutional=False)
    adapter.scale.data = torch.tensor([0.5, 2.0])
    adapter.project_layer.weight.data = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0]])
    adapter.project_layer.bias.data = torch.tensor([0.25, 1.0])
    adapter.out.weight.data = torch.tensor([[10.0, 100.0]])
    # alpha * h = [1, 2, 6]; V gives [9 + .25, -5 + 1]; g cuts the second to 0; U gives 92.5.
    torch.testing.assert_close(adapter(torch.tensor([[2.0, 4.0, 3.0]])), torch.tensor([[92.5]]))


@pytest.mark.parametrize("widths", [[3], [3, 3], [3, 3, 3, 3], [2, 5, 1]])
@pytest.mark.parametrize("kind", ["linear", "adapter"])
def test_dense_lateral_equals_the_paper(kind: str, widths: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    sources = [torch.randn(4, width, generator=generator) for width in widths]
    if kind == "linear":
        lateral: nn.Module = LinearLateral(widths, nn.Linear(sum(widths), 6, bias=False))
    else:
        lateral = Adapter(widths, 5, nn.Linear(5, 6, bias=False), scale=0.1, convolutional=False)
    randomise(lateral)
    p = paper_network.symbols(parameters_of(lateral), 1, 2)
    expected = [paper_network.lateral({"units": 6}, p, [s[b].numpy() for s in sources]) for b in range(4)]
    np.testing.assert_allclose(lateral(side_by_side(sources)).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 0), (4, 2, 0), (3, 2, 1)])
@pytest.mark.parametrize("widths", [[3], [3, 3], [2, 5, 1]])
@pytest.mark.parametrize("kind", ["linear", "adapter"])
def test_convolutional_lateral_equals_the_paper(
    kind: str, widths: list[int], kernel: int, stride: int, padding: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    sources = [torch.randn(2, width, 7, 6, generator=generator) for width in widths]
    into = sum(widths) if kind == "linear" else 4
    out = nn.Conv2d(into, 5, kernel, stride, padding, bias=False)
    lateral: nn.Module = (
        LinearLateral(widths, out) if kind == "linear" else Adapter(widths, 4, out, scale=0.1, convolutional=True)
    )
    randomise(lateral)
    layer = {"kernel": kernel, "stride": stride, "padding": padding}
    p = paper_network.symbols(parameters_of(lateral), 1, 2)
    expected = [paper_network.lateral(layer, p, [s[b].numpy() for s in sources]) for b in range(2)]
    np.testing.assert_allclose(lateral(side_by_side(sources)).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_dense_lateral_reads_maps_flattened_column_by_column() -> None:
    """A dense layer on top of convolutions: alpha must meet all pixels of its own column's maps and no others."""
    maps = [torch.randn(1, 2, 3, 3), torch.randn(1, 4, 3, 3)]
    adapter = Adapter([18, 36], 7, nn.Linear(7, 3, bias=False), scale=0.1, convolutional=False)
    randomise(adapter)
    p = paper_network.symbols(parameters_of(adapter), 1, 2)
    expected = paper_network.lateral({"units": 3}, p, [m[0].numpy() for m in maps])
    for layout in (torch.contiguous_format, torch.channels_last):
        found = adapter(side_by_side(maps).contiguous(memory_format=layout))
        np.testing.assert_allclose(found[0].detach().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01])
def test_alpha_starts_at_the_given_scale_for_every_source_column(scale: float) -> None:
    adapter = Adapter([3, 3, 3], 3, nn.Linear(3, 2, bias=False), scale=scale, convolutional=False)
    assert torch.equal(adapter.scale, torch.full((3,), scale))
    assert adapter.scale.requires_grad


@pytest.mark.parametrize("convolutional", [False, True])
def test_gradients_of_alpha_equal_finite_differences(convolutional: bool) -> None:
    out = nn.Conv2d(2, 2, 3, bias=False) if convolutional else nn.Linear(2, 2, bias=False)
    adapter = Adapter([2, 3], 2, out, scale=0.7, convolutional=convolutional).double()
    randomise(adapter)
    sources = torch.randn(2, 5, 4, 4, dtype=torch.float64) if convolutional else torch.randn(2, 5).double()
    adapter(sources).square().sum().backward()
    for j in range(2):
        moved = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                adapter.scale[j] += step
                moved.append(float(adapter(sources).square().sum()))
                adapter.scale[j] -= step
        assert float(adapter.scale.grad[j]) == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("widths", [(3,), (3, 3, 3), (2, 5, 1)])
def test_gradients_of_the_dense_product_equal_autograds_own(widths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    operands = [
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((4, sum(widths)), (len(widths),), (5, sum(widths)), (5,))
    ]
    assert torch.autograd.gradcheck(lambda *given: ScaledProduct.apply(*given, widths), operands)
    upstream = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    sources, scale, weight, bias = operands
    plain = nn.functional.linear(sources * torch.repeat_interleave(scale, torch.tensor(widths)), weight, bias)
    expected = torch.autograd.grad(plain, operands, upstream)
    for wanted in ([0], [1], [2], [3], [0, 1], [1, 2, 3], [0, 1, 2, 3]):
        given = [o.detach().requires_grad_(i in wanted) for i, o in enumerate(operands)]
        found = torch.autograd.grad(ScaledProduct.apply(*given, widths), [given[i] for i in wanted], upstream)
        for i, gradient in zip(wanted, found, strict=True):
            torch.testing.assert_close(gradient, expected[i])


def test_gradients_of_the_channels_last_product_equal_autograds_own() -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = ((4, 5, 6), (3, 5), (3,))  # maps, weight, bias
    operands = [torch.randn(*s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    maps, weight, bias = operands
    out = ChannelsLastProduct.apply(*operands)
    assert out.shape == (4, 6, 3) and out.is_contiguous()
    plain = (weight @ maps + bias.view(-1, 1)).relu().transpose(1, 2)
    torch.testing.assert_close(out, plain)
    assert 0 < (out > 0).sum() < out.numel()
    upstream = torch.randn(4, 6, 3, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad(plain, operands, upstream)
    for wanted in ([0], [1], [2], [1, 2], [0, 1, 2]):
        given = [o.detach().requires_grad_(i in wanted) for i, o in enumerate(operands)]
        found = torch.autograd.grad(ChannelsLastProduct.apply(*given), [given[i] for i in wanted], upstream)
        for i, gradient in zip(wanted, found, strict=True):
            torch.testing.assert_close(gradient, expected[i])


@pytest.mark.parametrize("convolutional", [False, True])
def test_the_first_part_of_a_wider_tensor_gives_the_same_bits(convolutional: bool) -> None:
    """A frozen column reads the first part of what later columns read, which grows with every column."""
    for batch in (1, 3, 16, 80):
        out = nn.Conv2d(12, 4, 3, bias=False) if convolutional else nn.Linear(12, 4, bias=False)
        adapter = Adapter([12, 12], 12, out, scale=0.5, convolutional=convolutional)
        randomise(adapter)
        size = (20, 20) if convolutional else ()
        apart = torch.randn(batch, 24, *size)
        for columns in (3, 7):
            wider = torch.cat([apart, torch.randn(batch, 12 * columns - 24, *size)], dim=1)
            with torch.no_grad():
                assert torch.equal(adapter(wider[:, :24]), adapter(apart))


def test_asking_and_learning_give_the_same_bits() -> None:
    adapter = Adapter([6, 6], 6, nn.Linear(6, 4, bias=False), scale=0.5, convolutional=False)
    randomise(adapter)
    sources = torch.randn(5, 12)
    with torch.no_grad():
        asked = adapter(sources)
    assert torch.equal(adapter(sources), asked)
