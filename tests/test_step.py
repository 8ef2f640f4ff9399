"""What a training step is given: chance by (seed, epoch, sample), conditions, masks; and what its loss counts."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from models import SPARSE, random_weights
from torch.nn.functional import linear

from ditmoe_ds.diffusion.noise import kept_patches
from ditmoe_ds.diffusion.objectives import DDPM, DiffusionConfig, RectifiedFlow
from ditmoe_ds.diffusion.sampling import make_scheduler, sample
from ditmoe_ds.errors import DataError
from ditmoe_ds.latents.condition import Captions, Classes, Texts, padded
from ditmoe_ds.latents.loader import Batch
from ditmoe_ds.moe.layer import Router
from ditmoe_ds.moe.routing import RouterConfig
from ditmoe_ds.pipelines.run import load_model
from ditmoe_ds.training.ahead import Ahead
from ditmoe_ds.training.step import Preparation, Prepared, compute_loss, pixels_of, router_metrics

COUNT = 2000
EMPTY = torch.full((1, 3), -1.0).bfloat16()


def batch(epoch=0, count=COUNT):
    lengths = [1 + i % 4 for i in range(count)]
    samples, epochs = torch.arange(count), torch.full((count,), epoch)
    text = torch.arange(3 * sum(lengths)).view(-1, 3).bfloat16()
    return Batch(torch.zeros(count, 1, 4, 6), samples % 10, epochs, samples, text, lengths, [str(i) for i in range(count)])


def prepare(conditioner, dropout=0.1, mask_ratio=0.0, mirror=False):
    return Preparation(5, RectifiedFlow(1000.0), conditioner, dropout, mirror, mask_ratio, patch=2)


def test_classes_are_dropped_for_guidance():
    labels = prepare(Classes(10))(batch()).condition["y"]
    dropped = labels == 10
    assert dropped.float().mean() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(labels[~dropped], batch().labels[~dropped])
    assert torch.equal(prepare(Classes(10), dropout=0.0)(batch()).condition["y"], batch().labels)
    assert torch.equal(prepare(Classes(10))(batch()).condition["y"], labels)
    again = prepare(Classes(10))(batch(epoch=1)).condition["y"] == 10
    assert 0 < (again & dropped).sum() < 0.3 * dropped.sum(), "each epoch drops others"


@pytest.mark.parametrize("objective", [RectifiedFlow(1000.0), DDPM()])
def test_time_dropout_and_flip_say_nothing_of_each_other(objective):
    slope = torch.arange(6.0).expand(COUNT, 1, 4, 6)
    found = Preparation(5, objective, Classes(10), 0.5, True, 0.0, patch=2)(batch()._replace(latents=slope))
    chances = torch.stack([found.times, (found.condition["y"] == 10).float(), (found.latents[:, 0, 0, 0] == 5).float()])
    assert (chances.corrcoef() - torch.eye(3)).abs().max() < 0.1


def test_held_out_samples_without_a_class_are_of_no_class():
    assert Classes(10).of(batch(count=3)._replace(labels=torch.tensor([4, -1, 0]))) == [4, 10, 0]


def test_texts_are_dropped_like_classes():
    dropped = (prepare(Classes(10))(batch()).condition["y"] == 10).tolist()
    condition = prepare(Texts(EMPTY))(batch()).condition
    assert condition["text"].shape == (COUNT, 4, 3) and condition["mask"].shape == (COUNT, 4)
    texts = batch().text.split(batch().lengths)
    for i in range(0, COUNT, 7):
        wanted = EMPTY if dropped[i] else texts[i]
        assert torch.equal(condition["text"][i][condition["mask"][i]], wanted) and not condition["text"][i, len(wanted) :].any()


def test_padding():
    found = padded([torch.ones(2, 3), torch.ones(1, 3)])
    assert found["mask"].tolist() == [[True, True], [True, False]]
    assert found["text"].sum(-1).tolist() == [[3, 3], [3, 0]]


def test_masks_are_drawn_anew_for_each_visit():
    whole = prepare(Classes(10))(batch())
    assert whole.keep is None
    keep = prepare(Classes(10), mask_ratio=0.5)(batch()).keep
    assert keep.shape == (COUNT, 3) and (keep.diff(dim=1) > 0).all()
    assert keep.flatten().bincount(minlength=6).div(COUNT / 2).tolist() == pytest.approx([1] * 6, abs=0.1)
    assert torch.equal(keep, prepare(Classes(10), mask_ratio=0.5)(batch()).keep)
    assert not torch.equal(keep, prepare(Classes(10), mask_ratio=0.5)(batch(epoch=1)).keep)
    assert torch.equal(keep, kept_patches(5, batch().epochs, batch().samples, 6, 3))
    assert prepare(Classes(10), mask_ratio=0.3)(batch()).keep.shape == (COUNT, 4)  # 1.8 of 6 are left out, rounded
    two = batch()._replace(latents=torch.zeros(COUNT, 1, 2, 4))
    assert prepare(Classes(10), mask_ratio=0.75)(two).keep.flatten().bincount().div(COUNT / 2).tolist() == pytest.approx([1] * 2, abs=0.1)
    # nothing else is drawn otherwise
    assert torch.equal(prepare(Classes(10), mask_ratio=0.5)(batch()).noise, whole.noise)


@pytest.mark.parametrize("objective", [RectifiedFlow(1.0), DDPM()])
def test_a_masked_loss_counts_the_patches_that_are_there(objective):
    torch.manual_seed(0)
    x0, noise, t = torch.randn(2, 4, 4, 6), torch.randn(2, 4, 4, 6), torch.tensor([0.3, 0.8])
    keep = torch.tensor([[0, 4], [1, 5]])
    where = pixels_of(keep, x0, 2)
    assert where[0, 0].tolist() == [[1, 1, 0, 0, 0, 0]] * 2 + [[0, 0, 1, 1, 0, 0]] * 2
    out = torch.randn(2, 8, 4, 6)
    masked = objective.loss(lambda z, s: out * where, x0, t, noise, where)
    other = torch.where(where.bool(), out, torch.randn_like(out))
    assert torch.equal(objective.loss(lambda z, s: other, x0, t, noise, where), masked)
    torch.testing.assert_close(
        objective.loss(lambda z, s: out, x0, t, noise, torch.ones_like(where)), objective.loss(lambda z, s: out, x0, t, noise)
    )
    if isinstance(objective, RectifiedFlow):
        error = (out[:, :4] - (noise - x0)).square()
        wanted = torch.stack(
            [error[0, :, :2, :2].mean() + error[0, :, 2:, 2:4].mean(), error[1, :, :2, 2:4].mean() + error[1, :, 2:, 4:].mean()]
        )
        torch.testing.assert_close(masked, wanted / 2)


def test_a_time_shift_moves_training_and_sampling():
    flow, t = RectifiedFlow(1000.0, time_shift=3.0), torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert flow.shifted(t).tolist() == pytest.approx([0, 0.5, 0.75, 1])
    times = []

    def predict(z, t):
        times.append(t[0].item())
        return torch.zeros_like(z)

    config = DiffusionConfig(time_shift=3.0, time_scale=1.0)
    sample(predict, torch.zeros(1, 1, 2, 2), make_scheduler(config), config, 4)
    assert times == pytest.approx([1, 0.9, 0.75, 0.5])
    shifted = prepare(Classes(10))(batch())
    plain = Preparation(5, flow, Classes(10), 0.1, False, 0.0, 2)(batch())
    torch.testing.assert_close(plain.times, flow.shifted(shifted.times))


@pytest.mark.parametrize("scope", ["global", "local"])
def test_a_loss_is_the_sum_of_its_parts(scope, monkeypatch):
    """Of both layers with experts: the balance of what was chosen, here or anywhere, and the router's z-loss."""
    config = replace(SPARSE, router=RouterConfig(balance_alpha=0.3, balance_scope=scope, z_alpha=0.2))
    net, logits = load_model(random_weights(config)[1]), []
    for module in net.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, args, out: logits.append(linear(args[0], module.weight).flatten(0, 1)))

    def with_another_rank(counts):
        counts[:, 1] += 50  # takings of its tokens, all by the second expert

    monkeypatch.setattr(dist, "all_reduce", with_another_rank)
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 8, 8)
    micro = Prepared(x0, dict(y=torch.tensor([0, 1, 2])), torch.rand(3), noise, torch.arange(3), None)
    found = compute_loss(net, RectifiedFlow(1000.0), micro, config)
    balance = z = 0.0
    for layer in logits:
        chosen = layer.topk(2).indices.flatten().bincount(minlength=4) + torch.tensor([0, 50 * (scope == "global"), 0, 0])
        balance += 0.3 * 4 * (chosen / chosen.sum() * layer.softmax(1).mean(0)).sum()
        z += 0.2 * layer.logsumexp(1).square().mean()
    assert len(logits) == 2
    torch.testing.assert_close(torch.stack([found.balance, found.z]), torch.stack([balance, z]))
    torch.testing.assert_close(found.total, found.diffusion + balance + z)


def test_a_masked_step_is_of_the_patches_that_are_there(monkeypatch):
    """What the network computes, and what the loss counts."""
    monkeypatch.setattr(dist, "all_reduce", lambda counts: None)
    net, objective = load_model(random_weights(SPARSE)[1]), RectifiedFlow(1000.0)
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 8, 8)
    y, t, keep = torch.tensor([0, 1, 2]), torch.rand(3), torch.stack([torch.randperm(16)[:5].sort().values for _ in range(3)])
    micro = Prepared(x0, dict(y=y), t, noise, torch.arange(3), keep)
    found = compute_loss(net, objective, micro, SPARSE)

    def only_these(z, s):
        return net(z, s, y, keep=keep)

    torch.testing.assert_close(found.diffusion, objective.loss(only_these, x0, t, noise, pixels_of(keep, x0, 2)).mean())
    assert found.takers.sum(1).tolist() == [3 * 5] * 2 and micro.tokens(2) == 5


def test_router_metrics_of_tokens():
    found = router_metrics(torch.tensor([[4, 4], [8, 0]]), torch.tensor([[2, 4, 2], [0, 8, 0]]))
    assert found["untaken"] == [0.25, 0] and found["takers_std"] == [pytest.approx(0.5**0.5, abs=1e-6), 0]
    assert found["dead"] == [0, 0.5] and found["max_over_mean"] == [1, 2] and found["cv"] == [0, 1]
    assert router_metrics(torch.tensor([[4, 4, 4, 4], [8, 8, 0, 0]]), torch.ones(2, 5))["entropy"] == [1, 0.5]


class Lengths:
    """An encoder whose tokens tell which caption they are of."""

    def padded(self, captions):
        return tuple(padded([torch.full((1 + int(caption) % 3, 2), float(caption)) for caption in captions]).values())


def on_their_way(device, steps, then=None):
    """Micro-batches of two epochs, with captions, taken as a step takes them."""
    conditioner = Captions(Lengths())
    loaded = [prepare(conditioner, dropout=0.0)(batch(epoch, 6)) for epoch in range(2 * steps)]

    def loader():
        yield from loaded
        raise then

    ahead, taken = Ahead(loader(), 2, device, conditioner), []
    for step in range(steps):
        taken.append(ahead.take())
        if step:  # the second step's were not asked for before
            ahead.begin()
    return [one.to(device, conditioner) for one in loaded], taken, ahead


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_next_step_is_brought_while_this_one_is_computed(device):
    """Each step has its own; one that cannot be read is told when it is wanted, not in the step before."""
    wanted, taken, ahead = on_their_way(torch.device(device), 3, then=DataError("shard.tar: ends early"))
    assert [len(step) for step in taken] == [2, 2, 2]
    for ours, theirs in zip((one for step in taken for one in step), wanted, strict=True):
        assert torch.equal(ours.noise, theirs.noise) and ours.noise.device.type == device
        assert torch.equal(ours.condition["text"], theirs.condition["text"])
        assert ours.condition["text"][:, 0, 0].tolist() == list(range(6))
    with pytest.raises(DataError, match="ends early"):
        ahead.take()


def test_what_stays_on_the_host_belongs_to_no_stream(monkeypatch):
    """As on a GPU, with a stand-in for its streams: torch refuses to record one for a tensor of the host."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    wanted, _, ahead = on_their_way(torch.device("cpu"), 2, then=DataError("no more"))
    ahead.ready, ahead.stream = wanted[:2], stream
    assert [one.samples.tolist() for one in ahead.take()] == [list(range(6))] * 2
