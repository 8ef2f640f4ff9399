"""The ranks share the work of an evaluation; without a process group there is one rank."""

import torch.distributed as dist
from torch import Tensor


def share(count: int, block: int = 1) -> tuple[int, int]:
    """This rank's part [first, last) of ``count`` items, in whole blocks, so that blocks are the same at any world size."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    blocks = -(-count // block)
    return min(blocks * rank // world * block, count), min(blocks * (rank + 1) // world * block, count)


def total(tensor: Tensor) -> Tensor:
    """Sum over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
