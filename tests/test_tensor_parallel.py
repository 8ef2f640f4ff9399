"""Tensor parallelism changes no number: the curve, norm and state of a run are those of one process, whatever else cuts the model."""

import math

import numpy as np
import pytest
import torch
import yaml
from latents import write_latents, write_vae
from models import random_weights
from PIL import Image
from processes import launch, metrics, state, train_cases

from ditmoe_ds.distributed.weights import write_weights
from ditmoe_ds.models.dit import DiTConfig
from ditmoe_ds.models.sizes import describe as size_of
from ditmoe_ds.models.sizes import named_config
from ditmoe_ds.slices import Cut, Slice

STEPS, HALF = 4, 2
TOKEN = ["model.name=DiT-MoE-Nano/2-4E2A", "model.router.balance_alpha=0.05", "model.router.z_alpha=0.001"]
VARIANTS = {
    "token": TOKEN,
    "normed": [*TOKEN, "model.qk_norm=true", "train.activation_checkpointing=true", "train.accumulation=2"],
    "expert": ["model.name=EC-DIT-Nano-4E", "data.manifest={folder}/texts", "model.router.input=decoupled"],
    "dense": ["model.name=DiT-Nano/2"],
    "deep": ["model.weights={folder}/weights"],
    "bf16": [*TOKEN, "train.precision=bf16"],
}
TOLERANCE = {"bf16": 1e-2}
BASE = (0, 1, 1, 1)
"""ZeRO stage, EP, TP, processes."""
CASES = [("token", 0, 2, 2, 4), ("token", 1, 2, 2, 4), ("token", 3, 2, 2, 4), ("normed", 2, 1, 2, 4), ("expert", 2, 2, 2, 4)]
MOVES = [((1, 2, 2, 4), (1, 2, 2, 4)), ((0, 2, 2, 4), (3, 4, 1, 4)), (BASE, (3, 2, 2, 4))]
"""Saved by the first shape, loaded by the second; always "token"."""
SLOW_CASES = [
    ("token", 2, 2, 2, 4),
    ("token", 1, 1, 4, 4),
    ("normed", 3, 1, 2, 4),
    ("expert", 0, 1, 2, 4),
    ("expert", 3, 2, 2, 4),
    ("dense", 1, 1, 4, 4),
    ("bf16", 0, 2, 2, 4),
    ("bf16", 3, 2, 2, 4),
]
SLOW_MOVES = [
    ((3, 2, 2, 4), (3, 2, 2, 4)),
    ((2, 2, 2, 4), (2, 2, 2, 4)),
    ((0, 2, 2, 4), (0, 2, 2, 4)),
    ((2, 2, 2, 4), (1, 1, 4, 4)),
    ((1, 1, 4, 4), (3, 1, 2, 4)),
]


def with_slow(quick, slow):
    return [*quick, *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


def title(stage, ep, tp, world):
    return f"zero{stage}-ep{ep}-tp{tp}-world{world}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tensor")


@pytest.fixture(scope="module")
def start(folder):
    """Train cases as so many processes; returns what each case recorded."""
    recipe = folder / "recipe.yaml"
    write_latents(folder / "texts", train=40, val=6, shape=(4, 4, 8), text=6)
    recipe.write_text(
        yaml.safe_dump(
            dict(
                model={},
                data=dict(manifest=write_latents(folder / "latents", train=40, val=6, shape=(4, 4, 4)), window=16, workers=0),
                train=dict(
                    steps=1000,
                    global_batch=8,
                    elastic=False,
                    precision="fp32",
                    optimizer=dict(lr=1e-3, weight_decay=0.01, grad_clip=0.2, warmup_steps=3),
                    validate_every=STEPS,
                    sample_every=0,
                    tensorboard=False,
                ),
                ema=dict(decays=[0.9]),
                checkpoint=dict(every=HALF),
                run_dir="unset",
            )
        )
    )

    def start(world, cases):
        return train_cases(world, [case | dict(recipe=str(recipe)) for case in cases], folder)[0]

    return start


def describe(folder, variant, stage, ep, tp, world, saved=None):
    """A case for ``shapes_worker``, maybe one that begins with what another shape saved."""
    name = f"{variant}-{title(stage, ep, tp, world)}"
    begin = None
    if saved:
        begin = str(folder / f"{variant}-{title(*saved)}" / "checkpoints" / f"step_{HALF:08d}")
        name += f"-from-{title(*saved)}"
    shape = [f"parallel.zero_stage={stage}", f"parallel.expert={ep}", f"parallel.tensor={tp}", f"run_dir={folder / name}"]
    overrides = [override.format(folder=folder) for override in VARIANTS[variant]]
    return dict(name=name, overrides=[*overrides, *shape], steps=STEPS, begin=begin)


@pytest.fixture(scope="module")
def quick_runs(folder, start):
    results = start(1, [describe(folder, variant, *BASE) for variant in ("token", "normed", "expert")])
    moves = [describe(folder, "token", *loaded, saved) for saved, loaded in MOVES]
    return results | start(4, [*(describe(folder, *case) for case in CASES), *moves])


@pytest.fixture(scope="module")
def all_runs(folder, start, quick_runs):
    results = quick_runs | start(1, [describe(folder, variant, *BASE) for variant in ("dense", "bf16")])
    moves = [describe(folder, "token", *loaded, saved) for saved, loaded in SLOW_MOVES]
    return results | start(4, [*(describe(folder, *case) for case in SLOW_CASES), *moves])


@pytest.fixture
def runs(request):
    return request.getfixturevalue("all_runs" if request.node.get_closest_marker("slow") else "quick_runs")


@pytest.mark.parametrize("variant,stage,ep,tp,world", with_slow(CASES, SLOW_CASES))
def test_same_curve(runs, variant, stage, ep, tp, world):
    ours, base = (runs[f"{variant}-{title(*shape)}"]["records"] for shape in ((stage, ep, tp, world), BASE))
    assert len(ours) == len(base) == STEPS
    for key in ("loss", "balance_loss", "z_loss", "grad_norm"):
        for mine, theirs in zip(ours, base, strict=True):
            assert mine[key] == pytest.approx(theirs[key], rel=TOLERANCE.get(variant, 1e-5)), (key, mine["step"])
    if variant != "bf16":
        assert ours[-1]["val_loss"] == pytest.approx(base[-1]["val_loss"], rel=1e-5)
        assert [r.get("router") for r in ours] == [r.get("router") for r in base]


@pytest.mark.parametrize("variant,stage,ep,tp,world", with_slow(CASES, SLOW_CASES))
def test_what_is_not_cut_stays_alike(runs, variant, stage, ep, tp, world):
    """Bit by bit, on all ranks of a tensor-parallel group; and of what is cut, each holds its part."""
    run = runs[f"{variant}-{title(stage, ep, tp, world)}"]
    assert run["alike"]
    if variant == "token":
        experts = size_of(named_config("DiT-MoE-Nano/2-4E2A"))["parts"]["routed_experts"]
        assert run["held"] == [experts // (world if stage else ep * tp)] * world


@pytest.mark.parametrize("saved,loaded", with_slow(MOVES, SLOW_MOVES))
def test_saved_and_loaded_run_is_the_straight_run(runs, folder, saved, loaded):
    """Loading changes no bit of weights, moments and averages, whoever holds them; then the run goes on as it would have."""
    there, here = folder / f"token-{title(*saved)}", folder / f"token-{title(*loaded)}-from-{title(*saved)}"
    before, found = state(there, HALF), state(here, HALF)
    assert before.keys() == found.keys() and len({kind for kind, _ in before}) == 4
    for key, value in before.items():
        assert torch.equal(found[key], value), key
    records, wanted = runs[here.name]["records"], runs[there.name]["records"][HALF:]
    for key in ("loss", "balance_loss", "grad_norm"):
        for mine, theirs in zip(records, wanted, strict=True):
            assert mine[key] == (theirs[key] if saved == loaded else pytest.approx(theirs[key], rel=1e-5)), (key, mine["step"])
    if saved == loaded:
        end, ours = state(there, STEPS), state(here, STEPS)
        for key, value in end.items():
            assert torch.equal(ours[key], value) and not torch.equal(before[key], value), key


def test_gradients_and_sums_of_any_layout(tmp_path):
    """Two ranks, with tensors that are not contiguous."""
    worker = """
import torch
from ditmoe_ds.distributed.topology import expert_group, join, leave as part
from ditmoe_ds.ending import end
world = join()
expert_group(1, tensor=2)
from ditmoe_ds.distributed.tensor_parallel import enter, leave
x = torch.arange(6.0).view(2, 3).requires_grad_()
table = torch.arange(6.0).view(3, 2) + 10 * world.rank
(enter(x).t() * table).sum().backward()
assert torch.equal(x.grad, (2 * torch.arange(6.0).view(3, 2) + 10).t()), x.grad
assert torch.equal(leave((torch.arange(6.0).view(3, 2) + world.rank).t()), (2 * torch.arange(6.0).view(3, 2) + 1).t())
part()
end(0)
"""
    launch(2, ["-c", worker])


@pytest.mark.slow
def test_pictures_and_distances_while_training(folder, start):
    """The ranks of a tensor-parallel group draw the same pictures together, and count once."""
    data = write_latents(folder / "pictured", train=40, val=8, shape=(4, 4, 4), vae=write_vae(folder / "vae"))
    found = []
    for world, tensor in ((1, 1), (2, 2)):
        run = folder / f"pictures-{tensor}"
        overrides = [f"data.manifest={data}", "model.name=DiT-MoE-Nano/2-4E2A", f"parallel.tensor={tensor}", f"run_dir={run}"]
        overrides += [
            "train.steps=2",
            "train.sample_every=2",
            "train.sample_images=5",
            "train.sample_steps=4",
            "train.fd_every=2",
            "train.fd_samples=8",
        ]
        launch(world, ["-m", "ditmoe_ds.train", folder / "recipe.yaml", *overrides])
        picture = torch.from_numpy(np.array(Image.open(run / "samples" / "step_00000002.png"))).float()
        found.append((picture, metrics(run)[-1]["fd"]))
    (picture, distance), (ours, our_distance) = found
    assert picture.std() > 1 and (picture - ours).abs().max() <= 1
    assert our_distance == pytest.approx(distance, rel=1e-3)


@pytest.mark.slow
def test_eight_processes_and_forty_layers(folder, start):
    """TP 2 x EP 2 x ZeRO-1: the depth of DiT-MoE-G, tiny widths. Trains as one process does, saves, and resumes exactly."""
    config = DiTConfig(hidden=32, depth=40, heads=4, input_size=4, num_classes=10, experts=4, qk_norm=True)
    write_weights(folder / "weights", random_weights(config)[1], "fp32")
    shape = (1, 2, 2, 8)
    base = start(1, [describe(folder, "deep", *BASE)])[f"deep-{title(*BASE)}"]["records"]
    runs = start(8, [describe(folder, "deep", *shape), describe(folder, "deep", *shape, shape)])
    straight = runs[f"deep-{title(*shape)}"]["records"]
    rest = runs[f"deep-{title(*shape)}-from-{title(*shape)}"]["records"]
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in straight] == pytest.approx([record[key] for record in base], rel=1e-5)
        assert [record[key] for record in rest] == [record[key] for record in straight[HALF:]]
    assert straight[-1]["loss"] != straight[HALF]["loss"]


@pytest.mark.parametrize("cut", [Cut(0, (8, 4, 4)), Cut(1, (6,)), Cut(2, (2, 8)), Cut(1, (4, 2))])
@pytest.mark.parametrize("part", [0, 1])
def test_a_slice_is_what_chunking_the_blocks_gives(monkeypatch, cut, part):
    monkeypatch.setattr("ditmoe_ds.slices.CHUNK", 7)
    shape = [16, 6, 10]
    whole = torch.arange(math.prod(shape)).view(shape).float()
    wanted = torch.cat([block.chunk(2, cut.dim)[part] for block in whole.split(cut.blocks, cut.dim)], cut.dim).flatten()
    piece = Slice(tuple(shape), cut, part, 2)
    for start, stop in ((0, len(wanted)), (3, 4), (5, 77), (100, len(wanted))):
        out = torch.empty(stop - start)
        piece.gather(start, out, lambda low, span: span.copy_(whole.flatten()[low : low + len(span)]))
        assert torch.equal(out, wanted[start:stop])
    for start, stop in ((0, whole.numel()), (1, 2), (13, 500), (959, 960)):
        out = torch.full((stop - start,), -1.0)
        piece.scatter(start, out, lambda low, span: span.copy_(wanted[low : low + len(span)]))
        inside = torch.isin(whole.flatten()[start:stop], wanted)
        assert torch.equal(out, whole.flatten()[start:stop].where(inside, -1))
