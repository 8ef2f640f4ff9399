"""Run by test_moe.py: every Triton kernel compiles for a GPU as it is launched for models of published sizes, without one.

In a process of its own, since Triton is made to believe in a GPU: of compute capability ``KERNELS_FOR``, or AMD's of that name. Instead of
a launch a kernel is compiled, to the machine's code, so what is computed means nothing; ``interpreted_kernels.py`` sees to that.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ditmoe_ds.distributed.adamw import AtOnce
from ditmoe_ds.distributed.norm import square_sum
from ditmoe_ds.models import adaln, adaln_kernels, attention, head_norm
from ditmoe_ds.models.adaln import AdaNorm, add_gated
from ditmoe_ds.models.attention import HeadNorm
from ditmoe_ds.models.rotary import Rotate
from ditmoe_ds.models.sizes import named_config
from ditmoe_ds.moe import kernels
from ditmoe_ds.moe.choosing import choose
from ditmoe_ds.moe.routing import RouterConfig

MODELS = ["DiT-MoE-S/2-8E2A", "DiT-MoE-XL/2-8E2A", "DiT-MoE-G/2-16E2A", "EC-DIT-XL-8E", "EC-DIT-M-64E"]
SHARED = 99 * 1024
"""Bytes that a block of threads may share on any GPU with bf16 (CUDA's table of compute capabilities: 8.6, 8.9 and 12.0 have the least)."""
KIND = os.environ["KERNELS_FOR"]
TARGET = GPUTarget("cuda", int(KIND), 32) if KIND.isdigit() else GPUTarget("hip", KIND, 64)
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Driver:
    def get_current_target(self):
        return TARGET

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """By kernel's name, the machine's code of each of its kinds."""
    found = {}
    triton.runtime.driver.set_active(Driver())
    run = JITFunction.run

    def compiling(self, *args, grid, warmup, **named):
        kernel = run(self, *args, grid=grid, warmup=True, **named)
        found.setdefault(self.fn.__name__, {})[kernel.hash] = kernel

    monkeypatch.setattr(JITFunction, "run", compiling)
    monkeypatch.setattr(adaln, "adaln_kernels", adaln_kernels, raising=False)
    monkeypatch.setattr(attention, "head_norm", head_norm, raising=False)
    for module in (adaln, attention):
        monkeypatch.setattr(module, "fused", lambda x: True)
    return found


def differentiate(outs, *leaves):
    outs = [outs] if isinstance(outs, torch.Tensor) else outs
    torch.autograd.grad(outs, leaves, [torch.randn_like(out) for out in outs])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_kernels_of_a_block(name, dtype, compiled, tmp_path):
    config = named_config(name)
    x, branch = torch.randn(2, 2, 256, config.hidden, dtype=dtype).requires_grad_()
    shift, scale, gate = torch.randn(2, 1, 3 * config.hidden, dtype=dtype).requires_grad_().chunk(3, -1)
    differentiate(AdaNorm()(x, shift, scale), x, shift, scale)
    differentiate(AdaNorm()(x, shift, scale, branch, gate), x, shift, scale, branch, gate)
    differentiate(AdaNorm()(x, shift, scale, branch), x, shift, scale, branch)
    differentiate(AdaNorm()(x, None, None, branch, gate), x, branch, gate)
    differentiate(add_gated(x, branch, gate), x, branch, gate)

    width = config.hidden // config.heads
    qkv = torch.randn(2, 256, 3 * config.heads, width, dtype=dtype).requires_grad_()
    q = qkv.split(config.heads, dim=2)[1]
    norm, angles = HeadNorm(width).to(dtype), torch.rand(1, 256, width // 2)
    differentiate(norm(q), q, *norm.parameters())
    differentiate(norm(q).transpose(1, 2), q, *norm.parameters())
    differentiate(Rotate.apply(q, angles.cos(), angles.sin()), q)

    hidden, rows = torch.randn(64, 2 * config.expert_width, dtype=dtype), torch.randn(64, config.hidden, dtype=dtype)
    kernels.swiglu_backward(hidden, kernels.swiglu(hidden), None)
    kernels.swiglu_backward(hidden, again := kernels.swiglu(hidden), again)
    kernels.gelu_backward(hidden, torch.randn_like(hidden))
    tokens, weights, logits = torch.arange(64) % 32, torch.rand(64), torch.randn(32, config.experts, requires_grad=True)
    listed, number = kernels.list_takings(tokens, weights, 32, config.experts)
    kernels.sum_takings(rows, weights, listed, number)
    kernels.sum_takings(rows, None, listed[:, :2].contiguous(), None)
    kernels.weigh_backward(rows[:32], rows, tokens, weights)
    assignment, means = choose(logits, 2, RouterConfig(renormalise=True))
    differentiate([assignment.weights, means], logits)
    kernels.clear(torch.empty(4, 64, config.hidden, dtype=dtype), torch.arange(4, dtype=torch.int32))

    assert len(compiled) == 16, sorted(compiled)
    for kernel in (kernel for kinds in compiled.values() for kernel in kinds.values()):
        assert kernel.metadata.shared <= SHARED, (kernel.name, kernel.metadata.shared)
        if TARGET.backend == "hip":
            continue
        if dtype == torch.bfloat16 and "norm" in kernel.name:
            alone = re.findall(r"ld\.global\.b16", kernel.asm["ptx"])
            assert len(alone) <= 2, f"{kernel.name} reads element by element"  # but for weight and bias
        code = tmp_path / "code.cubin"
        code.write_bytes(kernel.asm["cubin"])
        used = subprocess.run([TOOL, "-res-usage", code], capture_output=True, text=True, check=True).stdout
        assert re.search(r" STACK:(0|8|16) .* LOCAL:0 ", used), (kernel.name, used)  # no more is spilled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_of_the_optimizer(dtype, compiled):
    master = torch.randn(5000, requires_grad=True)
    weight = torch.nn.Parameter(master.detach().bfloat16())
    adam = torch.optim.AdamW([master], lr=0.1)
    master.grad = torch.randn(5000)
    adam.step()
    weight.grad = torch.randn(5000).bfloat16()
    kernel = AtOnce(adam, [master], [weight])
    kernel.also_average([master], [[torch.randn(5000)]], lambda: [0.25])
    kernel.prepare()
    kernel.step(0.5)
    square_sum([torch.randn(5000).to(dtype), torch.randn(5001).to(dtype)[1:]])
    assert compiled.keys() == {"_adamw", "_square_sums"}
