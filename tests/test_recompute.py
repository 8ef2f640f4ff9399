"""What backward computes again, and what torch.compile makes of a block."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from processes import ROOT
from torch._dynamo.utils import counters

from ditmoe_ds.models.attention import Attention
from ditmoe_ds.models.dit import DiT, DiTConfig
from ditmoe_ds.models.init import init_weights
from ditmoe_ds.moe.experts import PackedExperts
from ditmoe_ds.moe.layer import Router
from ditmoe_ds.moe.routing import RouterConfig

TINY = DiTConfig(hidden=32, depth=2, heads=4, input_size=8, num_classes=3, experts=4)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def disturbed(**options):
    """A model without zeros, which would leave most of its gradients zero."""
    model = DiT(replace(TINY, **options))
    init_weights(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def gradients(model):
    model.zero_grad()
    out, stats = model(torch.ones(2, 4, 8, 8), torch.tensor([1.0, 2.0]), torch.tensor([0, 1]), return_router=True)
    (out.square().mean() + stats.mean_scores[:, 0].sum() + stats.z.sum()).backward()
    return [p.grad.clone() for p in model.parameters()]


ROUTINGS = {
    "token": {},
    "forced": dict(router=RouterConfig(force_balance=True)),
    "capacity": dict(router=RouterConfig(capacity_factor=0.8)),
    "expert": dict(routing="expert"),
}


@pytest.mark.parametrize("options", ROUTINGS.values(), ids=ROUTINGS)
def test_recomputed_activations_give_the_same_gradients(options):
    model = disturbed(**options)
    kept = gradients(model)
    for again in (True, "attention"):
        model.checkpoint_activations = again
        assert all(torch.equal(a, b) for a, b in zip(gradients(model), kept))


def test_tokens_lie_side_by_side_in_every_block():
    """Not channel by channel, as the patch convolution leaves them: all that blocks do to them would go against the grain."""
    model, found = disturbed(), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, arguments: found.append(arguments[0].is_contiguous()))
    gradients(model)
    assert found == [True] * len(model.blocks)


def test_what_is_computed_again():
    """Twice the forward of all, or of attention alone."""
    model = disturbed()
    ran = Counter()
    for name, kind in (("attention", Attention), ("experts", PackedExperts), ("router", Router)):
        for module in model.modules():
            if isinstance(module, kind):
                module.register_forward_pre_hook(lambda module, args, name=name: ran.update([name]))
    for again, wanted in ((False, (1, 1, 1)), ("attention", (2, 1, 1)), (True, (2, 2, 2))):
        model.checkpoint_activations = again
        ran.clear()
        gradients(model)
        assert tuple(ran[name] / len(model.blocks) for name in ("attention", "experts", "router")) == wanted


@pytest.mark.parametrize("options", ROUTINGS.values(), ids=ROUTINGS)
def test_what_is_computed_again_is_routed_as_it_was(options):
    """Whatever the router sees in backward: other experts than the forward's would give another model's gradient."""
    model = disturbed(**options)
    seen = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    model.checkpoint_activations = True

    def jolt(module, args):
        if len(seen) >= len(model.blocks):  # in backward
            return (args[0] + torch.randn_like(args[0]),)
        return None

    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_pre_hook(jolt)
    gradients(model)
    first, again = seen[: len(model.blocks)], seen[len(model.blocks) :][::-1]
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.counts, b.counts) and not torch.equal(a.weights, b.weights)


COMPILED = {name: ROUTINGS[name] for name in ("capacity", "expert")}


@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
def test_blocks_of_static_shapes_are_one_graph(options):
    """torch.compile finds nothing that it must leave to Python, and compiles blocks that are alike once."""
    model = disturbed(**options)
    plain = gradients(model)
    torch._dynamo.reset()
    counters.clear()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        for a, b in zip(gradients(model), plain):
            torch.testing.assert_close(a, b)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_so_are_blocks_with_the_kernels_of_a_gpu():
    """Dropless token choice, too."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "traced_kernels.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "22 passed" in done.stdout, done.stdout[-6000:]
