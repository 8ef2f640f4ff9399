"""``ditmoe``: train, info, and the commands that the packages add, each in its cli.py."""

import argparse
import json
import sys
from typing import NoReturn

from ditmoe_ds.analysis import cli as analysis
from ditmoe_ds.ending import end
from ditmoe_ds.errors import ConfigError, UserError, visible
from ditmoe_ds.evaluation import cli as evaluation
from ditmoe_ds.interop import cli as interop
from ditmoe_ds.launching import cli as launching
from ditmoe_ds.launching import doctor
from ditmoe_ds.parser import Parser
from ditmoe_ds.pipelines import cli as pipelines
from ditmoe_ds.pipelines.arguments import add_recipe
from ditmoe_ds.planning import cli as planning


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if ``doctor`` found problems, or 2 after one line about a user's mistake."""
    parser = Parser(prog="ditmoe", description="Train and use Mixture-of-Experts diffusion transformers on DeepSpeed.")
    commands = parser.add_subparsers(required=True)

    train = commands.add_parser("train", help="train in one process (in several: deepspeed --module ditmoe_ds.train)")
    train.set_defaults(command=_train)
    add_recipe(train)

    info = commands.add_parser("info", help="print parameters and multiply-accumulates of a named model")
    info.set_defaults(command=_info)
    info.add_argument("name", help="for example DiT-MoE-XL/2-8E2A or DiT-XL/2")
    info.add_argument("--image-size", type=int, default=256, help="pixels, with an f=8 VAE")
    info.add_argument("--json", action="store_true", help="print the same as JSON")

    pipelines.add_commands(commands)
    evaluation.add_commands(commands)
    analysis.add_commands(commands)
    interop.add_commands(commands)
    launching.add_commands(commands)
    doctor.add_command(commands)
    planning.add_commands(commands)
    words = [word for word in (sys.argv[1:] if argv is None else argv) if not word.startswith("--local_rank")]  # deepspeed's launcher
    arguments, rest = parser.parse_known_args(words)
    if rest and not (hasattr(arguments, "overrides") and all("=" in word and not word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest  # key=value after an option, where argparse takes no more of them
    try:
        return arguments.command(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno is None:  # raised by a library, not by the system
            raise
        print(visible(f"error: {error.filename or ' '.join(words)}: {error.strerror or error}"), file=sys.stderr)
        return 2


def _train(arguments: argparse.Namespace) -> int:
    from ditmoe_ds import train

    return train.main([arguments.recipe, *arguments.overrides])


def _info(arguments: argparse.Namespace) -> int:
    from ditmoe_ds.models.sizes import describe, named_config

    config = named_config(arguments.name, input_size=arguments.image_size // 8)
    if arguments.image_size < 1 or arguments.image_size % (8 * config.patch):
        raise ConfigError(
            "--image-size", arguments.image_size, f"a multiple of {8 * config.patch}: 8 pixels a latent, {config.patch} a patch"
        )
    numbers = describe(config)
    if arguments.json:
        print(json.dumps({"name": arguments.name, **numbers}))
        return 0
    print(f"{arguments.name} at {arguments.image_size} px: {numbers['tokens']} tokens")
    rows = {"total parameters": numbers["total"], "active per token": numbers["active"]} | {
        f"  {k}": v for k, v in numbers["parts"].items()
    }
    for name, count in rows.items():
        print(f"{name:<22}{count:>18,}")
    print(f"{'linear GMACs':<22}{numbers['linear_gmacs']:>18,}\n{'GMACs with attention':<22}{numbers['gmacs']:>18,}")
    return 0


def run() -> NoReturn:
    """The command itself, which may be one process of several."""
    end(main())


if __name__ == "__main__":
    run()
