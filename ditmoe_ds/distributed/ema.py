"""Exponential moving average of the weights, in fp32, sharded exactly like the master weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ditmoe_ds.distributed.engine import Engine
from ditmoe_ds.distributed.shards import Shard, refresh_weights


class EMA:
    """An average of this rank's shards; nothing is communicated.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that short runs forget their start.
    """

    def __init__(self, shards: list[Shard], decay: float):
        self.decay, self.updates = decay, 0
        self.masters = [shard.master for shard in shards]
        self.values = [master.clone() for master in self.masters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the master weights. Call after each optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, self.masters, 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self, engine: Engine) -> Iterator[None]:
        """Compute with the averaged weights inside the block. Collective; no second copy of the model is made."""
        self._swap(engine)
        try:
            yield
        finally:
            self._swap(engine)

    @torch.no_grad()
    def _swap(self, engine: Engine) -> None:
        for master, value in zip(self.masters, self.values, strict=True):
            kept = master.clone()
            master.copy_(value)
            value.copy_(kept)
        refresh_weights(engine)
