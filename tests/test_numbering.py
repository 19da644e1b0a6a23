"""Patches of a batch, numbered once: the numbers and gradients of the ordinary way in any order, with fewer rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from small_networks import SHAPE, make
from torch import Tensor, nn

import rllib_pnn
from rllib_pnn import ProgressiveNetwork
from rllib_pnn.network import progressive, repeats
from rllib_pnn.network.numbering import distinct_share, number_patches
from rllib_pnn.network.repeats import NumberedRepeats
from rllib_pnn.training.array_connectors import NumberPatches
from rllib_pnn.training.rl_module import PATCHES, SOURCES, ProgressiveRLModule

MAPS = [{"conv": [6, 8, 4]}, {"conv": [5, 3, 2]}, {"conv": [4, 2]}]
DEEP = [*MAPS, {"dense": 8}]
pytestmark = pytest.mark.usefixtures("one_thread")


def frames(batch: int = 40, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """(B, C, H, W): a background, a box somewhere, one of two signs in a corner, and one image of its own."""
    rng = np.random.default_rng(3)
    images = np.repeat(rng.integers(0, 256, (1, *shape), dtype=np.uint8), batch, axis=0)
    for image in images:
        y, x = rng.integers(0, shape[1] - 5), rng.integers(0, shape[2] - 5)
        image[:, y : y + 5, x : x + 5] = 200
        image[:, :4, :4] = rng.choice([10, 20])
    images[batch // 2] = rng.integers(0, 256, shape)
    return torch.from_numpy(images)


def layers_of(network: ProgressiveNetwork) -> list[nn.Module]:
    return [*network.columns[-1].layers]


@pytest.mark.parametrize("spec", [MAPS, [{"conv": [3, 4, 2]}, {"conv": [3, 5, 3]}], [{"conv": [3, 6, 1]}]])
def test_equal_numbers_are_equal_patches(spec: Any) -> None:
    obs = frames(12)
    network = make(1, [*spec, {"dense": 4}])
    numbers = number_patches(obs, layers_of(network))
    kernel, stride = 1, 1
    for layer, found in zip(layers_of(network), numbers, strict=False):
        # The pixels that a position sees through all layers below.
        kernel += (layer.kernel_size[0] - 1) * stride
        stride *= layer.stride[0]
        patches = F.unfold(obs.double(), kernel, stride=stride).permute(2, 0, 1)  # (P, B, pixels)
        assert found.shape == (len(obs), len(patches)) and found.dtype == torch.int32 and found.min() >= 0
        for position, column in zip(patches, found.t(), strict=True):
            same = (position[:, None] == position[None]).all(2)
            assert torch.equal(column[:, None] == column[None], same)
    assert len(numbers) == len([layer for layer in layers_of(network) if isinstance(layer, nn.Conv2d)])


@pytest.mark.parametrize("byte", [0, 1, 2, 3])
def test_a_pixel_that_differs_gives_another_number(byte: int) -> None:
    """Wherever it stands in a word, and by whatever power of two it differs."""
    obs = torch.zeros(9, *SHAPE, dtype=torch.uint8)
    for bit in range(8):
        obs[bit + 1, 2, 13, 20 + byte] = 1 << bit
    for numbers in number_patches(obs, layers_of(make(1, DEEP))):
        assert max(len(column.unique()) for column in numbers.t()) == 9


def test_what_can_not_be_numbered() -> None:
    obs = frames()
    assert number_patches(obs.float(), layers_of(make(1))) == []
    assert number_patches(obs, [nn.Conv2d(4, 3, 8, 4, padding=1)]) == []
    assert number_patches(obs, [nn.Conv2d(4, 3, 6, 4)]) == []
    assert number_patches(obs, [nn.Linear(5, 3)]) == []
    padded = make(1, [{"conv": [6, 8, 4]}, {"conv": [5, 3, 2, 1]}, {"dense": 8}])
    assert len(number_patches(obs, layers_of(padded))) == 1


def test_share_of_distinct_patches() -> None:
    numbers = torch.tensor([[0, 1], [2, 3]] * 8)
    assert distinct_share(numbers, 16) == 4 / 32
    assert distinct_share(numbers, 4) == 2 / 8  # every fourth row has the same
    assert distinct_share(torch.arange(32).view(16, 2), 16) == 1.0


def some_repeats() -> tuple[NumberedRepeats, np.ndarray]:
    network = make(1, DEEP)
    numbers = [n.numpy() for n in number_patches(frames(), layers_of(network))]
    height, width = network.columns[0].shapes[1][1:]
    return NumberedRepeats(numbers, (height, width)), numbers[0]


def test_spread_and_gather_one_by_one() -> None:
    found, numbers = some_repeats()
    flat = numbers.reshape(-1)
    assert len(found.rows) == len(np.unique(flat)) and found.share == len(found.rows) / flat.size
    index = [np.flatnonzero(flat[found.rows] == n).item() for n in flat]
    rng = np.random.default_rng(1)
    values = rng.normal(size=(len(found.rows), 3))
    assert np.array_equal(found.spread(values), values[index])
    gradients = rng.normal(size=(len(flat), 3))
    sums = np.zeros_like(values)
    np.add.at(sums, index, gradients)
    np.testing.assert_allclose(found.gather(gradients), sums)


def test_layers_above_read_what_stands_in_their_patch() -> None:
    found, _ = some_repeats()
    values = np.random.default_rng(1).normal(size=(len(found.rows), 2))
    for layer in layers_of(make(1, DEEP))[1:3]:
        kernel, stride = layer.kernel_size[0], layer.stride[0]
        above = found.above(kernel, stride)
        assert above is not None
        upper, read = above
        maps = torch.from_numpy(found.spread(values)).view(*found.shape, 2).permute(0, 3, 1, 2)
        patches = F.unfold(maps, kernel, stride=stride).view(len(maps), 2, kernel**2, -1).permute(0, 3, 2, 1)
        assert np.array_equal(values[read], patches.flatten(0, 1).numpy()[upper.rows])
        found, values = upper, np.random.default_rng(2).normal(size=(len(upper.rows), 2))
    assert found.above(2, 1) is None  # no numbers for it


def results(network: ProgressiveNetwork, obs: Tensor, **kwargs: Any) -> list[Tensor]:
    output = network(obs, **kwargs)
    loss = (output.logits * torch.linspace(-1, 1, output.logits.shape[1])).sin().sum()
    loss = loss + (output.value * torch.linspace(0, 1, len(obs))).cos().sum()
    gradients = torch.autograd.grad(loss, network.trainable_parameters(), allow_unused=True, materialize_grads=True)
    return [output.logits.detach(), output.value.detach(), *gradients]


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("lateral", ["adapter", "linear"])
@pytest.mark.parametrize("num_columns", [1, 2, 3])
def test_outputs_and_gradients_of_the_ordinary_way(num_columns: int, lateral: str, num_layers: int) -> None:
    network, obs = make(num_columns, DEEP, lateral=lateral), frames().flip(0)
    patches = number_patches(obs, layers_of(network))[:num_layers]
    wanted = results(network, obs)
    assert_close(results(network, obs, patches=patches), wanted)
    sources, _ = network.sources(obs)
    assert_close(results(network, obs, patches=patches, sources=sources), wanted)
    assert network.reads_same_patches()
    without = {n: source for n, source in sources.items() if n != 1}  # layer 1's are computed from the patches
    assert_close(results(network, obs, patches=patches, sources=without), wanted)
    part = slice(3, 30)
    cut = {n: source[part] for n, source in without.items()}
    assert_close(
        results(network, obs[part], patches=[p[part] for p in patches], sources=cut), results(network, obs[part])
    )
    with torch.no_grad():
        found, known = network(obs, patches=patches, sources=without), network(obs)
    assert_close([found.logits, found.value], [known.logits, known.value])


def test_heads_alone_are_trained() -> None:
    network, obs = make(1, DEEP), frames()
    network.add_column(copy_of=-1, trains="heads")
    patches = number_patches(obs, layers_of(network))
    assert_close(results(network, obs, patches=patches), results(network, obs))


# Maps of the same sizes as DEEP's, from other pixels: layer 1 reads others, or layer 2 does.
OTHERS = [
    [{"conv": [6, 13, 3]}, {"conv": [5, 3, 2]}, {"conv": [4, 2]}, {"dense": 8}],
    [{"conv": [6, 8, 4]}, {"conv": [5, 4, 2]}, {"conv": [4, 2]}, {"dense": 8}],
]


@pytest.mark.parametrize(("spec", "depth"), zip(OTHERS, (0, 1), strict=True))
def test_sources_that_read_other_pixels(spec: Any, depth: int) -> None:
    """They need not repeat where the column's own patches do."""
    network, obs = make(1, spec), frames()
    network.add_column(DEEP)
    assert network.reads_same_patches() == (depth > 0)
    patches, (sources, _) = number_patches(obs, layers_of(network)), network.sources(obs)
    wanted = results(network, obs)
    assert_close(results(network, obs, patches=patches, sources=sources), wanted)
    assert_close(results(network, obs.repeat(6, 1, 1, 1), num_envs=len(obs)), results(network, obs.repeat(6, 1, 1, 1)))
    del sources[1]
    if depth:
        assert_close(results(network, obs, patches=patches, sources=sources), wanted)
    else:
        with pytest.raises(ValueError, match=r"sources: layer 1 is missing"):
            network(obs, sources=sources, patches=patches)


def test_numbers_of_other_observations_are_refused() -> None:
    network, obs = make(1, DEEP), frames()
    patches = number_patches(obs, layers_of(network))
    with pytest.raises(ValueError, match=r"patches: layer 1: expected \(10, 64\), got \(40, 64\)"):
        network(obs[:10], patches=patches)
    with pytest.raises(ValueError, match=r"patches: this column's layer 1"):
        network(obs.float(), patches=patches)


def test_highest_bits_of_two_rows_do_not_cancel() -> None:
    obs = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    obs[1, 0, :2, 7] = 128
    (numbers,) = number_patches(obs, [nn.Conv2d(1, 2, 16, 8)])
    assert (numbers[0] != numbers[1]).tolist() == [y == x == 0 for y in range(3) for x in range(3)]


class Module(nn.Module):
    """What the connector asks of a module."""

    def __init__(self, numbers: dict[str, Tensor]):
        super().__init__()
        self.numbers, self.asked = numbers, 0

    def unwrapped(self) -> Module:
        return self

    def patch_numbers(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        self.asked += 1
        return self.numbers


def added(connector: NumberPatches, module: Module) -> list[str]:
    batch = {DEFAULT_MODULE_ID: {Columns.OBS: torch.zeros(64, 1)}}
    batch = connector(rl_module={DEFAULT_MODULE_ID: module}, batch=batch)
    return [key for key in batch[DEFAULT_MODULE_ID] if key != Columns.OBS]


def numbers_with(distinct: int) -> Tensor:
    return torch.arange(64 * 10, dtype=torch.int32).view(64, 10) % distinct


def test_the_connector_adds_what_repeats() -> None:
    few, many = numbers_with(70), numbers_with(640)
    module = Module({f"{PATCHES}1": few, f"{PATCHES}2": few, f"{PATCHES}3": many, f"{PATCHES}4": few})
    assert added(NumberPatches(minibatch_size=64), module) == [f"{PATCHES}1", f"{PATCHES}2"]
    assert added(NumberPatches(minibatch_size=None), module) == [f"{PATCHES}1", f"{PATCHES}2"]
    assert added(NumberPatches(minibatch_size=8), Module({f"{PATCHES}1": few})) == []  # 70 of 80 positions
    assert added(NumberPatches(minibatch_size=8), Module({})) == []


def test_the_connector_waits_where_nothing_repeats() -> None:
    connector, module = NumberPatches(minibatch_size=64), Module({f"{PATCHES}1": numbers_with(640)})
    asked = []
    for _ in range(1 + 1 + 1 + 3 + 1 + 7):  # batches with a look at them, and so many without
        assert added(connector, module) == []
        asked.append(module.asked)
    assert asked == [1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3]
    module.numbers = {f"{PATCHES}1": numbers_with(20)}
    assert added(connector, module) == [f"{PATCHES}1"] == added(connector, module)


def config_on_pong(algorithm: str) -> AlgorithmConfig:
    config = PPOConfig() if algorithm == "PPO" else IMPALAConfig()
    config.environment("rllib_pnn/PongSoup-v0", env_config={"variant": "pong"})
    config.env_runners(
        num_env_runners=0,
        num_envs_per_env_runner=8,
        rollout_fragment_length=16,
        gym_env_vectorize_mode="vector_entry_point",
    )
    config.training(train_batch_size_per_learner=128, lr=1e-4)
    if isinstance(config, PPOConfig):
        config.training(minibatch_size=64, num_epochs=2, use_kl_loss=False)
    config.learners(num_learners=0)
    config.reporting(min_time_s_per_iteration=0)
    return config.debugging(seed=0, log_level="ERROR")


@pytest.mark.parametrize(("algorithm", "passes"), [("PPO", 1 + 2 * 2), ("IMPALA", 1)])
def test_training_goes_as_rllibs_own(monkeypatch: pytest.MonkeyPatch, algorithm: str, passes: int) -> None:
    """The same module on RLlib's own EnvRunner, connectors and Learner: the same weights but for rounding.

    Without a shift, with which most of the screen is exactly 0 and rounding decides on which side of a ReLU.
    """
    rllib_pnn.register()
    tasks = [{"name": "pong", "env_config": {"variant": "pong"}, "until": {"num_env_steps": 10**9}}]
    settings = {"tasks": tasks, "column": "atari", "input_shift": 0.3, "evaluation_episodes": 0}
    ours = rllib_pnn.make_progressive(config_on_pong(algorithm), **settings)
    stock = config_on_pong(algorithm).rl_module(rl_module_spec=ours.rl_module_spec)
    asked: list[int] = []
    found = repeats.numbered_lower_layers
    monkeypatch.setattr(progressive, "numbered_lower_layers", lambda *args: asked.append(len(args[1])) or found(*args))
    weights: list[Tensor] = []
    for config, is_numbered in ((ours, True), (stock, False)):
        built = config.build_algo()
        module = built.learner_group._learner.module[DEFAULT_MODULE_ID]
        start = torch.cat([p.detach().flatten() for p in module.parameters()])
        for _ in range(3):
            built.train()
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
        built.stop()
        assert len(asked) >= 3 * passes if is_numbered else not asked  # for values, and every minibatch
        asked.clear()
    change, difference = (weights[1] - start).norm(), (weights[0] - weights[1]).norm()
    assert change > 0.05 and difference < 1e-3 * change


def test_a_second_column_trains_the_same_without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sources' layer 1 is carried along only where patches are not numbered."""
    rllib_pnn.register()
    pong = {"env_config": {"variant": "pong"}}
    tasks = [
        {"name": "a", **pong, "until": {"num_env_steps": 1}},
        {"name": "b", **pong, "until": {"num_env_steps": 10**9}},
    ]
    settings = {"tasks": tasks, "column": "atari", "input_shift": 0.3, "evaluation_episodes": 0}
    seen: list[set[str]] = []
    found = ProgressiveRLModule._forward_train

    def note(self: ProgressiveRLModule, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        seen.append({key for key in batch if key.startswith((PATCHES, SOURCES))})
        return found(self, batch, **kwargs)

    monkeypatch.setattr(ProgressiveRLModule, "_forward_train", note)
    weights: list[Tensor] = []
    for is_numbered in (True, False):
        if not is_numbered:
            monkeypatch.setattr(NumberPatches, "__call__", lambda self, batch, **kwargs: batch)
        built = rllib_pnn.make_progressive(config_on_pong("PPO"), **settings).build_algo()
        built.train()
        module = built.learner_group._learner.module[DEFAULT_MODULE_ID]
        start = torch.cat([p.detach().flatten() for p in module.network.columns[1].parameters()])
        seen.clear()
        for _ in range(2):
            built.train()
        weights.append(torch.cat([p.detach().flatten() for p in module.network.columns[1].parameters()]))
        built.stop()
        upper = {f"{SOURCES}{n}" for n in (2, 3, 4)}
        added = {f"{PATCHES}{n}" for n in (1, 2)} if is_numbered else {f"{SOURCES}1"}
        assert len(seen) >= 2 * 2 * 2 and all(upper | added <= columns for columns in seen)
        assert all((f"{SOURCES}1" in columns) != is_numbered for columns in seen)
    change, difference = (weights[1] - start).norm(), (weights[0] - weights[1]).norm()
    assert change > 0.05 and difference < 1e-3 * change
