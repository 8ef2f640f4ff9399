"""Memory of the host that a GPU copies from and to: page-locked, and no more of it than was asked for.

torch's own allocator of such memory rounds every tensor up to a power of two bytes.
"""

import weakref
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap

import torch
from torch import Tensor


def empty_on_host(shape: torch.Size, dtype: torch.dtype, locked: bool) -> Tensor:
    """Uninitialised memory of the host, page-locked if ``locked`` until it is freed."""
    if not locked:
        return torch.empty(shape, dtype=dtype, device="cpu")
    size = shape.numel() * dtype.itemsize
    # Pages of its own: no page can be locked twice. A tensor counts as locked if its storage begins in locked memory.
    memory = torch.frombuffer(mmap(-1, (size // PAGESIZE + 1) * PAGESIZE, MAP_PRIVATE | MAP_ANONYMOUS), dtype=torch.uint8)
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 1))  # 1: for all GPUs
    weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, memory.data_ptr()).atexit = False
    return memory[:size].view(dtype).view(shape)
