"""Where expert choice spends its compute: how many experts took each token, by layer and time, while images are sampled.

The analysis of EC-DIT (arXiv 2410.02098, section 4).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditmoe_ds.analysis.routing import watched
from ditmoe_ds.latents.images import save_grid
from ditmoe_ds.pipelines.run import Run
from ditmoe_ds.plain import plain

STEPS = 25
WHITE = 30
"""A pixel belongs to an object if one of its channels is darker than white by more than this."""


def sample_with_takers(run: Run, prompts: list[str], *, steps: int, guidance: float) -> tuple[Tensor, Tensor]:
    """Sample an image for each of B prompts.

    Returns:
        uint8 images (B, H, W, 3); how many experts took each token, int64 (L, steps, B, rows, columns), from noise to image.

    Raises:
        ConfigError: as ``Run.sample``.
    """
    with watched(run.model) as taken:
        images = run.sample(prompts, steps=steps, guidance=guidance)
    side = [length // run.model.config.patch for length in run.shape[1:]]
    # with guidance the first half of each forward is the conditional one, or the first of two forwards is
    counts = [layer.sum(1).view(-1, *side)[: len(prompts)] for layer in taken]
    shape = (steps, -1, len(run.model.config.sparse_layers), len(prompts), *side)
    return images, torch.stack(counts).cpu().view(shape)[:, 0].transpose(0, 1)


def on_objects(images: Tensor, takers: Tensor) -> dict[str, Any]:
    """Experts per token on objects against those on a white background, in images (B, H, W, 3).

    Args:
        takers: (L, steps, B, rows, columns).

    Returns:
        Means over images, ``ratio`` of the two and its 95 % interval ``ci95`` (bootstrap over images), of all and by layer and by step.
    """
    colored = ((255 - images.int()).amax(-1) > WHITE).float()[:, None]
    object_share = torch.nn.functional.adaptive_avg_pool2d(colored, (takers.shape[-2], takers.shape[-1]))[:, 0]  # (B, rows, columns)
    usable = [i for i in range(len(images)) if (object_share[i] > 0.5).any() and (object_share[i] == 0).any()]
    if not usable:
        return dict(images=0)
    inside, outside = [], []
    for i in usable:
        counts = takers[:, :, i].double()
        inside.append(counts[:, :, object_share[i] > 0.5].mean(-1))
        outside.append(counts[:, :, object_share[i] == 0].mean(-1))
    inner, outer = torch.stack(inside), torch.stack(outside)  # (images, L, steps)
    random = torch.Generator().manual_seed(0)
    picks = torch.randint(len(usable), (2000, len(usable)), generator=random)
    ratios = inner.mean((1, 2))[picks].mean(1) / outer.mean((1, 2))[picks].mean(1)
    return dict(
        images=len(usable),
        objects=inner.mean().item(),
        background=outer.mean().item(),
        ratio=(inner.mean() / outer.mean()).item(),
        ci95=ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist(),
        ratio_by_layer=(inner.mean((0, 2)) / outer.mean((0, 2))).tolist(),
        ratio_by_step=(inner.mean((0, 1)) / outer.mean((0, 1))).tolist(),
    )


def adaptive(run: Run, prompts: list[str], out: Path) -> dict[str, Path]:
    """Write ``adaptive.json`` and two pictures into the folder ``out``: a row per prompt, its image and the experts per token.

    ``adaptive_time.png``: mean over layers, at the start, middle and end of sampling; ``adaptive_layer.png``: mean over time, of the
    first, middle and last layer with experts. Blue is 0 experts, white the mean, red twice the mean and more.

    Returns:
        The files, by name.
    """
    guidance = 3.0 if run.diffusion.condition_dropout else 1.0  # without its condition such a model is untrained
    images, takers = sample_with_takers(run, prompts, steps=STEPS, guidance=guidance)
    files = {name: out / name for name in ("adaptive.json", "adaptive_time.png", "adaptive_layer.png")}
    spread = takers.flatten(3).double()
    report = dict(
        step=run.step,
        prompts=prompts,
        experts=run.model.config.experts,
        layers=list(run.model.config.sparse_layers),
        experts_per_token=spread.mean().item(),
        tokens=spread.shape[3],
        untaken=(spread == 0).double().mean((2, 3)).tolist(),
        most=spread.amax((2, 3)).tolist(),
        std=spread.std(3).mean(2).tolist(),
        objects=on_objects(images, takers),
        takers=takers.double().mean(1).round(decimals=3).tolist(),
    )
    files["adaptive.json"].write_text(json.dumps(plain(report), allow_nan=False))
    thirds = [slice(0, STEPS // 3), slice(STEPS // 3, 2 * STEPS // 3), slice(2 * STEPS // 3, STEPS)]
    last = len(takers) - 1
    panels = {
        "adaptive_time.png": [takers[:, third].double().mean((0, 1)) for third in thirds],
        "adaptive_layer.png": [takers[layer].double().mean(0) for layer in sorted({0, last // 2, last})],
    }
    for name, maps in panels.items():
        row = [[image, *(overlay(image, one[i]) for one in maps)] for i, image in enumerate(images)]
        save_grid([tile for tiles in row for tile in tiles], files[name], columns=1 + len(maps))
    return files


def overlay(image: Tensor, counts: Tensor) -> Tensor:
    """An image (H, W, 3) uint8, greyed, under the colours of (rows, columns) counts."""
    import matplotlib

    share = counts / counts.mean() / 2  # 1/2 is the mean
    stretched = torch.nn.functional.interpolate(share[None, None].float(), tuple(image.shape[:2]), mode="nearest")[0, 0].clamp(0, 1)
    color = torch.from_numpy(np.asarray(matplotlib.colormaps["RdBu_r"](stretched.numpy()))[..., :3] * 255)
    return (0.35 * image.double().mean(-1, keepdim=True) + 0.65 * color).clamp(0, 255).to(torch.uint8)
