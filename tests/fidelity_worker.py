"""A rank that measures two npz files: by a cheap extractor of three kinds of features, then by the command, at last with a mistake.

fidelity_worker.py MADE REAL OUT
"""

import json
import sys
from pathlib import Path

import torch

from ditmoe_ds import cli
from ditmoe_ds.distributed.topology import join, leave
from ditmoe_ds.ending import end
from ditmoe_ds.evaluation.extractors import Extractor
from ditmoe_ds.evaluation.fidelity import Measurement, run
from ditmoe_ds.evaluation.images import open_images
from ditmoe_ds.rng import keyed_generator


def features(images):
    """Random projections of the pixels: ``pool`` (B, 12), ``spatial`` (B, 20), ``logits`` (B, 5)."""
    pixels = images.flatten(1).double() / 255
    widths = dict(pool=12, spatial=20, logits=5)
    weights = {kind: torch.randn(pixels.shape[1], n, generator=keyed_generator(kind), dtype=torch.float64) for kind, n in widths.items()}
    return {kind: (pixels @ weights[kind] / 5).float() for kind in weights}


PROJECTIONS = Extractor("projections", "", "", features)


def measure(made, real, world):
    """All scores but those of captions."""
    asked = ("fid", "sfid", "is", "precision-recall", "kid", "cmmd")
    measurement = Measurement(asked, open_images(made), None, Path(real), open_images(real), {}, PROJECTIONS, None)
    return run(measurement, world.device, batch=16)


def main(made, real, out):
    world = join()
    (Path(out) / f"scores.{world.rank}").write_text(json.dumps(measure(made, real, world)))
    leave()
    words = ["eval", "fid", made, "--extractor", "efficientnet-lite0", "--out", out, "--batch", "16"]
    assert cli.main([*words, "--reference", real, "--local_rank=0"]) == 0
    return cli.main([*words, "--reference", "nowhere.npz"])


if __name__ == "__main__":
    end(main(*sys.argv[1:]))
