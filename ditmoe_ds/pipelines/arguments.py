"""What command lines share: recipes, options that open a run, and checks."""

import argparse
import math
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ditmoe_ds.errors import ConfigError

if TYPE_CHECKING:
    from ditmoe_ds.distributed.topology import ExpertGroup
    from ditmoe_ds.pipelines.run import Run

LONG_PATIENCE = timedelta(days=1)
"""For ranks that each make or score their own images: one on a slower or shared GPU may be hours late."""


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add a recipe and its overrides."""
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="override a setting of the recipe")


def add_opening(parser: argparse.ArgumentParser) -> None:
    """Add --vae, --text-encoder and --weights."""
    parser.add_argument("--vae", help="folder or hub id, if the weights name none or it has moved")
    parser.add_argument("--text-encoder", help="folder or hub id, if the weights name none or it has moved")
    add_weights(parser)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add --weights."""
    parser.add_argument("--weights", default="ema", help="of a run: ema, master (the raw weights), or one average by name: ema_0.999")


def add_memory(parser: argparse.ArgumentParser) -> None:
    """Add --dtype and --offload-experts."""
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="precision of the model; latents and VAE are fp32")
    parser.add_argument("--offload-experts", action="store_true", help="keep experts in host memory and copy them layer by layer")


def check_least(arguments: argparse.Namespace, **least: int) -> None:
    """Raises ConfigError if an option, named with underscores, is given and smaller than this."""
    for name, number in least.items():
        value = getattr(arguments, name)
        if value is not None and value < number:
            raise ConfigError(f"--{name.replace('_', '-')}", value, f"at least {number}")


def make_folder(folder: Path) -> None:
    """For what --out names, before long work. Raises ConfigError if it cannot be made, or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("--out", str(folder), f"cannot be written: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise ConfigError("--out", str(folder), "cannot be written by this user; choose another")


def check_guidance(guidance: float) -> None:
    """Raises ConfigError if it is not a finite number."""
    if not math.isfinite(guidance):
        raise ConfigError("--guidance", guidance, "a number; 1 is none")


def check_can_be_guided(run: "Run", guidance: float) -> None:
    """Raises ConfigError if the model never trained without its condition, so that guidance has nothing to guide away from."""
    if guidance != 1 and run.diffusion.condition_dropout == 0:
        fix = "this model was trained with diffusion.condition_dropout=0, so without its condition it is untrained; give 1"
        raise ConfigError("--guidance", guidance, fix)


def open_named(arguments: argparse.Namespace, path: str, group: "ExpertGroup | None" = None) -> "Run":
    """The run at ``path``, opened as the options of ``add_opening`` and ``add_memory`` say."""
    from ditmoe_ds.pipelines.run import open_run

    given = {name: getattr(arguments, name) for name in ("vae", "text_encoder", "dtype", "offload_experts")}
    return open_run(path, arguments.weights, group=group, **given)


def open_for_captions(arguments: argparse.Namespace, path: str, key: str) -> "Run":
    """As ``open_named``, for a benchmark of text to image. Raises ConfigError, naming ``key``, if the model takes
    classes or cannot be guided."""
    run = open_named(arguments, path)
    if run.model.config.num_classes:
        raise ConfigError(key, path, "this model takes classes; the benchmark is for captions")
    check_can_be_guided(run, arguments.guidance)
    return run
