"""Encoded images to pixels, and their captions from files. Runs in the decoding processes, so nothing heavy is imported here."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from data_prep import captions
from data_prep.files import MEMBER_LIMIT, content

Size = tuple[int, int]
"""(height, width) in pixels."""

# Listed, since Pillow would open every format it knows, and hand PostScript to an interpreter.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")

_UPRIGHT: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF's number for how the camera was held: what turns the image upright."""


def size_names(sizes: Sequence[Size]) -> str:
    """As on the command line: ``192x320,256x256``."""
    return ",".join(f"{height}x{width}" for height, width in sizes)


def read(
    pairs: list[tuple[Path | bytes | np.ndarray | str, tuple[Path, Path] | None]], sizes: Sequence[Size]
) -> list[tuple[np.ndarray | str, str | None]]:
    """For pairs of an image and what ``captions.read`` takes, or None: what ``decode`` makes of the image, and the caption.

    Raises:
        DataError: a file cannot be read at all.
    """
    found = []
    for image, text in pairs:
        caption = None
        try:
            caption = captions.read(*text) if text else None
        except ValueError as error:
            image = str(error)[:200]
        found.append((decode(image, sizes), caption))
    return found


def decode(image: Path | bytes | np.ndarray | str, sizes: Sequence[Size]) -> np.ndarray | str:
    """The image as (height, width, 3) uint8, or the reason why it cannot be used. A path or bytes are decoded; an array (h, w) or
    (h, w, 3) uint8 is only cropped; a string is such a reason already, and is returned.

    Args:
        sizes: to choose from; the image gets the one whose aspect ratio is nearest to its own.

    Raises:
        DataError: a file cannot be read at all; that is the disk's fault and not the image's.
    """
    if isinstance(image, str):
        return image
    if isinstance(image, Path):
        try:
            image = content(image, MEMBER_LIMIT)
        except ValueError as error:
            return str(error)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images; the truly large are errors
            if isinstance(image, np.ndarray):
                return crop(Image.fromarray(image).convert("RGB"), sizes)
            with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
                return crop(rgb(upright(opened)), sizes)
    except UnidentifiedImageError:
        return "empty file" if not len(image) else f"not an image ({', '.join(FORMATS)})"
    except Exception as error:  # bytes from anywhere: each format's decoder fails in its own ways
        # The same words on each run: no addresses.
        return re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {error}")[:200]


def upright(image: Image.Image) -> Image.Image:
    """The image turned as EXIF says. Pillow's own function rewrites all of EXIF, and fails if any other entry is invalid."""
    image.load()  # a TIFF is turned by Pillow as it is loaded, and then no longer says how it was held
    way = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if way is None else image.transpose(way)


def rgb(image: Image.Image) -> Image.Image:
    """8-bit colour; where an image is transparent, white shows."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode} has more than 8 bits per channel")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def crop(image: Image.Image, sizes: Sequence[Size]) -> np.ndarray:
    """The centre at the size of nearest aspect ratio, resized as ADM does: halve with a box filter while large, then bicubic.

    Raises:
        ValueError: it is so narrow that it would become enormous while it is resized.
    """
    ratio = image.height / image.width
    rows, columns = min(sizes, key=lambda size: abs(math.log(size[0] / size[1] / ratio)))
    while image.height >= 2 * rows and image.width >= 2 * columns:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(rows / image.height, columns / image.width)
    width, height = round(image.width * scale), round(image.height * scale)
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too narrow for a centre crop of {rows} x {columns}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (image.width - columns) // 2, (image.height - rows) // 2
    return np.array(image.crop((left, top, left + columns, top + rows)))
