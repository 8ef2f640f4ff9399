"""All local experts of a layer as packed 3-D weights."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_ds.moe.rows import activate, activate_backward

if torch.version.cuda or torch.version.hip:  # these builds of torch bring Triton along
    from ditmoe_ds.moe import kernels


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
        kernel = fastest_kernel(x.device, x.dtype, equal)
        return ExpertFFN.apply(x, self.w1, self.b1, self.w2, self.b2, counts, kernel, self.activation)

    def asks_for_counts(self, equal: bool) -> bool:
        """Whether the host has to know how many rows each expert has."""
        return fastest_kernel(self.w1.device, self.w1.dtype, equal) == "each"


KERNELS = {"grouped": "one grouped GEMM", "batched": "one batched GEMM", "each": "one GEMM each"}


def fastest_kernel(device: torch.device, dtype: torch.dtype, equal: bool) -> str:
    """A key of ``KERNELS``. On a CPU a grouped GEMM is no faster than a GEMM per expert (docs/log.md). On GPUs torch has a grouped kernel
    only for bf16 on Hopper and Blackwell; elsewhere every ``grouped_mm`` waits for the device to tell where each expert's rows end, and
    loops over the experts."""
    if equal:
        return "batched"
    fused = device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in (9, 10)
    return "grouped" if fused else "each"


def leaves_gaps(device: torch.device) -> bool:
    """Whether a grouped GEMM leaves the weight gradient of an expert without rows uninitialised: on Blackwell (pytorch issue 172439)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 10


class ExpertFFN(torch.autograd.Function):
    """Rows of x (M, D), sorted by expert, through their expert's first matrix, activation and second matrix: (M, D).

    Plain operations would save views of the weights for backward, and so keep alive the memory of every layer that ZeRO-3 gathered.
    Here the parameters themselves are saved, which ZeRO-3 empties when it releases the layer and refills before backward reaches it.
    Of the activations only x and the first product are saved; backward repeats the elementwise part.

    ``kernel`` "grouped" is one kernel for all experts, without host sync; so is "batched", for equal counts. "each" is a
    GEMM per expert, for devices and dtypes without such a kernel. Experts without rows multiply an empty matrix, so that
    every weight has a gradient on every rank.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        counts: Tensor,
        kernel: str,
        activation: str,
    ) -> Tensor:
        ctx.parts, ctx.activation, ctx.biased = split(x, counts, kernel), activation, b1 is not None
        first, out = [], []
        for part in ctx.parts:
            first.append(add_bias(multiply(x[part.rows], w1[part.experts].mT, part.ends), b1, part, counts))
            out.append(add_bias(multiply(activate(first[-1], activation), w2[part.experts].mT, part.ends), b2, part, counts))
        ctx.save_for_backward(x, w1, w2, counts, *first)
        return join(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, counts, *first = ctx.saved_tensors
        grad = grad.contiguous()
        x_grads, b1_grads, b2_grads, w1_grad, w2_grad = [], [], [], None, None
        for part, before in zip(ctx.parts, first, strict=True):
            inner, before_grad = activate_backward(before, multiply(grad[part.rows], w2[part.experts], part.ends), ctx.activation)
            w2_grad = fill(w2_grad, w2, part, grad[part.rows], inner)
            del inner  # makes room for the rest
            w1_grad = fill(w1_grad, w1, part, before_grad, x[part.rows])
            x_grads.append(multiply(before_grad, w1[part.experts], part.ends))
            if ctx.biased:
                b1_grads.append(sum_rows(before_grad, part, counts))
                b2_grads.append(sum_rows(grad[part.rows], part, counts))
        b1_grad, b2_grad = (join(grads) if ctx.biased else None for grads in (b1_grads, b2_grads))
        return join(x_grads), w1_grad, b1_grad, w2_grad, b2_grad, None, None, None


class Part(NamedTuple):
    """Experts that are computed together."""

    rows: slice
    experts: slice
    ends: Tensor | None
    """Where each expert's rows end; None if all have equally many."""


def split(x: Tensor, counts: Tensor, kernel: str) -> list[Part]:
    """Group the experts for computation: all at once on a GPU; a few at a time on a CPU, whose cache then still holds a product when the
    elementwise part reads it."""
    if kernel == "grouped":
        return [Part(slice(None), slice(None), counts.cumsum(0).to(torch.int32))]
    if kernel == "batched":
        if x.is_cuda or torch.compiler.is_compiling():  # a compiler fuses elementwise parts itself, and has a graph for each end of a slice
            return [Part(slice(None), slice(None), None)]
        step, rows = torch.get_num_threads(), len(x) // len(counts)
        return [Part(slice(e * rows, (e + step) * rows), slice(e, e + step), None) for e in range(0, len(counts), step)]
    ends = counts.cumsum(0).tolist()
    return [Part(slice(start, end), slice(e, e + 1), None) for e, (start, end) in enumerate(zip([0, *ends], ends))]


def multiply(x: Tensor, matrices: Tensor, ends: Tensor | None) -> Tensor:
    """Rows of x (M, K) times their expert's of the matrices (E, K, N)."""
    if ends is not None:
        return F.grouped_mm(x, matrices, offs=ends)
    if len(matrices) == 1:
        return x @ matrices[0]
    return (per_expert(x, matrices) @ matrices).flatten(0, 1)


def fill(weight_grad: Tensor | None, weight: Tensor, part: Part, grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of weight (E, N, K), with the part's experts filled in: grad (M, N), transposed, times x (M, K)."""
    if part.ends is not None:
        found = F.grouped_mm(grad.t(), x, offs=part.ends)
        if leaves_gaps(x.device):
            kernels.clear(found, part.ends)
        return found
    if part.experts == slice(None):
        return per_expert(grad, weight).mT @ per_expert(x, weight)
    weight_grad = torch.empty_like(weight) if weight_grad is None else weight_grad
    own = weight_grad[part.experts]
    if len(own) == 1:
        torch.mm(grad.t(), x, out=own[0])
    else:
        torch.bmm(per_expert(grad, own).mT, per_expert(x, own), out=own)
    return weight_grad


def add_bias(x: Tensor, bias: Tensor | None, part: Part, counts: Tensor) -> Tensor:
    """Rows of x (M, N) of the part's experts plus their expert's row of bias (E, N), if there is one. No host sync."""
    if bias is None:
        return x
    bias, counts = bias[part.experts], counts[part.experts]
    if part.ends is None:
        return (x.view(len(bias), len(x) // len(bias), x.shape[1]) + bias[:, None]).view_as(x)
    return x + bias.repeat_interleave(counts, dim=0, output_size=len(x))


def sum_rows(x: Tensor, part: Part, counts: Tensor) -> Tensor:
    """The sum of each of the part's experts' rows of x (M, N): (experts, N). It accumulates in fp32."""
    counts = counts[part.experts]
    if part.ends is None:
        return x.view(len(counts), len(x) // len(counts), x.shape[1]).sum(1)
    each = torch.arange(len(counts), device=x.device)
    own = each[:, None] == each.repeat_interleave(counts, output_size=len(x))
    return own.to(x.dtype) @ x  # a GPU's index_add would round to bf16 after every addition


def per_expert(x: Tensor, matrices: Tensor) -> Tensor:
    """Rows (M, K) of experts with equal counts as (E, M / E, K)."""
    return x.view(len(matrices), -1, x.shape[1])


def join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
