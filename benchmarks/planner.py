"""Memory and traffic of real training processes, counted to the byte, beside what ``ditmoe plan`` says of them.

python benchmarks/planner.py [--from POINT] [--write]

Each point is a fresh group of processes on the CPU: the real engine with DeepSpeed, masters, an average and optimizer steps on
random latents. Memory is every storage while somebody holds it, from before the model is built; traffic is counted where
``torch.distributed`` hands it to a process group. The largest points need 4 GB and minutes. --from begins with the point of that
number, counted from 0. --write puts the table under "Measured" in planner.md.
"""

import argparse
import gc
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from ranks import CPU, on_ranks
from report import Page

from ditmoe_ds.distributed import shards
from ditmoe_ds.distributed.hardware import GPUS
from ditmoe_ds.distributed.settings import read_ds_config
from ditmoe_ds.distributed.topology import ParallelConfig, join, leave, tensor_group
from ditmoe_ds.latents.loader import DataConfig
from ditmoe_ds.models.sizes import named_config
from ditmoe_ds.planning.counting import Count
from ditmoe_ds.planning.job import Cluster, Job, Shape
from ditmoe_ds.planning.plan import Plan
from ditmoe_ds.planning.rehearsal import Rehearsal
from ditmoe_ds.training.recipe import ModelConfig, Recipe, TrainConfig

TEXT = 16
"""Tokens of a caption."""


CALLS = (
    ("allreduce", "gradients", 2),
    ("reduce", "gradients", 1),
    ("_reduce_scatter_base", "gradients", 1),
    ("reduce_scatter_single", "gradients", 1),
    ("reduce_scatter_single_coalesced", "gradients", 1),
    ("allgather", "weights", 1),
    ("_allgather_base", "weights", 1),
    ("all_gather_single", "weights", 1),
    ("all_gather_single_coalesced", "weights", 1),
    ("broadcast", "weights", 1),
    ("alltoall_base", "all_to_all", 1),
    ("all_to_all_single", "all_to_all", 1),
)
"""Methods of a process group, in older and newer torch; what they are for here; how often a ring sends all but a rank's part."""


class Sent:
    """Bytes that this rank sends by kind of collective, as rings would carry them: all that a process group is asked for."""

    def __init__(self) -> None:
        self.bytes = Counter[str]()
        for name, kind, rounds in CALLS:
            if hasattr(dist.ProcessGroup, name):
                setattr(dist.ProcessGroup, name, self._counted(getattr(dist.ProcessGroup, name), name, kind, rounds))

    def _counted(self, real: Any, name: str, kind: str, rounds: int) -> Any:
        def call(group: Any, *arguments: Any) -> Any:
            ranks = group.size()
            if kind == "all_to_all":
                _, rows, _, splits, *_ = arguments
                amount = rows.nbytes * (1 - (splits[group.rank()] / max(sum(splits), 1) if splits else 1 / ranks))
            else:
                # whole tensor: the output of a gather, the input of the others
                whole = max(_nbytes(argument) for argument in arguments[:2])
                amount = rounds * whole * (ranks - 1) / ranks
            tensor = tensor_group()
            self.bytes["sums" if tensor is not None and group.group_name == tensor.group_name else kind] += amount
            return real(group, *arguments)

        return call


def _nbytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.nbytes
    return sum(_nbytes(tensor) for tensor in tensors) if isinstance(tensors, list) else 0


def case(**given: Any) -> dict[str, Any]:
    """A point to plan and to measure. ``fields`` of the model differ from the named one's; ``zero`` are more of ZeRO's settings."""
    common = dict(tensor=1, world=2, micro=4, accumulation=1, recompute=False, precision="fp32", bucket=100_000, zero={})
    return common | given | dict(fields=dict(input_size=16) | given.get("fields", {}))


def case_model(case: dict[str, Any]) -> Any:
    return named_config(case["model"], **case["fields"])


def case_settings(case: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's, with buckets as small against these models as the shipped ones are against large models."""
    settings = read_ds_config(ParallelConfig(case["stage"]))
    if case["stage"]:
        settings["zero_optimization"] |= dict(reduce_bucket_size=case["bucket"], allgather_bucket_size=case["bucket"]) | case["zero"]
    return settings


def images_of(case: dict[str, Any]) -> int:
    """Of a step."""
    return int(case["world"] // case["tensor"] * case["micro"] * case["accumulation"])


def rehearse(case: dict[str, Any], count: Count) -> Rehearsal:
    """A case in training, from random weights. Collective."""
    torch.manual_seed(dist.get_rank())
    images = images_of(case)
    train = TrainConfig(1, images, case["accumulation"], precision=case["precision"], activation_checkpointing=case["recompute"])
    recipe = Recipe(ModelConfig(), DataConfig(""), train, "", ParallelConfig(case["stage"], case["ep"], case["tensor"]))
    rehearsal = Rehearsal(recipe, plan_of(case).job, case_settings(case), count)
    shards.fill(rehearsal.engine, rehearsal.shards, lambda name, start, out: out.normal_(std=0.02))
    return rehearsal


def work(case: dict[str, Any]) -> dict[str, Any]:
    """Train on this rank; bytes at the peak of the third step, and that it sent in it."""
    join()
    sent, count = Sent(), Count(per_node=case["world"])
    rehearsal = rehearse(case, count)
    for _ in range(2):  # ZeRO-3 learns the order of modules in the first
        rehearsal.step()
    gc.collect()  # else it depends on luck whether DeepSpeed's cycles of an earlier step are still there
    sent.bytes.clear()
    count.start()
    rehearsal.step()
    leave()
    return dict(peak=count.peak, sent=dict(sent.bytes))


def plan_of(case: dict[str, Any]) -> Plan:
    model, bucket = case_model(case), case["bucket"] if case["stage"] else 0
    job = Job(model, model.tokens, TEXT if model.text_width else 0, case["precision"], images_of(case), steps=1, averages=1)
    shape = Shape(case["stage"], case["ep"], case["micro"], case["recompute"], bucket, 100_000, case["tensor"])
    return Plan(job, Cluster(GPUS["h100-80gb"], 1, case["world"]), shape, cuda=False)


def compare(case: dict[str, Any], reports: list[dict[str, Any]]) -> dict[str, Any]:
    """(planned, measured): ``peak`` and ``sent`` by kind, means over ranks, among which the plan takes the load to be even."""
    plan, sent = plan_of(case), {}
    for kind, word in (("gradients", "reduce"), ("weights", "gather"), ("all_to_all", "exchange"), ("sums", "sum")):
        planned = sum(flow.in_node + flow.across for flow in plan.traffic if flow.kind.startswith(word))
        sent[kind] = planned, sum(report["sent"].get(kind, 0) for report in reports) / len(reports)
    peaks = [report["peak"] for report in reports]
    return dict(peak=(plan.peak, sum(peaks) / len(peaks)), ranks=(min(peaks), max(peaks)), sent=sent)


def row(case: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Cells of the table, for what ``compare`` found."""
    fields = ", ".join(f"{key} {value}" for key, value in case["fields"].items() if key in ("hidden", "depth"))
    planned, counted = (sum(pair[i] for pair in found["sent"].values()) for i in (0, 1))
    peak, measured = found["peak"]
    cells = [f"{case['model']}, {fields}", *(str(case[key]) for key in ("stage", "tensor", "ep", "world", "micro", "accumulation"))]
    cells += [{False: "no", True: "blocks"}.get(case["recompute"], "attention"), case["precision"], f"{peak / 1e6:.1f}"]
    cells += ["-".join(f"{each / 1e6:.1f}" for each in found["ranks"]), f"{peak / measured - 1:+.1%}"]
    return [*cells, f"{planned / 1e6:.2f}", f"{counted / 1e6:.2f}", f"{planned / counted - 1:+.1%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="first", type=int, default=0, metavar="POINT", help="leave out those before this number")
    parser.add_argument("--write", action="store_true", help="put the figures into planner.md")
    arguments = parser.parse_args()
    page = Page(__file__, arguments.write, "buckets of 100,000 elements")
    shape = ("model", "stage", "TP", "EP", "processes", "micro", "accum.", "recompute", "dtype")
    page.table(*shape, "peak MB: planned", "measured", "off", "sent MB: planned", "counted", "off")
    for point in POINTS[arguments.first :]:
        page.row(*row(point, compare(point, on_ranks(point["world"], work, point, environment=CPU))))


MOE, TEXTED = "DiT-MoE-Nano/2-4E2A", "EC-DIT-Nano-4E"
WIDE, DEEP = dict(hidden=128, depth=6), dict(hidden=64, depth=16)
POINTS = [
    case(model="DiT-Nano/2", stage=0, ep=1, fields=WIDE),
    case(model=MOE, stage=0, ep=1, fields=WIDE),
    case(model=MOE, stage=1, ep=1, accumulation=2, fields=WIDE),
    case(model=MOE, stage=1, ep=2, accumulation=2, recompute=True, fields=WIDE),
    case(model=MOE, stage=2, ep=2, fields=WIDE),
    case(model=MOE, stage=2, ep=1, micro=8, recompute=True, fields=DEEP),
    case(model=MOE, stage=3, ep=1, fields=WIDE),
    case(model=MOE, stage=3, ep=2, micro=2, recompute=True, fields=WIDE),
    case(model=MOE, stage=3, ep=2, world=4, micro=2, fields=WIDE),
    case(model=TEXTED, stage=2, ep=2, fields=dict(hidden=128, depth=8)),
    case(model=TEXTED, stage=3, ep=2, recompute=True, fields=dict(hidden=128, depth=8)),
    case(model=TEXTED, stage=1, ep=4, world=4, micro=8, fields=dict(hidden=96, depth=6)),
    case(model=MOE, stage=2, ep=2, micro=2, precision="bf16", fields=dict(hidden=96, depth=4)),
    case(model=TEXTED, stage=3, ep=2, micro=2, precision="bf16", fields=dict(hidden=96, depth=6)),
    case(model="DiT-Nano/2", stage=0, ep=1, tensor=2, fields=WIDE),
    case(model=MOE, stage=1, ep=1, tensor=2, accumulation=2, fields=WIDE),
    case(model=MOE, stage=3, ep=2, tensor=2, world=4, micro=2, fields=WIDE),
    case(model=MOE, stage=2, ep=2, tensor=2, world=4, recompute="attention", fields=dict(hidden=96, depth=6, qk_norm=True)),
    case(model=TEXTED, stage=2, ep=1, tensor=2, fields=dict(hidden=128, depth=8)),
    case(model=TEXTED, stage=2, ep=1, tensor=2, recompute=True, fields=dict(hidden=128, depth=8)),
    case(model=TEXTED, stage=3, ep=2, tensor=2, world=4, recompute="attention", precision="bf16", fields=dict(hidden=128, depth=8)),
]


if __name__ == "__main__":
    main()
