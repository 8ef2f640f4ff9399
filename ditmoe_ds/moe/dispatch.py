"""Moving tokens to the ranks that hold their experts, and back. Variable splits: nothing is padded or dropped."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ditmoe_ds.clock import clock
from ditmoe_ds.moe.routing import Assignment


class Exchange(NamedTuple):
    """Who sends how many rows to whom in one layer's forward."""

    send: list[int]
    """Rows for each rank of the group."""
    receive: list[int]
    """Rows from each rank of the group."""
    order: Tensor
    """(R,) received rows, which arrive by (source rank, local expert), sorted by local expert;"""
    back: Tensor
    """(R,) and back."""
    counts: Tensor
    """(E_local,) rows of each local expert."""


def plan(assignment: Assignment, group: dist.ProcessGroup) -> Exchange:
    """Derive the splits from the takings per expert: exchange them, the layer's only device-to-host sync. Equal ones are known."""
    counts, ranks = assignment.counts, dist.get_world_size(group)
    if assignment.equal:
        rows = torch.arange(len(assignment.tokens), device=counts.device)
        split = [len(rows) // ranks] * ranks
        arrived = rows.view(ranks, len(counts) // ranks, -1)  # (source rank, local expert, places)
        order, back = (rows.transpose(0, 1).reshape(-1) for rows in (arrived, arrived.view(len(counts) // ranks, ranks, -1)))
        return Exchange(split, split, order, back, counts[: len(counts) // ranks] * ranks)
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts, group=group)
    send, receive = torch.stack([counts.view(ranks, -1).sum(1), arriving.view(ranks, -1).sum(1)]).tolist()
    local = torch.arange(len(counts) // ranks, device=counts.device).repeat(ranks)
    order = local.repeat_interleave(arriving, output_size=sum(receive)).argsort(stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return Exchange(send, receive, order, back, arriving.view(ranks, -1).sum(0))


class Permute(torch.autograd.Function):
    """Rows in the given order, whose inverse is ``back``: one gather each way, without the zeros and sums of an index's backward."""

    @staticmethod
    def forward(ctx, rows, order, back):
        ctx.save_for_backward(back)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None


class InFlight:
    """Rows on their way. ``wait`` returns them; what runs before it overlaps with the transfer."""

    def __init__(self, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup):
        self.sent = rows.contiguous()  # the transfer reads it until wait
        self.work: list[dist.Work] = []
        self.received = _AllToAll.apply(self.sent, send, receive, group, self.work)

    def wait(self) -> Tensor:
        with clock("all_to_all"):  # what of it the shared path did not hide
            self.work.pop().wait()
        del self.sent
        return self.received


class _AllToAll(torch.autograd.Function):
    """Forward starts the transfer and hands its work to the caller; backward is the reverse exchange."""

    @staticmethod
    def forward(ctx, rows, send, receive, group, work):
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out = rows.new_empty(sum(receive), rows.shape[1])
        work.append(dist.all_to_all_single(out, rows, receive, send, group=group, async_op=True))
        return out

    @staticmethod
    def backward(ctx, grad):
        out = grad.new_empty(sum(ctx.send), grad.shape[1])
        with clock("all_to_all"):
            dist.all_to_all_single(out, grad.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return out, None, None, None, None
