"""Routers: scores -> who takes which token with what weight. Pure tensors, no process groups.

Shapes: T tokens, E experts, K choices, M takings (a taking is one expert processing one token).
"""

import math
from collections.abc import Iterator
from contextvars import ContextVar
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
    """Token choice: None keeps every token (dropless); otherwise an expert takes at most ceil(factor * T * K / E) of a rank's tokens, and
    always computes that many rows: places that no token fills have weight 0.
    Expert choice: experts per token on average, f_c; None is the model's K."""
    layer_capacity: tuple[float, ...] = ()
    """Expert choice: the capacity factor of each sparse layer, where they differ."""
    pool: Literal["image", "microbatch"] = "image"
    """Expert choice: the tokens that compete, those of an image or of all images of a rank's micro-batch. With "image", what
    becomes of an image does not depend on the others."""
    input: Literal["modulated", "decoupled"] = "modulated"
    """What the router sees. modulated: the experts' own input. decoupled: the token before adaLN's modulation, joined to the vector that
    adaLN is given."""
    balance_alpha: float = 0.005
    """Weight of the expert-level balance loss; for token choice only, since expert choice is balanced by construction."""
    balance_scope: Literal["global", "local"] = "global"
    """Tokens over which the balance loss counts: the whole global micro-batch, or each rank's own."""
    z_alpha: float = 0.0
    """Weight of the router z-loss, mean(logsumexp(logits)^2) (arXiv 2202.08906, section 2.2)."""
    force_balance: bool = False
    """Token choice: tokens take experts in turn instead of the best; the weights are still the scores. For measuring speed at an even load,
    not for training."""


class Assignment(NamedTuple):
    """Takings sorted by expert, the one form that dispatch understands."""

    tokens: Tensor
    """(M,) index of the token of each taking."""
    weights: Tensor
    """(M,) fp32 factor on the expert's output."""
    counts: Tensor
    """(E,) takings of each expert."""
    equal: bool = False
    """Whether all counts are equal, on every rank: then ranks need not exchange them."""
    listed: Tensor | None = None
    """Only from a GPU's dropless token choice: (T, K) int32 index of each token's takings."""


def token_choice(scores: Tensor, k: int, config: RouterConfig) -> tuple[Assignment, Tensor]:
    """Each token takes its k best experts.

    Args:
        scores: (T, E) fp32 softmax over experts.
        k: experts per token.

    Returns:
        The assignment and the (T, K) chosen experts, before any capacity drop. Under a capacity factor all first
        choices rank before all second choices, then earlier tokens before later ones, and every expert has as many
        takings as its capacity, so that shapes are static: places that no token fills have weight 0.
    """
    tokens, experts = scores.shape
    weights, chosen = best(scores, k, in_turn(scores, k) if config.force_balance else None)
    if config.renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    if config.route_scale != 1:
        weights = weights * config.route_scale
    flat = chosen.t().reshape(-1)  # below, weights are gathered: the backward of indexing would sort
    order = flat.short().argsort(stable=True)  # short: a GPU sorts the key byte by byte
    counts = count(flat, experts)
    weights = weights.t().reshape(-1)
    if config.capacity_factor is None:
        return Assignment(order % tokens, weights.gather(0, order), counts), chosen
    place = torch.arange(token_choice_capacity(tokens, experts, k * config.capacity_factor), device=order.device)
    taken = place < counts[:, None]  # (E, C)
    taking = order[((counts.cumsum(0) - counts)[:, None] + place).clamp(max=len(order) - 1).view(-1)]
    kept = torch.where(taken.view(-1), weights.gather(0, taking), 0.0)
    return Assignment(taking % tokens, kept, torch.full_like(counts, len(place)), equal=True), chosen


def expert_choice(scores: Tensor, capacity: tuple[int, int], config: RouterConfig) -> Assignment:
    """Each expert takes the C tokens of each pool that score best with it. Source: EC-DIT (arXiv 2410.02098), section 3.

    Args:
        scores: (P, N, E) fp32 softmax over experts, of P pools of N tokens.
        capacity: f_c, experts per token on average, as a ratio.

    Returns:
        The assignment; tokens are numbered through the pools. A token may be taken by 0 to E experts.
    """
    pools, tokens, experts = scores.shape
    weights, chosen = best(scores.transpose(1, 2), expert_choice_capacity(tokens, experts, capacity))  # (P, E, C)
    if config.renormalise:
        kept = torch.zeros_like(scores.transpose(1, 2)).scatter(2, chosen, weights)
        weights = weights / kept.sum(1, keepdim=True).expand_as(kept).gather(2, chosen)  # a GPU's index_add rounds differently on every run
    index = chosen + torch.arange(0, pools * tokens, tokens, device=scores.device)[:, None, None]
    index, weights = (part.transpose(0, 1).reshape(-1) for part in (index, weights))
    if config.route_scale != 1:
        weights = weights * config.route_scale
    counts = torch.full((experts,), len(index) // experts, device=scores.device)
    return Assignment(index, weights, counts, equal=True)


_decisions: ContextVar[list[Tensor] | Iterator[Tensor] | None] = ContextVar("decisions", default=None)


class Deciding:
    """Within this context routers record their choices in ``kept`` or, with ``again``, repeat those recorded there."""

    def __init__(self, kept: list[Tensor], again: bool):
        self.kept, self.again = kept, again

    def __enter__(self) -> None:
        self.before = _decisions.set(iter(self.kept) if self.again else self.kept)

    def __exit__(self, *error: object) -> None:
        _decisions.reset(self.before)


def same_decisions() -> tuple[Deciding, Deciding]:
    """For ``torch.utils.checkpoint``'s ``context_fn``: backward recomputes with forward's routing, even where it rounds differently."""
    kept: list[Tensor] = []
    return Deciding(kept, again=False), Deciding(kept, again=True)


def best(scores: Tensor, k: int, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k largest scores along the last dimension, or else those ``given``, and their indices."""
    chosen = recorded() if given is None else given
    if chosen is None:
        chosen = scores.detach().topk(k, dim=-1).indices
    record(chosen)
    return scores.gather(-1, chosen), chosen


def in_turn(scores: Tensor, k: int) -> Tensor:
    """(T, k) experts for the tokens of scores (T, E): each token's are the next k of 0 to E - 1, round and round."""
    tokens, experts = scores.shape
    return (torch.arange(tokens * k, device=scores.device) % experts).view(tokens, k)


def recorded() -> Tensor | None:
    """The next choice to be repeated, if there is one."""
    made = _kept()
    return next(made) if isinstance(made, Iterator) else None


def record(chosen: Tensor) -> None:
    """Keep a choice, if it is to be repeated."""
    made = _kept()
    if isinstance(made, list):
        made.append(chosen)


def _kept() -> list[Tensor] | Iterator[Tensor] | None:
    return None if torch.compiler.is_compiling() else _decisions.get()


def expert_choice_capacity(tokens: int, experts: int, capacity: tuple[int, int]) -> int:
    """C, the tokens of a pool that each expert takes: ``tokens * capacity / experts``, rounded, at least 1 and at most all.

    Args:
        capacity: as a ratio of integers, because torch.compile can follow a varying number of tokens through integer arithmetic only.
    """
    over, under = capacity
    return min(max((2 * tokens * over + under * experts) // (2 * under * experts), 1), tokens)


def token_choice_capacity(tokens: int, experts: int, capacity: float) -> int:
    """C, the takings of each expert under token choice with ``capacity`` experts per token: rounded up, at most one of each token."""
    return min(math.ceil(tokens * capacity / experts), tokens)


def count(chosen: Tensor, experts: int, those: Tensor | None = None) -> Tensor:
    """How often each of ``experts`` occurs in ``chosen``, where ``those`` is true; int64 (E,), without a device-to-host sync."""
    flat = chosen.reshape(-1)
    ones = torch.ones_like(flat) if those is None else those.long()
    return torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, ones)


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
