"""``ditmoe``: train, sample, eval, info; more commands are in analysis/cli.py, interop/cli.py and launching/cli.py."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from ditmoe_ds.analysis import cli as analysis
from ditmoe_ds.errors import ConfigError, UserError
from ditmoe_ds.interop import cli as interop
from ditmoe_ds.launching import cli as launching
from ditmoe_ds.launching import doctor

if TYPE_CHECKING:
    from ditmoe_ds.pipelines.run import Run


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 of a doctor who found problems, or 2 after one line about a user's mistake."""
    parser = argparse.ArgumentParser(prog="ditmoe", description="Mixture-of-Experts diffusion transformers on DeepSpeed-MoE.")
    commands = parser.add_subparsers(required=True)

    train = commands.add_parser("train", help="train in one process (several: deepspeed --module ditmoe_ds.train)")
    train.set_defaults(command=_train)
    train.add_argument("recipe")
    train.add_argument("overrides", nargs="*", metavar="key=value")

    sample = commands.add_parser("sample", help="images from a run's EMA weights, or from a weights folder")
    sample.set_defaults(command=_sample)
    sample.add_argument("run_dir", help="or a checkpoint folder, or a weights folder")
    sample.add_argument("--classes", default="0", help="comma-separated, for example 0,1,2")
    sample.add_argument("--prompt", action="append", help="of a text-to-image model; several are given by --prompt each")
    sample.add_argument("--per-class", type=int, default=8, help="images (a row) per class or prompt")
    sample.add_argument("--steps", type=int, default=50)
    sample.add_argument("--guidance", type=float, default=2.0, help="1 is none")
    sample.add_argument("--guided-channels", type=int, help="guide the first N latent channels only (the DiT family's scripts: 3)")
    sample.add_argument("--sampler", choices=["euler", "ddpm", "ddim"])
    _add_opening(sample)
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--out", default="grid.png")

    evaluate = commands.add_parser("eval", help="score a run")
    evaluate.set_defaults(command=_eval)
    evaluate.add_argument("benchmark", choices=["shapes"], help="text to image: new compositions of sample:shapes, by an exact detector")
    evaluate.add_argument("run_dir")
    evaluate.add_argument("--out", required=True, help="folder for the numbers and a picture")
    evaluate.add_argument("--images", type=int, default=4, help="of each prompt")
    evaluate.add_argument("--steps", type=int, default=25)
    evaluate.add_argument("--guidance", type=float, default=3.0)
    evaluate.add_argument("--seen", action="store_true", help="captions of training instead of new ones")
    _add_opening(evaluate)
    evaluate.add_argument("--seed", type=int, default=0)

    info = commands.add_parser("info", help="parameters and multiply-accumulates of a named model")
    info.set_defaults(command=_info)
    info.add_argument("name", help="for example DiT-MoE-XL/2-8E2A or DiT-XL/2")
    info.add_argument("--image-size", type=int, default=256, help="pixels, with an f=8 VAE")
    info.add_argument("--json", action="store_true")

    analysis.add_commands(commands)
    interop.add_commands(commands)
    launching.add_commands(commands)
    doctor.add_command(commands)
    arguments, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(arguments, "overrides") and all("=" in word and not word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest  # key=value after an option, where argparse takes no more of them
    try:
        return arguments.command(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _add_opening(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vae", help="folder or hub id, where the weights name none or it has moved")
    parser.add_argument("--text-encoder", help="likewise")
    parser.add_argument("--weights", default="ema", help="ema, master (the raw weights) or one average by name: ema_0.999")


def _open(arguments: argparse.Namespace) -> "Run":
    from ditmoe_ds.pipelines.run import open_run

    return open_run(arguments.run_dir, arguments.weights, vae=arguments.vae, text_encoder=arguments.text_encoder)


def _train(arguments: argparse.Namespace) -> int:
    from ditmoe_ds import train

    return train.main([arguments.recipe, *arguments.overrides])


def _sample(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from ditmoe_ds.latents.images import save_grid

    try:
        classes = [int(part) for part in arguments.classes.split(",")]
    except ValueError:
        raise ConfigError("--classes", arguments.classes, "write numbers with commas, for example 0,1,2") from None
    run = _open(arguments)
    if bool(arguments.prompt) == bool(run.model.config.num_classes):
        wanted = "--classes" if run.model.config.num_classes else "--prompt"
        raise ConfigError("--prompt", arguments.prompt, f"this model is told {wanted}")
    asked = [one for one in arguments.prompt or classes for _ in range(arguments.per_class)]
    images = run.sample(
        asked,
        steps=arguments.steps,
        guidance=arguments.guidance,
        seed=arguments.seed,
        sampler=arguments.sampler,
        guided_channels=arguments.guided_channels,
    )
    save_grid(images, Path(arguments.out), columns=arguments.per_class)
    print(f"{len(asked)} images of step {run.step} in {arguments.out}")
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from ditmoe_ds.evaluation.shapes import evaluate

    run = _open(arguments)
    if run.model.config.num_classes:
        raise ConfigError("run_dir", arguments.run_dir, "this model is told classes; the benchmark is for captions")
    report = evaluate(
        run,
        Path(arguments.out),
        images=arguments.images,
        steps=arguments.steps,
        guidance=arguments.guidance,
        seed=arguments.seed,
        seen=arguments.seen,
    )
    for category, numbers in report["categories"].items():
        low, high = numbers["ci95"]
        print(f"{category:<18}{numbers['score']:>7.1%}  ({low:.1%} to {high:.1%} of {numbers['images']})")
    print(f"{'mean':<18}{report['mean']:>7.1%}  step {report['step']}, {report['captions']} captions")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from ditmoe_ds.models.sizes import describe, named_config

    numbers = describe(named_config(arguments.name, input_size=arguments.image_size // 8))
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


if __name__ == "__main__":
    sys.exit(main())
