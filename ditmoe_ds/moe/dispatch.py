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
    """(R,) index that sorts the received rows, which arrive by (source rank, local expert), by local expert."""
    back: Tensor
    """(R,) the inverse of ``order``."""
    counts: Tensor
    """(E_local,) rows of each local expert."""


Asked = tuple[Tensor, dist.Work] | None
"""How many rows each local expert will receive from each rank, on its way; None if all counts are equal."""


def ask(assignment: Assignment, group: dist.ProcessGroup) -> Asked:
    """Start telling the other ranks how many rows each of their experts will receive, for ``plan``."""
    if assignment.equal:
        return None
    arriving = torch.empty_like(assignment.counts)
    return arriving, dist.all_to_all_single(arriving, assignment.counts, group=group, async_op=True)


def plan(assignment: Assignment, asked: Asked, group: dist.ProcessGroup) -> Exchange:
    """Work out who sends how much to whom. ``asked`` is what ``ask`` returned; reading those counts is the layer's only device-to-host
    sync."""
    counts, ranks = assignment.counts, dist.get_world_size(group)
    local = len(counts) // ranks
    if asked is None:
        rows = torch.arange(len(assignment.tokens), device=counts.device)
        split = [len(rows) // ranks] * ranks
        order = rows.view(ranks, local, -1).transpose(0, 1).reshape(-1)
        back = rows.view(local, ranks, -1).transpose(0, 1).reshape(-1)
        return Exchange(split, split, order, back, counts[:local] * ranks)
    arriving, work = asked
    work.wait()
    send, receive = torch.stack([counts.view(ranks, -1).sum(1), arriving.view(ranks, -1).sum(1)]).tolist()
    experts = torch.arange(local, device=counts.device).repeat(ranks)
    order = experts.repeat_interleave(arriving, output_size=sum(receive)).argsort(stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return Exchange(send, receive, order, back, arriving.view(ranks, -1).sum(0))


class Permute(torch.autograd.Function):
    """Rows reordered by ``order``, whose inverse is ``back``. Backward is one gather too, where that of plain indexing adds into zeros."""

    @staticmethod
    def forward(ctx, rows, order, back):
        ctx.save_for_backward(back)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None


class InFlight:
    """Rows on their way to other ranks. ``wait`` returns the received ones; what is computed until then overlaps with the transfer.

    So does its backward: the gradient's transfer begins where ``wait`` was called and is awaited where the rows' transfer began. Autograd
    runs whatever is ready in reverse order of creation, so in between it computes the gradients of what was computed in between.
    """

    def __init__(self, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup):
        self.send, self.receive, self.group = send, receive, group
        self.under_way: tuple[dist.Work, Tensor, Tensor]
        """The transfer; the rows that it sends, which must live until it ends; and the tensor that it fills."""
        self.received = _Begin.apply(rows, self)

    def wait(self) -> Tensor:
        received = _End.apply(self.received, self)
        del self.received
        return received

    def begin(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        rows, out = rows.contiguous(), rows.new_empty(sum(receive), rows.shape[1])
        work = dist.all_to_all_single(out, rows, receive, send, group=self.group, async_op=True)
        self.under_way = work, rows, out
        return out

    def end(self) -> Tensor:
        work, _, out = self.under_way
        with clock("all_to_all"):  # only the time that no computation hides
            work.wait()
        del self.under_way
        return out


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, flight):
        ctx.flight = flight
        return flight.begin(rows, flight.send, flight.receive)

    @staticmethod
    def backward(ctx, unsent):
        return ctx.flight.end(), None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx, received, flight):
        ctx.flight = flight
        flight.end()
        return received.view_as(received)

    @staticmethod
    def backward(ctx, grad):
        ctx.flight.begin(grad, ctx.flight.receive, ctx.flight.send)
        return grad, None  # a placeholder of the right shape: ``_Begin`` returns what arrives
