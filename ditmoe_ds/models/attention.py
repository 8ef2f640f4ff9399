"""Attention among patches, and from patches to text."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_ds.models.embeddings import rotate
from ditmoe_ds.moe.rows import fused

if torch.version.cuda or torch.version.hip:  # these builds of torch bring Triton along
    from ditmoe_ds.models import head_norm


class HeadNorm(nn.LayerNorm):
    """LayerNorm of each head of (B, N, heads, head_dim)."""

    def forward(self, x: Tensor) -> Tensor:
        if fused(x):
            out: Tensor = head_norm.HeadNorm.apply(x, self.weight, self.bias, self.eps)
            return out
        return super().forward(x)


class Attention(nn.Module):
    """Self-attention with biases.

    Args:
        heads: of q.
        kv_heads: of k and v; fewer than ``heads`` is grouped-query attention.
        qk_norm: LayerNorm over head_dim on q and k, as DiT-MoE XL and G.
    """

    def __init__(self, dim: int, heads: int, kv_heads: int, qk_norm: bool):
        super().__init__()
        head_dim = dim // heads
        self.head_dim, self.group = head_dim, heads // kv_heads
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * head_dim)
        self.q_norm = HeadNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D). ``rotation``, cosines and sines (B or 1, N, head_dim / 2), turns q and k by their positions (RoPE)."""
        heads = self.qkv(x).unflatten(2, (-1, self.head_dim))  # (B, N, heads, d)
        kv = heads.shape[2] // (self.group + 2)  # those on this rank: tensor parallelism divides them
        q, k, v = heads.split([self.group * kv, kv, kv], dim=2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        grouped = self.group > 1
        if grouped and q.is_cuda and q.dtype == torch.float32:  # no fused fp32 kernel takes groups: all scores would be in memory
            k, v, grouped = k.repeat_interleave(self.group, 2), v.repeat_interleave(self.group, 2), False
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=grouped)
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention from patches to text tokens, with biases, optionally with LayerNorm over head_dim on q and k."""

    def __init__(self, dim: int, heads: int, qk_norm: bool):
        super().__init__()
        self.head_dim = dim // heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.q_norm = HeadNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """x (B, N, D) and text (B, T, D) -> (B, N, D); ``mask`` (B, T) is true for tokens, of which each caption has one at least."""
        q = self.q(x).unflatten(2, (-1, self.head_dim))
        k, v = self.kv(text).unflatten(2, (2, -1, self.head_dim)).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask[:, None, None])
        return self.proj(out.transpose(1, 2).flatten(2))
