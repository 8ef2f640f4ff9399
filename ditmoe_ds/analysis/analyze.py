"""All of ``ditmoe analyze``: numbers as ``routing.json``, pictures, and ``report.html``."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from ditmoe_ds.analysis.adaptive import adaptive
from ditmoe_ds.analysis.experts import answers_alike, weights_alike
from ditmoe_ds.analysis.plots import plot_loss, plot_shares
from ditmoe_ds.analysis.report import write_report
from ditmoe_ds.analysis.routing import count_takings
from ditmoe_ds.analysis.summary import read_metrics, summary, training
from ditmoe_ds.distributed.weights import differently_encoded
from ditmoe_ds.errors import CheckpointError, ConfigError
from ditmoe_ds.latents.loader import LatentDataset
from ditmoe_ds.latents.manifest import Manifest
from ditmoe_ds.latents.remote import is_url
from ditmoe_ds.moe.layer import Router
from ditmoe_ds.pipelines.arguments import make_folder
from ditmoe_ds.pipelines.run import Run
from ditmoe_ds.plain import plain

COMPARED = 32
"""Samples on which experts' answers are compared."""


def analyze(
    run: Run,
    run_dir: Path,
    out: Path,
    *,
    dataset: str | None = None,
    samples: int = 256,
    times: int = 10,
    permutations: int = 200,
    prompts: Sequence[str] = (),
    command: str = "",
) -> dict[str, Path]:
    """Analyse the routing of held-out samples and write the files into ``out``.

    Args:
        run_dir: what ``run`` was opened from; of a run directory, ``metrics.jsonl`` is read too.
        dataset: folder of latents, if not the run's own; its held-out split is taken.
        samples: at most so many; drawn at random, but the same ones every time.
        prompts: for which images are sampled, to show how much compute their tokens get.

    Returns:
        The files, by name.

    Raises:
        CheckpointError, ConfigError, DataError: a dense model, latents that are gone or of another kind, no VAE or text encoder; or ``out``
            cannot be made.
    """
    config = run.model.config
    if not any(isinstance(module, Router) for module in run.model.modules()):
        raise CheckpointError(f"{run_dir}: the model is dense, it has no routing to analyze")
    if prompts and config.num_classes:
        raise ConfigError("--prompt", list(prompts), "this model takes classes; maps of compute are for text to image")
    if samples < 2:
        raise ConfigError("--samples", samples, "must be at least 2: their labels are permuted")
    data, records = heldout(run, dataset), read_metrics(run_dir / "metrics.jsonl")
    make_folder(out)
    pictures = adaptive(run, list(prompts), out) if prompts else {}
    order = data.spread(samples)
    number = len(order)
    chosen = data.batch(order)
    counted = count_takings(run, chosen, times)
    sides = (run.shape[1] // config.patch, run.shape[2] // config.patch)
    numbers = summary(run, counted, sides, chosen.labels, permutations)
    answers = answers_alike(run, data.batch(order[: min(number, COMPARED)]), times)
    numbers["similarity"] = dict(w1=weights_alike(run, "w1"), w2=weights_alike(run, "w2"), outputs=answers)
    numbers["training"] = training(records) if records else None

    files = {"report.html": out / "report.html", "routing.json": out / "routing.json"} | pictures
    files["routing.json"].write_text(json.dumps(plain(numbers), allow_nan=False))
    for axis, share in numbers["share"].items():
        files[axis] = out / f"routing_{axis}.png"
        plot_shares(share, axis, config.sparse_layers, files[axis])
    if records:
        files["loss"] = out / "loss.png"
        plot_loss(records, files["loss"])
    facts = dict(
        model=f"{config.depth} layers, {len(config.sparse_layers)} of them with {config.experts} experts; width {config.hidden}; "
        f"{config.routing} choice, {config.top_k if config.routing == 'token' else numbers['experts_per_token']:.3g} experts per token",
        run=str(run_dir),
        step=f"{run.step:,}",
        data=f"{dataset or run.latents['manifest']}, {data.manifests[0].source}",
        samples=f"{number} held out, each noised to {times} times; {math.prod(sides)} tokens",
        command=command,
    )
    write_report(files["report.html"], "/".join(run_dir.resolve().parts[-2:]), numbers, facts, pictures)
    return files


def heldout(run: Run, folder: str | None) -> LatentDataset:
    """The held-out samples of a folder of latents, or of the run's own.

    Raises:
        ConfigError, DataError: not of the kind that the model was trained on; missing or damaged.
    """
    if folder is None and "manifest" not in run.latents:
        raise ConfigError("--dataset", None, "these weights do not say what they were trained on; name a folder of latents")
    place = folder or run.latents["manifest"]
    if is_url(place):
        raise ConfigError("--dataset", place, "is behind a URL; copy the folder here and name it")
    manifest = Manifest.load(place, "--dataset")
    if run.shape not in manifest.shapes:
        raise ConfigError(
            "--dataset", place, f"latents of shape {manifest.shapes}, the model was trained with {run.shape}; encode it alike"
        )
    encoded = {key: getattr(manifest, key) for key in ("vae", "vae_sha256", "scaling_factor", "shift_factor")}
    if difference := differently_encoded(run.weights.description["latents"], encoded):  # whatever VAE --vae names
        raise ConfigError("--dataset", place, f"not encoded as what the model was trained on: {difference}; encode it alike")
    if classes := run.model.config.num_classes:
        names = list(manifest.class_names), run.latents.get("class_names")
        for key, (theirs, ours) in dict(num_classes=(manifest.num_classes, classes), class_names=names).items():
            if ours is not None and theirs != ours:
                raise ConfigError("--dataset", place, f"{key}: {theirs}, the model was trained with {ours}; encode it alike")
    return LatentDataset([manifest], "val", shape=run.shape)
