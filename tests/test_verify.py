"""ditmoe-data verify, inspect and subset, on a tiny random VAE and a folder of noise."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from encoding import assert_one_line, contents, flip_bit, png, run_encode, samples, write_tar
from latents import write_latents
from PIL import Image
from processes import ROOT
from safetensors.torch import load_file, save_file

from data_prep import verify as verifying
from data_prep.cli import main
from ditmoe_ds.latents.images import save_pairs
from ditmoe_ds.latents.manifest import Manifest
from ditmoe_ds.latents.vae import load_vae


def test_verify_finds_one_flipped_bit(inputs, tmp_path, capsys):
    run_encode(inputs, tmp_path / "out")
    assert main(["verify", str(tmp_path / "out")]) == 0
    flip_bit(tmp_path / "out" / "train-000000.tar")
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out")]) == 2
    assert_one_line(capsys.readouterr().err, "train-000000.tar", "sha256")


def test_verify_finds_a_key_that_is_there_twice(inputs, tmp_path, capsys):
    for name in "ab":
        write_tar(tmp_path / f"in-{name}.tar", [{"__key__": key, "png": png(i)} for i, key in enumerate((name, "same"))])
    out = run_encode(inputs, tmp_path / "out", f"wds:{tmp_path}/in-{{a,b}}.tar", holdout=0)
    assert main(["verify", str(out)]) == 2
    assert_one_line(capsys.readouterr().err, "1 samples have the key of another", "'same' in train-000000.tar, train-000001.tar")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m: replace(m, splits=replace(m.splits, val=replace(m.splits.val, samples=3))), ["split val do not add up to its number"]),
        (lambda m: replace(m, class_histogram=(1, 1, 2)), ["training samples of each class are not what the manifest says"]),
        (lambda m: replace(m, num_classes=2), ["train-000000.tar: key 'train000002' has label 2, the manifest has 2 classes"]),
        (lambda m: replace(m, text=replace(m.text, empty_sha256="")), ["empty.text.safetensors: cannot be used (sha256 differs"]),
    ],
)
def test_a_manifest_that_tells_of_other_samples(tmp_path, capsys, change, words):
    out = write_latents(tmp_path, train=5, val=2, classes=3, text=6)
    assert main(["verify", out]) == 0
    change(Manifest.load(out)).save()
    assert main(["verify", out]) == 2
    assert_one_line(capsys.readouterr().err, out, *words)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_verify_names_the_first_damage(workers, tmp_path, capsys, monkeypatch):
    """However many processes look for it."""
    monkeypatch.setattr(verifying, "FEWEST", 1)
    out = write_latents(tmp_path / "out", train=500, val=20, per_shard=20)
    assert main(["verify", out, "--workers", workers]) == 0
    assert "intact, 500 training and 20 held-out samples" in capsys.readouterr().out
    for name in ("val-000000.tar", "train-000020.tar", "train-000019.tar"):
        flip_bit(tmp_path / "out" / name)
    assert main(["verify", out, "--workers", workers]) == 2
    assert_one_line(capsys.readouterr().err, "train-000019.tar", "sha256")


@pytest.mark.parametrize("signalled, code, words", [("all", 130, "verify is interrupted"), ("one", 2, "--workers=2: one of these")])
def test_the_processes_of_verify_end_together(signalled, code, words, tmp_path):
    """After Ctrl-C, and after one was killed."""
    out = write_latents(tmp_path / "out", train=60, val=2, per_shard=2)
    slowly = "import signal, sys, time, data_prep.verify as v; from data_prep.cli import main; v.FEWEST = 1\n"
    slowly += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what a shell starts with & ignores it
    slowly += "v.Progress.update = lambda *_: time.sleep(1); sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", slowly, "verify", out, "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline, server = time.monotonic() + 300, None
    while not server and time.monotonic() < deadline:
        time.sleep(0.05)
        server = next((child for child in psutil.Process(process.pid).children() if len(child.children()) == 2), None)
    if signalled == "all":
        os.killpg(process.pid, signal.SIGINT)
    else:
        server.children()[0].kill()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == code and words in error and "Traceback" not in error
    with pytest.raises(ProcessLookupError):  # its processes, a moment later
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)


def test_verify_finds_values_that_are_not_finite(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda tensor: torch.ones_like(tensor, dtype=torch.bool))
    monkeypatch.setattr("data_prep.encode.encode_images", lambda vae, images: (torch.full((len(images), 2, 8, 8), torch.inf), None))
    run_encode(inputs, tmp_path / "out")
    monkeypatch.undo()
    assert main(["verify", str(tmp_path / "out")]) == 2
    assert "not finite" in capsys.readouterr().err


def test_a_sheet_that_cannot_be_written_is_told_before_all_is_read(encoded, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(verifying, "_check", lambda *_: pytest.fail("a shard was read"))
    assert main(["verify", str(encoded), "--sheet", str(tmp_path / "file" / "sheet.png")]) == 2
    assert_one_line(capsys.readouterr().err, str(tmp_path / "file"), "File exists")


def test_an_image_stands_above_its_decoded_latent_in_the_last_row_too(tmp_path):
    images = [torch.full((4, 4, 3), i, dtype=torch.uint8) for i in range(10)]
    save_pairs(images, [image + 100 for image in images], tmp_path / "pairs.png", columns=8)
    tiles = np.array(Image.open(tmp_path / "pairs.png"))[::6, ::6, 0]
    assert (tiles[0] + 100 == tiles[1]).all()
    assert tiles[2:].tolist() == [[8, 9, *[255] * 6], [108, 109, *[255] * 6]]


def test_sheets_and_tables(inputs, encoded, tmp_path, capsys):
    assert main(["verify", str(encoded), "--sheet", str(tmp_path / "a.png")]) == 0
    manifest = Manifest.load(encoded)
    count = min(manifest.splits.val.samples, 16)
    said = capsys.readouterr().out
    assert f"{tmp_path / 'a.png'}: 8 images" in said
    assert Image.open(tmp_path / "a.png").size == (8 * 18 - 2, -(-count // 8) * 36 - 2)
    images, after = np.array(Image.open(tmp_path / "a.png")).astype(float)[[[*range(16)], [*range(18, 34)]]]
    errors = [np.square((images - after)[:, 18 * i : 18 * i + 16]).mean() for i in range(count)]
    psnr = np.mean([10 * np.log10(255**2 / error) for error in errors])
    assert abs(float(said.split("PSNR ")[1].split()[0]) - psnr) < 0.06
    assert main(["verify", str(encoded), "--sheet", str(tmp_path / "b.png"), "--source", "sample:digits"]) == 2
    assert_one_line(capsys.readouterr().err, "sample:digits", "no image of key")
    shutil.copytree(inputs / "images", tmp_path / "images")
    for file in tmp_path.glob("images/*/*"):
        file.write_bytes(b"broken")
    assert main(["verify", str(encoded), "--sheet", str(tmp_path / "b.png"), "--source", f"folder:{tmp_path}/images"]) == 2
    assert_one_line(capsys.readouterr().err, f"--source='folder:{tmp_path}/images': the image of key", "cannot be read (not an image")
    assert main(["inspect", str(encoded)]) == 0
    assert main(["inspect", str(encoded / "val-000001.tar"), "--sheet", str(tmp_path / "c.png")]) == 0
    text = capsys.readouterr().out
    for number, name in enumerate(("ant", "cat")):
        assert f"{number:>5}{manifest.class_histogram[number]:>18}  {name}\n" in text
    for words in ("train, val", "(2, 8, 8) float32, mean", "2, of", "bytes", samples(encoded, "train")[0].key):
        assert words in text
    assert Image.open(tmp_path / "c.png").mode == "RGB"
    assert main(["inspect", str(encoded / "none.tar")]) == 2


def test_a_table_shows_what_a_terminal_would_obey(inputs, tmp_path, capsys):
    """A title, a deleted line, an error of ours that is none: whoever made the folder wrote its texts."""
    harmful = "Käse 木 \x1b]0;owned\x07\x1b[2K\nerror: nothing"
    write_tar(tmp_path / "in.tar", [{"__key__": f"{i}", "png": png(i), "cls": b"0", "txt": harmful.encode()} for i in range(3)])
    out = run_encode(inputs, tmp_path / "out", f"wds:{tmp_path}/in.tar", holdout=0)
    replace(Manifest.load(out), class_names=(f"class {harmful}",), source=harmful).save()
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count(r"Käse 木 \x1b]0;owned\x07\x1b[2K\nerror: nothing") == 5  # source, three captions, class
    assert said.replace("\n", "").isprintable() and "\nerror" not in said
    assert main(["verify", f"{out}/\x1b[2K"]) == main(["inspect", str(out), "--sheet", f"{out}/manifest.json/\x1b[2K/a.png"]) == 2
    assert "\x1b" not in (said := capsys.readouterr().err) and said.count(r"/\x1b[2K") == 2


def test_subsets_are_nested_and_the_same_each_time(inputs, encoded, tmp_path, capsys):
    keys = {}
    for fraction in ("0.3", "0.6"):
        assert main(["subset", str(encoded), "--fraction", fraction, "--out", str(tmp_path / fraction), "--shard-size", "5"]) == 0
        assert main(["verify", str(tmp_path / fraction)]) == 0
        keys[fraction] = {sample.key for split in ("train", "val") for sample in samples(tmp_path / fraction, split)}
    assert 4 < len(keys["0.3"]) < len(keys["0.6"]) < 36 and keys["0.3"] < keys["0.6"]
    assert main(["subset", str(encoded), "--fraction", "0.6", "--out", str(tmp_path / "again"), "--shard-size", "5"]) == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "0.6")
    small = Manifest.load(tmp_path / "0.6")
    latents = np.stack([sample.tensors["latent"] for sample in samples(tmp_path / "0.6", "train")])
    np.testing.assert_allclose(small.std, latents.std((0, 2, 3)), rtol=1e-4)
    assert load_vae(small.vae, "cpu")
    capsys.readouterr()
    assert main(["subset", str(encoded), "--fraction", "0.6", "--out", str(tmp_path / "again")]) == 2
    assert main(["subset", str(encoded), "--fraction", "0.0", "--out", str(tmp_path / "nothing")]) == 2
    assert "leaves none" in capsys.readouterr().err


def test_what_a_folder_says_of_its_source_is_not_run(inputs, tmp_path, capsys, monkeypatch):
    """A tar's URL may be a shell's pipe, a data set's any server's, and whoever made the folder wrote it."""
    out = run_encode(inputs, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ftp:/127.0.0.1/x").mkdir(parents=True)  # as that folder may be here, too
    monkeypatch.setattr("data_prep.verify.open_source", lambda *_, **__: pytest.fail("it is opened"))
    for source in ("wds:pipe:touch was_run", "hf:ftp://127.0.0.1/x", f"hf:{tmp_path}/gone", "folder:.", "other:/"):
        replace(Manifest.load(out), source=source).save()
        assert main(["verify", str(out), "--sheet", str(tmp_path / "a.png")]) == 2
        assert_one_line(capsys.readouterr().err, "--source=None", source, "which is no folder here; say where")


def test_a_vae_that_was_changed_meanwhile_is_refused(inputs, tmp_path, capsys):
    shutil.copytree(inputs / "vae", tmp_path / "vae")
    out = run_encode(inputs, tmp_path / "out", vae=str(tmp_path / "vae"))
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: 1.5 * tensor for name, tensor in tensors.items()}, file)
    assert main(["inspect", str(out), "--sheet", str(tmp_path / "a.png")]) == 2
    assert_one_line(capsys.readouterr().err, str(tmp_path / "vae"), "not those that the latents were made with")


def test_a_subset_of_damaged_samples_is_refused(inputs, tmp_path, capsys):
    flip_bit(run_encode(inputs, tmp_path / "out") / "train-000000.tar")
    assert main(["subset", str(tmp_path / "out"), "--fraction", "0.9", "--out", str(tmp_path / "some")]) == 2
    assert_one_line(capsys.readouterr().err, "train-000000.tar", "sha256")
    assert not (tmp_path / "some").exists()
