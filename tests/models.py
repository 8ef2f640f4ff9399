"""Models with random weights, none of them zero."""

from dataclasses import asdict

import torch

from ditmoe_ds.diffusion.objectives import DiffusionConfig
from ditmoe_ds.distributed.weights import Weights
from ditmoe_ds.models.dit import DiTConfig
from ditmoe_ds.models.sizes import parameter_shapes

SPARSE = DiTConfig(hidden=32, depth=2, heads=4, input_size=8, num_classes=3, experts=4)
DENSE = DiTConfig(hidden=32, depth=2, heads=4, input_size=8, num_classes=3)


def random_weights(config=SPARSE, diffusion=DiffusionConfig(), **description):  # noqa: B008 (frozen)
    """A model's parameters by name, and the same as ``Weights``."""
    generator = torch.Generator().manual_seed(0)
    parameters = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in parameter_shapes(config).items()}
    known = dict(name="test", model=asdict(config), diffusion=asdict(diffusion), latents={}, step=5, weights="ema")

    def read(name, start, out):
        out.copy_(parameters[name].view(-1)[start : start + out.numel()])

    return parameters, Weights(parameter_shapes(config), read, known | description)
