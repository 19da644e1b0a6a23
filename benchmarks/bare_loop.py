"""PPO and A2C on ALE's native vector env, as lean as plain torch allows: the limit to approach.

One process (or one per core, gradients averaged) acts on `ale_py.vector_env.AtariVectorEnv` and learns from
it: no Ray, no RLlib and no `rllib_pnn`. It answers two questions: how many env-steps/s a core can give to an
algorithm, and which settings solve a game soonest. Losses follow RLlib's conventions (the value loss is
`coeff * error**2` without a half, advantages are normalised over the whole train batch, schedules are linear
in env-steps), so a setting found here can be written into an `AlgorithmConfig`.

    python benchmarks/bare_loop.py --algo ppo --steps 1000000 --seed 0 --out ppo.csv
    python benchmarks/bare_loop.py --algo a2c --envs 16 --rollout 5 --processes 2 --out a2c.csv

Shapes: T rollout length, N envs, B a minibatch of the T * N steps, A actions; observations are uint8
(4, 84, 84). One env-step is one action of one env, that is 4 frames. Returns are per episode, of the rewards
learned from. The gradients are those of the sampled actions' own policy: A2C is synchronous, never stale.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import math
import os
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ale_py.vector_env import AtariVectorEnv
from gymnasium.spaces import Discrete
from torch import Tensor, nn
from torch.nn import functional as F

COLUMNS = [
    "env_steps",
    "wall_s",
    "episodes",
    "return_mean_20",
    "entropy",
    "value_loss",
    "explained_variance",
    "approx_kl",
    "clip_fraction",
    "grad_norm",
    "steps_per_s",
]


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed tensors: giving them back costs a page fault per 4 KiB at the next use.

    Without glibc (macOS, musl) it does nothing.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    m_trim_threshold, m_mmap_max = -1, -4
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


class Column(nn.Module):
    """The paper's Atari column: three convolutions of 12 maps, dense 256, policy and value heads; ReLU."""

    def __init__(self, num_actions: int, init: str, input_shift: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 12, 8, 4)
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(12, 12, 4, 2),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12 * 7 * 7, 256),
            nn.ReLU(),
        )
        self.policy = nn.Linear(256, num_actions)
        self.value = nn.Linear(256, 1)
        if init == "orthogonal":
            for layer in (self.first, *self.body):
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    nn.init.orthogonal_(layer.weight, math.sqrt(2.0))
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
            nn.init.orthogonal_(self.value.weight, 1.0)
            nn.init.zeros_(self.value.bias)
        if init in ("orthogonal", "torch_small_head"):
            nn.init.orthogonal_(self.policy.weight, 0.01)
            nn.init.zeros_(self.policy.bias)
        self.input_shift = input_shift

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 4, 84, 84) as floats in 0..255 -> logits (B, A) and values (B,)."""
        # W(x/255 - m) + b = (W/255)x + (b - mW1): scaling 12 filters costs less than scaling every pixel.
        weight, bias = self.first.weight, self.first.bias
        if bias is not None and self.input_shift != 0.0:
            bias = bias - self.input_shift * weight.sum((1, 2, 3))
        x = self.body(F.conv2d(pixels, weight / 255.0, bias, self.first.stride))
        return self.policy(x), self.value(x).squeeze(-1)


def schedule(start: float, end: float, until: float, step: int) -> float:
    """Linear from `start` at step 0 to `end` at step `until`, constant afterwards."""
    return end if step >= until else start + (end - start) * step / until


class Log:
    """The CSV file: a line per call, on disk at once; adds wall time and env-steps/s since the last line."""

    def __init__(self, path: Path) -> None:
        path.write_text(",".join(COLUMNS) + "\n")
        self.path, self.step = path, 0
        self.begin = self.time = time.monotonic()

    def write(self, step: int, stats: dict[str, float]) -> None:
        now = time.monotonic()
        rate = (step - self.step) / (now - self.time)
        row = stats | {"env_steps": step, "wall_s": now - self.begin, "steps_per_s": rate}
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([f"{row[name]:.8g}" for name in COLUMNS])
        self.step, self.time = step, now


class Run:
    """One training run in one process: envs, rollout buffers, network, optimizer, log."""

    def __init__(self, args: argparse.Namespace, rank: int) -> None:
        self.args, self.rank = args, rank
        torch.manual_seed(args.seed)  # the same network in every process ...
        self.envs = AtariVectorEnv(
            args.game,
            args.envs,
            num_threads=1,
            repeat_action_probability=args.sticky,
            full_action_space=args.full_action_space,
        )
        actions = self.envs.single_action_space
        assert isinstance(actions, Discrete)
        num_actions = int(actions.n)
        self.net = Column(num_actions, args.init, args.input_shift)
        # Acting on a few observations is faster in the default layout, learning from many in channels_last.
        for parameter in self.net.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        self.actor = Column(num_actions, "torch", args.input_shift).requires_grad_(False)
        self.actor.load_state_dict(self.net.state_dict())
        torch.manual_seed(args.seed + 1000 * rank)  # ... with its own actions and minibatches
        params = list(self.net.parameters())
        self.optimizer: torch.optim.Optimizer
        if args.optimizer == "adam":
            betas = (args.beta1, args.beta2)
            self.optimizer = torch.optim.Adam(params, args.lr, eps=args.eps, betas=betas, fused=True)
        else:
            self.optimizer = torch.optim.RMSprop(params, args.lr, alpha=0.99, eps=args.eps)

        T, N = args.rollout, args.envs
        # Pixels last-to-first as channels_last wants them: turned once here, not once per epoch.
        self.obs = torch.empty((T, N, 84, 84, 4), dtype=torch.uint8)
        self.actions = torch.empty((T, N), dtype=torch.int64)
        self.logits = torch.empty((T, N, num_actions))
        self.values = torch.empty((T + 1, N))
        self.rewards = torch.zeros((T, N))
        self.dones = torch.zeros((T, N), dtype=torch.bool)
        self.is_reset = torch.zeros((T, N), dtype=torch.bool)  # NEXT_STEP autoreset: nothing to learn there
        self.act_buffer = torch.empty((N, 4, 84, 84))
        self.minibatch_size = T * N if args.algo == "a2c" else args.minibatch
        self.epochs = 1 if args.algo == "a2c" else args.epochs
        self.gather_buffer = torch.empty((self.minibatch_size, 84, 84, 4), dtype=torch.uint8)
        self.learn_buffer = torch.empty((self.minibatch_size, 84, 84, 4))

        seeds = np.arange(N) + args.seed * 10_000 + rank * 1_000
        first: np.ndarray
        first, _ = self.envs.reset(seed=seeds)
        self.next_obs = torch.from_numpy(first)
        self.next_is_reset = torch.zeros(N, dtype=torch.bool)
        self.episode_return = np.zeros(N)
        self.returns: deque[float] = deque(maxlen=20)
        self.episodes = 0

    def collect(self) -> None:
        """Fill the rollout buffers: T steps of N envs, one inference a step whose outputs are kept."""
        with torch.inference_mode():
            for t in range(self.args.rollout):
                logits, values = self.actor(self.act_buffer.copy_(self.next_obs))
                # The Gumbel trick: argmax(logits - log E), E ~ Exp(1), is a sample of softmax(logits).
                noise = torch.empty_like(logits).exponential_().log_()
                actions = (logits - noise).argmax(-1)
                self.obs[t] = self.next_obs.permute(0, 2, 3, 1)
                self.logits[t] = logits
                self.values[t] = values
                self.actions[t] = actions
                self.is_reset[t] = self.next_is_reset
                obs, rewards, terminated, truncated, _ = self.envs.step(actions.numpy())
                done = terminated | truncated
                self.next_obs = torch.from_numpy(obs)
                self.rewards[t] = torch.from_numpy(rewards)
                self.next_is_reset = torch.from_numpy(done)
                self.dones[t] = self.next_is_reset
                self.episode_return += rewards
                for n in np.flatnonzero(done):
                    self.returns.append(float(self.episode_return[n]))
                    self.episode_return[n] = 0.0
                    self.episodes += 1
            _, self.values[-1] = self.actor(self.act_buffer.copy_(self.next_obs))

    def advantages(self) -> Tensor:
        """Generalised advantage estimates (T, N); lambda = 1 gives n-step returns minus values."""
        gamma, lam = self.args.gamma, self.args.lam
        advantages = torch.empty_like(self.rewards)
        carry = torch.zeros(self.args.envs)
        alive = (~self.dones).float()
        for t in reversed(range(self.args.rollout)):
            delta = self.rewards[t] + gamma * alive[t] * self.values[t + 1] - self.values[t]
            carry = delta + gamma * lam * alive[t] * carry
            advantages[t] = carry
        return advantages

    def learn(self, step: int) -> dict[str, float]:
        """Update the network from the rollout; return what the log shows, averaged over minibatches."""
        args = self.args
        progress_lr = schedule(args.lr, args.lr_end, args.lr_until, step)
        entropy_coeff = schedule(args.entropy, args.entropy_end, args.entropy_until, step)
        for group in self.optimizer.param_groups:
            group["lr"] = progress_lr

        advantages = self.advantages()
        targets = (advantages + self.values[:-1]).flatten()
        values_old = self.values[:-1].flatten()
        valid = (~self.is_reset).flatten().nonzero().squeeze(-1)
        error, goal = (targets - values_old)[valid], targets[valid]
        explained = 1.0 - float(error.var() / goal.var().clamp_min(1e-8))
        advantages = advantages.flatten()
        if args.normalize:
            kept = advantages[valid]
            advantages = (advantages - kept.mean()) / kept.std().clamp_min(1e-4)
        obs, actions = self.obs.flatten(0, 1), self.actions.flatten()
        logp_old = self.logits.flatten(0, 1).log_softmax(-1).gather(1, actions[:, None]).squeeze(1)

        sums: dict[str, float] = {}
        updates = 0
        for _ in range(self.epochs):
            if args.algo == "a2c":
                batches = [valid]
            else:
                order = valid[torch.randperm(len(valid))]
                count = max(1, round(len(order) / self.minibatch_size))
                missing = count * self.minibatch_size - len(order)
                if missing > 0:  # as RLlib: the last minibatch is filled up from the start
                    order = torch.cat((order, order[:missing]))
                batches = list(order[: count * self.minibatch_size].split(self.minibatch_size))
            for index in batches:
                taken, pixels = self.gather_buffer[: len(index)], self.learn_buffer[: len(index)]
                pixels.copy_(torch.index_select(obs, 0, index, out=taken))
                logits, values = self.net(pixels.permute(0, 3, 1, 2))
                logp_all = logits.log_softmax(-1)
                logp = logp_all.gather(1, actions[index][:, None]).squeeze(1)
                entropy = -(logp_all.exp() * logp_all).sum(-1).mean()
                advantage = advantages[index]
                log_ratio = logp - logp_old[index]
                if args.algo == "ppo":
                    ratio = log_ratio.exp()
                    clipped = ratio.clamp(1.0 - args.clip, 1.0 + args.clip)
                    policy_loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
                else:
                    policy_loss = -(logp * advantage).mean()
                value_error = (values - targets[index]).square()
                if args.vf_clip > 0:
                    value_error = value_error.clamp_max(args.vf_clip)
                value_loss = value_error.mean()
                loss = policy_loss + args.vf_coeff * value_loss - entropy_coeff * entropy
                self.optimizer.zero_grad(set_to_none=False)
                loss.backward()
                if args.processes > 1:
                    self.average_gradients()
                norm = nn.utils.clip_grad_norm_(self.net.parameters(), args.grad_clip)
                self.optimizer.step()
                updates += 1
                with torch.no_grad():
                    kl = (log_ratio.exp() - 1.0 - log_ratio).mean()
                    outside = (log_ratio.exp() - 1.0).abs().gt(args.clip).float().mean()
                for name, value in [
                    ("entropy", entropy),
                    ("value_loss", value_loss),
                    ("approx_kl", kl),
                    ("clip_fraction", outside),
                    ("grad_norm", norm),
                ]:
                    sums[name] = sums.get(name, 0.0) + float(value.detach())
        self.actor.load_state_dict(self.net.state_dict())
        return {name: total / updates for name, total in sums.items()} | {"explained_variance": explained}

    def average_gradients(self) -> None:
        """Mean of the gradients over the processes, in one message."""
        grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        flat /= self.args.processes
        start = 0
        for g in grads:
            g.copy_(flat[start : start + g.numel()].view(g.shape))
            start += g.numel()

    def train(self) -> None:
        """Alternate between collecting and learning until `--steps`; process 0 logs every `--log-every`."""
        args = self.args
        log = Log(Path(args.out)) if self.rank == 0 else None
        step = 0
        while step < args.steps:
            self.collect()
            stats = self.learn(step)
            step += args.rollout * args.envs * args.processes
            if log is not None and step - log.step >= args.log_every:
                mean = float(np.mean(self.returns)) if self.returns else math.nan
                log.write(step, stats | {"episodes": self.episodes, "return_mean_20": mean})
                if args.save:
                    torch.save(self.net.state_dict(), args.save)


def parse() -> argparse.Namespace:
    """The command line; the PPO defaults are the settings that README.md gives a curve for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--algo", choices=["ppo", "a2c"], default="ppo")
    add("--game", default="pong")
    add("--full-action-space", action="store_true")
    add("--sticky", type=float, default=0.0, help="probability that ALE repeats the last action")
    add("--steps", type=int, default=1_000_000, help="env-steps of all processes together")
    add("--processes", type=int, default=1, help="one per core; gradients are averaged")
    add("--envs", type=int, default=16, help="per process")
    add("--rollout", type=int, default=64, help="T: steps of every env between updates")
    add("--epochs", type=int, default=4)
    add("--minibatch", type=int, default=256, help="per process")
    add("--optimizer", choices=["adam", "rmsprop"], default="adam")
    add("--lr", type=float, default=1e-3)
    add("--lr-end", type=float, default=2e-4)
    add("--lr-until", type=float, default=1e6, help="env-steps at which the rate reaches --lr-end")
    add("--eps", type=float, default=1e-5)
    add("--beta1", type=float, default=0.9)
    add("--beta2", type=float, default=0.999)
    add("--clip", type=float, default=0.1)
    add("--vf-clip", type=float, default=0.0, help="RLlib's vf_clip_param; 0: none")
    add("--vf-coeff", type=float, default=0.5)
    add("--entropy", type=float, default=0.01)
    add("--entropy-end", type=float, default=0.001)
    add("--entropy-until", type=float, default=4e5)
    add("--gamma", type=float, default=0.99)
    add("--lam", type=float, default=0.95)
    add("--grad-clip", type=float, default=0.5)
    add("--no-normalize", dest="normalize", action="store_false", help="leave the advantages as they are")
    add("--init", choices=["orthogonal", "torch", "torch_small_head"], default="orthogonal")
    add("--input-shift", type=float, default=0.34, help="subtracted from pixels in 0..1: Pong's background")
    add("--seed", type=int, default=0)
    add("--log-every", type=int, default=20_000)
    add("--out", default="bare_loop.csv")
    add("--save", default=None)
    return parser.parse_args()


def main(rank: int, args: argparse.Namespace) -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    if args.processes > 1:
        dist.init_process_group("gloo", rank=rank, world_size=args.processes)
    Run(args, rank).train()
    if args.processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    arguments = parse()
    if arguments.processes == 1:
        main(0, arguments)
    else:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29517")
        mp.spawn(main, (arguments,), arguments.processes)
