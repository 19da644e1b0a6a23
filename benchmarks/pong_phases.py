"""How a policy plays Pong in each phase of the emulator, of which an agent's step, four frames, leaves four.

    python benchmarks/pong_phases.py RUN/seed_1/checkpoint_000022 --idle 6
    python benchmarks/pong_phases.py RUN/seed_1/checkpoint_000022 --episodes 8 --noop-max 30

With `--idle N`, greedy play on ALE alone after 0 .. N - 1 idle frames. With `--episodes N`, N episodes of the package's
vector env with actions drawn from the policy, up to `--noop-max` idle frames before each, by the environment's seed.
Prints return and steps of every episode, of drawn ones also who made each point: `++-+` lost the third. Reads RLlib's
checkpoint, which is a pickle: only of runs that you trust.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ale_py import ALEInterface, LoggerMode, roms
from ray.rllib.core.rl_module.rl_module import RLModule

import rllib_pnn

MAX_STEPS = 5_000
FRAMES = 4  # of an agent's step


def area_weights(size: int, to: int) -> np.ndarray:
    """(to, size): each row averages the pixels below one of the smaller picture."""
    edges = np.linspace(0, size, to + 1)
    pixel = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return overlap.clip(0) * to / size


def play_greedily(network: Any, idle: int) -> tuple[int, int]:
    ale = ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(roms.get_rom_path("pong"))
    ale.reset_game()
    actions = ale.getMinimalActionSet()
    rows, columns = area_weights(210, 84), area_weights(160, 84).T
    for _ in range(idle):
        ale.act(0)
    score, steps, screens = 0.0, 0, [ale.getScreenGrayscale()] * 2
    stack = torch.zeros((1, 4, 84, 84), dtype=torch.uint8)
    while True:
        pooled = rows @ np.maximum(*screens[-2:]) @ columns  # as Atari agents see it: the last two frames
        frame = torch.from_numpy(np.rint(pooled).astype(np.uint8))[None, None]
        stack = torch.cat([stack[:, 1:], frame], 1)
        if ale.game_over() or steps == MAX_STEPS:
            return int(score), steps
        action = actions[int(network(stack)[0].argmax())]
        screens = []
        for _ in range(FRAMES):
            score += ale.act(action)
            screens.append(ale.getScreenGrayscale())
        steps += 1


def play_episodes(network: Any, episodes: int, noop_max: int) -> list[tuple[str, int]]:
    """The points of every episode, in order, and its steps."""
    env = gym.make_vec(
        "rllib_pnn/PongSoup-v0", episodes, vectorization_mode="vector_entry_point", variant="pong", noop_max=noop_max
    )
    observations, _ = env.reset(seed=0)
    points = [""] * episodes
    steps, over = np.zeros(episodes, int), np.zeros(episodes, bool)
    while not over.all() and steps.max() < MAX_STEPS:
        logits = network(torch.from_numpy(observations))[0]
        actions = torch.distributions.Categorical(logits=logits).sample().numpy()
        observations, rewards, terminated, truncated, _ = env.step(actions)
        for n in np.flatnonzero((rewards != 0) & ~over):
            points[n] += "+" if rewards[n] > 0 else "-"
        steps += ~over
        over |= terminated | truncated
    env.close()
    return list(zip(points, steps.tolist(), strict=True))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder of a run, its columns on Pong")
    parser.add_argument("--idle", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=0)
    parser.add_argument("--noop-max", type=int, default=30)
    args = parser.parse_args()
    rllib_pnn.register()
    torch.manual_seed(0)
    ALEInterface.setLoggerMode(LoggerMode.Error)
    module = RLModule.from_checkpoint(args.checkpoint.resolve() / "learner_group/learner/rl_module/default_policy")
    for idle in range(args.idle):
        score, steps = play_greedily(module.network, idle)
        print(f"{idle} idle frames: return {score} after {steps} steps", flush=True)
    episodes = play_episodes(module.network, args.episodes, args.noop_max) if args.episodes else []
    returns = [points.count("+") - points.count("-") for points, _ in episodes]
    for (points, steps), score in zip(episodes, returns, strict=True):
        print(f"return {score:3d} after {steps} steps: {points}")
    if returns:
        print(f"mean {np.mean(returns):.1f}; below 10: {sum(r < 10 for r in returns)} of {len(returns)}")


if __name__ == "__main__":
    main()
