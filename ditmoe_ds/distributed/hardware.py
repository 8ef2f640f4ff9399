"""GPUs that runs are planned for and measured against."""

from dataclasses import dataclass

from ditmoe_ds.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One accelerator and its links. TFLOP/s are 10^12 dense bf16 operations a second, without sparsity."""

    name: str
    """Part of the driver's name for it."""
    tflops: float
    memory: float
    """GB (10^9 bytes)."""
    memory_bandwidth: float
    """GB/s, as the links below."""
    node_bandwidth: float
    """To the other GPUs of its node, one way."""
    network_bandwidth: float
    """Its share of the node's network, one way."""


# From the vendor's data sheets: a sheet's bf16 "with sparsity" halved, NVLink's total of both ways halved, the network of the DGX
# of that generation (HDR 200 Gb/s a GPU for A100, 400 Gb/s for the later), and for PCIe cards the slot and a 200 Gb/s port for two.
GPUS = {
    #                           TFLOP/s  GB   GB/s  in node  across nodes
    "a100-40gb": Gpu("A100", 312, 40, 1555, 300, 25),
    "a100-80gb": Gpu("A100", 312, 80, 2039, 300, 25),
    "h100-pcie-80gb": Gpu("H100 PCIe", 756, 80, 2000, 64, 12.5),
    "h100-nvl-94gb": Gpu("H100 NVL", 835, 94, 3900, 64, 12.5),
    "h100-80gb": Gpu("H100", 989, 80, 3350, 450, 50),
    "h200-141gb": Gpu("H200", 989, 141, 4800, 450, 50),
    "b200-180gb": Gpu("B200", 2250, 180, 8000, 900, 50),
    "l40s-48gb": Gpu("L40S", 362, 48, 864, 32, 12.5),
}


def find(name: str) -> Gpu:
    """A row of ``GPUS``.

    Raises:
        ConfigError: no such row.
    """
    if name not in GPUS:
        fix = f"choose one of {', '.join(GPUS)}, or give the figures of another with --gpu-tflops, --gpu-memory and the like"
        raise ConfigError("--gpu", name, fix)
    return GPUS[name]


def peak_tflops(device: str) -> float | None:
    """Peak TFLOP/s of a device, by its driver's name for it; None if unknown."""
    return next((gpu.tflops for gpu in sorted(GPUS.values(), key=lambda gpu: -len(gpu.name)) if gpu.name in device), None)
