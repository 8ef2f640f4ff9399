"""A dense DiT becomes a Mixture-of-Experts that computes the same.

Every expert is a copy of the layer's dense MLP, or one of ``split`` equal slices of a copy's hidden units. The kept scores
are renormalised, so that the weights of a token's copies add up to 1 whatever the router says; slices of one copy have equal
router rows, so a token takes all of them or none. Sources: arXiv 2212.05055 (copies), arXiv 2410.07524 (slices and
their router). Renormalised rather than scaled by E / k: that would be exact only for a uniform router, in which
fp32 scores tie and tear slices of a copy apart.
"""

import math
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ditmoe_ds.distributed.weights import Weights
from ditmoe_ds.errors import CheckpointError, ConfigError
from ditmoe_ds.models.sizes import described, parameter_shapes
from ditmoe_ds.moe.routing import RouterConfig
from ditmoe_ds.rng import keyed_generator

_EXPERTS = "deepspeed_moe.experts.deepspeed_experts.0."
_GATE = "deepspeed_moe.gate.weight"
_DENSE = {"w1": "w1.weight", "b1": "w1.bias", "w2": "w2.weight", "b2": "w2.bias"}


def upcycle(dense: Weights, experts: int, top_k: int, split: int = 1, noise: float = 0.0, seed: int = 0) -> Weights:
    """Weights of the sparse model; nothing is read yet. It routes by token choice, whatever the dense model's family: with expert choice,
    tokens that no expert takes would get nothing.

    Args:
        dense: of a DiT without experts.
        experts, top_k: of every layer; multiples of ``split``.
        split: slices per copy. An expert's hidden width is 4D / split.
        noise: standard deviation of what is added to every copy's matrices, relative to the matrix's own.
        seed: of router and noise.

    Raises:
        CheckpointError: ``dense`` is sparse already, or the dense twin of a sparse model.
        ConfigError: numbers that do not go together.
    """
    old = described(dense.description["model"], len(dense.shapes))
    if old.experts and old.routing == "dense":
        raise CheckpointError("the model to upcycle is the dense twin of a sparse one, with MLPs of other widths; give a plain DiT")
    if old.experts:
        raise CheckpointError(f"the model to upcycle has {old.experts} experts already; give a dense one")
    if split < 1 or 4 * old.hidden % (8 * split):  # in bf16 a grouped GEMM takes widths that are multiples of 16 bytes
        fix = f"must cut the {4 * old.hidden} hidden units of the dense MLP into slices of 8, or a multiple of 8"
        raise ConfigError("--split", split, fix)
    if experts < 1 or experts % split:
        raise ConfigError("--experts", experts, f"must be a multiple of --split {split}")
    if not 0 <= noise < math.inf:
        raise ConfigError("--noise", noise, "at least 0")
    if not 1 <= top_k <= experts or top_k % split:
        raise ConfigError("--top-k", top_k, f"must be a multiple of --split {split} and at most --experts {experts}")
    new = replace(
        old,
        experts=experts,
        top_k=top_k,
        routing="token",
        shared=0,
        expert_activation="gelu",
        expert_hidden=4 * old.hidden // split,
        router=RouterConfig(renormalise=True, route_scale=float(split)),
    )
    shapes = parameter_shapes(new)

    def matrix(name: str, index: int) -> Tensor:
        """Row ``index`` of an (E, ...) parameter, flattened: a router row or an expert's weight."""
        block, _, part = name.partition(".mlp.")
        copy, piece = divmod(index, split)
        if part == _GATE:
            bound = 1 / math.sqrt(old.hidden)
            return torch.empty(old.hidden).uniform_(-bound, bound, generator=keyed_generator("upcycle", seed, name, copy))
        kind = part.removeprefix(_EXPERTS)
        value = dense.tensor(f"{block}.mlp.{_DENSE[kind]}")
        if noise and kind in ("w1", "w2"):
            draw = torch.empty_like(value).normal_(generator=keyed_generator("upcycle", seed, name, copy))
            value += draw * (noise * value.std())
        if kind == "b2":
            return value / split
        return value.chunk(split, dim=1 if kind == "w2" else 0)[piece].reshape(-1)

    def read(name: str, start: int, out: Tensor) -> None:
        if name in dense.shapes:
            dense.read(name, start, out)
            return
        stop, size = start + out.numel(), math.prod(shapes[name][1:])
        for index in range(start // size, -(-stop // size)):
            low, high = max(start, index * size), min(stop, (index + 1) * size)
            out[low - start : high - start] = matrix(name, index)[low - index * size : high - index * size]

    description: dict[str, Any] = dense.description | dict(name=None, model=asdict(new), step=0, weights="upcycled")
    return Weights(shapes, read, description)
