"""A rollout's repeated patches, computed once: the numbers and gradients of the ordinary way, with fewer rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import SHAPE, SMALL, make
from torch import Tensor

import rllib_pnn
from rllib_pnn import A3CConfig, ProgressiveNetwork, make_progressive
from rllib_pnn.network import progressive, repeats
from rllib_pnn.network.incremental import IncrementalLayers, StepMaps
from rllib_pnn.network.repeats import ChangingMaps, StepRepeats, find_repeats, lower_layers

STEPS, ENVS = 9, 3
pytestmark = pytest.mark.usefixtures("one_thread", "few_positions_pay")


def rollout(shape: tuple[int, ...] = SHAPE, steps: int = STEPS, envs: int = ENVS) -> Tensor:
    """(T * N, C, H, W): something moves in every environment; one of them shows something new in between."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (envs, *shape), dtype=np.uint8)
    found = []
    for t in range(steps):
        images = images.copy()
        for n in range(envs):
            y, x = rng.integers(0, shape[1] - 1), rng.integers(0, shape[2] - 1)
            images[n, rng.integers(0, shape[0]), y, x] = rng.integers(0, 256)
        if t == 4:
            images[1] = rng.integers(0, 256, shape)
        found.append(images)
    return torch.from_numpy(np.concatenate(found))


def outputs_and_gradients(
    network: ProgressiveNetwork, obs: Tensor, num_envs: int | None, sources: Any = None
) -> list[Tensor]:
    output = network(obs, num_envs=num_envs, sources=sources)
    weights = torch.linspace(-1, 1, output.logits.shape[1])
    loss = (output.logits * weights).sin().sum() + (output.value * torch.linspace(0, 1, len(obs))).cos().sum()
    gradients = torch.autograd.grad(loss, network.trainable_parameters(), allow_unused=True, materialize_grads=True)
    return [output.logits.detach(), output.value.detach(), *gradients]


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 5e-3 * b.norm() + 1e-7  # a ReLU at 0 may fall to either side


def some_repeats(steps: int = 6, envs: int = 2, height: int = 5, width: int = 4) -> StepRepeats:
    is_new = np.random.default_rng(0).random((steps, envs, height, width)) < 0.2
    is_new[0] = True
    return StepRepeats(np.flatnonzero(is_new), (steps, envs, height, width))


def rows_one_by_one(found: StepRepeats) -> np.ndarray:
    """(T, N * H * W): which of the rows stands at each position."""
    steps, width = found.shape[0], int(np.prod(found.shape[1:]))
    index = np.empty((steps, width), int)
    for t in range(steps):
        for p in range(width):
            at = np.searchsorted(found.rows, t * width + p)
            is_new = at < len(found.rows) and found.rows[at] == t * width + p
            index[t, p] = at if is_new else index[t - 1, p]
    return index


def test_spread_and_gather_one_by_one() -> None:
    found = some_repeats()
    index = rows_one_by_one(found)
    rng = np.random.default_rng(1)
    values = rng.normal(size=(len(found.rows), 3))
    assert np.array_equal(found.spread(values), values[index].reshape(-1, 3))
    gradients = rng.normal(size=(*index.shape, 3))
    sums = np.zeros_like(values)
    np.add.at(sums, index, gradients)
    np.testing.assert_allclose(found.gather(gradients.reshape(-1, 3)), sums)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (2, 2), (4, 3)])
def test_the_layer_above_one_by_one(monkeypatch: pytest.MonkeyPatch, kernel: int, stride: int) -> None:
    monkeypatch.setattr(repeats, "MAX_DISTINCT_ABOVE", 1.0)
    found = some_repeats(height=8, width=7)
    steps, envs, height, width = found.shape
    above = found.above(kernel, stride)
    assert above is not None
    upper, read = above
    index = rows_one_by_one(found).reshape(found.shape)
    high, wide = (height - kernel) // stride + 1, (width - kernel) // stride + 1
    assert upper.shape == (steps, envs, high, wide)
    rows, patches = [], []
    for t in range(steps):
        for n in range(envs):
            for y in range(high):
                for x in range(wide):
                    at = np.s_[n, y * stride : y * stride + kernel, x * stride : x * stride + kernel]
                    if t == 0 or (index[t][at] != index[t - 1][at]).any():
                        rows.append(((t * envs + n) * high + y) * wide + x)
                        patches.append(index[t][at].reshape(-1))
    assert upper.rows.tolist() == rows
    assert np.array_equal(read, patches)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (4, 2), (3, 2), (2, 3)])
def test_a_convolution_of_rows_in_both_directions(monkeypatch: pytest.MonkeyPatch, kernel: int, stride: int) -> None:
    monkeypatch.setattr(repeats, "MAX_DISTINCT_ABOVE", 1.0)
    found = some_repeats(height=8, width=7)
    generator = torch.Generator().manual_seed(0)
    operands = [
        torch.randn(shape, generator=generator, requires_grad=True)
        for shape in ((len(found.rows), 3), (5, 3, kernel, kernel), (5,))
    ]
    above = found.above(kernel, stride)
    assert above is not None
    upper, read = above
    wanted = F.conv2d(repeats._Spread.apply(operands[0], found), *operands[1:], stride=stride)
    rows = repeats._Convolution.apply(*operands, read, stride, found)
    result = repeats._Spread.apply(rows.contiguous(), upper)
    torch.testing.assert_close(result, wanted)
    weights = torch.randn(wanted.shape, generator=generator)
    for a, b in zip(*(torch.autograd.grad((r * weights).sum(), operands) for r in (result, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_every_patch_is_among_the_rows() -> None:
    obs, network = rollout(), make(1)
    layer = network.columns[0].layers[0]
    found = find_repeats(obs, ENVS, layer)
    patches = F.unfold(obs.float(), 8, stride=4).transpose(1, 2)  # (T * N, positions, features)
    rows = patches.flatten(0, 1)[torch.from_numpy(found.rows)].numpy()
    assert np.array_equal(found.spread(rows).reshape(patches.shape), patches.numpy())
    assert len(found.rows) < 0.3 * patches[..., 0].numel()


@pytest.mark.parametrize("lateral", ["adapter", "linear", "none"])
@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (SMALL, SHAPE),
        ("atari", (4, 84, 84)),
        ([{"conv": [6, 8, 4]}, {"conv": [5, 3, 2, 1]}, {"dense": 8}], SHAPE),  # layer 2 is padded
        ([{"conv": [6, 8, 4]}, {"dense": 8}], SHAPE),
        ([{"conv": [6, 4, 2]}], (2, 19, 22)),
        ([{"conv": [6, 8, 4]}, {"conv": [5, 6]}, {"dense": 8}], SHAPE),  # a patch of layer 2 hardly ever repeats
    ],
)
@pytest.mark.parametrize("num_columns", [1, 3])
def test_outputs_and_gradients_are_those_of_the_ordinary_way(
    num_columns: int, spec: Any, shape: tuple[int, ...], lateral: str
) -> None:
    network, obs = make(num_columns, spec, shape, lateral=lateral), rollout(shape)
    assert lower_layers_of(network, obs) is not None
    assert_close(outputs_and_gradients(network, obs, ENVS), outputs_and_gradients(network, obs, None))
    if num_columns > 1:
        sources, _ = network.sources(obs)
        shaped = {n: source.unflatten(0, (STEPS, ENVS)) for n, source in sources.items()}
        assert_close(
            outputs_and_gradients(network, obs, ENVS, shaped), outputs_and_gradients(network, obs, None, sources)
        )


def lower_layers_of(network: ProgressiveNetwork, obs: Tensor) -> Any:
    sources, _ = network.sources(obs)
    shaped = {n: source.unflatten(0, (STEPS, ENVS)) for n, source in sources.items()}
    return lower_layers(obs, ENVS, network.columns[-1], shaped, [*network.columns][:-1])


def recorded(network: ProgressiveNetwork, obs: Tensor, incremental: IncrementalLayers) -> dict[int, Any]:
    """The sources of a rollout as an EnvRunner records them: all of them as tensors but layer 1."""
    maps, others = ChangingMaps(), []
    for step in obs.split(ENVS):
        with torch.no_grad():
            _, found = network.forward_with_sources(step, incremental=incremental)
        maps.append(found.pop(1))
        others.append({n: source.clone() for n, source in found.items()})
    return {1: maps} | {n: torch.stack([other[n] for other in others]) for n in others[0]}


def shaped_sources(network: ProgressiveNetwork, obs: Tensor) -> dict[int, Tensor]:
    sources, _ = network.sources(obs)
    return {n: source.unflatten(0, (STEPS, ENVS)) for n, source in sources.items()}


def test_maps_recorded_by_what_changes() -> None:
    network, obs = make(4), rollout()
    found = recorded(network, obs, IncrementalLayers(keeps_changes=True))
    wanted = shaped_sources(network, obs)
    assert found[1].shape == wanted[1].shape
    assert all(torch.equal(found[n], wanted[n]) for n in wanted if n > 1)
    assert torch.equal(found[1].whole(), wanted[1])
    assert torch.equal(found[1].of_envs(slice(1, 3)).whole(), wanted[1][:, 1:3])
    frames = find_repeats(obs, ENVS, network.columns[0].layers[0])
    assert np.array_equal(found[1].repeats().rows, frames.rows)
    assert torch.equal(found[1].rows(), repeats._rows(wanted[1], frames))


@pytest.mark.parametrize("case", ["gave_up", "other_observations", "other_batch", "bits_differ", "starts_again"])
def test_maps_recorded_where_something_comes_between(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, obs = make(3), rollout()
    incremental = IncrementalLayers(keeps_changes=True)
    maps, kinds = ChangingMaps(), set()
    if case == "bits_differ":
        monkeypatch.setattr("rllib_pnn.network.incremental._verdict", lambda *_: False)
    for t, step in enumerate(obs.split(ENVS)):
        if t == 6 and case == "gave_up":
            incremental._skip = 2
        elif t == 6 and case == "other_observations":
            network.sources(step + (torch.arange(36) == 9).to(torch.uint8), incremental=incremental)
        elif t == 6 and case == "other_batch":
            network.sources(step[:1], incremental=incremental)
        elif t == 6 and case == "starts_again":
            first, _ = network.sources(step, incremental=incremental)
            maps, begin = ChangingMaps(), t
            maps.append(first[1])
            continue
        found, _ = network.sources(step, incremental=incremental)
        kinds.add(type(found[1]))
        maps.append(found[1])
    wanted = shaped_sources(network, obs)[1]
    assert torch.equal(maps.whole(), wanted[begin:] if case == "starts_again" else wanted)
    assert kinds == ({StepMaps, Tensor} if case == "gave_up" else {StepMaps})


@pytest.mark.parametrize("lateral", ["adapter", "linear"])
@pytest.mark.parametrize("spec", [SMALL, [{"conv": [6, 8, 4]}, {"dense": 8}]])
def test_recorded_maps_are_sources_as_others_are(spec: Any, lateral: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, obs = make(3, spec, lateral=lateral), rollout()
    found, wanted = recorded(network, obs, IncrementalLayers(keeps_changes=True)), shaped_sources(network, obs)
    ordinary = outputs_and_gradients(network, obs, ENVS, wanted)
    monkeypatch.setattr(repeats, "find_repeats", None)  # it was found when they were recorded
    assert_close(outputs_and_gradients(network, obs, ENVS, found), ordinary)
    monkeypatch.setattr(progressive, "lower_layers", lambda *_: None)
    assert_close(outputs_and_gradients(network, obs, ENVS, found), ordinary)


def test_a_step_s_maps_are_sources_as_others_are() -> None:
    network, obs = make(3), rollout()
    incremental = IncrementalLayers(keeps_changes=True)
    step, other = obs[:ENVS], obs[-ENVS:]
    found, _ = network.sources(step, incremental=incremental)
    network.sources(other, incremental=incremental)  # what the first call gave stays valid
    assert isinstance(found[1], StepMaps)
    for use in (None, incremental):
        with torch.no_grad():
            assert torch.equal(network(step, sources=found, incremental=use).logits, network(step).logits)


def test_recurrent_networks_record_tensors() -> None:
    network = make(2, [{"conv": [6, 8, 4]}, {"lstm": 8}])
    found, _ = network.sources(rollout()[:ENVS].unsqueeze(1), incremental=IncrementalLayers(keeps_changes=True))
    assert isinstance(found[1], Tensor)


def test_how_far_up_it_goes() -> None:
    obs = rollout()
    assert lower_layers_of(make(2), obs).number == 2
    padded = lower_layers_of(make(2, [{"conv": [6, 8, 4]}, {"conv": [5, 3, 2, 1]}, {"dense": 8}]), obs)
    assert padded.number == 1 and padded.projected is not None
    dense = lower_layers_of(make(2, [{"conv": [6, 8, 4]}, {"dense": 8}]), obs)
    assert dense.number == 1 and dense.projected is None
    wide = lower_layers_of(make(2, [{"conv": [6, 8, 4]}, {"conv": [5, 6]}, {"dense": 8}]), obs)
    assert wide.number == 2 and wide.projected is None


def test_layers_are_computed_for_the_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, conv2d = [], F.conv2d
    product, convolution = repeats._product, repeats._Convolution.apply
    monkeypatch.setattr(repeats, "_product", lambda x, *args: rows.append(len(x)) or product(x, *args))
    monkeypatch.setattr(repeats._Convolution, "apply", lambda *args: rows.append(len(args[3])) or convolution(*args))
    network, obs = make(2), rollout()
    sources, _ = network.sources(obs)
    shaped = {n: source.unflatten(0, (STEPS, ENVS)) for n, source in sources.items()}
    called = []
    monkeypatch.setattr(F, "conv2d", lambda *args: called.append(1) or conv2d(*args))
    network(obs, num_envs=ENVS, sources=shaped)
    assert not called
    first, projected, second = rows
    assert first == projected < 0.3 * len(obs) * 64 and second < 0.5 * len(obs) * 36


def test_heads_that_train_alone() -> None:
    network, obs = make(1), rollout()
    network.add_column(copy_of=0, trains="heads")
    assert_close(outputs_and_gradients(network, obs, ENVS), outputs_and_gradients(network, obs, None))


@pytest.mark.parametrize("case", ["noise", "floats", "one_step", "uneven"])
def test_where_it_is_of_no_use_the_ordinary_way_goes_on(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, obs, num_envs = make(2), rollout(), ENVS
    if case == "noise":
        obs = torch.randint(0, 256, obs.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    elif case == "floats":
        obs = obs.float()
    elif case == "one_step":
        num_envs = len(obs)
    asked = []
    monkeypatch.setattr(progressive, "lower_layers", lambda *args: asked.append(lower_layers(*args)) or asked[-1])
    if case == "uneven":
        with pytest.raises(ValueError, match="num_envs: 27 observations are no time steps of 4 environments"):
            network(obs, num_envs=4)
        return
    pairs = zip(outputs_and_gradients(network, obs, num_envs), outputs_and_gradients(network, obs, None), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert asked == [None]


def test_a3c_gradients_of_pong_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    rllib_pnn.register()
    config = A3CConfig().environment("rllib_pnn/PongSoup-v0").debugging(seed=1)
    config.env_runners(num_env_runners=0, num_envs_per_env_runner=4, rollout_fragment_length=6)
    tasks = [{"name": name, "until": {"num_env_steps": 1}} for name in "ab"]
    config = make_progressive(config, tasks=tasks, column="atari")
    runner = config.env_runner_cls(config=config, worker_index=0)
    runner.module.grow({**runner.module.progress, "task_index": 1})
    with torch.no_grad():
        for parameter in runner.module.network.trainable_parameters():
            # Otherwise layer 1 makes 0 of the background, but for rounding, and its ReLU's gradient is 0 or not.
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(0)  # of the actions
    asked = []
    monkeypatch.setattr(progressive, "lower_layers", lambda *args: asked.append(lower_layers(*args)) or asked[-1])
    rollouts = [runner.collect_rollout() for _ in range(2)]
    assert rollouts[0].last_features == {}
    rollout = rollouts[1]
    maps = rollout.features["sources/1"]
    assert isinstance(maps, ChangingMaps)
    wanted_maps, _ = runner.module.network.sources(rollout.observations.flatten(0, 1))
    assert torch.equal(maps.whole().flatten(0, 1), wanted_maps[1])
    assert len(maps.rows()) < 0.4 * maps.whole()[:, :, 0].numel()
    for part in rollout.divide(2):
        found, stats = runner.rollout_gradient(part)
        assert asked[-1].number >= 2
        with monkeypatch.context() as context:
            context.setattr(progressive, "lower_layers", lambda *_: None)
            wanted, wanted_stats = runner.rollout_gradient(part)
        assert np.linalg.norm(found - wanted) < 5e-3 * np.linalg.norm(wanted)
        assert stats == pytest.approx(wanted_stats, rel=5e-3, abs=1e-5)
    runner.stop()


@pytest.mark.parametrize("restart", [False, True])
def test_a3c_records_features_also_where_incremental_evaluation_gives_up(restart: bool) -> None:
    rllib_pnn.register()
    config = A3CConfig().environment("rllib_pnn/PongSoup-v0").debugging(seed=1)
    config.env_runners(num_env_runners=0, num_envs_per_env_runner=2, rollout_fragment_length=5)
    config = make_progressive(config, tasks=[{"name": n, "until": {"num_env_steps": 1}} for n in "ab"], column="atari")
    runner = config.env_runner_cls(config=config, worker_index=0)
    runner.module.grow({**runner.module.progress, "task_index": 1})
    torch.manual_seed(0)  # of the actions
    runner.collect_rollout()
    runner._restart_rollouts = restart
    runner.module._incremental._skip = 3
    rollout = runner.collect_rollout()
    found = rollout.features["sources/1"]
    assert isinstance(found, Tensor if restart else ChangingMaps)
    wanted, _ = runner.module.network.sources(rollout.observations.flatten(0, 1))
    assert torch.equal((found if restart else found.whole()).flatten(0, 1), wanted[1])
    for part in rollout.divide(2):
        assert np.isfinite(runner.rollout_gradient(part)[0]).all()
    runner.stop()
