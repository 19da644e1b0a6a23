"""ProgressiveRLModule: growth by state, references, frozen features, spaces. No algorithm, no EnvRunner."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
import ray
import torch
import tree
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns

from rllib_pnn import A3CConfig, make_progressive
from rllib_pnn.network.incremental import StepMaps
from rllib_pnn.training.rl_module import (
    ARCHITECTURES,
    MODEL_CONFIG_KEY,
    ProgressiveRLModule,
    ProgressiveTargetRLModule,
    num_outputs_of,
    observation_shape_of,
)

VECTOR = gym.spaces.Box(-1.0, 1.0, (5,), np.float32)
DISCRETE = gym.spaces.Discrete(3)
SMALL = [{"dense": 16}, {"dense": 16}]
RECURRENT = [{"dense": 8}, {"lstm": 6}]


def make(cls=ProgressiveRLModule, *, column=SMALL, action_space=DISCRETE, inference_only=False, **settings):
    return cls(
        observation_space=VECTOR,
        action_space=action_space,
        inference_only=inference_only,
        model_config={MODEL_CONFIG_KEY: {"column": column, "seed": 3, **settings}},
    )


def grow(module, times=1):
    for _ in range(times):
        with torch.no_grad():
            for parameter in module.network.trainable_parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        module.grow({**module.progress, "task_index": 0})
    return module


def batch(rows=7, seed=0):
    return {Columns.OBS: torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed))}


@pytest.fixture(scope="module")
def object_store():
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    yield
    ray.shutdown()


def test_a_module_grows_to_the_state_that_it_is_handed():
    learner, runner = grow(make(), 2), make(inference_only=True)
    runner.set_state(learner.get_state())
    assert runner.network.fingerprints() == learner.network.fingerprints()
    assert [f is None for f in runner.network.fingerprints()] == [False, False, True]
    for column in range(3):
        expected = learner.network(batch()[Columns.OBS], column).logits
        assert torch.equal(runner.network(batch()[Columns.OBS], column).logits, expected)


def test_new_weights_go_into_the_same_parameters():
    # An optimizer holds on to parameter objects; a broadcast must not replace them.
    learner, other = grow(make()), grow(make())
    held = learner.network.trainable_parameters()
    with torch.no_grad():
        other.network.trainable_parameters()[0].add_(1.0)
    learner.set_state(other.get_state())
    assert all(a is b for a, b in zip(held, learner.network.trainable_parameters(), strict=True))
    assert torch.equal(held[0], other.network.trainable_parameters()[0])


def share(module):
    frozen = [entry for entry in module.get_state()["columns"] if entry["fingerprint"]]
    module.use_references({entry["fingerprint"]: ray.put(entry) for entry in frozen})


def test_frozen_columns_travel_by_reference_and_are_shared(object_store):
    learner, runner = grow(make(), 2), make(inference_only=True)
    share(learner)
    state = learner.get_state(inference_only=True)
    assert [set(entry) for entry in state["columns"][:2]] == [{"fingerprint", "reference"}] * 2
    runner.set_state(state)
    frozen = next(iter(runner.network.columns[0].parameters()))
    assert not frozen.detach().numpy().flags.owndata  # a view of the object store, no copy
    assert torch.equal(runner.network(batch()[Columns.OBS], 0).logits, learner.network(batch()[Columns.OBS], 0).logits)
    again = runner.network.columns[0]
    runner.set_state(state)
    assert runner.network.columns[0] is again  # a known fingerprint is not fetched again


def test_a_broadcast_does_not_grow_with_frozen_columns(object_store):
    def size(columns):
        module = grow(make(lateral="none"), columns - 1)
        share(module)
        state = module.get_state(inference_only=True)
        stripped = [{k: v for k, v in entry.items() if k != "reference"} for entry in state["columns"]]
        return len(pickle.dumps(stripped))

    assert size(8) - size(2) < 6 * 200  # six fingerprints


def test_a_checkpoint_state_holds_everything(object_store):
    module = grow(make())
    share(module)
    assert all("parameters" in entry for entry in module.get_state()["columns"])


def test_a_changed_frozen_column_is_refused():
    state = copy.deepcopy(grow(make()).get_state())
    state["columns"][0]["parameters"]["policy.bias"] = state["columns"][0]["parameters"]["policy.bias"] + 1
    module = make()
    before = module.network.columns[0]
    with pytest.raises(ValueError, match="fingerprint"):
        module.set_state(state)
    assert list(module.network.columns) == [before]


def test_an_earlier_state_shrinks_the_module():
    module = make()
    early = copy.deepcopy(module.get_state())
    grow(module, 2)
    module.set_state(early)
    assert module.network.num_columns == 1
    assert module.network.fingerprints() == [None]


def test_frozen_features_give_the_same_outputs_and_gradients():
    module = grow(make(), 2)
    plain = module.forward_train(batch())
    features = module.frozen_features(batch())
    assert sorted(features) == ["sources/1", "sources/2"]
    assert not any(f.requires_grad for f in features.values())
    reused = module.forward_train({**batch(), **features})
    for key in (Columns.ACTION_DIST_INPUTS, Columns.EMBEDDINGS):
        assert torch.equal(plain[key], reused[key])
    reused[Columns.ACTION_DIST_INPUTS].sum().backward()
    assert all(p.grad is None for c in module.network.columns[:-1] for p in c.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.network.columns[-1].parameters())


def test_features_are_what_the_forward_pass_uses():
    module = grow(make())
    features = {k: torch.randn_like(v) * 10 for k, v in module.frozen_features(batch()).items()}
    changed = module.forward_inference({**batch(), **features})[Columns.ACTION_DIST_INPUTS]
    assert not torch.equal(changed, module.forward_inference(batch())[Columns.ACTION_DIST_INPUTS])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_training_layout_moves_pixels_and_changes_none(dtype):
    obs = torch.randint(0, 256, (3, 4, 6, 5), generator=torch.Generator().manual_seed(0)).to(dtype)
    module = ProgressiveRLModule(
        observation_space=gym.spaces.Box(0, 255, (4, 6, 5), np.uint8),
        action_space=DISCRETE,
        model_config={MODEL_CONFIG_KEY: {"column": SMALL}},
    )
    laid_out = module.training_layout(obs)
    assert laid_out.dtype == dtype and laid_out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(laid_out, obs)


@pytest.mark.parametrize("recurrent", [False, True])
def test_outputs_and_features_in_one_pass_are_those_of_two(recurrent):
    module = grow(make(column=RECURRENT), 2) if recurrent else grow(make(), 2)
    inputs = batch()
    if recurrent:
        inputs = {Columns.OBS: torch.randn(4, 1, 5), Columns.STATE_IN: {k: torch.randn(4, 18) for k in ("h", "c")}}
    with torch.no_grad():
        features = module.frozen_features(inputs)
        expected = module.forward_exploration({**inputs, **features})
        passes = []
        for column in module.network.columns:
            column.register_forward_hook(lambda *_: passes.append(1))
        outputs, found = module.forward_with_features(inputs, t=0)
    assert len(passes) == 3  # every column once
    kept = {key: value for key, value in features.items() if key not in ("sources/h", "sources/c")}
    assert found.keys() == kept.keys() != set()
    assert all(torch.equal(found[key], kept[key]) for key in kept)
    assert outputs.keys() == expected.keys()
    tree.map_structure(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), outputs, expected)


def test_acting_computes_no_value_and_bootstrapping_no_policy():
    module = grow(make())
    newest, called = module.network.columns[-1], []
    for head in ("policy", "value"):
        getattr(newest, head).register_forward_hook(lambda *_, head=head: called.append(head))
    expected = module.forward_train(batch())
    assert sorted(called) == ["policy", "value"]
    called.clear()
    passes = (
        (lambda: module.forward_exploration(batch())[Columns.ACTION_DIST_INPUTS], "policy"),
        (lambda: module.forward_inference(batch())[Columns.ACTION_DIST_INPUTS], "policy"),
        (lambda: module.forward_with_features(batch())[0][Columns.ACTION_DIST_INPUTS], "policy"),
        (lambda: module.compute_values(batch()), "value"),
    )
    for outputs, head in passes:
        with torch.no_grad():
            found = outputs()
        assert called == [head]
        key = Columns.ACTION_DIST_INPUTS if head == "policy" else Columns.EMBEDDINGS
        torch.testing.assert_close(found, expected[key])
        called.clear()


def test_a_subclass_with_a_forward_pass_of_its_own_still_has_features():
    class Own(ProgressiveRLModule):
        def _forward(self, batch, **kwargs):
            return {Columns.ACTION_DIST_INPUTS: self._evaluate(batch).logits + 1}

    module = grow(make(cls=Own))
    passes = []
    module.network.columns[0].register_forward_hook(lambda *_: passes.append(1))
    outputs, features = module.forward_with_features(batch())
    assert len(passes) == 1
    assert torch.equal(outputs[Columns.ACTION_DIST_INPUTS], module.forward_exploration(batch())["action_dist_inputs"])
    assert features.keys() == module.frozen_features(batch()).keys() != set()


@pytest.mark.usefixtures("few_positions_pay")
@pytest.mark.parametrize("name", ["_forward", "_forward_train", "compute_values"])
def test_a_subclass_with_a_pass_of_its_own_gets_features_as_tensors(name):
    space = gym.spaces.Box(0, 255, (4, 20, 20), np.uint8)
    settings = {MODEL_CONFIG_KEY: {"column": [{"conv": [4, 8, 4]}, {"dense": 8}]}}
    own = type("Own", (ProgressiveRLModule,), {name: lambda self, *args, **kwargs: None})
    kinds = []
    for cls in (ProgressiveRLModule, own):
        module = grow(cls(observation_space=space, action_space=DISCRETE, model_config=settings))
        module.follows_environments(keeps_changes=True)
        features = module.frozen_features({Columns.OBS: torch.zeros(2, 4, 20, 20, dtype=torch.uint8)})
        kinds.append(type(features["sources/1"]))
    assert kinds == [StepMaps, torch.Tensor]


def test_a_first_column_has_no_features():
    assert make().frozen_features(batch()) == {}
    assert make().forward_with_features(batch())[1] == {}


def test_values_with_and_without_embeddings_agree():
    module = grow(make())
    out = module.forward_train(batch())
    assert torch.equal(module.compute_values(batch()), module.compute_values(batch(), out[Columns.EMBEDDINGS]))


def test_recurrent_states_of_all_columns_move_with_and_without_features():
    module = grow(make(column=RECURRENT), 2)
    state = {k: torch.randn(4, 18) for k in ("h", "c")}
    inputs = {Columns.OBS: torch.randn(4, 5, 5), Columns.STATE_IN: state}
    assert {k: v.shape for k, v in module.get_initial_state().items()} == {"h": (18,), "c": (18,)}
    plain = module.forward_inference(inputs)
    reused = module.forward_inference({**inputs, **module.frozen_features(inputs)})
    assert torch.equal(plain[Columns.ACTION_DIST_INPUTS], reused[Columns.ACTION_DIST_INPUTS])
    for key in ("h", "c"):
        assert torch.equal(plain[Columns.STATE_OUT][key], reused[Columns.STATE_OUT][key])
        for start in (0, 6, 12):  # every column's part moved
            assert not torch.equal(
                plain[Columns.STATE_OUT][key][:, start : start + 6], state[key][:, start : start + 6]
            )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures_are_the_papers_baselines(architecture):
    module = make(architecture=architecture)
    first = module.network.num_columns
    assert first == (2 if architecture == "random_column" else 1)
    before = dict(module.network.columns[-1].named_parameters())
    grow(module)
    newest = module.network.columns[-1]
    trained = {name for name, p in newest.named_parameters() if p.requires_grad}
    copied = (
        all(torch.equal(before[n], p) for n, p in newest.named_parameters())
        if len(before) == len(dict(newest.named_parameters()))
        else False
    )
    assert newest.num_sources == {"progressive": 1, "random_column": 2}.get(architecture, 0)
    assert copied == architecture.startswith("finetune")
    if architecture == "finetune_heads":
        assert trained == {"policy.weight", "policy.bias", "value.weight", "value.bias"}
    else:
        assert trained == set(dict(newest.named_parameters()))


@pytest.mark.parametrize(
    ("space", "outputs"),
    [
        (gym.spaces.Discrete(4), 4),
        (gym.spaces.MultiDiscrete([2, 3]), 5),
        (gym.spaces.Box(-1.0, 1.0, (2,), np.float32), 4),
    ],
)
def test_action_spaces(space, outputs):
    module = make(action_space=space)
    logits = module.forward_exploration(batch())[Columns.ACTION_DIST_INPUTS]
    assert logits.shape == (7, outputs)
    actions = module.get_exploration_action_dist_cls().from_logits(logits).sample()
    assert space.contains(np.asarray(actions[0].numpy(), dtype=space.dtype)) or space.shape == (2,)


def test_spaces_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="expected Discrete, MultiDiscrete or a one-dimensional Box"):
        num_outputs_of(gym.spaces.Dict())
    with pytest.raises(ValueError, match=r"wrappers\.FlattenObservation"):
        observation_shape_of(gym.spaces.Discrete(3))


@pytest.mark.parametrize("space", [gym.spaces.Discrete(2, start=1), gym.spaces.MultiDiscrete([2, 3], start=[0, 1])])
def test_actions_that_do_not_count_from_0_are_refused(space):
    for refused in (lambda: num_outputs_of(space), lambda: make(action_space=space)):
        with pytest.raises(
            ValueError, match=r"action space: expected actions that count from 0, got .*start="
        ) as caught:
            refused()
        assert "\n" not in str(caught.value)


def test_target_network_follows_the_newest_column():
    module = grow(make(ProgressiveTargetRLModule))
    module.make_target_networks()
    main, target = module.get_target_network_pairs()[0]
    assert main is module.network.columns[-1]
    with torch.no_grad():
        for p in main.parameters():
            p.add_(0.5)
    lagging = module.forward_target(batch())
    assert not torch.equal(next(iter(lagging.values())), module.forward_inference(batch())[Columns.ACTION_DIST_INPUTS])
    assert module.network.columns[-1] is main
    restored = make(ProgressiveTargetRLModule)
    restored.make_target_networks()
    restored.set_state(module.get_state())
    assert torch.equal(next(iter(restored.forward_target(batch()).values())), next(iter(lagging.values())))
    grow(module)
    assert module.get_target_network_pairs()[0][1].num_sources == 2
    assert target.num_sources == 1


@pytest.mark.usefixtures("few_positions_pay")
def test_a_module_that_follows_environments_computes_the_same():
    space = gym.spaces.Box(0, 255, (4, 20, 20), np.uint8)
    spec = [{"conv": [4, 8, 4]}, {"conv": [4, 2]}, {"dense": 8}]

    def image_module():
        settings = {MODEL_CONFIG_KEY: {"column": spec, "seed": 3}}
        return grow(ProgressiveRLModule(observation_space=space, action_space=DISCRETE, model_config=settings))

    plain, following = image_module(), image_module()
    following.follows_environments()
    obs = np.random.default_rng(0).integers(0, 256, (3, 4, 20, 20), dtype=np.uint8)
    for t in range(6):
        obs[t % 3, 0, 5, 5] += 1
        frame = {Columns.OBS: torch.from_numpy(obs.copy())}
        with torch.no_grad():
            outputs = [[*m.forward_with_features(dict(frame)), m.frozen_features(frame)] for m in (following, plain)]
            outputs[0].append(following.forward_exploration({**frame, **outputs[0][2]}))
            outputs[1].append(plain.forward_exploration({**frame, **outputs[1][2]}))
        assert all(torch.equal(a, b) for a, b in zip(*map(tree.flatten, outputs), strict=True))
    assert following._incremental._seen is not None


@pytest.mark.parametrize("algorithm", ["PPO", "A3C"])
def test_training_env_runners_have_modules_that_follow_environments(algorithm):
    config = {"PPO": PPOConfig, "A3C": A3CConfig}[algorithm]().environment("rllib_pnn/CartPoleSoup-v0")
    config.env_runners(num_env_runners=0)
    config = make_progressive(config, tasks=[{"name": "a", "until": {"num_env_steps": 1}}], column=SMALL)
    runner = config.env_runner_cls(config=config, worker_index=0)
    assert runner.module._incremental is not None
    runner.stop()
