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
    lying_well = [at_16_bytes(tensor) for tensor in tensors]
    table = to_device([[tensor.data_ptr(), tensor.numel()] for tensor in lying_well], tensors[0].device)
    parts = torch.empty(len(tensors), max(1, PROGRAMS // len(tensors)), device=table.device)
    _square_sums[parts.shape[::-1]](lying_well[0], table, parts, BLOCK, num_warps=WARPS)
    return parts.double().sum()


def at_16_bytes(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it that is contiguous and lies where kernels can read four elements at a time."""
    lies_well = tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
    return tensor if lies_well else tensor.clone(memory_format=torch.contiguous_format)


def to_device(values: list[Any], device: torch.device) -> Tensor:
    """``torch.tensor(values)``, copied from page-locked memory, so that nothing waits."""
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@triton.jit
def elements(address, at, kind: tl.constexpr):
    """Pointers to the elements ``at`` of the tensor whose address is stored at ``address``."""
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(kind)), 16) + at


@triton.jit
def _square_sums(like, table, parts, BLOCK: tl.constexpr):
    """Program (i, t) of (n, T) adds up blocks i, i + n, i + 2n, ... of tensor t, whose dtype is that of ``like``."""
    row, first, step = table + 2 * tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    size, found = tl.load(row + 1), tl.zeros([BLOCK], tl.float32)
    whole = size // BLOCK
    for block in range(first.to(tl.int64), whole, step):  # without a mask, eight elements at a time
        value = tl.load(elements(row, block * BLOCK + tl.arange(0, BLOCK), like.dtype.element_ty)).to(tl.float32)
        found += value * value
    if first == 0:
        at = whole * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(elements(row, at, like.dtype.element_ty), at < size, 0.0).to(tl.float32)
        found += value * value
    tl.store(parts + tl.program_id(1) * step + first, tl.sum(found))
