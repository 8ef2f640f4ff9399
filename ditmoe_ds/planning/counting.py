"""Counts what this process allocates and sends, with real tensors, or with meta tensors, on which nothing is computed."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ditmoe_ds.distributed.topology import tensor_group
from ditmoe_ds.planning.traffic import crossing

aten = torch.ops.aten

SENDS = {
    "allreduce_": ("reduce", 2),
    "reduce_": ("reduce", 1),
    "reduce_scatter_": ("reduce", 1),
    "_reduce_scatter_base_": ("reduce", 1),
    "allgather_": ("gather", 1),
    "_allgather_base_": ("gather", 1),
    "broadcast_": ("gather", 1),
    "alltoall_base_": ("exchange", 1),
}
"""A process group's operators: what each is for here, and how many times a rank sends all but its part of the tensor, in a ring."""

GATHERED = "ZeRO-3 live layers"


class Count(TorchDispatchMode):
    """Within this context, counts every storage, from the operator that makes it until nobody holds it, and every collective.

    Attributes:
        kind: what storages that are made from now on count as.
        live: bytes by kind.
        peak: the most bytes that were live together since ``start``; ``at_peak`` by kind; ``when``, the ``kind`` of that moment.
        sent: bytes since ``start``, by purpose and link: ("reduce", "in node"), ("exchange", "across"), ("sum", "in node") of tensor
            parallelism, ...
    """

    def __init__(self, per_node: int):
        super().__init__()
        self.per_node, self.kind = per_node, ""
        self.live = Counter[str]()
        self._total = 0
        self._storages: dict[int, tuple[str, int]] = {}
        self.start()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's guard against it takes as long as the rest of a call

    def start(self) -> None:
        """Forget the peak and the traffic so far."""
        self.peak, self.at_peak, self.when = self._total, self.live.copy(), self.kind
        self.sent = defaultdict[tuple[str, str], float](float)

    def become(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Storages of these tensors count as ``kind`` from now on."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._storages:
                before, size = self._storages[key]
                self._storages[key] = kind, size
                self.live[before] -= size
                self.live[kind] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_view(func):  # asked first: most calls, as DeepSpeed cuts tensors into a view for each rank
            return func(*args, **(kwargs or {}))
        out = self.run(func, args, kwargs or {})
        if func.namespace == "c10d":
            self._send(func._opname, args)
        elif allocates(func) and not asks_for_meta(func, args, kwargs or {}):
            for tensor in tensors_in(out):
                self._made(tensor.untyped_storage(), self.kind)
        return out

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the operator."""
        return func(*args, **kwargs)

    def _kind_of(self, tensor: Tensor) -> str:
        return self._storages.get(tensor.untyped_storage()._cdata, ("", 0))[0]

    def _made(self, storage: torch.UntypedStorage, kind: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages or not size:
            return
        self._storages[key] = kind, size
        self.live[kind] += size
        self._total += size
        if self._total > self.peak:
            self.peak, self.at_peak, self.when = self._total, self.live.copy(), self.kind
        weakref.finalize(storage, self._freed, key).atexit = False  # type: ignore[misc]

    def _freed(self, key: int) -> None:
        kind, size = self._storages.pop(key)
        self.live[kind] -= size
        self._total -= size

    def _send(self, name: str, args: Any) -> None:
        if name not in SENDS:
            return
        purpose, rounds = SENDS[name]
        group = dist.ProcessGroup.unbox(next(arg for arg in args if isinstance(arg, torch.ScriptObject)))  # type: ignore[attr-defined]
        ranks, tensor = dist.get_process_group_ranks(group), tensor_group()
        if tensor is not None and group.group_name == tensor.group_name:
            purpose = "sum"
        if purpose == "exchange":
            return self._exchange(args[1], args[4], ranks)
        if name == "_allgather_base_" and self._kind_of(args[0]) != "weights":
            self.become(GATHERED, args[:1])
        whole = max(sum(tensor.nbytes for tensor in tensors_in(arg)) for arg in args[:2])  # output of a gather, input of the others
        amount = rounds * whole * (1 - 1 / len(ranks))
        across = crossing(tuple(ranks), (0,), self.per_node)
        self.sent[purpose, "in node"] += amount * (1 - across)
        self.sent[purpose, "across"] += amount * across

    def _exchange(self, rows: Tensor, splits: list[int], ranks: list[int]) -> None:
        me, row = dist.get_rank(), rows.nbytes / max(len(rows), 1)
        for rank, count in zip(ranks, splits or [len(rows) // len(ranks)] * len(ranks), strict=True):
            if rank != me:
                self.sent["exchange", "in node" if rank // self.per_node == me // self.per_node else "across"] += count * row


class CountOnMeta(Count):
    """As ``Count``, but every tensor is made on meta, whatever device is asked for. Those for which meta is asked are not counted.

    Values that Python reads (``item()``) are False, 0 or 1.0: no overflow, a finite norm. Tensors made of Python's numbers stay real.
    """

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        on_meta = bool(args) and isinstance(args[0], Tensor) and args[0].is_meta
        if on_meta and any(isinstance(argument, Tensor) and not argument.is_meta for argument in args):
            args = tuple(argument.to("meta") if isinstance(argument, Tensor) else argument for argument in args)
        if on_meta and func is aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 0
        if on_meta and func is aten._to_copy.default and kwargs.get("dtype", args[0].dtype) == args[0].dtype and "device" in kwargs:
            return aten.alias(args[0])  # it is there already
        if creates(func) or (on_meta and kwargs.get("device") is not None):
            kwargs = kwargs | dict(device=torch.device("meta"))
        return func(*args, **kwargs)


def asks_for_meta(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the caller asks for a meta tensor. Not so autograd, which names the device when it converts a gradient's dtype."""
    return kwargs.get("device") == torch.device("meta") and not (func is aten._to_copy.default and args[0].is_meta)


@cache
def is_view(func: Any) -> bool:
    """Whether an operator returns one view of its argument, and writes nothing."""
    returned = func._schema.returns
    return len(returned) == 1 and returned[0].alias_info is not None and not returned[0].alias_info.is_write


@cache
def allocates(func: Any) -> bool:
    """Whether an operator returns anything but its arguments and views of them."""
    return any(returned.alias_info is None for returned in func._schema.returns)


@cache
def creates(func: Any) -> bool:
    """Whether an operator makes a tensor from no other."""
    arguments = func._schema.arguments
    return any(argument.name == "device" for argument in arguments) and "Tensor" not in {str(argument.type) for argument in arguments}


def tensors_in(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for part in tree:
            yield from tensors_in(part)
