"""The shard format: a folder of tar files of VAE latents, described by one manifest.

    manifest.json
    train-000000.tar ...   each sample is {key}.json       label (int), class name, source
    val-000000.tar ...                    {key}.latent.npy (C, H, W), the posterior mean before any scaling

Stock webdataset reads the tars. The same input gives the same bytes on every run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tarfile
import tokenize
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ditmoe_ds.config import build
from ditmoe_ds.errors import ConfigError, DataError

FORMAT, VERSION = "ditmoe-latents", 1
REMAKE = "delete it and manifest.json, then run ditmoe-data encode again"
MEMBER_LIMIT = 16 << 20  # bytes; the largest latents in use, (16, 128, 128) float32, are 1 MiB


@dataclasses.dataclass(frozen=True)
class Shard:
    """One tar file; ``name`` is relative to the manifest's folder."""

    name: str
    samples: int
    bytes: int
    sha256: str


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
class Manifest:
    """What a finished folder of latents holds."""

    root: str
    """Folder of the shards; not stored."""
    format: str
    version: int
    source: str
    """Where the images came from, as given to ``ditmoe-data encode``."""
    vae: str
    """Absolute folder of the VAE, or its hub id; a folder is stored relative to ``root``, so both can move together."""
    vae_sha256: str | None
    """Digest of the VAE's weights; None for a hub id."""
    scaling_factor: float
    """Latents are learned as ``(x - shift_factor) * scaling_factor``."""
    shift_factor: float
    downsample: int
    """Image pixels per latent pixel, along one side."""
    image_size: int
    """Pixels."""
    shape: tuple[int, ...]
    """(C, H, W) of one latent."""
    dtype: Literal["float32", "float16"]
    mean: tuple[float, ...]
    """(C,) of the unscaled training latents."""
    std: tuple[float, ...]
    """(C,) of the unscaled training latents."""
    num_classes: int
    class_names: tuple[str, ...]
    splits: Splits

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Read the manifest of a folder (or the ``manifest.json`` itself) and check that all shards are there in full length.

        Raises:
            DataError: no manifest, an unknown format, a shard missing or of the wrong size.
        """
        path = Path(path)
        file = path / "manifest.json" if path.suffix != ".json" else path
        try:
            tree = json.loads(file.read_text())
        except OSError as error:
            raise DataError(f"data.manifest={str(path)!r}: no readable manifest ({error.strerror}); run ditmoe-data encode first") from None
        except ValueError as error:
            raise DataError(f"{file}: not valid JSON ({error}); encode the data again") from None
        if not isinstance(tree, dict) or (tree.get("format"), tree.get("version")) != (FORMAT, VERSION):
            found = (tree.get("format"), tree.get("version")) if isinstance(tree, dict) else type(tree).__name__
            raise DataError(f"{file}: is {found}, this release reads {(FORMAT, VERSION)}; encode the data again")
        try:
            manifest = build(cls, {**tree, "root": str(file.parent.resolve())})
        except ConfigError as error:
            raise DataError(f"{file}: {error}") from None
        for shard in manifest.shards():
            if Path(shard.name).name != shard.name:
                raise DataError(f"{file}: shard {shard.name!r} lies outside the folder; encode the data again")
            shard_path = manifest.path(shard)
            if not shard_path.is_file():
                raise DataError(f"{shard_path}: missing; delete manifest.json and run ditmoe-data encode again")
            if shard_path.stat().st_size != shard.bytes:
                size = shard_path.stat().st_size
                raise DataError(f"{shard_path}: {size} bytes, the manifest says {shard.bytes}; {REMAKE}")
        if manifest.vae_sha256 is not None:
            manifest = dataclasses.replace(manifest, vae=os.path.normpath(os.path.join(manifest.root, manifest.vae)))
        return manifest

    def save(self) -> None:
        """Write ``manifest.json`` into ``root``, in one rename: a folder with a manifest is finished."""
        tree = dataclasses.asdict(self)
        root = Path(tree.pop("root"))
        if self.vae_sha256 is not None:
            tree["vae"] = os.path.relpath(self.vae, root.resolve())
        partial = root / "manifest.json.partial"
        partial.write_text(json.dumps(tree, indent=2) + "\n")
        partial.replace(root / "manifest.json")

    def split(self, name: str) -> Split:
        """The split ``train`` or ``val``."""
        if name not in ("train", "val"):
            raise DataError(f"split {name!r}: choose train or val")
        return getattr(self.splits, name)

    def shards(self) -> list[Shard]:
        """All shards of both splits."""
        return [*self.splits.train.shards, *self.splits.val.shards]

    def path(self, shard: Shard) -> Path:
        """Where ``shard`` lies."""
        return Path(self.root, shard.name)

    def digest(self) -> str:
        """sha256 of what decides the training data: everything but where the folder and the VAE lie."""
        tree = dataclasses.asdict(self)
        del tree["root"], tree["vae"]
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def verify(self) -> None:
        """Read every byte of every shard.

        Raises:
            DataError: a shard's sha256 is not the manifest's.
        """
        for shard in self.shards():
            if sha256(self.path(shard)) != shard.sha256:
                raise DataError(f"{self.path(shard)}: sha256 differs from the manifest, the file is damaged; {REMAKE}")


def sha256(*paths: Path) -> str:
    """Hex digest of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class ShardWriter:
    """Writes one tar file, under a temporary name until the ``with`` block ends without an error."""

    def __init__(self, path: str | Path):
        from webdataset import TarWriter  # only writers need it

        self._path = Path(path)
        self._partial = self._path.with_suffix(".tar.partial")
        self._stream = open(self._partial, "wb")  # noqa: SIM115 - __exit__ closes it
        # Fixed owner and time: the same samples give the same bytes.
        self._tar = TarWriter(self._stream, user="", group="", mtime=0, encoder=False)

    def write(self, key: str, latent: np.ndarray, meta: dict[str, Any]) -> None:
        """Append a sample; ``latent`` is (C, H, W), ``key`` has no dot."""
        array = io.BytesIO()
        np.save(array, np.ascontiguousarray(latent), allow_pickle=False)
        self._tar.write({"__key__": key, "json": json.dumps(meta).encode(), "latent.npy": array.getvalue()})

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self._tar.close()
        self._stream.close()
        if failure is None:
            self._partial.replace(self._path)


class ShardIndex(NamedTuple):
    """Where the S samples of one tar file lie in it."""

    keys: list[str]
    spans: np.ndarray
    """(S, 4) int64: offset and size of the json, offset and size of the latent, in bytes."""


def index_shard(path: Path) -> ShardIndex:
    """Scan the headers of a tar file, which may come from anyone: nothing is extracted.

    Raises:
        DataError: not a tar file, or a member that is no regular file, is named outside the folder, is too large or has no partner.
    """
    spans: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                where = f"{path}: member {member.name!r}"
                if not member.isreg() or member.issparse():
                    raise DataError(f"{where} is no regular file; do not use this shard")
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    raise DataError(f"{where} points outside the folder; do not use this shard")
                if member.size > MEMBER_LIMIT:
                    raise DataError(f"{where} has {member.size} bytes, more than {MEMBER_LIMIT}; do not use this shard")
                folder, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if kind not in ("json", "latent.npy") or kind in spans.setdefault(key, {}):
                    raise DataError(f"{where} is not part of the format; each key has one .json and one .latent.npy")
                spans[key][kind] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path}: not a readable tar file ({error}); {REMAKE}") from None
    for key, kinds in spans.items():
        if len(kinds) != 2:
            raise DataError(f"{path}: key {key!r} lacks its .json or .latent.npy; {REMAKE}")
    rows = [(*kinds["json"], *kinds["latent.npy"]) for kinds in spans.values()]
    return ShardIndex(list(spans), np.array(rows, dtype=np.int64).reshape(-1, 4))


def read_sample(path: Path, span: np.ndarray, shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray, dict[str, Any]]:
    """One sample of a tar file, by its row of ``ShardIndex.spans``: the unscaled latent (C, H, W), read-only, and its json.

    Raises:
        DataError: the bytes are cut short or are not a latent of ``shape`` and ``dtype`` with an integer label.
    """
    json_offset, json_size, latent_offset, latent_size = span.tolist()
    try:
        # Opened per read: a large data set has more shards than a process may hold open.
        file = os.open(path, os.O_RDONLY)
        try:
            raw_meta, raw_latent = os.pread(file, json_size, json_offset), os.pread(file, latent_size, latent_offset)
        finally:
            os.close(file)
        meta = json.loads(raw_meta)
        if not isinstance(meta, dict) or type(meta.get("label")) is not int:
            raise ValueError("the json has no integer label")
        # The header is checked before np.load believes it: a forged one could ask for any amount of memory.
        stream = io.BytesIO(raw_latent)
        np.lib.format.read_magic(stream)
        found, fortran, kind = np.lib.format.read_array_header_1_0(stream)
        if (found, fortran, kind) != (shape, False, np.dtype(dtype)):
            raise ValueError(f"latent is {kind} {found}, the manifest says {dtype} {shape}")
        return np.frombuffer(raw_latent, kind, count=int(np.prod(shape)), offset=stream.tell()).reshape(shape), meta
    except (OSError, ValueError, tokenize.TokenError) as error:  # the last from a garbled numpy header
        raise DataError(f"{path}: sample at byte {json_offset} is damaged ({error}); {REMAKE}") from None
