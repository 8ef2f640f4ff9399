"""``ditmoe eval``: score a run, or samples on disk."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ditmoe_ds.evaluation.geneval import cli as geneval
from ditmoe_ds.pipelines.arguments import (
    LONG_PATIENCE,
    add_memory,
    add_opening,
    check_guidance,
    check_least,
    make_folder,
    open_for_captions,
)

MEASURES = {
    "fid": "all that the ADM evaluator prints: FID, sFID, Inception Score, precision, recall; with other extractors FD, precision, recall",
    "sfid": "sFID alone",
    "is": "Inception Score alone",
    "precision-recall": "improved precision and recall alone",
    "kid": "kernel Inception distance",
    "cmmd": "CLIP maximum mean discrepancy",
    "clip-score": "how well images fit their captions",
}


def add_commands(commands: Any) -> None:
    """Add ``eval`` to ``ditmoe``'s subparsers."""
    kinds = commands.add_parser("eval", help="score a run, or samples on disk").add_subparsers(required=True)

    shapes = kinds.add_parser("shapes", help="score a text-to-image run on new compositions of sample:shapes, by an exact detector")
    shapes.set_defaults(command=_shapes)
    shapes.add_argument("run_dir", help="a run directory, a checkpoint folder or a weights folder")
    shapes.add_argument("--out", required=True, help="folder for the numbers and a picture")
    shapes.add_argument("--images", type=int, default=4, help="images per prompt")
    shapes.add_argument("--steps", type=int, default=25, help="of the sampler")
    shapes.add_argument("--guidance", type=float, default=3.0, help="guidance scale; 1 turns guidance off")
    shapes.add_argument("--seen", action="store_true", help="use captions of training instead of new ones")
    add_opening(shapes)
    add_memory(shapes)
    shapes.add_argument("--seed", type=int, default=0, help="of the noise")

    geneval.add_command(kinds)

    for measure, what in MEASURES.items():
        parser = kinds.add_parser(measure, help=what, description=f"{what}. Under deepspeed, torchrun or srun the ranks share the images.")
        parser.set_defaults(command=_measure, measure=measure)
        parser.add_argument("samples", help="npz with arr_0 (N, H, W, 3) uint8, or a folder of pictures (PNG, JPEG, WebP, TIFF and others)")
        parser.add_argument("--reference", help="real images, in the same form, or an npz with ADM's statistics")
        parser.add_argument("--out", required=True, help=f"folder for {measure}.json")
        parser.add_argument(
            "--extractor",
            help="inception, efficientnet-lite0, timm:NAME, hf:ID_OR_PATH, clip:ID_OR_PATH; default: inception, or a CLIP",
        )
        parser.add_argument("--inception", metavar="FILE", help="Inception's weights, if they cannot be downloaded")
        parser.add_argument("--captions", metavar="FILE", help="for clip-score: one line per sample")
        parser.add_argument("--batch", type=int, default=64, help="images at a time on each rank")


def _shapes(arguments: argparse.Namespace) -> int:
    from ditmoe_ds.evaluation.shapes import evaluate

    check_least(arguments, images=1)
    check_guidance(arguments.guidance)
    run = open_for_captions(arguments, arguments.run_dir, "run_dir")
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


def _measure(arguments: argparse.Namespace) -> int:
    from ditmoe_ds.distributed.topology import World, agreed, on_all_ranks
    from ditmoe_ds.evaluation.fidelity import Measurement, open_measurement, result, run

    out = Path(arguments.out)

    def opened(world: World) -> Measurement:
        check_least(arguments, batch=1)
        given = {name: getattr(arguments, name) for name in ("reference", "extractor", "inception", "captions")}
        measurement = open_measurement(arguments.measure, arguments.samples, device=world.device, **given)
        make_folder(out)
        return measurement

    def measure(world: World) -> None:
        measurement = agreed(lambda: opened(world))
        scores = run(measurement, world.device, arguments.batch)
        if world.rank == 0:
            for name, value in scores.items():
                print(f"{name:<12}{value:>12.5g}")
            file = out / f"{arguments.measure}.json"
            extractor = f"{measurement.extractor.name} {measurement.extractor.sha256[:8]}"
            print(f"{len(measurement.samples):,} samples, {extractor}: {file}", flush=True)
            file.write_text(json.dumps(result(measurement, scores), indent=1) + "\n")

    return on_all_ranks(measure, LONG_PATIENCE)
