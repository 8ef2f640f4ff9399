"""DiT: a transformer over latent patches, conditioned by adaLN-Zero, with dense or Mixture-of-Experts feed-forwards.

Sources: DiT (arXiv 2212.09748, section 3.2) and DiT-MoE (arXiv 2407.11633, section 3). Knows nothing of distribution
but the number of ranks that share a set of experts.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ditmoe_ds.models.attention import Attention
from ditmoe_ds.models.embeddings import LabelEmbedder, TimestepEmbedder, position_table
from ditmoe_ds.moe.layer import MoE
from ditmoe_ds.moe.routing import RouterConfig


@dataclass(frozen=True)
class DiTConfig:
    """Everything that fixes the network. ``experts`` 0 is the dense DiT."""

    hidden: int
    depth: int
    heads: int
    patch: int = 2
    input_size: int = 32
    in_channels: int = 4
    num_classes: int = 1000
    experts: int = 0
    top_k: int = 2
    shared: int = 2
    """Shared experts, each ``hidden`` wide, realised as one SwiGLU of their joint width."""
    expert_activation: Literal["swiglu", "gelu"] = "swiglu"
    """swiglu is DiT-MoE's; gelu is the dense DiT's MLP with its biases, for experts upcycled from one."""
    expert_hidden: int | None = None
    """Hidden width of a routed expert; None is 4 * ``hidden``."""
    qk_norm: bool = False
    learn_variance: bool = True
    """The output carries a second set of channels (DDPM's variance; unused by rectified flow)."""
    frequency_shift: int = 0
    """The timestep's frequencies are 10000^(-i / (128 - shift)): 0 as in DiT, 1 as in diffusers' stock DiT."""
    router: RouterConfig = field(default_factory=RouterConfig)

    @property
    def expert_width(self) -> int:
        return self.expert_hidden or 4 * self.hidden

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_variance else 1)

    @property
    def tokens(self) -> int:
        return (self.input_size // self.patch) ** 2


class RouterStats(NamedTuple):
    """What the routers did in one forward, stacked over the L sparse layers."""

    selections: Tensor
    """(L, E) how often each expert was chosen."""
    mean_scores: Tensor
    """(L, E) mean softmax score, with gradient."""
    z: Tensor
    """(L,) z-loss terms, with gradient."""


class DenseMLP(nn.Module):
    """Linear-GELU-Linear of width 4D, the feed-forward of the dense DiT."""

    def __init__(self, dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, 4 * dim)
        self.w2 = nn.Linear(4 * dim, dim)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.w2(self.act(self.w1(x))),)


class Block(nn.Module):
    """Attention and feed-forward, each modulated and gated by the condition (adaLN-Zero)."""

    def __init__(self, config: DiTConfig, ep_size: int):
        super().__init__()
        dim = config.hidden
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, config.heads, config.qk_norm)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp: nn.Module
        if config.experts:
            widths = config.expert_width, config.shared * dim
            self.mlp = MoE(dim, config.experts, config.top_k, *widths, config.router, ep_size, config.expert_activation)
        else:
            self.mlp = DenseMLP(dim)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        """x (B, N, D), c (B, D) -> x and, from a sparse layer, its router's (selections, mean scores, z)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        out, *stats = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x + gate2 * out, *stats


class FinalLayer(nn.Module):
    """Modulated LayerNorm and a Linear to the channels of a patch."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden, 2 * config.hidden))
        self.linear = nn.Linear(config.hidden, config.patch**2 * config.out_channels)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


class DiT(nn.Module):
    """Class-conditional diffusion transformer.

    Args:
        config: the network.
        ep_size: ranks that share a set of experts. This rank's E / ep_size experts are built, no others.
    """

    pos_embed: Tensor

    def __init__(self, config: DiTConfig, ep_size: int = 1):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.x_embed = nn.Conv2d(config.in_channels, config.hidden, config.patch, stride=config.patch)
        self.t_embed = TimestepEmbedder(config.hidden, config.frequency_shift)
        self.y_embed = LabelEmbedder(config.num_classes, config.hidden)
        table = position_table(config.input_size // config.patch, config.hidden)
        self.register_buffer("pos_embed", table, persistent=False)
        self.blocks = nn.ModuleList([Block(config, ep_size) for _ in range(config.depth)])
        self.final = FinalLayer(config)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, return_router: bool = False) -> Tensor | tuple[Tensor, RouterStats | None]:
        """Predict noise or velocity.

        Args:
            x: latents (B, C, S, S).
            t: timesteps (B,) on the 0..1000 scale.
            y: class labels (B,); ``num_classes`` means none.
            return_router: also return the ``RouterStats`` (None for a dense model).

        Returns:
            fp32 (B, out_channels, S, S).
        """
        x = self.x_embed(x.to(self.x_embed.weight.dtype)).flatten(2).transpose(1, 2)
        x = x + self.pos_embed.to(x.dtype)
        c = self.t_embed(t) + self.y_embed(y)
        stats = []
        for block in self.blocks:
            run = partial(checkpoint, block, use_reentrant=False) if self.checkpoint_activations and self.training else block
            x, *layer = run(x, c)
            stats.append(layer)
        out = self.unpatchify(self.final(x, c)).float()
        if not return_router:
            return out
        if not self.config.experts:
            return out, None
        return out, RouterStats(*(torch.stack(column) for column in zip(*stats, strict=True)))

    def unpatchify(self, x: Tensor) -> Tensor:
        """(B, N, patch * patch * C) -> (B, C, S, S); the channel is the fastest index."""
        side, patch = self.config.input_size // self.config.patch, self.config.patch
        x = x.view(len(x), side, side, patch, patch, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, side * patch, side * patch)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift
