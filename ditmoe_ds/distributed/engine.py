"""DeepSpeed's engine for every ZeRO stage with expert parallelism, without a fork.

DeepSpeed 0.19 refuses ZeRO stage 3 for its own MoE layer, although its stage-3 code does everything needed for
parameters that carry the attributes of its newer "AutoEP" layers. We set those attributes and lift the refusal,
for the versions it was tried with. Stage 0 clips by a wrong norm under expert parallelism; we clip ourselves.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.utils import groups, set_z3_leaf_module
from torch import Tensor, nn

from ditmoe_ds.distributed import zero3
from ditmoe_ds.distributed.settings import offloads, zero_settings
from ditmoe_ds.distributed.topology import ParallelConfig

if torch.version.cuda or torch.version.hip:  # these builds of torch bring Triton along
    from ditmoe_ds.distributed.adamw import AtOnce
    from ditmoe_ds.distributed.norm import square_sum


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule: linear warm-up, then constant, as DiT."""

    name: Literal["adamw", "rmsprop"] = "adamw"
    """rmsprop, with momentum, is EC-DIT's."""
    lr: float = 1e-4
    beta1: float = 0.9
    """Decay of the mean gradient; with rmsprop the momentum."""
    beta2: float = 0.999
    """Decay of the mean square of the gradient."""
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled with adamw; with rmsprop added to the gradient."""
    warmup_steps: int = 0
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""

    def lr_at(self, step: int) -> float:
        """Learning rate of the optimizer step numbered ``step`` (from 0)."""
        return self.lr * min(1.0, (step + 1) / (self.warmup_steps + 1))


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is cut: ranks x accumulation x micro-batch."""

    global_batch: int
    accumulation: int
    micro: int


class Engine(DeepSpeedEngine):
    """DeepSpeedEngine with native MoE under ZeRO-3, and the true gradient norm and clipping at stage 0.

    A step whose gradient norm is not finite is not applied, at any stage; ``was_step_applied`` tells.
    """

    grad_clip = 0.0
    clip = 1.0
    """Factor that clips this step's gradient; used at stage 0 only."""
    at_once: "AtOnce | None" = None
    """The optimizer's step at stage 0 in bf16, if one kernel makes it."""

    def _broadcast_model(self) -> None:
        """Not needed: every rank fills in the same weights, later."""

    def _validate_zero3_moe_compatibility(self) -> None:
        """Replace DeepSpeed's blanket refusal by what its stage-3 code needs; ``read_ds_config`` has its other refusals."""
        for name, parameter in self.module.named_parameters():
            tagged = getattr(parameter, "ds_zero_placement_family", None) == "autoep_expert"
            assert tagged == is_moe_param(parameter), f"{name}: expert parameters, and only those, carry ZeRO-3 placement tags"

    def allreduce_no_retain(self, bucket: list[Tensor], dp_group: Any, numel_per_bucket: int = 0, dp_world_size: float = 1) -> None:
        """At stage 0: gradients that this rank shares with no other stay where they are, instead of being copied into a bucket and back."""
        if dist.get_world_size(dp_group) > 1:
            super().allreduce_no_retain(bucket, dp_group, numel_per_bucket, dp_world_size)
        elif dp_world_size != 1:  # experts: their tokens came from this many ranks
            torch._foreach_mul_(bucket, 1 / dp_world_size)

    def _take_model_step(self, lr_kwargs: Any) -> None:
        if self.zero_optimization():
            super()._take_model_step(lr_kwargs)
            return
        square = self._square_without_zero()
        if self.at_once:
            self.at_once.prepare()
        norm = math.sqrt(square.item())  # waits for the device
        if not math.isfinite(norm):
            self.optimizer.zero_grad()
            self._step_applied = False
            self.skipped_steps += 1
            self.global_steps += 1
            return
        self.clip = min(1.0, self.grad_clip / (norm + 1e-6)) if self.grad_clip else 1.0
        if self.clip < 1 and not self.bfloat16_enabled():
            torch._foreach_mul_([parameter.grad for parameter in self.module.parameters()], self.clip)
        super()._take_model_step(lr_kwargs)
        self._global_grad_norm = norm

    def _square_without_zero(self) -> Tensor:
        """() squared 2-norm of the averaged gradient of the whole model: every expert once, every replicated weight once."""
        squares = torch.zeros(2, 2, dtype=torch.float64, device=self.device)  # [is cut by tensor parallelism][is of experts]
        group, gradients = None, defaultdict(list)
        for parameter in self.module.parameters():
            if is_moe_param(parameter):
                group = groups._get_expert_parallel_group(parameter.group_name)
            gradients[int(is_model_parallel_parameter(parameter)), int(is_moe_param(parameter))].append(parameter.grad)
        for kind, those in gradients.items():
            squares[kind] = _square_sum(those)
        if self.mpu is not None:
            dist.all_reduce(squares[1], group=self.mpu.get_model_parallel_group())
        squares = squares.sum(0)
        if group is not None:
            dist.all_reduce(squares[1:], group=group)
        return squares.sum()


def build(
    model: nn.Module,
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    batch: BatchShape,
    precision: Literal["bf16", "fp32"],
    ds_config: dict[str, Any],
    device: torch.device,
) -> Engine:
    """Wrap ``model``, which is on the meta device; its expert groups must exist (``topology.expert_group``).

    Memory is given to one module at a time and, under ZeRO-3, cut into this rank's part at once, so that no rank ever
    holds more than its part and one module. The weights are not initialised: see ``shards.fill``.

    Args:
        ds_config: what ``read_ds_config`` returned.
    """
    params: dict[str, Any] = dict(lr=optimizer.lr, eps=optimizer.eps, weight_decay=optimizer.weight_decay)
    if optimizer.name == "rmsprop":
        params |= dict(momentum=optimizer.beta1, alpha=optimizer.beta2)
    else:
        params["betas"] = [optimizer.beta1, optimizer.beta2]
        if not offloads(ds_config):
            params |= dict(torch_adam=True, fused=True)  # one kernel per flat tensor, and nothing to compile as for DeepSpeed's own
    timers = dict(throughput=dict(enabled=False))  # DeepSpeed's timer waits for the GPU around every forward
    config = (
        dict(timers=timers)
        | ds_config
        | dict(
            train_batch_size=batch.global_batch,
            train_micro_batch_size_per_gpu=batch.micro,
            gradient_accumulation_steps=batch.accumulation,
            gradient_clipping=optimizer.grad_clip if parallel.zero_stage else 0.0,
            optimizer=dict(type={"adamw": "AdamW", "rmsprop": "RMSprop"}[optimizer.name], params=params),
            zero_allow_untested_optimizer=True,  # RMSprop is tested here
            bf16=dict(enabled=precision == "bf16", check_grad_overflow=True),
        )
    )
    if parallel.zero_stage == 3:
        zero3.install()
        by_layer = _gather_by_layer(model, zero_settings(config).param_persistence_threshold)
        config["zero_optimization"] = by_layer | config["zero_optimization"]
    _materialise(model, device, torch.bfloat16 if precision == "bf16" else torch.float32, config if parallel.zero_stage == 3 else None)
    engine = Engine(
        args=None,
        model=model,
        model_parameters=list(model.parameters()),
        config=config,
        config_class=DeepSpeedConfig(config, mpu=groups.mpu),
        mpu=groups.mpu,
    )
    if offloads(ds_config):
        _powers_afresh(engine.optimizer)
        # else stage 3 does not sum experts' norms over tensor-parallel ranks: right for AutoEP, whose expert-parallel groups hold those
        engine.optimizer._grad_norm_counts_every_rank = lambda parameters, group: False
    elif parallel.zero_stage:
        _one_pass_over_gradients(engine.optimizer, parallel.zero_stage)
        _norm_on_host(engine.optimizer, parallel.zero_stage)
        if not get_accelerator().is_synchronized_device():
            _end_backward_without_the_host(engine.optimizer, parallel.zero_stage)
        if parallel.zero_stage == 2:
            _keep_until_reduced(engine.optimizer)
    if parallel.zero_stage == 0 and precision == "bf16":
        engine.optimizer.step = partial(_step_masters, engine)
        if device.type == "cuda" and optimizer.name == "adamw":
            groups_of = engine.optimizer.fp32_groups, engine.optimizer.fp16_groups
            engine.at_once = AtOnce(engine.optimizer.optimizer, *([*chain(*each)] for each in groups_of))
            engine.optimizer.step = lambda: engine.at_once.step(engine.clip)
    engine.grad_clip = optimizer.grad_clip
    assert parallel.zero_stage == engine.zero_optimization_stage()
    assert not any(isinstance(module, MoE) for module in model.modules()) or engine.has_moe_layers
    return engine


def _powers_afresh(optimizer: Any) -> None:
    """DeepSpeed's CPU Adam updates the powers of its betas from step to step, but computes them anew in the first step after a resume,
    which rounds differently. A step numbered 0, without weights, before each step makes it always compute them anew."""
    adam, step, nothing = optimizer.optimizer, optimizer.step, [torch.empty(0)] * 4

    def afresh(*arguments: Any, **named: Any) -> Any:
        group = adam.param_groups[0]
        adam.ds_opt_adam.adam_update(adam.opt_id, 0, group["lr"], *group["betas"], group["eps"], 0.0, True, *nothing)
        return step(*arguments, **named)

    optimizer.step = afresh


def _one_pass_over_gradients(optimizer: Any, stage: int) -> None:
    """Compute the gradient norm under ZeRO by few kernels. DeepSpeed copies each gradient to double, and at stages 1 and 2 first searches
    it for values that are not finite: a dozen small kernels for every parameter. Such values show in the norm as well."""

    def norm_of(gradients: list[Tensor], parameters: list[nn.Parameter]) -> Tensor:
        """The norm of a group of parameters over all ranks, given this rank's part; -1 if it is not finite, as DeepSpeed expects."""
        proper = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        counted = [g for g, p in zip(proper, parameters) if is_model_parallel_parameter(p) or optimizer.model_parallel_rank == 0]
        square = _square_sum(counted) if counted else torch.zeros((), dtype=torch.float64, device=optimizer.device)
        if stage == 3:  # experts are divided among their replicas
            over = [optimizer._get_param_partition_group(parameters[0]), optimizer._autoep_expert_parallel_group(parameters)]
        else:
            over = [optimizer.dp_process_group]
        for group in filter(None, (*over, groups.mpu and groups.mpu.get_model_parallel_group())):
            dist.all_reduce(square, group=group)
        return torch.where(square.isfinite(), square.sqrt(), -1.0).float()

    optimizer.get_grad_norm_direct = norm_of
    optimizer.check_overflow = lambda partition_gradients: None


def _norm_on_host(optimizer: Any, stage: int) -> None:
    """DeepSpeed asks for every group of weights whether the gradient norm is finite, and we read it after the step. Asking a tensor on a
    GPU would wait for all that the GPU has been given before, at last for the whole step; the host's copy waits for backward alone."""
    if stage == 3:
        norms = optimizer._get_norm_groups
        optimizer._get_norm_groups = lambda: [norm.cpu() for norm in norms()]
    else:
        norm = optimizer.scaled_global_norm
        optimizer.scaled_global_norm = lambda: norm().cpu()


def _end_backward_without_the_host(optimizer: Any, stage: int) -> None:
    """After the last gradient of every backward DeepSpeed has the host wait for the GPU (at stage 3 for the stream that reduces gradients),
    which then has nothing to do until the host has launched more. It is enough that the current stream waits for the one that reduces."""
    end, accelerator = optimizer.independent_gradient_partition_epilogue, get_accelerator()
    stream = optimizer.reduce_and_partition_stream if stage == 3 else optimizer.reduction_stream
    awaited = stream if stage == 3 else accelerator

    def end_by_streams() -> None:
        awaited.synchronize = lambda: accelerator.current_stream().wait_stream(stream)
        try:
            end()
        finally:
            del awaited.synchronize

    optimizer.independent_gradient_partition_epilogue = end_by_streams


def _keep_until_reduced(optimizer: Any) -> None:
    """DeepSpeed reduces a gradient larger than its bucket where it lies, on a stream of its own, and lets go of it at once: on a rank that
    keeps no part of it, what backward computes next could be written over it before it was read."""
    average = optimizer.average_tensor

    def keep_and_average(gradient: Tensor, dtype: torch.dtype) -> None:
        if gradient.numel() > optimizer.reduce_bucket_size and not get_accelerator().is_synchronized_device():
            gradient.record_stream(optimizer.reduction_stream)
        average(gradient, dtype)

    optimizer.average_tensor = keep_and_average


def _square_sum(gradients: list[Tensor]) -> Tensor:
    """() float64 sum of squares, by few kernels however many gradients there are."""
    if gradients[0].is_cuda:
        return square_sum(gradients)
    return torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)).double().square().sum()


def _step_masters(engine: Engine) -> None:
    """The optimizer's step at stage 0 in bf16, by groups of weights. DeepSpeed's takes a dozen small kernels for each weight."""
    optimizer = engine.optimizer
    for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        gradients = [torch.empty_like(master) for master in high]
        torch._foreach_copy_(gradients, [parameter.grad for parameter in low])
        if engine.clip < 1:
            torch._foreach_mul_(gradients, engine.clip)
        for master, gradient in zip(high, gradients, strict=True):
            master.grad = gradient
        optimizer.optimizer.step()  # the other groups have no gradients
        for master in high:
            master.grad = None
        torch._foreach_copy_([parameter.data for parameter in low], [master.data for master in high])


def _gather_by_layer(model: nn.Module, persistent: int) -> dict[str, int]:
    """Have ZeRO-3 gather a layer's weights together, and the next layer's while this one is computed.

    DeepSpeed would give each module of a layer hooks of its own, and the host twice the work and more (benchmarks/zero3_host.md).

    Args:
        persistent: elements of the largest weights that stay whole.

    Returns:
        Settings. DeepSpeed's prefetch continues at every layer until ``max_live_parameters`` elements are whole (and may exceed it by one
        tensor): that, not the bucket, is what bounds it. What is needed again within ``max_reuse_distance`` elements is not released:
        here the layers that backward begins with.
    """
    layers = [layer for stack in model.children() if isinstance(stack, nn.ModuleList) for layer in stack]
    for layer in layers:
        set_z3_leaf_module(layer, True)
    sizes = [[parameter.numel() for parameter in layer.parameters()] for layer in layers]
    gathered = max(1, *(sum(size for size in layer if size > persistent) for layer in sizes))  # 0 would turn prefetching off
    apart = 2 * max(map(sum, sizes))
    return dict(stage3_prefetch_bucket_size=gathered, stage3_max_live_parameters=2 * gathered, stage3_max_reuse_distance=apart)


def _materialise(model: nn.Module, device: torch.device, dtype: torch.dtype, partition: dict[str, Any] | None) -> None:
    """Replace every meta parameter by uninitialised memory; given a DeepSpeed config, by this rank's ZeRO-3 part of it."""
    for module in model.modules():
        parameter: Any  # carries DeepSpeed's attributes
        for name, parameter in list(module.named_parameters(recurse=False)):
            made: Any = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
            made.__dict__.update(parameter.__dict__)
            if is_moe_param(made):
                made.ds_zero_placement_family = "autoep_expert"
                made.ds_zero_partition_group_name = made.group_name
                made.ds_zero_partition_process_group = groups._get_expert_data_parallel_group(made.group_name)
            setattr(module, name, made)
        if partition and next(module.parameters(recurse=False), None) is not None:
            group = groups.mpu and groups.mpu.get_data_parallel_group()
            deepspeed.zero.Init(module=module, data_parallel_group=group, config_dict_or_path=partition, dtype=dtype, mpu=groups.mpu)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
