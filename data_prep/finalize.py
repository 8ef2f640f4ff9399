"""``ditmoe-data finalize``: makes a finished folder of units that are all done."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_prep.tally import mean_and_std
from data_prep.units import Request, load_record
from ditmoe_ds.errors import ConfigError, DataError, some
from ditmoe_ds.latents.manifest import EMPTY_TEXT, FORMAT, READERS, VERSION, Manifest, Shard, Split, Splits, Text, sha256
from ditmoe_ds.progress import Progress


def finalize(path: str, *, max_rejected: float = 0.01) -> None:
    """Write ``rejected.jsonl`` and ``manifest.json`` of a folder whose units are all encoded.

    Raises:
        ConfigError: more than ``max_rejected`` of all images are bad.
        DataError: units are missing; nothing is left to learn from.
    """
    root = Path(path)
    request = Request.load(root)
    with ThreadPoolExecutor(READERS) as readers, Progress("finalize", "units", request.units) as progress:
        found = list(progress.over(readers.map(functools.partial(load_record, root), range(request.units))))
    missing = [str(unit) for unit, record in enumerate(found) if record is None]
    if missing:
        fix = f"run {request.command(root, max_rejected)}"
        raise DataError(f"{path}: of {request.units} units {len(missing)} are missing ({some(missing)}); {fix}")
    records = [record for record in found if record is not None]
    rejected = [rejection for record in records for rejection in record.rejected]
    images = sum(record.images for record in records)
    if len(rejected) > max_rejected * images:
        last = f"the last: {rejected[-1].source}: {rejected[-1].reason}"
        raise ConfigError("--max-rejected", max_rejected, f"{len(rejected)} of {images} images could not be encoded; {last}; allow more")
    train, val = (_split(shards) for shards in ([s for r in records for s in r.train], [s for r in records for s in r.val]))
    if not train.samples:
        gone = f"{val.samples} samples are held out, {len(rejected)} images rejected"
        fix = "encode into another folder, with a smaller --holdout or other images"
        raise DataError(f"{path}: of {images} images none is left to learn from: {gone}; {fix}")

    labels = max(len(record.histogram) for record in records)
    names = request.class_names if request.class_names is not None else tuple(map(str, range(labels)))
    histogram = np.zeros(len(names), np.int64)
    for record in records:
        histogram[: len(record.histogram)] += np.array(record.histogram, np.int64)
    if untaught := [name for name, count in zip(names, histogram) if not count]:
        print(f"{path}: of {len(names)} classes {len(untaught)} have no training sample: {some(untaught)}", file=sys.stderr)
    sums, squares = (np.sum([getattr(r, field) for r in records], axis=0) for field in ("sum", "squares"))
    mean, std = mean_and_std(sums, squares, sum(record.pixels for record in records))
    partial = root / "rejected.jsonl.partial"
    partial.write_text("".join(json.dumps(dataclasses.asdict(rejection)) + "\n" for rejection in rejected))
    partial.replace(root / "rejected.jsonl")
    text = None
    if request.text:
        width = max(record.text_width for record in records)
        text = Text(request.text, request.text_sha256, width, request.text_max_tokens, sha256(root / EMPTY_TEXT))
    Manifest(
        root=path,
        format=FORMAT,
        version=VERSION,
        source=request.source,
        vae=request.vae,
        vae_sha256=request.vae_sha256,
        scaling_factor=request.scaling_factor,
        shift_factor=request.shift_factor,
        downsample=request.downsample,
        dtype=request.dtype,
        store=request.store,
        text=text,
        mean=mean,
        std=std,
        num_classes=len(names),
        class_names=names,
        class_histogram=tuple(histogram.tolist()),
        rejected=len(rejected),
        splits=Splits(train, val),
    ).save()
    shutil.rmtree(root / "partial", ignore_errors=True)  # of killed processes
    shapes = ", ".join(map(str, sorted({shard.shape for shard in (*train.shards, *val.shards)})))
    print(f"{path}: {train.samples} training and {val.samples} held-out latents of shape {shapes}, {len(rejected)} images rejected")


def _split(shards: list[Shard]) -> Split:
    return Split(sum(shard.samples for shard in shards), tuple(shards))
