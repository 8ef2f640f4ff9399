"""Run by test_recompute.py: blocks that torch.compile has traced with our Triton kernels in them give the same gradients.

In a process of its own, since torch is made to believe in a GPU. When a graph launches a kernel, torch's operators do what
``interpreted_kernels.py`` has found the kernel to do.
"""

import math
from collections import Counter

import pytest
import torch
import triton
from test_recompute import ROUTINGS, disturbed, gradients
from torch._C import DispatchKey
from torch._dynamo.utils import counters
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget

from ditmoe_ds.models import adaln, adaln_kernels, attention
from ditmoe_ds.models import head_norm as head_norm_kernels
from ditmoe_ds.models.adaln import EPS
from ditmoe_ds.moe import experts, kernels, layer, rows
from ditmoe_ds.moe.choosing import choose


class Driver:
    """Of a GPU that is not there. Triton asks for its kind when torch looks for what a kernel overwrites."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def swiglu(x, out, **_):
    gate, up = x.float().chunk(2, -1)
    out.copy_(F.silu(gate) * up)


def swiglu_backward(x, grad, x_grad, again=None, **_):
    leaf = x.float().requires_grad_()
    with torch.enable_grad():
        gate, up = leaf.chunk(2, -1)
        value = F.silu(gate) * up
    x_grad.copy_(*torch.autograd.grad(value, leaf, grad.float()))
    if again is not None:
        again.copy_(value)  # perhaps over grad


def gelu_backward(x, grad, x_grad, **_):
    leaf = x.float().requires_grad_()
    with torch.enable_grad():
        value = F.gelu(leaf, approximate="tanh")
    x_grad.copy_(*torch.autograd.grad(value, leaf, grad.float()))
    grad.copy_(value)


def list_rows(tokens, weights, by_expert, rows, each, **_):
    row = torch.arange(rows)[weights != 0]
    by_expert[tokens[row], row // each] = row.int()


def chose(logits, chosen, taken, sums, given, BLOCK, K, **_):
    scores = logits.softmax(-1)
    if not given:
        chosen.copy_(scores.topk(K, dim=-1).indices)
    for block, (one, of_one) in enumerate(zip(chosen.split(BLOCK), scores.split(BLOCK), strict=True)):
        taken[:, block], sums[block] = one.flatten().bincount(minlength=len(taken)), of_one.sum(0)


def place(logits, chosen, tokens, weights, listed, scale, renormalise, **_):
    order = chosen.flatten().argsort(stable=True)
    tokens.copy_(order // chosen.shape[1])
    listed.view(-1)[order] = torch.arange(len(order), dtype=torch.int32)
    kept = logits.softmax(-1).gather(1, chosen.long())
    weights.copy_((scale * kept / (kept.sum(1, keepdim=True) if renormalise else 1)).flatten()[order])


def choose_backward(logits, chosen, listed, weights_grad, means_grad, logits_grad, scale, renormalise, **_):
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        scores = leaf.softmax(-1)
        kept = scores.gather(1, chosen.long())
        weights = scale * kept / (kept.sum(1, keepdim=True) if renormalise else 1)
        value = (weights * weights_grad[listed.long()]).sum() + (scores.mean(0) * means_grad).sum()
    logits_grad.copy_(*torch.autograd.grad(value, leaf))


def pack(by_expert, listed, found, **_):
    there = by_expert >= 0
    found.copy_(there.sum(1))
    listed.copy_(by_expert.gather(1, (~there).int().argsort(dim=1, stable=True)))


def sum_takings(rows, listed, out, weights=None, found=None, **_):
    weighted = rows.float() if weights is None else rows.float() * weights[:, None]
    there = torch.ones_like(listed) if found is None else torch.arange(listed.shape[1]) < found[:, None]
    token, place = torch.where(there)
    out.copy_(torch.zeros(out.shape).index_add_(0, token, weighted[listed[token, place].long()]))


def weigh_backward(grad, rows, tokens, weights, rows_grad, weights_grad, **_):
    upward = grad.float()[tokens]
    rows_grad.copy_(upward * weights[:, None])
    weights_grad.copy_((upward * rows.float()).sum(1))


def normed(value, scale, shift):
    value = F.layer_norm(value, value.shape[-1:], eps=EPS)
    return value if scale is None else value * (1 + scale.float()) + shift.float()


def add_norm(x, branch, gate, shift, scale, total, out, BRANCH, GATE, NORM, MODULATED, **_):
    value = x.float()
    if BRANCH:
        total.copy_(value + branch.float() * (gate.float() if GATE else 1))
        value = total.float()
    if NORM:
        out.copy_(normed(value, scale if MODULATED else None, shift))


def add_norm_backward(total_grad, out_grad, total, branch, gate, scale, x_grad, branch_grad, parts, GATE, NORM, MODULATED, **_):
    grad, parts = total_grad.float(), parts.zero_()
    if NORM:
        leaf, shift, factor = (each.detach().float().requires_grad_() for each in (total, torch.zeros_like(scale), scale))
        with torch.enable_grad():
            value = normed(leaf, factor if MODULATED else None, shift)
        wanted = [leaf, shift, factor] if MODULATED else [leaf]
        found, *of_condition = torch.autograd.grad(value, wanted, out_grad.float())
        grad = grad + found
        x_grad.copy_(grad)
        for part, one in zip(parts, of_condition):
            part[:, :1] = one
    if GATE:
        parts[-1, :, :1] = (grad * branch.float()).sum(1, keepdim=True)
        branch_grad.copy_(grad * gate.float())


def head_norm(x, weight, bias, out, eps, **_):
    out.copy_(F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps))


def head_norm_backward(x, grad, weight, x_grad, parts, eps, **_):
    leaf, factor, shift = (each.detach().float().requires_grad_() for each in (x, weight, torch.zeros_like(weight)))
    with torch.enable_grad():
        value = F.layer_norm(leaf, factor.shape, factor, shift, eps)
    found, *of_weights = torch.autograd.grad(value, [leaf, factor, shift], grad.float())
    x_grad.copy_(found)
    parts.zero_()[0] = torch.stack(of_weights)


def clear(matrices, ends, **_):
    matrices[ends.diff(prepend=ends.new_zeros(1)) == 0] = 0.0


BOTH = {
    f"_{f.__name__}": f
    for f in (swiglu, swiglu_backward, sum_takings, weigh_backward, add_norm, add_norm_backward, head_norm, head_norm_backward)
}
EQUAL, UNEQUAL = (
    {"_list": list_rows, "_pack": pack},
    {"_choose": chose, "_place": place, "_choose_backward": choose_backward, "_clear": clear},
)
GELU = {"_gelu_backward": gelu_backward}
PLAIN = BOTH | EQUAL | UNEQUAL | GELU


@pytest.fixture
def ran(monkeypatch):
    """How often each kernel was launched by a graph."""
    found = Counter()

    def launch(*, kernel_idx, constant_args_idx, grid, tma_descriptor_metadata, kwargs):
        kernel, constants = kernel_side_table.get_kernel(kernel_idx), kernel_side_table.get_constant_args(constant_args_idx)
        jitted = kernel.fn if isinstance(kernel, triton.runtime.Autotuner) else kernel
        name = jitted.__name__
        found[name] += 1
        for parameter in jitted.params:
            number = constants.get(parameter.name)
            assert parameter.is_constexpr or not isinstance(number, float), f"{parameter.name}: a compiler would give it in fp64"
        PLAIN[name](**kwargs, **constants)

    triton.runtime.driver.set_active(Driver())
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda **_: True)
    monkeypatch.setitem(triton_kernel_wrapper_mutation.py_kernels, DispatchKey.CompositeExplicitAutograd, launch)
    triton_kernel_wrapper_mutation._dispatch_cache.clear()
    monkeypatch.setattr(rows, "kernels", kernels, raising=False)
    monkeypatch.setattr(adaln, "adaln_kernels", adaln_kernels, raising=False)
    monkeypatch.setattr(attention, "head_norm", head_norm_kernels, raising=False)
    monkeypatch.setattr(layer, "choose", choose, raising=False)
    for module in (adaln, attention, layer, rows):
        monkeypatch.setattr(module, "fused", lambda x: torch.compiler.is_compiling())  # the final layer is not compiled
    monkeypatch.setattr(experts, "kernels", kernels, raising=False)
    monkeypatch.setattr(experts, "leaves_gaps", lambda device: True)
    monkeypatch.setattr(experts, "fastest_kernel", lambda device, dtype, equal: "batched" if equal else "grouped")
    torch._dynamo.reset()
    counters.clear()
    return found


@pytest.mark.parametrize("again", [False, "attention"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("options", ROUTINGS.values(), ids=ROUTINGS)
def test_a_compiled_block_with_kernels_is_the_block(ran, monkeypatch, options, activation, again):
    model = disturbed(expert_activation=activation, qk_norm=True, **options).bfloat16()
    model.checkpoint_activations = again
    with monkeypatch.context() as without:
        for module in (adaln, attention, layer, rows):
            without.setattr(module, "fused", lambda x: False)
        without.setattr(experts, "leaves_gaps", lambda device: False)
        plain = gradients(model)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for (name, _), ours, theirs in zip(model.named_parameters(), gradients(model), plain, strict=True):
        if not name.endswith("k_norm.bias"):  # softmax does not see it, so its gradient is rounding alone
            near = 6e-2 if "_norm" in name else 1e-2  # torch's own in bf16 is some percent off that of fp32
            assert (ours - theirs).norm() <= near * theirs.norm(), name
    used = BOTH | (EQUAL if model.config.equal_load else UNEQUAL) | (GELU if activation == "gelu" else {})
    assert ran.keys() == used.keys() and counters["stats"]["unique_graphs"] == 1


def test_a_compiled_block_keeps_experts_hidden_units_once(ran):
    """Before their activation; a compiler that saw backward compute that again would keep it from forward."""
    model = disturbed(expert_activation="gelu", routing="expert", expert_hidden=56).bfloat16()
    block, found = model.blocks[0], []
    block.compile(backend="aot_eager", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.append(tensor.shape) or tensor, lambda tensor: tensor):
        block(torch.randn(2, 64, 32).bfloat16(), torch.randn(2, 32).bfloat16())
    assert [math.prod(shape) for shape in found].count(2 * 64 * model.config.top_k * 56) == 1, found


@pytest.mark.parametrize("options", ROUTINGS.values(), ids=ROUTINGS)
def test_all_numbers_of_tokens_after_the_first_share_a_graph(ran, monkeypatch, options):
    """As where latents have several shapes, for each of which a compiler would take a minute."""
    monkeypatch.setattr(adaln_kernels, "PROGRAMS", 40)
    block = disturbed(qk_norm=True, **options).bfloat16().blocks[0]
    block.compile(backend="aot_eager", fullgraph=True)
    for tokens in (96, 128, 200):
        out, *_ = block(torch.randn(3, tokens, 32).bfloat16(), torch.randn(3, 32).bfloat16())
        out.sum().backward()
    assert counters["stats"]["unique_graphs"] == 2


def test_models_of_several_widths_are_compiled_in_one_process(ran):
    """For torch.compile a width that changes is no number any more, from which a kernel's size could follow."""
    for width in (32, 48, 64):
        block = disturbed(hidden=width, qk_norm=True).bfloat16().blocks[0]
        block.compile(backend="aot_eager", fullgraph=True)
        out, *_ = block(torch.randn(3, 96, width).bfloat16(), torch.randn(3, width).bfloat16())
        out.sum().backward()
    assert counters["stats"]["unique_graphs"] == 3
