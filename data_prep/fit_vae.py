"""``ditmoe-data fit-vae``: train a small AutoencoderKL, for data that no public VAE fits."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from data_prep import images
from data_prep.sources import Item, is_heldout, open_source
from data_prep.units import NOTE, placed, read_note, refuse_another
from ditmoe_ds.errors import ConfigError, DataError
from ditmoe_ds.latents.images import save_pairs
from ditmoe_ds.latents.vae import decode, encode
from ditmoe_ds.progress import Progress

HOLDOUT = 0.1  # as encode's default, so that the reported error is of images the VAE never saw
KL_WEIGHT = 1e-3  # per latent value against squared error per pixel value: smooth latents, digits still crisp
LEARNING_RATE = 4e-3


def fit_vae(source: str, out: str, *, size: int, factor: int, latent_channels: int, steps: int, batch: int, seed: int) -> None:
    """Train on the images of ``source`` and save a diffusers folder. Does nothing if ``out`` is complete. In the folder,
    ``reconstructions.png`` has rows of held-out images, each above the row of what the VAE makes of them.

    Images are held in memory, ``size * size * 3`` bytes each.

    Raises:
        ConfigError: ``factor`` is no power of two or does not divide ``size``.
        DataError: the source cannot be read, or ``out`` holds something else, such as a VAE of other arguments.
    """
    folder = Path(out).resolve()
    request = dict(source=placed(source), size=size, factor=factor, latent_channels=latent_channels, steps=steps, batch=batch, seed=seed)
    if (folder / "diffusion_pytorch_model.safetensors").is_file():
        if (folder / NOTE).is_file():
            refuse_another(folder, read_note(folder), request)
        print(f"{out}: already complete")
        return
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"--out={out!r}: the folder is not empty and holds no VAE; choose another")
    if factor < 1 or factor & (factor - 1) or size % factor:
        raise ConfigError("--factor", factor, f"must be a power of two that divides --size {size}")
    items = list(open_source(source, wanted="images").items())
    try:
        folder.mkdir(parents=True, exist_ok=True)  # now, not after training
    except OSError as error:
        raise DataError(f"--out={out!r}: cannot be written ({error.strerror}); choose another folder") from None
    train, heldout = (_images([item for item in items if is_heldout(item.key, HOLDOUT) == held], size) for held in (False, True))
    if not len(train) or not len(heldout):
        readable = f"{len(train) + len(heldout)} of its {len(items)} images can be read"
        raise DataError(f"--source={source!r}: {readable}, too few to learn from some and test on others; give more")

    torch.manual_seed(seed)
    vae = _build(size, factor, latent_channels).to("cuda" if torch.cuda.is_available() else "cpu")
    _train(vae, train, steps, batch)
    vae.eval().requires_grad_(False)
    latents = torch.cat([encode(vae, part)[0] for part in _batches(train)])
    scale = 1 / latents.std().item()
    vae.register_to_config(scaling_factor=scale)
    decoded = torch.cat([decode(vae, encode(vae, part)[0] * scale, scale, 0.0).cpu() for part in _batches(heldout)])
    mse = (decoded.float() - heldout.permute(0, 2, 3, 1).float()).square().mean().item() / 255**2

    partial = folder.with_name(folder.name + ".partial")
    vae.save_pretrained(partial)
    shown = torch.linspace(0, len(heldout) - 1, min(64, len(heldout))).long()
    save_pairs(heldout.permute(0, 2, 3, 1)[shown], decoded[shown], partial / "reconstructions.png", columns=16)
    (partial / NOTE).write_text(json.dumps(request, indent=2) + "\n")
    for file in partial.iterdir():  # safetensors lets nobody but the owner read its own
        shutil.copymode(partial / NOTE, file)
    partial.replace(folder)
    print(f"{out}: held-out MSE {mse:.5f} (pixels in [0, 1]), PSNR {-10 * math.log10(mse):.1f} dB, scaling_factor {scale:.4f}")


def _images(items: list[Item], size: int) -> torch.Tensor:
    """(N, 3, size, size) uint8; those that cannot be read are left out."""
    good = [found for item in items if not isinstance(found := images.decode(item.image, [(size, size)]), str)]
    return torch.from_numpy(np.stack(good)).permute(0, 3, 1, 2) if good else torch.empty(0)


def _batches(pixels: torch.Tensor, size: int = 250) -> list[torch.Tensor]:
    return [part.float() / 127.5 - 1 for part in pixels.split(size)]


def _build(size: int, factor: int, latent_channels: int) -> AutoencoderKL:
    levels = factor.bit_length()
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) + (32,) * (levels - 1),  # few channels at full size, where nearly all the work is
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=size,
        mid_block_add_attention=False,
    )


def _train(vae: AutoencoderKL, pixels: torch.Tensor, steps: int, batch: int) -> None:
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 30, 0.5 + 0.5 * math.cos(math.pi * step / steps)))
    with Progress("fit-vae", "steps", steps) as progress:
        for step in range(steps):
            x = pixels[torch.randint(len(pixels), (batch,))].to(vae.device).float() / 127.5 - 1
            posterior = vae.encode(x).latent_dist
            error = (vae.decode(posterior.sample()).sample - x).square().mean()
            kl = posterior.kl().mean() / posterior.mean[0].numel()
            optimizer.zero_grad()
            (error + KL_WEIGHT * kl).backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                progress.note = f"mse={error.item():.4f}, kl={kl.item():.2f}"
            progress.update()
