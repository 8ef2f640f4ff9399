"""What is planned: a job, a cluster, and how the job is spread over it."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from ditmoe_ds.distributed.hardware import Gpu
from ditmoe_ds.models.dit import DiT, DiTConfig, Recompute
from ditmoe_ds.models.tensor_plan import tensor_plan


@dataclass(frozen=True)
class Job:
    """What is trained, however it is spread."""

    model: DiTConfig
    patches: int
    """Patches of an image that the network sees."""
    text: int
    """Tokens of a caption; 0 for models without."""
    precision: Literal["bf16", "fp32"]
    global_batch: int
    steps: int
    averages: int
    sides: tuple[int, int] | None = None
    """Rows and columns of a latent, where it is not a square of the model's ``input_size``."""
    optimizer: str = "adamw"
    encoder: int = 0
    """Bytes of the text encoder, where captions are encoded in training."""


@dataclass(frozen=True)
class Cluster:
    """Nodes with equal numbers of equal GPUs."""

    gpu: Gpu
    nodes: int
    per_node: int

    @property
    def world(self) -> int:
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Assumptions:
    """What a plan cannot know. Every one is an option of ``ditmoe plan``."""

    mfu: float = 0.4
    """Share of the GPU's peak that the arithmetic reaches, waiting aside."""
    overlap: float = 0.8
    """Share of the arithmetic's time that can hide ZeRO's traffic; nothing hides the exchange of tokens, nor their sums."""
    link: float = 0.7
    """Share of their nominal rates that links and the GPU's memory reach."""
    margin: float = 0.1
    """Share of the GPU's memory left for the CUDA context, NCCL's buffers, kernels' workspaces and fragmentation."""


@dataclass(frozen=True)
class Shape:
    """How the job is spread; what the search varies."""

    stage: int
    ep: int
    micro: int
    recompute: Recompute
    bucket: int = 0
    """DeepSpeed's ``reduce_bucket_size``, in elements."""
    persistent: int = 0
    """Weights of fewer elements stay whole at stage 3."""
    tensor: int = 1
    """Tensor-parallel size: so many consecutive ranks divide every layer among them and see the same images."""


@dataclass(frozen=True)
class Layers:
    """How many elements the weights have on a rank of a tensor-parallel group. Dense are all weights but those of experts."""

    dense: int
    """In all dense weights."""
    experts: int
    """In the weights of all experts."""
    dense_layer: tuple[int, ...]
    """In each dense tensor of the largest layer."""
    expert_layer: tuple[int, ...]
    """In each of its tensors of experts."""
    dense_tensors: tuple[int, ...]
    """In each dense tensor, inside and outside the layers, in the model's order."""
    expert_tensors: tuple[int, ...]
    """In each tensor of experts, in the model's order."""


@lru_cache
def layers(model: DiTConfig, tensor: int = 1) -> Layers:
    """``Layers`` of the whole model (EP 1), shared by ``tensor`` ranks; nothing is allocated."""
    with torch.device("meta"):
        net = DiT(model)
    cuts, sizes = tensor_plan(net).cuts, dict[str, list[tuple[bool, int]]]()
    for name, parameter in net.named_parameters():
        block = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""
        size = parameter.numel() // (tensor if name in cuts else 1)
        sizes.setdefault(block, []).append(("deepspeed_experts" in name, size))
    everything = [pair for block in sizes.values() for pair in block]
    largest = max((block for name, block in sizes.items() if name), key=lambda block: sum(size for _, size in block))

    def of(block: list[tuple[bool, int]], experts: bool) -> list[int]:
        return [size for is_expert, size in block if is_expert == experts]

    return Layers(
        dense=sum(of(everything, False)),
        experts=sum(of(everything, True)),
        dense_layer=tuple(of(largest, False)),
        expert_layer=tuple(of(largest, True)),
        dense_tensors=tuple(of(everything, False)),
        expert_tensors=tuple(of(everything, True)),
    )
