"""Checkpoints by logical tensor: any (ZeRO stage, EP, world) loads what any other saved.

A checkpoint is a folder ``step_00001000`` with one safetensors file per rank and an ``index.json``. A file holds ranges
of flattened logical tensors under ``kind/name@start``; the kinds are master, exp_avg, exp_avg_sq and ema. Nothing is
pickled. A folder is complete when it has its final name, which it gets after every rank's file is on disk.
"""

import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from ditmoe_ds.distributed.ema import EMA
from ditmoe_ds.distributed.engine import Engine
from ditmoe_ds.distributed.shards import MOMENTS, Shard, refresh_weights, set_optimizer_step
from ditmoe_ds.distributed.tensorfile import TensorFile
from ditmoe_ds.errors import CheckpointError

FORMAT = "ditmoe-checkpoint/1"


def save(folder: Path, step: int, shards: list[Shard], ema: EMA, description: dict[str, Any], keep: int) -> Path:
    """Write ``folder/step_N`` and point ``folder/latest`` to it; then delete all but the newest ``keep``. Collective.

    Args:
        description: what else to store, JSON-able: the model, the data position.
    """
    rank = dist.get_rank()
    final, partial = folder / f"step_{step:08d}", folder / f"step_{step:08d}.partial"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    tensors: dict[str, Tensor] = {}
    for shard, average in zip(shards, ema.values, strict=True):
        if shard.saved:
            for kind, values in {"master": shard.master, "ema": average, **shard.moments}.items():
                tensors[f"{kind}/{shard.name}@{shard.start}"] = values
    file = partial / f"rank_{rank:05d}.safetensors"
    save_file(tensors, file)
    _sync(file)
    shapes: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(shapes, {shard.name: shard.shape for shard in shards})
    if rank == 0:
        index = dict(
            format=FORMAT,
            step=step,
            ema_updates=ema.updates,
            files={path.name: path.stat().st_size for path in sorted(partial.glob("*.safetensors"))},
            shapes={name: shape for of_rank in shapes for name, shape in of_rank.items()},
            **description,
        )
        _write(partial / "index.json", json.dumps(index, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(folder)
        _write(folder / "latest", final.name)
        for old in sorted(folder.glob("step_????????"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


class Reader:
    """Random access to a checkpoint's logical tensors; reads only the bytes asked for.

    Raises:
        CheckpointError: the folder is no complete checkpoint.
    """

    def __init__(self, folder: Path):
        try:
            self.index: dict[str, Any] = json.loads((folder / "index.json").read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: no readable index.json ({error}); is this a finished checkpoint?") from None
        if self.index.get("format") != FORMAT:
            raise CheckpointError(f"{folder}: format {self.index.get('format')!r}, this code reads {FORMAT!r}")
        self.pieces: dict[str, list[tuple[int, int, TensorFile, str]]] = defaultdict(list)
        for name, size in self.index["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise CheckpointError(f"{path}: missing or not of its {size} bytes; take an older checkpoint")
            file = TensorFile(path)
            for key, (count,) in file.shapes.items():
                tensor, _, start = key.rpartition("@")
                self.pieces[tensor].append((int(start), count, file, key))

    def read(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Fill ``out`` (1-D) with the elements of ``kind/name`` from ``start`` on."""
        stop, filled = start + out.numel(), 0
        for offset, count, file, key in self.pieces[f"{kind}/{name}"]:
            low, high = max(start, offset), min(stop, offset + count)
            if low < high:
                file.read(key, low - offset, out[low - start : high - start])
                filled += high - low
        if filled != out.numel():
            raise CheckpointError(f"{kind}/{name}: {filled} of elements {start}..{stop} are in the checkpoint")

    def check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Refuse a model whose logical tensors (or the part of them given) are not this checkpoint's."""
        for name, shape in shapes.items():
            saved = self.index["shapes"].get(name)
            if saved is None or tuple(saved) != shape:
                raise CheckpointError(f"{name}: the model has shape {list(shape)}, the checkpoint {saved}; is it another model?")


def newest(folder: Path) -> Path | None:
    """The checkpoint that ``folder/latest`` names, or None before the first save."""
    marker = folder / "latest"
    return folder / marker.read_text().strip() if marker.is_file() else None


@torch.no_grad()
def load(reader: Reader, engine: Engine, shards: list[Shard], ema: EMA) -> None:
    """Restore weights, moments, step count and EMA, whatever shape of run saved them. Collective."""
    reader.check_shapes({shard.name: shard.shape for shard in shards})
    for shard, average in zip(shards, ema.values, strict=True):
        reader.read("master", shard.name, shard.start, shard.master)
        reader.read("ema", shard.name, shard.start, average)
        for key in MOMENTS:
            reader.read(key, shard.name, shard.start, shard.moments[key])
    set_optimizer_step(engine, reader.index["step"])
    ema.updates = reader.index["ema_updates"]
    engine.global_steps = reader.index["step"]
    refresh_weights(engine)


@torch.no_grad()
def load_weights(reader: Reader, model: nn.Module, kind: str) -> None:
    """Fill a whole model (EP 1, no engine) with ``kind`` master or ema."""
    reader.check_shapes({name: tuple(parameter.shape) for name, parameter in model.named_parameters()})
    for name, parameter in model.named_parameters():
        reader.read(kind, name, 0, parameter.view(-1))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _write(path: Path, text: str) -> None:
    """Replace ``path`` at once, durably."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    _sync(temporary)
    temporary.rename(path)
    _sync(path.parent)
