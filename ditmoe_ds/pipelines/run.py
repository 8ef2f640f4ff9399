"""A finished (or running) run, or a weights folder, opened for sampling in one process."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
from ditmoe_ds.latents.condition import Captions, Classes, Condition, Conditioner
from ditmoe_ds.latents.text import TextEncoder
from ditmoe_ds.latents.vae import decode, load_vae
from ditmoe_ds.models.dit import DiT, DiTConfig


@dataclass
class Run:
    """A model with a run's weights, and what is needed to make images from it."""

    model: DiT
    diffusion: DiffusionConfig
    step: int
    latents: dict[str, Any]
    """VAE, scaling, class names, shape and text encoder of the training data; imported weights know none of them."""

    @cached_property
    def conditioner(self) -> Conditioner:
        """Of classes, or of prompts.

        Raises:
            ConfigError, DataError: no text encoder known, or it cannot be used.
        """
        if self.model.config.num_classes:
            return Classes(self.model.config.num_classes)
        text = self.latents.get("text")
        if not text:
            raise ConfigError("--text-encoder", None, "these weights do not say what encoded their text; name a folder or hub id")
        encoder = TextEncoder(text["encoder"], text["max_tokens"], self.device, ("--text-encoder", "text_max_tokens"))
        if encoder.width != self.model.config.text_width:
            fix = f"its tokens are {encoder.width} wide, the model was trained with {self.model.config.text_width}"
            raise ConfigError("--text-encoder", text["encoder"], fix)
        return Captions(encoder)

    @property
    def device(self) -> torch.device:
        return self.model.x_embed.weight.device

    def condition(self, asked: Sequence[int] | Sequence[str]) -> Condition:
        """Arguments of the model for B classes or prompts, and for B times nothing, as ``guided`` takes them.

        Raises:
            ConfigError: a class that does not exist; and as ``conditioner``.
        """
        classes = self.model.config.num_classes
        wrong = [y for y in asked if not isinstance(y, int) or not 0 <= y < classes] if classes else []
        if wrong:
            raise ConfigError("--classes", wrong[0], f"classes are 0..{classes - 1}")
        told = self.conditioner
        return told.unpack(told.pack([*asked, *[told.null] * len(asked)]), self.device)

    def sample(
        self,
        asked: Sequence[int] | Sequence[str],
        *,
        steps: int,
        guidance: float,
        seed: int = 0,
        first: int = 0,
        sampler: Sampler | None = None,
        guided_channels: int | None = None,
    ) -> Tensor:
        """Sample one image for each class, or prompt.

        Args:
            asked: B classes or prompts, as the model was trained.
            first: number of the first image; image i's starting noise depends on (seed, first + i) alone.
            sampler: by default euler for rectified flow, ddim for ddpm.
            guided_channels: guidance acts on the first so many latent channels; all by default, 3 for parity with the DiT family's scripts.

        Returns:
            uint8 images (B, H, W, 3).

        Raises:
            ConfigError: a class that does not exist, a sampler that does not go with the model's objective, no VAE or text encoder known.
        """
        if "vae" not in self.latents:
            raise ConfigError("--vae", None, "these weights do not say which VAE makes images of their latents; name a folder or hub id")
        config = self.model.config
        flow = self.diffusion.objective == "rectified_flow"
        sampler = sampler or ("euler" if flow else "ddim")
        if (sampler == "euler") != flow:
            fix = f"the model was trained with {self.diffusion.objective}: use {'euler' if flow else 'ddpm or ddim'}"
            raise ConfigError("--sampler", sampler, fix)
        condition = self.condition(asked)
        noise = starting_noise(seed, first, len(asked), self.shape).to(self.device)
        predict = guided(self.model, condition, guidance, guided_channels or config.in_channels)
        generator = torch.Generator(self.device).manual_seed(seed)
        z = sample(predict, noise, self.diffusion, steps, sampler, generator)
        vae = load_vae(self.latents["vae"], self.device)
        scaling = self.latents.get("scaling_factor", vae.config.scaling_factor)
        shift = self.latents.get("shift_factor", vae.config.shift_factor or 0.0)
        return decode(vae, z, scaling, shift).cpu()

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of the latents that are sampled: the commonest in training."""
        config = self.model.config
        return tuple(self.latents.get("shape", (config.in_channels, config.input_size, config.input_size)))


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


def open_run(
    path: str | Path,
    weights: str = "ema",
    device: torch.device | None = None,
    vae: str | None = None,
    text_encoder: str | None = None,
) -> Run:
    """Load what ``open_weights`` opens, whatever shape of run saved it, into one process.

    Args:
        weights: ``ema`` or ``master`` (the raw weights).
        vae, text_encoder: folders or hub ids, instead of those that the weights name, if they name any.

    Raises:
        CheckpointError: no finished checkpoint and no weights folder there.
    """
    opened = open_weights(path, weights)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    diffusion = config.build(DiffusionConfig, opened.description["diffusion"])
    latents = opened.description["latents"] | (dict(vae=vae) if vae else {})
    if text_encoder:
        latents["text"] = {"max_tokens": 77, **latents.get("text", {}), "encoder": text_encoder}
    return Run(load_model(opened).to(device).eval(), diffusion, opened.description["step"], latents)
