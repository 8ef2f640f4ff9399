"""From tokens to the rows that experts compute, and back: activations, gathers and weighted sums.

On a GPU each, but for plain gathers, is one Triton kernel (``kernels.py``), also inside compiled blocks; elsewhere torch's operators.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ditmoe_ds.moe.routing import Assignment

if torch.version.cuda or torch.version.hip:  # these builds of torch bring Triton along
    from ditmoe_ds.moe import kernels


def fused(x: Tensor) -> bool:
    """Whether Triton kernels compute on x."""
    return x.is_cuda


def activate(x: Tensor, activation: str) -> Tensor:
    """SwiGLU halves the last dimension, silu(gate) * up; GELU (tanh) keeps it."""
    if activation == "gelu":
        return F.gelu(x, approximate="tanh")
    if fused(x):
        return SwiGLU.apply(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def activate_backward(x: Tensor, grad: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """``activate(x)`` once more, and the gradient of x (M, N), given ``grad``, that of ``activate(x)``, which may be overwritten."""
    if fused(x):  # by torch's operators a compiler would see that forward computed the activation, too, and keep it
        x_grad = kernels.gelu_backward(x, grad) if activation == "gelu" else kernels.swiglu_backward(x, grad, again=grad)
        return grad, x_grad
    if activation == "gelu":
        return activate(x, activation), torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    gate, up = x.chunk(2, dim=-1)
    gated = F.silu(gate)
    x_grad = torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * gated], dim=-1)
    return gated.mul_(up), x_grad


class SwiGLU(torch.autograd.Function):
    """``activate`` on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return kernels.swiglu(x.contiguous().flatten(0, -2)).view(*x.shape[:-1], x.shape[-1] // 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return kernels.swiglu_backward(x.contiguous().flatten(0, -2), grad.contiguous().flatten(0, -2), None).view_as(x)


def by_token(assignment: Assignment, number: int) -> tuple[Tensor | None, Tensor | None]:
    """For ``Take`` and ``Combine`` on a GPU: ``listed`` and ``found`` of ``kernels.sum_takings``, for ``number`` tokens. With these,
    kernels add without atomics, in the same order on every run."""
    if not fused(assignment.tokens):
        return None, None
    if assignment.listed is not None:
        return assignment.listed, None
    return kernels.list_takings(assignment.tokens, assignment.weights, number, len(assignment.counts))


class Take(torch.autograd.Function):
    """The rows of x (T, D) at ``tokens`` (M,): (M, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, listed: Tensor | None, found: Tensor | None) -> Tensor:
        ctx.save_for_backward(tokens, listed, found)
        ctx.number = len(x)
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, listed, found = ctx.saved_tensors
        if listed is None:
            return grad.new_zeros(ctx.number, grad.shape[1]).index_add_(0, tokens, grad), None, None, None
        return kernels.sum_takings(grad.contiguous(), None, listed, found), None, None, None


class Combine(torch.autograd.Function):
    """The weighted sum of each token's takings, in fp32: from rows (M, D), which belong to ``tokens`` (M,), to (T, D).

    Plain operations would save the rows twice in fp32 for backward, plain and weighted; this saves them once, in their own dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, tokens: Tensor, weights: Tensor, number: int, listed: Tensor | None, found: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(rows, tokens, weights)
        if listed is None:
            out = rows.new_zeros(number, rows.shape[1], dtype=torch.float32)
            out = out.index_add(0, tokens, rows * weights[:, None])
            # neither in place nor by a ``to`` that changes nothing: torch 2.11 would compile a gradient of zeros
            return out if rows.dtype == out.dtype else out.to(rows.dtype)
        return kernels.sum_takings(rows.contiguous(), weights, listed, found)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, tokens, weights = ctx.saved_tensors
        if fused(grad):
            rows_grad, weights_grad = kernels.weigh_backward(grad.contiguous(), rows.contiguous(), tokens, weights)
        else:
            upward = grad.index_select(0, tokens).float()
            weights_grad = (upward * rows).sum(1)
            rows_grad = upward.mul_(weights[:, None]).to(rows.dtype)
        return rows_grad, None, weights_grad, None, None, None
