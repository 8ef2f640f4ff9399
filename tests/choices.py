"""Dropless token choice: three kernels do what torch's operators do."""

import torch

from ditmoe_ds.moe.choosing import choose
from ditmoe_ds.moe.routing import RouterConfig, token_choice

CHOICES = [(5, 4, 1), (37, 8, 2), (300, 6, 3), (700, 64, 2), (40, 3, 3)]
"""Tokens, experts, and how many of them take each token: blocks that are not full, and experts that are no power of 2."""
ROUTERS = [RouterConfig(), RouterConfig(renormalise=True, route_scale=2.5), RouterConfig(force_balance=True, renormalise=True)]


def chosen_alike(tokens: int, experts: int, k: int, config: RouterConfig) -> None:
    """On the default device."""
    logits, upward, of_means = torch.randn(tokens, experts, requires_grad=True), torch.randn(tokens, experts), torch.randn(experts)
    outcomes = []
    for ours in (False, True):
        if ours:
            assignment, means = choose(logits, k, config)
            assert torch.equal(assignment.tokens[assignment.listed.long()], torch.arange(tokens)[:, None].expand(-1, k))
            assert torch.equal(assignment.listed.flatten().sort().values, torch.arange(k * tokens, dtype=torch.int32))
        else:
            scores = logits.softmax(-1)
            assignment, means = token_choice(scores, k, config)[0], scores.mean(0)
        expert = torch.arange(experts).repeat_interleave(assignment.counts)
        dense = torch.zeros(tokens, experts).index_put((assignment.tokens, expert), assignment.weights)
        loss = (dense * upward).sum() + (means * of_means).sum()
        outcomes.append([dense, means, assignment.counts, *torch.autograd.grad(loss, logits)])
        for places in assignment.tokens.split(assignment.counts.tolist()):
            assert not ours or torch.equal(places, places.sort().values)
    for found, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
