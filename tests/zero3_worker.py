"""Two steps at ZeRO-3 as one of eight ranks, of which the others are not there; prints what was gathered, when, and how long it stayed.

python zero3_worker.py ROUTING RECOMPUTE train.compile=COMPILED
"""

import inspect
import json
import sys

import deepspeed.comm
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed import fake_pg  # noqa: F401, registers the backend

from ditmoe_ds.distributed import zero3
from ditmoe_ds.distributed.engine import BatchShape, OptimizerConfig, build
from ditmoe_ds.distributed.topology import ParallelConfig, expert_group
from ditmoe_ds.models import dit

routing, recompute, compiled = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "train.compile=true"
dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=8)
deepspeed.comm.init_distributed(dist_backend="fake", dist_init_required=False)
config = dit.DiTConfig(hidden=64, depth=6, heads=4, num_classes=10, input_size=8, experts=4, shared=1, routing=routing)
with torch.device("meta"):
    net = dit.DiT(config, ep_size=expert_group(1, 1).size)
net.checkpoint_activations = recompute
zero = dict(stage=3, overlap_comm=True, stage3_param_persistence_threshold=100)
settings = ParallelConfig(zero_stage=3, expert=1), OptimizerConfig(), BatchShape(16, 1, 2), "fp32", dict(zero_optimization=zero)
engine = build(net, *settings, torch.device("cpu"))
if compiled:
    compile_with = torch.compile
    torch.compile = lambda function, mode: compile_with(function, backend="aot_eager_decomp_partition")  # all but the code for each graph
    net.compile_blocks()
for parameter in net.parameters():
    parameter.ds_tensor.data.normal_(0, 0.02)
layer = sum(parameter.ds_numel for parameter in net.blocks[0].parameters())
gather, wait = zero3.gather, zero3.OnTheirWay.wait
whole, most, awaited, ahead = [], 0, [], []


def live():
    """Elements of gathered weights that are in memory, in layers."""
    whole[:] = [(storage, size) for storage, size in whole if not storage.expired()]
    return sum(size for _, size in whole) / layer


def counted_wait(self, handle_dependency=True):
    global most
    mine = self.parameters
    wait(self, handle_dependency)
    whole.extend((StorageWeakRef(parameter.data.untyped_storage()), parameter.numel()) for parameter in mine)
    most = max(most, live())


def counted_gather(coordinator, parameters, forward):
    missing = sum(parameter.ds_numel for parameter in parameters if parameter.ds_status.name == "NOT_AVAILABLE") / layer
    if missing:
        caller = inspect.currentframe().f_back.f_locals
        (ahead if "params_to_prefetch" in caller else awaited).append(missing)
    gather(coordinator, parameters, forward)


zero3.OnTheirWay.wait = counted_wait
setattr(PartitionedParameterCoordinator, zero3.GATHER, counted_gather)
x, t, y, found = torch.randn(2, 4, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.long), []
for _ in range(3):  # in the first DeepSpeed learns the order
    most = 0
    awaited.clear(), ahead.clear()
    loss = engine(x, t, y).square().mean()
    between, forward, most = live(), most, 0
    engine.backward(loss)
    found.append(dict(forward=forward, between=between, backward=most, after=live(), awaited=max(awaited), ahead=sorted(ahead)))
    engine.step()
breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
asked = sum(len(module._external_params) for module in net.modules())
print(json.dumps(dict(steps=found, breaks=breaks, graphs=torch._dynamo.utils.counters["stats"]["unique_graphs"], asked=asked)))
