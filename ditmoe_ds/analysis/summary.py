"""The numbers of ``analyze``: what follows from the counts and from a run's records."""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditmoe_ds.analysis.experts import lift
from ditmoe_ds.analysis.information import entropy, informations
from ditmoe_ds.analysis.routing import Takings
from ditmoe_ds.pipelines.run import Run

Numbers = dict[str, Any]
RECORDS = 20_000
"""Most steps that are read."""
PLACES = 100
"""Most points of a curve over training."""


def summary(run: Run, counted: Takings, sides: tuple[int, int], labels: Tensor, permutations: int) -> Numbers:
    """What follows from the counts; layers are those with experts, whose numbers are in ``layers``."""
    config, labelled = run.model.config, labels >= 0  # held-out samples may have no class
    classes = config.num_classes if labelled.any() else 0
    samples, times, layers, experts = counted.by_time.shape
    tables = dict(timestep=counted.by_time.sum(0), position=counted.by_position.sum(0))
    if classes:
        by_sample = counted.by_time.sum(1)
        tables["class"] = torch.zeros(classes, layers, experts, dtype=by_sample.dtype).index_add_(0, labels[labelled], by_sample[labelled])
    shares = {axis: (table / table.sum(-1, keepdim=True)).transpose(0, 1) for axis, table in tables.items()}
    total = tables["timestep"].sum(0)
    per_image = config.routing == "expert" and config.router.pool == "image"
    tokens = samples * times * math.prod(sides)
    found = informations(counted, sides, labels, classes, permutations)
    return dict(
        step=run.step,
        samples=samples,
        classes=len(labels[labelled].unique()),
        experts=experts,
        top_k=config.top_k,
        routing=config.routing,
        layers=list(config.sparse_layers),
        sides=list(sides),
        timesteps=[(k + 0.5) / times for k in range(times)],
        class_names=run.latents.get("class_names"),
        permutations=permutations,
        share=shares,
        load=total / total.sum(-1, keepdim=True),
        entropy=entropy(shares["timestep"]),
        information={axis: one.report() for axis, one in found.items()},
        fixed=["timestep", "class"] if per_image else [],
        lift=lift(counted.together, tokens, distinct=config.routing == "token"),
        experts_per_token=counted.by_time.sum().item() / tokens / layers,
        takers=spread(counted.takers.transpose(0, 1)),
        takers_by_position=counted.by_position.sum((0, 3)).T / (samples * times),
    )


def spread(takers: Tensor) -> dict[str, Tensor]:
    """How unequally tokens share the experts.

    Args:
        takers: (..., E + 1) tokens that 0, 1, ..., E experts took.

    Returns:
        (...) ``untaken``, the share of tokens that no expert took; ``std`` of the number of experts per token; ``gini``, half the
        mean difference of two tokens over the mean: 0 if all tokens have the same, towards 1 if few have all.
    """
    share = takers.double() / takers.sum(-1, keepdim=True)
    number = torch.arange(takers.shape[-1], dtype=torch.float64)
    mean = share @ number
    apart = (number[:, None] - number).abs()
    gini = ((share @ apart) * share).sum(-1) / (2 * mean)
    return dict(untaken=share[..., 0], std=(share @ number.square() - mean.square()).clamp(min=0).sqrt(), gini=gini)


def read_metrics(metrics: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``, without skipped steps and without an incomplete last line; none if there is no such file.

    Of more than ``RECORDS`` steps only every n-th and those with a validation loss: a file may be larger than the memory.
    """
    if not metrics.is_file():
        return []
    with metrics.open() as file:
        every = sum(1 for _ in file) // RECORDS + 1
    with metrics.open() as file:
        lines = [line for number, line in enumerate(file) if number % every == 0 or '"val_loss"' in line]
    records = []
    for line in lines:
        with suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if record["loss"] is not None]


def training(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Loss and the routers' records of a run, as means over equal stretches of steps: ``loss`` (P,), ``router`` by name (L, P)."""
    every = -(-len(records) // PLACES)
    stretches = [records[first : first + every] for first in range(0, len(records), every)]
    names = [name for name in records[-1]["router"] if all(name in record["router"] for record in records)]
    router = {
        name: torch.stack([torch.tensor([r["router"][name] for r in stretch]).mean(0) for stretch in stretches], dim=1) for name in names
    }
    loss = torch.tensor([sum(r["loss"] for r in stretch) / len(stretch) for stretch in stretches])
    steps = stretches[0][-1]["step"] - stretches[0][0]["step"] + 1  # of more than RECORDS not each is among the records
    return dict(steps=[stretch[-1]["step"] for stretch in stretches], every=steps, loss=loss, router=router)
