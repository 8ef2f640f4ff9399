"""What a DiT is told beside the latent: where, when and what."""

from typing import Any

import torch
from torch import Tensor, nn


def position_table(side: int, dim: int) -> Tensor:
    """Fixed 2-D sin-cos table (side * side, dim): first half from the column index, second from the row index.

    Each half is [sin | cos] with omega_i = 10000^(-i / (dim / 4)). Source: DiT (arXiv 2212.09748), as in MAE. Made on
    the CPU also inside ``torch.device("meta")``, since no initial weights will fill it.
    """
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, dim / 2)
    columns = line[None, :, :].expand(side, side, -1)
    rows = line[:, None, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(side * side, dim).float()


class TimestepEmbedder(nn.Module):
    """Sinusoid [cos | sin] of size 256 in fp32, then Linear-SiLU-Linear to D. omega_i = 10000^(-i / (128 - frequency_shift))."""

    frequencies = 256

    def __init__(self, dim: int, frequency_shift: int = 0):
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp: Any = nn.Sequential(nn.Linear(self.frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """t (B,) on the 0..1000 scale -> (B, D)."""
        half = self.frequencies // 2
        omega = 10000.0 ** (-torch.arange(half, dtype=torch.float32, device=t.device) / (half - self.frequency_shift))
        angles = t.float()[:, None] * omega
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(sinusoid.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class table with one more row, the last, for "no class" (classifier-free guidance)."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        """labels (B,) in 0..num_classes -> (B, D)."""
        return self.table(labels)
