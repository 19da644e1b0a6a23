"""The trials of a transfer experiment (Rusu et al. 2016, section 4): which there are, and which wait for which.

Plain data: no Ray, no torch, no pydantic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# What a target can be learned with that knows no source: trained once a target and seed.
WITHOUT_SOURCE = ("scratch", "random_column")
# The paper's baselines 2 and 3 are one column that was pretrained on one source.
BASELINES_OF_ONE_COLUMN = ("finetune_heads", "finetune_all")


@dataclass(frozen=True)
class Trial:
    """One task learned in one way.

    Args:
        name: of its folder, less the seed.
        role: `source` trains a column that others start from, `target` is scored.
        task: what it learns.
        architecture: how.
        source: tasks of the columns that it starts from, first column first.
        waits_for: name of the trial whose columns it starts from.
    """

    name: str
    role: Literal["source", "target"]
    task: str
    architecture: str
    source: tuple[str, ...] = ()
    waits_for: str | None = None


def grid_of(sources: Sequence[Sequence[str]], targets: Sequence[str], architectures: Sequence[str]) -> list[Trial]:
    """Every trial once, each behind the one that it waits for.

    A source of several tasks is trained a column at a time, each column a trial of its own, so that sources that
    begin alike share their first columns. Target follows target, so that a grid that is cut short has whole rows.
    """
    needs_source = [name for name in architectures if name not in WITHOUT_SOURCE]
    used = [
        tuple(chain)
        for chain in sources
        if any(target not in chain and _allowed(name, chain) for target in targets for name in needs_source)
    ]
    columns = dict.fromkeys(chain[: n + 1] for n in range(max(map(len, used), default=0)) for chain in used)
    trials = [
        Trial(
            source_name(chain),
            "source",
            chain[-1],
            "progressive",
            chain[:-1],
            source_name(chain[:-1]) if chain[:-1] else None,
        )
        for chain in sorted(columns, key=len)
    ]
    for target in targets:
        for name in architectures:
            if name in WITHOUT_SOURCE:
                trials.append(Trial(f"{target}_{name}", "target", target, name))
                continue
            trials += [
                Trial(f"{'+'.join(chain)}_to_{target}_{name}", "target", target, name, chain, source_name(chain))
                for chain in used
                if target not in chain and _allowed(name, chain)
            ]
    return trials


def source_name(chain: Sequence[str]) -> str:
    return f"source_{'+'.join(chain)}"


def _allowed(architecture: str, chain: Sequence[str]) -> bool:
    return len(chain) == 1 or architecture not in BASELINES_OF_ONE_COLUMN
