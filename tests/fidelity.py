"""Images and weights for tests of the FID family, and distances to compare with."""

import numpy as np
import torch

from ditmoe_ds.evaluation.inception import Inception
from ditmoe_ds.evaluation.moments import Moments
from ditmoe_ds.rng import keyed_generator


def pictures(count, height=32, width=32, key="pictures"):
    """(count, height, width, 3) uint8: waves of random direction and colour, unlike each other."""
    draw = keyed_generator(key, count, height, width)
    frequency, phase = torch.rand(count, 2, 3, generator=draw) * 0.5, torch.rand(count, 1, 1, 3, generator=draw) * 6
    y, x = torch.arange(height).view(1, -1, 1, 1), torch.arange(width).view(1, 1, -1, 1)
    wave = torch.sin(y * frequency[:, None, None, 0] + x * frequency[:, None, None, 1] + phase)
    return ((wave + 1) * 127.5).to(torch.uint8)


def inception_weights():
    """Of the right names and shapes, random but for their scale: activations neither vanish nor explode."""
    weights = Inception().state_dict()
    for name, value in weights.items():
        draw = torch.randn(value.shape, generator=keyed_generator("inception", name)) if value.is_floating_point() else None
        if value.dim() == 4:
            weights[name] = draw * (2 / value[0].numel()) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            weights[name] = 1 + 0.3 * draw.tanh()
        elif draw is not None:
            weights[name] = 0.1 * draw
    return weights


def projections(features):
    """(N, 3) sums of the features (N, D) with fixed random weights: few numbers that depend on all of them."""
    weights = torch.randn(features.shape[1], 3, generator=keyed_generator("projections"), dtype=torch.float64)
    return features.double() @ weights / features.shape[1] ** 0.5


def gaussian(vectors, batch=37):
    moments = Moments(vectors.shape[1])
    for part in vectors.split(batch):
        moments.add(part)
    return moments.gaussian()


def of_few(x, y):
    """The distance in closed form where there are fewer vectors than features: the root's trace is the nuclear norm of X Y', centred."""
    centred = [(v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (x.double().numpy(), y.double().numpy())]
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    means = ((x.double().mean(0) - y.double().mean(0)) ** 2).sum().item()
    return means + (centred[0] ** 2).sum() + (centred[1] ** 2).sum() - 2 * root
