"""Memory of the host that a GPU copies from and to: page-locked, and no more of it than was asked for.

torch's own allocator of such memory rounds every tensor up to a power of two bytes.
"""

import weakref
from mmap import PAGESIZE

import torch
from torch import Tensor


def empty_on_host(shape: torch.Size, dtype: torch.dtype, locked: bool) -> Tensor:
    """Uninitialised memory of the host, page-locked if ``locked`` until it is freed."""
    if not locked:
        return torch.empty(shape, dtype=dtype, device="cpu")
    size = shape.numel() * dtype.itemsize
    pages = size // PAGESIZE + 1
    memory = torch.empty((pages + 1) * PAGESIZE, dtype=torch.uint8, device="cpu")
    own = memory[-memory.data_ptr() % PAGESIZE :]  # from a page on, so that it shares no page with other locked memory
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaHostRegister(own.data_ptr(), pages * PAGESIZE, 1))  # 1: for all GPUs
    weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, own.data_ptr()).atexit = False
    return own[:size].view(dtype).view(shape)
