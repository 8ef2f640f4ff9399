"""Draw how a step scales by ``ditmoe plan``'s arithmetic, and the points that were measured.

python docs/scaling.py --out docs/images
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from ditmoe_ds.distributed.hardware import GPUS
from ditmoe_ds.models.sizes import named_config
from ditmoe_ds.planning.job import Assumptions, Cluster, Job
from ditmoe_ds.planning.plan import Plan
from ditmoe_ds.planning.recipe import own_shape, read_job, stages
from ditmoe_ds.planning.search import best, search

G, XL, M = (f"recipes/{name}.yaml" for name in ("dit_moe_g2_16e2a_256", "dit_moe_xl2_8e2a_256", "ec_dit_m_64e"))
COLORS = dict(
    arithmetic="#1f6feb", zero="#d9730d", exchange="#2da44e", optimizer="#57606a", alike="#8250df", sums="#bf3989", gradients="#c9a227"
)
NODES = (1, 2, 4, 8, 16, 32, 64)


def cluster(nodes: int, per_node: int = 8) -> Cluster:
    return Cluster(GPUS["h100-80gb"], nodes, per_node)


def fastest(path: str, place: Cluster) -> Plan | None:
    recipe, job = read_job([path], None, None)
    return best(search(job, place, stages(recipe.parallel), Assumptions(), "time"), "time")


def of_recipe(path: str, place: Cluster, **shape: Any) -> Plan:
    """As the recipe says, but for some of the shape."""
    recipe, job = read_job([path], None, None)
    plan = Plan(job, cluster(8), own_shape(recipe, job, cluster(8)))
    return replace(plan, cluster=place, shape=replace(plan.shape, **shape))


def draw_speed(path: Path) -> None:
    """Images a second of the fastest plan by number of GPUs; and where the G recipe's step goes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", facecolor="white")
    curves = [("DiT-MoE-XL/2-8E2A", XL, "#2da44e", 6), ("DiT-MoE-G/2-16E2A", G, "#1f6feb", 6), ("EC-DIT-M-64E", M, "#d9730d", -12)]
    for label, recipe, color, beside in curves:
        plans = [plan for nodes in NODES if (plan := fastest(recipe, cluster(nodes)))]
        gpus = [plan.cluster.world for plan in plans]
        left.loglog(gpus, [plan.images_per_second for plan in plans], color=color, marker="o", markerfacecolor="white", label=label)
        ideal = plans[0].images_per_second / gpus[0]
        left.loglog(gpus, [ideal * count for count in gpus], color=color, linestyle=":", linewidth=1)
        for plan in plans:
            place = (plan.cluster.world, plan.images_per_second)
            left.annotate(f"{plan.mfu:.0%}", place, textcoords="offset points", xytext=(-4, beside), fontsize=7, color=color)
    left.set(xlabel="GPUs (H100 80 GB, nodes of 8)", ylabel="images/s", title="planned: the fastest that fits, and its MFU")
    left.set_xticks([8 * nodes for nodes in NODES], [str(8 * nodes) for nodes in NODES])
    left.minorticks_off()
    left.legend(fontsize=8)
    plans = [plan for nodes in NODES if (plan := fastest(G, cluster(nodes)))]
    bottom = [0.0] * len(plans)
    names = dict(arithmetic="arithmetic", zero="ZeRO's traffic, not hidden", exchange="exchange of tokens", optimizer="optimizer")
    names |= dict(gradients="copies and sums of gradients", alike="alike on a TP group's ranks", sums="sums of tokens")
    for part, name in names.items():
        heights = [plan.seconds[part] * plan.cluster.world / 64 for plan in plans]
        right.bar(range(len(plans)), heights, bottom=bottom, color=COLORS[part], label=name)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    ticks = [f"{plan.cluster.world}\n{plan.shape.tensor}, {plan.shape.ep}\n{plan.shape.micro} x {plan.accumulation}" for plan in plans]
    right.set_xticks(range(len(plans)), ticks, fontsize=8)
    right.set(ylabel="GPU-seconds of a step / 64", title="DiT-MoE-G/2-16E2A, 1024 images: where a step goes")
    right.set_xlabel("GPUs; TP, EP; micro-batch x accumulation", fontsize=9)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def draw_traffic(path: Path) -> None:
    """GB that a GPU sends in a step of G at stage 3 by EP, by nodes and by experts."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained", facecolor="white")
    by_ep = {str(ep): of_recipe(G, cluster(8), ep=ep) for ep in (1, 2, 4, 8, 16)}
    by_nodes = {str(nodes): of_recipe(G, cluster(nodes), ep=8, micro=1024 // (8 * nodes)) for nodes in NODES[1:]}
    by_experts = {}
    for experts in (8, 16, 32, 64):
        plan = of_recipe(G, cluster(8), ep=8)
        job: Job = replace(plan.job, model=named_config(f"DiT-MoE-G/2-{experts}E2A"))
        by_experts[str(experts)] = replace(plan, job=job)
    for panel, (plans, label, title) in zip(
        panels,
        [
            (by_ep, "EP", "16 experts, 8 nodes: by EP"),
            (by_nodes, "nodes of 8", "16 experts, EP 8: by nodes, no accumulation"),
            (by_experts, "experts", "EP 8, 8 nodes: by experts, 2 active"),
        ],
        strict=True,
    ):
        for i, plan in enumerate(plans.values()):
            tokens = [flow for flow in plan.traffic if flow.kind == "exchange tokens"]
            state = [flow for flow in plan.traffic if flow.kind != "exchange tokens"]
            for at, link in ((i - 0.2, "in_node"), (i + 0.2, "across")):
                low = sum(getattr(flow, link) for flow in state) / 1e9
                high = sum(getattr(flow, link) for flow in tokens) / 1e9
                faint = 0.45 if link == "in_node" else 1
                panel.bar(at, low, 0.38, color=COLORS["zero"], alpha=faint)
                panel.bar(at, high, 0.38, bottom=low, color=COLORS["exchange"], alpha=faint)
        panel.set_xticks(range(len(plans)), plans)
        panel.set(xlabel=label, title=title)
        panel.title.set_fontsize(10)
    panels[0].set_ylabel("GB that a GPU sends in a step")
    shown = [("weights and gradients", "zero"), ("tokens", "exchange")]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[key], alpha=a) for _, key in shown for a in (0.45, 1)]
    panels[0].legend(handles, [f"{name}, {link}" for name, _ in shown for link in ("in the node", "across nodes")], fontsize=8)
    figure.savefig(path, dpi=110)


def draw_measured(page: Path, path: Path) -> None:
    """Planned beside measured: the rows that benchmarks/planner.py wrote."""
    measured = page.read_text().partition("## Measured\n")[2]
    rows = [line.split("|")[1:-1] for line in measured.splitlines() if line.startswith("| ") and "TP" not in line.split("|")[3]]
    assert len(rows) >= 8
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", facecolor="white")
    for panel, column, title, allowed in (
        (panels[0], 10, "peak of a rank, MB", 0.10),
        (panels[1], 13, "sent in a step by a rank, MB", 0.05),
    ):
        for row in rows:
            planned, found = float(row[column - 1]), float(row[column].split("-")[-1])
            stage = int(row[1])
            panel.loglog(planned, found, marker="osD^"[stage], color=list(COLORS.values())[stage], linestyle="none", label=f"ZeRO {stage}")
        ends = [0.8 * panel.get_xlim()[0], 1.2 * panel.get_xlim()[1]]
        panel.plot(ends, ends, color="#24292f", linewidth=0.8)
        panel.fill_between(ends, [(1 - allowed) * x for x in ends], [(1 + allowed) * x for x in ends], color="#57606a", alpha=0.2)
        panel.set(xlabel="planned", ylabel="measured", title=f"{title}; grey: {allowed:.0%}", xlim=ends, ylim=ends)
        panel.minorticks_off()
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
        labels = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
        panel.legend([labels[key] for key in sorted(labels)], sorted(labels), fontsize=8)
    figure.suptitle(f"measured: {len(rows)} points on processes on a CPU, no GPU", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    draw_speed(arguments.out / "scaling_speed.png")
    draw_traffic(arguments.out / "scaling_traffic.png")
    draw_measured(Path("benchmarks/planner.md"), arguments.out / "scaling_measured.png")


if __name__ == "__main__":
    main()
