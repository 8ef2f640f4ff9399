"""A dense DiT upcycled computes what it computed, by experts that different tokens reach."""

from dataclasses import replace

import pytest
import torch
from models import DENSE, SPARSE, random_weights

from ditmoe_ds.analysis.routing import watched
from ditmoe_ds.cli import main
from ditmoe_ds.diffusion.objectives import make_objective
from ditmoe_ds.distributed.weights import open_weights, write_weights
from ditmoe_ds.interop.upcycle import upcycle
from ditmoe_ds.models.sizes import named_config
from ditmoe_ds.pipelines.run import load_model, open_run

CASES = {  # experts, top_k, split
    "copies": (8, 2, 1),
    "one copy at a time": (4, 1, 1),
    "slices": (8, 4, 4),
    "slices of two copies": (8, 4, 2),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("dense") / "weights", random_weights(DENSE)[1])


def loss(run):
    """(8,) losses of a fixed batch."""
    generator = torch.Generator().manual_seed(3)
    x0, noise = torch.randn(2, 8, 4, 8, 8, generator=generator).unbind()
    t, y = torch.linspace(0.05, 0.95, 8), torch.arange(8) % 4
    with torch.no_grad():
        return make_objective(run.diffusion).loss(lambda z, s: run.model(z, s, y), x0, t, noise)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_the_dense_ones(case, dense, tmp_path):
    experts, top_k, split = CASES[case]
    numbers = ["--experts", str(experts), "--top-k", str(top_k), "--split", str(split)]
    assert main(["upcycle", str(dense), *numbers, "--out", str(tmp_path / "sparse"), "--shard-size", "100KB"]) == 0
    before, after = open_run(dense), open_run(tmp_path / "sparse")
    config = after.model.config
    assert (config.experts, config.top_k, config.shared, config.expert_width) == (experts, top_k, 0, 128 // split)
    with watched(after.model) as taken:
        torch.testing.assert_close(loss(after), loss(before), rtol=1e-5, atol=0)
    assert len(taken) == DENSE.depth
    for layer in taken:  # (T, E)
        assert layer.any(0).sum() > experts / 2  # of 128 tokens that much resemble each other
        slices = layer.view(len(layer), -1, split)
        assert (slices == slices[..., :1]).all()  # all slices of a copy, or none


def test_a_dense_ec_dit_becomes_one_of_token_choice():
    """Where experts choose, tokens that none takes would lose their MLP."""
    weights = random_weights(named_config("EC-DIT-Nano", text_width=24))[1]
    models = [load_model(weights), load_model(upcycle(weights, experts=8, top_k=2))]
    z, text, mask = torch.randn(2, 4, 32, 32), torch.randn(2, 5, 24), torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        before, after = (model(z, torch.tensor([10.0, 700.0]), text=text, mask=mask) for model in models)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert models[1].config.sparse_layers and before.std() > 0.1


def test_every_expert_learns(dense):
    model = load_model(upcycle(open_weights(dense), experts=4, top_k=2, split=2))
    x, t, y = torch.randn(8, 4, 8, 8), torch.linspace(0, 999, 8), torch.arange(8) % 4
    model(x, t, y).square().mean().backward()
    for block in model.blocks:
        experts = block.mlp.deepspeed_moe.experts.deepspeed_experts[0]
        for parameter in experts.parameters():
            assert (parameter.grad.flatten(1).abs().sum(1) > 0).all()
        assert block.mlp.deepspeed_moe.gate.weight.grad.abs().sum() > 0


def test_noise_makes_copies_differ_by_as_much(dense):
    exact, noisy, again, other = (
        upcycle(open_weights(dense), experts=4, top_k=2, noise=noise, seed=seed) for noise, seed in ((0, 0), (0.1, 0), (0.1, 0), (0.1, 1))
    )
    name = "blocks.1.mlp.deepspeed_moe.experts.deepspeed_experts.0.w1"
    added = noisy.tensor(name) - exact.tensor(name)
    assert float(added.std()) == pytest.approx(0.1 * float(exact.tensor(name).std()), rel=0.05)
    assert not torch.equal(added[0], added[1])
    assert torch.equal(noisy.tensor(name), again.tensor(name)) and not torch.equal(noisy.tensor(name), other.tensor(name))
    part = torch.empty(5000)
    noisy.read(name, 1234, part)
    assert torch.equal(part, noisy.tensor(name).view(-1)[1234:6234])


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--experts", "8", "--split", "3"], "--split"),
        (["--experts", "32", "--split", "32"], "--split"),
        (["--experts", "6", "--split", "4"], "--experts"),
        (["--experts", "8", "--split", "4", "--top-k", "2"], "--top-k"),
        (["--experts", "2", "--top-k", "3"], "--top-k"),
        (["--experts", "2", "--top-k", "0"], "--top-k"),
        (["--experts", "4", "--noise", "-0.1"], "--noise"),
        (["--experts", "4", "--noise", "inf"], "--noise"),
    ],
)
def test_numbers_that_do_not_go_together(arguments, word, dense, tmp_path, capsys):
    assert main(["upcycle", str(dense), *arguments, "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1 and not (tmp_path / "x").exists()


def test_a_sparse_model_is_refused(tmp_path, capsys):
    plain = dict(depth=1, expert_activation="gelu", shared=0)
    for name, model, word in (
        ("sparse", replace(SPARSE, depth=1), "4 experts already"),
        ("twin", replace(SPARSE, **plain, routing="dense"), "the dense twin of a sparse one"),
    ):
        weights = write_weights(tmp_path / name, random_weights(model)[1])
        assert main(["upcycle", str(weights), "--out", str(tmp_path / "x")]) == 2
        assert word in capsys.readouterr().err
