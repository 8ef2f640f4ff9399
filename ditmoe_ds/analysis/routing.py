"""Which expert takes which token: shares of selections by layer and timestep, patch position and class.

The analysis of arXiv 2407.11633, section 4.4, on held-out data noised to equidistant times.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from ditmoe_ds.diffusion.objectives import make_objective
from ditmoe_ds.errors import CheckpointError
from ditmoe_ds.latents.format import Manifest
from ditmoe_ds.latents.loader import LatentDataset
from ditmoe_ds.moe.layer import Router
from ditmoe_ds.pipelines.run import Run, open_run
from ditmoe_ds.rng import keyed_generator

AXES = ("timestep", "position", "class")


@torch.no_grad()
def count_selections(run: Run, latents: Tensor, labels: Tensor, bins: int, batch: int = 64) -> dict[str, Tensor]:
    """Count how often each expert was chosen.

    Args:
        latents, labels: (S, C, H, W) scaled, (S,).
        bins: times; each sample is noised to the middle of each of ``bins`` equal parts of [0, 1].

    Returns:
        For each of ``AXES``, int64 (L, bins | N | classes, E).
    """
    model, objective = run.model, make_objective(run.diffusion)
    routers = [module for module in model.modules() if isinstance(module, Router)]
    L, E, N, classes = len(routers), model.config.experts, model.config.tokens, model.config.num_classes
    counts = {axis: torch.zeros(L, size, E, dtype=torch.int64) for axis, size in zip(AXES, (bins, N, classes), strict=True)}
    chosen: list[Tensor] = []
    hooks = [router.register_forward_hook(lambda module, args, out: chosen.append(out[1].cpu())) for router in routers]
    device = model.x_embed.weight.device
    try:
        for first in range(0, len(latents), batch):
            x0, y = latents[first : first + batch].to(device), labels[first : first + batch]
            for k in range(bins):
                chosen.clear()
                draws = [torch.randn(x0.shape[1:], generator=keyed_generator("analysis", first + i, k)) for i in range(len(x0))]
                t = x0.new_full((len(x0),), (k + 0.5) / bins)
                objective.loss(lambda z, s: model(z, s, y.to(device)), x0, t, torch.stack(draws).to(device))  # noqa: B023
                for layer, experts in enumerate(chosen):
                    hits = torch.nn.functional.one_hot(experts.view(len(x0), N, -1), E).sum(2)  # (B, N, E)
                    counts["timestep"][layer, k] += hits.sum((0, 1))
                    counts["position"][layer] += hits.sum(0)
                    counts["class"][layer].index_add_(0, y, hits.sum(1))
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def analyze(run_dir: str, out: str, samples: int = 256, bins: int = 10) -> dict[str, Path]:
    """Write ``routing.json`` and one heat-map per axis into ``out``.

    Returns:
        The files, by name.

    Raises:
        CheckpointError, DataError: no checkpoint, a dense model, or the run's latents are gone.
    """
    from ditmoe_ds.analysis.plots import plot_loss, plot_shares

    run = open_run(run_dir)
    if not run.model.config.experts:
        raise CheckpointError(f"{run_dir}: the model is dense, it has no routing to analyze")
    dataset = LatentDataset([Manifest.load(run.latents["manifest"])], "val")
    chosen = [dataset[i] for i in range(min(samples, len(dataset)))]
    latents, labels = torch.stack([sample.latent for sample in chosen]), torch.tensor([sample.label for sample in chosen])
    counts = count_selections(run, latents, labels, bins)
    shares = {axis: count / count.sum(-1, keepdim=True) for axis, count in counts.items()}
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"routing.json": folder / "routing.json"}
    numbers = dict(
        step=run.step,
        samples=len(labels),
        experts=run.model.config.experts,
        top_k=run.model.config.top_k,
        timesteps=[(k + 0.5) / bins for k in range(bins)],
        class_names=run.latents["class_names"],
        share={axis: share.tolist() for axis, share in shares.items()},
    )
    files["routing.json"].write_text(json.dumps(numbers))
    for axis, share in shares.items():
        files[axis] = folder / f"routing_{axis}.png"
        plot_shares(share, axis, files[axis])
    metrics = Path(run_dir) / "metrics.jsonl"
    if metrics.is_file():
        files["loss"] = folder / "loss.png"
        plot_loss(metrics, files["loss"])
    return files
