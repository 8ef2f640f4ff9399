"""The command ``ditmoe-data``: images to latents."""

from __future__ import annotations

import argparse
import sys

from ditmoe_ds.errors import UserError

SOURCE = "sample:digits (5,000 MNIST digits) or folder:PATH (one sub-folder per class)"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 a user's mistake, told in one line on stderr."""
    arguments = vars(_parser().parse_args(argv))
    command = arguments.pop("command")
    try:
        # Imported once the arguments are known to be right: torch and diffusers take seconds.
        if command == "fit-vae":
            from data_prep.fit_vae import fit_vae

            fit_vae(**arguments)
        elif command == "encode":
            from data_prep.encode import encode

            encode(**arguments)
        else:
            from data_prep.encode import verify

            verify(**arguments)
    except UserError as error:
        print(f"ditmoe-data: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ditmoe-data", description="Prepare latents for training.")
    commands = parser.add_subparsers(dest="command", required=True)

    fit = commands.add_parser("fit-vae", help="train a small VAE on images", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    fit.add_argument("--source", required=True, help=SOURCE)
    fit.add_argument("--out", required=True, help="folder for the VAE")
    fit.add_argument("--size", type=_positive, default=32, help="pixels")
    fit.add_argument("--factor", type=_positive, default=4, help="image pixels per latent pixel, along one side")
    fit.add_argument("--latent-channels", type=_positive, default=4, help="channels of a latent")
    fit.add_argument("--steps", type=_positive, default=1000, help="optimizer steps")
    fit.add_argument("--batch", type=_positive, default=12, help="images per step")
    fit.add_argument("--seed", type=int, default=0, help="of weights and batches")

    encode = commands.add_parser("encode", help="encode images into shards", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    encode.add_argument("--source", required=True, help=SOURCE)
    encode.add_argument("--vae", required=True, help="diffusers folder or hub id of an AutoencoderKL")
    encode.add_argument("--out", required=True, help="folder for the shards")
    encode.add_argument("--size", type=_positive, default=32, help="pixels")
    encode.add_argument("--shard-size", type=_positive, default=1000, help="samples per shard")
    encode.add_argument("--holdout", type=_fraction, default=0.1, help="share of samples in the split val")
    encode.add_argument("--batch", type=_positive, default=100, help="images encoded at once")
    encode.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of stored latents")

    verify = commands.add_parser("verify", help="check every byte of a finished folder")
    verify.add_argument("path", metavar="DIR", help="folder made by encode")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not in [0, 1)")
    return value


if __name__ == "__main__":
    sys.exit(main())
