"""What a manifest says about the training samples as a whole."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Tally:
    """Sums over the training latents, unscaled.

    Args:
        channels: of a latent.
    """

    def __init__(self, channels: int):
        self.pixels = 0
        self.sum, self.squares = torch.zeros(2, channels, dtype=torch.float64)
        self.histogram: list[int] = []
        """Training samples of each label, up to the largest label in either split."""

    def add(self, split: str, latent: Tensor, label: int | None) -> None:
        """One more sample, with its (C, H, W) latent."""
        if label is not None:
            self.histogram += [0] * (label + 1 - len(self.histogram))
        if split == "train":
            exact = latent.double()
            self.pixels += exact[0].numel()
            self.sum += exact.sum((1, 2))
            self.squares += exact.square().sum((1, 2))
            if label is not None:
                self.histogram[label] += 1


def mean_and_std(total: np.ndarray, squares: np.ndarray, pixels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (C,) from sums (C,) over ``pixels`` latent pixels."""
    mean = total / pixels
    return tuple(mean.tolist()), tuple(np.sqrt(np.maximum(squares / pixels - mean**2, 0)).tolist())
