"""``ditmoe-data encode``: images to latents to shards, unit by unit."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_prep import images
from data_prep.ahead import ahead
from data_prep.finalize import finalize
from data_prep.sources import FLIP, Item, Source, is_heldout, open_source
from data_prep.units import (
    Rejection,
    Request,
    UnitWriter,
    claim_folder,
    device_of_rank,
    load_record,
    placed,
    worker_from_environment,
    write_text,
)
from ditmoe_ds.errors import ConfigError, DataError
from ditmoe_ds.latents.manifest import EMPTY_TEXT, Manifest, weights_sha256
from ditmoe_ds.latents.tars import captions_of, text_names
from ditmoe_ds.latents.text import load_text_encoder, text_width
from ditmoe_ds.latents.vae import LatentSpace, is_hub_id, latent_space, load_vae
from ditmoe_ds.latents.vae import encode as encode_images
from ditmoe_ds.progress import Progress
from ditmoe_ds.rng import keyed_generator

ENOUGH = 100
"""Images to see before the share of rejected ones is judged."""


def encode(
    source: str,
    vae: str,
    out: str,
    *,
    size: Sequence[images.Size] = ((32, 32),),
    shard_size: int = 1000,
    holdout: float = 0.1,
    batch: int = 100,
    dtype: Any = "float32",
    store: Any = "mean",
    seed: int = 0,
    flip_copies: bool = False,
    text: str | None = None,
    text_max_tokens: int = 77,
    classes: int | None = None,
    decoders: int = 0,
    worker: tuple[int, int] | None = None,
    max_rejected: float = 0.01,
) -> None:
    """Encode the images of ``source`` into the folder ``out``: all of them, or worker i's share of n. Units that are done are kept.

    Raises:
        ConfigError: a value that does not fit the VAE or the source.
        DataError: the source or VAE cannot be read, ``out`` cannot be written or holds another request, too many bad images.
    """
    number, count = worker or worker_from_environment()
    found = open_source(source, shard_size, classes, "captions" if text else "classes")
    settings = dict(shard_size=shard_size, batch=batch, holdout=holdout, dtype=dtype, store=store, seed=seed, flip_copies=flip_copies)
    request = _request(found, vae, size, text, text_max_tokens, settings)
    root = Path(out)
    open_encoder = functools.cache(functools.partial(_Encoder, request))
    claim_folder(root, dataclasses.asdict(request), first=open_encoder, until_a_unit="batch")
    if (root / "manifest.json").is_file():
        Manifest.load(root)
        print(f"{out}: already complete")
        return
    mine = range(number, found.units, count)
    done = {unit: record for unit in mine if (record := load_record(root, unit))}
    todo = [unit for unit in mine if unit not in done]
    if todo:
        rejections = _Rejections(max_rejected)
        for record in done.values():
            rejections.add(record.images, record.rejected)
        encoder = open_encoder()
        with Progress("encode", "images") as progress:
            try:
                if encoder.text and not (root / EMPTY_TEXT).is_file():
                    write_text(root / EMPTY_TEXT, encoder.text([""])[0])
                _encode(root, found, todo, encoder, decoders, rejections, progress)
            except FileNotFoundError:
                if not (root / "manifest.json").is_file():
                    raise DataError(f"--out={out!r}: another process has taken over a unit of this one; start each worker once") from None
            except torch.OutOfMemoryError:
                raise ConfigError("--batch", batch, "the GPU's memory does not hold so many images at once; choose fewer") from None
            except OSError as error:
                reason = f"cannot write ({error.strerror or error})"
                raise DataError(f"--out={out!r}: {reason}; once that is mended, the same command continues") from None
        if encoder.text and encoder.text.cut:
            print(f"{encoder.text.cut} captions were longer than {text_max_tokens} tokens and are cut")
    if (root / "manifest.json").is_file():
        print(f"{out}: others have completed it")
    elif count == 1:
        finalize(out, max_rejected=max_rejected)
    else:
        then = shlex.join(["ditmoe-data", "finalize", out, "--max-rejected", str(max_rejected)])
        print(f"{out}: worker {number} of {count} is done; when all are, run {then}")


def check(source: str, vae: str, size: Sequence[images.Size], store: str, text: str | None, classes: int | None) -> None:
    """What can be checked without loading a model, for who submits an encoding that runs later.

    Hub ids are left out: a login node may have no network. A name without a slash that is no folder can be the hub id of a text encoder.

    Raises:
        ConfigError, DataError: as ``encode``.
    """
    open_source(source, classes=classes, wanted="captions" if text else "classes")
    if not is_hub_id(vae):
        _fitting_space(vae, size, store)
    if text and not is_hub_id(text) and (Path(text).is_dir() or "/" in text):
        text_width(text, "--text")


def _fitting_space(vae: str, size: Sequence[images.Size], store: str) -> LatentSpace:
    space = latent_space(vae)
    if any(side % space.downsample for sides in size for side in sides):
        raise ConfigError("--size", images.size_names(size), f"must be multiples of {space.downsample}, the VAE's downsampling")
    if store != "mean" and not space.posterior:
        raise ConfigError("--store", store, "this VAE has no posterior to draw from; use mean")
    return space


def _request(
    found: Source, vae: str, size: Sequence[images.Size], text: str | None, text_max_tokens: int, settings: dict[str, Any]
) -> Request:
    """``settings``: fields of the request that are as the user gave them."""
    space = _fitting_space(vae, size, settings["store"])
    return Request(
        source=placed(found.name),
        source_sha256=found.sha256,
        units=found.units,
        class_names=found.class_names,
        vae=_resolved(vae),
        vae_sha256=weights_sha256(vae),
        scaling_factor=space.scaling_factor,
        shift_factor=space.shift_factor,
        downsample=space.downsample,
        shapes=tuple((space.channels, height // space.downsample, width // space.downsample) for height, width in size),
        sizes=tuple(size),
        text=_resolved(text) if text else None,
        text_sha256=weights_sha256(text) if text else None,
        text_max_tokens=text_max_tokens if text else 0,
        **settings,
    )


def _resolved(path_or_id: str) -> str:
    return str(Path(path_or_id).resolve()) if Path(path_or_id).is_dir() else path_or_id


class _Task(NamedTuple):
    """A batch of one unit."""

    unit: int
    items: list[Item]
    last: bool


def _tasks(root: Path, source: Source, units: list[int], batch: int) -> Iterator[_Task]:
    for unit in units:
        if load_record(root, unit):  # another worker has done it meanwhile
            continue
        items = iter(source.unit(unit))
        part = list(itertools.islice(items, batch))
        while following := list(itertools.islice(items, batch)):
            yield _Task(unit, part, last=False)
            part = following
        yield _Task(unit, part, last=True)


class _Rejections:
    """How many images this worker saw, and how many of them were bad."""

    def __init__(self, limit: float):
        self.limit, self.seen, self.number = limit, 0, 0
        self.last: Rejection | None = None

    def add(self, images: int, rejected: Sequence[Rejection]) -> None:
        """Count those of a unit."""
        self.seen += images
        self.number += len(rejected)
        self.last = rejected[-1] if rejected else self.last

    def check(self) -> None:
        """Raises ConfigError if they are too many."""
        if self.last and self.seen >= ENOUGH and self.number > self.limit * self.seen:
            fix = f"{self.number} of {self.seen} images could not be encoded; the last: {self.last.source}: {self.last.reason}"
            raise ConfigError("--max-rejected", self.limit, f"{fix}; repair them or allow more")


def _encode(
    root: Path, source: Source, units: list[int], encoder: _Encoder, decoders: int, rejections: _Rejections, progress: Progress
) -> None:
    before, finished = rejections.seen, 0
    if source.images is not None:
        progress.total = -(-source.images * len(units) // source.units)
    with ExitStack() as stack:
        unit: UnitWriter | None = None
        tasks = _tasks(root, source, units, encoder.request.batch)
        batches = ((task, [(item.image, item.caption_file) for item in task.items]) for task in tasks)
        for task, contents in ahead(batches, functools.partial(images.read, sizes=encoder.request.sizes), decoders, "--decoders"):
            if unit is None:
                unit = stack.enter_context(UnitWriter(root, task.unit, encoder.request.shapes, encoder.text_width))
            encoder.add(unit, task.items, contents)
            progress.update(len(task.items))
            if task.last:
                encoder.flush(unit)
                rejections.add(unit.images, unit.rejected)
                rejections.check()
                unit.finish()
                unit, finished = None, finished + 1
                if source.images is None:  # the units to come are as large as those so far
                    progress.total = round((rejections.seen - before) / finished * len(units))


class _Encoder:
    """Images and captions to samples."""

    def __init__(self, request: Request):
        self.request = request
        self.device = device_of_rank()
        self.vae = load_vae(request.vae, self.device)
        self.text = load_text_encoder(request.text, request.text_max_tokens, self.device) if request.text else None
        self.text_width = self.text.width if self.text else 0
        self.waiting: dict[tuple[int, ...], list[tuple[Item, np.ndarray]]] = {}

    def add(self, unit: UnitWriter, items: list[Item], contents: list[tuple[np.ndarray | str, str | None]]) -> None:
        """Encode ``items`` into ``unit``. They wait until there is a full batch of their size.

        Args:
            contents: of each item its pixels (height, width, 3) uint8, or the reason why there are none; and its caption, if in a file.
        """
        unit.images += len(items)
        for item, (found, caption) in zip(items, contents):
            if isinstance(found, str):
                unit.rejected.append(Rejection(item.key, item.origin, found))
                continue
            waiting = self.waiting.setdefault(found.shape, [])
            waiting.append((item if caption is None else dataclasses.replace(item, caption=caption), found))
            if len(waiting) == self.request.batch:
                self._write(unit, self.waiting.pop(found.shape))

    def flush(self, unit: UnitWriter) -> None:
        """Encode what still waits."""
        for shape in sorted(self.waiting):
            self._write(unit, self.waiting.pop(shape))

    def _write(self, unit: UnitWriter, good: list[tuple[Item, np.ndarray]]) -> None:
        batch = torch.from_numpy(np.stack([found for _, found in good])).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        tensors = self._latents(batch, [item.key for item, _ in good])
        if self.request.flip_copies:
            flipped = self._latents(batch.flip(-1), [item.key + FLIP for item, _ in good])
        metas = [self._meta(item) for item, _ in good]
        texts = self._texts([captions_of(meta) for meta in metas])
        for i, (item, _) in enumerate(good):
            copies = {item.key: tensors[i]} | ({item.key + FLIP: flipped[i]} if self.request.flip_copies else {})
            if not all(tensor.isfinite().all() for copy in copies.values() for tensor in copy.values()):
                reason = f"its latent has values that are not finite in {self.request.dtype}"
                unit.rejected.append(Rejection(item.key, item.origin, reason))
                continue
            split = "val" if is_heldout(item.key, self.request.holdout) else "train"
            try:
                for key, copy in copies.items():  # of the same size
                    unit.write(split, key, metas[i], **copy, **texts[i])
            except ValueError as error:
                unit.rejected.append(Rejection(item.key, item.origin, str(error)))

    def _texts(self, captions: list[list[str]]) -> list[dict[str, Tensor]]:
        """For each sample, by its name, the text of each of its captions; nothing without an encoder."""
        if not self.text:
            return [{} for _ in captions]
        flat, batch = list(itertools.chain(*captions)), self.request.batch
        texts = itertools.chain(*(self.text(flat[start : start + batch]) for start in range(0, len(flat), batch)))
        return [dict(zip(text_names(len(own)), itertools.islice(texts, len(own)))) for own in captions]

    def _latents(self, batch: Tensor, keys: list[str]) -> list[dict[str, Tensor]]:
        """What is stored of each image: ``latent`` (C, H, W) and, for "mean+std", ``std`` (C, H, W)."""
        dtype = getattr(torch, self.request.dtype)
        mean, std = (part.float().cpu() if part is not None else None for part in encode_images(self.vae, batch))
        assert mean is not None
        if self.request.store == "mean":
            return [{"latent": latent.to(dtype)} for latent in mean]
        assert std is not None
        if self.request.store == "mean+std":
            return [{"latent": latent.to(dtype), "std": deviation.to(dtype)} for latent, deviation in zip(mean, std)]
        noise = [torch.randn(mean.shape[1:], generator=keyed_generator(self.request.seed, "posterior", key)) for key in keys]
        return [{"latent": (mean[i] + std[i] * noise[i]).to(dtype)} for i in range(len(keys))]

    def _meta(self, item: Item) -> dict[str, Any]:
        names, name = self.request.class_names, None
        if item.label is not None:
            if names is not None and item.label >= len(names):
                raise DataError(f"{item.origin}: has label {item.label}, the source has {len(names)} classes; see --classes")
            name = names[item.label] if names is not None else str(item.label)
        return {"label": item.label, "class": name, "caption": item.caption, "source": item.origin}
