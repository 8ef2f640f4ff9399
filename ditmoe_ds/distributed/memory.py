"""What training costs a rank in memory, from the size of the model and how it is spread."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

EXPERT_GROUP = 178_956_971
"""DeepSpeed steps the local experts in groups of at most this many elements, and the dense weights in one."""
TRAVELLING = 500_000_000
"""Gradients that DeepSpeed all-reduces at once at stage 0, in elements; a tensor may exceed it."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. Activations, and at stage 3 the layers gathered at the moment, come on top."""

    weights: float
    """What forward reads (at stage 3 the rank's part)."""
    master: float
    """fp32 weights that the optimizer steps; none at stage 0 in fp32, where ``weights`` are these."""
    moments: float
    averages: float
    gradients: float
    """Buffers that DeepSpeed never frees (stage 3)."""
    backward: float
    """Additional bytes during the last backward before a step."""
    step: float
    """Additional bytes while the optimizer steps."""

    @property
    def kept(self) -> float:
        """What is held between steps."""
        return self.weights + self.master + self.moments + self.averages + self.gradients

    @property
    def peak(self) -> float:
        return self.kept + max(self.backward, self.step)


@lru_cache
def touched(tensors: Sequence[int], ranks: int, group: float = math.inf) -> tuple[int, ...]:
    """Elements of the gradients that each of ``ranks`` keeps at stages 1 and 2. DeepSpeed cuts groups of tensors into a part for each rank,
    and a rank keeps whole every tensor of which its part has elements: in groups with fewer tensors than ranks, one or two, not a part.

    Args:
        tensors: their sizes, in the order of the model.
        group: DeepSpeed's largest group, in elements.
    """
    groups: list[list[int]] = [[]]
    for size in tensors:
        if sum(groups[-1]) + size > group:
            groups.append([])
        groups[-1].append(size)
    kept = [0] * ranks
    for sizes in groups:
        part, start = -(-sum(sizes) // ranks), 0
        for size in sizes:
            for rank in range(start // part, (start + size - 1) // part + 1):
                kept[rank] += size
            start += size
    return tuple(kept)


def training_memory(
    dense: float,
    experts: float,
    stage: int,
    ep: int,
    world: int,
    precision: Literal["bf16", "fp32"] = "bf16",
    averages: int = 1,
    accumulation: int = 1,
    bucket: float = 0,
    whole: float | None = None,
    one_kernel: bool = False,
) -> Memory:
    """Memory of training on DeepSpeed 0.19 with AdamW, as ``distributed.engine`` sets it up. ``benchmarks/memory.md`` measures it.

    Args:
        dense: parameters that every rank needs, in elements; with tensor parallelism, a rank's part of them.
        experts: parameters of all routed experts, in elements; with tensor parallelism, a rank's part of each.
        stage: of ZeRO, 0 to 3.
        ep: expert-parallel size.
        world: processes; with tensor parallelism, those with the same place in their groups.
        averages: exponential moving averages kept.
        accumulation: micro-batches of a step.
        bucket: DeepSpeed's ``reduce_bucket_size``, in elements.
        whole: the most that is ``touched``, in elements; None for tensors that are small beside a part.
        one_kernel: the optimizer's step at stage 0 is one kernel's (``distributed.adamw``), which makes no copies.
    """
    size, wide = (2, 4) if precision == "bf16" else (4, 0)  # bytes of a weight, and of its fp32 copy
    local = dense + experts / ep
    part = (dense + experts) / world
    parts, replicas = (1, 1) if stage == 0 else (world, world / ep)
    group = max(dense / parts, min(experts / ep, EXPERT_GROUP) / replicas)  # the largest that is stepped at once
    if stage == 0:  # gradients travel as copies: dense ones, then experts'
        copied = min(max(dense * (world > 1), experts / ep * (world > ep)), TRAVELLING)
        backward, step = size * (local + copied), size * local + wide * group * (not one_kernel)
        return Memory(size * local, wide * local, 8 * local, 4 * averages * local, 0, backward, step)
    step = (size + wide) * group  # its gradient, flattened and then in fp32
    if stage == 3:
        kept = size * (part + bucket)
        return Memory(size * part, 4 * part, 8 * part, 4 * averages * part, kept, size * bucket, step)
    # between micro-batches stage 1 keeps all gradients, stage 2 the rank's own; the last micro-batch adds the rank's own
    own = part if whole is None else whole
    earlier = 0 if accumulation == 1 else local if stage == 1 else own
    backward = size * (earlier + own + 3 * bucket)
    return Memory(size * local, 4 * part, 8 * part, 4 * averages * part, 0, backward, size * own + step)
