"""The folder being encoded: what was asked for, and which units of it are done.

    request.json          what is encoded, so that a later run knows whether it may continue here
    train-000003.tar ...  unit 3's samples, unless it has none of that split
    units/000003.json     written last: unit 3 is done
    partial/000003-.../   unit 3 while it is written

Any number of processes work here at once, each on units of its own. No file depends on which process wrote it, or when.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

from data_prep.images import size_names
from data_prep.tally import Tally
from ditmoe_ds.config import build
from ditmoe_ds.distributed.topology import under_srun
from ditmoe_ds.errors import ConfigError, DataError, in_a_line
from ditmoe_ds.latents.manifest import Shard, sha256
from ditmoe_ds.latents.tars import ShardWriter, index_path

SPLITS = ("train", "val")
NOTE = "request.json"


@dataclasses.dataclass(frozen=True)
class Request:
    """What is encoded."""

    source: str
    source_sha256: str
    units: int
    class_names: tuple[str, ...] | None
    """None: as many as the labels need, which is known at the end."""
    vae: str
    vae_sha256: str | None
    scaling_factor: float
    shift_factor: float
    downsample: int
    shapes: tuple[tuple[int, ...], ...]
    """(C, H, W) of the latents of each of ``sizes``."""
    sizes: tuple[tuple[int, int], ...]
    """(height, width) in pixels. Each image is cropped to the one whose aspect ratio is nearest to its own."""
    shard_size: int
    batch: int
    """Images encoded at once: another number rounds differently."""
    holdout: float
    dtype: Literal["float32", "float16", "bfloat16"]
    store: Literal["mean", "mean+std", "sample"]
    seed: int
    flip_copies: bool
    text: str | None
    text_sha256: str | None
    text_max_tokens: int

    @classmethod
    def load(cls, root: Path) -> Request:
        """Read ``request.json``.

        Raises:
            DataError: there is none, or not of this release.
        """
        return _read(cls, root / NOTE, f"{root}: was not begun by ditmoe-data encode of this release")

    def command(self, root: Path, max_rejected: float) -> str:
        """The command that continues it, as typed into a shell."""
        fields = ("shard_size", "batch", "holdout", "dtype", "store", "seed")
        options = dict(source=self.source, vae=self.vae, out=root, size=size_names(self.sizes)) | {f: getattr(self, f) for f in fields}
        options |= dict(text=self.text, text_max_tokens=self.text_max_tokens) if self.text else {}
        named = self.class_names and self.source.startswith(("wds:", "hf:")) and self.class_names[0] == "0"
        options |= dict(classes=len(self.class_names or ())) if named else {}
        options |= dict(max_rejected=max_rejected)
        words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
        words = ["ditmoe-data", "encode", *words, *["--flip-copies"] * self.flip_copies]
        return shlex.join(map(str, words))


@dataclasses.dataclass(frozen=True)
class Rejection:
    """An image that could not be encoded."""

    key: str
    source: str
    reason: str


@dataclasses.dataclass(frozen=True)
class UnitRecord:
    """A unit that is done."""

    train: tuple[Shard, ...]
    """One shard for each size that occurs; as ``val``, in the order of their names."""
    val: tuple[Shard, ...]
    images: int
    """Images of the source, the rejected ones included."""
    rejected: tuple[Rejection, ...]
    pixels: int
    """Pixels of all training latents."""
    sum: tuple[float, ...]
    """(C,) sum over the pixels of all training latents, unscaled."""
    squares: tuple[float, ...]
    """(C,) sum of their squares."""
    histogram: tuple[int, ...]
    """Training samples of each label, up to the largest label in either split."""
    text_width: int
    """0 without text."""


def claim_folder(root: Path, request: dict[str, Any], first: Callable[[], object], until_a_unit: str = "") -> None:
    """Note in ``root`` what is made there, unless that is noted already; of processes that start at once, one does.

    A VAE or text encoder whose sha256 is that of the note may have moved: then its new place is noted.

    Args:
        first: called before anything is noted, to open what the request names: a mistake in it must not claim the folder.
        until_a_unit: field of the request that may change as long as no unit is done.

    Raises:
        DataError: ``root`` is another request's, or not ditmoe-data's.
    """
    note, text = root / NOTE, json.dumps(request, indent=2) + "\n"
    try:
        if not note.is_file():
            names = [path.name for path in root.iterdir()] if root.is_dir() else []
            # a file server's client may still say that the note is not there when it is already listed
            if note.name not in names and (root.is_file() or not all(name.startswith(note.name) for name in names)):
                raise DataError(f"--out={str(root)!r}: exists and was not made by ditmoe-data; choose another folder")
            root.mkdir(parents=True, exist_ok=True)
            first()
            partial = root / f"{note.name}.{_process()}.partial"
            partial.write_text(text)
            with contextlib.suppress(FileExistsError):  # another process was first: then its note counts
                os.link(partial, note)
            partial.unlink()
        theirs, ours = read_note(root), json.loads(text)
        if isinstance(theirs, dict) and theirs != ours:
            models = [key for key in ("vae", "text") if ours.get(f"{key}_sha256")]  # the source's says what is there, not what it shows
            may_change = {key for key in models if ours[f"{key}_sha256"] == theirs.get(f"{key}_sha256")}
            if until_a_unit and not (root / "units").exists():
                may_change.add(until_a_unit)
            theirs |= {key: ours[key] for key in may_change}
            if theirs == ours:
                _replace(note, text.encode())
    except OSError as error:
        raise DataError(f"--out={str(root)!r}: cannot write there ({error.strerror}); choose another folder") from None
    refuse_another(root, theirs, ours)


def read_note(root: Path) -> Any:
    """What is noted in ``root``. Earlier releases noted folders of images as they were given.

    Raises:
        DataError: the note is no JSON.
    """
    try:
        note = json.loads((root / NOTE).read_text())
    except ValueError as error:
        raise DataError(f"{root / NOTE}: is damaged ({error}); choose another folder or delete this one") from None
    return note | dict(source=placed(note["source"])) if isinstance(note, dict) and "source" in note else note


def placed(source: str) -> str:
    """The source with an absolute path, if it is a local folder."""
    kind, _, path = source.partition(":")
    return f"{kind}:{Path(path).resolve()}" if kind in ("folder", "hf") and Path(path).is_dir() else source


def refuse_another(root: Path, theirs: Any, ours: dict[str, Any]) -> None:
    """Compare a note that was found in ``root`` with this request.

    Raises:
        DataError: it is another request's.
    """
    if not isinstance(theirs, dict) or theirs != ours:
        before = theirs if isinstance(theirs, dict) else {}
        changed = [f"{key} {_short(before.get(key))} -> {_short(ours[key])}" for key in ours if before.get(key) != ours[key]]
        what = ", ".join(changed) or "of another release"
        raise DataError(f"--out={str(root)!r}: holds the work of another request ({what}); choose another folder or delete it")


def record_path(root: Path, unit: int) -> Path:
    """Where the record of a unit lies."""
    return root / "units" / f"{unit:06d}.json"


def load_record(root: Path, unit: int) -> UnitRecord | None:
    """The record of a unit; None if it is not done, or if a shard of it is no longer there in full."""
    path = record_path(root, unit)
    if not path.is_file():
        return None
    record = _read(UnitRecord, path, f"{path}: is damaged; delete it and run ditmoe-data encode again")
    for shard in (*record.train, *record.val):
        tar = root / shard.name
        if not (tar.is_file() and tar.stat().st_size == shard.bytes and index_path(tar).is_file()):
            return None
    return record


class UnitWriter:
    """Writes the shards of one unit in a folder of its own, and moves them to ``root`` once they are complete.

    Args:
        shapes: (C, H, W) of its latents, of each size.
        text_width: of its text, or 0.
    """

    def __init__(self, root: Path, unit: int, shapes: tuple[tuple[int, ...], ...], text_width: int):
        self.root, self.unit, self.shapes, self.text_width = root, unit, shapes, text_width
        for leftover in (root / "partial").glob(f"{unit:06d}-*"):
            shutil.rmtree(leftover)
        self._stage = root / "partial" / f"{unit:06d}-{_process()}"
        self._stage.mkdir(parents=True)
        self._open = ExitStack()
        self._writers: dict[tuple[str, tuple[int, ...]], ShardWriter] = {}
        self._samples = Counter[tuple[str, tuple[int, ...]]]()
        self._tally = Tally(channels=shapes[0][0])
        self.rejected: list[Rejection] = []
        self.images = 0

    def __enter__(self) -> UnitWriter:
        return self

    def __exit__(self, *failure: Any) -> None:
        self._open.__exit__(*failure)

    def write(self, split: str, key: str, meta: dict[str, Any], **tensors: torch.Tensor) -> None:
        """Append a sample; as ``ShardWriter.write``."""
        latent = tensors["latent"]
        shard = split, tuple(latent.shape)
        if shard not in self._writers:
            self._writers[shard] = self._open.enter_context(ShardWriter(self._stage / self._name(*shard)))
        self._writers[shard].write(key, meta, **tensors)
        self._samples[shard] += 1
        self._tally.add(split, latent, meta["label"])

    def finish(self) -> None:
        """Close the shards, give them their names, and write the record; what another process has finished meanwhile stays."""
        self._open.close()
        if load_record(self.root, self.unit):
            shutil.rmtree(self._stage)
            return
        shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
        for (split, shape), samples in sorted(self._samples.items()):
            tar = self._stage / self._name(split, shape)
            shards[split].append(Shard(tar.name, samples, tar.stat().st_size, sha256(tar), shape))
        record = UnitRecord(
            train=tuple(shards["train"]),
            val=tuple(shards["val"]),
            images=self.images,
            rejected=tuple(self.rejected),
            pixels=self._tally.pixels,
            sum=tuple(self._tally.sum.tolist()),
            squares=tuple(self._tally.squares.tolist()),
            histogram=tuple(self._tally.histogram),
            text_width=self.text_width,
        )
        partial = self._stage / "record.json"
        partial.write_text(json.dumps(dataclasses.asdict(record), indent=2) + "\n")
        for shard in self._samples:
            tar = self._stage / self._name(*shard)
            index_path(tar).replace(self.root / index_path(tar).name)
            tar.replace(self.root / tar.name)
        (self.root / "units").mkdir(exist_ok=True)
        partial.replace(record_path(self.root, self.unit))
        shutil.rmtree(self._stage)

    def _name(self, split: str, shape: tuple[int, ...]) -> str:
        size = f"-{shape[1]}x{shape[2]}" if len(self.shapes) > 1 else ""
        return f"{split}-{self.unit:06d}{size}.tar"


def write_text(path: Path, text: torch.Tensor) -> None:
    """Write the tokens (T, width) of one caption; of processes that do so at once, all write the same."""
    _replace(path, safetensors.torch.save({"text": text}))


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.{_process()}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def worker_from_environment() -> tuple[int, int]:
    """Worker i of n: a task of a SLURM array, a rank of torchrun or srun, or such a rank within a task; (0, 1) if this process is alone.

    Raises:
        ConfigError: an array's tasks are not 0 to n - 1, as where a part of an array was submitted again.
    """
    environment, worker, count = os.environ, 0, 1
    if "SLURM_ARRAY_TASK_COUNT" in environment:
        worker, last, count = (int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MAX", "COUNT"))
        if last != count - 1:
            fix = f"the array's tasks are not 0 to n - 1; give --worker {worker}/n, of n workers in all"
            raise ConfigError("SLURM_ARRAY_TASK_ID", worker, fix)
    by_srun = under_srun()
    rank = int(environment.get("SLURM_PROCID" if by_srun else "RANK", 0))
    ranks = int(environment.get("SLURM_NTASKS" if by_srun else "WORLD_SIZE", 1))
    return worker * ranks + rank, count * ranks


def device_of_rank() -> str:
    """The GPU of this process among those of its node, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return f"cuda:{local % torch.cuda.device_count()}"


def _process() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _read(cls: Any, path: Path, problem: str) -> Any:
    try:
        return build(cls, json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, AttributeError, ConfigError) as error:
        raise DataError(f"{problem} ({in_a_line(error)})") from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:76]} ..."
