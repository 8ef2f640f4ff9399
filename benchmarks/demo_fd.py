"""Fréchet distance of the demo's samples to real digits it was not trained on, and what real digits have among themselves.

python benchmarks/demo_fd.py [RUN_DIR] [--samples 2000]

Features are those of EfficientNet-Lite0. The distance is biased by the number of images, so the floor has as many on either side:
training digits instead of samples. The same digits through the VAE show what it costs.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from data_prep.samples import digits
from data_prep.sources import is_heldout
from ditmoe_ds.distributed.topology import join, leave
from ditmoe_ds.evaluation.extractors import load_extractor
from ditmoe_ds.evaluation.features import summarise
from ditmoe_ds.evaluation.images import open_images
from ditmoe_ds.evaluation.moments import Gaussian, Moments, frechet_distance
from ditmoe_ds.latents.vae import decode, encode, load_vae
from ditmoe_ds.pipelines.run import open_run

BATCH = 100


def gaussian(features: torch.Tensor) -> Gaussian:
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments.gaussian()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", nargs="?", default="demo/run")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--out", default="demo/fd", help="folder for the images")
    arguments = parser.parse_args()
    out, count = Path(arguments.out), arguments.samples
    out.mkdir(parents=True, exist_ok=True)

    _, items = digits()
    real = np.stack([item.image for item in items])[..., None].repeat(3, -1)
    held_out = np.array([is_heldout(item.key, 0.1) for item in items])
    order = np.random.default_rng(0).permutation(len(real))
    training = order[~held_out[order]][:count]

    run = open_run(arguments.run_dir)
    start = time.monotonic()
    sampled = [
        run.sample(
            [i % 10 for i in range(first, min(first + BATCH, count))], steps=arguments.steps, guidance=arguments.guidance, first=first
        )
        for first in range(0, count, BATCH)
    ]
    seconds = time.monotonic() - start
    vae = load_vae(run.latents["vae"], run.device)
    batches = torch.from_numpy(real[training]).permute(0, 3, 1, 2).split(BATCH)
    decoded = [decode(vae, encode(vae, batch.to(run.device) / 127.5 - 1)[0], 1.0, 0.0).cpu() for batch in batches]

    join()
    extractor = load_extractor("efficientnet-lite0", run.device)
    features = {}
    for name, images in dict(real=real, samples=torch.cat(sampled).numpy(), decoded=torch.cat(decoded).numpy()).items():
        np.savez(out / f"{name}.npz", images)
        found = summarise(open_images(out / f"{name}.npz"), extractor, run.device, keep=True, label=name).features
        features[name] = found.cpu()
    leave()
    held, half = gaussian(features["real"][held_out]), len(real) // 2
    result = {
        "samples to held-out": frechet_distance(gaussian(features["samples"]), held),
        "training digits to held-out": frechet_distance(gaussian(features["real"][training]), held),
        "the same through the VAE to held-out": frechet_distance(gaussian(features["decoded"]), held),
        "one half of the real digits to the other": frechet_distance(
            gaussian(features["real"][order[:half]]), gaussian(features["real"][order[half:]])
        ),
        "numbers": dict(samples=count, training=len(training), held_out=int(held_out.sum()), half=half),
        "sampler": f"euler, {arguments.steps} steps, guidance {arguments.guidance}, step {run.step}",
        "sampling_seconds": round(seconds, 1),
        "extractor": extractor.describe(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
