"""Ranks that exchange by NCCL train as one GPU alone does, whatever the parallel shape.

They may share a GPU: each names itself another host, so that NCCL takes them for two and goes through sockets. Nothing here is about speed.
"""

import pytest
import yaml
from encoding import write_text_encoder
from latents import write_latents, write_vae
from processes import train_cases

pytestmark = pytest.mark.gpu

STEPS, HALF = 6, 3
HOW = {
    "bf16": [],
    "fp32": ["train.precision=fp32"],
    "compiled": ["train.compile=true"],
    "recomputed": ["train.accumulation=2", "train.activation_checkpointing=true"],
    "offloaded": ["parallel.deepspeed=ds_configs/zero3_offload.json"],
    "measured": [f"train.validate_every={HALF}", f"train.sample_every={STEPS}", "train.sample_images=3", "train.sample_steps=2"],
    "captions": ["model.name=EC-DIT-Tiny-4E", "data.text_encoder={folder}/encoder", "data.text_max_tokens=8"],
}
ONE, SAVED = (0, 1, 1, 1), ("bf16", 3, 2, 1, 2)
CASES = [
    *(("bf16", stage, expert, 1, 2) for stage in range(4) for expert in (1, 2)),
    *(("bf16", stage, 1, 2, 2) for stage in (1, 3)),
    *(("fp32", 3, 2, 1, 2), ("fp32", 2, 1, 2, 2)),
    *(("compiled", stage, 2, 1, 2) for stage in (0, 1, 3)),
    ("compiled", 1, 1, 2, 2),
    *((how, 3, 2, 1, 2) for how in ("recomputed", "offloaded", "measured")),
    ("captions", 2, 2, 1, 2),
    *(("bf16", 3, 2, 1, 4), ("bf16", 1, 2, 2, 4), ("fp32", 2, 4, 1, 4), ("captions", 3, 2, 1, 4)),
]
"""How, stage of ZeRO, expert and tensor parallelism, ranks."""


def title(how, stage, expert, tensor, world):
    return f"{how}-zero{stage}-ep{expert}-tp{tensor}-world{world}"


def base(how):
    """With what it is compared: the same on one rank, neither compiled nor recomputed nor offloaded."""
    return (how if how in ("fp32", "measured", "captions") else "bf16", *ONE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    """Records by title of what the tests that are asked for need, and of the run that goes on."""
    asked = " ".join(item.name for item in request.session.items)
    needed = {one for case in CASES if title(*case) in asked for one in (case, base(case[0]))}
    if test_a_run_goes_on_as_if_it_had_not_ended.__name__ in asked:
        needed.add(SAVED)
    folder = tmp_path_factory.mktemp("nccl")
    write_text_encoder(folder / "encoder", "bert", ("a", "b"))
    latents = write_latents(folder / "latents", train=40, val=6, vae=write_vae(folder / "vae"))
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(
            dict(
                model=dict(name="DiT-MoE-Tiny/2-4E2A", router=dict(balance_alpha=0.05)),
                data=dict(manifest=latents, workers=0),
                train=dict(
                    steps=1000, global_batch=8, precision="bf16", validate_every=0, validate_samples=6, sample_every=0, tensorboard=False
                )
                | dict(optimizer=dict(lr=1e-3, grad_clip=0.2)),
                ema=dict(decays=[0.9]),
                checkpoint=dict(every=HALF),
                run_dir="unset",
            )
        )
    )

    def case(name, how, stage, expert, tensor, **begin):
        shape = [f"parallel.zero_stage={stage}", f"parallel.expert={expert}", f"parallel.tensor={tensor}", f"run_dir={folder / name}"]
        overrides = [override.format(folder=folder) for override in HOW[how]]
        return dict(name=name, recipe=str(folder / "recipe.yaml"), overrides=[*overrides, *shape], steps=STEPS) | begin

    results = {}
    for world in (1, 2, 4):
        cases = [case(title(*one), *one[:4]) for one in sorted(needed) if one[4] == world]
        if world == SAVED[4] and SAVED in needed:
            cases.append(case("goes on", *SAVED[:4], begin=str(folder / title(*SAVED) / "checkpoints" / f"step_{HALF:08d}")))
        if cases:
            results |= train_cases(world, cases, folder, gpu=True)[0]
    return {name: run["records"] for name, run in results.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: title(*case))
def test_ranks_train_as_one_gpu_does(runs, case):
    ours, alone = runs[title(*case)], runs[title(*base(case[0]))]
    assert len(ours) == len(alone) == STEPS and ("val_loss" in alone[-1]) == (case[0] == "measured")
    assert min(record["grad_norm"] for record in alone) > 0.2, "clipping was not active in every step"
    for mine, theirs in zip(ours, alone, strict=True):
        for key in ("loss", "balance_loss", "grad_norm", *({"val_loss"} & theirs.keys())):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4 if case[0] == "fp32" else 2e-2), (key, mine["step"])


def test_a_run_goes_on_as_if_it_had_not_ended(runs):
    for mine, theirs in zip(runs["goes on"], runs[title(*SAVED)][HALF:], strict=True):
        assert [mine[key] for key in ("step", "loss", "grad_norm")] == [theirs[key] for key in ("step", "loss", "grad_norm")]
