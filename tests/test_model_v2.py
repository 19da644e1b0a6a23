"""The old API stack: one algorithm a column, columns from a store in front, frozen ones the same bits (promise 1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import ray
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.models.catalog import MODEL_DEFAULTS, ModelCatalog
from ray.rllib.utils.torch_utils import update_target_network

from rllib_pnn import ColumnStore, ColumnStoreError, ProgressiveNetwork, register
from rllib_pnn.training.model_v2 import FROZEN, ProgressiveTorchModelV2

SMALL = [{"dense": 8}, {"dense": 8}]
VECTOR = gym.spaces.Box(-2.0, 2.0, (4,), np.float32)
ACTIONS = gym.spaces.Discrete(2)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    register()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    yield
    ray.shutdown()


@pytest.fixture
def store(tmp_path: Path) -> ColumnStore:
    """Two columns for CartPole's spaces, the second with laterals."""
    network = ProgressiveNetwork((4,), 2, SMALL, seed=3)
    network.add_column()
    network.add_column()
    network.freeze()
    columns = ColumnStore(tmp_path / "run" / "columns")
    for k in range(2):
        columns.save_column(network, k, task=f"task {k}", env="CartPole-v1", env_config={"a": k}, score=7.0 + k)
    return columns


def make_model(
    space: gym.Space = VECTOR, actions: gym.Space = ACTIONS, num_outputs: int = 2, **settings: Any
) -> ProgressiveTorchModelV2:
    """The model as RLlib makes it, through the catalog."""
    options = {"custom_model": "progressive", "custom_model_config": {"column": SMALL, **settings}}
    return ModelCatalog.get_model_v2(space, actions, num_outputs, MODEL_DEFAULTS | options, framework="torch")


def old_stack(config: AlgorithmConfig, env: Any = "CartPole-v1", **settings: Any) -> AlgorithmConfig:
    model = {"custom_model": "progressive", "custom_model_config": {"column": SMALL, **settings}}
    return (
        config.api_stack(enable_rl_module_and_learner=False, enable_env_runner_and_connector_v2=False)
        .environment(env)
        .resources(num_gpus=0)
        .env_runners(num_env_runners=0, rollout_fragment_length=100)
        .training(lr=0.01, train_batch_size=200, model=model)
        .debugging(seed=1)
    )


def ppo(env: Any = "CartPole-v1", **settings: Any) -> AlgorithmConfig:
    return old_stack(PPOConfig().training(minibatch_size=100, num_epochs=2), env, **settings)


def copies(network: ProgressiveNetwork, column: int) -> list[torch.Tensor]:
    return [p.detach().clone() for p in network.columns[column].parameters()]


def moved(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def optimized(algorithm: Algorithm) -> set[int]:
    return {id(p) for o in algorithm.get_policy()._optimizers for group in o.param_groups for p in group["params"]}


# -- training --------------------------------------------------------------------------------------------------------


def test_trains_one_column_stores_it_and_goes_on_behind_it(tmp_path: Path):
    first = ppo().build_algo()
    model = first.get_policy().model
    before = copies(model.network, 0)
    first.train()
    assert moved(before, copies(model.network, 0))
    path = tmp_path / "columns"
    entry = model.save_column(path, task="first", score=20.0, num_env_steps=200)
    assert (entry.task, entry.score, entry.num_env_steps) == ("first", 20.0, 200)
    first.train()  # what is stored is frozen; the model is not
    first.stop()

    second = ppo(columns_from=str(path)).build_algo()
    model = second.get_policy().model
    assert model.network.fingerprints() == [entry.fingerprint, None]
    frozen, trained = copies(model.network, 0), copies(model.network, 1)
    second.train()
    second.train()
    model.network.verify()
    assert not moved(frozen, copies(model.network, 0)) and moved(trained, copies(model.network, 1))
    assert optimized(second) == {id(p) for p in model.network.columns[1].parameters()}
    model.save_column(path, task="second")
    second.stop()

    loaded = ColumnStore(path).load()
    assert [e.task for e in ColumnStore(path).entries] == ["first", "second"]
    assert loaded.fingerprints()[0] == entry.fingerprint
    obs = torch.randn(5, 4)
    assert torch.equal(loaded(obs).logits, model({"obs": obs})[0])


@pytest.mark.parametrize("config_class", [IMPALAConfig, APPOConfig])
def test_asynchronous_algorithms_train_only_the_new_column(config_class: type, store: ColumnStore):
    config = old_stack(config_class(), columns_from=str(store.path)).training(lr=0.01, train_batch_size=100)
    if config_class is APPOConfig:
        config.training(tau=0.3, use_kl_loss=True)  # a target network, moved in part
    algorithm = config.build_algo()
    policy = algorithm.get_policy()
    before = copies(policy.model.network, 2)
    policy.learn_on_batch(algorithm.env_runner.sample()["default_policy"])
    assert moved(before, copies(policy.model.network, 2))
    if config_class is APPOConfig:
        policy.update_target()
        policy.update_target()
    policy.model.network.verify()
    assert policy.model.network.fingerprints()[:2] == [e.fingerprint for e in store.entries]
    assert optimized(algorithm) == {id(p) for p in policy.model.network.columns[2].parameters()}
    algorithm.stop()


def test_checkpoint_restores_and_a_store_that_grew_is_named(tmp_path: Path, store: ColumnStore):
    tmp_path = tmp_path / "checkpoint"
    tmp_path.mkdir()
    algorithm = ppo(columns_from=str(store.path), num_columns=1).build_algo()
    algorithm.train()
    model = algorithm.get_policy().model
    algorithm.save_checkpoint(str(tmp_path))
    restored = Algorithm.from_checkpoint(str(tmp_path))
    again = restored.get_policy().model
    assert not moved(copies(model.network, 1), copies(again.network, 1))
    assert again.network.fingerprints() == model.network.fingerprints() == [store.entries[0].fingerprint, None]
    restored.train()
    weights = model.state_dict()
    with pytest.raises(ValueError, match=r"weights: trained behind .*num_columns: 1 takes only the first$"):
        make_model(columns_from=store.path).load_state_dict(weights)
    algorithm.stop()
    restored.stop()


class Bricks(gym.Env):
    """Observations of any space; one step a move, ten steps an episode."""

    def __init__(self, config: Any) -> None:
        self.observation_space = config["space"]
        self.action_space = config.get("actions", ACTIONS)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.steps == 10, False, {}


IMAGE = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
SHORT = {"rollout_fragment_length": 20, "train_batch_size": 20, "minibatch_size": 20}
CONVOLUTION = [{"conv": {"channels": 4, "kernel": 8, "stride": 8}}, {"dense": 8}]


@pytest.mark.parametrize(
    ("space", "column", "shape", "scale", "more"),
    [
        (IMAGE, CONVOLUTION, (4, 84, 84), 1 / 255, {}),
        (gym.spaces.Box(0, 255, (84, 84, 4), np.uint8), CONVOLUTION, (84, 84, 4), 1 / 255, {}),
        # RLlib's own preprocessors: this one crops and scales to [-1, 1]; with none, bytes come as they are.
        (gym.spaces.Box(0, 255, (210, 160, 3), np.uint8), CONVOLUTION, (84, 84, 3), 1.0, {}),
        (
            gym.spaces.Box(0, 255, (210, 160, 3), np.uint8),
            CONVOLUTION,
            (210, 160, 3),
            1 / 255,
            {"preprocessor_pref": None, "_disable_preprocessor_api": True},
        ),
        (gym.spaces.Dict({"a": VECTOR, "b": gym.spaces.Discrete(3)}), SMALL, (7,), 1.0, {}),
        (gym.spaces.Discrete(5), SMALL, (5,), 1.0, {}),
    ],
    ids=["image", "channels-last", "rllib-pixels", "no-preprocessor", "dict", "discrete"],
)
def test_trains_on_what_the_old_stack_preprocesses(space, column, shape, scale, more):
    config = ppo(Bricks, column=column).environment(env_config={"space": space})
    config.update_from_dict(SHORT | more)
    algorithm = config.build_algo()
    network = algorithm.get_policy().model.network
    assert (network.given_observation_shape, network.input_scale) == (shape, scale)
    before = copies(network, 0)
    algorithm.train()
    assert moved(before, copies(network, 0))
    algorithm.stop()


@pytest.mark.parametrize(
    ("actions", "num_outputs"),
    [(gym.spaces.MultiDiscrete([2, 3]), 5), (gym.spaces.Box(-1.0, 1.0, (2,), np.float32), 4)],
)
def test_trains_on_other_action_spaces(actions: gym.Space, num_outputs: int):
    config = ppo(Bricks).environment(env_config={"space": VECTOR, "actions": actions})
    algorithm = config.update_from_dict(SHORT).build_algo()
    assert algorithm.get_policy().model.network.num_outputs == num_outputs
    algorithm.train()
    algorithm.stop()


# -- the model -------------------------------------------------------------------------------------------------------


def test_forward_is_the_plain_network(store: ColumnStore):
    model = make_model(columns_from=store.path.parent, seed=5)  # the run folder
    plain = ProgressiveNetwork((4,), 2, SMALL, seed=5)
    for column in store.load().columns:
        plain.append_column(column)
    plain.add_column()
    obs = torch.randn(6, 4)
    logits, state = model({"obs": obs})
    assert torch.equal(logits, plain(obs).logits) and state == []
    assert torch.equal(model.value_function(), plain(obs).value)


def test_recurrent_columns_follow_sequences():
    column = [{"dense": 8}, {"lstm": 6}]
    algorithm = ppo(column=column).build_algo()
    algorithm.train()
    model = algorithm.get_policy().model
    h, c = (s.expand(2, -1) for s in model.get_initial_state())
    assert h.shape == (2, 6)
    obs = torch.randn(2, 5, 4)
    logits, (h_after, _) = model({"obs": obs.flatten(0, 1)}, [h, c], torch.tensor([5, 5]))
    plain = model.network(obs)
    assert torch.equal(logits, plain.logits.flatten(0, 1)) and torch.equal(h_after, plain.state["h"])
    assert torch.equal(model.value_function(), plain.value.flatten())
    for t in range(5):  # as an EnvRunner plays it
        stepped, (h, c) = model({"obs": obs[:, t]}, [h, c], torch.tensor([1, 1]))
        assert torch.allclose(stepped, plain.logits[:, t], atol=1e-6)
    algorithm.stop()


def test_recurrent_columns_stand_behind_each_other(tmp_path: Path):
    column = [{"dense": 8}, {"lstm": 6}]
    make_model(column=column).save_column(tmp_path, task="first")
    algorithm = ppo(column=column, columns_from=tmp_path).build_algo()
    algorithm.train()
    model = algorithm.get_policy().model
    assert [tuple(s.shape) for s in model.get_initial_state()] == [(12,), (12,)]
    model.network.verify()
    algorithm.stop()


def test_weights_are_the_newest_columns_and_name_the_frozen_ones(store: ColumnStore):
    model, other = (make_model(columns_from=store.path) for _ in range(2))
    assert {k.split(".")[2] for k in model.state_dict() if k != FROZEN} == {"2"}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    obs = torch.randn(3, 4)
    assert not torch.equal(model({"obs": obs})[0], other({"obs": obs})[0])
    other.load_state_dict(model.state_dict())
    assert torch.equal(model({"obs": obs})[0], other({"obs": obs})[0])
    update_target_network(model, other, tau=0.3)
    with pytest.raises(RuntimeError, match="missing"):
        other.load_state_dict({FROZEN: model.state_dict()[FROZEN]})
    with pytest.raises(ValueError, match="columns_from must be the store"):
        make_model(columns_from=store.path, num_columns=1, seed=1).load_state_dict(model.state_dict())


def test_variables_pair_names_with_parameters(store: ColumnStore):
    model = make_model(columns_from=store.path)
    named = dict(model.network.named_parameters(prefix="network"))
    assert model.variables(as_dict=True).keys() == named.keys()
    assert all(model.variables(as_dict=True)[name] is p for name, p in named.items())
    trained = model.trainable_variables(as_dict=True)
    assert {k.split(".")[2] for k in trained} == {"2"} and len(trained) == len(model.trainable_variables())
    assert [id(p) for p in model.parameters()] == [id(p) for p in model.trainable_variables()]


@pytest.mark.parametrize(
    ("architecture", "num_columns", "num_sources", "trains"),
    [
        ("progressive", 3, 2, "all"),
        ("scratch", 3, 0, "all"),
        ("finetune_heads", 3, 1, "heads"),
        ("finetune_all", 3, 1, "all"),
        ("random_column", 3, 2, "all"),
    ],
)
def test_architectures_behind_a_store(store: ColumnStore, architecture, num_columns, num_sources, trains):
    network = make_model(columns_from=store.path, architecture=architecture).network
    assert network.num_columns == num_columns
    assert (network.columns[-1].num_sources, network.columns[-1].trains) == (num_sources, trains)


def test_random_column_is_the_same_in_every_process_and_is_stored(tmp_path: Path):
    torch.manual_seed(0)
    model = make_model(architecture="random_column")
    torch.manual_seed(1)
    assert make_model(architecture="random_column").network.fingerprints() == model.network.fingerprints()
    model.save_column(tmp_path, task="first")
    assert [e.task for e in ColumnStore(tmp_path).entries] == ["random", "first"]


def test_settings_reach_the_column(store: ColumnStore):
    model = make_model(
        columns_from=store.path, lateral_scale=0.5, lateral_heads=False, lateral="adapter", input_shift=0.25
    )
    layout = model.network.columns[-1].layout
    assert (layout.lateral_scale, layout.lateral_heads, layout.input_shift) == (0.5, False, 0.25)
    assert make_model(columns_from=store.path, lateral="linear").network.columns[-1].layout.lateral == "linear"


def test_save_column_copies_the_store_with_what_it_knows(store: ColumnStore, tmp_path: Path):
    make_model(columns_from=store.path).save_column(tmp_path / "new", task="third", env="CartPole-v1")
    first, second, third = ColumnStore(tmp_path / "new").entries
    assert [first, second] == store.entries and third.task == "third"
    with pytest.raises(ColumnStoreError, match="never replaced"):
        make_model(columns_from=store.path, seed=9).save_column(tmp_path / "new", task="third")


def test_save_column_refuses_a_changed_frozen_column(store: ColumnStore, tmp_path: Path):
    model = make_model(columns_from=store.path)
    with torch.no_grad():
        model.network.columns[0].policy.bias.add_(1e-3)
    with pytest.raises(ColumnStoreError, match="a frozen column changed"):
        model.save_column(tmp_path / "new", task="third")


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"colum": "mlp"}, "unknown key 'colum'; did you mean 'column'?"),
        ({"lateral_scal": 0.1}, "unknown key 'lateral_scal'; did you mean 'lateral_scale'?"),
        ({"zzz": 1}, "unknown key 'zzz'; expected some of column, lateral, .*"),
        ({"lateral": "adaptor"}, "lateral: .*did you mean 'adapter'?"),
        ({"architecture": "scratsh"}, "architecture: .*did you mean 'scratch'?"),
        ({"lateral_scale": "big"}, "lateral_scale: expected a finite number, got 'big'"),
        ({"input_shift": float("nan")}, "input_shift: expected a finite number, got nan"),
        ({"lateral_heads": "no"}, "lateral_heads: expected true or false, got 'no'"),
        ({"seed": 1.5}, "seed: expected a whole number from 0, got 1.5"),
        ({"num_columns": 1}, "num_columns: 1 of what.*"),
        ({"columns_from": 7}, "columns_from: expected the path .*, got 7"),
        ({"columns_from": "/no/such/store"}, "columns_from: /no/such/store: no such folder.*"),
        ({"column": "atari"}, ".*convolution.*"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], message: str):
    pattern = "^custom_model_config: " + message.replace("?", r"\?") + "$"
    with pytest.raises(ValueError, match=pattern) as caught:
        make_model(**settings)
    assert "\n" not in str(caught.value)


def test_bad_settings_end_the_build():
    with pytest.raises(ValueError, match="did you mean 'column'"):
        ppo(colum="mlp").build_algo()


def test_columns_that_do_not_fit_are_refused(store: ColumnStore):
    with pytest.raises(ValueError, match="made for observations"):
        make_model(gym.spaces.Box(-1.0, 1.0, (5,), np.float32), columns_from=store.path)
    with pytest.raises(ValueError, match="2 outputs, the network has"):
        make_model(actions=gym.spaces.Discrete(3), num_outputs=3, columns_from=store.path)
    with pytest.raises(ValueError, match="holds 2 columns, 3 were asked for"):
        make_model(columns_from=store.path, num_columns=3)


def test_a_damaged_store_is_refused(store: ColumnStore):
    file = store.path / store.entries[1].file
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ValueError, match=r"custom_model_config: .*column_001\.safetensors: its fingerprint is"):
        make_model(columns_from=store.path)


@pytest.mark.parametrize("space", [gym.spaces.Box(0, 1, (3, 3)), gym.spaces.Dict({"a": VECTOR})])
def test_other_observations_are_refused(space: gym.Space):
    with pytest.raises(ValueError, match="expected observations that are an image or a vector"):
        make_model(space)


def test_other_outputs_are_refused():
    with pytest.raises(ValueError, match="the policy asks for 256 outputs"):
        make_model(num_outputs=256)


@pytest.mark.parametrize("wrapper", ["use_lstm", "use_attention"])
def test_wrappers_of_rllib_are_refused(wrapper: str):
    options = {"custom_model": "progressive", "custom_model_config": {"column": SMALL}, wrapper: True}
    with pytest.raises(ValueError, match="put an lstm layer into `column`"):
        ModelCatalog.get_model_v2(VECTOR, ACTIONS, 2, MODEL_DEFAULTS | options, framework="torch")


def test_value_before_any_observation_is_an_error():
    with pytest.raises(ValueError, match="no forward pass yet"):
        make_model().value_function()


def test_registering_again_changes_nothing():
    register()
    register()
    assert type(make_model()) is ProgressiveTorchModelV2
