"""torch.compile on real runs: the same numbers as without."""

import copy
import io
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from latents import write_latents, write_vae
from models import SPARSE, random_weights
from PIL import Image
from processes import demo_on, launch, metrics
from torch import nn
from torch._dynamo.utils import counters

from ditmoe_ds.cli import main
from ditmoe_ds.distributed.weights import write_weights
from ditmoe_ds.models.dit import DiT
from ditmoe_ds.moe import dispatch
from ditmoe_ds.moe.layer import RoutedExperts
from ditmoe_ds.moe.routing import RouterConfig


@pytest.fixture
def blocks_compiled(monkeypatch):
    """Without the compiler's last part, which takes minutes and has no say in what a graph is."""
    torch._dynamo.reset()
    counters.clear()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode: real(function, backend="aot_eager"))
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def grown(config, group=None):
    """A network of random weights, and its compiled twin; with a ``group`` of this process alone, their experts are asked through it."""
    torch.manual_seed(0)
    network = DiT(config)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    twin = copy.deepcopy(network)
    for module in (*network.modules(), *twin.modules()):
        if group and isinstance(module, RoutedExperts):
            module.ep_size, module.ep_group = 2, group
    twin.compile_blocks()
    return network, twin


def same(network, twin, *sides):
    """Outputs and gradients, of three latents."""
    x, t, y = torch.randn(3, 4, *sides), torch.rand(3) * 1000, torch.tensor([0, 1, 2])
    outputs = [one(x, t, y) for one in (network, twin)]
    torch.testing.assert_close(*outputs)
    for one, output in zip((network, twin), outputs):
        one.zero_grad()
        output.square().mean().backward()
    for ours, theirs in zip(twin.parameters(), network.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("router", [RouterConfig(), RouterConfig(pool="microbatch"), RouterConfig(layer_capacity=(1.1, 2.3))])
def test_experts_choose_among_any_number_of_tokens(router, blocks_compiled):
    """As where latents have several shapes; and each layer its own share."""
    network, twin = grown(replace(SPARSE, routing="expert", router=router))
    for sides in ((8, 8), (8, 12), (6, 10), (12, 12), (8, 8)):
        same(network, twin, *sides)
    assert blocks_compiled() > 0


def test_token_choice_is_compiled_once(blocks_compiled):
    """However many tokens come to each expert, which the host has to know on a CPU."""
    network, twin = grown(SPARSE)
    for _ in range(2):
        same(network, twin, 8, 8)
    before = blocks_compiled()
    for _ in range(5):
        same(network, twin, 8, 8)
    assert before == blocks_compiled() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, stage, expert, tensor",
    [("EC-DIT-Nano-4E", 2, 2, 1), ("DiT-MoE-Nano/2-4E2A", 0, 1, 1), ("DiT-MoE-Nano/2-4E2A", 3, 2, 1), ("EC-DIT-Nano-4E", 1, 1, 2)],
)
def test_a_compiled_run_is_the_run(tmp_path, name, stage, expert, tensor):
    """And goes on as if it had not ended."""
    latents = write_latents(tmp_path / "latents", train=64, text=6 if name.startswith("EC") else 0)

    def run(directory, compiled, *steps):
        how = [f"model.name={name}", f"parallel.zero_stage={stage}", f"parallel.expert={expert}", f"parallel.tensor={tensor}"]
        how += [f"train.compile={compiled}", "train.precision=fp32", "train.validate_every=4"]
        how += ["checkpoint.every=2", f"run_dir={tmp_path / directory}"]
        for until in steps:
            launch(expert * tensor, ["-m", "ditmoe_ds.train", "recipes/digits.yaml", *demo_on(latents, until), *how], timeout=900)
        return metrics(tmp_path / directory)

    plain, ours, resumed = run("plain", "false", 4), run("compiled", "true", 4), run("resumed", "true", 2, 4)
    assert len(plain) == len(ours) == len(resumed) == 4
    for key in ("loss", "balance_loss", "grad_norm"):
        assert [record[key] for record in ours] == pytest.approx([record[key] for record in plain], rel=1e-5), key
        assert [record[key] for record in resumed] == [record[key] for record in ours], key
    assert ours[-1]["val_loss"] == pytest.approx(plain[-1]["val_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.gpu  # too: there blocks are CUDA graphs
@pytest.mark.parametrize("routing", ["token", "expert"])
def test_compiled_samples_are_the_samples(tmp_path, routing):
    latents = dict(vae=write_vae(tmp_path / "vae"), scaling_factor=0.9, shift_factor=0.1)
    write_weights(tmp_path / "weights", random_weights(replace(SPARSE, routing=routing), latents=latents)[1])
    found = []
    for how in ([], ["--compile"]):
        out = tmp_path / f"out{len(found)}"
        assert main(["sample", str(tmp_path / "weights"), "--out", str(out), "--num", "5", "--batch", "2", "--steps", "4", *how]) == 0
        found.append([np.asarray(Image.open(io.BytesIO(path.read_bytes()))).astype(int) for path in sorted(out.glob("*.png"))])
    plain, ours = found
    assert len(plain) == len(ours) == 5
    for a, b in zip(plain, ours):
        assert abs(a - b).max() <= 1 and a.std() > 1


def test_an_exchange_between_ranks_is_left_to_python(alone, monkeypatch, blocks_compiled):
    """Its splits change from pass to pass, and events of a clock that a compiler had traced would never be recorded."""
    traced = []

    @contextmanager
    def clock(part):
        traced.append(torch.compiler.is_compiling())
        yield

    monkeypatch.setattr(dispatch, "clock", clock)
    network, twin = grown(SPARSE, group=dist.group.WORLD)
    graphs = []
    for side in (8, 12, 16):
        same(network, twin, side, side)
        graphs.append(blocks_compiled())
    assert len(traced) == 2 * 3 * 4 * SPARSE.depth and not any(traced)
    assert graphs[0] < graphs[1] == graphs[2] == 2 * graphs[0], "once for this number of tokens, once for any"
