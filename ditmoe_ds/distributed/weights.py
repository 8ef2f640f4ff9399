"""One set of weights, wherever it lies: a run's newest checkpoint, a checkpoint, or a weights folder.

A **weights folder** is how weights leave and enter: ``config.json`` says what they are, ``model-0000i-of-0000N.safetensors``
with ``model.safetensors.index.json`` (the Hugging Face hub's layout) hold one tensor per parameter of the whole model, all
experts of a layer as one (E, ...) tensor. Nothing here needs a process group, a GPU or memory for more than one tensor.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditmoe_ds.distributed import checkpoint
from ditmoe_ds.distributed.tensorfile import CHUNK, Entry, TensorFile, write
from ditmoe_ds.errors import CheckpointError, ConfigError

FORMAT = "ditmoe-weights/1"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Tensors:
    """Named tensors, read on demand."""

    shapes: dict[str, tuple[int, ...]]
    """Of every tensor, by name."""
    read: Callable[[str, int, Tensor], None]
    """``read(name, start, out)`` fills ``out`` (1-D) with the elements of the flattened tensor from ``start`` on."""

    def tensor(self, name: str, start: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
        """One whole tensor, fp32; or its elements from ``start`` on, as many as a tensor of this shape has."""
        out = torch.empty(self.shapes[name] if shape is None else shape)
        self.read(name, start, out.view(-1))
        return out


@dataclass
class Weights(Tensors):
    """The parameters of a whole model (EP 1), by their names in it."""

    description: dict[str, Any]
    """``name`` (or None), ``model`` and ``diffusion`` (fields of DiTConfig, DiffusionConfig), ``latents`` (VAE, scaling_factor,
    shift_factor, class names; {} if unknown), ``step`` (0 if unknown), ``weights`` (which set: ema, master, ...)."""

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Compare with the parameters of a model.

        Raises:
            CheckpointError: one is missing, unknown or of another shape.
        """
        for name in shapes | self.shapes:
            if shapes.get(name) != self.shapes.get(name):
                raise CheckpointError(f"{name}: the model has shape {shapes.get(name)}, the weights {self.shapes.get(name)}")

    def sha256(self) -> str:
        """Of names, shapes and fp32 values: the same however the weights are cut into files. Reads them all."""
        digest = hashlib.sha256()
        for name in sorted(self.shapes):
            digest.update(f"{name}{list(self.shapes[name])}".encode())
            count = math.prod(self.shapes[name])
            for start in range(0, count, CHUNK):
                piece = torch.empty(min(CHUNK, count - start))
                self.read(name, start, piece)
                digest.update(piece.numpy().data)
        return digest.hexdigest()


def of_step(step: int) -> str:
    """For messages, `` of step N``; nothing for weights made elsewhere, whose step is unknown."""
    return f" of step {step}" if step else ""


def differently_encoded(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """How two descriptions of latents differ, as far as both know: ``key: ours -> theirs``; None if they agree. Models in folders are
    known by their sha256, wherever they lie; hub ids by their name."""
    pairs = {key: (ours.get(key), theirs.get(key)) for key in ("scaling_factor", "shift_factor", "vae_sha256")}
    mine, other = ours.get("text", {}), theirs.get("text", {})
    pairs |= {f"text.{key}": (mine.get(key), other.get(key)) for key in ("sha256", "max_tokens")}
    if pairs["vae_sha256"] == (None, None):
        pairs["vae"] = ours.get("vae"), theirs.get("vae")
    if pairs["text.sha256"] == (None, None):
        pairs["text.encoder"] = mine.get("encoder"), other.get("encoder")
    for key, (mine, other) in pairs.items():
        if None not in (mine, other) and mine != other:
            return f"{key}: {mine} -> {other}"
    return None


def locate(path: str | Path) -> Path:
    """The folder that ``open_weights`` reads: for a run directory its newest checkpoint (a run may soon write another), else ``path``.

    Raises:
        CheckpointError: there is neither a finished checkpoint nor a weights folder.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    if (path / "index.json").is_file():
        checkpoint.Reader(path).verify()
        return path
    if found := checkpoint.newest(path / "checkpoints"):
        return found
    inside = sorted(entry.name for entry in path.iterdir())[:8] if path.is_dir() else []
    what = f"it holds {', '.join(inside) or 'nothing'}" if path.is_dir() else "it is a file" if path.exists() else "it does not exist"
    if (path / "model_index.json").is_file():
        what = f"it is a pipeline of diffusers: make a weights folder of it by ditmoe import diffusers {path} --out FOLDER"
    raise CheckpointError(f"{path}: no finished checkpoint and no weights folder; {what}")


def open_weights(path: str | Path, kind: str = "ema") -> Weights:
    """Open a run directory (its newest checkpoint), a checkpoint folder ``step_N`` or a weights folder.

    Args:
        kind: which weights of a checkpoint: ``ema`` (its first average), one average by its name, such as ``ema_0.999``, or ``master`` for
            the raw ones. A weights folder holds one set, whose kind is in its description.

    Raises:
        CheckpointError: nothing of the three is there, or it is incomplete.
        ConfigError: the checkpoint has no such weights.
    """
    return open_located(locate(path), kind)


def open_located(path: Path, kind: str = "ema") -> Weights:
    """As ``open_weights``, given what ``locate`` returned, which looks for every file of a checkpoint: one rank can do that for all."""
    if (path / "config.json").is_file():
        opened = _open_folder(path)
        if kind not in ("ema", opened.description["weights"]):
            raise CheckpointError(f"{path}: a weights folder of {opened.description['weights']} weights alone, not {kind}")
        return opened
    reader = checkpoint.Reader(path)
    if kind not in ("ema", "master", *(averages := reader.index["ema"]["kinds"])):
        raise ConfigError("--weights", kind, f"choose {', '.join(averages)}, ema (the first of these) or master; {path} has no others")
    description = {key: reader.index[key] for key in ("model", "diffusion", "latents", "step")}
    shapes = {name: tuple(shape) for name, shape in reader.index["shapes"].items()}
    return Weights(shapes, partial(reader.read, kind), dict(name=None, **description, weights=kind))


def _open_folder(path: Path) -> Weights:
    try:
        description = json.loads((path / "config.json").read_text())
        found = description.pop("format", None)
        if found != FORMAT:
            raise CheckpointError(f"{path}: its config.json has format {found!r}, not {FORMAT!r}; is it to be imported (ditmoe import)?")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: no readable config.json ({error})") from None
    if missing := {"model", "diffusion", "latents", "step", "weights"} - description.keys():
        raise CheckpointError(f"{path}: its config.json lacks {min(missing)!r}")
    tensors = open_shards(path, "model")
    return Weights(tensors.shapes, tensors.read, description)


def open_shards(folder: Path, stem: str) -> Tensors:
    """Open ``stem.safetensors``, or what ``stem.safetensors.index.json`` lists.

    Raises:
        CheckpointError: neither is there, or a file or a tensor of the index is missing.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        single = TensorFile(folder / f"{stem}.safetensors")
        return Tensors(single.shapes, single.read)
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
        if outside := [file for file in weight_map.values() if Path(file).name != file]:
            raise ValueError(f"{outside[0]!r} lies outside the folder")
        files = {file: TensorFile(folder / file) for file in sorted(set(weight_map.values()))}
        shapes = {name: files[file].shapes[name] for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: does not fit the files beside it ({error})") from None
    return Tensors(shapes, lambda name, start, out: files[weight_map[name]].read(name, start, out))


def write_weights(folder: str | Path, weights: Weights, dtype: str = "fp32", shard_bytes: int = 5 * 10**9) -> Path:
    """Write a weights folder, tensor by tensor.

    Args:
        folder: a new or empty folder; it gets its name when all is written.
        dtype: a key of ``DTYPES``.
        shard_bytes: most bytes of tensors per file, except for a single larger tensor.

    Raises:
        CheckpointError: the folder is not empty, a tensor is missing from the source, or does not fit ``dtype``.
    """
    entries = [Entry(name, DTYPES[dtype], shape, partial(weights.tensor, name)) for name, shape in weights.shapes.items()]
    with new_folder(folder) as unfinished:
        write_shards(unfinished, "model", entries, shard_bytes)
        write_json(unfinished / "config.json", dict(format=FORMAT, **weights.description | dict(dtype=dtype)))
    return Path(folder)


def check_new(target: Path) -> None:
    """Raises CheckpointError if there is something at ``target``, but for an empty folder."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(f"{target}: something is there already; choose a new or empty folder")


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A folder to fill, which takes the name ``target`` at the end and until then is its sibling ``.partial``.

    Raises:
        CheckpointError: there is something at ``target``.
    """
    target = Path(target).resolve()
    check_new(target)
    unfinished = target.with_name(target.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def write_shards(folder: Path, stem: str, entries: Sequence[Entry], shard_bytes: int) -> None:
    """Write ``stem-0000i-of-0000N.safetensors`` in the order of ``entries``, and the index that says what is where."""
    shards: list[list[Entry]] = [[]]
    room = shard_bytes
    for entry in entries:
        size = math.prod(entry.shape) * entry.dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write(folder / file, shard)
        weight_map.update((entry.key, file) for entry in shard)
    total = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in entries)
    write_json(folder / f"{stem}.safetensors.index.json", dict(metadata=dict(total_size=total), weight_map=weight_map))


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
