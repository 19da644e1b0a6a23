"""Are a column's laterals alive? How loud they are beside its own weights, their gradients, ReLUs that never fire.

    python benchmarks/laterals.py RUN/columns [RUN/columns ...] [--states 512] [--episodes 8] [--out FILE.json]

For the newest column of every store, as it was drawn (`fresh`) and as it was frozen (`trained`), on states that the
frozen column meets when it plays its own task:

    own       root mean square of the layer's own share of its pre-activation, W h_{i-1}^k + b
    lateral   of what the lateral adds, U g(V (alpha * h_{i-1}^{<k}))
    dW dU dV  root mean square of the gradient of log pi(a | s) for one state, by parameter (batch of random signs,
              which leaves the sum of the states' squares)
    dead      maps or units of the layer that are 0 in all these states; of V's output in brackets
    alpha     one a source column

One process, no Ray. Prints a table a store and writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rllib_pnn.analysis.rollouts import play
from rllib_pnn.network.adapter import Adapter
from rllib_pnn.network.column import Column
from rllib_pnn.network.progressive import ProgressiveNetwork
from rllib_pnn.network.store import ColumnStore


def rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def dead(features: Tensor) -> float:
    """Share of maps or units, (B, n, ...), that are 0 everywhere."""
    return float((features.flatten(2).amax((0, 2)) if features.dim() > 2 else features.amax(0)).le(0).float().mean())


def gradients(network: ProgressiveNetwork, obs: Tensor, seed: int) -> dict[str, float]:
    """Root mean square, over parameters and states, of the gradient of log pi(a | s), by parameter name."""
    column = network.columns[-1]
    named = dict(column.named_parameters())
    for parameter in named.values():
        parameter.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    logp = network(obs).logits.log_softmax(-1)
    actions = torch.multinomial(logp.detach().exp(), 1, generator=generator)
    signs = torch.randint(0, 2, (len(obs), 1), generator=generator) * 2.0 - 1.0
    found = torch.autograd.grad((logp.gather(1, actions) * signs).sum(), list(named.values()), allow_unused=True)
    scale = 1 / math.sqrt(len(obs))
    return {name: 0.0 if g is None else rms(g) * scale for name, g in zip(named, found, strict=True)}


def own_share(column: Column, number: int, below: Tensor) -> Tensor:
    layer = column.layers[number - 1]
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(below, layer.weight, layer.bias, layer.stride, layer.padding)
    return F.linear(below.flatten(1), layer.weight, layer.bias)


def look(network: ProgressiveNetwork, obs: Tensor, seed: int) -> list[dict[str, Any]]:
    """A row for every layer and head of the newest column that has a lateral."""
    column = network.columns[-1]
    slopes = gradients(network, obs, seed)
    with torch.no_grad():
        activations, _ = network.activations(obs)
        *earlier, newest = activations
        rows = []
        for key, lateral in column.laterals.items():
            number = int(key) if key.isdigit() else len(column.layers) + 1
            sources = torch.cat([h[number - 2] for h in earlier], dim=1)
            below = newest[number - 2]
            own = own_share(column, number, below) if key.isdigit() else getattr(column, key)(below.flatten(1))
            name = f"layers.{number - 1}.weight" if key.isdigit() else f"{key}.weight"
            adapter = isinstance(lateral, Adapter)
            rows.append(
                {
                    "layer": key,
                    "own": rms(own),
                    "lateral": rms(lateral(sources)),
                    "dW": slopes[name],
                    "dU": slopes[f"laterals.{key}.out.weight"],
                    "dV": slopes[f"laterals.{key}.project_layer.weight"] if adapter else None,
                    "dead": dead(newest[number - 1]) if key.isdigit() else None,
                    "dead_projected": dead(lateral.project(sources)) if adapter else None,
                    "alpha": lateral.scale.tolist() if adapter else None,
                }
            )
    return rows


def check(store: Path, states: int, episodes: int, seed: int) -> dict[str, Any]:
    """The rows of one store's newest column, fresh and trained."""
    columns = ColumnStore(store)
    network = columns.load()
    entry = columns.entries[-1]
    column = network.columns[-1]
    if not column.laterals or network.is_recurrent:
        raise SystemExit(f"{store}: the newest column has no laterals, or the network is recurrent; nothing to look at")
    if entry.env is None:
        raise SystemExit(f"{store}: the newest column has no environment; it can't be played")
    rollout = play(network, entry.env, entry.env_config, num_episodes=episodes, num_states=states, seed=seed)
    obs = torch.from_numpy(rollout.observations)
    fresh = columns.load(num_columns=len(columns.entries) - 1)
    fresh.add_column(column.layout.spec, lateral=column.layout.lateral, input_shift=column.layout.input_shift)
    means = [float(r) for r in rollout.returns]
    return {
        "store": store.parent.name,
        "task": entry.task,
        "states": len(obs),
        "return_mean": sum(means) / len(means),
        "fresh": look(fresh, obs, seed),
        "trained": look(network, obs, seed),
    }


def print_table(result: dict[str, Any]) -> None:
    print(
        f"\n{result['store']}, {result['task']}: {result['states']} states, mean return {result['return_mean']:.1f}\n"
    )
    print("| | layer | own | lateral | dW | dU | dV | dead | alpha |\n|---|---|---|---|---|---|---|---|---|")
    for when in ("fresh", "trained"):
        for row in result[when]:
            slopes = " | ".join("-" if row[k] is None else f"{row[k]:.2g}" for k in ("dW", "dU", "dV"))
            dead_units = "-" if row["dead"] is None else f"{row['dead']:.0%}"
            dead_v = "" if row["dead_projected"] is None else f" ({row['dead_projected']:.0%})"
            alpha = "-" if row["alpha"] is None else ", ".join(f"{a:.3f}" for a in row["alpha"])
            print(
                f"| {when} | {row['layer']} | {row['own']:.2g} | {row['lateral']:.2g} | {slopes} "
                f"| {dead_units}{dead_v} | {alpha} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="+", type=Path)
    parser.add_argument("--states", type=int, default=512)
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [check(store, args.states, args.episodes, args.seed) for store in args.stores]
    for result in results:
        print_table(result)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
