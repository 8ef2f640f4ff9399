"""Routers: scores -> who takes which token with what weight. Pure tensors, no process groups.

Shapes: T tokens, E experts, K choices, M takings (a taking is one expert processing one token).
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class RouterConfig:
    """How tokens meet experts. The defaults are the papers': DiT-MoE (arXiv 2407.11633, section 3), EC-DIT (arXiv 2410.02098)."""

    renormalise: bool = False
    """Divide each token's kept scores by their sum. The published models do not."""
    route_scale: float = 1.0
    """Factor on every routed weight."""
    capacity_factor: float | None = None
    """Token choice: None keeps every token (dropless); otherwise an expert takes at most ceil(factor * T * K / E) of a rank's tokens.
    Expert choice: experts per token on average, f_c; None is the model's K."""
    layer_capacity: tuple[float, ...] = ()
    """Expert choice: the capacity factor of each sparse layer, where they differ."""
    pool: Literal["image", "microbatch"] = "image"
    """Expert choice: the tokens that compete, those of an image or of all images of a rank's micro-batch. With "image", what
    becomes of an image does not depend on the others."""
    input: Literal["modulated", "decoupled"] = "modulated"
    """What the router sees: the experts' own input, or the token before adaLN's modulation beside the timestep's embedding."""
    balance_alpha: float = 0.005
    """Weight of the expert-level balance loss; of token choice, since expert choice is balanced by construction."""
    balance_scope: Literal["global", "local"] = "global"
    """Tokens over which the balance loss counts: the whole global micro-batch, or each rank's own."""
    z_alpha: float = 0.0
    """Weight of the router z-loss, mean(logsumexp(logits)^2) (arXiv 2202.08906, section 2.2)."""


class Assignment(NamedTuple):
    """Takings sorted by expert, the one form that dispatch understands."""

    tokens: Tensor
    """(M,) index of the token of each taking."""
    weights: Tensor
    """(M,) fp32 factor on the expert's output."""
    counts: Tensor
    """(E,) takings of each expert."""
    equal: bool = False
    """Whether all counts are one number, and the same on every rank: then nobody needs to ask for them."""


def token_choice(scores: Tensor, k: int, config: RouterConfig) -> tuple[Assignment, Tensor]:
    """Each token takes its k best experts.

    Args:
        scores: (T, E) fp32 softmax over experts.
        k: experts per token.

    Returns:
        The assignment and the (T, K) chosen experts, before any capacity drop. Under a capacity factor all first
        choices rank before all second choices, then earlier tokens before later ones.
    """
    tokens, experts = scores.shape
    weights, chosen = scores.topk(k, dim=-1)
    if config.renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights * config.route_scale
    flat = chosen.t().reshape(-1)
    order = flat.argsort(stable=True)
    counts = count(flat, experts)
    assignment = Assignment(order % tokens, weights.t().reshape(-1)[order], counts)
    if config.capacity_factor is not None:
        capacity = math.ceil(config.capacity_factor * tokens * k / experts)
        place = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[flat[order]]
        kept = place < capacity
        assignment = Assignment(assignment.tokens[kept], assignment.weights[kept], counts.clamp(max=capacity))
    return assignment, chosen


def expert_choice(scores: Tensor, capacity: float, config: RouterConfig) -> Assignment:
    """Each expert takes the ``places`` tokens of each pool that score best with it. Source: EC-DIT (arXiv 2410.02098), section 3.

    Args:
        scores: (P, N, E) fp32 softmax over experts, of P pools of N tokens.
        capacity: f_c, experts per token on average.

    Returns:
        The assignment; tokens are numbered through the pools. A token may be taken by 0 to E experts.
    """
    pools, tokens, experts = scores.shape
    weights, chosen = scores.transpose(1, 2).topk(places(tokens, experts, capacity), dim=-1)  # (P, E, C)
    index = chosen + torch.arange(0, pools * tokens, tokens, device=scores.device)[:, None, None]
    index, weights = (part.transpose(0, 1).reshape(-1) for part in (index, weights))
    if config.renormalise:
        weights = weights / torch.zeros_like(scores[..., 0]).view(-1).index_add(0, index, weights)[index]
    counts = torch.full((experts,), len(index) // experts, device=scores.device)
    return Assignment(index, weights * config.route_scale, counts, equal=True)


def places(tokens: int, experts: int, capacity: float) -> int:
    """C, the tokens of a pool that each expert takes: ``tokens * capacity / experts``, rounded, at least 1 and at most all."""
    return min(max(round(tokens * capacity / experts), 1), tokens)


def count(chosen: Tensor, experts: int) -> Tensor:
    """How often each of ``experts`` occurs in ``chosen``; int64 (E,), without a device-to-host sync."""
    flat = chosen.reshape(-1)
    return torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def balance_loss(selections: Tensor, mean_scores: Tensor, alpha: float) -> Tensor:
    """Expert-level balance loss, alpha * sum_i f_i P_i with f_i = E * share of the selections that went to i.

    Args:
        selections: (..., E) how often each expert was chosen; constant for autograd.
        mean_scores: (..., E) P, the mean softmax score of each expert.
        alpha: the loss at perfect balance.

    Returns:
        () sum over the leading (layer) dimensions. Source: arXiv 2407.11633, section 3.2.
    """
    share = selections / selections.sum(-1, keepdim=True)
    return alpha * selections.shape[-1] * (share * mean_scores).sum()
