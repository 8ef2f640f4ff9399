"""On a GPU, DeepSpeed gathers weights and reduces gradients on streams of their own. Nothing is read or used again before it is ready."""

import json

import pytest
from latents import write_latents
from processes import ROOT, demo_on, launch

CASES = dict(  # settings, processes, and what is found of DeepSpeed as it is
    stage_3=(dict(stage=3, reduce_bucket_size=100_000, stage3_param_persistence_threshold=1000), 2, "read on "),
    stage_2=(dict(stage=2, reduce_bucket_size=400_000), 3, "memory is used again on the default stream"),
)


@pytest.mark.parametrize("how", ["repaired", "as_found"])
@pytest.mark.parametrize("case", CASES)
def test_what_streams_share_is_in_order(case, how, tmp_path):
    zero, world, told = CASES[case]
    (tmp_path / "ds.json").write_text(json.dumps(dict(zero_optimization=zero | dict(overlap_comm=True, contiguous_gradients=True))))
    settings = [*demo_on(write_latents(tmp_path / "latents"), steps=2), "train.global_batch=12", "parallel.expert=1"]
    settings += [f"parallel.zero_stage={zero['stage']}", f"parallel.deepspeed={tmp_path / 'ds.json'}", f"run_dir={tmp_path / 'run'}"]
    recipe = ROOT / "recipes" / "digits.yaml"
    launch(world, [ROOT / "tests" / "streams_worker.py", tmp_path / "found.json", how, recipe, *settings])
    found = [line for rank in json.loads((tmp_path / "found.json").read_text()) for line in rank]
    assert any(line.startswith(told) for line in found) if how == "as_found" else not found, "\n".join(found)
