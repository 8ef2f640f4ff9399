"""The heart of the project: one loss curve and one training state, whatever the parallel shape, also across checkpoints.

fp32 runs at equal global batch agree to 1e-5 for every ZeRO stage, expert parallelism and world size, with clipping
active, AdamW, and the balance loss on; a run that is saved and loaded, in its own shape or another, continues its curve.
Processes are expensive to start, so one group per world size runs all cases that can run then.
"""

import json
import math

import pytest
import torch
import yaml
from latents import write_latents
from processes import ROOT, state, train_cases

from ditmoe_ds.distributed.checkpoint import Reader
from ditmoe_ds.distributed.engine import BatchShape
from ditmoe_ds.errors import ConfigError
from ditmoe_ds.models.sizes import describe, named_config
from ditmoe_ds.training.plan import cut_batch, read_plan
from ditmoe_ds.training.recipe import TrainConfig

NAME = "DiT-MoE-Nano/2-4E2A"
STEPS, HALF, SHORT, LONG = 20, 10, 5, 30
WORLDS = (1, 2, 4)
SHAPES = [(stage, ep, world) for world in WORLDS for ep in (1, 2, 4) if world % ep == 0 for stage in (0, 1, 2, 3)]
VARIANTS = {
    "plain": [f"checkpoint.every={HALF}", f"train.validate_every={STEPS}"],
    "recomputed": ["train.accumulation=2", "train.activation_checkpointing=true"],
    "attention recomputed": ["train.accumulation=2", "train.activation_checkpointing=attention"],
    "starved": [],
    "bf16": ["train.precision=bf16"],
    "experts choose": ["model.name=EC-DIT-Nano-4E", "data.manifest={folder}/texts", "train.mask_ratio=0.5", "model.router.input=decoupled"],
}
BASES = {"recomputed": "accumulated", "attention recomputed": "accumulated"}
"""With what a variant is compared, on one process without ZeRO: itself, but recomputed runs with one that keeps its activations."""
ROUNDED = 1e-2
"""In bf16 other kernels round otherwise. On one process without ZeRO-3 there are no others, but a last bit of the clipping turns a weight's
some day."""
CASES = [
    (variant, *shape)
    for variant in VARIANTS
    for shape in SHAPES
    if variant in ("plain", "experts choose") or (shape[0] in (0, 3) and shape[1:] in ((1, 1), (2, 2))) or shape == (3, 2, 4)
]
MOVES = [
    ((3, 2, 4), (1, 1, 1)),
    ((1, 1, 1), (3, 2, 4)),
    ((3, 4, 4), (2, 2, 2)),
    ((2, 2, 2), (3, 4, 4)),
    ((1, 4, 4), (3, 1, 2)),
    ((3, 1, 2), (1, 4, 4)),
    ((2, 1, 4), (0, 1, 1)),
    ((0, 1, 1), (3, 2, 2)),
    ((3, 2, 2), (3, 2, 4)),
    ((2, 4, 4), (1, 2, 4)),
    *((shape, shape) for shape in SHAPES if shape[0] > 0 and shape[1] == 2),
]
"""Saved by the first shape (ZeRO stage, EP, world), loaded by the second."""
SLOW_MOVES = [
    ((1, 2, 2), (0, 4, 4)),
    ((3, 1, 4), (3, 4, 4)),
    ((0, 2, 4), (3, 1, 1)),
    ((3, 1, 1), (2, 1, 2)),
    *((shape, shape) for shape in SHAPES if shape[0] > 0 and shape[1] != 2 and shape[2] > 1),
]
"""More moves, and the other exact resumes; trained only where their tests are asked for."""


def title(stage, ep, world):
    return f"zero{stage}-ep{ep}-world{world}"


def move_title(saved, loaded):
    return f"{title(*saved)}-to-{title(*loaded)}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture(scope="module")
def runs(folder, request):
    slow = [move for move in SLOW_MOVES if any(move_title(*move) in item.name for item in request.session.items)]
    recipe = folder / "recipe.yaml"
    write_latents(folder / "texts", train=40, val=6, shape=(4, 4, 8), text=6)
    for stage in range(4):
        settings = json.loads((ROOT / f"ds_configs/zero{stage}.json").read_text())
        if stage == 3:
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 1000  # else little but experts would be sharded
        (folder / f"zero{stage}.json").write_text(json.dumps(settings))
    recipe.write_text(
        yaml.safe_dump(
            dict(
                model=dict(name=NAME, router=dict(balance_alpha=0.05, z_alpha=0.001)),
                parallel=dict(deepspeed=str(folder / "zero{zero_stage}.json")),
                data=dict(manifest=write_latents(folder / "latents", train=40, val=6, shape=(4, 4, 4), per_shard=12), window=16, workers=0),
                train=dict(
                    steps=1000,
                    global_batch=8,
                    precision="fp32",
                    optimizer=dict(lr=1e-3, weight_decay=0.01, grad_clip=0.2, warmup_steps=3),
                    validate_every=SHORT,
                    sample_every=0,
                    tensorboard=False,
                ),
                ema=dict(decays=[0.9, 0.99]),
                checkpoint=dict(every=1000),
                run_dir="unset",
            )
        )
    )

    def case(name, stage, ep, *overrides, **more):
        shape = [f"parallel.zero_stage={stage}", f"parallel.expert={ep}", f"run_dir={folder / name}"]
        return dict(name=name, recipe=str(recipe), overrides=[*overrides, *shape], steps=STEPS) | more

    def straight(world):
        for variant, stage, ep, size in CASES:
            if size == world:
                name, overrides = f"{variant}-{title(stage, ep, world)}", [override.format(folder=folder) for override in VARIANTS[variant]]
                yield case(name, stage, ep, *overrides, steps=STEPS if variant == "plain" else SHORT, starve=variant == "starved")

    def moved(world, sources):
        for saved, loaded in [*MOVES, *slow]:
            if loaded[2] == world and saved[2] in sources:
                begin = folder / f"plain-{title(*saved)}" / "checkpoints" / f"step_{HALF:08d}"
                overrides = [f"checkpoint.every={HALF}", "train.validate_every=0", "train.elastic=false"]  # balance is counted per pass
                yield case(move_title(saved, loaded), *loaded[:2], *overrides, begin=str(begin))

    def long(world, **more):
        logged = ["checkpoint.every=11", "data.log_samples=true", "data.workers=2"]
        return case(f"long-{world}{len(more)}", 3, 2, *logged, **more | dict(steps=LONG))

    def elastic(stage, ep, world, saved=None):
        """Six steps; with ``saved``, the processes of another one, the last three of them."""
        begin = {} if saved is None else dict(begin=str(folder / f"elastic-{saved}" / "checkpoints" / "step_00000003"))
        overrides = [override.format(folder=folder) for override in VARIANTS["experts choose"]]
        return case(f"elastic-{world}", stage, ep, *overrides, "checkpoint.every=3", "train.validate_every=0", steps=6, **begin)

    accumulated = case(f"accumulated-{title(0, 1, 1)}", 0, 1, "train.accumulation=2", steps=SHORT)
    results, begin = {}, str(folder / "long-20" / "checkpoints" / "step_00000011")
    for i, (world, cases) in enumerate(
        [
            (1, [*straight(1), *moved(1, {1}), accumulated]),
            (2, [*straight(2), *moved(2, {1, 2}), long(2), long(2, begin=begin)]),
            (4, [*straight(4), *moved(4, {1, 2, 4}), long(4, begin=begin), elastic(3, 2, 4)]),
            (2, [*moved(2, {4}), elastic(2, 2, 2, saved=4)]),
            (1, [*moved(1, {2, 4}), elastic(1, 1, 1, saved=2)]),
        ]
    ):
        found, said = train_cases(world, cases, folder)
        results |= found | {f"said {i}": said}
    return results


@pytest.mark.parametrize("variant,stage,ep,world", CASES)
def test_same_curve(runs, variant, stage, ep, world):
    ours = runs[f"{variant}-{title(stage, ep, world)}"]["records"]
    base = runs[f"{BASES.get(variant, variant)}-{title(0, 1, 1)}"]["records"]
    assert [record["step"] for record in ours] == list(range(1, len(base) + 1))
    assert len(base) == (STEPS if variant == "plain" else SHORT)
    alike = 3 if world == 1 and stage < 3 else 0
    for key in ("loss", "balance_loss", "z_loss", "grad_norm"):
        for mine, theirs in zip(ours, base, strict=True):
            tolerance = 1e-5 if variant != "bf16" else 1e-6 if mine["step"] <= alike else ROUNDED
            assert mine[key] == pytest.approx(theirs[key], rel=tolerance), (key, mine["step"])
    if variant != "bf16":
        assert ours[-1]["val_loss"] == pytest.approx(base[-1]["val_loss"], rel=1e-5)
        assert [r["router"] for r in ours] == [r["router"] for r in base]


@pytest.mark.parametrize("stage,ep,world", SHAPES)
def test_optimizer_state_of_experts_is_sharded_over_their_replicas(runs, stage, ep, world):
    held = runs[f"plain-{title(stage, ep, world)}"]["held"]
    experts = describe(named_config(NAME))["parts"]["routed_experts"]
    assert held == [experts // (world if stage else ep)] * world


@pytest.mark.parametrize("stage,ep,world", SHAPES)
def test_every_element_is_saved_once(runs, folder, stage, ep, world):
    """By one rank, also where others hold a copy."""
    index = Reader(folder / f"plain-{title(stage, ep, world)}" / "checkpoints" / f"step_{HALF:08d}").index
    for name, shape in index["shapes"].items():
        assert sum(count for _, count, _ in index["pieces"][name]) == math.prod(shape), name


def test_the_cases_are_hard_enough(runs):
    plain = runs["plain-zero0-ep1-world1"]["records"]
    assert min(record["grad_norm"] for record in plain) > 0.2, "clipping was not active in every step"
    assert plain[-1]["loss"] < 0.98 * plain[0]["loss"], "training changed nothing"
    assert plain[0]["balance_loss"] > 0
    assert runs["plain-zero3-ep2-world4"]["idle"], "every expert got tokens from every rank"
    for record in runs["starved-zero3-ep2-world4"]["records"]:
        assert min(record["router"]["dead"]) >= 0.25


@pytest.mark.parametrize(
    "saved,loaded",
    [
        *(pytest.param(*move, id=move_title(*move)) for move in MOVES),
        *(pytest.param(*move, id=move_title(*move), marks=pytest.mark.slow) for move in SLOW_MOVES),
    ],
)
def test_saved_and_loaded_run_is_the_straight_run(runs, folder, saved, loaded):
    """Loading changes no bit of weights, moments and averages; then 10 + 10 steps are 20."""
    there, here = folder / f"plain-{title(*saved)}", folder / move_title(saved, loaded)
    before, found = state(there, HALF), state(here, HALF)
    assert before.keys() == found.keys() and len({kind for kind, _ in before}) == 5
    for key, value in before.items():
        assert torch.equal(found[key], value), key

    records, wanted = runs[here.name]["records"], runs[there.name]["records"][HALF:]
    assert [record["step"] for record in records] == list(range(HALF + 1, STEPS + 1))
    exact = saved == loaded
    for key in ("loss", "balance_loss", "z_loss", "grad_norm"):
        for mine, theirs in zip(records, wanted, strict=True):
            assert mine[key] == (theirs[key] if exact else pytest.approx(theirs[key], rel=1e-6)), (key, mine["step"])
    end, ours = state(there, STEPS), state(here, STEPS)
    for (kind, name), value in end.items():
        assert not torch.equal(before[kind, name], value), (kind, name, "training changed nothing")
        mine = ours[kind, name]
        if exact:
            assert torch.equal(mine, value), (kind, name)
            continue
        if name.endswith("qkv.bias"):  # softmax ignores k's bias: its gradient is rounding, which Adam scales up to whole steps
            mine, value = (torch.cat([tensor.chunk(3)[0], tensor.chunk(3)[2]]) for tensor in (mine, value))
        assert (mine - value).norm() <= 1e-6 * value.norm(), (kind, name)


@pytest.mark.parametrize("world", [2, 4])
def test_every_global_batch_has_its_samples_after_a_resume(runs, world):
    """30 steps on 2 ranks against 11 of them and 19 on 2 or 4; 6 epochs of 4 shards, read by worker processes."""
    straight, rest = runs["long-20"]["records"], runs[f"long-{world}1"]["records"]
    assert [record["samples"] for record in rest] == [record["samples"] for record in straight[11:]]
    assert [record["loss"] for record in rest] == pytest.approx([record["loss"] for record in straight[11:]], rel=1e-5)
    seen = [key for record in straight for key in record["samples"]]
    for epoch in range(6):
        assert sorted(seen[40 * epoch : 40 * (epoch + 1)]) == [f"train{i:06d}" for i in range(40)]
    assert len({tuple(seen[40 * epoch : 40 * (epoch + 1)]) for epoch in range(6)}) == 6


def test_fewer_processes_accumulate(runs, folder):
    """4 processes, then 2, then 1: the micro-batch of 2 and the global batch of 8 stay, and so does the curve."""
    assert [runs[f"elastic-{world}"]["accumulation"] for world in (4, 2, 1)] == [1, 2, 4]
    straight = runs["elastic-4"]["records"][3:]
    for world in (2, 1):
        for mine, theirs in zip(runs[f"elastic-{world}"]["records"], straight, strict=True):
            for key in ("loss", "grad_norm"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-5), (world, key, mine["step"])
            assert mine["router"] == theirs["router"], "of all passes"
    assert "2 processes, begun on 4: train.accumulation 1 -> 2, the global batch stays 8\n" in runs["said 3"]
    assert runs["said 4"].count("1 processes, begun on 4: train.accumulation 1 -> 4") == 1

    def batch(world, *overrides):
        found = read_plan([str(folder / "elastic-1" / "config.yaml"), *overrides], world).batch
        return found.accumulation, found.micro

    assert [batch(world) for world in (1, 2, 4, 8)] == [(4, 2), (2, 2), (1, 2), (1, 1)]
    assert batch(1, "train.elastic=false") == (1, 8)
    assert batch(1, "train.accumulation=2") == (2, 4)  # whoever says so anew is obeyed
    assert batch(1, "train.global_batch=12") == (1, 12)
    with pytest.raises(ConfigError, match=r"train.global_batch=8: must divide by 3 processes x 1"):
        batch(3)


@pytest.mark.parametrize(
    ("accumulation", "processes", "world", "passes"),
    [(1, 8, 4, 2), (1, 4, 8, 1), (4, 8, 16, 2), (4, 8, 32, 1), (4, 8, 64, 1), (2, 8, 6, 4), (3, 8, 6, 4), (2, 4, 4, 2)],
)
def test_passes_of_a_step(accumulation, processes, world, passes):
    """192 images a step; (2, 8, 6): 12 at once before, on 6 processes 32 each, of which 16 are too many."""
    batch = cut_batch(TrainConfig(1, 192, accumulation), world, processes)
    assert batch == BatchShape(192, passes, 192 // passes // world)
    assert world == processes or batch.micro <= 192 // processes // accumulation
