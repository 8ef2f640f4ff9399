"""A finished (or running) run, opened for sampling in one process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditmoe_ds import config
from ditmoe_ds.diffusion.noise import starting_noise
from ditmoe_ds.diffusion.objectives import DiffusionConfig
from ditmoe_ds.diffusion.sampling import Sampler, guided, sample
from ditmoe_ds.distributed.weights import open_weights
from ditmoe_ds.errors import ConfigError
from ditmoe_ds.latents.vae import decode, load_vae
from ditmoe_ds.models.dit import DiT, DiTConfig


@dataclass
class Run:
    """A model with a run's weights, and what is needed to make images from it."""

    model: DiT
    diffusion: DiffusionConfig
    step: int
    latents: dict[str, Any]
    """VAE, scaling, class names and manifest of the training data."""

    def sample(
        self,
        labels: Tensor,
        *,
        steps: int,
        guidance: float,
        seed: int = 0,
        first: int = 0,
        sampler: Sampler | None = None,
        guided_channels: int | None = None,
    ) -> Tensor:
        """Sample one image per label.

        Args:
            labels: (B,) classes.
            first: number of the first image; image i's starting noise depends on (seed, first + i) alone.
            sampler: by default euler for rectified flow, ddim for ddpm.
            guided_channels: guidance acts on the first so many latent channels; all by default, 3 for parity with the DiT family's scripts.

        Returns:
            uint8 images (B, H, W, 3).

        Raises:
            ConfigError: a class that does not exist, or a sampler that does not go with the model's objective.
        """
        config = self.model.config
        flow = self.diffusion.objective == "rectified_flow"
        sampler = sampler or ("euler" if flow else "ddim")
        if (sampler == "euler") != flow:
            raise ConfigError(
                "--sampler", sampler, f"the model was trained with {self.diffusion.objective}: use {'euler' if flow else 'ddpm or ddim'}"
            )
        wrong = [int(y) for y in labels if not 0 <= y < config.num_classes]
        if wrong:
            raise ConfigError("--classes", wrong[0], f"classes are 0..{config.num_classes - 1}")
        device = self.model.x_embed.weight.device
        noise = starting_noise(seed, first, len(labels), (config.in_channels, config.input_size, config.input_size)).to(device)
        predict = guided(self.model, labels.to(device), config.num_classes, guidance, guided_channels or config.in_channels)
        generator = torch.Generator(device).manual_seed(seed)
        z = sample(predict, noise, self.diffusion, steps, sampler, generator)
        vae = load_vae(self.latents["vae"], device)
        return decode(vae, z, self.latents["scaling_factor"], self.latents["shift_factor"]).cpu()


def open_run(run_dir: str | Path, weights: str = "ema", device: torch.device | None = None) -> Run:
    """Load the newest checkpoint of a run, whatever shape of run saved it, into one process.

    Args:
        weights: ``ema`` or ``master`` (the raw weights).

    Raises:
        CheckpointError: no finished checkpoint there.
    """
    found = open_weights(run_dir, weights)
    model = DiT(config.build(DiTConfig, found.description["model"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            found.read(name, 0, parameter.view(-1))
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    diffusion = config.build(DiffusionConfig, found.description["diffusion"])
    return Run(model.to(device).eval(), diffusion, found.description["step"], found.description["latents"])
