"""Tensor parallelism by megatron-core: its process groups and its layers, in place of a built model's.

Consecutive ranks form a tensor-parallel group. They see the same images and hold all that is not cut alike, bit by bit:
whatever was computed from a part is summed over the group before it meets the rest. torch.compile is told to leave these sums, and layers
with one, to Python, for the reasons of ``RoutedExperts.leave_to_python``; by decorators, since megatron-core imports the compiler anyway.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_ds.moe.layer import MoE
from ditmoe_ds.slices import Cut

with warnings.catch_warnings():  # that Transformer Engine and Apex are missing; nothing of them is used
    warnings.simplefilter("ignore")
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        copy_to_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
    )


class ModelParallelUnit:
    """megatron-core's groups under all the names by which DeepSpeed asks for them; there is no other model parallelism."""

    get_tensor_model_parallel_group = get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)


def join_groups(size: int) -> ModelParallelUnit:
    """Make groups of ``size`` consecutive ranks, unless they exist. Collective."""
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(size, create_gloo_process_groups=False)
    return ModelParallelUnit()


@torch.compiler.disable
def enter(x: Tensor) -> Tensor:
    """Returns x, which all ranks of the group have alike and each uses with its part: backward sums the gradient over the group."""
    return _ContiguousGradient.apply(copy_to_tensor_model_parallel_region(x))


@torch.compiler.disable
def leave(x: Tensor) -> Tensor:
    """Sum over the group; backward gives every rank the whole gradient."""
    return reduce_from_tensor_model_parallel_region(x.contiguous())


class _ContiguousGradient(torch.autograd.Function):
    """megatron-core 0.16 returns a tensor that is not contiguous as it was, and sums a copy of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


class OutputsCut(ColumnParallelLinear):
    """This rank's outputs of a linear layer. Backward sums the gradient of the input over the group."""

    def __init__(self, whole: nn.Linear, config: ModelParallelConfig):
        super().__init__(whole.in_features, whole.out_features, config=config, init_method=None, bias=whole.bias is not None)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class InputsCut(RowParallelLinear):
    """This rank's inputs of a linear layer. Forward sums the output over the group, then adds the bias, which is whole."""

    def __init__(self, whole: nn.Linear, config: ModelParallelConfig):
        biased = whole.bias is not None
        sizes = whole.in_features, whole.out_features
        super().__init__(*sizes, config=config, init_method=None, bias=biased, input_is_parallel=True, skip_bias_add=False)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class HeadNorm(nn.LayerNorm):
    """LayerNorm over the dimensions of a head. Its weights are whole, applied to this rank's heads only: backward sums their gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, enter(self.weight), enter(self.bias), self.eps)


def cut(model: nn.Module, cuts: dict[str, Cut], head_norms: list[str]) -> None:
    """Reduce a model on the meta device to this rank's part.

    Args:
        cuts: of parameters, by name. A linear layer becomes one of megatron-core's, except inside a MoE layer, which is entered and
            left as a whole.
        head_norms: modules that become a ``HeadNorm``.
    """
    size = parallel_state.get_tensor_model_parallel_world_size()
    config = ModelParallelConfig(tensor_model_parallel_size=size, use_cpu_initialization=True, perform_initialization=False)
    inside = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, MoE))
    with torch.device("meta"):
        for path, module in list(model.named_modules()):
            if path in head_norms:
                model.set_submodule(path, HeadNorm(module.normalized_shape, module.eps))
            if isinstance(module, MoE):
                _sum_around(module)
            if isinstance(module, nn.Linear) and f"{path}.weight" in cuts and not path.startswith(inside):
                model.set_submodule(path, (OutputsCut if cuts[f"{path}.weight"].dim == 0 else InputsCut)(module, config))
            module = model.get_submodule(path)
            for name, parameter in list(module.named_parameters(recurse=False)):
                if f"{path}.{name}" in cuts:
                    setattr(module, name, _part(parameter, cuts[f"{path}.{name}"], size))


def _part(parameter: nn.Parameter, cut: Cut, size: int) -> nn.Parameter:
    """A parameter of the part's shape, with the whole one's attributes and those by which DeepSpeed and ``shards`` know it."""
    shape = list(parameter.shape)
    shape[cut.dim] = sum(cut.blocks) // size
    part: Any = nn.Parameter(torch.empty(shape))
    part.__dict__.update(parameter.__dict__, tensor_model_parallel=True, tensor_cut=cut)
    return part


def _sum_around(moe: MoE) -> None:
    """Every rank runs all takings through its part of each expert and of the shared path; their outputs are summed once, combined.

    So the router's weights, too, meet parts of the experts' outputs. It is not cut: every rank routes alike.
    """

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return enter(args[0]), args[-1]  # what the router sees has its whole gradient already

    def after(_: nn.Module, args: Any, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return leave(out[0]), *out[1:]

    def routed(_: nn.Module, args: Any, out: tuple[Any, Any]) -> tuple[Any, Any]:
        assignment, stats = out
        return assignment._replace(weights=enter(assignment.weights)), stats

    moe.register_forward_pre_hook(before)
    moe.register_forward_hook(after)
    moe.deepspeed_moe.gate.register_forward_hook(routed)
