"""Which column plays, if nobody says which task it is."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from rllib_pnn.envs import cartpole_soup, pong_soup
from rllib_pnn.network import ProgressiveNetwork
from rllib_pnn.registration import register
from rllib_pnn.training import evaluation
from rllib_pnn.training.evaluation import evaluate_column, evaluate_recognised
from rllib_pnn.training.recognition import (
    FIRST_STEPS,
    FirstSteps,
    Recogniser,
    Statistics,
    confused_pairs,
    features_of,
)

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def envs() -> None:
    register()


def statistics_of(values: np.ndarray, num_actions: int | None = None) -> Statistics:
    seen = FirstSteps(num_actions, False)
    seen.add(values)
    found = seen.statistics()
    assert found is not None
    return found


def test_frames_are_pooled_and_vectors_are_not() -> None:
    images = np.zeros((2, 4, 84, 84), np.uint8)
    images[:, :3] = 200  # older frames
    images[1, 3, :4, :4] = np.arange(16).reshape(4, 4)
    features = features_of(images)
    assert features.shape == (2, 441)
    assert features[0].max() == 0 and features[1, 0] == 7.5 and features[1, 1:].max() == 0
    uneven = np.arange(30 * 50, dtype=float).reshape(1, 1, 30, 50)
    assert features_of(uneven).shape == (1, 441)
    assert features_of(np.full((3, 1, 30, 50), 9))[1] == pytest.approx(np.full(441, 9.0))
    vectors = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert np.array_equal(features_of(vectors), vectors.astype(float))
    assert features_of(np.zeros((2, 1, 7, 5), np.uint8)).shape == (2, 35)


def test_frames_whose_channels_come_last() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 84, 84, 3), dtype=np.uint8)
    features = features_of(images, channels_last=True)
    assert features.shape == (2, 441)
    assert np.array_equal(features, features_of(images.transpose(0, 3, 1, 2)))
    blackened = images.copy()
    blackened[:, :42] = 0
    assert not np.array_equal(features_of(blackened, channels_last=True), features)


class RoomEnv(gym.Env):
    """Six steps in a room of (H, W, C) pixels whose ceiling is light or dark; all else is noise."""

    observation_space = gym.spaces.Box(0, 255, (30, 30, 3), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, light: bool) -> None:
        self.light = light

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: int) -> tuple:
        self.steps += 1
        return self._observe(), 0.0, self.steps == 6, False, {}

    def _observe(self) -> np.ndarray:
        frame = self.np_random.integers(0, 100, (30, 30, 3), dtype=np.uint8)
        frame[:10] += 150 * self.light
        return frame


def test_tasks_that_differ_in_the_upper_half_of_their_channels_last_images() -> None:
    if "rllib_pnn_test/Room-v0" not in gym.registry:
        gym.register("rllib_pnn_test/Room-v0", entry_point=RoomEnv)
    network = ProgressiveNetwork((30, 30, 3), 2, [{"conv": [2, 8, 4]}, {"dense": 4}], lateral="none")
    for _ in range(2):
        network.add_column()
    network.freeze()
    rooms = [{"light": False}, {"light": True}]
    statistics = []
    for k, room in enumerate(rooms):
        seen = evaluate_column(network, "rllib_pnn_test/Room-v0", room, column=k, num_episodes=2).first_steps
        statistics.append(seen.statistics())
    recogniser = Recogniser(statistics, True)
    for k, room in enumerate(rooms):
        played = evaluate_recognised(
            network, "rllib_pnn_test/Room-v0", room, columns=[0, 1], recogniser=recogniser, num_episodes=4, seed=9
        )
        assert played.chosen == (k,) * 4


def test_moments_by_hand_in_any_parts() -> None:
    values = np.array([[1.0, 10.0], [3.0, 10.0], [5.0, 40.0]])
    actions = np.array([0, 1, 0])
    whole, first, second = (FirstSteps(2, False) for _ in range(3))
    whole.add(values, values * 0, actions)
    first.add(values[:1], values[:1] * 0, actions[:1])
    second.add(values[1:], values[1:] * 0, actions[1:])
    for found in (whole.statistics(), first.merge(second).statistics(), second.merge(first).statistics()):
        assert found is not None and found.count == 3
        assert found.mean == pytest.approx([3, 20]) and found.std == pytest.approx([np.sqrt(8 / 3), np.sqrt(200)])
        assert found.change_counts.tolist() == [2, 1]
        assert found.change_mean == pytest.approx(np.array([[3, 25], [3, 10]]))
        assert found.change_std == pytest.approx(np.array([[2, 15], [0, 0]]))
    assert FirstSteps(2, False).statistics() is None


def test_statistics_as_json() -> None:
    found = statistics_of(np.random.default_rng(0).normal(size=(50, 3)) * 1e3, 2)
    data = found.to_json()
    assert all("\n" not in text for text in (data["mean"], data["std"]))
    back = Statistics.from_json(data)
    assert back.mean == pytest.approx(found.mean, rel=1e-4) and back.std == pytest.approx(found.std, rel=1e-4)
    assert back.count == 50 and back.to_json() == data


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"count": 1, "mean": "1 2"},
        {"count": 1, "mean": "1 2", "std": "1"},
        {"count": 1, "mean": "1 nan", "std": "1 1"},
        {"count": 1, "mean": "1 2", "std": "1 -1"},
        {"count": 1, "mean": "one", "std": "1"},
        {"count": 1, "mean": [1, 2], "std": [1, 1]},
        {"count": 1, "mean": "1 " * 5000, "std": "1 " * 5000},
        {"count": 1, "mean": "1 2", "std": "1 1", "changes": [{"count": 1, "mean": "1", "std": "1"}]},
        {"count": 1, "mean": "1 2", "std": "1 1", "changes": 3},
    ],
)
def test_what_is_no_statistics_is_one_line(data: object) -> None:
    with pytest.raises(ValueError, match="not statistics of first observations") as caught:
        Statistics.from_json(data)
    assert "\n" not in str(caught.value)


def test_the_nearest_column_and_few_outliers_decide_nothing() -> None:
    rng = np.random.default_rng(0)
    low, high = (statistics_of(rng.normal(center, 1.0, size=(400, 10))) for center in (0.0, 3.0))
    recogniser = Recogniser([low, high], False)
    seen = np.zeros((1, 10))
    assert recogniser.log_likelihood(seen).argmax(1) == [0]
    assert recogniser.log_likelihood(seen + 3).argmax(1) == [1]
    seen[0, 0] = 1e6  # far from both, a little less far from the second
    assert recogniser.log_likelihood(seen).argmax(1) == [0]


def test_what_never_changes_decides() -> None:
    """Constants differ by a little, noise by a lot; and a constant's last digits are rounded in the store."""
    rng = np.random.default_rng(0)
    tasks = [np.hstack([np.full((100, 1), value), rng.normal(0, 5, (100, 3))]) for value in (1 / 3, 0.5)]
    tasks.append(rng.normal(0.4, 0.2, (100, 4)) * [1, 25, 25, 25])  # wide enough for the others' first entries too
    recogniser = Recogniser([Statistics.from_json(statistics_of(values).to_json()) for values in tasks], False)
    for k, values in enumerate(tasks[:2]):
        assert (recogniser.log_likelihood(values).argmax(1) == k).all()


def test_columns_of_other_observations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of \[2, 3\] features"):
        Recogniser([statistics_of(np.ones((4, 2))), statistics_of(np.ones((4, 3)))], False)


def soup(env: str, variants: tuple[str, ...], shape: tuple[int, ...], outputs: int, episodes: int = 8) -> tuple:
    """Untrained columns and what their tasks look like, from a few episodes each."""
    network = ProgressiveNetwork(shape, outputs, [{"dense": 8}], lateral="none")
    for _ in variants:
        network.add_column()
    network.freeze()
    statistics = []
    for k, variant in enumerate(variants):
        seen = evaluate_column(network, env, {"variant": variant}, column=k, num_episodes=episodes, seed=50).first_steps
        assert seen is not None
        statistics.append(Statistics.from_json(seen.statistics().to_json()))
    return network, statistics


def right_in(env: str, variants: tuple[str, ...], network: ProgressiveNetwork, statistics: list, episodes: int) -> int:
    recogniser = Recogniser(statistics, len(network.given_observation_shape) > 1)
    right = 0
    for k, variant in enumerate(variants):
        played = evaluate_recognised(
            network, env, {"variant": variant}, columns=range(len(variants)), recogniser=recogniser,
            num_episodes=episodes, seed=7,
        )  # fmt: skip
        assert len(played.chosen) == episodes
        right += sum(column == k for column in played.chosen)
    return right


def test_pong_soup(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 95 % of the episodes of all eight variants."""
    make, made = evaluation.make_vector_env, {}

    def make_once(env: str, env_config: dict, num_envs: int, **_: object) -> object:
        """Making six emulators takes longer than the steps that count."""
        key = (env_config["variant"], num_envs)
        if key not in made:
            made[key] = make(env, {**env_config, "max_episode_frames": 4 * FIRST_STEPS + 8}, num_envs)
            monkeypatch.setattr(made[key], "close", lambda: None)
        return made[key]

    monkeypatch.setattr(evaluation, "make_vector_env", make_once)
    env, variants = "rllib_pnn/PongSoup-v0", pong_soup.VARIANTS
    network, statistics = soup(env, variants, (4, 84, 84), 6, episodes=6)
    assert right_in(env, variants, network, statistics, 6) >= 0.95 * 6 * len(variants)


def test_cartpole_soup_takes_what_actions_do() -> None:
    """`plain` and `flipped` look alike from the first state on; pushing the cart tells them apart."""
    env, variants = "rllib_pnn/CartPoleSoup-v0", cartpole_soup.VARIANTS
    network, statistics = soup(env, variants, (4,), 2)
    assert right_in(env, variants, network, statistics, 16) >= 0.95 * 16 * len(variants)
    blind = [Statistics(s.count, s.mean, s.std, *(x[:0] for x in (s.change_counts, s.change_mean, s.change_std)))
             for s in statistics]  # fmt: skip
    assert right_in(env, variants, network, blind, 16) < 0.95 * 16 * len(variants)


def test_every_row_is_played_by_its_column() -> None:
    network = ProgressiveNetwork((4,), 2, [{"dense": 8}, {"lstm": 8}])
    for _ in range(3):
        network.add_column()
    network.freeze()
    batch, state = torch.randn(5, 1, 4), {k: torch.randn(v.shape) for k, v in network.initial_state(5).items()}
    players = np.array([2, 0, 1, 0, 2])
    logits, after = evaluation._each_its_column(network, batch, players, state)
    for i, k in enumerate(players):
        row = {key: value[i : i + 1] for key, value in state.items()}
        expected = network(batch[i : i + 1], int(k), row)
        torch.testing.assert_close(logits[i : i + 1], expected.logits)
        for key, value in expected.state.items():
            torch.testing.assert_close(after[key][i : i + 1], value)


def test_recognising_changes_no_ordinary_evaluation() -> None:
    network = ProgressiveNetwork((4,), 2, [{"dense": 8}])
    network.add_column()
    network.freeze()
    env = "rllib_pnn/CartPoleSoup-v0"
    played = evaluate_column(network, env, {}, column=0, num_episodes=3)
    recogniser = Recogniser([played.first_steps.statistics()], False)
    again = evaluate_recognised(network, env, {}, columns=[0], recogniser=recogniser, num_episodes=3)
    assert again.chosen == (0, 0, 0) and played.chosen == ()
    assert (again.returns, again.lengths) == (played.returns, played.lengths)


def test_tasks_that_are_taken_for_each_other_are_named() -> None:
    confusion = {("a", "a"): 10, ("b", "b"): 4, ("b", "c"): 6, ("c", "b"): 5, ("c", "c"): 5, ("a", "b"): 1}
    assert confused_pairs(confusion, ["a", "b", "c"]) == [("b", "c")]


class ClippingEnv(gym.vector.VectorEnv):
    """Two episodes of 3 and 5 steps, rewards clipped to 1; the last info tells the unclipped score."""

    num_envs = 2
    single_observation_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
    single_action_space = gym.spaces.Discrete(2)
    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        self.step_count = 0
        return np.zeros((2, 4), np.float32), {}

    def step(self, actions: np.ndarray) -> tuple:
        self.step_count += 1
        ended = self.step_count == np.array([3, 5])
        infos = {"episode_score": np.array([70.0, 900.0]), "_episode_score": ended} if ended.any() else {}
        return np.zeros((2, 4), np.float32), np.ones(2), ended, np.zeros(2, bool), infos


def test_returns_are_unclipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "make_vector_env", lambda *_, **__: ClippingEnv())
    network = ProgressiveNetwork((4,), 2, [{"dense": 8}])
    network.add_column()
    network.freeze()
    played = evaluate_column(network, "any", {}, column=0, num_episodes=2)
    assert played.returns == (70.0, 900.0) and played.lengths == (3, 5)
