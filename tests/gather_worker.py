"""Train two steps, then hash the whole model as the ranks hold it: gathered over ZeRO-3 and over the expert-parallel group.

python gather_worker.py HASHES.json RECIPE [key=value ...]
"""

import hashlib
import json
import sys
from pathlib import Path
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.zero import stage3
from deepspeed.utils import groups

from ditmoe_ds.distributed import zero3
from ditmoe_ds.distributed.topology import join, leave
from ditmoe_ds.ending import end
from ditmoe_ds.training.plan import read_plan
from ditmoe_ds.training.trainer import Trainer


def main():
    world = join()
    with patch.object(deepspeed.comm, "broadcast", wraps=deepspeed.comm.broadcast) as broadcast:
        trainer = Trainer(read_plan(sys.argv[2:], world.size), world)
    assert not broadcast.called, "weights without values were sent around"
    optimizer, stage = trainer.engine.optimizer, trainer.engine.zero_optimization_stage()
    norm = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
    with patch.object(optimizer, norm, wraps=getattr(optimizer, norm)) as asked:
        trainer.run()
    assert asked.call_count == 2, "DeepSpeed gets the norm elsewhere than from what brings it to the host"
    if stage == 3:
        assert stage3.reduce_scatter_coalesced is zero3.reduce_scatter
        inside = [module for block in trainer.engine.module.blocks for module in block.modules() if module is not block]
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in inside), "hooks that cost the host time"
    trainer.engine.empty_partition_cache()
    hashes = {}
    for name, parameter in trainer.engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            local = parameter.detach().clone()
        if is_moe_param(parameter):
            group = groups._get_expert_parallel_group(parameter.group_name)
            blocks = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
            dist.all_gather(blocks, local, group=group)
            for expert, matrix in enumerate(torch.cat(blocks)):
                hashes[f"{name}/{expert}"] = hashlib.sha256(matrix.numpy().tobytes()).hexdigest()
        else:
            hashes[name] = hashlib.sha256(local.numpy().tobytes()).hexdigest()
    if world.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(hashes))
    leave()
    end(0)


if __name__ == "__main__":
    main()
