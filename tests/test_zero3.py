"""What replaces parts of DeepSpeed's ZeRO-3 does what they did."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.comm import coalesced_collectives as theirs
from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus
from torch import nn

from ditmoe_ds.distributed import zero3

WORLD = 5
SIZES = [(1,), (7, 3), (5, 4), (11,), (3,)]


def on_rank(monkeypatch, rank):
    """The reduction doubles what this rank hands in."""
    for module in (zero3, theirs):
        monkeypatch.setattr(module.dist, "get_world_size", lambda group=None: WORLD)
        monkeypatch.setattr(module.dist, "get_rank", lambda group=None: rank)
        monkeypatch.setattr(module, "_torch_reduce_scatter_fn", lambda given, out, group=None: out.mul_(2))


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("sizes", [SIZES, [(5, 4)], [(7, 3)]])
def test_gradients_are_scattered_alike(monkeypatch, rank, sizes):
    on_rank(monkeypatch, rank)
    tensors = [torch.randn(size) for size in sizes]
    wanted = theirs.reduce_scatter_coalesced([tensor.clone() for tensor in tensors])
    found = zero3.reduce_scatter(tensors)
    assert len(found) == len(wanted)
    assert all(torch.equal(ours, other) for ours, other in zip(found, wanted))


def gathered():
    """A handle of weights whose parts lie, rank by rank, in one buffer."""
    generator = torch.Generator().manual_seed(0)
    params, rows = [], [[] for _ in range(WORLD)]
    for size in SIZES:
        whole, part = torch.randn(size, generator=generator), -(-torch.Size(size).numel() // WORLD)
        padded = torch.cat([whole.view(-1), torch.full((part * WORLD - whole.numel(),), torch.nan)]).view(WORLD, part)
        for row, piece in zip(rows, padded):
            row.append(piece)
        held = SimpleNamespace(ds_numel=part, dtype=torch.float32)
        params.append(
            SimpleNamespace(ds_status=ZeroParamStatus.INFLIGHT, ds_tensor=held, ds_numel=whole.numel(), ds_shape=whole.shape, whole=whole)
        )
    flat = torch.cat([torch.cat(row) for row in rows])
    each = len(flat) // WORLD
    parts = [flat.narrow(0, each * rank, each) for rank in range(WORLD)]
    return AllGatherCoalescedHandle(SimpleNamespace(wait=lambda: None), params, parts, WORLD)


def test_weights_are_gathered_alike():
    for wait in (zero3._wait, zero3.wait):
        handle = gathered()
        wait(handle)
        assert handle.complete
        for parameter in handle.params:
            assert torch.equal(parameter.data, parameter.whole) and parameter.ds_status == ZeroParamStatus.AVAILABLE


def test_weights_that_stay_whole_are_gathered_at_once(monkeypatch):
    handle = gathered()
    everyone, calls = torch.stack(handle.partitions), []

    def gather(out, held, group):
        calls.append(group)
        assert torch.equal(held, everyone[2].nan_to_num(7.0))
        out.copy_(everyone.view(-1))

    monkeypatch.setattr(zero3.dist, "get_world_size", lambda group=None: WORLD)
    monkeypatch.setattr(zero3.dist, "all_gather_into_tensor", gather)
    for parameter, part in zip(handle.params, everyone[2].split([p.ds_tensor.ds_numel for p in handle.params])):
        parameter.ds_tensor = part.nan_to_num(7.0)
        parameter.ds_tensor.ds_numel = len(part)
    init = SimpleNamespace(get_partition_dp_group=lambda parameter: "group")
    zero3.gather_together(init, handle.params)
    assert calls == ["group"] and all(torch.equal(parameter.data, parameter.whole) for parameter in handle.params)


def test_ranks_gather_in_one_order(monkeypatch):
    seen = []
    monkeypatch.setattr(zero3, "_gather", lambda coordinator, parameters, forward: seen.append([p.ds_id for p in parameters]))
    for order in ((3, 1, 2), (2, 3, 1)):
        zero3.gather_in_order(None, [SimpleNamespace(ds_id=number) for number in order], True)
    assert seen == [[1, 2, 3]] * 2


def test_hooks_are_not_compiled():
    network, seen = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), []
    for module in network:
        module.register_forward_pre_hook(lambda module, args: seen.append(torch.compiler.is_compiling()))
        module.register_forward_hook(lambda module, args, out: seen.append(torch.compiler.is_compiling()))
    zero3.keep_from_compilers(network)
    network.compile(backend="eager")
    network(torch.ones(2))
    assert seen == [False] * 4
