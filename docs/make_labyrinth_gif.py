"""Draws docs/images/labyrinth.gif: an episode of a trained column, first person.

How to run: python docs/make_labyrinth_gif.py RUN [--column 0] [--seed 0] [--steps 90]

RUN is a run folder of `rllib train` (or a column store). The column plays the level that it was trained on; actions are
samples of its policy, so the same seed gives the same episode.
"""

import argparse
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from PIL import Image

import rllib_pnn  # registers the environment's id
from rllib_pnn.network import ColumnStore

SIZE = (224, 168)
NUM_COLORS = 48
MAX_BYTES = 2_000_000
LAST_FRAME_MS = 1000


@torch.no_grad()
def play(store: ColumnStore, column: int, seed: int, steps: int) -> tuple[list[Image.Image], float, int, float]:
    """Frames of an episode's first steps, their return, the level's number of good items, frames per second."""
    network, entry = store.load(), store.entries[column]
    env = gym.make(str(entry.env), **entry.env_config, render_mode="rgb_array")
    generator = torch.Generator().manual_seed(seed)
    frames, total = [], 0.0
    try:
        observation, _ = env.reset(seed=seed)
        state = network.initial_state(1)
        over = False
        while not over and len(frames) < steps:
            frames.append(Image.fromarray(np.asarray(env.render())).resize(SIZE, Image.Resampling.BOX))
            logits, _, state = network(torch.from_numpy(observation)[None, None], column, state)
            action = torch.multinomial(logits[0, 0].softmax(-1), 1, generator=generator).item()
            observation, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            over = terminated or truncated
        frames.append(Image.fromarray(np.asarray(env.render())).resize(SIZE, Image.Resampling.BOX))
        return frames, total, env.unwrapped.level.num_good_items, env.metadata["render_fps"]
    finally:
        env.close()


def save(frames: list[Image.Image], fps: float, path: Path) -> None:
    """One palette for all frames, no dithering: what does not move costs nothing."""
    sheet = Image.new("RGB", (SIZE[0], SIZE[1] * 8))
    for i in range(8):
        sheet.paste(frames[i * (len(frames) - 1) // 7], (0, i * SIZE[1]))
    palette = sheet.quantize(NUM_COLORS)
    images = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [round(1000 / fps)] * (len(images) - 1) + [LAST_FRAME_MS]
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder or column store")
    parser.add_argument("--column", type=int, default=0, help="which column plays (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="which episode is shown (default: 0)")
    parser.add_argument("--steps", type=int, default=90, help="at most so many steps of it (default: 90)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images" / "labyrinth.gif")
    arguments = parser.parse_args()

    rllib_pnn.register()
    folder = arguments.run / "columns"
    frames, total, items, fps = play(
        ColumnStore(folder if folder.exists() else arguments.run), arguments.column, arguments.seed, arguments.steps
    )
    save(frames, fps, arguments.out)
    size = arguments.out.stat().st_size
    print(f"{arguments.out}: {len(frames)} frames, return {total:g} of {items}, {size / 1e6:.2f} MB")
    if size > MAX_BYTES:
        sys.exit(f"expected at most {MAX_BYTES / 1e6:g} MB; show fewer --steps")


if __name__ == "__main__":
    main()
