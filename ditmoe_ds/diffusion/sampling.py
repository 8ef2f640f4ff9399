"""From noise to latents: Euler for rectified flow, diffusers' DDPM and DDIM schedulers for noise prediction."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from ditmoe_ds.diffusion.objectives import DDPM, DiffusionConfig, Predict, RectifiedFlow

Sampler = Literal["euler", "ddpm", "ddim"]


def guided(model: Callable[..., Tensor], condition: dict[str, Tensor], scale: float, channels: int) -> Predict:
    """Bind a condition to ``model(x, t, **condition)`` with classifier-free guidance, both halves in one batched call.

    Args:
        condition: arguments of 2 B rows: what is asked for, and for as many the absence of it.
        scale: 1 is no guidance (and one half-size call).
        channels: guidance acts on the first ``channels`` outputs; the rest (variance) is the conditional half's.
    """

    def predict(z: Tensor, t: Tensor) -> Tensor:
        if scale == 1:
            return model(z, t, **{name: rows[: len(z)] for name, rows in condition.items()})
        return guide(model(torch.cat([z, z]), torch.cat([t, t]), **condition), scale, channels)

    return predict


def guide(out: Tensor, scale: float, channels: int) -> Tensor:
    """Mix the outputs (2B, ...) of the conditional and the unconditional half: uncond + scale * (cond - uncond)."""
    cond, uncond = out.chunk(2)
    mixed = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
    return torch.cat([mixed, cond[:, channels:]], dim=1)


@torch.no_grad()
def sample(
    predict: Predict, noise: Tensor, config: DiffusionConfig, steps: int, sampler: Sampler, generator: torch.Generator | None = None
) -> Tensor:
    """Integrate from ``noise`` (B, C, H, W) to scaled latents of the same shape.

    Args:
        sampler: euler goes with rectified flow, ddpm and ddim with the ddpm objective.
        generator: for the noise that ddpm adds on the way.
    """
    if sampler == "euler":
        return _euler(predict, noise, config, steps)
    return _diffusers(predict, noise, steps, sampler, generator)


def _euler(predict: Predict, z: Tensor, config: DiffusionConfig, steps: int) -> Tensor:
    objective = RectifiedFlow(config.time_scale, config.time_shift)
    times = objective.shifted(torch.linspace(1, 0, steps + 1, device=z.device))
    for now, then in pairwise(times):
        velocity = predict(z, objective.embed(now.expand(len(z))))[:, : z.shape[1]]
        z = z + (then - now) * velocity
    return z


def noise_scheduler(sampler: Literal["ddpm", "ddim"]) -> Any:
    """diffusers' scheduler for the ddpm objective."""
    from diffusers import DDIMScheduler, DDPMScheduler

    common = dict(num_train_timesteps=DDPM.steps, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=False)
    if sampler == "ddim":
        return DDIMScheduler(**common, set_alpha_to_one=True, timestep_spacing="trailing")
    return DDPMScheduler(**common, variance_type="learned_range", timestep_spacing="trailing")


def _diffusers(predict: Predict, z: Tensor, steps: int, sampler: Literal["ddpm", "ddim"], generator: torch.Generator | None) -> Tensor:
    scheduler = noise_scheduler(sampler)
    channels = z.shape[1]
    scheduler.set_timesteps(steps, device=z.device)
    for t in scheduler.timesteps:
        out = predict(z, t.float().expand(len(z)))
        if sampler == "ddim":
            z = scheduler.step(out[:, :channels], t, z).prev_sample
        else:
            z = scheduler.step(out, t, z, generator=generator).prev_sample
    return z
