"""From noise to latents: one loop, which any of diffusers' schedulers steps; and guidance."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ditmoe_ds.diffusion.objectives import DDPM, DiffusionConfig, Predict
from ditmoe_ds.errors import ConfigError

Sampler = Literal["euler", "heun", "dpm++", "unipc", "ddim", "ddpm"]
_BOTH: dict[Sampler, str] = {"dpm++": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}
SCHEDULERS: dict[str, dict[Sampler, str]] = {
    "rectified_flow": {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler", **_BOTH},
    "ddpm": {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", **_BOTH},
}
"""Classes of diffusers, by objective; the first is the default."""
After = Callable[[int, Tensor, Tensor], tuple[Tensor, bool]]


@dataclass(frozen=True)
class Guidance:
    """How far to go beyond the conditional prediction: weak + scale * (conditional - weak)."""

    scale: float = 1.0
    """1 is no guidance."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Guide only at times from the first to the second, where 1 is noise; elsewhere the prediction is the conditional one.
    Source: arXiv 2404.07724, section 3."""
    channels: int | None = None
    """How many latent channels are guided, from the first on; None guides all."""


def guided(
    model: Callable[..., Tensor],
    condition: dict[str, Tensor],
    guidance: Guidance,
    diffusion: DiffusionConfig,
    weak: Callable[..., Tensor] | None = None,
    apart: bool = False,
) -> Predict:
    """Bind a condition to ``model(x, t, **condition)``, with guidance.

    Args:
        condition: arguments with 2 B rows: the B conditions, then as many empty ones.
        weak: a worse model to guide away from, under the same condition (autoguidance, arXiv 2406.02507, section 3). None: the model
            itself under the empty condition (classifier-free guidance), both halves in one batched call.
        apart: two calls, for models in which the halves would compete for experts.

    Returns:
        ``predict(z, t)``; t lies on the CPU, so that reading it does not wait for the device.
    """
    low, high = guidance.interval

    def predict(z: Tensor, t: Tensor) -> Tensor:
        rows, channels = len(z), guidance.channels or z.shape[1]
        inside = low - 1e-6 <= t[0].item() / diffusion.noise_time <= high + 1e-6  # despite rounding at the ends
        t = t.to(z.device, non_blocking=True)
        asked, nothing = ({name: tensor[half] for name, tensor in condition.items()} for half in (slice(rows), slice(rows, None)))
        if guidance.scale == 1 or not inside:
            return model(z, t, **asked)
        if weak is not None:
            return guide(model(z, t, **asked), weak(z, t, **asked), guidance.scale, channels)
        if apart:
            return guide(model(z, t, **asked), model(z, t, **nothing), guidance.scale, channels)
        cond, uncond = model(torch.cat([z, z]), torch.cat([t, t]), **condition).chunk(2)
        return guide(cond, uncond, guidance.scale, channels)

    return predict


def guide(cond: Tensor, weak: Tensor, scale: float, channels: int) -> Tensor:
    """weak + scale * (cond - weak) in the first ``channels``; the rest (of the latent, and the variance) is ``cond``'s."""
    mixed = weak[:, :channels] + scale * (cond[:, :channels] - weak[:, :channels])
    return torch.cat([mixed, cond[:, channels:]], dim=1)


@torch.no_grad()
def sample(
    predict: Predict,
    z: Tensor,
    scheduler: Any,
    config: DiffusionConfig,
    steps: int,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    after: After = lambda i, t, z: (z, True),
) -> Tensor:
    """Go from noise z (B, C, H, W) to scaled latents of the same shape.

    Args:
        scheduler: of diffusers; see ``scheduled``.
        generator: for noise that is added on the way; one for each image makes it independent of the others.
        after: ``after(i, t, z)``, called after step i from the scheduler's time t, returns the latents to continue with, and whether to
            continue.

    Raises:
        ConfigError: as ``scheduled``.
    """
    flow, channels = config.objective == "rectified_flow", z.shape[1]
    scheduler = scheduled(scheduler, config, steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else it looks the step up by its time, which two may share after rounding
    random = dict(generator=generator) if "generator" in inspect.signature(scheduler.step).parameters else {}
    variance = scheduler.config.get("variance_type") == "learned_range"
    for i, t in enumerate(scheduler.timesteps):
        time = scheduler.sigmas[i] * config.time_scale if flow else t
        out = predict(z, torch.full((len(z),), float(time)))
        if not variance:
            out = out[:, :channels]
        elif out.shape[1] == channels:
            out = torch.cat([out, torch.full_like(out, -1)], 1)  # the lower end of the range, the posterior's
        z, go_on = after(i, t, scheduler.step(out, t, z, **random).prev_sample)
        if not go_on:
            break
    return z


def make_scheduler(config: DiffusionConfig, sampler: Sampler | None = None) -> Any:
    """A scheduler by our name for it, by default euler or ddim.

    Raises:
        ConfigError: it does not fit the objective.
    """
    import diffusers  # takes seconds

    known = SCHEDULERS[config.objective]
    sampler = sampler or next(iter(known))
    if sampler not in known:
        raise ConfigError("--sampler", sampler, f"the model was trained with {config.objective}: use {', '.join(known)}")
    cls = getattr(diffusers, known[sampler])
    takes = inspect.signature(cls.__init__).parameters
    ours = dict(timestep_spacing="trailing", set_alpha_to_one=True)  # from the noisiest step to no noise
    return fitted(cls(**{key: value for key, value in ours.items() if key in takes}), config)


def scheduled(scheduler: Any, config: DiffusionConfig, steps: int, key: str = "--steps") -> Any:
    """``fitted``, and set to ``steps`` steps. It stays on the CPU, where its numbers are read; scalars combine with tensors of any device.

    Args:
        key: what the user calls ``steps``.

    Raises:
        ConfigError: the scheduler does not fit the objective, or cannot take that many steps.
    """
    scheduler, most = fitted(scheduler, config), DDPM.steps
    if not 1 <= steps <= most:
        raise ConfigError(key, steps, f"from 1 to {most}")
    name = type(scheduler).__name__
    if name == SCHEDULERS["rectified_flow"]["euler"]:
        scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])  # its own would stop short of 0 and take a tiny step there
    elif name == SCHEDULERS["ddpm"]["ddpm"]:
        scheduler.set_timesteps(timesteps=np.linspace(most - 1, 0, steps).round().astype(int).tolist())  # as ADM: no noise in the last step
    else:
        if name == SCHEDULERS["rectified_flow"]["heun"]:
            scheduler.sigma_min = 1 / most  # it has shifted its last time already, and would again
        scheduler.set_timesteps(steps)
    if config.objective == "ddpm":
        if name == SCHEDULERS["ddpm"]["ddim"] and most % steps:  # it always goes back by most // steps
            near = [max(n for n in range(1, steps) if most % n == 0), min(n for n in range(steps, most + 1) if most % n == 0)]
            raise ConfigError(key, steps, f"DDIM's steps are equal parts of {most}: take {near[0]} or {near[1]}, or another sampler")
        if len(scheduler.timesteps) != steps:  # rounding has added one, at time -1
            raise ConfigError(key, steps, f"{name} cannot spread that many steps over {most} times; take a few more or fewer")
    return scheduler


def fitted(scheduler: Any, config: DiffusionConfig) -> Any:
    """A new scheduler of the same class and options, but with what the training fixed: what is predicted, betas or time shift.

    So ``pipe.scheduler = X.from_config(pipe.scheduler.config)`` needs to know nothing of the model.

    Raises:
        ConfigError: its class does not fit the objective.
    """
    known, name = SCHEDULERS[config.objective], type(scheduler).__name__
    if name not in known.values():
        raise ConfigError("scheduler", name, f"the model was trained with {config.objective}: use {', '.join(known.values())}")
    if config.objective == "rectified_flow":
        fixed: dict[str, Any] = dict(prediction_type="flow_prediction", use_flow_sigmas=True)
        fixed |= dict(shift=config.time_shift, flow_shift=config.time_shift, use_dynamic_shifting=False, invert_sigmas=False)
    else:
        fixed = dict(prediction_type="epsilon", use_flow_sigmas=False, clip_sample=False)
        fixed |= dict(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", trained_betas=None, rescale_betas_zero_snr=False)
        # for DDPM alone: DPM-Solver, told of a learned variance, would keep only three channels of the noise
        fixed["variance_type"] = "learned_range" if name == known["ddpm"] else None
    takes = inspect.signature(type(scheduler).__init__).parameters
    options = dict(scheduler.config) | dict(num_train_timesteps=DDPM.steps) | fixed
    return type(scheduler)(**{key: value for key, value in options.items() if key in takes})
