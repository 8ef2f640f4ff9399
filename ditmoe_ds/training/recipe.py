"""A recipe: everything that defines a run, and the checks of it alone."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from ditmoe_ds import config
from ditmoe_ds.diffusion.objectives import DiffusionConfig
from ditmoe_ds.distributed.checkpoint import CheckpointConfig
from ditmoe_ds.distributed.ema import EMAConfig
from ditmoe_ds.distributed.engine import OptimizerConfig
from ditmoe_ds.distributed.topology import ParallelConfig
from ditmoe_ds.errors import ConfigError
from ditmoe_ds.latents.loader import DataConfig
from ditmoe_ds.models.dit import Recompute
from ditmoe_ds.moe.routing import RouterConfig


@dataclass(frozen=True)
class ModelConfig:
    """Which network; latent shape and classes come from the data."""

    name: str | None = None
    """As in the papers: ``DiT-MoE-XL/2-8E2A``, or dense ``DiT-XL/2``."""
    weights: str | None = None
    """Instead of a name: start from these weights, as the network that they are. A run (its EMA), a checkpoint or a weights
    folder, such as ``ditmoe import`` and ``ditmoe upcycle`` make."""
    new_classes: bool = False
    """Start from weights of other classes than the data's: each class begins as the weights' "no class", so that the model begins as
    theirs without a condition."""
    qk_norm: bool | None = None
    """LayerNorm on q and k; unset, as published for the size."""
    routing: Literal["token", "expert", "dense"] | None = None
    """Tokens choose experts, experts choose tokens, or a dense MLP of the same active width; unset, as in the family's paper."""
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
    elastic: bool = True
    """On another number of processes a run takes the fewest passes in which no rank computes more images at once than before."""
    seed: int = 0
    """Of initial weights, order of samples, noise, times and dropout."""
    precision: Literal["bf16", "fp32"] = "bf16"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mask_ratio: float = 0.0
    """Share of the patches left out of each step, 0 to 0.75: cheaper steps; end a run with some at 0."""
    activation_checkpointing: Recompute = False
    """What backward computes again instead of keeping it: whole blocks (true), or attention alone, so that no token is sent and no
    expert computed twice."""
    compile: bool = False
    """Compile the blocks with torch.compile; the first steps wait for it."""
    deterministic: bool = False
    """Have a GPU round alike on every run, with torch's slower algorithms where the faster do not; a CPU always does."""
    validate_every: int = 1000
    """Steps between validation losses; 0 for never."""
    validate_samples: int = 512
    sample_every: int = 1000
    """Steps between sample grids; 0 for never."""
    sample_images: int = 40
    sample_steps: int = 25
    guidance: float = 2.0
    """Guidance scale of sample grids and Fréchet distances."""
    fd_every: int = 0
    """Steps between Fréchet distances of EMA samples to held-out data; 0 for never."""
    fd_samples: int = 2000
    fd_extractor: str = "efficientnet-lite0"
    """As ``ditmoe eval fid --extractor``."""
    max_skipped_steps: int = 10
    """A step whose gradient is not finite is skipped; the run stops after this number of them in a row."""
    spike_threshold: float = 6.0
    """A loss this many standard deviations above the mean of the last 100 steps is logged with its samples; 0 for never."""
    log_every: int = 10
    """Steps between printed lines, beside those of steps with a validation loss or distance; ``metrics.jsonl`` has every step."""
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
    profile: bool = False
    """Write a trace of three early steps of every rank into ``run_dir/trace``."""


BOUNDS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "at least 1",
        lambda value: value >= 1,
        "train.steps train.global_batch train.accumulation train.max_skipped_steps train.log_every train.sample_images "
        "train.validate_samples data.prefetch data.weight data.window data.text_max_tokens ema.every checkpoint.every checkpoint.keep",
    ),
    (
        "at least 0",
        lambda value: value >= 0,
        "train.optimizer.lr train.optimizer.weight_decay train.optimizer.warmup_steps train.guidance checkpoint.keep_every "
        "model.router.balance_alpha model.router.z_alpha",
    ),
    (
        "at least 0, which is never",
        lambda value: value >= 0,
        "train.validate_every train.sample_every train.fd_every train.spike_threshold",
    ),
    ("at least 0, which does not clip", lambda value: value >= 0, "train.optimizer.grad_clip"),
    ("at least 0, which loads in the training process", lambda value: value >= 0, "data.workers"),
    (
        "above 0",
        lambda value: value > 0,
        "train.optimizer.eps diffusion.time_shift diffusion.time_scale data.cache_gb model.router.route_scale",
    ),
    ("in [0, 1)", lambda value: 0 <= value < 1, "train.optimizer.beta1 train.optimizer.beta2 diffusion.condition_dropout"),
    ("from 0 to 0.75", lambda value: 0 <= value <= 0.75, "train.mask_ratio"),
)
"""What single numbers of a recipe must be."""


def read_recipe(arguments: list[str]) -> Recipe:
    """Read ``RECIPE.yaml [key=value ...]`` and check what needs neither data nor processes.

    Raises:
        ConfigError: with the key, the value and the fix.
    """
    if not arguments:
        raise ConfigError("recipe", None, "name a recipe, for example recipes/digits.yaml")
    recipe = config.load(Recipe, arguments[0], arguments[1:])
    for wanted, holds, keys in BOUNDS:
        for key in keys.split():
            if not holds(value := attrgetter(key)(recipe)):
                raise ConfigError(key, value, f"must be {wanted}")
    for key in ("run_dir", "data.cache"):  # which would be made under this very name
        if (place := attrgetter(key)(recipe)).startswith("~") or "$" in place:
            raise ConfigError(key, place, "write the path as it is: ~ and variables are not replaced")
    diffusion = recipe.diffusion
    if diffusion.objective == "ddpm" and diffusion.time_shift != 1:
        raise ConfigError("diffusion.time_shift", diffusion.time_shift, "is of rectified flow; leave it at 1 with ddpm")
    if (recipe.train.sample_every or recipe.train.fd_every) and recipe.train.guidance != 1 and diffusion.condition_dropout == 0:
        fix = "with diffusion.condition_dropout=0 nothing is learned of images without their condition; set 1"
        raise ConfigError("train.guidance", recipe.train.guidance, fix)
    if recipe.train.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("train.wandb", True, "needs package wandb; pip install wandb")
    if recipe.profile and recipe.train.steps < 6:
        raise ConfigError("train.steps", recipe.train.steps, "profile=true traces the fourth to the sixth step; set at least 6")
    decays = recipe.ema.decays
    if not decays or len(set(decays)) < len(decays) or not all(0 <= decay < 1 for decay in decays):
        raise ConfigError("ema.decays", list(decays), "list different decays in [0, 1), at least one, for example [0.9999, 0.999]")
    return recipe
