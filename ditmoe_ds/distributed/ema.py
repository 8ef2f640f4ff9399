"""Exponential moving averages of the weights, in fp32, sharded exactly like the master weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ditmoe_ds.distributed.engine import Engine
from ditmoe_ds.distributed.shards import Shard, refresh_weights

if TYPE_CHECKING:  # needs Triton
    from ditmoe_ds.distributed.adamw import AtOnce


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

    Args:
        at_once: the kernel that moves them, too, if one makes the optimizer's step.

    Attributes:
        averages: by kind, the averages of the shards in their order.
        steps: optimizer steps so far.
    """

    def __init__(self, shards: list[Shard], config: EMAConfig, at_once: "AtOnce | None" = None):
        self.config, self.steps, self.at_once = config, 0, at_once
        self.masters = [shard.master for shard in shards]
        self.averages = {kind(decay): [master.clone() for master in self.masters] for decay in config.decays}
        if at_once:
            at_once.also_average(self.masters, [*self.averages.values()], self.shares)

    def shares(self) -> list[float]:
        """How far the next update moves each average towards the weights; empty if it moves none."""
        step, every = self.steps + 1, self.config.every
        if step % every:
            return []
        reach = step / (9 + step) if self.config.warmup else 1.0
        return [1 - min(decay, reach) ** every for decay in self.config.decays]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the master weights, unless the optimizer's kernel has. Call after each optimizer step."""
        if not self.at_once:
            for share, average in zip(self.shares(), self.averages.values()):
                torch._foreach_lerp_(average, self.masters, share)
        self.steps += 1

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
