"""How close samples are to real images: FID, sFID, Inception Score, precision and recall as the ADM evaluator computes them; FD, KID, CMMD;
and how well they fit their captions: CLIP score."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ditmoe_ds
from ditmoe_ds.distributed.topology import decided
from ditmoe_ds.errors import ConfigError, DataError
from ditmoe_ds.evaluation.extractors import CLIP, Extractor, load_extractor
from ditmoe_ds.evaluation.features import summarise
from ditmoe_ds.evaluation.images import MEMBER, FolderImages, Images, npz_members, open_images, published_statistics
from ditmoe_ds.evaluation.metrics import KID_SUBSET, cmmd, kid, precision_recall
from ditmoe_ds.evaluation.moments import Gaussian, frechet_distance
from ditmoe_ds.evaluation.ranks import share, total
from ditmoe_ds.latents.manifest import sha256

OF_PAIRS = {"precision-recall", "kid", "cmmd"}
"""Measures that need the features of both sets, not only their moments."""
FEWEST = 4
"""Fewest images: recall and precision need three neighbours of each."""


@dataclass(frozen=True)
class Measurement:
    """What is measured, and of what. Everything that a user can get wrong has been checked."""

    asked: tuple[str, ...]
    samples: Images
    described: Any
    """How the samples were made, if they say so."""
    reference: Path | None
    real: Images | None
    """Images of the reference; None where its statistics are enough."""
    statistics: dict[str, Gaussian]
    """Published statistics that the reference has."""
    extractor: Extractor
    captions: list[str] | None


def open_measurement(
    measure: str,
    samples: str,
    *,
    reference: str | None = None,
    extractor: str | None = None,
    inception: str | None = None,
    captions: str | None = None,
    device: torch.device,
) -> Measurement:
    """Open and check everything before the long work.

    Args:
        measure: a name of ``ditmoe eval``.
        samples, reference: a folder of pictures or an npz; a reference may have ADM's statistics instead, or too.
        extractor: None is the measure's own.
        inception: file of Inception's weights.
        captions: file with a caption per line, in the order of the samples.

    Raises:
        ConfigError: arguments that do not fit together.
        DataError: a file or weights that cannot be read.
    """
    of_clip = measure in ("cmmd", "clip-score")
    name = extractor or (CLIP if of_clip else "inception")
    if of_clip and not name.startswith("clip:"):
        raise ConfigError("--extractor", name, f"{measure} is of CLIP: clip:ID_OR_PATH")
    if measure in ("sfid", "is") and name != "inception":
        raise ConfigError("--extractor", name, f"{measure} is of inception")
    asked: tuple[str, ...] = (measure,)
    if measure == "fid":
        asked = ("fid", "sfid", "is", "precision-recall") if name == "inception" else ("fd", "precision-recall")
    made = _enough(open_images(samples))
    described = made.description()
    if isinstance(described, dict) and str(described.get("format")).startswith("ditmoe-samples") and described["num"] != len(made):
        few = len(made) < described["num"]
        fix = "let ditmoe sample finish them" if few else "move the others elsewhere"
        raise DataError(f"{samples}: {len(made)} of {described['num']} images; {fix}")
    first = os.environ.get("RANK", "0") == "0"
    if first and "is" in asked and isinstance(made, FolderImages) and len({file.parent for file in made.files}) > 1:
        fix = "if they hold a class each, its splits of 5,000 in a row show few classes"
        print(f"{samples}: the Inception Score is of pictures in the order of their paths, through sub-folders; {fix}", file=sys.stderr)
    lines = _captions(captions, len(made)) if measure == "clip-score" else None
    path, real = None, None
    statistics: dict[str, Gaussian] = {}
    if set(asked) - {"is", "clip-score"}:
        if reference is None:
            raise ConfigError("--reference", None, "name a folder of real images, or an npz of ADM's")
        path = Path(reference)
        real, statistics = _reference(path, asked, name)
        if real is None and measure == "fid":
            asked = tuple(one for one in asked if one != "precision-recall" and (one != "sfid" or "spatial" in statistics))
    fewest = min(len(made), len(real or made))
    if first and measure == "kid" and fewest < KID_SUBSET:
        print(f"{samples}: KID of subsets of all {fewest} images; published ones are of {KID_SUBSET:,}", file=sys.stderr)
    if first and real and real.shape != made.shape:
        print(f"{samples}: images of {made.shape[:2]} pixels are compared with those of {real.shape[:2]} of {reference}", file=sys.stderr)
    return Measurement(asked, made, described, path, real, statistics, load_extractor(name, device, inception), lines)


def run(measurement: Measurement, device: torch.device, batch: int = 64) -> dict[str, float]:
    """The scores by name. Collective; the same on every rank."""
    pairs = bool(OF_PAIRS & {*measurement.asked})
    of = partial(summarise, extractor=measurement.extractor, device=device, batch=batch)
    made = of(measurement.samples, keep=pairs or measurement.captions is not None, label="samples")
    real = of(measurement.real, keep=pairs, label="reference") if measurement.real else None
    gaussians = (real.gaussians if real else {}) | measurement.statistics
    scores: dict[str, float] = {}
    for measure in measurement.asked:
        if measure in ("fid", "fd"):
            scores[measure] = decided(lambda: frechet_distance(made.gaussians["pool"], gaussians["pool"]))
        elif measure == "sfid":
            scores["sfid"] = decided(lambda: frechet_distance(made.gaussians["spatial"], gaussians["spatial"]))
        elif measure == "is":
            assert made.inception_score
            scores["is"], scores["is_std"] = made.inception_score
        elif measure == "clip-score":
            assert made.features is not None and measurement.captions and measurement.extractor.text
            scores["clip_score"] = clip_score(made.features, measurement.captions, measurement.extractor.text, batch)
        else:
            assert made.features is not None and real and real.features is not None
            if measure == "precision-recall":
                scores["precision"], scores["recall"] = precision_recall(real.features, made.features)
            elif measure == "kid":
                scores["kid"], scores["kid_std"] = kid(made.features, real.features)
            else:
                scores["cmmd"] = cmmd(real.features, made.features)
    return scores


def result(measurement: Measurement, scores: dict[str, float]) -> dict[str, Any]:
    """The content of ``MEASURE.json``; its ``samples`` says how they were made, and is null where that is not known."""
    reference: dict[str, Any] | None = None
    if measurement.reference:
        real = measurement.real
        reference = dict(
            path=str(measurement.reference),
            sha256=real.sha256() if real else sha256(measurement.reference),
            number=len(real) if real else None,
            published_statistics=[*measurement.statistics],
            size=real.shape[:2] if real else None,
        )
    return {
        **scores,
        "number": len(measurement.samples),
        "path": str(measurement.samples.path),
        "size": measurement.samples.shape[:2],
        "samples": measurement.described,
        "reference": reference,
        "extractor": measurement.extractor.describe(),
        "ditmoe_ds": ditmoe_ds.__version__,
        "torch": torch.__version__,
        "command": sys.argv,
    }


def clip_score(images: Tensor, captions: list[str], text: Callable[[list[str]], Tensor], batch: int = 64) -> float:
    """The mean of 100 max(cos, 0) of images' unit vectors (N, D) and their captions (arXiv 2104.08718, there times 2.5). Collective."""
    first, last = share(len(captions), batch)
    found = torch.zeros((), dtype=torch.float64, device=images.device)
    for start in range(first, last, batch):
        told = text(captions[start : min(start + batch, last)])
        found += (images[start : start + len(told)] * told).double().sum(1).clamp(min=0).sum()
    return 100 * total(found).item() / len(captions)


def _reference(path: Path, asked: tuple[str, ...], extractor: str) -> tuple[Images | None, dict[str, Gaussian]]:
    """The reference's images, if they must be read, and the statistics it carries."""
    published = published_statistics(path) if not path.is_dir() and extractor == "inception" else {}
    kinds = {"fid": ("pool", "mu", "sigma", 2048), "sfid": ("spatial", "mu_s", "sigma_s", 2023)}
    statistics = {}
    for measure, (kind, mean, covariance, width) in kinds.items():
        if measure in asked and mean in published:
            if len(published[mean]) != width:
                raise DataError(f"{path}: {mean} has {len(published[mean])} numbers, of Inception it is {width}")
            statistics[kind] = Gaussian(torch.from_numpy(published[mean]), torch.from_numpy(published[covariance]))
    missing = [measure for measure in asked if measure == "fd" or (measure in kinds and kinds[measure][0] not in statistics)]
    pairs = [measure for measure in asked if measure in OF_PAIRS]
    if path.is_dir() or MEMBER in npz_members(path):
        return (_enough(open_images(path)) if missing or pairs else None), statistics
    if (missing and not (missing == ["sfid"] and "fid" in asked)) or not statistics:  # many hold those of FID alone
        needs = ", ".join(missing or pairs)
        raise ConfigError("--reference", str(path), f"has no images ({', '.join(npz_members(path))}), which {needs} needs here")
    return None, statistics


def _enough(images: Images) -> Images:
    if len(images) < FEWEST:
        raise DataError(f"{images.path}: {len(images)} images are too few to measure")
    return images


def _captions(path: str | None, count: int) -> list[str]:
    if path is None:
        raise ConfigError("--captions", None, "name a file with a caption per line, in the order of the samples")
    try:
        lines = Path(path).read_text().removesuffix("\n").split("\n")  # splitlines() would also cut at Unicode's line ends
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--captions", path, f"cannot be read ({error})") from None
    if len(lines) != count:
        raise ConfigError("--captions", path, f"has {len(lines)} lines for {count} samples")
    return lines
