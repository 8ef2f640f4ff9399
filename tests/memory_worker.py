"""Exports a made-up model to every target and prints what it held: python memory_worker.py FOLDER HIDDEN DEPTH"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.report import forget_peak, host_bytes
from ditmoe_ds.cli import main
from ditmoe_ds.diffusion.objectives import DiffusionConfig
from ditmoe_ds.distributed.weights import Weights, write_weights
from ditmoe_ds.models.dit import DiTConfig
from ditmoe_ds.models.sizes import parameter_shapes


def make(folder, **size):
    config = DiTConfig(heads=4, experts=8, **size)
    known = dict(name=None, model=asdict(config), diffusion=asdict(DiffusionConfig()), latents={}, step=0, weights="ema")
    shapes = parameter_shapes(config)
    write_weights(folder, Weights(shapes, lambda name, start, out: out.fill_(0.5), known))
    sizes = [4 * torch.Size(shape).numel() for shape in shapes.values()]
    return dict(largest=max(sizes), total=sum(sizes), peaks={})


root = Path(sys.argv[1])
make(root / "small", hidden=32, depth=1)
result = make(root / "weights", hidden=int(sys.argv[2]), depth=int(sys.argv[3]))
for target in ("safetensors", "diffusers", "reference"):
    options = ["--to", target, "--dtype", "bf16", "--out"]
    assert main(["export", str(root / "small"), *options, str(root / target / "small")]) == 0  # everything is imported
    forget_peak()
    before = host_bytes("VmRSS")
    assert main(["export", str(root / "weights"), *options, str(root / target / "weights")]) == 0
    result["peaks"][target] = host_bytes("VmHWM") - before
print(json.dumps(result))
