"""DiT: a transformer over latent patches, conditioned by adaLN-Zero and maybe text, with dense or Mixture-of-Experts feed-forwards.

Sources: DiT (arXiv 2212.09748, section 3.2), DiT-MoE (arXiv 2407.11633, section 3) and EC-DIT (arXiv 2410.02098,
section 3): one network, whose options make the families. Knows nothing of distribution but the number of ranks that
share a set of experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ditmoe_ds.models.adaln import AdaNorm, add_gated, modulate
from ditmoe_ds.models.attention import Attention, CrossAttention
from ditmoe_ds.models.embeddings import LabelEmbedder, TextEmbedder, TimestepEmbedder, dtype_of, position_table, rotary_angles
from ditmoe_ds.moe.experts import PackedExperts
from ditmoe_ds.moe.layer import MoE, RoutedExperts, RouterStats
from ditmoe_ds.moe.routing import RouterConfig, same_decisions

Recompute = Literal[False, "attention", True]
"""What backward computes again instead of keeping it: nothing, attention, or whole blocks."""


@dataclass(frozen=True)
class DiTConfig:
    """Everything that fixes the network. ``experts`` 0 is the dense DiT."""

    hidden: int
    depth: int
    heads: int
    kv_heads: int | None = None
    """Heads of k and v in self-attention; None is ``heads``."""
    patch: int = 2
    input_size: int = 32
    """Side of a latent. Positions are computed, so the network takes any other height and width too."""
    in_channels: int = 4
    num_classes: int = 1000
    """0 for none."""
    text_width: int = 0
    """Width of text tokens; 0 for none."""
    condition: int | None = None
    """Width of the vector that adaLN is given, from timestep, class and mean text token; None is ``hidden``."""
    positions: Literal["sincos", "rope"] = "sincos"
    """sincos: added to the patches once. rope: rotates q and k in every self-attention."""
    experts: int = 0
    sparse_first: int = 0
    """Index of the first layer with experts."""
    sparse_every: int = 1
    """From there on, every ``sparse_every``-th layer has experts; all others have a dense MLP."""
    routing: Literal["token", "expert", "dense"] = "token"
    """token: tokens choose experts (DiT-MoE). expert: experts choose tokens (EC-DIT). dense: instead of experts a dense MLP as wide as
    ``top_k`` of them, for a twin with the same active parameters."""
    top_k: int = 2
    """Experts per token; with expert choice, on average."""
    shared: int = 2
    """Shared experts, each ``hidden`` wide, realised as one SwiGLU of their joint width."""
    expert_activation: Literal["swiglu", "gelu"] = "swiglu"
    """swiglu is DiT-MoE's; gelu is the dense DiT's MLP with its biases, as in EC-DIT and for experts upcycled from a dense DiT."""
    mlp_bias: bool = True
    """Whether GELU feed-forwards, dense ones and experts, have biases."""
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
    def condition_width(self) -> int:
        return self.condition or self.hidden

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_variance else 1)

    @property
    def tokens(self) -> int:
        return (self.input_size // self.patch) ** 2

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers with experts, or with their dense twin."""
        return tuple(range(self.sparse_first, self.depth, self.sparse_every)) if self.experts else ()

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """The layers with real experts: none in a dense twin."""
        return self.sparse_layers if self.routing != "dense" else ()

    def mlp_width(self, layer: int) -> int:
        """Hidden units of a layer's dense MLP: that of every DiT, or as many as a token's experts have."""
        return round(self.capacity(layer) * self.expert_width) if layer in self.sparse_layers else 4 * self.hidden

    @property
    def images_compete(self) -> bool:
        """Whether the images of a batch compete for experts, so that what becomes of one depends on the others."""
        if not self.routed_layers:
            return False
        return self.router.pool == "microbatch" if self.routing == "expert" else self.router.capacity_factor is not None

    @property
    def equal_load(self) -> bool:
        """Whether each expert of a layer computes as many rows as the others, so that shapes are static."""
        return self.routing == "expert" or self.router.capacity_factor is not None

    def capacity(self, layer: int) -> float:
        """Experts per token, with expert choice on average, in a layer with experts."""
        if self.routing == "token":
            return self.top_k
        if self.router.layer_capacity:
            return self.router.layer_capacity[self.sparse_layers.index(layer)]
        return self.router.capacity_factor or self.top_k


class DenseMLP(nn.Module):
    """Linear-GELU-Linear, the feed-forward of the dense DiT."""

    def __init__(self, dim: int, hidden: int, bias: bool):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=bias)
        self.w2 = nn.Linear(hidden, dim, bias=bias)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.w2(self.act(self.w1(x))),)


class Block(nn.Module):
    """Attention, maybe to text too, and feed-forward; adaLN-Zero modulates and gates all but the attention to text."""

    def __init__(self, config: DiTConfig, layer: int, ep_size: int):
        super().__init__()
        dim = config.hidden
        self.norm1 = AdaNorm()
        self.attn = Attention(dim, config.heads, config.kv_heads or config.heads, config.qk_norm)
        self.cross: CrossAttention | None = None
        if config.text_width:
            self.norm_cross = AdaNorm()
            self.cross = CrossAttention(dim, config.heads, config.qk_norm)
        self.norm2 = AdaNorm()
        self.mlp: nn.Module
        self.decoupled = config.router.input == "decoupled" and layer in config.routed_layers
        if layer not in config.routed_layers:
            self.mlp = DenseMLP(dim, config.mlp_width(layer), config.mlp_bias)
        else:
            self.mlp = MoE(
                dim,
                config.experts,
                config.routing,
                config.capacity(layer),
                config.expert_width,
                config.shared * dim,
                config.router,
                ep_size,
                config.expert_activation,
                config.mlp_bias,
                router_dim=dim + config.condition_width if self.decoupled else None,
            )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.condition_width, 6 * dim))

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        rotation: tuple[Tensor, Tensor] | None = None,
        text: Tensor | None = None,
        mask: Tensor | None = None,
        recompute_attention: bool = False,
    ) -> tuple[Tensor, ...]:
        """Tokens x (B, N, D) given c (B, condition), positions, and text (B, T, D) with its mask (B, T).

        Returns:
            x and, from a layer with experts, the fields of ``RouterStats``.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        attend = partial(checkpoint, self.attend, use_reentrant=False) if recompute_attention else self.attend
        if self.decoupled:
            x, plain = attend(x, (shift1, scale1, gate1), (None, None), rotation, text, mask)
            seen = torch.cat([plain, c[:, None].expand(-1, x.shape[1], -1)], dim=-1)
            out, *stats = self.mlp(modulate(plain, shift2, scale2), seen)
        else:
            x, modulated = attend(x, (shift1, scale1, gate1), (shift2, scale2), rotation, text, mask)
            out, *stats = self.mlp(modulated)
        return add_gated(x, out, gate2), *stats

    def attend(
        self,
        x: Tensor,
        first: tuple[Tensor, Tensor, Tensor],
        second: tuple[Tensor | None, Tensor | None],
        rotation: tuple[Tensor, Tensor] | None,
        text: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The first half: x after attention to itself and to the text, and its norm, modulated by ``second``.

        Args:
            first: shift, scale and gate of self-attention.
            second: shift and scale of the feed-forward.
        """
        shift, scale, gate = first
        x, modulated = self.norm1(x, shift, scale)
        out = self.attn(modulated, rotation)
        if self.cross is None:
            return self.norm2(x, *second, out, gate)
        x, normed = self.norm_cross(x, None, None, out, gate)
        return self.norm2(x, *second, self.cross(normed, text, mask))


class FinalLayer(nn.Module):
    """Modulated LayerNorm and a Linear to the channels of a patch."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm = AdaNorm()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.condition_width, 2 * config.hidden))
        self.linear = nn.Linear(config.hidden, config.patch**2 * config.out_channels)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm(x, shift, scale)[1])


def on_its_device(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``forward`` with its first input's device as the current one, where Triton launches kernels wherever their tensors lie."""

    @wraps(forward)
    def run(self: nn.Module, x: Tensor, *rest: Any, **named: Any) -> Any:
        with torch.cuda.device_of(x):
            return forward(self, x, *rest, **named)

    return run


class DiT(nn.Module):
    """Diffusion transformer, conditioned on a class, a text, both or neither.

    Args:
        config: the network.
        ep_size: ranks that share a set of experts. This rank's E / ep_size experts are built, no others.
    """

    def __init__(self, config: DiTConfig, ep_size: int = 1):
        super().__init__()
        self.config = config
        self.checkpoint_activations: Recompute = False
        self.graphs = False
        self.x_embed = nn.Conv2d(config.in_channels, config.hidden, config.patch, stride=config.patch)
        self.t_embed = TimestepEmbedder(config.condition_width, config.frequency_shift)
        self.y_embed = LabelEmbedder(config.num_classes, config.condition_width) if config.num_classes else None
        self.text_embed = TextEmbedder(config.text_width, config.hidden, config.condition_width) if config.text_width else None
        self.blocks = nn.ModuleList([Block(config, layer, ep_size) for layer in range(config.depth)])
        self.final = FinalLayer(config)

    def compile_blocks(self, graphs: bool = False) -> None:
        """Compile each block by itself with torch.compile: blocks are alike, so they are compiled once.

        Args:
            graphs: replay each as a CUDA graph, which saves launching its kernels one by one. For inference alone, in one shape.
        """
        self.graphs = graphs
        torch._dynamo.config.recompile_limit = 64  # kinds of blocks x training, validation, sampling x shapes of images and captions
        for module in self.modules():
            if isinstance(module, PackedExperts) and module.asks_for_counts(self.config.equal_load):
                module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign] # else recompiled for new counts
            if isinstance(module, RoutedExperts) and module.ep_size > 1:
                module.leave_to_python()
        for block in self.blocks:
            # not the call, which has ZeRO-3's hooks
            block.forward = torch.compile(block.forward, mode="reduce-overhead" if graphs else None)  # type: ignore[method-assign]

    @on_its_device
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        text: Tensor | None = None,
        mask: Tensor | None = None,
        keep: Tensor | None = None,
        return_router: bool = False,
    ) -> Tensor | tuple[Tensor, RouterStats | None]:
        """Predict noise or velocity.

        Args:
            x: latents (B, C, H, W), H and W multiples of the patch.
            t: (B,) on the scale that the model was trained with, as ``Objective.embed`` gives it.
            y: class labels (B,); ``num_classes`` means none.
            text: (B, T, text_width), with ``mask`` (B, T) true for tokens and false for padding.
            keep: (B, n) numbers of the patches to compute, row by row; the output is 0 at the others.
            return_router: also return the ``RouterStats``, stacked over layers (None without experts).

        Returns:
            fp32 (B, out_channels, H, W).
        """
        config = self.config
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()  # else every block would be free to overwrite what the one before it returned
        rows, columns = (side // config.patch for side in x.shape[2:])
        # contiguous, since every block would inherit the convolution's strides
        x = self.x_embed(x.to(dtype_of(self.x_embed))).flatten(2).transpose(1, 2).contiguous()
        angles = None
        if config.positions == "rope":
            angles = rotary_angles(rows, columns, config.hidden // config.heads, x.device)[None]
        else:
            x = x + position_table(rows, columns, config.hidden, x.device).to(x.dtype)
        if keep is not None:
            x = _take(x, keep)
            angles = _take(angles.expand(len(x), -1, -1), keep) if angles is not None else None
        c = self.t_embed(t)
        if self.y_embed is not None:
            c = c + self.y_embed(y)
        if self.text_embed is not None:
            assert text is not None and mask is not None
            text, pooled = self.text_embed(text, mask)
            c = c + pooled
        rotation = None if angles is None else (angles.cos(), angles.sin())  # once for all layers
        stats = []
        again = self.checkpoint_activations if self.training else False
        for block in self.blocks:
            run = partial(checkpoint, block, use_reentrant=False, context_fn=same_decisions) if again is True else block
            x, *layer = run(x, c, rotation, text, mask, again == "attention")
            if layer:
                stats.append(layer)
        out = self.final(x, c)
        if keep is not None:
            everywhere = out.new_zeros(len(out), rows * columns, out.shape[2])
            out = everywhere.scatter(1, keep[..., None].expand_as(out), out)
        out = self.unpatchify(out, rows, columns).float()
        if not return_router:
            return out
        return out, RouterStats(*(torch.stack(column) for column in zip(*stats, strict=True))) if stats else None

    def unpatchify(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """(B, rows * columns, patch * patch * C) -> (B, C, H, W); the channel is the fastest index."""
        patch = self.config.patch
        x = x.view(len(x), rows, columns, patch, patch, -1)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, rows * patch, columns * patch)


def _take(x: Tensor, keep: Tensor) -> Tensor:
    """Tokens ``keep`` (B, n) of x (B, N, D)."""
    return x.gather(1, keep[..., None].expand(-1, -1, x.shape[2]))
