"""What went wrong in a step whose loss or gradient was not finite: the module, the times, the samples."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ditmoe_ds.training.step import Prepared

MAX_KEYS = 8


def explain(engine: Any, batches: list[Prepared], forward: Callable[[Prepared], Any], key: Callable[[int], str]) -> str:
    """Run the forwards of the skipped step again and watch every module. Collective; the same text on every rank.

    Args:
        batches: this rank's micro-batches of the step.
        forward: computes the loss of one, as the step did.
        key: the data set's key of a sample.

    Returns:
        The first module (in the order of computation) whose output is not finite, on the first rank that has one, with the
        range of t and the samples of its micro-batch; if there is none, that the backward pass did it.
    """
    mine = None
    for batch in batches:
        module = _first_bad_module(engine.module, partial(forward, batch))
        if mine is None and module is not None:
            where = "the latents" if not batch.latents.isfinite().all() else f"the output of {module}"
            keys = [key(i) for i in batch.samples.tolist()]
            shown = ", ".join(keys[:MAX_KEYS]) + (f" and {len(keys) - MAX_KEYS} more" if len(keys) > MAX_KEYS else "")
            mine = f"first in {where}, rank {dist.get_rank()}, t {batch.times.min():.3f} to {batch.times.max():.3f}, samples {shown}"
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return next((found for found in everyone if found), "in the backward pass: every module's output is finite")


@torch.no_grad()
def _first_bad_module(model: nn.Module, run: Callable[[], Any]) -> str | None:
    flags: list[tuple[str, Tensor]] = []

    def watch(name: str) -> Callable[..., None]:
        def check(module: nn.Module, args: Any, out: Any) -> None:
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    flags.append((name, tensor.isfinite().all()))

        return check

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return next((name for name, finite in flags if not finite), None)
