"""The optimizer's step at stage 0 in bf16, and the gradients' norm: one kernel does what torch's operators do."""

from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch

from ditmoe_ds.distributed import adamw, engine
from ditmoe_ds.distributed.ema import EMA, EMAConfig
from ditmoe_ds.distributed.norm import BLOCK, square_sum


def stepped_alike(device: str, rounding: float) -> None:
    """Weights of all sizes, in two groups; a decay; gradients that lie badly; clipping; a step that is not the first; two averages, every
    other step, in another order.

    Args:
        rounding: how far bf16 weights may be from their masters.
    """
    sides = [(3,), (adamw.BLOCK,), (100, 130)], [(2, adamw.BLOCK + 1), (1,)]
    torch.manual_seed(0)
    start = [[torch.randn(side, device=device) for side in group] for group in sides]
    gradients = [[torch.randn(5, *side, device=device).bfloat16() for side in group] for group in sides]
    found = []
    for at_once in (False, True):
        masters = [[master.clone().requires_grad_() for master in group] for group in start]
        weights = [[torch.nn.Parameter(master.detach().bfloat16()) for master in group] for group in masters]
        adam = torch.optim.AdamW(
            [dict(params=group) for group in masters], lr=1e-2, betas=(0.9, 0.99), eps=1e-2, weight_decay=0.1, fused=True
        )
        pretended: Any = SimpleNamespace(clip=0.3, optimizer=SimpleNamespace(optimizer=adam, fp16_groups=weights, fp32_groups=masters))
        shards: Any = [SimpleNamespace(master=master.detach().view(-1)) for master in [*chain(*masters)][::-1]]
        kernel: Any = adamw.AtOnce(adam, *([*chain(*groups)] for groups in (masters, weights))) if at_once else None
        ema = EMA(shards, EMAConfig((0.9, 0.5), every=2, warmup=False), kernel)
        for number in range(5):
            for parameter, gradient in zip(chain(*weights), chain(*gradients)):
                parameter.grad = torch.cat([gradient.new_zeros(1), gradient[number].flatten()])[1:].view(parameter.shape)
                if number % 2 and gradient.dim() == 3:
                    parameter.grad = parameter.grad.mT.contiguous().mT
            if at_once and number:  # the first step makes the state
                kernel.prepare()
                kernel.step(0.3)
            else:
                engine._step_masters(pretended)
            ema.update()
        found.append([*chain(*masters), *(state[key] for state in adam.state.values() for key in ("exp_avg", "exp_avg_sq", "step"))])
        found[-1] += [*chain(*ema.averages.values())]
        for weight, master in zip(chain(*weights), chain(*masters)):
            torch.testing.assert_close(weight, master.bfloat16(), rtol=rounding, atol=0)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)


def squared_alike(device: str) -> None:
    """Of many tensors and of one, of all sizes, some lying badly, one of them larger than its programs read in one go."""
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        parts = [torch.randn(size, device=device).to(dtype) for size in (1, BLOCK - 1, BLOCK, 3 * BLOCK + 5, 700)]
        badly = [parts[1][1:], parts[3][5:].view(3, BLOCK).t()]
        for tensors in ([*parts, *badly], [parts[3]], [parts[0]] * 20 + [parts[3]]):
            exact = torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()
            assert square_sum(tensors).dtype == torch.float64
            torch.testing.assert_close(square_sum(tensors), exact, rtol=1e-6, atol=0)
    parts[3][-1] = float("nan")
    assert square_sum(parts).isnan()
