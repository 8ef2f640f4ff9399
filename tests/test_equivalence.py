"""The heart of the project: one loss curve and one series of gradient norms, whatever the parallel shape.

fp32 runs at equal global batch agree to 1e-5 for every ZeRO stage, expert parallelism and world size, with clipping
active, AdamW, and the balance loss on. Processes are expensive to start, so one group per world size runs all cases.
"""

import json
from pathlib import Path

import pytest
import yaml
from latents import write_latents
from processes import launch

from ditmoe_ds.models.sizes import describe, named_config

NAME = "DiT-MoE-Nano/2-4E2A"
STEPS = 20
WORLDS = (1, 2, 4)
SHAPES = [(stage, ep, world) for world in WORLDS for ep in (1, 2, 4) if world % ep == 0 for stage in (0, 1, 2, 3)]
VARIANTS = {
    "plain": [],
    "accumulation": ["train.accumulation=2"],
    "recomputed": ["train.activation_checkpointing=true"],
    "starved": [],
    "bf16": ["train.precision=bf16"],
}
TOLERANCE = {"bf16": 1e-2}
CASES = [(variant, stage, ep, world) for variant in VARIANTS for stage, ep, world in SHAPES]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equivalence")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            dict(
                model=dict(name=NAME, router=dict(balance_alpha=0.05, z_alpha=0.001)),
                data=dict(manifest=write_latents(folder / "latents", train=40, val=6, shape=(4, 4, 4))),
                train=dict(
                    steps=1000,
                    global_batch=8,
                    precision="fp32",
                    optimizer=dict(lr=1e-3, weight_decay=0.01, grad_clip=0.2, warmup_steps=3),
                    validate_every=STEPS // 2,
                    sample_every=0,
                    tensorboard=False,
                ),
                run_dir="unset",
            )
        )
    )
    results = {}
    for world in WORLDS:
        cases = []
        for variant, stage, ep, w in CASES:
            name = f"{variant}-zero{stage}-ep{ep}-world{w}"
            shape = [f"parallel.zero_stage={stage}", f"parallel.expert={ep}", f"run_dir={folder / name}"]
            if w == world:
                overrides = VARIANTS[variant] + shape
                cases.append(dict(name=name, recipe=str(recipe), overrides=overrides, steps=STEPS, starve=variant == "starved"))
        (folder / "cases.json").write_text(json.dumps(cases))
        launch(world, [Path(__file__).parent / "equivalence_worker.py", folder / "cases.json", folder / f"results{world}.json"])
        results |= json.loads((folder / f"results{world}.json").read_text())
    return results


@pytest.mark.parametrize("variant,stage,ep,world", CASES)
def test_same_curve(runs, variant, stage, ep, world):
    ours = runs[f"{variant}-zero{stage}-ep{ep}-world{world}"]["records"]
    base = runs[f"{variant}-zero0-ep1-world1"]["records"]
    assert [record["step"] for record in ours] == list(range(1, STEPS + 1))
    for key in ("loss", "balance_loss", "z_loss", "grad_norm"):
        for mine, theirs in zip(ours, base, strict=True):
            assert mine[key] == pytest.approx(theirs[key], rel=TOLERANCE.get(variant, 1e-5)), (key, mine["step"])
    if variant != "bf16":
        assert ours[-1]["val_loss"] == pytest.approx(base[-1]["val_loss"], rel=1e-5)
        assert [r["router"] for r in ours] == [r["router"] for r in base]


@pytest.mark.parametrize("stage,ep,world", SHAPES)
def test_optimizer_state_of_experts_is_sharded_over_their_replicas(runs, stage, ep, world):
    held = runs[f"plain-zero{stage}-ep{ep}-world{world}"]["held"]
    experts = describe(named_config(NAME))["parts"]["routed_experts"]
    assert held == [experts // (world if stage else ep)] * world


def test_the_cases_are_hard_enough(runs):
    plain = runs["plain-zero0-ep1-world1"]["records"]
    assert min(record["grad_norm"] for record in plain) > 0.2, "clipping was not active in every step"
    assert plain[-1]["loss"] < 0.98 * plain[0]["loss"], "training changed nothing"
    assert plain[0]["balance_loss"] > 0
    assert runs["plain-zero3-ep2-world4"]["idle"], "every expert got tokens from every rank"
    for record in runs["starved-zero3-ep2-world4"]["records"]:
        assert min(record["router"]["dead"]) >= 0.25


def test_recomputing_changes_nothing(runs):
    plain, recomputed = (runs[f"{variant}-zero3-ep2-world4"]["records"] for variant in ("plain", "recomputed"))
    assert [r["loss"] for r in recomputed] == pytest.approx([r["loss"] for r in plain], rel=1e-5)
