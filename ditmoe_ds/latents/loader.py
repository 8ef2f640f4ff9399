"""Latents from shards: random access by sample index, and the micro-batches of one rank."""

from __future__ import annotations

import functools
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ditmoe_ds.errors import ConfigError, DataError, UserError, in_a_line
from ditmoe_ds.latents import remote
from ditmoe_ds.latents.manifest import Manifest, Shard, SplitName, sha256
from ditmoe_ds.latents.order import BucketOrder, Order
from ditmoe_ds.latents.tars import Sample, ShardReader, captions_of, index_path, index_size, text_names
from ditmoe_ds.rng import keyed_generator

T = TypeVar("T")

INDEX_BYTES = 64 << 20
"""Most bytes of shard indices that a process holds: enough for about 7 million samples, in shards of 1000."""


@dataclass(frozen=True)
class MixConfig:
    """One more data set, with the same VAE, latent shape and classes."""

    manifest: str
    weight: int = 1
    """Samples of it in each block of the mix."""


@dataclass(frozen=True)
class DataConfig:
    """The data of a run."""

    manifest: str
    """Folder made by ``ditmoe-data``, or its URL (https, gs, ... as webdataset opens them)."""
    weight: int = 1
    """With ``mix``: samples of it in each block of the mix."""
    mix: tuple[MixConfig, ...] = ()
    """More data sets. With weights 1 and 5, every sample of the first goes with five of the second."""
    window: int = 16384
    """Samples shuffled together, after the shards were shuffled. A rank reads from the shards that a window spans."""
    flip: bool = False
    """Mirror latents left to right, each with probability 1/2 per epoch; not for digits or text."""
    workers: int = 2
    """Processes per rank that load ahead; 0 loads in the training process."""
    prefetch: int = 4
    """Micro-batches that each worker holds ready, at least 1."""
    cache: str = ""
    """Local folder for the shards of a data set behind a URL."""
    cache_gb: float = 100.0
    """Most gigabytes in the cache; the least recently used shards are deleted."""
    skip_shards: tuple[str, ...] = ()
    """Names of training shards to leave out, such as one that was found damaged; of a mix, FOLDER/NAME where several have it."""
    text_encoder: str = ""
    """transformers folder or hub id that encodes captions in training; empty: the text in the shards."""
    text_max_tokens: int = 77
    """Most tokens of a caption with ``text_encoder``; longer captions are cut."""
    log_samples: bool = False
    """Write the keys of every global batch into ``metrics.jsonl``, under ``samples``."""

    def open(self, manifests: Sequence[Manifest], split: SplitName, shape: tuple[int, ...] | None = None) -> LatentDataset:
        """The samples of a split of the data sets, of one shape or all. Raises as ``LatentDataset``, and ConfigError for ``cache``."""
        try:
            cache = remote.Cache(Path(self.cache), int(self.cache_gb * 1e9)) if self.cache else None
        except OSError as error:
            raise ConfigError("data.cache", self.cache, f"cannot be made or written ({error.strerror})") from None
        return LatentDataset(manifests, split, self.skip_shards if split == "train" else (), cache, shape)


class Latent(NamedTuple):
    """One sample, scaled."""

    latent: Tensor
    """(C, H, W) float32."""
    std: Tensor | None
    """(C, H, W) float32 of the posterior, if it is stored."""
    label: int
    """-1 if it has none."""
    captions: list[str]
    """One at least: the empty one if it has none."""
    texts: list[Tensor]
    """(T, width) bfloat16 tokens of each caption, if they are stored; else empty."""


class Batch(NamedTuple):
    """A micro-batch of one rank."""

    latents: Tensor
    """(B, C, H, W) float32, scaled."""
    labels: Tensor
    """(B,) int64."""
    epochs: Tensor
    """(B,) int64: with ``samples`` the identity of a visit, from which noise can be drawn."""
    samples: Tensor
    """(B,) int64: index into the data set."""
    text: Tensor | None
    """(M, width) bfloat16 tokens of all captions, one after the other, if they are stored: one tensor crosses processes cheaply."""
    lengths: list[int]
    """B numbers of tokens, which add up to M."""
    captions: list[str]
    """B captions, empty for those that have none."""


def collate(chosen: list[Latent], epochs: Tensor, samples: Tensor) -> Batch:
    """A batch of samples: their latents, which are the means where a deviation is stored, and their first captions."""
    texts = [sample.texts[0] for sample in chosen if sample.texts]
    return Batch(
        torch.stack([sample.latent for sample in chosen]),
        torch.tensor([sample.label for sample in chosen]),
        epochs,
        samples,
        torch.cat(texts) if texts else None,
        [len(text) for text in texts],
        [sample.captions[0] for sample in chosen],
    )


class LatentDataset:
    """Random access to the samples of one or several data sets, in the order they were written, shape by shape.

    Args:
        manifests: of the data sets; sample indices count through them, within each shape.
        skip: shards to leave out, as NAME or ROOT/NAME.
        cache: where the shards of data sets behind a URL are kept.
        shape: samples of this (C, H, W) only; None for all.

    Raises:
        ConfigError: a name to skip fits no shard, or shards of several data sets.
        DataError: a split is empty, or has no samples of a shape that another has.
    """

    def __init__(
        self,
        manifests: Sequence[Manifest],
        split: SplitName,
        skip: Sequence[str] = (),
        cache: remote.Cache | None = None,
        shape: tuple[int, ...] | None = None,
    ):
        self.manifests, self.cache = manifests, cache
        listed = [(m, shard) for m in manifests for shard in m.split(split).shards]
        skipped = set()
        for name in skip:
            called = {name, os.path.realpath(name)}
            named = [(m.root, shard.name) for m, shard in listed if called & {shard.name, f"{m.root}/{shard.name}"}]
            if len(named) != 1:
                fix = f"of several data sets: write {named[0][0]}/{name}" if named else f"no such {split} shard in the manifest"
                raise ConfigError("data.skip_shards", name, fix)
            skipped.add(named[0])
        shards = [(m, shard) for m, shard in listed if (m.root, shard.name) not in skipped and shape in (None, shard.shape)]
        self.shards = sorted(shards, key=lambda pair: pair[1].shape)
        for manifest in manifests:
            if not any(m is manifest for m, _ in shards):
                fix = "data.skip_shards leaves none" if skip else "encode again with another --holdout"
                of = "" if shape is None else f" of the commonest shape, {' x '.join(map(str, shape))}"
                raise DataError(f"{manifest.root}: split {split} has no samples{of}; {fix}")
        self.sets: dict[tuple[int, ...], list[list[int]]] = {}
        """By shape, then by data set: the number of samples in each shard."""
        for shape in sorted({shard.shape for _, shard in shards}):
            self.sets[shape] = [[s.samples for m, s in shards if m is manifest and s.shape == shape] for manifest in manifests]
            for manifest, sizes in zip(manifests, self.sets[shape]):
                if not sizes:
                    raise DataError(
                        f"{manifest.root}: split {split} has no latents of shape {shape}, which it is mixed with; encode it alike"
                    )
        self._ends = np.cumsum([shard.samples for _, shard in self.shards])
        self._fetched_again: set[int] = set()
        self._reader = functools.lru_cache(maxsize=INDEX_BYTES // (1000 + 8 * len(self) // len(self.shards)))(self._open)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Latent:
        """Sample ``i``.

        Raises:
            DataError: its shard or bytes are damaged.
        """
        reader, sample = self._read(i)
        m, label = reader.manifest, sample.meta["label"]
        if label is not None and not 0 <= label < m.num_classes:
            raise DataError(f"{reader.path}: key {sample.key!r} has label {label}, the manifest has {m.num_classes} classes")
        std, captions = sample.tensors.get("std"), captions_of(sample.meta)
        return Latent(
            (sample.tensors["latent"].float() - m.shift_factor) * m.scaling_factor,
            None if std is None else std.float() * m.scaling_factor,
            -1 if label is None else label,
            captions,
            [sample.tensors[name] for name in text_names(len(captions))] if m.text else [],
        )

    def batch(self, items: Sequence[int]) -> Batch:
        """A batch of these samples, of one shape, with 0 for their epochs."""
        return collate([self[i] for i in items], torch.zeros(len(items), dtype=torch.int64), torch.tensor(items))

    def spread(self, count: int) -> list[int]:
        """``count`` random samples (all if there are fewer), the same on every call. The first ones would not do: shards may be sorted by
        class. Nor would a permutation: of a billion samples it takes 8 GB."""
        generator, drawn = keyed_generator("spread"), dict[int, None]()
        while len(drawn) < min(count, len(self)):
            drawn.update(dict.fromkeys(torch.randint(len(self), (count,), generator=generator).tolist()))
        return list(drawn)[:count]

    def key(self, i: int) -> str:
        """The key of sample ``i``."""
        return self._read(i)[1].key

    def _read(self, i: int) -> tuple[ShardReader, Sample]:
        number = int(np.searchsorted(self._ends, i, side="right"))
        for _ in range(remote.ATTEMPTS):
            path = self._path(number)
            try:
                reader = self._reader(number)
                return reader, reader.read(i - int(self._ends[number]) + len(reader))
            except (FileNotFoundError, DataError):
                if not (self.cache and remote.is_url(self.shards[number][0].root)):
                    raise
                if path.is_file() and index_path(path).is_file():  # else another process deleted it to make room
                    if number in self._fetched_again:
                        raise
                    self._fetched_again.add(number)  # damaged here, by a power cut say: downloads are checked
                    path.unlink(missing_ok=True)
                    index_path(path).unlink(missing_ok=True)
                self._reader.cache_clear()
        manifest, shard = self.shards[number]
        fix = "other processes need the cache's room; raise data.cache_gb"
        raise DataError(f"{manifest.root}/{shard.name}: deleted from the cache before it was read, {remote.ATTEMPTS} times: {fix}")

    def _open(self, number: int) -> ShardReader:
        manifest, shard = self.shards[number]
        return manifest.open(shard, self._path(number))

    def _path(self, number: int) -> Path:
        manifest, shard = self.shards[number]
        return self._download(manifest, shard) if remote.is_url(manifest.root) else manifest.path(shard)

    def _download(self, manifest: Manifest, shard: Shard) -> Path:
        assert self.cache, "whoever opens data sets behind a URL has a cache for them"

        def whole(path: Path) -> None:
            if sha256(path) != shard.sha256:
                raise OSError("sha256 differs from the manifest")

        def fits(path: Path) -> None:
            if path.stat().st_size != index_size(shard.samples):
                raise OSError(f"not the index of {shard.samples} samples")

        name = f"{shard.sha256[:32]}.tar"
        ours, theirs = (index_path(Path(tar_name)).name for tar_name in (name, shard.name))
        tar = self.cache.file(f"{manifest.root}/{shard.name}", name, shard.bytes, whole)
        self.cache.file(f"{manifest.root}/{theirs}", ours, index_size(shard.samples), fits, beside=name)
        return tar


class LatentLoader:
    """Endless iterator over the micro-batches of one rank.

    Micro-batch ``a`` of the optimizer step that began at global position P covers the ``global_batch / accumulation`` positions from
    ``P + a * global_batch / accumulation``; rank r takes the r-th of ``world`` equal, contiguous slices. So the samples of a step, and
    of each micro-step, do not depend on the number of ranks. All of a step have one shape.

    Args:
        config: of the order, the worker processes and the mix.
        global_batch: samples per optimizer step, over all ranks and micro-steps; a multiple of ``accumulation * world``.
        accumulation: micro-steps per optimizer step.
        consumed: global position to begin at: samples that all ranks together have seen.
        prepare: runs on each ``Batch`` ahead of time, in the worker; the iterator then yields its result.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        config: DataConfig,
        *,
        seed: int,
        global_batch: int,
        accumulation: int,
        rank: int,
        world: int,
        consumed: int = 0,
        prepare: Callable[[Batch], Any] | None = None,
    ):
        assert global_batch % (accumulation * world) == 0, (global_batch, accumulation, world)
        micro = global_batch // accumulation
        weights = [config.weight, *(other.weight for other in config.mix)]
        orders = [Order(sets, weights, seed, config.window) for sets in dataset.sets.values()]
        order = orders[0] if len(orders) == 1 else BucketOrder(orders, global_batch, seed)
        batches = _Batches(dataset, order, seed, micro // world, prepare)
        loader: DataLoader[Any] = DataLoader(
            batches,
            batch_size=None,
            sampler=itertools.count(consumed + rank * (micro // world), micro),  # type: ignore[arg-type]
            num_workers=config.workers,
            prefetch_factor=config.prefetch if config.workers else None,
            multiprocessing_context="fork" if config.workers else None,  # nothing is pickled, and the index of shards is shared
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # not the global one: nothing here is random
            worker_init_fn=_leave_signals_to_the_rank,
        )
        self._iterator: Iterator[Any] = iter(loader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        item = next(self._iterator)
        if isinstance(item, UserError):
            self.close()
            raise item
        return item

    def close(self) -> None:
        """Stop the workers. The iterator ends."""
        self._iterator = iter(())


class _Batches(Dataset):
    """Micro-batches by the global position of their first sample."""

    def __init__(self, dataset: LatentDataset, order: Order | BucketOrder, seed: int, local: int, prepare: Callable[[Batch], Any] | None):
        self.dataset, self.order, self.seed, self.local, self.prepare = dataset, order, seed, local, prepare

    def __getitem__(self, position: int) -> Any:
        try:
            epochs, samples = self.order.at(position, self.local)
            batch = collate([self._visit(*visit) for visit in zip(epochs.tolist(), samples.tolist())], epochs, samples)
            return _shared(self.prepare(batch) if self.prepare else batch)
        except UserError as error:  # as a value: an exception would arrive with the worker's traceback around it
            return error

    def _visit(self, epoch: int, i: int) -> Latent:
        """Sample ``i`` as this epoch sees it: with a latent drawn from the posterior, if that is stored, and one of its captions first."""
        sample = self.dataset[i]
        if sample.std is not None:
            noise = torch.randn(sample.std.shape, generator=keyed_generator(self.seed, "posterior", epoch, i))
            sample = sample._replace(latent=sample.latent + sample.std * noise)
        if (count := len(sample.captions)) > 1:
            one = int(torch.randint(count, (), generator=keyed_generator(self.seed, "caption", epoch, i)))
            sample = sample._replace(captions=sample.captions[one:], texts=sample.texts[one:])
        return sample


def _shared(batch: T) -> T:
    """In a worker: move the tensors into shared memory. The queue would do it, but if there is no room the rank would wait for ever."""
    if worker := get_worker_info():
        try:
            for leaf in tree_leaves(batch):
                if isinstance(leaf, Tensor):
                    leaf.share_memory_()
        except RuntimeError as error:
            fix = "their batches find no room in /dev/shm; give it more (docker run --shm-size), or lower data.workers or data.prefetch"
            raise ConfigError("data.workers", worker.num_workers, f"{fix} ({in_a_line(error)})") from None
    return batch


def _leave_signals_to_the_rank(worker: int) -> None:
    """Ignore the signals by which SLURM or a terminal asks all processes of a job to stop: a rank still needs its workers to finish the
    step, and ends them itself."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
