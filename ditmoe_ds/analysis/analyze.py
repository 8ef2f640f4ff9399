"""All of ``ditmoe analyze``: numbers as ``routing.json``, pictures, and ``report.html``."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditmoe_ds.analysis.adaptive import adaptive
from ditmoe_ds.analysis.experts import answers_alike, lift, weights_alike
from ditmoe_ds.analysis.information import entropy, informations
from ditmoe_ds.analysis.plots import plot_loss, plot_shares
from ditmoe_ds.analysis.report import Numbers, write_report
from ditmoe_ds.analysis.routing import Takings, count_takings
from ditmoe_ds.errors import CheckpointError, ConfigError
from ditmoe_ds.latents.format import Manifest
from ditmoe_ds.latents.loader import LatentDataset
from ditmoe_ds.moe.layer import Router
from ditmoe_ds.pipelines.run import Run

COMPARED = 32
"""Samples on which experts' answers are compared."""
PLACES = 100
"""Most points of a curve over training."""


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
        run_dir: has ``metrics.jsonl``, if it is a run's.
        dataset: folder of latents, if not the run's own; its held-out split is taken.
        samples: at most, evenly spaced in the split.
        prompts: for which images are sampled, to show how much compute their tokens get.

    Returns:
        The files, by name.

    Raises:
        CheckpointError, ConfigError, DataError: a dense model, latents that are gone or of another kind, no VAE or text encoder.
    """
    config = run.model.config
    if not any(isinstance(module, Router) for module in run.model.modules()):
        raise CheckpointError(f"{run_dir}: the model is dense, it has no routing to analyze")
    if prompts and config.num_classes:
        raise ConfigError("--prompt", list(prompts), "this model is told classes; maps of compute are for text to image")
    data = heldout(run, dataset)
    number = min(samples, len(data))
    chosen = data.batch([i * len(data) // number for i in range(number)])
    counted = count_takings(run, chosen, times)
    sides = (run.shape[1] // config.patch, run.shape[2] // config.patch)
    numbers = summary(run, counted, sides, chosen.labels, permutations)
    compared = data.batch([i * len(data) // min(COMPARED, number) for i in range(min(COMPARED, number))])
    numbers["similarity"] = dict(w1=weights_alike(run, "w1"), w2=weights_alike(run, "w2"), outputs=answers_alike(run, compared, times))
    metrics = run_dir / "metrics.jsonl"
    numbers["training"] = training(metrics) if metrics.is_file() else None

    out.mkdir(parents=True, exist_ok=True)
    files = {"report.html": out / "report.html", "routing.json": out / "routing.json"}
    files["routing.json"].write_text(json.dumps(plain(numbers), allow_nan=False))
    for axis, share in numbers["share"].items():
        files[axis] = out / f"routing_{axis}.png"
        plot_shares(share, axis, files[axis])
    if metrics.is_file():
        files["loss"] = out / "loss.png"
        plot_loss(metrics, files["loss"])
    pictures = {}
    if prompts:
        made = adaptive(run, list(prompts), out)
        files |= made
        rows = "Red tokens are taken by twice the mean number of experts and more, white by the mean, blue by none. A row per prompt: "
        pictures = {
            rows + "the image, then the start, middle and end of sampling.": made["adaptive_time.png"],
            rows + "the image, then the first, middle and last layer with experts.": made["adaptive_layer.png"],
        }
    facts = dict(
        model=f"{config.depth} layers, {len(config.sparse_layers)} of them with {config.experts} experts; width {config.hidden}; "
        f"{config.routing} choice, {config.top_k if config.routing == 'token' else numbers['experts_per_token']:.3g} experts per token",
        run=str(run_dir.resolve()),
        step=f"{run.step:,}",
        data=f"{data.manifests[0].root}, {data.manifests[0].source}",
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
    manifest = Manifest.load(folder or run.latents["manifest"])
    theirs: dict[str, Any] = dict(shape=manifest.shapes, classes=manifest.num_classes, scaling_factor=manifest.scaling_factor)
    ours = dict(
        shape=run.shape,
        classes=run.model.config.num_classes,
        scaling_factor=run.latents.get("scaling_factor", manifest.scaling_factor),
    )
    if run.shape in manifest.shapes:
        theirs["shape"] = run.shape
    if not run.model.config.num_classes:
        theirs["classes"] = 0  # text models are not told them
    for key, value in ours.items():
        if theirs[key] != value:
            raise ConfigError("--dataset", folder, f"{key}: {theirs[key]}, the model was trained with {value}; encode it alike")
    return LatentDataset([manifest], "val", shape=run.shape)


def summary(run: Run, counted: Takings, sides: tuple[int, int], labels: Tensor, permutations: int) -> Numbers:
    """What follows from the counts; layers are those with experts, ``layers`` tells their numbers."""
    config, classes = run.model.config, run.model.config.num_classes
    samples, times, layers, experts = counted.by_time.shape
    tables = dict(timestep=counted.by_time.sum(0), position=counted.by_position.sum(0))
    if classes:
        by_sample = counted.by_time.sum(1)
        tables["class"] = torch.zeros(classes, layers, experts, dtype=by_sample.dtype).index_add_(0, labels, by_sample)
    shares = {axis: (table / table.sum(-1, keepdim=True)).transpose(0, 1) for axis, table in tables.items()}
    total = tables["timestep"].sum(0)
    per_image = config.routing == "expert" and config.router.pool == "image"
    tokens = samples * times * math.prod(sides)
    found = informations(counted, sides, labels, classes, permutations)
    return dict(
        step=run.step,
        samples=samples,
        experts=experts,
        top_k=config.top_k,
        routing=config.routing,
        layers=list(config.sparse_layers),
        sides=list(sides),
        timesteps=[(k + 0.5) / times for k in range(times)],
        class_names=run.latents.get("class_names"),
        permutations=permutations,
        share=shares,
        load=total / total.sum(-1, keepdim=True),
        entropy=entropy(shares["timestep"]),
        information={axis: one.report() for axis, one in found.items()},
        fixed=["timestep", "class"] if per_image else [],
        lift=lift(counted.together, tokens, distinct=config.routing == "token"),
        experts_per_token=counted.by_time.sum().item() / tokens / layers,
        takers=spread(counted.takers.transpose(0, 1)),
        takers_by_position=counted.by_position.sum((0, 3)).T / (samples * times),
    )


def spread(takers: Tensor) -> dict[str, Tensor]:
    """How unequally tokens share the experts.

    Args:
        takers: (..., E + 1) tokens that 0, 1, ..., E experts took.

    Returns:
        (...) ``untaken``, the share of tokens that no expert took; ``std`` of the number of experts per token; ``gini``, half the
        mean difference of two tokens over the mean: 0 if all tokens have the same, towards 1 if few have all.
    """
    share = takers.double() / takers.sum(-1, keepdim=True)
    number = torch.arange(takers.shape[-1], dtype=torch.float64)
    mean = share @ number
    apart = (number[:, None] - number).abs()
    gini = ((share @ apart) * share).sum(-1) / (2 * mean)
    return dict(untaken=share[..., 0], std=(share @ number.square() - mean.square()).clamp(min=0).sqrt(), gini=gini)


def training(metrics: Path) -> dict[str, Any]:
    """Loss and the routers' records of a run, as means over equal stretches of steps: ``loss`` (P,), ``router`` by name (L, P)."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    every = -(-len(records) // PLACES)
    stretches = [records[first : first + every] for first in range(0, len(records), every)]
    names = [name for name in records[-1]["router"] if all(name in record["router"] for record in records)]
    router = {
        name: torch.stack([torch.tensor([r["router"][name] for r in stretch]).mean(0) for stretch in stretches], dim=1) for name in names
    }
    loss = torch.tensor([sum(r["loss"] for r in stretch) / len(stretch) for stretch in stretches])
    return dict(steps=[stretch[-1]["step"] for stretch in stretches], every=every, loss=loss, router=router)


def plain(value: Any) -> Any:
    """For JSON: tensors as lists, and None for what is not a number."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
