"""One ViZDoom process that plays one Labyrinth level, and what makes sure that it goes when its owner goes.

ViZDoom starts its engine as a child that talks to it through files in `/dev/shm`; a killed owner leaves both
behind. Here a guard (`labyrinth_guard`), one process per owner, hears of every engine before it starts and
removes what is left as soon as the owner is gone. Engines run in the guard's folder, so what they write
(`_vizdoom/`, settings) never lands in the user's working directory. Knows nothing of gymnasium.
"""

import itertools
import os
import shlex
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
from gymnasium.error import DependencyNotInstalled

from rllib_pnn.envs import labyrinth_guard, labyrinth_levels

try:
    import vizdoom
except ImportError as error:
    raise DependencyNotInstalled('the labyrinth needs ViZDoom: pip install "vizdoom>=1.3,<1.4"') from error

FRAME_SIZE = (160, 120)  # width, height of what the engine draws: its smallest, every larger one is slower
RENDER_SIZE = (640, 480)
TURN_PER_TIC = 5.0  # degrees

# What a button list means, in the order of `Engine.act`.
BUTTONS = (
    vizdoom.Button.MOVE_FORWARD,
    vizdoom.Button.MOVE_BACKWARD,
    vizdoom.Button.MOVE_LEFT,
    vizdoom.Button.MOVE_RIGHT,
    vizdoom.Button.TURN_LEFT_RIGHT_DELTA,
)
_RESOLUTIONS = {
    FRAME_SIZE: vizdoom.ScreenResolution.RES_160X120,
    RENDER_SIZE: vizdoom.ScreenResolution.RES_640X480,
}
_FIRST_TIC = 10  # by then items are spawned, and the engine lets the player move


class Engine:
    """A running ViZDoom process.

    Args:
        level: Which level it plays.
        size: (width, height) of its frames in pixels, `FRAME_SIZE` or `RENDER_SIZE`. Does not change what
            happens.
        track_items: Whether `items` can be asked (makes every step slower).

    Raises:
        OSError: the level file can't be written, or no program be run from the folder for temporary files.
        vizdoom.ViZDoomErrorException: the engine didn't come up.
    """

    def __init__(
        self,
        level: labyrinth_levels.Level,
        size: tuple[int, int] = FRAME_SIZE,
        track_items: bool = False,
    ) -> None:
        guard = _get_guard()
        game = vizdoom.DoomGame()
        package = Path(vizdoom.__file__).parent
        game.set_doom_game_path(str(package / "freedoom2.wad"))
        game.set_doom_scenario_path(str(labyrinth_levels.level_file()))
        game.set_doom_map(level.map_name)
        game.set_doom_skill(3)
        game.set_mode(vizdoom.Mode.PLAYER)
        game.set_episode_start_time(_FIRST_TIC)
        game.set_episode_timeout(0)  # the environment counts steps itself
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        game.set_screen_resolution(_RESOLUTIONS[size])
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        for show in (
            game.set_render_hud,
            game.set_render_weapon,
            game.set_render_crosshair,
            game.set_render_messages,
            game.set_render_screen_flashes,
            game.set_render_decals,
            game.set_render_particles,
        ):
            show(False)
        game.set_available_buttons(list(BUTTONS))
        game.set_available_game_variables([vizdoom.GameVariable.ITEMCOUNT, vizdoom.GameVariable.SECRETCOUNT])
        game.set_objects_info_enabled(track_items)
        game.add_game_args("+movebob 0")
        self._game = game
        token = guard.start(game)
        self._finalizer = weakref.finalize(self, _shut_down, game, guard, token, os.getpid())

    def new_episode(self, seed: int) -> None:
        """Starts an episode; everything in it follows from `seed` (0 <= seed < 2**31) and the actions."""
        self._game.set_seed(seed)
        self._game.new_episode()

    def act(self, buttons: list[float], num_tics: int) -> None:
        """Holds `buttons` for `num_tics` tics and draws the last; meanwhile other Python threads run.

        Raises:
            vizdoom.ViZDoomErrorException: the engine process has died.
        """
        self._game.make_action(buttons, num_tics)

    def observe(self) -> tuple[np.ndarray, int, int]:
        """The frame, (height, width, 3) uint8 RGB, and how many good and bad items were collected so far."""
        state = self._game.get_state()
        if state is None or state.game_variables is None:
            raise RuntimeError("the engine has no frame to show: it ended the episode, which nothing here asks it to")
        good, bad = state.game_variables
        return state.screen_buffer, int(good), int(bad)

    def pose(self) -> tuple[float, float, float]:
        """Where the player is: x, y (map units), heading (degrees counter-clockwise from east)."""
        variable = vizdoom.GameVariable
        x, y, heading = (
            self._game.get_game_variable(v) for v in (variable.POSITION_X, variable.POSITION_Y, variable.ANGLE)
        )
        return x, y, heading

    def items(self) -> list[labyrinth_levels.Item]:
        """The items that are there and not yet collected; needs `track_items`."""
        kinds = {labyrinth_levels.item_class(kind): kind for kind in labyrinth_levels.ITEMS}
        return [
            labyrinth_levels.Item(kinds[thing.name], thing.position_x, thing.position_y)
            for thing in self._game.get_state().objects
            if thing.name in kinds
        ]

    def close(self) -> None:
        """Ends the process; harmless the second time."""
        self._finalizer()


class _Guard:
    """The owner's end of `labyrinth_guard`."""

    def __init__(self) -> None:
        read_end, write_end = os.pipe()  # neither is inherited by programs that this process runs
        try:
            # -I -S: a guard needs nothing of the user's Python set-up, and should start fast and stay small.
            started = subprocess.run(
                [sys.executable, "-I", "-S", labyrinth_guard.__file__],
                stdin=read_end,
                capture_output=True,
                cwd="/",
                check=False,
            )
        finally:
            os.close(read_end)
        if started.returncode != 0:
            os.close(write_end)
            raise OSError(f"the labyrinth's guard process did not start: {started.stderr.decode().strip()}")
        self.folder = Path(os.fsdecode(started.stdout.strip()))
        self._pipe = write_end
        self._lock = threading.Lock()
        self._tokens = itertools.count()
        engine = Path(vizdoom.__file__).parent / "vizdoom"
        self.launcher = launcher = self.folder / labyrinth_guard.LAUNCHER
        # The engine ignores Ctrl-C, which is meant for its owner and would otherwise look like a crash to it.
        launcher.write_text(
            "#!/bin/sh\n"
            f"cd {shlex.quote(str(self.folder))} || exit\n"
            "trap '' INT\n"
            f'exec {shlex.quote(str(engine))} "$@"\n'
        )
        launcher.chmod(0o700)
        if not os.access(launcher, os.X_OK):
            raise OSError(
                f"{self.folder.parent} doesn't allow programs (mounted noexec?), but the labyrinth's "
                "engines are started from there; set TMPDIR to a folder that does"
            )

    def start(self, game: "vizdoom.DoomGame") -> str:
        """Initialises `game` under the guard's eyes; returns the token to close it with."""
        token = str(next(self._tokens))
        game.set_vizdoom_path(str(self.launcher))
        game.set_doom_config_path(str(self.folder / f"{token}.ini"))
        self._tell("starting", token)
        try:
            game.init()
        except BaseException:
            self.closed(token)
            raise
        self._tell("started", token, game.get_instance_id())
        return token

    def closed(self, token: str) -> None:
        """The engine of this token is gone."""
        (self.folder / f"{token}.ini").unlink(missing_ok=True)
        self._tell("closed", token)

    def forget(self) -> None:
        """For a forked child: let go of the pipe, whose end has to mean the end of the parent."""
        os.close(self._pipe)

    def _tell(self, *words: str) -> None:
        with self._lock:
            try:
                os.write(self._pipe, (" ".join(words) + "\n").encode())
            except BrokenPipeError:
                # Somebody killed the guard. What runs goes on; the next engine gets a new one.
                _drop_guard(self)


_guard: _Guard | None = None
_guard_lock = threading.Lock()


def _get_guard() -> _Guard:
    global _guard
    with _guard_lock:
        # The folder goes where somebody tidies up old temporary files. Engines that run are still guarded.
        if _guard is None or not _guard.launcher.exists():
            _guard = _Guard()
        return _guard


def _drop_guard(guard: _Guard) -> None:
    global _guard
    if _guard is guard:
        _guard = None


def _after_fork_in_child() -> None:
    global _guard, _guard_lock
    _guard_lock = threading.Lock()
    if _guard is not None:
        _guard.forget()
        _guard = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _shut_down(game: "vizdoom.DoomGame", guard: _Guard, token: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked child must not close its parent's engines
        game.close()
        guard.closed(token)
