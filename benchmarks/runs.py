"""What benchmarks of training share: a folder of random latents, and a real trainer on them with random weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ditmoe_ds.distributed.topology import World
from ditmoe_ds.distributed.weights import Weights
from ditmoe_ds.latents.manifest import EMPTY_TEXT, FORMAT, VERSION, Manifest, Shard, Split, Splits, Text, sha256
from ditmoe_ds.latents.tars import ShardWriter
from ditmoe_ds.models.dit import DiTConfig
from ditmoe_ds.models.sizes import parameter_shapes
from ditmoe_ds.training.callbacks import Record
from ditmoe_ds.training.plan import read_plan
from ditmoe_ds.training.trainer import Trainer

RECIPE = Path(__file__).parents[1] / "recipes" / "dit_moe_s2_8e2a_256.yaml"
CLASSES = 1000


def write_latents(
    folder: Path, shards: int, per_shard: int, shape: tuple[int, ...] = (4, 32, 32), text: tuple[int, int] | None = None
) -> Manifest:
    """A folder of random float16 latents, with random bf16 ``text`` (tokens, width) or without."""
    folder.mkdir(parents=True)
    written = []
    for number in range(shards):
        path = folder / f"train-{number:06d}.tar"
        with ShardWriter(path) as writer:
            for i in range(per_shard):
                tensors = dict(latent=torch.randn(shape).half())
                if text:
                    tensors["text"] = torch.randn(text).bfloat16()
                writer.write(f"{number}-{i}", {"label": i % CLASSES, "class": "", "source": ""}, **tensors)
        written.append(Shard(path.name, per_shard, path.stat().st_size, sha256(path), shape))
    told, classes = None, tuple(shards * len(range(c, per_shard, CLASSES)) for c in range(CLASSES))
    if text:
        safetensors.torch.save_file({"text": torch.randn(1, text[1]).bfloat16()}, folder / EMPTY_TEXT)
        told = Text("none", None, text[1], text[0], sha256(folder / EMPTY_TEXT))
    Manifest(
        root=str(folder), format=FORMAT, version=VERSION, source="random", vae="none", vae_sha256=None, scaling_factor=1.0,
        shift_factor=0.0, downsample=8, dtype="float16", store="mean", text=told, mean=(0.0,) * 4, std=(1.0,) * 4, num_classes=CLASSES,
        class_names=tuple(map(str, range(CLASSES))), class_histogram=classes, rejected=0,
        splits=Splits(Split(shards * per_shard, tuple(written)), Split(0, ())),
    ).save()  # fmt: skip
    return Manifest.load(folder)


def random_reader() -> Callable[[str, int, Tensor], None]:
    """For ``Weights``: fills ``out`` with a million random numbers again and again, from anywhere among them; new ones for each of
    billions would take a CPU most of a minute."""
    noise = torch.empty(2**20 + 7).normal_(std=0.02).bfloat16().float()  # a prime, so that experts begin at different places

    def read(name: str, start: int, out: Tensor) -> None:
        turned = noise.roll(int(torch.randint(len(noise), ())))
        for part in out.split(len(noise)):
            part.copy_(turned[: len(part)])

    return read


def make_trainer(world: World, settings: dict[str, Any], change: dict[str, Any] | None = None) -> Trainer:
    """A trainer that saves, validates and samples nothing. Its weights are random, none zero, and exact in bf16, so that they equal its
    fp32 masters.

    Args:
        settings: ``key=value`` of the recipe.
        change: fields of ``DiTConfig`` to replace in the named model.
    """
    quiet = {"train.steps": 10**6, "train.validate_every": 0, "train.sample_every": 0, "train.log_every": 10**6}
    quiet |= {"checkpoint.every": 10**6, "parallel.expert": 1, "diffusion.objective": "rectified_flow"}
    plan = read_plan([str(RECIPE), *(f"{key}={value}" for key, value in (quiet | settings).items())], world.size)
    model: DiTConfig = replace(plan.model, **change or {})
    made = Trainer(replace(plan, model=model, weights=Weights(parameter_shapes(model), random_reader(), {})), world)
    made.engine.train()
    return made


def close(trainer: Trainer) -> None:
    """End it and free its memory, which DeepSpeed's hooks would hold."""
    trainer.loader.close()
    trainer.engine.destroy()


def train(trainer: Trainer) -> Record:
    """One step as ``Trainer.run`` makes it. Returns its record."""
    record = trainer.train_step()
    for callback in trainer.callbacks:
        callback(trainer, record)
    assert "skipped" not in record, record
    return record
