"""``ditmoe sample --num``: many images, whatever the processes, batches and kills."""

import errno
import io
import json
import os
import shutil
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from latents import write_vae
from models import SPARSE, random_weights
from PIL import Image
from processes import Ranks, launch

from ditmoe_ds.cli import main
from ditmoe_ds.diffusion.objectives import DiffusionConfig
from ditmoe_ds.distributed.weights import open_weights, write_weights
from ditmoe_ds.errors import ConfigError, DataError
from ditmoe_ds.pipelines import many as many_of
from ditmoe_ds.pipelines.many import Target, sample_many
from ditmoe_ds.pipelines.parts import save_png
from ditmoe_ds.pipelines.run import open_run

WIDE = replace(SPARSE, hidden=128)
"""Wide enough for its matrix products to round differently with other rows or threads."""
SAMPLER = dict(rectified_flow=[], ddpm=["--sampler", "ddpm"])
COMMON = ["--steps", "8", "--seed", "5", "--guidance", "20", "--guidance-interval", "0.1,0.9"]
"""So strong a guidance that a difference in rounding is seen in pixels."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("many")


@pytest.fixture(scope="module")
def weights(folder):
    """One folder of weights for each objective, in several files."""
    latents = dict(vae=write_vae(folder / "vae"), scaling_factor=0.9, shift_factor=0.1)
    for name in ("rectified_flow", "ddpm"):
        write_weights(folder / name, random_weights(WIDE, DiffusionConfig(name), latents=latents)[1], shard_bytes=2_000_000)
    return {name: str(folder / name) for name in ("rectified_flow", "ddpm")}


def many(world, weights, out, *more, **options):
    return launch(world, ["-m", "ditmoe_ds.cli", "sample", weights, "--out", out, *COMMON, *more], **options)


def pictures(out):
    return {path.name: path.read_bytes() for path in sorted(Path(out).glob("*.png"))}


@pytest.fixture(scope="module", autouse=True)
def untouched():
    """What ``main`` sets in its own process."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one(weights, folder):
    """Nine images of each objective, by this process."""
    for name, path in weights.items():
        assert main(["sample", path, "--out", str(folder / f"one-{name}"), *COMMON, "--num", "9", *SAMPLER[name]]) == 0
    return {name: pictures(folder / f"one-{name}") for name in weights}


def test_the_folder_describes_itself(one, weights, folder):
    assert list(one["rectified_flow"]) == [f"{i:06d}.png" for i in range(9)]
    assert len(set(one["rectified_flow"].values())) == 9
    said = json.loads((folder / "one-rectified_flow" / "samples.json").read_text())
    assert said["weights_sha256"] == open_weights(weights["rectified_flow"]).sha256()
    wanted = dict(num=9, step=5, weights="ema", sampler="euler", steps=8, guidance=20.0, guidance_interval=[0.1, 0.9], seed=5)
    wanted |= dict(classes=[0, 1, 2], autoguidance=None, vae=str(folder / "vae"), dtype="fp32", device="cpu")
    assert wanted.items() <= said.items()


def test_a_set_is_gone_on_with_by_its_own_model_alone(weights, folder, capsys):
    """What no tensor shows is of the model, too."""
    known = open_weights(weights["rectified_flow"])
    told = known.description
    out, command = folder / "set", ["--num", "1", "--steps", "1", "--out", str(folder / "set")]
    assert main(["sample", weights["rectified_flow"], *command]) == 0
    for name, changed, word in (
        ("top-1", dict(model=told["model"] | dict(top_k=1)), "begun with model.top_k 2, not 1"),
        ("scale", dict(diffusion=told["diffusion"] | dict(time_scale=1.0)), "begun with diffusion.time_scale 1000.0, not 1.0"),
        ("latents", dict(latents=told["latents"] | dict(scaling_factor=0.5)), "begun with latents.scaling_factor 0.9, not 0.5"),
    ):
        write_weights(folder / name, replace(known, description=told | changed))
        assert main(["sample", str(folder / name), *command]) == 2
        assert word in capsys.readouterr().err
    assert len(pictures(out)) == 1


def test_a_set_is_extended(one, weights, folder, capsys):
    """Image i is the same in a larger set; an npz is whole once it is packed."""
    out = folder / "larger"
    command = ["sample", weights["rectified_flow"], *COMMON, "--out"]
    assert main([*command, str(out), "--num", "2"]) == 0
    (out / "000000.png").write_bytes(b"kept")
    assert main([*command, str(out), "--num", "4"]) == 0
    assert pictures(out) == dict([*one["rectified_flow"].items()][:4]) | {"000000.png": b"kept"}
    assert json.loads((out / "samples.json").read_text())["num"] == 4
    assert main([*command, str(out), "--num", "5", "--seed", "6"]) == 2
    assert "begun with seed 5, not 6" in capsys.readouterr().err
    assert main([*command, str(out), "--num", "3"]) == 2
    assert "begun with num 4, not 3" in capsys.readouterr().err
    assert json.loads((out / "samples.json").read_text())["num"] == 4
    assert main([*command, f"{out}.npz", "--num", "1", "--steps", "1"]) == 0
    assert main([*command, f"{out}.npz", "--num", "2", "--steps", "1"]) == 2
    assert "larger.npz has 1 images, and a finished npz is not extended" in capsys.readouterr().err


def test_sizes(weights, folder, capsys):
    """Of a few images and of many; a set has one."""
    command = ["sample", weights["rectified_flow"], "--steps", "1", "--size", "16x40", "--out"]
    assert main([*command, str(folder / "wide.png"), "--per-class", "1"]) == 0
    assert Image.open(folder / "wide.png").size == (40, 16)
    out = folder / "wide"
    assert main([*command, str(out), "--num", "1"]) == 0
    assert Image.open(out / "000000.png").size == (40, 16)
    assert json.loads((out / "samples.json").read_text())["size"] == [16, 40]
    for other, told in (([], "None"), (["--size", "16"], "[16, 16]")):
        assert main([*command[:-3], *other, "--out", str(out), "--num", "2"]) == 2
        assert f"begun with size [16, 40], not {told}" in capsys.readouterr().err


def test_classes_have_names(weights, folder, capsys):
    known = open_weights(weights["rectified_flow"])
    latents = known.description["latents"] | dict(class_names=["bird", "red cats", "7"])
    write_weights(folder / "named", replace(known, description=known.description | dict(latents=latents)))
    command = ["sample", str(folder / "named"), "--num", "1", "--steps", "1", "--out", str(folder / "of-names"), "--classes"]
    assert main([*command, "red cats, bird,2"]) == 0
    assert json.loads((folder / "of-names" / "samples.json").read_text())["classes"] == [1, 0, 2]
    for wrong, words in (("cats", "--classes='cats': write numbers with commas, or names: bird, red cats, 7"), ("7", "0..2")):
        assert main([*command, wrong]) == 2
        assert words in capsys.readouterr().err


def test_ranks_that_make_images_wait_for_each_other_for_long(weights, folder, monkeypatch):
    begin, given = dist.init_process_group, []
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **named: (given.append(named["timeout"]), begin(*args, **named)))
    assert main(["sample", weights["rectified_flow"], "--num", "1", "--steps", "1", "--out", str(folder / "patient")]) == 0
    assert given == [timedelta(days=1)]


def test_a_model_that_was_always_told_something_is_not_guided(weights, folder, capsys):
    known = open_weights(weights["rectified_flow"])
    told = known.description | dict(diffusion=known.description["diffusion"] | dict(condition_dropout=0.0))
    write_weights(folder / "told", replace(known, description=told))
    command = ["sample", str(folder / "told"), "--per-class", "1", "--steps", "1", "--out", str(folder / "told.png")]
    assert main(command) == 2
    assert "--guidance=2.0: this model was trained with diffusion.condition_dropout=0" in capsys.readouterr().err
    assert main([*command, "--guidance", "1"]) == 0
    assert main([*command, "--autoguidance", weights["rectified_flow"]]) == 0


def test_images_that_compete_in_the_weak_model_are_made_alone(weights, monkeypatch, tmp_path):
    run = open_run(weights["rectified_flow"])
    weak = SimpleNamespace(config=replace(run.model.config, router=replace(run.model.config.router, capacity_factor=1.0)))
    asked = []
    monkeypatch.setattr(type(run), "device", torch.device("meta"))
    monkeypatch.setattr(run, "numbered", lambda numbers, *more, **options: asked.append(numbers) or torch.zeros(1), raising=False)
    monkeypatch.setattr(run, "images", lambda latents: torch.zeros(1, 2, 2, 3, dtype=torch.uint8), raising=False)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(many_of, "decided", lambda action: action())
    how = dict(seed=0, sampler=None, steps=1, weak_transformer=weak)
    sample_many(run, SimpleNamespace(rank=0, size=1), Target(tmp_path / "x"), [0], 2, 8, {}, **how)
    assert asked == [[0], [1]]


def test_the_hash_is_of_the_content(weights, folder):
    parameters, known = random_weights(WIDE)
    write_weights(folder / "whole", known)
    assert open_weights(folder / "whole").sha256() == known.sha256() == open_weights(weights["rectified_flow"]).sha256()
    parameters["blocks.1.attn.proj.bias"][-1] += 1e-3
    assert known.sha256() != open_weights(folder / "whole").sha256()


def test_the_images_are_what_a_run_samples(one, weights):
    run = open_run(weights["rectified_flow"])
    how = dict(steps=8, seed=5, guidance=20.0, guidance_interval=(0.1, 0.9))
    torch.set_num_threads(1)
    images = [run.sample([i % 3], first=i, **how)[0] for i in range(9)]
    for image, name in zip(images, one["rectified_flow"]):
        found = torch.from_numpy(np.asarray(Image.open(Path(weights["rectified_flow"]).parent / "one-rectified_flow" / name)).copy())
        assert torch.equal(found, image)


@pytest.mark.parametrize("name,world,batch", [("rectified_flow", 2, 7), pytest.param("ddpm", 4, 1, marks=pytest.mark.slow)])
def test_any_world_and_batch_makes_the_same_bits(one, weights, folder, name, world, batch):
    out = folder / f"world-{world}"
    outputs = [output for _, output in many(world, weights[name], out, "--num", 9, "--batch", batch, *SAMPLER[name])]
    assert pictures(out) == one[name]
    assert ["sample: 100% 9/9 " in output for output in outputs] == [True, *[False] * (world - 1)] and "\r" not in "".join(outputs)


def test_threads_and_batches_do_not_matter_either(one, weights, folder, capsys):
    """In this process, which has as many threads as it likes; and as an npz."""
    torch.set_num_threads(2)
    out = folder / "set.npz"
    arguments = ["sample", weights["rectified_flow"], "--out", str(out), *COMMON, "--num", "9", "--batch", "32"]
    assert main(arguments) == 0
    with np.load(out, allow_pickle=False) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.shape == (9, 32, 32, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
    assert labels.tolist() == [0, 1, 2] * 3
    for i, content in enumerate(one["rectified_flow"].values()):
        assert (np.asarray(Image.open(io.BytesIO(content))) == images[i]).all()
    assert json.loads((folder / "set.json").read_text())["num"] == 9 and not list(folder.glob("set.npz.*"))
    before = out.stat().st_mtime_ns
    assert main(arguments) == 0 and out.stat().st_mtime_ns == before  # done already
    capsys.readouterr()
    for change, word in (
        (["--seed", "6"], "seed 5, not 6"),
        (["--classes", "1"], "classes [0, 1, 2], not [1]"),
        (["--steps", "4"], "not 4"),
    ):
        assert main([*arguments, *change]) == 2
        error = capsys.readouterr().err
        assert "begun with" in error and word in error and error.count("error:") == 1


def test_a_killed_run_goes_on(one, weights, folder):
    """With noise on the way, and as an npz; what was finished is not made again."""
    out = folder / "killed.npz"
    arguments = ["sample", weights["ddpm"], "--out", str(out), *COMMON, *SAMPLER["ddpm"], "--num", "9"]
    [process] = Ranks(1, ["-m", "ditmoe_ds.cli", *arguments]).processes
    parts, deadline = folder / "killed.npz.parts", time.monotonic() + 200
    while len(pictures(parts)) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    killed = pictures(parts)
    assert 3 <= len(killed) < 9 and not out.exists(), "it was to be killed on the way"
    (parts / "000008.png.partial").write_bytes(b"half a picture")
    Image.new("RGB", (32, 32)).save(parts / "000000.png")
    assert main(arguments) == 0
    images = np.load(out, allow_pickle=False)["arr_0"]
    assert (images[0] == 0).all()
    for image, content in list(zip(images, one["ddpm"].values(), strict=True))[1:]:
        assert (np.asarray(Image.open(io.BytesIO(content))) == image).all()
    assert not parts.exists()


@pytest.mark.parametrize("number", [0, 8], ids=["first", "last"])
def test_a_full_disk_is_told(weights, tmp_path, monkeypatch, number, capsys):
    """In one line. Images are written by a thread, whose error must not be lost."""

    def save(path, image):
        if path.name == f"{number:06d}.png":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("ditmoe_ds.pipelines.many.save_png", save)
    assert main(["sample", weights["rectified_flow"], "--out", str(tmp_path / "out"), *COMMON, "--num", "9"]) == 2
    assert f"error: {tmp_path}/out/{number:06d}.png: No space left on device" in capsys.readouterr().err
    torch.distributed.destroy_process_group()


def test_expert_parallel_makes_the_same_images(one, weights, folder):
    out = folder / "ep"
    mild = ["--num", 9, "--steps", 2, "--guidance", 2]
    many(2, weights["rectified_flow"], out, *mild, "--expert-parallel", 2)
    images = open_run(weights["rectified_flow"]).sample(
        [i % 3 for i in range(9)], first=0, seed=5, steps=2, guidance=2.0, guidance_interval=(0.1, 0.9)
    )
    assert len(pictures(out)) == 9
    for i, image in enumerate(images):
        assert np.abs(np.asarray(Image.open(out / f"{i:06d}.png")).astype(int) - image.numpy()).max() <= 1


def test_offloaded_experts_and_bf16(weights, folder):
    run = open_run(weights["rectified_flow"])
    how = dict(steps=2, guidance=2.0)
    images = run.sample([0, 1], **how)
    offloaded = open_run(weights["rectified_flow"], offload_experts=True)
    assert torch.equal(offloaded.sample([0, 1], **how), images)
    half = open_run(weights["rectified_flow"], dtype="bf16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16} and half.pipeline.vae.dtype == torch.float32
    assert 0 < (half.sample([0, 1], **how).int() - images.int()).abs().float().mean() < 10


@pytest.mark.gpu
def test_offloaded_experts_lie_on_the_host(weights):
    how = dict(steps=2, guidance=2.0)
    run = open_run(weights["rectified_flow"], offload_experts=True)
    experts = [p for name, p in run.model.named_parameters() if "deepspeed_experts" in name]
    assert all(p.is_pinned() for p in experts) and {p.device.type for p in experts} == {"cpu"} != {run.device.type}
    images = open_run(weights["rectified_flow"]).sample([0, 1], **how)
    assert (run.sample([0, 1], **how).int() - images.int()).abs().max() <= 1


def test_a_rank_that_comes_late_packs_with_the_others(weights, folder):
    """The first may have packed everything by then; whether it has is asked together."""
    late = """
import os, sys, time
import torch.distributed as dist
from ditmoe_ds.cli import main
from ditmoe_ds.ending import end
together = dist.barrier
def barrier():
    together()
    time.sleep(2 * int(os.environ["RANK"]))
dist.barrier = barrier
end(main(sys.argv[1:]))
"""
    out = folder / "late.npz"
    launch(2, ["-c", late, "sample", weights["rectified_flow"], "--out", out, "--num", 2, "--steps", 1], timeout=120)
    assert out.is_file()


def test_autoguidance(weights, folder, one):
    """From itself: without guidance; the weak run is described."""
    path, common = weights["rectified_flow"], ["--steps", "2", "--num", "3"]
    assert main(["sample", path, "--out", str(folder / "weak"), *common, "--guidance", "3", "--autoguidance", path]) == 0
    assert main(["sample", path, "--out", str(folder / "none"), *common, "--guidance", "1"]) == 0
    assert pictures(folder / "weak") == pictures(folder / "none")
    said = json.loads((folder / "weak" / "samples.json").read_text())
    moved = folder / "moved"
    shutil.copytree(path, moved)  # the same weights: whoever goes on may find them elsewhere
    assert main(["sample", str(moved), "--out", str(folder / "weak"), *common, "--guidance", "3", "--autoguidance", str(moved)]) == 0
    assert said["autoguidance"]["checkpoint"] == path and said["autoguidance"]["weights_sha256"] == said["weights_sha256"]


def test_autoguidance_by_a_model_of_other_latents(folder, capsys):
    """The dropout of its conditions is its own affair."""
    for name, dropout, scaling in (("strong", 0.1, 0.9), ("early", 0.2, 0.9), ("elsewhere", 0.1, 0.5)):
        weights = random_weights(SPARSE, latents=dict(vae=str(folder / "vae"), scaling_factor=scaling))[1]
        weights.description["diffusion"]["condition_dropout"] = dropout
        write_weights(folder / name, weights)
    command = ["sample", str(folder / "strong"), "--classes", "0", "--per-class", "1", "--steps", "1", "--out", str(folder / "g.png")]
    assert main([*command, "--autoguidance", str(folder / "early")]) == 0
    assert main([*command, "--autoguidance", str(folder / "elsewhere")]) == 2
    assert "its model was trained otherwise; scaling_factor: 0.9 -> 0.5" in capsys.readouterr().err


def test_pictures_of_an_npz_that_nothing_describes_are_not_taken(tmp_path):
    target = Target(tmp_path / "set.npz")
    assert target.begin(dict(guidance=20.0), 2) == [0, 1]
    save_png(target.image(0), torch.zeros(2, 2, 3, dtype=torch.uint8))
    assert target.begin(dict(guidance=20.0), 2) == [1]
    with pytest.raises(ConfigError, match="begun with guidance 20.0"):
        target.begin(dict(guidance=1.0), 2)
    target.description.unlink()
    with pytest.raises(ConfigError, match=r"set.npz.parts is there, but no set.json that says what it is"):
        target.begin(dict(guidance=1.0), 2)
    for content in ("[]", "no json"):
        target.description.write_text(content)
        with pytest.raises(ConfigError, match="set.json does not say what is there"):
            target.begin(dict(guidance=1.0), 2)


def test_an_image_that_cannot_be_packed_is_named(tmp_path):
    """As a power cut leaves it; without it the set goes on."""
    target = Target(tmp_path / "set.npz")
    target.begin({}, 2)
    for number in range(2):
        save_png(target.image(number), torch.zeros(2, 2, 3, dtype=torch.uint8))
    target.image(1).write_bytes(b"")
    with pytest.raises(DataError, match=r"set.npz.parts/000001.png cannot be read; remove it and start again"):
        target.pack(2, None)
    target.image(1).unlink()
    assert target.begin({}, 2) == [1]


def test_what_a_kill_at_the_end_leaves_is_deleted(tmp_path):
    target = Target(tmp_path / "set.npz")
    target.begin(dict(guidance=20.0), 1)
    save_png(target.image(0), torch.zeros(2, 2, 3, dtype=torch.uint8))
    target.out.write_bytes(b"whole")
    assert target.begin(dict(guidance=20.0), 1) == [] and not target.folder.exists()


def test_a_set_is_written_where_its_own_folder_may_be(weights, tmp_path, monkeypatch, capsys):
    """The folder above may be another user's."""
    out, npz = tmp_path / "mine", tmp_path / "mine.npz"
    monkeypatch.setattr(os, "access", lambda path, mode: path == out)
    command = ["sample", weights["rectified_flow"], "--num", "1", "--steps", "1", "--out"]
    for place in (out, npz):
        assert main([*command, str(place)]) == 2
        assert f"--out='{tmp_path}': cannot be written by this user" in capsys.readouterr().err
    out.mkdir()
    assert main([*command, str(out)]) == 0


def test_mistakes(weights, folder, capsys):
    path = weights["rectified_flow"]
    (folder / "other").mkdir()
    (folder / "other" / "file").write_text("precious")
    for arguments, word in (
        (["--num", "2", "--out", "a.png"], "FILE.npz"),
        (["--num", "2", "--out", "a.JPG"], "FILE.npz"),
        (["--num", "2", "--out", str(folder / "other" / "file" / "x")], "cannot be written: "),
        (["--out", str(folder / "other" / "file" / "x.png")], "cannot be written: "),
        (["--out", str(folder / "x.png"), "--vae", write_vae(folder / "vae6", channels=6)], "of 6 channels; the model makes 4"),
        (["--num", "0", "--out", str(folder / "zero")], "at least 1"),
        (["--num", "2", "--out", str(folder / "other")], "is there, but no samples.json"),
        (["--num", "2", "--out", str(folder / "ep"), "--expert-parallel", "2"], "one of [1]"),
        (["--num", "2", "--out", str(folder / "no"), "--sampler", "ddim"], "euler"),
        (["--num", "2", "--out", str(folder / "no"), "--guidance-interval", "0.8,0.1"], "LOW,HIGH"),
        (["--guidance-interval", "0.8"], "--guidance-interval='0.8': write LOW,HIGH"),
        (["--num", "2", "--out", str(folder / "no"), "--autoguidance", weights["ddpm"]], "objective: rectified_flow -> ddpm"),
        (["--num", "2", "--out", str(folder / "no"), "--prompts", str(folder / "other" / "file")], "takes classes"),
        (["--num", "2", "--out", str(folder / "no"), "--classes", "3"], "0..2"),
        (["--num", "2", "--out", str(folder / "no"), "--classes", "bird"], "know no names"),
        (["--num", "2", "--out", str(folder / "no"), "--steps", "0"], "from 1 to 1000"),
        (["--expert-parallel", "2"], "say how many"),
        (["--per-class", "0"], "--per-class"),
        (["--size", "16x36", "--out", str(folder / "no.png")], "--size='16x36': both must be multiples of 8"),
        (["--size", "0", "--num", "1", "--out", str(folder / "no")], "--size='0x0': both must be multiples of 8"),
        (["--size", "16x", "--out", str(folder / "no.png")], "HEIGHTxWIDTH"),
        (["--size", "16x16x3", "--out", str(folder / "no.png")], "HEIGHTxWIDTH"),
        (["--guidance", "nan"], "--guidance"),
        (["--compile", "--offload-experts"], "--compile=True"),
        (["--guided-channels", "9"], "have 4"),
        (["--guided-channels", "0"], "have 4"),
        (["--out", str(folder / "no.xyz")], "FILE.png"),
    ):
        assert main(["sample", path, *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert word in error and error.count("error:") == 1, error
    assert not (folder / "no").exists() and [entry.name for entry in (folder / "other").iterdir()] == ["file"]
