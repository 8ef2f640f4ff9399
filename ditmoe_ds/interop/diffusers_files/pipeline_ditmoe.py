"""Class-conditional images from a DiT or DiT-MoE: torch and diffusers only, shipped inside every folder that ``ditmoe export`` writes.

pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline_ditmoe", trust_remote_code=True)
pipe(class_labels=[207, 360], num_inference_steps=50, guidance_scale=2.0).images
"""

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class DiTMoEPipeline(DiffusionPipeline):
    """Rectified flow by Euler steps, or noise prediction by DDIM: whichever the transformer was trained for."""

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012 (as diffusers declares it)

    def __init__(self, transformer, scheduler, vae=None, scaling_factor=None, shift_factor=None, class_names=None, latent_shape=None):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(
            scaling_factor=scaling_factor, shift_factor=shift_factor, class_names=class_names, latent_shape=latent_shape
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int],
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        """Sample one image per label.

        Args:
            class_labels: B classes, 0..num_classes - 1.
            guidance_scale: 1 is no guidance.
            latents: starting noise (B, C, H, W); drawn with ``generator`` by default.
            output_type: "pil", "np" (B, H, W, 3) or "pt" (B, 3, H, W) in [0, 1], or "latent": scaled latents (B, C, h, w).
        """
        class_labels = [class_labels] if isinstance(class_labels, int | str) else class_labels
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r}: choose pil, np, pt or latent")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps}: at least 1")
        if isinstance(generator, list) and len(generator) != len(class_labels):
            raise ValueError(f"generator: {len(generator)} of them for {len(class_labels)} images")
        config, device = self.transformer.config, self._execution_device
        wrong = [label for label in class_labels if isinstance(label, str) or not 0 <= label < config.num_classes]
        if wrong:
            raise ValueError(f"class_labels: {wrong[0]!r} is no number in 0..{config.num_classes - 1}")
        if output_type != "latent" and self.vae is None:
            raise ValueError(
                "this folder holds no VAE: pass vae=AutoencoderKL.from_pretrained(...) to from_pretrained, or output_type='latent'"
            )
        if latents is None:
            shape = self.config.latent_shape or (config.in_channels, config.input_size, config.input_size)
            latents = randn_tensor((len(class_labels), *shape), generator=generator, device=device)
        z = latents.to(device, torch.float32)
        labels = torch.tensor(class_labels, device=device)
        flow = config.diffusion["objective"] == "rectified_flow"
        if flow:  # equal steps from t = 1 to 0; the scheduler counts time 0..1000
            self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_inference_steps, num_inference_steps), device=device)
            factor = config.diffusion["time_scale"] / self.scheduler.config.num_train_timesteps
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
            ddim, times = type(self.scheduler).__name__ == "DDIMScheduler", self.scheduler.config.num_train_timesteps
            if ddim and times % num_inference_steps:  # it goes back times // steps each time, whatever lies between two of them
                raise ValueError(f"num_inference_steps={num_inference_steps}: DDIM takes equal parts of {times}, such as 50 and 250")
            factor = 1.0
        for t in self.progress_bar(self.scheduler.timesteps):
            out = self._guided(z, t.float() * factor, labels, guidance_scale)
            z = self.scheduler.step(out[:, : config.in_channels], t, z, return_dict=False)[0]
        images = z if output_type == "latent" else self._decode(z, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _guided(self, z, t, labels, scale):
        if scale == 1:
            return self.transformer(z, t.expand(len(z)), labels).sample
        null = torch.full_like(labels, self.transformer.config.num_classes)
        out = self.transformer(torch.cat([z, z]), t.expand(2 * len(z)), torch.cat([labels, null])).sample
        cond, uncond = out.chunk(2)
        return uncond + scale * (cond - uncond)

    def _decode(self, z, output_type):
        scaling = self.vae.config.scaling_factor if self.config.scaling_factor is None else self.config.scaling_factor
        shift = self.vae.config.get("shift_factor") if self.config.shift_factor is None else self.config.shift_factor
        images = self.vae.decode((z / scaling + (shift or 0.0)).to(self.vae.dtype)).sample
        images = (images.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images
