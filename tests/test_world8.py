"""The recipe of 16.5B parameters on 8 processes: its depth, experts, precision and mix of data, of tiny width."""

import pytest
from latents import write_latents
from processes import ROOT, train_cases

pytestmark = pytest.mark.slow

STEPS, SAVED, WIDTH = 4, 2, 32
SHAPES = {"EP 8 x ZeRO-3": (3, 8, 1), "EP 4 x ZeRO-2": (2, 4, 1), "TP 2 x EP 2 x ZeRO-1": (1, 2, 2)}
"""ZeRO stage, EP, TP."""
EXPERTS = 40 * 16 * 3 * 4 * WIDTH**2
"""Elements of all, SwiGLU of four times the width."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world8")
    real, made = (write_latents(folder / name, train=24, val=6, shape=(4, 4, 4)) for name in ("real", "made"))
    cases = []
    for name, (stage, ep, tp) in SHAPES.items():
        for begin in (None, str(folder / name / "checkpoints" / f"step_{SAVED:08d}")):
            run = name if begin is None else f"{name}, resumed"
            overrides = [
                f"data.manifest={real}",
                f"data.mix=[{{manifest: {made}, weight: 5}}]",
                "data.workers=0",
                f"run_dir={folder / run}",
            ]
            overrides += [f"parallel.zero_stage={stage}", f"parallel.expert={ep}", f"parallel.tensor={tp}"]
            overrides += ["train.global_batch=16", "train.optimizer.lr=1e-3"]
            overrides += ["train.sample_every=0", "train.validate_every=0", "train.tensorboard=false", f"checkpoint.every={SAVED}"]
            recipe = str(ROOT / "recipes" / "dit_moe_g2_16e2a_256.yaml")
            case = dict(name=run, recipe=recipe, overrides=overrides, steps=STEPS, width=WIDTH)
            cases.append(case if begin is None else case | dict(begin=begin))
    return train_cases(8, cases, folder)[0]


@pytest.mark.parametrize("name", SHAPES)
def test_trains_saves_and_resumes(runs, name):
    straight, resumed = runs[name], runs[f"{name}, resumed"]
    assert straight["held"] == resumed["held"] == [EXPERTS // 8] * 8
    assert len(straight["records"]) == STEPS and len(straight["records"][0]["router"]["cv"]) == 40
    assert straight["records"][-1]["loss"] < straight["records"][0]["loss"]
    for mine, theirs in zip(resumed["records"], straight["records"][SAVED:], strict=True):
        for key in ("step", "loss", "balance_loss", "grad_norm", "router"):
            assert mine[key] == theirs[key], (key, mine["step"])


def test_shapes_train_alike(runs):
    first, *others = (runs[name]["records"] for name in SHAPES)
    for records in others:
        for one, other in zip(first, records, strict=True):
            for key in ("loss", "grad_norm"):
                assert one[key] == pytest.approx(other[key], rel=1e-2), (key, one["step"])  # bf16
