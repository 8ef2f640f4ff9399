"""What must not lose a run: kills at any moment of a save, a full disk, gradients that are not finite; and what it may start from."""

import hashlib
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from latents import write_latents
from models import DENSE, SPARSE, random_weights
from processes import ROOT, launch, losses, metrics, state, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ditmoe_ds.cli import main
from ditmoe_ds.distributed import checkpoint
from ditmoe_ds.distributed.shards import Shard
from ditmoe_ds.distributed.topology import AgreedError
from ditmoe_ds.distributed.weights import open_weights, write_weights
from ditmoe_ds.errors import CheckpointError, ConfigError
from ditmoe_ds.training.callbacks import MetricsWriter
from ditmoe_ds.training.lock import check_shared, claim
from ditmoe_ds.training.plan import CLASS_TABLE, read_plan
from ditmoe_ds.training.resume import check_same_run
from ditmoe_ds.training.trainer import Trainer

STEPS = 12
POISON = "import sys; from poison import main; from ditmoe_ds.ending import end; end(main(sys.argv[1], sys.argv[2:]))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("safety")


@pytest.fixture(scope="module")
def recipe(folder):
    path = folder / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            dict(
                model=dict(name="DiT-MoE-Nano/2-4E2A"),
                data=dict(manifest=write_latents(folder / "latents", train=40, val=6, shape=(4, 4, 4)), workers=0),
                parallel=dict(zero_stage=3, expert=2),
                train=dict(steps=STEPS, global_batch=8, precision="fp32", validate_every=0, sample_every=0, tensorboard=False, log_every=1),
                checkpoint=dict(every=1, keep=2),
                run_dir=str(folder / "straight"),
            )
        )
    )
    return path


@pytest.fixture(scope="module")
def straight(folder, recipe):
    train(recipe, 2)
    return folder / "straight"


@pytest.mark.parametrize(
    "kills, steps, asynchronous",
    [(3, STEPS, "true"), pytest.param(20, 100, "true", marks=pytest.mark.slow), pytest.param(20, 100, "false", marks=pytest.mark.slow)],
)
def test_a_rank_killed_during_a_save(kills, steps, asynchronous, straight, folder, recipe):
    """Saves follow each other without pause (one a step), so a kill at a random moment falls into one or between two."""
    if steps != STEPS:
        straight = folder / f"straight-{steps}"
        train(recipe, 2, f"run_dir={straight}", f"train.steps={steps}")
    run = folder / f"killed-{asynchronous}-{kills}"
    chance = random.Random(kills)
    arguments = [recipe, f"run_dir={run}", f"train.steps={steps}", f"checkpoint.asynchronous={asynchronous}"]
    for kill in range(kills):
        # further each time, so that no run ends before its kill
        seen = kill * (steps - 2) // kills
        code = "import sys; from kill import main; from ditmoe_ds.ending import end; end(main(sys.argv[1:]))"
        wait = [str(chance.randrange(2)), str(seen), str(chance.uniform(0, 0.15))]
        results = launch(2, ["-c", code, *wait, *arguments], check=False)
        assert -signal.SIGKILL in [code for code, _ in results], results[0][1][-2000:]
    results = train(*arguments[:1], 2, *arguments[1:])
    assert "resumed at step" in results[0][1]
    assert losses(run) == losses(straight)
    assert not list((run / "checkpoints").glob("*.partial"))
    assert checkpoint.newest(run / "checkpoints").name == f"step_{steps:08d}"
    ours = state(run, steps)
    for key, value in state(straight, steps).items():
        assert torch.equal(ours[key], value), key


UNREADABLE = """
import os, sys
from ditmoe_ds.ending import end
from ditmoe_ds.errors import DataError
from ditmoe_ds.latents.loader import LatentDataset
from ditmoe_ds.train import main

read, seen = LatentDataset.__getitem__, []

def unreadable(self, i):
    seen.append(i)
    if len(seen) > 4 * 3 and os.environ["RANK"] == "1":
        raise DataError("train-000001.tar: damaged")
    return read(self, i)

LatentDataset.__getitem__ = unreadable
end(main(sys.argv[1:]))
"""


def test_a_sample_that_a_rank_cannot_read_loses_no_step(folder, recipe):
    results = launch(2, ["-c", UNREADABLE, recipe, f"run_dir={folder / 'unreadable'}", "checkpoint.every=1000"], check=False)
    assert [code for code, _ in results] == [2, 2]
    assert "error: train-000001.tar: damaged (only rank 1 on " in results[0][1]
    assert (folder / "unreadable" / "checkpoints" / "latest").read_text() == "step_00000003"
    assert not (folder / "unreadable" / "interrupted.json").exists()


OTHERWISE = """
import os, sys
from ditmoe_ds.ending import end
from ditmoe_ds.train import main

end(main(sys.argv[1:] + ["train.seed=9"] * (os.environ["RANK"] == "1")))
"""


def test_ranks_that_would_train_different_things(folder, recipe):
    results = launch(2, ["-c", OTHERWISE, recipe, f"run_dir={folder / 'otherwise'}"], check=False)
    assert [code for code, _ in results] == [2, 2] and not (folder / "otherwise").exists()
    assert "error: not what rank 0 trains: recipe.train.seed: 0 -> 9; give all nodes the same" in results[0][1]
    assert "(only rank 1 on " in results[0][1]


OLDER = """
import os, sys
from ditmoe_ds.ending import end
from ditmoe_ds.train import main
from ditmoe_ds.training import plan

if os.environ["RANK"] == "1":
    newest = plan.open_located
    plan.open_located = lambda folder: newest(folder.with_name("step_00000011"))
end(main(sys.argv[1:]))
"""


def test_ranks_with_copies_of_other_starting_weights(straight, folder, recipe):
    run = folder / "copies"
    results = launch(2, ["-c", OLDER, recipe, f"run_dir={run}", f"model.weights={straight}", "model.name=null"], check=False)
    assert [code for code, _ in results] == [2, 2] and not run.exists()
    assert "error: not what rank 0 trains: weights.step: 12 -> 11; give all nodes the same" in results[0][1]


def test_a_run_directory_that_the_nodes_do_not_share(tmp_path):
    lock = claim(tmp_path / "one")
    check_shared(tmp_path / "one", patience=0)
    with pytest.raises(ConfigError, match="two': is not the directory that rank 0 sees there"):
        check_shared(tmp_path / "two", patience=0)
    lock.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_full_at_the_start(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", tmp_path], check=True)
    try:
        with suppress(OSError):
            (tmp_path / "full").write_text("x" * 9000)
        lock = claim(tmp_path)  # which would raise that error
        assert lock.tell() == 0 and not (tmp_path / "lock").read_bytes()
        lock.close()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_a_full_disk(on_failure, folder, recipe):
    """The last good checkpoint stands; the run goes on or stops, as configured."""
    disk = folder / f"disk-{on_failure}"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", disk], check=True)  # one checkpoint of 5.6 MB fits, not two
    try:
        # with a loader's process, which ignores SIGTERM: the end must not wait for it
        overrides = [
            "data.workers=1",
            f"run_dir={disk / 'run'}",
            f"checkpoint.on_failure={on_failure}",
            "checkpoint.every=3",
            "train.steps=8",
        ]
        results = train(recipe, 2, *overrides, check=False)
        output = results[0][1]
        assert "checkpoint of step 6 was not written" in output and "No space left on device" in output
        assert [code for code, _ in results] == [2, 2], output
        assert ("its last checkpoint could not be written" in output) == (on_failure == "continue")
        assert len(losses(disk / "run")) == (8 if on_failure == "continue" else 6)
        assert "Traceback" not in output + results[1][1]
        assert checkpoint.newest(disk / "run" / "checkpoints").name == "step_00000003"
        assert not list((disk / "run" / "checkpoints").glob("*.partial"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_log_that_cannot_be_written_stops_no_run(folder, recipe):
    """Its disk may be another than the run's; and whoever read it may have gone."""
    run = folder / "unread"
    command = [sys.executable, "-m", "ditmoe_ds.train", recipe, f"run_dir={run}", "parallel.expert=1", "train.steps=2"]
    with open("/dev/full", "w") as full:
        environment = os.environ | dict(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1")
        assert subprocess.run(command, cwd=ROOT, env=environment, stdout=full, stderr=full, timeout=600).returncode == 0
    assert checkpoint.newest(run / "checkpoints").name == "step_00000002"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's, which ends by it
@pytest.mark.parametrize("room, steps, files", [(5, [1, 2, 5], 1), (30, [1, 2, 3, 4, 5], 3)])
def test_metrics_that_cannot_be_written_are_left_out(room, steps, files, tmp_path, capsys):
    """Whole lines: what is written later does not begin in the midst of one. With room for a line alone TensorBoard goes without, and on a
    disk that is full for days it does not leave a file a step."""
    settings = SimpleNamespace(tensorboard=True, wandb=False, log_every=1, steps=9)
    trainer = SimpleNamespace(plan=SimpleNamespace(recipe=SimpleNamespace(train=settings)), step=0)
    writer, limits = MetricsWriter(trainer.plan, tmp_path, 0), resource.getrlimit(resource.RLIMIT_FSIZE)
    for trainer.step in range(1, 6):
        if trainer.step in (3, 4):  # as a disk with room for a part of it
            resource.setrlimit(resource.RLIMIT_FSIZE, (writer.file.stat().st_size + room, limits[1]))
        try:
            writer(trainer, dict(step=trainer.step, loss=1.0))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [json.loads(line)["step"] for line in writer.file.read_text().splitlines()] == steps
    assert [event.step for event in EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")] == [1, 2, 5]
    assert len(list((tmp_path / "tensorboard").iterdir())) == files
    assert capsys.readouterr().out.count("metrics cannot be written") == 1


def test_tensorboard_opens_its_file_once_a_step(tmp_path, monkeypatch):
    """On a shared file system the whole run waits for each time."""
    settings = SimpleNamespace(tensorboard=True, wandb=False, log_every=1, steps=9)
    trainer = SimpleNamespace(plan=SimpleNamespace(recipe=SimpleNamespace(train=settings)), step=1)
    writer = MetricsWriter(trainer.plan, tmp_path, 0)
    writer(trainer, dict(step=1, loss=1.0))
    opened, real = [], open
    monkeypatch.setattr(io, "open", lambda file, *how, **options: opened.append(str(file)) or real(file, *how, **options))
    trainer.step = 2
    writer(trainer, dict(step=2, loss=0.5, router=dict(cv=[0.25, 0.125])))
    assert sum("events" in file for file in opened) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    told = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert told == {"step": [(1, 1), (2, 2)], "loss": [(1, 1), (2, 0.5)], "router/cv/0": [(2, 0.25)], "router/cv/1": [(2, 0.125)]}


def test_special_steps_are_told_whatever_log_every_is(tmp_path):
    settings = SimpleNamespace(tensorboard=True, wandb=False, log_every=50, steps=9)
    trainer = SimpleNamespace(plan=SimpleNamespace(recipe=SimpleNamespace(train=settings)))
    writer = MetricsWriter(trainer.plan, tmp_path, 0)
    special = ({}, dict(val_loss=1.0), dict(fd=1.0), dict(skipped="why"), {}, dict(spike="where"))
    for trainer.step, what in enumerate(special, 1):
        writer(trainer, dict(step=trainer.step, **what))
    assert [event.step for event in EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("step")] == [2, 3, 4, 6]


@pytest.mark.parametrize("fails, steps", [("init", []), ("log", [2])])
def test_weights_and_biases_stop_no_run(fails, steps, tmp_path, monkeypatch, capsys):
    """Without network or login, say."""
    got = []

    def log(record, step):
        if fails == "log" and step != 2:
            raise ConnectionError("no network")
        got.append(step)

    def init(**_):
        if fails == "init":
            raise RuntimeError("no api key\nlog in")
        return SimpleNamespace(log=log)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    settings = SimpleNamespace(tensorboard=False, wandb=True, log_every=1, steps=9)
    trainer = SimpleNamespace(plan=SimpleNamespace(recipe=SimpleNamespace(train=settings)), step=0)
    writer = MetricsWriter(trainer.plan, tmp_path, 0)
    for trainer.step in range(1, 4):
        writer(trainer, dict(step=trainer.step, loss=1.0))
    assert got == steps and writer.file.read_text().count("\n") == 3
    reason = dict(init="no api key log in", log="no network")[fails]
    assert capsys.readouterr().out == f"Weights & Biases cannot be written ({reason}); the run goes on\n"


def test_what_a_run_may_not_change(recipe, folder):
    """Its order of samples, of which every part is named."""
    turned = write_latents(folder / "turned", train=40, val=6, shape=(4, 4, 8), turned=True, per_shard=10)

    def plan(*overrides):
        return read_plan([str(recipe), f"data.manifest={turned}", f"run_dir={folder / 'none'}", "parallel.expert=1", *overrides], 1)

    index = json.loads(json.dumps(plan().describe())) | dict(ema=dict(kinds=["ema_0.9"]))
    check_same_run(plan("ema.decays=[0.9]"), index)
    for override, words in (
        ("train.seed=9", "train.seed=9: .* by 0; keep that"),
        ("data.window=64", "data.window=64: .* by 16384; keep that"),
        ("model.router.balance_alpha=0.01", "of another model: model.router.balance_alpha: 0.005 -> 0.01; choose"),
        ("model.router.force_balance=true", "of another model: model.router.force_balance: False -> True; choose"),
        ("train.global_batch=4", "or another train.global_b"),
        ("data.weight=2", "or another data.mix or weight"),
        ("ema.decays=[0.5]", "ema.decays=.0.5.: the checkpoint's ema_0.9 would be lost"),
    ):
        with pytest.raises(CheckpointError, match=words):
            check_same_run(plan(override), index)


@pytest.mark.parametrize("allowed", [True, False])
def test_a_new_checkpoint_stays_whatever_lies_there(allowed, alone, tmp_path, monkeypatch, capsys):
    """Later ones, of a run that went back behind them, and earlier ones that this user may not delete."""
    saver = checkpoint.Saver(tmp_path, checkpoint.CheckpointConfig(keep=1))
    for name in ("step_00004000", "step_00006000", "step_00005000.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00005000.partial" / "rank_00000.safetensors").write_bytes(b"some")
    if not allowed:

        def forbidden(folder):
            if folder.exists():
                raise PermissionError(1, "Operation not permitted", str(folder))

        monkeypatch.setattr(checkpoint, "_remove", forbidden)
    saver._publish(tmp_path / "step_00005000.partial", dict(format=checkpoint.FORMAT, step=5000), [(4, [])])
    assert (tmp_path / "latest").read_text() == "step_00005000" and (tmp_path / "step_00005000" / "index.json").is_file()
    assert (tmp_path / "step_00004000").exists() != allowed and (tmp_path / "step_00006000").exists()
    assert ("cannot be deleted (Operation not permitted)" in capsys.readouterr().out) != allowed
    shutil.copytree(tmp_path / "step_00005000", tmp_path / "step_00006000", dirs_exist_ok=True)
    assert checkpoint.newest(tmp_path).name == "step_00005000", "a whole one that the run went back behind does not count"


def test_a_rank_whose_disk_is_slow_is_waited_for(tmp_path):
    """For longer than collectives may take by torch's default, here two seconds."""
    worker = """
import sys, time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
import torch.distributed.distributed_c10d as c10d
from ditmoe_ds.distributed import checkpoint
from ditmoe_ds.distributed.topology import join, leave
c10d._get_default_timeout = lambda backend: timedelta(seconds=2)
world, write = join(), checkpoint.write
def slow(*arguments):
    time.sleep(6 * world.rank)
    write(*arguments)
checkpoint.write = slow
saver = checkpoint.Saver(Path(sys.argv[1]), checkpoint.CheckpointConfig())
saver.save(1, [], SimpleNamespace(averages={}, steps=0), 1, {})
leave()
"""
    launch(2, ["-c", worker, tmp_path])
    assert checkpoint.newest(tmp_path).name == "step_00000001"


def test_a_checkpoint_written_in_the_background_is_of_its_step(alone, tmp_path, monkeypatch):
    """Whatever training does to the weights meanwhile, and though the next one is to be written by then."""
    waited, write, weights = threading.Event(), checkpoint.write, torch.zeros(4)
    monkeypatch.setattr(checkpoint, "write", lambda *arguments: waited.wait(60) and write(*arguments))
    saver = checkpoint.Saver(tmp_path, checkpoint.CheckpointConfig(asynchronous=True))
    for step in (1, 2):
        weights.fill_(step)
        saver.save(step, [Shard("w", (4,), 0, weights, {}, True, None)], SimpleNamespace(averages={}, steps=step), step, {})
        threading.Timer(0.5, waited.set).start()
    weights.fill_(3)
    saver.finish()
    for step in (1, 2):
        checkpoint.Reader(tmp_path / f"step_{step:08d}").read("master", "w", 0, found := torch.empty(4))
        assert found.tolist() == [step] * 4


def test_which_checkpoints_are_kept(alone, tmp_path):
    saver = checkpoint.Saver(tmp_path, checkpoint.CheckpointConfig(keep=2, keep_every=4))
    for step in range(1, 11):
        (tmp_path / f"step_{step:08d}.partial").mkdir()
        (tmp_path / f"step_{step:08d}.partial" / "rank_00000.safetensors").write_bytes(b"some")
        saver._publish(tmp_path / f"step_{step:08d}.partial", dict(step=step), [(4, [])])
    assert sorted(int(path.name[5:]) for path in tmp_path.glob("step_*")) == [4, 8, 9, 10]
    assert checkpoint.CheckpointConfig(every=1, keep=2, keep_every=4).most(10) == 4  # step 8 is the third newest, and stays
    assert checkpoint.CheckpointConfig(every=4, keep=1).most(10) == 2  # the last, and the one before while it is written


def test_all_that_killed_saves_left_can_be_deleted(tmp_path, capsys):
    left = [tmp_path / "step_00005000.partial", tmp_path / "step_00005000.old.partial"]
    for folder in left:
        folder.mkdir()
        (folder / "rank_00000.safetensors").write_bytes(b"some")
    for folder in left:
        checkpoint._discard(folder)
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_a_run_that_stops_by_itself_finishes_its_checkpoint():
    finished = []

    def step():
        raise AgreedError("so many steps in a row")

    def finish():
        finished.append(True)
        raise AgreedError("no space left")

    trainer = SimpleNamespace(
        engine=torch.nn.Linear(1, 1),
        step=0,
        interrupted=False,
        plan=SimpleNamespace(recipe=SimpleNamespace(train=SimpleNamespace(steps=1))),
        train_step=step,
        saver=SimpleNamespace(finish=finish),
    )
    with pytest.raises(AgreedError, match="so many"):
        Trainer.run(trainer)
    assert finished


def test_deepspeeds_converters_refuse_our_checkpoints(straight, folder):
    """On this layout they would give wrong weights without a word (ds_to_universal) or crash half-way."""
    with pytest.raises(Exception, match=r"model states file|No such file|doesn't exist|not exist|Unable to find|can't find"):
        get_fp32_state_dict_from_zero_checkpoint(str(straight / "checkpoints"))
    step = checkpoint.newest(straight / "checkpoints")
    done = subprocess.run(
        [sys.executable, "-m", ds_to_universal.__module__, "--input_folder", step, "--output_folder", folder / "universal"],
        capture_output=True,
        text=True,
        env=os.environ | dict(DS_ACCELERATOR="cpu"),
    )
    assert done.returncode != 0 and not list((folder / "universal").rglob("*.pt")), done.stdout


@pytest.mark.parametrize("stage, routing", [(0, "token"), (1, "expert"), pytest.param(2, "token", marks=pytest.mark.slow), (3, "token")])
def test_a_step_without_a_finite_gradient_is_skipped(stage, routing, folder, recipe):
    """A sample whose latent is not a number ruins its batch, and its tokens what other ranks' experts return; the weights stay, and the
    message names it."""
    run = folder / f"nan-{stage}"
    overrides = [recipe, f"run_dir={run}", f"parallel.zero_stage={stage}", "train.steps=6", "train.precision=bf16"]
    overrides.append(f"model.routing={routing}")
    output = launch(2, ["-c", POISON, "latents", *overrides])[0][1]
    records = metrics(run)
    bad = [record for record in records if "skipped" in record]
    assert 1 <= len(bad) < len(records) and [record["step"] for record in records] == list(range(1, 7))
    for record in bad:
        assert "the latents" in record["skipped"] and "t 0." in record["skipped"] and record["loss"] is None
        assert record["skipped"] in output
    assert all(math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"]) for record in records if record not in bad)
    weights = open_weights(run)
    assert all(weights.tensor(name).isfinite().all() for name in weights.shapes)
    index = checkpoint.Reader(checkpoint.newest(run / "checkpoints")).index
    assert (index["skipped"], index["optimizer_steps"], index["ema"]["steps"]) == (len(bad), 6 - len(bad), 6 - len(bad))


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_run_whose_steps_all_fail_stops(stage, folder, recipe):
    """Every output is finite, and no gradient from the last block's attention on."""
    run = folder / f"overflow-{stage}"
    overrides = [recipe, f"run_dir={run}", f"parallel.zero_stage={stage}", "train.max_skipped_steps=2"]
    results = launch(2, ["-c", POISON, "gradients", *overrides], check=False)
    assert [code for code, _ in results] == [2, 2] and "train.max_skipped_steps=2" in results[0][1]
    records = metrics(run)
    assert len(records) == 1 and math.isfinite(records[0]["loss"])
    assert records[0]["skipped"].startswith("first in the gradient of the output of blocks.1."), records[0]["skipped"]


@pytest.mark.parametrize("stage", [0, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_all_ranks_skip_what_one_ranks_experts_cannot_learn(stage, folder, recipe):
    """The gradients of rank 1's experts alone overflow, which no other rank holds."""
    overrides = [recipe, f"run_dir={folder / f'experts-{stage}'}", f"parallel.zero_stage={stage}", "train.max_skipped_steps=2"]
    results = launch(2, ["-c", POISON, "experts", *overrides], check=False)
    assert [code for code, _ in results] == [2, 2] and "train.max_skipped_steps=2" in results[0][1]


def test_training_starts_from_upcycled_weights(folder, recipe):
    write_weights(folder / "dense", random_weights(replace(DENSE, input_size=4, num_classes=10))[1])
    assert main(["upcycle", str(folder / "dense"), "--experts", "4", "--out", str(folder / "sparse")]) == 0
    content = yaml.safe_load(recipe.read_text()) | dict(model=dict(weights=str(folder / "sparse")), run_dir=str(folder / "from-sparse"))
    (folder / "sparse.yaml").write_text(yaml.safe_dump(content))
    output = train(folder / "sparse.yaml", 2, "train.steps=1", "train.optimizer.lr=0")[0][1]
    started, given = open_weights(folder / "from-sparse"), open_weights(folder / "sparse")
    says = f"starts from the upcycled weights of {folder / 'sparse'}\n"
    kept = dict(path=str(folder / "sparse"), step=0, weights="upcycled")
    assert says in output
    assert checkpoint.Reader(checkpoint.newest(folder / "from-sparse" / "checkpoints")).index["started_from"] == kept
    assert started.shapes == given.shapes
    assert all(torch.equal(started.tensor(name), given.tensor(name)) for name in given.shapes)
    results = train(folder / "sparse.yaml", 2, "model.name=DiT-MoE-Nano/2-4E2A", check=False)
    assert [code for code, _ in results] == [2, 2] and "leave out model.name" in results[0][1]
    results = train(folder / "sparse.yaml", 2, "diffusion.time_scale=1.0", check=False)
    assert [code for code, _ in results] == [2, 2] and "diffusion.time_scale=1.0" in results[0][1]
    (folder / "sparse").rename(folder / "moved")
    output = train(folder / "sparse.yaml", 2, "train.steps=2")[0][1]
    assert "resumed at step 1" in output and says not in output, "a run that goes on needs no others' weights"
    assert checkpoint.Reader(checkpoint.newest(folder / "from-sparse" / "checkpoints")).index["started_from"] == kept
    assert json.loads((folder / "from-sparse" / "env.json").read_text())["started_from"] == kept


def test_all_ranks_start_from_one_checkpoint_of_a_run_that_is_saving(folder, recipe, straight):
    """Of which rank 1 sees the one before the newest."""
    content = yaml.safe_load(recipe.read_text()) | dict(model=dict(weights=str(straight)), run_dir=str(folder / "from-run"))
    (folder / "from-run.yaml").write_text(yaml.safe_dump(content))
    launch(2, ["-c", POISON, "early", folder / "from-run.yaml", "train.steps=1", "train.optimizer.lr=0"])
    started, given = open_weights(folder / "from-run", "master"), open_weights(straight)
    assert all(torch.equal(started.tensor(name), given.tensor(name)) for name in given.shapes)


def test_training_starts_from_weights_of_other_classes(folder, recipe):
    """Every class begins as "no class", all else as it is; said once, it is no hindrance to a resume."""
    _, given = random_weights(replace(SPARSE, input_size=4, num_classes=3, learn_variance=False))
    write_weights(folder / "three", given)
    content = yaml.safe_load(recipe.read_text()) | dict(model=dict(weights=str(folder / "three")), run_dir=str(folder / "ten"))
    content["parallel"] = dict(zero_stage=3)
    (folder / "ten.yaml").write_text(yaml.safe_dump(content))
    results = train(folder / "ten.yaml", 1, check=False)
    assert results[0][0] == 2 and "trained on 3 classes, data.manifest has 10; set model.new_classes=true" in results[0][1]
    train(folder / "ten.yaml", 1, "model.new_classes=true", "train.steps=1", "train.optimizer.lr=0")
    started = open_weights(folder / "ten")
    for name in given.shapes:
        expected = given.tensor(name)[-1].expand(11, -1) if name == CLASS_TABLE else given.tensor(name)
        torch.testing.assert_close(started.tensor(name), expected, atol=0, rtol=0)
    assert "resumed at step 1" in train(folder / "ten.yaml", 1, "model.new_classes=true", "train.steps=2")[0][1]
    results = train(recipe, 1, "model.new_classes=true", f"run_dir={folder / 'named'}", check=False)
    assert results[0][0] == 2 and "is for training that starts from model.weights" in results[0][1]


@pytest.mark.parametrize("stage", [2, 3])
def test_every_experts_every_tensor_is_in_the_export(folder, recipe, stage):
    """EP 4: 8 experts, two on a rank; compared by hash with the model as gathered from the ranks."""
    run, out = folder / f"gathered{stage}", folder / f"gathered-export{stage}"
    overrides = [f"run_dir={run}", "model.name=DiT-MoE-Nano/2-8E2A", "parallel.expert=4", "train.steps=2", f"parallel.zero_stage={stage}"]
    launch(4, [ROOT / "tests" / "gather_worker.py", folder / "hashes.json", recipe, *overrides])
    gathered = json.loads((folder / "hashes.json").read_text())
    assert main(["export", str(run), "--weights", "master", "--out", str(out)]) == 0
    exported = open_weights(out)
    hashes = {}
    for name in exported.shapes:
        tensor = exported.tensor(name)
        parts = {f"{name}/{i}": matrix for i, matrix in enumerate(tensor)} if "deepspeed_experts" in name else {name: tensor}
        hashes |= {key: hashlib.sha256(part.numpy().tobytes()).hexdigest() for key, part in parts.items()}
    assert hashes == gathered
    experts = [value for key, value in hashes.items() if "deepspeed_experts" in key]
    assert len(experts) == 2 * 2 * 8 == len(set(experts)), "layers x (w1, w2) x experts, each its own"
