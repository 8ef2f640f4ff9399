"""Conditional accuracy of the demo's model: are sampled digits the digits that were asked for?

python benchmarks/demo_quality.py [RUN_DIR] [--samples 200]

A support-vector classifier is trained on the real digits that the model was trained on, checked on the held-out real
ones, and then asked what it sees in the samples.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from sklearn.svm import SVC

from data_prep.samples import digits
from data_prep.sources import is_heldout
from ditmoe_ds.pipelines.run import open_run


def features(images: np.ndarray) -> np.ndarray:
    """(N, 32, 32) uint8 -> (N, 1024) in [0, 1]."""
    return images.reshape(len(images), -1) / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", nargs="?", default="demo/run")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=2.0)
    arguments = parser.parse_args()

    _, items = digits()
    images, labels = np.stack([item.image for item in items]), np.array([item.label for item in items])
    held_out = np.array([is_heldout(item.key, 0.1) for item in items])
    classifier = SVC(C=10, gamma="scale").fit(features(images[~held_out]), labels[~held_out])
    real = (classifier.predict(features(images[held_out])) == labels[held_out]).mean()

    run = open_run(arguments.run_dir)
    asked = np.arange(arguments.samples) % 10
    start = time.monotonic()
    sampled = run.sample(asked.tolist(), steps=arguments.steps, guidance=arguments.guidance)
    seconds = time.monotonic() - start
    seen = classifier.predict(features(sampled.float().mean(-1).numpy()))
    result = {
        "real_held_out_accuracy": round(float(real), 4),
        "sample_accuracy": round(float((seen == asked).mean()), 4),
        "per_class": [round(float((seen[asked == c] == c).mean()), 2) for c in range(10)],
        "samples": arguments.samples,
        "sampler": f"euler, {arguments.steps} steps, guidance {arguments.guidance}",
        "sampling_seconds": round(seconds, 1),
        "step": run.step,
    }
    environment = Path(arguments.run_dir) / "env.json"
    result["trained_on"] = {key: json.loads(environment.read_text())[key] for key in ("device", "processes", "torch")}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
