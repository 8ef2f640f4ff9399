"""A finished (or running) run, or a weights folder, opened for sampling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.moe.utils import is_moe_param
from torch import Tensor, nn

import ditmoe_ds
from ditmoe_ds import config
from ditmoe_ds.diffusion.noise import image_generators
from ditmoe_ds.diffusion.objectives import DiffusionConfig
from ditmoe_ds.diffusion.sampling import Sampler, make_scheduler
from ditmoe_ds.distributed.host import empty_on_host
from ditmoe_ds.distributed.topology import ExpertGroup
from ditmoe_ds.distributed.weights import DTYPES, Weights, open_weights
from ditmoe_ds.errors import ConfigError
from ditmoe_ds.latents.condition import Captions, Classes, Conditioner
from ditmoe_ds.latents.manifest import weights_sha256
from ditmoe_ds.latents.text import load_text_encoder
from ditmoe_ds.latents.vae import decoder_space, load_vae
from ditmoe_ds.models.dit import DiT
from ditmoe_ds.models.sizes import described, parameter_shapes
from ditmoe_ds.moe.layer import MoE
from ditmoe_ds.pipelines.offload import keep_experts_on_the_host

if TYPE_CHECKING:
    from ditmoe_ds.pipelines.pipeline import DiTMoEPipeline, ECDiTPipeline


@dataclass
class Run:
    """A model with a run's weights, and what is needed to make images from it."""

    model: DiT
    diffusion: DiffusionConfig
    step: int
    latents: dict[str, Any]
    """VAE, scaling, class names, shape and text encoder of the training data; imported weights know none of them."""
    weights: Weights
    """What the model's weights were read from."""

    @cached_property
    def conditioner(self) -> Conditioner:
        """For classes or for prompts.

        Raises:
            ConfigError, DataError: no text encoder known, or it cannot be used.
        """
        if self.model.config.num_classes:
            return Classes(self.model.config.num_classes)
        text = self.latents.get("text")
        if not text or not text["encoder"]:
            raise ConfigError("--text-encoder", None, "these weights do not say what encoded their text; name a folder or hub id")
        if text.get("sha256") and weights_sha256(text["encoder"]) not in (None, text["sha256"]):
            fix = "its weights are not those that the captions were encoded with; put those back, or name their folder"
            raise ConfigError("--text-encoder", text["encoder"], fix)
        encoder = load_text_encoder(text["encoder"], text["max_tokens"], self.device, ("--text-encoder", "text_max_tokens"))
        if encoder.width != self.model.config.text_width:
            fix = f"its tokens are {encoder.width} wide, the model was trained with {self.model.config.text_width}"
            raise ConfigError("--text-encoder", text["encoder"], fix)
        return Captions(encoder)

    def identity(self, path: str | Path) -> dict[str, Any]:
        """Which model this is, opened from ``path``: for the description of images. Reads all weights, the VAE's and encoder's too."""
        opened, text, vae = self.weights.description, self.latents.get("text"), self.latents.get("vae")
        latents = {key: self.latents.get(key) for key in ("scaling_factor", "shift_factor")}
        latents |= dict(shape=list(self.shape), vae_sha256=vae and weights_sha256(vae))
        if text:
            latents |= dict(text_max_tokens=text["max_tokens"], text_sha256=text["encoder"] and weights_sha256(text["encoder"]))
        return dict(
            checkpoint=str(Path(path).absolute()),
            step=self.step,
            weights=opened["weights"],
            weights_sha256=self.weights.sha256(),
            model=opened["model"],
            diffusion=opened["diffusion"],
            latents=latents,
        )

    @property
    def device(self) -> torch.device:
        return self.model.x_embed.weight.device

    @cached_property
    def pipeline(self) -> DiTMoEPipeline | ECDiTPipeline:
        """The diffusers pipeline of this model and its VAE; it shares the model.

        Raises:
            ConfigError, DataError: no VAE known, or it cannot be read; and as ``conditioner``.
        """
        from ditmoe_ds.pipelines.pipeline import DiTMoEPipeline, ECDiTPipeline  # takes seconds
        from ditmoe_ds.pipelines.transformer import DiTMoETransformer

        if "vae" not in self.latents:
            raise ConfigError("--vae", None, "these weights do not say which VAE makes images of their latents; name a folder or hub id")
        decoder_space(self.latents["vae"], self.model.config.in_channels)
        conditioner = self.conditioner
        parts: dict[str, Any] = dict(
            transformer=DiTMoETransformer.of(self.model, self.diffusion),
            scheduler=make_scheduler(self.diffusion),
            vae=load_vae(self.latents["vae"], self.device, self.latents.get("vae_sha256")),
            scaling_factor=self.latents.get("scaling_factor"),
            shift_factor=self.latents.get("shift_factor"),
            latent_shape=self.shape,
        )
        pipe: DiTMoEPipeline | ECDiTPipeline
        if isinstance(conditioner, Captions):
            encoder = conditioner.encoder
            pipe = ECDiTPipeline(**parts, text_encoder=encoder.model, tokenizer=encoder.tokenizer, max_tokens=encoder.max_tokens)
        else:
            pipe = DiTMoEPipeline(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sample(
        self,
        asked: Sequence[int] | Sequence[str],
        *,
        steps: int,
        guidance: float,
        seed: int = 0,
        first: int = 0,
        sampler: Sampler | None = None,
        **options: Any,
    ) -> Tensor:
        """Sample one image for each class, or prompt.

        Args:
            asked: B classes or B prompts, whichever the model was trained on.
            first: number of the first image; all randomness of image i depends on (seed, first + i) alone.
            sampler: by default euler for rectified flow, ddim for ddpm.
            options: further arguments of the pipeline.

        Returns:
            uint8 images (B, H, W, 3).

        Raises:
            ConfigError: a class that does not exist, a sampler that does not go with the model's objective, no VAE or text encoder known.
        """
        numbers = range(first, first + len(asked))
        return self.images(self.numbered(numbers, asked, seed, sampler, steps, guidance_scale=guidance, **options))

    def numbered(
        self, numbers: Iterable[int], asked: Sequence[Any], seed: int, sampler: Sampler | None, steps: int, **options: Any
    ) -> Tensor:
        """As ``sample``, for images of any ``numbers``, but returns scaled latents (B, C, h, w)."""
        pipe, generators = self.pipeline, image_generators(seed, numbers)
        pipe.scheduler = make_scheduler(self.diffusion, sampler)
        found: Tensor = pipe(asked, num_inference_steps=steps, generator=generators, output_type="latent", **options).images
        return found

    def images(self, latents: Tensor) -> Tensor:
        """uint8 images (B, H, W, 3), on the CPU, of scaled latents (B, C, h, w)."""
        return torch.from_numpy((self.pipeline.decoded(latents, "np") * 255).round().astype("uint8"))

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of the latents that are sampled: the most common in training."""
        config = self.model.config
        return tuple(self.latents.get("shape", (config.in_channels, config.input_size, config.input_size)))


def versions() -> dict[str, str]:
    """Versions of the packages that compute images."""
    import diffusers  # takes seconds

    return dict(version=ditmoe_ds.__version__, torch=torch.__version__, diffusers=diffusers.__version__)


@torch.no_grad()
def load_model(
    weights: Weights,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    group: ExpertGroup | None = None,
    offload_experts: bool = False,
) -> DiT:
    """The model with these weights; only what this rank keeps is read.

    Args:
        group: hold this rank's share of the experts only; every forward is then collective in the group.
        offload_experts: see ``keep_experts_on_the_host``.

    Raises:
        CheckpointError: a parameter is missing, unknown or of another shape.
    """
    settings = described(weights.description["model"], len(weights.shapes))
    weights.check(parameter_shapes(settings))
    device = torch.device(device)
    with torch.device("meta"):
        model = DiT(settings, group.size if group else 1)
    for module in model.modules():
        if group and isinstance(module, MoE):
            module.set_deepspeed_parallelism()
        for key, parameter in list(module.named_parameters(recurse=False)):
            if offload_experts and is_moe_param(parameter):
                made = nn.Parameter(empty_on_host(parameter.shape, dtype, locked=device.type == "cuda"))
            else:
                made = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
            made.__dict__.update(parameter.__dict__)  # DeepSpeed's mark of an expert
            setattr(module, key, made)
    for name, parameter in model.named_parameters():
        start = group.rank * parameter.numel() if group and is_moe_param(parameter) else 0
        weights.read(name, start, parameter.view(-1))
    if offload_experts:
        keep_experts_on_the_host(model, device)
    return model.eval()


def open_run(
    path: str | Path,
    weights: str = "ema",
    device: torch.device | None = None,
    vae: str | None = None,
    text_encoder: str | None = None,
    dtype: str = "fp32",
    group: ExpertGroup | None = None,
    offload_experts: bool = False,
) -> Run:
    """Load what ``open_weights`` opens, whatever shape of run saved it.

    Args:
        weights: ``ema``, ``master`` (the raw weights) or one average by its name, such as ``ema_0.999``.
        vae, text_encoder: folders or hub ids, instead of those that the weights name, if they name any.
        dtype: of the model, a key of ``DTYPES``.
        group, offload_experts: see ``load_model``.

    Raises:
        CheckpointError: no finished checkpoint and no weights folder there.
    """
    opened = open_weights(path, weights)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    diffusion = config.build(DiffusionConfig, opened.description["diffusion"])
    latents = opened.description["latents"] | (dict(vae=vae, vae_sha256=None) if vae else {})
    if text_encoder:
        latents["text"] = {"max_tokens": 77, **latents.get("text", {}), "encoder": text_encoder, "sha256": None}
    model = load_model(opened, device, DTYPES[dtype], group, offload_experts)
    return Run(model, diffusion, opened.description["step"], latents, opened)
