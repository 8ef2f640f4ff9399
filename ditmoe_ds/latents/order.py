"""The order of samples, as a pure function of (seed, epoch, position). Nothing else decides who is seen when."""

from __future__ import annotations

import functools

import torch

from ditmoe_ds.rng import keyed_generator


@functools.lru_cache(maxsize=2)  # a batch touches two epochs at most, unless it is larger than the data set
def epoch_order(seed: int, epoch: int, n: int) -> torch.Tensor:
    """The permutation (n,) int64 of an epoch. The result is cached: do not write into it."""
    return torch.randperm(n, generator=keyed_generator(seed, "order", epoch, n))


def batch_indices(seed: int, consumed: int, count: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Epochs (count,) and samples (count,), both int64, at the global positions ``consumed`` to ``consumed + count``.

    Position p is place ``p % n`` of epoch ``p // n``, so batches run across the end of an epoch: nothing is dropped or repeated.
    """
    positions = torch.arange(consumed, consumed + count)
    epochs, places = positions // n, positions % n
    samples = torch.empty_like(positions)
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        samples[here] = epoch_order(seed, epoch, n)[places[here]]
    return epochs, samples
