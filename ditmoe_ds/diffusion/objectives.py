"""Training objectives: what time a sample is noised to, and the loss of a prediction there.

``predict(z, t)`` is the model with its condition bound: z (B, C, H, W), t (B,) as ``Objective.embed`` gives it.
Time is in [0, 1] everywhere here; 0 is the image, 1 is noise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ditmoe_ds.diffusion.noise import Draws

Predict = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DiffusionConfig:
    """The objective and what it needs."""

    objective: Literal["rectified_flow", "ddpm"] = "rectified_flow"
    """rectified_flow (DiT-MoE XL, G) or ddpm (S, B)."""
    time_scale: float = 1000.0
    """Factor on rectified flow's t before the embedding. 1.0 for the released reference weights."""
    condition_dropout: float = 0.1
    """Share of samples trained without their class or caption, for classifier-free guidance."""
    time_shift: float = 1.0
    """Rectified flow, for large latents: s > 1 moves t towards noise, t -> s t / (1 + (s - 1) t), in training and sampling; s is the
    square root of the ratio of token counts (arXiv 2403.03206, section 5.3.2)."""

    @property
    def noise_time(self) -> float:
        """What the model's timestep embedding receives at t = 1."""
        return self.time_scale if self.objective == "rectified_flow" else float(DDPM.steps)


class Objective(Protocol):
    """How samples are noised, and what the model learns to predict of them."""

    def time(self, draws: Draws) -> Tensor:
        """(B,) the times in [0, 1] to which samples are noised."""

    def embed(self, t: Tensor) -> Tensor:
        """(B,) what the model's timestep embedding receives for t (B,)."""

    def loss(self, predict: Predict, x0: Tensor, t: Tensor, noise: Tensor, where: Tensor | None = None) -> Tensor:
        """(B,) the loss of ``predict`` for x0 and noise (B, C, H, W) at t (B,), over the pixels ``where`` (B, 1, H, W) is 1, or all."""


class RectifiedFlow:
    """z_t = (1 - t) x + t noise, target noise - x, logit-normal t. Source: arXiv 2407.11633, section 3.3."""

    def __init__(self, time_scale: float, time_shift: float = 1.0):
        self.time_scale, self.time_shift = time_scale, time_shift

    def time(self, draws: Draws) -> Tensor:
        """(B,) t = sigmoid of a standard normal, shifted."""
        return self.shifted(draws.normal.sigmoid())

    def shifted(self, t: Tensor) -> Tensor:
        """t, moved towards noise by ``time_shift``."""
        return t if self.time_shift == 1 else self.time_shift * t / (1 + (self.time_shift - 1) * t)

    def embed(self, t: Tensor) -> Tensor:
        """(B,) t times ``time_scale``."""
        return t * self.time_scale

    def loss(self, predict: Predict, x0: Tensor, t: Tensor, noise: Tensor, where: Tensor | None = None) -> Tensor:
        """(B,) mean square error of the velocity at t (B,), over the pixels ``where`` (B, 1, H, W) is 1, or all."""
        s = t.view(-1, 1, 1, 1)
        velocity = predict((1 - s) * x0 + s * noise, self.embed(t))[:, : x0.shape[1]]
        return mean_per_sample((velocity - (noise - x0)).square(), where)


class DDPM:
    """1000 steps, linear betas, noise prediction with learned-range variance: MSE plus the variational bound's term.

    The bound trains the variance alone (the mean is detached), in bits. Source: arXiv 2102.09672, section 3.1; DiT.
    """

    steps = 1000

    def __init__(self) -> None:
        betas = torch.linspace(1e-4, 2e-2, self.steps, dtype=torch.float64)
        alphas = 1 - betas
        bar = alphas.cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
        posterior = betas * (1 - before) / (1 - bar)
        log_posterior = torch.cat([posterior[1:2], posterior[1:]]).log()  # the first variance is 0
        mean_x0, mean_z = betas * before.sqrt() / (1 - bar), (1 - before) * alphas.sqrt() / (1 - bar)
        table = torch.stack([bar.sqrt(), (1 - bar).sqrt(), mean_x0, mean_z, betas.log(), log_posterior]).float()
        self.tables = {table.device: table}

    def at(self, step: Tensor) -> Tensor:
        """(6, B, 1, 1, 1) for the steps (B,): the factors of x0 and noise in z, those of x0 and z in the posterior's mean, log beta, and
        the log of the posterior's variance."""
        if step.device not in self.tables:  # only once: the copy waits for the device
            self.tables[step.device] = self.tables[torch.device("cpu")].to(step.device)
        return self.tables[step.device][:, step, None, None, None]

    def time(self, draws: Draws) -> Tensor:
        """(B,) uniform in [0, 1)."""
        return draws.uniform[:, 0]

    def embed(self, t: Tensor) -> Tensor:
        """(B,) the step 0..999 as a float."""
        return (t * self.steps).floor().clamp(max=self.steps - 1)

    def loss(self, predict: Predict, x0: Tensor, t: Tensor, noise: Tensor, where: Tensor | None = None) -> Tensor:
        """(B,) mean square error of the noise at t (B,), plus the bound's term if the model predicts a variance; over the pixels
        ``where`` (B, 1, H, W) is 1, or all."""
        step = self.embed(t).long()
        signal, sigma, mean_x0, mean_z, log_beta, log_posterior = self.at(step)
        z = signal * x0 + sigma * noise
        out = predict(z, step.float())
        channels = x0.shape[1]
        eps = out[:, :channels]
        mse = mean_per_sample((eps - noise).square(), where)
        if out.shape[1] == channels:
            return mse
        share = (out[:, channels:] + 1) / 2
        log_variance = share * log_beta + (1 - share) * log_posterior
        predicted_x0 = (z - sigma * eps.detach()) / signal
        mean, true_mean = mean_x0 * predicted_x0 + mean_z * z, mean_x0 * x0 + mean_z * z
        kl = gaussian_kl(true_mean, log_posterior, mean, log_variance)
        decoder = -discretized_log_likelihood(x0, mean, log_variance / 2)
        bound = mean_per_sample(torch.where(step.view(-1, 1, 1, 1) == 0, decoder, kl), where) / math.log(2)
        return mse + bound


def mean_per_sample(x: Tensor, where: Tensor | None) -> Tensor:
    """(B,) mean of x (B, C, H, W) over the pixels ``where`` (B, 1, H, W) is 1, or over all."""
    if where is None:
        return x.flatten(1).mean(1)
    return (x * where).flatten(1).sum(1) / (where.flatten(1).sum(1) * x.shape[1])


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Elementwise KL divergence of two normals, in nats."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (-1 - ratio + ratio.exp() + (mean1 - mean2).square() * (-log_variance2).exp())


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Elementwise log-probability of the 2/255-wide bin around x under a normal, the outer bins open at +-1."""
    normal = lambda edge: 0.5 * (1 + torch.erf((edge - mean) * (-log_scale).exp() / math.sqrt(2)))  # noqa: E731
    upper = torch.where(x > 0.999, torch.ones_like(x), normal(x + 1 / 255))
    lower = torch.where(x < -0.999, torch.zeros_like(x), normal(x - 1 / 255))
    return (upper - lower).clamp(min=1e-12).log()


def make_objective(config: DiffusionConfig) -> Objective:
    return RectifiedFlow(config.time_scale, config.time_shift) if config.objective == "rectified_flow" else DDPM()


def flip(x: Tensor, draws: Draws) -> Tensor:
    """x (B, C, H, W) with about half of the samples mirrored left to right."""
    return torch.where((draws.uniform[:, 2] < 0.5).view(-1, 1, 1, 1), x.flip(-1), x)
