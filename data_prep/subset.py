"""``ditmoe-data subset``: a small share of a data set, to try things on."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.finalize import statistics
from data_prep.sources import FLIP, below
from ditmoe_ds.errors import DataError
from ditmoe_ds.latents.format import Manifest, Sample, Shard, ShardReader, ShardWriter, Split, Splits, sha256


def subset(path: str, out: str, *, fraction: float, shard_size: int = 1000) -> None:
    """Copy the samples whose key's hash is below ``fraction`` into a finished folder ``out``; smaller fractions are among larger ones.

    Raises:
        DataError: ``path`` is not finished, ``out`` exists, or nothing is left to learn from.
    """
    manifest, folder = Manifest.load(path), Path(out)
    if folder.exists():
        raise DataError(f"--out={out!r}: exists; choose another folder or delete it")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    total, squares = torch.zeros(2, manifest.shape[0], dtype=torch.float64)
    histogram = np.zeros(manifest.num_classes, np.int64)
    splits = {}
    for name in ("train", "val"):
        shards: list[Shard] = []
        samples = _chosen(manifest, manifest.split(name), fraction)
        while part := list(itertools.islice(samples, shard_size)):
            tar = partial / f"{name}-{len(shards):06d}.tar"
            with ShardWriter(tar) as writer:
                for sample in part:
                    writer.write(sample.key, sample.meta, **sample.tensors)
                    if name == "train":
                        latent, label = sample.tensors["latent"].double(), sample.meta["label"]
                        total, squares = total + latent.sum((1, 2)), squares + latent.square().sum((1, 2))
                        if label is not None:
                            histogram[label] += 1
            shards.append(Shard(tar.name, len(part), tar.stat().st_size, sha256(tar)))
        splits[name] = Split(sum(shard.samples for shard in shards), tuple(shards))
    if not splits["train"].samples:
        shutil.rmtree(partial)
        raise DataError(f"--fraction={fraction}: leaves none of {manifest.splits.train.samples} training samples; choose a larger one")
    mean, std = statistics(total.numpy(), squares.numpy(), splits["train"].samples, manifest.shape)
    changes: dict[str, Any] = dict(mean=mean, std=std, class_histogram=tuple(histogram.tolist()), rejected=0, splits=Splits(**splits))
    dataclasses.replace(manifest, root=str(partial), **changes).save()
    partial.replace(folder)
    print(f"{out}: {splits['train'].samples} training and {splits['val'].samples} held-out latents")


def _chosen(manifest: Manifest, split: Split, fraction: float) -> Iterator[Sample]:
    for shard in split.shards:
        reader = ShardReader(manifest.path(shard), manifest)
        for i in range(len(reader)):
            sample = reader.read(i)
            # Not the hash that chose the held-out samples, or a small share would hold those alone.
            if below(f"subset {sample.key.removesuffix(FLIP)}", fraction):
                yield sample
