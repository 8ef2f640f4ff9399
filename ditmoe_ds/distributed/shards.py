"""The part of the training state that lives on this rank, in terms that depend on no ZeRO stage, EP or world size.

A logical tensor is a parameter of the whole model: a dense weight, or the (E, ...) weights of all experts of a layer.
Whatever the stage, a rank's part of it is one range of its flattened elements, or of its tensor-parallel slice's; a
``Shard`` is that range with views of the fp32 master weights and the optimizer's moments.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from deepspeed.moe.utils import is_moe_param
from torch import Tensor

from ditmoe_ds.distributed.engine import Engine
from ditmoe_ds.distributed.topology import ExpertGroup, agreed, data_group, tensor_place
from ditmoe_ds.slices import Slice


@dataclass
class Shard:
    """This rank's range of one logical tensor. All tensors are 1-D fp32 views of the optimizer's own memory."""

    name: str
    shape: tuple[int, ...]
    """Shape of the logical tensor."""
    start: int
    """Offset of the range in the flattened logical tensor, or in the flattened ``slice``."""
    master: Tensor
    moments: dict[str, Tensor]
    saved: bool
    """Whether this rank is the one that writes the range to a checkpoint (False for a replica's copy)."""
    slice: Slice | None
    """The slice of the logical tensor, where tensor parallelism cuts it."""

    def read(self, read: Callable[[str, int, Tensor], None], out: Tensor) -> None:
        """Fill ``out`` with the range, where ``read(name, start, out)`` fills ``out`` with a range of the flattened logical tensor."""
        if self.slice is None:
            read(self.name, self.start, out)
        else:
            self.slice.gather(self.start, out, partial(read, self.name))


def collect(engine: Engine, group: ExpertGroup) -> list[Shard]:
    """List this rank's shards in the order of the model's parameters."""
    _prepare_moments(engine)
    stage = engine.zero_optimization_stage()
    part = {0: _replicated, 1: _partitioned_optimizer, 2: _partitioned_optimizer, 3: _partitioned_weights}[stage]
    tensor_rank, tensor_size = tensor_place()
    shards = []
    for name, parameter in engine.module.named_parameters():
        found = part(engine, parameter)
        if found is None:
            continue
        start, master, moments = found
        local_shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        shape, replica = list(local_shape), torch.distributed.get_rank(data_group())
        if is_moe_param(parameter):
            shape[0] *= group.size
            start += group.rank * torch.Size(local_shape).numel()
            replica = group.replica
        cut = getattr(parameter, "tensor_cut", None)
        if cut:
            shape[cut.dim] *= tensor_size
        held = Slice(tuple(shape), cut, tensor_rank, tensor_size) if cut else None
        saved = (stage > 0 or replica == 0) and (held is not None or tensor_rank == 0)
        shards.append(Shard(name, tuple(shape), start, master, moments, saved, held))
    return shards


@torch.no_grad()
def fill(engine: Engine, shards: list[Shard], read: Callable[[str, int, Tensor], None]) -> None:
    """Set the weights from a source of logical tensors. Collective.

    Args:
        read: ``read(name, start, out)`` fills ``out`` (1-D fp32) with the elements from ``start`` on of the flattened tensor.
    """

    def read_all() -> None:
        for shard in shards:
            shard.read(read, shard.master)

    agreed(read_all)
    refresh_weights(engine)


def refresh_weights(engine: Engine) -> None:
    """Copy the master weights into the (possibly bf16, possibly partitioned) weights that forward uses. Collective."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        engine.empty_partition_cache()
        for index in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif stage:
        optimizer.update_lp_params()
    elif engine.bfloat16_enabled():
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            torch._foreach_copy_([p.data for p in low], [p.data for p in high])


def set_optimizer_step(engine: Engine, step: int) -> None:
    """Set the optimizer's step count, which Adam's bias correction uses."""
    for state in _torch_optimizer(engine).state.values():
        state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else step


def _moments(engine: Engine) -> tuple[str, str]:
    """torch's names for the two tensors that the optimizer keeps for each weight."""
    return ("momentum_buffer", "square_avg") if isinstance(_torch_optimizer(engine), torch.optim.RMSprop) else ("exp_avg", "exp_avg_sq")


def _torch_optimizer(engine: Engine) -> Any:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _masters(engine: Engine) -> list[Tensor]:
    """The fp32 tensors that the optimizer steps."""
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return [p for group in optimizer.param_groups for p in group["params"]]


def _prepare_moments(engine: Engine) -> None:
    """Make the moments before the first step, at step 0. Some of DeepSpeed's optimizers would make them only in the first step; others have
    already taken a step on zero gradients to make them, which would shift Adam's bias correction."""
    optimizer = _torch_optimizer(engine)
    for master in _masters(engine):
        state = optimizer.state[master]
        for key in _moments(engine):
            state[key] = state[key].zero_() if key in state else torch.zeros_like(master, requires_grad=False)
        state["step"] = torch.zeros((), device=master.device) if isinstance(optimizer, torch.optim.AdamW | torch.optim.RMSprop) else 0


def _replicated(engine: Engine, parameter: Any) -> tuple[int, Tensor, dict[str, Tensor]]:
    master: Tensor = parameter
    if engine.bfloat16_enabled():
        optimizer = engine.optimizer
        master = next(
            high
            for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            for low, high in zip(lows, highs, strict=True)
            if low is parameter
        )
    state = _torch_optimizer(engine).state[master]
    return 0, master.detach().view(-1), {key: state[key].view(-1) for key in _moments(engine)}


def _partitioned_optimizer(engine: Engine, parameter: Any) -> tuple[int, Tensor, dict[str, Tensor]] | None:
    mapping = parameter._hp_mapping
    if mapping is None:  # no element of it is ours
        return None
    flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    state, place = _torch_optimizer(engine).state[flat], mapping.hp_fragment_address
    cut = lambda tensor: tensor.detach().narrow(0, place.start, place.numel)  # noqa: E731
    return mapping.lp_fragment_address.start, cut(flat), {key: cut(state[key]) for key in _moments(engine)}


def _partitioned_weights(engine: Engine, parameter: Any) -> tuple[int, Tensor, dict[str, Tensor]] | None:
    optimizer = engine.optimizer
    start = parameter.partition_numel() * torch.distributed.get_rank(parameter.ds_process_group)
    count = min(parameter.partition_numel(), parameter.ds_numel - start)
    if count <= 0:  # the last ranks of a small parameter hold padding only
        return None
    index, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    flat = optimizer.fp32_partitioned_groups_flat[index]
    state = _torch_optimizer(engine).state[flat]
    cut = lambda tensor: tensor.detach().narrow(0, int(offset), count)  # noqa: E731
    return start, cut(flat), {key: cut(state[key]) for key in _moments(engine)}
