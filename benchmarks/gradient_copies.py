"""Bytes of memory traffic of a training step outside of the model, for each parameter: by operator, ZeRO stage and micro-batches.

python benchmarks/gradient_copies.py [--stages 0 1 2 3] [--accumulation 1 2] [--write]
torchrun --nproc_per_node 2 benchmarks/gradient_copies.py [...]

--write puts the table under "Measured" in gradient_copies.md.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist
from report import Page
from runs import close, make_trainer, train, write_latents
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ditmoe_ds.distributed.topology import join, leave

OPERATORS = ("copy_", "cat", "div_", "mul_", "add_")
"""What DeepSpeed does to gradients. From stage 1 on, clipping (``mul_``) and 6 bytes of ``copy_`` belong to the optimizer's step."""


class Traffic(TorchDispatchMode):
    """Bytes that ``OPERATORS`` read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        out = function(*given, **(named or {}))
        if (name := function.overloadpacket.__name__) in OPERATORS:
            read = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
            written = given[0] if name.endswith("_") else out
            self.bytes[name] += sum(t.nbytes for t in read[name == "copy_" :]) + written.nbytes
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--write", action="store_true", help="put the table into gradient_copies.md")
    arguments = parser.parse_args()
    world = join()
    shared = [tempfile.mkdtemp()]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])
    if world.rank == 0:
        write_latents(folder / "latents", 1, 64, shape=(4, 4, 4))
        page = Page(__file__, arguments.write, "DiT-MoE-Tiny/2-4E2A, bf16, EP 1, one image of 4 tokens a micro-batch")
        page.table("ZeRO", "micro-batches", *(f"`{name}`" for name in OPERATORS), "sum, bytes a parameter")
    dist.barrier()
    for stage in arguments.stages:
        for accumulation in arguments.accumulation:
            settings = {
                "model.name": "DiT-MoE-Tiny/2-4E2A",
                "data.manifest": folder / "latents",
                "train.global_batch": accumulation * world.size,
                "train.accumulation": accumulation,
                "train.precision": "bf16",
                "parallel.zero_stage": stage,
                "run_dir": folder / f"run-{stage}-{accumulation}",
            }
            trainer = make_trainer(world, settings)
            train(trainer)
            with Traffic() as traffic:
                trainer.train_step()
            parameters = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.engine.module.parameters())
            if world.rank == 0:
                each = [traffic.bytes[name] / parameters for name in OPERATORS]
                page.row(stage, accumulation, *(f"{number:.1f}" for number in each), f"{sum(each):.1f}")
            close(trainer)
    leave()


if __name__ == "__main__":
    main()
