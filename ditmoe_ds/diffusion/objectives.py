"""Training objectives: what time a sample is noised to, and the loss of a prediction there.

``predict(z, t)`` is the model with its condition bound: z (B, C, H, W), t (B,) as the embedding wants it.
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
    label_dropout: float = 0.1
    """Share of samples trained without their class, for classifier-free guidance."""


class Objective(Protocol):
    def time(self, draws: Draws) -> Tensor: ...

    def embed(self, t: Tensor) -> Tensor: ...

    def loss(self, predict: Predict, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor: ...


class RectifiedFlow:
    """z_t = (1 - t) x + t noise, target noise - x, logit-normal t. Source: arXiv 2407.11633, section 3.3."""

    def __init__(self, time_scale: float):
        self.time_scale = time_scale

    def time(self, draws: Draws) -> Tensor:
        """(B,) t = sigmoid of a standard normal."""
        return draws.normal.sigmoid()

    def embed(self, t: Tensor) -> Tensor:
        """What the model's timestep embedding receives for t."""
        return t * self.time_scale

    def loss(self, predict: Predict, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """(B,) mean square error of the velocity at t (B,)."""
        s = t.view(-1, 1, 1, 1)
        velocity = predict((1 - s) * x0 + s * noise, self.embed(t))[:, : x0.shape[1]]
        return (velocity - (noise - x0)).square().flatten(1).mean(1)


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
        self.log_beta = betas.log().float()
        self.log_posterior = torch.cat([posterior[1:2], posterior[1:]]).log().float()  # the first is 0
        self.signal, self.sigma = bar.sqrt().float(), (1 - bar).sqrt().float()
        self.mean_x0 = (betas * before.sqrt() / (1 - bar)).float()
        self.mean_z = ((1 - before) * alphas.sqrt() / (1 - bar)).float()

    def time(self, draws: Draws) -> Tensor:
        """(B,) uniform in [0, 1)."""
        return draws.uniform[:, 0]

    def embed(self, t: Tensor) -> Tensor:
        """(B,) the step 0..999 as a float."""
        return (t * self.steps).floor().clamp(max=self.steps - 1)

    def loss(self, predict: Predict, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """(B,) mean square error of the noise at t (B,), plus the bound's term if the model predicts a variance."""
        step = self.embed(t).long()
        at = lambda table: table.to(x0.device)[step].view(-1, 1, 1, 1)  # noqa: E731
        z = at(self.signal) * x0 + at(self.sigma) * noise
        out = predict(z, step.float())
        channels = x0.shape[1]
        eps = out[:, :channels]
        mse = (eps - noise).square().flatten(1).mean(1)
        if out.shape[1] == channels:
            return mse
        share = (out[:, channels:] + 1) / 2
        log_variance = share * at(self.log_beta) + (1 - share) * at(self.log_posterior)
        predicted_x0 = (z - at(self.sigma) * eps.detach()) / at(self.signal)
        mean = at(self.mean_x0) * predicted_x0 + at(self.mean_z) * z
        true_mean = at(self.mean_x0) * x0 + at(self.mean_z) * z
        kl = gaussian_kl(true_mean, at(self.log_posterior), mean, log_variance)
        decoder = -discretized_log_likelihood(x0, mean, log_variance / 2)
        bound = torch.where(step.view(-1, 1, 1, 1) == 0, decoder, kl).flatten(1).mean(1) / math.log(2)
        return mse + bound


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Elementwise KL divergence of two normals, in nats."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (-1 - ratio + ratio.exp() + (mean1 - mean2).square() * (-log_variance2).exp())


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Elementwise log-probability of the 1/255-wide bin around x under a normal, the outer bins open at +-1."""
    normal = lambda edge: 0.5 * (1 + torch.erf((edge - mean) * (-log_scale).exp() / math.sqrt(2)))  # noqa: E731
    upper = torch.where(x > 0.999, torch.ones_like(x), normal(x + 1 / 255))
    lower = torch.where(x < -0.999, torch.zeros_like(x), normal(x - 1 / 255))
    return (upper - lower).clamp(min=1e-12).log()


def make_objective(config: DiffusionConfig) -> Objective:
    return RectifiedFlow(config.time_scale) if config.objective == "rectified_flow" else DDPM()


def drop_labels(labels: Tensor, draws: Draws, share: float, null: int) -> Tensor:
    """(B,) labels with about ``share`` of them replaced by ``null``."""
    return torch.where(draws.uniform[:, 1] < share, torch.full_like(labels, null), labels)


def flip(x: Tensor, draws: Draws) -> Tensor:
    """x (B, C, H, W) with about half of the samples mirrored left to right."""
    return torch.where((draws.uniform[:, 2] < 0.5).view(-1, 1, 1, 1), x.flip(-1), x)
