"""LayerNorm of each head of q or k as one Triton kernel forward and one backward, on tensors on a GPU, computed in fp32.

It reads q where it lies, among k and v, and moves 4 bytes for an element forward and 6 backward in bf16. Backward computes the statistics
again.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

EACH, PROGRAMS = 4, 1024
"""A program of forward gets so many tokens. Backward has so many programs at most, each of which leaves a sum for the gradients of weight
and bias."""


class HeadNorm(torch.autograd.Function):
    """``F.layer_norm`` over the last dimension of x (B, N, heads, d), whose elements lie side by side there; the output is contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out, rows = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape[0] * x.shape[1]
        x = _laid(x)
        if x.numel():
            _head_norm[(triton.cdiv(rows, EACH),)](x, weight, bias, out, rows, x.shape[1], *_steps(x), eps, EACH, *_sizes(x), num_warps=4)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad = _laid(grad)
        x_grad, rows = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape[0] * x.shape[1]
        each = max(triton.cdiv(rows, PROGRAMS), 1)
        programs = triton.cdiv(rows, each)
        parts = torch.empty(programs, 2, x.shape[3], dtype=torch.float32, device=x.device)
        if x.numel():
            _head_norm_backward[(programs,)](
                x, grad, weight, x_grad, parts, rows, each, x.shape[1], *_steps(x), *_steps(grad), ctx.eps, *_sizes(x), num_warps=8
            )  # fmt: skip
        weight_grad, bias_grad = parts.sum(0).to(weight.dtype).unbind()
        return x_grad, weight_grad, bias_grad, None


def _unit(x: Tensor) -> int:
    """The largest power of two that divides a head's width. Kernels are given strides in this unit, from which Triton's compiler sees that
    it may read so many elements at once; of 72 it would see nothing."""
    return x.shape[3] & -x.shape[3]


def _laid(x: Tensor) -> Tensor:
    """x, copied if need be, with a head's elements side by side, and other strides that are multiples of the unit."""
    return x if x.stride(3) == 1 and all(stride % _unit(x) == 0 for stride in x.stride()[:3]) else x.contiguous()


def _steps(x: Tensor) -> tuple[int, ...]:
    """Strides of images, tokens and heads in units."""
    return tuple(stride // _unit(x) for stride in x.stride()[:3])


def _sizes(x: Tensor) -> tuple[int, ...]:
    """The unit, heads and their width, and both rounded up to powers of two."""
    heads, width = x.shape[2:]
    return _unit(x), heads, width, triton.next_power_of_2(heads), triton.next_power_of_2(width)


@triton.jit
def _at(row, tokens, image_step, token_step, head_step, heads, columns, UNIT: tl.constexpr):
    """Where a token's heads lie."""
    return (row // tokens * image_step + row % tokens * token_step) * UNIT + heads * (head_step * UNIT) + columns


@triton.jit
def _normed(value, inside, eps: tl.constexpr, WIDTH: tl.constexpr):
    """The heads of one token without their means, divided by their standard deviations; and the divisors' inverses."""
    off = tl.where(inside, value - tl.sum(value, 1, keep_dims=True) / WIDTH, 0.0)
    rate = 1 / tl.sqrt(tl.sum(off * off, 1, keep_dims=True) / WIDTH + eps)
    return off * rate, rate


@triton.jit
def _head_norm(
    x, weight, bias, out, rows, tokens, image_step, token_step, head_step, eps: tl.constexpr, EACH: tl.constexpr,
    UNIT: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, HEADS_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
):  # fmt: skip
    """``EACH`` tokens."""
    program, heads, columns = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS_BLOCK)[:, None], tl.arange(0, WIDTH_BLOCK)[None]
    inside = (heads < HEADS) & (columns < WIDTH)
    factor = tl.load(weight + columns, columns < WIDTH, 0.0).to(tl.float32)
    shift = tl.load(bias + columns, columns < WIDTH, 0.0).to(tl.float32)
    for row in range(program * EACH, min((program + 1) * EACH, rows)):
        at = _at(row, tokens, image_step, token_step, head_step, heads, columns, UNIT)
        normed, _ = _normed(tl.load(x + at, inside, 0.0).to(tl.float32), inside, eps, WIDTH)
        tl.store(out + row * HEADS * WIDTH + heads * WIDTH + columns, normed * factor + shift, inside)


@triton.jit
def _head_norm_backward(
    x, grad, weight, x_grad, parts, rows, each, tokens, image_step, token_step, head_step, grad_image_step, grad_token_step, grad_head_step,
    eps: tl.constexpr, UNIT: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, HEADS_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
):  # fmt: skip
    """``each`` tokens."""
    program, heads, columns = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS_BLOCK)[:, None], tl.arange(0, WIDTH_BLOCK)[None]
    inside = (heads < HEADS) & (columns < WIDTH)
    factor = tl.load(weight + columns, columns < WIDTH, 0.0).to(tl.float32)
    weight_sum, bias_sum = tl.zeros([HEADS_BLOCK, WIDTH_BLOCK], tl.float32), tl.zeros([HEADS_BLOCK, WIDTH_BLOCK], tl.float32)
    for row in range(program * each, min((program + 1) * each, rows)):
        at = _at(row, tokens, image_step, token_step, head_step, heads, columns, UNIT)
        grad_at = _at(row, tokens, grad_image_step, grad_token_step, grad_head_step, heads, columns, UNIT)
        upward = tl.load(grad + grad_at, inside, 0.0).to(tl.float32)
        normed, rate = _normed(tl.load(x + at, inside, 0.0).to(tl.float32), inside, eps, WIDTH)
        weight_sum += upward * normed
        bias_sum += upward
        upward *= factor
        along = tl.sum(upward * normed, 1, keep_dims=True) / WIDTH
        found = (upward - tl.sum(upward, 1, keep_dims=True) / WIDTH - normed * along) * rate
        tl.store(x_grad + row * HEADS * WIDTH + heads * WIDTH + columns, found, inside)
    at = parts + 2 * program * WIDTH + tl.arange(0, WIDTH_BLOCK)
    tl.store(at, tl.sum(weight_sum, 0), tl.arange(0, WIDTH_BLOCK) < WIDTH)
    tl.store(at + WIDTH, tl.sum(bias_sum, 0), tl.arange(0, WIDTH_BLOCK) < WIDTH)
