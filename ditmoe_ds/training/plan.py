"""The plan of a run: a recipe with its data, network and starting weights, cut for a number of processes; and the checks that they fit."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ditmoe_ds import config
from ditmoe_ds.diffusion.objectives import DiffusionConfig
from ditmoe_ds.diffusion.sampling import make_scheduler, scheduled
from ditmoe_ds.distributed.checkpoint import newest_index
from ditmoe_ds.distributed.engine import BatchShape
from ditmoe_ds.distributed.settings import offloads, read_ds_config
from ditmoe_ds.distributed.topology import ParallelConfig, check_expert_parallel, check_tensor_parallel, require_tensor_parallel
from ditmoe_ds.distributed.weights import Weights, locate, open_located
from ditmoe_ds.errors import ConfigError
from ditmoe_ds.latents import remote
from ditmoe_ds.latents.condition import Captions, Classes, Conditioner, Texts
from ditmoe_ds.latents.loader import DataConfig, LatentDataset
from ditmoe_ds.latents.manifest import Manifest, fetch
from ditmoe_ds.latents.text import load_text_encoder, text_width
from ditmoe_ds.models.dit import DiT, DiTConfig
from ditmoe_ds.models.init import InitialWeights
from ditmoe_ds.models.sizes import described, named_config, parameter_shapes
from ditmoe_ds.models.tensor_plan import divided, has_biased_experts
from ditmoe_ds.moe.routing import RouterConfig
from ditmoe_ds.training.recipe import ModelConfig, Recipe, TrainConfig, read_recipe
from ditmoe_ds.training.resume import check_encoders, check_same_run

CLASS_TABLE = "y_embed.table.weight"


@dataclass(frozen=True)
class Plan:
    """A recipe that was found fit for its data and number of processes."""

    recipe: Recipe
    manifests: tuple[Manifest, ...]
    """Of ``data.manifest`` and of what is mixed in."""
    model: DiTConfig
    begun_on: int
    """Processes for which ``train.accumulation`` was chosen; a tensor-parallel group counts as one, here as in ``batch``."""
    batch: BatchShape
    """How the present number of processes cuts the global batch."""
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
        parts = [manifest.digest for manifest in self.manifests]
        steps = self.recipe.train.global_batch if len(self.manifest.shapes) > 1 else None  # all of a step have one shape
        return hashlib.sha256(json.dumps([parts, weights, data.window, steps]).encode()).hexdigest()

    @property
    def shape(self) -> tuple[int, ...]:
        """The commonest (C, H, W) of the latents: what is validated on and sampled."""
        return _commonest_shape(self.manifest)

    def initial(self, model: DiT) -> Callable[[str, int, Tensor], None]:
        """A function that fills any range of a flattened weight of ``model`` (may be on meta), like ``InitialWeights.read``."""
        if self.weights is None:
            return InitialWeights(model, self.recipe.train.seed).read
        return partial(_without_classes, self.weights) if self.recipe.model.new_classes else self.weights.read

    def open_heldout(self) -> LatentDataset:
        """Held-out samples of the commonest shape. Raises as ``LatentDataset``."""
        return self.recipe.data.open([self.manifest], "val", self.shape)

    def conditioner(self, device: torch.device) -> Conditioner:
        """The conditioner that the model needs: for classes, stored texts, or captions encoded on ``device``.

        Raises:
            ConfigError, DataError: the text encoder or the stored empty caption cannot be used.
        """
        data = self.recipe.data
        if self.model.num_classes:
            return Classes(self.model.num_classes)
        if data.text_encoder:
            return Captions(
                load_text_encoder(data.text_encoder, data.text_max_tokens, device, ("data.text_encoder", "data.text_max_tokens"))
            )
        return Texts(self.manifest.empty_text())

    def grid_conditions(self, count: int, conditioner: Conditioner) -> list[Any]:
        """The conditions of the ``count`` pictures of a sample grid: classes in turn, or held-out captions."""
        if self.model.num_classes:
            return [i % self.model.num_classes for i in range(count)]
        heldout = self.open_heldout()
        samples = heldout.spread(count)
        conditions = conditioner.of(heldout.batch([samples[i % len(samples)] for i in range(count)]))
        # Parts of one tensor would each be pickled with all of it.
        return [condition.clone() if isinstance(condition, Tensor) else condition for condition in conditions]

    def describe(self, encoder_sha256: str | None = None) -> dict[str, Any]:
        """What a checkpoint must say about itself to be sampled from.

        Args:
            encoder_sha256: of the weights of ``data.text_encoder``, if they are in a folder.
        """
        manifest, data = self.manifest, self.recipe.data
        latents: dict[str, Any] = dict(vae=manifest.vae, scaling_factor=manifest.scaling_factor, shift_factor=manifest.shift_factor)
        latents |= dict(vae_sha256=manifest.vae_sha256, shape=list(self.shape))
        if self.model.text_width:
            stored = None if data.text_encoder else manifest.text
            if stored:
                latents["text"] = dict(encoder=stored.encoder, max_tokens=stored.max_tokens, sha256=stored.encoder_sha256)
            else:
                latents["text"] = dict(encoder=data.text_encoder, max_tokens=data.text_max_tokens, sha256=encoder_sha256)
        return dict(
            recipe=asdict(self.recipe),
            processes=self.begun_on,
            data_sha256=self.data_digest(),
            model=asdict(self.model),
            diffusion=asdict(self.recipe.diffusion),
            latents=latents | dict(class_names=list(manifest.class_names), manifest=manifest.root),
        )


@dataclass(frozen=True)
class Asked:
    """What ``read_plan`` has to ask of servers, each of which would else have to answer every rank."""

    start: Path | None
    """The folder of what ``starting_weights`` opens; another a moment later, if it is a run that is still saving."""
    manifests: dict[str, bytes]
    """The contents of those behind a URL, by what the recipe calls them."""
    text_width: int | None
    """Of the tokens of ``data.text_encoder``, if there is one."""


def ask(recipe: Recipe) -> Asked:
    """Ask for a recipe's starting weights, manifests and text encoder.

    Raises:
        CheckpointError, ConfigError, DataError: of something that is not there, as ``read_plan``.
    """
    data, manifests = recipe.data, {}
    for key, place in [("data", data.manifest), *((f"data.mix[{i}]", other.manifest) for i, other in enumerate(data.mix))]:
        if "@" in urlsplit(place).netloc:
            host = place.rpartition("@")[2]
            fix = "leave user and password out, which the run's files would tell; curl takes them from ~/.netrc, with 'netrc' in ~/.curlrc"
            raise ConfigError(f"{key}.manifest", f"...@{host}", fix)
        if remote.is_url(place):
            manifests[place] = fetch(place, f"{key}.manifest")
    start = _starting_folder(recipe)
    texts = data.text_encoder and (start or not named_network(recipe.model).num_classes)  # with classes it is refused unasked
    return Asked(start, manifests, text_width(data.text_encoder, "data.text_encoder") if texts else None)


def read_plan(arguments: list[str], world: int, asked: Asked | None = None, share: slice = slice(None)) -> Plan:
    """Read ``RECIPE.yaml [key=value ...]`` and check everything that can be checked before long work starts.

    Args:
        asked: what ``ask`` says of the recipe, where one rank has asked for all.
        share: see ``Manifest.load``.

    Raises:
        ConfigError, DataError: with the key, the value and the fix.
    """
    recipe = read_recipe(arguments)
    train, tensor = recipe.train, recipe.parallel.tensor
    wanted = Path(recipe.run_dir).absolute()
    there = next(path for path in (wanted, *wanted.parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError("run_dir", recipe.run_dir, f"{there} is no folder that this user may write to; name another")
    asked = asked or ask(recipe)
    weights = open_located(asked.start) if asked.start else None
    named = network_of(weights, recipe) if weights else named_network(recipe.model)
    if weights:
        weights.check(parameter_shapes(named))
    check_parallel(recipe.parallel, named, world)
    require_tensor_parallel(tensor)
    processes = world // tensor
    saved = last_index(recipe)
    begun = begun_on(recipe, processes, saved)
    batch = cut_batch(train, processes, begun, tensor)
    ds_config = read_ds_config(recipe.parallel)
    if train.optimizer.name != "adamw" and offloads(ds_config):
        raise ConfigError("train.optimizer.name", train.optimizer.name, "DeepSpeed offloads adamw alone; choose it, or do not offload")
    manifests = _load_manifests(recipe, share, asked.manifests)
    model, *_ = (fitted(named, recipe, manifest, asked.text_width) for manifest in manifests)
    if weights:
        _check_conditions(recipe, named, model)
    if train.sample_every or train.fd_every:
        scheduled(make_scheduler(recipe.diffusion), recipe.diffusion, train.sample_steps, "train.sample_steps")
    manifest = manifests[0]
    LatentDataset(manifests, "train", recipe.data.skip_shards)
    settings = ["validate_every", "fd_every", *(["sample_every"] if model.text_width else [])]  # of captions the grids need some, too
    if wanting := [f"train.{setting}" for setting in settings if getattr(train, setting)]:
        if not manifest.splits.val.samples:
            fix = f"holds out no sample to validate on: encode again with --holdout, or set {' and '.join(wanting)} to 0"
            raise ConfigError("data.manifest", recipe.data.manifest, fix)
        LatentDataset([manifest], "val", shape=_commonest_shape(manifest))
    if (train.sample_every or train.fd_every) and manifest.vae_sha256 and not Path(manifest.vae).is_dir():
        fix = f"its VAE is not at {manifest.vae}, which sample grids need: put it there, or set train.sample_every=0 and train.fd_every=0"
        raise ConfigError("data.manifest", recipe.data.manifest, fix)
    plan = Plan(recipe, manifests, model, begun, batch, ds_config, weights)
    if saved:
        check_same_run(plan, saved)
    if before := saved or (weights and weights.description):
        check_encoders(plan, before["latents"])
    return plan


def _starting_folder(recipe: Recipe) -> Path | None:
    source = recipe.model.weights
    if source is not None and last_index(recipe):
        source = recipe.run_dir  # a run that continues needs no others
    return locate(source) if source is not None else None


def starting_weights(recipe: Recipe) -> Weights | None:
    """What the recipe starts from or, once there is a checkpoint, continues from. Nothing is read yet. Raises as ``open_weights``."""
    folder = _starting_folder(recipe)
    return open_located(folder) if folder else None


def named_network(given: ModelConfig) -> DiTConfig:
    """The network that a recipe names, before the data say its latents and classes. Raises as ``named_config``, for the router too."""
    named = named_config(given.name or "")
    qk_norm = named.qk_norm if given.qk_norm is None else given.qk_norm
    if given.new_classes:
        raise ConfigError("model.new_classes", True, "is for training that starts from model.weights; leave it out")
    for key in ("routing", *(f"router.{field.name}" for field in fields(RouterConfig))):
        if not named.experts and (value := attrgetter(key)(given)) != attrgetter(key)(ModelConfig()):
            raise ConfigError(f"model.{key}", value, f"{given.name} has no experts; leave it out")
    config = replace(named, qk_norm=qk_norm, routing=given.routing or named.routing, router=given.router)
    if config.routing == "dense" and (config.expert_activation != "gelu" or config.shared):
        raise ConfigError("model.routing", "dense", f"{given.name} has SwiGLU and shared experts; a dense twin has EC-DIT")
    if given.router.force_balance and config.routing != "token":
        raise ConfigError("model.router.force_balance", True, "is for token choice; with another model.routing every load is even")
    factors = given.router.layer_capacity
    if factors and (config.routing == "token" or len(factors) != len(config.sparse_layers)):
        fix = f"is for expert choice, one factor for each of {len(config.sparse_layers)} sparse layers"
        raise ConfigError("model.router.layer_capacity", list(factors), fix)
    factor = given.router.capacity_factor
    for key, value in [("capacity_factor", 1.0 if factor is None else factor), *(("layer_capacity", one) for one in factors)]:
        if value <= 0:
            raise ConfigError(f"model.router.{key}", value, "must be above 0")
        if config.routing == "expert" and value > config.experts:
            raise ConfigError(f"model.router.{key}", value, f"of {config.experts} experts no more can take a token")
    return config


def network_of(weights: Weights, recipe: Recipe) -> DiTConfig:
    """The network of the starting weights. Raises ConfigError: the recipe names one too, or another objective."""
    given = recipe.model
    if given != ModelConfig(weights=given.weights, new_classes=given.new_classes):
        raise ConfigError(
            "model.weights", given.weights, "the network is that of the weights: leave out model.name, qk_norm, routing and router"
        )
    theirs = config.build(DiffusionConfig, weights.description["diffusion"])
    for key in ("objective", "time_scale"):
        if getattr(theirs, key) != getattr(recipe.diffusion, key):
            fix = f"model.weights={given.weights!r} were trained with {getattr(theirs, key)!r}; set this"
            raise ConfigError(f"diffusion.{key}", getattr(recipe.diffusion, key), fix)
    network = described(weights.description["model"], len(weights.shapes))
    if given.new_classes and not network.num_classes:
        raise ConfigError("model.new_classes", True, f"model.weights={given.weights!r} are of a text-to-image model; leave it out")
    return network


def _load_manifests(recipe: Recipe, share: slice, contents: dict[str, bytes]) -> tuple[Manifest, ...]:
    data = recipe.data
    first = Manifest.load(data.manifest, share=share, content=contents.get(data.manifest))
    others = []
    for i, other in enumerate(data.mix):
        if other.weight < 1:
            raise ConfigError(f"data.mix[{i}].weight", other.weight, "must be at least 1")
        manifest = Manifest.load(other.manifest, f"data.mix[{i}].manifest", share, contents.get(other.manifest))
        if differences := config.changes(_encoding(manifest), _encoding(first)):
            fix = f"{', '.join(differences)} of data.manifest; encode it alike"
            raise ConfigError(f"data.mix[{i}].manifest", other.manifest, fix)
        others.append(manifest)
    for manifest in (first, *others):
        if remote.is_url(manifest.root) and not data.cache:
            raise ConfigError("data.cache", "", f"{manifest.root} is remote: name a local folder for its shards")
    return first, *others


def _encoding(manifest: Manifest) -> dict[str, Any]:
    """What sets that are mixed must agree in. Encoders in folders are known by their sha256, wherever they lie; hub ids by their name."""
    agreed = {key: getattr(manifest, key) for key in ("shapes", "scaling_factor", "shift_factor", "vae_sha256", "store", "class_names")}
    if manifest.vae_sha256 is None:
        agreed["vae"] = manifest.vae
    text = asdict(manifest.text) if manifest.text else None
    if text and text["encoder_sha256"] is not None:
        del text["encoder"]
    return agreed | dict(text=text)


def fitted(named: DiTConfig, recipe: Recipe, manifest: Manifest, text: int | None = None) -> DiTConfig:
    """The network as the data make it: size and channels of their latents, classes or width of their texts.

    Args:
        text: width of the tokens of ``data.text_encoder``, where it has been asked for.

    Raises:
        ConfigError: they do not go together.
    """
    data = recipe.data
    if named.num_classes and data.text_encoder:
        raise ConfigError("data.text_encoder", data.text_encoder, "this model is conditioned on classes; leave it out")
    if named.num_classes and not manifest.num_classes:
        raise ConfigError("data.manifest", manifest.root, "its samples have no classes; this model is conditioned on classes")
    samples, classified = manifest.splits.train.samples, sum(manifest.class_histogram)
    if named.num_classes and classified < samples:
        fix = f"{samples - classified} of {samples} training samples have no class; encode those that have, or train text to image"
        raise ConfigError("data.manifest", manifest.root, fix)
    for _, height, width in manifest.shapes:
        if height % named.patch or width % named.patch:
            fix = f"the data has latents of {height}x{width}, the model patches of {named.patch}"
            raise ConfigError("model.name", recipe.model.name, fix)
    channels, height, _ = _commonest_shape(manifest)
    model = replace(named, input_size=height, in_channels=channels)
    if named.num_classes:
        return replace(model, num_classes=manifest.num_classes)
    return replace(model, text_width=text or _text_width(data, manifest))


def _commonest_shape(manifest: Manifest) -> tuple[int, ...]:
    """(C, H, W)."""
    found = Counter[tuple[int, ...]]()
    for shard in manifest.splits.train.shards:
        found[shard.shape] += shard.samples
    return found.most_common(1)[0][0]


def _text_width(data: DataConfig, manifest: Manifest) -> int:
    if data.text_encoder:
        return text_width(data.text_encoder, "data.text_encoder")
    if manifest.text is None:
        raise ConfigError(
            "data.manifest",
            data.manifest,
            "holds no encoded text; encode with --text, or, if its samples have captions, name a data.text_encoder",
        )
    return manifest.text.width


def _check_conditions(recipe: Recipe, theirs: DiTConfig, ours: DiTConfig) -> None:
    """Refuse data of another kind than the starting weights'; their classes may be others if the recipe says so."""
    pairs = {"latent channels": (theirs.in_channels, ours.in_channels), "text width": (theirs.text_width, ours.text_width)}
    if not recipe.model.new_classes:
        pairs["classes"] = theirs.num_classes, ours.num_classes
    for what, (trained, given) in pairs.items():
        if trained != given:
            fix = (
                "set model.new_classes=true to begin with new ones" if what == "classes" else "encode as the data that they were trained on"
            )
            raise ConfigError("model.weights", recipe.model.weights, f"trained on {trained} {what}, data.manifest has {given}; {fix}")


def _without_classes(weights: Weights, name: str, start: int, out: Tensor) -> None:
    """Like ``weights.read``, but every class gets "no class", the last row of their table."""
    if name != CLASS_TABLE:
        weights.read(name, start, out)
        return
    rows, dim = weights.shapes[name]
    none = torch.empty(dim)
    weights.read(name, (rows - 1) * dim, none)
    out.copy_(none[torch.arange(start, start + out.numel()) % dim])


def check_parallel(parallel: ParallelConfig, model: DiTConfig, world: int) -> None:
    """Refuse tensor- and expert-parallel sizes that do not fit a model and this number of processes.

    Raises:
        ConfigError: naming sizes that fit.
    """
    check_tensor_parallel(parallel.tensor, divided(model), world)
    if parallel.tensor > 1 and has_biased_experts(model):
        fix = "experts with biases, as upcycled from a dense DiT, are not cut; set 1 and spread them with parallel.expert"
        raise ConfigError("parallel.tensor", parallel.tensor, fix)
    check_expert_parallel(parallel.expert, model.experts if model.routed_layers else 0, world, parallel.tensor)


def cut_batch(train: TrainConfig, processes: int, begun_on: int, tensor: int = 1) -> BatchShape:
    """How processes cut the global batch, where a tensor-parallel group counts as one.

    Args:
        begun_on: the number of processes for which ``train.accumulation`` was chosen. On another number it becomes the smallest with which
            no rank computes more images at once than then.
        tensor: tensor-parallel size.

    Raises:
        ConfigError: the batch does not divide.
    """
    accumulation = train.accumulation
    if processes != begun_on and train.global_batch % processes == 0:
        images, most = train.global_batch // processes, train.global_batch // (begun_on * accumulation)
        accumulation = next(n for n in range(1, images + 1) if images % n == 0 and images // n <= most)
    parts = processes * accumulation
    if train.global_batch % parts:
        near, called = max(train.global_batch // parts, 1) * parts, "processes" if tensor == 1 else "tensor-parallel groups"
        fix = f"must divide by {processes} {called} x {accumulation} accumulation steps; {near} does"
        raise ConfigError("train.global_batch", train.global_batch, fix)
    return BatchShape(train.global_batch, accumulation, train.global_batch // parts)


def last_index(recipe: Recipe) -> dict[str, Any] | None:
    """The index of the run's newest checkpoint; None if there is none yet."""
    return newest_index(Path(recipe.run_dir) / "checkpoints")


def begun_on(recipe: Recipe, processes: int, saved: dict[str, Any] | None) -> int:
    """Processes for which the recipe's accumulation was chosen: those that the run began on, unless batch or accumulation have changed.

    Args:
        saved: ``last_index``.
    """
    if saved is None or not recipe.train.elastic:
        return processes
    before = saved["recipe"]["train"]
    same = all(before[key] == getattr(recipe.train, key) for key in ("global_batch", "accumulation"))
    return saved["processes"] if same else processes
