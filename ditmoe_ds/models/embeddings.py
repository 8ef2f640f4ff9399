"""Embeddings of what a DiT is given beside the latent: positions, time, class and text."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ditmoe_ds.moe.rows import fused

if torch.version.cuda or torch.version.hip:  # these builds of torch bring Triton along
    from ditmoe_ds.models import rotary


@functools.lru_cache(maxsize=64)
def position_table(rows: int, columns: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Fixed 2-D sin-cos table (rows * columns, dim): first half from the column index, second from the row index.

    Each half is [sin | cos] with omega_i = 10000^(-i / (dim / 4)). Source: DiT (arXiv 2212.09748), as in MAE.
    """
    down, across = _angles(rows, dim // 4), _angles(columns, dim // 4)
    halves = [torch.cat([angles.sin(), angles.cos()], dim=1) for angles in (across, down)]  # each (places, dim / 2)
    return _grid(halves[0], halves[1]).float().to(device or "cpu")


@functools.lru_cache(maxsize=64)
def rotary_angles(rows: int, columns: int, dim: int, device: torch.device) -> Tensor:
    """Angles (rows * columns, dim / 2) for ``rotate``: half of the pairs turn with the column index, half with the row index.

    omega_i = 10000^(-i / (dim / 4)). Source: RoPE (arXiv 2104.09864), along each axis.
    """
    return _grid(_angles(columns, dim // 4), _angles(rows, dim // 4)).float().to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_(i + d/2)) of x (B, N, heads, d) by angles with these cosines and sines (B or 1, N, d / 2), in fp32."""
    if fused(x) and not torch.compiler.is_compiling():  # a compiler fuses what follows into one kernel
        return rotary.Rotate.apply(x, cos, sin)
    cos, sin = cos[:, :, None], sin[:, :, None]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def _angles(places: int, count: int) -> Tensor:
    # on the CPU even inside ``torch.device("meta")``: unlike weights, these are not filled in later
    omega = 10000.0 ** (-torch.arange(count, dtype=torch.float64, device="cpu") / count)
    return torch.arange(places, dtype=torch.float64, device="cpu")[:, None] * omega


def _grid(across: Tensor, down: Tensor) -> Tensor:
    """(columns, a) and (rows, b) -> (rows * columns, a + b)."""
    shape = len(down), len(across)
    return torch.cat([across[None].expand(*shape, -1), down[:, None].expand(*shape, -1)], dim=-1).flatten(0, 1)


def dtype_of(module: nn.Module) -> torch.dtype:
    """That of a module's weights. From a weight asked for by its name, by another module, ZeRO-3 would think that this one needs it."""
    return next(module.parameters()).dtype


class TimestepEmbedder(nn.Module):
    """Sinusoid [cos | sin] of size 256 in fp32, then Linear-SiLU-Linear to D. omega_i = 10000^(-i / (128 - frequency_shift))."""

    frequencies = 256

    def __init__(self, dim: int, frequency_shift: int = 0):
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp: Any = nn.Sequential(nn.Linear(self.frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """t (B,), on the scale that the model was trained with -> (B, D)."""
        half = self.frequencies // 2
        omega = 10000.0 ** (-torch.arange(half, dtype=torch.float32, device=t.device) / (half - self.frequency_shift))
        angles = t.float()[:, None] * omega
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(sinusoid.to(dtype_of(self.mlp)))


class LabelEmbedder(nn.Module):
    """Class table with one more row, the last, for "no class" (classifier-free guidance)."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        """labels (B,) in 0..num_classes -> (B, D)."""
        return self.table(labels)


class TextEmbedder(nn.Module):
    """Projects a text encoder's tokens, for cross-attention and for adaLN.

    Args:
        text_width: of the encoder's tokens.
        dim: of the tokens that cross-attention sees.
        condition: width of adaLN's vector.
    """

    def __init__(self, text_width: int, dim: int, condition: int):
        super().__init__()
        self.tokens: Any = nn.Sequential(nn.Linear(text_width, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.pooled = nn.Linear(text_width, condition)

    def forward(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """text (B, T, text_width), mask (B, T) true for tokens -> (B, T, D), and (B, condition) from the mean token."""
        text = text.to(dtype_of(self.pooled))
        # Padding counts for nothing, whatever it holds.
        mean = torch.where(mask[..., None], text, 0).sum(1) / mask.sum(1, keepdim=True)
        return self.tokens(text), self.pooled(mean)
