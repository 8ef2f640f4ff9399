"""What happens around a step: each callback is one concern, called with the trainer and the step's record.

A callback may add to the record, which ``MetricsWriter`` writes down after them.
"""

import errno
import hashlib
import json
import mmap
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from ditmoe_ds.diffusion.noise import image_generators, starting_noise
from ditmoe_ds.diffusion.sampling import Guidance, guided, make_scheduler, sample
from ditmoe_ds.distributed.topology import data_group, gathered, tensor_place
from ditmoe_ds.errors import UserError, in_a_line
from ditmoe_ds.latents.images import save_grid
from ditmoe_ds.latents.loader import Batch, LatentDataset
from ditmoe_ds.latents.vae import decode, load_vae
from ditmoe_ds.plain import plain
from ditmoe_ds.rng import keyed_generator
from ditmoe_ds.training.plan import Plan

if TYPE_CHECKING:  # which calls them
    from ditmoe_ds.training.trainer import Trainer

Record = dict[str, Any]
Callback = Callable[["Trainer", Record], None]
VALIDATION_TIMES = [(i + 0.5) / 8 for i in range(8)]


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every ``every`` steps (0: never), and at the end, is due after ``step``."""
    return every > 0 and (step % every == 0 or step == last)


def share_out(count: int) -> tuple[list[int], int]:
    """Divide 0..count among the ranks that see different images, equally many to each, since every forward is collective.

    Returns:
        This rank's items, and how many of them, from the first on, count as its own; the rest are repetitions, or a tensor-parallel peer's.
    """
    rank, ranks = dist.get_rank(data_group()), dist.get_world_size(data_group())
    mine = list(range(rank, count, ranks))
    return mine + [0] * (-(-count // ranks) - len(mine)), len(mine) if tensor_place()[0] == 0 else 0


class HeldOut(NamedTuple):
    """A micro-batch of held-out samples."""

    items: list[int]
    """Their places among those that the ranks share out."""
    counted: int
    """How many of them, from the first on, count as this rank's."""
    batch: Batch


def read_heldout(trainer: "Trainer", dataset: LatentDataset, samples: list[int], count: int, what: str) -> list[HeldOut] | None:
    """This rank's micro-batches of ``count`` items, shared out, which are the ``samples`` in turn. They are all read before any rank
    computes with them, since every forward is collective. Collective.

    Returns:
        None, on all ranks, where one of them could not read: then rank 0 says that there is no ``what`` of this step.
    """
    (items, own), micro = share_out(count), trainer.plan.batch.micro
    parts, failed = [], None
    try:
        for first in range(0, len(items), micro):
            those = items[first : first + micro]
            batch = dataset.batch([samples[i % len(samples)] for i in those])
            parts.append(HeldOut(those, min(max(own - first, 0), micro), batch))
    except UserError as error:
        failed = str(error)
    return None if any_failed(trainer, what, failed) else parts


def any_failed(trainer: "Trainer", what: str, failed: str | None) -> bool:
    """Whether a rank says why it ``failed``; if so, rank 0 says that there is no ``what`` of this step. Collective."""
    first = next(filter(None, gathered(failed)), None)
    if first and trainer.world.rank == 0:
        print(f"no {what} of step {trainer.step}: {first}", flush=True)
    return first is not None


class Validation:
    """EMA's loss on held-out samples at 8 equidistant times, with noise fixed per sample and time. If a rank cannot read its samples,
    rank 0 says so and training continues."""

    def __init__(self, plan: Plan):
        self.dataset = plan.open_heldout()
        self.samples = self.dataset.spread(plan.recipe.train.validate_samples)

    def __call__(self, trainer: "Trainer", record: Record) -> None:
        train = trainer.plan.recipe.train
        if not due(trainer.step, train.validate_every, train.steps):
            return
        parts = read_heldout(trainer, self.dataset, self.samples, len(self.samples), "val_loss")
        if parts is None:
            return
        sums = torch.zeros(len(VALIDATION_TIMES), dtype=torch.float64, device=trainer.device)
        trainer.engine.eval()
        with trainer.ema.applied(trainer.engine), torch.no_grad():
            for _, counted, batch in parts:
                sums += self._losses(trainer, batch)[:, :counted].double().sum(1)
        trainer.engine.train()
        dist.all_reduce(sums)
        record["val_loss_at_t"] = (sums / len(self.samples)).tolist()
        record["val_loss"] = sum(record["val_loss_at_t"]) / len(sums)

    def _losses(self, trainer: "Trainer", batch: Batch) -> torch.Tensor:
        """(times, samples) losses."""
        samples = batch.samples.tolist()
        x0 = batch.latents.to(trainer.device)
        conditioner = trainer.conditioner
        condition = conditioner.unpack(conditioner.pack(conditioner.of(batch)), trainer.device)

        def predict(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return trainer.engine(z, t, **condition)

        rows = []
        for k, t in enumerate(VALIDATION_TIMES):
            noise = torch.stack([torch.randn(x0.shape[1:], generator=keyed_generator("validation", i, k)) for i in samples])
            rows.append(trainer.objective.loss(predict, x0, x0.new_full((len(samples),), t), noise.to(x0.device)))
        return torch.stack(rows)


def sample_latents(trainer: "Trainer", items: list[int], conditions: list[Any]) -> torch.Tensor:
    """Sample latents (B, C, H, W) with the current weights for the images numbered ``items``, under ``conditions``. Collective.

    An image starts from the same noise at every training step.
    """
    plan, conditioner = trainer.plan, trainer.conditioner
    diffusion, train = plan.recipe.diffusion, plan.recipe.train
    noise = starting_noise(image_generators(train.seed, items), plan.shape).to(trainer.device)
    condition = conditioner.unpack(conditioner.pack([*conditions, *[conditioner.null] * len(conditions)]), trainer.device)
    predict = guided(trainer.engine, condition, Guidance(train.guidance), diffusion, apart=plan.model.images_compete)
    return sample(predict, noise, make_scheduler(diffusion), diffusion, train.sample_steps)


class SampleGrid:
    """A picture of EMA samples, the same noise and classes or captions every time. The ranks share the images, and decode their own.

    Args:
        conditions: ``Plan.grid_conditions``.
    """

    def __init__(self, plan: Plan, conditions: list[Any], device: torch.device):
        self.conditions = conditions
        _, own = share_out(plan.recipe.train.sample_images)
        self.vae = load_vae(plan.manifest.vae, device, plan.manifest.vae_sha256) if own else None  # few of a thousand ranks have an image

    def __call__(self, trainer: "Trainer", record: Record) -> None:
        train = trainer.plan.recipe.train
        if not due(trainer.step, train.sample_every, train.steps):
            return
        items, own = share_out(train.sample_images)
        trainer.engine.eval()
        with trainer.ema.applied(trainer.engine):
            latents = sample_latents(trainer, items, [self.conditions[i] for i in items])[:own]
        trainer.engine.train()
        ranks = dist.get_world_size(data_group())
        everyone: list[Any] | None = None if dist.get_rank(data_group()) else [None] * ranks
        dist.gather_object(self._decoded(trainer, latents), everyone, group=data_group(), group_dst=0)
        if everyone is None or dist.get_rank():
            return
        try:
            if failed := next((part for part in everyone if isinstance(part, str)), None):
                raise RuntimeError(failed)
            images = [everyone[i % ranks][i // ranks] for i in range(train.sample_images)]  # as they were shared out
            columns = min(10, trainer.plan.model.num_classes or 10, train.sample_images)
            save_grid(torch.from_numpy(np.stack(images)), trainer.run_dir / "samples" / f"step_{trainer.step:08d}.png", columns)
        except Exception as error:  # a full disk, for one: no reason to stop a run
            print(f"no sample grid of step {trainer.step}: {error}", flush=True)

    def _decoded(self, trainer: "Trainer", latents: torch.Tensor) -> list[np.ndarray] | str:
        """uint8 images (H, W, 3), or why there are none: after an exception the other ranks would wait for this one."""
        manifest = trainer.plan.manifest
        try:  # one by one: a step leaves little memory, and a VAE needs much for an image
            return [decode(self.vae, one[None], manifest.scaling_factor, manifest.shift_factor)[0].cpu().numpy() for one in latents]
        except Exception as error:
            return f"{type(error).__name__}: {error}"


class Checkpoints:
    """Saves every ``checkpoint.every`` steps, at the end, and when the run is asked to stop."""

    def __call__(self, trainer: "Trainer", record: Record) -> None:
        recipe = trainer.plan.recipe
        if trainer.interrupted or due(trainer.step, recipe.checkpoint.every, recipe.train.steps):
            trainer.save()


class Progress:
    """Rank 0's printed lines, with the time that is left: of every ``train.log_every``-th step, and of what was validated."""

    def __init__(self, first: int):
        self.first, self.start = first, time.monotonic()

    def __call__(self, trainer: "Trainer", record: Record) -> None:
        if dist.get_rank():
            return
        train, step = trainer.plan.recipe.train, trainer.step
        if "spike" in record:
            print(f"step {step}: the loss jumped: {record['spike']}", flush=True)
        measured = {key: record[key] for key in ("val_loss", "fd") if key in record}
        if not (due(step, train.log_every, train.steps) or step == self.first + 1 or measured):
            return
        left = (time.monotonic() - self.start) / (step - self.first) * (train.steps - step)
        told = "".join(f"  {key} {value:.4f}" for key, value in measured.items())
        print(
            f"step {step}/{train.steps}  loss {record['loss']:.4f}{told}  grad norm {record['grad_norm']:.3f}"
            f"  {record['images_per_s']:.1f} img/s  {timedelta(seconds=round(left))} left",
            flush=True,
        )


class MetricsWriter:
    """``metrics.jsonl``, one object per optimizer step; printed and special steps also go to TensorBoard and Weights & Biases, if asked
    for. Rank 0 only. What cannot be written is left out: whether a full disk ends the run is decided when a checkpoint is written, and a
    service that nobody reaches is no reason to end it."""

    def __init__(self, plan: Plan, run_dir: Path, resumed_at: int):
        self.file = run_dir / "metrics.jsonl"
        if resumed_at:
            _cut_after(self.file, resumed_at)  # steps after the checkpoint are run again
        else:
            _set_aside(self.file)
        self.told = resumed_at
        """The last step that TensorBoard has."""
        self.tensorboard: Any = None
        self.wandb: Any = None
        self.failed: set[str] = set()
        """What could not be written, and was told."""
        if plan.recipe.train.wandb:
            try:
                self.wandb = _open_wandb(run_dir)
            except Exception as error:  # without network or login, for two
                self._leave_out("Weights & Biases", error)

    def __call__(self, trainer: "Trainer", record: Record) -> None:
        train = trainer.plan.recipe.train
        told = due(trainer.step, train.log_every, train.steps) or record.keys() & {"val_loss", "fd", "skipped", "spike"}
        try:
            _append(self.file, json.dumps(plain(record)).encode() + b"\n")
            if told and train.tensorboard:
                self._tell_tensorboard(trainer.step, record)
        except OSError as error:
            self._leave_out("metrics", error)
        if told and self.wandb:
            try:
                self.wandb.log(_flat(record), step=trainer.step)
            except Exception as error:
                self._leave_out("Weights & Biases", error)

    def _leave_out(self, what: str, error: Exception) -> None:
        if what not in self.failed:
            print(f"{what} cannot be written ({in_a_line(error)}); the run goes on", flush=True)
        self.failed.add(what)

    def _tell_tensorboard(self, step: int, record: Record) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = self.tensorboard
        self.tensorboard = None  # one that has failed writes nothing ever after
        writer = writer or SummaryWriter(str(self.file.parent / "tensorboard"), purge_step=self.told + 1)
        # as one event: for every event the file is opened and closed, 260 times a step with 40 sparse layers
        values = [Summary.Value(tag=key, simple_value=value) for key, value in _flat(record).items()]
        writer.file_writer.add_summary(Summary(value=values), step)
        writer.flush()
        self.tensorboard, self.told = writer, step


def _open_wandb(run_dir: Path) -> Any:
    import wandb

    own = hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:8]
    return wandb.init(project="ditmoe_ds", dir=str(run_dir), name=run_dir.name, id=f"{run_dir.name}-{own}", resume="allow")


def _append(path: Path, line: bytes) -> None:
    """All of the line, or nothing."""
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            if (written := file.write(line)) < len(line):
                raise OSError(errno.ENOSPC, f"{written} bytes fitted")
        except OSError:
            file.truncate(end)
            raise


def _set_aside(metrics: Path) -> None:
    """Keep the records of a run whose checkpoints are gone, or that was killed before its first."""
    if not metrics.is_file() or not metrics.stat().st_size:
        return
    numbers = (int(path.suffix[1:]) for path in metrics.parent.glob(f"{metrics.name}.*") if path.suffix[1:].isdecimal())
    kept = metrics.with_name(f"{metrics.name}.{max(numbers, default=0) + 1}")
    metrics.rename(kept)
    print(f"{metrics.parent} has no checkpoint: training begins at step 1; the metrics of before are in {kept.name}", flush=True)


def _cut_after(metrics: Path, step: int) -> None:
    """Cut off the records after ``step``, and last lines that are none (a host may fail while it writes), without reading the rest, which
    may be gigabytes."""
    if not metrics.is_file() or not metrics.stat().st_size:
        return
    with metrics.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = content.rfind(b"\n") + 1
            while end:
                start = content.rfind(b"\n", 0, end - 1) + 1
                with suppress(ValueError):
                    if json.loads(content[start:end])["step"] <= step:
                        break
                end = start
        file.truncate(end)


def _flat(record: Record) -> dict[str, float]:
    """Nested lists and dicts as ``router/cv/3``."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            flat |= {f"{key}/{inner}": number for inner, number in _flat(value).items()}
        elif not isinstance(value, str):
            flat[key] = value
    return flat
