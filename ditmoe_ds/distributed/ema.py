"""Exponential moving averages of the weights, in fp32, sharded exactly like the master weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_ds.distributed.engine import Engine
from ditmoe_ds.distributed.shards import Shard, refresh_weights


@dataclass(frozen=True)
class EMAConfig:
    """Averages of the weights, updated after the optimizer."""

    decays: tuple[float, ...] = (0.9999,)
    """One average each, all kept and saved; validation, sample grids and ``ditmoe sample`` take the first."""
    every: int = 1
    """Optimizer steps between updates. The decay is raised to this power, so that the average reaches equally far back; harmless where
    that is many times as many steps (``benchmarks/ema.md``)."""
    warmup: bool = True
    """Begin with smaller decays, (1 + n) / (10 + n) after n steps, so that short runs forget their start."""


def kind(decay: float) -> str:
    """What the average with this decay is called in checkpoints and on the command line: ``ema_0.9999``."""
    return f"ema_{decay!r}"


class EMA:
    """Averages of this rank's shards; nothing is communicated.

    Attributes:
        averages: by kind, the averages of the shards in their order.
        steps: optimizer steps so far.
    """

    def __init__(self, shards: list[Shard], config: EMAConfig):
        self.config, self.steps = config, 0
        self.masters = [shard.master for shard in shards]
        self.averages = {kind(decay): [master.clone() for master in self.masters] for decay in config.decays}

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the master weights. Call after each optimizer step."""
        self.steps += 1
        if self.steps % self.config.every:
            return
        for decay, average in zip(self.config.decays, self.averages.values(), strict=True):
            if self.config.warmup:
                decay = min(decay, self.steps / (9 + self.steps))
            torch._foreach_lerp_(average, self.masters, 1 - decay**self.config.every)

    @contextmanager
    def applied(self, engine: Engine) -> Iterator[None]:
        """Compute with the first average inside the block. Collective; no second copy of the model is made.

        After an error the average stays in place: the rank that met it ends, and must not wait here for the others, which are elsewhere.
        """
        self._swap(engine)
        yield
        self._swap(engine)

    @torch.no_grad()
    def _swap(self, engine: Engine) -> None:
        first: list[Tensor] = self.averages[kind(self.config.decays[0])]
        for master, value in zip(self.masters, first, strict=True):
            kept = master.clone()
            master.copy_(value)
            value.copy_(kept)
        refresh_weights(engine)
