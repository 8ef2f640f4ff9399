"""What reading, decoding, hashing and writing cost beside the VAE: images/s of ``ditmoe-data encode`` and of the VAE alone.

    python benchmarks/encode.py [--images 2000 --size 256 --batch 32] [--write]

JPEGs of noise, a VAE with random weights. The bare loop encodes batches that are in memory, decoded, on the CPU, as float32.
--write puts the table under "Measured" in encode.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

# The decoding processes import this module; what takes seconds to import is imported where it is used.


def write_vae(folder: Path, width: int) -> None:
    """The layout of Stable Diffusion's VAE; there ``width`` is 128."""
    from diffusers import AutoencoderKL

    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=min(32, width),
    ).save_pretrained(folder)


def write_images(folder: Path, count: int, size: int) -> None:
    """JPEGs a quarter larger than what is encoded, smooth enough to compress like photographs."""
    generator = np.random.default_rng(0)
    (folder / "class").mkdir(parents=True)
    for i in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8))
        coarse.resize((size * 5 // 4, size * 5 // 4), Image.Resampling.BICUBIC).save(folder / "class" / f"{i:06d}.jpg", quality=90)


def cells(row: Iterable[float]) -> list[str]:
    return [form.format(value) for form, value in zip(("{:.1f}", "{:.1f}", "{:.1%}"), row)]


def main() -> None:
    import torch
    from report import Page

    from data_prep.encode import encode
    from ditmoe_ds.latents.vae import encode as encode_images
    from ditmoe_ds.latents.vae import load_vae

    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--width", type=int, default=128 if torch.cuda.is_available() else 16, help="of the VAE")
    parser.add_argument("--decoders", type=int, default=min(8, len(os.sched_getaffinity(0))))
    parser.add_argument("--repeats", type=int, default=5, help="of the bare loop and encode in turn")
    parser.add_argument("--write", action="store_true", help="put the figures into encode.md")
    arguments = parser.parse_args()
    shape = f"VAE of width {arguments.width}, {arguments.size} x {arguments.size} pixels, batches of {arguments.batch}"
    page = Page(__file__, arguments.write, f"{torch.get_num_threads()} threads. {shape}, {arguments.decoders} decoder(s)")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_vae(root / "vae", arguments.width)
        write_images(root / "images", arguments.images, arguments.size)
        vae = load_vae(str(root / "vae"), "cuda" if torch.cuda.is_available() else "cpu")
        batch = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
        encode_images(vae, batch)
        page.table("repeat", "the VAE alone, images/s", "`encode`, images/s", "share")
        rows = []
        for repeat in range(1, arguments.repeats + 1):
            start = time.perf_counter()
            for _ in range(arguments.images // arguments.batch):
                encode_images(vae, batch)[0].cpu()
            bare = arguments.images / (time.perf_counter() - start)
            start = time.perf_counter()
            with contextlib.redirect_stdout(None):
                encode(
                    f"folder:{root / 'images'}",
                    str(root / "vae"),
                    str(root / f"out-{repeat}"),
                    size=((arguments.size,) * 2,),
                    batch=arguments.batch,
                    decoders=arguments.decoders,
                )
            ours = arguments.images / (time.perf_counter() - start)
            rows.append((bare, ours, ours / bare))
            page.row(repeat, *cells(rows[-1]))
    page.row("median", *cells(map(statistics.median, zip(*rows))))


if __name__ == "__main__":
    main()
