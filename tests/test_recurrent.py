"""LSTM columns through the whole stack: EnvRunners, batches, switches, checkpoints; DESIGN.md's promises over time.

Equations over time are in test_column.py, A3C's gradient through time in test_a3c_env_runner.py.
"""

import gymnasium as gym
import numpy as np
import pytest
import ray
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from ray import tune
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.columns import Columns
from small_algorithms import small_config

import rllib_pnn
from rllib_pnn.network import ColumnStore, ProgressiveNetwork
from rllib_pnn.training.a3c_env_runner import LEARNER_STAMP
from rllib_pnn.training.progressive import make_progressive
from rllib_pnn.training.rl_module import ProgressiveRLModule

CELLS = 6
RECURRENT = [{"dense": 8}, {"lstm": CELLS}]
pytestmark = pytest.mark.usefixtures("one_thread")
VARIANTS = ("plain", "flipped", "permuted")


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    rllib_pnn.register()
    yield
    ray.shutdown()


# -- promise 1: whole sequences ------------------------------------------------------------------------------------


def play(network: ProgressiveNetwork, column: int, obs: torch.Tensor, resets: torch.Tensor) -> list[torch.Tensor]:
    """Every output of a column over a sequence (B, T), step by step as an EnvRunner plays it."""
    outputs = []
    state = network.initial_state(len(obs))
    with torch.no_grad():
        for t in range(obs.shape[1]):
            step = network(obs[:, t : t + 1], column, state, resets=resets[:, t : t + 1])
            state = step.state
            kept = sum(c.state_width for c in network.columns[: column + 1])
            outputs += [step.logits, step.value, *(part[:, :kept] for part in state.values())]
    return outputs


def train(network: ProgressiveNetwork, obs: torch.Tensor, steps: int = 3) -> None:
    """By an optimizer that holds all parameters, with momentum and weight decay."""
    optimizer = torch.optim.RMSprop(network.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        output = network(obs)
        loss = (output.logits - 1).square().mean() + (output.value - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("column", "shape"),
    [(RECURRENT, (5,)), ([{"lstm": 5}, {"lstm": 4}, {"dense": 3}], (5,)), ("labyrinth", (84, 84, 3))],
    ids=["dense, lstm", "lstm, lstm, dense", "labyrinth"],
)
def test_frozen_columns_repeat_whole_sequences_bit_for_bit(tmp_path, column, shape):
    network = ProgressiveNetwork(shape, 4, column, seed=2)
    generator = torch.Generator().manual_seed(0)
    length = 4 if column == "labyrinth" else 12
    size = (3, length, *shape)
    obs = (
        torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        if len(shape) == 3
        else torch.randn(size, generator=generator)
    )
    resets = torch.rand(3, length, generator=generator) < 0.3
    before = []
    for k in range(3):
        network.add_column()
        train(network, obs)
        network.freeze()
        before.append(play(network, k, obs, resets))
    network.add_column()
    train(network, obs)
    network.verify()
    store = ColumnStore(tmp_path)
    for k in range(3):
        store.save_column(network, k, task=str(k))
    restored = store.load()
    for k in range(3):
        for other in (network, restored):
            after = play(other, k, obs, resets)
            assert len(after) == len(before[k])
            assert all(torch.equal(a, b) for a, b in zip(before[k], after, strict=True)), f"column {k}"


# -- promise 2: a silent lateral ------------------------------------------------------------------------------------


@pytest.mark.parametrize("silent", ["alpha", "U"])
@pytest.mark.parametrize("lateral", ["adapter", "linear"])
def test_with_zero_laterals_a_recurrent_column_is_a_single_column(lateral, silent):
    if (lateral, silent) == ("linear", "alpha"):
        pytest.skip("eq. 1 has no alpha")
    network = ProgressiveNetwork((5,), 4, RECURRENT, lateral=lateral, seed=2)
    single = ProgressiveNetwork((5,), 4, RECURRENT, seed=9)
    single.add_column()
    for _ in range(3):
        network.add_column()
    column, alone = network.columns[2], single.columns[0]
    lstm, own_lstm = column.layers[1], alone.layers[1]
    width = own_lstm.input_size  # of W in [W U]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.4)
        for part in column.laterals.values():
            if silent == "alpha":
                part.scale.zero_()
                part.project_layer.bias.zero_()
            elif part.out is not None:
                part.out.weight.zero_()
        if silent == "U":
            lstm.weight_ih_l0[:, width:] = 0
        own = {n: p for n, p in column.state_dict().items() if not n.startswith("laterals")}
        own["layers.1.weight_ih_l0"] = lstm.weight_ih_l0[:, :width].clone()
        alone.load_state_dict(own)
    obs = torch.randn(3, 7, 5)
    state = {key: torch.randn(3, 3 * CELLS) for key in ("h", "c")}
    got = network(obs, state=state)
    expected = single(obs, state={key: part[:, -CELLS:].contiguous() for key, part in state.items()})
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(got.value, expected.value)
    for key in ("h", "c"):
        torch.testing.assert_close(got.state[key][:, -CELLS:], expected.state[key])


# -- states in EnvRunners and batches --------------------------------------------------------------------------------


class Wandering(gym.vector.VectorEnv):
    """Random vectors as observations, episodes of 3 to 9 steps; remembers all that it showed."""

    def __init__(self, num_envs: int, length: int = 9) -> None:
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.num_envs, self.length = num_envs, length
        self.single_observation_space = gym.spaces.Box(-9.0, 9.0, (4,), np.float32)
        self.single_action_space = gym.spaces.Discrete(3)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.random = np.random.default_rng(4)

    def _show(self):
        return self.random.normal(size=(self.num_envs, 4)).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        self.left = self.random.integers(3, self.length + 1, self.num_envs)
        return self._show(), {}

    def step(self, actions):
        over = self.left == 0
        self.left = np.where(over, self.random.integers(3, self.length + 1, self.num_envs), self.left - 1)
        done = ~over & (self.left == 0)
        half = self.random.random(self.num_envs) < 0.5
        rewards = np.where(over, 0.0, np.asarray(actions) - 1.0)
        return self._show(), rewards, done & half, done & ~half, {}


def base_config(algorithm: str, *, env="rllib_pnn/CartPoleSoup-v0", num_env_runners=1, num_envs=2) -> AlgorithmConfig:
    made = small_config(algorithm)
    made.environment(env)
    made.env_runners(
        num_env_runners=num_env_runners,
        num_envs_per_env_runner=num_envs,
        gym_env_vectorize_mode="vector_entry_point",
    )
    return made.debugging(seed=7)


def randomise(module: ProgressiveRLModule) -> None:
    """Loud columns, so that a state that is off by anything shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.network.trainable_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("max_seq_len", [None, 3])
@pytest.mark.parametrize("num_columns", [1, 3])
def test_train_batches_start_where_the_acting_states_were(tmp_path, num_columns, max_seq_len):
    """PPO's batches, chunk after chunk of episodes that go on, against every episode played from its first step."""
    tune.register_env("wandering", lambda ctx: Wandering(ctx["num_envs"]))
    config = base_config("PPO", env="wandering", num_env_runners=0, num_envs=3)
    if max_seq_len:
        config.rl_module(model_config={"max_seq_len": max_seq_len})
    config.env_runners(env_runner_cls=rllib_pnn.ArrayEnvRunner, rollout_fragment_length="auto")
    tasks = [{"name": str(k)} for k in range(num_columns)]
    made = make_progressive(config, tasks=tasks, column=RECURRENT, column_store=tmp_path, evaluation_episodes=0)
    algorithm = made.build_algo()
    try:
        learner, runner = algorithm.learner_group._learner, algorithm.env_runner
        module = learner.progressive_module
        for k in range(num_columns):
            if k:
                learner.grow({**module.progress, "task_index": k})
            randomise(module)
        runner.follow(module.get_state())
        network, width = module.network, num_columns * CELLS
        assert runner.module.get_initial_state()["h"].shape == (width,)
        whole: dict[str, list[np.ndarray]] = {}  # observations of each episode so far
        mid_episode = 0
        for _ in range(4):
            episodes = runner.sample(num_timesteps=15)
            for episode in episodes:
                states = episode.get_extra_model_outputs(Columns.STATE_OUT)
                assert states["h"].shape == (len(episode), width)
                mid_episode += episode.t_started > 0
                whole.setdefault(episode.id_, []).extend(episode.get_observations()[: len(episode)])
                obs = torch.from_numpy(np.stack(whole[episode.id_]))[None]
                with torch.no_grad():
                    replayed = network(obs)
                logits = episode.get_extra_model_outputs(Columns.ACTION_DIST_INPUTS)
                np.testing.assert_allclose(logits, replayed.logits[0, -len(episode) :], rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(states["c"][-1], replayed.state["c"][0], rtol=1e-4, atol=1e-5)

            # What the Learner makes of them: sequences, each from the state in which its first step was acted.
            num_steps = sum(len(e) for e in episodes)
            batch = learner._learner_connector(
                rl_module=learner.module, batch={}, episodes=episodes, shared_data={}, metrics=learner.metrics
            )["default_policy"]
            L = max_seq_len or 20
            assert batch[Columns.OBS].shape[1:] == (L, 4)
            assert batch[Columns.STATE_IN]["h"].shape == (len(batch[Columns.OBS]), width)
            module.eval()
            with torch.no_grad():
                trained = module.forward_train(dict(batch))[Columns.ACTION_DIST_INPUTS]
            mask = batch[Columns.LOSS_MASK].bool()
            assert int(mask.sum()) == num_steps
            torch.testing.assert_close(
                trained[mask], torch.as_tensor(batch[Columns.ACTION_DIST_INPUTS])[mask], rtol=1e-4, atol=1e-5
            )
        assert mid_episode > 3
    finally:
        algorithm.stop()


@pytest.mark.parametrize("num_columns", [1, 3])
def test_a3cs_rollouts_start_where_the_acting_states_were(num_columns):
    tune.register_env("wandering", lambda ctx: Wandering(ctx["num_envs"]))
    config = base_config("A3C", env="wandering", num_env_runners=0, num_envs=3)
    config.env_runners(rollout_fragment_length=5)
    tasks = [{"name": str(k)} for k in range(num_columns)]
    made = make_progressive(config, tasks=tasks, column=RECURRENT, evaluation_episodes=0)
    runner = made.env_runner_cls(config=made)
    for k in range(num_columns):
        if k:
            runner.module.grow({**runner.module.progress, "task_index": k})
        randomise(runner.module)
    runner.set_state({"rl_module": runner.module.get_state(), LEARNER_STAMP: 1})
    network = runner.module.network
    episodes = [[] for _ in range(3)]  # what each environment has shown since its episode began
    mid_episode = 0
    for _ in range(6):
        rollout = runner.collect_rollout()
        assert rollout.state["h"].shape == (3, num_columns * CELLS)
        obs = rollout.obs.clone()
        for n, seen in enumerate(episodes):
            expected = network.initial_state(1)
            if seen:
                mid_episode += 1
                with torch.no_grad():
                    expected = network(torch.stack(seen)[None]).state
            for key in ("h", "c"):
                torch.testing.assert_close(rollout.state[key][n], expected[key][0], rtol=1e-4, atol=1e-5)
            for t in range(5):
                seen.append(obs[t, n])
                if rollout.resets[t, n]:
                    seen.clear()
    assert mid_episode > 5


# -- through the algorithms --------------------------------------------------------------------------------------------


def train_until(algorithm, condition, limit=5000):
    for _ in range(limit):
        result = algorithm.train()
        if condition(result):
            return result
    raise AssertionError("condition never met")


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    "algorithm", ["A3C", *(pytest.param(name, marks=pytest.mark.slow) for name in ("PPO", "IMPALA", "APPO"))]
)
def test_train_switch_train_checkpoint_restore_train(tmp_path, algorithm):
    steps = [160, 4000, 160]
    tasks = [
        {"name": v, "env_config": {"variant": v}, "until": {"num_env_steps": n}}
        for v, n in zip(VARIANTS, steps, strict=True)
    ]
    made = make_progressive(
        base_config(algorithm),
        tasks=tasks,
        column=RECURRENT,
        column_store=tmp_path / "columns",
        evaluation_episodes=2,
    ).build_algo()
    try:
        first = train_until(made, lambda r: r["progressive"]["task_over"])
        assert not np.isnan(first["columns"]["plain"]["frozen_episode_return_mean"])
        train_until(made, lambda r: r["progressive"]["task"] == "flipped" and r["progressive"]["task_env_steps"] > 0)
        widths = made.env_runner_group.foreach_env_runner(
            lambda r: r.module.get_initial_state()["h"].shape, local_env_runner=False
        )
        assert set(widths) == {(2 * CELLS,)}
        checkpoint = made.save_to_path(str(tmp_path / "checkpoint"))
    finally:
        made.stop()
    stored = ColumnStore(tmp_path / "columns").entries[0].fingerprint

    restored = Algorithm.from_checkpoint(checkpoint)
    try:
        assert restored.train()["progressive"]["task"] == "flipped"
        last = train_until(restored, lambda r: r.get("done"))
        # Promise 1: played again after two more tasks and a restore, the same episodes with bit-equal outputs.
        assert [last["columns"][v]["bit_equal"] for v in VARIANTS] == [1, 1, 1]
        assert [last["columns"][v]["forgetting"] for v in VARIANTS] == [0.0, 0.0, 0.0]
    finally:
        restored.stop()
    columns = ColumnStore(tmp_path / "columns")
    assert [e.task for e in columns.entries] == list(VARIANTS)
    assert columns.entries[0].fingerprint == stored
    assert columns.load().initial_state(1)["h"].shape == (1, 3 * CELLS)


@pytest.mark.usefixtures("cluster")
def test_episodes_with_states_of_fewer_columns_are_dropped(tmp_path):
    """Promise 4: what an EnvRunner sampled before it heard of the new column trains nothing and breaks nothing."""
    tasks = [{"name": v, "env_config": {"variant": v}} for v in VARIANTS[:2]]
    config = base_config("PPO", num_env_runners=0)
    made = make_progressive(config, tasks=tasks, column=RECURRENT, column_store=tmp_path, evaluation_episodes=0)
    algorithm = made.build_algo()
    try:
        learner, runner = algorithm.learner_group._learner, algorithm.env_runner
        module = learner.progressive_module
        old = runner.sample(num_timesteps=40)
        learner.grow({**module.progress, "task_index": 1})
        runner.follow(module.get_state())
        new = runner.sample(num_timesteps=40)
        for episodes, trains in ((old, False), (old[:1] + new, False), (runner.sample(num_timesteps=40), True)):
            before = [p.detach().clone() for p in module.network.parameters()]
            algorithm.learner_group.update(
                episodes=[e for e in episodes if len(e)], num_epochs=1, minibatch_size=20, timesteps={}
            )
            after = module.network.parameters()
            assert trains != all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    finally:
        algorithm.stop()


def test_aggregator_actors_do_not_go_with_lstm_columns():
    config = base_config("IMPALA").learners(num_aggregator_actors_per_learner=1)
    tasks = [{"name": "plain", "env_config": {"variant": "plain"}}]
    with pytest.raises(ValueError, match="num_aggregator_actors_per_learner"):
        make_progressive(config, tasks=tasks, column=RECURRENT)
    make_progressive(config, tasks=tasks, column="mlp")


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("algorithm", ["A3C", "PPO"])
def test_only_the_new_recurrent_column_trains(tmp_path, algorithm):
    """Promise 4 with gradients through time: the frozen columns keep their bits, every part of the new one moves."""
    tasks = [
        {"name": v, "env_config": {"variant": v}, "until": {"num_env_steps": n}}
        for v, n in zip(VARIANTS, [100, 10_000], strict=False)
    ]
    config = base_config(algorithm, num_env_runners=0)
    made = make_progressive(
        config, tasks=tasks, column=RECURRENT, column_store=tmp_path, evaluation_episodes=0
    ).build_algo()
    try:
        train_until(made, lambda r: r["progressive"]["task_over"])
        network = made.learner_group._learner.progressive_module.network
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        for _ in range(3):
            made.train()
        moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name in before if name.startswith("columns.1.")}
        assert "columns.1.layers.1.weight_hh_l0" in moved
        network.verify()
    finally:
        made.stop()


# -- memory ------------------------------------------------------------------------------------------------------------


class Recall(gym.vector.VectorEnv):
    """Shows a sign, then nothing for some steps, then asks for it: the right answer brings 1, and ends the episode.

    At the question all episodes look alike, so without a memory no policy does better than 0.5.
    """

    def __init__(self, num_envs: int, delay: int = 4, inverted: bool = False) -> None:
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.num_envs, self.delay, self.inverted = num_envs, delay, inverted
        self.single_observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.single_action_space = gym.spaces.Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def _show(self):
        sign = np.where(self.time == 0, 2.0 * self.answer - 1.0, 0.0)
        return np.stack([-sign if self.inverted else sign, self.time > self.delay], axis=1).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        self.random = np.random.default_rng(seed)
        self.time = np.zeros(self.num_envs, int)
        self.answer = self.random.integers(2, size=self.num_envs)
        return self._show(), {}

    def step(self, actions):
        over = self.time == self.delay + 2
        asked = self.time == self.delay + 1
        rewards = np.where(asked, np.asarray(actions) == self.answer, False).astype(np.float64)
        self.time = np.where(over, 0, self.time + 1)
        self.answer = np.where(over, self.random.integers(2, size=self.num_envs), self.answer)
        return self._show(), rewards, asked, np.zeros(self.num_envs, bool), {}


def recall_config(algorithm: str) -> AlgorithmConfig:
    tune.register_env("recall", lambda ctx: Recall(ctx["num_envs"], ctx.get("delay", 4), ctx.get("inverted", False)))
    config = base_config(algorithm, env="recall", num_env_runners=0, num_envs=16)
    config.training(lr=5e-3, gamma=0.9, entropy_coeff=0.003)
    if algorithm == "A3C":
        config.env_runners(rollout_fragment_length=15)
        config.training(gradients_per_training_step=10)
    else:
        config.env_runners(env_runner_cls=rllib_pnn.ArrayEnvRunner, rollout_fragment_length="auto")
        config.training(train_batch_size_per_learner=640, minibatch_size=320, num_epochs=4, use_kl_loss=False)
    config.reporting(metrics_num_episodes_for_smoothing=200)
    return config


def learn(config: AlgorithmConfig, column, tasks, tmp_path, num_iterations: int) -> list[float]:
    """The best mean return of each task."""
    made = make_progressive(config, tasks=tasks, column=column, column_store=tmp_path, evaluation_episodes=0)
    algorithm = made.build_algo()
    best = [0.0] * len(tasks)
    try:
        for _ in range(num_iterations):
            result = algorithm.train()
            progress = result["progressive"]
            if not np.isnan(progress["episode_return_mean"]):
                index = progress["task_index"]
                best[index] = max(best[index], progress["episode_return_mean"])
            if result.get("done"):
                break
    finally:
        algorithm.stop()
    return best


@pytest.mark.usefixtures("cluster")
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["A3C", "PPO"])
def test_memory_is_learned_by_lstm_columns_alone(tmp_path, algorithm):
    """At least 0.95 of 1 on both tasks with LSTM columns, within 150,000 steps each (A3C: 10,000 when written); less
    than 0.65 with feed-forward ones (0.5 is the most that is there for them, the best of many means of 200 episodes
    lies above it).
    """
    until = {"episode_return_mean": 0.97, "num_env_steps": 150_000}
    tasks = [
        {"name": "recall", "until": until},
        {"name": "inverted", "env_config": {"inverted": True}, "until": until},
    ]
    column = [{"dense": 16}, {"lstm": 16}]
    best = learn(recall_config(algorithm), column, tasks, tmp_path / "lstm", num_iterations=400)
    assert min(best) >= 0.95
    column = [{"dense": 16}, {"dense": 16}]
    tasks = [{"name": "recall", "until": {"num_env_steps": 60_000}}]
    best = learn(recall_config(algorithm), column, tasks, tmp_path / "dense", num_iterations=200)
    assert max(best) < 0.65


def test_the_question_of_recall_looks_the_same_whatever_the_answer():
    envs = Recall(8, delay=2)
    obs, _ = envs.reset(seed=0)
    answers = envs.answer.copy()
    assert len(set(answers)) == 2
    np.testing.assert_array_equal(obs[:, 0], 2 * answers - 1)
    for _ in range(3):
        obs, rewards, done, _, _ = envs.step(answers)
        assert len(np.unique(obs, axis=0)) == 1
        assert not rewards.any() and not done.any()
    np.testing.assert_array_equal(obs, [[0.0, 1.0]] * 8)
    _, rewards, done, _, _ = envs.step(answers)
    assert rewards.all() and done.all()
