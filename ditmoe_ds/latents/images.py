"""Pictures of images."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def save_grid(images: Tensor, path: Path, columns: int, gap: int = 2) -> None:
    """Write images (N, H, W, 3) uint8 as one picture, row by row, ``gap`` pixels apart."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    canvas = torch.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=torch.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas.numpy()).save(path)
