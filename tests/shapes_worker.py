"""One rank of a group that trains the same recipe in many parallel shapes; rank 0 writes what it saw as JSON.

python shapes_worker.py CASES.json RESULTS.json
"""

import gc
import json
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from megatron.core import parallel_state

from ditmoe_ds.distributed.topology import gathered, join, leave, tensor_place
from ditmoe_ds.ending import end
from ditmoe_ds.models.init import InitialWeights
from ditmoe_ds.models.sizes import SIZES
from ditmoe_ds.moe import layer
from ditmoe_ds.rng import keyed_generator
from ditmoe_ds.training import trainer as trainer_module
from ditmoe_ds.training.plan import read_plan
from ditmoe_ds.training.recipe import read_recipe
from ditmoe_ds.training.trainer import Trainer

real_choice, real_linear = layer.token_choice, torch.nn.functional.linear


class WithoutZeros(InitialWeights):
    """As trained for a while. The real start, where every block is the identity, would hide wrong experts for many steps."""

    def read(self, name, start, out):
        super().read(name, start, out)
        if not out.any():
            out.copy_(0.1 * torch.randn(2**16, generator=keyed_generator(name))[start : start + out.numel()])


trainer_module.InitialWeights = WithoutZeros


def choice_without_the_last_expert(scores, k, config):
    """Routing in which one expert never gets a token, anywhere."""
    masked = torch.cat([scores[:, :-1], scores[:, -1:] * 0], dim=1)
    return real_choice(masked, k, config)


def forget_groups(tensor):
    """A training process has one tensor-parallel size for life; this one may have had another in its last case."""
    if tensor_place()[1] != tensor:
        parallel_state.destroy_model_parallel()
        groups._release_process_group_references()


def run(case, world):
    """Train a case to its last step; one that begins from a checkpoint saves what it loaded before it goes on."""
    idle = []
    if "width" in case:  # the recipe's model, but for its width
        SIZES.update({name: replace(size, hidden=case["width"], heads=2) for name, size in SIZES.items()})
    layer.token_choice = choice_without_the_last_expert if case.get("starve") else real_choice
    arguments, begin = [case["recipe"], *case["overrides"]], case.get("begin")
    if begin and world.rank == 0:
        checkpoints = Path(read_recipe(arguments).run_dir) / "checkpoints"
        shutil.copytree(begin, checkpoints / Path(begin).name)
        (checkpoints / "latest").write_text(Path(begin).name)
    dist.barrier()
    plan = read_plan(arguments, world.size)
    forget_groups(plan.recipe.parallel.tensor)
    trainer = Trainer(plan, world)
    if begin:
        trainer.save()
    for module in trainer.engine.module.modules():
        if isinstance(module, layer.Router):
            module.register_forward_hook(torch.compiler.disable(lambda module, args, out: idle.append(bool((out[0].counts == 0).any()))))
    held = gathered(sum(shard.master.numel() for shard in trainer.shards if "deepspeed_experts" in shard.name))
    whole = [shard for shard in trainer.shards if shard.slice is None]
    trainer.engine.train()
    records = []
    while trainer.step < case["steps"]:
        record = trainer.train_step()
        for callback in trainer.callbacks:
            callback(trainer, record)
        records.append(record)
    trainer.loader.close()
    trainer.saver.finish()
    anywhere = torch.tensor(float(any(idle)))
    dist.all_reduce(anywhere)
    group = groups.mpu and groups.mpu.get_tensor_model_parallel_group()
    alike = not group or all(same_over(group, shard.master) for shard in whole)
    del trainer, whole
    gc.collect()
    return dict(records=records, idle=bool(anywhere), held=held, accumulation=plan.batch.accumulation, alike=alike)


def same_over(group, tensor):
    """Whether the group's ranks have the same bits."""
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, tensor.contiguous(), group=group)
    return all(torch.equal(other, tensor) for other in everyone)


def main():
    cases, results = json.loads(Path(sys.argv[1]).read_text()), {}
    world = join()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    gc.freeze()  # DeepSpeed collects garbage often; what the imports made is none
    for case in cases:
        results[case["name"]] = run(case, world)
        torch.nn.functional.linear = real_linear  # ZeRO-3 leaves its own there, which rounds otherwise
        if world.rank == 0:
            Path(sys.argv[2]).write_text(json.dumps(results))
    leave()
    end(0)


if __name__ == "__main__":
    main()
