"""Run by test_moe.py with TRITON_INTERPRET=1: our Triton kernels give the same values as torch's operators."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from choices import CHOICES, ROUTERS, chosen_alike
from masters import squared_alike, stepped_alike
from norms import NORMS, gated_alike, heads_alike, normed_alike
from test_planning import MODELS, kept
from torch.nn import functional as F
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from ditmoe_ds.distributed import adamw, norm
from ditmoe_ds.launching import arithmetic
from ditmoe_ds.models import adaln, adaln_kernels, attention, embeddings, head_norm, rotary
from ditmoe_ds.models.embeddings import rotate
from ditmoe_ds.models.rotary import Rotate
from ditmoe_ds.moe import choosing, experts, kernels, layer, rows
from ditmoe_ds.moe.choosing import choose
from ditmoe_ds.moe.layer import MoE
from ditmoe_ds.moe.routing import RouterConfig, expert_choice, same_decisions, token_choice
from ditmoe_ds.planning.activations import MicroBatch, activations

NEAR = {torch.float32: dict(rtol=1e-5, atol=1e-5), torch.bfloat16: dict(rtol=2e-2, atol=2e-2)}


@pytest.fixture(autouse=True)
def at_hand(monkeypatch):
    monkeypatch.setattr(adaln, "adaln_kernels", adaln_kernels, raising=False)
    monkeypatch.setattr(attention, "head_norm", head_norm, raising=False)


@pytest.fixture(autouse=True)
def counting_loops(monkeypatch):
    """Triton 3.6 takes the ends of loops for arrays, of which numpy 2.4 makes no numbers."""
    set_attr = interpreter._LangPatchScope.set_attr

    def setting(self, place, name, value):
        set_attr(self, place, name, (lambda tensor: int(tensor.handle.data.squeeze())) if name == "__index__" else value)

    monkeypatch.setattr(interpreter._LangPatchScope, "set_attr", setting)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def minding_its_memory(monkeypatch):
    """Every launch reads and writes in its tensors alone, and no element twice: which of two writes stays, a GPU does not say."""
    launch, load, store = GridExecutor.__call__, InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    memory: list[range] = []
    written: set[int] = set()

    def launching(self, *arguments, **named):
        storages = [value.untyped_storage() for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)]
        memory[:] = [range(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
        if self.fn.__name__ in ("_adamw", "_square_sums"):  # are given tables of addresses
            memory[:] = [range(2**64)]
        written.clear()
        launch(self, *arguments, **named)

    def used(pointers, mask):
        places = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel().tolist()
        assert all(any(place in own for own in memory) for place in places), "outside of its tensors"
        assert written.isdisjoint(places), "used after it was written"
        return places

    def loading(self, pointers, mask, *rest):
        used(pointers, mask)
        return load(self, pointers, mask, *rest)

    def storing(self, pointers, value, mask, *rest):
        places = used(pointers, mask)
        written.update(places)
        assert len(set(places)) == len(places), "written twice"
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(GridExecutor, "__call__", launching)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", loading)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", storing)


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("rows, width", [(5, 8), (3, 1500), (0, 8)])
def test_swiglu(rows, width, dtype):
    x, upward = torch.randn(rows, 2 * width).to(dtype), torch.randn(rows, width).to(dtype)
    leaf = x.float().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    wanted = F.silu(gate) * up
    (plain_grad,) = torch.autograd.grad(wanted, leaf, upward.float())
    alone = kernels.swiglu_backward(x, upward, None)
    again = upward.clone()
    x_grad = kernels.swiglu_backward(x, again, again)
    assert torch.equal(alone, x_grad)
    for found, plain in ((kernels.swiglu(x), wanted), (again, wanted), (x_grad, plain_grad)):
        torch.testing.assert_close(found, plain.to(dtype), **NEAR[dtype])


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("rows, width", [(5, 8), (3, 1500), (0, 8)])
def test_gelu(rows, width, dtype):
    x, upward = (3 * torch.randn(rows, width)).to(dtype), torch.randn(rows, width).to(dtype)
    leaf = x.float().requires_grad_()
    wanted = F.gelu(leaf, approximate="tanh")
    (plain_grad,) = torch.autograd.grad(wanted, leaf, upward.float())
    x_grad = kernels.gelu_backward(x, upward)
    for found, plain in ((upward, wanted), (x_grad, plain_grad)):
        torch.testing.assert_close(found, plain.to(dtype), **NEAR[dtype])


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("width", [8, 1500])
@pytest.mark.parametrize("tokens", [[0, 2, 2, 5, 0, 1, 3, 3, 3, 5, 0], [5], []])  # of 6, some of which nobody takes
def test_rows_of_tokens(tokens, width, dtype):
    tokens = torch.tensor(tokens, dtype=torch.int64)
    rows, weights, upward = torch.randn(len(tokens), width).to(dtype), torch.rand(len(tokens)), torch.randn(6, width).to(dtype)
    found = torch.bincount(tokens, minlength=6).int()
    listed = torch.full((6, 5), -1, dtype=torch.int32)
    listed[torch.arange(5) < found[:, None]] = tokens.argsort(stable=True).int()
    leaves = rows.float().requires_grad_(), weights.clone().requires_grad_()
    weighted = torch.zeros(6, width).index_add(0, tokens, leaves[0] * leaves[1][:, None])
    plain = torch.zeros(6, width).index_add(0, tokens, rows.float())
    torch.testing.assert_close(kernels.sum_takings(rows, weights, listed, found), weighted.to(dtype), **NEAR[dtype])
    torch.testing.assert_close(kernels.sum_takings(rows, None, listed, found), plain.to(dtype), **NEAR[dtype])
    rows_grad, weights_grad = torch.autograd.grad(weighted, leaves, upward.float())
    own = kernels.weigh_backward(upward, rows, tokens, weights)
    torch.testing.assert_close(own[0], rows_grad.to(dtype), **NEAR[dtype])
    torch.testing.assert_close(own[1], weights_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", ROUTERS)
@pytest.mark.parametrize("tokens, experts, k", CHOICES)
def test_token_choice(tokens, experts, k, config):
    chosen_alike(tokens, experts, k, config)


@pytest.mark.parametrize("which", ["weights", "means"])
def test_token_choice_with_a_gradient_that_is_one_number(which):
    """``sum`` gives such a one; of the other output there is none."""
    logits, config, outcomes = torch.randn(40, 6, requires_grad=True), RouterConfig(route_scale=2.0), []
    for ours in (False, True):
        if ours:
            assignment, means = choose(logits, 2, config)
        else:
            scores = logits.softmax(-1)
            assignment, means = token_choice(scores, 2, config)[0], scores.mean(0)
        total = assignment.weights.sum() if which == "weights" else means.sum()
        outcomes.append(torch.autograd.grad(total, logits)[0])
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-5, atol=1e-6)


def test_token_choice_repeats_its_decisions():
    logits, other = torch.randn(2, 50, 8)
    first, again = same_decisions()
    with first:
        before, _ = choose(logits, 2, RouterConfig())
    with again:
        after, _ = choose(other, 2, RouterConfig())
    assert torch.equal(before.tokens, after.tokens) and torch.equal(before.counts, after.counts)
    chosen = other.softmax(-1)[after.tokens, torch.arange(8).repeat_interleave(after.counts)]
    torch.testing.assert_close(after.weights, chosen)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, -3.4e38])
def test_token_choice_of_what_is_not_finite(value):
    """Each token has K different experts still, so nothing is written elsewhere, and the loss shows it."""
    logits = torch.randn(40, 6)
    logits[7], logits[9, 2], logits[11, 1:] = value, value, value
    assignment, means = choose(logits, 3, RouterConfig())
    assert assignment.counts.sum() == 120 and torch.equal(assignment.tokens.bincount(), torch.full((40,), 3))
    expert = torch.arange(6).repeat_interleave(assignment.counts)
    assert len(torch.stack([assignment.tokens, expert]).unique(dim=1).t()) == 120
    assert means.isfinite().all() == (value == -3.4e38)


@pytest.mark.parametrize("config", [RouterConfig(), RouterConfig(pool="microbatch"), RouterConfig(capacity_factor=1.5)])
@pytest.mark.parametrize("images, tokens, experts", [(1, 5, 4), (3, 37, 6), (2, 700, 9)])
def test_takings_of_each_token(images, tokens, experts, config):
    scores, number = torch.randn(images, tokens, experts).softmax(-1), images * tokens
    if config.capacity_factor:
        assignment, _ = token_choice(scores.flatten(0, 1), 2, config)
    else:
        assignment = expert_choice(scores if config.pool == "image" else scores.reshape(1, number, experts), (2, 1), config)
    listed, found = kernels.list_takings(assignment.tokens, assignment.weights, number, experts)
    assert listed.shape == (number, experts) and listed.dtype == found.dtype == torch.int32
    filled = assignment.weights != 0
    assert filled.all() == (config.capacity_factor is None)
    for token, own in enumerate(listed):
        assert own[: found[token]].tolist() == torch.where(filled & (assignment.tokens == token))[0].tolist()


@pytest.mark.parametrize("choice", ["token", "expert"])
@pytest.mark.parametrize("config", [RouterConfig(z_alpha=0.1), RouterConfig(renormalise=True), RouterConfig(capacity_factor=0.8)])
def test_layer(monkeypatch, choice, config):
    """With all kernels in it. Without a residual stream beside them, which would drown what is wrong."""
    moe, x, upward = MoE(24, 6, choice, 2, 16, 8, config), torch.randn(3, 15, 24, requires_grad=True), torch.randn(3, 15, 24)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    outcomes = []
    for ours in (False, True):
        if ours:
            monkeypatch.setattr(rows, "kernels", kernels, raising=False)
            monkeypatch.setattr(layer, "choose", choose, raising=False)
            for module in (layer, rows):
                monkeypatch.setattr(module, "fused", lambda x: True)
        out, selections, takers, means, z = moe(x)
        grads = torch.autograd.grad((out * upward).sum() + means.square().sum() + z, [x, *moe.parameters()])
        outcomes.append([out, selections, takers, means, z, *grads])
    for found, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [[0, 3, 0, 2], [1, 1, 1, 1], [0, 0, 0, 0], [2, 0, 0, 0]])
@pytest.mark.parametrize("shape", [(30, 50), (400, 500)])  # a block and a half; more blocks than programs
def test_clear(shape, counts):
    counts = torch.tensor(counts)
    matrices = torch.full((4, *shape), torch.nan).bfloat16()
    kernels.clear(matrices, counts.cumsum(0).to(torch.int32))
    assert torch.equal(matrices.isnan(), (counts > 0)[:, None, None].expand_as(matrices)) and not matrices.nan_to_num().any()


def test_an_expert_without_rows_has_no_gradient(monkeypatch):
    """On Blackwell a grouped GEMM leaves its memory as it was."""
    real = F.grouped_mm

    def leaving(a, b, offs):
        out = real(a, b, offs=offs)
        return out.masked_fill((offs.diff(prepend=offs.new_zeros(1)) == 0)[:, None, None], torch.nan) if out.dim() == 3 else out

    monkeypatch.setattr(F, "grouped_mm", leaving)
    monkeypatch.setattr(experts, "leaves_gaps", lambda device: True)
    monkeypatch.setattr(experts, "kernels", kernels, raising=False)
    x, w1, w2 = torch.randn(6, 32), torch.randn(3, 128, 32, requires_grad=True), torch.randn(3, 32, 64, requires_grad=True)
    experts.ExpertFFN.apply(x, w1, None, w2, None, torch.tensor([4, 0, 2]), "grouped", "swiglu").sum().backward()
    for grad in (w1.grad, w2.grad):
        assert (grad[1] == 0).all() and grad.isfinite().all() and grad[0].norm() > 0 < grad[2].norm()


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("tables", [1, 2])  # one for all images, or each its own, where tokens are masked
@pytest.mark.parametrize("images, tokens, heads, width", [(2, 6, 3, 16), (2, 5, 18, 64), (2, 4, 1, 4), (0, 4, 1, 4)])
def test_rotate(images, tokens, heads, width, tables, dtype):
    whole, upward = torch.randn(images, tokens, heads + 1, width), torch.randn(images, heads, tokens, width)
    x, upward = whole.to(dtype).requires_grad_()[:, :, 1:], upward.to(dtype).transpose(1, 2)  # neither lies side by side
    angles = 3 * torch.randn(min(tables, images) or 1, tokens, width // 2)
    outcomes = []
    for function in (rotate, Rotate.apply):
        out = function(x, angles.cos(), angles.sin())
        outcomes.append((out, *torch.autograd.grad(out, x, upward)))
    for found, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, plain, **NEAR[dtype])


@pytest.fixture
def a_sound_device(monkeypatch):
    """It computes with our kernels what is in bf16; what is in fp32 is computed by torch, as on a CPU."""
    monkeypatch.setattr(rows, "kernels", kernels, raising=False)
    monkeypatch.setattr(layer, "choose", choose, raising=False)
    forward, ours = MoE.forward, False

    def telling(self, x):
        nonlocal ours
        ours = x.dtype == torch.bfloat16
        return forward(self, x)

    monkeypatch.setattr(MoE, "forward", telling)
    for module in (layer, rows):
        monkeypatch.setattr(module, "fused", lambda x: ours)
    for module in (adaln, attention):
        monkeypatch.setattr(module, "fused", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(norm, "PROGRAMS", 20)  # of 32,768 the interpreter would run each
    monkeypatch.setattr(arithmetic, "rotate", lambda x, *turns: (Rotate.apply if x.dtype == torch.bfloat16 else rotate)(x, *turns))


FAULTS = {
    "a layer with token choice": ((choosing.TokenChoice, "backward"), lambda found: (found[0] * 1.05, *found[1:])),
    "a layer with expert choice": ((kernels, "list_takings"), lambda found: (found[0], found[1] - 1)),
    "RoPE": ((rotary, "turn"), lambda found: torch.cat([found[:-1], 2 * found[-1:]])),
    "adaLN": ((adaln_kernels, "_launch_backward"), lambda found: (found[0], found[1], found[2] * 1.05)),
    "LayerNorm of heads": ((head_norm.HeadNorm, "backward"), lambda found: (found[0], found[1] * 1.05, *found[2:])),
    "AdamW": ((adamw, "blocks_of"), lambda found: found[:-1]),
}


def test_the_doctor_finds_a_device_sound(a_sound_device):
    assert arithmetic.wrong_on(torch.device("cpu")) is None


@pytest.mark.parametrize("name", FAULTS)
def test_the_doctor_tells_what_a_device_computes_wrong(a_sound_device, monkeypatch, name):
    (place, attribute), fault = FAULTS[name]
    right = getattr(place, attribute)
    monkeypatch.setattr(arithmetic, "CHECKS", {name: arithmetic.CHECKS[name]})
    monkeypatch.setattr(place, attribute, lambda *given, **named: fault(right(*given, **named)))
    assert re.fullmatch(rf"{name} differs from the CPU's by \d+\.\d%", arithmetic.wrong_on(torch.device("cpu")))


def test_the_doctor_tells_what_a_device_cannot_compute(a_sound_device, monkeypatch):
    monkeypatch.setattr(kernels, "swiglu", lambda x: 1 / 0)
    wanted = "a layer with token choice fails: ZeroDivisionError: division by zero"
    assert arithmetic.wrong_on(torch.device("cpu")) == wanted


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("shape", [(3, 75, 24), (2, 40, 16), (1, 3, 1100)])
@pytest.mark.parametrize("dtype", NEAR)
def test_adaln(kind, shape, dtype, monkeypatch):
    monkeypatch.setattr(adaln_kernels, "PROGRAMS", 20)  # so that programs have several tokens, also where they do not divide an image's
    normed_alike("cpu", shape, dtype, *NORMS[kind], monkeypatch)


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("shape", [(2, 40, 3, 24), (3, 5, 2, 16)])
def test_heads(shape, dtype, monkeypatch):
    monkeypatch.setattr(head_norm, "EACH", 3)
    monkeypatch.setattr(head_norm, "PROGRAMS", 7)
    heads_alike("cpu", shape, dtype, monkeypatch)


@pytest.mark.parametrize("dtype", NEAR)
def test_the_gate(dtype, monkeypatch):
    gated_alike("cpu", (3, 75, 24), dtype, monkeypatch)


def test_the_norm(monkeypatch):
    monkeypatch.setattr(norm, "PROGRAMS", 10)
    squared_alike("cpu")


def test_adamw():
    stepped_alike("cpu", rounding=2**-7)  # the interpreter rounds towards zero


@pytest.mark.parametrize("name", ["DiT-MoE, shared experts", "EC-DIT with text"])
def test_what_kernels_spare_is_planned(name, monkeypatch):
    """Of what autograd keeps by torch's operators; more by the final layer's norm, which is planned as if kept."""
    model = replace(MODELS[name], input_size=8, depth=2 + MODELS[name].sparse_first)
    batch = MicroBatch(model, 2, model.tokens, 7 if model.text_width else 0, 1, 2)
    by_operators = kept(batch, torch.bfloat16, recompute=False)
    monkeypatch.setattr(embeddings, "rotary", rotary, raising=False)
    monkeypatch.setattr(rows, "kernels", kernels, raising=False)
    monkeypatch.setattr(layer, "choose", choose, raising=False)
    for module in (adaln, attention, embeddings, layer, rows):
        monkeypatch.setattr(module, "fused", lambda x: True)
    spared = by_operators - kept(batch, torch.bfloat16, recompute=False)
    assert spared == pytest.approx(activations(replace(batch, cuda=False), False).kept - activations(batch, False).kept, rel=0.15)
    assert spared > 0.08 * by_operators
