"""The eight Labyrinth levels (Rusu et al. 2016, section 5.4) as data, and the WAD file that holds them.

Corridors, rooms and mazes are our own plans after the paper's one-line descriptions (it prints no maps).
Everything that the engine reads, from the walls to the fruit, is made here: `level_file` builds the bytes of
one WAD (the same bytes every time) and keeps them in the user's cache. Knows nothing of gymnasium, and needs
no engine.

Lengths are map units (a player is 32 wide and 56 high), angles degrees counter-clockwise from east.
"""

import functools
import hashlib
import itertools
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

TICS_PER_SECOND = 35
PICKUP_DISTANCE = 40  # a player (radius 16) takes what lies this near along both axes (item radius 24)

# kind -> (reward, thing number in the map, sprite name of four letters)
ITEMS: dict[str, tuple[int, int, str]] = {
    "apple": (1, 20001, "APPL"),
    "strawberry": (1, 20002, "STRB"),
    "lemon": (-1, 20003, "LEMN"),
    "mushroom": (-1, 20004, "MUSH"),
}
_PLAYER_START = 1
_CORRIDOR_WIDTH = 160

Point = tuple[float, float]


@dataclass(frozen=True)
class Item:
    """One thing to collect; `kind` is a key of `ITEMS`."""

    kind: str
    x: float
    y: float


@dataclass(frozen=True)
class Start:
    """Where an episode may begin; `heading` is a multiple of 45 degrees (the engine rounds any other)."""

    x: float
    y: float
    heading: int


@dataclass(frozen=True)
class CoinFlip:
    """A good and a bad item `distance` apart (east-west) around (x, y).

    Which is where is a coin flip in every episode, and each lies up to `jitter` off its place along both
    axes.
    """

    good: str
    bad: str
    x: float
    y: float
    distance: int
    jitter: int


@dataclass(frozen=True)
class Level:
    """One level: `outline` is a clockwise polygon, the walls of everything that can be walked on."""

    name: str
    summary: str
    map_name: str
    outline: tuple[Point, ...]
    starts: tuple[Start, ...]
    textures: tuple[str, str, str]  # of wall, floor and ceiling, from the Freedoom data in ViZDoom's wheel
    items: tuple[Item, ...] = ()
    flips: tuple[CoinFlip, ...] = ()

    @property
    def num_good_items(self) -> int:
        """How many items with a positive reward an episode has; the same in every episode."""
        return len(self.flips) + sum(ITEMS[item.kind][0] > 0 for item in self.items)

    @property
    def num_bad_items(self) -> int:
        """How many items with a negative reward an episode has; the same in every episode."""
        return len(self.flips) + sum(ITEMS[item.kind][0] < 0 for item in self.items)


# --- Plans -----------------------------------------------------------------------------------------------


def corridor_outline(path: Sequence[Point], width: float) -> tuple[Point, ...]:
    """A corridor of `width` along a centre line of straight pieces -> its clockwise polygon.

    Two pieces meet in a mitre, so a turn of more than about 120 degrees would grow a spike: split it in two.
    """
    left, right = [], []
    for i, (x, y) in enumerate(path):
        directions = [
            ((bx - ax) / math.dist((ax, ay), (bx, by)), (by - ay) / math.dist((ax, ay), (bx, by)))
            for (ax, ay), (bx, by) in zip(path[max(i - 1, 0) :], path[max(i - 1, 0) + 1 : i + 2], strict=False)
        ]
        normal = np.sum([(-dy, dx) for dx, dy in directions], axis=0)
        normal /= np.linalg.norm(normal)
        dx, dy = directions[0]
        reach = width / 2 / (normal[1] * dx - normal[0] * dy)
        left.append((x + normal[0] * reach, y + normal[1] * reach))
        right.append((x - normal[0] * reach, y - normal[1] * reach))
    return _rounded(left + right[::-1])


def y_outline(stem: float, arm: float, width: float) -> tuple[Point, ...]:
    """A stem up from the origin and two arms at 45 degrees to it -> clockwise polygon."""
    half, s = width / 2, math.sqrt(0.5)
    shoulder = stem + half * (1 - 2 * s)  # where the wall of the stem meets the outer wall of an arm
    end, across = arm * s, half * s
    one_side = [
        (half, 0.0),
        (half, shoulder),
        (end + across, stem + end - across),
        (end - across, stem + end + across),
    ]
    crotch = (0.0, stem + half / s)
    return _rounded([(-x, y) for x, y in one_side] + [crotch] + one_side[::-1])


def along(path: Sequence[Point], first: float, spacing: float, count: int, sway: float = 0.0) -> list[Point]:
    """`count` points on a centre line, from `first` on every `spacing`; they swing left and right of it by
    `sway`."""
    pieces = list(itertools.pairwise(path))
    points = []
    for n in range(count):
        distance = first + n * spacing
        for (ax, ay), (bx, by) in pieces:
            length = math.dist((ax, ay), (bx, by))
            if distance <= length:
                break
            distance -= length
        else:
            raise ValueError(f"point {n} of {count} lies beyond the end of the centre line by {distance:.0f} units")
        dx, dy = (bx - ax) / length, (by - ay) / length
        side = sway * (0, 1, 0, -1)[n % 4]
        points.append((ax + dx * distance - dy * side, ay + dy * distance + dx * side))
    return points


def _rounded(points: Sequence[Point]) -> tuple[Point, ...]:
    return tuple((float(round(x)), float(round(y))) for x, y in points)


def _items(kind: str, points: Sequence[Point]) -> tuple[Item, ...]:
    return tuple(Item(kind, round(x), round(y)) for x, y in points)


def _all_headings(x: float, y: float) -> tuple[Start, ...]:
    return tuple(Start(x, y, heading) for heading in range(0, 360, 45))


def _track(
    number: int, shape: str, path: Sequence[Point], items: tuple[Item, ...], textures: tuple[str, str, str]
) -> Level:
    (ax, ay), (bx, by) = path[:2]
    heading = round(math.degrees(math.atan2(by - ay, bx - ax))) % 360
    length = math.dist((ax, ay), (bx, by))
    start = Start(ax + 64 * (bx - ax) / length, ay + 64 * (by - ay) / length, heading)
    outline = corridor_outline(path, _CORRIDOR_WIDTH)
    return Level(f"track_{number}", shape, f"MAP0{number}", outline, (start,), textures, items)


def _avoid(number: int, bad: str, textures: tuple[str, str, str]) -> Level:
    summary = f"large square room, apples (good) and {bad}s (bad)"
    cells, cell = 6, 224  # 6 x 6 cells with an item in each; the start, a corner of four, is never on one
    size = cells * cell
    flips = tuple(
        CoinFlip("apple", bad, (2 * column + 1) * cell, row * cell + cell / 2, distance=cell, jitter=cell // 4)
        for row in range(cells)
        for column in range(cells // 2)
    )
    outline = _rounded([(0, size), (size, size), (size, 0), (0, 0)])
    starts = _all_headings(size / 2, size / 2)
    return Level(f"avoid_{number}", summary, f"MAP0{4 + number}", outline, starts, textures, flips=flips)


def _maze_m() -> Level:
    path = [(0, 0), (0, 640), (120, 640), (480, 280), (840, 640), (960, 640), (960, 0)]
    apples = _items("apple", [(x, y) for x in (0, 960) for y in (64, 136, 208)])
    return Level(
        "maze_m",
        "M-shaped maze, apples at dead ends",
        "MAP07",
        corridor_outline(path, _CORRIDOR_WIDTH),
        _all_headings(480, 280),
        ("STARTAN2", "FLOOR4_8", "CEIL5_1"),
        apples,
    )


def _maze_y() -> Level:
    stem, arm = 704, 768
    ends = [math.sqrt(0.5) * (arm - from_end) for from_end in (64, 136, 208)]
    return Level(
        "maze_y",
        "Y-shaped maze, apples at dead ends",
        "MAP08",
        y_outline(stem, arm, _CORRIDOR_WIDTH),
        _all_headings(0, 80),
        ("BRICK4", "RROCK19", "CEIL5_1"),
        _items("apple", [(side * end, stem + end) for side in (-1, 1) for end in ends]),
    )


def _make_levels() -> tuple[Level, ...]:
    straight = [(0, 0), (1792, 0)]
    u_shape = [(0, 1152), (0, 0), (832, 0), (832, 1152)]
    omega_90 = [(0, 0), (640, 0), (640, 320), (320, 320), (320, 960), (1280, 960), (1280, 320), (960, 320)]
    omega_90 += [(960, 0), (1600, 0)]
    omega_45 = [(0, 0), (560, 0), (720, 160), (720, 320), (480, 560), (480, 880), (720, 1120), (1040, 1120)]
    omega_45 += [(1280, 880), (1280, 560), (1040, 320), (1040, 160), (1200, 0), (1760, 0)]
    return (
        _track(
            1,
            "simple corridor, many apples",
            straight,
            _items("apple", along(straight, 208, 96, 16, sway=28)),
            ("BRICK1", "FLAT5_4", "CEIL5_1"),
        ),
        _track(
            2,
            "U-shaped corridor, many strawberries",
            u_shape,
            _items("strawberry", along(u_shape, 208, 128, 22, sway=28)),
            ("STONE2", "RROCK19", "FLAT5_4"),
        ),
        _track(
            3,
            "omega-shaped corridor, 90 degree turns, few apples",
            omega_90,
            _items("apple", along(omega_90, 480, 640, 7)),
            ("METAL1", "FLOOR0_1", "CEIL5_1"),
        ),
        _track(
            4,
            "omega-shaped corridor, 45 degree turns, few apples",
            omega_45,
            _items("apple", along(omega_45, 400, 520, 7)),
            ("BROWN96", "FLOOR4_8", "CEIL5_1"),
        ),
        _avoid(1, "lemon", ("STONE3", "FLAT5_4", "CEIL5_1")),
        _avoid(2, "mushroom", ("BRICK6", "RROCK19", "CEIL5_1")),
        _maze_m(),
        _maze_y(),
    )


LEVELS: dict[str, Level] = {level.name: level for level in _make_levels()}


# --- Sprites ---------------------------------------------------------------------------------------------

_SPRITE_SIZE = 48  # pixels
_OVERSAMPLING = 8  # drawn this many times larger, then averaged down


def sprite(kind: str) -> np.ndarray:
    """The picture of an item: (48, 48, 4) uint8 RGBA, alpha 0 or 255."""
    k = _OVERSAMPLING
    canvas = np.zeros((_SPRITE_SIZE * k, _SPRITE_SIZE * k, 4), np.uint8)

    def ellipse(x: float, y: float, rx: float, ry: float, color: tuple[int, int, int], angle: float = 0) -> None:
        cv2.ellipse(
            canvas,
            (round(x * k), round(y * k)),
            (round(rx * k), round(ry * k)),
            angle,
            0,
            360,
            (*color, 255),
            -1,
        )

    def polygon(points: Sequence[Point], color: tuple[int, int, int]) -> None:
        cv2.fillPoly(canvas, [np.array([(round(x * k), round(y * k)) for x, y in points])], (*color, 255))

    if kind == "apple":
        ellipse(17, 29, 14, 17, (210, 20, 20))
        ellipse(31, 29, 14, 17, (210, 20, 20))
        ellipse(14, 23, 4, 6, (255, 130, 120))
        polygon([(22, 16), (23, 4), (27, 3), (26, 16)], (90, 50, 10))
        ellipse(34, 8, 9, 4, (30, 190, 30), angle=-20)
    elif kind == "strawberry":
        ellipse(24, 22, 18, 12, (255, 40, 110))
        polygon([(6, 23), (42, 23), (34, 37), (24, 47), (14, 37)], (255, 40, 110))
        for x, y in [(14, 22), (24, 21), (34, 22), (19, 29), (29, 29), (24, 37)]:
            ellipse(x, y, 1.6, 2.4, (255, 240, 150))
        for tip in (4, 14, 24, 34, 44):
            polygon([(18, 8), (30, 8), (tip, 17)], (30, 170, 40))
        polygon([(22, 10), (22, 2), (26, 2), (26, 10)], (30, 170, 40))
    elif kind == "lemon":
        ellipse(24, 30, 19, 14, (250, 225, 20))
        ellipse(4, 30, 5, 4, (235, 200, 20))
        ellipse(44, 30, 5, 4, (235, 200, 20))
        ellipse(17, 24, 6, 3, (255, 255, 190), angle=-25)
    elif kind == "mushroom":
        polygon([(18, 24), (30, 24), (33, 46), (15, 46)], (240, 230, 210))
        ellipse(24, 24, 22, 18, (165, 105, 50))
        canvas[27 * k :, : 15 * k] = canvas[27 * k :, 33 * k :] = 0  # a cap is flat below
        polygon([(15, 27), (33, 27), (33, 46), (15, 46)], (240, 230, 210))
        for x, y, r in [(14, 20, 4), (26, 12, 4), (36, 21, 3.5)]:
            ellipse(x, y, r, r, (245, 240, 250))
    else:
        raise ValueError(f"kind: expected one of {', '.join(ITEMS)}, got {kind!r}")
    # Colours are averaged over what is drawn only, or edges would darken towards the transparent black around
    # them.
    opaque = (canvas[..., 3:] > 0).astype(np.float32)
    cover = cv2.resize(opaque, (_SPRITE_SIZE, _SPRITE_SIZE), interpolation=cv2.INTER_AREA)
    color = cv2.resize(
        canvas[..., :3].astype(np.float32) * opaque,
        (_SPRITE_SIZE, _SPRITE_SIZE),
        interpolation=cv2.INTER_AREA,
    )
    visible = cover >= 0.5
    result = np.zeros((_SPRITE_SIZE, _SPRITE_SIZE, 4), np.uint8)
    result[visible, :3] = np.rint(color[visible] / cover[visible, None])
    result[visible, 3] = 255
    return result


def _sprite_png(kind: str) -> bytes:
    """A PNG whose `grAb` chunk says which pixel stands on the item's position: bottom centre."""
    rgba = sprite(kind)
    rows = b"".join(b"\0" + row.tobytes() for row in rgba)  # filter type 0 for each row
    header = struct.pack(">IIBBBBB", rgba.shape[1], rgba.shape[0], 8, 6, 0, 0, 0)
    offset = struct.pack(">ii", rgba.shape[1] // 2, rgba.shape[0] - 1)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    # Stored, not deflated (level 0): the same bytes whatever the zlib.
    body = [(b"IHDR", header), (b"grAb", offset), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in body)


# --- The WAD ---------------------------------------------------------------------------------------------

# COUNTITEM and COUNTSECRET make the engine count good and bad items apart. One statement a line: the engine's
# parser crashes on `Stop` behind a frame.
_ITEM_ACTOR = """\
actor Lab{name} : CustomInventory {number}
{{
  +{counter}
  +INVENTORY.ALWAYSPICKUP
  +INVENTORY.QUIET
  Radius 24
  Height 32
  Scale 1.2
  Inventory.PickupMessage ""
  States
  {{
  Spawn:
    {sprite} A -1 bright
    Stop
  Pickup:
    TNT1 A 0
    Stop
  }}
}}
"""
_COIN_FLIP_ACTOR = """\
actor LabCoinFlip{number} {number}
{{
  +NOBLOCKMAP
  +NOGRAVITY
  States
  {{
  Spawn:
    TNT1 A 0 NoDelay A_Jump(128, "Other")
    TNT1 A 0 A_SpawnItemEx("{good}", {west}, {y}, 0, 0, 0, 0, 0, {flags})
    TNT1 A 1 A_SpawnItemEx("{bad}", {east}, {y}, 0, 0, 0, 0, 0, {flags})
    Stop
  Other:
    TNT1 A 0 A_SpawnItemEx("{bad}", {west}, {y}, 0, 0, 0, 0, 0, {flags})
    TNT1 A 1 A_SpawnItemEx("{good}", {east}, {y}, 0, 0, 0, 0, 0, {flags})
    Stop
  }}
}}
"""
_PLAYER_ACTOR = """\
actor LabPlayer : DoomPlayer
{
  Player.DisplayName "Lab"
  Player.StartItem "Fist"
  Player.ForwardMove 1.6, 1.6
  Player.SideMove 1.6, 1.6
}
"""
_NO_CHECK_POSITION = 32  # flag of A_SpawnItemEx: spawn the item whatever is there


def item_class(kind: str) -> str:
    """The engine's class name of an item, such as `LabApple`."""
    return f"Lab{kind.capitalize()}"


@functools.cache
def build_wad() -> bytes:
    """All levels, their actors and sprites as one WAD (PWAD): the same bytes at every call."""
    actors: list[str] = []
    flip_numbers: dict[tuple[str, str, int, int], int] = {}
    for kind, (reward, number, sprite_name) in ITEMS.items():
        counter = "COUNTITEM" if reward > 0 else "COUNTSECRET"
        actors.append(_ITEM_ACTOR.format(name=kind.capitalize(), number=number, counter=counter, sprite=sprite_name))
    for level in LEVELS.values():
        for flip in level.flips:
            recipe = (flip.good, flip.bad, flip.distance, flip.jitter)
            if recipe in flip_numbers:
                continue
            number = flip_numbers[recipe] = 20101 + len(flip_numbers)
            aside = f"random(-{flip.jitter}, {flip.jitter})"
            actors.append(
                _COIN_FLIP_ACTOR.format(
                    number=number,
                    good=item_class(flip.good),
                    bad=item_class(flip.bad),
                    west=f"-{flip.distance // 2} + {aside}",
                    east=f"{flip.distance // 2} + {aside}",
                    y=aside,
                    flags=_NO_CHECK_POSITION,
                )
            )
    actors.append(_PLAYER_ACTOR)
    options = '  sky1 = "SKY1"\n  randomplayerstarts\n  nointermission\n'
    map_info = 'gameinfo { playerclasses = "LabPlayer" }\n' + "".join(
        f'map {level.map_name} "{level.name}"\n{{\n{options}}}\n' for level in LEVELS.values()
    )
    lumps = [
        ("DECORATE", "".join(actors).encode()),
        ("MAPINFO", map_info.encode()),
        # Bad items count as secrets, whose finding the engine would otherwise announce on the screen.
        ("LANGUAGE", b'[enu default]\nSECRETMESSAGE = "";\n'),
        ("S_START", b""),
        *((f"{sprite_name}A0", _sprite_png(kind)) for kind, (_, _, sprite_name) in ITEMS.items()),
        ("S_END", b""),
    ]
    for level in LEVELS.values():
        lumps += [
            (level.map_name, b""),
            ("TEXTMAP", _text_map(level, flip_numbers).encode()),
            ("ENDMAP", b""),
        ]
    data, directory = b"", b""
    for name, content in lumps:
        directory += struct.pack("<II8s", 12 + len(data), len(content), name.encode())
        data += content
    return struct.pack("<4sII", b"PWAD", len(lumps), 12 + len(data)) + data + directory


def _text_map(level: Level, flip_numbers: dict[tuple[str, str, int, int], int]) -> str:
    """The level in UDMF, the engine's text format for maps: one sector, walls that are open on their right
    side."""
    things = [(start.x, start.y, _PLAYER_START, start.heading) for start in level.starts]
    things += [(item.x, item.y, ITEMS[item.kind][1], 0) for item in level.items]
    things += [(f.x, f.y, flip_numbers[f.good, f.bad, f.distance, f.jitter], 0) for f in level.flips]
    corners = level.outline
    lines = ['namespace = "ZDoom";']
    lines += [f"vertex {{ x = {x:.1f}; y = {y:.1f}; }}" for x, y in corners]
    wall, floor, ceiling = level.textures
    offset = 0.0
    for i, corner in enumerate(corners):
        after = (i + 1) % len(corners)
        lines.append(f"linedef {{ v1 = {i}; v2 = {after}; sidefront = {i}; blocking = true; }}")
        lines.append(f'sidedef {{ sector = 0; texturemiddle = "{wall}"; offsetx = {round(offset)}; }}')
        offset += math.dist(corner, corners[after])  # so that the texture runs on around a corner
    lines.append(
        f'sector {{ texturefloor = "{floor}"; textureceiling = "{ceiling}"; '
        "heightfloor = 0; heightceiling = 128; lightlevel = 255; }"
    )
    everywhere = "skill1 = true; skill2 = true; skill3 = true; skill4 = true; skill5 = true; single = true; "
    everywhere += "class1 = true; class2 = true; class3 = true;"
    lines += [
        f"thing {{ x = {x:.1f}; y = {y:.1f}; type = {number}; angle = {angle}; {everywhere} }}"
        for x, y, number, angle in things
    ]
    return "\n".join(lines) + "\n"


# --- The cache -------------------------------------------------------------------------------------------


def level_file() -> Path:
    """The WAD of all levels on disk; written at first use.

    It lies in `$XDG_CACHE_HOME/rllib_pnn` (`~/.cache/rllib_pnn`), or where that can't be written in the
    user's own folder in the system's place for temporary files. Its name holds the hash of its content and it
    is moved into place whole, so any number of processes, versions and users can ask at the same time.

    Raises:
        OSError: neither folder can be written.
    """
    wad = build_wad()
    name = f"labyrinth-{hashlib.sha256(wad).hexdigest()[:16]}.wad"
    try:
        return _kept(_user_cache() / name, wad)
    except OSError:
        user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
        return _kept(Path(tempfile.gettempdir()) / f"rllib_pnn-{user}" / name, wad)


def _user_cache() -> Path:
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG standard says to ignore a path that is not absolute.
    home = Path(xdg) if os.path.isabs(xdg) else Path(os.path.expanduser("~")) / ".cache"
    return home / "rllib_pnn"


def _kept(path: Path, content: bytes) -> Path:
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write_whole(path, content)
    return path


def _write_whole(path: Path, content: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
