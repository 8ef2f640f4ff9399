"""LayerNorm of each head of q or k as one Triton kernel forward and one backward, on tensors on a GPU, computed in fp32.

It reads q where it lies, among k and v, and moves 4 bytes for an element forward and 6 backward in bf16. Backward computes the statistics
again.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 2048
"""About how many programs share the tokens in backward, each of which leaves a sum for the gradients of weight and bias."""


class HeadNorm(torch.autograd.Function):
    """``F.layer_norm`` over the last dimension of x (B, N, heads, d), whose elements lie side by side there; the output is contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if x.numel():
            _head_norm[(x.shape[0] * x.shape[1],)](x, weight, bias, out, *_layout(x), eps, *_sizes(x), num_warps=4)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        if grad.stride(-1) != 1:
            grad = grad.contiguous()
        x_grad, rows = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape[0] * x.shape[1]
        each = max(triton.cdiv(rows, PROGRAMS), 1)
        programs = triton.cdiv(rows, each)
        parts = torch.empty(programs, 2, x.shape[3], dtype=torch.float32, device=x.device)
        if x.numel():
            _head_norm_backward[(programs,)](
                x, grad, weight, x_grad, parts, rows, each, *_layout(x), *grad.stride()[:3], ctx.eps, *_sizes(x), num_warps=4
            )
        weight_grad, bias_grad = parts.sum(0).to(weight.dtype).unbind()
        return x_grad, weight_grad, bias_grad, None


def _layout(x: Tensor) -> tuple[int, ...]:
    """Tokens of an image, and strides of images, tokens and heads."""
    return (x.shape[1], *x.stride()[:3])


def _sizes(x: Tensor) -> tuple[int, ...]:
    """Heads and their width, and both rounded up to powers of two."""
    heads, width = x.shape[2:]
    return heads, width, triton.next_power_of_2(heads), triton.next_power_of_2(width)


@triton.jit
def _normed(x, row, tokens, image_step, token_step, head_step, heads, columns, inside, eps, WIDTH: tl.constexpr):
    """The heads of one token without their means, divided by their standard deviations; and the divisors' inverses."""
    first = x + row // tokens * image_step + row % tokens * token_step
    value = tl.load(first + heads * head_step + columns, inside, 0.0).to(tl.float32)
    off = tl.where(inside, value - tl.sum(value, 1, keep_dims=True) / WIDTH, 0.0)
    rate = 1 / tl.sqrt(tl.sum(off * off, 1, keep_dims=True) / WIDTH + eps)
    return off * rate, rate


@triton.jit
def _head_norm(
    x, weight, bias, out, tokens, image_step, token_step, head_step, eps, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
):  # fmt: skip
    """One token."""
    row, heads, columns = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS_BLOCK)[:, None], tl.arange(0, WIDTH_BLOCK)[None]
    inside = (heads < HEADS) & (columns < WIDTH)
    normed, _ = _normed(x, row, tokens, image_step, token_step, head_step, heads, columns, inside, eps, WIDTH)
    factor = tl.load(weight + columns, columns < WIDTH, 0.0).to(tl.float32)
    shift = tl.load(bias + columns, columns < WIDTH, 0.0).to(tl.float32)
    tl.store(out + row * HEADS * WIDTH + heads * WIDTH + columns, normed * factor + shift, inside)


@triton.jit
def _head_norm_backward(
    x, grad, weight, x_grad, parts, rows, each, tokens, image_step, token_step, head_step, grad_image_step, grad_token_step, grad_head_step,
    eps, HEADS: tl.constexpr, WIDTH: tl.constexpr, HEADS_BLOCK: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
):  # fmt: skip
    """``each`` tokens."""
    program, heads, columns = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS_BLOCK)[:, None], tl.arange(0, WIDTH_BLOCK)[None]
    inside = (heads < HEADS) & (columns < WIDTH)
    factor = tl.load(weight + columns, columns < WIDTH, 0.0).to(tl.float32)
    weight_sum, bias_sum = tl.zeros([HEADS_BLOCK, WIDTH_BLOCK], tl.float32), tl.zeros([HEADS_BLOCK, WIDTH_BLOCK], tl.float32)
    for row in range(program * each, min((program + 1) * each, rows)):
        normed, rate = _normed(x, row, tokens, image_step, token_step, head_step, heads, columns, inside, eps, WIDTH)
        first = grad + row // tokens * grad_image_step + row % tokens * grad_token_step
        upward = tl.load(first + heads * grad_head_step + columns, inside, 0.0).to(tl.float32)
        weight_sum += upward * normed
        bias_sum += upward
        upward *= factor
        along = tl.sum(upward * normed, 1, keep_dims=True) / WIDTH
        found = (upward - tl.sum(upward, 1, keep_dims=True) / WIDTH - normed * along) * rate
        tl.store(x_grad + row * HEADS * WIDTH + heads * WIDTH + columns, found, inside)
    at = parts + 2 * program * WIDTH + tl.arange(0, WIDTH_BLOCK)
    tl.store(at, tl.sum(weight_sum, 0), tl.arange(0, WIDTH_BLOCK) < WIDTH)
    tl.store(at + WIDTH, tl.sum(bias_sum, 0), tl.arange(0, WIDTH_BLOCK) < WIDTH)
