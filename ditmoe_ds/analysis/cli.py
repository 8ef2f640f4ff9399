"""``ditmoe analyze``: what the choice of experts depends on."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from ditmoe_ds.pipelines.arguments import add_memory, add_opening, open_named


def add_commands(commands: Any) -> None:
    """Add ``analyze`` to ``ditmoe``'s subparsers."""
    analyze = commands.add_parser("analyze", help="show which experts take which tokens: a report, pictures and JSON")
    analyze.set_defaults(command=_analyze)
    analyze.add_argument("run_dir", help="a run directory, a checkpoint folder or a weights folder")
    analyze.add_argument("--out", required=True, help="folder for report.html, routing.json and pictures")
    analyze.add_argument("--dataset", help="folder of latents whose held-out samples are used; default: the run's own")
    analyze.add_argument("--samples", type=int, default=256, help="number of held-out samples")
    analyze.add_argument("--prompt", action="append", help="also map how many experts take each token of this prompt's image")
    add_opening(analyze)
    add_memory(analyze)


def _analyze(arguments: argparse.Namespace) -> int:
    from ditmoe_ds.analysis.analyze import analyze

    files = analyze(
        open_named(arguments, arguments.run_dir),
        Path(arguments.run_dir),
        Path(arguments.out),
        dataset=arguments.dataset,
        samples=arguments.samples,
        prompts=arguments.prompt or (),
        command=shlex.join(["ditmoe", *sys.argv[1:]]),
    )
    for name, path in files.items():
        print(f"{name}: {path}")
    return 0
