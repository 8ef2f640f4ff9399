"""How another program's tensors make up ours: written once, used to read and to write.

A ``Layout`` gives for each of our parameters those tensors of theirs (key, shape) whose flattened elements, one after the other,
are the parameter's. This is all it takes to pack experts and to fuse gate with up, or q with k and v.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ditmoe_ds import config
from ditmoe_ds.distributed.tensorfile import Entry
from ditmoe_ds.distributed.weights import Tensors, Weights
from ditmoe_ds.errors import CheckpointError
from ditmoe_ds.models.dit import DiTConfig
from ditmoe_ds.models.sizes import parameter_shapes

Layout = dict[str, list[tuple[str, tuple[int, ...]]]]


def assemble(theirs: Tensors, layout: Layout, description: dict[str, Any], ignored: Sequence[str] = ()) -> Weights:
    """Their tensors as our weights; nothing is read yet.

    Args:
        ignored: keys of theirs that our model does not need.

    Raises:
        CheckpointError: a tensor of theirs is missing, unknown or of another shape.
    """
    wanted = {key: shape for pieces in layout.values() for key, shape in pieces}
    for key, shape in wanted.items():
        if key not in theirs.shapes:
            raise CheckpointError(f"{key} is missing")
        if theirs.shapes[key] != shape:
            raise CheckpointError(f"{key}: has shape {list(theirs.shapes[key])}, but {list(shape)} follows from the settings")
    unknown = [key for key in theirs.shapes if key not in wanted and key not in ignored]
    if unknown:
        raise CheckpointError(f"{unknown[0]}: unknown tensor")

    def read(name: str, start: int, out: Tensor) -> None:
        stop, offset = start + out.numel(), 0
        for key, shape in layout[name]:
            count = math.prod(shape)
            low, high = max(start, offset), min(stop, offset + count)
            if low < high:
                theirs.read(key, low - offset, out[low - start : high - start])
            offset += count

    shapes = parameter_shapes(config.build(DiTConfig, description["model"]))
    return Weights(shapes, read, description)


def disassemble(weights: Weights, layout: Layout, dtype: torch.dtype) -> list[Entry]:
    """Our weights as their tensors, each read when it is written."""
    entries = []
    for name, pieces in layout.items():
        offset = 0
        for key, shape in pieces:
            entries.append(Entry(key, dtype, shape, partial(weights.tensor, name, offset, shape)))
            offset += math.prod(shape)
        assert offset == math.prod(weights.shapes[name]), name
    return entries


def from_memory(tensors: dict[str, Any]) -> Tensors:
    """A state dict as ``Tensors``.

    Raises:
        CheckpointError: a value is no tensor.
    """
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{key}: a {type(value).__name__}, not a tensor")

    def read(key: str, start: int, out: Tensor) -> None:
        out.copy_(tensors[key].reshape(-1)[start : start + out.numel()])

    return Tensors({key: tuple(value.shape) for key, value in tensors.items()}, read)


def refuse_settings_without_place(model: DiTConfig, known: set[str], target: str) -> None:
    """Every setting but the ``known`` ones (dotted) must be at its default, which is what ``target`` assumes.

    Raises:
        CheckpointError: one is not; or the model takes text, for which no target has a layout.
    """
    if model.text_width:
        raise CheckpointError(f"{target} has no layout for text to image, nor for EC-DIT")
    defaults = _flat(asdict(DiTConfig(hidden=0, depth=0, heads=0)))
    for key, value in _flat(asdict(model)).items():
        if key not in known and value != defaults[key]:
            raise CheckpointError(f"{target} has no place for model.{key}={value!r}, only for {defaults[key]!r}")


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    router = tree.pop("router")
    return tree | {f"router.{key}": value for key, value in router.items()}
