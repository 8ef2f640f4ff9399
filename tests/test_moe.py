"""Routing, packed experts, the layer in one process."""

import math
import os
import subprocess
import sys

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.moe.utils import has_moe_layers, is_moe_param
from processes import ROOT
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ditmoe_ds.models.dit import DenseMLP
from ditmoe_ds.moe import dispatch
from ditmoe_ds.moe import rows as rows_of
from ditmoe_ds.moe.experts import ExpertFFN, PackedExperts, fastest_kernel, leaves_gaps
from ditmoe_ds.moe.layer import MoE, Router, in_halves
from ditmoe_ds.moe.routing import RouterConfig, balance_loss, count, token_choice, token_choice_capacity
from ditmoe_ds.moe.rows import activate

T, E, D = 50, 5, 16


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def layer(top_k=2, shared=8, **router):
    moe = MoE(D, E, "token", top_k, 24, shared, RouterConfig(**router))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe


def by_loop(moe, x, weights_of=lambda scores, chosen: scores.gather(1, chosen)):
    """The layer as one would first write it: a loop over tokens and their experts."""
    core = moe.deepspeed_moe
    packed = core.experts.deepspeed_experts[0]
    scores = (x @ core.gate.weight.t()).softmax(-1)
    chosen = scores.topk(core.gate.experts_per_token).indices
    weights = weights_of(scores, chosen)
    rows = []
    for i, token in enumerate(x):
        out = moe.shared_mlp(token) if moe.shared_mlp else torch.zeros_like(token)
        for weight, e in zip(weights[i], chosen[i]):
            out = out + weight * (packed.w2[e] @ activate(packed.w1[e] @ token, packed.activation))
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_layer_is_the_loop(top_k):
    moe, x = layer(top_k, z_alpha=0.1), torch.randn(T, D)
    out, selections, takers, mean_scores, z = moe(x.view(2, 25, D))
    torch.testing.assert_close(out.view(T, D), by_loop(moe, x), rtol=1e-4, atol=1e-5)
    assert selections.sum() == T * top_k and takers.tolist() == [T if k == top_k else 0 for k in range(E + 1)]
    logits = x @ moe.deepspeed_moe.gate.weight.t()
    torch.testing.assert_close(mean_scores, logits.softmax(-1).mean(0))
    torch.testing.assert_close(z, logits.logsumexp(-1).square().mean())
    assert layer(top_k)(x.view(2, 25, D))[4] == 0


def test_renormalise_and_route_scale():
    moe, x = layer(renormalise=True, route_scale=2.5), torch.randn(T, D)

    def scaled(scores, chosen):
        kept = scores.gather(1, chosen)
        return 2.5 * kept / kept.sum(1, keepdim=True)

    outputs, leaves, upward = (moe(x[None])[0][0], by_loop(moe, x, scaled)), list(moe.parameters()), torch.randn(T, D)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(out, leaves, upward) for out in outputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_of_many_experts_each_has_its_takings_together():
    """Of more than eight bits can number."""
    scores = torch.eye(300)[torch.randperm(300)]
    assignment, chosen = token_choice(scores, 1, RouterConfig())
    assert assignment.counts.tolist() == [1] * 300 and chosen[assignment.tokens, 0].tolist() == list(range(300))


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_forced_balance(top_k):
    """Tokens take experts in turn, whatever the scores, which are still the weights and get their gradients."""
    scores = torch.randn(48, E).softmax(-1).requires_grad_()
    assignment, chosen = token_choice(scores, top_k, RouterConfig(force_balance=True))
    assert chosen.flatten().tolist() == [i % E for i in range(48 * top_k)]
    assert all(len(set(own)) == top_k for own in chosen.tolist()) and assignment.counts.max() - assignment.counts.min() <= 1
    expert = torch.arange(E).repeat_interleave(assignment.counts)
    assert torch.equal(assignment.weights, scores[assignment.tokens, expert])
    assert torch.equal(torch.autograd.grad(assignment.weights.sum(), scores)[0], torch.zeros(48, E).scatter(1, chosen, 1.0))


def test_deepspeed_knows_the_layer():
    moe = layer()
    assert isinstance(moe, DeepSpeedMoE) and has_moe_layers(moe) == (True, E)
    tagged = {name for name, parameter in moe.named_parameters() if is_moe_param(parameter)}
    assert tagged == {f"deepspeed_moe.experts.deepspeed_experts.0.{w}" for w in ("w1", "w2")}


def test_no_shared_path():
    moe, x = layer(shared=0), torch.randn(T, D)
    torch.testing.assert_close(moe(x[None])[0][0], by_loop(moe, x), rtol=1e-4, atol=1e-5)


def test_what_is_computed_while_tokens_are_on_their_way(monkeypatch):
    """The shared path, forward and backward, each of the four transfers beside half of it; and, while their numbers are asked for, the
    order in which they are summed. One rank is its own peer."""
    events = []

    class Work:
        def __init__(self, *copy):
            self.copy = copy
            events.append("begin")

        def wait(self):
            self.copy[0].copy_(self.copy[1])  # not before: what is computed meanwhile cannot have used it
            events.append("end")

    def transfer(out, rows, *_, async_op, **__):
        return Work(out.fill_(torch.nan if out.is_floating_point() else -1), rows)

    monkeypatch.setattr(dispatch.dist, "all_to_all_single", transfer)
    monkeypatch.setattr(dispatch.dist, "get_world_size", lambda group: 1)
    monkeypatch.setattr("ditmoe_ds.moe.layer.by_token", lambda *given: events.append("by token") or rows_of.by_token(*given))
    moe, x = layer(), torch.randn(T, D, requires_grad=True)
    moe.deepspeed_moe.ep_size = 2
    moe.deepspeed_moe._set_ep_group(None)
    for name in ("w1", "w2"):
        linear = getattr(moe.shared_mlp, name)
        linear.register_forward_hook(lambda *_, name=name: events.append(name))
        linear.weight.register_post_accumulate_grad_hook(lambda _, name=name: events.append(f"gradient of {name}"))
    found = []
    for compute in (lambda: moe(x[None])[0][0], lambda: by_loop(moe, x)):
        out = compute()
        moe.zero_grad()
        x.grad = None
        out.square().sum().backward()
        found.append([out, x.grad, *(parameter.grad for parameter in moe.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    forward = ["begin", "by token", "end", "begin", "w1", "end", "begin", "w2", "end"]
    assert events[:15] == [*forward, "begin", "gradient of w2", "end", "begin", "gradient of w1", "end"]


def test_an_expert_without_tokens_gets_a_zero_gradient():
    moe, x = layer(), torch.randn(1, T, D).abs()
    with torch.no_grad():
        moe.deepspeed_moe.gate.weight[3] = -100.0  # positive tokens: never chosen
    out, selections, *_ = moe(x)
    out.sum().backward()
    packed = moe.deepspeed_moe.experts.deepspeed_experts[0]
    assert selections[3] == 0
    assert packed.w1.grad[3].abs().sum() == 0 and packed.w2.grad[3].abs().sum() == 0
    assert packed.w1.grad[selections.argmax()].abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in moe.parameters())


def test_capacity_drops_the_last_second_choices_first():
    scores = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.2, 0.8], [0.9, 0.1]])
    assignment, chosen = token_choice(scores, 2, RouterConfig(capacity_factor=0.5))  # 2 of 4 tokens per expert
    assert chosen.shape == (4, 2)
    assert assignment.counts.tolist() == [2, 2]
    assert assignment.tokens.tolist() == [0, 1, 2, 0]  # expert 0: first choices of 0, 1 (3 is too late); 1: 2, then 0's second
    assert assignment.weights.tolist() == pytest.approx([0.6, 0.7, 0.8, 0.4])


def test_a_capacity_is_rounded_up():
    assert [token_choice_capacity(tokens, 4, 1.0) for tokens in (1, 8, 9, 10)] == [1, 2, 3, 3] and token_choice_capacity(3, 4, 8.0) == 3


def test_enough_capacity_drops_nothing():
    scores = torch.randn(T, E).softmax(-1)
    free, _ = token_choice(scores, 2, RouterConfig())
    capped, _ = token_choice(scores, 2, RouterConfig(capacity_factor=float(E)))
    assert capped.equal and capped.counts.tolist() == [T] * E  # no expert takes a token twice
    filled = capped.weights.view(E, T) != 0
    assert filled.sum(1).tolist() == free.counts.tolist()
    assert torch.equal(capped.tokens.view(E, T)[filled], free.tokens) and torch.equal(capped.weights.view(E, T)[filled], free.weights)


@pytest.mark.parametrize("factor", [0.4, 1.0, 1.7, float(E)])
def test_a_capacity_is_the_loop_without_what_was_dropped(factor):
    """Empty places add nothing: not to the output, not to a gradient, not to the statistics."""
    moe, x = layer(capacity_factor=factor), torch.randn(1, T, D)
    capacity, taken = min(math.ceil(factor * T * 2 / E), T), []

    def kept_weights(scores, chosen):
        assert selections.tolist() == chosen.flatten().bincount(minlength=E).tolist()
        weights, load = scores.gather(1, chosen), [0] * E
        kept = torch.zeros_like(weights)
        for choice in range(2):
            for token in range(T):
                e = int(chosen[token, choice])
                if load[e] < capacity:
                    load[e] += 1
                    kept[token, choice] = 1
        taken.append(kept.sum(1))
        return weights * kept

    leaves, upward = list(moe.parameters()), torch.randn(T, D)
    out, selections, takers, *_ = moe(x)
    wanted = by_loop(moe, x[0], kept_weights)
    torch.testing.assert_close(out[0], wanted, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(out[0], leaves, upward), torch.autograd.grad(wanted, leaves, upward, materialize_grads=True)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert takers.tolist() == torch.bincount(taken[0].long(), minlength=E + 1).tolist()


def test_balance_loss_is_alpha_at_perfect_balance():
    assert balance_loss(torch.full((E,), 7), torch.full((E,), 1 / E), 0.005) == pytest.approx(0.005)
    assert balance_loss(torch.full((3, E), 7), torch.full((3, E), 1 / E), 0.005) == pytest.approx(0.015)
    collapsed = torch.tensor([1.0] + [0.0] * (E - 1))
    assert balance_loss(collapsed * 9, collapsed, 0.005) == pytest.approx(0.005 * E)


def test_balance_gradient_scales_with_the_loss():
    """fp16's loss scaling multiplies the loss; the unscaled router gradient must not change."""
    moe, x = layer(), torch.randn(1, T, D)
    gradients = []
    for scale in (1.0, 65536.0):
        moe.zero_grad()
        _, selections, _, mean_scores, _ = moe(x)
        (scale * balance_loss(selections, mean_scores, 0.005)).backward()
        gradients.append(moe.deepspeed_moe.gate.weight.grad / scale)
    assert gradients[0].norm() > 1e-5
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=0)


def test_balance_loss_pushes_towards_balance():
    scores = torch.randn(T, E, requires_grad=True)
    with torch.no_grad():
        scores[:, 0] += 3
    soft = scores.softmax(-1)
    balance_loss(count(soft.topk(2).indices, E), soft.mean(0), 1.0).backward()
    assert scores.grad[:, 0].mean() > 0 > scores.grad[:, 1:].mean()


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize(
    "kernel, counts",
    [
        *((kernel, counts) for kernel in ("each", "grouped") for counts in ([10, 0, 25, 15], [0, 0, 0, 50], [0, 0, 0, 0])),
        *(("batched", counts) for counts in ([7] * 4, [9] * 5, [4])),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_kernels_are_plain_operations(kernel, counts, activation, dtype):
    if kernel == "grouped" and dtype == torch.float64:
        dtype = torch.float32
    experts, x = PackedExperts(len(counts), 32, 64, activation), torch.randn(sum(counts), 32, requires_grad=True)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    experts, upward = experts.to(dtype), torch.randn_like(x)
    leaves = [x, *experts.parameters()]
    wanted = []
    for e, rows in enumerate(x.to(dtype).split(counts)):
        w1, b1, w2, b2 = (None if w is None else w[e] for w in (experts.w1, experts.b1, experts.w2, experts.b2))
        wanted.append(torch.nn.functional.linear(activate(torch.nn.functional.linear(rows, w1, b1), activation), w2, b2))
    out = ExpertFFN.apply(x.to(dtype), experts.w1, experts.b1, experts.w2, experts.b2, torch.tensor(counts), kernel, activation)
    tolerance = dict(rtol=5e-2, atol=5e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, torch.cat(wanted), **tolerance)
    for a, b in zip(*(torch.autograd.grad(y, leaves, upward.to(dtype)) for y in (out, torch.cat(wanted)))):
        torch.testing.assert_close(a, b, **tolerance)


def test_grouped_kernels_are_for_gpus_that_have_one(monkeypatch):
    gpu, bf16 = torch.device("cuda"), torch.bfloat16
    for capability, kernel in {(8, 0): "each", (8, 9): "each", (9, 0): "grouped", (10, 3): "grouped", (12, 0): "each"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert fastest_kernel(gpu, bf16, equal=False) == kernel
        assert fastest_kernel(gpu, torch.float32, equal=False) == "each" and fastest_kernel(gpu, bf16, equal=True) == "batched"
        assert leaves_gaps(gpu) == (capability == (10, 3)) and not leaves_gaps(torch.device("cpu"))
    assert fastest_kernel(torch.device("cpu"), bf16, equal=False) == "each"


@pytest.mark.parametrize("choice, kernel", [("token", "grouped"), ("expert", "batched")])
def test_a_gpu_is_never_waited_for(choice, kernel):
    """Fake tensors have shapes and no values: whatever asks the device for one, fails."""
    with FakeTensorMode():
        router, packed = Router(64, 8, choice, 2, RouterConfig()), PackedExperts(8, 64, 128, "gelu")
        x = torch.randn(2, 48, 64, requires_grad=True)
        assignment, _ = router(x)
        rows = x.flatten(0, 1).index_select(0, assignment.tokens)
        tensors = [tensor.bfloat16() for tensor in (rows, packed.w1, packed.b1, packed.w2, packed.b2)]
        ExpertFFN.apply(*tensors, assignment.counts, kernel, "gelu").sum().backward()
        assert all(p.grad.shape == p.shape for p in packed.parameters())
        with pytest.raises(DataDependentOutputException):
            ExpertFFN.apply(*tensors, assignment.counts, "each", "gelu")


def test_kernels_of_a_gpu_are_torchs_operators():
    """By Triton's interpreter, in a process of its own: Triton decides while it is imported whether to interpret."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "interpreted_kernels.py")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | dict(TRITON_INTERPRET="1"), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "128 passed" in done.stdout, done.stdout[-6000:]


@pytest.mark.parametrize("kind", ["90", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("80", "89", "100", "120", "gfx942"))])
def test_kernels_of_a_gpu_compile_for_one(kind):
    """To the machine's code, which an interpreter does not make."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "compiled_kernels.py")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | dict(KERNELS_FOR=kind), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "12 passed" in done.stdout, done.stdout[-6000:]


def test_a_router_with_matrix_units_has_the_same_gradients(monkeypatch):
    """They take bf16 alone; two such numbers hold a gradient's first 16 bits."""
    grad, x, weight = torch.randn(300, 8) * torch.logspace(-6, 0, 8), torch.randn(300, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    x_grad, weight_grad = in_halves(grad, x, weight)
    assert x_grad.dtype == torch.bfloat16 and weight_grad.dtype == torch.float32
    torch.testing.assert_close(x_grad.double(), grad.double() @ weight.double(), rtol=2**-8, atol=2**-14)
    exact = grad.double().t() @ x.double()
    assert ((weight_grad - exact).norm(dim=1) < 1e-5 * exact.norm(dim=1)).all()


def test_the_router_keeps_its_input_as_it_came():
    router = Router(D, E, "token", 2, RouterConfig(z_alpha=0.1)).bfloat16()
    torch.nn.init.normal_(router.weight)
    x, kept = torch.randn(2, 25, D).bfloat16().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        _, stats = router(x)
    assert [tensor.dtype for tensor in kept if tensor.numel() == x.numel()] == [torch.bfloat16]
    plain = torch.nn.functional.linear(x.float(), router.weight.float())
    ours, theirs = (torch.autograd.grad(z, [x, router.weight]) for z in (stats.z, plain.logsumexp(-1).square().mean()))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_experts_keep_no_weights_for_backward():
    """ZeRO-3 takes a layer's memory away after its forward and gathers it anew for its backward."""
    experts, x = PackedExperts(3, D, 4 * D), torch.randn(6, D, requires_grad=True)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    gradients = []
    for taken in (False, True):
        loss = experts(x, torch.tensor([2, 4, 0])).square().sum()
        if taken:
            for parameter in experts.parameters():
                gathered, parameter.data = parameter.data, parameter.data.clone()
                gathered.fill_(torch.nan)
        gradients.append(torch.autograd.grad(loss, [x, *experts.parameters()]))
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


@pytest.mark.parametrize("counts", [[2, 4, 0], [0, 6, 0], [3, 1, 2], [0, 0, 0]])
def test_gelu_experts_are_the_dense_mlp(counts):
    experts, mlps, x = PackedExperts(3, D, 4 * D, "gelu"), [DenseMLP(D, 4 * D, True) for _ in counts], torch.randn(sum(counts), D)
    with torch.no_grad():
        for e, mlp in enumerate(mlps):
            for packed, own in zip((experts.w1, experts.b1, experts.w2, experts.b2), (*mlp.w1.parameters(), *mlp.w2.parameters())):
                packed[e] = own
    out = experts(x, torch.tensor(counts))
    wanted = torch.cat([mlp(rows)[0] for mlp, rows in zip(mlps, x.split(counts))])
    torch.testing.assert_close(out, wanted)
    out.square().sum().backward()
    wanted.square().sum().backward()
    for e, mlp in enumerate(mlps):
        for packed, own in zip((experts.w1, experts.b1, experts.w2, experts.b2), (*mlp.w1.parameters(), *mlp.w2.parameters())):
            torch.testing.assert_close(packed.grad[e], own.grad, rtol=1e-4, atol=1e-5)


def test_router_computes_in_fp32_under_bf16():
    moe = layer().bfloat16()
    seen = []
    moe.deepspeed_moe.gate.register_forward_hook(lambda module, args, out: seen.append(out[0].weights.dtype))
    out, *_ = moe(torch.randn(1, T, D, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and seen == [torch.float32]


def test_takings_in_bf16_are_weighed_and_summed_in_fp32():
    """Of numbers that fp32 adds exactly, in any order, and bf16 does not hold."""
    rows, upward = (torch.randint(-8, 9, (number, D)).bfloat16() for number in (300, 5))
    weights, tokens, outputs = torch.randint(1024, (300,)) / 1024, torch.arange(300) % 5, []
    leaves = rows.requires_grad_(), weights.requires_grad_()
    for out in (rows_of.Combine.apply(rows, tokens, weights, 5, None, None), (weights[:, None] * rows).view(60, 5, D).sum(0).bfloat16()):
        outputs.append((out, *torch.autograd.grad(out, leaves, upward)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*outputs, strict=True))
