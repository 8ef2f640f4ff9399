"""Which expert takes which token of held-out data, noised to equidistant times: counts that stay on the device until the end.

The analysis of arXiv 2407.11633, section 4.4. A *taking* is one expert processing one token; both routers are lists of takings.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ditmoe_ds.diffusion.objectives import make_objective
from ditmoe_ds.latents.loader import Batch
from ditmoe_ds.models.dit import DiT
from ditmoe_ds.moe.layer import Router, RouterStats
from ditmoe_ds.moe.routing import Assignment, count
from ditmoe_ds.pipelines.run import Run
from ditmoe_ds.rng import keyed_generator


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within this context every forward appends, per sparse layer, which expert took which token: bool (B * N, E), on its device."""
    taken: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Tensor, ...], out: tuple[Assignment, RouterStats]) -> None:
        taken.append(taken_by(out[0], args[0].shape[0] * args[0].shape[1]))

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, Router):
                hooks.enter_context(module.register_forward_hook(look))
        yield taken


def taken_by(assignment: Assignment, tokens: int) -> Tensor:
    """Which expert takes which token: bool (tokens, E). No host sync: every shape is known."""
    counts = assignment.counts
    expert = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=len(assignment.tokens))
    taken = count(assignment.tokens * len(counts) + expert, tokens * len(counts), assignment.weights != 0)  # a capacity leaves places empty
    return taken.view(tokens, len(counts)) > 0


@dataclass
class Takings:
    """Counts of S samples at T times, in L layers of E experts, over N positions. Kept apart by sample, so that tests can permute labels.

    int32, 4 S (T + N) L E bytes in all: 175 MB for DiT-MoE-G (40 layers, 16 experts) with 256 samples of 256 tokens at 10 times,
    0.7 GB with 1024 tokens. Counts by class follow from these, since a sample has one class.
    """

    by_time: Tensor
    """(S, T, L, E)."""
    by_position: Tensor
    """(S, N, L, E)."""
    takers: Tensor
    """(T, L, E + 1) tokens that were taken by 0, 1, ..., E experts."""
    together: Tensor
    """(L, E, E) float64: tokens that both experts took; on the diagonal, that one took."""

    @classmethod
    def none(cls, samples: int, times: int, layers: int, positions: int, experts: int, device: torch.device | str) -> "Takings":
        zeros = partial(torch.zeros, dtype=torch.int32, device=device)
        return cls(
            zeros(samples, times, layers, experts),
            zeros(samples, positions, layers, experts),
            zeros(times, layers, experts + 1),
            zeros(layers, experts, experts).double(),
        )

    def add(self, taken: list[Tensor], first: int, times: Tensor) -> None:
        """Count one forward of B samples, of which ``first`` is the first, at times (B,).

        Args:
            taken: of each of L layers (B * N, E), as ``watched`` gives it. Nothing waits for the device.
        """
        positions, experts = self.by_position.shape[1], self.by_position.shape[3]
        hits = torch.stack(taken, dim=1).view(-1, positions, len(taken), experts)  # (B, N, L, E)
        rows = torch.arange(first, first + len(hits), device=hits.device)
        self.by_time[rows, times] += hits.sum(1, dtype=torch.int32)
        self.by_position[first : first + len(hits)] += hits
        number = torch.arange(experts + 1, device=hits.device)
        self.takers.index_add_(0, times, (hits.sum(3)[..., None] == number).sum(1, dtype=torch.int32))
        flat = hits.flatten(0, 1).transpose(0, 1).float()  # (L, B * N, E): sums below 2^24 are exact
        self.together += flat.transpose(1, 2) @ flat

    def on_cpu(self) -> "Takings":
        return Takings(*(part.cpu() for part in (self.by_time, self.by_position, self.takers, self.together)))


def noised(run: Run, samples: Batch, times: int, size: int = 64) -> Iterator[tuple[int, Tensor]]:
    """Forward each sample, noised to the middle of each of ``times`` equal parts of [0, 1], ``size`` samples together.

    Where images compete for experts, those of one forward get different times, as in training: if all had one time, every expert would
    take equally many tokens at every time.

    Yields:
        After each forward the position of its first sample in ``samples`` and, for each of its samples, the number of its time (B,). The
        noise depends on the sample and the time alone.
    """
    objective, conditioner = make_objective(run.diffusion), run.conditioner
    conditions = conditioner.of(samples)
    for first in range(0, len(samples.latents), size):
        x0 = samples.latents[first : first + size].to(run.device)
        condition = conditioner.unpack(conditioner.pack(conditions[first : first + size]), run.device)
        for k in range(times):
            keys = samples.samples[first : first + size].tolist()
            each = (k + torch.arange(len(keys)) * run.model.config.images_compete) % times
            draws = [
                torch.randn(x0.shape[1:], generator=keyed_generator("analysis", *key)) for key in zip(keys, each.tolist(), strict=True)
            ]
            t = ((each + 0.5) / times).to(x0)
            objective.loss(lambda z, s: run.model(z, s, **condition), x0, t, torch.stack(draws).to(run.device))  # noqa: B023
            yield first, each.to(run.device)


@torch.no_grad()
def count_takings(run: Run, samples: Batch, times: int) -> Takings:
    """Count, for S samples (scaled), which expert takes which token. Read from the device once, at the end."""
    model: DiT = run.model
    positions = samples.latents[0, 0].numel() // model.config.patch**2
    layers, experts = len(model.config.sparse_layers), model.config.experts
    counted = Takings.none(len(samples.latents), times, layers, positions, experts, run.device)
    with watched(model) as taken:
        for first, each in noised(run, samples, times):
            counted.add(taken, first, each)
            taken.clear()
    return counted.on_cpu()
