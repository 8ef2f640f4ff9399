"""DeepSpeed's MoE layer with our router, packed experts and a shared path beside the routed one."""

from typing import Any, NamedTuple

import torch
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.moe.sharded_moe import MOELayer
from torch import Tensor, nn

from ditmoe_ds.moe import dispatch
from ditmoe_ds.moe.experts import PackedExperts
from ditmoe_ds.moe.routing import Assignment, RouterConfig, count, expert_choice, token_choice
from ditmoe_ds.moe.rows import Combine, Take, activate, by_token, fused

if torch.version.cuda or torch.version.hip:  # these builds of torch bring Triton along
    from ditmoe_ds.moe.choosing import choose


class RouterStats(NamedTuple):
    """What a router did with this rank's tokens. ``DiT`` stacks those of its L sparse layers, along a first dimension."""

    selections: Tensor
    """(E,) how often each expert was chosen, before any capacity drop."""
    takers: Tensor
    """(E + 1,) tokens that were taken by 0, 1, ..., E experts."""
    mean_scores: Tensor
    """(E,) mean softmax score, with gradient."""
    z: Tensor
    """() z-loss term, with gradient; 0 if ``z_alpha`` is 0."""


class Router(nn.Module):
    """Linear without bias and softmax in fp32, then a routing function. ``weight`` is (E, D).

    Args:
        choice: "token": each token takes ``experts_per_token`` experts; "expert": experts choose, and a token is taken by
            ``experts_per_token`` of them on average.
    """

    def __init__(self, dim: int, experts: int, choice: str, experts_per_token: float, config: RouterConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, dim))
        self.choice, self.experts_per_token, self.config = choice, experts_per_token, config
        self.capacity = experts_per_token.as_integer_ratio()

    def forward(self, x: Tensor) -> tuple[Assignment, RouterStats]:
        """Route tokens x (B, N, D)."""
        logits = Logits.apply(x, self.weight)
        tokens, experts = x.shape[0] * x.shape[1], len(self.weight)
        z = logits.logsumexp(-1).square().mean() if self.config.z_alpha else logits.new_zeros(())
        if self.choice == "token" and self.config.capacity_factor is None and fused(logits):
            k = int(self.experts_per_token)
            assignment, mean_scores = choose(logits.view(tokens, experts), k, self.config)
            return assignment, RouterStats(assignment.counts, all_taken(assignment.counts, tokens, k), mean_scores, z)
        scores = logits.softmax(-1)
        if self.choice == "expert":
            pools = scores if self.config.pool == "image" else scores.reshape(1, tokens, experts)
            assignment = expert_choice(pools, self.capacity, self.config)
            selections, takers = assignment.counts, count(count(assignment.tokens, tokens), experts + 1)
        else:
            assignment, chosen = token_choice(scores.view(tokens, experts), int(self.experts_per_token), self.config)
            if self.config.capacity_factor is None:
                selections, takers = assignment.counts, all_taken(assignment.counts, tokens, chosen.shape[1])
            else:
                selections = count(chosen, experts)
                takers = count(count(assignment.tokens, tokens, assignment.weights != 0), experts + 1)
        return assignment, RouterStats(selections, takers, scores.mean((0, 1)), z)


def all_taken(counts: Tensor, tokens: int, k: int) -> Tensor:
    """``RouterStats.takers`` where each of the tokens is taken by k experts. ``counts`` is (E,)."""
    takers = counts.new_zeros(len(counts) + 1)
    takers[k].fill_(tokens)
    return takers


class Logits(torch.autograd.Function):
    """x (B, N, D) times the transposed weight (E, D), in fp32: (B, N, E). Plain operations would keep x in fp32 for backward.

    A GPU's matrix units take bf16 and add products, which are exact, in fp32; a gradient in fp32 they are given as the sum of two in bf16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x.flatten(0, 1), weight.t()).unflatten(0, x.shape[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        tokens, grad = x.flatten(0, 1), grad.flatten(0, 1)
        if direct(tokens, weight):
            x_grad, weight_grad = in_halves(grad, tokens, weight)
        else:
            x_grad, weight_grad = product(grad, weight), product(grad.t(), tokens)
        return x_grad.to(x.dtype).view_as(x), weight_grad.to(weight.dtype)


def direct(a: Tensor, b: Tensor) -> bool:
    """Whether a and b are multiplied as they are, with a result in fp32."""
    return a.is_cuda and a.dtype == b.dtype == torch.bfloat16


def product(a: Tensor, b: Tensor) -> Tensor:
    """The product of two matrices in fp32."""
    return torch.mm(a, b, out_dtype=torch.float32) if direct(a, b) else a.float() @ b.float()


def in_halves(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (T, D) in bf16 and of weight (E, D) in fp32, given that of the logits (T, E) in fp32, whose first 16 bits count."""
    high = grad.bfloat16()
    halves = torch.cat([high, (grad - high).bfloat16()], 1)
    return halves @ torch.cat([weight, weight]), product(halves.t(), x).view(2, *weight.shape).sum(0)


class RoutedExperts(MOELayer):
    """Route, send, compute, return, combine: the dropless counterpart of DeepSpeed's MOELayer."""

    def _set_ep_group(self, ep_group) -> None:
        self.ep_group = ep_group

    def forward(self, x: Tensor, route_by: Tensor, shared: "SharedMLP | None") -> tuple[Tensor, ...]:
        """Process x (B, N, D); the router sees ``route_by`` (B, N, D'). The first half of the shared path is computed while tokens are on
        their way to their experts, the second while they come back. In backward their gradients overlap with transfers likewise.

        Returns:
            (output (B, N, D), selections, takers, mean_scores, z); the last four are the fields of ``RouterStats``, for this rank's tokens.
        """
        tokens = x.reshape(-1, x.shape[-1])
        assignment, stats = self.gate(route_by)
        asked = self.ask(assignment) if self.ep_size > 1 else None
        listed = by_token(assignment, len(tokens))
        rows = Take.apply(tokens, assignment.tokens, *listed)
        if self.ep_size == 1:
            rows = self.experts.deepspeed_experts[0](rows, assignment.counts, assignment.equal)
            beside = shared(x) if shared else None
        else:
            rows, beside = self.elsewhere(rows, assignment, asked, x, shared)
        routed = Combine.apply(rows, assignment.tokens, assignment.weights, len(tokens), *listed).view_as(x)
        return routed if beside is None else beside + routed, *stats

    def ask(self, assignment: Assignment) -> dispatch.Asked:
        """For ``elsewhere``, which begins later: counts travel while rows are gathered."""
        return dispatch.ask(assignment, self.ep_group)

    def elsewhere(
        self, rows: Tensor, assignment: Assignment, asked: dispatch.Asked, x: Tensor, shared: "SharedMLP | None"
    ) -> tuple[Tensor, Tensor | None]:
        """Rows through their experts, wherever these are, and back; and what the shared path makes of x meanwhile."""
        exchange = dispatch.plan(assignment, asked, self.ep_group)
        order, back = exchange.order, exchange.back
        outward = dispatch.InFlight(rows, exchange.send, exchange.receive, self.ep_group)
        inner: Any = shared.up(x) if shared else None
        received = dispatch.Permute.apply(outward.wait(), order, back)
        done = self.experts.deepspeed_experts[0](received, exchange.counts, assignment.equal)
        homeward = dispatch.InFlight(dispatch.Permute.apply(done, back, order), exchange.receive, exchange.send, self.ep_group)
        beside = shared.down(inner) if shared else None
        return homeward.wait(), beside

    def leave_to_python(self) -> None:
        """Have torch.compile leave out what goes between ranks: it cannot start a transfer and await it later, would compile again for
        other splits, and takes the events of a clock into its graph, where nobody records them."""
        self.ask, self.elsewhere = map(torch.compiler.disable, (self.ask, self.elsewhere))  # type: ignore[method-assign]


class SharedMLP(nn.Module):
    """The shared experts as one SwiGLU of their joint width, without bias. A name with "expert" would be taken
    for a routed expert by DeepSpeed's checkpoint code."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(dim, 2 * hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def up(self, x: Tensor) -> Tensor:
        return activate(self.w1(x), "swiglu")

    def down(self, inner: Tensor) -> Tensor:
        return self.w2(inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class MoE(DeepSpeedMoE):
    """Sparse feed-forward layer that DeepSpeed's engine knows as its own.

    Args:
        dim: token width D.
        experts: routed experts E over all ranks; ``ep_size`` must divide it.
        choice, experts_per_token: see ``Router``.
        expert_width: hidden width of a routed expert.
        shared_width: hidden width of the shared path; 0 leaves it out.
        activation, bias: of the routed experts, see ``PackedExperts``.
        ep_size: ranks that share one set of experts; this rank holds E / ep_size of them.
        router_dim: width of what the router sees, if not D.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        choice: str,
        experts_per_token: float,
        expert_width: int,
        shared_width: int,
        router: RouterConfig,
        ep_size: int = 1,
        activation: str = "swiglu",
        bias: bool = True,
        router_dim: int | None = None,
    ):
        nn.Module.__init__(self)  # DeepSpeed's own __init__ would build its gate and E copies of one expert
        self.num_experts, self.ep_size, self.num_local_experts = experts, ep_size, experts // ep_size
        self.expert_group_name = f"ep_size_{ep_size}"
        self.use_residual = self.enable_expert_tensor_parallelism = False
        packed = PackedExperts(self.num_local_experts, dim, expert_width, activation, bias)
        # One packed module poses as the only local expert: DeepSpeed tags its parameters and finds it under the
        # names that its checkpoint code expects.
        self.deepspeed_moe = RoutedExperts(
            Router(router_dim or dim, experts, choice, experts_per_token, router),
            Experts(packed, 1, self.expert_group_name),
            self.expert_group_name,
            ep_size,
            self.num_local_experts,
        )
        self.shared_mlp = SharedMLP(dim, shared_width) if shared_width else None

    def forward(self, x: Tensor, route_by: Tensor | None = None) -> tuple[Tensor, ...]:
        """Map x (B, N, D), routed by (B, N, router_dim) or by x itself; see ``RoutedExperts.forward`` for what is returned."""
        return self.deepspeed_moe(x, x if route_by is None else route_by, self.shared_mlp)
