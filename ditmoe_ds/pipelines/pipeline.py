"""diffusers pipelines of our models: ``DiTMoEPipeline`` for classes, ``ECDiTPipeline`` for texts.

pipe = DiTMoEPipeline.from_pretrained(folder)
pipe(class_labels=[207, 360], guidance_scale=2.0).images
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ditmoe_ds.diffusion.sampling import SCHEDULERS, Guidance, guided, sample
from ditmoe_ds.errors import ConfigError
from ditmoe_ds.latents.condition import Captions, Classes, Condition, Conditioner
from ditmoe_ds.latents.text import TextEncoder
from ditmoe_ds.latents.vae import downsampling
from ditmoe_ds.pipelines.transformer import DiTMoETransformer

Generators = torch.Generator | list[torch.Generator] | None


class _Pipeline(DiffusionPipeline):
    """What both share: noise, the loop, the VAE.

    ``scaling_factor``, ``shift_factor`` and ``latent_shape`` (C, H, W) are those of training, where they differ from what the
    VAE and the transformer say.
    """

    _optional_components = ["vae"]  # noqa: RUF012 (as diffusers declares it)
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    @property
    def conditioner(self) -> Conditioner:
        raise NotImplementedError

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, H, W), where no size is asked for."""
        model = self.transformer.dit.config
        return tuple(self.config.latent_shape or (model.in_channels, model.input_size, model.input_size))

    def latent_shape_of(self, height: int | None, width: int | None, key: str = "height, width") -> tuple[int, ...]:
        """(C, H, W) of the latents of images of this size in pixels.

        Raises:
            ConfigError: naming ``key``; the model cannot make such images, or there is no VAE that would say what a pixel is.
        """
        if self.vae is None:
            raise ConfigError(key, f"{height}x{width}", "this pipeline has no VAE: pass one to from_pretrained, or latents")
        factor, patch = downsampling(self.vae.config), self.transformer.dit.config.patch
        if not height or not width or min(height, width) < 1 or height % (factor * patch) or width % (factor * patch):
            fix = f"both must be multiples of {factor * patch}: a patch of the model is {patch} latent pixels of {factor} pixels each"
            raise ConfigError(key, f"{height}x{width}", fix)
        return self.latent_shape[0], height // factor, width // factor

    @torch.no_grad()
    def _sample(
        self,
        asked: Sequence[Any],
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guided_channels: int | None = None,
        weak_transformer: DiTMoETransformer | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
    ) -> Any:
        """Sample one image for each of B things asked for: an ``ImagePipelineOutput``, or a tuple of the images alone.

        Args:
            guidance_scale, guidance_interval, guided_channels: see ``Guidance``.
            weak_transformer: for autoguidance, see ``guided``.
            height, width: of the images in pixels, both or none; by default the most common in training. Sizes that training did not see
                are for experiments.
            generator: one, or one for each image: then an image depends on its own alone.
            latents: starting noise (B, C, H, W) instead.
            output_type: "pil", "np" (B, H, W, 3) and "pt" (B, 3, H, W) in [0, 1], or "latent": scaled latents.
            callback_on_step_end: ``callback(pipe, step, t, {"latents": z})`` returns a dict, whose latents replace z; setting
                ``pipe._interrupt`` ends the sampling.

        Raises:
            ConfigError: no VAE, a scheduler that does not go with the transformer's objective, not a generator for each image, or as
                ``latent_shape_of``.
        """
        if isinstance(generator, list) and len(generator) != len(asked):
            raise ConfigError("generator", len(generator), f"one, or as many as images: {len(asked)}")
        if output_type != "latent" and self.vae is None:
            raise ConfigError("vae", None, "this pipeline has no VAE: pass one to from_pretrained, or output_type='latent'")
        device = self._execution_device
        self._interrupt = False
        if latents is None:
            shape = self.latent_shape if height is None and width is None else self.latent_shape_of(height, width)
            latents = randn_tensor((len(asked), *shape), generator=generator, device=device)
        guidance = Guidance(guidance_scale, guidance_interval, guided_channels)
        condition = self._condition(asked, device)
        diffusion = self.transformer.diffusion
        predict = guided(self.transformer, condition, guidance, diffusion, weak_transformer, self.transformer.dit.config.images_compete)
        heun = type(self.scheduler).__name__ == SCHEDULERS["rectified_flow"]["heun"]
        with self.progress_bar(total=2 * num_inference_steps - 1 if heun else num_inference_steps) as bar:

            def after(i: int, t: Tensor, z: Tensor) -> tuple[Tensor, bool]:
                bar.update()
                if callback_on_step_end is not None:
                    z = callback_on_step_end(self, i, t, {"latents": z}).get("latents", z)
                return z, not self._interrupt

            z = latents.to(device, torch.float32)
            z = sample(predict, z, self.scheduler, diffusion, num_inference_steps, generator, after)
        images = z if output_type == "latent" else self.decoded(z, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _condition(self, asked: Sequence[Any], device: torch.device) -> Condition:
        """Arguments of the model for B things asked for, and for B times nothing, as ``guided`` takes them."""
        conditioner = self.conditioner
        return conditioner.unpack(conditioner.pack([*asked, *[conditioner.null] * len(asked)]), device)

    @torch.no_grad()
    def decoded(self, z: Tensor, output_type: str) -> Any:
        """Images of scaled latents (B, C, h, w), for ``output_type`` see ``_sample``."""
        scaling = self.config.scaling_factor or self.vae.config.scaling_factor
        shift = self.config.shift_factor if self.config.shift_factor is not None else self.vae.config.get("shift_factor")
        decoded = self.vae.decode((z / scaling + (shift or 0.0)).to(self.vae.dtype), return_dict=False)[0]
        return VaeImageProcessor().postprocess(decoded.float(), output_type)


class DiTMoEPipeline(_Pipeline):
    """Images of classes."""

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        transformer: DiTMoETransformer,
        scheduler: Any,
        vae: Any = None,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        latent_shape: Sequence[int] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(scaling_factor=scaling_factor, shift_factor=shift_factor, latent_shape=latent_shape)

    @property
    def conditioner(self) -> Conditioner:
        return Classes(self.transformer.dit.config.num_classes)

    def __call__(self, class_labels: int | Sequence[int], **options: Any) -> Any:
        """Sample one image per label, of 0..num_classes - 1; options and errors as ``_sample``."""
        labels, classes = torch.as_tensor(class_labels), self.transformer.dit.config.num_classes
        if labels.is_floating_point() or (labels.numel() and not 0 <= labels.min() <= labels.max() < classes):
            raise ConfigError("class_labels", class_labels, f"classes are 0..{classes - 1}")
        return self._sample(labels.view(-1).tolist(), **options)


class ECDiTPipeline(_Pipeline):
    """Images of texts.

    Args:
        text_encoder, tokenizer: of transformers, those of training.
        max_tokens: longer prompts are cut.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        transformer: DiTMoETransformer,
        scheduler: Any,
        text_encoder: Any,
        tokenizer: Any,
        vae: Any = None,
        max_tokens: int = 77,
        scaling_factor: float | None = None,
        shift_factor: float | None = None,
        latent_shape: Sequence[int] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(scaling_factor=scaling_factor, shift_factor=shift_factor, latent_shape=latent_shape, max_tokens=max_tokens)

    @cached_property
    def conditioner(self) -> Conditioner:
        return Captions(TextEncoder(self.text_encoder, self.tokenizer, self.config.max_tokens))

    def __call__(self, prompt: str | Sequence[str], **options: Any) -> Any:
        """Sample one image per prompt; options and errors as ``_sample``."""
        return self._sample([prompt] if isinstance(prompt, str) else list(prompt), **options)
