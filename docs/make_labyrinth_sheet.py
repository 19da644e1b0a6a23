"""Draws docs/images/labyrinth.png: every Labyrinth level as the agent sees it and from above.

How to run: python docs/make_labyrinth_sheet.py [--seed 3] [--out docs/images/labyrinth.png]
"""

import argparse
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from rllib_pnn.envs.labyrinth import to_observation
from rllib_pnn.envs.labyrinth_engine import RENDER_SIZE, Engine
from rllib_pnn.envs.labyrinth_levels import LEVELS, Item, Level, sprite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=3, help="which episode is shown (default: 3)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images" / "labyrinth.png")
    arguments = parser.parse_args()

    figure, axes = plt.subplots(6, 4, figsize=(15, 18), height_ratios=[3, 3, 4.2] * 2, layout="constrained")
    for n, level in enumerate(LEVELS.values()):
        view_axes, observation_axes, map_axes = axes[3 * (n // 4) : 3 * (n // 4) + 3, n % 4]
        frame, observation, pose, items = first_frame(level, arguments.seed)
        view_axes.imshow(frame)
        view_axes.set_title(f"{level.name}\n{textwrap.fill(level.summary, 30)}", fontsize=12)
        observation_axes.imshow(observation)
        draw_map(map_axes, level, pose, items)
        for ax in (view_axes, observation_axes, map_axes):
            ax.set_xticks([])
            ax.set_yticks([])
    for row in (0, 3):
        axes[row, 0].set_ylabel("first person")
        axes[row + 1, 0].set_ylabel("observation, 84 x 84")
        axes[row + 2, 0].set_ylabel("from above")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=70)
    print(arguments.out)


def first_frame(level: Level, seed: int) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float], list[Item]]:
    """An episode's start: the large frame, the observation, where the player stands, what lies there."""
    painter = Engine(level, RENDER_SIZE, track_items=True)
    painter.new_episode(seed)
    frame, _, _ = painter.observe()
    pose, items = painter.pose(), painter.items()
    painter.close()
    engine = Engine(level)
    engine.new_episode(seed)
    observation = to_observation(engine.observe()[0])
    engine.close()
    return frame, observation, pose, items


def draw_map(ax: Axes, level: Level, pose: tuple[float, float, float], items: list[Item]) -> None:
    """The walls, the items as their sprites, and an arrow where the player stands."""
    ax.set_facecolor("#30343c")
    outline = np.array(level.outline)
    ax.fill(outline[:, 0], outline[:, 1], facecolor="#8f8a7c", edgecolor="black", linewidth=1.5)
    low, high = outline.min(axis=0), outline.max(axis=0)
    middle, reach = (low + high) / 2, max(high - low) / 2 + 90
    half = 0.055 * reach
    for item in items:
        box = (item.x - half, item.x + half, item.y - half, item.y + half)
        ax.imshow(sprite(item.kind), extent=box, zorder=2)
    x, y, heading = pose
    dx, dy = np.cos(np.radians(heading)), np.sin(np.radians(heading))
    ax.annotate(
        "",
        xy=(x + 2.4 * half * dx, y + 2.4 * half * dy),
        xytext=(x - 1.2 * half * dx, y - 1.2 * half * dy),
        arrowprops={"arrowstyle": "-|>", "color": "#0a3cff", "linewidth": 3, "mutation_scale": 18},
    )
    ax.set_xlim(middle[0] - reach, middle[0] + reach)
    ax.set_ylim(middle[1] - reach, middle[1] + reach)
    ax.set_aspect("equal")


if __name__ == "__main__":
    main()
