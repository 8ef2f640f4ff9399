"""The shard format: a folder of tar files of VAE latents, described by one manifest.

    manifest.json
    train-000000.tar ...         each sample is {key}.json        label (int or null), class, caption, source
    val-000000.tar ...                          {key}.latent.npy  (C, H, W) before any scaling
                                                {key}.std.npy     (C, H, W) the posterior's, if it is stored
                                                {key}.text.safetensors  "text": (tokens, width), valid tokens only
    empty.text.safetensors      the tokens of an empty caption, if there is text
    train-000000.index.npy ...   where each sample begins in the tar, and where the last ends

bfloat16, which npy lacks, is stored as ``latent.safetensors``. Stock webdataset reads the tars. The same input gives the same
bytes on every run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors.torch
import torch

from ditmoe_ds.config import build
from ditmoe_ds.errors import ConfigError, DataError
from ditmoe_ds.latents import remote

FORMAT, VERSION = "ditmoe-latents", 3
REMAKE = "delete it and manifest.json, then run ditmoe-data encode again"
SAMPLE_LIMIT = 64 << 20  # bytes; latents of (16, 128, 128) float32 are 1 MiB, 512 text tokens of width 4096 are 4 MiB
EMPTY_TEXT = "empty.text.safetensors"
KEY = re.compile(r"[\w-]{1,80}", re.ASCII)
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
    def load(cls, path: str | Path) -> Manifest:
        """Read the manifest of a folder or URL (or the ``manifest.json`` itself). In a folder, all shards must be there in full length.

        Raises:
            DataError: no manifest, an unknown format, a shard missing or of the wrong size.
        """
        there = remote.is_url(str(path))
        file = str(path) if str(path).endswith(".json") else f"{str(path).rstrip('/')}/manifest.json"
        root = file.rpartition("/")[0] if there else str(Path(file).parent.resolve())
        try:
            tree = json.loads(remote.read(file) if there else Path(file).read_text())
        except OSError as error:
            raise DataError(f"data.manifest={str(path)!r}: no readable manifest ({error.strerror}); run ditmoe-data encode first") from None
        except ValueError as error:
            raise DataError(f"{file}: not valid JSON ({error}); encode the data again") from None
        if not isinstance(tree, dict) or (tree.get("format"), tree.get("version")) != (FORMAT, VERSION):
            found = (tree.get("format"), tree.get("version")) if isinstance(tree, dict) else type(tree).__name__
            raise DataError(f"{file}: is {found}, this release reads {(FORMAT, VERSION)}; encode the data again")
        try:
            manifest = build(cls, {**tree, "root": root})
        except ConfigError as error:
            raise DataError(f"{file}: {error}") from None
        for shard in manifest.shards():
            if Path(shard.name).name != shard.name:
                raise DataError(f"{file}: shard {shard.name!r} lies outside the folder; encode the data again")
            if not re.fullmatch("[0-9a-f]{64}", shard.sha256):  # part of a file's name in a cache
                raise DataError(f"{file}: shard {shard.name!r} has the sha256 {shard.sha256!r}; encode the data again")
            if len(shard.shape) != 3 or min(shard.shape) < 1 or shard.shape[0] != len(manifest.mean):
                raise DataError(f"{file}: shard {shard.name!r} has latents of shape {list(shard.shape)}; encode the data again")
            if there:
                continue
            shard_path = manifest.path(shard)
            try:
                size = shard_path.stat().st_size
            except FileNotFoundError:
                raise DataError(f"{shard_path}: missing; delete manifest.json and run ditmoe-data encode again") from None
            if size != shard.bytes:
                raise DataError(f"{shard_path}: {size} bytes, the manifest says {shard.bytes}; {REMAKE}")
        return manifest if there else manifest._with_folders(lambda folder: os.path.normpath(os.path.join(manifest.root, folder)))

    def save(self) -> None:
        """Write ``manifest.json`` into ``root``, in one rename: a folder with a manifest is finished."""
        root = Path(self.root).resolve()
        near = self._with_folders(lambda folder: os.path.relpath(folder, root) if Path(folder).is_relative_to(root.parent) else folder)
        tree = dataclasses.asdict(near)
        del tree["root"]
        partial = root / "manifest.json.partial"
        partial.write_text(json.dumps(tree, indent=2) + "\n")
        partial.replace(root / "manifest.json")

    def _with_folders(self, change: Callable[[str], str]) -> Manifest:
        """With the folders of the VAE and text encoder changed, where they are none of a hub's ids."""
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
        """The samples of ``shard``, of which ``path`` may be a copy.

        Raises:
            DataError: its index does not fit it, or the manifest.
        """
        reader = ShardReader(path or self.path(shard), self, shard.shape)
        if len(reader) != shard.samples:
            fix = f"{REMAKE}, or leave it out with data.skip_shards"
            raise DataError(f"{reader.path}: {len(reader)} samples, the manifest says {shard.samples}; {fix}")
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
            return _text(content, self.text)
        except Exception as error:  # bytes from anywhere
            raise DataError(f"{file}: cannot be used ({error}); delete manifest.json and run ditmoe-data encode again") from None

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of what decides the training data: everything but where folders lie."""
        tree = dataclasses.asdict(self._with_folders(lambda _: ""))
        del tree["root"], tree["vae"]
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def verify(self, shard: Shard) -> None:
        """Read every byte of a shard.

        Raises:
            DataError: its sha256 is not the manifest's.
        """
        if sha256(self.path(shard)) != shard.sha256:
            raise DataError(f"{self.path(shard)}: sha256 differs from the manifest, the file is damaged; {REMAKE}")


def weights_sha256(path_or_id: str) -> str | None:
    """Of the safetensors in a local folder; None of a hub's id."""
    return sha256(*sorted(Path(path_or_id).glob("*.safetensors"))) if Path(path_or_id).is_dir() else None


def sha256(*paths: Path) -> str:
    """Hex digest of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class ShardWriter:
    """Writes one tar file and its index, under temporary names until the ``with`` block ends without an error."""

    def __init__(self, path: str | Path):
        from webdataset import TarWriter  # only writers need it

        self._path = Path(path)
        self._partial = self._path.with_suffix(".tar.partial")
        self._stream = open(self._partial, "wb")  # noqa: SIM115 - __exit__ closes it
        # Fixed owner and time: the same samples give the same bytes.
        self._tar = TarWriter(self._stream, user="", group="", mtime=0, encoder=False)
        self._starts: list[int] = []

    def write(self, key: str, meta: dict[str, Any], **tensors: torch.Tensor) -> None:
        """Append a sample; ``tensors`` are ``latent`` and maybe ``std`` and ``text``. ``key`` has no dot and at most 80 characters."""
        assert KEY.fullmatch(key), key
        self._starts.append(self._tar.tarstream.offset)
        members = {f"{name}.{_kind(tensor.dtype)}": _encode(name, tensor) for name, tensor in tensors.items()}
        self._tar.write({"__key__": key, "json": json.dumps(meta).encode(), **members})

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        end = self._tar.tarstream.offset
        self._tar.close()
        self._stream.close()
        if failure is not None:
            self._partial.unlink()
            return
        index = index_path(self._path)
        with open(index.with_suffix(".partial"), "wb") as file:
            np.save(file, np.array([*self._starts, end], dtype="<i8"))
        index.with_suffix(".partial").replace(index)
        self._partial.replace(self._path)  # last: a tar under its name is complete and has an index


def index_path(tar: Path) -> Path:
    """Where the index of a shard lies."""
    return tar.with_suffix(".index.npy")


def index_size(samples: int) -> int:
    """Bytes of the index of so many samples."""
    return len(_npy_header((samples + 1,), "int64")) + 8 * (samples + 1)


class Sample(NamedTuple):
    """One sample as stored."""

    key: str
    meta: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    """By name; as stored, ``latent`` before any scaling."""


class ShardReader:
    """Random access to the samples of a tar file, which may come from anyone: nothing is extracted, every header is checked.

    Args:
        shape: (C, H, W) of its latents.

    Raises:
        DataError: the index is missing or does not fit the tar.
    """

    def __init__(self, path: Path, manifest: Manifest, shape: tuple[int, ...]):
        self.path, self.manifest, self.shape = path, manifest, shape
        index = index_path(path)
        try:
            raw, size = index.read_bytes(), path.stat().st_size
        except FileNotFoundError as error:
            raise DataError(f"{error.filename}: is not there; {REMAKE}") from None
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
        # As of tensors, the header is compared and not believed.
        count = (len(raw) - len(_npy_header((0,), "int64"))) // 8
        header = _npy_header((max(count, 0),), "int64")
        if count < 1 or raw[: len(header)] != header or len(raw) != len(header) + 8 * count:
            raise DataError(f"{index}: does not hold the starts of samples; {REMAKE}")
        starts = np.frombuffer(raw, "<i8", offset=len(header))
        if starts[0] < 0 or (np.diff(starts) <= 0).any() or starts[-1] > size:
            raise DataError(f"{index}: does not fit {path.name}; {REMAKE}")
        self.starts = starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def read(self, i: int) -> Sample:
        """The ``i``-th sample.

        Raises:
            DataError: its bytes are cut short, or are not a sample as the manifest describes it.
        """
        start, size = int(self.starts[i]), int(self.starts[i + 1] - self.starts[i])
        try:
            if size > SAMPLE_LIMIT:
                raise ValueError(f"{size} bytes, more than {SAMPLE_LIMIT}")
            # Opened per read: a large data set has more shards than a process may hold open.
            file = os.open(self.path, os.O_RDONLY)
            try:
                raw = os.pread(file, size, start)
            finally:
                os.close(file)
            return self._parse(raw)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from None
        except Exception as error:  # bytes from anywhere: each parser of them fails in its own ways
            raise DataError(f"{self.path}: sample {i} at byte {start} is damaged ({error}); {REMAKE}") from None

    def _parse(self, raw: bytes) -> Sample:
        keys, members = set(), {}
        position = 0
        while position < len(raw):
            header = tarfile.TarInfo.frombuf(raw[position : position + 512], "utf-8", "strict")
            key, _, kind = header.name.partition(".")
            if header.type != tarfile.REGTYPE or not KEY.fullmatch(key) or kind in members:
                raise ValueError(f"member {header.name!r} is not part of the format")
            begin = position + 512
            if not 0 <= header.size <= len(raw) - begin:
                raise ValueError(f"member {header.name!r} has {header.size} bytes, of which {len(raw) - begin} are there")
            members[kind] = raw[begin : begin + header.size]
            keys.add(key)
            position = begin + -(-header.size // 512) * 512
        latent = f"latent.{_kind(getattr(torch, self.manifest.dtype))}"
        wanted = {"json", latent}
        wanted |= {latent.replace("latent", "std")} if self.manifest.store == "mean+std" else set()
        wanted |= {"text.safetensors"} if self.manifest.text else set()
        if members.keys() != wanted or len(keys) != 1:
            raise ValueError(f"members {sorted(members)} of keys {sorted(keys)}, the manifest says {sorted(wanted)} of one")
        meta = json.loads(members.pop("json"))
        if not isinstance(meta, dict) or type(meta.get("label", "")) not in (int, type(None)):
            raise ValueError("the json has no label: a number or null")
        if type(meta.get("caption")) not in (str, type(None)):
            raise ValueError("the json's caption is no text")
        tensors = {kind.partition(".")[0]: self._tensor(kind, content) for kind, content in members.items()}
        return Sample(keys.pop(), meta, tensors)

    def _tensor(self, kind: str, content: bytes) -> torch.Tensor:
        name, _, form = kind.partition(".")
        if form == "npy":
            # The header is compared, not believed: a forged one could ask for any amount of memory.
            header = _npy_header(self.shape, self.manifest.dtype)
            shape, dtype = self.shape, getattr(torch, self.manifest.dtype)
            if content[: len(header)] != header or len(content) - len(header) != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} is not the manifest's {self.manifest.dtype} {shape}")
            return torch.frombuffer(bytearray(content), dtype=dtype, offset=len(header)).view(shape)
        if name == "text":
            assert self.manifest.text
            return _text(content, self.manifest.text)
        tensor = _bfloat16(content, name)
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, not the manifest's")
        return tensor


def _text(content: bytes, text: Text) -> torch.Tensor:
    tensor = _bfloat16(content, "text")
    if not (tensor.ndim == 2 and tensor.shape[1] == text.width and 1 <= len(tensor) <= text.max_tokens):
        raise ValueError(f"text has shape {list(tensor.shape)}, not the manifest's")
    return tensor


def _bfloat16(content: bytes, name: str) -> torch.Tensor:
    tensor = safetensors.torch.load(content).get(name)
    if tensor is None or tensor.dtype != torch.bfloat16:
        raise ValueError(f"holds no bfloat16 tensor {name!r}")
    return tensor


def _kind(dtype: torch.dtype) -> str:
    return "safetensors" if dtype == torch.bfloat16 else "npy"


def _encode(name: str, tensor: torch.Tensor) -> bytes:
    tensor = tensor.contiguous().cpu()
    if tensor.dtype == torch.bfloat16:
        return safetensors.torch.save({name: tensor})
    array = tensor.numpy()
    return _npy_header(array.shape, array.dtype.name) + array.tobytes()


@functools.lru_cache
def _npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, dict(descr=np.dtype(dtype).newbyteorder("<").str, fortran_order=False, shape=shape))
    return stream.getvalue()
