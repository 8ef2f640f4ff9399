"""One rank that builds a model for training and measures what it cost the host. python construction_worker.py STAGE EP NAME OUT"""

import json
import sys
from pathlib import Path

import torch

from benchmarks.report import forget_peak, host_bytes
from ditmoe_ds.distributed import shards
from ditmoe_ds.distributed.ema import EMA, EMAConfig
from ditmoe_ds.distributed.engine import BatchShape, OptimizerConfig, build
from ditmoe_ds.distributed.settings import read_ds_config
from ditmoe_ds.distributed.topology import ParallelConfig, expert_group, join, leave
from ditmoe_ds.ending import end
from ditmoe_ds.models.dit import DiT
from ditmoe_ds.models.init import InitialWeights
from ditmoe_ds.models.sizes import named_config


def main():
    stage, ep, name, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    world = join()
    parallel = ParallelConfig(zero_stage=stage, expert=ep)
    group = expert_group(ep)

    def construct(name):
        with torch.device("meta"):
            model = DiT(named_config(name), ep_size=group.size)
        source = InitialWeights(model, seed=0)
        batch = BatchShape(world.size, 1, 1)
        engine = build(model, parallel, OptimizerConfig(), batch, "bf16", read_ds_config(parallel), world.device)
        parts = shards.collect(engine, group)
        shards.fill(engine, parts, source.read)
        return engine, parts, EMA(parts, EMAConfig())

    small = construct("DiT-MoE-Nano/2-4E2A")  # DeepSpeed's imports and buffers are not the model's
    del small
    forget_peak()
    before = host_bytes("VmRSS")
    engine, parts, _ema = construct(name)
    peak = host_bytes("VmHWM")
    local = [(p.ds_numel if stage == 3 else p.numel()) * torch.finfo(p.dtype).bits // 8 for p in engine.module.parameters()]
    report = dict(before=before, peak=peak, shard=sum(p.master.numel() for p in parts), local=sum(local) // 2, largest=max(local) // 2)
    out.with_suffix(f".{world.rank}").write_text(json.dumps(report))
    leave()
    end(0)


if __name__ == "__main__":
    main()
