"""Checkpoints by logical tensor: any (ZeRO stage, EP, TP, world) loads what any other saved.

A checkpoint is a folder ``step_00001000`` with one safetensors file per rank and an ``index.json``. A file holds ranges
of flattened logical tensors under ``kind/name@start``; the kinds are master, the optimizer's moments and one per EMA.
Of a tensor that tensor parallelism cuts they are ranges of flattened slices, ``kind/name:part@start``; the index says how it is cut.
Nothing is pickled. A folder has its final name only when every rank's file is on disk, and ``latest`` names it only then.
"""

import json
import os
import shutil
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ditmoe_ds.distributed.ema import EMA
from ditmoe_ds.distributed.engine import Engine
from ditmoe_ds.distributed.host import empty_on_host
from ditmoe_ds.distributed.shards import Shard, fill, set_optimizer_step
from ditmoe_ds.distributed.tensorfile import Entry, TensorFile, write
from ditmoe_ds.distributed.topology import agreed
from ditmoe_ds.errors import CheckpointError, UserError, in_a_line
from ditmoe_ds.slices import Cut, Slice

FORMAT = "ditmoe-checkpoint/4"

PATIENCE = 300.0
"""Seconds that a run which has failed waits for the checkpoint that is being written."""

T = TypeVar("T")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every: int = 1000
    """Steps between checkpoints; one is also written at the end."""
    keep: int = 3
    """How many of the newest are kept."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this are never deleted; 0 for none."""
    asynchronous: bool = False
    """Copy to host memory, write in the background and train on. The copy takes as much host memory as the rank's file."""
    on_failure: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written (a full disk): stop the run, or say so and train on. An asynchronous failure
    is printed at once and stops the run at the next save."""

    def most(self, steps: int) -> int:
        """The most that a run of so many steps has on disk at once: one is written before the one that it replaces is deleted."""
        written = sorted({*range(self.every, steps + 1, self.every), steps})
        return len({*written[-self.keep - 1 :], *(step for step in written if self.keep_every and step % self.keep_every == 0)})


class Saver:
    """Writes a run's checkpoints into ``folder``. Methods are collective; one checkpoint is written at a time."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        self.folder, self.config = folder, config
        # a group of its own, so that a background thread never meets training's collectives; made now, as it connects to every rank
        # A disk may take its time: that every rank is alive, the lookout watches.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        self.buffers: dict[str, Tensor] = {}
        self.thread: threading.Thread | None = None
        self.failure: Exception | None = None
        self.lost = False
        """Whether the last checkpoint could not be written."""
        if dist.get_rank() == 0:
            for unfinished in folder.glob("*.partial"):  # of a run that was killed
                _discard(unfinished)

    def save(self, step: int, shards: list[Shard], ema: EMA, optimizer_steps: int, description: dict[str, Any]) -> None:
        """Write ``step_N``, point ``latest`` to it and delete what need not be kept.

        Args:
            optimizer_steps: steps that the optimizer took (skipped ones do not count).
            description: what else to store, JSON-able: the model, the data position.

        Raises:
            AgreedError: this one (asynchronous: the one before) could not be written, and ``on_failure`` is stop.
        """
        self.finish()
        self.lost = False
        entries, pieces = [], []
        for i, shard in enumerate(shards):
            if shard.saved:
                stored = _stored(shard.name, shard.slice)
                pieces.append((shard.name, shard.shape, shard.slice, shard.start, shard.master.numel()))
                averages = {kind: average[i] for kind, average in ema.averages.items()}
                for kind, values in {"master": shard.master, **averages, **shard.moments}.items():
                    key = f"{kind}/{stored}@{shard.start}"
                    held = self._host_copy(key, values) if self.config.asynchronous else values
                    entries.append(Entry(key, torch.float32, held.shape, held.detach))
        index = dict(
            format=FORMAT,
            step=step,
            optimizer_steps=optimizer_steps,
            ema=dict(kinds=list(ema.averages), steps=ema.steps),
            **description,
        )
        if not self.config.asynchronous:
            self._write(index, entries, pieces)
            self.finish()
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.thread = threading.Thread(target=self._write, args=(index, entries, pieces), name="checkpoint", daemon=True)
        self.thread.start()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. Raises AgreedError, as ``save`` does."""
        if self.thread:
            self.thread.join()
            self.thread = None
        failure, self.failure = self.failure, None
        self.lost = self.lost or failure is not None
        if failure and (self.config.on_failure == "stop" or not isinstance(failure, UserError)):
            raise failure

    def wait(self) -> None:
        """Wait, for at most ``PATIENCE``, until the checkpoint that is being written is complete. Not collective."""
        if self.thread:
            self.thread.join(PATIENCE)

    def _host_copy(self, key: str, values: Tensor) -> Tensor:
        if key not in self.buffers:
            self.buffers[key] = empty_on_host(values.shape, values.dtype, locked=values.is_cuda)
        return self.buffers[key].copy_(values, non_blocking=True)

    def _write(self, index: dict[str, Any], entries: list[Entry], pieces: list[Any]) -> None:
        unfinished = self.folder / f"step_{index['step']:08d}.partial"
        file = unfinished / _file(dist.get_rank())
        try:
            self._on_rank_0(lambda: _make(unfinished))
            self._together(lambda: write(file, entries))
            everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
            dist.gather_object((file.stat().st_size, pieces), everyone, group=self.group)
            self._on_rank_0(lambda: self._publish(unfinished, index, everyone or []))
        except Exception as failure:
            self.failure = failure
            if dist.get_rank() == 0 and isinstance(failure, UserError):
                shutil.rmtree(unfinished, ignore_errors=True)
                then = "the run stops" if self.config.on_failure == "stop" else "the run goes on"
                print(f"checkpoint of step {index['step']} was not written: {failure}; the ones before stand, {then}", flush=True)

    def _publish(self, unfinished: Path, index: dict[str, Any], everyone: list[Any]) -> None:
        final = unfinished.with_suffix("")
        index["files"] = {_file(rank): size for rank, (size, _) in enumerate(everyone)}
        for name, size in index["files"].items():
            if (unfinished / name).stat().st_size != size:
                raise CheckpointError(f"{unfinished / name}: {(unfinished / name).stat().st_size} bytes, its rank wrote {size}")
        index["shapes"], index["cuts"], index["pieces"] = {}, {}, defaultdict(list)
        for rank, (_, pieces) in enumerate(everyone):
            for name, shape, part, start, count in pieces:
                index["shapes"][name] = shape
                if part:
                    index["cuts"][name] = (*part.cut, part.parts)
                index["pieces"][_stored(name, part)].append((start, count, rank))
        _write_text(unfinished / "index.json", json.dumps(index))
        _remove(final)
        unfinished.rename(final)
        _sync(self.folder)
        _write_text(self.folder / "latest", final.name)
        # Later ones are from before the run went back to an earlier checkpoint, and do not count.
        for old in sorted(path for path in self.folder.glob("step_????????") if path <= final)[: -self.config.keep]:
            if not self.config.keep_every or int(old.name[5:]) % self.config.keep_every:
                _discard(old)

    def _together(self, action: Callable[[], T]) -> T:
        def on_disk() -> T:
            try:
                return action()
            except OSError as error:
                raise CheckpointError(f"{error.filename or self.folder}: {error.strerror}") from None

        return agreed(on_disk, self.group)

    def _on_rank_0(self, action: Callable[[], None]) -> None:
        self._together(action if dist.get_rank() == 0 else lambda: None)


class Reader:
    """Random access to a checkpoint's logical tensors; reads only the bytes asked for.

    Raises:
        CheckpointError: the folder is no complete checkpoint.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.index: dict[str, Any] = json.loads((folder / "index.json").read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{folder}: no readable index.json ({error}); is this a finished checkpoint?") from None
        if not isinstance(self.index, dict):
            raise CheckpointError(f"{folder}: index.json holds no mapping; is this a finished checkpoint?")
        if self.index.get("format") != FORMAT:
            found = self.index.get("format")
            raise CheckpointError(f"{folder}: format {found!r}, this release reads {FORMAT!r}; go on with the one that wrote it")
        self.opened: dict[int, TensorFile] = {}
        self.last: TensorFile | None = None
        """The file that was read last, which stays open for the next read: it asks a file server once for it, not for every tensor."""

    def verify(self) -> None:
        """Refuse a checkpoint of which a file is missing or has lost bytes, or whose index makes no sense."""
        try:
            self._verify()
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{self.folder}: index.json is damaged ({type(error).__name__}: {in_a_line(error)})") from None

    def _verify(self) -> None:
        for name, size in self.index["files"].items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise CheckpointError(f"{path}: missing or not of its {size} bytes")
        for name, shape in self.index["shapes"].items():
            parts = self._parts(name)
            wanted = torch.Size(shape).numel() // len(parts)
            for stored in (_stored(name, part) for part in parts):
                held = 0
                for start, count, _ in sorted(self.index["pieces"][stored]):
                    held += count if start == held else 0  # not what is there twice, nor what comes after a gap
                if held != wanted:
                    raise CheckpointError(f"{self.folder}: {stored} has {held} of {wanted} elements")

    def read(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Fill ``out`` (1-D) with the elements of ``kind/name`` from ``start`` on; kind ``ema`` is the first average."""
        if kind == "ema":
            kind = self.index["ema"]["kinds"][0]
        for part in self._parts(name):
            stored = partial(self._read_stored, kind, _stored(name, part))
            if part:
                part.scatter(start, out, stored)
            else:
                stored(start, out)

    def _parts(self, name: str) -> list[Slice | None]:
        """The slices that the tensor is stored in; None is all of it."""
        if name not in self.index["cuts"]:
            return [None]
        dim, blocks, parts = self.index["cuts"][name]
        shape = tuple(self.index["shapes"][name])
        if not 0 < parts <= shape[dim]:
            raise ValueError(f"{name}: {parts} parts of {shape[dim]} rows")
        return [Slice(shape, Cut(dim, tuple(blocks)), part, parts) for part in range(parts)]

    def _read_stored(self, kind: str, name: str, start: int, out: Tensor) -> None:
        stop = start + out.numel()
        for offset, count, rank in self.index["pieces"][name]:
            low, high = max(start, offset), min(stop, offset + count)
            if low < high:
                if rank not in self.opened:
                    self.opened[rank] = TensorFile(self.folder / _file(rank))
                file, key = self.opened[rank], f"{kind}/{name}@{offset}"
                if key not in file.shapes:
                    raise CheckpointError(f"{file.path}: no {key}, which index.json says is there; is it of another one?")
                if file is not self.last:
                    self.close()
                self.last = file
                file.read(key, low - offset, out[low - start : high - start])

    def close(self) -> None:
        """Until the next read. On NFS a folder cannot be deleted from where a file in it is open."""
        if self.last:
            self.last.close()


def newest(folder: Path) -> Path | None:
    """The checkpoint that ``folder/latest`` names (without that file, as in a folder into which checkpoints alone were copied, the
    newest); if that is damaged, the newest intact one before it, which is printed. None before the first save.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    found = _named(folder)
    if not found and not (folder / "latest").is_file():
        return None
    for path in found:
        try:
            Reader(path).verify()
        except CheckpointError as error:
            then = "there is none before it" if path == found[-1] else "taking the one before"
            print(f"checkpoint refused, {then}: {error}", file=sys.stderr, flush=True)
            continue
        return path
    fix = "restore one, or remove the folder, and the run begins anew"
    raise CheckpointError(f"{folder}: none of its {len(found)} checkpoints up to {_last(folder) or found[0].name} is whole; {fix}")


def newest_index(folder: Path) -> dict[str, Any] | None:
    """The newest index that can be read. Whether its checkpoint is intact, ``newest`` checks."""
    for path in _named(folder):
        with suppress(CheckpointError):
            return Reader(path).index
    return None


def _last(folder: Path) -> str | None:
    marker = folder / "latest"
    return marker.read_text().strip() if marker.is_file() else None


def _named(folder: Path) -> list[Path]:
    """Checkpoints up to the one that ``folder/latest`` names, the newest first."""
    last = _last(folder)
    return sorted((path for path in folder.glob("step_????????") if last is None or path.name <= last), reverse=True)


@torch.no_grad()
def load(reader: Reader, engine: Engine, shards: list[Shard], ema: EMA) -> None:
    """Restore weights, moments, step count and EMA, whatever shape of run saved them. Collective.

    An average that the checkpoint does not have begins at the weights.
    """

    def read_the_rest() -> None:
        for i, shard in enumerate(shards):
            for moment, out in shard.moments.items():
                shard.read(partial(reader.read, moment), out)
            for kind, average in ema.averages.items():
                if kind in reader.index["ema"]["kinds"]:
                    shard.read(partial(reader.read, kind), average[i])
                else:
                    average[i].copy_(shard.master)

    fill(engine, shards, partial(reader.read, "master"))
    agreed(read_the_rest)
    reader.close()
    set_optimizer_step(engine, reader.index["optimizer_steps"])
    ema.steps = reader.index["ema"]["steps"]
    engine.global_steps = reader.index["step"]


def _stored(name: str, part: Slice | None) -> str:
    """What a tensor, or this part of it, is called in the files."""
    return f"{name}:{part.part}" if part else name


def _file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _make(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _discard(folder: Path) -> None:
    """Delete a folder that is no longer needed, or print why that is impossible."""
    try:
        _remove(folder)
    except OSError as error:
        print(f"{folder} cannot be deleted ({error.strerror}); the run goes on", flush=True)


def _remove(folder: Path) -> None:
    """Delete a checkpoint such that, killed half-way, nothing is left under its name; or what is left of one."""
    if folder.exists():
        shutil.rmtree(folder if folder.suffix == ".partial" else folder.rename(folder.with_suffix(".old.partial")))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _write_text(path: Path, text: str) -> None:
    """Replace ``path`` at once, durably."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    _sync(temporary)
    temporary.rename(path)
    _sync(path.parent)
