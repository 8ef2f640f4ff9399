"""All local experts of a layer as packed 3-D weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PackedExperts(nn.Module):
    """``num_experts`` feed-forward networks of width F, run on tokens sorted by expert.

    "swiglu" is DiT-MoE's, without bias: ``w1`` (E, 2F, D), rows [gate | up], and ``w2`` (E, D, F). "gelu" is the dense DiT's,
    so that its weights can become experts: ``w1`` (E, F, D), ``b1`` (E, F), ``w2`` (E, D, F), ``b2`` (E, D), tanh GELU;
    ``bias`` False leaves ``b1`` and ``b2`` out.
    """

    def __init__(self, num_experts: int, dim: int, hidden: int, activation: str = "swiglu", bias: bool = True):
        super().__init__()
        self.activation = activation
        rows = 2 * hidden if activation == "swiglu" else hidden
        self.w1 = nn.Parameter(torch.empty(num_experts, rows, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        biased = activation == "gelu" and bias
        self.b1 = nn.Parameter(torch.empty(num_experts, hidden)) if biased else None
        self.b2 = nn.Parameter(torch.empty(num_experts, dim)) if biased else None

    def forward(self, x: Tensor, counts: Tensor, equal: bool = False) -> Tensor:
        """Apply expert e to its ``counts[e]`` consecutive rows of x (M, D); any count may be zero. Returns (M, D).

        Args:
            equal: all counts are M / E.
        """
        kernel = "batched" if equal else "grouped" if x.is_cuda and x.dtype == torch.bfloat16 else "each"
        hidden = add_bias(ExpertMM.apply(x, self.w1, counts, kernel), self.b1, counts)
        return add_bias(ExpertMM.apply(activate(hidden, self.activation), self.w2, counts, kernel), self.b2, counts)


def activate(x: Tensor, activation: str) -> Tensor:
    """SwiGLU halves the last dimension, silu(gate) * up; GELU (tanh) keeps it."""
    if activation == "gelu":
        return F.gelu(x, approximate="tanh")
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def add_bias(x: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """Rows of x (M, N) plus their expert's row of bias (E, N), if there is one. No host sync."""
    return x if bias is None else x + bias.repeat_interleave(counts, dim=0, output_size=len(x))


class ExpertMM(torch.autograd.Function):
    """Rows of x (M, K), sorted by expert, times their expert's matrix of weight (E, N, K): (M, N).

    Plain operations would save views of the weight for backward, and so keep the memory of every layer that ZeRO-3 gathered.
    The parameter itself, saved here, is empty once ZeRO-3 let go of the layer, and whole again when backward comes to it.

    ``kernel`` "grouped" is one kernel for all experts, without host sync; so is "batched", for equal counts. "each" is a
    GEMM per expert, for devices and dtypes without such a kernel. Experts without rows multiply an empty matrix: every
    weight has a gradient on every rank.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor, kernel: str) -> Tensor:
        ctx.save_for_backward(x, weight, counts)
        ctx.kernel = kernel
        return multiply(x, weight.transpose(1, 2), counts, kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, counts = ctx.saved_tensors
        grad = grad.contiguous()
        if ctx.kernel == "batched":
            outer = per_expert(grad, counts).transpose(1, 2) @ per_expert(x, counts)
        elif ctx.kernel == "grouped":
            outer = F.grouped_mm(grad.t(), x, offs=ends(counts))
        else:
            sizes = counts.tolist()
            outer = torch.stack([g.t() @ rows for g, rows in zip(grad.split(sizes), x.split(sizes), strict=True)])
        return multiply(grad, weight, counts, ctx.kernel), outer, None, None


def multiply(x: Tensor, matrices: Tensor, counts: Tensor, kernel: str) -> Tensor:
    """Rows of x (M, K) times their expert's of the matrices (E, K, N)."""
    if kernel == "batched":
        return (per_expert(x, counts) @ matrices).flatten(0, 1)
    if kernel == "grouped":
        return F.grouped_mm(x, matrices, offs=ends(counts))
    return torch.cat([rows @ matrix for rows, matrix in zip(x.split(counts.tolist()), matrices.unbind(), strict=True)])


def per_expert(x: Tensor, counts: Tensor) -> Tensor:
    """Rows (M, K) of experts with equal counts as (E, M / E, K)."""
    return x.view(len(counts), -1, x.shape[1])


def ends(counts: Tensor) -> Tensor:
    """Where each expert's rows end."""
    return counts.cumsum(0).to(torch.int32)
