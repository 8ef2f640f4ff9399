"""How experts relate to each other: which are chosen together, and whose weights and answers are alike."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_ds.analysis.routing import noised
from ditmoe_ds.latents.loader import Batch
from ditmoe_ds.moe.layer import RoutedExperts
from ditmoe_ds.pipelines.run import Run


def lift(together: Tensor, tokens: int, distinct: bool) -> Tensor:
    """How many times as often as their loads alone imply two experts take the same token.

    Args:
        together: (L, E, E) tokens that both took; on the diagonal, that one took.
        distinct: every token has the same number of different experts, as by token choice. Then independent takings are
            impossible, and quasi-independence takes their place: expected pairs a_e a_f for e != f, none for e = f, with the
            row sums that were seen (Goodman 1968, for tables whose diagonal must be empty). Else expected are n_e n_f / tokens.

    Returns:
        (L, E, E); NaN on the diagonal and where no pair is expected.
    """
    load = together.diagonal(dim1=1, dim2=2)
    diagonal = torch.eye(load.shape[1], dtype=torch.bool)
    seen = together.masked_fill(diagonal, 0)
    if distinct:
        wanted = seen.sum(2)
        factor = wanted.sqrt()
        for _ in range(500):  # proportional fitting, damped: row and column are one factor
            row = factor * (factor.sum(1, keepdim=True) - factor)
            factor = factor * (wanted / row.clamp(min=1e-300)).sqrt()
        expected = factor[:, :, None] * factor[:, None]
    else:
        expected = load[:, :, None] * load[:, None] / tokens
    return torch.where(diagonal | (expected <= 0), torch.nan, seen / expected)


def experts_of(model: nn.Module) -> list[RoutedExperts]:
    """The L sparse layers, in order."""
    return [module for module in model.modules() if isinstance(module, RoutedExperts)]


@torch.no_grad()
def weights_alike(run: Run, name: str) -> Tensor:
    """(L, E, E) cosines of the experts' flattened ``w1`` or ``w2``. Hidden units may be permuted: equal experts can look unlike."""
    cosines = []
    for layer in experts_of(run.model):
        flat = F.normalize(getattr(layer.experts.deepspeed_experts[0], name).flatten(1).float(), dim=1)
        cosines.append((flat @ flat.t()).cpu())
    return torch.stack(cosines)


@contextmanager
def compared(model: nn.Module, tokens: int = 64) -> Iterator[list[Tensor]]:
    """Within this context every forward appends, per sparse layer, the mean cosine of what experts make of the same tokens: (E, E)."""
    alike: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, RoutedExperts)
        x = args[0].flatten(0, 1)
        x = x[torch.arange(tokens, device=x.device) * (len(x) // tokens + 1) % len(x)]  # so that positions differ from image to image
        experts = module.experts.deepspeed_experts[0]
        number = len(experts.w1)
        out = experts(x.repeat(number, 1), torch.full((number,), tokens, device=x.device), equal=True)
        out = F.normalize(out.view(number, tokens, -1).float(), dim=-1)
        alike.append(torch.einsum("etd,ftd->ef", out, out) / tokens)

    with ExitStack() as hooks:
        for layer in experts_of(model):
            hooks.enter_context(layer.register_forward_pre_hook(look))
        yield alike


@torch.no_grad()
def answers_alike(run: Run, samples: Batch, times: int) -> Tensor:
    """(L, E, E) mean cosines of the experts' outputs on the same tokens, chosen or not, over samples and times."""
    with compared(run.model) as alike:
        forwards = sum(1 for _ in noised(run, samples, times))
    return torch.stack(alike).view(forwards, -1, *alike[0].shape).mean(0).cpu()
