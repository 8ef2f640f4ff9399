"""torch.compile on real runs: the same numbers as without."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from latents import write_latents, write_vae
from models import SPARSE, random_weights
from PIL import Image
from processes import demo_on, launch

from ditmoe_ds.cli import main
from ditmoe_ds.distributed.weights import write_weights

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name, stage, world", [("EC-DIT-Nano-4E", 2, 2), ("DiT-MoE-Nano/2-4E2A", 0, 1), ("DiT-MoE-Nano/2-4E2A", 3, 2)])
def test_a_compiled_run_is_the_run(tmp_path, name, stage, world):
    """And goes on as if it had not ended."""
    latents = write_latents(tmp_path / "latents", train=64, text=6 if name.startswith("EC") else 0)

    def run(directory, compiled, *steps):
        how = [f"model.name={name}", f"parallel.zero_stage={stage}", f"parallel.expert={world}", "train.precision=fp32"]
        how += [f"train.compile={compiled}", "train.validate_every=4", "checkpoint.every=2", f"run_dir={tmp_path / directory}"]
        for until in steps:
            launch(world, ["-m", "ditmoe_ds.train", "recipes/digits.yaml", *demo_on(latents, until), *how], timeout=900)
        return [json.loads(line) for line in (tmp_path / directory / "metrics.jsonl").read_text().splitlines()]

    plain, ours, resumed = run("plain", "false", 4), run("compiled", "true", 4), run("resumed", "true", 2, 4)
    assert len(plain) == len(ours) == len(resumed) == 4
    for key in ("loss", "balance_loss", "grad_norm"):
        assert [record[key] for record in ours] == pytest.approx([record[key] for record in plain], rel=1e-5), key
        assert [record[key] for record in resumed] == [record[key] for record in ours], key
    assert ours[-1]["val_loss"] == pytest.approx(plain[-1]["val_loss"], rel=1e-5)


@pytest.mark.gpu  # too: there blocks are CUDA graphs
@pytest.mark.parametrize("routing", ["token", "expert"])
def test_compiled_samples_are_the_samples(tmp_path, routing):
    latents = dict(vae=write_vae(tmp_path / "vae"), scaling_factor=0.9, shift_factor=0.1)
    write_weights(tmp_path / "weights", random_weights(replace(SPARSE, routing=routing), latents=latents)[1])
    found = []
    for how in ([], ["--compile"]):
        out = tmp_path / f"out{len(found)}"
        assert main(["sample", str(tmp_path / "weights"), "--out", str(out), "--num", "5", "--batch", "2", "--steps", "4", *how]) == 0
        found.append([np.asarray(Image.open(io.BytesIO(path.read_bytes()))).astype(int) for path in sorted(out.glob("*.png"))])
    plain, ours = found
    assert len(plain) == len(ours) == 5
    for a, b in zip(plain, ours):
        assert abs(a - b).max() <= 1 and a.std() > 1
