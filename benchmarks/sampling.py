"""Latency and images per second of sampling with guidance: our pipeline beside a plain loop.

python benchmarks/sampling.py [--model NAME] [--batches 1 64] [--steps 50] [--write]

The plain loop calls the model twice per step, for the condition and without it, its layers go through the experts one by one, and on a
GPU it has torch's operators alone, where ours has Triton kernels.
On a GPU our blocks are compiled to CUDA graphs, as by `ditmoe sample --compile`; --eager leaves that out.
Same weights, scheduler and noise; latents are compared first. Without a VAE. --write puts the table under "Measured" in sampling.md.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from unittest.mock import patch

import torch
from report import Page, now
from torch import Tensor, nn
from torch.nn import functional as F

from ditmoe_ds.diffusion.objectives import DiffusionConfig
from ditmoe_ds.diffusion.sampling import Guidance, guided, make_scheduler, sample
from ditmoe_ds.models import adaln, attention, embeddings
from ditmoe_ds.models.dit import DiT
from ditmoe_ds.models.sizes import named_config
from ditmoe_ds.moe import rows
from ditmoe_ds.moe.layer import MoE
from ditmoe_ds.pipelines.pipeline import DiTMoEPipeline
from ditmoe_ds.pipelines.transformer import DiTMoETransformer

GPU = torch.cuda.is_available()
GUIDANCE = 4.0


class Loop(nn.Module):
    """The layer ``moe`` of token choice and SwiGLU, on the same weights, one expert after the other."""

    def __init__(self, moe: MoE):
        super().__init__()
        self.router, self.shared = moe.deepspeed_moe.gate, moe.shared_mlp
        self.experts = moe.deepspeed_moe.experts.deepspeed_experts[0]

    def forward(self, x: Tensor) -> tuple[Tensor]:
        tokens = x.flatten(0, 1)
        weights, chosen = F.linear(tokens.float(), self.router.weight.float()).softmax(-1).topk(int(self.router.experts_per_token))
        out = torch.zeros_like(tokens)
        for expert, (w1, w2) in enumerate(zip(self.experts.w1, self.experts.w2)):
            which, place = torch.where(chosen == expert)
            gate, up = F.linear(tokens[which], w1).chunk(2, dim=-1)
            out[which] += weights[which, place, None].to(x.dtype) * F.linear(F.silu(gate) * up, w2)
        return (out.view_as(x) + self.shared(x),)


def with_loops(model: DiT) -> DiT:
    """The same model and weights, with ``Loop`` for its sparse layers."""
    weights = {id(parameter): parameter for parameter in model.parameters()}
    twin = deepcopy(model, weights)  # parameters that are in the memo are shared, not copied
    for block in twin.blocks:
        block.mlp = Loop(block.mlp)
    return twin


@contextmanager
def torch_alone() -> Iterator[None]:
    """No Triton kernels of ours."""
    with ExitStack() as patches:
        for module in (adaln, attention, embeddings, rows):
            patches.enter_context(patch.object(module, "fused", lambda x: False))
        yield


def seconds(run: Callable[..., Tensor], *given: object) -> float:
    start = now()
    run(*given)
    return now() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="DiT-MoE-XL/2-8E2A" if GPU else "DiT-MoE-Tiny/2-8E2A")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64] if GPU else [1, 8])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=1 if GPU else 3)
    parser.add_argument("--eager", action="store_true", help="do not compile our blocks")
    parser.add_argument("--write", action="store_true", help="put the figures into sampling.md")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    diffusion = DiffusionConfig()
    with torch.device("cuda" if GPU else "cpu"):
        model = DiT(named_config(arguments.model)).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    pipe = DiTMoEPipeline(DiTMoETransformer.of(model, diffusion), make_scheduler(diffusion))
    pipe.set_progress_bar_config(disable=True)
    plain = with_loops(model)

    def ours(labels: list[int], noise: Tensor, steps: int) -> Tensor:
        return pipe(labels, num_inference_steps=steps, guidance_scale=GUIDANCE, latents=noise, output_type="latent").images

    @torch_alone()
    def theirs(labels: list[int], noise: Tensor, steps: int) -> Tensor:
        nothing = [model.config.num_classes] * len(labels)
        condition = {"y": torch.tensor([*labels, *nothing], device=noise.device)}
        predict = guided(plain, condition, Guidance(GUIDANCE), diffusion, apart=True)
        return sample(predict, noise, make_scheduler(diffusion), diffusion, steps)

    noise = torch.randn(max(arguments.batches), *pipe.latent_shape, device=model.x_embed.weight.device)
    labels = [17 * i % 1000 for i in range(len(noise))]
    # in fp32, where rounding does not change the routing
    torch.testing.assert_close(ours(labels[:2], noise[:2], 4), theirs(labels[:2], noise[:2], 4), rtol=1e-3, atol=1e-3)
    dtype = torch.bfloat16 if GPU else torch.float32
    model.to(dtype), plain.to(dtype)
    page = Page(__file__, arguments.write, f"{arguments.model}, {dtype}, {arguments.steps} steps, guidance {GUIDANCE}")
    page.table("batch", "ours, s", "plain loop, s", "ours, img/s", "plain loop, img/s", "plain / ours, median of rounds", "each round")
    if GPU and not arguments.eager:
        torch._dynamo.config.automatic_dynamic_shapes = False  # a graph for each batch, as each would have in its own run
        model.compile_blocks(graphs=True)
    for batch in arguments.batches:
        given = labels[:batch], noise[:batch]
        for run in (ours, theirs):
            run(*given, 4)
        times = [[seconds(run, *given, arguments.steps) for run in (ours, theirs)] for _ in range(arguments.rounds)]
        mine, other = (statistics.median(column) for column in zip(*times))
        ratios = [b / a for a, b in times]
        page.row(batch, f"{mine:.3f}", f"{other:.3f}", f"{batch / mine:.3g}", f"{batch / other:.3g}", f"{statistics.median(ratios):.2f}",
                 " ".join(f"{ratio:.2f}" for ratio in ratios))  # fmt: skip


if __name__ == "__main__":
    main()
