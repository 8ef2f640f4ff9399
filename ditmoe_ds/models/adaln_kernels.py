"""Residual sum, LayerNorm and modulation of ``adaln`` as one Triton kernel forward and one backward, on tensors on a GPU, computed in fp32.

In bf16 forward moves 8 bytes for an element of the tokens (4 without a branch), backward 12 with a gate (8 without a branch or gate). The
gradients of shift, scale and gate, sums over an image's tokens, come from the same pass: each program adds up some tokens.
"""

import operator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD, BACKWARD = (8, 1024), (32, 256)
"""Of a kernel: how many tokens a program gets at most, and elements of a token for each warp."""
PROGRAMS = 512
"""About so many programs there are at least, by fewer tokens for each."""
STAGES, SHARED = 3, 96 * 1024
"""A program of backward loads two tokens ahead, or as many as fit into the bytes that its threads share on any GPU with bf16."""


class AddNorm(torch.autograd.Function):
    """``adaln.AdaNorm``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        branch = None if branch is None else branch.contiguous()
        total = x.view_as(x) if branch is None else torch.empty_like(x)
        out, stats = torch.empty_like(x), torch.empty(*x.shape[:2], 2, dtype=torch.float32, device=x.device)
        _launch_forward(x, branch, gate, shift, scale, total, out, stats, eps)
        ctx.save_for_backward(x if branch is None else total, stats, branch if gate is not None else None, gate, scale)
        ctx.branched = branch is not None
        return total, out

    @staticmethod
    def backward(ctx: Any, total_grad: Tensor, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        total, stats, branch, gate, scale = ctx.saved_tensors
        x_grad = torch.empty_like(total)
        branch_grad = None if gate is None else torch.empty_like(total)
        sums = _launch_backward(total_grad, out_grad, total, stats, branch, gate, scale, x_grad, branch_grad)
        shift_grad, scale_grad, gate_grad = sums
        if ctx.branched and branch_grad is None:
            branch_grad = x_grad
        return x_grad, branch_grad, gate_grad, shift_grad, scale_grad, None


class AddGated(torch.autograd.Function):
    """``adaln.add_gated``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        x, branch = x.contiguous(), branch.contiguous()
        total = torch.empty_like(x)
        _launch_forward(x, branch, gate, None, None, total, None, None, 0.0)
        ctx.save_for_backward(branch, gate)
        return total

    @staticmethod
    def backward(ctx: Any, total_grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, gate = ctx.saved_tensors
        branch_grad = torch.empty_like(branch)
        *_, gate_grad = _launch_backward(total_grad, None, None, None, branch, gate, None, None, branch_grad)
        return total_grad, branch_grad, gate_grad


def _launch_forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    total: Tensor,
    out: Tensor | None,
    stats: Tensor | None,
    eps: float,
) -> None:
    images, tokens, width = _sizes(x)
    vectors = [(x, 0) if vector is None else (vector, vector.stride(0)) for vector in (gate, shift, scale)]
    (gate_, gate_step), (shift_, shift_step), (scale_, scale_step) = vectors
    block, rows = triton.next_power_of_2(width), _rows(images, tokens, FORWARD[0], 1)
    if x.numel():
        _add_norm[images, triton.cdiv(tokens, rows)](
            x, x if branch is None else branch, gate_, shift_, scale_, total, x if out is None else out, x if stats is None else stats,
            tokens, rows, gate_step, shift_step, scale_step, eps, width,
            branch is not None, gate is not None, out is not None, scale is not None, block, num_warps=_warps(block, FORWARD[1]),
        )  # fmt: skip


def _launch_backward(
    total_grad: Tensor,
    out_grad: Tensor | None,
    total: Tensor | None,
    stats: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    x_grad: Tensor | None,
    branch_grad: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Fills in ``x_grad`` and ``branch_grad``. Returns the gradients of shift, scale and gate."""
    total_grad = total_grad.contiguous()
    images, tokens, width = _sizes(total_grad)
    rows = _rows(images, tokens, BACKWARD[0], 4)
    chunks, block = triton.cdiv(tokens, rows), triton.next_power_of_2(width)
    kinds = [scale is not None, scale is not None, gate is not None]
    parts = torch.empty(sum(kinds), images, chunks, width, dtype=torch.float32, device=total_grad.device)
    given = [total_grad if tensor is None else tensor.contiguous() for tensor in (out_grad, total, stats, branch)]
    vectors = [(total_grad, 0) if vector is None else (vector, vector.stride(0)) for vector in (gate, scale)]
    (gate_, gate_step), (scale_, scale_step) = vectors
    stages = min(STAGES, 1 + SHARED // (4 * block * total_grad.element_size()))
    results = [total_grad if tensor is None else tensor for tensor in (x_grad, branch_grad)]
    if total_grad.numel():
        _add_norm_backward[(images, chunks)](
            total_grad, *given, gate_, scale_, *results, parts, tokens, rows, gate_step, scale_step, width,
            gate is not None, out_grad is not None, scale is not None, stages, block, num_warps=_warps(block, BACKWARD[1]),
        )  # fmt: skip
    sums = iter(parts.sum(2, keepdim=True).to(total_grad.dtype).unbind(0))
    shift_grad, scale_grad, gate_grad = (next(sums) if there else None for there in kinds)
    return shift_grad, scale_grad, gate_grad


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Of x (B, N, D). D is a number, since it decides how many warps there are; of a second model's width torch.compile makes a symbol."""
    images, tokens, width = x.shape
    return images, tokens, operator.index(width)


def _rows(images: int, tokens: int, most: int, least: int) -> int:
    """How many tokens of an image a program gets. Without a branch, for each side of which torch.compile would have a graph."""
    return min(max(images * tokens // PROGRAMS, least), most)


def _warps(block: int, each: int) -> int:
    return min(max(block // each, 1), 16)


@triton.jit
def _both(a, b, more_a, more_b):
    return a + more_a, b + more_b


@triton.jit
def _add_norm(
    x, branch, gate, shift, scale, total, out, stats, tokens, rows, gate_step, shift_step, scale_step, eps: tl.constexpr,
    WIDTH: tl.constexpr, BRANCH: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, MODULATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``rows`` tokens of an image."""
    image, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < WIDTH
    if GATE:
        gates = tl.load(gate + image * gate_step + columns, inside, 0.0).to(tl.float32)
    if MODULATED:
        scales = 1 + tl.load(scale + image * scale_step + columns, inside, 0.0).to(tl.float32)
        shifts = tl.load(shift + image * shift_step + columns, inside, 0.0).to(tl.float32)
    first = tl.program_id(1) * rows
    for token in range(first, min(first + rows, tokens)):
        row = image * tokens + token
        at = row * WIDTH + columns
        value = tl.load(x + at, inside, 0.0).to(tl.float32)
        if BRANCH:
            more = tl.load(branch + at, inside, 0.0).to(tl.float32)
            if GATE:
                more *= gates
            rounded = (value + more).to(total.dtype.element_ty)
            tl.store(total + at, rounded, inside)
            value = rounded.to(tl.float32)
        if NORM:
            mean = tl.sum(value) / WIDTH
            off = tl.where(inside, value - mean, 0.0)
            rate = 1 / tl.sqrt(tl.sum(off * off) / WIDTH + eps)
            tl.store(stats + 2 * row, mean)
            tl.store(stats + 2 * row + 1, rate)
            normed = off * rate
            if MODULATED:
                normed = normed * scales + shifts
            tl.store(out + at, normed, inside)


@triton.jit
def _add_norm_backward(
    total_grad, out_grad, total, stats, branch, gate, scale, x_grad, branch_grad, parts, tokens, rows, gate_step, scale_step,
    WIDTH: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, MODULATED: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``rows`` tokens of an image."""
    image, chunk, columns = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    inside, nothing = columns < WIDTH, tl.zeros([BLOCK], tl.float32)
    shift_sum, scale_sum, gate_sum = nothing, nothing, nothing
    if GATE:
        gates = tl.load(gate + image * gate_step + columns, inside, 0.0).to(tl.float32)
    if MODULATED:
        scales = 1 + tl.load(scale + image * scale_step + columns, inside, 0.0).to(tl.float32)
    first = chunk * rows
    for token in tl.range(first, min(first + rows, tokens), num_stages=STAGES):
        row = image * tokens + token
        at = row * WIDTH + columns
        grad = tl.load(total_grad + at, inside, 0.0).to(tl.float32)
        if NORM:
            upward, value = tl.load(out_grad + at, inside, 0.0).to(tl.float32), tl.load(total + at, inside, 0.0).to(tl.float32)
            rate = tl.load(stats + 2 * row + 1)
            normed = (value - tl.load(stats + 2 * row)) * rate
            if MODULATED:
                shift_sum += upward
                scale_sum += upward * normed
                upward *= scales
            upward_sum, along = tl.reduce((upward, upward * normed), 0, _both)
            grad += (upward - upward_sum / WIDTH - normed * (along / WIDTH)) * rate
            tl.store(x_grad + at, grad, inside)
        if GATE:
            gate_sum += grad * tl.load(branch + at, inside, 0.0).to(tl.float32)
            tl.store(branch_grad + at, grad * gates, inside)
    chunks = tl.num_programs(1)
    part = parts + (image * chunks + chunk) * WIDTH + columns
    step = tl.num_programs(0).to(tl.int64) * chunks * WIDTH
    if MODULATED:
        tl.store(part, shift_sum, inside)
        tl.store(part + step, scale_sum, inside)
        part += 2 * step
    if GATE:
        tl.store(part, gate_sum, inside)
