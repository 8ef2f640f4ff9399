"""``ditmoe-data subset``: a small share of a data set, to try things on."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.sources import FLIP, below
from data_prep.tally import Tally, mean_and_std
from ditmoe_ds.errors import DataError
from ditmoe_ds.latents.manifest import EMPTY_TEXT, Manifest, Shard, Split, Splits, sha256
from ditmoe_ds.latents.tars import Sample, ShardWriter


def subset(path: str, out: str, *, fraction: float, shard_size: int = 1000) -> None:
    """Copy the samples whose key's hash is below ``fraction`` into a finished folder ``out``; smaller fractions are subsets of larger ones.

    Raises:
        DataError: ``path`` is not finished or damaged, ``out`` exists, or nothing is left to learn from.
    """
    manifest, folder = Manifest.load(path, "DIR"), Path(out)
    if folder.exists():
        raise DataError(f"--out={out!r}: exists; choose another folder or delete it")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tally = Tally(channels=manifest.shapes[0][0])
    splits = {}
    for name in ("train", "val"):
        shards: list[Shard] = []
        for shape in manifest.shapes:
            samples = _chosen(manifest, manifest.split(name), shape, fraction)
            while part := list(itertools.islice(samples, shard_size)):
                tar = partial / f"{name}-{len(shards):06d}.tar"
                with ShardWriter(tar) as writer:
                    for sample in part:
                        writer.write(sample.key, sample.meta, **sample.tensors)
                        tally.add(name, sample.tensors["latent"], sample.meta["label"])
                shards.append(Shard(tar.name, len(part), tar.stat().st_size, sha256(tar), shape))
        splits[name] = Split(sum(shard.samples for shard in shards), tuple(shards))
    if not splits["train"].samples:
        shutil.rmtree(partial)
        raise DataError(f"--fraction={fraction}: leaves none of {manifest.splits.train.samples} training samples; choose a larger one")
    mean, std = mean_and_std(tally.sum.numpy(), tally.squares.numpy(), tally.pixels)
    histogram = (*tally.histogram, *[0] * (manifest.num_classes - len(tally.histogram)))
    changes: dict[str, Any] = dict(mean=mean, std=std, class_histogram=histogram, rejected=0, splits=Splits(**splits))
    if manifest.text:
        shutil.copyfile(Path(manifest.root, EMPTY_TEXT), partial / EMPTY_TEXT)
    dataclasses.replace(manifest, root=str(partial), **changes).save()
    partial.replace(folder)
    print(f"{out}: {splits['train'].samples} training and {splits['val'].samples} held-out latents")


def _chosen(manifest: Manifest, split: Split, shape: tuple[int, ...], fraction: float) -> Iterator[Sample]:
    for shard in split.shards:
        if shard.shape != shape:
            continue
        reader = manifest.open(shard)
        manifest.verify(shard)  # a copy gets a sha256 of its own, which would vouch for damage
        for i in range(len(reader)):
            sample = reader.read(i)
            # Not the hash that chose the held-out samples, or a small share would hold those alone.
            if below(f"subset {sample.key.removesuffix(FLIP)}", fraction):
                yield sample
