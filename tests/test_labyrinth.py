"""The labyrinth: what levels hold, rewards and ends of episodes, same seed same frames, nothing left
behind."""

import hashlib
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

vizdoom = pytest.importorskip("vizdoom", reason="needs ViZDoom")

from rllib_pnn.envs import labyrinth_guard, labyrinth_levels  # noqa: E402
from rllib_pnn.envs.labyrinth import ACTIONS, LabyrinthEnv, LabyrinthVectorEnv  # noqa: E402
from rllib_pnn.envs.labyrinth_engine import RENDER_SIZE, Engine  # noqa: E402
from rllib_pnn.envs.labyrinth_levels import ITEMS, LEVELS  # noqa: E402

FORWARD = list(ACTIONS).index("forward")
LOOK_LEFT = list(ACTIONS).index("look_left")
ROOT = Path(__file__).parents[1]


def random_actions(num_steps: int, num_envs: int = 1) -> np.ndarray:
    return np.random.default_rng(7).integers(len(ACTIONS), size=(num_steps, num_envs))


def rollout_hash(level: str, seed: int, num_steps: int = 60) -> str:
    """SHA-256 of all observations and rewards of a fixed sequence of actions."""
    env = LabyrinthEnv(level)
    digest = hashlib.sha256(env.reset(seed=seed)[0].tobytes())
    for (action,) in random_actions(num_steps):
        observation, reward, *_ = env.step(action)
        digest.update(observation.tobytes() + str(reward).encode())
    env.close()
    return digest.hexdigest()


def run_python(code: str, **environment: str) -> str:
    """What `code` prints in a fresh interpreter."""
    completed = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment},
        timeout=120,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.strip()


def walk_to(engine: Engine, x: float, y: float, until_counts: tuple[int, int], max_moves: int = 200) -> None:
    """Turns to (x, y) and walks until as many (good, bad) items are collected; stops at nothing on the
    way."""
    for _ in range(max_moves):
        px, py, heading = engine.pose()
        turn = (math.degrees(math.atan2(y - py, x - px)) - heading + 180) % 360 - 180
        engine.act([0, 0, 0, 0, -turn], 1)
        engine.act([1, 0, 0, 0, 0], 1)
        if engine.observe()[1:] == until_counts:
            return
    raise AssertionError(f"{until_counts} not reached, collected {engine.observe()[1:]} at {engine.pose()}")


# --- Levels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEVELS)
def test_level_holds_what_it_says(name: str) -> None:
    level = LEVELS[name]
    engine = Engine(level, track_items=True)
    layouts = set()
    for seed in range(4):
        engine.new_episode(seed)
        items = engine.items()
        rewards = [ITEMS[item.kind][0] for item in items]
        assert (rewards.count(1), rewards.count(-1)) == (level.num_good_items, level.num_bad_items)
        assert engine.observe()[1:] == (0, 0)
        x, y, heading = engine.pose()
        assert min(math.dist((x, y), (s.x, s.y)) for s in level.starts) < 1
        assert min(abs(heading - s.heading) for s in level.starts) < 1
        for thing_x, thing_y in [(x, y), *((item.x, item.y) for item in items)]:
            assert distance_to_walls(level, thing_x, thing_y) > 20  # a player, 16 in radius, can stand there
        layouts.add((round(heading), *sorted((item.kind, item.x, item.y) for item in items)))
    assert len(layouts) == 1 if name.startswith("track") else len(layouts) >= 2
    engine.close()


@pytest.mark.parametrize("name", ["avoid_1", "avoid_2"])
def test_where_good_and_bad_lie_is_a_coin_flip(name: str) -> None:
    level = LEVELS[name]
    engine = Engine(level, track_items=True)
    num_good_in_the_west = []
    for seed in range(6):
        engine.new_episode(seed)
        good = [item for item in engine.items() if ITEMS[item.kind][0] > 0]
        for flip in level.flips:
            (item,) = (i for i in good if abs(i.x - flip.x) < flip.distance and abs(i.y - flip.y) <= flip.jitter)
            assert abs(abs(item.x - flip.x) - flip.distance / 2) <= flip.jitter
        num_good_in_the_west.append(
            sum(any(0 < f.x - i.x < f.distance and abs(f.y - i.y) <= f.jitter for i in good) for f in level.flips)
        )
    # 108 flips of a fair coin: outside of this once in 10**8 (and the seeds are fixed)
    assert 24 < sum(num_good_in_the_west) < 84
    assert len(set(num_good_in_the_west)) > 1
    engine.close()


def distance_to_walls(level: labyrinth_levels.Level, x: float, y: float) -> float:
    """Signed distance to the outline, positive inside."""
    outline = np.array(level.outline, np.float32)
    return cv2.pointPolygonTest(outline, (float(x), float(y)), True)


def test_levels_are_those_of_the_paper() -> None:
    kinds = {
        name: {item.kind for item in level.items} | {k for f in level.flips for k in (f.good, f.bad)}
        for name, level in LEVELS.items()
    }
    assert kinds == {
        "track_1": {"apple"},
        "track_2": {"strawberry"},
        "track_3": {"apple"},
        "track_4": {"apple"},
        "avoid_1": {"apple", "lemon"},
        "avoid_2": {"apple", "mushroom"},
        "maze_m": {"apple"},
        "maze_y": {"apple"},
    }


def turns(level: labyrinth_levels.Level) -> list[int]:
    """The turns of a corridor in degrees, left positive, read off its left wall."""
    wall = level.outline[: len(level.outline) // 2]
    headings = [math.atan2(by - ay, bx - ax) for (ax, ay), (bx, by) in itertools.pairwise(wall)]
    return [round((math.degrees(b - a) + 180) % 360 - 180) for a, b in itertools.pairwise(headings)]


def test_tracks_have_their_shapes() -> None:
    assert turns(LEVELS["track_1"]) == []
    assert turns(LEVELS["track_2"]) == [90, 90]
    assert turns(LEVELS["track_3"]) == [90, 90, -90, -90, -90, -90, 90, 90]
    # Corners are rounded to whole units, and so are their angles.
    eighths = [1, 1, 1, -1, -1, -1, -1, -1, -1, 1, 1, 1]
    assert turns(LEVELS["track_4"]) == [pytest.approx(45 * eighth, abs=1) for eighth in eighths]


def test_sprites_are_distinct() -> None:
    assert len({sprite_name for _, _, sprite_name in ITEMS.values()}) == len(ITEMS)
    means = {}
    for kind in ITEMS:
        picture = labyrinth_levels.sprite(kind)
        drawn = picture[..., 3] == 255
        assert set(np.unique(picture[..., 3])) == {0, 255}
        assert 0.2 < drawn.mean() < 0.9
        means[kind] = picture[drawn][:, :3].mean(axis=0)
    for kind, mean in means.items():
        for other, other_mean in means.items():
            assert kind == other or np.abs(mean - other_mean).max() > 30, (kind, other)


@pytest.mark.parametrize("kind", ITEMS)
def test_each_item_counts_for_its_side(kind: str) -> None:
    name = {"apple": "track_1", "strawberry": "track_2", "lemon": "avoid_1", "mushroom": "avoid_2"}[kind]
    engine = Engine(LEVELS[name], track_items=True)
    engine.new_episode(0)
    x, y, _ = engine.pose()
    before = engine.items()
    nearest = min((item for item in before if item.kind == kind), key=lambda i: math.dist((i.x, i.y), (x, y)))
    walk_to(engine, nearest.x, nearest.y, (1, 0) if ITEMS[kind][0] > 0 else (0, 1))
    assert [item for item in before if item not in engine.items()] == [nearest]
    engine.close()


# --- The file of levels ---------------------------------------------------------------------------


def test_level_file_is_the_same_everywhere_and_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from rllib_pnn.envs import labyrinth_levels as l; print(l.level_file())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "PYTHONHASHSEED": str(i)},
        )
        for i in range(3)
    ]
    (path,) = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert Path(path).read_bytes() == labyrinth_levels.build_wad()
    assert hashlib.sha256(labyrinth_levels.build_wad()).hexdigest()[:16] in path
    assert [file.name for file in (tmp_path / "rllib_pnn").iterdir()] == [Path(path).name]

    Path(path).write_bytes(b"half a f")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert labyrinth_levels.level_file().read_bytes() == labyrinth_levels.build_wad()


def test_level_file_without_a_writable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    assert labyrinth_levels.level_file().parent == tmp_path / "tmp" / f"rllib_pnn-{os.getuid()}"

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(OSError):
        labyrinth_levels.level_file()


# --- The environment ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::UserWarning")
def test_gymnasium_finds_no_fault() -> None:
    env = LabyrinthEnv("avoid_1", render_mode="rgb_array")
    env.spec = gym.envs.registration.EnvSpec(
        "test/Labyrinth-v0", entry_point=LabyrinthEnv, kwargs={"level": "avoid_1", "render_mode": "rgb_array"}
    )
    check_env(env)
    env.close()


def test_walking_down_track_1_collects_all_and_ends() -> None:
    env = LabyrinthEnv("track_1")
    _, info = env.reset(seed=0)
    assert info == {"good_items": 0, "bad_items": 0}
    rewards, terminated = [], False
    while not terminated:
        _, reward, terminated, truncated, info = env.step(FORWARD)
        rewards.append(reward)
        assert not truncated
        assert terminated == (info["good_items"] == env.level.num_good_items)
    assert sum(rewards) == env.level.num_good_items == 16
    assert set(rewards) == {0.0, 1.0}
    observation, info = env.reset()
    assert info == {"good_items": 0, "bad_items": 0}
    assert observation.shape == (84, 84, 3)
    env.close()


def test_bad_items_cost() -> None:
    env = LabyrinthEnv("avoid_2")
    rewards = set()
    for seed in range(6):  # whatever lies on six straight ways
        _, before = env.reset(seed=seed)
        for _ in range(30):
            _, reward, terminated, _, info = env.step(FORWARD)
            good, bad = (info[key] - before[key] for key in ("good_items", "bad_items"))
            assert reward == good - bad
            assert not terminated
            rewards.add(reward)
            before = info
    assert {-1.0, 0.0, 1.0} <= rewards
    env.close()


def test_time_is_up() -> None:
    env = LabyrinthEnv("track_1", episode_seconds=2.0)
    assert env.max_steps == math.ceil(2 * 35 / 4) == 18
    env.reset(seed=0)
    ends = [env.step(LOOK_LEFT)[2:4] for _ in range(18)]
    assert ends == [(False, False)] * 17 + [(False, True)]
    env.close()


def test_actions_do_what_they_are_called() -> None:
    env = LabyrinthEnv("avoid_1")
    assert env.get_action_meanings() == list(ACTIONS)
    moved = {}
    for action, name in enumerate(ACTIONS):
        env.reset(seed=11)
        assert env._engine is not None
        x0, y0, heading0 = env._engine.pose()
        env.step(action)
        env.step(action)
        x, y, heading = env._engine.pose()
        angle = math.radians(heading0)
        ahead = (x - x0) * math.cos(angle) + (y - y0) * math.sin(angle)
        to_left = (y - y0) * math.cos(angle) - (x - x0) * math.sin(angle)
        moved[name] = (np.sign(round(ahead)), np.sign(round(to_left)), (heading - heading0 + 180) % 360 - 180)
    env.close()
    assert moved.pop("look_left") == (0, 0, pytest.approx(40, abs=0.1))
    assert moved.pop("look_right") == (0, 0, pytest.approx(-40, abs=0.1))
    still = pytest.approx(0, abs=0.1)
    assert moved == {
        "forward": (1, 0, still),
        "backward": (-1, 0, still),
        "strafe_left": (0, 1, still),
        "strafe_right": (0, -1, still),
    }


def test_same_seed_same_frames_in_any_process() -> None:
    here = [rollout_hash("avoid_1", 5), rollout_hash("maze_m", 6)]
    there = run_python(
        "from test_labyrinth import rollout_hash as h; print(h('avoid_1', 5), h('maze_m', 6))",
        PYTHONHASHSEED="1",
    )
    assert there.split() == here
    assert rollout_hash("avoid_1", 6) != here[0]


def test_an_episode_does_not_depend_on_those_before() -> None:
    env = LabyrinthEnv("avoid_1")
    first = env.reset(seed=3)[0]
    for _ in range(2):
        env.reset()
        for _ in range(30):
            env.step(FORWARD)
    assert np.array_equal(env.reset(seed=3)[0], first)
    assert not np.array_equal(env.reset()[0], first)
    env.close()


def test_render_shows_the_same_game_larger() -> None:
    env = LabyrinthEnv("avoid_1", render_mode="rgb_array")
    plain = LabyrinthEnv("avoid_1")
    assert np.array_equal(env.reset(seed=2)[0], plain.reset(seed=2)[0])
    for (action,) in random_actions(40):
        assert np.array_equal(env.step(action)[0], plain.step(action)[0])
        assert env._render_engine is not None and env._engine is not None
        assert env._render_engine.pose() == env._engine.pose()
    frame = env.render()
    assert frame is not None
    assert frame.shape == (RENDER_SIZE[1], RENDER_SIZE[0], 3)
    assert plain.render() is None
    env.close()
    plain.close()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_wrong_arguments_say_what_is_wanted() -> None:
    with pytest.raises(ValueError, match=r"Labyrinth-v0: level is 'track1'; did you mean 'track_1'\?"):
        LabyrinthEnv("track1")
    with pytest.raises(ValueError, match="frame_skip must be a whole number >= 1, got 0"):
        LabyrinthEnv(frame_skip=0)
    for seconds in (-1, "60", float("inf")):
        with pytest.raises(ValueError, match="episode_seconds must be a number from"):
            LabyrinthEnv(episode_seconds=seconds)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_envs must be a whole number >= 1, got 0"):
        LabyrinthVectorEnv(0)
    with pytest.raises(ValueError, match="render_mode is 'human'; expected one of rgb_array"):
        LabyrinthEnv(render_mode="human")
    for make in (LabyrinthEnv, LabyrinthVectorEnv):
        with pytest.raises(ValueError, match=r"unknown option 'levle'; did you mean 'level'\?"):
            make(levle="track_1")
    with pytest.raises(gym.error.ResetNeeded):
        LabyrinthEnv().step(0)


def test_without_vizdoom_the_mend_is_named() -> None:
    code = (
        "import sys; sys.modules['vizdoom'] = None\n"
        "try:\n  import rllib_pnn.envs.labyrinth\n"
        "except Exception as e: print(type(e).__name__, e)"
    )
    assert run_python(code) == ('DependencyNotInstalled the labyrinth needs ViZDoom: pip install "vizdoom>=1.3,<1.4"')


# --- The vector -----------------------------------------------------------------------------------


def test_vector_gives_what_single_environments_give() -> None:
    num_envs, arguments = 3, {"level": "avoid_1", "episode_seconds": 3.0}
    vector = LabyrinthVectorEnv(num_envs, **arguments)
    singles = [LabyrinthEnv(**arguments) for _ in range(num_envs)]
    assert vector.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert vector.observation_space.shape == (num_envs, 84, 84, 3)
    observations, infos = vector.reset(seed=4)
    handed_out = [(observations, observations.copy())]
    expected = [env.reset(seed=4 + i)[0] for i, env in enumerate(singles)]
    assert np.array_equal(observations, expected)
    assert infos["_good_items"].all()
    over = [False] * num_envs
    num_episodes = 0
    for actions in random_actions(60, num_envs):
        observations, rewards, terminations, truncations, infos = vector.step(actions)
        assert vector.observation_space.contains(observations)
        for i, env in enumerate(singles):
            if over[i]:
                observation, info = env.reset()
                reward, terminated, truncated = 0.0, False, False
                num_episodes += 1
            else:
                observation, reward, terminated, truncated, info = env.step(actions[i])
            assert np.array_equal(observations[i], observation)
            assert (rewards[i], terminations[i], truncations[i]) == (reward, terminated, truncated)
            assert {key: infos[key][i] for key in info} == info
            over[i] = terminated or truncated
        handed_out.append((observations, observations.copy()))
    assert num_episodes == 2 * num_envs
    for array, copy in handed_out:
        assert np.array_equal(array, copy)
    vector.close()
    for env in singles:
        env.close()


def test_vector_resets_what_it_is_asked_to() -> None:
    vector = LabyrinthVectorEnv(2, "avoid_1")
    first, _ = vector.reset(seed=[8, 9])
    stepped, *_ = vector.step([FORWARD, FORWARD])
    assert not np.array_equal(stepped[0], first[0])
    again, infos = vector.reset(seed=8, options={"reset_mask": np.array([True, False])})
    assert np.array_equal(again[0], first[0])
    assert np.array_equal(again[1], stepped[1])
    assert infos["_good_items"].tolist() == [True, False]
    assert vector.np_random_seed == (8, 9)
    with pytest.raises(ValueError, match="reset_mask"):
        vector.reset(options={"reset_mask": [True, False]})
    with pytest.raises(ValueError, match="actions: expected one for each of 2"):
        vector.step([0])
    vector.close()
    with pytest.raises(gym.error.ClosedEnvironmentError):
        vector.step([0, 0])


def test_a_dead_engine_is_an_error_and_close_still_works() -> None:
    vector = LabyrinthVectorEnv(2, "track_1")
    vector.reset(seed=0)
    engine = vector.envs[1]._engine
    assert engine is not None
    identity = engine._game.get_instance_id().encode()
    (pid,) = [pid for pid in processes_with(b"cmdline", identity) if is_engine(pid)]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(vizdoom.ViZDoomErrorException):
        for _ in range(3):
            vector.step([FORWARD, FORWARD])
    vector.close()


# --- Nothing stays behind -------------------------------------------------------------------------

# Forks owners that each start engines and step them, and kills every second one while it steps, the others at
# a random moment of their start: before, while and after the guard and the engines come up. How long a start
# takes is measured.
KILLER = """
import os, random, signal, sys, time
from rllib_pnn.envs.labyrinth import LabyrinthVectorEnv
dice = random.Random(0)
num_killed_in_start = num_killed_in_steps = 0
for kill in range(int(sys.argv[1])):
    read_end, write_end = os.pipe()
    owner = os.fork()
    if owner == 0:
        envs = LabyrinthVectorEnv(2, "avoid_1")
        envs.reset(seed=0)
        os.write(write_end, b"!")
        while True:
            envs.step([0, 2])
    os.close(write_end)
    began = time.monotonic()
    if kill % 2 == 0:
        os.read(read_end, 1)
        start_seconds = time.monotonic() - began
        time.sleep(0.2 * dice.random())
    else:
        time.sleep(start_seconds * dice.random())
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    if kill % 2 == 0 or os.read(read_end, 1):
        num_killed_in_steps += 1
    else:
        num_killed_in_start += 1
    os.close(read_end)
print(num_killed_in_start, num_killed_in_steps)
"""


def processes_with(file: bytes, content: bytes) -> Iterator[int]:
    """The processes whose `/proc/PID/file` has the content."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if content in Path(f"/proc/{pid}/{file.decode()}").read_bytes():
                yield int(pid)
        except OSError:
            continue


def is_engine(pid: int) -> bool:
    return os.path.basename(os.readlink(f"/proc/{pid}/exe")) == "vizdoom"


def unused_shared_memory() -> set[str]:
    """ViZDoom's files that no process has open or mapped."""
    names = {str(path) for path in Path("/dev/shm").glob("ViZDoom*")}
    return names - labyrinth_guard._shared_memory_in_use()


def wait_until_nothing_is_left(
    folder: Path, before: set[str], seconds: float = 60.0, still_there: tuple[int, ...] = ()
) -> None:
    """Fails if owners that had `folder` as TMPDIR leave processes, files or shared memory behind."""
    left: list[object] = ["not looked yet"]
    deadline = time.monotonic() + seconds
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = [
            *({*processes_with(b"environ", b"TMPDIR=" + os.fsencode(folder))} - {*still_there}),
            *folder.iterdir(),
            *(unused_shared_memory() - before),
        ]
    assert not left


def kill_owners(folder: Path, num_kills: int) -> None:
    before = unused_shared_memory()
    working_directory = folder / "cwd"
    temporary = folder / "tmp"
    working_directory.mkdir()
    temporary.mkdir()
    # Files, not pipes, which an engine that lives on would keep open.
    output, errors = folder / "output", folder / "errors"
    with output.open("w") as out, errors.open("w") as err:
        subprocess.run(
            [sys.executable, "-c", KILLER, str(num_kills)],
            cwd=working_directory,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
            stdout=out,
            stderr=err,
            check=False,
        )
    assert output.read_text(), errors.read_text()
    during_start, during_steps = map(int, output.read_text().split())
    # Or this has tested less than it says.
    assert during_start > 0 and during_steps > 0, (during_start, during_steps)
    wait_until_nothing_is_left(temporary, before)
    assert list(working_directory.iterdir()) == []


def test_killed_owners_leave_nothing(tmp_path: Path) -> None:
    kill_owners(tmp_path, num_kills=6)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_200_killed_owners_leave_nothing(tmp_path: Path) -> None:
    kill_owners(tmp_path, num_kills=200)


def test_a_forked_child_does_not_hide_the_death_of_its_parent(tmp_path: Path) -> None:
    before = unused_shared_memory()
    code = (
        "import os, signal, time\nfrom rllib_pnn.envs.labyrinth import LabyrinthEnv\n"
        "env = LabyrinthEnv()\nenv.reset()\nchild = os.fork()\n"
        "if child == 0:\n  os.close(1)\n  time.sleep(60)\n  os._exit(0)\n"
        "print(child, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
    )
    child = int(owner.communicate(timeout=60)[0])
    try:
        wait_until_nothing_is_left(tmp_path, before, still_there=(child,))
        assert Path(f"/proc/{child}").exists()
    finally:
        os.kill(child, signal.SIGKILL)


def test_an_owner_that_ends_in_order_leaves_nothing(tmp_path: Path) -> None:
    before = unused_shared_memory()
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    code = (
        "from rllib_pnn.envs.labyrinth import LabyrinthVectorEnv as V\n"
        "a, b = V(1), V(1)\na.reset()\nb.reset()\na.close()"  # b is left to the interpreter's end
    )
    run_python(code, TMPDIR=str(temporary))
    wait_until_nothing_is_left(temporary, before)


def test_a_run_is_not_disturbed_by_the_death_of_another(tmp_path: Path) -> None:
    expected = rollout_hash("avoid_1", 5, num_steps=200)
    env = LabyrinthEnv("avoid_1")
    digest = hashlib.sha256(env.reset(seed=5)[0].tobytes())
    code = (
        "import os, signal\nfrom rllib_pnn.envs.labyrinth import LabyrinthEnv\n"
        "env = LabyrinthEnv('avoid_1')\nenv.reset(seed=5)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    others = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
            stdout=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    actions = iter(random_actions(200))
    for other in others:
        other.wait(60)
        for _ in range(100):
            observation, reward, *_ = env.step(next(actions)[0])
            digest.update(observation.tobytes() + str(reward).encode())
    env.close()
    assert digest.hexdigest() == expected


def test_names_that_no_one_told_are_found_and_those_in_use_are_kept(tmp_path: Path) -> None:
    unused, used = (Path(f"/dev/shm/ViZDoomMQCtr-test-{os.getpid()}-{i}") for i in range(2))
    unused.touch()
    with used.open("w"):
        labyrinth_guard._unlink_unused(time.time(), deadline=0)
        assert (unused.exists(), used.exists()) == (False, True)
    used.unlink()


def test_engines_start_again_after_temporary_files_were_tidied_up(tmp_path: Path) -> None:
    before = unused_shared_memory()
    code = (
        "import glob, os, shutil, tempfile\nfrom rllib_pnn.envs.labyrinth import LabyrinthEnv\n"
        "first = LabyrinthEnv()\nfirst.reset()\n"
        "for folder in glob.glob(tempfile.gettempdir() + '/*'): shutil.rmtree(folder)\n"
        "second = LabyrinthEnv()\nsecond.reset()\nfirst.step(0)\nsecond.step(0)\n"
        "print('alive', flush=True)\nos.kill(os.getpid(), 9)"
    )
    owner = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        check=False,
    )
    assert owner.stdout == b"alive\n", owner.stderr
    wait_until_nothing_is_left(tmp_path, before)
