"""On a GPU, DeepSpeed gathers weights and reduces gradients on streams of their own. Nothing is read or used again before it is ready."""

import json
from types import SimpleNamespace

import pytest
from latents import write_latents
from processes import ROOT, demo_on, launch

from ditmoe_ds.distributed.engine import _norm_on_host

STAGE_3 = dict(stage=3, reduce_bucket_size=100_000, stage3_param_persistence_threshold=1000), 2
STAGE_2 = dict(stage=2, reduce_bucket_size=400_000), 3
STAGE_1 = dict(stage=1, reduce_bucket_size=400_000), 2
CASES = [  # settings and processes, what is done to the code, and the line that tells of it
    (STAGE_3, "repaired", None),
    (STAGE_3, "as_found", "read on "),
    (STAGE_3, "unawaited", "read on the default stream"),
    (STAGE_2, "repaired", None),
    (STAGE_2, "as_found", "memory is used again on the default stream"),
    (STAGE_2, "unawaited", "read on the default stream"),
    (STAGE_1, "repaired", None),
    (STAGE_1, "unawaited", "read on the default stream"),
]


@pytest.mark.parametrize(
    "shape, how, told",
    [
        pytest.param(shape, how, told, id=f"{shape[0]['stage']}-{how}", marks=pytest.mark.slow if how == "as_found" else ())
        for shape, how, told in CASES
    ],
)
def test_what_streams_share_is_in_order(shape, how, told, tmp_path):
    zero, world = shape
    (tmp_path / "ds.json").write_text(json.dumps(dict(zero_optimization=zero | dict(overlap_comm=True, contiguous_gradients=True))))
    settings = [
        *demo_on(write_latents(tmp_path / "latents"), steps=2),
        "train.global_batch=12",
        "train.accumulation=2",
        "parallel.expert=1",
    ]
    settings += [f"parallel.zero_stage={zero['stage']}", f"parallel.deepspeed={tmp_path / 'ds.json'}", f"run_dir={tmp_path / 'run'}"]
    recipe = ROOT / "recipes" / "digits.yaml"
    launch(world, [ROOT / "tests" / "streams_worker.py", tmp_path / "found.json", how, recipe, *settings])
    found = [line for rank in json.loads((tmp_path / "found.json").read_text()) for line in rank]
    assert any(line.startswith(told) for line in found) if told else not found, "\n".join(found)


def test_the_gradient_norm_is_asked_on_the_host():
    """Where it is still on the GPU, each question waits for all that the GPU was given."""
    there = SimpleNamespace(cpu=lambda: "on the host")
    optimizer = SimpleNamespace(scaled_global_norm=lambda: there, _get_norm_groups=lambda: [there, there])
    _norm_on_host(optimizer, stage=2)
    _norm_on_host(optimizer, stage=3)
    assert optimizer.scaled_global_norm() == "on the host" and optimizer._get_norm_groups() == ["on the host"] * 2
