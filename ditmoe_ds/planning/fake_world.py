"""A rank of a world that is not there: collectives end at once, and tensors have no memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor, nn
from torch.testing._internal.distributed import fake_pg  # noqa: F401, registers the backend

from ditmoe_ds.moe.layer import Router, RouterStats
from ditmoe_ds.moe.routing import Assignment


class _OnMeta(CPU_Accelerator):
    """DeepSpeed's CPU accelerator, but it also accepts meta tensors as its own."""

    def on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.is_meta

    def create_op_builder(self, op_name: str) -> None:
        """No extension is compiled: nothing runs in one."""


@contextmanager
def fake_world(rank: int, size: int) -> Iterator[None]:
    """Within this context the process is one of ``size`` ranks. Once in a process only, since DeepSpeed keeps its groups.

    Meta tensors are treated as a GPU's would be: fused attention, the fused optimizer, all experts at once.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    set_accelerator(_OnMeta())
    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=size)
    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("scaled_dot_product_attention", _fused_attention, "AutogradMeta")
    with patch("torch.optim.adam._device_dtype_check_for_fused"):  # it runs on meta tensors, but torch does not list them
        yield
    kernels._destroy()
    dist.destroy_process_group()


def _fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """In place of the plain matrix products that torch uses on a device without a fused kernel."""
    mask = None if attn_mask is None else torch.empty_like(attn_mask, dtype=q.dtype)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]


def balance(model: nn.Module) -> None:
    """Give all experts equally many tokens where no capacity does: how many each gets would depend on values, which are not there."""

    def even(router: Router, args: Any, out: tuple[Assignment, RouterStats]) -> tuple[Assignment, RouterStats]:
        assignment, stats = out
        rows = len(assignment.tokens) // len(router.weight) * len(router.weight)
        return Assignment(assignment.tokens[:rows], assignment.weights[:rows], assignment.counts, equal=True), stats

    for router in model.modules():
        if isinstance(router, Router) and router.choice == "token" and router.config.capacity_factor is None:
            router.register_forward_hook(even)
