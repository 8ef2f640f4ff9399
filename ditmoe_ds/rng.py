"""Randomness as a pure function of a key: the same draw on every rank, world size and restart."""

import hashlib

import torch


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on ``key`` alone, e.g. ``(seed, "noise", epoch, sample)``."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
