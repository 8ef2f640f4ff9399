"""Whether a GPU computes what a CPU does: ``ditmoe doctor`` asks every one, since our kernels have run on few kinds of GPUs."""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ditmoe_ds.errors import in_a_line
from ditmoe_ds.models.adaln import AdaNorm
from ditmoe_ds.models.attention import HeadNorm
from ditmoe_ds.models.embeddings import rotary_angles, rotate
from ditmoe_ds.moe.layer import MoE
from ditmoe_ds.moe.routing import RouterConfig

CPU = torch.device("cpu")
TOLERANCE = 0.02
"""Of a tensor's norm. In a layer and its gradients bf16 rounds to about a quarter of it."""
Pairs = Iterable[tuple[Tensor, Tensor]]
"""Of tensors that the device and the CPU computed."""


def wrong_on(device: torch.device) -> str | None:
    """What this device computes otherwise than the CPU, or not at all; None if all is well. Its bf16 is compared with the CPU's fp32.

    Tried are forward and backward of a sparse layer with each router, of RoPE, adaLN and the norms of heads, and AdamW, with all of our
    kernels for them.
    """
    for name, check in CHECKS.items():
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                errors = [(ours.cpu().float() - wanted).norm() / wanted.norm() for ours, wanted in check(device)]
        except Exception as error:  # compilers, drivers and kernels each fail in their own ways
            return f"{name} fails: {type(error).__name__}: {in_a_line(error)}"
        worst = torch.stack(errors).max().item()
        if not worst < TOLERANCE:
            return f"{name} differs from the CPU's by {worst:.1%}"
    return None


def _layer(choice: str, device: torch.device) -> Pairs:
    """The output, and the gradients of the input and of all weights."""
    plain, (x, upward) = MoE(64, 8, choice, 2, 96, 64, RouterConfig()), _rounded(2, 2, 75, 64)
    for parameter in plain.parameters():
        parameter.data = _rounded(*parameter.shape, scale=0.12)
    found = []
    for moe, where, dtype in ((copy.deepcopy(plain), device, torch.bfloat16), (plain, CPU, torch.float32)):
        leaf = x.to(where, dtype).requires_grad_()
        out, _, _, mean_scores, _ = moe.to(where, dtype)(leaf)
        loss = (out * upward.to(where, dtype)).sum() + mean_scores.square().sum()
        found.append([out.detach(), *torch.autograd.grad(loss, [leaf, *moe.parameters()])])
    return zip(*found, strict=True)


def _rope(device: torch.device) -> Pairs:
    x, upward = _rounded(2, 2, 60, 6, 64)
    found = []
    for where, dtype in ((device, torch.bfloat16), (CPU, torch.float32)):
        leaf, angles = x.to(where, dtype).requires_grad_(), rotary_angles(6, 10, 64, where)[None]
        out = rotate(leaf, angles.cos(), angles.sin())
        found.append([out.detach(), *torch.autograd.grad(out, leaf, upward.to(where, dtype))])
    return zip(*found, strict=True)


def _adaln(device: torch.device) -> Pairs:
    x, branch, *upward = _rounded(4, 2, 75, 64)
    vectors = _rounded(2, 1, 3 * 64)
    found = []
    for where, dtype in ((device, torch.bfloat16), (CPU, torch.float32)):
        leaves = [leaf.to(where, dtype).requires_grad_() for leaf in (x, branch, *vectors.chunk(3, dim=-1))]
        outs = AdaNorm()(leaves[0], *leaves[2:4], leaves[1], leaves[4])
        grads = torch.autograd.grad(outs, leaves, [each.to(where, dtype) for each in upward])
        found.append([*(out.detach() for out in outs), *grads])
    return zip(*found, strict=True)


def _heads(device: torch.device) -> Pairs:
    x, upward = _rounded(2, 2, 60, 6, 64)
    vectors = _rounded(2, 64)
    found = []
    for where, dtype in ((device, torch.bfloat16), (CPU, torch.float32)):
        norm, leaf = HeadNorm(64).to(where, dtype), x.to(where, dtype).requires_grad_()
        norm.weight.data, norm.bias.data = vectors.to(where, dtype).unbind()
        out = norm(leaf)
        found.append([out.detach(), *torch.autograd.grad(out, [leaf, norm.weight, norm.bias], upward.to(where, dtype))])
    return zip(*found, strict=True)


def _adamw(device: torch.device) -> Pairs:
    """Weights, masters, both moments and an average after two steps, and the second gradient's sum of squares. The first step, which makes
    the moments, is torch's."""
    from ditmoe_ds.distributed.adamw import AtOnce  # needs Triton
    from ditmoe_ds.distributed.norm import square_sum

    start, *gradients = _rounded(3, 5000)
    found = []
    for where in (device, CPU):
        master, grads = start.to(where, copy=True).requires_grad_(), [gradient.to(where) for gradient in gradients]
        weight, average = torch.nn.Parameter(master.detach().bfloat16()), start.to(where, copy=True)
        adam = torch.optim.AdamW([master], lr=0.1, weight_decay=0.1)
        master.grad = grads[0]
        adam.step()
        if where is device:
            weight.grad = grads[1].bfloat16()
            kernel = AtOnce(adam, [master], [weight])
            kernel.also_average([master], [[average]], lambda: [0.25])
            squares = square_sum([weight.grad])
            kernel.prepare()
            kernel.step(0.5)
        else:
            master.grad, squares = 0.5 * grads[1], grads[1].square().sum()
            adam.step()
            weight.data = master.detach().clone()
            average.lerp_(master.detach(), 0.25)
        state = adam.state[master]
        found.append([weight.detach(), master.detach(), state["exp_avg"], state["exp_avg_sq"], average, squares])
    return zip(*found, strict=True)


def _rounded(*shape: int, scale: float = 1.0) -> Tensor:
    """Random numbers that bf16 has, too."""
    return (scale * torch.randn(shape)).bfloat16().float()


CHECKS: dict[str, Callable[[torch.device], Pairs]] = {
    "a layer with token choice": lambda device: _layer("token", device),
    "a layer with expert choice": lambda device: _layer("expert", device),
    "RoPE": _rope,
    "adaLN": _adaln,
    "LayerNorm of heads": _heads,
    "AdamW": _adamw,
}
