"""All local experts of a layer as packed 3-D weights."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PackedExperts(nn.Module):
    """``num_experts`` feed-forward networks of width F, run on tokens sorted by expert.

    "swiglu" is DiT-MoE's, without bias: ``w1`` (E, 2F, D), rows [gate | up], and ``w2`` (E, D, F). "gelu" is the dense DiT's,
    so that its weights can become experts: ``w1`` (E, F, D), ``b1`` (E, F), ``w2`` (E, D, F), ``b2`` (E, D), tanh GELU.
    """

    def __init__(self, num_experts: int, dim: int, hidden: int, activation: str = "swiglu"):
        super().__init__()
        self.activation = activation
        rows = 2 * hidden if activation == "swiglu" else hidden
        self.w1 = nn.Parameter(torch.empty(num_experts, rows, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        biased = activation == "gelu"
        self.b1 = nn.Parameter(torch.empty(num_experts, hidden)) if biased else None
        self.b2 = nn.Parameter(torch.empty(num_experts, dim)) if biased else None

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Apply expert e to its ``counts[e]`` consecutive rows of x (M, D); any count may be zero. Returns (M, D)."""
        multiply = grouped_mm if x.is_cuda and x.dtype == torch.bfloat16 else per_expert_mm
        hidden = add_bias(multiply(x, self.w1, counts), self.b1, counts)
        return add_bias(multiply(activate(hidden, self.activation), self.w2, counts), self.b2, counts)


def activate(x: Tensor, activation: str) -> Tensor:
    """SwiGLU halves the last dimension, silu(gate) * up; GELU (tanh) keeps it."""
    if activation == "gelu":
        return F.gelu(x, approximate="tanh")
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def add_bias(x: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """Rows of x (M, N) plus their expert's row of bias (E, N), if there is one. No host sync."""
    return x if bias is None else x + bias.repeat_interleave(counts, dim=0, output_size=len(x))


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """One kernel for all experts: rows of x (M, K) times weight (E, N, K)^T of their expert. No host sync."""
    return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))


def per_expert_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The same by one GEMM per expert, for devices and dtypes without a grouped kernel.

    Experts without rows multiply an empty matrix, so that every weight is in the graph on every rank.
    """
    return torch.cat([F.linear(rows, matrix) for rows, matrix in zip(x.split(counts.tolist()), weight.unbind(), strict=True)])
