"""The command ``ditmoe-data``: images to latents."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from ditmoe_ds.errors import UserError, visible
from ditmoe_ds.parser import Parser

SOURCE = (
    "folder:PATH (one sub-folder per class), wds:URLS (webdataset tars, each with jpg/png/webp and maybe json, cls, txt), "
    "hf:PATH (saved with datasets' save_to_disk), sample:digits (5,000 MNIST digits), sample:emoji (3,778 Twemoji with captions) or "
    "sample:shapes (12,000 captioned scenes of coloured shapes)"
)
TEXT = (
    "folder or hub id of a transformers text encoder. Without it captions are stored as text alone, and those of folder:PATH (x.txt beside "
    "x.png, or metadata.jsonl or metadata.csv with file_name and text) are not read"
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 a user's mistake or a full disk, 130 Ctrl-C, each told in one line on stderr."""
    arguments = vars(parser().parse_args(argv))
    command = arguments.pop("command")
    try:
        # Imported once the arguments are known to be right: torch and diffusers take seconds.
        name = {"fit-vae": "fit_vae", "inspect": "show"}.get(command, command)
        getattr(import_module(f"data_prep.{name}"), name)(**arguments)
    except UserError as error:
        print(f"ditmoe-data: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(visible(f"ditmoe-data: error: {error.filename or command}: {error.strerror or error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"ditmoe-data: {command} is interrupted", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line of ``ditmoe-data``."""
    parser = Parser(prog="ditmoe-data", description="Prepare latents for training.")
    commands = parser.add_subparsers(dest="command", required=True)

    fit = commands.add_parser("fit-vae", help="train a small VAE on images")
    fit.add_argument("--source", required=True, help=SOURCE)
    fit.add_argument("--out", required=True, help="folder for the VAE")
    fit.add_argument("--size", type=_positive, default=32, help="pixels")
    fit.add_argument("--factor", type=_positive, default=4, help="image pixels per latent pixel, along one side")
    fit.add_argument("--latent-channels", type=_positive, default=4, help="channels of a latent")
    fit.add_argument("--steps", type=_positive, default=1000, help="optimizer steps")
    fit.add_argument("--batch", type=_positive, default=12, help="images per step")
    fit.add_argument("--seed", type=int, default=0, help="for weights and batches")

    encode = commands.add_parser("encode", help="encode images into shards")
    encode.add_argument("--source", required=True, help=SOURCE)
    encode.add_argument("--vae", required=True, help="diffusers folder or hub id of an AutoencoderKL, AutoencoderDC or AutoencoderTiny")
    encode.add_argument("--out", required=True, help="folder for the shards")
    encode.add_argument(
        "--size",
        type=_sizes,
        default="32",
        help="pixels: 256 is 256x256; or several HEIGHTxWIDTH, comma-separated: each image gets the one nearest to its aspect ratio",
    )
    encode.add_argument("--shard-size", type=_positive, default=1000, help="images per unit of work; each tar of wds is one unit")
    encode.add_argument("--holdout", type=_fraction, default=0.1, help="share of the samples that is held out")
    encode.add_argument("--batch", type=_positive, default=100, help="images encoded at once")
    encode.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the stored latents")
    encode.add_argument("--store", choices=("mean", "mean+std", "sample"), default="mean", help="what to store of the VAE's posterior")
    encode.add_argument("--seed", type=int, default=0, help="for --store sample")
    encode.add_argument("--flip-copies", action="store_true", help="also encode a mirrored copy of each image")
    encode.add_argument("--text", help=TEXT)
    encode.add_argument("--text-max-tokens", type=_positive, default=77, help="longer captions are cut")
    encode.add_argument("--classes", type=_positive, help="for wds and hf: number of classes; default: as many as the largest label needs")
    encode.add_argument("--decoders", type=_count, default=min(8, len(os.sched_getaffinity(0))), help="processes that decode images ahead")
    encode.add_argument("--worker", type=_worker, help="i/n: encode every n-th unit; default: by SLURM array task, or by rank")
    rejected: dict[str, Any] = dict(type=_fraction, default=0.01, help="share of a worker's images, and of all, that may be rejected")
    encode.add_argument("--max-rejected", **rejected)

    finalize = commands.add_parser("finalize", help="write the manifest, once all workers are done")
    finalize.add_argument("path", metavar="DIR", help="folder that encode wrote to")
    finalize.add_argument("--max-rejected", **rejected)

    verify = commands.add_parser("verify", help="check every byte of a finished folder")
    verify.add_argument("path", type=_local, metavar="DIR", help="folder made by encode")
    workers = "processes that read shards; default: one for each core, at most 16"
    verify.add_argument("--workers", type=_positive, default=min(16, len(os.sched_getaffinity(0))), help=workers)
    verify.add_argument("--sheet", type=_picture, metavar="PNG", help="picture of some images above their decoded latents")
    verify.add_argument("--source", help="where the images of the sheet are, if not in the folder that the manifest names")

    inspect = commands.add_parser("inspect", help="print what is in a folder or shard")
    inspect.add_argument("path", type=_local, metavar="SHARD_OR_DIR", help="finished folder, or a tar in it")
    inspect.add_argument("--sheet", type=_picture, metavar="PNG", help="picture of some decoded latents")

    subset = commands.add_parser("subset", help="copy a small part of the samples, to try things on")
    subset.add_argument("path", type=_local, metavar="DIR", help="finished folder")
    subset.add_argument("--fraction", type=_fraction, required=True, help="share of the samples; larger shares contain smaller ones")
    subset.add_argument("--out", required=True, help="new folder")
    subset.add_argument("--shard-size", type=_positive, default=1000, help="samples per shard")

    make = commands.add_parser("synthesize", help="make images with a text-to-image pipeline")
    make.add_argument("--pipeline", required=True, help="folder or hub id of a diffusers text-to-image pipeline")
    make.add_argument("--classes", required=True, help="file with one class per line: its folder, or folder, tab and name for the prompt")
    make.add_argument("--out", required=True, help="folder for the images, a sub-folder per class; encode it as folder:OUT")
    make.add_argument("--per-class", type=_positive, required=True, help="images to keep of each class")
    make.add_argument("--prompt", default="a photo of a {}", help="{} stands for the class's name")
    make.add_argument("--clip", help="folder or hub id of a transformers CLIP model that chooses the images to keep")
    make.add_argument("--keep", type=float, default=1.0, help="share of the images to keep: those that fit the prompt best")
    make.add_argument("--size", type=_positive, default=512, help="pixels")
    make.add_argument("--steps", type=_positive, default=30, help="steps of the pipeline's sampler")
    make.add_argument("--guidance", type=_finite, default=5.0, help="guidance scale")
    make.add_argument("--batch", type=_positive, default=4, help="images made at once")
    make.add_argument("--seed", type=int, default=0, help="for the noise, together with the class and the image's number")
    make.add_argument("--worker", type=_worker, help="i/n: make every n-th class, from class i on; default: as for encode")
    return parser


def _number(kind: Callable[[str], Any], holds: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """A ``type`` of argparse, for numbers of this kind."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if holds(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")

    return parse


_positive = _number(int, lambda value: value >= 1, "a whole number of at least 1")
_count = _number(int, lambda value: value >= 0, "a whole number of at least 0")
_fraction = _number(float, lambda value: 0 <= value < 1, "in [0, 1)")
_finite = _number(float, math.isfinite, "a finite number")


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes = []
    for part in text.split(","):
        sides = [_positive(side) for side in part.split("x")]
        sizes.append((sides[0], sides[-1]))
        if len(sides) > 2 or len(set(sizes)) < len(sizes):
            raise argparse.ArgumentTypeError(f"{part!r} in {text!r} is no HEIGHTxWIDTH of its own")
    return tuple(sizes)


def _local(text: str) -> str:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is behind a URL; copy the folder here first")
    return text


def _picture(text: str) -> str:
    if Path(text).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise argparse.ArgumentTypeError(f"{text} ends in none of .png, .jpg, .webp")
    return text


def _worker(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n with i from 0 to n - 1, such as 0/8")
    return int(number), int(count)


if __name__ == "__main__":
    sys.exit(main())
