"""The order of samples, as a pure function of (seed, position). Nothing else decides which sample is seen when.

A data set is a list of shards. In each of its epochs the shards are permuted, and the samples, in that order, are cut into
windows whose samples are permuted: a reader is never busy with more shards than a window spans. Several data sets are mixed
in blocks: with weights 1 and 5, one sample of the first and five of the second, in an order drawn for each block. Where
latents have several shapes, blocks of global batches are mixed likewise.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from ditmoe_ds.rng import keyed_generator


class SetOrder:
    """The order of one data set.

    Args:
        sizes: samples of each shard.
        window: samples shuffled together; at least as many as the data set has shuffle all of it.
        key: what else the order depends on, above all the seed.
    """

    def __init__(self, sizes: Sequence[int], window: int, *key: int | str):
        self.sizes, self.window, self.key = torch.tensor(sizes), window, key
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.total = int(self.sizes.sum())
        # a batch touches a window or two; a batch larger than that only pays for permuting again
        self._shards = functools.lru_cache(maxsize=2)(self._permuted_shards)
        self._window = functools.lru_cache(maxsize=4)(self._permuted_window)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Epochs and samples, both int64 like ``positions``: place ``p % n`` of epoch ``p // n``. Nothing is dropped or repeated."""
        epochs, places = positions // self.total, positions % self.total
        windows, samples = places // self.window, torch.empty_like(positions)
        for epoch, window in torch.stack([epochs, windows], 1).unique(dim=0).tolist():
            here = (epochs == epoch) & (windows == window)
            samples[here] = self._window(epoch, window)[places[here] - window * self.window]
        return epochs, samples

    def _permuted_shards(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The shards (S,) in their order and the places (S,) at which each ends."""
        shards = torch.randperm(len(self.sizes), generator=keyed_generator(*self.key, "shards", epoch))
        return shards, self.sizes[shards].cumsum(0)

    def _permuted_window(self, epoch: int, window: int) -> Tensor:
        shards, ends = self._shards(epoch)
        first = window * self.window
        places = torch.arange(first, min(first + self.window, self.total))
        found = torch.searchsorted(ends, places, right=True)
        samples = self.starts[shards[found]] + places - (ends - self.sizes[shards])[found]
        return samples[torch.randperm(len(places), generator=keyed_generator(*self.key, "window", epoch, window))]


class Order:
    """The order of a mix of data sets; sample indices count through the sets one after the other.

    Args:
        sets: sizes of the shards of each set.
        weights: whole numbers, one per set: how many samples of it are in each block.
        seed: of all permutations.
        window: see ``SetOrder``.
    """

    def __init__(self, sets: Sequence[Sequence[int]], weights: Sequence[int], seed: int, window: int):
        self.weights, self.seed = weights, seed
        self.orders = [SetOrder(sizes, window, seed, "order", i) for i, sizes in enumerate(sets)]
        self.slots = torch.repeat_interleave(torch.arange(len(sets)), torch.tensor(weights))
        self.ranks = torch.cat([torch.arange(weight) for weight in weights])  # a slot's number among those of its set

    def at(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Epochs (count,), each of the sample's own set, and samples (count,), both int64, at the global positions from ``first`` on."""
        positions = torch.arange(first, first + count)
        blocks = positions // len(self.slots)
        if len(self.orders) == 1:
            return self.orders[0].at(positions)
        slots = torch.cat([self._block(block)[positions[blocks == block] % len(self.slots)] for block in blocks.unique().tolist()])
        sets, within = self.slots[slots], blocks * torch.tensor(self.weights)[self.slots[slots]] + self.ranks[slots]
        epochs, samples = torch.empty_like(positions), torch.empty_like(positions)
        offset = 0
        for i, order in enumerate(self.orders):
            here = sets == i
            epochs[here], found = order.at(within[here])
            samples[here] = found + offset
            offset += order.total
        return epochs, samples

    def _block(self, block: int) -> Tensor:
        return torch.randperm(len(self.slots), generator=keyed_generator(self.seed, "mix", block))


class BucketOrder:
    """The order of samples of several shapes, such that all of a global batch have one.

    In each block of about 10,000 global batches each shape has its share, at least one batch, in an order drawn for the block.
    The samples of a shape have an ``Order`` and epochs of their own. Indices count through the shapes one after the other.

    Args:
        orders: of each shape.
        global_batch: samples of a step.
        seed: of the blocks.
    """

    BLOCK = 10_000

    def __init__(self, orders: Sequence[Order], global_batch: int, seed: int):
        self.orders, self.global_batch, self.seed = orders, global_batch, seed
        sizes = [sum(part.total for part in order.orders) for order in orders]
        sets = [sum(part.total for part in parts) for parts in zip(*(order.orders for order in orders), strict=True)]
        # a set's weight is divided among shapes like its samples: else one of large weight would repeat its few samples of a rare shape
        wanted = [sum(Fraction(w * p.total, n) for w, p, n in zip(order.weights, order.orders, sets, strict=True)) for order in orders]
        self.shares = [max(1, round(self.BLOCK * share / sum(wanted))) for share in wanted]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._block = functools.lru_cache(maxsize=2)(self._permuted_block)

    def at(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Epochs (count,), each of the sample's own shape, and samples (count,), both int64, at global positions of one global batch."""
        step, offset = divmod(first, self.global_batch)
        assert offset + count <= self.global_batch, (first, count)
        block, place = divmod(step, sum(self.shares))
        shapes = self._block(block)
        shape = int(shapes[place])
        batch = block * self.shares[shape] + int((shapes[:place] == shape).sum())
        epochs, samples = self.orders[shape].at(batch * self.global_batch + offset, count)
        return epochs, samples + self.starts[shape]

    def _permuted_block(self, block: int) -> Tensor:
        slots = torch.repeat_interleave(torch.arange(len(self.shares)), torch.tensor(self.shares))
        return slots[torch.randperm(len(slots), generator=keyed_generator(self.seed, "buckets", block))]
