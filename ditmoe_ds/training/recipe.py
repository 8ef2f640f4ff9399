"""A recipe: everything that defines a run, and the checks that it can run at all."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ditmoe_ds import config
from ditmoe_ds.diffusion.objectives import DiffusionConfig
from ditmoe_ds.distributed.checkpoint import CheckpointConfig
from ditmoe_ds.distributed.ema import EMAConfig
from ditmoe_ds.distributed.engine import BatchShape, OptimizerConfig, read_ds_config
from ditmoe_ds.distributed.topology import ParallelConfig, check_expert_parallel
from ditmoe_ds.distributed.weights import Weights, open_weights
from ditmoe_ds.errors import ConfigError
from ditmoe_ds.latents import remote
from ditmoe_ds.latents.format import Manifest
from ditmoe_ds.latents.loader import DataConfig
from ditmoe_ds.models.dit import DiTConfig
from ditmoe_ds.models.sizes import named_config
from ditmoe_ds.moe.routing import RouterConfig


@dataclass(frozen=True)
class ModelConfig:
    """Which network; latent shape and classes come from the data."""

    name: str | None = None
    """As in the papers: ``DiT-MoE-XL/2-8E2A``, or dense ``DiT-XL/2``."""
    weights: str | None = None
    """Instead of a name: start from these weights, as the network that they are. A run (its EMA), a checkpoint or a weights
    folder, such as ``ditmoe import`` and ``ditmoe upcycle`` make."""
    qk_norm: bool | None = None
    """LayerNorm on q and k; unset, as published for the size."""
    router: RouterConfig = field(default_factory=RouterConfig)


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int
    """Optimizer steps of the whole run; may be raised when resuming."""
    global_batch: int
    """Images per optimizer step, over all ranks."""
    accumulation: int = 1
    """Forward-backward passes per optimizer step."""
    seed: int = 0
    """Of initial weights, order of samples, noise, times and dropout."""
    precision: Literal["bf16", "fp32"] = "bf16"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    activation_checkpointing: bool = False
    """Recompute each block in backward instead of keeping its activations."""
    validate_every: int = 1000
    """Steps between validation losses; 0 for never."""
    validate_samples: int = 512
    sample_every: int = 1000
    """Steps between sample grids; 0 for never."""
    sample_images: int = 40
    sample_steps: int = 25
    guidance: float = 2.0
    """Guidance scale of the sample grids."""
    max_skipped_steps: int = 10
    """A step whose gradient is not finite is skipped; the run stops after so many in a row."""
    spike_threshold: float = 6.0
    """A loss so many standard deviations over the mean of the last 100 steps is logged with its samples; 0 for never."""
    log_every: int = 10
    """Steps between printed lines; ``metrics.jsonl`` has every step."""
    tensorboard: bool = True
    wandb: bool = False


@dataclass(frozen=True)
class Recipe:
    """One run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    run_dir: str
    """Where the run writes; the same command with the same folder resumes."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)


@dataclass(frozen=True)
class Plan:
    """A recipe that was found fit for its data and number of processes."""

    recipe: Recipe
    manifests: tuple[Manifest, ...]
    """Of ``data.manifest`` and of what is mixed in."""
    model: DiTConfig
    batch: BatchShape
    ds_config: dict[str, Any]
    weights: Weights | None
    """What training starts from; None for new weights."""

    @property
    def manifest(self) -> Manifest:
        """The first data set's, which also has the validation split."""
        return self.manifests[0]

    def data_digest(self) -> str:
        """sha256 of what decides which sample is where in the run."""
        data = self.recipe.data
        weights = [data.weight, *(other.weight for other in data.mix)]
        parts = [manifest.digest() for manifest in self.manifests]
        steps = self.recipe.train.global_batch if len(self.manifest.shapes) > 1 else None  # all of a step have one shape
        return hashlib.sha256(json.dumps([parts, weights, data.window, steps]).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a checkpoint must say about itself to be sampled from."""
        manifest = self.manifest
        latents = dict(vae=manifest.vae, scaling_factor=manifest.scaling_factor, shift_factor=manifest.shift_factor)
        return dict(
            recipe=asdict(self.recipe),
            data_sha256=self.data_digest(),
            model=asdict(self.model),
            diffusion=asdict(self.recipe.diffusion),
            latents=latents | dict(class_names=list(manifest.class_names), manifest=manifest.root),
        )


AT_LEAST_1 = dict(
    train=("steps", "global_batch", "accumulation", "max_skipped_steps", "log_every"),
    data=("prefetch", "weight", "window"),
    ema=("every",),
    checkpoint=("every", "keep"),
)


def read_plan(arguments: list[str], world: int) -> Plan:
    """Read ``RECIPE.yaml [key=value ...]`` and check everything that can be checked before long work starts.

    Raises:
        ConfigError, DataError: with the key, the value and the fix.
    """
    if not arguments:
        raise ConfigError("recipe", None, "name a recipe, for example recipes/digits.yaml")
    recipe = config.load(Recipe, arguments[0], arguments[1:])
    train = recipe.train
    for section, keys in AT_LEAST_1.items():
        for key in keys:
            value = getattr(getattr(recipe, section), key)
            if value < 1:
                raise ConfigError(f"{section}.{key}", value, "must be at least 1")
    if recipe.data.workers < 0:
        raise ConfigError("data.workers", recipe.data.workers, "must be at least 0, which loads in the training process")
    decays = recipe.ema.decays
    if not decays or len(set(decays)) < len(decays) or not all(0 <= decay < 1 for decay in decays):
        raise ConfigError("ema.decays", list(decays), "list different decays in [0, 1), at least one, for example [0.9999, 0.999]")
    parts = world * train.accumulation
    if train.global_batch % parts:
        near = max(train.global_batch // parts, 1) * parts
        fix = f"must divide by {world} processes x {train.accumulation} accumulation steps; {near} does"
        raise ConfigError("train.global_batch", train.global_batch, fix)
    weights = open_weights(recipe.model.weights) if recipe.model.weights is not None else None
    named = _network_of(weights, recipe) if weights else named_config(recipe.model.name or "")
    check_expert_parallel(recipe.parallel.expert, named.experts, world)
    ds_config = read_ds_config(recipe.parallel)
    manifests = _load_manifests(recipe)
    manifest = manifests[0]
    if len(manifest.shapes) > 1:
        raise ConfigError("data.manifest", recipe.data.manifest, f"has latents of {len(manifest.shapes)} shapes, this model takes one")
    channels, height, width = manifest.shapes[0]
    if height != width or height % named.patch:
        raise ConfigError(
            "model.name", recipe.model.name, f"the data's latents are {height}x{width}; they must be square and divide by the patch"
        )
    model = replace(named, input_size=height, in_channels=channels, num_classes=manifest.num_classes)
    if not weights:
        qk_norm = named.qk_norm if recipe.model.qk_norm is None else recipe.model.qk_norm
        model = replace(model, qk_norm=qk_norm, router=recipe.model.router)
    elif (named.in_channels, named.num_classes) != (channels, manifest.num_classes):
        theirs, ours = (named.in_channels, named.num_classes), (channels, manifest.num_classes)
        fix = f"trained on (channels, classes) {theirs}, data.manifest has {ours}"
        raise ConfigError("model.weights", recipe.model.weights, fix)
    known = weights.description["latents"] if weights else {}
    for key in ("scaling_factor", "shift_factor"):
        ours = getattr(manifest, key)
        if known.get(key) not in (None, ours):
            fix = f"{key}: {ours} -> {known[key]} of model.weights={recipe.model.weights!r}; encode with the VAE that they were trained on"
            raise ConfigError("data.manifest", recipe.data.manifest, fix)
    batch = BatchShape(train.global_batch, train.accumulation, train.global_batch // parts)
    return Plan(recipe, manifests, model, batch, ds_config, weights)


def _load_manifests(recipe: Recipe) -> tuple[Manifest, ...]:
    data = recipe.data
    first = Manifest.load(data.manifest)
    if remote.is_url(first.root) and not data.cache:
        raise ConfigError("data.cache", "", f"data.manifest={data.manifest!r} is remote: name a local folder for its shards")
    if not first.num_classes:
        raise ConfigError("data.manifest", data.manifest, "its samples have no classes; this model is conditioned on classes")
    others = []
    for i, other in enumerate(data.mix):
        if other.weight < 1:
            raise ConfigError(f"data.mix[{i}].weight", other.weight, "must be at least 1")
        manifest = Manifest.load(other.manifest)
        for key in ("shapes", "scaling_factor", "shift_factor", "vae_sha256", "store", "text", "class_names"):
            theirs, ours = getattr(manifest, key), getattr(first, key)
            if theirs != ours:
                raise ConfigError(f"data.mix[{i}].manifest", other.manifest, f"{key}: {theirs} -> {ours} of data.manifest; encode it alike")
        others.append(manifest)
    return first, *others


def _network_of(weights: Weights, recipe: Recipe) -> DiTConfig:
    given = recipe.model
    if given != ModelConfig(weights=given.weights):
        raise ConfigError("model.weights", given.weights, "the network is that of the weights: leave out model.name, qk_norm and router")
    theirs = config.build(DiffusionConfig, weights.description["diffusion"])
    for key in ("objective", "time_scale"):
        if getattr(theirs, key) != getattr(recipe.diffusion, key):
            fix = f"model.weights={given.weights!r} were trained with {getattr(theirs, key)!r}; set this"
            raise ConfigError(f"diffusion.{key}", getattr(recipe.diffusion, key), fix)
    return config.build(DiTConfig, weights.description["model"])
