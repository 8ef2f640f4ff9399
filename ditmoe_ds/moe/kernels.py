"""Triton kernels for what experts do besides GEMMs, called by ``rows.py`` and ``experts.py`` for tensors on a GPU.

Each reads and writes every row once, where a sequence of torch's operators would do so several times. All arithmetic is in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Columns of a row that one program handles."""
SUM_WARPS = 2
"""Of a program of ``_sum_takings``."""


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up of x (M, 2F), rows [gate | up]: (M, F)."""
    out = x.new_empty(x.shape[0], x.shape[1] // 2)
    if len(out):
        _swiglu[_grid(out)](x, out, out.shape[1], BLOCK)
    return out


def swiglu_backward(x: Tensor, grad: Tensor, again: Tensor | None) -> Tensor:
    """The gradient of x, given ``grad``, that of ``swiglu(x)``. If given ``again``, which may be ``grad``, writes ``swiglu(x)`` there."""
    x_grad = torch.empty_like(x)
    if len(x):
        _swiglu_backward[_grid(grad)](x, grad, again, x_grad, grad.shape[1], BLOCK)
    return x_grad


def gelu_backward(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x (M, F), given ``grad``, that of ``gelu(x)`` by tanh, over which ``gelu(x)`` is written."""
    x_grad = torch.empty_like(x)
    if len(x):
        _gelu_backward[_grid(grad)](x, grad, x_grad, grad.shape[1], BLOCK)
    return x_grad


def list_takings(tokens: Tensor, weights: Tensor, number: int, experts: int) -> tuple[Tensor, Tensor]:
    """The rows of each of ``number`` tokens T, by expert: the first entries of (T, E) int32; and (T,) int32, how many these are. Rows whose
    weight is 0 are left out.

    Args:
        tokens: (M,) the token that a row belongs to; each of the ``experts`` has M / E consecutive rows, and no token twice.
    """
    by_expert = tokens.new_full((number, experts), -1, dtype=torch.int32)
    listed, found = torch.empty_like(by_expert), by_expert.new_empty(number)
    _list[(triton.cdiv(len(tokens), BLOCK),)](tokens, weights, by_expert, len(tokens), len(tokens) // experts, experts, BLOCK)
    _pack[(number,)](by_expert, listed, found, experts, triton.next_power_of_2(experts), num_warps=1)
    return listed, found


def sum_takings(rows: Tensor, weights: Tensor | None, listed: Tensor, found: Tensor | None) -> Tensor:
    """For each of T tokens the sum of its rows, weighted or plain, always added in the order listed, so that every run rounds alike.

    Args:
        rows: (M, D).
        weights: (M,) fp32.
        listed: (T, S) int32 row numbers of each token.
        found: (T,) int32, how many of these count; None: all.
    """
    out = rows.new_empty(len(listed), rows.shape[1])
    if len(out):
        _sum_takings[_grid(out)](rows, weights, listed, found, out, out.shape[1], listed.shape[1], BLOCK, num_warps=SUM_WARPS)
    return out


def weigh_backward(grad: Tensor, rows: Tensor, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows (M, D) and weights (M,), given grad (T, D), that of each token's weighted sum of its rows. ``tokens`` (M,) says
    which token a row belongs to."""
    rows_grad, weights_grad = torch.empty_like(rows), torch.empty_like(weights)
    if len(rows):
        width = rows.shape[1]
        _weigh_backward[(len(rows),)](grad, rows, tokens, weights, rows_grad, weights_grad, width, triton.next_power_of_2(width))
    return rows_grad, weights_grad


def clear(matrices: Tensor, ends: Tensor) -> None:
    """Zero those of the matrices (E, N, K) whose experts have no rows; ``ends`` (E,) is where each expert's rows end."""
    experts, size = len(matrices), matrices[0].numel()
    _clear[experts, min(triton.cdiv(size, BLOCK), 128)](matrices, ends, size, BLOCK)


def _grid(rows: Tensor) -> tuple[int, int]:
    return len(rows), triton.cdiv(rows.shape[1], BLOCK)


@triton.jit
def _columns(width, BLOCK: tl.constexpr):
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return columns, columns < width


@triton.jit
def _swiglu(x, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns, inside = _columns(width, BLOCK)
    gate = tl.load(x + row * 2 * width + columns, inside).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + columns, inside).to(tl.float32)
    tl.store(out + row * width + columns, gate * tl.sigmoid(gate) * up, inside)


@triton.jit
def _swiglu_backward(x, grad, again, x_grad, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns, inside = _columns(width, BLOCK)
    gate = tl.load(x + row * 2 * width + columns, inside).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + columns, inside).to(tl.float32)
    upward = tl.load(grad + row * width + columns, inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    gated = gate * sigmoid
    if again is not None:
        tl.store(again + row * width + columns, gated * up, inside)
    tl.store(x_grad + row * 2 * width + columns, upward * up * sigmoid * (1 + gate * (1 - sigmoid)), inside)
    tl.store(x_grad + row * 2 * width + width + columns, upward * gated, inside)


@triton.jit
def _gelu_backward(x, grad, x_grad, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns, inside = _columns(width, BLOCK)
    at = row * width + columns
    value, upward = tl.load(x + at, inside).to(tl.float32), tl.load(grad + at, inside).to(tl.float32)
    square = value * value
    share = tl.sigmoid(1.5957691216057308 * value * (1 + 0.044715 * square))  # (1 + tanh(y)) / 2 is sigmoid(2 y)
    steepness = 1.5957691216057308 * (1 + 0.134145 * square)
    tl.store(grad + at, value * share, inside)
    tl.store(x_grad + at, upward * share * (1 + value * (1 - share) * steepness), inside)


@triton.jit
def _list(tokens, weights, by_expert, rows, each, experts, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    inside &= tl.load(weights + row, inside, other=0.0) != 0
    tl.store(by_expert + tl.load(tokens + row, inside, other=0) * experts + row // each, row, inside)


@triton.jit
def _pack(by_expert, listed, found, experts, BLOCK: tl.constexpr):
    token, expert = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    row = tl.load(by_expert + token * experts + expert, expert < experts, other=-1)
    there = (row >= 0).to(tl.int32)
    tl.store(listed + token * experts + tl.cumsum(there) - 1, row, there > 0)
    tl.store(found + token, tl.sum(there))


@triton.jit
def _sum_takings(rows, weights, listed, found, out, width, slots: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns, inside = _columns(width, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for at in range(slots if found is None else tl.load(found + token)):
        row = tl.load(listed + token * slots + at).to(tl.int64)
        part = tl.load(rows + row * width + columns, inside).to(tl.float32)
        total += part if weights is None else part * tl.load(weights + row)
    tl.store(out + token * width + columns, total, inside)


@triton.jit
def _weigh_backward(grad, rows, tokens, weights, rows_grad, weights_grad, width, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < width
    upward = tl.load(grad + tl.load(tokens + row) * width + columns, inside, other=0.0).to(tl.float32)
    own = tl.load(rows + row * width + columns, inside, other=0.0).to(tl.float32)
    tl.store(rows_grad + row * width + columns, upward * tl.load(weights + row), inside)
    tl.store(weights_grad + row, tl.sum(upward * own))


@triton.jit
def _clear(matrices, ends, size, BLOCK: tl.constexpr):
    expert = tl.program_id(0).to(tl.int64)
    if tl.load(ends + expert) == tl.load(ends + expert - 1, expert > 0, other=0):
        for start in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(matrices + expert * size + at, 0.0, at < size)
