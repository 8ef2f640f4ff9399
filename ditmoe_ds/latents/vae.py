"""The frozen VAE: images to latents and back. AutoencoderKL, AutoencoderDC and AutoencoderTiny of diffusers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ditmoe_ds.errors import ConfigError, DataError, loading
from ditmoe_ds.latents.manifest import weights_sha256

CLASSES = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")


class LatentSpace(NamedTuple):
    """What the config of a VAE says about its latents."""

    channels: int
    downsample: int
    """Image pixels per latent pixel, along one side."""
    scaling_factor: float
    """Latents are learned as ``(x - shift_factor) * scaling_factor``."""
    shift_factor: float
    posterior: bool
    """Whether an image has a distribution of latents, or just one."""


def latent_space(path_or_id: str) -> LatentSpace:
    """Read from the config alone; no weights are loaded.

    Raises:
        DataError: there is no such folder or id, or it is no VAE of a known class.
    """
    config, cls = _config(path_or_id)
    # A config.json may leave out what equals the default of its class, such as SD's scaling_factor.
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls.__init__).parameters.items()}
    values = {**defaults, **config}
    return LatentSpace(
        channels=values["latent_channels"],
        downsample=downsampling(values),
        scaling_factor=float(values["scaling_factor"]),
        shift_factor=float(values.get("shift_factor") or 0.0),
        posterior=cls.__name__ == "AutoencoderKL",
    )


def is_hub_id(path_or_id: str) -> bool:
    """Whether it is a hub id, as far as its form and this machine's folders tell."""
    return not Path(path_or_id).is_dir() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", path_or_id) is not None


def downsampling(config: Mapping[str, Any]) -> int:
    """Image pixels per latent pixel, along one side, of the VAE with this whole config."""
    levels = config["block_out_channels"] if "block_out_channels" in config else config["encoder_block_out_channels"]
    return int(2 ** (len(levels) - 1))


def decoder_space(vae: str, channels: int) -> LatentSpace:
    """The latent space of the VAE that a user named for a model whose latents have ``channels``.

    Raises:
        ConfigError: it has another number of channels.
        DataError: as ``latent_space``.
    """
    space = latent_space(vae)
    if space.channels != channels:
        raise ConfigError("--vae", vae, f"decodes latents of {space.channels} channels; the model makes {channels}")
    return space


def load_vae(path_or_id: str, device: str | torch.device, sha256: str | None = None) -> Any:
    """A diffusers VAE from a local folder or the hub: float32, frozen, safetensors only.

    Args:
        sha256: of the weights that made the latents, if known.

    Raises:
        DataError: there is no such folder or id, its weights cannot be read, or have changed since.
    """
    _, cls = _config(path_or_id)
    if sha256 and weights_sha256(path_or_id) not in (None, sha256):
        raise DataError(f"vae={path_or_id!r}: its weights are not those that the latents were made with; put those back, or encode again")
    with loading(_unreadable(path_or_id)):
        vae = cls.from_pretrained(path_or_id, use_safetensors=True, low_cpu_mem_usage=False)
    return vae.to(device).eval().requires_grad_(False)


def _config(path_or_id: str) -> tuple[dict[str, Any], Any]:
    """The raw config and the class it names."""
    import diffusers  # takes seconds to import

    if not (Path(path_or_id).is_dir() or is_hub_id(path_or_id)):
        raise DataError(f"vae={path_or_id!r}: no such folder; give a diffusers folder or a hub id such as stabilityai/sd-vae-ft-ema")
    with loading(_unreadable(path_or_id)):
        config = diffusers.AutoencoderKL.load_config(path_or_id)
    if config.get("_class_name") not in CLASSES:
        raise DataError(f"vae={path_or_id!r}: is {config.get('_class_name')!r}; choose one of {', '.join(CLASSES)}")
    return config, getattr(diffusers, config["_class_name"])


def _unreadable(path_or_id: str) -> str:
    return f"vae={path_or_id!r}: neither a folder nor a hub id with a readable {', '.join(CLASSES)}"


@torch.no_grad()
def encode(vae: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images (B, 3, H, W) in [-1, 1] to the unscaled posterior's mean and standard deviation, both (B, C, h, w).

    A VAE without a posterior gives its latents and None.
    """
    found = vae.encode(images.to(vae.device, vae.dtype), return_dict=False)[0]
    return (found, None) if isinstance(found, torch.Tensor) else (found.mean, found.std)


@torch.no_grad()
def decode(vae: Any, latents: torch.Tensor, scaling_factor: float, shift_factor: float) -> torch.Tensor:
    """Scaled latents (B, C, h, w) to images (B, H, W, 3) uint8."""
    images = vae.decode((latents / scaling_factor + shift_factor).to(vae.device, vae.dtype), return_dict=False)[0]
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
