"""Residual sums, norms and modulations by kernels are those of torch's operators, computed in fp32 on the CPU."""

import torch

from ditmoe_ds.models import adaln, attention
from ditmoe_ds.models.adaln import AdaNorm, add_gated
from ditmoe_ds.models.attention import HeadNorm

NEAR = {torch.float32: dict(rtol=1e-4, atol=1e-4), torch.bfloat16: dict(rtol=3e-2, atol=3e-2)}

NORMS = {
    "first": (False, False, True),
    "after attention": (True, True, True),
    "to text": (True, True, False),
    "after text": (True, False, True),
}
"""Of a block: with a branch, a gate, a modulation."""


def normed_alike(device, shape, dtype, branched, gated, modulated, monkeypatch):
    def run(x, branch, shift, scale, gate):
        return AdaNorm()(x, *(shift, scale) if modulated else (None, None), branch if branched else None, gate if gated else None)

    alike(run, device, shape, dtype, [True, branched, modulated, modulated, gated], monkeypatch)


def gated_alike(device, shape, dtype, monkeypatch):
    alike(
        lambda x, branch, shift, scale, gate: [add_gated(x, branch, gate)],
        device,
        shape,
        dtype,
        [True, True, False, False, True],
        monkeypatch,
    )


def heads_alike(device, shape, dtype, monkeypatch):
    """Of q, which lies among k and v; its gradient lies as attention's backward may leave it."""
    batch, tokens, heads, width = shape
    torch.manual_seed(0)
    qkv, upward = torch.randn(batch, tokens, 3 * heads, width).to(dtype), torch.randn(batch, heads, tokens, width).to(dtype)
    vectors = torch.randn(2, width).to(dtype)
    found = []
    for kernels, where, precision in ((True, device, dtype), (False, "cpu", torch.float32)):
        monkeypatch.setattr(attention, "fused", lambda x, kernels=kernels: kernels)
        norm, leaf = HeadNorm(width, eps=1e-6).to(where, precision), qkv.to(where, precision).requires_grad_()
        norm.weight.data, norm.bias.data = vectors.to(where, precision).unbind()
        out = norm(leaf.split(heads, dim=2)[1])
        grads = [torch.autograd.grad(out, [leaf, norm.weight, norm.bias], each, retain_graph=True) for each in (
            upward.to(where, precision).transpose(1, 2), upward.to(where, precision).mT.contiguous().mT.transpose(1, 2)
        )]  # fmt: skip
        found.append([out, *grads[0], *grads[1]])
    for ours, plain in zip(*found, strict=True):
        assert ours.dtype == dtype and ours.shape == plain.shape
        torch.testing.assert_close(ours.cpu().float() / plain.std(), plain / plain.std(), **NEAR[dtype])


def alike(run, device, shape, dtype, used, monkeypatch):
    """``run`` on tokens, a branch, and each image's shift, scale and gate, which lie in one tensor, has the same outputs and gradients."""
    torch.manual_seed(0)
    tokens, vectors = torch.randn(4, *shape).to(dtype), torch.randn(shape[0], 1, 3 * shape[2]).to(dtype)
    found = []
    for kernels, where, precision in ((True, device, dtype), (False, "cpu", torch.float32)):
        monkeypatch.setattr(adaln, "fused", lambda x, kernels=kernels: kernels)
        x, branch, *upward = tokens.to(where, precision).unbind()
        leaves = [leaf.detach().requires_grad_() for leaf in (x, branch, *vectors.to(where, precision).chunk(3, dim=-1))]
        outs = run(*leaves)
        wanted = [leaf for leaf, is_used in zip(leaves, used, strict=True) if is_used]
        found.append([*outs, *torch.autograd.grad(outs, wanted, upward[: len(outs)])])
    for ours, plain in zip(*found, strict=True):
        assert ours.dtype == dtype and ours.shape == plain.shape
        torch.testing.assert_close(ours.cpu().float() / plain.std(), plain / plain.std(), **NEAR[dtype])
