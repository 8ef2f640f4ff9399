"""Which expert takes which token: shares of selections by layer and timestep, patch position and class.

The analysis of arXiv 2407.11633, section 4.4, on held-out data noised to equidistant times.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ditmoe_ds.diffusion.objectives import make_objective
from ditmoe_ds.errors import CheckpointError
from ditmoe_ds.latents.format import Manifest
from ditmoe_ds.latents.loader import Batch, LatentDataset
from ditmoe_ds.models.dit import DiT
from ditmoe_ds.moe.layer import LayerStats, Router
from ditmoe_ds.moe.routing import Assignment
from ditmoe_ds.pipelines.run import Run
from ditmoe_ds.rng import keyed_generator


@contextmanager
def watched(model: DiT) -> Iterator[list[Tensor]]:
    """Inside the block every forward appends, per sparse layer, who took which token: bool (B * N, E) on the CPU."""
    taken: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Tensor, ...], out: tuple[Assignment, LayerStats]) -> None:
        taken.append(taken_by(out[0], args[0].shape[0] * args[0].shape[1]))

    hooks = [module.register_forward_hook(look) for module in model.modules() if isinstance(module, Router)]
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()


def taken_by(assignment: Assignment, tokens: int) -> Tensor:
    """Which expert takes which token: bool (tokens, E) on the CPU."""
    taken = torch.zeros(tokens, len(assignment.counts), dtype=torch.bool)
    expert = torch.arange(len(assignment.counts)).repeat_interleave(assignment.counts.cpu())
    taken[assignment.tokens.cpu(), expert] = True
    return taken


@torch.no_grad()
def count_takings(run: Run, samples: Batch, bins: int, size: int = 64) -> dict[str, Tensor]:
    """Count how many tokens each expert took.

    Args:
        samples: S samples, scaled.
        bins: times; each sample is noised to the middle of each of ``bins`` equal parts of [0, 1].
        size: samples in a forward.

    Returns:
        By "timestep", "position" and, of a model that knows classes, "class": int64 (L, bins | N | classes, E).
    """
    model, objective, told = run.model, make_objective(run.diffusion), run.conditioner
    L, E, classes = len(model.config.sparse_layers), model.config.experts, model.config.num_classes
    patches = samples.latents[0, 0].numel() // model.config.patch**2
    sizes = {"timestep": bins, "position": patches} | ({"class": classes} if classes else {})
    counts = {axis: torch.zeros(L, rows, E, dtype=torch.int64) for axis, rows in sizes.items()}
    asked = told.told(samples)
    with watched(model) as taken:
        for first in range(0, len(samples.latents), size):
            x0 = samples.latents[first : first + size].to(run.device)
            condition = told.unpack(told.pack(asked[first : first + size]), run.device)
            for k in range(bins):
                taken.clear()
                draws = [torch.randn(x0.shape[1:], generator=keyed_generator("analysis", first + i, k)) for i in range(len(x0))]
                t = x0.new_full((len(x0),), (k + 0.5) / bins)
                objective.loss(lambda z, s: model(z, s, **condition), x0, t, torch.stack(draws).to(run.device))  # noqa: B023
                for layer, takers in enumerate(taken):
                    hits = takers.view(len(x0), patches, E).long()
                    counts["timestep"][layer, k] += hits.sum((0, 1))
                    counts["position"][layer] += hits.sum(0)
                    if classes:
                        counts["class"][layer].index_add_(0, samples.labels[first : first + size], hits.sum(1))
    return counts


def analyze(run: Run, run_dir: Path, out: Path, samples: int = 256, bins: int = 10) -> dict[str, Path]:
    """Write ``routing.json`` and one heat-map per axis into ``out``, and the loss curve if ``run_dir`` has one.

    Returns:
        The files, by name.

    Raises:
        CheckpointError, DataError: no checkpoint, a dense model, or the run's latents are gone.
    """
    from ditmoe_ds.analysis.plots import plot_loss, plot_shares

    if not any(isinstance(module, Router) for module in run.model.modules()):
        raise CheckpointError(f"{run_dir}: the model is dense, it has no routing to analyze")
    dataset = LatentDataset([Manifest.load(run.latents["manifest"])], "val", shape=run.shape)
    chosen = dataset.batch(range(min(samples, len(dataset))))
    counts = count_takings(run, chosen, bins)
    shares = {axis: count / count.sum(-1, keepdim=True) for axis, count in counts.items()}
    out.mkdir(parents=True, exist_ok=True)
    files = {"routing.json": out / "routing.json"}
    numbers = dict(
        step=run.step,
        samples=len(chosen.samples),
        experts=run.model.config.experts,
        top_k=run.model.config.top_k,
        timesteps=[(k + 0.5) / bins for k in range(bins)],
        class_names=run.latents["class_names"],
        share={axis: share.tolist() for axis, share in shares.items()},
    )
    files["routing.json"].write_text(json.dumps(numbers))
    for axis, share in shares.items():
        files[axis] = out / f"routing_{axis}.png"
        plot_shares(share, axis, files[axis])
    metrics = run_dir / "metrics.jsonl"
    if metrics.is_file():
        files["loss"] = out / "loss.png"
        plot_loss(metrics, files["loss"])
    return files
