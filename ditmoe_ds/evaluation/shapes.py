"""The benchmark ``shapes``: does a text-to-image model draw what captions say, when it never saw such captions in training?"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.shapes import CATEGORIES, SIZE, Scene, scenes
from ditmoe_ds.errors import ConfigError
from ditmoe_ds.evaluation.detector import detect, shows
from ditmoe_ds.evaluation.metrics import wilson
from ditmoe_ds.latents.images import save_grid
from ditmoe_ds.pipelines.arguments import make_folder
from ditmoe_ds.pipelines.run import Run

CAPTIONS = 12
"""Most captions of each category."""


def prompts(unseen: bool = True) -> list[Scene]:
    """The same prompts for every model: of each category up to ``CAPTIONS`` scenes, evenly spread over all."""
    chosen = []
    for category in CATEGORIES:
        found = scenes(category, unseen)
        places = np.unique(np.linspace(0, len(found) - 1, min(CAPTIONS, len(found))).round().astype(int))
        chosen += [found[i] for i in places]
    return chosen


def evaluate(
    run: Run, out: Path, *, images: int, steps: int, guidance: float, seed: int = 0, batch: int = 64, seen: bool = False
) -> dict[str, Any]:
    """Sample and score; writes ``shapes.json`` and ``shapes.png`` (a row per prompt) into ``out``.

    Args:
        images: of each prompt.
        batch: images sampled at once.
        seen: captions of training instead of new ones.

    Returns:
        What is in ``shapes.json``: of each category ``right``, ``images``, ``score`` and ``ci95`` (Wilson), and their ``mean``.

    Raises:
        ConfigError: ``out`` cannot be made, images of another size, or a model conditioned on classes; and as ``Run.sample``.
    """
    if find_spec("scipy") is None:
        raise ConfigError("eval", "shapes", "needs package scipy: pip install scipy")
    make_folder(out)
    asked = [scene for scene in prompts(not seen) for _ in range(images)]
    pictures = []
    for first in range(0, len(asked), batch):
        part = [scene.caption for scene in asked[first : first + batch]]
        pictures.append(run.sample(part, steps=steps, guidance=guidance, seed=seed, first=first))
        if tuple(found := pictures[-1].shape[1:3]) != (SIZE, SIZE):
            raise ConfigError("run", list(found), f"the benchmark is for pictures of {SIZE} pixels: train on sample:shapes")
    sampled = torch.cat(pictures)
    right: dict[str, list[bool]] = {category: [] for category in CATEGORIES}
    for scene, picture in zip(asked, sampled.numpy(), strict=True):
        right[scene.category].append(shows(detect(picture), scene))
    scores = {category: sum(hits) / len(hits) for category, hits in right.items()}
    report = dict(
        step=run.step,
        captions="seen" if seen else "unseen",
        steps=steps,
        guidance=guidance,
        seed=seed,
        mean=sum(scores.values()) / len(scores),
        categories={
            category: dict(right=sum(hits), images=len(hits), score=scores[category], ci95=wilson(sum(hits), len(hits)))
            for category, hits in right.items()
        },
    )
    (out / "shapes.json").write_text(json.dumps(report, indent=1) + "\n")
    save_grid(sampled, out / "shapes.png", columns=images)
    return report
