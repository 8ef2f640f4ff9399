"""Weights of the public DiT-MoE reference code, in and out."""

import argparse
import math
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ditmoe_ds.diffusion.objectives import DiffusionConfig
from ditmoe_ds.distributed.tensorfile import Entry, TensorFile
from ditmoe_ds.distributed.weights import DTYPES, Tensors, Weights, new_folder, open_shards, write_shards
from ditmoe_ds.errors import CheckpointError, ConfigError, in_a_line
from ditmoe_ds.interop.layout import Layout, assemble, disassemble, from_memory, refuse_settings_without_place
from ditmoe_ds.models.dit import DiT, DiTConfig
from ditmoe_ds.models.embeddings import position_table
from ditmoe_ds.models.sizes import described, parameter_shapes
from ditmoe_ds.moe.routing import RouterConfig
from ditmoe_ds.pipelines.run import load_model

CONTAINERS = ("ema", "model", "module", "state_dict")
"""Keys under which a checkpoint file may hold the weights, the preferred first; a bare state dict works too."""

_SETTINGS = {"hidden", "depth", "heads", "patch", "input_size", "in_channels", "num_classes", "experts", "top_k", "shared", "qk_norm"}
_SETTINGS |= {"learn_variance", "router.balance_alpha", "router.balance_scope", "router.z_alpha"}
"""Settings that the reference's model has, or that matter in training only."""

_RENAMED = {
    "x_embed.": "x_embedder.proj.",
    "t_embed.": "t_embedder.",
    "y_embed.table.": "y_embedder.embedding_table.",
    ".mlp.deepspeed_moe.gate.": ".moe.gate.",
    "final.": "final_layer.",
    "modulation.": "adaLN_modulation.",
}
_RENAMED_QK_NORM = {".attn.qkv.": ".attn.Wqkv.", ".attn.proj.": ".attn.out_proj."}


def layout(config: DiTConfig) -> Layout:
    """In their names: experts one by one, gate and up apart, attention named by whether it has qk-norm."""
    out: Layout = {}
    for name, shape in parameter_shapes(config).items():
        block, _, rest = name.partition(".mlp.")
        matrices = ("gate", "up") if "w1" in rest else ("down",)
        if "deepspeed_experts" in rest:
            piece = (shape[1] // len(matrices), shape[2])
            out[name] = [(f"{block}.moe.experts.{e}.{matrix}_proj.weight", piece) for e in range(shape[0]) for matrix in matrices]
        elif "shared_mlp" in rest:
            piece = (shape[0] // len(matrices), shape[1])
            out[name] = [(f"{block}.moe.shared_experts.{matrix}_proj.weight", piece) for matrix in matrices]
        else:
            key = name
            for ours, theirs in (_RENAMED | (_RENAMED_QK_NORM if config.qk_norm else {})).items():
                key = key.replace(ours, theirs)
            out[name] = [(key, shape)]
    return out


def reference_weights(
    source: str | Path | dict[str, Any],
    *,
    top_k: int,
    num_heads: int,
    num_classes: int,
    input_size: int,
    objective: Literal["rectified_flow", "ddpm"],
    balance_alpha: float = 0.005,
    time_scale: float = 1.0,
) -> Weights:
    """Open weights of the reference code.

    What follows from the shapes is read from them: width, depth, experts, patch, variance channels, qk-norm.

    Args:
        source: a file of ``torch.save`` (read whole, with ``weights_only=True``) in any of ``CONTAINERS`` or bare, with or
            without a ``module.`` prefix, or its content; a safetensors file, or a folder with ``model.safetensors.index.json``.
        top_k, num_heads, num_classes, input_size, objective, balance_alpha: what does not follow from the shapes.
        time_scale: factor on rectified flow's t before the model sees it: 1 for the released weights.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
        ConfigError: a setting that contradicts the shapes.
    """
    theirs = _open(source)
    shapes = theirs.shapes
    for needed, dimensions in {
        "x_embedder.proj.weight": 4,
        "final_layer.linear.bias": 1,
        "blocks.0.moe.gate.weight": 2,
        "blocks.0.moe.shared_experts.gate_proj.weight": 2,
    }.items():
        if len(shapes.get(needed, ())) != dimensions:
            raise CheckpointError(f"{needed} is missing: this is no DiT-MoE checkpoint (its keys begin {list(shapes)[:3]})")
    hidden, in_channels, patch, _ = shapes["x_embedder.proj.weight"]
    experts, tokens = shapes["blocks.0.moe.gate.weight"][0], (input_size // patch) ** 2
    if num_heads < 1 or hidden % num_heads:
        raise ConfigError("--heads", num_heads, f"must divide the width {hidden}")
    if input_size < patch or input_size % patch:
        raise ConfigError("--input-size", input_size, f"must divide by the patch of {patch}")
    if not 0 <= balance_alpha < math.inf:
        raise ConfigError("--balance-alpha", balance_alpha, "a number, at least 0")
    if not 0 < time_scale < math.inf:
        raise ConfigError("--time-scale", time_scale, "a number above 0")
    if objective == "ddpm" and time_scale != 1:
        raise ConfigError("--time-scale", time_scale, "is of rectified_flow; leave it out")
    if not 1 <= top_k <= experts:
        raise ConfigError("--top-k", top_k, f"the checkpoint has {experts} experts")
    if "pos_embed" in shapes and shapes["pos_embed"][1] != tokens:
        right = round(shapes["pos_embed"][1] ** 0.5) * patch
        raise ConfigError("--input-size", input_size, f"the checkpoint's position table is for {right}")
    config = DiTConfig(
        hidden=hidden,
        depth=len({match[1] for match in map(re.compile(r"blocks\.(\d+)\.").match, shapes) if match}),  # no more than there are tensors
        heads=num_heads,
        patch=patch,
        input_size=input_size,
        in_channels=in_channels,
        num_classes=num_classes,
        experts=experts,
        top_k=top_k,
        shared=shapes["blocks.0.moe.shared_experts.gate_proj.weight"][0] // hidden,
        qk_norm="blocks.0.attn.q_norm.weight" in shapes,
        learn_variance=shapes["final_layer.linear.bias"][0] == 2 * in_channels * patch**2,
        router=RouterConfig(balance_alpha=balance_alpha),
    )
    # ddpm ignores the scale: it passes its step 0..999 to the embedding
    diffusion = DiffusionConfig(objective, time_scale=time_scale if objective == "rectified_flow" else 1000.0)
    description = dict(name=None, model=asdict(config), diffusion=asdict(diffusion), latents={}, step=0, weights="reference")
    return assemble(theirs, layout(config), description, ignored=("pos_embed",))


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

    The arguments and errors are those of ``reference_weights``. Released rectified-flow weights expect t in [0, 1], not 0..1000.
    """
    settings = dict(top_k=top_k, num_heads=num_heads, num_classes=num_classes, input_size=input_size, balance_alpha=balance_alpha)
    return load_model(reference_weights(path_or_state_dict, objective="rectified_flow", **settings))  # type: ignore[arg-type]


def export_reference(weights: Weights, out: Path, dtype: str, shard_bytes: int) -> None:
    """Write weights as the reference code names them, with the position table it stores.

    Args:
        out: a new folder of safetensors shards; or a file ``*.pt``, one state dict for ``torch.load``, which needs memory
            for the whole model at once.

    Raises:
        CheckpointError: the model has a setting that the reference's lacks, or ``out`` exists or does not fit on the disk.
    """
    config = described(weights.description["model"], len(weights.shapes))
    refuse_settings_without_place(config, _SETTINGS, "the reference code")
    if not config.experts or not config.shared:
        raise CheckpointError("the reference code knows sparse models with shared experts only; use --to diffusers or safetensors")
    shape = weights.description["latents"].get("shape", (config.in_channels, config.input_size, config.input_size))
    if tuple(shape[1:]) != (config.input_size, config.input_size):
        raise CheckpointError(f"the reference code knows square latents only, these are {shape[1]}x{shape[2]}; use --to diffusers")
    table = position_table(config.input_size // config.patch, config.input_size // config.patch, config.hidden)[None]
    entries = [Entry("pos_embed", DTYPES[dtype], tuple(table.shape), lambda: table)]
    entries += disassemble(weights, layout(config), DTYPES[dtype])
    if out.suffix != ".pt":
        with new_folder(out) as folder:
            write_shards(folder, "model", entries, shard_bytes)
        return
    if out.exists():
        raise CheckpointError(f"{out}: exists already; choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(out.name + ".partial")
    tensors = {entry.key: entry.fetch().to(entry.dtype) for entry in entries}
    try:
        torch.save(tensors, unfinished)
        os.replace(unfinished, out)
    except (OSError, RuntimeError) as error:  # torch's own do not say why
        raise CheckpointError(f"{out}: cannot be written; is the disk full? ({in_a_line(error)})") from None
    finally:
        unfinished.unlink(missing_ok=True)


def _open(source: str | Path | dict[str, Any]) -> Tensors:
    if not isinstance(source, dict):
        path = Path(source)
        if path.is_dir():
            return open_shards(path, "model")
        if path.suffix == ".safetensors":
            file = TensorFile(path)
            return Tensors(file.shapes, file.read)
        source = _load(path)
    inner: dict[str, Tensor] = next((source[name] for name in CONTAINERS if isinstance(source.get(name), dict)), source)
    return from_memory({str(key).removeprefix("module."): value for key, value in inner.items()})


def _load(path: Path) -> dict[str, Any]:
    # the reference's training script stores its argparse options beside the weights; a Namespace holds data only
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise CheckpointError(f"{path}: not readable ({error.strerror})") from None
        except Exception:  # of many kinds; what torch advises, to load it without weights_only, would run what the file holds
            fix = "it is damaged, or holds more than tensors: save the state dict alone, or as safetensors"
            raise CheckpointError(f"{path} cannot be read as weights alone: {fix}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, not a state dict")
    return found
