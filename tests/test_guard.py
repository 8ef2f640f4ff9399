"""What is said of a step whose loss jumps, and what of a step is read again. Steps that are skipped: test_safety.py."""

import json
import math

import pytest
import torch

from ditmoe_ds.training import guard
from ditmoe_ds.training.callbacks import _cut_after
from ditmoe_ds.training.guard import SpikeWatch, explain
from ditmoe_ds.training.step import Prepared

pytestmark = pytest.mark.usefixtures("alone")


def look(watch, loss, *losses):
    """A step of this loss with micro-batches of two samples: 0 and 1, 10 and 11, ..."""
    batches = []
    for i in range(len(losses)):
        latents, times = torch.zeros(2, 4, 2, 2), torch.tensor([0.25, 0.5]) + i / 10
        batches.append(Prepared(latents, {}, times, latents, torch.tensor([10 * i, 10 * i + 1]), None))
    return watch(loss, [torch.tensor(value) for value in losses], batches, "sample{}".format)


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_a_jump_names_the_worst_micro_batch(threshold):
    watch = SpikeWatch(threshold)
    assert [look(watch, 1 + 0.1 * (-1) ** i, 1.0, 1.0) for i in range(30)] == [None] * 30
    assert look(watch, 1.5, 1.5, 1.5) is None, "five deviations are not six"
    found = look(watch, 3.0, 1.0, 5.0)
    if threshold:
        assert found.startswith("loss 3.0000 after 1.0161 +- ")
        assert found.endswith("largest, 5.0000, on rank 0, t 0.350 to 0.600, samples sample10, sample11")
    else:
        assert found is None


def test_of_all_ranks_the_worst_is_told(monkeypatch):
    monkeypatch.setattr(guard, "gathered", lambda mine: [mine, (9.0, "rank 1, t 0")])
    watch = SpikeWatch(6.0)
    assert [look(watch, 1.0, 1.0) for _ in range(20)] == [None] * 20
    assert look(watch, 7.0, 5.0).endswith("largest, 9.0000, on rank 1, t 0")


def test_the_first_steps_only_fill_the_memory():
    watch = SpikeWatch(6.0)
    assert [look(watch, loss, loss) for loss in [1.0] * 10 + [100.0] + [1.0] * 9] == [None] * 20
    assert look(watch, 1e4, 1e4)


def test_a_loss_that_is_not_finite_is_a_jump_and_not_usual():
    watch = SpikeWatch(6.0)
    for i in range(20):
        look(watch, 1 + 0.1 * (-1) ** i, 1.0)
    for loss in (math.inf, math.nan):
        assert look(watch, loss, loss).startswith(f"loss {loss} after 1.0000 +- 0.1026")
    assert look(watch, 1.1, 1.1) is None and look(watch, 3.0, 3.0)


def test_what_was_usual_is_forgotten_after_100_steps():
    watch = SpikeWatch(6.0)
    for loss in [100.0] * 30 + [1.0] * 100:
        look(watch, loss, loss)
    assert look(watch, 3.0, 3.0).startswith("loss 3.0000 after 1.0000 +- 0.0000")


def test_compiled_modules_are_looked_into():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), torch.nn.Linear(4, 4))
    with torch.no_grad():
        model[1][0].bias.fill_(torch.inf)
    model[1].forward = compiled = torch.compile(model[1].forward, backend="eager")
    batch = Prepared(torch.ones(2, 4), {}, torch.tensor([0.5, 0.5]), torch.ones(2, 4), torch.tensor([3, 4]), None)
    said = explain(model, [batch], lambda batch: model(batch.latents).sum(), "sample{}".format)
    assert said == "first in the output of 1.0, rank 0, t 0.500 to 0.500, samples sample3, sample4"
    assert model[1].forward is compiled


class Experts(torch.nn.Module):
    """Three rows of every token, of which large ones overflow."""

    def forward(self, x):
        return x.flatten(0, 1).repeat(3, 1).exp()


class Overflow(torch.autograd.Function):
    """Of the gradient of a sample whose values are above 1."""

    @staticmethod
    def forward(ctx, x):
        ctx.large = (x > 1).any(-1, keepdim=True)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.where(ctx.large, torch.inf, grad)


class Network(torch.nn.Module):
    def __init__(self, cut):
        super().__init__()
        self.first, self.experts, self.last = torch.nn.Linear(4, 4), Experts(), torch.nn.Linear(4, 4)
        self.cut = cut
        torch.nn.init.eye_(self.first.weight)

    def forward(self, x):
        x = self.first(x)
        x = self.experts(x).view(3, *x.shape).sum(0) if self.cut == "output" else Overflow.apply(x)
        return self.last(x)


@pytest.mark.parametrize(
    "cut, where",
    [("latents", "the latents"), ("output", "the output of experts"), ("gradient", "the gradient of the output of first")],
)
def test_the_bad_samples_of_a_large_micro_batch_are_named(cut, where):
    latents = torch.zeros(16, 3, 4)
    latents[12, 1, 2] = torch.nan if cut == "latents" else 100.0
    batch = Prepared(latents, {}, torch.arange(16) / 100, latents, torch.arange(16) + 50, None)
    network = Network(cut)
    said = explain(network, [batch], lambda batch: network(batch.latents).sum(), "sample{}".format)
    assert said == f"first in {where}, rank 0, t 0.120 to 0.120, samples sample62"


def test_of_all_that_is_bad_the_first_is_told(monkeypatch):
    """Of the step's micro-batches, and then of all ranks' modules in the order of computation."""
    network, batches = Network("output"), []
    for first in (50, 70):
        latents = torch.zeros(2, 3, 4)
        latents[1, 0] = 100.0
        batches.append(Prepared(latents, {}, torch.tensor([0.25, 0.5]), latents, torch.arange(2) + first, None))

    def said():
        return explain(network, batches, lambda batch: network(batch.latents).sum(), "sample{}".format)

    assert said() == "first in the output of experts, rank 0, t 0.500 to 0.500, samples sample51"
    monkeypatch.setattr(guard, "gathered", lambda mine: [mine, [(0, 0, 1, "first in the output of first, rank 1"), (1, 0, 1, "later")]])
    assert said() == "first in the output of first, rank 1"


def test_of_many_samples_eight_are_named():
    latents = torch.zeros(11, 1)
    batch = Prepared(latents, {}, torch.full((11,), 0.5), latents, torch.arange(11), None)
    named = ", ".join(f"sample{i}" for i in range(8))
    assert guard._describe(batch, "sample{}".format) == f"rank 0, t 0.500 to 0.500, samples {named} and 3 more"


@pytest.mark.parametrize("tail", ['{"step": 4, "lo', "\0\0\0\n", '{"step": 4, "lo\n\0\n{"step": 5'])
@pytest.mark.parametrize("step, kept", [(0, 0), (2, 2), (3, 3), (9, 3)])
def test_records_after_the_checkpoint_are_cut_off(tmp_path, step, kept, tail):
    lines = [json.dumps(dict(step=number, loss=1.0)) + "\n" for number in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + tail)
    _cut_after(tmp_path / "metrics.jsonl", step)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:kept])


def test_there_may_be_no_records(tmp_path):
    _cut_after(tmp_path / "metrics.jsonl", 3)
    (tmp_path / "metrics.jsonl").write_text("")
    _cut_after(tmp_path / "metrics.jsonl", 3)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
