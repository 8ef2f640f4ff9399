"""What tensor parallelism cuts in a DiT: heads, and hidden widths of feed-forwards. How it is cut is not decided here."""

from typing import NamedTuple

from torch import nn

from ditmoe_ds.models.attention import Attention, CrossAttention
from ditmoe_ds.models.dit import DenseMLP, DiTConfig
from ditmoe_ds.moe.experts import PackedExperts
from ditmoe_ds.moe.layer import SharedMLP
from ditmoe_ds.slices import Cut


class TensorPlan(NamedTuple):
    """What is cut and what is affected by that, by names in the model."""

    cuts: dict[str, Cut]
    """How parameters are cut; the others are whole on every rank."""
    head_norms: list[str]
    """Modules whose weights are whole on every rank, but are applied to the rank's heads only."""


def tensor_plan(model: nn.Module) -> TensorPlan:
    """List what can be cut. Where the outputs of a matrix are cut, so are the inputs of the next one."""
    cuts: dict[str, Cut] = {}
    norms: list[str] = []

    def outputs(path: str, *blocks: int) -> None:
        cuts[f"{path}.weight"] = cuts[f"{path}.bias"] = Cut(0, blocks)

    def inputs(path: str, width: int) -> None:
        cuts[f"{path}.weight"] = Cut(1, (width,))

    for path, module in model.named_modules():
        if isinstance(module, Attention | CrossAttention):
            D = module.proj.in_features
            if isinstance(module, Attention):
                outputs(f"{path}.qkv", D, D // module.group, D // module.group)
            else:
                outputs(f"{path}.q", D)
                outputs(f"{path}.kv", D, D)
            inputs(f"{path}.proj", D)
            norms += [f"{path}.{name}" for name in ("q_norm", "k_norm") if isinstance(getattr(module, name), nn.LayerNorm)]
        elif isinstance(module, DenseMLP | SharedMLP):
            width = module.w2.in_features
            outputs(f"{path}.w1", *[width] * (module.w1.out_features // width))
            inputs(f"{path}.w2", width)
        elif isinstance(module, PackedExperts):
            width = module.w2.shape[2]
            cuts[f"{path}.w1"] = Cut(1, (width,) * (module.w1.shape[1] // width))
            cuts[f"{path}.w2"] = Cut(2, (width,))
    return TensorPlan(cuts, norms)


def divided(config: DiTConfig) -> dict[str, int]:
    """The numbers that a tensor-parallel size must divide, by a name for the user."""
    found = {"heads": config.heads, "heads of k and v": config.kv_heads or config.heads}
    if len(config.sparse_layers) < config.depth:
        found["hidden units of a dense MLP"] = 4 * config.hidden
    for layer in config.sparse_layers:
        if config.routing == "dense":
            found[f"hidden units of layer {layer}'s MLP"] = config.mlp_width(layer)
    if config.routed_layers:
        found["hidden units of an expert"] = config.expert_width
        if config.shared:
            found["hidden units of the shared experts"] = config.shared * config.hidden
    return found


def has_biased_experts(config: DiTConfig) -> bool:
    """Whether experts add biases, which the plan does not cut: b2 would be added by every rank."""
    return bool(config.routed_layers) and config.expert_activation == "gelu" and config.mlp_bias
