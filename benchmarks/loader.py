"""Samples per second of the loader, beside plain webdataset over the same files and beside reading the tars' bytes.

python benchmarks/loader.py [--seconds 5] [--folder build/loader] [--write]

Writes random latents of (4, 32, 32) in float16 (8 KB), without and with 64 x 768 bf16 text. Every reader makes float32 batches
of 32 latents. Ours shuffles (windows of 16,384), plain webdataset reads from the first shard to the last. The files are in the page
cache for all. --write puts the tables under "Measured" in loader.md.
"""

import argparse
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import webdataset
from report import Page
from runs import write_latents

from ditmoe_ds.latents.loader import DataConfig, LatentLoader
from ditmoe_ds.latents.manifest import Manifest

BATCH = 32


def ours(manifest: Manifest, workers: int) -> Iterator[Any]:
    config = DataConfig(manifest.root, workers=workers)
    dataset = config.open([manifest], "train")
    return LatentLoader(dataset, config, seed=0, global_batch=BATCH, accumulation=1, rank=0, world=1)


def plain(manifest: Manifest, workers: int) -> Iterator[Any]:
    """What one writes with webdataset: decode, take latent, label and text, make batches in the workers."""
    urls = [str(manifest.path(shard)) for shard in manifest.splits.train.shards]

    def fields(sample: dict[str, Any]) -> tuple[Any, ...]:
        text = (safetensors.torch.load(sample["text.safetensors"])["text"],) if manifest.text else ()
        return torch.from_numpy(sample["latent.npy"]).float(), sample["json"]["label"], *text

    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode().map(fields).batched(BATCH)
    return itertools.chain.from_iterable(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers) for _ in itertools.count())


def samples_per_second(batches: Iterator[Any], seconds: float) -> float:
    next(batches)  # the workers are up
    count, start = 0, time.monotonic()
    while (passed := time.monotonic() - start) < seconds:
        count += len(next(batches)[0])
    if hasattr(batches, "close"):
        batches.close()
    return count / passed


def bytes_alone(manifest: Manifest) -> float:
    """Samples per second of reading the files into one buffer."""
    buffer, start = bytearray(1 << 22), time.monotonic()
    for shard in manifest.splits.train.shards:
        with open(manifest.path(shard), "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return manifest.splits.train.samples / (time.monotonic() - start)


def median(measure: Callable[[], float]) -> float:
    return sorted(measure() for _ in range(3))[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement; the median of three counts")
    parser.add_argument("--folder", type=Path, default=Path("build/loader"), help="a new folder, deleted at the end")
    parser.add_argument("--write", action="store_true", help="put the figures into loader.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    page = Page(__file__, arguments.write, f"webdataset {webdataset.__version__}")
    try:
        page.table("", "workers", "ours, samples/s", "plain webdataset", "bytes alone", "ours / plain")
        for text in (False, True):
            manifest = write_latents(arguments.folder / f"text-{text}", 20, 250 if text else 1000, text=(64, 768) if text else None)
            what = "latents + 64 x 768 text" if text else "8 KB latents"
            alone = median(lambda manifest=manifest: bytes_alone(manifest))  # type: ignore[misc]
            for workers in (0, 1, 2):
                rates = [median(lambda read=read: samples_per_second(read(manifest, workers), arguments.seconds)) for read in (ours, plain)]  # type: ignore[misc]  # noqa: B023
                page.row(what, workers, *(f"{rate:,.0f}" for rate in (*rates, alone)), f"{rates[0] / rates[1]:.2f}")
            shutil.rmtree(arguments.folder / f"text-{text}")
        page.table("shards of 100 samples", "samples", "ours without workers, microseconds per sample")
        for shards in (10, 100, 1000):
            manifest = write_latents(arguments.folder / f"{shards}", shards, 100)
            rate = median(lambda: samples_per_second(ours(manifest, 0), arguments.seconds))  # noqa: B023
            page.row(f"{shards:,}", f"{shards * 100:,}", f"{1e6 / rate:.0f}")
            shutil.rmtree(arguments.folder / f"{shards}")
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
