"""EC-DIT: expert choice, text, masks, any shape, and the published sizes."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditmoe_ds.models.dit import DiT, DiTConfig
from ditmoe_ds.models.embeddings import rotary_angles, rotate
from ditmoe_ds.models.init import InitialWeights
from ditmoe_ds.models.sizes import TEXT_SIZES, describe, named_config
from ditmoe_ds.moe.layer import MoE, Router
from ditmoe_ds.moe.routing import RouterConfig, expert_choice, expert_choice_capacity

B, N, D, E, F_C = 3, 24, 16, 4, 2.0


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def layer(experts=E, capacity=F_C, shared=0, **router):
    moe = MoE(D, experts, "expert", capacity, 32, shared, RouterConfig(**router), activation="gelu")
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe


def one_hot_einsum(moe, x, capacity):
    """Expert choice as its paper writes it, with a one-hot (pools, E, C, N) tensor."""
    router, packed, config = moe.deepspeed_moe.gate, moe.deepspeed_moe.experts.deepspeed_experts[0], moe.deepspeed_moe.gate.config
    pools = x if config.pool == "image" else x.reshape(1, -1, D)
    scores = F.linear(pools, router.weight).softmax(-1)
    weights, chosen = scores.transpose(1, 2).topk(round(pools.shape[1] * capacity / len(router.weight)))
    hot = F.one_hot(chosen, pools.shape[1]).float()
    taken = torch.einsum("pecn,pnd->pecd", hot, pools)
    hidden = F.gelu(torch.einsum("pecd,efd->pecf", taken, packed.w1) + packed.b1[:, None], approximate="tanh")
    out = torch.einsum("pecf,edf->pecd", hidden, packed.w2) + packed.b2[:, None]
    if config.renormalise:
        total = torch.einsum("pecn,pec->pn", hot, weights)
        weights = weights / torch.einsum("pecn,pn->pec", hot, total)
    routed = torch.einsum("pecn,pec,pecd->pnd", hot, weights * config.route_scale, out).reshape(x.shape)
    return routed + moe.shared_mlp(x) if moe.shared_mlp else routed


@pytest.mark.parametrize("pool", ["image", "microbatch"])
@pytest.mark.parametrize("options", [{}, {"renormalise": True, "route_scale": 2.5}, {"shared": 24}, {"capacity": 0.5}, {"capacity": 3.7}])
def test_gather_dispatch_is_the_one_hot_einsum(pool, options):
    moe, x, gradient = layer(pool=pool, **options), torch.randn(B, N, D), torch.randn(B, N, D)
    results = []
    for compute in (lambda x: moe(x)[0], lambda x: one_hot_einsum(moe, x, options.get("capacity", F_C))):
        moe.zero_grad()
        x = x.detach().requires_grad_()
        out = compute(x)
        out.backward(gradient)
        results.append([out, x.grad, *(parameter.grad.clone() for parameter in moe.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", ["image", "microbatch"])
def test_every_expert_takes_exactly_its_capacity(pool):
    moe = layer(capacity=1.0, pool=pool)
    _, selections, takers, _, _ = moe(torch.randn(B, N, D))
    assert selections.tolist() == [B * N * 1.0 / E] * E
    assert takers.sum() == B * N and (takers * torch.arange(E + 1)).sum() == B * N
    assignment, _ = moe.deepspeed_moe.gate(torch.randn(B, N, D))
    taken = assignment.tokens.view(E, -1)
    assert all(len(row.unique()) == len(row) for row in taken), "an expert took a token twice"
    if pool == "image":
        for expert in taken:
            assert expert.div(N, rounding_mode="floor").bincount().tolist() == [N * 1.0 / E] * B
    untaken = torch.ones(B * N, dtype=torch.bool).index_fill(0, assignment.tokens, False)
    assert untaken.any(), "the test sees no token that is left out"


def test_experts_take_the_tokens_that_score_best():
    scores = torch.rand(2, 6, 3)
    assignment = expert_choice(scores, (1, 1), RouterConfig())
    for expert, (tokens, weights) in enumerate(zip(assignment.tokens.view(3, 2, 2), assignment.weights.view(3, 2, 2), strict=True)):
        for pool in range(2):
            best = scores[pool, :, expert].topk(2)
            assert (tokens[pool] - 6 * pool).tolist() == best.indices.tolist() and torch.equal(weights[pool], best.values)


def test_capacity():
    sizes = (256, 32, (2, 1)), (9, 4, (1, 1)), (4, 64, (2, 1)), (8, 2, (3, 1))
    assert [expert_choice_capacity(*size) for size in sizes] == [16, 2, 1, 8]
    for tokens, experts, capacity in itertools.product((5, 16, 255, 1024), (2, 8, 32), (0.3, 1.1, 2.0, 3.7)):
        exact = tokens * capacity / experts
        assert abs(expert_choice_capacity(tokens, experts, capacity.as_integer_ratio()) - min(max(exact, 1), tokens)) <= 0.5


def tiny(**changes) -> DiTConfig:
    return replace(named_config("EC-DIT-Nano-4E"), text_width=12, input_size=8, **changes)


def model(config) -> DiT:
    made = DiT(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return made.eval()


def inputs(count=2, rows=8, columns=8):
    mask = torch.arange(5) < torch.tensor([5, 2, 1, 3])[:count, None]
    return torch.randn(count, 4, rows, columns), torch.rand(count) * 1000, torch.randn(count, 5, 12), mask


@pytest.mark.parametrize("config", [tiny(), tiny(positions="sincos"), tiny(qk_norm=False), tiny(router=RouterConfig(input="decoupled"))])
@torch.no_grad()
def test_an_image_does_not_depend_on_its_companions(config):
    net = model(config)
    x, t, text, mask = inputs(4)
    together = net(x, t, text=text, mask=mask)
    others = [torch.cat([part[:1], other[1:]]) for part, other in zip((x, t, text, mask), inputs(4), strict=True)]
    with_others = net(others[0], others[1], text=others[2], mask=others[3])
    assert torch.equal(together[0], with_others[0]) and not torch.equal(together[1], with_others[1])
    torch.testing.assert_close(net(x[:1], t[:1], text=text[:1], mask=mask[:1])[0], together[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_pool_of_the_microbatch_does_depend_on_them():
    net = model(tiny(router=RouterConfig(pool="microbatch")))
    x, t, text, mask = inputs()
    alone = net(x[:1], t[:1], text=text[:1], mask=mask[:1])
    assert not torch.allclose(net(x, t, text=text, mask=mask)[:1], alone, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 1e4])
@torch.no_grad()
def test_padding_of_the_text_changes_nothing(value):
    net = model(tiny())
    x, t, text, mask = inputs()
    wanted = net(x, t, text=text, mask=mask)
    changed = torch.where(mask[..., None], text, value)
    longer = torch.cat([changed, torch.full((2, 3, 12), 7.0)], dim=1)
    out = net(x, t, text=longer, mask=torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], dim=1))
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net(x, t, text=text + 0.1, mask=mask), wanted, atol=1e-3)


@pytest.mark.parametrize("positions", ["rope", "sincos"])
@torch.no_grad()
def test_masked_patches_keep_their_positions(positions):
    net = model(tiny(positions=positions))
    x, t, text, mask = inputs()
    whole = net(x, t, text=text, mask=mask)
    every = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(net(x, t, text=text, mask=mask, keep=every), whole, rtol=1e-5, atol=1e-6)
    # the upper left quarter is what it would be as a latent of its own, and nothing of the rest is looked at
    quarter, alone = torch.tensor([0, 1, 4, 5]).expand(2, -1), x[:, :, :4, :4]
    wanted = net(alone, t, text=text, mask=mask)
    for other in (x, x + torch.randn_like(x)):
        other[:, :, :4, :4] = alone
        out = net(other, t, text=text, mask=mask, keep=quarter)
        torch.testing.assert_close(out[:, :, :4, :4], wanted, rtol=1e-4, atol=1e-5)
        assert not out[:, :, 4:].any() and not out[:, :, :, 4:].any()
    # any other square is the same to rotated q and k, which only know distances, but not to added positions
    shifted, lower = torch.zeros_like(x), torch.tensor([10, 11, 14, 15]).expand(2, -1)
    shifted[:, :, 4:, 4:] = alone
    moved = net(shifted, t, text=text, mask=mask, keep=lower)[:, :, 4:, 4:]
    assert torch.allclose(moved, wanted, rtol=1e-4, atol=1e-4) == (positions == "rope")


@torch.no_grad()
def test_any_height_and_width():
    net = model(tiny())
    x, t, text, mask = inputs(rows=4, columns=12)
    out = net(x, t, text=text, mask=mask)
    assert out.shape == (2, 4, 4, 12)
    turned = net(x.transpose(2, 3), t, text=text, mask=mask)
    assert not torch.allclose(turned.transpose(2, 3), out, atol=1e-3)


def test_rotation_knows_distances_only():
    angles = rotary_angles(4, 5, 8, torch.device("cpu"))
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 20, 1, 8)
    rotation = angles[None].cos(), angles[None].sin()
    products = (rotate(q, *rotation)[0, :, 0] @ rotate(k, *rotation)[0, :, 0].T).view(4, 5, 4, 5)
    torch.testing.assert_close(products[0, 0, 1, 2], products[2, 1, 3, 3])
    assert abs(products[0, 0, 1, 2] - products[0, 0, 2, 1]) > 1e-3
    torch.testing.assert_close(rotate(q, *rotation).norm(dim=-1), q.norm(dim=-1))
    omega = [10000 ** (-i / 2) for i in range(2)]
    assert angles[2 * 5 + 3].tolist() == pytest.approx([place * w for place in (3, 2) for w in omega])  # row 2, column 3
    from_first = products[0, 0]  # a row further and a column further are each a distance of their own
    assert len({round(value, 4) for value in from_first.flatten().tolist()}) == from_first.numel()


@torch.no_grad()
def test_a_decoupled_router_does_not_see_the_modulation():
    for kind in ("decoupled", "modulated"):
        net = model(tiny(router=RouterConfig(input=kind)))
        seen = []
        for module in net.modules():
            if isinstance(module, Router):
                module.register_forward_hook(lambda module, args, out, seen=seen: seen.append(args[0]))
        x, t, text, mask = inputs()
        for scale in (1.0, 3.0):
            net.blocks[1].modulation[1].bias[4 * 64 : 5 * 64] = scale  # of the feed-forward
            net(x, t, text=text, mask=mask)
        assert torch.equal(seen[0], seen[2]) == (kind == "decoupled")
        assert seen[0].shape[-1] == (64 + 48 if kind == "decoupled" else 64)


@torch.no_grad()
def test_layers_may_have_capacities_of_their_own():
    net = model(tiny(router=RouterConfig(layer_capacity=(1.0, 3.0))))
    x, t, text, mask = inputs()
    _, stats = net(x, t, text=text, mask=mask, return_router=True)
    assert stats.selections.tolist() == [[2 * 16 * 1 / 4] * 4, [2 * 16 * 3 / 4] * 4]


CAPACITIES = [RouterConfig(), RouterConfig(capacity_factor=1.0), RouterConfig(layer_capacity=(1.0, 2.0))]


@pytest.mark.parametrize("routing,router", [("token", CAPACITIES[0]), *itertools.product(["expert", "dense"], CAPACITIES)])
def test_the_three_kinds_of_feed_forward_cost_the_same(routing, router):
    config = tiny(routing=routing, router=router)
    net = model(config)
    x, t, text, mask = inputs(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the only one that it counts
        net(x, t, text=text, mask=mask)
    counted = describe(config, text_tokens=5)
    routers = 0 if routing == "dense" else 2 * 16 * 4 * 64
    assert counter.get_total_flops() == 2 * counted["macs"]
    assert counted["total"] == sum(parameter.numel() for parameter in net.parameters())
    dense = describe(tiny(routing="dense", router=router), text_tokens=5)
    assert counted["macs"] - dense["macs"] == routers


PAPER = {"XL": 1.47, "XXL": 2.35, "3XL": 4.50, "M": 8.03}
TEXT_ENCODER = 0.67


@pytest.mark.parametrize("size", PAPER)
def test_dense_totals_are_the_papers_without_a_text_encoder(size):
    assert describe(named_config(f"EC-DIT-{size}"))["total"] / 1e9 == pytest.approx(PAPER[size] - TEXT_ENCODER, rel=0.05)


@pytest.mark.parametrize("name,total", [("XL-32E", 6.08), ("XXL-32E", 13.47), ("3XL-32E", 32.15), ("M-64E", 97.21)])
def test_sparse_totals_are_the_papers_without_a_text_encoder(name, total):
    assert describe(named_config(f"EC-DIT-{name}"))["total"] / 1e9 == pytest.approx(total - TEXT_ENCODER, rel=0.01)


@pytest.mark.parametrize("experts", [8, 16, 32, 64])
@pytest.mark.parametrize("size", TEXT_SIZES)
def test_what_experts_add_is_exact(size, experts):
    config = named_config(f"EC-DIT-{size}-{experts}E")
    ours, twin = describe(config), describe(replace(config, experts=0))
    increment = ours["total"] - twin["total"] - ours["parts"]["routers"]
    assert increment == (experts - 1) * 8 * config.hidden**2 * (config.depth // 2)
    assert ours["parts"]["routers"] == experts * config.hidden * config.depth // 2


@torch.no_grad()
def test_a_new_model_is_zero_and_each_block_the_identity():
    config = tiny()
    net = DiT(config)
    source = InitialWeights(net, 0)
    for name, parameter in net.named_parameters():
        source.read(name, 0, parameter.view(-1))
    x, t, text, mask = inputs()
    assert not net(x, t, text=text, mask=mask).any()
    tokens = torch.randn(2, 16, 64)
    out, *_ = net.blocks[1](tokens, torch.randn(2, 48), None, torch.randn(2, 5, 64), mask)
    assert torch.equal(out, tokens)


@torch.no_grad()
def test_a_saved_model_computes_what_it_did():
    """Nothing of EC-DIT is public to compare with, so that a change of what its weights mean would show nowhere else."""
    net = DiT(tiny()).eval()
    for i, parameter in enumerate(net.parameters()):
        parameter.copy_(waves(*parameter.shape, start=i) * 0.3)
    out = net(waves(2, 4, 8, 8), torch.tensor([40.0, 907.0]), text=waves(2, 5, 12), mask=torch.arange(5) < torch.tensor([[5], [3]]))
    wanted = [1.495438, 4.679048, 1.513229, 4.215637, -2.975962, 4.211140]
    assert out[:, 1, 2, ::3].flatten().tolist() == pytest.approx(wanted, rel=1e-4)


def waves(*shape, start=0):
    """Numbers in [-1, 1] that no library draws."""
    return torch.sin(0.37 * torch.arange(math.prod(shape), dtype=torch.float64).square() + start).view(shape).float()
