"""The optimizer's step at stage 0 in bf16: one kernel does what torch's operators do."""

from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch

from ditmoe_ds.distributed import adamw, engine


def stepped_alike(device: str, rounding: float) -> None:
    """Weights of all sizes, in two groups; a decay; gradients that lie badly; clipping; a step that is not the first.

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
        kernel: Any = None
        for number in range(5):
            for parameter, gradient in zip(chain(*weights), chain(*gradients)):
                parameter.grad = torch.cat([gradient.new_zeros(1), gradient[number].flatten()])[1:].view(parameter.shape)
                if number % 2 and gradient.dim() == 3:
                    parameter.grad = parameter.grad.mT.contiguous().mT
            if at_once and number:  # the first step makes the state
                kernel = kernel or adamw.AtOnce(adam, *([*chain(*groups)] for groups in (masters, weights)))
                kernel.prepare()
                kernel.step(0.3)
            else:
                engine._step_masters(pretended)
        found.append([*chain(*masters), *(state[key] for state in adam.state.values() for key in ("exp_avg", "exp_avg_sq", "step"))])
        for weight, master in zip(chain(*weights), chain(*masters)):
            torch.testing.assert_close(weight, master.bfloat16(), rtol=rounding, atol=0)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)
