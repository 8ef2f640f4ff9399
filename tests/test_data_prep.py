"""The command ditmoe-data, on a tiny random VAE and a folder of noise."""

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderTiny
from encoding import SETTINGS, assert_one_line, contents, pixels, png, run_encode, samples, write_tar, write_text_encoder
from PIL import Image
from processes import ROOT
from safetensors.torch import load_file, save_file

from data_prep.cli import main
from data_prep.encode import encode
from data_prep.finalize import finalize
from data_prep.images import decode as decode_image
from data_prep.sources import is_heldout, open_source
from data_prep.units import Request, UnitWriter, claim_folder, load_record, worker_from_environment
from ditmoe_ds.errors import ConfigError, DataError
from ditmoe_ds.latents.condition import padded
from ditmoe_ds.latents.manifest import Manifest
from ditmoe_ds.latents.text import load_text_encoder
from ditmoe_ds.latents.vae import decode, load_vae
from ditmoe_ds.latents.vae import encode as encode_images
from ditmoe_ds.rng import keyed_generator


def test_latents_are_those_of_the_images(inputs, encoded):
    manifest = Manifest.load(encoded)
    assert (manifest.shapes, manifest.downsample, manifest.class_names) == (((2, 8, 8),), 2, ("ant", "cat"))
    assert (manifest.scaling_factor, manifest.shift_factor, manifest.rejected) == (0.5, 0.25, 0)
    assert manifest.splits.train.samples + manifest.splits.val.samples == 40
    vae = load_vae(manifest.vae, "cpu")
    found = {sample.meta["source"]: (sample, split) for split in ("train", "val") for sample in samples(encoded, split)}
    for item in open_source(f"folder:{inputs / 'images'}").items():
        sample, split = found.pop(item.origin)
        assert is_heldout(sample.key, SETTINGS["holdout"]) == (split == "val")
        torch.testing.assert_close(sample.tensors["latent"], encode_images(vae, pixels(item))[0][0], atol=1e-5, rtol=1e-5)
        assert sample.meta == {"label": item.label, "class": item.origin.split("/")[0], "caption": None, "source": item.origin}
    assert not found
    train = samples(encoded, "train")
    latents = np.stack([sample.tensors["latent"] for sample in train])
    np.testing.assert_allclose(manifest.mean, latents.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(manifest.std, latents.std((0, 2, 3)), rtol=1e-4)
    assert manifest.class_histogram == tuple(np.bincount([sample.meta["label"] for sample in train]).tolist())
    assert not (encoded / "partial").exists()


def test_each_image_gets_the_size_most_like_its_own_shape(inputs, tmp_path, capsys):
    """The images are 50 pixels wide and 16 to 55 high."""
    sizes = ((16, 16), (8, 32), (12, 24))
    out = run_encode(inputs, tmp_path / "out", size=sizes)
    manifest = Manifest.load(out)
    assert manifest.shapes == ((2, 4, 16), (2, 6, 12), (2, 8, 8)) and manifest.splits.train.samples + manifest.splits.val.samples == 40
    vae = load_vae(manifest.vae, "cpu")
    found = {sample.meta["source"]: sample for split in ("train", "val") for sample in samples(out, split)}
    for item in open_source(f"folder:{inputs / 'images'}").items():
        height = Image.open(item.image).height
        nearest = (8, 32) if height < 50 * 8**-0.5 else (12, 24) if height < 50 * 2**-0.5 else (16, 16)
        image = decode_image(item.image, [nearest])
        assert image.shape == (*nearest, 3)
        latent = encode_images(vae, torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1)[0][0]
        torch.testing.assert_close(found[item.origin].tensors["latent"], latent, atol=1e-5, rtol=1e-5)
    pixels = torch.cat([sample.tensors["latent"].flatten(1) for sample in samples(out, "train")], 1)
    np.testing.assert_allclose(manifest.mean, pixels.mean(1), atol=1e-5)
    np.testing.assert_allclose(manifest.std, pixels.std(1), rtol=1e-3)

    other = tmp_path / "other"
    run_encode(inputs, other, size=sizes, worker=(1, 2))
    with pytest.raises(DataError, match="of 4 units 2 are missing") as caught:
        finalize(str(other))
    assert main([*str(caught.value).partition("; run ditmoe-data ")[2].split(), "--decoders", "0", "--worker", "0/1"]) == 0
    assert contents(other) == contents(out)
    sheet = tmp_path / "sheet.png"
    assert main(["verify", str(out), "--sheet", str(sheet)]) == 0
    widest = max(sample.tensors["latent"].shape[2] * 2 for sample in samples(out, "val"))
    assert Image.open(sheet).width == 8 * (widest + 2) - 2
    assert main(["inspect", str(out)]) == 0
    assert "8x32, 12x24, 16x16 pixels" in capsys.readouterr().out
    assert main(["subset", str(out), "--fraction", "0.5", "--out", str(tmp_path / "half")]) == 0
    assert Manifest.load(tmp_path / "half").shapes == manifest.shapes and main(["verify", str(tmp_path / "half")]) == 0


@pytest.mark.parametrize("size", ["0", "16x", "16x16,16", "x16", "a", "8x8x8"])
def test_sizes_that_are_none(size, capsys):
    with pytest.raises(SystemExit):
        main(["encode", "--source", "s", "--vae", "v", "--out", "o", "--size", size])
    assert "--size" in capsys.readouterr().err


def test_any_number_of_workers_and_decoders_write_the_same_bytes(inputs, encoded, tmp_path, capsys):
    out = tmp_path / "out"
    run_encode(inputs, out, worker=(2, 3), decoders=1)
    assert "worker 2 of 3 is done" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"of 4 units 3 are missing \(0, 1, 3\); run ditmoe-data encode --source folder:") as caught:
        finalize(str(out))
    run_encode(inputs, out, worker=(1, 2))
    arguments = str(caught.value).partition("; run ditmoe-data ")[2].split()
    assert main([*arguments, "--decoders", "0", "--worker", "0/2"]) == 0
    assert main(["finalize", str(out)]) == 0
    assert contents(out) == contents(encoded)
    capsys.readouterr()
    run_encode(inputs, out)
    assert "already complete" in capsys.readouterr().out


def test_an_interrupted_run_continues(inputs, encoded, tmp_path):
    out = run_encode(inputs, tmp_path / "out")
    (out / "manifest.json").unlink()
    (out / "train-000001.tar").unlink()
    (out / "units" / "000003.json").unlink()
    leftover = out / "partial" / "000003-elsewhere-17"
    leftover.mkdir(parents=True)
    (leftover / "train-000003.tar.partial").write_bytes(b"half")
    kept = (out / "train-000000.tar").stat().st_mtime_ns
    run_encode(inputs, out)
    assert contents(out) == contents(encoded)
    assert (out / "train-000000.tar").stat().st_mtime_ns == kept


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_result_is_the_same(inputs, tmp_path, kills):
    """Processes killed some time after they begin to encode, and started again as other numbers of workers."""
    chance = random.Random(0)
    settings = dict(shard_size=4, batch=1, flip_copies=True, store="mean+std")
    whole = run_encode(inputs, tmp_path / "whole", **settings)
    out = tmp_path / "out"
    arguments = ["encode", "--source", f"folder:{inputs / 'images'}", "--vae", str(inputs / "vae"), "--out", str(out), "--size", "16"]
    arguments += ["--holdout", "0.3", "--shard-size", "4", "--batch", "1", "--flip-copies", "--store", "mean+std"]
    killed, made = 0, 0
    while killed < kills:
        count = chance.choice((1, 2, 3))
        workers = []
        for i in range(count):  # forked, since imports take a hundred times as long as the encoding
            process = multiprocessing.get_context("fork").Process(
                target=main, args=([*arguments, "--worker", f"{i}/{count}", "--decoders", "0"],)
            )
            process.start()
            workers.append((process, chance.uniform(0, 0.15)))
        deadlines: dict[int, float] = {}
        while any(process.is_alive() for process, _ in workers):
            for process, moment in workers:
                if list(out.glob(f"partial/*-{process.pid}")):
                    deadlines.setdefault(process.pid, time.monotonic() + moment)
                if time.monotonic() > deadlines.get(process.pid, float("inf")):
                    process.kill()
            time.sleep(0.001)
        killed += sum(process.exitcode == -signal.SIGKILL for process, _ in workers)
        made = max(made, len(list(out.glob("units/*"))))
        if made == 10:  # too fast to be killed again: once more from the start
            assert main([*arguments, "--decoders", "0"]) == 0
            assert contents(out) == contents(whole)
            shutil.rmtree(out)
            made = 0
    command = [sys.executable, "-m", "data_prep.cli", *arguments]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=True)
    assert contents(out) == contents(whole)


def test_another_request_does_not_mix_with_the_shards_there(inputs, encoded, tmp_path):
    with pytest.raises(DataError, match=r"shard_size 12 -> 6"):
        run_encode(inputs, encoded, shard_size=6)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(DataError, match="not made by ditmoe-data"):
        run_encode(inputs, tmp_path / "other")


def test_a_vae_that_has_moved_goes_on_where_it_is_now(inputs, tmp_path):
    run_encode(inputs, tmp_path / "whole")
    run_encode(inputs, tmp_path / "out", worker=(0, 2))
    moved = shutil.copytree(inputs / "vae", tmp_path / "moved")
    run_encode(inputs, tmp_path / "out", worker=(1, 2), vae=str(moved))
    finalize(str(tmp_path / "out"))
    assert Request.load(tmp_path / "out").vae == Manifest.load(tmp_path / "out").vae == str(moved)
    shards = {name: digest for name, digest in contents(tmp_path / "out").items() if name.endswith("tar")}
    assert shards and shards.items() <= contents(tmp_path / "whole").items()
    images = shutil.copytree(inputs / "images", tmp_path / "images")  # others may look the same in a list
    with pytest.raises(DataError, match=r"another request \(source "):
        run_encode(inputs, tmp_path / "out", source=f"folder:{images}")
    weights = next(moved.glob("*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(DataError, match=r"another request \(vae_sha256 "):
        run_encode(inputs, tmp_path / "out", vae=str(moved))


def test_too_large_a_batch_is_told_and_a_smaller_one_goes_on(inputs, encoded, tmp_path, monkeypatch):
    def full(vae, images):
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return encode_images(vae, images)

    monkeypatch.setattr("data_prep.encode.encode_images", full)
    with pytest.raises(ConfigError, match="--batch=8: the GPU's memory does not hold so many"):
        run_encode(inputs, tmp_path / "out", batch=8)
    with pytest.raises(DataError, match=r"another request \(seed 0 -> 1\)"):
        run_encode(inputs, tmp_path / "out", batch=4, seed=1)
    assert contents(run_encode(inputs, tmp_path / "out")) == contents(encoded)
    with pytest.raises(DataError, match=r"batch 4 -> 2"):  # which would round otherwise
        run_encode(inputs, tmp_path / "out", batch=2)


def test_workers_that_start_at_once_agree_on_one_request(encoded, tmp_path):
    request = Request.load(encoded)
    arguments = tmp_path / "out", asdict(request), lambda: None
    processes = [multiprocessing.get_context("fork").Process(target=claim_folder, args=arguments) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["request.json"]


def test_of_two_processes_on_one_unit_one_goes_on(tmp_path, monkeypatch):
    latent = torch.zeros(2, 8, 8)
    monkeypatch.setattr("data_prep.units._process", lambda: "first")
    first = UnitWriter(tmp_path, 3, ((2, 8, 8),), 0)
    first.write("train", "a", {"label": 0}, latent=latent)
    monkeypatch.setattr("data_prep.units._process", lambda: "second")
    second = UnitWriter(tmp_path, 3, ((2, 8, 8),), 0)
    second.write("train", "b", {"label": 0}, latent=latent)
    with pytest.raises(FileNotFoundError), first:
        first.finish()
    second.finish()
    record = load_record(tmp_path, 3)
    assert record and [shard.samples for shard in record.train] == [1] and record.histogram == (1,) and not list(tmp_path.glob("partial/*"))


def test_what_others_have_completed_stays_as_it_is(inputs, encoded, tmp_path, monkeypatch, capsys):
    """A worker goes on while its units were given to others, who finalized: shards may be read by then."""
    out, finish, written = tmp_path / "out", UnitWriter.finish, {}

    def and_then_the_others(unit):
        finish(unit)
        monkeypatch.setattr(UnitWriter, "finish", finish)
        run_encode(inputs, out, shard_size=4, worker=(0, 1))
        written.update({path: path.stat().st_mtime_ns for path in out.glob("*.*")})

    monkeypatch.setattr(UnitWriter, "finish", and_then_the_others)
    run_encode(inputs, out, shard_size=4, worker=(0, 2))
    assert len(written) > 20 and {path: path.stat().st_mtime_ns for path in out.glob("*.*")} == written
    assert "others have completed it" in capsys.readouterr().out

    def taken_over(unit):
        monkeypatch.setattr(UnitWriter, "finish", finish)
        run_encode(inputs, tmp_path / "again")
        finish(unit)

    monkeypatch.setattr(UnitWriter, "finish", taken_over)
    run_encode(inputs, tmp_path / "again", worker=(0, 2))
    assert "others have completed it" in capsys.readouterr().out and contents(tmp_path / "again") == contents(encoded)

    def taken_over_by_a_worker_beside_it(unit):
        monkeypatch.setattr(UnitWriter, "finish", finish)
        run_encode(inputs, tmp_path / "twice", worker=(0, 2))
        finish(unit)

    monkeypatch.setattr(UnitWriter, "finish", taken_over_by_a_worker_beside_it)
    with pytest.raises(DataError, match=r"--out='.*twice': another process has taken over a unit of this one; start each worker once"):
        run_encode(inputs, tmp_path / "twice", worker=(0, 2))


def test_the_worker_is_found_in_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert worker_from_environment() == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert worker_from_environment() == (3, 4)
    for name, value in (("ID", 2), ("COUNT", 3), ("MAX", 2)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert worker_from_environment() == (11, 12)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    assert worker_from_environment() == (2, 3)
    for name, value in (("STEP_ID", 0), ("PROCID", 1), ("NTASKS", 2)):
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert worker_from_environment() == (5, 6)


@pytest.mark.parametrize("tasks", [[7], [0, 9], [7, 9], range(1, 65)])
def test_a_part_of_an_array_does_not_know_of_how_many(monkeypatch, tasks):
    """A task that was killed and is submitted again would else be worker 0 of 1, and encode everything."""
    for name, value in (("ID", tasks[0]), ("COUNT", len(tasks)), ("MIN", tasks[0]), ("MAX", tasks[-1]), ("STEP", 1)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    with pytest.raises(ConfigError, match=rf"SLURM_ARRAY_TASK_ID={tasks[0]}: .* give --worker {tasks[0]}/n"):
        worker_from_environment()


def test_a_data_folder_moves_together_with_its_vae(inputs, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (inputs / "vae").rename(home / "vae")
    try:
        encode(f"folder:{inputs / 'images'}", str(home / "vae"), str(home / "data"), **SETTINGS)
        home.rename(tmp_path / "moved")
        assert Manifest.load(tmp_path / "moved" / "data" / "manifest.json").vae == str(tmp_path / "moved" / "vae")
    finally:
        (tmp_path / "moved" / "vae").rename(inputs / "vae")


def test_a_relative_folder_of_images_is_found_from_elsewhere(inputs, tmp_path, monkeypatch):
    """Also by a command that continues; what an earlier release began is gone on with."""
    monkeypatch.chdir(inputs)
    relative, out = ["encode", "--source", "folder:images", "--vae", "vae", "--size", "16", "--decoders", "0"], tmp_path / "out"
    assert main([*relative, "--out", str(out), "--worker", "0/2", "--shard-size", "20"]) == 0
    note = json.loads((out / "request.json").read_text())
    assert note["source"] == f"folder:{inputs / 'images'}"
    (out / "request.json").write_text(json.dumps(note | dict(source="folder:images")))
    assert main([*relative, "--out", str(out), "--shard-size", "20"]) == 0
    assert main([*relative, "--out", str(tmp_path / "new"), "--worker", "0/2", "--shard-size", "20"]) == 0
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="1 are missing") as caught:
        finalize("new")
    assert main(str(caught.value).partition("; run ditmoe-data ")[2].split()) == 0
    assert main(["verify", "new", "--sheet", "sheet.png"]) == 0


def test_a_folder_called_by_a_dot(inputs, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    shutil.copytree(inputs / "vae", tmp_path / "vae")
    monkeypatch.chdir(tmp_path / "data")
    encode(f"folder:{inputs / 'images'}", str(tmp_path / "vae"), ".", **SETTINGS)
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["vae"] == "../vae"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("store", ["mean", "mean+std", "sample"])
def test_what_of_the_posterior_is_stored(inputs, tmp_path, store, dtype):
    out = run_encode(inputs, tmp_path / "out", store=store, dtype=dtype, seed=3, flip_copies=True)
    assert main(["verify", str(out)]) == 0
    vae = load_vae(str(inputs / "vae"), "cpu")
    items = {item.key: item for item in open_source(f"folder:{inputs / 'images'}").items()}
    found = samples(out, "train")[:4]
    assert [sample.key.endswith("-flip") for sample in found] == [False, True] * 2
    for key, _, tensors in found:
        image = pixels(items[key.removesuffix("-flip")])
        mean, std = encode_images(vae, image.flip(-1) if key.endswith("-flip") else image)
        if store == "sample":
            mean += std * torch.randn(mean.shape[1:], generator=keyed_generator(3, "posterior", key))
        close = dict(atol=2e-2, rtol=2e-2) if dtype == "bfloat16" else dict(atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(tensors["latent"].float(), mean[0], **close)
        assert ("std" in tensors) == (store == "mean+std")
        if store == "mean+std":
            torch.testing.assert_close(tensors["std"].float(), std[0], **close)
    keys = {split: {sample.key.removesuffix("-flip") for sample in samples(out, split)} for split in ("train", "val")}
    assert not keys["train"] & keys["val"]


def test_decoding_undoes_the_scaling_and_rounds():
    vae = SimpleNamespace(device="cpu", dtype=torch.float32, decode=lambda latents, return_dict: [latents])
    shades = torch.tensor([0, 0.6, 99.6, 100.4, 254.6, 300]).expand(1, 3, 1, 6) / 127.5 - 1
    assert decode(vae, (shades - 0.25) * 0.5, 0.5, 0.25)[0, 0, :, 0].tolist() == [0, 1, 100, 100, 255, 255]


@pytest.mark.parametrize("kind", ["dc", "tiny"])
def test_other_vaes(inputs, tmp_path, kind, capsys):
    torch.manual_seed(0)
    if kind == "dc":
        blocks = dict(encoder_block_types="ResBlock", encoder_block_out_channels=(4, 4, 8), encoder_layers_per_block=(1, 1, 1))
        blocks |= {name.replace("encoder", "decoder"): value for name, value in blocks.items()}
        multiscales = dict(encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()))
        vae = AutoencoderDC(latent_channels=2, scaling_factor=0.4, **blocks, **multiscales)
        expected = (((2, 4, 4),), 4, 0.4, 0.0)
    else:
        blocks = dict(encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8))
        vae = AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), scaling_factor=1.5, shift_factor=0.5)
        expected = (((4, 4, 4),), 4, 1.5, 0.5)
    vae.save_pretrained(tmp_path / "vae")
    out = run_encode(inputs, tmp_path / "out", vae=str(tmp_path / "vae"))
    manifest = Manifest.load(out)
    assert (manifest.shapes, manifest.downsample, manifest.scaling_factor, manifest.shift_factor) == expected
    assert main(["verify", str(out), "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert "PSNR" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no posterior"):
        run_encode(inputs, tmp_path / "other", vae=str(tmp_path / "vae"), store="mean+std")


def test_latents_that_are_not_finite_are_rejected(inputs, tmp_path, monkeypatch):
    def spoilt(vae, images):
        mean, std = encode_images(vae, images)
        mean[1, 1, 2, 3] = 1e5
        return mean, std

    monkeypatch.setattr("data_prep.encode.encode_images", spoilt)
    out = run_encode(inputs, tmp_path / "out", dtype="float16", max_rejected=0.5)
    assert Manifest.load(out).rejected == 10 and "not finite in float16" in (out / "rejected.jsonl").read_text()


def test_what_leaves_nothing_to_learn_from_is_told(inputs, tmp_path):
    with pytest.raises(DataError, match="of 40 images none is left to learn from: 40 samples are held out, 0 images rejected; encode"):
        run_encode(inputs, tmp_path / "out", holdout=1 - 1e-9)
    write_tar(tmp_path / "in.tar", [])
    with pytest.raises(DataError, match="of 0 images none is left"):
        run_encode(inputs, tmp_path / "empty", f"wds:{tmp_path}/in.tar")


def test_a_full_disk_is_told_in_one_line_and_the_run_continues(inputs, encoded, tmp_path, capsys):
    out = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = ["encode", "--source", f"folder:{inputs / 'images'}", "--vae", str(inputs / "vae"), "--out", str(out), "--size", "16"]
    arguments += ["--shard-size", "12", "--holdout", "0.3", "--batch", "4", "--decoders", "0"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))  # no file can become longer
    try:
        assert main(arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_one_line(capsys.readouterr().err, str(out), os.strerror(errno.EFBIG), "same command continues")
    assert not list(out.glob("*.tar"))
    assert main(arguments) == 0
    assert contents(out) == contents(encoded)


@pytest.mark.parametrize("kind", ["clip", "bert", "t5"])
def test_text_is_encoded_beside_the_latents(inputs, tmp_path, kind, capsys):
    write_text_encoder(tmp_path / kind, kind)
    captions = ["a red square", "", "a a a a a a a a a a"]
    half_an_emoji = b'{"caption": "red \\ud83d"}'
    entries = [{"__key__": f"k{i}", "png": png(i), "txt": captions[i % 3].encode()} for i in range(9)]
    entries.append({"__key__": "k9", "png": png(9), "json": half_an_emoji})
    write_tar(tmp_path / "in.tar", entries)
    out = run_encode(inputs, tmp_path / "out", f"wds:{tmp_path / 'in.tar'}", text=str(tmp_path / kind), text_max_tokens=8, flip_copies=True)
    said = capsys.readouterr().out
    assert said.count("--text-max-tokens=8: a caption of 11 tokens is cut, and so are others: 'a a a a a a a a a a'") == 1
    assert "3 captions were longer than 8 tokens and are cut" in said
    manifest = Manifest.load(out)
    assert (manifest.text.width, manifest.text.max_tokens, len(manifest.text.encoder_sha256)) == (12, 8, 64)
    # they move together
    assert manifest.text.encoder == str(tmp_path / kind) and f'"encoder": "../{kind}"' in (out / "manifest.json").read_text()
    encoder = load_text_encoder(str(tmp_path / kind), 8, "cpu")
    for _, meta, tensors in samples(out, "train"):
        alone = encoder([meta["caption"]])[0]  # without padding: the mask hides it
        assert len(alone) == min(len(meta["caption"].split()) + 1, 8)
        torch.testing.assert_close(tensors["text"], alone, atol=2e-2, rtol=2e-2)
    together = dict(zip(("text", "mask"), encoder.padded(captions)))
    for name, tensor in padded(encoder(captions)).items():
        assert torch.equal(together[name], tensor) and len(tensor) == 3
    assert main(["verify", str(out)]) == 0


def test_a_text_encoder_whose_weights_are_elsewhere(tmp_path):
    """As while accelerate offloads it: its hooks send the inputs after the weights."""
    write_text_encoder(tmp_path / "bert", "bert")
    encoder = load_text_encoder(str(tmp_path / "bert"), 8, "cpu")
    wanted, model = encoder(["a red", "a"]), encoder.model

    class Hooked:
        device, config = torch.device("meta"), model.config

        def __call__(self, **inputs):
            return model(**inputs)

    encoder.model = Hooked()
    assert all(torch.equal(a, b) for a, b in zip(encoder(["a red", "a"]), wanted, strict=True))


def test_too_many_tokens_for_a_text_encoder(inputs, tmp_path):
    write_text_encoder(tmp_path / "bert", "bert")
    with pytest.raises(ConfigError, match="at most 16"):
        load_text_encoder(str(tmp_path / "bert"), 17, "cpu")
    write_text_encoder(tmp_path / "roberta", "roberta")
    with pytest.raises(ConfigError, match="at most 14"):
        load_text_encoder(str(tmp_path / "roberta"), 15, "cpu")
    assert len(load_text_encoder(str(tmp_path / "roberta"), 14, "cpu")(["a " * 20])[0]) == 14
    with pytest.raises(DataError, match="readable text encoder"):
        load_text_encoder(str(inputs / "vae"), 8, "cpu")


def test_a_text_encoder_without_a_token_for_nothing(tmp_path):
    """Guidance needs one. It is asked alone, before any caption."""
    write_text_encoder(tmp_path / "bert", "bert")
    encoder = load_text_encoder(str(tmp_path / "bert"), 8, "cpu")
    encoder.tokenizer.backend_tokenizer.post_processor = None  # which ends each caption
    for captions in ([""], ["a red", ""]):
        with pytest.raises(DataError, match="bert' has no token for the caption ''; choose another"):
            encoder(captions)


def test_stock_webdataset_reads_the_shards_without_this_package(encoded, tmp_path):
    program = """
import json, sys
sys.modules["ditmoe_ds"] = None
import webdataset
urls = sys.argv[1:]
found = {s["__key__"]: [s["latent.npy"].sum().item(), s["json"]["label"]] for s in webdataset.WebDataset(urls, shardshuffle=False).decode()}
print(json.dumps(found))
"""
    urls = sorted(map(str, encoded.glob("*.tar")))
    answer = subprocess.run([sys.executable, "-c", program, *urls], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    expected = [sample for split in ("train", "val") for sample in samples(encoded, split)]
    found = json.loads(answer)
    assert found.keys() == {sample.key for sample in expected}
    for sample in expected:
        assert found[sample.key] == [pytest.approx(sample.tensors["latent"].sum().item(), abs=1e-4), sample.meta["label"]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit-vae", "--source", "sample:cats", "--out", "{tmp}/v"], ["--source", "sample:cats", "sample:digits"]),
        (["fit-vae", "--source", "folder:{inputs}/images", "--out", "{tmp}/v", "--factor", "3"], ["--factor", "3", "power of two"]),
        (["fit-vae", "--source", "folder:{inputs}/images", "--out", "{inputs}/images"], ["--out='{inputs}/images'", "holds no VAE"]),
        (["fit-vae", "--source", "folder:{inputs}/images", "--out", "{inputs}/images/ant/0.png"], ["ant/0.png: Not a directory"]),
        (["fit-vae", "--source", "folder:{tmp}/few", "--out", "{tmp}/v"], ["--source='folder:{tmp}/few'", "1 of its 2 images can be read"]),
        (["encode", "--source", "folder:{tmp}/none", "--vae", "v", "--out", "{tmp}/o"], ["{tmp}/none", "no such folder"]),
        (["encode", "--source", "folder:{inputs}/images", "--vae", "{tmp}/none", "--out", "{tmp}/o"], ["{tmp}/none", "no such folder"]),
        (["encode", "--source", "folder:{inputs}/images", "--vae", "{inputs}/images", "--out", "{tmp}/o"], ["AutoencoderKL"]),
        (["encode", "--source", "folder:{inputs}/images", "--vae", "{tmp}/few", "--out", "{tmp}/o"], ["'UNet2DModel'; choose one of Auto"]),
        (["encode", "--source", "folder:{inputs}/images", "--vae", "{tmp}/bare", "--out", "{tmp}/o"], ["{tmp}/bare", "safetensors found"]),
        (["encode", "--source", "folder:{inputs}/images", "--vae", "{inputs}/vae", "--out", "{tmp}/o", "--size", "15"], ["--size", "15"]),
        (["encode", "--source", "folder:{inputs}/images", "--vae", "v", "--out", "{tmp}/o", "--classes", "3"], ["--classes", "3"]),
        (
            ["encode", "--source", "folder:{inputs}/images", "--vae", "{inputs}/vae", "--out", "/dev/null/o"],
            ["/dev/null/o", "cannot write"],
        ),
        (["finalize", "{inputs}/images"], ["{inputs}/images", "not begun by ditmoe-data encode"]),
        (["verify", "{tmp}/none"], ["DIR='{tmp}/none'", "ditmoe-data encode", "ditmoe-data finalize"]),
        (["inspect", "{tmp}/none"], ["SHARD_OR_DIR='{tmp}/none'", "ditmoe-data encode"]),
    ],
)
def test_mistakes_are_told_in_one_line(inputs, tmp_path, capsys, arguments, words):
    places = {"tmp": tmp_path, "inputs": inputs}
    for name, kind in (("few", "UNet2DModel"), ("bare", "AutoencoderKL")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(dict(_class_name=kind)))
    (tmp_path / "few" / "a.png").write_bytes(png())
    (tmp_path / "few" / "b.png").write_bytes(b"broken")
    assert main([argument.format(**places) for argument in arguments]) == 2
    assert_one_line(capsys.readouterr().err, *(word.format(**places) for word in words))
    assert not list(tmp_path.glob("o/*"))


def test_a_vae_may_be_made_where_one_stands(inputs, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["fit-vae", "--source", f"folder:{inputs / 'images'}", "--out", ".", "--size", "16", "--steps", "1", "--batch", "2"]) == 0
    assert load_vae(str(tmp_path / "here"), "cpu") and not list(tmp_path.glob("*.partial"))


def test_an_encoder_that_is_none_does_not_keep_the_folder(inputs, tmp_path, capsys):
    write_text_encoder(tmp_path / "bert", "bert")
    write_tar(tmp_path / "in.tar", [{"__key__": f"k{i}", "png": png(i)} for i in range(9)])
    wanted = ["encode", "--source", f"wds:{tmp_path / 'in.tar'}", "--vae", str(inputs / "vae"), "--out", str(tmp_path / "o")]
    wanted += ["--size", "16", "--text-max-tokens", "8", "--decoders", "0", "--text"]
    assert main([*wanted, str(inputs / "vae")]) == 2
    assert_one_line(capsys.readouterr().err, "readable text encoder")
    assert main([*wanted, str(tmp_path / "bert")]) == 0


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["verify", "https://example.org/latents"], "copy the folder here"),
        (["inspect", "gs://bucket/latents"], "copy the folder here"),
        (["subset", "https://example.org/latents", "--fraction", "0.1", "--out", "o"], "copy the folder here"),
        (["verify", "latents", "--sheet", "sheet.tex"], ".png"),
        (["inspect", "latents", "--sheet", "sheet"], ".png"),
        (["encode", "--source", "s", "--vae", "v", "--out", "o", "--worker", "8/8"], "--worker: '8/8' is not i/n with i from 0 to n - 1"),
    ],
)
def test_arguments_that_cannot_be(arguments, word, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2 and word in capsys.readouterr().err.splitlines()[-1]


def test_ctrl_c_ends_all_in_one_line_and_what_is_done_is_kept(inputs, encoded, tmp_path):
    out = tmp_path / "out"
    wanted = ["encode", "--source", f"folder:{inputs / 'images'}", "--vae", str(inputs / "vae"), "--out", str(out), "--size", "16"]
    wanted += ["--shard-size", "12", "--holdout", "0.3", "--batch", "4", "--decoders", "1"]
    slowly = "import signal, sys, time, data_prep.encode as e; from data_prep.cli import main; add = e._Encoder.add\n"
    slowly += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what a shell starts with & ignores it
    slowly += "e._Encoder.add = lambda *a: (time.sleep(0.5), add(*a)); sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", slowly, *wanted]
    one_thread = os.environ | dict(OMP_NUM_THREADS="1")  # as here: another number rounds differently
    process = subprocess.Popen(command, cwd=ROOT, env=one_thread, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 300
    while not list(out.glob("units/*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "ditmoe-data: encode is interrupted" in error and "Traceback" not in error
    with pytest.raises(ProcessLookupError):  # its decoders, a moment later
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    assert not (out / "manifest.json").exists()
    assert main(wanted) == 0 and contents(out) == contents(encoded)


def test_fit_vae_saves_a_vae_that_encodes(inputs, tmp_path, capsys):
    arguments = ["fit-vae", "--source", f"folder:{inputs / 'images'}", "--out", str(tmp_path / "v"), "--size", "16"]
    arguments += ["--factor", "2", "--latent-channels", "3", "--steps", "3", "--batch", "2"]
    before = os.umask(0o027)
    assert main(arguments) == 0
    os.umask(before)
    out, error = capsys.readouterr()
    assert "PSNR" in out and "\r" not in error and "fit-vae: 100% 3/3" in error and "mse=" in error
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "v").iterdir()} == {0o640}  # colleagues may read it
    assert main(arguments) == 0
    assert "already complete" in capsys.readouterr().out
    assert main([*arguments, "--steps", "4"]) == 2
    assert_one_line(capsys.readouterr().err, "another request (steps 3 -> 4)")
    (tmp_path / "file").write_text("")
    assert main([*arguments[:4], str(tmp_path / "file" / "v"), *arguments[5:]]) == 2
    assert_one_line(capsys.readouterr().err, "/file/v': cannot be written (Not a directory)")
    (tmp_path / "v" / "request.json").write_text("{")
    assert main(arguments) == 2
    assert_one_line(capsys.readouterr().err, "request.json: is damaged")

    items = open_source(f"folder:{inputs / 'images'}").items()
    train = [decode_image(item.image, [(16, 16)]) for item in items if not is_heldout(item.key, 0.1)]
    images = torch.from_numpy(np.stack(train)).permute(0, 3, 1, 2) / 127.5 - 1
    vae = load_vae(str(tmp_path / "v"), "cpu")
    latents, _ = encode_images(vae, images)
    scale = vae.config.scaling_factor
    assert latents.shape[1:] == (3, 8, 8)
    assert (latents * scale).std().item() == pytest.approx(1, rel=1e-3)
    pictures = decode(vae, (latents - 0.5) * scale, scale, 0.5)
    assert (pictures.shape, pictures.dtype) == ((len(images), 16, 16, 3), torch.uint8)
    expected = vae.decode(latents).sample.clamp(-1, 1).permute(0, 2, 3, 1) * 127.5 + 127.5
    assert (pictures - expected).abs().max() <= 0.51
    assert Image.open(tmp_path / "v" / "reconstructions.png").mode == "RGB"
