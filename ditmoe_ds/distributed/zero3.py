"""Replacements for parts of DeepSpeed's ZeRO-3, for many ranks and for experts.

- DeepSpeed 0.19 cuts every weight that it gathered, and every gradient that it scatters, into a view for each rank of the group. Among 512
  ranks that takes the host seconds in each micro-batch, whatever the GPU does (docs/log.md). Here each is one strided copy.
- After a step it gathers the weights that stay whole, hundreds of small ones, by a collective each. Here it is one for all.
- It gathers sets of parameters, which Python orders by their addresses. Where a set has weights of experts and others, which different
  groups of ranks hold, two ranks could begin with different groups, and NCCL would have them wait for each other. Here sets are sorted.
- It gathers on a stream of its own, which does not wait for weights to be written, except by a wait for the whole GPU in what gathers those
  that stay whole. Here it waits at the beginning of every forward, and the host never does.
- It sends every parameter from the first rank to all before cutting it. Here it does not, since no rank has values yet.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.comm.coalesced_collectives import _torch_reduce_scatter_fn
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor

GATHER, STREAM, IN_FLIGHT, WHOLE = (
    f"_PartitionedParameterCoordinator__{name}"
    for name in ("all_gather_params", "allgather_stream", "inflight_param_registry", "n_available_params")
)
_clean = PartitionedParameterCoordinator._clean_inflight_param_registry


def install() -> None:
    """Replace DeepSpeed's functions by those below, for all engines of this process."""
    setattr(PartitionedParameterCoordinator, GATHER, gather)
    PartitionedParameterCoordinator._clean_inflight_param_registry = begin_forward
    Init._allgather_params_coalesced = gather_together
    stage3.reduce_scatter_coalesced = reduce_scatter
    Init._zero_init_param = cut


def cut(init: Any, parameter: Any) -> None:
    """Keep this rank's part of a parameter, whose values come later."""
    init._convert_to_deepspeed_param(parameter)
    parameter.partition()


def begin_forward(coordinator: Any) -> None:
    """Drop what was gathered and not used. From here on gathering waits for what the current stream has been given until now: it may write
    the weights, or wait for a gather into memory that is free now."""
    _clean(coordinator)
    if not get_accelerator().is_synchronized_device():
        getattr(coordinator, STREAM).wait_stream(get_accelerator().current_stream())


def gather(coordinator: Any, parameters: Iterable[Any], forward: bool) -> None:
    """Begin to gather those of the parameters that are not here, by one collective for each group of ranks."""
    by_group = defaultdict(list)
    for parameter in sorted(parameters, key=lambda parameter: parameter.ds_id):
        if parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE:
            by_group[parameter.ds_process_group].append(parameter)
    with get_accelerator().stream(getattr(coordinator, STREAM)):
        for group, missing in by_group.items():
            on_their_way = OnTheirWay(missing, group)
            for parameter in missing:
                parameter.ds_status = ZeroParamStatus.INFLIGHT
                getattr(coordinator, IN_FLIGHT)[parameter] = on_their_way
    missing = sum(parameter.ds_numel for missing in by_group.values() for parameter in missing)
    setattr(coordinator, WHOLE, getattr(coordinator, WHOLE) + missing)


class OnTheirWay:
    """Parameters of which the ranks of one group send each other their parts."""

    def __init__(self, parameters: list[Any], group: Any):
        self.parameters, held = parameters, [parameter.ds_tensor for parameter in parameters]
        self.parts: Sequence[Tensor]
        if dist.get_world_size(group) == 1:
            self.parts, self.work = [part[None] for part in held], None
            return
        sizes = [len(part) for part in held]
        everyone = held[0].new_empty(dist.get_world_size(group), sum(sizes))
        mine = everyone[dist.get_rank(group)]
        torch.cat(held, out=mine)
        self.work = dist.all_gather_into_tensor(everyone.view(-1), mine, group=group, async_op=True)
        self.parts = everyone.split(sizes, dim=1)

    def wait(self, handle_dependency: bool = True) -> None:
        """The current stream waits for them, then assembles each."""
        if self.work:
            self.work.wait()
        for parameter, parts in zip(self.parameters, self.parts, strict=True):
            parameter.data = parts.reshape(-1)[: parameter.ds_numel].view(parameter.ds_shape)  # the last part's end may be padding
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        self.parameters, self.parts = [], []


def gather_together(init: Any, parameters: list[Any], hierarchy: int = 0, quantize: bool = False) -> None:
    """Gather parameters of one group of ranks, and wait for it."""
    if parameters:
        OnTheirWay(parameters, init.get_partition_dp_group(parameters[0])).wait()


@torch.no_grad()
def reduce_scatter(tensors: list[Tensor], group: Any = None) -> list[Tensor]:
    """The mean over ranks of each tensor's part that is this rank's: of n elements and W ranks the r-th ceil(n / W), without padding."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    sizes = [math.ceil(tensor.numel() / world) for tensor in tensors]
    if len(tensors) == 1 and tensors[0].numel() == world * sizes[0]:
        parts = tensors[0].view(world, -1)
    else:
        parts = tensors[0].new_empty(world, sum(sizes))
        for tensor, own in zip(tensors, parts.split(sizes, dim=1), strict=True):
            full, rest = divmod(tensor.numel(), own.shape[1])
            flat = tensor.view(-1)
            own[:full].copy_(flat[: len(flat) - rest].view(full, -1))
            if rest:
                own[full, :rest].copy_(flat[len(flat) - rest :])
    parts.div_(world)
    mine = parts[rank]
    _torch_reduce_scatter_fn(parts.view(-1), mine, group=group)
    ours = [max(min(tensor.numel() - rank * size, size), 0) for tensor, size in zip(tensors, sizes, strict=True)]
    return [part[:count] for part, count in zip(mine.split(sizes), ours, strict=True)]
