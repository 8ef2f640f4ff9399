"""The training loop, top to bottom. Everything optional is a callback."""

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist

from ditmoe_ds import config
from ditmoe_ds.clock import clock
from ditmoe_ds.diffusion.objectives import make_objective
from ditmoe_ds.distributed import checkpoint, shards
from ditmoe_ds.distributed.ema import EMA
from ditmoe_ds.distributed.engine import build
from ditmoe_ds.distributed.host import fetch
from ditmoe_ds.distributed.topology import (
    AgreedError,
    World,
    agreed,
    data_group,
    decided,
    describe_placement,
    expert_group,
    gathered,
    host_name,
)
from ditmoe_ds.distributed.weights import of_step
from ditmoe_ds.errors import UserError
from ditmoe_ds.latents.loader import LatentLoader
from ditmoe_ds.latents.manifest import weights_sha256
from ditmoe_ds.models.dit import DiT
from ditmoe_ds.moe.experts import KERNELS, fastest_kernel
from ditmoe_ds.plain import plain
from ditmoe_ds.source import source
from ditmoe_ds.training.ahead import Ahead
from ditmoe_ds.training.callbacks import Callback, Checkpoints, MetricsWriter, Progress, Record, SampleGrid, Validation
from ditmoe_ds.training.guard import SpikeWatch, explain
from ditmoe_ds.training.hub import fetched
from ditmoe_ds.training.interruption import Interruption, clear, mark
from ditmoe_ds.training.lock import check_shared, claim
from ditmoe_ds.training.network import arrange
from ditmoe_ds.training.plan import Plan
from ditmoe_ds.training.resume import check_encoders
from ditmoe_ds.training.step import Preparation, Prepared, compute_loss, router_metrics
from ditmoe_ds.training.telemetry import Profile, throughput

T = TypeVar("T")


def round_alike() -> None:
    """From here on this process rounds the same on every run; torch raises an error for operations that cannot."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which torch refuses cuBLAS
    torch.use_deterministic_algorithms(True)
    # filling new tensors helps only in debugging, and costs a pass over each
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class Trainer:
    """One run on this rank: builds everything, resumes if there is a checkpoint, and runs to the last step."""

    def __init__(self, plan: Plan, world: World, interruption: Interruption | None = None, callbacks: Sequence[Callback] = ()):
        recipe = plan.recipe
        train = recipe.train
        self.plan, self.world, self.device = plan, world, world.device
        self.interruption, self.interrupted = interruption, False
        self.code = source() | dict(started=datetime.now(UTC).isoformat(timespec="seconds")) if world.rank == 0 else None
        self.run_dir = Path(recipe.run_dir)
        if train.deterministic:
            round_alike()
        self.lock = agreed(lambda: claim(self.run_dir) if world.rank == 0 else None)
        agreed(lambda: check_shared(self.run_dir))
        self.dataset = agreed(lambda: recipe.data.open(plan.manifests, "train"))
        encoder = recipe.data.text_encoder
        self.encoder_sha256 = decided(lambda: weights_sha256(encoder)) if encoder else None
        if encoder:
            self.conditioner = self._loaded(lambda: plan.conditioner(world.device), self.encoder_sha256)
        else:
            self.conditioner = decided(lambda: plan.conditioner(world.device))
        self.objective = make_objective(recipe.diffusion)

        group = expert_group(recipe.parallel.expert, recipe.parallel.tensor)
        self.data_group = data_group()
        self.hosts = gathered(host_name())
        if world.rank == 0:
            print(describe_placement(self.hosts, group.size, recipe.parallel.tensor), flush=True)
            if plan.model.routed_layers:
                dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
                print(f"experts by {KERNELS[fastest_kernel(world.device, dtype, plan.model.equal_load)]}", flush=True)
                if plan.model.router.force_balance:
                    why = "tokens take experts in turn, whatever the scores; this run is for measuring, not for training"
                    print(f"model.router.force_balance=true: {why}", flush=True)
        with torch.device("meta"):
            model = DiT(plan.model, ep_size=group.size)
        initial = plan.initial(model)
        arrange(model, recipe)
        self.engine = build(model, recipe.parallel, train.optimizer, plan.batch, train.precision, plan.ds_config, world.device)
        if train.compile:
            model.compile_blocks()
        self.shards = shards.collect(self.engine, group)
        self.saver = checkpoint.Saver(self.run_dir / "checkpoints", recipe.checkpoint)
        saved = self._newest_checkpoint()
        before = saved.index if saved else plan.weights.description if plan.weights else {}
        agreed(lambda: check_encoders(plan, before.get("latents", {}), self.encoder_sha256))
        self.started_from = saved.index.get("started_from") if saved else decided(self._started_from)
        if saved is None:
            shards.fill(self.engine, self.shards, initial)
        self.ema = EMA(self.shards, recipe.ema, self.engine.at_once)
        self.step = self.samples_seen = self.skipped = self.skipped_in_a_row = 0
        self.spikes = SpikeWatch(train.spike_threshold)
        if saved:
            self._resume(saved)
        self.loader = LatentLoader(
            self.dataset,
            recipe.data,
            seed=train.seed,
            global_batch=train.global_batch,
            accumulation=plan.batch.accumulation,
            rank=dist.get_rank(self.data_group),
            world=dist.get_world_size(self.data_group),
            consumed=self.samples_seen,
            prepare=Preparation(
                train.seed,
                self.objective,
                self.conditioner,
                recipe.diffusion.condition_dropout,
                recipe.data.flip,
                train.mask_ratio,
                plan.model.patch,
            ),
        )
        self.ahead = Ahead(self.loader, plan.batch.accumulation, self.device, self.conditioner)
        self.callbacks = self._callbacks(callbacks)

    def run(self) -> None:
        """Train to ``train.steps``, or until any rank is asked to stop: then save and leave a note that the run can be continued.

        Raises:
            UserError: as on a rank that cannot load its samples. What was trained before is saved.
        """
        steps = self.plan.recipe.train.steps
        if self.step >= steps and self.world.rank == 0:
            print(f"train.steps={steps}: nothing is left to do after step {self.step}; raise it to go on", flush=True)
            clear(self.run_dir)  # or a launcher would start it again
        self.engine.train()
        while self.step < steps and not self.interrupted:
            try:
                record = self.train_step()
                for callback in self.callbacks:
                    callback(self, record)
            except AgreedError:  # on all ranks, so that a checkpoint that is being written can be finished
                with suppress(UserError):  # which was printed already
                    self.saver.finish()
                raise
        self.loader.close()
        self.saver.finish()
        agreed(self.ahead.check)
        if self.saver.lost and not self.interrupted:
            raise AgreedError(f"run_dir={str(self.run_dir)!r}: its last checkpoint could not be written; make room and start again")
        if self.interrupted and self.world.rank == 0:
            mark(self.run_dir, self.step)
            latest = self.saver.folder / "latest"
            saved = latest.read_text() if latest.is_file() else "its beginning: nothing could be saved"
            print(f"interrupted after step {self.step}; started again, the run goes on from {saved}", flush=True)

    def train_step(self) -> Record:
        """One optimizer step over the global batch. Returns its entry of ``metrics.jsonl``. Collective."""
        train, accumulation, start = self.plan.recipe.train, self.plan.batch.accumulation, time.monotonic()
        clock.start()
        lr = train.optimizer.lr_at(self.step)
        for parameters in self.engine.optimizer.param_groups:
            parameters["lr"] = lr
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)  # three losses, and whether this rank has to stop
        selections = takers = torch.zeros((), dtype=torch.int64, device=self.device)
        per_batch = []
        batches = self.ahead.take()
        for i, batch in enumerate(batches, 1):
            with clock("forward"):
                loss = compute_loss(self.engine, self.objective, batch, self.plan.model)
            with clock("backward"):
                self.engine.backward(loss.total)
            sums[:3] += torch.stack([loss.diffusion, loss.balance, loss.z]).double() / accumulation
            selections, takers = selections + loss.selections, takers + loss.takers
            per_batch.append(loss.diffusion)
            if i == accumulation:
                if self.step + 1 < train.steps:
                    self.ahead.begin()
                asked = self.interruption is not None and self.interruption.asked
                sums[3].fill_(asked or self.ahead.failed)  # an assignment would wait for the device
                dist.all_reduce(sums)
                arrived = fetch(sums, selections, takers)  # so early that the host need not wait until the device has made the step
            with clock("optimizer"):
                self.engine.step()
        applied = self.engine.was_step_applied()
        if applied:
            with clock("ema"):
                self.ema.update()
        self.step += 1
        self.samples_seen += train.global_batch
        sums, selections, takers = arrived()
        diffusion, balance, z, stop = (sums / self.world.size).tolist()
        self.interrupted = stop > 0 and self.step < train.steps
        parts = clock.stop()
        seconds = time.monotonic() - start
        record: Record = dict(
            step=self.step,
            loss=diffusion,
            balance_loss=balance,
            z_loss=z,
            grad_norm=float(self.engine.get_global_grad_norm()) if applied else math.inf,
            lr=lr,
            data_wait=self.ahead.waited / seconds,
            epoch=self.samples_seen / len(self.dataset),
            seconds=dict(total=seconds, data=self.ahead.waited) | parts,
        )
        record |= throughput(
            self.plan.model,
            batches,
            seconds,
            self.world.size,
            train.precision == "bf16",
            train.activation_checkpointing,
            self.plan.recipe.parallel.tensor,
        )
        if self.plan.recipe.data.log_samples:
            record["samples"] = self._keys(batches)
        if selections.numel():
            record["router"] = router_metrics(selections, takers)
        if applied:
            self.skipped_in_a_row = 0
            if spike := self.spikes(diffusion, per_batch, batches, self.dataset.key):
                record["spike"] = spike
        else:
            self._skip(record, batches)
        return record

    def _keys(self, batches: list[Prepared]) -> list[str]:
        """The keys of the global batch's samples, in its order. Collective."""
        mine = [[self.dataset.key(i) for i in batch.samples.tolist()] for batch in batches]
        return [key for micro in zip(*gathered(mine, self.data_group), strict=True) for keys in micro for key in keys]

    def _skip(self, record: Record, batches: list[Prepared]) -> None:
        """The gradient was not finite, and DeepSpeed left the weights alone: say why, and stop if it happens too often."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        model = self.engine.module  # not the engine, which at stage 0 allows no other backward than its own
        record["skipped"] = explain(
            model,
            batches,
            lambda batch: compute_loss(model, self.objective, batch, self.plan.model).total,
            self.dataset.key,
        )
        if self.world.rank == 0:
            print(f"step {self.step} skipped, its gradient is not finite: {record['skipped']}", flush=True)
        if self.skipped_in_a_row == self.plan.recipe.train.max_skipped_steps:
            raise AgreedError(
                f"train.max_skipped_steps={self.skipped_in_a_row}: so many steps in a row had no finite gradient, the last at step "
                f"{self.step}, {record['skipped']}; checkpoints before it stand; lower train.optimizer.lr or look at the samples"
            )

    def save(self) -> None:
        """Write a checkpoint of this step. Collective."""
        description = self.plan.describe(self.encoder_sha256) | dict(samples_seen=self.samples_seen, skipped=self.skipped)
        description |= dict(started_from=self.started_from, code=self.code)  # rank 0, which writes the index, has the code
        self.saver.save(self.step, self.shards, self.ema, self.step - self.skipped, description)

    def _started_from(self) -> dict[str, Any] | None:
        """Which weights a new run starts from, which are printed; None if the recipe names none."""
        source, weights = self.plan.recipe.model.weights, self.plan.weights
        if source is None or weights is None:
            return None
        kind, step = weights.description["weights"], weights.description["step"]
        print(f"starts from the {kind} weights{of_step(step)} of {source}", flush=True)
        return dict(path=str(Path(source).absolute()), step=step, weights=kind)

    def _newest_checkpoint(self) -> checkpoint.Reader | None:
        path = decided(lambda: checkpoint.newest(self.saver.folder))
        if path is None:
            return None
        return agreed(lambda: checkpoint.Reader(path))

    def _resume(self, reader: checkpoint.Reader) -> None:
        checkpoint.load(reader, self.engine, self.shards, self.ema)
        self.step, self.samples_seen, self.skipped = (reader.index[key] for key in ("step", "samples_seen", "skipped"))
        if self.world.rank == 0:
            print(f"resumed at step {self.step} from {reader.folder}", flush=True)
            assert self.code
            changed = config.changes(reader.index.get("code", {}), {key: self.code[key] for key in ("ditmoe_ds", "commit")}, "code.")
            if changed := changed + config.changes(reader.index["recipe"], plain(asdict(self.plan.recipe))):
                print(f"changed since then: {', '.join(changed)}", flush=True)
            for begun in self.ema.averages.keys() - set(reader.index["ema"]["kinds"]):
                print(f"{begun} begins here, with the weights", flush=True)
            batch, before = self.plan.batch, self.plan.recipe.train.accumulation
            if batch.accumulation != before:
                begun = f"{dist.get_world_size(self.data_group)} processes, begun on {self.plan.begun_on}"
                kept = f"the global batch stays {batch.global_batch}"
                print(f"{begun}: train.accumulation {before} -> {batch.accumulation}, {kept}", flush=True)

    def _callbacks(self, others: Sequence[Callback]) -> list[Callback]:
        train = self.plan.recipe.train
        callbacks: list[Callback] = []
        if train.validate_every:
            callbacks.append(agreed(lambda: Validation(self.plan)))
        if train.sample_every:
            # read by one rank: they are of as many shards, which a thousand ranks would each open
            conditions = decided(lambda: self.plan.grid_conditions(train.sample_images, self.conditioner))
            vae_sha256 = self.plan.manifest.vae_sha256
            callbacks.append(self._loaded(lambda: SampleGrid(self.plan, conditions, self.device), vae_sha256))
        callbacks += [*others, Progress(self.step)]
        if self.plan.recipe.profile:
            callbacks.append(Profile(self.run_dir, self.world.rank))
        if self.world.rank == 0 and self.step < train.steps:  # a start that trains nothing leaves the record as it is
            self._describe_run()
            callbacks.append(MetricsWriter(self.plan, self.run_dir, self.step))
        return [*callbacks, Checkpoints()]

    def _loaded(self, load: Callable[[], T], sha256: str | None) -> T:
        """What ``load`` returns, which loads a model. Raises as ``agreed``. Collective.

        Args:
            sha256: of the model's weights; None for a hub id.
        """
        return agreed(load) if sha256 else fetched(self.world, load)

    def _describe_run(self) -> None:
        clear(self.run_dir)
        cuda = torch.cuda.get_device_name() if self.device.type == "cuda" else None
        environment = dict(
            code=self.code,
            python=platform.python_version(),
            torch=torch.__version__,
            deepspeed=deepspeed.__version__,
            device=cuda or platform.processor() or platform.machine(),
            processes=self.world.size,
            accumulation=self.plan.batch.accumulation,
            hosts=self.hosts,
            job=os.environ.get("SLURM_JOB_ID"),
            threads=torch.get_num_threads(),
            command=sys.argv,
            started_from=self.started_from,
        )
        try:
            config.dump(self.plan.recipe, self.run_dir / "config.yaml")
            (self.run_dir / "env.json").write_text(json.dumps(environment, indent=1))
        except OSError as error:  # checkpoints tell when there is no room for them
            print(f"config.yaml and env.json cannot be written ({error.strerror}); the run goes on", flush=True)
