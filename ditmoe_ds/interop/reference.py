"""Weights of the public DiT-MoE reference code, read into our model."""

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditmoe_ds.errors import CheckpointError
from ditmoe_ds.models.dit import DiT, DiTConfig
from ditmoe_ds.moe.routing import RouterConfig

CONTAINERS = ("ema", "model", "module", "state_dict")
"""Where the weights may lie in a checkpoint file, the preferred first; a bare state dict works too."""

_RENAMED = [
    (r"x_embedder\.proj\.(.*)", r"x_embed.\1"),
    (r"t_embedder\.(.*)", r"t_embed.\1"),
    (r"y_embedder\.embedding_table\.(.*)", r"y_embed.table.\1"),
    (r"(blocks\.\d+)\.attn\.Wqkv\.(.*)", r"\1.attn.qkv.\2"),
    (r"(blocks\.\d+)\.attn\.out_proj\.(.*)", r"\1.attn.proj.\2"),
    (r"(blocks\.\d+\.attn\.(?:qkv|proj|q_norm|k_norm)\..*)", r"\1"),
    (r"(blocks\.\d+)\.adaLN_modulation\.(.*)", r"\1.modulation.\2"),
    (r"(blocks\.\d+)\.moe\.gate\.weight", r"\1.mlp.deepspeed_moe.gate.weight"),
    (r"final_layer\.adaLN_modulation\.(.*)", r"final.modulation.\1"),
    (r"final_layer\.linear\.(.*)", r"final.linear.\1"),
]
_EXPERT = re.compile(r"(blocks\.\d+)\.moe\.(?:experts\.(?P<index>\d+)|shared_experts)\.(?P<matrix>gate|up|down)_proj\.weight")


def load_reference(
    path_or_state_dict: str | Path | dict[str, Any],
    *,
    top_k: int,
    num_heads: int,
    num_classes: int,
    input_size: int,
    balance_alpha: float = 0.005,
) -> DiT:
    """Build a model with the reference's weights; call it as ``model(x, t, y)``.

    What the shapes tell is read from them: width, depth, experts, patch, variance channels, qk-norm.

    Args:
        path_or_state_dict: a file (loaded with ``weights_only=True``) or its content, in any of ``CONTAINERS`` or bare,
            with or without a ``module.`` prefix.
        top_k, num_heads, num_classes, input_size, balance_alpha: what the shapes do not tell. Released rectified-flow
            weights expect t in [0, 1], not 0..1000.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    source = path_or_state_dict
    if not isinstance(source, dict):
        source = _read(Path(source))
    weights = _unwrap(source)
    for needed in ("x_embedder.proj.weight", "final_layer.linear.bias", "y_embedder.embedding_table.weight"):
        if needed not in weights:
            raise CheckpointError(f"{needed} is missing: this is no DiT-MoE checkpoint (its keys begin {list(weights)[:3]})")
    hidden, in_channels, patch, _ = weights["x_embedder.proj.weight"].shape
    out_channels = len(weights["final_layer.linear.bias"]) // patch**2
    config = DiTConfig(
        hidden=hidden,
        depth=1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks.")),
        heads=num_heads,
        patch=patch,
        input_size=input_size,
        in_channels=in_channels,
        num_classes=num_classes,
        experts=len(weights["blocks.0.moe.gate.weight"]),
        top_k=top_k,
        shared=len(weights["blocks.0.moe.shared_experts.gate_proj.weight"]) // hidden,
        qk_norm="blocks.0.attn.q_norm.weight" in weights,
        learn_variance=out_channels == 2 * in_channels,
        router=RouterConfig(balance_alpha=balance_alpha),
    )
    model = DiT(config)
    try:
        model.load_state_dict(_translate(weights))
    except RuntimeError as error:
        raise CheckpointError(f"the reference checkpoint does not fit {config}: {error}") from None
    return model


def _read(path: Path) -> dict[str, Any]:
    # the reference's training script stores its argparse options beside the weights; a Namespace holds data only
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, pickle.UnpicklingError, RuntimeError) as error:
            raise CheckpointError(f"{path} cannot be read as weights alone: {str(error).splitlines()[0]}") from None


def _unwrap(source: dict[str, Any]) -> dict[str, Tensor]:
    inner = next((source[name] for name in CONTAINERS if isinstance(source.get(name), dict)), source)
    return {key.removeprefix("module."): value for key, value in inner.items()}


def _translate(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename to our keys; pack experts and fuse each gate with its up projection. The position table is computed."""
    out: dict[str, Tensor] = {}
    packed: dict[str, dict[int, Tensor]] = {}
    for key, value in weights.items():
        expert = _EXPERT.fullmatch(key)
        if key == "pos_embed" or (expert and expert["matrix"] == "up"):
            continue
        if not expert:
            out[_rename(key)] = value
            continue
        matrix = "w2"
        if expert["matrix"] == "gate":
            matrix, up = "w1", key.replace("gate_proj", "up_proj")
            if up not in weights:
                raise CheckpointError(f"{up} is missing from the reference checkpoint")
            value = torch.cat([value, weights[up]])
        if expert["index"]:
            packed.setdefault(f"{expert[1]}.mlp.deepspeed_moe.experts.deepspeed_experts.0.{matrix}", {})[int(expert["index"])] = value
        else:
            out[f"{expert[1]}.mlp.shared_mlp.{matrix}.weight"] = value
    for name, matrices in packed.items():
        if sorted(matrices) != list(range(len(matrices))):
            raise CheckpointError(f"{name}: the reference checkpoint has experts {sorted(matrices)}, some are missing")
        out[name] = torch.stack([matrices[index] for index in range(len(matrices))])
    return out


def _rename(key: str) -> str:
    for pattern, replacement in _RENAMED:
        name, found = re.subn(rf"^{pattern}$", replacement, key)
        if found:
            return name
    raise CheckpointError(f"{key}: unknown tensor in the reference checkpoint")
