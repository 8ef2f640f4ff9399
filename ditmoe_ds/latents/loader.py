"""Latents from shards: random access by sample index, and the micro-batches of one rank."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ditmoe_ds.errors import ConfigError, DataError
from ditmoe_ds.latents.format import REMAKE, Manifest, index_shard, read_sample
from ditmoe_ds.latents.order import batch_indices


@dataclass
class DataConfig:
    """The data of a run."""

    manifest: str
    """Folder made by ``ditmoe-data encode``."""
    flip: bool = False
    """Mirror latents left to right, each with probability 1/2 per epoch; not for digits or text."""
    prefetch: int = 2
    """Micro-batches loaded ahead, at least 1."""


class Batch(NamedTuple):
    """A micro-batch of one rank."""

    latents: torch.Tensor
    """(B, C, H, W) float32, scaled."""
    labels: torch.Tensor
    """(B,) int64."""
    epochs: torch.Tensor
    """(B,) int64: with ``samples`` the identity of a visit, from which noise can be drawn."""
    samples: torch.Tensor
    """(B,) int64: index into the data set."""


class LatentDataset:
    """Random access to the samples of a split, in the order they were written.

    Raises:
        DataError: a shard is unsafe, damaged or does not hold what the manifest says; the split is empty.
    """

    def __init__(self, manifest: Manifest, split: str):
        self.manifest = manifest
        self._keys: list[str] = []
        self._paths = [manifest.path(shard) for shard in manifest.split(split).shards]
        spans = []
        for path, shard in zip(self._paths, manifest.split(split).shards):
            index = index_shard(path)
            if len(index.keys) != shard.samples:
                raise DataError(f"{path}: {len(index.keys)} samples, the manifest says {shard.samples}; {REMAKE}")
            self._keys += index.keys
            spans.append(index.spans)
        if not self._keys:
            raise DataError(f"{manifest.root}: split {split} has no samples; encode again with another --holdout")
        self._spans = np.concatenate(spans)
        self._shard_of = np.repeat(np.arange(len(spans)), [len(s) for s in spans])

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        """Sample ``i``: the scaled latent (C, H, W) float32 and the label."""
        m = self.manifest
        path = self._paths[self._shard_of[i]]
        latent, meta = read_sample(path, self._spans[i], m.shape, m.dtype)
        if not 0 <= meta["label"] < m.num_classes:
            raise DataError(f"{path}: key {self._keys[i]!r} has label {meta['label']}, the manifest has {m.num_classes} classes")
        return (torch.from_numpy(latent.astype(np.float32)) - m.shift_factor) * m.scaling_factor, meta["label"]

    def key(self, i: int) -> str:
        """The key of sample ``i``."""
        return self._keys[i]


class LatentLoader:
    """Endless iterator over the micro-batches of one rank.

    Micro-batch ``a`` of the optimizer step that began at global position P covers the ``global_batch / accumulation`` positions from
    ``P + a * global_batch / accumulation``; rank r takes the r-th of ``world`` equal, contiguous slices. So the samples of a step, and
    of each micro-step, do not depend on the number of ranks.

    Args:
        global_batch: samples per optimizer step, over all ranks and micro-steps.
        accumulation: micro-steps per optimizer step.
        consumed: global position to begin at: samples that all ranks together have seen.
        prepare: runs on each ``Batch`` ahead of time, in the loading thread; the iterator then yields its result.
        prefetch: micro-batches held ready.

    Raises:
        ConfigError: ``global_batch`` cannot be divided evenly.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        *,
        seed: int,
        global_batch: int,
        accumulation: int,
        rank: int,
        world: int,
        consumed: int = 0,
        prepare: Callable[[Batch], Any] | None = None,
        prefetch: int = 2,
    ):
        if global_batch % (accumulation * world):
            fix = f"must be a multiple of accumulation x ranks = {accumulation} x {world}"
            raise ConfigError("global_batch", global_batch, fix)
        self._dataset, self._seed, self._prepare = dataset, seed, prepare
        self._micro = global_batch // accumulation
        self._local = self._micro // world
        self._begin = consumed + rank * self._local
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="latent-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._stop.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, _Failure):
            self.close()
            raise item.error
        return item

    def close(self) -> None:
        """Stop the thread. The iterator ends."""
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.05)  # it may be waiting for room

    def _run(self) -> None:
        position = self._begin
        while not self._stop.is_set():
            try:
                batch = self._load(position)
                item = self._prepare(batch) if self._prepare else batch
            except BaseException as error:
                self._ready.put(_Failure(error))
                return
            self._ready.put(item)
            position += self._micro

    def _load(self, position: int) -> Batch:
        epochs, samples = batch_indices(self._seed, position, self._local, len(self._dataset))
        latents, labels = zip(*(self._dataset[i] for i in samples.tolist()))
        return Batch(torch.stack(latents), torch.tensor(labels), epochs, samples)


class _Failure(NamedTuple):
    error: BaseException
