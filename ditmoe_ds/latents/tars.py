"""The shards of a folder of latents: tar files, written and read at random.

    {key}.json              label (int or null), class, caption (a text, null, or a list of several), source
    {key}.latent.npy        (C, H, W) before any scaling
    {key}.std.npy           (C, H, W) the posterior's, if it is stored
    {key}.text.safetensors  "text": (tokens, width), valid tokens only; the second caption's is "text1" in a file of that name, and so on

bfloat16, which npy lacks, is stored as ``latent.safetensors``. Stock webdataset reads the tars.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import safetensors.torch
import torch

from ditmoe_ds.errors import DataError, some
from ditmoe_ds.latents import remote

if TYPE_CHECKING:  # which opens the shards that it lists
    from ditmoe_ds.latents.manifest import Manifest, Text

REMAKE = "delete it and manifest.json, then run ditmoe-data encode again"
LEAVE_OUT = f"{REMAKE}, or leave it out with data.skip_shards"
SAMPLE_LIMIT = 64 << 20  # bytes; latents of (16, 128, 128) float32 are 1 MiB, 512 text tokens of width 4096 are 4 MiB
T = TypeVar("T")
KEY = re.compile(r"[\w-]{1,80}", re.ASCII)


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
        """Append a sample. ``key`` has no dot and at most 80 characters.

        Args:
            tensors: ``latent``, maybe ``std``, and maybe those of ``text_names``.

        Raises:
            ValueError: it has more than ``SAMPLE_LIMIT`` bytes. Nothing was written.
        """
        assert KEY.fullmatch(key), key
        members = {f"{name}.{_kind(tensor.dtype)}": _encode(name, tensor) for name, tensor in tensors.items()}
        members = {"json": json.dumps(meta).encode(), **members}
        if (size := sum(1024 + len(content) for content in members.values())) > SAMPLE_LIMIT:  # with headers and padding
            raise ValueError(f"its latent and captions have {size} bytes, more than {SAMPLE_LIMIT}")
        self._starts.append(self._tar.tarstream.offset)
        self._tar.write({"__key__": key, **members})

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
    """Bytes of the index of a shard with this many samples."""
    return len(_npy_header((samples + 1,), "int64")) + 8 * (samples + 1)


def captions_of(meta: dict[str, Any]) -> list[str]:
    """The captions of a sample, of which there is one at least: without any, the empty one."""
    told = meta.get("caption")
    return told if isinstance(told, list) else [told or ""]


def text_names(count: int) -> list[str]:
    """The names of the texts of ``count`` captions among a sample's tensors."""
    return ["text", *(f"text{i}" for i in range(1, count))]


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
        raw, size = _persist(index, lambda: (index.read_bytes(), os.fstat(_opened(self).fileno()).st_size))
        # As with tensors (see ``_tensor``), the header is compared, not believed.
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
            return self._parse(_persist(self.path, lambda: os.pread(_opened(self).fileno(), size, start)))
        except DataError:
            raise
        except Exception as error:  # bytes from anywhere: each parser of them fails in its own ways
            raise DataError(f"{self.path}: sample {i} at byte {start} is damaged ({error}); {LEAVE_OUT}") from None

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
        meta = json.loads(members.pop("json", b"null"))
        if not isinstance(meta, dict) or type(meta.get("label", "")) not in (int, type(None)):
            raise ValueError("no json with a label: a number or null")
        captions = captions_of(meta)
        if not captions or not all(isinstance(caption, str) for caption in captions):
            raise ValueError("the json's caption is neither a text nor a list of texts")
        latent = f"latent.{_kind(getattr(torch, self.manifest.dtype))}"
        wanted = {latent}
        wanted |= {latent.replace("latent", "std")} if self.manifest.store == "mean+std" else set()
        wanted |= {f"{name}.safetensors" for name in text_names(len(captions))} if self.manifest.text else set()
        if members.keys() != wanted or len(keys) != 1:
            raise ValueError(
                f"members {some(sorted(members))} of keys {some(sorted(keys))}, the manifest says {some(sorted(wanted))} of one"
            )
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
        if name.startswith("text"):
            assert self.manifest.text
            return parse_text(content, self.manifest.text, name)
        tensor = _bfloat16(content, name)
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, not the manifest's")
        return tensor


@functools.lru_cache(maxsize=64)
def _opened(shard: ShardReader) -> BinaryIO:
    """The tar, open until as many others were read: a file server is asked for each opening, which a window of samples needs again and
    again, and a large data set has more shards than a process may hold open."""
    return open(shard.path, "rb", buffering=0)


def _persist(path: Path, action: Callable[[], T]) -> T:
    """As ``remote.persist``, for file servers that are away for minutes; what is missing or forbidden is refused at once."""

    def attempt() -> T:
        try:
            return action()
        except FileNotFoundError as error:
            raise DataError(f"{error.filename}: is not there; {REMAKE}") from None
        except PermissionError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
        except OSError:
            _opened.cache_clear()  # a server that was away may not know them any more
            raise

    return remote.persist(str(path), attempt, remote.LASTING)


def parse_text(content: bytes, text: Text, name: str = "text") -> torch.Tensor:
    tensor = _bfloat16(content, name)
    if not (tensor.ndim == 2 and tensor.shape[1] == text.width and 1 <= len(tensor) <= text.max_tokens):
        raise ValueError(f"{name} has shape {list(tensor.shape)}, not the manifest's")
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
