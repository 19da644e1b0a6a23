"""Figures in the documentation that the code can say for itself."""

import re
from pathlib import Path

import pytest

from rllib_pnn import ProgressiveNetwork

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize(
    ("preset", "shape", "outputs"),
    [("atari", (4, 84, 84), 18), ("pong", (4, 84, 84), 6), ("labyrinth", (3, 84, 84), 6)],
)
def test_parameters_of_columns_in_the_cluster_plan(preset, shape, outputs):
    text = (DOCS / "cluster.md").read_text()
    (row,) = re.findall(rf"^\| `{preset}` \| [^|]*, {outputs} \|(.*)\|$", text, re.M)
    table = [int(cell.replace(",", "")) for cell in row.split("|")]
    network = ProgressiveNetwork(shape, outputs, preset)
    counted = []
    for _ in range(4):
        network.add_column()
        counted.append(sum(p.numel() for p in network.trainable_parameters()))
    further = counted[3] - counted[2]
    assert table == [*counted, counted[1] + 6 * further, counted[1] + 10 * further, further]


def test_links_lead_somewhere():
    for page in [DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"
