"""The frozen VAE: images to latents and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ditmoe_ds.errors import DataError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def load_vae(path_or_id: str, device: str | torch.device) -> AutoencoderKL:
    """A diffusers ``AutoencoderKL`` from a local folder or the hub: float32, frozen, safetensors only.

    Raises:
        DataError: there is no such folder or id, or its weights cannot be read.
    """
    from diffusers import AutoencoderKL  # takes seconds to import

    if not Path(path_or_id).is_dir() and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", path_or_id):
        raise DataError(f"vae={path_or_id!r}: no such folder; give a diffusers folder or a hub id such as stabilityai/sd-vae-ft-ema")
    try:
        vae = AutoencoderKL.from_pretrained(path_or_id, use_safetensors=True, low_cpu_mem_usage=False)
    except Exception as error:  # the hub, the config and the weights each fail in their own way
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"vae={path_or_id!r}: neither a folder nor a hub id with a readable AutoencoderKL ({reason})") from error
    return vae.to(device).eval().requires_grad_(False)


@torch.no_grad()
def encode_mean(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1] to unscaled posterior means (B, C, h, w)."""
    return vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: torch.Tensor, scaling_factor: float, shift_factor: float) -> torch.Tensor:
    """Scaled latents (B, C, h, w) to images (B, H, W, 3) uint8."""
    images = vae.decode((latents / scaling_factor + shift_factor).to(vae.device, vae.dtype)).sample
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
