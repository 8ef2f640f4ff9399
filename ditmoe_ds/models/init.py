"""Initial weights as a function of (seed, parameter, global expert index): not of EP, world size or ZeRO stage."""

import math

import torch
from torch import Tensor, nn

from ditmoe_ds.models.dit import DiT
from ditmoe_ds.models.embeddings import LabelEmbedder
from ditmoe_ds.moe.experts import PackedExperts
from ditmoe_ds.moe.layer import Router
from ditmoe_ds.rng import keyed_generator


@torch.no_grad()
def init_weights(model: DiT, seed: int, ep_rank: int = 0) -> None:
    """Draw every weight of ``model`` in place, as DiT-MoE does: the output is exactly 0 and each block the identity.

    Xavier-uniform for every matrix (each expert's own), N(0, 0.02) for label table and timestep MLP,
    uniform +-1/sqrt(D) for routers, zeros for biases, adaLN and the final layer.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            if module.bias is not None:
                module.bias.zero_()
            if "modulation" in path or path.startswith("final"):
                module.weight.zero_()
            elif path.startswith("t_embed"):
                _fill(module.weight, (seed, path), std=0.02)
            elif path.endswith("shared_mlp.w1"):
                for name, half in zip(("gate", "up"), module.weight.chunk(2), strict=True):
                    _fill(half, (seed, path, name))
            else:
                _fill(module.weight, (seed, path))
        elif isinstance(module, LabelEmbedder):
            _fill(module.table.weight, (seed, path), std=0.02)
        elif isinstance(module, Router):
            _fill(module.weight, (seed, path), bound=1 / math.sqrt(module.weight.shape[1]))
        elif isinstance(module, PackedExperts):
            first = ep_rank * len(module.w1)
            for bias in (module.b1, module.b2):
                if bias is not None:
                    bias.zero_()
            for local, (w1, w2) in enumerate(zip(module.w1, module.w2, strict=True)):
                halves = w1.chunk(2) if module.activation == "swiglu" else (w1,)
                for name, matrix in zip(("down", "gate", "up"), (w2, *halves), strict=False):
                    _fill(matrix, (seed, path, first + local, name))


def _fill(weight: Tensor, key: tuple[int | str, ...], std: float | None = None, bound: float | None = None) -> None:
    """Normal with ``std``, or uniform in +-``bound``, by default Xavier's for the matrix (out, everything else)."""
    generator = keyed_generator("weight", *key)
    draw = torch.empty(weight.shape)
    if std is not None:
        draw.normal_(0, std, generator=generator)
    else:
        bound = bound or math.sqrt(6 / (len(weight) + weight[0].numel()))
        draw.uniform_(-bound, bound, generator=generator)
    weight.copy_(draw)
