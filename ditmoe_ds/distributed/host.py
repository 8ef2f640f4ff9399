"""Memory of the host that a GPU copies from and to.

torch's own allocator of page-locked memory rounds every tensor up to a power of two bytes; ours does not.
"""

import weakref
from collections.abc import Callable
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


def fetch(*tensors: Tensor) -> Callable[[], list[Tensor]]:
    """Begin to copy tensors to the host. Returns a function that waits for the copies, though for nothing that the device was asked to do
    after them, and returns them."""
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    if not tensors[0].is_cuda:
        return lambda: copies
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[Tensor]:
        copied.synchronize()
        return copies

    return wait
