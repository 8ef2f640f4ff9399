"""Exact sizes, initial weights, shapes."""

import json
import math
from dataclasses import replace

import pytest
import torch

from ditmoe_ds.cli import main
from ditmoe_ds.errors import ConfigError
from ditmoe_ds.models.dit import DiT, DiTConfig
from ditmoe_ds.models.embeddings import TimestepEmbedder, position_table
from ditmoe_ds.models.init import InitialWeights, init_weights
from ditmoe_ds.models.sizes import describe, named_config

PUBLISHED = {  # total, active, linear GMACs at 256 tokens
    "DiT-MoE-S/2-8E2A": (199_307_552, 71_905_568, 15.43),
    "DiT-MoE-S/2-16E2A": (369_213_728, 71_942_432, 15.44),
    "DiT-MoE-B/2-8E2A": (795_861_536, 286_253_600, 61.68),
    "DiT-MoE-L/2-8E2A": (2_823_764_000, 1_011_824_672, 219.26),
    "DiT-MoE-XL/2-8E2A": (4_168_172_192, 1_492_730_528, 323.74),
    "DiT-MoE-G/2-16E2A": (16_503_731_232, 3_181_573_152, 690.94),
    "DiT-XL/2": (675_129_632, 675_129_632, 114.39),  # the count of the public DiT-XL/2
}
TINY = DiTConfig(hidden=32, depth=2, heads=4, input_size=8, num_classes=3, experts=4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_info_prints_the_published_counts(name, capsys):
    assert main(["info", name, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["total"], numbers["active"], numbers["linear_gmacs"]) == PUBLISHED[name]
    assert sum(numbers["parts"].values()) == numbers["total"]


def test_info_is_readable(capsys):
    assert main(["info", "DiT-MoE-G/2-16E2A"]) == 0
    assert "16,503,731,232" in capsys.readouterr().out


def test_gmacs_with_attention():
    assert describe(named_config("DiT-MoE-G/2-16E2A"))["gmacs"] == pytest.approx(698.3, abs=0.05)


GELU = DiTConfig(hidden=32, depth=2, heads=4, input_size=8, num_classes=3, experts=4, shared=0, expert_activation="gelu", expert_hidden=48)


@pytest.mark.parametrize("config", [TINY, GELU, DiTConfig(hidden=32, depth=1, heads=2, qk_norm=True, experts=2, top_k=1, shared=0)])
def test_the_count_is_the_models(config):
    model = DiT(config)
    assert describe(config)["total"] == sum(p.numel() for p in model.parameters()) + config.tokens * config.hidden


def test_heads_are_the_published():
    """No count of parameters tells them."""
    heads = {"S": 6, "B": 12, "L": 16, "XL": 16, "G": 16}
    assert {size: named_config(f"DiT-MoE-{size}/2-8E2A").heads for size in heads} == heads
    heads = {"XL": (18, 6), "XXL": (24, 6), "3XL": (36, 6), "M": (48, 12)}
    assert {size: ((found := named_config(f"EC-DIT-{size}-8E")).heads, found.kv_heads) for size in heads} == heads


@pytest.mark.parametrize(
    "name", ["DiT-MoE-XL/2", "DiT-XL/2-8E2A", "DiT-MoE-XXL/2-8E2A", "DiT-MoE-S/3-8E2A", "DiT-MoE-S/2-8E9A", "SiT-XL/2"]
)
def test_unknown_names(name, capsys):
    with pytest.raises(ConfigError, match=r"model\.name"):
        named_config(name)
    assert main(["info", name]) == 2
    error = capsys.readouterr().err
    assert name in error and error.count("\n") == 1


def test_dense_experts_count_as_the_dense_mlp():
    """One expert that is the dense MLP: the dense model and a router."""
    dense = DiTConfig(hidden=32, depth=2, heads=4, input_size=8)
    one = replace(dense, experts=1, top_k=1, shared=0, expert_activation="gelu")
    assert describe(one)["total"] == describe(dense)["total"] + 2 * 32 == describe(one)["active"]
    four = describe(replace(one, experts=4, top_k=2, expert_hidden=64))
    assert four["parts"]["routed_experts"] == 2 * 4 * (2 * 32 * 64 + 64 + 32)
    assert four["total"] - four["active"] == 2 * 2 * (2 * 32 * 64 + 64 + 32)


def make(config=TINY, seed=0):
    model = DiT(config)
    init_weights(model, seed)
    return model


@pytest.mark.parametrize("config", [TINY, GELU, DiTConfig(hidden=32, depth=2, heads=4, input_size=8, num_classes=3)])
def test_output_is_zero_and_blocks_are_the_identity_at_init(config):
    model = make(config)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 900.0]), torch.tensor([0, 3])
    assert torch.equal(model(x, t, y), torch.zeros(2, 8, 8, 8))
    tokens, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert torch.equal(model.blocks[0](tokens, c)[0], tokens)


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_any_range_of_any_initial_weight_can_be_drawn_alone(ep_size):
    whole = {name: parameter.detach().flatten() for name, parameter in make().named_parameters()}
    with torch.device("meta"):
        source = InitialWeights(DiT(TINY, ep_size), seed=0)  # what a rank knows: its own experts' shapes
    assert source.matrices.keys() == whole.keys()
    for name, values in whole.items():
        for start, stop in ((0, len(values)), (len(values) // 3, len(values) // 2 + 1), (len(values) - 1, len(values))):
            out = torch.full((stop - start,), torch.nan)
            source.read(name, start, out)
            assert torch.equal(out, values[start:stop]), (name, start)


def test_initial_scales_of_layer_norm_are_one():
    model = make(DiTConfig(hidden=32, depth=1, heads=4, input_size=8, num_classes=3, experts=2, qk_norm=True))
    assert torch.equal(model.blocks[0].attn.q_norm.weight, torch.ones(8)) and not model.blocks[0].attn.k_norm.bias.any()


def test_every_matrix_is_its_own_draw():
    model, other = make().requires_grad_(False), make(seed=1)
    experts = [block.mlp.deepspeed_moe.experts.deepspeed_experts[0] for block in model.blocks]
    drawn = [matrix for e in experts for w1 in e.w1 for matrix in w1.chunk(2)] + [w2.t() for e in experts for w2 in e.w2]
    for i, a in enumerate(drawn):
        assert a.abs().max() <= math.sqrt(6 / (32 + 128)) and a.std() == pytest.approx(math.sqrt(2 / (32 + 128)), rel=0.1)
        assert not any(torch.equal(a, b) for b in drawn[:i])
    assert not torch.equal(model.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)
    router = model.blocks[0].mlp.deepspeed_moe.gate.weight
    assert 0.5 / math.sqrt(32) < router.abs().max() <= 1 / math.sqrt(32)
    for half in model.blocks[0].mlp.shared_mlp.w1.weight.chunk(2):  # gate and up, of 64
        assert 0.9 * math.sqrt(6 / (32 + 64)) < half.abs().max() <= math.sqrt(6 / (32 + 64))
    patches = model.x_embed.weight  # Xavier's of 4 channels of 2 x 2 pixels
    assert 0.9 * math.sqrt(6 / (32 + 16)) < patches.abs().max() <= math.sqrt(6 / (32 + 16))
    for weight in (model.y_embed.table.weight, model.t_embed.mlp[0].weight, model.t_embed.mlp[2].weight):
        assert weight.std() == pytest.approx(0.02, rel=4 / (2 * weight.numel()) ** 0.5)


def test_position_table_matches_its_formula():
    table = position_table(3, 5, 16)
    assert table.shape == (15, 16)
    for row, column in ((0, 0), (1, 4), (2, 1)):
        ours = table[row * 5 + column]
        omega = [10000 ** (-i / 4) for i in range(4)]
        wanted = [f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in omega]
        assert ours.tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timestep_sinusoid_is_cos_then_sin(dtype):
    """In fp32 whatever the weights are: bf16 does not tell 906 from 907."""
    embedder = TimestepEmbedder(8)
    seen = []
    embedder.mlp = torch.nn.Sequential(torch.nn.Linear(256, 8)).to(dtype)
    embedder.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    embedder(torch.tensor([907.0]))
    wanted = torch.tensor([f(907 * 10000 ** (-i / 128)) for f in (math.cos, math.sin) for i in range(128)])
    torch.testing.assert_close(seen[0][0], wanted.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 0, atol=2e-4)


def test_the_output_is_fp32_whatever_the_weights_are():
    assert make().bfloat16()(torch.randn(2, 4, 8, 8), torch.tensor([1.0, 900.0]), torch.tensor([0, 3])).dtype == torch.float32
