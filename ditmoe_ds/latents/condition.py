"""What a model is conditioned on: from a batch's classes, stored texts or captions to keyword arguments of ``DiT``.

Each kind of condition is a class here. ``told`` gives the condition of each sample of a batch, some of which may be replaced
by ``null`` (classifier-free guidance); ``pack`` joins them, in the loader's processes; ``unpack`` makes the arguments, on the device.
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
    """One kind of condition; see the module."""

    null: Any
    """The condition of a sample without one."""

    def told(self, batch: Batch) -> Sequence[Any]:
        """The condition of each sample of a batch."""

    def pack(self, told: Sequence[Any]) -> Any:
        """One value, for ``unpack``, of the conditions of a micro-batch."""

    def unpack(self, packed: Any, device: torch.device) -> Condition:
        """Keyword arguments of ``DiT``, on the device."""


class _Packed:
    """A condition that needs no encoder: packing makes the arguments."""

    def unpack(self, packed: Condition, device: torch.device) -> Condition:
        return {name: tensor.to(device, non_blocking=True) for name, tensor in packed.items()}


class Classes(_Packed):
    """``y`` (B,): class labels; ``num_classes`` is none."""

    def __init__(self, num_classes: int):
        self.null = num_classes

    def told(self, batch: Batch) -> list[int]:
        return [self.null if label < 0 else label for label in batch.labels.tolist()]  # held-out samples may have none

    def pack(self, told: Sequence[int]) -> Condition:
        return {"y": torch.tensor(told)}


class Texts(_Packed):
    """``text`` (B, T, width) bfloat16 as stored, padded to the longest, and ``mask`` (B, T), true for tokens.

    Args:
        empty: (T, width) tokens of an empty caption.
    """

    def __init__(self, empty: Tensor):
        self.null = empty

    def told(self, batch: Batch) -> Sequence[Tensor]:
        assert batch.text is not None
        return batch.text.split(batch.lengths)

    def pack(self, told: Sequence[Tensor]) -> Condition:
        return padded(told)


class Captions:
    """As ``Texts``, of captions that are encoded when they are needed."""

    def __init__(self, encoder: TextEncoder):
        self.encoder, self.null = encoder, ""

    def told(self, batch: Batch) -> list[str]:
        return batch.captions

    def pack(self, told: Sequence[str]) -> list[str]:
        return list(told)

    def unpack(self, packed: list[str], device: torch.device) -> Condition:
        return {name: tensor.to(device) for name, tensor in padded(self.encoder(packed)).items()}


def padded(texts: Sequence[Tensor]) -> Condition:
    """``text`` and ``mask`` of texts (T, width) of different lengths."""
    text = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    lengths = torch.tensor([len(one) for one in texts])
    return {"text": text, "mask": torch.arange(text.shape[1]) < lengths[:, None]}
