"""Dropless token choice on a GPU: what ``routing.token_choice`` returns, by three Triton kernels and a few sums of small tensors.

Tokens are handled in blocks. One kernel chooses and counts how often each block took each expert; from these counts follows where a block's
takings of an expert begin among all takings; a second kernel puts them there. The third is backward. All recompute the softmax, in fp32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ditmoe_ds.moe.routing import Assignment, RouterConfig, in_turn, record, recorded


def choose(logits: Tensor, k: int, config: RouterConfig) -> tuple[Assignment, Tensor]:
    """Each token takes its k best experts.

    Args:
        logits: (T, E) fp32.

    Returns:
        The assignment, with ``listed``; among an expert's takings tokens ascend. And (E,) the mean softmax scores, with gradient.
    """
    given = in_turn(logits, k).int() if config.force_balance else recorded()
    weights, means, tokens, counts, listed, chosen = TokenChoice.apply(logits, k, config.renormalise, config.route_scale, given)
    record(chosen)
    return Assignment(tokens, weights, counts, listed=listed), means


class TokenChoice(torch.autograd.Function):
    """``choose``, by the experts (T, k) ``given`` or else by the best."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, k: int, renormalise: bool, scale: float, given: Tensor | None) -> tuple[Tensor, ...]:
        number, experts = logits.shape
        ctx.width = max(triton.next_power_of_2(experts), 2)
        ctx.block = max(1024 // ctx.width, 16)
        blocks = triton.cdiv(number, ctx.block)
        chosen = logits.new_empty(number, k, dtype=torch.int32) if given is None else given
        taken, sums = chosen.new_empty(experts, blocks), logits.new_empty(blocks, experts)
        _choose[(blocks,)](logits, chosen, taken, sums, number, experts, blocks, given is not None, k, ctx.width, ctx.block)
        ends = taken.view(-1).cumsum(0, dtype=torch.int32)
        tokens, weights = logits.new_empty(k * number, dtype=torch.int64), logits.new_empty(k * number)
        listed = torch.empty_like(chosen)
        _place[(blocks,)](
            logits, chosen, taken, ends, tokens, weights, listed, number, experts, blocks, scale, renormalise, k, ctx.width, ctx.block
        )
        ctx.save_for_backward(logits, chosen, listed)
        ctx.scale, ctx.renormalise = scale, renormalise
        return weights, sums.sum(0) / number, tokens, taken.sum(1), listed, chosen

    @staticmethod
    def backward(ctx: Any, weights_grad: Tensor, means_grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        logits, chosen, listed = ctx.saved_tensors
        (number, experts), k, logits_grad = logits.shape, chosen.shape[1], torch.empty_like(logits)
        gradients = weights_grad.contiguous(), means_grad.contiguous()
        _choose_backward[(triton.cdiv(number, ctx.block),)](
            logits, chosen, listed, *gradients, logits_grad, number, experts, ctx.scale, ctx.renormalise, k, ctx.width, ctx.block
        )
        return logits_grad, None, None, None, None


@triton.jit
def _choose(
    logits, chosen, taken, sums, number, experts, blocks, given: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    token, inside, expert, raw, scores = _scores(logits, number, experts, WIDTH, BLOCK)
    # not a number counts as 0, and what is least is finite, so that the K are distinct and none is beyond the experts
    key = tl.where(expert < experts, tl.maximum(tl.where(raw == raw, raw, 0.0), -3.0e38), -float("inf"))
    mine = tl.zeros([BLOCK, WIDTH], tl.int32)
    for place in tl.static_range(K):
        if given:
            best = tl.load(chosen + token * K + place)
        else:
            best = tl.argmax(key, 1)
            tl.store(chosen + token * K + place, best, inside)
        here = expert == best[:, None]
        key = tl.where(here, -float("inf"), key)
        mine += (here & inside[:, None]).to(tl.int32)
    columns, block = tl.arange(0, WIDTH), tl.program_id(0)
    tl.store(taken + columns * blocks + block, tl.sum(mine, 0), columns < experts)
    tl.store(sums + block * experts + columns, tl.sum(tl.where(inside[:, None], scores, 0.0), 0), columns < experts)


@triton.jit
def _place(
    logits, chosen, taken, ends, tokens, weights, listed, number, experts, blocks, scale: tl.constexpr,
    renormalise: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, inside, expert, _, scores = _scores(logits, number, experts, WIDTH, BLOCK)
    columns = tl.arange(0, WIDTH)
    at = columns * blocks + tl.program_id(0)
    begin = tl.load(ends + at, columns < experts, other=0) - tl.load(taken + at, columns < experts, other=0)
    mine, total = tl.zeros([BLOCK, WIDTH], tl.int32), tl.zeros([BLOCK], tl.float32)
    for place in tl.static_range(K):
        here = expert == tl.load(chosen + token * K + place)[:, None]
        mine += (here & inside[:, None]).to(tl.int32)
        total += _picked(scores, here)
    rows = begin[None, :] + tl.cumsum(mine, 0) - mine
    for place in tl.static_range(K):
        here = expert == tl.load(chosen + token * K + place)[:, None]
        row, weight = _picked(rows, here), _picked(scores, here) * scale
        tl.store(tokens + row, token.to(tl.int64), inside)
        tl.store(weights + row, weight / total if renormalise else weight, inside)
        tl.store(listed + token * K + place, row, inside)


@triton.jit
def _choose_backward(
    logits, chosen, listed, weights_grad, means_grad, logits_grad, number, experts, scale: tl.constexpr,
    renormalise: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, inside, expert, _, scores = _scores(logits, number, experts, WIDTH, BLOCK)
    columns = tl.arange(0, WIDTH)
    upward = tl.zeros([BLOCK, WIDTH], tl.float32) + (tl.load(means_grad + columns, columns < experts, other=0.0) / number)[None, :]
    total, against = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if renormalise:
        for place in tl.static_range(K):
            here = expert == tl.load(chosen + token * K + place)[:, None]
            score = _picked(scores, here)
            total += score
            against += score * tl.load(weights_grad + tl.load(listed + token * K + place))
    for place in tl.static_range(K):
        here = expert == tl.load(chosen + token * K + place)[:, None]
        own = tl.load(weights_grad + tl.load(listed + token * K + place)) * scale
        if renormalise:
            own = (own - against * scale / total) / total
        upward += tl.where(here, own[:, None], 0.0)
    grad = scores * (upward - tl.sum(scores * upward, 1)[:, None])
    tl.store(logits_grad + token[:, None] * experts + expert, grad, inside[:, None] & (expert < experts))


@triton.jit
def _scores(logits, number, experts, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The block's tokens, the last one repeated where there are no more, and which count; experts (1, WIDTH); their logits and softmax."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < number
    token, expert = tl.minimum(token, number - 1), tl.arange(0, WIDTH)[None, :]
    raw = tl.load(logits + token[:, None] * experts + expert, expert < experts, other=-float("inf"))
    powers = tl.exp(raw - tl.max(raw, 1)[:, None])
    return token, inside, expert, raw, powers / tl.sum(powers, 1)[:, None]


@triton.jit
def _picked(values, here):
    """Of each row the value that is ``here``."""
    return tl.sum(tl.where(here, values, 0), 1)
