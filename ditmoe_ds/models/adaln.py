"""A block's residual sums, LayerNorms and modulations: what adaLN-Zero does around attention and feed-forwards.

Source: DiT (arXiv 2212.09748), section 3.2.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_ds.moe.rows import fused

if torch.version.cuda or torch.version.hip:  # these builds of torch bring Triton along
    from ditmoe_ds.models import adaln_kernels

EPS = 1e-6


class AdaNorm(nn.Module):
    """LayerNorm without weights of its own, after a residual sum and before a modulation."""

    def forward(
        self,
        x: Tensor,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        branch: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """From tokens x (B, N, D).

        Args:
            shift: (B, 1, D), with ``scale``; None leaves out the modulation, norm * (1 + scale) + shift.
            branch: (B, N, D), added to x before the norm, times ``gate`` (B, 1, D) if there is one.

        Returns:
            The sum (x itself without a branch), and its modulated norm.
        """
        if fused(x):
            total, out = adaln_kernels.AddNorm.apply(x, branch, gate, shift, scale, EPS)
            return total, out
        if branch is not None:
            x = x + (branch if gate is None else gate * branch)
        normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
        return x, normed if scale is None or shift is None else modulate(normed, shift, scale)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def add_gated(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + gate * branch, of (B, N, D) with a gate (B, 1, D)."""
    if fused(x) and not torch.compiler.is_compiling():  # a compiler makes as few kernels of it
        total: Tensor = adaln_kernels.AddGated.apply(x, branch, gate)
        return total
    return x + gate * branch
