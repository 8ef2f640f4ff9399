"""One pass over a set of images: moments of their features, Inception Score, and the features themselves where a measure needs them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ditmoe_ds.distributed.topology import agreed
from ditmoe_ds.evaluation.extractors import Extractor
from ditmoe_ds.evaluation.images import Images
from ditmoe_ds.evaluation.metrics import InceptionScore
from ditmoe_ds.evaluation.moments import Gaussian, Moments
from ditmoe_ds.evaluation.ranks import share, total
from ditmoe_ds.progress import Progress


@dataclass(frozen=True)
class Summary:
    """What the measures must know of a set of images; the same on every rank."""

    gaussians: dict[str, Gaussian]
    """By kind of feature: ``pool`` and, of Inception, ``spatial``."""
    inception_score: tuple[float, float] | None
    """Mean and standard deviation."""
    features: Tensor | None
    """``pool`` of all images in order, (N, D) float32, if asked for."""


def summarise(
    images: Images, extractor: Extractor, device: torch.device, *, batch: int = 64, keep: bool = False, label: str = ""
) -> Summary:
    """Extract every image once; the ranks share them. Collective.

    Args:
        batch: images at a time; the ranks' parts are whole batches, so features do not depend on the world size.
        keep: keep the features too.
        label: of the progress that rank 0 shows.

    Raises:
        AgreedError: a file is damaged; on every rank.
    """
    count, (first, last) = len(images), share(len(images), batch)
    blank = extractor.features(torch.zeros(1, *images.shape, dtype=torch.uint8, device=device))
    width = {kind: found.shape[1] for kind, found in blank.items()}  # known to a rank without images, too
    moments = {kind: Moments(size, device) for kind, size in width.items() if kind != "logits"}
    score = InceptionScore(count, width["logits"], device) if "logits" in width else None
    kept = torch.zeros(count, width["pool"], device=device) if keep else None

    def extract() -> None:
        with Progress(label, "images", last - first, shown=dist.get_rank() == 0) as progress:
            at = first
            for arrays in images.batches(first, last, batch):
                found = extractor.features(torch.from_numpy(arrays).to(device))
                for kind, moment in moments.items():
                    moment.add(found[kind])
                if score:
                    score.add(at, found["logits"])
                if kept is not None:
                    kept[at : at + len(arrays)] = found["pool"]
                at += len(arrays)
                progress.update(len(arrays))

    agreed(extract)
    gaussians = {kind: moment.gaussian() for kind, moment in moments.items()}
    return Summary(gaussians, score.score() if score else None, None if kept is None else total(kept))
