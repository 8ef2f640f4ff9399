"""Safetensors files, streamed: written tensor by tensor, read by range of elements.

The safetensors library wants all tensors of a file in memory to write it, and maps the file into memory to read it, where its pages count
as the process's own. Here neither holds more than was asked for. Either can read what the other wrote.
Source of the format: https://huggingface.co/docs/safetensors (8 bytes of header length, JSON header, data).
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from ditmoe_ds.errors import CheckpointError, in_a_line

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000
"""Bytes of a header; the library refuses longer ones too."""
CHUNK = 1 << 22
"""Elements converted at a time: 16 MB of fp32."""


class Entry(NamedTuple):
    """A tensor to write."""

    key: str
    dtype: torch.dtype
    """The dtype in the file; what ``fetch`` returns is converted piece by piece."""
    shape: Sequence[int]
    fetch: Callable[[], Tensor]
    """Called when its turn comes; the result is dropped before the next call."""


def write(path: Path, entries: Sequence[Entry]) -> None:
    """Write a file and sync it to disk. Holds one tensor at a time.

    Raises:
        CheckpointError: a finite value would not be finite in the file's dtype (fp16 ends at 65504).
    """
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # every tensor aligned, as the library does it
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + _bytes(entry.dtype, entry.shape)
        header[entry.key] = dict(dtype=_NAMES[entry.dtype], shape=list(entry.shape), data_offsets=[start, end])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            _write_tensor(file, entry)
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(file: BinaryIO, entry: Entry) -> None:
    tensor = entry.fetch().detach()
    assert tuple(tensor.shape) == tuple(entry.shape), (entry.key, tensor.shape, entry.shape)
    for piece in tensor.reshape(-1).split(CHUNK):
        converted = piece.to("cpu", entry.dtype)
        if converted.dtype != piece.dtype and converted.isinf().any() and not piece.isinf().any():
            raise CheckpointError(f"{entry.key}: values up to {piece.abs().max():.3g} do not fit {entry.dtype}; write bf16 or fp32")
        if converted.numel():
            file.write(converted.view(torch.uint8).numpy())


class TensorFile:
    """Random access to the tensors of a safetensors file, which is open from the first read until ``close``.

    Attributes:
        shapes: of every tensor, by key.
        dtypes: of every tensor, by key.

    Raises:
        CheckpointError: the file is missing, cut short, or its header is not a safetensors header.
    """

    def __init__(self, path: Path):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._starts: dict[str, int] = {}
        self._file: BinaryIO | None = None
        try:
            with open(path, "rb") as file:
                total = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if length > min(MAX_HEADER, total - 8):
                    raise ValueError(f"a header of {length} bytes in a file of {total}")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for key, entry in header.items():
                if entry["dtype"] not in DTYPES:
                    raise ValueError(f"{key} has dtype {entry['dtype']}; {', '.join(DTYPES)} are read")
                dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
                start, end = entry["data_offsets"]
                if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
                    raise ValueError(f"{key}: a shape or offset that is no count")
                if end > total - 8 - length or end - start != _bytes(dtype, shape):
                    raise ValueError(f"{key} of shape {list(shape)} at bytes {start}..{end} of {total - 8 - length}")
                self.shapes[key], self.dtypes[key], self._starts[key] = shape, dtype, 8 + length + start
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # whatever a header can have wrong
            raise CheckpointError(f"{path}: no safetensors file that can be read ({in_a_line(error)})") from None

    def read(self, key: str, start: int, out: Tensor) -> None:
        """Fill ``out`` (1-D, any dtype and device) with the elements of the flattened tensor from ``start`` on."""
        dtype = self.dtypes[key]
        assert start >= 0 and start + out.numel() <= math.prod(self.shapes[key]), (key, start, out.shape)
        offset = self._starts[key] + start * dtype.itemsize
        if out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous():
            self._fill(offset, out)
            return
        buffer = torch.empty(min(CHUNK, out.numel()), dtype=dtype)
        for piece in out.split(CHUNK):
            part = buffer[: len(piece)]
            self._fill(offset, part)
            piece.copy_(part)
            offset += part.nbytes

    def close(self) -> None:
        """Until the next read: a large run has more files than a process may have open."""
        if self._file:
            self._file.close()
        self._file = None

    def _fill(self, offset: int, out: Tensor) -> None:
        if not out.numel():
            return
        self._file = self._file or open(self.path, "rb", buffering=0)  # noqa: SIM115 - until ``close``
        rest = out.detach().view(torch.uint8).numpy().data
        while rest:  # one call reads at most 2 GB
            count = os.preadv(self._file.fileno(), [rest], offset)
            if not count:
                raise CheckpointError(f"{self.path}: ends at byte {offset}; it was cut after it was opened")
            rest, offset = rest[count:], offset + count


def _bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    return math.prod(shape) * dtype.itemsize
