"""Time that a core needs for the forward and backward of a layer at ZeRO-3, by how its weights are gathered, beside ZeRO-2.

python benchmarks/zero3_host.py [--ranks 8 64 512] [--rounds 3] [--write]

--write puts the table under "Measured" in zero3_host.md.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from report import Page

from ditmoe_ds.distributed import engine, zero3
from ditmoe_ds.distributed.topology import ParallelConfig, expert_group
from ditmoe_ds.models.dit import DiT
from ditmoe_ds.models.sizes import named_config
from ditmoe_ds.planning.fake_world import balance

MODEL, WIDTH = "DiT-MoE-G/2-16E2A", 64
WAYS = {
    "stage 2": 2,
    "DeepSpeed's stage 3": 3,
    "with each gathered weight copied at once": 3,
    "and layers gathered whole: ours": 3,
}


def patches(way: str) -> list[Any]:
    """What of ours a way leaves out."""
    modules = patch.object(engine, "set_z3_leaf_module", lambda layer, flag: None)
    return {"DeepSpeed's stage 3": [modules, patch.object(zero3, "install")], "with each gathered weight copied at once": [modules]}.get(
        way, []
    )


def one_rank(way: str, ranks: int) -> None:
    """Print the least seconds of a core that a layer took."""
    import deepspeed.comm
    from torch.testing._internal.distributed import fake_pg  # noqa: F401, registers the backend

    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=ranks)
    deepspeed.comm.init_distributed(dist_backend="fake", dist_init_required=False)
    for one in patches(way):
        one.start()
    ep, stage = min(16, ranks), WAYS[way]
    config = replace(named_config(MODEL), hidden=WIDTH, heads=4, input_size=8)
    with torch.device("meta"):
        net = DiT(config, expert_group(ep, 1).size)
    zero = dict(stage=stage, overlap_comm=True, reduce_bucket_size=50_000_000)
    zero |= dict(stage3_param_persistence_threshold=1100) if stage == 3 else {}  # as at full width, biases, norms and routers stay whole
    shape = engine.BatchShape(2 * ranks, 1, 2)
    settings = ParallelConfig(zero_stage=stage, expert=ep), engine.OptimizerConfig(), shape, "bf16", dict(zero_optimization=zero)
    built = engine.build(net, *settings, torch.device("cpu"))
    balance(net)
    for parameter in net.parameters():
        getattr(parameter, "ds_tensor", parameter).data.zero_()
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.long)
    found = []
    for _ in range(8):
        start = time.process_time()
        built.backward(built(x, t, y).square().mean())
        found.append(time.process_time() - start)
        built.step()
    print(min(found[3:]) / config.depth)  # in the first two DeepSpeed learns the order


def in_its_own_process(way: str, ranks: int) -> float:
    environment = os.environ | dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    environment |= dict(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    said = subprocess.run(
        [sys.executable, __file__, "--ranks", str(ranks), "--way", way],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return float(said.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--rounds", type=int, default=3, help="of which the least counts; the ways take turns")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="put the table into zero3_host.md")
    arguments = parser.parse_args()
    if arguments.way:
        one_rank(arguments.way, arguments.ranks[0])
        return
    page = Page(__file__, arguments.write, f"{MODEL} with width {WIDTH}, one core")
    page.table("ranks", "EP", *(f"{way}, ms" for way in WAYS))
    for ranks in arguments.ranks:
        rounds = [{way: in_its_own_process(way, ranks) for way in WAYS} for _ in range(arguments.rounds)]
        page.row(ranks, min(16, ranks), *(f"{1e3 * min(each[way] for each in rounds):.1f}" for way in WAYS))


if __name__ == "__main__":
    main()
