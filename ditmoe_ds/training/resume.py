"""What a run that goes on may not change."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ditmoe_ds import config
from ditmoe_ds.distributed.ema import kind
from ditmoe_ds.distributed.weights import differently_encoded
from ditmoe_ds.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from ditmoe_ds.training.plan import Plan


def check_same_run(plan: "Plan", index: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint with another network, objective, optimizer or order of samples, or without one of its averages.

    Args:
        index: of the newest checkpoint in the run directory.

    Raises:
        CheckpointError: naming what differs.
    """
    recipe = plan.recipe
    run_dir, before = f"run_dir={recipe.run_dir!r}", index["recipe"]
    parts: dict[str, Any] = dict(model=plan.model, diffusion=recipe.diffusion)
    for part, settings in parts.items():
        ours, saved = asdict(settings), asdict(config.build(type(settings), index[part]))
        saved["input_size"] = ours.get("input_size")  # which of the data's sizes counts as its own does not matter
        if changed := config.changes(saved, ours, f"{part}."):
            fix = "choose another run_dir or the old settings"
            raise CheckpointError(f"{run_dir} holds a checkpoint of another {part}: {', '.join(changed)}; {fix}")
    trained, name = before["train"]["optimizer"]["name"], recipe.train.optimizer.name
    if trained != name:
        raise CheckpointError(f"train.optimizer.name={name!r}: {run_dir} was trained with {trained}; keep that")
    for section, key in (("train", "seed"), ("data", "window")):
        was, now = before[section][key], getattr(getattr(recipe, section), key)
        if was != now:
            raise CheckpointError(f"{section}.{key}={now}: {run_dir} orders its samples by {was}; keep that")
    if plan.data_digest() != index["data_sha256"]:
        batch = ", or another train.global_batch" if len(plan.manifest.shapes) > 1 else ""
        raise CheckpointError(
            f"data.manifest={recipe.data.manifest!r}: not the data that {run_dir} was trained on "
            f"({index['latents']['manifest']}), or another data.mix or weight{batch}, which changes the order; "
            "choose a new run_dir and start it from these weights with model.weights"
        )
    decays = recipe.ema.decays
    if lost := [name for name in index["ema"]["kinds"] if name not in map(kind, decays)]:
        fix = f"the checkpoint's {', '.join(lost)} would be lost; keep its decay, or start a new run_dir"
        raise CheckpointError(f"ema.decays={list(decays)}: {fix}")


def check_encoders(plan: "Plan", before: dict[str, Any], encoder_sha256: str | None = None) -> None:
    """Refuse another VAE or text encoder than that of ``before``, as far as both are known.

    Args:
        before: how a checkpoint or starting weights describe their latents.
        encoder_sha256: see ``Plan.describe``; None: not looked for.

    Raises:
        ConfigError: naming what differs.
    """
    if difference := differently_encoded(plan.describe(encoder_sha256)["latents"], before):
        key = "text_encoder" if plan.recipe.data.text_encoder and difference.startswith("text.") else "manifest"
        fix = f"{difference} of the weights that this run goes on from; encode as the data that they were trained on"
        raise ConfigError(f"data.{key}", getattr(plan.recipe.data, key), fix)
