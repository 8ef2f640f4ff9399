"""Our MoE layer and others with the same weights, each as a ``Layer``: routed SwiGLU experts, top-2, no shared path.

A builder takes the weights and who chooses, "token" or "expert". It raises what the peer lacks or needs.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from report import Layer
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_ds.moe.layer import MoE, SharedMLP
from ditmoe_ds.moe.routing import RouterConfig, expert_choice

TOP_K = 2
ROUTERS = {"token": RouterConfig(renormalise=True), "expert": RouterConfig()}
"""DeepSpeed's top-2 weights always sum to one, so they do in every layer here; expert choice is as published."""


class Weights(NamedTuple):
    router: Tensor
    """(E, D)."""
    w1: Tensor
    """(E, 2F, D), rows [gate | up]."""
    w2: Tensor
    """(E, D, F)."""


class Loop(nn.Module):
    """A Python loop over experts that are modules of their own, as one would first write it."""

    def __init__(self, weights: Weights, choice: str):
        super().__init__()
        self.choice = choice
        self.gate = nn.Linear(*weights.router.shape[::-1], bias=False, device="meta")
        self.gate.weight = nn.Parameter(weights.router)
        self.experts = expert_modules(weights)

    def forward(self, x: Tensor) -> Tensor:
        scores = F.linear(x.float(), self.gate.weight.float()).softmax(-1)
        tokens, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        if self.choice == "token":
            kept, chosen = scores.flatten(0, 1).topk(TOP_K)
            kept = kept / kept.sum(-1, keepdim=True)
            taken = [torch.where(chosen == e) for e in range(len(self.experts))]
            takings = [(token, kept[token, place]) for token, place in taken]
        else:
            assignment = expert_choice(scores, (TOP_K, 1), ROUTERS["expert"])
            each = assignment.counts.tolist()
            takings = list(zip(assignment.tokens.split(each), assignment.weights.split(each), strict=True))
        for expert, (token, weight) in zip(self.experts, takings, strict=True):
            out.index_add_(0, token, expert(tokens[token]) * weight[:, None].to(x.dtype))
        return out.view_as(x)


def expert_modules(weights: Weights) -> nn.ModuleList:
    """Experts that share their weights' memory."""
    with torch.device("meta"):
        experts = nn.ModuleList(SharedMLP(weights.w2.shape[1], weights.w2.shape[2]) for _ in weights.w2)
    for expert, w1, w2 in zip(experts, weights.w1, weights.w2, strict=True):
        expert.w1.weight, expert.w2.weight = nn.Parameter(w1), nn.Parameter(w2)
    return experts


def ours(weights: Weights, choice: str) -> Layer:
    experts, dim, hidden = weights.w2.shape
    with torch.device("meta"):
        moe = MoE(dim, experts, choice, TOP_K, hidden, 0, ROUTERS[choice])
    moe.deepspeed_moe.gate.weight = nn.Parameter(weights.router)
    packed = moe.deepspeed_moe.experts.deepspeed_experts[0]
    packed.w1, packed.w2 = nn.Parameter(weights.w1), nn.Parameter(weights.w2)
    return Layer(lambda x: moe(x)[0], list(moe.parameters()))


def loop(weights: Weights, choice: str) -> Layer:
    module = Loop(weights, choice)
    return Layer(module, list(module.parameters()))


def deepspeed(weights: Weights, choice: str) -> Layer:
    if choice == "expert":
        raise NotImplementedError("no expert choice")
    experts, dim, hidden = weights.w2.shape
    with torch.device("meta"):
        moe = DeepSpeedMoE(dim, SharedMLP(dim, hidden), experts, k=TOP_K, drop_tokens=False, top2_2nd_expert_sampling=False)
    moe.deepspeed_moe.gate.wg.weight = nn.Parameter(weights.router)
    moe.deepspeed_moe.experts.deepspeed_experts = expert_modules(weights)
    return Layer(lambda x: moe(x)[0], list(moe.parameters()))


def autoep(weights: Weights, choice: str, **how: str) -> Layer:
    """Grouped experts of DeepSpeed's AutoEP, with their own weights: gate and up are two there. Its router in fp32, as the others' are."""
    if choice == "expert":
        raise NotImplementedError("no expert choice")
    experts, dim, hidden = weights.w2.shape
    source = nn.Module()
    source.gate, source.experts = nn.Linear(dim, experts, bias=False, device="meta"), nn.Module()
    source.gate.weight = nn.Parameter(weights.router)
    source.experts.gate_up_proj, source.experts.down_proj = nn.Parameter(weights.w1), nn.Parameter(weights.w2)
    named = dict(moe_module_name="", model_family="", router_name="gate", experts_name="experts", shared_experts_name="")
    stored = dict(expert_storage="fused_3d", expert_w1_name="gate_up_proj", expert_w2_name="down_proj", expert_w3_name=None)
    sizes = dict(num_experts=experts, top_k=TOP_K, hidden_size=dim, ffn_hidden_size=hidden, has_shared_experts=False)
    gate = dict(score_func="softmax", score_apply="post", route_norm=True, gate_bias=False)
    logits = dict(router_logits_capture_target="none", router_logits_capture_index=None, router_logits_capture_layer_name=None)
    spec = MoELayerSpec(**named, **stored, **sizes, **gate, **logits, return_router_logits=False)
    layer = AutoEPMoELayer(spec, source, 1, 0, AutoEPConfig(enabled=True, **how))
    weight = layer.router.gate.weight
    layer.router.gate.forward = lambda x: F.linear(x.float(), weight.float())
    return Layer(layer, list(layer.parameters()))


def autoep_fused(weights: Weights, choice: str) -> Layer:
    """The same with gate and up as one product and a kernel that weighs and sums."""
    return autoep(weights, choice, gate_up_impl="fused", combine_impl="fused_weighted_sum")


def megatron(weights: Weights, choice: str) -> Layer:
    """megatron-core's layer without Transformer Engine. Its softmax over the chosen logits is the renormalised softmax."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.spec_utils import build_module

    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16.1 names it, also without Transformer Engine
        moe_utils.te_general_gemm = None
    if choice == "expert":
        raise NotImplementedError("no expert choice")
    if not dist.is_initialized():
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    experts, dim, hidden = weights.w2.shape
    config = TransformerConfig(
        num_layers=1,
        num_attention_heads=1,
        hidden_size=dim,
        num_moe_experts=experts,
        moe_ffn_hidden_size=hidden,
        moe_router_topk=TOP_K,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        perform_initialization=False,
        use_cpu_initialization=not weights.w1.is_cuda,
        params_dtype=weights.w1.dtype,
        bf16=weights.w1.dtype == torch.bfloat16,
    )
    layer = build_module(get_moe_module_spec(use_te=False, num_experts=experts, moe_grouped_gemm=False), config=config)
    layer.set_layer_number(1)
    layer.router.weight = nn.Parameter(weights.router)
    for expert, w1, w2 in zip(layer.experts.local_experts, weights.w1, weights.w2, strict=True):
        expert.linear_fc1.weight, expert.linear_fc2.weight = nn.Parameter(w1), nn.Parameter(w2)
    return Layer(lambda x: layer(x)[0], list(layer.parameters()))


def floor(weights: Weights) -> Layer:
    """A dense SwiGLU that does for every token the multiplications of its experts."""
    _, dim, hidden = weights.w2.shape
    mlp = SharedMLP(dim, TOP_K * hidden).to(weights.w2)
    return Layer(mlp, list(mlp.parameters()))
