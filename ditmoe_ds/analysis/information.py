"""How much the time, position or class of a token says about its expert: mutual information, tested by permutation.

Tokens of an image are alike, so a test that took them for independent would find significance everywhere. Here labels are permuted
only among what is exchangeable if the expert does not depend on them: classes between images; times between the forwards of an
image; positions by shifting the whole grid of an image (a torus), which leaves neighbours neighbours. The mean over permutations
is also the bias of the estimate, which is never negative.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ditmoe_ds.analysis.routing import Takings

Shuffle = Callable[[torch.Generator], Tensor]


def entropy(counts: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    """In bits, of the distribution that counts over ``dim`` are proportional to; 0 where there are none."""
    share = counts.double() / counts.double().sum(dim, keepdim=True).clamp(min=1)
    return torch.special.entr(share).sum(dim) / torch.tensor(2.0, dtype=torch.float64).log()


def mutual_information(table: Tensor) -> Tensor:
    """I(row; expert) in bits of counts (rows, ..., E), by the plug-in estimate H(row) + H(expert) - H(row, expert)."""
    return (entropy(table.sum(-1), 0) + entropy(table.sum(0)) - entropy(table, (0, -1))).clamp(min=0)


@dataclass
class Information:
    """I(label; expert) of L layers, in bits, beside what R permutations of the labels give."""

    bits: Tensor
    """(L,)."""
    shuffled: Tensor
    """(R, L)."""
    experts: Tensor
    """(L,) entropy of the expert, in bits: the most that any label could tell."""

    def report(self) -> dict[str, list[float | None]]:
        """By layer, and at the end of each list for the mean over layers.

        Returns:
            ``bits``; ``experts``, the entropy of the expert, the most that any label could tell; ``baseline``, the permutations'
            mean, and ``baseline_high``, their 95 % quantile; ``share``, what is above the baseline as a share of that entropy; ``z``,
            None if the permutations all agree; ``p``, one-sided, at least 1 / (R + 1).
        """
        observed = torch.cat([self.bits, self.bits.mean()[None]])
        null = torch.cat([self.shuffled, self.shuffled.mean(1, keepdim=True)], dim=1)
        most = torch.cat([self.experts, self.experts.mean()[None]])
        mean, spread = null.mean(0), null.std(0)
        reached = (null >= observed - 1e-12).sum(0)  # sums in another order differ in the last bits
        z = [None if s < 1e-12 else (o - m) / s for o, m, s in zip(observed.tolist(), mean.tolist(), spread.tolist(), strict=True)]
        return dict(
            bits=observed.tolist(),
            experts=most.tolist(),
            baseline=mean.tolist(),
            baseline_high=null.quantile(0.95, dim=0).tolist(),
            share=((observed - mean) / most.clamp(min=1e-12)).tolist(),
            z=z,
            p=((1.0 + reached.double()) / (1 + len(null))).tolist(),
        )


def information(units: Tensor, labels: Tensor, rows: int, shuffle: Shuffle, permutations: int) -> Information:
    """Mutual information of label and expert.

    Args:
        units: (U, L, E) takings of what has one label.
        labels: (U,) below ``rows``.
        shuffle: draws other labels (U,), as likely as these if labels do not matter.
    """

    def table(rows_of: Tensor) -> Tensor:
        return torch.zeros(rows, *units.shape[1:], dtype=units.dtype).index_add_(0, rows_of, units)

    generator = torch.Generator().manual_seed(0)
    shuffled = [mutual_information(table(shuffle(generator))) for _ in range(permutations)]
    return Information(mutual_information(table(labels)), torch.stack(shuffled), entropy(units.sum(0)))


def informations(counted: Takings, sides: tuple[int, int], labels: Tensor, classes: int, permutations: int) -> dict[str, Information]:
    """Of "timestep", "position" and, if there are classes, "class".

    Args:
        sides: rows and columns of the N positions.
        labels: (S,) classes of the samples, -1 of those without.
    """
    samples, times, layers, experts = counted.by_time.shape
    height, width = sides
    row, column = torch.arange(height)[:, None], torch.arange(width)

    def other_times(generator: torch.Generator) -> Tensor:
        return torch.rand(samples, times, generator=generator).argsort(1).flatten()

    def other_positions(generator: torch.Generator) -> Tensor:
        down, right = (torch.randint(side, (samples, 1, 1), generator=generator) for side in sides)
        return ((row + down) % height * width + (column + right) % width).flatten()

    def measure(units: Tensor, known: Tensor, rows: int, shuffle: Shuffle) -> Information:
        return information(units.reshape(-1, layers, experts), known, rows, shuffle, permutations)

    found = dict(
        timestep=measure(counted.by_time, torch.arange(times).repeat(samples), times, other_times),
        position=measure(counted.by_position, torch.arange(height * width).repeat(samples), height * width, other_positions),
    )
    if classes:
        of_samples, labels = counted.by_time.sum(1, dtype=torch.int32)[labels >= 0], labels[labels >= 0]
        found["class"] = measure(of_samples, labels, classes, lambda generator: labels[torch.randperm(len(labels), generator=generator)])
    return found
