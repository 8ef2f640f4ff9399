"""``ditmoe-data verify``: is everything still intact, and does it look like its images?"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections import Counter
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_prep import images
from data_prep.ahead import ahead
from data_prep.sources import FLIP, hash_of, open_source
from ditmoe_ds.errors import DataError
from ditmoe_ds.latents.images import save_pairs
from ditmoe_ds.latents.manifest import Manifest, Shard, Split, Splits
from ditmoe_ds.latents.tars import Sample
from ditmoe_ds.latents.vae import decode, load_vae
from ditmoe_ds.progress import Progress

SHEET = 16
"""Samples on a contact sheet."""
FEWEST = 20_000
"""Samples that are read in the time in which a process starts."""


def verify(path: str, *, workers: int = 1, sheet: str | None = None, source: str | None = None) -> None:
    """Read all of a finished folder: sha256, counts, shapes, labels, that every value is finite and every key unique.

    Args:
        workers: processes that read shards, fewer if there are not ``FEWEST`` samples for each; 1 is this one.
        sheet: a picture to write: rows of images of ``source``, each above the row of their decoded latents.
        source: where the images are, as for ``encode``; None is the manifest's, if that is a folder here or a sample: URLs may be commands.

    Raises:
        DataError: the first thing that is wrong; or a process died.
    """
    manifest = Manifest.load(path, "DIR")
    if sheet:
        Path(sheet).parent.mkdir(parents=True, exist_ok=True)  # now, not after hours of reading
    if manifest.text:
        manifest.empty_text()
    histogram, keys = Counter[int](), []
    check = partial(_check, replace(manifest, splits=Splits(Split(0, ()), Split(0, ()))))  # a shard's process needs no list of all
    total, shards = sum(shard.samples for shard in manifest.shards()), ((shard, shard) for shard in manifest.shards())
    workers = min(workers, total // FEWEST)
    with (
        Progress("verify", "samples", total) as progress,
        closing(ahead(shards, check, workers if workers > 1 else 0, "--workers")) as checked,
    ):
        for split in ("train", "val"):
            for shard, (labels, hashes) in islice(checked, len(manifest.split(split).shards)):
                keys.append(hashes)
                if split == "train":
                    histogram += labels
                progress.update(shard.samples)
            if manifest.split(split).samples != sum(shard.samples for shard in manifest.split(split).shards):
                raise DataError(f"{path}: the shards of split {split} do not add up to its number of samples; encode the data again")
    if manifest.class_histogram != tuple(histogram[label] for label in range(manifest.num_classes)):
        raise DataError(f"{path}: the training samples of each class are not what the manifest says; encode the data again")
    _check_unique(manifest, keys)
    print(f"{path}: intact, {manifest.splits.train.samples} training and {manifest.splits.val.samples} held-out samples")
    if sheet:
        psnr = contact_sheet(manifest, Path(sheet), source)
        shown = min(SHEET, manifest.splits.val.samples or manifest.splits.train.samples)
        print(f"{sheet}: {shown} images and their decoded latents, PSNR {psnr:.1f} dB")


def contact_sheet(manifest: Manifest, picture: Path, source: str | None) -> float:
    """Write the picture described in ``verify``; returns the mean PSNR in dB, of 8-bit pixels.

    Raises:
        DataError: the source cannot be read, or lacks a sample's image.
    """
    kind, _, folder = manifest.source.partition(":")  # whoever made the data wrote this
    if source is None and kind != "sample" and not (kind in ("folder", "hf") and os.path.isabs(folder) and os.path.isdir(folder)):
        raise DataError(f"--source=None: the images are said to be of {manifest.source!r}, which is no folder here; say where to read them")
    samples = spread(manifest, manifest.splits.val.shards or manifest.splits.train.shards, SHEET)
    wanted = {sample.key.removesuffix(FLIP) for sample in samples}
    origins = {}
    for item in open_source(source or manifest.source, wanted="images").items():
        if item.key in wanted:
            origins[item.key] = item.image
            if len(origins) == len(wanted):
                break
    missing = wanted - origins.keys()
    if missing:
        raise DataError(f"--source={source or manifest.source!r}: has no image of key {min(missing)!r}; give the source that was encoded")
    originals = []
    for sample in samples:
        height, width = (side * manifest.downsample for side in sample.tensors["latent"].shape[1:])
        found = images.decode(origins[sample.key.removesuffix(FLIP)], [(height, width)])
        if isinstance(found, str):
            raise DataError(f"--source={source or manifest.source!r}: the image of key {sample.key!r} cannot be read ({found})")
        originals.append(torch.from_numpy(np.ascontiguousarray(found[:, ::-1] if sample.key.endswith(FLIP) else found)))
    after = decoded(manifest, samples)
    save_pairs(originals, after, picture, columns=8)
    errors = [(a.float() - b.float()).square().mean().clamp(min=1e-12).item() for a, b in zip(originals, after)]
    return float(np.mean([10 * math.log10(255**2 / error) for error in errors]))


def spread(manifest: Manifest, shards: tuple[Shard, ...], count: int) -> list[Sample]:
    """At most ``count`` samples, evenly spread over ``shards``."""
    total = sum(shard.samples for shard in shards)
    picks = np.unique(np.linspace(0, total - 1, min(count, total)).astype(int))
    found, start = [], 0
    for shard in shards:
        reader = manifest.open(shard)
        found += [reader.read(int(pick) - start) for pick in picks if start <= pick < start + shard.samples]
        start += shard.samples
    return found


def decoded(manifest: Manifest, samples: list[Sample]) -> list[Tensor]:
    """What the VAE makes of stored latents: each (H, W, 3) uint8."""
    vae = load_vae(manifest.vae, "cuda" if torch.cuda.is_available() else "cpu", manifest.vae_sha256)
    scale, shift = manifest.scaling_factor, manifest.shift_factor
    return [decode(vae, (sample.tensors["latent"].float()[None] - shift) * scale, scale, shift)[0].cpu() for sample in samples]


def _check(manifest: Manifest, shard: Shard) -> tuple[Counter[int], np.ndarray]:
    """Check every sample of a shard. Returns how often it has each label, and the hash of each key (samples,)."""
    if multiprocessing.parent_process():  # one of as many as there are cores
        torch.set_num_threads(1)
    manifest.verify(shard)
    reader = manifest.open(shard)
    labels, keys = Counter[int](), np.empty(len(reader), np.uint64)
    for i in range(len(reader)):
        sample = reader.read(i)
        for name, tensor in sample.tensors.items():
            if not tensor.isfinite().all():
                raise DataError(f"{reader.path}: key {sample.key!r} has a {name} with values that are not finite; encode the data again")
        keys[i] = hash_of(sample.key)
        label = sample.meta["label"]
        if label is not None:
            if not 0 <= label < manifest.num_classes:
                raise DataError(f"{reader.path}: key {sample.key!r} has label {label}, the manifest has {manifest.num_classes} classes")
            labels[label] += 1
    return labels, keys


def _check_unique(manifest: Manifest, keys: list[np.ndarray]) -> None:
    """``keys``: of each shard, its keys' hashes."""
    hashes = np.concatenate(keys)
    found, counts = np.unique(hashes, return_counts=True)
    if len(found) == len(hashes):
        return
    ends = np.cumsum([len(part) for part in keys])
    places = np.flatnonzero(hashes == found[counts.argmax()])
    shards = [manifest.shards()[i] for i in np.searchsorted(ends, places, side="right")]
    reader = manifest.open(shards[0])
    key = next(sample.key for sample in map(reader.read, range(len(reader))) if hash_of(sample.key) == hashes[places[0]])
    what = f"{len(hashes) - len(found)} samples have the key of another, such as {key!r} in {', '.join(s.name for s in shards[:5])}"
    raise DataError(f"{manifest.root}: {what}; leave one of the inputs out and encode again")
