"""Reads a recipe as a job and a shape to plan. Its data need not be on this machine."""

import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ditmoe_ds.diffusion.noise import patches_kept
from ditmoe_ds.distributed.settings import offloads, read_ds_config, zero_settings
from ditmoe_ds.distributed.topology import ParallelConfig
from ditmoe_ds.errors import ConfigError
from ditmoe_ds.latents.manifest import Manifest
from ditmoe_ds.latents.text import encoder_bytes
from ditmoe_ds.planning.job import Cluster, Job, Shape
from ditmoe_ds.training.plan import (
    begun_on,
    check_parallel,
    cut_batch,
    fitted,
    last_index,
    named_network,
    network_of,
    starting_weights,
)
from ditmoe_ds.training.recipe import Recipe, read_recipe


def read_job(arguments: list[str], image_size: int | None, text_tokens: int | None) -> tuple[Recipe, Job]:
    """Read ``RECIPE.yaml [key=value ...]``.

    Args:
        image_size: pixels, with an f=8 VAE. None: the largest of the data if they are on this machine, else the model's usual size.
        text_tokens: of a caption, for models with text. None: the recipe's, else the most of the data if they are on this machine, else 77.

    Raises:
        ConfigError, DataError: with the key, the value and the fix.
    """
    recipe = read_recipe(arguments)
    train = recipe.train
    weights = starting_weights(recipe)
    model = network_of(weights, recipe) if weights else named_network(recipe.model)
    sides = [model.input_size] * 2
    encoder = recipe.data.text_encoder
    if encoder:
        text_tokens = text_tokens or recipe.data.text_max_tokens
    if (Path(recipe.data.manifest) / "manifest.json").is_file():
        manifest = Manifest.load(recipe.data.manifest)
        model = fitted(model, recipe, manifest)
        _, *sides = max(manifest.shapes, key=math.prod)
        model = replace(model, input_size=sides[0])
        if manifest.text:
            text_tokens = text_tokens or manifest.text.max_tokens
    if image_size is not None:
        sides = [image_size // 8] * 2
        model = replace(model, input_size=image_size // 8)
        if image_size < 8 * model.patch or image_size % (8 * model.patch):
            raise ConfigError("--image-size", image_size, f"must divide by {8 * model.patch}: an f=8 VAE and patches of {model.patch}")
    tokens = math.prod(side // model.patch for side in sides)
    text = (text_tokens or 77) if model.text_width else 0
    return recipe, Job(
        model,
        patches_kept(tokens, train.mask_ratio),
        text,
        train.precision,
        train.global_batch,
        train.steps,
        averages=len(recipe.ema.decays),
        sides=(sides[0], sides[1]),
        optimizer=train.optimizer.name,
        encoder=encoder_bytes(encoder, "data.text_encoder") if encoder else 0,
    )


def stages(parallel: ParallelConfig) -> list[Shape]:
    """A shape of the recipe's ZeRO stage and of each other one that it has a DeepSpeed file for, as ``of_stage``.

    Raises:
        ConfigError: see ``of_stage``, of the recipe's own stage.
    """
    found = [of_stage(parallel)]
    for stage in (0, 1, 2, 3) if "{zero_stage}" in parallel.deepspeed else ():
        if stage != parallel.zero_stage:
            with suppress(ConfigError):
                found.append(of_stage(replace(parallel, zero_stage=stage)))
    return found


def of_stage(parallel: ParallelConfig) -> Shape:
    """A shape with what the DeepSpeed file says; TP, EP, micro-batch and recomputation are yet to be set.

    Raises:
        ConfigError: the file cannot be used (see ``read_ds_config``), or offloads the optimizer.
    """
    settings = read_ds_config(parallel)
    if offloads(settings):
        raise ConfigError("parallel.deepspeed", parallel.deepspeed, "offloads the optimizer, which is not planned; name another")
    zero = zero_settings(settings)
    bucket = zero.reduce_bucket_size if parallel.zero_stage else 0
    return Shape(parallel.zero_stage, 1, 1, False, bucket, zero.param_persistence_threshold)


def own_shape(recipe: Recipe, job: Job, cluster: Cluster) -> Shape:
    """The shape that the recipe itself describes.

    Raises:
        ConfigError: the cluster does not divide the batch, the experts, or what tensor parallelism cuts; and as ``of_stage``.
    """
    parallel, tensor, shape = recipe.parallel, recipe.parallel.tensor, of_stage(recipe.parallel)
    check_parallel(parallel, job.model, cluster.world)
    processes = cluster.world // tensor
    micro = cut_batch(recipe.train, processes, begun_on(recipe, processes, last_index(recipe)), tensor).micro
    recompute = recipe.train.activation_checkpointing
    return replace(shape, ep=parallel.expert, tensor=tensor, micro=micro, recompute=recompute)
