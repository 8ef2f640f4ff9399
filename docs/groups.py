"""Draw the process groups that expert parallelism really makes.

torchrun --standalone --nproc-per-node 8 docs/groups.py --expert 4 --experts 8 --out docs/images/groups.png
"""

import argparse
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch.distributed as dist
from deepspeed.utils import groups
from matplotlib.patches import FancyBboxPatch

from ditmoe_ds.distributed.topology import expert_group, gathered, join, leave

EXPERT_PARALLEL, REPLICAS, EVERYONE = "#1f6feb", "#d9730d", "#57606a"


def draw(ranks: list[dict], path: Path) -> None:
    """A row per expert-parallel group and a column per expert-data-parallel group; ``ranks[r]`` is what rank r says of itself."""
    rows = sorted({tuple(rank["expert_parallel"]) for rank in ranks})
    columns = sorted({tuple(rank["replicas"]) for rank in ranks})
    width, height = 1.75 * len(columns) + 3.1, 1.1 * len(rows) + 1.45
    figure = plt.figure(figsize=(width, height), facecolor="white")  # opaque, to be read on a dark page, too
    panel = figure.add_axes((0, 0, 1, 1), xlim=(-0.45, width - 0.45), ylim=(-0.85, height - 0.85))
    panel.axis("off")

    def box(x: float, y: float, w: float, h: float, color: str, **style: object) -> None:
        panel.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.12", edgecolor=color, **style))

    def names(members: tuple[int, ...]) -> str:
        return "ranks " + ", ".join(map(str, members))

    right, top, write = 1.75 * len(columns), 1.1 * len(rows), partial(panel.text, va="center")
    box(-0.25, -0.3, right + 0.4, top + 0.5, EVERYONE, facecolor="#f6f8fa", linestyle=(0, (4, 3)))
    everyone = f"data-parallel group: all {len(ranks)} ranks, each with other images; ZeRO shards the dense weights over it"
    write(-0.2, top + 0.37, everyone, color=EVERYONE)
    for y, row in enumerate(reversed(rows)):
        box(-0.1, 1.1 * y + 0.02, right + 0.1, 0.86, EXPERT_PARALLEL, facecolor="#ddebff", linewidth=1.6)
        write(right + 0.3, 1.1 * y + 0.45, f"expert-parallel group:\n{names(row)}\nexchange tokens", color=EXPERT_PARALLEL)
    for x, column in enumerate(columns):
        box(1.75 * x + 0.02, -0.15, 1.5, top + 0.12, REPLICAS, facecolor="none", linewidth=1.6)
        write(1.75 * x + 0.77, -0.47, names(column), color=REPLICAS, ha="center")
    write(right + 0.3, -0.47, "expert-data-parallel groups:\nreplicas, ZeRO shards them", color=REPLICAS)
    for number, rank in enumerate(ranks):
        x, y = columns.index(tuple(rank["replicas"])), len(rows) - 1 - rows.index(tuple(rank["expert_parallel"]))
        box(1.75 * x + 0.17, 1.1 * y + 0.12, 1.2, 0.66, "#24292f", facecolor="white")
        write(1.75 * x + 0.77, 1.1 * y + 0.58, f"rank {number}", ha="center", weight="bold", fontsize=11)
        write(1.75 * x + 0.77, 1.1 * y + 0.3, f"experts {', '.join(map(str, rank['experts']))}", ha="center")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--expert", type=int, default=4, help="expert-parallel size")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images/groups.png")
    arguments = parser.parse_args()
    world = join()
    group, name = expert_group(arguments.expert), f"ep_size_{arguments.expert}"
    local = arguments.experts // group.size
    mine = dict(
        experts=list(range(group.rank * local, (group.rank + 1) * local)),
        expert_parallel=dist.get_process_group_ranks(groups._get_expert_parallel_group(name)),
        replicas=dist.get_process_group_ranks(groups._get_expert_data_parallel_group(name)),
    )
    ranks = gathered(mine)
    if world.rank == 0:
        draw(ranks, arguments.out)
    leave()


if __name__ == "__main__":
    main()
