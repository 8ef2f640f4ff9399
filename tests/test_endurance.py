"""A run that trains for weeks: what a rank holds does not grow with its steps."""

import json

import pytest
import yaml
from latents import write_latents, write_vae
from processes import ROOT, launch

EVERY = 200


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, parallel",
    [
        ("DiT-MoE-Nano/2-4E2A", dict(zero_stage=3, expert=2)),
        ("DiT-MoE-Nano/2-4E2A", dict(zero_stage=0)),
        ("EC-DIT-Nano-4E", dict(zero_stage=1, expert=2)),
    ],
)
def test_nothing_grows(model, parallel, tmp_path):
    """With saves, validations, grids of samples and many epochs. In fp32: in bf16 a CPU keeps code for every number of rows that an expert
    ever had, half a gigabyte in the end."""
    vae, text = write_vae(tmp_path / "vae"), 12 if model.startswith("EC") else 0
    often = dict(validate_every=50, sample_every=50, log_every=50)
    train = dict(steps=5 * EVERY, global_batch=8, precision="fp32", sample_images=4, sample_steps=2) | often
    recipe = dict(
        model=dict(name=model),
        data=dict(manifest=write_latents(tmp_path / "latents", train=64, val=8, vae=vae, text=text), workers=1),
        parallel=parallel,
        train=train,
        checkpoint=dict(every=50, keep=2),
        run_dir=str(tmp_path / "run"),
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    launch(2, [ROOT / "tests" / "endurance_worker.py", str(EVERY), tmp_path / "notes", tmp_path / "recipe.yaml"], timeout=1500)
    for rank in range(2):
        early, *_, late = [json.loads(line) for line in (tmp_path / f"notes.{rank}").read_text().splitlines()][1:]
        for key in ("children", "files", "their_files", "threads", "shared_memory"):
            assert late[key] <= early[key], (key, early, late)
        assert late["objects"] < 1.01 * early["objects"], (early, late)
        assert late["megabytes"] < early["megabytes"] + 1 and late["their_megabytes"] < early["their_megabytes"] + 3, (early, late)
