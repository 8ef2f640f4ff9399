"""AdamW for bf16 weights with fp32 masters, as one Triton kernel for all of them, on a GPU.

It reads and writes what a step needs once, 28 bytes a parameter. torch's operators, which make the gradients fp32, clip them, step, and
copy the masters, move 48.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Elements that one program steps."""


def blocks_of(tensors: list[Tensor]) -> Tensor:
    """(programs, 2) int32: for each program its tensor's number, and its block's number within that tensor."""
    counts = [triton.cdiv(tensor.numel(), BLOCK) for tensor in tensors]
    each = torch.tensor(counts, device=tensors[0].device)
    owner = torch.arange(len(counts), device=each.device).repeat_interleave(each, output_size=sum(counts))
    first = each.cumsum(0) - each
    return torch.stack([owner, torch.arange(len(owner), device=each.device) - first[owner]], 1).int()


def adamw(
    gradients: list[Tensor],
    masters: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    weights: list[Tensor],
    blocks: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip: float,
) -> None:
    """Step ``masters`` by ``gradients * clip`` as ``torch.optim.AdamW`` does, and round them into ``weights``.

    Args:
        gradients, weights: bf16; the others are fp32, all contiguous.
        means, squares: moving averages of the gradient and of its square.
        blocks: ``blocks_of(masters)``.
        step: the number of this step, from 1.
    """
    gradients = [g if g.is_contiguous() and g.data_ptr() % 16 == 0 else g.clone(memory_format=torch.contiguous_format) for g in gradients]
    places = zip(gradients, masters, means, squares, weights, strict=True)
    rows = [[*(tensor.data_ptr() for tensor in place), place[0].numel()] for place in places]
    # anew in every step, since gradients have other addresses; from page-locked memory, so that nothing waits
    table = torch.tensor(rows, pin_memory=blocks.is_cuda).to(blocks.device, non_blocking=True)
    rate, root = lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** -0.5
    _adamw[(len(blocks),)](blocks, table, clip, 1 - lr * weight_decay, 1 - betas[0], 1 - betas[1], rate, root, eps, BLOCK, num_warps=8)


@triton.jit
def _adamw(blocks, table, clip, keep, new_mean, new_square, rate, root, eps, BLOCK: tl.constexpr):
    row = table + tl.load(blocks + 2 * tl.program_id(0)).to(tl.int64) * 6
    start = tl.load(blocks + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    at, size = start + tl.arange(0, BLOCK), tl.load(row + 5)
    if start + BLOCK <= size:  # without a mask, 16 bytes at a time
        _step(row, at, None, clip, keep, new_mean, new_square, rate, root, eps)
    else:
        _step(row, at, at < size, clip, keep, new_mean, new_square, rate, root, eps)


@triton.jit
def _step(row, at, inside, clip, keep, new_mean, new_square, rate, root, eps):
    masters, means, squares = _at(row + 1, at, tl.float32), _at(row + 2, at, tl.float32), _at(row + 3, at, tl.float32)
    gradient = tl.load(_at(row, at, tl.bfloat16), inside).to(tl.float32) * clip
    mean, square = tl.load(means, inside), tl.load(squares, inside)
    mean += (gradient - mean) * new_mean
    square += (gradient * gradient - square) * new_square
    master = tl.load(masters, inside) * keep - rate * mean / (tl.sqrt(square) * root + eps)
    tl.store(means, mean, inside)
    tl.store(squares, square, inside)
    tl.store(masters, master, inside)
    tl.store(_at(row + 4, at, tl.bfloat16), master.to(tl.bfloat16), inside)


@triton.jit
def _at(address, at, kind: tl.constexpr):
    """Pointers to the elements ``at`` of the tensor whose address is stored at ``address``."""
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(kind)), 16) + at
