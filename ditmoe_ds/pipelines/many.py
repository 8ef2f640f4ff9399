"""Many images, by any number of ranks, into a folder of PNGs or one npz in ADM's layout. A killed run can be continued.

Image i is a function of (seed, i) and the settings: on a CPU bit for bit, for which each image is computed alone by one thread (a
matrix product rounds differently with other rows or threads); on a GPU within rounding, batch by batch. ``samples.json`` says what the
images are.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from ditmoe_ds.diffusion.sampling import Sampler
from ditmoe_ds.distributed.topology import World, decided
from ditmoe_ds.errors import ConfigError, loading
from ditmoe_ds.pipelines.parts import DESCRIPTION, describe, read_description, save_png
from ditmoe_ds.pipelines.run import Run
from ditmoe_ds.progress import Progress


@dataclass(frozen=True)
class Target:
    """Where the images go: a folder, or FILE.npz, into which such a folder is packed at the end."""

    out: Path

    @property
    def npz(self) -> bool:
        return self.out.suffix == ".npz"

    @property
    def folder(self) -> Path:
        """The folder of the PNGs."""
        return self.out.with_name(self.out.name + ".parts") if self.npz else self.out

    @property
    def description(self) -> Path:
        """What the images are, as JSON: ``samples.json`` in the folder, FILE.json beside FILE.npz."""
        return self.out.with_suffix(".json") if self.npz else self.out / DESCRIPTION

    def image(self, number: int) -> Path:
        return self.folder / f"{number:06d}.png"

    def begin(self, settings: dict[str, Any], count: int) -> list[int]:
        """Write the description or, if there is one, compare with it. Images may be added to a set unless it is a finished npz.

        Returns:
            The numbers of the images that are missing.

        Raises:
            ConfigError: something else is there, or images of other settings.
        """
        packed = self.npz and self.out.is_file()
        noted = read_description(self.description) if packed else None
        if noted and (number := noted.get("num", count)) < count:
            fix = f"{self.out} has {number} images, and a finished npz is not extended (a folder is); choose another --out"
            raise ConfigError("--num", count, fix)
        describe(self.description, settings, "--out", self.out, self.folder, grows="" if packed else "num")
        if packed:
            shutil.rmtree(self.folder, ignore_errors=True)  # of a process that was killed before it removed them
            return []
        self.folder.mkdir(parents=True, exist_ok=True)
        return [number for number in range(count) if not self.image(number).is_file()]

    def pack(self, count: int, labels: Sequence[int] | None) -> None:
        """Write the npz: ``arr_0`` uint8 (N, H, W, 3) and, of class models, ``arr_1`` int64 (N,). Holds one image at a time.

        Raises:
            DataError: an image cannot be read.
        """
        unfinished = self.out.with_name(self.out.name + ".partial")
        with zipfile.ZipFile(unfinished, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                for number in range(count):
                    with loading(f"{self.image(number)} cannot be read; remove it and start again"):
                        image = np.asarray(Image.open(self.image(number)))
                    if not number:
                        header = dict(descr="|u1", fortran_order=False, shape=(count, *image.shape))
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(image.tobytes())
            if labels is not None:
                with archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(labels, dtype=np.int64))
        os.replace(unfinished, self.out)
        shutil.rmtree(self.folder)


class Behind:
    """Decodes and writes one batch while the next is sampled: in a thread and, on a GPU, in a stream of its own."""

    def __init__(self, run: Run):
        self.run = run
        self.thread = ThreadPoolExecutor(1, initializer=self._start_thread, initargs=(torch.get_num_threads(),))
        self.stream = torch.cuda.Stream(run.device) if run.device.type == "cuda" else None
        self.last: Future[None] | None = None

    def __call__(self, latents: Tensor, paths: list[Path]) -> None:
        """Begin to make images of the first ``len(paths)`` latents. Waits for the batch before, and raises what that one raised."""
        self._wait()
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.run.device))
        self.last = self.thread.submit(self._finish, latents, paths)

    def _start_thread(self, threads: int) -> None:
        """A new thread would compute with as many threads as there are cores, and take memory on the first GPU, as all ranks of a host."""
        torch.set_num_threads(threads)
        if self.stream:
            torch.cuda.set_device(self.run.device)

    def _finish(self, latents: Tensor, paths: list[Path]) -> None:
        with torch.cuda.stream(self.stream):
            images = self.run.images(latents)
        for path, image in zip(paths, images, strict=False):
            save_png(path, image)

    def _wait(self) -> None:
        if self.last:
            self.last.result()

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.thread.shutdown()
        if kind is None:
            self._wait()


def sample_many(
    run: Run,
    world: World,
    target: Target,
    asked: Sequence[int] | Sequence[str],
    count: int,
    batch: int,
    settings: dict[str, Any],
    *,
    seed: int,
    sampler: Sampler | None,
    steps: int,
    **options: Any,
) -> None:
    """Make the images 0..count that are missing. Collective.

    Args:
        asked: classes or prompts, which the images take in turn.
        batch: images computed together on a GPU, unless they would compete for experts.
        settings: what the description says.
        options: further arguments of the pipeline.

    Raises:
        ConfigError: as ``Target.begin``; and as ``Run.sample``.
    """
    missing = decided(lambda: target.begin(settings, count))
    if run.device.type == "cpu":
        torch.set_num_threads(1)
    models = filter(None, (run.model, options.get("weak_transformer")))
    if run.device.type == "cpu" or any(model.config.images_compete for model in models):
        batch = 1
    batches = [missing[first : first + batch] for first in range(0, len(missing), batch)]
    turns = -(-len(batches) // world.size)  # every rank takes as many, since with expert parallelism every forward is collective
    with Behind(run) as finish, Progress("sample", "images", len(missing), shown=world.rank == 0) as progress:
        for turn in range(turns):
            place = turn * world.size + world.rank
            numbers = batches[place if place < len(batches) else 0]
            padded = numbers + numbers[-1:] * (batch - len(numbers))  # one shape, for compiled models
            latents = run.numbered(padded, [asked[i % len(asked)] for i in padded], seed, sampler, steps, **options)
            if place < len(batches):
                finish(latents, [target.image(number) for number in numbers])
            progress.update(sum(map(len, batches[turn * world.size : (turn + 1) * world.size])))
    dist.barrier()
    if target.npz:
        labels = [int(asked[i % len(asked)]) for i in range(count)] if run.model.config.num_classes else None
        decided(lambda: None if target.out.is_file() else target.pack(count, labels))
