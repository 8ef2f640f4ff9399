"""Time and memory of our MoE layer, forward and backward, beside others with the same weights and beside a dense MLP of equal FLOPs.

python benchmarks/moe_layer.py [--sizes S B] [--experts 8 16 32 64] [--tokens 2048 8192] [--repeats 3] [--write]

Widths of the named sizes, SwiGLU experts 4 D wide, top-2, images of 256 tokens. Outputs and input gradients are checked equal
first; then the layers take turns. A second table says from a profile what the floor and our layer spend their time on.
--write puts the tables under "Measured" in moe_layer.md.
"""

import argparse
import itertools

import torch
from moe_peers import Weights, autoep, autoep_fused, deepspeed, floor, loop, megatron, ours
from report import Layer, Page, measure, spent
from torch import Tensor

from ditmoe_ds.models.sizes import SIZES

IMAGE = 256
PEERS = (loop, deepspeed, autoep, autoep_fused, megatron)
GEMMS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::_grouped_mm")
TITLES = {"loop": "loop", "deepspeed": "DeepSpeed", "autoep": "AutoEP", "autoep_fused": "AutoEP, fused", "megatron": "megatron-core"}


def random_weights(dim: int, experts: int, device: str, dtype: torch.dtype) -> Weights:
    """Outputs of unit scale, and router logits of unit variance, so that experts are chosen about equally often."""
    shapes = (experts, dim), (experts, 8 * dim, dim), (experts, dim, 4 * dim)
    return Weights(*(torch.randn(shape, device=device, dtype=dtype).mul_(shape[-1] ** -0.5) for shape in shapes))


def example(size: str, tokens: int, experts: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Weights]:
    """Input and weights."""
    dim = SIZES[size].hidden
    x = torch.randn(tokens // IMAGE, IMAGE, dim, device=device, dtype=dtype, requires_grad=True)
    return x, random_weights(dim, experts, device, dtype)


def outcome(layer: Layer, x: Tensor, upward: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient."""
    out = layer.forward(x)
    return out.detach(), *torch.autograd.grad(out, x, upward)


def equal_layers(choice: str, weights: Weights, x: Tensor) -> tuple[dict[str, Layer], dict[str, str]]:
    """Our layer and the peers, all checked to compute the same; and the errors of peers that do not run here."""
    layers, absent, upward = {"ours": ours(weights, choice)}, {}, torch.randn_like(x)
    wanted = outcome(layers["ours"], x, upward)
    for build in PEERS:
        name = build.__name__
        try:
            layer = build(weights, choice)
            found = outcome(layer, x, upward)
        except Exception as error:  # a peer that does not run here; the table says why
            absent[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        for a, b in zip(found, wanted, strict=True):
            off = ((a - b).float().norm() / b.float().norm()).item()
            assert off < (2e-2 if x.dtype == torch.bfloat16 else 1e-5), f"{name} computes something else: off by {off:.1e}"
        layers[name] = layer
    return layers, absent


def profiled(layer: Layer, x: Tensor, repeats: int) -> tuple[float, float]:
    """Milliseconds of GEMMs, and of everything else, in a forward and backward: operators' own time, on a GPU kernels'."""
    upward = torch.randn_like(x)
    found = spent(lambda: torch.autograd.grad(layer.forward(x), [x, *layer.parameters], upward), repeats)
    gemms = sum(found.get(name, 0.0) for name in GEMMS)
    return gemms, sum(found.values()) - gemms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--sizes", nargs="+", default=["XL", "S", "B", "G"] if cuda else ["S", "B"], choices=list(SIZES))
    parser.add_argument("--experts", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384] if cuda else [2048, 8192])
    parser.add_argument("--repeats", type=int, default=4 if cuda else 3)
    parser.add_argument("--write", action="store_true", help="put the figures into moe_layer.md")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    sizes = list(itertools.product(arguments.sizes, arguments.tokens, arguments.experts))
    page = Page(__file__, arguments.write, f"{dtype}; median of {arguments.repeats}")
    page.add("", "Milliseconds of forward and backward, each other layer's as a multiple of ours; and peak MiB beside weights and input.")
    page.table(
        "width", "tokens", "experts", "choice", "floor", "ours", "ours / floor", *TITLES.values(), "MiB: floor", "ours", *TITLES.values()
    )
    reasons: dict[tuple[str, str], str] = {}
    for size, tokens, experts in sizes:
        x, weights = example(size, tokens, experts, device, dtype)
        for choice in ("token", "expert"):
            layers, absent = equal_layers(choice, weights, x)
            reasons |= {(choice, name): reason for name, reason in absent.items()}
            figures = measure({"floor": floor(weights)} | layers, x, arguments.repeats)
            first, own = figures["floor"][0], figures["ours"][0]
            ratios = [f"{figures[name][0] / own:.2f}" if name in figures else "-" for name in TITLES]
            taken = [f"{figures[name][1] / 2**20:,.0f}" if name in figures else "-" for name in ("floor", "ours", *TITLES)]
            page.row(size, f"{tokens:,}", experts, choice, f"{1e3 * first:.1f}", f"{1e3 * own:.1f}", f"{own / first:.2f}", *ratios, *taken)
    page.add(
        "", "Milliseconds of GEMMs and of the rest; and GB of weights that ours reads in forward and in backward, and writes as gradients."
    )
    page.table("width", "tokens", "experts", "choice", "floor: GEMMs", "rest", "ours: GEMMs", "rest", "GEMMs, ours / floor", "GB")
    for size, tokens, experts in sizes:
        x, weights = example(size, tokens, experts, device, dtype)
        moved = 3 * (weights.w1.nbytes + weights.w2.nbytes) / 1e9
        for choice in ("token", "expert"):
            dense, sparse = (profiled(layer, x, arguments.repeats) for layer in (floor(weights), ours(weights, choice)))
            parts = [f"{part:.1f}" for part in (*dense, *sparse)]
            page.row(size, f"{tokens:,}", experts, choice, *parts, f"{sparse[0] / dense[0]:.2f}", f"{moved:.2f}")
    page.add("", *(f"- {TITLES[name]}, {choice} choice: {reason}" for (choice, name), reason in reasons.items()))


if __name__ == "__main__":
    main()
