"""Named models and their exact size: ``DiT-MoE-XL/2-8E2A`` (sparse), ``DiT-XL/2`` (dense)."""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from ditmoe_ds.config import build
from ditmoe_ds.errors import CheckpointError, ConfigError
from ditmoe_ds.models.dit import DiT, DiTConfig, Recompute
from ditmoe_ds.models.embeddings import TimestepEmbedder


@dataclass(frozen=True)
class Size:
    """Dimensions of a DiT and of the DiT-MoE of the same name."""

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


@dataclass(frozen=True)
class TextSize:
    """Dimensions of an EC-DIT; see ``DiTConfig``."""

    depth: int
    """Layers of the sparse model."""
    dense_depth: int
    """Layers of the dense one."""
    hidden: int
    heads: int
    kv_heads: int
    condition: int


# The width of adaLN's vector is not published; with 1280 all five published totals agree (docs/models.md).
TEXT_SIZES = {
    "Nano": TextSize(4, 4, 64, 4, 2, 48),  # ours, for tests
    "Tiny": TextSize(8, 8, 128, 4, 2, 128),  # ours, for the demo on a CPU
    "XL": TextSize(28, 28, 1152, 18, 6, 1280),
    "XXL": TextSize(38, 38, 1536, 24, 6, 1280),
    "3XL": TextSize(42, 42, 2304, 36, 6, 1280),
    "M": TextSize(38, 46, 3072, 48, 12, 1280),
}
_TEXT_NAME = re.compile(r"EC-DIT-(?P<size>\w+?)(?:-(?P<experts>\d+)E)?")


def named_config(name: str, **overrides: Any) -> DiTConfig:
    """The configuration behind a model name; ``overrides`` are fields of ``DiTConfig``.

    Raises:
        ConfigError: no such model, or more experts chosen than there are.
    """
    if match := _TEXT_NAME.fullmatch(name):
        return _text_config(name, match, overrides)
    match = _NAME.fullmatch(name)
    if not match or match["size"] not in SIZES or bool(match["moe"]) != bool(match["experts"]):
        fix = f"write DiT-MoE-SIZE/PATCH-nEkA or DiT-SIZE/PATCH; sizes {', '.join(SIZES)}, patch 2, 4 or 8; or EC-DIT-SIZE-nE"
        raise ConfigError("model.name", name, fix)
    size = SIZES[match["size"]]
    fields: dict[str, Any] = dict(depth=size.depth, hidden=size.hidden, heads=size.heads, patch=int(match["patch"]))
    if match["moe"]:
        fields.update(experts=int(match["experts"]), top_k=int(match["top_k"]), qk_norm=size.qk_norm)
        if not 1 <= fields["top_k"] <= fields["experts"]:
            raise ConfigError("model.name", name, f"{fields['top_k']} of {fields['experts']} experts cannot be chosen")
    return DiTConfig(**fields | overrides)


def _text_config(name: str, match: re.Match[str], overrides: dict[str, Any]) -> DiTConfig:
    """EC-DIT's: text instead of classes, and experts, which choose two tokens' worth each, in every second layer."""
    if match["size"] not in TEXT_SIZES:
        raise ConfigError("model.name", name, f"write EC-DIT-SIZE-nE, or EC-DIT-SIZE for the dense one; sizes {', '.join(TEXT_SIZES)}")
    size, experts = TEXT_SIZES[match["size"]], int(match["experts"] or 0)
    fields: dict[str, Any] = dict(
        depth=size.depth if experts else size.dense_depth,
        hidden=size.hidden,
        heads=size.heads,
        kv_heads=size.kv_heads,
        num_classes=0,
        text_width=1280,
        condition=size.condition,
        positions="rope",
        experts=experts,
        sparse_first=1,
        sparse_every=2,
        routing="expert",
        shared=0,
        expert_activation="gelu",
        mlp_bias=False,
        qk_norm=True,
        learn_variance=False,
    )
    if match["experts"] and experts < 2:
        raise ConfigError("model.name", name, f"{experts} experts are no choice; leave out -{experts}E for the dense model")
    return DiTConfig(**fields | overrides)


def described(model: dict[str, Any], tensors: int) -> DiTConfig:
    """The model that weights of so many tensors say they are of; ``model``: fields of ``DiTConfig``.

    Raises:
        CheckpointError: it has more layers than that, and to build it might take minutes.
    """
    config = build(DiTConfig, model)
    if config.depth > tensors:
        raise CheckpointError(f"the model has {config.depth} layers, the weights {tensors} tensors")
    return config


def parameter_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the whole model (EP 1) and its shape, without allocating it."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in DiT(config).named_parameters()}


def describe(config: DiTConfig, text_tokens: int = 77) -> dict[str, Any]:
    """Count parameters and multiply-accumulates without allocating them.

    Args:
        text_tokens: of a caption, for models with text.

    Returns:
        ``total`` and ``active`` parameters (active: those that one token meets, on average), ``parts``, and
        multiply-accumulates of one image's forward: ``macs``, as 10^9 of them ``gmacs``, and ``linear_gmacs`` without
        attention's two matrix products. A fixed position table counts, as in the published figures.
    """
    parts: dict[str, int] = {"position_table": config.tokens * config.hidden} if config.positions == "sincos" else {}
    for name, shape in parameter_shapes(config).items():
        part = _part(name)
        parts[part] = parts.get(part, 0) + math.prod(shape)
    total = sum(parts.values())
    sparse = len(config.routed_layers)
    met = sum(map(config.capacity, config.routed_layers)) / (sparse * config.experts) if sparse else 1.0
    idle = parts.get("routed_experts", 0) * (1 - met)

    linear, attention = macs(config, config.tokens, text_tokens if config.text_width else 0)
    return dict(
        total=total,
        active=round(total - idle),
        parts=parts,
        linear_gmacs=round(linear / 1e9, 2),
        gmacs=round((linear + attention) / 1e9, 2),
        macs=linear + attention,
        tokens=config.tokens,
    )


def macs(config: DiTConfig, tokens: int, text_tokens: int) -> tuple[int, int]:
    """Multiply-accumulates of one image's forward: of linear layers (of experts, those that a token meets), and of attention's two
    matrix products.

    Args:
        tokens: patches of the image that the network sees.
        text_tokens: of its caption; 0 for models without text.
    """
    h, N, T, L = config.hidden, tokens, text_tokens, config.depth
    shared = len(config.routed_layers) * 3 * h * config.shared * h
    feed_forwards = N * ((L - len(config.sparse_layers)) * 8 * h * h + shared) + expert_macs(config, N)
    projections, products = attention_macs(config, N, T)
    return feed_forwards + projections + uncut_macs(config, N, T), products


def expert_macs(config: DiTConfig, tokens: int) -> int:
    """The part of ``macs`` in routed experts or their dense twins, without the takings that a capacity factor drops."""
    matrices, left = 3 if config.expert_activation == "swiglu" else 2, 1.0
    if config.routing == "token" and config.router.capacity_factor:
        left = min(config.router.capacity_factor, 1.0)
    units = sum(round(left * config.capacity(layer) * config.expert_width) for layer in config.sparse_layers)
    return matrices * config.hidden * units * tokens


def uncut_macs(config: DiTConfig, tokens: int, text_tokens: int) -> int:
    """The part of ``macs`` that tensor parallelism leaves whole on every rank: embeddings, routers, adaLN and the final layer."""
    h, c, N, T, L = config.hidden, config.condition_width, tokens, text_tokens, config.depth
    per_token = config.patch**2 * h * (config.in_channels + config.out_channels)
    per_token += len(config.routed_layers) * config.experts * h
    per_image = L * 6 * h * c + 2 * h * c + TimestepEmbedder.frequencies * c + c * c
    if T:
        per_image += T * (config.text_width * h + h * h) + config.text_width * c
    return N * per_token + per_image


def attention_macs(config: DiTConfig, tokens: int, text_tokens: int) -> tuple[int, int]:
    """The parts of ``macs`` in attention's projections, those for the text included, and in its two matrix products."""
    h, N, T, L = config.hidden, tokens, text_tokens, config.depth
    kv = h * (config.kv_heads or config.heads) // config.heads
    projections = N * (2 * h * h + 2 * h * kv) + (N + T) * 2 * h * h * bool(T)
    return L * projections, L * 2 * N * (N + T) * h


def recomputed_macs(config: DiTConfig, tokens: int, text_tokens: int, recompute: Recompute) -> int:
    """Multiply-accumulates of an image's forward that backward computes again."""
    if recompute == "attention":
        return sum(attention_macs(config, tokens, text_tokens))
    return sum(macs(config, tokens, text_tokens)) if recompute else 0


def _part(name: str) -> str:
    for needle, part in (
        ("deepspeed_experts", "routed_experts"),
        ("shared_mlp", "shared_experts"),
        ("gate.weight", "routers"),
        (".mlp.", "dense_mlp"),
        (".attn.", "attention"),
        (".cross.", "cross_attention"),
        ("modulation", "adaln"),
        ("final.", "final_layer"),
    ):
        if needle in name and not name.startswith("t_embed"):
            return part
    return "embeddings"
