"""``ditmoe export``, ``import`` and ``upcycle``: weights out, in, and from dense to sparse. One CPU process each."""

import argparse
import re
from pathlib import Path
from typing import Any

from ditmoe_ds.errors import ConfigError
from ditmoe_ds.pipelines.arguments import add_weights

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNTOLD = ("time_shift", "condition_dropout")
"""Settings of diffusion that sampling follows and that the reference's layout does not hold."""


def add_commands(commands: Any) -> None:
    """Add the three commands to ``ditmoe``'s subparsers."""
    export = commands.add_parser("export", help="write a run's weights for other programs")
    export.set_defaults(command=_export)
    export.add_argument("run", help="a run directory, a checkpoint folder or a weights folder")
    export.add_argument(
        "--to",
        choices=["safetensors", "diffusers", "reference"],
        default="safetensors",
        help="a weights folder, a diffusers pipeline, or the public DiT-MoE code's layout",
    )
    export.add_argument("--vae", help="for --to diffusers: folder of the VAE, if the weights name none or it has moved")
    add_weights(export)
    _add_output(export, "a new folder; for --to reference also a file NAME.pt")

    importing = commands.add_parser("import", help="make a weights folder from other programs' weights").add_subparsers(required=True)
    reference = importing.add_parser("reference", help="a checkpoint of the DiT-MoE reference code")
    reference.set_defaults(command=_import_reference)
    reference.add_argument("file", help="*.pt, *.safetensors or a folder of shards")
    for name, meaning in (("top-k", "experts per token"), ("heads", "attention heads"), ("classes", "not counting the null class")):
        reference.add_argument(f"--{name}", type=int, required=True, help=meaning)
    reference.add_argument("--input-size", type=int, required=True, help="side of the latent, for example 32 for 256 px")
    reference.add_argument("--objective", choices=["rectified_flow", "ddpm"], required=True, help="that the weights were trained with")
    reference.add_argument("--balance-alpha", type=float, default=0.005, help="weight of the balance loss in later training")
    reference.add_argument("--time-scale", type=float, default=1.0, help="factor on rectified flow's t: 1000 if trained here, else 1")
    _add_output(reference)
    diffusers = importing.add_parser("diffusers", help="a pipeline saved by this package, or one with diffusers' DiTTransformer2DModel")
    diffusers.set_defaults(command=_import_diffusers)
    diffusers.add_argument("folder", help="of the pipeline, or of its transformer alone")
    _add_output(diffusers)

    upcycle = commands.add_parser("upcycle", help="make a sparse model from a dense one, with the same output")
    upcycle.set_defaults(command=_upcycle)
    upcycle.add_argument("dense", help="a run directory, a checkpoint folder or a weights folder of a dense DiT")
    upcycle.add_argument("--experts", type=int, default=8, help="of each layer")
    upcycle.add_argument("--top-k", type=int, help="experts per token; default: 2, or the value of --split")
    upcycle.add_argument("--split", type=int, default=1, help="cut each copy of the dense MLP into this many experts")
    upcycle.add_argument("--noise", type=float, default=0.0, help="standard deviation of noise on copies, relative to the matrix's")
    upcycle.add_argument("--seed", type=int, default=0, help="for the router and the noise")
    add_weights(upcycle)
    _add_output(upcycle)


def _add_output(parser: argparse.ArgumentParser, out: str = "a new folder") -> None:
    parser.add_argument("--out", required=True, help=out)
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the weights that are written")
    parser.add_argument("--shard-size", default="5GB", help="largest size of a file, for example 500MB")


def _export(arguments: argparse.Namespace) -> int:
    from ditmoe_ds import config
    from ditmoe_ds.diffusion.objectives import DiffusionConfig
    from ditmoe_ds.distributed.weights import of_step, open_weights, write_weights
    from ditmoe_ds.interop.diffusers_folder import export_diffusers
    from ditmoe_ds.interop.reference import export_reference

    weights, out, how = open_weights(arguments.run, arguments.weights), Path(arguments.out), (arguments.dtype, _shard_bytes(arguments))
    notes = []
    if arguments.vae and arguments.to != "diffusers":
        raise ConfigError("--vae", arguments.vae, f"--to {arguments.to} has no place for it; leave it out")
    if arguments.to == "safetensors":
        write_weights(out, weights, *how)
    elif arguments.to == "diffusers" and not export_diffusers(weights, out, *how, arguments.vae):
        named = weights.description["latents"].get("vae")
        notes.append(f"without its VAE ({f'{named} is no local folder' if named else 'the weights name none'}; give it by --vae)")
    elif arguments.to == "reference":
        export_reference(weights, out, *how)
        diffusion, usual = config.build(DiffusionConfig, weights.description["diffusion"]), DiffusionConfig()
        if diffusion.objective == "rectified_flow" and diffusion.time_scale != 1:
            scale = f"{diffusion.time_scale:g}"
            notes.append(f"call it with t * {scale}: the reference's own sampler passes t in [0, 1]; import it with --time-scale {scale}")
        if lost := [f"{key}={getattr(diffusion, key):g}" for key in _UNTOLD if getattr(diffusion, key) != getattr(usual, key)]:
            notes.append(f"without {' and '.join(lost)}, for which there is no place: remember it")
    print("; ".join([f"{weights.description['weights']} weights{of_step(weights.description['step'])} in {out}", *notes]))
    return 0


def _import_reference(arguments: argparse.Namespace) -> int:
    from ditmoe_ds.distributed.weights import check_new
    from ditmoe_ds.interop.reference import reference_weights

    _shard_bytes(arguments)
    check_new(Path(arguments.out))  # before a checkpoint is read whole
    weights = reference_weights(
        arguments.file,
        top_k=arguments.top_k,
        num_heads=arguments.heads,
        num_classes=arguments.classes,
        input_size=arguments.input_size,
        objective=arguments.objective,
        balance_alpha=arguments.balance_alpha,
        time_scale=arguments.time_scale,
    )
    return _write(arguments, weights)


def _import_diffusers(arguments: argparse.Namespace) -> int:
    from ditmoe_ds.interop.diffusers_folder import diffusers_weights

    return _write(arguments, diffusers_weights(Path(arguments.folder)))


def _upcycle(arguments: argparse.Namespace) -> int:
    from ditmoe_ds.distributed.weights import open_weights
    from ditmoe_ds.interop.upcycle import upcycle

    top_k = arguments.top_k
    if top_k is None:
        top_k = arguments.split if arguments.split > 1 else 2
    dense = open_weights(arguments.dense, arguments.weights)
    return _write(arguments, upcycle(dense, arguments.experts, top_k, arguments.split, arguments.noise, arguments.seed))


def _write(arguments: argparse.Namespace, weights: Any) -> int:
    from ditmoe_ds.distributed.weights import write_weights

    write_weights(arguments.out, weights, arguments.dtype, _shard_bytes(arguments))
    print(f"weights folder in {arguments.out}; ditmoe sample, export and upcycle open it")
    return 0


def _shard_bytes(arguments: argparse.Namespace) -> int:
    match = re.fullmatch(r"([1-9]\d*) ?(KB|MB|GB)", arguments.shard_size, re.IGNORECASE)
    if not match:
        raise ConfigError("--shard-size", arguments.shard_size, "write a number and KB, MB or GB, for example 5GB")
    return int(match[1]) * _UNITS[match[2].upper()]
