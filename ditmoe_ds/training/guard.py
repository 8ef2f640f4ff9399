"""What went wrong in a step: where a loss or gradient stopped being finite, and which samples made the loss jump."""

import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ditmoe_ds.distributed.topology import gathered
from ditmoe_ds.training.step import Prepared

MAX_KEYS = 8

Key = Callable[[int], str]
"""From a sample's index to its key in the data set."""


def explain(model: nn.Module, batches: list[Prepared], forward: Callable[[Prepared], Tensor], key: Key) -> str:
    """Run a skipped step again and watch every module. Collective; the same text on every rank.

    Args:
        batches: this rank's micro-batches of the step.
        forward: computes the loss of one, as the step did.

    Returns:
        The first module (in the order of computation) whose output is not finite, with its rank, and the samples whose part of it is not
        and their range of t; of all samples of the micro-batch where only experts met them, as their rows may be other ranks'. If all
        outputs are finite, the same of the gradients in backward.
    """
    for first_bad, what in ((_first_bad_output, "the output of"), (_first_bad_gradient, "the gradient of the output of")):
        mine: list[tuple[int, int, int, str]] = []
        for number, batch in enumerate(batches):
            bad = first_bad(model, batch, partial(forward, batch))
            if bad is not None:
                place, where, samples = bad.place, f"{what} {bad.module}", bad.samples
                if not (finite := batch.latents.isfinite().flatten(1).all(1)).all():
                    place, where, samples = -1, "the latents", ~finite
                mine.append((number, place, dist.get_rank(), f"first in {where}, {_describe(batch, key, samples)}"))
        if found := min(itertools.chain.from_iterable(gathered(mine)), default=None):
            return found[3]
    return "in the gradient of a weight: every output and its gradient is finite"


class SpikeWatch:
    """Tells when the loss jumps: by more than ``threshold`` standard deviations over the mean of the last 100 steps."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.recent: deque[float] = deque(maxlen=100)

    def __call__(self, loss: float, losses: list[Tensor], batches: list[Prepared], key: Key) -> str | None:
        """Look at a step. Collective; the same answer on every rank. The first 20 steps after a start are only recorded.

        Args:
            loss: of the step, over all ranks.
            losses: () each, of this rank's micro-batches.

        Returns:
            On a jump, the usual loss, and the micro-batch of the largest loss over all ranks: its range of t and samples.
        """
        usual = list(self.recent)
        if math.isfinite(loss):  # squares of a damaged latent may overflow where its gradient does not
            self.recent.append(loss)
        if not self.threshold or len(usual) < 20:
            return None
        mean, deviation = statistics.fmean(usual), statistics.stdev(usual)
        if loss <= mean + self.threshold * deviation:
            return None
        largest, batch = max(((float(value), batch) for value, batch in zip(losses, batches, strict=True)), key=lambda pair: pair[0])
        value, where = max(gathered((largest, _describe(batch, key))))
        return f"loss {loss:.4f} after {mean:.4f} +- {deviation:.4f}; largest, {value:.4f}, on {where}"


class _Bad(NamedTuple):
    place: int
    """Number of the module in the order of computation."""
    module: str
    samples: Tensor | None
    """(B,) which ones were not finite; None if only experts met them, whose rows may be other ranks'."""


def _describe(batch: Prepared, key: Key, which: Tensor | None = None) -> str:
    """The rank, and range of t and keys of the samples that ``which`` (B,) marks, by default of all."""
    samples, times = (x if which is None else x[which.to(x.device)] for x in (batch.samples, batch.times))
    keys = [key(i) for i in samples.tolist()]
    shown = ", ".join(keys[:MAX_KEYS]) + (f" and {len(keys) - MAX_KEYS} more" if len(keys) > MAX_KEYS else "")
    return f"rank {dist.get_rank()}, t {times.min():.3f} to {times.max():.3f}, samples {shown}"


@torch.no_grad()
def _first_bad_output(model: nn.Module, batch: Prepared, run: Callable[[], Tensor]) -> _Bad | None:
    finite: list[tuple[str, Tensor]] = []
    with _watched(model, lambda name, args, out: finite.append((name, _finite(out, batch)))):
        run()
    return _first(finite)


def _first_bad_gradient(model: nn.Module, batch: Prepared, run: Callable[[], Tensor]) -> _Bad | None:
    finite: list[tuple[str, Tensor]] = []
    sources: list[Tensor] = []  # outputs that depend on weights alone: where a backward that computes no weight's gradient ends

    def look(name: str, args: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda gradient: finite.append((name, _finite(gradient, batch))))
            if not any(isinstance(value, Tensor) and value.requires_grad for value in args):
                sources.append(out)

    with _watched(model, look):
        loss = run()
    torch.autograd.grad(loss, sources, allow_unused=True)
    return _first(finite)


def _finite(x: Tensor, batch: Prepared) -> Tensor:
    """(B,) for each sample of the batch where ``x`` has a row for each, else ()."""
    of_samples = x.dim() > 1 and len(x) == len(batch.samples)
    return x.isfinite().flatten(1).all(1) if of_samples else x.isfinite().all()


def _first(finite: list[tuple[str, Tensor]]) -> _Bad | None:
    bad = [(place, name, good) for place, (name, good) in enumerate(finite) if not good.all()]
    return _Bad(*bad[0][:2], next((~good for *_, good in bad if good.dim()), None)) if bad else None


@contextmanager
def _watched(model: nn.Module, look: Callable[[str, Any, Tensor], None]) -> Iterator[None]:
    """Within this context ``look`` is called with every floating-point output of every module, and with the module's name and arguments."""

    def hook(name: str, module: nn.Module, args: Any, out: Any) -> None:
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                look(name, args, tensor)

    handles = [module.register_forward_hook(partial(hook, name)) for name, module in model.named_modules() if name]
    compiled = [(module, vars(module).pop("forward")) for module in model.modules() if "forward" in vars(module)]  # calls no hooks inside
    try:
        yield
    finally:
        for module, forward in compiled:
            module.forward = forward
        for handle in handles:
            handle.remove()
