"""Where one rank's part of a tensor lies in the whole one, when tensor parallelism cuts it. Index arithmetic, no processes."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Elements whose places are computed at a time: 32 MB of indices."""


class Cut(NamedTuple):
    """Along which dimension a tensor is cut, and what lies side by side there."""

    dim: int
    blocks: tuple[int, ...]
    """Sizes along ``dim`` of, for example, [gate | up] or [q | k | v]: every part has its share of each. They add up to the dimension."""


@dataclass(frozen=True)
class Slice:
    """Part ``part`` of ``parts`` equal ones of a tensor of this shape. Its elements are in the order of the whole tensor's."""

    shape: tuple[int, ...]
    cut: Cut
    part: int
    parts: int

    def places(self, start: int, stop: int) -> Tensor:
        """Offsets in the flattened whole tensor of the flattened part's elements ``start`` to ``stop``, in ascending order."""
        kept, inner = self._kept(), self._inner
        index = torch.arange(start, stop)
        row, inside = index // inner, index % inner
        return (row // len(kept) * self.shape[self.cut.dim] + kept[row % len(kept)]) * inner + inside

    def before(self, place: int) -> int:
        """How many of this part's elements lie before offset ``place`` of the flattened whole tensor."""
        kept, inner = self._kept(), self._inner
        row, inside = divmod(place, inner)
        outer, along = divmod(row, self.shape[self.cut.dim])
        count = outer * len(kept) + int((kept < along).sum())
        return count * inner + (inside if (kept == along).any() else 0)

    def gather(self, start: int, out: Tensor, read: Callable[[int, Tensor], None]) -> None:
        """Fill ``out`` (1-D) with the part's elements from ``start`` on, out of the whole tensor.

        Args:
            read: ``read(start, out)`` fills ``out`` with the elements of the flattened whole tensor.
        """
        for first, last in _chunks(start, start + out.numel()):
            places = self.places(first, last)
            low = int(places[0])
            span = torch.empty(int(places[-1]) + 1 - low)
            read(low, span)
            out[first - start : last - start].copy_(span[places - low])

    def scatter(self, start: int, out: Tensor, read: Callable[[int, Tensor], None]) -> None:
        """Fill what belongs to this part in ``out`` (1-D), the elements of the flattened whole tensor from ``start`` on.

        Args:
            read: ``read(start, out)`` fills ``out`` with the elements of the flattened part.
        """
        for first, last in _chunks(self.before(start), self.before(start + out.numel())):
            part = torch.empty(last - first)
            read(first, part)
            out[(self.places(first, last) - start).to(out.device)] = part.to(out)

    @property
    def _inner(self) -> int:
        return math.prod(self.shape[self.cut.dim + 1 :])

    def _kept(self) -> Tensor:
        """Indices along the dimension that belong to this part."""
        pieces, begin = [], 0
        for block in self.cut.blocks:
            share = block // self.parts
            pieces.append(torch.arange(begin + self.part * share, begin + (self.part + 1) * share))
            begin += block
        return torch.cat(pieces)


def _chunks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, CHUNK):
        yield first, min(first + CHUNK, stop)
