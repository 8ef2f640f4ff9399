"""Mean and covariance of features, streamed in float64 and summed over the ranks; the Fréchet distance of two."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ditmoe_ds.evaluation.ranks import total


class Gaussian(NamedTuple):
    """A mean (D,) and a covariance (D, D), float64."""

    mean: Tensor
    covariance: Tensor


class Moments:
    """Count, mean and sum of outer products about the mean, of vectors that come batch by batch."""

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, vectors: Tensor) -> None:
        """Take in (B, D); the update for two sets of Chan, Golub and LeVeque (1983)."""
        vectors = vectors.double()
        mean = vectors.mean(0)
        centred = vectors - mean
        step, count = mean - self.mean, self.count + len(vectors)
        self.scatter += centred.T @ centred + torch.outer(step, step) * (self.count * len(vectors) / count)
        self.mean += step * (len(vectors) / count)
        self.count = count

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance of all ranks' vectors, at least two. Collective."""
        device = self.mean.device
        count = total(torch.tensor(float(self.count), dtype=torch.float64, device=device)).item()
        mean = total(self.mean * (self.count / count))
        step = self.mean - mean
        scatter = total(self.scatter + torch.outer(step, step) * self.count)
        return Gaussian(mean.cpu(), scatter.cpu() / (count - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), arXiv 1706.08500; also of singular covariances.

    The trace of the root is computed as the sum of the singular values of A^(1/2) B^(1/2). This takes no root of numbers that are zero but
    for rounding, and so stays exact where there are fewer images than features.
    """
    root = torch.linalg.svdvals(_root(a.covariance).T @ _root(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root
    return max(distance.item(), 0.0)  # rounding may leave less than 0 for equal ones


def _root(covariance: Tensor) -> Tensor:
    """(D, R) with the covariance as its product with its transpose, R its rank."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()
