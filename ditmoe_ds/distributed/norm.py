"""The sum of squares of many tensors, as one Triton kernel on a GPU. torch's operator launches one for every 21 million elements, between
which a GPU waits for its host."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS, BLOCK, WARPS = 2**15, 2048, 4
"""About how many programs there are, the elements that one reads at a time, and its warps."""


def square_sum(tensors: list[Tensor]) -> Tensor:
    """() float64, of tensors of one dtype."""
    lying = [tensor.contiguous() for tensor in tensors]
    well, badly = ([tensor for tensor in lying if (tensor.data_ptr() % 16 == 0) is at_16] for at_16 in (True, False))
    return torch.stack([_parts(those, alignment).double().sum() for those, alignment in ((well, 16), (badly, 1)) if those]).sum()


def _parts(tensors: list[Tensor], alignment: int) -> Tensor:
    """Partial sums of the squares of contiguous tensors, some for each."""
    table = to_device([[tensor.data_ptr(), tensor.numel()] for tensor in tensors], tensors[0].device)
    parts = torch.empty(len(tensors), max(1, PROGRAMS // len(tensors)), device=table.device)
    _square_sums[parts.shape[::-1]](tensors[0], table, parts, alignment, BLOCK, num_warps=WARPS)
    return parts


def to_device(values: list[Any], device: torch.device) -> Tensor:
    """``torch.tensor(values)``, copied from page-locked memory, so that nothing waits."""
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@triton.jit
def elements(address, at, kind: tl.constexpr, alignment: tl.constexpr = 16):
    """Pointers to the elements ``at`` of the tensor whose address, a multiple of ``alignment``, is stored at ``address``."""
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(kind)), alignment) + at


@triton.jit
def _square_sums(like, table, parts, ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr):
    """Program (i, t) of (n, T) adds up blocks i, i + n, i + 2n, ... of tensor t, whose dtype is that of ``like``."""
    row, first, step = table + 2 * tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    size, found = tl.load(row + 1), tl.zeros([BLOCK], tl.float32)
    whole = size // BLOCK
    for block in range(first.to(tl.int64), whole, step):  # without a mask, eight elements at a time
        value = tl.load(elements(row, block * BLOCK + tl.arange(0, BLOCK), like.dtype.element_ty, ALIGNMENT)).to(tl.float32)
        found += value * value
    if first == 0:
        at = whole * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(elements(row, at, like.dtype.element_ty, ALIGNMENT), at < size, 0.0).to(tl.float32)
        found += value * value
    tl.store(parts + tl.program_id(1) * step + first, tl.sum(found))
