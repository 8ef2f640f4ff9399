"""What coloured shapes are in a picture, exactly: connected components, classified by colour and by overlap with each shape."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from data_prep.shapes import COLORS, SHAPES, Scene, outline_of, side

HALF = 150
"""A pixel belongs to an object if a channel is darker: every colour has one that is nearly black, so this is half of it."""
FARTHEST = 80.0
"""RGB distance at which a pixel still has a colour; those at an edge are blends with white."""
PURE = 0.6
"""Share of an object's pixels that must have its colour."""
SMALLEST = 40
"""Fewest pixels of an object; a smaller one is ignored."""
OVERLAP = 0.7
"""Least intersection over union of an object with its shape."""
GRID = 32


class Found(NamedTuple):
    """An object."""

    x: float
    y: float
    color: str | None
    """None: of several colours, or of none."""
    shape: str | None
    """None: like no shape."""


def detect(picture: np.ndarray) -> list[Found]:
    """The objects in a picture (H, W, 3) uint8."""
    from scipy import ndimage  # comes with the extra "eval"

    components, _ = ndimage.label(picture.min(-1) < HALF)
    distances = np.linalg.norm(picture[..., None, :] - np.array([*COLORS.values()], np.float32), axis=-1)  # (H, W, colours)
    nearest = np.where(distances.min(-1) < FARTHEST, distances.argmin(-1), len(COLORS))
    found = []
    for index, box in enumerate(ndimage.find_objects(components), 1):
        mask = components[box] == index
        if mask.sum() < SMALLEST:
            continue
        shares = np.bincount(nearest[box][mask], minlength=len(COLORS) + 1)[:-1] / mask.sum()
        color = list(COLORS)[shares.argmax()] if shares.max() >= PURE else None
        rows, columns = box
        found.append(Found((columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2, color, _shape(mask)))
    return found


def shows(found: list[Found], scene: Scene) -> bool:
    """Whether these objects are those of the scene, in its colours and places, and no others."""
    if len(found) != len(scene.things):
        return False
    orders = (found, found[::-1]) if len(found) == 2 else (found,)
    return any(_shows_in_order(order, scene) for order in orders)


def _shows_in_order(found: list[Found], scene: Scene) -> bool:
    for one, thing in zip(found, scene.things, strict=True):
        if one.shape != thing.shape or thing.color not in (None, one.color):
            return False
    return scene.relation is None or side(found[0], found[1]) == scene.relation


def _shape(mask: np.ndarray) -> str | None:
    """The shape that most resembles a mask (h, w), stretched to a common size."""
    height, width = mask.shape
    if not 0.6 < height / width < 1 / 0.6:
        return None
    stretched = np.array(Image.fromarray(mask).resize((GRID, GRID), Image.Resampling.NEAREST))
    overlaps = {shape: (stretched & template).sum() / (stretched | template).sum() for shape, template in _templates().items()}
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] >= OVERLAP else None


@functools.lru_cache
def _templates() -> dict[str, np.ndarray]:
    templates = {}
    for shape in SHAPES:
        picture = Image.new("1", (GRID, GRID))
        ImageDraw.Draw(picture).polygon([((1 + x) * (GRID - 1) / 2, (1 + y) * (GRID - 1) / 2) for x, y in outline_of(shape)], fill=1)
        templates[shape] = np.array(picture)
    return templates
