"""What a model is conditioned on: from a batch's classes, stored texts or captions to keyword arguments of ``DiT``.

Each kind of condition is a class here, used in three stages. ``of`` lists the conditions of a batch's samples, some of which the caller
may replace by ``null`` (for classifier-free guidance). ``pack`` collates them, in the loader's processes. ``unpack`` turns the result
into keyword arguments on the device, in the training process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ditmoe_ds.latents.loader import Batch
from ditmoe_ds.latents.text import TextEncoder

Condition = dict[str, Tensor]


class Conditioner(Protocol):
    """One kind of condition; see the module's docstring."""

    null: Any
    """Stands for "no condition"."""

    def of(self, batch: Batch) -> Sequence[Any]:
        """The condition of each sample of a batch."""

    def pack(self, conditions: Sequence[Any]) -> Any:
        """Collate the conditions of a micro-batch into what ``unpack`` takes."""

    def unpack(self, packed: Any, device: torch.device) -> Condition:
        """Keyword arguments of ``DiT``, on the device."""


class _Packed:
    """A condition that needs no encoder: ``pack`` already returns the keyword arguments."""

    def unpack(self, packed: Condition, device: torch.device) -> Condition:
        return {name: tensor.to(device, non_blocking=True) for name, tensor in packed.items()}


class Classes(_Packed):
    """``y`` (B,): class labels, where ``num_classes`` means "no class"."""

    def __init__(self, num_classes: int):
        self.null = num_classes

    def of(self, batch: Batch) -> list[int]:
        return [self.null if label < 0 else label for label in batch.labels.tolist()]  # held-out samples may have none

    def pack(self, conditions: Sequence[int]) -> Condition:
        return {"y": torch.tensor(conditions)}


class Texts(_Packed):
    """``text`` (B, T, width) bfloat16 as stored, padded to the longest caption, and ``mask`` (B, T), true for tokens.

    Args:
        empty: (T, width) tokens of an empty caption.
    """

    def __init__(self, empty: Tensor):
        self.null = empty

    def of(self, batch: Batch) -> Sequence[Tensor]:
        assert batch.text is not None
        return batch.text.split(batch.lengths)

    def pack(self, conditions: Sequence[Tensor]) -> Condition:
        return padded(conditions)


class Captions:
    """The same arguments as ``Texts``, from captions that ``unpack`` encodes."""

    def __init__(self, encoder: TextEncoder):
        self.encoder, self.null = encoder, ""

    def of(self, batch: Batch) -> list[str]:
        return batch.captions

    def pack(self, conditions: Sequence[str]) -> list[str]:
        return list(conditions)

    def unpack(self, packed: list[str], device: torch.device) -> Condition:
        text, mask = self.encoder.padded(packed)
        return {"text": text.to(device), "mask": mask.to(device)}


def padded(texts: Sequence[Tensor]) -> Condition:
    """``text`` and ``mask`` for texts (T, width) of different lengths."""
    text = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    lengths = torch.tensor([len(one) for one in texts])
    return {"text": text, "mask": torch.arange(text.shape[1]) < lengths[:, None]}
