"""What is planned: a job, a cluster, and how the job is spread over it."""

from dataclasses import dataclass
from functools import lru_cache

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
    precision: str
    global_batch: int
    steps: int
    averages: int
    sides: tuple[int, int] | None = None
    """Rows and columns of a latent, where it is not a square of the model's ``input_size``."""
    optimizer: str = "adamw"


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
    """Share of the GPU's peak that the arithmetic alone reaches, without waiting for anyone."""
    overlap: float = 0.8
    """Share of the arithmetic's time beside which ZeRO's traffic can run; the exchange of tokens, and their sums, are counted whole."""
    link: float = 0.7
    """Share of a link's line rate, and of the memory's, that is reached."""
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
    """Tensor-parallel size: consecutive ranks that share every layer and see the same images."""


@dataclass(frozen=True)
class Layers:
    """Numbers of elements of the weights, on a rank of a tensor-parallel group."""

    dense: int
    """Of all weights but those of experts."""
    experts: int
    """Of all experts' weights."""
    dense_layer: int
    """Of the largest layer's weights but those of its experts."""
    expert_layer: int
    """Of the experts' weights of the largest layer."""
    largest: tuple[int, int]
    """Of the largest layer: of its largest dense tensor, and of its largest tensor of experts."""
    dense_tensors: tuple[int, ...]
    """Of each dense tensor, those outside the layers included, in the model's order."""
    expert_tensors: tuple[int, ...]
    """Of each tensor of experts, in the model's order."""


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
        sum(of(everything, False)),
        sum(of(everything, True)),
        sum(of(largest, False)),
        sum(of(largest, True)),
        (max(of(largest, False)), max(of(largest, True), default=0)),
        tuple(of(everything, False)),
        tuple(of(everything, True)),
    )
