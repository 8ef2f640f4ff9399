"""``ditmoe eval geneval``, in one process or several (torchrun --module -- ditmoe_ds.cli eval geneval ...)."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditmoe_ds.errors import ConfigError
from ditmoe_ds.pipelines.arguments import LONG_PATIENCE, add_memory, add_opening, check_guidance, check_least, open_for_captions

if TYPE_CHECKING:
    from ditmoe_ds.distributed.topology import World


def add_command(kinds: Any) -> None:
    """Add ``geneval`` to the subparsers of ``ditmoe eval``."""
    command = kinds.add_parser("geneval", help="score a text-to-image model on GenEval's six tasks, by a detector and CLIP")
    command.set_defaults(command=geneval)
    command.add_argument("samples", metavar="SAMPLES", help="pictures in GenEval's folder layout; with --run they are made first")
    command.add_argument("--run", help="a run directory, a checkpoint folder or a weights folder")
    command.add_argument("--prompts", help="with --run: evaluation_metadata.jsonl of github.com/djghosh13/geneval")
    command.add_argument("--images", type=int, default=4, help="images per prompt")
    command.add_argument("--steps", type=int, default=50, help="of the sampler")
    command.add_argument("--guidance", type=float, default=5.0, help="guidance scale; 1 turns guidance off")
    command.add_argument("--seed", type=int, default=0, help="of the noise")
    add_opening(command)
    add_memory(command)
    command.add_argument("--detector", help="folder or hub id (facebook/mask2former-swin-small-coco-instance); none: do not score")
    command.add_argument("--clip", default="openai/clip-vit-large-patch14", help="folder or hub id of the CLIP model that judges colours")
    command.add_argument("--threshold", type=float, default=0.3, help="an object counts if its score is above this")
    command.add_argument("--counting-threshold", type=float, default=0.9, help="the same, in the task counting")
    command.add_argument(
        "--max-overlap", type=float, default=1.0, help="of boxes that overlap at least this much (IoU) only the strongest counts; 1: all"
    )


def geneval(arguments: argparse.Namespace) -> int:
    """Returns the exit code: 0, or 2 after one line about a user's mistake."""
    from ditmoe_ds.distributed.topology import on_all_ranks

    if not arguments.run and not arguments.detector:
        raise ConfigError("--run", None, "name a run whose pictures are to be made, a --detector that scores what is there, or both")
    check_guidance(arguments.guidance)
    for option in ("threshold", "counting_threshold", "max_overlap"):
        if not 0 <= getattr(arguments, option) <= 1:
            raise ConfigError(f"--{option.replace('_', '-')}", getattr(arguments, option), "a number from 0 to 1")
    check_least(arguments, images=1)
    if arguments.run and not arguments.prompts:
        raise ConfigError("--prompts", None, "name prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval")
    return on_all_ranks(lambda world: _evaluate(arguments, world), LONG_PATIENCE)


def _evaluate(arguments: argparse.Namespace, world: World) -> None:
    """Everything that can be refused is opened before pictures are made."""
    from ditmoe_ds.diffusion.sampling import make_scheduler, scheduled
    from ditmoe_ds.distributed.topology import agreed, decided, gathered
    from ditmoe_ds.distributed.weights import locate
    from ditmoe_ds.evaluation.extractors import tensors_sha256
    from ditmoe_ds.evaluation.geneval.colors import ColorClassifier
    from ditmoe_ds.evaluation.geneval.detectors import open_detector
    from ditmoe_ds.evaluation.geneval.folder import begin, check_writable, differences, generate, read_folder, report, score
    from ditmoe_ds.evaluation.geneval.prompts import read_prompts
    from ditmoe_ds.evaluation.geneval.scorer import Limits
    from ditmoe_ds.pipelines.run import versions
    from ditmoe_ds.progress import Progress

    folder, limits = Path(arguments.samples), Limits(arguments.threshold, arguments.counting_threshold, arguments.max_overlap)
    if arguments.run:
        prompts = agreed(lambda: read_prompts(Path(arguments.prompts)))
    else:
        pictures = agreed(lambda: read_folder(folder))
        prompts = [part.prompt for part in pictures]
        decided(lambda: check_writable(folder))
    if arguments.detector:
        detector = agreed(lambda: open_detector(arguments.detector, world.device))
        agreed(lambda: detector.check(sorted({name for prompt in prompts for name in prompt.names})))
        colors = agreed(lambda: ColorClassifier(arguments.clip, world.device))

    if arguments.run:
        named = arguments.run
        arguments.run = decided(lambda: str(locate(named)))
        run = agreed(lambda: open_for_captions(arguments, arguments.run, "--run"))
        agreed(lambda: scheduled(make_scheduler(run.diffusion), run.diffusion, arguments.steps))
        agreed(lambda: run.pipeline)  # or it says what is missing, before the folder is claimed
        sampling = dict(steps=arguments.steps, guidance=arguments.guidance, seed=arguments.seed)
        parts = dict(
            vae=run.latents.get("vae"),
            text_encoder=run.latents.get("text", {}).get("encoder"),
            dtype=arguments.dtype,
            device=run.device.type,
        )
        settings = decided(lambda: run.identity(arguments.run) | versions() | parts | sampling)
        missing = decided(lambda: begin(folder, settings, prompts, arguments.images))
        numbers = missing[world.rank :: world.size]
        with Progress("sample", "prompts", len(numbers), shown=world.rank == 0) as progress:
            agreed(lambda: generate(run, prompts, progress.over(numbers), folder, images=arguments.images, **sampling))
    if not arguments.detector:
        if world.rank == 0:
            then = f"ditmoe eval geneval {shlex.quote(str(folder))} --detector facebook/mask2former-swin-small-coco-instance"
            print(f"{len(prompts) * arguments.images} pictures in {folder}; to score them: {then}", flush=True)
        return

    if arguments.run:
        pictures = agreed(lambda: read_folder(folder))
    mine = pictures[world.rank :: world.size]
    with Progress("score", "prompts", len(mine), shown=world.rank == 0) as progress:
        verdicts = agreed(lambda: score(folder, progress.over(mine), detector, colors, limits))
    shares = gathered(verdicts)
    if world.rank == 0:
        together = sorted((verdict for share in shares for verdict in share), key=lambda verdict: verdict["filename"])
        how = dict(
            detector=arguments.detector,
            detector_sha256=tensors_sha256(detector.model),
            clip=arguments.clip,
            clip_sha256=tensors_sha256(colors.model),
            limits=limits._asdict(),
            differences=differences(pictures, detector, colors, limits),
        )
        _print(report(folder, together, how))


def _print(report: dict[str, Any]) -> None:
    for task, row in report["tasks"].items():
        low, high = row["ci95"]
        print(f"{task:<16}{row['score']:>7.1%}  ({low:.1%} to {high:.1%} of {row['images']})")
    print(f"{'overall':<16}{report['overall']:>7.1%}  {report['prompts_right']:.1%} of the prompts have a right picture")
    for difference in report["differences"]:
        print(f"not the published protocol: {difference}")
