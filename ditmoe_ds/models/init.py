"""Initial weights as a function of (seed, parameter, global expert index): not of EP, world size or ZeRO stage."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ditmoe_ds.models.dit import DiT
from ditmoe_ds.models.embeddings import LabelEmbedder
from ditmoe_ds.moe.experts import PackedExperts
from ditmoe_ds.moe.layer import Router
from ditmoe_ds.rng import keyed_generator


class Matrix(NamedTuple):
    """A matrix that is drawn on its own, and where it lies in its flattened logical tensor."""

    start: int
    shape: tuple[int, ...]
    key: tuple[int | str, ...]
    std: float | None = None
    """Standard deviation of a normal distribution; None for the uniform one in +-``bound``."""
    bound: float | None = None
    """None for Xavier's, where the first dimension is outputs and all others are inputs."""

    def draw(self) -> Tensor:
        generator = keyed_generator("weight", *self.key)
        draw = torch.empty(self.shape)
        if self.std is not None:
            return draw.normal_(0, self.std, generator=generator)
        bound = self.bound or math.sqrt(6 / (len(draw) + draw[0].numel()))
        return draw.uniform_(-bound, bound, generator=generator)


class InitialWeights:
    """Any range of any weight of a new model, as DiT-MoE starts: the output is exactly 0 and each block the identity.

    Xavier-uniform for every matrix (each expert's own), N(0, 0.02) for label table and timestep MLP, uniform +-1/sqrt(D)
    for routers, ones for the scales of LayerNorm, zeros for biases, adaLN, the final layer and what cross-attention adds.
    Matrices are drawn one by one, when they are read.

    Args:
        model: gives names and shapes; may be on the meta device, and hold the experts of one rank only.
    """

    def __init__(self, model: DiT, seed: int):
        self.matrices: dict[str, list[Matrix]] = {name: [] for name, _ in model.named_parameters()}
        self.ones: set[str] = set()
        for path, module in model.named_modules():
            name = f"{path}.weight"
            if isinstance(module, nn.Linear | nn.Conv2d):
                shape = tuple(module.weight.shape)
                if "modulation" in path or path.startswith("final") or path.endswith("cross.proj"):
                    continue
                if path.startswith("t_embed"):
                    self._add(name, shape, (seed, path), std=0.02)
                elif path.endswith("shared_mlp.w1"):
                    for half in ("gate", "up"):
                        self._add(name, (shape[0] // 2, shape[1]), (seed, path, half))
                else:
                    self._add(name, shape, (seed, path))
            elif isinstance(module, nn.LayerNorm):
                self.ones.add(name)
            elif isinstance(module, LabelEmbedder):
                self._add(f"{path}.table.weight", tuple(module.table.weight.shape), (seed, path), std=0.02)
            elif isinstance(module, Router):
                self._add(name, tuple(module.weight.shape), (seed, path), bound=1 / math.sqrt(module.weight.shape[1]))
            elif isinstance(module, PackedExperts):
                halves = ("gate", "up") if module.activation == "swiglu" else ("gate",)
                rows, dim = module.w1.shape[1:]
                for expert in range(model.config.experts):
                    for half in halves:
                        self._add(f"{path}.w1", (rows // len(halves), dim), (seed, path, expert, half))
                    self._add(f"{path}.w2", tuple(module.w2.shape[1:]), (seed, path, expert, "down"))

    def _add(self, name: str, shape: tuple[int, ...], key: tuple[int | str, ...], **law: float) -> None:
        before = self.matrices[name]
        start = before[-1].start + math.prod(before[-1].shape) if before else 0
        before.append(Matrix(start, shape, key, **law))

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill ``out`` (1-D) with the elements of the flattened logical tensor ``name`` from ``start`` on."""
        out.fill_(1.0 if name in self.ones else 0.0)
        stop = start + out.numel()
        for matrix in self.matrices[name]:
            low, high = max(start, matrix.start), min(stop, matrix.start + math.prod(matrix.shape))
            if low < high:
                out[low - start : high - start].copy_(matrix.draw().view(-1)[low - matrix.start : high - matrix.start])


@torch.no_grad()
def init_weights(model: DiT, seed: int) -> None:
    """Fill a whole model (EP 1) in place with its initial weights."""
    source = InitialWeights(model, seed)
    for name, parameter in model.named_parameters():
        source.read(name, 0, parameter.view(-1))
