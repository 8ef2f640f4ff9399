"""The part of a command line that opens a run."""

import argparse
import math
from typing import TYPE_CHECKING

from ditmoe_ds.errors import ConfigError

if TYPE_CHECKING:
    from ditmoe_ds.pipelines.run import Run


def add_opening(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vae", help="folder or hub id, where the weights name none or it has moved")
    parser.add_argument("--text-encoder", help="likewise")
    add_weights(parser)


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", default="ema", help="of a run: ema, master (the raw weights) or one average by name: ema_0.999")


def check_guidance(guidance: float) -> None:
    """Raises ConfigError: not a finite number."""
    if not math.isfinite(guidance):
        raise ConfigError("--guidance", guidance, "a number; 1 is none")


def open_named(arguments: argparse.Namespace) -> "Run":
    """The run that ``run_dir`` and the options of ``add_opening`` name."""
    from ditmoe_ds.pipelines.run import open_run

    return open_run(arguments.run_dir, arguments.weights, vae=arguments.vae, text_encoder=arguments.text_encoder)
