"""One micro-batch: from latents to a loss."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ditmoe_ds.diffusion.noise import draw
from ditmoe_ds.diffusion.objectives import DiffusionConfig, Objective, drop_labels, flip
from ditmoe_ds.latents.loader import Batch
from ditmoe_ds.models.dit import RouterStats
from ditmoe_ds.moe.routing import RouterConfig, balance_loss


class Prepared(NamedTuple):
    """A micro-batch with everything that chance decides."""

    latents: Tensor
    labels: Tensor
    times: Tensor
    """(B,) in [0, 1]."""
    noise: Tensor
    samples: Tensor
    """(B,) indices into the data set."""

    def to(self, device: torch.device) -> "Prepared":
        return Prepared(*(tensor.to(device, non_blocking=True) for tensor in self))


def prepare(batch: Batch, seed: int, objective: Objective, config: DiffusionConfig, null: int, mirror: bool) -> Prepared:
    """Draw time, noise, label dropout and flip of each sample from (seed, epoch, sample)."""
    draws = draw(seed, batch.epochs, batch.samples, tuple(batch.latents.shape[1:]))
    latents = flip(batch.latents, draws) if mirror else batch.latents
    return Prepared(
        latents, drop_labels(batch.labels, draws, config.label_dropout, null), objective.time(draws), draws.noise, batch.samples
    )


class StepLoss(NamedTuple):
    """What one micro-batch yields. ``total`` is minimised; the rest is for the record."""

    total: Tensor
    diffusion: Tensor
    """() this rank's mean."""
    balance: Tensor
    """() balance loss; with global scope, its mean over ranks is the loss of the global micro-batch."""
    z: Tensor
    selections: Tensor
    """(L, E) over all ranks; (0, 0) for a dense model."""


def compute_loss(model: torch.nn.Module, objective: Objective, batch: Prepared, router: RouterConfig) -> StepLoss:
    """Forward one prepared micro-batch. Collective: every rank's tokens count in the balance loss."""
    stats: list[RouterStats | None] = []

    def predict(z: Tensor, t: Tensor) -> Tensor:
        out, routed = model(z, t, batch.labels, return_router=True)
        stats.append(routed)
        return out

    diffusion = objective.loss(predict, batch.latents, batch.times, batch.noise).mean()
    routed = stats[0]
    if routed is None:
        zero = diffusion.new_zeros(())
        return StepLoss(diffusion, diffusion.detach(), zero, zero, torch.zeros(0, 0, device=diffusion.device))
    everywhere = routed.selections.clone()
    dist.all_reduce(everywhere)
    # f is a constant for autograd, so that only the mean scores P need averaging over ranks: the engine's gradient mean does it
    counted = everywhere if router.balance_scope == "global" else routed.selections
    balance = balance_loss(counted, routed.mean_scores, router.balance_alpha)
    z = router.z_alpha * routed.z.sum()
    return StepLoss(diffusion + balance + z, diffusion.detach(), balance.detach(), z.detach(), everywhere)


def router_metrics(selections: Tensor) -> dict[str, list[float]]:
    """Per layer, from (L, E) selections: coefficient of variation of the load, share of experts never chosen, entropy of
    the load as a share of its maximum, and the fullest expert's load over the mean."""
    load = selections.double()
    share = load / load.sum(1, keepdim=True)
    mean = load.mean(1)
    entropy = -(share * share.clamp(min=1e-12).log()).sum(1) / torch.tensor(max(load.shape[1], 2)).log()
    values = dict(
        cv=load.std(1, correction=0) / mean, dead=(load == 0).double().mean(1), entropy=entropy, max_over_mean=load.amax(1) / mean
    )
    return {key: [round(v, 6) for v in value.tolist()] for key, value in values.items()}
