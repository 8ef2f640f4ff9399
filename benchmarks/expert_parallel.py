"""Bytes that the experts' all-to-alls send, beside the fewest that the routing allows, and their share of a training step.

python benchmarks/expert_parallel.py [--model DiT-MoE-Tiny/2-8E2A] [--worlds 2 4] [--write]

Every rank trains with the real trainer on random latents. NCCL where there is a GPU for every process, else gloo on the CPU.
--write puts the table under "Measured" in expert_parallel.md.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from ranks import CPU, on_ranks
from report import Page
from runs import make_trainer, train, write_latents
from torch import Tensor

from ditmoe_ds.distributed.topology import join, leave
from ditmoe_ds.moe.layer import Router
from ditmoe_ds.moe.routing import expert_choice_capacity


class Sent:
    """Counts the bytes that leave this rank in every ``all_to_all_single`` from here on."""

    def __init__(self) -> None:
        self.bytes, self.call = 0, dist.all_to_all_single
        dist.all_to_all_single = self

    def __call__(
        self, output: Tensor, input: Tensor, output_splits: Any = None, input_splits: Any = None, group: Any = None, **others: Any
    ):
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        rows = input_splits or [len(input) // ranks] * ranks
        self.bytes += (sum(rows) - rows[rank]) * input.shape[1:].numel() * input.element_size()
        return self.call(output, input, output_splits, input_splits, group=group, **others)


class Needed:
    """Repeats each router's choice, and counts what has to leave this rank.

    Attributes:
        takings: tokens taken by experts of other ranks, once for each expert. A row goes there and back for each, as does its gradient.
        visits: the same, once for each rank: what would be sent if a token that several experts of a rank take were sent there once.
    """

    def __init__(self, model: torch.nn.Module, ep: int):
        self.takings = self.visits = 0
        self.ep, self.rank = ep, dist.get_rank(groups._get_expert_parallel_group(f"ep_size_{ep}"))
        for module in model.modules():
            if isinstance(module, Router):
                module.register_forward_pre_hook(self.count)

    @torch.no_grad()
    def count(self, router: Router, arguments: tuple[Tensor]) -> None:
        (x,) = arguments
        scores = (x.float() @ router.weight.float().t()).softmax(-1)  # (B, N, E)
        taken = torch.zeros_like(scores, dtype=torch.bool)
        if router.choice == "token":
            taken.scatter_(2, scores.topk(int(router.experts_per_token), dim=2).indices, True)
        else:
            taken.scatter_(1, scores.topk(expert_choice_capacity(*scores.shape[1:], router.capacity), dim=1).indices, True)
        by_rank = taken.unflatten(2, (self.ep, -1)).sum(3)  # (B, N, ranks)
        by_rank[..., self.rank] = 0
        self.takings += int(by_rank.sum())
        self.visits += int(by_rank.count_nonzero())


def work(settings: dict[str, Any], steps: int) -> dict[str, float]:
    """Time some steps on this rank, then count in some more, and report."""
    world = join()
    torch.manual_seed(0)
    trainer = make_trainer(world, settings)
    for _ in range(2):
        train(trainer)
    records = [train(trainer) for _ in range(steps)]
    shares = [record["seconds"].get("all_to_all", 0.0) / record["seconds"]["total"] for record in records]
    sent, needed = Sent(), Needed(trainer.engine.module, settings["parallel.expert"])
    for _ in range(steps):
        train(trainer)
    trainer.loader.close()
    leave()
    row = 4 * trainer.plan.model.hidden * (2 if trainer.plan.recipe.train.precision == "bf16" else 4) / steps
    return dict(
        seconds=statistics.median(record["seconds"]["total"] for record in records),
        share=statistics.median(shares),
        memory=records[-1]["peak_memory_gb"],
        sent=sent.bytes / steps,
        needed=needed.takings * row,
        once=needed.visits * row,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="DiT-MoE-Tiny/2-8E2A")
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--images", type=int, default=16, help="of a step, over all ranks")
    parser.add_argument("--precision", default="bf16" if torch.cuda.device_count() > 1 else "fp32", choices=["bf16", "fp32"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the figures into expert_parallel.md")
    arguments = parser.parse_args()
    settings = f"{arguments.model}, {arguments.precision}, {arguments.images} images a step, ZeRO-2"
    page = Page(__file__, arguments.write, settings)
    page.table("processes", "EP", "experts chosen by", "sent, MB per step and rank", "least", "sent / least", "once per rank / least",
               "all-to-all, of the step", "ms per step", "GB per rank")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_latents(Path(folder) / "latents", 1, 256)
        for world in arguments.worlds:
            environment = CPU if torch.cuda.device_count() < world else {}
            for ep, routing in ((1, "token"), (1, "expert"), (world, "token"), (world, "expert")):
                named = {"model.name": arguments.model, "model.routing": routing, "data.manifest": f"{folder}/latents", "data.workers": 1}
                train = {"train.global_batch": arguments.images, "train.precision": arguments.precision, "parallel.expert": ep}
                settings = named | train | {"run_dir": tempfile.mkdtemp(dir=folder)}
                reports = on_ranks(world, work, settings, arguments.steps, environment=environment)
                mean = {key: statistics.fmean(report[key] for report in reports) for key in reports[0]}
                sent, needed = mean["sent"], mean["needed"]
                ratios = [f"{sent / needed:.3f}", f"{mean['once'] / needed:.3f}"] if needed else ["", ""]
                page.row(world, ep, {"token": "tokens", "expert": "experts"}[routing], f"{sent / 1e6:.3f}", f"{needed / 1e6:.3f}", *ratios,
                         f"{mean['share']:.1%}", f"{1e3 * mean['seconds']:.0f}", f"{mean['memory']:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
