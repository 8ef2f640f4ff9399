"""AdamW for bf16 weights with fp32 masters, as one Triton kernel for all of them, on a GPU.

It reads and writes what a step needs once, 28 bytes a parameter. torch's operators, which make the gradients fp32, clip them, step, and
copy the masters, move 48.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 8
"""Elements that one program steps, and its warps."""


def blocks_of(tensors: list[Tensor]) -> Tensor:
    """(programs, 2) int32: for each program its tensor's number, and its block's number within that tensor."""
    counts = [triton.cdiv(tensor.numel(), BLOCK) for tensor in tensors]
    each = torch.tensor(counts, device=tensors[0].device)
    owner = torch.arange(len(counts), device=each.device).repeat_interleave(each, output_size=sum(counts))
    first = each.cumsum(0) - each
    return torch.stack([owner, torch.arange(len(owner), device=each.device) - first[owner]], 1).int()


class AtOnce:
    """The step of ``torch.optim.AdamW`` for bf16 ``weights`` with fp32 ``masters``, which are stepped and rounded into the weights.

    Args:
        adam: of the masters, all of whose groups have the same settings; it has made a step, so that its state is there.
    """

    def __init__(self, adam: torch.optim.Optimizer, masters: list[Tensor], weights: list[Tensor]):
        self.adam, self.masters, self.weights, self.blocks = adam, masters, weights, blocks_of(masters)

    def prepare(self) -> None:
        """What the host does before the kernel: to be called while the device is busy. The weights have their gradients."""
        own = [self.adam.state[master] for master in self.masters]
        means, squares = ([state[key] for state in own] for key in ("exp_avg", "exp_avg_sq"))
        gradients = [_at_16_bytes(weight.grad) for weight in self.weights]  # type: ignore[arg-type] # all have one
        self.copies = [gradient for gradient, weight in zip(gradients, self.weights) if gradient is not weight.grad]
        places = zip(gradients, self.masters, means, squares, self.weights, strict=True)
        rows = [[*(tensor.data_ptr() for tensor in place), place[0].numel()] for place in places]
        # anew in every step, since gradients have other addresses; from page-locked memory, so that nothing waits
        self.table = torch.tensor(rows, pin_memory=self.blocks.is_cuda).to(self.blocks.device, non_blocking=True)

    def step(self, clip: float) -> None:
        """Step by the gradients that were there at ``prepare``, times ``clip``."""
        settings, steps = self.adam.param_groups[0], [self.adam.state[master]["step"] for master in self.masters]
        lr, betas, number = settings["lr"], settings["betas"], int(steps[0]) + 1
        keep, rate, root = 1 - lr * settings["weight_decay"], lr / (1 - betas[0] ** number), (1 - betas[1] ** number) ** -0.5
        grid = (len(self.blocks),)
        _adamw[grid](self.blocks, self.table, clip, keep, 1 - betas[0], 1 - betas[1], rate, root, settings["eps"], BLOCK, num_warps=WARPS)
        torch._foreach_add_(steps, 1)


def _at_16_bytes(gradient: Tensor) -> Tensor:
    lies_well = gradient.is_contiguous() and gradient.data_ptr() % 16 == 0
    return gradient if lies_well else gradient.clone(memory_format=torch.contiguous_format)


@triton.jit
def _adamw(blocks, table, clip, keep, new_mean, new_square, rate, root, eps, BLOCK: tl.constexpr):
    row = table + tl.load(blocks + 2 * tl.program_id(0)).to(tl.int64) * 6
    start = tl.load(blocks + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    at, size = start + tl.arange(0, BLOCK), tl.load(row + 5)
    if start + BLOCK <= size:  # without a mask, four elements at a time
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
