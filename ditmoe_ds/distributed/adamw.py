"""AdamW for bf16 weights with fp32 masters, and the weights' averages, as one Triton kernel for all of them, on a GPU.

It reads and writes what a step needs once, 28 bytes a parameter and 8 for each average. torch's operators, which make the gradients fp32,
clip them, step, copy the masters, and move the averages, take 48 and 12.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ditmoe_ds.distributed.norm import elements, to_device

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
        self.steps: int | None = None
        self.averages: list[list[Tensor]] = []
        self.shares: Callable[[], list[float]] = list

    def also_average(self, masters: list[Tensor], averages: list[list[Tensor]], shares: Callable[[], list[float]]) -> None:
        """From here on every step also moves averages of the masters towards them.

        Args:
            masters: ours, in the order of each of the ``averages``, which are fp32.
            shares: asked before a step how far it moves each of them, in [0, 1]; empty if it leaves them alone.
        """
        place = {master.data_ptr(): number for number, master in enumerate(masters)}
        self.averages = [[average[place[master.data_ptr()]] for master in self.masters] for average in averages]
        self.shares = shares

    def prepare(self) -> None:
        """What the host does before the kernel: to be called while the device is busy. The weights have their gradients."""
        own = [self.adam.state[master] for master in self.masters]
        means, squares = ([state[key] for state in own] for key in ("exp_avg", "exp_avg_sq"))
        gradients = [_at_16_bytes(weight.grad) for weight in self.weights]  # type: ignore[arg-type] # all have one
        self.copies = [gradient for gradient, weight in zip(gradients, self.weights) if gradient is not weight.grad]
        places = zip(gradients, self.masters, means, squares, self.weights, *self.averages, strict=True)
        rows = [[place[0].numel(), *(tensor.data_ptr() for tensor in place)] for place in places]
        self.table = to_device(rows, self.blocks.device)  # anew in every step, since gradients have other addresses
        self.moved = to_device(self.shares(), self.blocks.device)

    def step(self, clip: float) -> None:
        """Step by the gradients that were there at ``prepare``, times ``clip``."""
        settings, steps = self.adam.param_groups[0], [self.adam.state[master]["step"] for master in self.masters]
        if self.steps is None:
            self.steps = int(steps[0])  # waits for the device
        self.steps += 1
        lr, betas = settings["lr"], settings["betas"]
        keep, rate, root = 1 - lr * settings["weight_decay"], lr / (1 - betas[0] ** self.steps), (1 - betas[1] ** self.steps) ** -0.5
        numbers = clip, keep, 1 - betas[0], 1 - betas[1], rate, root, settings["eps"]
        sizes = self.table.shape[1], len(self.moved), BLOCK
        _adamw[len(self.blocks),](self.blocks, self.table, self.moved, *numbers, *sizes, num_warps=WARPS)
        torch._foreach_add_(steps, 1)


def _at_16_bytes(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it that is contiguous and lies where kernels can read four elements at a time."""
    lies_well = tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
    return tensor if lies_well else tensor.clone(memory_format=torch.contiguous_format)


@triton.jit
def _adamw(
    blocks, table, moved, clip, keep, new_mean, new_square, rate, root, eps, COLUMNS: tl.constexpr, MOVED: tl.constexpr, BLOCK: tl.constexpr
):
    row = table + tl.load(blocks + 2 * tl.program_id(0)).to(tl.int64) * COLUMNS
    start = tl.load(blocks + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    at, size = start + tl.arange(0, BLOCK), tl.load(row)
    if start + BLOCK <= size:  # without a mask, four elements at a time
        _step(row + 1, at, None, moved, clip, keep, new_mean, new_square, rate, root, eps, MOVED)
    else:
        _step(row + 1, at, at < size, moved, clip, keep, new_mean, new_square, rate, root, eps, MOVED)


@triton.jit
def _step(row, at, inside, moved, clip, keep, new_mean, new_square, rate, root, eps, MOVED: tl.constexpr):
    masters, means, squares = elements(row + 1, at, tl.float32), elements(row + 2, at, tl.float32), elements(row + 3, at, tl.float32)
    gradient = tl.load(elements(row, at, tl.bfloat16), inside).to(tl.float32) * clip
    mean, square = tl.load(means, inside), tl.load(squares, inside)
    mean += (gradient - mean) * new_mean
    square += (gradient * gradient - square) * new_square
    master = tl.load(masters, inside) * keep - rate * mean / (tl.sqrt(square) * root + eps)
    tl.store(means, mean, inside)
    tl.store(squares, square, inside)
    tl.store(masters, master, inside)
    tl.store(elements(row + 4, at, tl.bfloat16), master.to(tl.bfloat16), inside)
    for i in tl.static_range(MOVED):
        averages = elements(row + 5 + i, at, tl.float32)
        average = tl.load(averages, inside)
        tl.store(averages, average + (master - average) * tl.load(moved + i), inside)
