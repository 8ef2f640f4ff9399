"""Time and memory of a layer with expert choice against the number of tokens, beside the same with one-hot dispatch.

python benchmarks/expert_choice.py [--width 256] [--experts 8] [--write]

One image of 256 to 4096 tokens, forward and backward, in turn. Ours gathers rows and adds them back by index. The other is the
dispatch of GShard's kind: a one-hot (experts, places, tokens) tensor and einsums, on the same experts and scores.
--write puts the table under "Measured" in expert_choice.md.
"""

import argparse

import torch
from report import Layer, Page, measure
from torch import Tensor
from torch.nn import functional as F

from ditmoe_ds.moe.layer import MoE
from ditmoe_ds.moe.routing import RouterConfig, expert_choice_capacity

LENGTHS = (256, 512, 1024, 2048, 4096)


def one_hot(moe: MoE, x: Tensor) -> Tensor:
    """The layer on x (1, N, D) with dense dispatch."""
    router, experts = moe.deepspeed_moe.gate, moe.deepspeed_moe.experts.deepspeed_experts[0]
    scores = F.linear(x.float(), router.weight.float()).softmax(-1)[0]
    weights, chosen = scores.t().topk(expert_choice_capacity(x.shape[1], len(router.weight), router.capacity))
    hot = F.one_hot(chosen, x.shape[1]).to(x.dtype)  # (E, C, N)
    rows = torch.einsum("ecn,nd->ecd", hot, x[0])
    counts = torch.full((len(chosen),), chosen.shape[1], device=x.device)
    done = experts(rows.flatten(0, 1), counts, equal=True).view_as(rows)
    return torch.einsum("ecn,ec,ecd->nd", hot, weights.to(x.dtype), done)[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1152 if torch.cuda.is_available() else 256)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put the figures into expert_choice.md")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    moe = MoE(arguments.width, arguments.experts, "expert", 2.0, 4 * arguments.width, 0, RouterConfig(), activation="gelu", bias=False)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    moe.to(device, dtype)
    parameters = list(moe.parameters())
    layers = {"ours": Layer(lambda x: moe(x)[0], parameters), "one-hot": Layer(lambda x: one_hot(moe, x), parameters)}
    page = Page(__file__, arguments.write, f"{dtype}; width {arguments.width}, {arguments.experts} experts, 2 per token")
    page.table("tokens", "ours, microseconds per token", "one-hot", "ours / one-hot", "ours, KB per token", "one-hot")
    for length in LENGTHS:
        x = torch.randn(1, length, arguments.width, device=device, dtype=dtype, requires_grad=True)
        near = dict(rtol=2e-2, atol=2e-3) if dtype == torch.bfloat16 else dict(rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moe(x)[0], one_hot(moe, x), **near)
        (ours, memory), (theirs, other) = measure(layers, x, arguments.repeats).values()
        speed = f"{1e6 * ours / length:.1f}", f"{1e6 * theirs / length:.1f}", f"{ours / theirs:.2f}"
        page.row(f"{length:,}", *speed, f"{memory / length / 1e3:.1f}", f"{other / length / 1e3:.1f}")


if __name__ == "__main__":
    main()
