"""What replaces parts of DeepSpeed's ZeRO-3 does what they did."""

import json
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.comm import coalesced_collectives as theirs
from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus
from processes import ROOT, launch

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


def weights(rank, group="all"):
    """As this rank holds them, and as they are ``whole``; what fills up the last part is not a number."""
    generator, found = torch.Generator().manual_seed(0), []
    for number, size in enumerate(SIZES):
        whole, part = torch.randn(size, generator=generator), -(-torch.Size(size).numel() // WORLD)
        held = torch.cat([whole.view(-1), torch.full((part * WORLD - whole.numel(),), torch.nan)]).view(WORLD, part)[rank].clone()
        held.ds_numel = part
        status = dict(ds_id=number, ds_status=ZeroParamStatus.NOT_AVAILABLE, ds_process_group=group)
        found.append(SimpleNamespace(ds_tensor=held, ds_numel=whole.numel(), ds_shape=whole.shape, whole=whole, **status))
    return found


def test_weights_are_gathered_alike(monkeypatch):
    handed, waiting = [], []

    def gather(out, held, group, async_op):
        handed.append(held.clone())
        return SimpleNamespace(wait=lambda: out.copy_(torch.cat(handed)))

    monkeypatch.setattr(zero3.dist, "all_gather_into_tensor", gather)
    for rank in range(WORLD):
        on_rank(monkeypatch, rank)
        parameters = weights(rank)
        waiting.append((parameters, zero3.OnTheirWay(parameters, "all")))
    theirs_too = [SimpleNamespace(**vars(parameter) | dict(ds_status=ZeroParamStatus.INFLIGHT)) for parameter in weights(0)]
    AllGatherCoalescedHandle(SimpleNamespace(wait=lambda: None), theirs_too, handed, WORLD).wait()
    for parameters, on_their_way in [*waiting, (theirs_too, None)]:
        for _ in range(2 if on_their_way else 0):  # each of the parameters has it waited for
            on_their_way.wait()
        for parameter in parameters:
            assert torch.equal(parameter.data, parameter.whole) and parameter.ds_status == ZeroParamStatus.AVAILABLE


def test_what_a_rank_holds_alone_is_there(monkeypatch):
    monkeypatch.setattr(zero3.dist, "get_world_size", lambda group=None: 1)
    parameters = [SimpleNamespace(ds_tensor=torch.randn(6), ds_numel=6, ds_shape=(2, 3)) for _ in range(2)]
    zero3.OnTheirWay(parameters, "alone").wait()
    for parameter in parameters:
        assert parameter.data.shape == (2, 3) and parameter.data.data_ptr() == parameter.ds_tensor.data_ptr()


def test_ranks_gather_in_one_order(monkeypatch):
    """Groups in the order of their first weight, and of a group by one collective what is not there, in the order of the weights."""
    seen, begun = [], SimpleNamespace(**{zero3.STREAM: None, zero3.WHOLE: 0})
    monkeypatch.setattr(zero3, "OnTheirWay", lambda parameters, group: seen.append((group, [p.ds_id for p in parameters])))
    for order in ((3, 0, 2, 1, 4), (4, 1, 3, 2, 0)):
        parameters = weights(0)
        parameters[1].ds_status = ZeroParamStatus.AVAILABLE
        for number in (2, 4):
            parameters[number].ds_process_group = "experts"
        registry = {}
        setattr(begun, zero3.IN_FLIGHT, Registry(registry))
        zero3.gather(begun, [parameters[number] for number in order], True)
        assert sorted(registry) == [0, 2, 3, 4]
    assert seen == [("all", [0, 3]), ("experts", [2, 4])] * 2
    assert getattr(begun, zero3.WHOLE) == 2 * (1 + 20 + 11 + 3)


class Registry:
    """By number, since a namespace is no key."""

    def __init__(self, by_number):
        self.by_number = by_number

    def __setitem__(self, parameter, on_their_way):
        assert parameter.ds_status == ZeroParamStatus.INFLIGHT
        self.by_number[parameter.ds_id] = on_their_way


def test_weights_that_stay_whole_are_gathered_at_once(monkeypatch):
    calls, everyone = [], torch.stack([torch.cat([parameter.ds_tensor for parameter in weights(rank)]) for rank in range(WORLD)])

    def gather(out, held, group, async_op):
        calls.append(group)
        assert torch.equal(held.nan_to_num(7.0), everyone[2].nan_to_num(7.0))
        return SimpleNamespace(wait=lambda: out.copy_(everyone.view(-1)))

    on_rank(monkeypatch, 2)
    monkeypatch.setattr(zero3.dist, "all_gather_into_tensor", gather)
    parameters = weights(2)
    zero3.gather_together(SimpleNamespace(get_partition_dp_group=lambda parameter: parameter.ds_process_group), parameters)
    assert calls == ["all"] and all(torch.equal(parameter.data, parameter.whole) for parameter in parameters)


@pytest.mark.parametrize("routing, recompute", [("token", "false"), ("expert", "true"), ("token", '"attention"')])
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_weights_are_gathered_a_layer_ahead(routing, recompute, compiled):
    """And let go of after it, also by what a compiler keeps for backward; the compiler sees nothing of ZeRO-3."""
    ended = launch(1, [ROOT / "tests" / "zero3_worker.py", routing, recompute, f"train.compile={compiled}"])
    found = json.loads(ended[0][1].splitlines()[-1])
    for step in found["steps"][1:]:
        assert 2 <= step["forward"] == step["between"] < 2.2, "of the last two layers, with which backward begins"
        assert 1 <= step["backward"] < 1.2 and step["after"] < 0.01
        assert step["awaited"] < 0.1, "of the final layer, after two that stay"
        assert len(step["ahead"]) == 10 and all(0.9 < size < 1.1 for size in step["ahead"])
    assert found["breaks"] == 0 or (routing, compiled) == ("token", "true"), "whose experts' numbers of rows the host asks for on a CPU"
    assert (found["graphs"] > 0) == (compiled == "true")
    assert found["asked"] == 0, "a module asked for another one's weight by name, which DeepSpeed then gathers for it, too"
