"""diffusers pipelines: our models out and back in, and diffusers' stock DiT in."""

import json
import re
import shutil
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from ditmoe_ds import config as configuration
from ditmoe_ds.diffusion.objectives import DiffusionConfig
from ditmoe_ds.diffusion.sampling import make_scheduler
from ditmoe_ds.distributed.weights import DTYPES, Tensors, Weights, new_folder, open_shards, write_json, write_shards
from ditmoe_ds.errors import CheckpointError, ConfigError
from ditmoe_ds.interop.layout import Layout, assemble, disassemble, refuse_settings_without_place
from ditmoe_ds.latents.vae import decoder_space, latent_space, load_vae
from ditmoe_ds.models.dit import DiTConfig
from ditmoe_ds.models.sizes import described, parameter_shapes

FILES = Path(__file__).parent / "diffusers_files"
STEM = "diffusion_pytorch_model"
PIPELINE, TRANSFORMER = "DiTMoEPipeline", "DiTMoETransformer2DModel"

_SETTINGS = {"hidden", "depth", "heads", "patch", "input_size", "in_channels", "num_classes", "experts", "top_k", "shared", "qk_norm"}
_SETTINGS |= {"learn_variance", "expert_activation", "expert_hidden", "frequency_shift", "router.renormalise", "router.route_scale"}
_SETTINGS |= {"router.balance_alpha", "router.balance_scope", "router.z_alpha"}
"""What ``transformer_ditmoe.py`` implements, and what matters in training alone."""


def layout(config: DiTConfig) -> Layout:
    """In our names, without the parts of them that DeepSpeed's modules add."""
    shorter = {".mlp.deepspeed_moe.gate.": ".mlp.router.", ".mlp.deepspeed_moe.experts.deepspeed_experts.0.": ".mlp.experts."}
    out: Layout = {}
    for name, shape in parameter_shapes(config).items():
        key = name
        for ours, theirs in shorter.items():
            key = key.replace(ours, theirs)
        out[name] = [(key, shape)]
    return out


def export_diffusers(weights: Weights, out: Path, dtype: str, shard_bytes: int, vae_folder: str | None = None) -> bool:
    """Write a pipeline folder that loads without this package:
    ``DiffusionPipeline.from_pretrained(out, custom_pipeline="pipeline_ditmoe", trust_remote_code=True)``.

    Args:
        vae_folder: folder of the VAE, instead of the one that the weights name, if they name any.

    Returns:
        Whether the VAE is in it: the run's, if that is a local folder.

    Raises:
        CheckpointError: the model has a setting that the shipped code lacks, or ``out`` is not empty.
        ConfigError, DataError: no such ``vae_folder``, or one of other latents; the run's VAE cannot be read, or has changed since.
    """
    config = described(weights.description["model"], len(weights.shapes))
    refuse_settings_without_place(config, _SETTINGS, "the diffusers model (another way: docs/weights.md)")
    diffusion = configuration.build(DiffusionConfig, weights.description["diffusion"])
    latents = weights.description["latents"]
    if vae_folder:
        if not Path(vae_folder).is_dir():
            raise ConfigError("--vae", vae_folder, "no such folder; download it first")
        space = decoder_space(vae_folder, config.in_channels)
        latents = dict(scaling_factor=space.scaling_factor, shift_factor=space.shift_factor) | latents
        latents |= dict(vae=vae_folder, vae_sha256=None)
    local = "vae" in latents and Path(latents["vae"]).is_dir()
    vae = load_vae(latents["vae"], "cpu", latents.get("vae_sha256")) if local else None
    scheduler = make_scheduler(diffusion)
    with new_folder(out) as folder:
        (folder / "transformer").mkdir()
        write_shards(folder / "transformer", STEM, disassemble(weights, layout(config), DTYPES[dtype]), shard_bytes)
        settings = {key: value for key, value in asdict(config).items() if key == "router" or key in _SETTINGS}
        write_json(
            folder / "transformer" / "config.json",
            dict(_class_name=TRANSFORMER, _step=weights.description["step"], **settings, diffusion=asdict(diffusion)),
        )
        shutil.copyfile(FILES / "transformer_ditmoe.py", folder / "transformer" / "transformer_ditmoe.py")
        shutil.copyfile(FILES / "pipeline_ditmoe.py", folder / "pipeline_ditmoe.py")
        scheduler.save_pretrained(folder / "scheduler")
        if vae:
            with tempfile.TemporaryDirectory() as made:  # safetensors gives its files to their owner alone
                vae.save_pretrained(made)  # no copy: there may be more in it, and links to anywhere
                shutil.copytree(made, folder / "vae", copy_function=shutil.copyfile)
        index = dict(
            _class_name=["pipeline_ditmoe", PIPELINE],
            transformer=["transformer_ditmoe", TRANSFORMER],
            scheduler=["diffusers", type(scheduler).__name__],
            vae=["diffusers", type(vae).__name__] if vae else [None, None],
            scaling_factor=latents.get("scaling_factor"),
            shift_factor=latents.get("shift_factor"),
            class_names=latents.get("class_names"),
            latent_shape=latents.get("shape"),
        )
        write_json(folder / "model_index.json", index)
    return vae is not None


def diffusers_weights(path: Path) -> Weights:
    """Open a pipeline folder of ours (an export, or what ``DiTMoEPipeline.save_pretrained`` writes), or one of diffusers' stock DiT
    (``DiTTransformer2DModel``); its transformer folder will do.

    Raises:
        CheckpointError: another model, a setting that ours lacks, or a damaged folder.
    """
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    settings = _read_json(folder / "config.json")
    index = _read_json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    latents: dict[str, Any] = {}
    if (path / "vae").is_dir():
        vae = str((path / "vae").absolute())
        space = latent_space(vae)
        latents = dict(vae=vae, scaling_factor=space.scaling_factor, shift_factor=space.shift_factor)
    if "max_tokens" in index:  # its text encoder and tokenizer are in two folders there: the user has to name one of both
        latents["text"] = dict(encoder=None, max_tokens=index["max_tokens"], sha256=None)
    named = dict(scaling_factor="scaling_factor", shift_factor="shift_factor", class_names="class_names", shape="latent_shape")
    latents |= {ours: index[theirs] for ours, theirs in named.items() if index.get(theirs) is not None}
    description = dict(name=None, latents=latents, step=settings.get("_step", 0), weights="diffusers")
    kind = settings.get("_class_name")
    try:
        if kind == TRANSFORMER:
            model = {field.name: settings[field.name] for field in fields(DiTConfig) if field.name in settings}
            description["diffusion"], tensors = settings["diffusion"], open_shards(folder, STEM)
            config = described(model, len(tensors.shapes))
            return assemble(tensors, layout(config), description | dict(model=asdict(config)))
        if kind == "DiTMoETransformer":
            description["diffusion"], tensors = settings["diffusion"], open_shards(folder, STEM)
            config = described(settings["model"], len(tensors.shapes))
            ours: Layout = {name: [(f"dit.{name}", shape)] for name, shape in parameter_shapes(config).items()}
            return assemble(tensors, ours, description | dict(model=asdict(config)))
        if kind in ("DiTTransformer2DModel", "Transformer2DModel") and settings.get("norm_type") == "ada_norm_zero":
            return _stock(folder, settings, description)
    except KeyError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error} is missing") from None
    raise CheckpointError(f"{folder}: a {kind}, neither an export of ours nor diffusers' DiTTransformer2DModel")


_NEEDED = dict(activation_fn="gelu-approximate", attention_bias=True, norm_elementwise_affine=False, upcast_attention=False)
"""Settings of the stock DiT that ours has built in, with diffusers' defaults."""

_STOCK = {
    "x_embed.": ["pos_embed.proj."],
    "t_embed.mlp.0.": ["transformer_blocks.0.norm1.emb.timestep_embedder.linear_1."],
    "t_embed.mlp.2.": ["transformer_blocks.0.norm1.emb.timestep_embedder.linear_2."],
    "y_embed.table.": ["transformer_blocks.0.norm1.emb.class_embedder.embedding_table."],
    "final.modulation.1.": ["proj_out_1."],
    "final.linear.": ["proj_out_2."],
}
_STOCK_BLOCK = {
    "attn.qkv.": ["attn1.to_q.", "attn1.to_k.", "attn1.to_v."],
    "attn.proj.": ["attn1.to_out.0."],
    "mlp.w1.": ["ff.net.0.proj."],
    "mlp.w2.": ["ff.net.2."],
    "modulation.1.": ["norm1.linear."],
}


def _stock(folder: Path, settings: dict[str, Any], description: dict[str, Any]) -> Weights:
    """diffusers' dense DiT, exact but for the LayerNorm before the MLP: eps 1e-6 here (as DiT), 1e-5 there by default."""
    for key, value in _NEEDED.items():
        if settings.get(key, value) != value:
            raise CheckpointError(f"{folder}: {key}={settings[key]!r} cannot be represented, only {value!r}")
    heads, in_channels = settings["num_attention_heads"], settings["in_channels"]
    out_channels = settings.get("out_channels") or in_channels
    if out_channels not in (in_channels, 2 * in_channels):
        raise CheckpointError(f"{folder}: out_channels={out_channels} is neither in_channels={in_channels} nor twice that")
    tensors = open_shards(folder, STEM)
    model = dict(
        hidden=heads * settings["attention_head_dim"],
        depth=settings["num_layers"],
        heads=heads,
        patch=settings["patch_size"],
        input_size=settings["sample_size"],
        in_channels=in_channels,
        num_classes=settings["num_embeds_ada_norm"],
        learn_variance=out_channels == 2 * in_channels,
        frequency_shift=1,
    )
    config = described(model, len(tensors.shapes))
    renamed = dict(_STOCK)
    for i in range(config.depth):
        for ours, theirs in _STOCK_BLOCK.items():
            renamed[f"blocks.{i}.{ours}"] = [f"transformer_blocks.{i}.{key}" for key in theirs]
    layout: Layout = {}
    for name, shape in parameter_shapes(config).items():
        ours = next(prefix for prefix in renamed if name.startswith(prefix))
        piece = (shape[0] // len(renamed[ours]), *shape[1:])
        layout[name] = [(key + name.removeprefix(ours), piece) for key in renamed[ours]]
    scheduler = _read_json(folder.parent / "scheduler" / "scheduler_config.json") if (folder.parent / "scheduler").is_dir() else {}
    for key, value in dict(prediction_type="epsilon", beta_schedule="linear", beta_start=1e-4, beta_end=0.02, trained_betas=None).items():
        if scheduler.get(key, value) != value:
            raise CheckpointError(f"{folder.parent}: the scheduler's {key}={scheduler[key]!r} cannot be represented, only {value!r}")
    copies = [key for key in tensors.shapes if re.match(r"transformer_blocks\.[1-9]\d*\.norm1\.emb\.", key)]
    _check_equal(folder, tensors, copies)
    diffusion = DiffusionConfig(objective="ddpm")
    return assemble(tensors, layout, description | dict(model=asdict(config), diffusion=asdict(diffusion)), ignored=copies)


def _check_equal(folder: Path, theirs: Tensors, copies: list[str]) -> None:
    """Every block of the stock DiT has its own embedders of timestep and class; ours has one for all."""
    for key in copies:
        first = re.sub(r"^transformer_blocks\.\d+", "transformer_blocks.0", key)
        if first not in theirs.shapes or not torch.equal(theirs.tensor(key), theirs.tensor(first)):
            raise CheckpointError(f"{folder}: {key} differs from the first block's; our DiT has one embedder for all blocks")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return found
