"""Sets of images on disk, in order and a batch at a time: an npz in ADM's layout, or a folder of pictures."""

from __future__ import annotations

import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from data_prep.images import FORMATS, rgb, upright
from data_prep.sources import SUFFIXES
from ditmoe_ds.errors import DataError, in_a_line
from ditmoe_ds.latents.manifest import sha256

MEMBER = "arr_0.npy"
STATISTICS = 64 << 20
"""Most bytes of published statistics, unpacked; ADM's have 66,327,744."""
READERS = 4
"""Threads that decode pictures."""


class NpzImages:
    """``arr_0`` of an npz: (N, H, W, 3) uint8, compressed or not. Only what is asked for is in memory.

    Attributes:
        shape: (H, W, 3).

    Raises:
        DataError: no such file, damaged, or an array of another kind.
    """

    def __init__(self, path: Path):
        self.path = path
        with self._open() as (file, size):
            (self.count, *self.shape), self.start = self._header(file)
        said = self.start + self.count * math.prod(self.shape)
        if size != said:
            raise DataError(f"{path}: {MEMBER} has {size} bytes, its header says {said}; write it again")

    def __len__(self) -> int:
        return self.count

    def batches(self, first: int, last: int, size: int) -> Iterator[np.ndarray]:
        """Images [first, last) as (up to ``size``, H, W, 3) uint8."""
        each = math.prod(self.shape)
        with self._open() as (file, _):
            for start in range(first, last, size):
                count = min(size, last - start)
                try:
                    if start == first:
                        _skip(file, self.start + first * each)
                    content = file.read(count * each)
                except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
                    raise DataError(f"{self.path}: damaged after image {start} ({error}); write it again") from None
                if len(content) < count * each:
                    raise DataError(f"{self.path}: ends after image {start}; write it again")
                yield np.frombuffer(bytearray(content), np.uint8).reshape(count, *self.shape)

    def sha256(self) -> str:
        return sha256(self.path)

    def description(self) -> Any:
        """Content of FILE.json beside FILE.npz, where ``ditmoe sample`` writes how the images were made; None without it."""
        return _read_json(self.path.with_suffix(".json"))

    @contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], int]]:
        """The member, and how many bytes it has."""
        members = npz_members(self.path)
        if MEMBER not in members:
            raise DataError(f"{self.path}: has {', '.join(members)}; images are in {MEMBER}")
        with zipfile.ZipFile(self.path) as archive:
            try:
                file = archive.open(MEMBER)
            except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # damaged, packed in another way, encrypted
                raise DataError(f"{self.path}: {MEMBER} cannot be read ({error})") from None
            with file:
                yield file, archive.getinfo(MEMBER).file_size

    def _header(self, file: IO[bytes]) -> tuple[tuple[int, ...], int]:
        """Shape, and where the data starts. NumPy's own readers of the header never unpickle."""
        try:
            if (version := np.lib.format.read_magic(file)) != (1, 0):  # the others' headers may be of any length
                raise ValueError(f"version {version}")
            shape, by_column, dtype = np.lib.format.read_array_header_1_0(file)
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{self.path}: {MEMBER} is no array of NumPy ({in_a_line(error)})") from None
        if dtype != np.uint8 or by_column or len(shape) != 4 or shape[3] != 3:
            raise DataError(f"{self.path}: {MEMBER} is {dtype} of shape {shape}; images are uint8 (N, H, W, 3), row by row")
        return shape, file.tell()


def _skip(file: IO[bytes], count: int) -> None:
    """By reading: from Python 3.12 on a zip's member whose reader has sought is not compared with its checksum at its end."""
    while count and (part := file.read(min(count, 1 << 20))):
        count -= len(part)


class FolderImages:
    """Pictures below a folder, files that end in one of ``SUFFIXES``, in the order of their paths, all of one size.

    Raises:
        DataError: no such folder, or no pictures there.
    """

    def __init__(self, path: Path):
        self.path = path
        self.files = sorted(file for file in _below(path) if file.suffix.lower() in SUFFIXES)
        if not self.files:
            raise DataError(f"{path}: no pictures ({', '.join(SUFFIXES)})")
        self.shape = list(_pixels(self.files[0]).shape)

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, first: int, last: int, size: int) -> Iterator[np.ndarray]:
        """As ``NpzImages.batches``."""
        with ThreadPoolExecutor(READERS) as readers:
            for start in range(first, last, size):
                files = self.files[start : min(start + size, last)]
                images = list(readers.map(_pixels, files))
                for file, image in zip(files, images, strict=True):
                    if list(image.shape) != self.shape:
                        pixels, wanted = (f"{columns} x {rows}" for rows, columns, _ in (image.shape, self.shape))
                        raise DataError(f"{file}: {pixels} pixels, the first {wanted}; crop all to one size")
                yield np.stack(images)

    def sha256(self) -> str:
        return sha256(*self.files)

    def description(self) -> Any:
        """Content of ``samples.json`` in the folder; None without it."""
        return _read_json(self.path / "samples.json")


def _below(path: Path) -> Iterator[Path]:
    """The files below a folder, also in linked folders; of a folder that is met again, as links in a circle do, only once."""
    seen = set()
    for folder, folders, files in os.walk(path, followlinks=True):
        folders.sort()  # of two ways to a folder always the same one counts
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
        else:
            seen.add(real)
            yield from (Path(folder, file) for file in files)


def _pixels(file: Path) -> np.ndarray:
    return np.array(open_picture(file))


def open_picture(file: Path) -> Image.Image:
    """A picture as 8-bit RGB, upright, on white where it is transparent.

    Raises:
        DataError: it cannot be read.
    """
    with _opened(file) as image:
        return rgb(upright(image))


def check_png(file: Path) -> None:
    """Compare its checksums, which takes a fiftieth of the time to decode it. Raises as ``open_picture``."""
    with _opened(file) as image:
        image.verify()


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(file, formats=FORMATS) as image:
            yield image
    except Exception as error:  # each format's decoder fails in its own ways
        raise DataError(f"{file}: cannot be read ({in_a_line(error)}); repair or remove it") from None


Images = NpzImages | FolderImages


def open_images(path: str | Path) -> Images:
    """The images of a folder or an npz.

    Raises:
        DataError: there are none; or it is a run, whose pictures are grids.
    """
    path = Path(path)
    if (path / "config.yaml").is_file() and ((path / "checkpoints").is_dir() or (path / "metrics.jsonl").is_file()):
        raise DataError(f"{path}: that is a run; sample from it first: ditmoe sample {path} --num N --out FILE.npz")
    return FolderImages(path) if path.is_dir() else NpzImages(path)


def npz_members(path: Path) -> list[str]:
    """Names of the files in an npz.

    Raises:
        DataError: there is no such npz.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path}: no folder and no whole npz ({error})") from None


def published_statistics(path: Path) -> dict[str, np.ndarray]:
    """``mu``, ``sigma`` (of FID), ``mu_s``, ``sigma_s`` (of sFID) from one of ADM's reference files, as far as it has them.

    Raises:
        DataError: the file is no npz, or these are not finite vectors with their covariances, or too large.
    """
    names = ("mu", "sigma", "mu_s", "sigma_s")
    try:
        with np.load(path, allow_pickle=False) as file:
            size = sum(member.file_size for member in file.zip.infolist() if member.filename.removesuffix(".npy") in names)
            if size > STATISTICS:
                raise ValueError(f"{size} bytes, more than {STATISTICS}")
            found = {key: np.asarray(file[key], np.float64) for key in names if key in file}
    except (OSError, ValueError, EOFError, TypeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: its statistics cannot be read ({in_a_line(error)})") from None
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if (mean in found) != (covariance in found):
            raise DataError(f"{path}: has only one of {mean} and {covariance}")
        if mean in found and not (found[mean].ndim == 1 and found[covariance].shape == found[mean].shape * 2):
            raise DataError(f"{path}: {mean} {found[mean].shape} and {covariance} {found[covariance].shape} do not go together")
        if mean in found and not (np.isfinite(found[mean]).all() and np.isfinite(found[covariance]).all()):
            raise DataError(f"{path}: {mean} or {covariance} is not finite")
    return found


def _read_json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: no valid JSON ({error})") from None
