"""How fast a step was, and how far from what the device could do."""

import resource
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ditmoe_ds.distributed.hardware import peak_tflops
from ditmoe_ds.models.dit import DiTConfig, Recompute
from ditmoe_ds.models.sizes import macs, recomputed_macs
from ditmoe_ds.training.step import Prepared

_macs, _recomputed_macs = lru_cache(macs), lru_cache(recomputed_macs)


def throughput(
    model: DiTConfig, batches: Sequence[Prepared], seconds: float, world: int, bf16: bool, recompute: Recompute, tensor: int = 1
) -> dict[str, Any]:
    """Entries of ``metrics.jsonl`` for one optimizer step.

    FLOPs are those of the model: 2 per multiply-accumulate, of active experts alone, with attention, and three times the forward for
    forward and backward. What activation checkpointing computes again is no progress and is counted separately.

    Args:
        batches: this rank's micro-batches.
        tensor: ranks that share them, by tensor parallelism.

    Returns:
        ``images_per_s`` and ``tokens_per_s`` over all ranks, ``tflops`` (10^12 a second) on each rank, ``recompute_tflops`` on top of
        them, ``mfu`` (share of the device's peak; of known devices, in bf16) and ``peak_memory_gb`` (10^9 bytes, of rank 0, so far).
    """
    images = tokens = 0
    forward = again = 0.0
    for batch in batches:
        seen, text = batch.tokens(model.patch), batch.condition["text"].shape[1] if model.text_width else 0
        images, tokens = images + len(batch.latents), tokens + len(batch.latents) * seen
        forward += 2 * len(batch.latents) * sum(_macs(model, seen, text)) / tensor
        again += 2 * len(batch.latents) / tensor * _recomputed_macs(model, seen, text, recompute)
    tflops, groups = 3 * forward / seconds / 1e12, world // tensor
    speed: dict[str, Any] = dict(images_per_s=images * groups / seconds, tokens_per_s=tokens * groups / seconds, tflops=tflops)
    if recompute:
        speed["recompute_tflops"] = again / seconds / 1e12
    cuda = batches[0].latents.is_cuda
    peak = peak_tflops(torch.cuda.get_device_name()) if cuda and bf16 else None
    if peak:
        speed["mfu"] = tflops / peak
    used = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return speed | dict(peak_memory_gb=used / 1e9)


class Profile:
    """A trace of three steps, from the fourth after the start on, for Perfetto or chrome://tracing: ``RUN_DIR/trace/rank_N.json.gz``."""

    def __init__(self, run_dir: Path, rank: int):
        (run_dir / "trace").mkdir(parents=True, exist_ok=True)
        self.profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(run_dir / "trace" / f"rank_{rank}.json.gz")),
        )
        self.profiler.start()

    def __call__(self, trainer: Any, record: dict[str, Any]) -> None:
        self.profiler.step()
