"""What a rank sends in one optimizer step, by kind and by link.

DeepSpeed 0.19 as ``distributed.engine`` sets it up: gradients travel in the weights' dtype; at stages 1 and 2 by all-reduce, though
each rank keeps a part of the sum, and updated weights are gathered after the step; at stage 3 gradients are reduce-scattered and
weights gathered, for forward and again for backward. A ring of g ranks sends (g - 1) / g of a tensor from each of them to gather it
or to reduce and scatter it, twice that to all-reduce it. Averages of the weights travel nowhere.

Under tensor parallelism, consecutive ranks all-reduce what each computed of the tokens from its part of a layer; all else travels among
those with the same place in their groups, each with its part.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ditmoe_ds.models.dit import Recompute
from ditmoe_ds.planning.activations import MicroBatch


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step, the mean over ranks."""

    kind: str
    phase: str
    """What it runs beside: "forward", "backward", "last backward" of the step; or "alone": the rank waits for it."""
    in_node: float
    across: float
    """To ranks of other nodes."""


def step_traffic(
    batch: MicroBatch, accumulation: int, recompute: Recompute, stage: int, world: int, per_node: int, weights: dict[str, float]
) -> list[Traffic]:
    """The traffic of all micro-batches of a step and of the optimizer.

    Args:
        weights: numbers of elements, before ZeRO and EP divide them, on a rank of a tensor-parallel group: ``dense``, ``experts``, and
            ``whole``, the part of ``dense`` that ZeRO-3 never shards.
    """
    ep, tensor, size, found = batch.ep, batch.tensor, batch.size, []
    apart = ep * tensor
    rings = [
        ("dense", weights["dense"], range(0, world, tensor), range(tensor)),
        ("experts", weights["experts"] / ep, range(0, world, apart), range(apart)),
    ]
    for kind, elements, ranks, shifts in rings:
        flows: list[tuple[str, str, float]]  # what, beside what, and how many times a rank sends its share of it
        if stage == 3:
            kept = weights["whole"] / weights["dense"] if kind == "dense" else 0
            layers = accumulation * (1 - kept)
            flows = [
                ("reduce gradients", "backward", accumulation),
                ("gather weights", "forward", layers),
                ("gather weights", "backward", layers * max(1 - 2 / batch.model.depth, 0)),  # the last two are still whole from forward
                ("gather weights", "alone", kept),
            ]
        else:
            phase = "alone" if stage == 0 else "last backward" if stage == 1 else "backward"
            flows = [
                ("reduce gradients", phase, 2 * (accumulation if stage == 2 else 1)),
                ("gather weights", "alone", min(stage, 1)),
            ]
        cross = crossing(ranks, shifts, per_node)
        once = size * elements * (1 - 1 / len(ranks))  # bytes that a rank sends to gather these weights once
        for what, phase, times in flows:
            if amount := once * times:
                found.append(Traffic(f"{what}, {kind}", phase, amount * (1 - cross), amount * cross))
    if ep > 1:
        ways = 6 if recompute is True else 4  # to the experts and back: in forward, in backward, and in what is recomputed
        rows = sum(map(batch.rows, batch.model.routed_layers))
        sent: float = ways * accumulation * size * batch.model.hidden * rows
        near, far = exchange_shares(world, ep, per_node, tensor)
        found.append(Traffic("exchange tokens", "alone", sent * near, sent * far))
    if tensor > 1:
        cross = crossing(range(tensor), range(0, world, tensor), per_node)
        sent = 2 * (1 - 1 / tensor) * accumulation * summed(batch, recompute)
        found.append(Traffic("sum tokens", "alone", sent * (1 - cross), sent * cross))
    return found


def summed(batch: MicroBatch, recompute: Recompute) -> float:
    """Bytes that the ranks of a tensor-parallel group all-reduce in a micro-batch, as ``distributed.tensor_parallel`` cuts the layers.

    Attention to the patches, attention to the text and the feed-forward each sum their outputs in forward and their inputs' gradients in
    backward. Where attention alone is recomputed, all its sums are, since the norm after it is, too.
    """
    model, D, text = batch.model, batch.model.hidden, bool(batch.text)
    forward = 2 + text
    again = forward if recompute is True else forward - 1 if recompute else 0
    layer = (2 * forward + again) * batch.tokens * D
    layer += batch.images * batch.text * D  # the gradient of the text, from which its k and v are computed
    layer += model.qk_norm * (1 + text) * 4 * (D // model.heads)  # gradients of the weights and biases of q's and k's norms
    takings = sum(map(batch.rows, model.routed_layers))
    return batch.size * model.depth * layer + 4 * takings  # the gradient of each taking's weight is fp32


@lru_cache
def crossing(ranks: Sequence[int], shifts: Sequence[int], per_node: int) -> float:
    """Share of the hops of rings over ``ranks``, each time shifted by one of ``shifts``, that leave a node."""
    if len(ranks) == 1:
        return 0.0
    hops = leaving = 0
    for shift in shifts:
        nodes = [(rank + shift) // per_node for rank in ranks]
        hops += len(nodes)
        leaving += sum(here != there for here, there in zip(nodes, [*nodes[1:], nodes[0]], strict=True))
    return leaving / hops


@lru_cache
def exchange_shares(world: int, ep: int, per_node: int, tensor: int = 1) -> tuple[float, float]:
    """Shares of a rank's rows that go to other ranks of its node, and to other nodes. Expert-parallel groups are of ``ep`` evenly loaded
    ranks, ``tensor`` ranks apart."""
    same, apart = 0, ep * tensor
    for first in range(0, world, apart):
        for place in range(first, first + tensor):
            nodes = Counter(rank // per_node for rank in range(place, place + apart, tensor))
            same += sum(members**2 for members in nodes.values())
    inside = same / (world // ep) / ep**2
    return inside - 1 / ep, 1 - inside
