"""Scores of features (N, D), in float64 and block by block, without a matrix of all pairs. Collective: the ranks share the blocks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ditmoe_ds.evaluation.ranks import share, total

BLOCK = 4096
"""Rows and columns of distances at a time: 134 MB."""
KID_SUBSET = 1000
"""Images."""


class InceptionScore:
    """exp of the mean divergence of p(y|x) from p(y), arXiv 1606.03498, streamed.

    As the ADM evaluator: splits of 5,000 consecutive images, the last with the rest; mean and standard deviation over them.
    """

    SPLIT = 5000

    def __init__(self, count: int, classes: int, device: torch.device | str = "cpu"):
        splits = -(-count // self.SPLIT)
        self.sums = torch.zeros(splits, classes, dtype=torch.float64, device=device)
        self.negentropy = torch.zeros(splits, dtype=torch.float64, device=device)
        self.count = count

    def add(self, first: int, logits: Tensor) -> None:
        """Take in images first, first + 1, ...: (B, classes)."""
        log = logits.double().log_softmax(1)
        split = torch.arange(first, first + len(log), device=log.device) // self.SPLIT
        self.sums.index_add_(0, split, log.exp())
        self.negentropy.index_add_(0, split, (log.exp() * log).sum(1))

    def score(self) -> tuple[float, float]:
        """Mean and standard deviation. Collective."""
        sums, negentropy = total(self.sums), total(self.negentropy)
        counts = sums.sum(1)
        marginal = sums / counts[:, None]
        scores = (negentropy / counts - torch.xlogy(marginal, marginal).sum(1)).exp()
        return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(real: Tensor, made: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall, arXiv 1904.06991.

    Precision is the share of ``made`` that lies in a ball around one of ``real``, whose radius is the distance to its
    ``neighbours``-th nearest other; recall the reverse.
    """
    return _covered(made, real, _squared_radii(real, neighbours)), _covered(real, made, _squared_radii(made, neighbours))


def kid(a: Tensor, b: Tensor, subsets: int = 100, size: int = KID_SUBSET) -> tuple[float, float]:
    """Kernel Inception distance, arXiv 1801.01401: mean and standard deviation over random subsets of the unbiased squared MMD.

    Kernel, subsets and seed are those of torch-fidelity.
    """
    size = min(size, len(a), len(b))
    rng = np.random.RandomState(2020)
    chosen = [[torch.from_numpy(rng.choice(len(x), size, replace=False)) for x in (a, b)] for _ in range(subsets)]
    found = torch.zeros(subsets, dtype=torch.float64)
    for index in range(*share(subsets)):
        x, y = (features[rows.to(features.device)].double() for features, rows in zip((a, b), chosen[index], strict=True))
        xx, yy, xy = _polynomial(x, x), _polynomial(y, y), _polynomial(x, y)
        own = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        found[index] = own - 2 * xy.mean()
    total(found)
    return found.mean().item(), found.std(correction=0).item()


def _polynomial(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def cmmd(a: Tensor, b: Tensor) -> float:
    """CMMD, arXiv 2401.09603: 1000 times the squared MMD of unit vectors with a Gaussian kernel of width 10.

    The estimator is that of the authors' code: pairs of a vector with itself count.
    """

    def kernel(squared: Tensor) -> Tensor:
        return (-squared / (2 * 10**2)).exp()

    return 1000 * (_mean_of_pairs(a, a, kernel) + _mean_of_pairs(b, b, kernel) - 2 * _mean_of_pairs(a, b, kernel))


def wilson(right: int, count: int) -> list[float]:
    """Wilson's 95 % confidence interval [low, high] of the share ``right / count``. Not collective."""
    z, share = 1.96, right / count
    middle, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    ends = (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)
    return [min(max(end, 0.0), 1.0) for end in ends]  # rounding may leave it


def _mean_of_pairs(a: Tensor, b: Tensor, of: Callable[[Tensor], Tensor]) -> float:
    first, last = share(len(a))
    found = torch.zeros((), dtype=torch.float64, device=a.device)
    for rows in a[first:last].split(BLOCK):
        for columns in b.split(BLOCK):
            found += of(_squared_distances(rows, columns)).sum()
    return total(found).item() / (len(a) * len(b))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.double(), b.double()
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def _squared_radii(x: Tensor, neighbours: int) -> Tensor:
    """(N,) squared distances to the ``neighbours``-th nearest other."""
    first, last = share(len(x))
    radii = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for start in range(first, last, BLOCK):
        rows = x[start : min(start + BLOCK, last)]
        nearest = x.new_empty(len(rows), 0, dtype=torch.float64)
        for columns in x.split(BLOCK):
            nearest = torch.cat([nearest, _squared_distances(rows, columns)], 1)
            nearest = nearest.topk(min(neighbours + 1, nearest.shape[1]), largest=False).values
        radii[start : start + len(rows)] = nearest.max(1).values  # the nearest of all is itself
    return total(radii)


def _covered(points: Tensor, centres: Tensor, squared_radii: Tensor) -> float:
    """Share of the points that lie in a ball."""
    first, last = share(len(points))
    found = torch.zeros((), dtype=torch.float64, device=points.device)
    for rows in points[first:last].split(BLOCK):
        inside = torch.zeros(len(rows), dtype=torch.bool, device=points.device)
        for columns, radii in zip(centres.split(BLOCK), squared_radii.split(BLOCK), strict=True):
            inside |= (_squared_distances(rows, columns) <= radii).any(1)
        found += inside.sum()
    return total(found).item() / len(points)
