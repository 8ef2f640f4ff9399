"""Many images in one picture."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def save_grid(images: Sequence[Tensor] | Tensor, path: Path, columns: int, gap: int = 2) -> None:
    """Write images (H, W, 3) uint8, of the same or different sizes, as one picture, row by row, at least ``gap`` pixels apart."""
    height, width = (max(image.shape[side] for image in images) for side in (0, 1))
    rows = -(-len(images) // columns)
    canvas = torch.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=torch.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + len(image), left : left + image.shape[1]] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas.numpy()).save(path)


def save_pairs(above: Sequence[Tensor] | Tensor, below: Sequence[Tensor] | Tensor, path: Path, columns: int) -> None:
    """As ``save_grid``: rows of images of ``above``, under each the row of their counterparts in ``below``."""
    columns = min(columns, len(above))
    nothing = torch.full((1, 1, 3), 255, dtype=torch.uint8)
    tiles: list[Tensor] = []
    for first in range(0, len(above), columns):
        for images in (above, below):
            row = images[first : first + columns]
            tiles += [*row, *[nothing] * (columns - len(row))]
    save_grid(tiles, path, columns)
