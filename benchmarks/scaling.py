"""How a training step's time and memory grow with experts, depth and tokens.

python benchmarks/scaling.py [--width 128] [--depth 4] [--images 8] [--write]

The bare model with the loss, AdamW and nothing else; one process. Sizes of one question take turns.
--write puts the tables under "Measured" in scaling.md.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from report import Page, now, peak_bytes

from ditmoe_ds.diffusion.objectives import DiffusionConfig, make_objective
from ditmoe_ds.models.dit import DiT, DiTConfig

GPU = torch.cuda.is_available()


class Step:
    """A training step of a new model on random latents.

    Attributes:
        memory: bytes that building it and two steps took at most.
    """

    def __init__(self, config: DiTConfig, images: int):
        self.config, self.images, self.objective = config, images, make_objective(DiffusionConfig())
        self.memory = peak_bytes(self._build)

    def _build(self) -> None:
        with torch.device("cuda" if GPU else "cpu"):
            self.model = DiT(self.config).to(torch.bfloat16 if GPU else torch.float32)
            for parameter in self.model.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            side = self.config.input_size
            self.x0, self.noise = torch.randn(2, self.images, self.config.in_channels, side, side)
            self.t, self.labels = torch.rand(self.images), torch.randint(self.config.num_classes, (self.images,))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=True)
        for _ in range(2):
            self()

    def __call__(self) -> tuple[float, float]:
        """Seconds of forward and backward, and of the optimizer."""
        start = now()
        self.objective.loss(lambda z, t: self.model(z, t, self.labels), self.x0, self.t, self.noise).mean().backward()
        middle = now()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return middle - start, now() - middle


def compare(page: Page, question: str, cases: Sequence[tuple[int, Callable[[], Step]]], rounds: int) -> None:
    """A table: the cases in turns, each beside the first."""
    steps = [(name, make()) for name, make in cases]
    times = [[step() for _, step in steps] for _ in range(rounds)]
    page.table(
        question,
        "parameters, M",
        "forward + backward, ms",
        "of the first",
        "optimizer, ms",
        "step, of the first",
        "peak MB",
        "of the first",
    )
    first: tuple[float, ...] = ()
    for (name, step), column in zip(steps, zip(*times)):
        compute, optimizer = (statistics.median(part) for part in zip(*column))
        first = first or (compute, compute + optimizer, step.memory)
        page.row(
            f"{name:,}",
            f"{sum(p.numel() for p in step.model.parameters()) / 1e6:.1f}",
            f"{1e3 * compute:.1f}",
            f"{compute / first[0]:.2f}",
            f"{1e3 * optimizer:.1f}",
            f"{(compute + optimizer) / first[1]:.2f}",
            f"{step.memory / 1e6:,.0f}",
            f"{step.memory / first[2]:.2f}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1152 if GPU else 128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--images", type=int, default=64 if GPU else 16, help="of 256 tokens, in a step; of more tokens fewer")
    parser.add_argument("--more", type=int, default=8, help="times as many images, for experts once more: the optimizer's time stays")
    parser.add_argument("--rounds", type=int, default=10 if GPU else 7)
    parser.add_argument("--write", action="store_true", help="put the figures into scaling.md")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    width, depth, images = arguments.width, arguments.depth, arguments.images
    precision = "bf16" if GPU else "fp32"
    page = Page(__file__, arguments.write, f"{precision}, width {width}, {depth} layers, 8 experts and 2 a token, {images * 256:,} tokens")
    base = DiTConfig(hidden=width, depth=depth, heads=width // (72 if GPU else 32), experts=8)

    def case(images: int = images, **fields: object) -> Callable[[], Step]:
        return lambda: Step(replace(base, **fields), images)

    Step(base, 1)  # so that what libraries allocate once does not count for the first case
    for times, (routing, chosen) in itertools.product(
        (1, arguments.more), (("token", "chosen by tokens"), ("expert", "which choose tokens"))
    ):
        cases = [(experts, case(times * images, routing=routing, experts=experts)) for experts in (8, 16, 32, 64)]
        compare(page, f"experts, {chosen}" + f"; {times * images * 256:,} tokens a step" * (times > 1), cases, arguments.rounds)
    compare(page, "layers", [(depth * times, case(depth=depth * times)) for times in (1, 2, 4)], arguments.rounds)
    sides = [(side, (side // 32) ** 2) for side in (32, 64, 128)]
    compare(page, "tokens of an image", [(256 * times, case(images // times, input_size=side)) for side, times in sides], arguments.rounds)


if __name__ == "__main__":
    main()
