"""DiT and DiT-MoE as a diffusers model: torch and diffusers only, shipped inside every folder that ``ditmoe export`` writes.

Sources: DiT (arXiv 2212.09748), DiT-MoE (arXiv 2407.11633). B batch, N tokens, D width, T = B * N, E experts.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional as F


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def activate(x, activation):
    if activation == "gelu":
        return F.gelu(x, approximate="tanh")
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class Timestep(nn.Module):
    def __init__(self, dim, frequency_shift):
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        omega = 10000.0 ** (-torch.arange(128, dtype=torch.float32, device=t.device) / (128 - self.frequency_shift))
        angles = t.float()[:, None] * omega
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(self.mlp.parameters()).dtype))


class Label(nn.Module):
    def __init__(self, num_classes, dim):
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, dim)  # the last row: no class

    def forward(self, labels):
        return self.table(labels)


class Attention(nn.Module):
    def __init__(self, dim, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(out.transpose(1, 2).reshape(B, N, D))


class DenseMLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.w1, self.w2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.w2(F.gelu(self.w1(x), approximate="tanh"))


class SharedMLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.w1, self.w2 = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.w2(activate(self.w1(x), "swiglu"))


class Experts(nn.Module):
    """All experts of a layer, packed: w1 (E, 2F, D) [gate | up] or (E, F, D), w2 (E, D, F), biases for "gelu" alone."""

    def __init__(self, experts, dim, hidden, activation):
        super().__init__()
        self.activation, gelu = activation, activation == "gelu"
        self.w1 = nn.Parameter(torch.zeros(experts, hidden if gelu else 2 * hidden, dim))
        self.w2 = nn.Parameter(torch.zeros(experts, dim, hidden))
        self.b1 = nn.Parameter(torch.zeros(experts, hidden)) if gelu else None
        self.b2 = nn.Parameter(torch.zeros(experts, dim)) if gelu else None

    def forward(self, x, e):
        hidden = activate(F.linear(x, self.w1[e], None if self.b1 is None else self.b1[e]), self.activation)
        return F.linear(hidden, self.w2[e], None if self.b2 is None else self.b2[e])


class Router(nn.Linear):
    """Logits in fp32. A module that is called, so that what offloads weights brings its own."""

    def forward(self, x):
        return F.linear(x.float(), self.weight.float())


class MoE(nn.Module):
    """Every token goes to its top-k experts, none is dropped; scores in fp32."""

    def __init__(self, dim, experts, top_k, expert_hidden, shared_hidden, activation, renormalise, route_scale):
        super().__init__()
        self.top_k, self.renormalise, self.route_scale = top_k, renormalise, route_scale
        self.router = Router(dim, experts, bias=False)
        self.experts = Experts(experts, dim, expert_hidden, activation)
        self.shared_mlp = SharedMLP(dim, shared_hidden) if shared_hidden else None

    def forward(self, x):
        """x (B, N, D) -> (B, N, D)."""
        tokens = x.reshape(-1, x.shape[-1])
        scores = self.router(tokens).softmax(-1)
        weights, chosen = scores.topk(self.top_k, dim=-1)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * self.route_scale
        routed = torch.zeros_like(tokens, dtype=torch.float32)
        for e in range(scores.shape[1]):
            token, choice = torch.where(chosen == e)
            if len(token):
                routed.index_add_(0, token, self.experts(tokens[token], e).float() * weights[token, choice, None])
        out = routed.to(x.dtype).view_as(x)
        return out if self.shared_mlp is None else self.shared_mlp(x) + out


class Block(nn.Module):
    def __init__(self, dim, attention, mlp):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = mlp
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class Final(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.linear = nn.Linear(dim, out)

    def forward(self, x, c):
        shift, scale = self.modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift, scale))


class DiTMoETransformer2DModel(ModelMixin, ConfigMixin):
    """Class-conditional DiT with dense (``experts`` 0) or Mixture-of-Experts feed-forwards.

    The config's fields are ditmoe_ds's DiTConfig; ``router`` and ``diffusion`` are its RouterConfig and DiffusionConfig.
    """

    _no_split_modules = ["Block"]  # noqa: RUF012 (as diffusers declares it)

    @register_to_config
    def __init__(
        self,
        hidden: int,
        depth: int,
        heads: int,
        patch: int = 2,
        input_size: int = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        experts: int = 0,
        top_k: int = 2,
        shared: int = 2,
        expert_activation: str = "swiglu",
        expert_hidden: int | None = None,
        qk_norm: bool = False,
        learn_variance: bool = True,
        frequency_shift: int = 0,
        router: dict | None = None,
        diffusion: dict | None = None,
    ):
        super().__init__()
        router = router or {}
        routing = router.get("renormalise", False), router.get("route_scale", 1.0)
        width = expert_hidden or 4 * hidden

        def mlp():
            return MoE(hidden, experts, top_k, width, shared * hidden, expert_activation, *routing) if experts else DenseMLP(hidden)

        self.x_embed = nn.Conv2d(in_channels, hidden, patch, stride=patch)
        self.t_embed = Timestep(hidden, frequency_shift)
        self.y_embed = Label(num_classes, hidden)
        self.blocks = nn.ModuleList([Block(hidden, Attention(hidden, heads, qk_norm), mlp()) for _ in range(depth)])
        self.final = Final(hidden, patch**2 * in_channels * (2 if learn_variance else 1))

    def position_table(self, rows, columns, device):
        """(N, D): first half of the channels from the column, second from the row; each [sin | cos]."""
        quarter = self.config.hidden // 4
        omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
        angles = torch.arange(max(rows, columns), dtype=torch.float64)[:, None] * omega
        line = torch.cat([angles.sin(), angles.cos()], dim=1)
        across, down = line[None, :columns].expand(rows, -1, -1), line[:rows, None].expand(-1, columns, -1)
        return torch.cat([across, down], dim=-1).flatten(0, 1).float().to(device)

    def forward(self, hidden_states, timestep, class_labels, return_dict: bool = True):
        """hidden_states (B, C, H, W), timestep (B,) on the scale the model was trained with, class_labels (B,) -> (B, C', H, W)."""
        patch = self.config.patch
        rows, columns = (side // patch for side in hidden_states.shape[2:])
        x = self.x_embed(hidden_states.to(self.x_embed.weight.dtype)).flatten(2).transpose(1, 2)
        x = x + self.position_table(rows, columns, x.device).to(x.dtype)
        c = self.t_embed(timestep) + self.y_embed(class_labels)
        for block in self.blocks:
            x = block(x, c)
        x = self.final(x, c).float().view(len(x), rows, columns, patch, patch, -1)
        sample = x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, rows * patch, columns * patch)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
