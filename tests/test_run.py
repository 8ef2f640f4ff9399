"""Whole runs: exact resume in the same and in other shapes, EMA, run directory, sampling and analysis."""

import json
import os
import re
import shutil
import subprocess
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from latents import write_latents, write_vae
from PIL import Image
from processes import ROOT, launch, metrics, state, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ditmoe_ds import config, source
from ditmoe_ds.analysis.analyze import analyze
from ditmoe_ds.cli import main
from ditmoe_ds.diffusion.objectives import make_objective
from ditmoe_ds.distributed import checkpoint, tensorfile
from ditmoe_ds.distributed.tensorfile import TensorFile
from ditmoe_ds.errors import CheckpointError
from ditmoe_ds.latents.condition import Classes
from ditmoe_ds.latents.loader import LatentLoader
from ditmoe_ds.models.dit import DiT, DiTConfig
from ditmoe_ds.models.init import init_weights
from ditmoe_ds.pipelines.run import open_run
from ditmoe_ds.rng import keyed_generator
from ditmoe_ds.training import callbacks
from ditmoe_ds.training.callbacks import MetricsWriter, _flat
from ditmoe_ds.training.interruption import MARKER, mark
from ditmoe_ds.training.plan import ask, read_plan
from ditmoe_ds.training.recipe import Recipe, read_recipe
from ditmoe_ds.training.step import Preparation

STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def recipe(folder):
    """A run of 2 processes, ZeRO-3 and EP 2, with everything switched on."""
    path = folder / "recipe.yaml"
    latents = write_latents(folder / "latents", train=44, val=7, vae=write_vae(folder / "vae"))
    path.write_text(
        yaml.safe_dump(
            dict(
                model=dict(name="DiT-MoE-Nano/2-4E2A"),
                data=dict(manifest=latents, flip=True, workers=1),
                parallel=dict(zero_stage=3, expert=2),
                train=dict(
                    steps=STEPS,
                    global_batch=8,
                    accumulation=2,
                    precision="fp32",
                    optimizer=dict(lr=1e-3, beta1=0.8, beta2=0.95, eps=1e-5, weight_decay=0.1, grad_clip=0.5, warmup_steps=5),
                    validate_every=4,
                    validate_samples=7,
                    sample_every=4,
                    sample_images=5,
                    sample_steps=4,
                    log_every=2,
                    deterministic=True,
                ),
                ema=dict(decays=[0.9, 0.5]),
                checkpoint=dict(every=1, keep=STEPS + 1),
                run_dir=str(folder / "straight"),
            )
        )
    )
    return path


@pytest.fixture(scope="module")
def straight(folder, recipe):
    output = train(recipe, 2)[0][1]
    return folder / "straight", output


def copy_to(straight, folder, name, step):
    """The straight run as it stood after ``step``: what a kill right after that checkpoint leaves."""
    run = folder / name
    shutil.copytree(straight, run)
    for path in (run / "checkpoints").glob("step_*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    (run / "checkpoints" / "latest").write_text(f"step_{step:08d}")
    return run


def test_a_start_compiles_nothing(folder, recipe, monkeypatch):
    """DeepSpeed would its all-reduce for CPUs, of which 69 MB a rank stay in /dev/shm for ever."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))
    train(recipe, 1, "parallel.expert=1", "train.steps=1", f"run_dir={folder / 'started'}")
    assert not (folder / "extensions").exists()


def test_the_run_directory_describes_itself(straight, recipe):
    run, output = straight
    assert config.load(Recipe, run / "config.yaml") == config.load(Recipe, recipe)
    environment = json.loads((run / "env.json").read_text())
    assert environment["processes"] == 2
    assert environment["code"] == checkpoint.Reader(run / "checkpoints" / f"step_{STEPS:08d}").index["code"]
    assert environment["code"].keys() == {"ditmoe_ds", "commit", "started"}
    assert datetime.fromisoformat(environment["code"]["started"]).utcoffset() == timedelta(0)
    records = metrics(run)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    for record in records:
        assert {"loss", "balance_loss", "grad_norm", "lr", "images_per_s"} <= set(record)
        assert all(len(record["router"][key]) == 2 for key in ("cv", "dead", "entropy", "max_over_mean"))
        assert record["balance_loss"] >= 2 * 0.005 * 0.99
        assert record["epoch"] == record["step"] * 8 / 44
    assert [r["lr"] for r in records] == pytest.approx([1e-3 * min(1, i / 6) for i in range(1, STEPS + 1)])
    assert [len(r["val_loss_at_t"]) for r in records if "val_loss" in r] == [8, 8]
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    found = {(event.step, tag): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    shown = [record for record in records if record["step"] % 2 == 0]  # train.log_every
    written = {(record["step"], tag): value for record in shown for tag, value in _flat(record).items()}
    assert found == pytest.approx(written)  # to the last value of the last step
    assert Image.open(run / "samples" / "step_00000008.png").size == (5 * 32 + 4 * 2, 32)
    lines = [line for line in output.splitlines() if line.startswith("step ")]
    assert lines[0].startswith("step 1/8") and lines[-1].endswith("img/s  0:00:00 left")


def test_what_is_left_is_told_in_days(monkeypatch, capsys):
    settings = SimpleNamespace(train=SimpleNamespace(steps=7_000_000, log_every=50))
    trainer = SimpleNamespace(step=1_000, plan=SimpleNamespace(recipe=settings))
    monkeypatch.setattr(callbacks.dist, "get_rank", lambda: 0)
    progress = callbacks.Progress(0)
    progress.start -= 250
    progress(trainer, dict(loss=1.0, grad_norm=1.0, images_per_s=1.0))
    assert re.search(r"  20 days, 6:0\d:\d\d left$", capsys.readouterr().out)


@pytest.mark.parametrize(
    "world, overrides, exact",
    [
        (2, [], True),
        # as many passes as before, on which the balance loss depends
        pytest.param(1, ["parallel.zero_stage=1", "parallel.expert=1", "train.elastic=false"], False, marks=pytest.mark.slow),
    ],
)
def test_resumed_run_is_the_straight_run(straight, folder, recipe, world, overrides, exact):
    """From the command line; test_shapes.py has every shape."""
    run = copy_to(straight[0], folder, f"resumed-{world}-{len(overrides)}-{exact}-{'-'.join(overrides)}".replace("=", ""), 3)
    index = run / "checkpoints" / "step_00000003" / "index.json"
    saved = json.loads(index.read_text())
    index.write_text(json.dumps(saved | dict(code=saved["code"] | dict(commit="abc"))))
    output = train(recipe, world, f"run_dir={run}", *overrides)[0][1]
    assert "resumed at step 3" in output
    changed = [f"run_dir: {straight[0]} -> {run}"]
    if overrides:
        changed = ["parallel.expert: 2 -> 1", "parallel.zero_stage: 3 -> 1", *changed, "train.elastic: True -> False"]
    code = f"code.commit: abc -> {source.source()['commit']}"
    assert f"\nchanged since then: {', '.join([code, *changed])}\n" in output
    wanted, ours = metrics(straight[0]), metrics(run)
    assert [r["step"] for r in ours] == list(range(1, STEPS + 1))
    tolerance = 0 if exact else 1e-5
    for a, b in zip(ours, wanted):
        for key in ("loss", "grad_norm", "balance_loss"):
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=0), (a["step"], key)
    assert ours[-1]["val_loss"] == pytest.approx(wanted[-1]["val_loss"], rel=tolerance, abs=0)
    theirs = state(straight[0], STEPS)
    for key, value in state(run, STEPS).items():
        if exact:
            assert torch.equal(value, theirs[key]), key
        else:
            assert (value - theirs[key]).norm() <= 1e-3 * theirs[key].norm(), key


@pytest.mark.slow
def test_bf16_resumes_exactly(folder, recipe):
    overrides = ["train.precision=bf16", "train.sample_every=0", f"run_dir={folder / 'bf16'}"]
    train(recipe, 2, *overrides)
    run = copy_to(folder / "bf16", folder, "bf16-resumed", 3)
    train(recipe, 2, *overrides[:2], f"run_dir={run}")
    wanted = state(folder / "bf16", STEPS)
    assert all(torch.equal(value, wanted[key]) for key, value in state(run, STEPS).items())


@pytest.mark.slow
def test_steps_may_be_raised(straight, folder, recipe):
    run = copy_to(straight[0], folder, "longer", STEPS)
    train(recipe, 2, f"run_dir={run}", "train.steps=10", "checkpoint.keep=2", "checkpoint.keep_every=4", "ema.decays=[0.9, 0.5, 0.99]")
    assert [r["step"] for r in metrics(run)] == list(range(1, 11))
    kept = [f"step_{step:08d}" for step in (4, 8, 9, 10)]
    assert sorted(p.name for p in (run / "checkpoints").glob("step_*")) == kept
    before, after = state(run, 8), state(run, 9)
    for name in (name for kind, name in before if kind == "master"):  # the new average began at the weights of step 8
        warm = 9 / 18
        torch.testing.assert_close(after["ema_0.99", name], warm * before["master", name] + (1 - warm) * after["master", name])
    assert len(metrics(run)) == 10


def test_a_run_that_is_done_says_so_and_keeps_its_averages(straight, folder, recipe):
    run = copy_to(straight[0], folder, "done", STEPS)
    mark(run, STEPS)
    before = {name: (run / name).read_bytes() for name in ("config.yaml", "env.json", "metrics.jsonl")}
    output = train(recipe, 2, f"run_dir={run}", "ema.decays=[0.9, 0.5, 0.99]")[0][1]
    assert before == {name: (run / name).read_bytes() for name in before} and not (run / MARKER).exists()
    assert f"resumed at step {STEPS}" in output and "ema_0.99 begins here" in output
    assert f"train.steps={STEPS}: nothing is left to do after step {STEPS}" in output and len(metrics(run)) == STEPS
    (code, output), _ = train(recipe, 2, f"run_dir={run}", "ema.decays=[0.9]", check=False)
    assert code == 2 and "error: ema.decays=[0.9]: the checkpoint's ema_0.5 would be lost" in output


@pytest.mark.parametrize("decay", [0.9, 0.5])
def test_ema_is_the_average_of_the_weights(straight, decay):
    index = checkpoint.Reader(straight[0] / "checkpoints" / f"step_{STEPS:08d}").index
    model = DiT(config.build(DiTConfig, index["model"]))
    init_weights(model, seed=0)
    average = {name: parameter.detach().flatten().double() for name, parameter in model.named_parameters()}
    for step in range(1, STEPS + 1):
        saved = state(straight[0], step)
        now = min(decay, step / (9 + step))
        average = {name: now * value + (1 - now) * saved["master", name].double() for name, value in average.items()}
    for name, value in average.items():
        torch.testing.assert_close(saved[f"ema_{decay}", name].double(), value, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(saved[f"ema_{decay}", name], saved["master", name]) for name in average)


def test_each_step_is_adamws_by_the_recipe(straight, recipe):
    """What the gradient was, its moving average tells."""
    its = config.load(Recipe, recipe).train.optimizer
    model = DiT(config.build(DiTConfig, checkpoint.Reader(straight[0] / "checkpoints" / "step_00000001").index["model"]))
    init_weights(model, seed=0)
    before = {("master", name): parameter.detach().flatten() for name, parameter in model.named_parameters()}
    before |= {(kind, name): torch.zeros_like(before["master", name]) for kind in ("exp_avg", "exp_avg_sq") for _, name in [*before]}
    for record in metrics(straight[0]):
        step, after, squares = record["step"], state(straight[0], record["step"]), 0.0
        for name, _ in model.named_parameters():
            mean, square, master = (after[kind, name].double() for kind in ("exp_avg", "exp_avg_sq", "master"))
            gradient = (mean - its.beta1 * before["exp_avg", name]) / (1 - its.beta1)
            squares += gradient.square().sum()
            wanted = its.beta2 * before["exp_avg_sq", name] + (1 - its.beta2) * gradient.square()
            torch.testing.assert_close(square, wanted, rtol=1e-3, atol=1e-12)
            move = mean / (1 - its.beta1**step) / ((square / (1 - its.beta2**step)).sqrt() + its.eps)
            wanted = before["master", name] * (1 - record["lr"] * its.weight_decay) - record["lr"] * move
            torch.testing.assert_close(master, wanted, rtol=1e-6, atol=1e-7)
        assert squares.sqrt() == pytest.approx(min(record["grad_norm"], its.grad_clip), rel=1e-3)
        before = after
    assert max(record["grad_norm"] for record in metrics(straight[0])) > its.grad_clip


def test_the_first_step_is_of_what_the_recipe_draws(straight, recipe):
    """A new model predicts 0, so that its loss is the target's square. Later the row of no class is learned, too."""
    plan = read_plan([str(recipe), f"run_dir={straight[0]}-unused"], 2)
    told = plan.recipe
    prepare = Preparation(0, make_objective(told.diffusion), Classes(10), told.diffusion.condition_dropout, told.data.flip, 0.0, 2)
    shared = dict(seed=0, global_batch=8, accumulation=1, rank=0, world=1, prepare=prepare)
    loader = LatentLoader(told.data.open(plan.manifests, "train"), told.data, **shared)
    batch = next(loader)
    loader.close()
    assert metrics(straight[0])[0]["loss"] == pytest.approx((batch.noise - batch.latents).square().mean().item(), rel=1e-5)
    assert state(straight[0], STEPS)["exp_avg", "y_embed.table.weight"].view(11, -1)[10].any()


def test_validation_is_by_the_average_at_fixed_times(straight, recipe):
    plan, run = read_plan([str(recipe), f"run_dir={straight[0]}-unused"], 2), open_run(straight[0])
    heldout, objective = plan.open_heldout(), make_objective(run.diffusion)
    x0, labels, _, samples, *_ = heldout.batch(heldout.spread(7))
    for k, loss in enumerate(metrics(straight[0])[-1]["val_loss_at_t"]):
        noise = torch.stack([torch.randn(x0.shape[1:], generator=keyed_generator("validation", i, k)) for i in samples.tolist()])
        with torch.no_grad():
            ours = objective.loss(lambda z, s: run.model(z, s, y=labels), x0, torch.full((7,), (k + 0.5) / 8), noise)
        assert loss == pytest.approx(ours.mean().item(), rel=1e-5)


def test_a_sample_grid_is_what_is_sampled(straight):
    picture = np.array(Image.open(straight[0] / "samples" / f"step_{STEPS:08d}.png")).astype(int)
    for i, image in enumerate(open_run(straight[0]).sample([0, 1, 2, 3, 4], steps=4, guidance=2.0).numpy()):
        assert np.abs(picture[:, 34 * i : 34 * i + 32] - image).max() <= 1


def test_another_model_is_refused(straight, folder, recipe):
    both = train(recipe, 2, f"run_dir={straight[0]}", "model.name=DiT-MoE-Nano/2-8E2A", "train.steps=20", check=False)
    assert all(code == 2 and "Traceback" not in output for code, output in both)
    assert "another model: model.experts: 4 -> 8; choose" in both[0][1]


def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_taken(straight, folder, capsys):
    run = copy_to(straight[0], folder, "damaged", 3)
    steps = [run / "checkpoints" / f"step_{step:08d}" for step in (3, 2, 1)]
    file = steps[0] / "rank_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert open_run(run).step == 2
    assert str(file) in capsys.readouterr().err
    (steps[1] / "index.json").write_text("{")
    assert open_run(run).step == 1
    assert capsys.readouterr().err.count("taking the one before") == 2
    (steps[2] / "rank_00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none of its 3 checkpoints .* or remove the folder, and the run begins anew"):
        open_run(run)
    assert "there is none before it" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        open_run(folder)


def test_checkpoints_are_found_without_the_file_that_names_the_last(straight, folder, capsys):
    """As where they alone were copied: a run that began anew there would delete them."""
    run = copy_to(straight[0], folder, "nameless", 3)
    (run / "checkpoints" / "latest").unlink()
    assert open_run(run).step == 3
    steps = sorted((run / "checkpoints").iterdir())
    for path in steps:
        (path / "index.json").write_text("{")
    with pytest.raises(CheckpointError, match="none of its 3 checkpoints up to step_00000003 is whole"):
        open_run(run)
    assert checkpoint.newest(folder / "nowhere") is None


def test_a_file_server_is_asked_little(straight, recipe, tmp_path, monkeypatch):
    """A rank looks for its share of the shards and for no file of what it starts from, since rank 0 has, and opens once what it reads."""
    arguments, looked, opened = [str(recipe), "model.name=null", f"model.weights={straight[0]}", f"run_dir={tmp_path}/run"], [], []
    asked = ask(read_recipe(arguments))
    start = asked.start
    assert start.name == f"step_{STEPS:08d}"
    real, really = os.stat, open

    def look(path, **options):
        looked.append(os.path.basename(path) if isinstance(path, str | Path) else path)
        return real(path, **options)

    def note(path, *mode, **options):
        opened.append(path.name)
        return really(path, *mode, **options)

    monkeypatch.setattr(os, "stat", look)
    monkeypatch.setattr(tensorfile, "open", note, raising=False)
    plan = read_plan(arguments, 2, asked, slice(1, None, 2))
    shards = [shard.name for shard in plan.manifest.shards()]
    assert len(shards) == 2 and [name for name in looked if name in shards] == shards[1:]
    reader = checkpoint.Reader(start)
    files = set(reader.index["files"])
    assert len(files) == 2 and not files & set(looked)
    pieces = [(name, first, count) for name, held in reader.index["pieces"].items() for first, count, rank in held if rank == 1]
    for name, first, count in pieces:
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            reader.read(kind, name, first, torch.empty(count))
    assert opened == ["rank_00001.safetensors"] * 2 and len(pieces) > 10  # for the header, and for all ranges
    held = reader.last._file
    reader.close()
    assert held.closed


def test_every_element_is_saved_once(straight):
    step = straight[0] / "checkpoints" / f"step_{STEPS:08d}"
    reader = checkpoint.Reader(step)
    kinds = {"master", "exp_avg", "exp_avg_sq", "ema_0.9", "ema_0.5"}
    files = {rank: TensorFile(step / f"rank_{rank:05d}.safetensors") for rank in (0, 1)}
    for name, shape in reader.index["shapes"].items():
        ranges = sorted((start, start + count) for start, count, _ in reader.index["pieces"][name])
        assert ranges[0][0] == 0 and ranges[-1][1] == torch.Size(shape).numel()
        assert all(a[1] == b[0] for a, b in pairwise(ranges)), name
        for start, count, rank in reader.index["pieces"][name]:
            assert all(files[rank].shapes[f"{kind}/{name}@{start}"] == (count,) for kind in kinds)
    assert sum(len(file.shapes) for file in files.values()) == len(kinds) * sum(map(len, reader.index["pieces"].values()))
    experts = [shape for name, shape in reader.index["shapes"].items() if "deepspeed_experts" in name]
    assert len(experts) == 4 and all(shape[0] == 4 for shape in experts)


def test_forced_balance(folder, recipe):
    overrides = ["model.router.force_balance=true", "train.steps=2", "train.validate_every=0", "train.sample_every=0"]
    outputs = [output for _, output in train(recipe, 2, *overrides, f"run_dir={folder / 'forced'}")]
    assert ["is for measuring, not for training\n" in output for output in outputs] == [True, False]
    for record in metrics(folder / "forced"):
        assert record["router"]["max_over_mean"] == [1.0, 1.0] and record["router"]["dead"] == [0, 0]


def test_other_data_is_refused(straight, folder, recipe):
    other = write_latents(folder / "other", train=45, val=7, vae=folder / "vae")
    overrides = [f"run_dir={straight[0]}", f"data.manifest={other}", "train.steps=20", "parallel.expert=1"]
    [(code, output)] = train(recipe, 1, *overrides, check=False)
    assert code == 2 and "Traceback" not in output and "not the data that run_dir" in output


def test_sample_and_analyze(straight, folder, capsys):
    run = str(straight[0])
    grid = folder / "grid.png"
    assert main(["sample", run, "--classes", "0,3", "--per-class", "3", "--steps", "2", "--out", str(grid)]) == 0
    assert Image.open(grid).size == (3 * 32 + 2 * 2, 2 * 32 + 2)
    opened = open_run(run)
    together = opened.sample([1, 2, 3], steps=2, guidance=2.0)
    alone = opened.sample([3], steps=2, guidance=2.0, first=2)
    assert (together[2].int() - alone[0].int()).abs().max() <= 1
    assert not torch.equal(opened.model.x_embed.weight, open_run(run, "master").model.x_embed.weight)

    files = analyze(opened, Path(run), folder / "analysis", samples=7, times=4)
    numbers = json.loads(files["routing.json"].read_text())
    shares = {axis: torch.from_numpy(np.array(share, dtype=float)) for axis, share in numbers["share"].items()}  # None: unseen
    assert shares["timestep"].shape == (2, 4, 4) and shares["position"].shape == (2, 16, 4) and shares["class"].shape == (2, 10, 4)
    for axis in ("timestep", "position"):
        torch.testing.assert_close(shares[axis].sum(-1), torch.ones(shares[axis].shape[:2], dtype=torch.float64))
    assert 3 <= shares["class"].isnan()[0, :, 0].sum() < 10  # 7 samples of 10 classes
    assert numbers["information"]["position"]["p"][-1] < 0.05
    assert len(numbers["training"]["router"]["max_over_mean"]) == 2
    assert all(Image.open(files[axis]).width > 100 for axis in ("timestep", "position", "class", "loss"))

    capsys.readouterr()
    for arguments, word in ((["--classes", "12"], "0..9"), (["--classes", "a"], "commas"), (["--sampler", "ddim"], "euler")):
        assert main(["sample", run, *arguments]) == 2
        error = capsys.readouterr().err
        assert word in error and error.count("\n") == 1


def test_one_rank_says_which_checkpoint_all_sample_from(straight, folder):
    """A run that goes on may have a newer one a moment later."""
    worker = """
import os, sys
from ditmoe_ds.cli import main
from ditmoe_ds.distributed import checkpoint
from ditmoe_ds.ending import end
if os.environ["RANK"] == "1":
    checkpoint.newest = lambda folder: sys.exit("looked for itself")
end(main(sys.argv[1:]))
"""
    launch(2, ["-c", worker, "sample", straight[0], "--num", 2, "--steps", 1, "--out", folder / "sampled"])
    said = json.loads((folder / "sampled" / "samples.json").read_text())
    assert said["checkpoint"] == str(straight[0] / "checkpoints" / f"step_{STEPS:08d}")


def test_ddpm_and_the_dense_model_train_in_one_process(folder, recipe):
    """``ditmoe train`` without any launcher; the other objective and the dense model run through the same loop."""
    overrides = ["train.steps=2", "train.sample_every=2", "checkpoint.every=2", "parallel.expert=1", "diffusion.objective=ddpm"]
    alone = f"""
import os
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    del os.environ[name]
from ditmoe_ds.cli import main
from ditmoe_ds.ending import end
end(main(["train", "{recipe}", "model.name=DiT-Nano/2", "run_dir={folder / "dense"}", *{overrides}]))
"""
    launch(1, ["-c", alone])
    records = metrics(folder / "dense")
    assert len(records) == 2 and "router" not in records[0] and records[0]["balance_loss"] == 0
    assert main(["sample", str(folder / "dense"), "--steps", "2", "--sampler", "ddpm", "--out", str(folder / "ddpm.png")]) == 0
    with pytest.raises(CheckpointError, match="dense"):
        analyze(open_run(folder / "dense"), folder / "dense", folder / "none")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_offload_trains_as_without_and_resumes_exactly(straight, folder, recipe, stage):
    """Slow: DeepSpeed compiles its CPU Adam. Resumed at step 5, whose powers of beta do not round as products of the first ones."""
    settings = json.loads((ROOT / "ds_configs" / "zero3_offload.json").read_text())
    if stage == 2:
        settings["zero_optimization"] = dict(stage=2, offload_optimizer=dict(device="cpu"))
    (folder / f"offload{stage}.json").write_text(json.dumps(settings))
    overrides = [f"parallel.zero_stage={stage}", f"parallel.deepspeed={folder / f'offload{stage}.json'}", "train.sample_every=0"]
    train(recipe, 2, f"run_dir={folder / f'offload{stage}'}", *overrides, timeout=900)
    for ours, theirs in zip(metrics(folder / f"offload{stage}"), metrics(straight[0]), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    run = copy_to(folder / f"offload{stage}", folder, f"offload{stage}-resumed", 5)
    train(recipe, 2, f"run_dir={run}", *overrides, timeout=900)
    wanted = state(folder / f"offload{stage}", STEPS)
    assert all(torch.equal(value, wanted[key]) for key, value in state(run, STEPS).items())


def test_rmsprop_begins_at_rest(folder, recipe):
    """DeepSpeed steps it once before the weights are there, which decays what was in the memory."""
    found = []
    for stage in (0, 2):
        run = folder / f"rmsprop{stage}"
        overrides = ["train.optimizer.name=rmsprop", "train.optimizer.weight_decay=0.01", "train.precision=bf16", "train.steps=3"]
        overrides += ["train.validate_every=0", "train.sample_every=0", f"parallel.zero_stage={stage}", "parallel.expert=1"]
        train(recipe, 1, f"run_dir={run}", *overrides)
        found.append([record["loss"] for record in metrics(run)])
    assert found[0] == pytest.approx(found[1], rel=1e-2)


def test_a_run_that_begins_anew_keeps_the_metrics_of_before(tmp_path, capsys):
    """Its checkpoints are gone, or it was killed before the first."""
    plan, file = SimpleNamespace(recipe=SimpleNamespace(train=SimpleNamespace(tensorboard=False, wandb=False))), tmp_path / "metrics.jsonl"
    (tmp_path / "metrics.jsonl.9").write_text("older")
    for kept in ("metrics.jsonl.10", "metrics.jsonl.11"):
        file.write_text('{"step": 1}\n{"st')
        MetricsWriter(plan, tmp_path, 0)
        assert not file.exists() and (tmp_path / kept).read_text() == '{"step": 1}\n{"st'
        said = f"{tmp_path} has no checkpoint: training begins at step 1; the metrics of before are in {kept}\n"
        assert capsys.readouterr().out == said
    MetricsWriter(plan, tmp_path, 0)
    assert not capsys.readouterr().out and (tmp_path / "metrics.jsonl.9").read_text() == "older"


def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path, monkeypatch):
    """Not that of a checkout in which it is installed."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(source, "ROOT", tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", source.source()["commit"])
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(source, "ROOT", tmp_path / "site-packages")
    assert source.source()["commit"] is None
    monkeypatch.setattr(source, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", "")
    assert source.source()["commit"] is None


def test_the_deepspeed_configs_are_json_for_their_stage():
    for path in (ROOT / "ds_configs").glob("*.json"):
        assert f"zero{json.loads(path.read_text())['zero_optimization']['stage']}" in path.name
