"""A rank's training step as ``training.trainer`` builds and runs it, on random latents, to be counted."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from ditmoe_ds.diffusion.objectives import make_objective
from ditmoe_ds.distributed import shards
from ditmoe_ds.distributed.ema import EMA
from ditmoe_ds.distributed.engine import build
from ditmoe_ds.distributed.topology import data_group, expert_group
from ditmoe_ds.distributed.zero3 import OnTheirWay
from ditmoe_ds.models.dit import DiT
from ditmoe_ds.planning.counting import GATHERED, Count
from ditmoe_ds.planning.job import Job
from ditmoe_ds.training.network import arrange
from ditmoe_ds.training.plan import begun_on, cut_batch, last_index
from ditmoe_ds.training.recipe import Recipe
from ditmoe_ds.training.step import Prepared, compute_loss


class Rehearsal:
    """Runs on the CPU, or without memory if ``count`` is a ``CountOnMeta``. Weights are not initialised.

    Args:
        job: of the recipe.
        ds_config: what ``read_ds_config`` returned.
    """

    def __init__(self, recipe: Recipe, job: Job, ds_config: dict[str, Any], count: Count):
        self.recipe, self.config, self.patches, self.text, self.count = recipe, job.model, job.patches, job.text, count
        self.sides = job.sides or (job.model.input_size, job.model.input_size)
        train, self.objective = recipe.train, make_objective(recipe.diffusion)
        group = expert_group(recipe.parallel.expert, recipe.parallel.tensor)
        processes = dist.get_world_size(data_group())
        self.batch = cut_batch(train, processes, begun_on(recipe, processes, last_index(recipe)), recipe.parallel.tensor)
        with torch.device("meta"):
            net = DiT(job.model, ep_size=group.size)
        arrange(net, recipe)
        with count:
            count.kind = "buffers"  # all but what is named below
            self.engine = build(net, recipe.parallel, train.optimizer, self.batch, train.precision, ds_config, torch.device("cpu"))
            self.shards = shards.collect(self.engine, group)
            self.ema = EMA(self.shards, recipe.ema)
            self.engine.train()
            count.kind = "text encoder"
            self.encoder = torch.empty(job.encoder, dtype=torch.uint8)
        parts = [getattr(parameter, "ds_tensor", None) for parameter in net.parameters()]
        count.become("weights", [*(part for part in parts if part is not None), *net.parameters(), *net.buffers()])
        count.become("optimizer", [tensor for shard in self.shards for tensor in (shard.master, *shard.moments.values())])
        count.become("EMA", [average for averages in self.ema.averages.values() for average in averages])

    def step(self) -> None:
        """One optimizer step: every micro-batch forward and backward, the optimizer, the averages."""
        with self.count, patch.object(OnTheirWay, "wait", _counted(self.count)):
            for _ in range(self.batch.accumulation):
                self.count.kind = "forward"
                loss = compute_loss(self.engine, self.objective, self._batch(), self.config).total
                self.count.kind = "backward"
                self.engine.backward(loss)
                del loss
                self.count.kind = "optimizer's step"
                self.engine.step()
            assert self.engine.was_step_applied()
            self.ema.update()

    def _batch(self) -> Prepared:
        model, images = self.config, self.batch.micro
        latents = torch.randn(images, model.in_channels, *self.sides)
        told: dict[str, Tensor] = dict(y=torch.zeros(images, dtype=torch.long))
        if model.text_width:
            text = torch.randn(images, self.text, model.text_width, dtype=torch.bfloat16)
            told = dict(text=text, mask=torch.ones(images, self.text, dtype=torch.bool))
        keep = None
        if self.recipe.train.mask_ratio:
            keep = torch.arange(self.patches).expand(images, self.patches)
        return Prepared(latents, told, torch.rand(images), torch.randn_like(latents), torch.zeros(images), keep)


def _counted(count: Count) -> Callable[..., None]:
    """``OnTheirWay.wait``, whose assembled parameters count as gathered; not those that this rank holds alone."""
    real = OnTheirWay.wait

    def wait(self: OnTheirWay, handle_dependency: bool = True) -> None:
        parameters = self.parameters
        real(self, handle_dependency)
        count.become(GATHERED, [parameter.data for parameter in parameters if parameter.ds_zero_partition_world_size > 1])

    return wait
