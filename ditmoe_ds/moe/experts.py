"""All local experts of a layer as packed 3-D weights."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PackedExperts(nn.Module):
    """``num_experts`` feed-forward networks without bias, run on tokens sorted by expert.

    ``w1`` is (E, 2F, D) for SwiGLU, rows [gate | up], or (E, F, D) for GELU; ``w2`` is (E, D, F).
    """

    def __init__(self, num_experts: int, dim: int, hidden: int, activation: str = "swiglu"):
        super().__init__()
        self.activation = activation
        rows = 2 * hidden if activation == "swiglu" else hidden
        self.w1 = nn.Parameter(torch.empty(num_experts, rows, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Apply expert e to its ``counts[e]`` consecutive rows of x (M, D); any count may be zero. Returns (M, D)."""
        multiply = grouped_mm if x.is_cuda and x.dtype == torch.bfloat16 else per_expert_mm
        return multiply(activate(multiply(x, self.w1, counts), self.activation), self.w2, counts)


def activate(x: Tensor, activation: str) -> Tensor:
    """SwiGLU halves the last dimension, silu(gate) * up; GELU keeps it."""
    if activation == "gelu":
        return F.gelu(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """One kernel for all experts: rows of x (M, K) times weight (E, N, K)^T of their expert. No host sync."""
    return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))


def per_expert_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The same by one GEMM per expert, for devices and dtypes without a grouped kernel.

    Experts without rows multiply an empty matrix, so that every weight is in the graph on every rank.
    """
    return torch.cat([F.linear(rows, matrix) for rows, matrix in zip(x.split(counts.tolist()), weight.unbind(), strict=True)])
