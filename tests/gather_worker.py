"""Train two steps, then hash the whole model as the ranks hold it: gathered over ZeRO-3 and over the expert-parallel group.

python gather_worker.py HASHES.json RECIPE [key=value ...]
"""

import hashlib
import json
import sys
import time
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
    seconds = []
    with patch.object(deepspeed.comm, "broadcast", wraps=deepspeed.comm.broadcast) as broadcast:
        told = [lambda trainer, record: seconds.append(record["seconds"]["total"])]
        trainer = Trainer(read_plan(sys.argv[2:], world.size), world, callbacks=told)
    assert not broadcast.called, "weights without values were sent around"
    norm = trainer.engine.get_global_grad_norm
    trainer.engine.get_global_grad_norm = lambda: (time.sleep(3), norm())[1]  # as on a GPU it waits until the step is made
    trainer.run()
    assert len(seconds) == 2 and min(seconds) > 3, f"the steps took {seconds} s, without the wait for their end"
    if trainer.engine.zero_optimization_stage() == 3:
        assert stage3.reduce_scatter_coalesced is zero3.reduce_scatter
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
