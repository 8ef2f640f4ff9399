"""Speed of a training step: sparse models beside dense ones of equal active FLOPs, and the trainer beside a plain PyTorch loop.

python benchmarks/train_step.py [--models NAME ...] [--plain DiT-XL/2] [--stage 0] [--no-compile] [--write]

One process, the real trainer on random latents. Without a GPU the models are small, and peers take turns. On one, blocks of all models are
compiled beforehand, side by side.
--write puts the tables under "Measured" in train_step.md.
"""

import argparse
import gc
import itertools
import re
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import Page, block, spent
from runs import close, make_trainer, train, write_latents

from ditmoe_ds.distributed.topology import join, leave
from ditmoe_ds.ending import end
from ditmoe_ds.models.dit import DiT, DiTConfig
from ditmoe_ds.models.sizes import named_config
from ditmoe_ds.training.callbacks import Record
from ditmoe_ds.training.step import Prepared
from ditmoe_ds.training.trainer import Trainer

GPU = torch.cuda.is_available()
LARGE = GPU and torch.cuda.mem_get_info()[1] > 120e9
XL = f"DiT-MoE-XL/2-{8 if LARGE else 4}E2A"  # the training state of 8 experts takes 85 GB
MODELS = (
    ["DiT-MoE-S/2-8E2A", "DiT-MoE-B/2-8E2A", "DiT-MoE-L/2-8E2A", XL, "EC-DIT-XL-8E"] if GPU else ["DiT-MoE-Tiny/2-8E2A", "EC-DIT-Tiny-8E"]
)
MICRO = {384: 128, 768: 128, 1024: 128, 1152: 64} if LARGE else {384: 128, 768: 64, 1024: 32, 1152: 16}
"""Images of a micro-batch on a GPU, by the width of a DiT-MoE. An EC-DIT takes twice as many, since every other layer is dense."""
KINDS = {
    "compiled": "^triton_",
    "attention": "flash|fmha|sdpa|attention",
    "GEMMs": "gemm|cutlass|nvjet|xmma|cublas|splitk|aten::(mm|bmm|addmm|_grouped_mm)$",
    "SwiGLU": "swiglu|silu",
    "routing, gathers, sums": "sort|topk|scan|histogram|takings|_weigh|index|gather|scatter",
    "optimizer, averages": "adam|multi_tensor|lerp|vector_norm|square_sums",
    "norms": "_norm$|_norm_backward$",
    "the rest": "",
}
"""Kinds of kernels, or without a GPU of operators, by a pattern of their names; the first that matches counts."""
CHECKED = 3
"""Steps whose losses must agree before the plain loop is timed."""


def dense_twin(sparse: DiTConfig) -> dict[str, Any]:
    """Fields of the dense model whose GELU MLPs have the FLOPs of the experts, shared ones included, that process a token."""
    matrices = 3 if sparse.expert_activation == "swiglu" else 2
    rows = matrices * sparse.top_k * sparse.expert_width + 3 * sparse.shared * sparse.hidden
    return dict(routing="dense", expert_activation="gelu", shared=0, expert_hidden=rows // (2 * sparse.top_k))


class Plain:
    """The trainer's model, weights, batches and arithmetic (AdamW on fp32 masters, clipping, one average) without any framework.

    Args:
        steps: micro-batches of each step, which are repeated.
    """

    def __init__(self, trainer: Trainer, weights: dict[str, torch.Tensor], steps: Sequence[list[Prepared]]):
        self.steps, self.objective, self.options = itertools.cycle(steps), trainer.objective, trainer.plan.recipe.train.optimizer
        self.model = DiT(trainer.plan.model).to(trainer.device, torch.bfloat16 if GPU else torch.float32)
        self.model.load_state_dict(weights)
        self.weights = list(self.model.parameters())
        self.masters = [torch.nn.Parameter(weight.detach().float()) for weight in self.weights] if GPU else self.weights
        self.average = [master.detach().clone() for master in self.masters]
        betas = self.options.beta1, self.options.beta2
        self.optimizer = torch.optim.AdamW(self.masters, self.options.lr, betas, weight_decay=self.options.weight_decay, fused=True)

    def step(self) -> float:
        batches, losses = next(self.steps), []
        for batch in batches:
            loss = self.objective.loss(partial(self.model, **batch.condition), batch.latents, batch.times, batch.noise).mean()
            (loss / len(batches)).backward()
            losses.append(loss.detach())
        if GPU:
            for master, weight in zip(self.masters, self.weights):
                master.grad = weight.grad.float()
        torch.nn.utils.clip_grad_norm_(self.masters, self.options.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.masters, 1e-4)
            if GPU:
                torch._foreach_copy_(self.weights, self.masters)
        self.model.zero_grad()
        return float(torch.stack(losses).mean())


def take_turns(trainers: Sequence[Trainer], rounds: int, steps: int) -> list[tuple[float, Record, dict[str, float]]]:
    """For each trainer the median seconds of a step, its last record, and what a step is ``spent`` on."""
    times: list[list[float]] = [[] for _ in trainers]
    for trainer in trainers:
        block(partial(train, trainer), 2)  # warm-up
    for _ in range(rounds):
        last = [block(partial(train, trainer), steps) for trainer in trainers]
        for each, (seconds, _) in zip(times, last):
            each.append(seconds)
    profiles = [spent(partial(train, trainer), 1 if GPU else 2, kernels=GPU) for trainer in trainers]
    for trainer in trainers:
        close(trainer)
    return [(statistics.median(each), record, profile) for each, (_, record), profile in zip(times, last, profiles)]


def compile_blocks(names: Sequence[str], options: Sequence[str]) -> None:
    """Have each model's blocks compiled by a process that trains it two layers deep. torch.compile keeps what it made, so that this process
    need not compile one model after the other."""
    command = [sys.executable, __file__, "--plain", "none", "--depth", "2", "--rounds", "1", "--steps", "1", *options, "--models"]
    for process in [subprocess.Popen([*command, name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for name in names]:
        process.wait()


def compare_models(page: Page, make: Callable[..., Trainer], names: Sequence[str], rounds: int, steps: int) -> list[str]:
    """Each sparse model and its dense twin. Without a GPU they take turns; on one they follow each other, as memory is short.

    Returns:
        Names of models that failed, which cost the others nothing.
    """
    parts = ("forward", "backward", "optimizer", "ema")
    page.table("model", "ms per step", "img/s", "of dense", "TFLOP/s", "MFU", *parts, "rest", *(["GB"] if GPU else []))
    profiles, failed = [], []
    for name in names:
        changes, done = ({}, dense_twin(named_config(name))), []
        for group in [[change] for change in changes] if GPU else [changes]:
            torch._dynamo.reset()  # the code of blocks is compiled for some models only, then no more
            gc.collect()
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            try:
                done += take_turns([make(name, change) for change in group], rounds, steps)
            except Exception:
                traceback.print_exc()
        if len(done) < len(changes):
            failed.append(name)
            continue
        flops = [record["tflops"] * record["seconds"]["total"] for _, record, _ in done]
        assert abs(flops[1] / flops[0] - 1) < 0.02, (name, flops)  # routers have no counterpart
        for title, (wall, record, profile), share in zip((name, "its dense twin"), done, (f"{done[1][0] / done[0][0]:.2f}", "")):
            profiles.append((title, wall, profile))
            total = record["seconds"]["total"]
            shares = [record["seconds"][part] / total for part in parts]
            page.row(
                title,
                f"{1e3 * wall:.0f}",
                f"{record['images_per_s'] * total / wall:.1f}",
                share,
                f"{record['tflops'] * total / wall:.3g}",
                f"{record['mfu'] * total / wall:.1%}" if "mfu" in record else "-",
                *(f"{value:.1%}" for value in (*shares, 1 - sum(shares))),
                *([f"{record['peak_memory_gb']:.1f}"] if GPU else []),
            )
    page.add("", f"Milliseconds of a step by {'kernels; `nothing`: none ran' if GPU else 'operators, by a profile'}.")
    page.table("model", *KINDS, *(["nothing"] if GPU else []), "longest of the rest")
    for title, wall, profile in profiles:
        kinds: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
        for name, ms in profile.items():
            kinds[next(kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))][name] = ms
        longest = sorted(kinds["the rest"], key=kinds["the rest"].__getitem__)[-1:-4:-1]
        cells = [sum(kind.values()) for kind in kinds.values()]
        if GPU:
            cells.append(1e3 * wall - sum(cells))
        page.row(title, *(f"{ms:.1f}" for ms in cells), ", ".join(f"`{name.removeprefix('void at::native::')[:60]}`" for name in longest))
    return failed


def compare_loops(page: Page, make: Callable[..., Trainer], name: str, stages: Sequence[int], rounds: int, steps: int) -> None:
    """The trainer and the plain loop in turns, on the same weights and batches; their losses are compared first."""
    page.table("model", "ZeRO", "trainer, ms per step", "plain loop", "trainer / plain, median of rounds", "each round")
    profiles = []
    for stage in stages:
        trainer = make(name, {}, stage=stage)
        plain = same_loop(trainer)
        times = [[block(step, steps)[0] for step in (partial(train, trainer), plain.step)] for _ in range(rounds)]
        ratios = [framework / bare for framework, bare in times]
        medians = [f"{1e3 * statistics.median(column):.1f}" for column in zip(*times)]
        page.row(name, str(stage), *medians, f"{statistics.median(ratios):.3f}", " ".join(f"{ratio:.3f}" for ratio in ratios))
        profiles.append([spent(step, 4) for step in (partial(train, trainer), plain.step)])
        close(trainer)
        del trainer, plain
        gc.collect()
    for stage, (theirs, ours) in zip(stages, profiles):
        page.add("", f"The operators in which the trainer spends more at ZeRO-{stage}, by a profile:")
        page.table("operator", "trainer, ms per step", "plain loop")
        for operator in sorted(theirs, key=lambda operator: ours.get(operator, 0.0) - theirs[operator])[:6]:
            page.row(f"`{operator}`", f"{theirs[operator]:.1f}", f"{ours.get(operator, 0.0):.1f}")


def same_loop(trainer: Trainer) -> Plain:
    """The plain loop of a trainer's weights and first batches, after steps of both whose losses agree."""
    weights = {key: value.clone() for key, value in trainer.engine.module.state_dict().items()}
    taken: list[Prepared] = []
    micro = trainer.plan.batch.accumulation
    trainer.ahead.loader = kept(trainer.loader, taken, CHECKED * micro)
    theirs = [train(trainer)["loss"] for _ in range(CHECKED)]
    batches = [batch.to(trainer.device, trainer.conditioner) for batch in taken]
    plain = Plain(trainer, weights, [batches[first : first + micro] for first in range(0, len(batches), micro)])
    ours = [plain.step() for _ in range(CHECKED)]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=2e-2 if GPU else 1e-4, atol=0)
    return plain


def kept(batches: Iterator[Prepared], taken: list[Prepared], count: int) -> Iterator[Prepared]:
    """All ``batches``, of which the first ``count`` are also ``taken``."""
    for batch in batches:
        if len(taken) < count:
            taken.append(batch)
        yield batch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=MODELS, help="none: the plain loop alone")
    parser.add_argument("--plain", default="DiT-XL/2" if GPU else "DiT-S/4", help="the dense model of the plain loop; none: leave it out")
    parser.add_argument("--images", type=int, default=128 if GPU else 32, help="of a step")
    parser.add_argument("--stage", type=int, default=0 if GPU else 2, help="of ZeRO")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=GPU, help="compare the models with compiled blocks")
    parser.add_argument("--depth", type=int, help="layers of each model, if not its own")
    parser.add_argument("--rounds", type=int, default=2 if GPU else 5)
    parser.add_argument("--steps", type=int, default=10 if GPU else 2, help="of a peer in a round")
    parser.add_argument("--write", action="store_true", help="put the figures into train_step.md")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if GPU and arguments.compile and not arguments.depth:
        compile_blocks(arguments.models, ["--images", str(arguments.images), "--stage", str(arguments.stage)])
    precision = "bf16" if GPU else "fp32"
    page = Page(__file__, arguments.write, f"{precision}, {arguments.images} images a step, ZeRO-{arguments.stage}")
    world = join()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_latents(folder / "classes", 1, 512)
        write_latents(folder / "texts", 1, 256, text=(77, 1280) if GPU else (16, 64))
        runs = itertools.count()

        def make(name: str, change: dict[str, Any], compiled: bool = False, stage: int = arguments.stage) -> Trainer:
            micro = arguments.images
            if GPU:
                micro = min(MICRO[named_config(name).hidden] * (2 if name.startswith("EC") else 1), micro)
            settings = {
                "model.name": name,
                "data.manifest": folder / ("texts" if name.startswith("EC") else "classes"),
                "train.global_batch": arguments.images,
                "train.accumulation": arguments.images // micro,
                "train.precision": precision,
                "train.compile": compiled,
                "parallel.zero_stage": stage,
                "run_dir": folder / f"run{next(runs)}",
            }
            return make_trainer(world, settings, change | (dict(depth=arguments.depth) if arguments.depth else {}))

        if arguments.plain != "none":
            compare_loops(page, make, arguments.plain, sorted({0, arguments.stage}), arguments.rounds, arguments.steps)
        if arguments.compile:
            page.add("", "With `train.compile=true`, sparse and dense:")
        failed = []
        if arguments.models:
            failed = compare_models(page, partial(make, compiled=arguments.compile), arguments.models, arguments.rounds, arguments.steps)
    if failed:
        page.add("", f"Failed: {', '.join(failed)}.")
        return 1
    leave()
    return 0


if __name__ == "__main__":
    end(main())  # a loader or a group of one that failed may keep a process from ending
