"""Every random number of a training step, drawn per sample from (seed, epoch, sample) alone."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ditmoe_ds.rng import keyed_generator


class Draws(NamedTuple):
    """Random numbers for B samples."""

    noise: Tensor
    """(B, C, H, W) standard normal."""
    normal: Tensor
    """(B,) standard normal, for a logit-normal time."""
    uniform: Tensor
    """(B, 3) in [0, 1): time, condition dropout, flip."""


def draw(seed: int, epochs: Tensor, samples: Tensor, shape: tuple[int, ...]) -> Draws:
    """Draw for samples (B,) in epochs (B,) of latents of ``shape`` (C, H, W), on the CPU."""
    rows = []
    for epoch, sample in zip(epochs.tolist(), samples.tolist(), strict=True):
        generator = keyed_generator(seed, "draw", epoch, sample)
        rows.append((torch.randn(shape, generator=generator), torch.randn((), generator=generator), torch.rand(3, generator=generator)))
    return Draws(*(torch.stack(column) for column in zip(*rows, strict=True)))


def patches_kept(patches: int, mask_ratio: float) -> int:
    """How many of an image's patches are not masked: of an image with one or two, one."""
    return max(patches - round(patches * mask_ratio), 1)


def kept_patches(seed: int, epochs: Tensor, samples: Tensor, patches: int, kept: int) -> Tensor:
    """(B, kept) numbers, ascending, of the patches that are not masked; any choice is equally likely."""
    chosen = []
    for epoch, sample in zip(epochs.tolist(), samples.tolist(), strict=True):
        generator = keyed_generator(seed, "mask", epoch, sample)
        chosen.append(torch.randperm(patches, generator=generator)[:kept].sort().values)
    return torch.stack(chosen)


def image_generators(seed: int, numbers: Iterable[int]) -> list[torch.Generator]:
    """For each image to sample a generator of its own, which depends on (seed, its number) alone."""
    return [keyed_generator(seed, "sample", number) for number in numbers]


def starting_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) noise to sample from, an image from each generator."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])
