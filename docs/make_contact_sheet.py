"""This script draws the eight variants of Pong Soup at one moment of one game: `docs/images/pong_soup.png`.

How to run: `.venv/bin/python docs/make_contact_sheet.py [FILE.png]` (seconds; always the same picture).
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from rllib_pnn.envs.pong_soup import BACKGROUND, NOISE_STD, VARIANTS, ZOOM_OFFSET, PongSoupVectorEnv

SEED = 1
FIRST_STEP = 300
FIELD = (slice(14, 77), slice(14, 70))  # between the walls and the paddles' columns
TITLES = {
    "pong": "the game as it is",
    "noisy": f"frozen Gaussian noise, std {NOISE_STD:g}",
    "black": "black background",
    "white": "white background",
    "zoom": f"75 %, moved by {ZOOM_OFFSET}",
    "v_flip": "upside down",
    "h_flip": "left and right exchanged",
    "vh_flip": "both",
}


def main(path: Path) -> None:
    frames = frames_of_one_moment()
    figure, axes = plt.subplots(2, 4, figsize=(12, 6.6), layout="constrained")
    for axis, variant in zip(axes.flat, VARIANTS, strict=True):
        axis.imshow(frames[variant], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(f"{variant}\n", fontsize=13, fontweight="bold", loc="left")
        axis.text(0, 1.02, TITLES[variant], transform=axis.transAxes, fontsize=10, va="bottom")
        axis.set_xticks([])
        axis.set_yticks([])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    print(path)


def frames_of_one_moment() -> dict[str, np.ndarray]:
    """Newest frame (84, 84) of every variant, at the first step from `FIRST_STEP` that shows all objects."""
    envs = {variant: PongSoupVectorEnv(1, variant=variant) for variant in VARIANTS}
    for env in envs.values():
        env.reset(seed=SEED)
    rng = np.random.default_rng(SEED)
    step = 0
    while True:
        step += 1
        action = rng.integers(0, 6, size=1)
        frames = {variant: env.step(action)[0][0, -1] for variant, env in envs.items()}
        if step >= FIRST_STEP and shows_all_objects(frames["pong"]):
            return frames


def shows_all_objects(frame: np.ndarray) -> bool:
    rows, columns = FIELD
    left, ball, right = frame[rows, : columns.start], frame[FIELD], frame[rows, columns.stop :]
    return left.max() > BACKGROUND and right.max() > BACKGROUND and ball.max() > BACKGROUND + 100


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images" / "pong_soup.png")
