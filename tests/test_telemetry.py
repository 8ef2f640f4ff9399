"""The figures of speed in metrics.jsonl."""

import gzip
import json

import pytest
import torch
from latents import write_latents
from processes import demo_on, launch, metrics
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditmoe_ds.models.dit import DiT, DiTConfig
from ditmoe_ds.training.step import Prepared
from ditmoe_ds.training.telemetry import throughput

MODEL = DiTConfig(hidden=32, depth=2, heads=4, input_size=8, num_classes=0, text_width=12, condition=16, experts=4, routing="expert")


@pytest.mark.parametrize("kept", [16, 8])
def test_flops_are_those_of_the_shapes_that_the_network_saw(kept):
    net = DiT(MODEL)
    keep = torch.arange(kept).expand(3, kept) if kept < 16 else None
    condition = dict(text=torch.zeros(3, 5, 12), mask=torch.ones(3, 5, dtype=torch.bool))
    batch = Prepared(torch.zeros(3, 4, 8, 8), condition, torch.zeros(3), torch.zeros(3, 4, 8, 8), torch.arange(3), keep)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the only one that it counts
        net(batch.latents, batch.times, **condition, keep=keep)
    speed = throughput(MODEL, [batch, batch], seconds=2.0, world=4, bf16=True, recompute=True)
    unseen = 3 * (16 - kept) * 2 * 4 * 2**2 * 32  # all patches are embedded before some are left out, which is no progress
    forward = 2 * (counter.get_total_flops() - unseen) / 2.0 / 1e12
    assert speed["tflops"] == pytest.approx(3 * forward, rel=1e-12)
    assert speed["recompute_tflops"] == pytest.approx(forward, rel=1e-12)
    attention = sum(sum(flops.values()) for name, flops in counter.get_flop_counts().items() if name.endswith((".attn", ".cross")))
    again = throughput(MODEL, [batch, batch], seconds=2.0, world=4, bf16=True, recompute="attention")["recompute_tflops"]
    assert again == pytest.approx(2 * attention / 2.0 / 1e12, rel=1e-12) and attention > 0
    assert (speed["images_per_s"], speed["tokens_per_s"]) == (12, 12 * kept)
    shared = throughput(MODEL, [batch, batch], seconds=2.0, world=4, bf16=True, recompute=True, tensor=2)
    assert [shared[key] / speed[key] for key in ("tflops", "recompute_tflops", "images_per_s", "tokens_per_s")] == pytest.approx([0.5] * 4)
    assert "mfu" not in speed  # of a device whose peak is not known
    assert 0.1 < speed["peak_memory_gb"] < 100


def test_mfu_is_of_the_devices_peak_in_bf16(monkeypatch):
    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 10**9)
    latents = torch.zeros(3, 4, 8, 8).as_subclass(OnGpu)
    batch = Prepared(latents, dict(text=torch.zeros(3, 5, 12)), torch.zeros(3), latents, torch.arange(3), None)
    speed, other = (throughput(MODEL, [batch], seconds=2.0, world=1, bf16=bf16, recompute=False) for bf16 in (True, False))
    assert speed["mfu"] == pytest.approx(speed["tflops"] / 756) and speed["peak_memory_gb"] == 3 and "mfu" not in other


def test_a_run_says_where_its_time_goes_and_leaves_a_trace(tmp_path):
    latents = write_latents(tmp_path / "latents", train=64)
    run_dir = tmp_path / "run"
    launch(2, ["-m", "ditmoe_ds.train", "recipes/digits.yaml", *demo_on(latents, 7), f"run_dir={run_dir}", "profile=true"])
    steps = [record["seconds"] for record in metrics(run_dir)]
    for seconds in steps:
        waits = seconds is not steps[-1]  # for the next step's samples
        parts = [seconds[part] for part in ("data", "forward", "backward", "optimizer", "ema")]
        assert min(parts[1:]) > 0 and (parts[0] > 0) == waits
        assert 0.5 * seconds["total"] < sum(parts) <= seconds["total"]
        assert 0 < seconds["all_to_all"] < seconds["forward"] + seconds["backward"]
    for rank in range(2):
        with gzip.open(run_dir / "trace" / f"rank_{rank}.json.gz", "rt") as file:
            names = [event.get("name") for event in json.load(file)["traceEvents"]]
        assert names.count("forward") == names.count("optimizer") == 3
        assert names.count("all_to_all") == 3 * 4 * 4  # steps, layers, two ways forward and two back
