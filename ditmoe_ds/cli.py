"""``ditmoe``: train, sample, analyze, eval, info; more commands are in interop/cli.py and launching/cli.py."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from ditmoe_ds.errors import ConfigError, UserError
from ditmoe_ds.interop import cli as interop
from ditmoe_ds.launching import cli as launching
from ditmoe_ds.launching import doctor
from ditmoe_ds.pipelines import cli as sampling
from ditmoe_ds.pipelines.cli import add_opening as _add_opening

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

    sampling.add_command(commands)

    analyze = commands.add_parser("analyze", help="which expert takes which token, as pictures and JSON")
    analyze.set_defaults(command=_analyze)
    analyze.add_argument("run_dir")
    analyze.add_argument("--out", required=True)
    analyze.add_argument("--samples", type=int, default=256)
    analyze.add_argument("--prompt", action="append", help="of a text-to-image model: how many experts take each token of its image")

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

    _add_opening(analyze)

    info = commands.add_parser("info", help="parameters and multiply-accumulates of a named model")
    info.set_defaults(command=_info)
    info.add_argument("name", help="for example DiT-MoE-XL/2-8E2A or DiT-XL/2")
    info.add_argument("--image-size", type=int, default=256, help="pixels, with an f=8 VAE")
    info.add_argument("--json", action="store_true")

    interop.add_commands(commands)
    launching.add_commands(commands)
    doctor.add_command(commands)
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


def _open(arguments: argparse.Namespace) -> "Run":
    from ditmoe_ds.pipelines.run import open_run

    return open_run(arguments.run_dir, arguments.weights, vae=arguments.vae, text_encoder=arguments.text_encoder)


def _train(arguments: argparse.Namespace) -> int:
    from ditmoe_ds import train

    return train.main([arguments.recipe, *arguments.overrides])


def _analyze(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from ditmoe_ds.analysis.adaptive import adaptive
    from ditmoe_ds.analysis.routing import analyze

    run = _open(arguments)
    if arguments.prompt:
        files = adaptive(run, arguments.prompt, Path(arguments.out))
    else:
        files = analyze(run, Path(arguments.run_dir), Path(arguments.out), arguments.samples)
    for name, path in files.items():
        print(f"{name}: {path}")
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
