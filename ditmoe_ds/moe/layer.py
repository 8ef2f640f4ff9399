"""DeepSpeed's MoE layer with our router, packed experts and a shared path beside the routed one."""

from collections.abc import Callable

import torch
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.moe.sharded_moe import MOELayer
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_ds.moe import dispatch
from ditmoe_ds.moe.experts import PackedExperts, activate
from ditmoe_ds.moe.routing import Assignment, RouterConfig, count, token_choice


class Router(nn.Module):
    """Linear without bias and softmax in fp32, then a routing function. ``weight`` is (E, D)."""

    def __init__(self, dim: int, experts: int, top_k: int, config: RouterConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, dim))
        self.top_k, self.config = top_k, config

    def forward(self, tokens: Tensor) -> tuple[Assignment, Tensor, Tensor, Tensor]:
        """Route tokens (T, D).

        Returns:
            The assignment; (T, K) chosen experts; (E,) mean scores; () z-loss term. The last two carry gradients.
        """
        logits = F.linear(tokens.float(), self.weight.float())
        scores = logits.softmax(-1)
        assignment, chosen = token_choice(scores, self.top_k, self.config)
        return assignment, chosen, scores.mean(0), logits.logsumexp(-1).square().mean()


class RoutedExperts(MOELayer):
    """Route, send, compute, return, combine: the dropless counterpart of DeepSpeed's MOELayer."""

    def _set_ep_group(self, ep_group) -> None:
        self.ep_group = ep_group

    def forward(self, x: Tensor, meanwhile: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Process x (B, N, D); ``meanwhile`` computes the shared path while tokens are on their way.

        Returns:
            Output (B, N, D); (E,) selections; (E,) mean scores; () z-loss term, all of this rank's tokens.
        """
        tokens = x.reshape(-1, x.shape[-1])
        assignment, chosen, mean_scores, z = self.gate(tokens)
        rows = tokens[assignment.tokens]
        experts = self.experts.deepspeed_experts[0]
        if self.ep_size == 1:
            shared = meanwhile(x)
            rows = experts(rows, assignment.counts)
        else:
            exchange = dispatch.plan(assignment.counts, self.ep_group)
            flight = dispatch.InFlight(rows, exchange.send, exchange.receive, self.ep_group)
            shared = meanwhile(x)
            done = experts(flight.wait()[exchange.order], exchange.counts)
            back = torch.empty_like(done).index_copy(0, exchange.order, done)
            rows = dispatch.InFlight(back, exchange.receive, exchange.send, self.ep_group).wait()
        weighted = rows.float() * assignment.weights[:, None]
        routed = torch.zeros_like(tokens, dtype=torch.float32).index_add_(0, assignment.tokens, weighted)
        return shared + routed.to(x.dtype).view_as(x), count(chosen, len(mean_scores)), mean_scores, z


class SharedMLP(nn.Module):
    """The shared experts as one SwiGLU of their joint width, without bias. A name with "expert" would be taken
    for a routed expert by DeepSpeed's checkpoint code."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(dim, 2 * hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(activate(self.w1(x), "swiglu"))


class MoE(DeepSpeedMoE):
    """Sparse feed-forward layer that DeepSpeed's engine knows as its own.

    Args:
        dim: token width D.
        experts: routed experts E over all ranks; ``ep_size`` must divide it.
        top_k: experts per token.
        expert_width: hidden width of a routed expert.
        shared_width: hidden width of the shared path; 0 leaves it out.
        activation: of the routed experts, see ``PackedExperts``.
        ep_size: ranks that share one set of experts; this rank holds E / ep_size of them.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        top_k: int,
        expert_width: int,
        shared_width: int,
        router: RouterConfig,
        ep_size: int = 1,
        activation: str = "swiglu",
    ):
        nn.Module.__init__(self)  # DeepSpeed's own __init__ would build its gate and E copies of one expert
        self.num_experts, self.ep_size, self.num_local_experts = experts, ep_size, experts // ep_size
        self.expert_group_name = f"ep_size_{ep_size}"
        self.use_residual = self.enable_expert_tensor_parallelism = False
        packed = PackedExperts(self.num_local_experts, dim, expert_width, activation)
        # One packed module poses as the only local expert: DeepSpeed tags its parameters and finds it under the
        # names that its checkpoint code expects.
        self.deepspeed_moe = RoutedExperts(
            Router(dim, experts, top_k, router),
            Experts(packed, 1, self.expert_group_name),
            self.expert_group_name,
            ep_size,
            self.num_local_experts,
        )
        self.shared_mlp = SharedMLP(dim, shared_width) if shared_width else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Map x (B, N, D); see ``RoutedExperts.forward`` for what is returned."""
        return self.deepspeed_moe(x, self.shared_mlp or torch.zeros_like)
