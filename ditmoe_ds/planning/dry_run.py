"""``ditmoe train RECIPE dry_run=8x8``: what one rank would allocate and send in a step, counted where a plan computes it.

The real model and DeepSpeed's real engine run on tensors without memory, in one process, on any machine, by torch's operators: what a GPU's
kernels spare is planned. Experts are evenly loaded.
As in a plan, kernels' workspaces, NCCL's buffers and fragmentation are not counted; ``Assumptions.margin`` is for them.
"""

import gc
import re
import shlex
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from ditmoe_ds.distributed.hardware import GPUS
from ditmoe_ds.distributed.settings import read_ds_config
from ditmoe_ds.distributed.topology import require_tensor_parallel
from ditmoe_ds.errors import ConfigError, UserError
from ditmoe_ds.planning.counting import GATHERED, Count, CountOnMeta
from ditmoe_ds.planning.fake_world import balance, fake_world
from ditmoe_ds.planning.job import Cluster
from ditmoe_ds.planning.plan import Plan
from ditmoe_ds.planning.recipe import own_shape, read_job
from ditmoe_ds.planning.rehearsal import Rehearsal
from ditmoe_ds.planning.report import overrides


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0, or 2 after one line about a user's mistake, such as a run that does not fit.

    Args:
        arguments: ``RECIPE.yaml dry_run=NODESxGPUS[@GPU][/PIXELSpx] [key=value ...]``.
    """
    asked = next(argument for argument in arguments if argument.startswith("dry_run="))
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", module="megatron.core")  # advice about a GPU's streams
    try:
        dry_run(asked.removeprefix("dry_run="), [argument for argument in arguments if argument != asked])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def dry_run(where: str, arguments: list[str]) -> None:
    """Print the report.

    Raises:
        ConfigError: a mistake in ``where`` or the recipe, or the run does not fit.
    """
    cluster, image_size = cluster_of(where)
    recipe, job = read_job(arguments, image_size, None)
    plan = Plan(job, cluster, own_shape(recipe, job, cluster))
    require_tensor_parallel(recipe.parallel.tensor)
    count = CountOnMeta(cluster.per_node)

    torch.set_num_threads(max(job.model.experts, 1))  # a CPU computes so many experts at a time; a GPU, all of them
    # At stages 1 and 2 the ranks differ in the gradients they keep: take one that keeps most, and of several the last, which owns the last
    # weights and so allocates its part while all activations are still there. At stage 3 they are alike, but each compares its trace
    # with rank 0's, which nobody sends here.
    rank = 0
    if plan.shape.stage in (1, 2):
        rank = max(range(plan.groups), key=lambda group: (plan.gradients[group], group)) * plan.shape.tensor
    with fake_world(rank, cluster.world):
        rehearsal = Rehearsal(recipe, job, read_ds_config(recipe.parallel), count)
        balance(rehearsal.engine.module)
        rehearsal.step()  # ZeRO-3 learns the order of the layers
        gc.collect()
        count.start()
        rehearsal.step()
    counted = replace(plan, cuda=False)
    spared = counted.peak - plan.peak
    print(report(f"{Path(arguments[0]).stem} as rank {rank} of {where}", counted, count, spared))
    if count.peak - spared > plan.usable:
        fix = f"out of memory: {(count.peak - spared) / 1e9:.1f} GB of {plan.usable / 1e9:.1f} usable, in {count.when}; "
        gpu = next(row for row, known in GPUS.items() if known is cluster.gpu)
        machines = f"--nodes {cluster.nodes} --gpus-per-node {cluster.per_node} --gpu {gpu}"
        size = f" --image-size {image_size}" if image_size else ""
        raise ConfigError("dry_run", where, fix + f"ditmoe plan {shlex.join(arguments)} {machines}{size} tells what fits")


def cluster_of(where: str) -> tuple[Cluster, int | None]:
    """``8x8``, ``8x8@h200-141gb`` or ``8x8@h200-141gb/512px``: GPUs, and the images' pixels if given. Raises ConfigError."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:@([^/]+))?(?:/([1-9]\d*)px)?", where)
    if not match or (match[3] or "h100-80gb") not in GPUS:
        fix = f"write NODESxGPUS, NODESxGPUS@GPU or NODESxGPUS@GPU/PIXELSpx, as 8x8@h100-80gb/512px; GPUs are {', '.join(GPUS)}"
        raise ConfigError("dry_run", where, fix)
    return Cluster(GPUS[match[3] or "h100-80gb"], int(match[1]), int(match[2])), int(match[4]) if match[4] else None


def report(title: str, plan: Plan, count: Count, spared: float) -> str:
    """Counted and planned, side by side, by torch's operators; and less the bytes ``spared`` by the kernels that a GPU runs instead."""
    job, planned = plan.job, dict(plan.memory)
    text = f" and {job.text} of text" if job.text else ""
    lines = [f"{title}: {overrides(plan)}, micro-batch {plan.shape.micro}, {job.patches} tokens an image{text}", ""]
    lines.append(f"{'GB on a GPU at the peak':<34}{'dry run':>9}{'plan':>9}")
    rows = {name: (float(count.at_peak[name]), planned.pop(name)) for name in ("weights", "optimizer", "EMA", GATHERED, "text encoder")}
    rows["gradients and activations"] = count.peak - sum(counted for counted, _ in rows.values()), sum(planned.values())
    lines += [_row(name, *pair) for name, pair in rows.items() if any(pair)]
    lines.append(_row("peak", count.peak, plan.peak, compare=True))
    lines.append(_row("peak with a GPU's kernels", count.peak - spared, plan.peak - spared))
    made = ", ".join(f"{amount / 1e9:.2f} in {name}" for name, amount in count.at_peak.items() if amount and name not in rows)
    lines.append(f"  in {count.when}; planned {plan.when}; gradients and activations made: {made}")
    lines += ["", f"{'GB that a GPU sends in a step':<34}{'dry run':>9}{'plan':>9}"]
    words = {"reduce": "reduce gradients", "gather": "gather weights", "exchange": "exchange tokens", "sum": "sum tokens"}
    for purpose, name in words.items():
        flows = [flow for flow in plan.traffic if flow.kind.startswith(purpose)]
        for link, amount in (("in node", sum(flow.in_node for flow in flows)), ("across", sum(flow.across for flow in flows))):
            if count.sent[purpose, link] or amount:
                lines.append(_row(f"{name}, {link}", count.sent[purpose, link], amount))
    everything = sum(flow.in_node + flow.across for flow in plan.traffic)
    lines.append(_row("all", sum(count.sent.values()), everything, compare=True))
    return "\n".join(lines)


def _row(name: str, counted: float, planned: float, compare: bool = False) -> str:
    off = f"{planned / counted - 1:>+9.1%}" if compare and counted else ""
    return f"  {name:<32}{counted / 1e9:>9.2f}{planned / 1e9:>9.2f}{off}"
