"""One micro-batch: from latents to a loss."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ditmoe_ds.diffusion.noise import draw, kept_patches, patches_kept
from ditmoe_ds.diffusion.objectives import Objective, flip
from ditmoe_ds.latents.condition import Condition, Conditioner
from ditmoe_ds.latents.loader import Batch
from ditmoe_ds.models.dit import DiTConfig
from ditmoe_ds.moe.layer import RouterStats
from ditmoe_ds.moe.routing import balance_loss


class Prepared(NamedTuple):
    """A micro-batch with everything that is drawn at random."""

    latents: Tensor
    """(B, C, H, W), scaled."""
    condition: Any
    """As the conditioner packed it; on the device, keyword arguments of the model."""
    times: Tensor
    """(B,) in [0, 1]."""
    noise: Tensor
    """(B, C, H, W)."""
    samples: Tensor
    """(B,) indices into the data set; they stay on the CPU."""
    keep: Tensor | None
    """(B, n) numbers of the patches that are not masked; None for all."""

    def to(self, device: torch.device, conditioner: Conditioner) -> "Prepared":
        """On the device, all but the indices, with the condition unpacked."""
        condition = conditioner.unpack(self.condition, device)
        latents, times, noise = (part.to(device, non_blocking=True) for part in (self.latents, self.times, self.noise))
        keep = None if self.keep is None else self.keep.to(device, non_blocking=True)
        return Prepared(latents, condition, times, noise, self.samples, keep)

    def tokens(self, patch: int) -> int:
        """How many tokens of each image the network sees."""
        return self.latents[0, 0].numel() // patch**2 if self.keep is None else self.keep.shape[1]


@dataclass
class Preparation:
    """Draws time, noise, condition dropout, flip and mask of each sample from (seed, epoch, sample). Runs in the loader's processes."""

    seed: int
    objective: Objective
    conditioner: Conditioner
    dropout: float
    """Share of samples that lose their condition."""
    mirror: bool
    """Flip about half of the latents."""
    mask_ratio: float
    """Share of the patches that are left out."""
    patch: int
    """Side of a patch, in latent pixels."""

    def __call__(self, batch: Batch) -> Prepared:
        draws = draw(self.seed, batch.epochs, batch.samples, tuple(batch.latents.shape[1:]))
        latents = flip(batch.latents, draws) if self.mirror else batch.latents
        dropped = (draws.uniform[:, 1] < self.dropout).tolist()
        conditions = [self.conditioner.null if drop else own for own, drop in zip(self.conditioner.of(batch), dropped, strict=True)]
        keep = None
        if self.mask_ratio:
            patches = latents[0, 0].numel() // self.patch**2
            keep = kept_patches(self.seed, batch.epochs, batch.samples, patches, patches_kept(patches, self.mask_ratio))
        return Prepared(latents, self.conditioner.pack(conditions), self.objective.time(draws), draws.noise, batch.samples, keep)


class StepLoss(NamedTuple):
    """What one micro-batch yields. ``total`` is minimised; the rest is for the record."""

    total: Tensor
    """() the sum of ``diffusion``, ``balance`` and ``z``."""
    diffusion: Tensor
    """() this rank's mean."""
    balance: Tensor
    """() balance loss; with global scope, its mean over ranks is the loss of the global micro-batch."""
    z: Tensor
    """() this rank's router z-loss."""
    selections: Tensor
    """(L, E) over all ranks, how often each expert was chosen; (0, 0) for a dense model."""
    takers: Tensor
    """(L, E + 1) over all ranks, tokens by the number of experts that took them."""


def compute_loss(model: torch.nn.Module, objective: Objective, batch: Prepared, config: DiTConfig) -> StepLoss:
    """Forward one prepared micro-batch. Collective: every rank's tokens count in the balance loss."""
    stats: list[RouterStats | None] = []
    condition: Condition = batch.condition if batch.keep is None else batch.condition | dict(keep=batch.keep)

    def predict(z: Tensor, t: Tensor) -> Tensor:
        out, routed = model(z, t, **condition, return_router=True)
        stats.append(routed)
        return out

    where = None if batch.keep is None else pixels_of(batch.keep, batch.latents, config.patch)
    diffusion = objective.loss(predict, batch.latents, batch.times, batch.noise, where).mean()
    routed = stats[0]
    if routed is None:
        zero, none = diffusion.new_zeros(()), torch.zeros(0, 0, device=diffusion.device)
        return StepLoss(diffusion, diffusion.detach(), zero, zero, none, none)
    counts = torch.cat([routed.selections, routed.takers], dim=1)
    dist.all_reduce(counts)
    everywhere, takers = counts.split([routed.selections.shape[1], routed.takers.shape[1]], dim=1)
    balance = diffusion.new_zeros(())
    if config.routing == "token":
        # f is a constant for autograd, so that only the mean scores P need averaging over ranks: the engine's gradient mean does it
        counted = everywhere if config.router.balance_scope == "global" else routed.selections
        balance = balance_loss(counted, routed.mean_scores, config.router.balance_alpha)
    z = config.router.z_alpha * routed.z.sum()
    return StepLoss(diffusion + balance + z, diffusion.detach(), balance.detach(), z.detach(), everywhere, takers)


def pixels_of(keep: Tensor, latents: Tensor, patch: int) -> Tensor:
    """(B, 1, H, W) 1 where latents (B, C, H, W) belong to the patches ``keep`` (B, n), else 0."""
    rows, columns = (side // patch for side in latents.shape[2:])
    patches = latents.new_zeros(len(latents), rows * columns).scatter(1, keep, 1.0).view(-1, 1, rows, columns)
    return patches.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)


def router_metrics(selections: Tensor, takers: Tensor) -> dict[str, list[float]]:
    """What routers did, per layer.

    Returns:
        From selections (L, E): coefficient of variation of the load, share of experts never chosen, entropy of the load as a
        share of its maximum, and the fullest expert's load over the mean. From takers (L, E + 1): the share of tokens that no
        expert took, and the standard deviation of the number of experts that took a token.
    """
    load, tokens = selections.double(), takers.double()
    share = load / load.sum(1, keepdim=True)
    mean = load.mean(1)
    entropy = -(share * share.clamp(min=1e-12).log()).sum(1) / math.log(max(load.shape[1], 2))
    portion = tokens / tokens.sum(1, keepdim=True)
    number = torch.arange(tokens.shape[1], device=tokens.device)
    average = (portion * number).sum(1, keepdim=True)
    values = dict(
        cv=load.std(1, correction=0) / mean,
        dead=(load == 0).double().mean(1),
        entropy=entropy,
        max_over_mean=load.amax(1) / mean,
        untaken=portion[:, 0],
        takers_std=(portion * (number - average).square()).sum(1).sqrt(),
    )
    return {key: [round(v, 6) for v in value.tolist()] for key, value in values.items()}
