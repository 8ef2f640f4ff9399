"""What a folder of VAE latents holds: tar files, described by one manifest.

    manifest.json
    train-000000.tar ...         shards, see ``latents.tars``
    val-000000.tar ...
    train-000000.index.npy ...   where each sample begins in the tar, and where the last ends
    empty.text.safetensors       the tokens of an empty caption, if there is text

The same input gives the same bytes on every run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch

from ditmoe_ds.config import build
from ditmoe_ds.errors import ConfigError, DataError
from ditmoe_ds.latents import remote
from ditmoe_ds.latents.tars import LEAVE_OUT, REMAKE, ShardReader, parse_text

FORMAT, VERSION = "ditmoe-latents", 3
EMPTY_TEXT = "empty.text.safetensors"
READERS = 16
"""Threads that ask for files: a file server takes about a millisecond for each."""
SplitName = Literal["train", "val"]


@dataclasses.dataclass(frozen=True)
class Shard:
    """One tar file; ``name`` is relative to the manifest's folder."""

    name: str
    samples: int
    bytes: int
    sha256: str
    shape: tuple[int, ...]
    """(C, H, W) of its latents; with aspect-ratio buckets, shards differ."""


@dataclasses.dataclass(frozen=True)
class Split:
    """The shards of one split, in order."""

    samples: int
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Splits:
    """Samples to learn from, and the held-out ones."""

    train: Split
    val: Split


@dataclasses.dataclass(frozen=True)
class Text:
    """What encoded the captions."""

    encoder: str
    """Folder or hub id of a transformers model; a folder is stored as that of ``Manifest.vae``."""
    encoder_sha256: str | None
    """Digest of its weights; None for a hub id."""
    width: int
    max_tokens: int
    """Longer captions are cut."""
    empty_sha256: str
    """Digest of ``empty.text.safetensors``, the tokens of an empty caption."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a finished folder of latents holds."""

    root: str
    """Folder of the shards; not stored."""
    format: str
    version: int
    source: str
    """Where the images came from, as given to ``ditmoe-data encode``."""
    vae: str
    """Absolute folder of the VAE, or its hub id. A folder beside ``root`` is stored relative to it, so both can move together."""
    vae_sha256: str | None
    """Digest of the VAE's weights; None for a hub id."""
    scaling_factor: float
    """Latents are learned as ``(x - shift_factor) * scaling_factor``."""
    shift_factor: float
    downsample: int
    """Image pixels per latent pixel, along one side."""
    dtype: Literal["float32", "float16", "bfloat16"]
    store: Literal["mean", "mean+std", "sample"]
    """Of the VAE's posterior: its mean; mean and standard deviation, to be sampled at each visit; or one sample."""
    text: Text | None
    mean: tuple[float, ...]
    """(C,) of the unscaled training latents."""
    std: tuple[float, ...]
    """(C,) of the unscaled training latents."""
    num_classes: int
    """0 for data without classes."""
    class_names: tuple[str, ...]
    class_histogram: tuple[int, ...]
    """Training samples of each class."""
    rejected: int
    """Images of the source that could not be encoded; ``rejected.jsonl`` says why."""
    splits: Splits

    @classmethod
    def load(cls, path: str | Path, key: str = "data.manifest", share: slice = slice(None), content: bytes | None = None) -> Manifest:
        """Read the manifest of a folder or URL (or the ``manifest.json`` itself). In a folder, shards must be there in full length.

        Args:
            key: the setting that names it, for errors.
            share: which shards to look for, where other processes look for the others: a file server has to answer for each.
            content: of the ``manifest.json`` at a URL, where another process has fetched it; see ``fetch``.

        Raises:
            ConfigError: a URL of a kind that nothing opens.
            DataError: no manifest, an unknown format, a shard missing or of the wrong size.
        """
        there, file = remote.is_url(str(path)), _file(path)
        root = file.rpartition("/")[0] if there else str(Path(file).parent.resolve())
        try:
            tree = json.loads((content or fetch(str(path), key)) if there else Path(file).read_text())
        except OSError as error:
            fix = "run ditmoe-data encode first and, if it had several workers, ditmoe-data finalize"
            raise DataError(f"{key}={str(path)!r}: no readable manifest ({error.strerror}); {fix}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}: not valid JSON ({error}); encode the data again") from None
        if not isinstance(tree, dict) or (tree.get("format"), tree.get("version")) != (FORMAT, VERSION):
            found = (tree.get("format"), tree.get("version")) if isinstance(tree, dict) else type(tree).__name__
            raise DataError(f"{file}: is {found}, this release reads {(FORMAT, VERSION)}; encode the data again")
        try:
            manifest = build(cls, {**tree, "root": root})
        except ConfigError as error:
            raise DataError(f"{file}: {error}") from None
        for shard in manifest.shards():
            if os.path.basename(shard.name) != shard.name:
                raise DataError(f"{file}: shard {shard.name!r} lies outside the folder; encode the data again")
            if not re.fullmatch("[0-9a-f]{64}", shard.sha256):  # becomes part of a file name in a cache
                raise DataError(f"{file}: shard {shard.name!r} has the sha256 {shard.sha256!r}; encode the data again")
            if len(shard.shape) != 3 or min(shard.shape) < 1 or shard.shape[0] != len(manifest.mean):
                raise DataError(f"{file}: shard {shard.name!r} has latents of shape {list(shard.shape)}; encode the data again")
        if there:
            return manifest
        shards = manifest.shards()[share]
        with ThreadPoolExecutor(READERS) as readers:
            list(readers.map(manifest._look_for, (shards[i::READERS] for i in range(READERS))))
        return manifest._with_folders(lambda folder: os.path.normpath(os.path.join(manifest.root, folder)))

    def save(self) -> None:
        """Write ``manifest.json`` into ``root``, in one rename: a folder with a manifest is finished."""
        root = Path(self.root).resolve()
        near = self._with_folders(lambda folder: os.path.relpath(folder, root) if Path(folder).is_relative_to(root.parent) else folder)
        stored = {key: value for key, value in vars(near).items() if key != "root"}
        partial = root / "manifest.json.partial"
        partial.write_text(json.dumps(stored, indent=2, default=vars) + "\n")
        partial.replace(root / "manifest.json")

    def _look_for(self, shards: list[Shard]) -> None:
        for shard in shards:
            path = f"{self.root}/{shard.name}"
            try:
                size = os.stat(path).st_size
            except FileNotFoundError:
                raise DataError(f"{path}: missing; delete manifest.json and run ditmoe-data encode again") from None
            if size != shard.bytes:
                raise DataError(f"{path}: {size} bytes, the manifest says {shard.bytes}; {REMAKE}")

    def _with_folders(self, change: Callable[[str], str]) -> Manifest:
        """A copy in which VAE and text encoder are ``change(folder)``, if they are folders and not hub ids."""
        text = self.text
        if text is not None and text.encoder_sha256 is not None:
            text = dataclasses.replace(text, encoder=change(text.encoder))
        return dataclasses.replace(self, vae=change(self.vae) if self.vae_sha256 is not None else self.vae, text=text)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The different (C, H, W) of its latents, sorted."""
        return tuple(sorted({shard.shape for shard in self.shards()}))

    def split(self, name: SplitName) -> Split:
        """The split of this name."""
        return getattr(self.splits, name)

    def shards(self) -> list[Shard]:
        """All shards of both splits."""
        return [*self.splits.train.shards, *self.splits.val.shards]

    def path(self, shard: Shard) -> Path:
        """Where ``shard`` lies."""
        return Path(self.root, shard.name)

    def open(self, shard: Shard, path: Path | None = None) -> ShardReader:
        """A reader of ``shard``, or of its copy at ``path``.

        Raises:
            DataError: its index does not fit it, or the manifest.
        """
        reader = ShardReader(path or self.path(shard), self, shard.shape)
        if len(reader) != shard.samples:
            raise DataError(f"{reader.path}: {len(reader)} samples, the manifest says {shard.samples}; {LEAVE_OUT}")
        return reader

    def empty_text(self) -> torch.Tensor:
        """(tokens, width) bfloat16 of an empty caption, which takes the place of one in classifier-free guidance.

        Raises:
            DataError: it is missing or damaged.
        """
        assert self.text is not None
        file = f"{self.root}/{EMPTY_TEXT}"
        try:
            content = remote.read(file) if remote.is_url(self.root) else Path(file).read_bytes()
            if hashlib.sha256(content).hexdigest() != self.text.empty_sha256:
                raise ValueError("sha256 differs from the manifest")
            return parse_text(content, self.text)
        except Exception as error:  # bytes from anywhere: parsing them fails in many ways
            raise DataError(f"{file}: cannot be used ({error}); delete manifest.json and run ditmoe-data encode again") from None

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of what decides the training data: everything but where folders lie."""
        alike = self._with_folders(lambda _: "")
        decisive = {key: value for key, value in vars(alike).items() if key not in ("root", "vae")}  # asdict takes seconds for many shards
        return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=vars).encode()).hexdigest()

    def verify(self, shard: Shard) -> None:
        """Read every byte of a shard.

        Raises:
            DataError: its sha256 is not the manifest's.
        """
        if sha256(self.path(shard)) != shard.sha256:
            raise DataError(f"{self.path(shard)}: sha256 differs from the manifest, the file is damaged; {REMAKE}")


def fetch(url: str, key: str) -> bytes:
    """The ``manifest.json`` at a URL, unread. Raises as ``Manifest.load``."""
    remote.refuse_unknown(key, url, url)
    return remote.read(_file(url))


def _file(path: str | Path) -> str:
    return str(path) if str(path).endswith(".json") else f"{str(path).rstrip('/')}/manifest.json"


def weights_sha256(path_or_id: str) -> str | None:
    """sha256 of the safetensors in a local folder; None for a hub id."""
    return sha256(*sorted(Path(path_or_id).glob("*.safetensors"))) if Path(path_or_id).is_dir() else None


def sha256(*paths: Path) -> str:
    """Hex digest of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
