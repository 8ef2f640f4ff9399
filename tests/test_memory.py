"""The memory formula by hand; ``benchmarks/memory.md`` holds it against measured runs."""

from itertools import pairwise
from mmap import PAGESIZE
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ditmoe_ds.distributed.engine import Engine
from ditmoe_ds.distributed.host import empty_on_host
from ditmoe_ds.distributed.memory import EXPERT_GROUP, TRAVELLING, touched, training_memory


def test_gradients_that_nobody_shares_stay_where_they_are(alone):
    for ranks, wanted in ((1, [4.0, 8.0]), (4, [1.0, 2.0])):
        bucket = [torch.full((3,), 4.0), torch.full((2, 2), 8.0)]
        places = [gradient.data_ptr() for gradient in bucket]
        Engine.allreduce_no_retain(SimpleNamespace(), bucket, dist.group.WORLD, 500, dp_world_size=ranks)
        assert [gradient.unique().tolist() for gradient in bucket] == [[value] for value in wanted]
        assert [gradient.data_ptr() for gradient in bucket] == places


def test_by_hand():
    # 100 dense weights and 400 of experts on 4 ranks in 2 expert groups: 300 live on a rank, 125 are its part, 100 of them experts
    zero0, zero1, zero2, zero3 = (training_memory(100, 400, stage, ep=2, world=4, accumulation=2) for stage in range(4))
    assert (zero0.weights, zero0.master, zero0.moments, zero0.averages, zero0.gradients) == (600, 1200, 2400, 1200, 0)
    assert zero0.peak == zero0.kept + 2 * 300 + 4 * 200
    assert (zero1.weights, zero1.master, zero1.moments, zero1.averages, zero1.gradients) == (600, 500, 1000, 500, 0)
    assert zero1.kept == zero2.kept
    assert (zero1.backward, zero2.backward) == (2 * (300 + 125), 2 * (125 + 125))
    assert training_memory(100, 400, 1, ep=2, world=4).backward == 2 * 125
    assert zero1.step == zero2.step == 2 * 125 + (2 + 4) * 100
    assert zero3.kept == (2 + 4 + 8 + 4 + 2) * 125
    assert zero3.peak == zero3.kept + (2 + 4) * 100


def test_fp32_weights_are_their_own_master_without_zero():
    zero0, zero3 = (training_memory(100, 400, stage, ep=4, world=4, precision="fp32", averages=2) for stage in (0, 3))
    assert (zero0.weights, zero0.master, zero0.averages) == (4 * 200, 0, 8 * 200)
    assert (zero3.weights, zero3.master, zero3.averages) == (4 * 125, 4 * 125, 8 * 125)


def test_without_zero_gradients_travel_as_copies():
    backward = lambda *spread: training_memory(100, 400, 0, *spread).backward  # noqa: E731, of EP and processes
    assert backward(1, 1) == 2 * 500 and backward(4, 4) == 2 * 200 + 2 * 100 and backward(2, 4) == 2 * 300 + 2 * 200
    assert training_memory(0, 9 * TRAVELLING, 0, 1, 2).backward == 2 * 10 * TRAVELLING


def test_gradients_are_kept_whole_of_which_a_part_is_the_ranks():
    assert touched((4, 4, 4, 4), 4) == (4, 4, 4, 4)  # a tensor each
    assert touched((6, 6), 4) == (6, 6, 6, 6)  # half of one
    assert touched((4, 6, 2), 3) == (4, 6, 8)  # elements 0 to 3, 4 to 7, 8 to 11
    assert touched((5, 5, 1), 2, group=6) == (5 + 5, 5 + 5 + 1)  # of the groups (5,) and (5, 1)
    part, whole = (training_memory(0, 400, 2, ep=1, world=4, whole=own) for own in (None, 300))
    assert whole.backward - part.backward == 2 * (300 - 100) == whole.step - part.step


def test_experts_are_stepped_in_groups():
    assert training_memory(0, 100 * EXPERT_GROUP, stage=3, ep=10, world=20).step == (2 + 4) * EXPERT_GROUP / 2
    assert training_memory(0, 100 * EXPERT_GROUP, stage=0, ep=10, world=20).step == (2 * 10 + 4) * EXPERT_GROUP


def test_buckets():
    without, reducing = (training_memory(0, 0, 2, ep=1, world=1, bucket=b) for b in (0, 10))
    assert reducing.peak - without.peak == 3 * 2 * 10


class Runtime:
    """CUDA's, of a GPU that is not there: what of the host is page-locked."""

    cudaError = SimpleNamespace(success=0)

    def __init__(self):
        self.locked, self.code = {}, 0

    def cudaHostRegister(self, address, size, flags):
        assert address % PAGESIZE == size % PAGESIZE == 0 < size
        self.locked[address] = size
        return self.code

    def cudaHostUnregister(self, address):
        del self.locked[address]


@pytest.fixture
def runtime(monkeypatch):
    found = Runtime()
    monkeypatch.setattr("torch.cuda.cudart", lambda: found)
    monkeypatch.setattr("torch.cuda._cudart", found)
    return found


def test_host_memory_is_locked_as_long_as_it_is_used(runtime):
    shapes = [(0,), (3, 5), (PAGESIZE // 4,), (33, 1000)]
    tensors = [empty_on_host(torch.Size(shape), torch.float32, locked=True).zero_() for shape in shapes]
    assert [tensor.shape for tensor in tensors] == shapes
    ranges = sorted(runtime.locked.items())
    assert all(start + size <= after for (start, size), (after, _) in pairwise(ranges))  # no page is locked twice
    for tensor in tensors:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        assert not tensor.nbytes or (start in runtime.locked and end <= start + runtime.locked[start] <= end + PAGESIZE)
        assert tensor.untyped_storage().data_ptr() in runtime.locked  # where ``is_pinned`` looks
    held = torch.nn.Parameter(tensors.pop())
    last = held.data_ptr()
    del tensor, tensors
    assert list(runtime.locked) == [last]
    held = held.data[1:2]
    assert list(runtime.locked) == [last]
    del held
    assert not runtime.locked


def test_host_memory_that_cannot_be_locked_is_an_error(runtime, monkeypatch):
    runtime.code = 2
    monkeypatch.setattr("torch.cuda.check_error", lambda code: pytest.fail(f"code {code}") if code else None)
    with pytest.raises(pytest.fail.Exception, match="code 2"):
        empty_on_host(torch.Size([4]), torch.float32, locked=True)


@pytest.mark.gpu
def test_a_gpu_copies_from_locked_memory():
    tensor = empty_on_host(torch.Size([3, 1000]), torch.float32, locked=True).normal_()
    assert tensor.is_pinned()
    assert torch.equal(tensor.to("cuda", non_blocking=True).cpu(), tensor)
