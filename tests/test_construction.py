"""Building a model for training never costs a rank more than its own part and one layer."""

import json
from pathlib import Path

import pytest
from processes import launch

from ditmoe_ds.models.sizes import describe, named_config

SMALL, LARGE = "DiT-MoE-S/2-8E2A", "DiT-MoE-B/2-4E2A"  # 200M and 456M parameters, most of them in experts
MiB = 2**20


@pytest.mark.slow
@pytest.mark.parametrize("stage, ep, name", [(3, 1, SMALL), (3, 1, LARGE), (1, 4, LARGE)])
def test_peak_host_memory(stage, ep, name, tmp_path):
    launch(4, [Path(__file__).parent / "construction_worker.py", stage, ep, name, tmp_path / "report"])
    parts = describe(named_config(name))["parts"]
    experts = parts["routed_experts"]
    dense = sum(parts.values()) - experts - parts["position_table"]
    own = (dense + experts) / 4
    for rank in range(4):
        report = json.loads((tmp_path / f"report.{rank}").read_text())
        assert report["shard"] == pytest.approx(own, rel=0.01)
        assert report["local"] == pytest.approx(dense + experts / ep, rel=0.001)
        cost = report["peak"] - report["before"]
        # docs/parallelism.md: bf16 weights (at stage 3 the own part, for a moment twice), fp32 master, moments and EMA, one layer
        weights = 4 * own if stage == 3 else 2 * report["local"]
        formula = weights + 16 * own + 8 * report["largest"]
        print(f"stage {stage} EP {ep} rank {rank}: {cost / MiB:.0f} MiB, formula {formula / MiB:.0f}")
        assert 16 * own < cost < 1.1 * formula + 80 * MiB
        assert stage == 1 or cost < 16 * own + 4 * report["local"], "no better than building the whole model first"
