"""Named models and their exact size: ``DiT-MoE-XL/2-8E2A`` (sparse), ``DiT-XL/2`` (dense)."""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from ditmoe_ds.errors import ConfigError
from ditmoe_ds.models.dit import DiT, DiTConfig
from ditmoe_ds.models.embeddings import TimestepEmbedder


@dataclass(frozen=True)
class Size:
    depth: int
    hidden: int
    heads: int
    qk_norm: bool
    """Whether the published DiT-MoE of this size normalises q and k."""


SIZES = {
    "Nano": Size(2, 64, 4, False),  # ours, for tests
    "Tiny": Size(4, 128, 4, False),  # ours, for the demo on a CPU
    "S": Size(12, 384, 6, False),
    "B": Size(12, 768, 12, False),
    "L": Size(24, 1024, 16, False),
    "XL": Size(28, 1152, 16, True),
    "G": Size(40, 1408, 16, True),
}
_NAME = re.compile(r"DiT(?P<moe>-MoE)?-(?P<size>\w+)/(?P<patch>[248])(?:-(?P<experts>\d+)E(?P<top_k>\d+)A)?")


def named_config(name: str, **overrides: Any) -> DiTConfig:
    """The configuration behind a model name; ``overrides`` are fields of ``DiTConfig``.

    Raises:
        ConfigError: no such model, or more experts chosen than there are.
    """
    match = _NAME.fullmatch(name)
    if not match or match["size"] not in SIZES or bool(match["moe"]) != bool(match["experts"]):
        raise ConfigError("model.name", name, f"write DiT-MoE-SIZE/PATCH-nEkA or DiT-SIZE/PATCH; sizes {', '.join(SIZES)}, patch 2, 4 or 8")
    size = SIZES[match["size"]]
    fields: dict[str, Any] = dict(depth=size.depth, hidden=size.hidden, heads=size.heads, patch=int(match["patch"]))
    if match["moe"]:
        fields.update(experts=int(match["experts"]), top_k=int(match["top_k"]), qk_norm=size.qk_norm)
        if not 1 <= fields["top_k"] <= fields["experts"]:
            raise ConfigError("model.name", name, f"{fields['top_k']} of {fields['experts']} experts cannot be chosen")
    return DiTConfig(**fields | overrides)


def parameter_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the whole model (EP 1) and its shape, without allocating it."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in DiT(config).named_parameters()}


def describe(config: DiTConfig) -> dict[str, Any]:
    """Count parameters and multiply-accumulates without allocating them.

    Returns:
        ``total`` and ``active`` parameters (active: those that one token meets), ``parts``, and ``linear_gmacs`` /
        ``gmacs``: 10^9 multiply-accumulates of one image's forward, without and with attention's two matrix products.
        The fixed position table counts, as in the published figures.
    """
    parts: dict[str, int] = {"position_table": config.tokens * config.hidden}
    for name, shape in parameter_shapes(config).items():
        part = _part(name)
        parts[part] = parts.get(part, 0) + math.prod(shape)
    total = sum(parts.values())
    idle = config.experts - config.top_k
    active = total - (parts["routed_experts"] * idle // config.experts if config.experts else 0)

    h, N, L = config.hidden, config.tokens, config.depth
    feed_forward = 8 * h * h
    if config.experts:
        matrices = 3 if config.expert_activation == "swiglu" else 2
        feed_forward = matrices * config.top_k * h * config.expert_width + 3 * h * config.shared * h + config.experts * h
    per_token = L * (4 * h * h + feed_forward) + config.patch**2 * h * (config.in_channels + config.out_channels)
    per_image = L * 6 * h * h + 2 * h * h + (TimestepEmbedder.frequencies * h + h * h)
    linear = N * per_token + per_image
    return dict(
        total=total,
        active=active,
        parts=parts,
        linear_gmacs=round(linear / 1e9, 2),
        gmacs=round((linear + L * 2 * N * N * h) / 1e9, 2),
        tokens=N,
    )


def _part(name: str) -> str:
    for needle, part in (
        ("deepspeed_experts", "routed_experts"),
        ("shared_mlp", "shared_experts"),
        ("gate.weight", "routers"),
        (".mlp.", "dense_mlp"),
        (".attn.", "attention"),
        ("modulation", "adaln"),
        ("final.", "final_layer"),
    ):
        if needle in name and not name.startswith("t_embed"):
            return part
    return "embeddings"
