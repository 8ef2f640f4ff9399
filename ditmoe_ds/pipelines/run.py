"""A finished (or running) run, or a weights folder, opened for sampling in one process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditmoe_ds import config
from ditmoe_ds.diffusion.noise import starting_noise
from ditmoe_ds.diffusion.objectives import DiffusionConfig
from ditmoe_ds.diffusion.sampling import Sampler, guided, sample
from ditmoe_ds.distributed.weights import Weights, open_weights
from ditmoe_ds.errors import CheckpointError, ConfigError
from ditmoe_ds.latents.vae import decode, load_vae
from ditmoe_ds.models.dit import DiT, DiTConfig


@dataclass
class Run:
    """A model with a run's weights, and what is needed to make images from it."""

    model: DiT
    diffusion: DiffusionConfig
    step: int
    latents: dict[str, Any]
    """VAE, scaling, class names and manifest of the training data; imported weights know none of them."""

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
            ConfigError: a class that does not exist, a sampler that does not go with the model's objective, no VAE known.
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
        if "vae" not in self.latents:
            raise ConfigError("--vae", None, "these weights do not say which VAE makes images of their latents; name a folder or hub id")
        device = self.model.x_embed.weight.device
        noise = starting_noise(seed, first, len(labels), (config.in_channels, config.input_size, config.input_size)).to(device)
        predict = guided(self.model, labels.to(device), config.num_classes, guidance, guided_channels or config.in_channels)
        generator = torch.Generator(device).manual_seed(seed)
        z = sample(predict, noise, self.diffusion, steps, sampler, generator)
        vae = load_vae(self.latents["vae"], device)
        scaling = self.latents.get("scaling_factor", vae.config.scaling_factor)
        shift = self.latents.get("shift_factor", vae.config.shift_factor or 0.0)
        return decode(vae, z, scaling, shift).cpu()


@torch.no_grad()
def load_model(weights: Weights) -> DiT:
    """The whole model (EP 1, fp32, on the CPU) with these weights.

    Raises:
        CheckpointError: a parameter is missing, unknown or of another shape.
    """
    model = DiT(config.build(DiTConfig, weights.description["model"]))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in shapes | weights.shapes:
        if shapes.get(name) != weights.shapes.get(name):
            raise CheckpointError(f"{name}: the model has shape {shapes.get(name)}, the weights {weights.shapes.get(name)}")
    for name, parameter in model.named_parameters():
        weights.read(name, 0, parameter.view(-1))
    return model


def open_run(path: str | Path, weights: str = "ema", device: torch.device | None = None, vae: str | None = None) -> Run:
    """Load what ``open_weights`` opens, whatever shape of run saved it, into one process.

    Args:
        weights: ``ema`` or ``master`` (the raw weights).
        vae: a VAE's folder or hub id, instead of the one that the weights name, if they name one.

    Raises:
        CheckpointError: no finished checkpoint and no weights folder there.
    """
    opened = open_weights(path, weights)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    diffusion = config.build(DiffusionConfig, opened.description["diffusion"])
    latents = opened.description["latents"] | (dict(vae=vae) if vae else {})
    return Run(load_model(opened).to(device).eval(), diffusion, opened.description["step"], latents)
