"""Train on CPUs as if these computed on streams, as GPUs do; look for accesses to memory that no wait puts in order.

python streams_worker.py FOUND.json repaired|as_found|unawaited RECIPE [key=value ...]

DeepSpeed is told that its accelerator has streams. Every operation is put on the stream that is current, a collective that is not awaited
at once on its group's own. A stream's clock says which operations of every stream are over before its next one: waits merge clocks. An
access must find in its clock what the other streams did to that memory, and so must an allocation, which may take memory that was freed.
``as_found`` leaves out what ``ditmoe_ds`` repairs of DeepSpeed, ``unawaited`` what waits at the end of backward. Only main threads are
watched: on CPUs backward runs in them, too.
"""

import inspect
import json
import sys
import traceback
import weakref
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FOUND = set()
"""What is not in order."""
STREAMS, MEMORY = [], {}


class Stream:
    def __init__(self, name=None):
        self.name, self.clock, self.freed = name or f"stream {len(STREAMS)}", {}, []
        STREAMS.append(self)

    def now(self):
        """{stream: operations on it that are over before the next one on this stream}."""
        self._add(HOST.clock)
        return dict(self.clock)

    def next(self):
        self.clock[self] = self.now().get(self, 0) + 1
        return self.clock[self]

    def _add(self, clock):
        for stream, count in clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), count)

    def wait_stream(self, other):
        self._add(other.now())

    def wait_event(self, event):
        self._add(event.clock)

    def synchronize(self):
        HOST._add(self.now())


class Event:
    def record(self, stream=None):
        self.clock = (stream or CURRENT[-1]).now()

    def synchronize(self):
        HOST._add(self.clock)

    def query(self):
        return False


HOST = Stream.__new__(Stream)  # what is over before the host's next order
HOST.clock = {}
CURRENT = [Stream("the default stream")]


@contextmanager
def on(stream):
    CURRENT.append(stream)
    yield
    CURRENT.pop()


class Memory:
    """A storage: where it was allocated, who wrote and read it last, {stream: (number, place)}, and the streams it was lent to."""

    def __init__(self, storage):
        self.stream, self.written, self.read, self.lent = CURRENT[-1], {}, {}, set()
        check(f"memory is used again on {self.stream.name}", self.stream.now(), self.stream.freed)
        self.stream.freed.clear()
        weakref.finalize(storage, self.free, storage._cdata)

    def free(self, key):
        del MEMORY[key]
        self.stream.freed += [use for use in [*self.written.items(), *self.read.items()] if use[0] not in self.lent]

    @classmethod
    def of(cls, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in MEMORY:
            MEMORY[storage._cdata] = cls(storage)
        return MEMORY[storage._cdata]

    def access(self, stream, write):
        number, place = stream.next(), where()
        check(f"{'written' if write else 'read'} on {stream.name} by {place}", stream.now(), self.written.items())
        if write:
            check(f"written on {stream.name} by {place}", stream.now(), self.read.items())
            self.written, self.read = {stream: (number, place)}, {}
        else:
            self.read[stream] = number, place


def check(what, clock, uses):
    for stream, (number, place) in uses:
        if clock.get(stream, 0) < number:
            FOUND.add(f"{what}, perhaps before {place} used it on {stream.name}")


def where():
    frames = [frame for frame in traceback.extract_stack() if "/deepspeed/" in frame.filename or "/ditmoe_ds/" in frame.filename]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[:-5:-1])


class Watch(TorchDispatchMode):
    """Notes every operation that computes."""

    def __torch_dispatch__(self, operation, types, given=(), named=None):
        out, schema = operation(*given, **(named or {})), operation._schema
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        is_view = any(value.alias_info and not value.alias_info.is_write for value in schema.returns)
        if is_view or "empty" in schema.name:
            for tensor in made:
                Memory.of(tensor)
            return out
        values = dict(zip((argument.name for argument in schema.arguments), given)) | (named or {})
        writes = {argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write}
        accesses = [(leaf, name in writes) for name, value in values.items() for leaf in tree_leaves(value)]
        before = {leaf.untyped_storage()._cdata for leaf, _ in accesses if isinstance(leaf, torch.Tensor)}
        accesses += [(tensor, True) for tensor in made if tensor.untyped_storage()._cdata not in before]
        for tensor, write in sorted(((t, w) for t, w in accesses if isinstance(t, torch.Tensor)), key=lambda access: access[1]):
            Memory.of(tensor).access(CURRENT[-1], write)
        return out


class Work:
    """A collective on its way, which keeps its tensors."""

    def __init__(self, clock, tensors):
        self.clock, self.tensors = clock, tensors

    def wait(self):
        CURRENT[-1]._add(self.clock)
        self.tensors = None


def on_a_stream(collective, streams={}):  # noqa: B006
    signature = inspect.signature(collective)

    def call(*given, **named):
        arguments = signature.bind(*given, **named).arguments
        if not arguments.get("async_op"):
            return collective(*given, **named)
        stream = streams.setdefault(arguments.get("group"), Stream(f"communicator {len(streams)}"))
        stream.wait_stream(CURRENT[-1])
        with on(stream):
            collective(*given, **named).wait()
        return Work(stream.now(), arguments)

    return call


for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single"):
    setattr(dist, name, on_a_stream(getattr(dist, name)))

from deepspeed.accelerator import get_accelerator  # noqa: E402 # it keeps the functions that are there now
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator  # noqa: E402

from ditmoe_ds.distributed import engine, zero3  # noqa: E402
from ditmoe_ds.distributed.topology import gathered, join, leave  # noqa: E402
from ditmoe_ds.ending import end  # noqa: E402
from ditmoe_ds.training import trainer  # noqa: E402
from ditmoe_ds.training.plan import read_plan  # noqa: E402


def pretend():
    """From here on DeepSpeed takes the CPU for a device with streams."""
    kind = type(get_accelerator())
    kind.is_synchronized_device = kind.resolves_data_dependency = kind.handles_memory_backpressure = lambda self: False
    kind.Stream, kind.Event = property(lambda self: Stream), property(lambda self: Event)
    kind.stream, kind.current_stream = lambda self, stream: on(stream), lambda self: CURRENT[-1]
    kind.synchronize = lambda self: [stream.synchronize() for stream in STREAMS]
    torch.Tensor.record_stream = lambda tensor, stream: Memory.of(tensor).lent.add(stream)


def main():
    file, how, *recipe = sys.argv[1:]
    world = join()
    pretend()
    if how == "as_found":
        zero3.begin_forward = PartitionedParameterCoordinator._clean_inflight_param_registry
        engine._keep_until_reduced = lambda optimizer: None
    elif how == "unawaited":
        engine._end_backward_without_the_host = lambda optimizer, stage: None
        get_accelerator().synchronize = lambda: None
        Stream.synchronize = lambda stream: None
    run = trainer.Trainer(read_plan(recipe, world.size), world)
    with Watch(), patch.object(trainer, "fetch", lambda *tensors: lambda: list(tensors)):
        run.run()
    everyone = gathered(sorted(FOUND))
    if world.rank == 0:
        Path(file).write_text(json.dumps(everyone))
    leave()
    end(0)


if __name__ == "__main__":
    main()
