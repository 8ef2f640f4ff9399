"""The manifest and the tars of a folder of latents."""

import hashlib
import io
import json
import os
import tarfile
import threading
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
from latents import SHAPE, write_latents, write_values

from ditmoe_ds.errors import DataError
from ditmoe_ds.latents.loader import LatentDataset
from ditmoe_ds.latents.manifest import Manifest, Text, weights_sha256
from ditmoe_ds.latents.tars import ShardReader, ShardWriter


def test_the_manifest_comes_back(tmp_path):
    manifest = write_values(tmp_path)
    assert Manifest.load(tmp_path / "manifest.json") == manifest
    for shard in manifest.shards():
        manifest.verify(shard)
    with pytest.raises(DataError, match="val has no samples; encode again"):
        LatentDataset([manifest], "val")
    with pytest.raises(DataError, match="val has no samples of the commonest shape, 4 x 9 x 9; encode again"):
        LatentDataset([manifest], "val", shape=(4, 9, 9))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "manifest.json").unlink(), "no readable manifest"),
        (lambda root: (root / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda root: (root / "manifest.json").write_text("[" * 100_000), "not valid JSON .*recursion"),
        (lambda root: edit(root, version=1), "reads"),
        (lambda root: edit(root, dtype="float8"), "dtype='float8'"),
        (lambda root: edit(root, mean=[0.0] * 4), r"shape \[2, 3, 4\]"),
        (lambda root: edit(root, splits={"train": {"samples": 0, "shards": []}}), "splits.val.samples"),
        (
            lambda root: (root / "manifest.json").write_text((root / "manifest.json").read_text().replace("        2,\n", "", 1)),
            r"shape \[3, 4\]",
        ),
        (lambda root: (root / "train-000001.tar").unlink(), r"train-000001\.tar: missing"),
        (lambda root: (root / "train-000000.tar").write_bytes(b"short"), "5 bytes, the manifest says"),
    ],
)
def test_a_damaged_folder_does_not_load(tmp_path, damage, message):
    write_values(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        Manifest.load(tmp_path)


def test_the_digest_is_that_of_earlier_releases(tmp_path):
    """By which a run knows its data again. It is made without ``asdict``, which copies every value."""
    manifest = replace(write_values(tmp_path), text=Text("encoder", "0" * 64, 12, 16, "1" * 64))
    tree = asdict(replace(manifest, text=replace(manifest.text, encoder="")))
    del tree["root"], tree["vae"]
    assert manifest.digest == hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def test_shards_are_looked_for_by_shares(tmp_path):
    """What is missing is missed by one of the processes that share the work."""
    write_values(tmp_path, (3, 3, 3, 3, 1))
    (tmp_path / "train-000003.tar").unlink()
    Manifest.load(tmp_path, share=slice(0, None, 2))
    with pytest.raises(DataError, match=r"train-000003\.tar: missing"):
        Manifest.load(tmp_path, share=slice(1, None, 2))


def test_shards_are_looked_for_several_at_a_time(tmp_path, monkeypatch):
    """A file server takes about a millisecond for each."""
    write_latents(tmp_path, train=16, val=0, per_shard=1)
    together, stat = threading.Barrier(16, timeout=20), os.stat

    def patient(path, **options):
        if str(path).endswith(".tar"):
            together.wait()
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", patient)
    assert len(Manifest.load(tmp_path).shards()) == 16


def edit(root: Path, **changes) -> None:
    tree = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**tree, **changes}))


def test_a_shard_outside_the_folder_does_not_load(tmp_path):
    (tmp_path / "data").mkdir()
    manifest = write_values(tmp_path / "data")
    shard = {"name": "../x.tar", "samples": 1, "bytes": 1, "sha256": "", "shape": SHAPE}
    edit(Path(manifest.root), splits={"train": {"samples": 1, "shards": [shard]}, "val": {"samples": 0, "shards": []}})
    (tmp_path / "x.tar").write_bytes(b"x")
    with pytest.raises(DataError, match="outside the folder"):
        Manifest.load(manifest.root)


def test_folders_beside_the_data_move_with_it_and_others_stay(tmp_path):
    (tmp_path / "home" / "data").mkdir(parents=True)
    near, far = str(tmp_path / "home" / "encoder"), str(tmp_path / "site-packages" / "vae")
    manifest = write_values(tmp_path / "home" / "data")
    manifest = replace(manifest, vae=far, vae_sha256="a", text=Text(near, "b", 5, 7, "c"))
    manifest.save()
    (tmp_path / "deep").mkdir()
    (tmp_path / "home").rename(tmp_path / "deep" / "moved")
    moved = Manifest.load(tmp_path / "deep" / "moved" / "data")
    assert (moved.vae, moved.text.encoder) == (far, str(tmp_path / "deep" / "moved" / "encoder"))
    assert manifest.digest == moved.digest == replace(moved, vae="/elsewhere").digest, "a run goes on wherever folders lie"
    assert len({moved.digest, *(replace(moved, **{key: "d"}).digest for key in ("vae_sha256", "source"))}) == 3


def test_a_models_digest_is_the_same_on_every_file_system(tmp_path, monkeypatch):
    """Which lists a folder's files in any order."""
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.safetensors").write_text(name)
    (tmp_path / "config.json").write_text("{}")
    listed = list(tmp_path.glob("*.safetensors"))
    for order in (listed, listed[::-1]):
        monkeypatch.setattr(Path, "glob", lambda folder, pattern, order=order: iter(order))
        assert weights_sha256(str(tmp_path)) == hashlib.sha256(b"abc").hexdigest()
    assert weights_sha256("org/name") is None


def test_a_writer_that_fails_leaves_no_shard(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "x.tar") as shard:
        shard.write("k", {"label": 0}, latent=torch.zeros(SHAPE))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda starts: starts[::-1], "does not fit"),
        (lambda starts: starts - 512, "does not fit"),
        (lambda starts: starts + 10**6, "does not fit"),
        (lambda starts: starts.astype(np.float64), "does not hold the starts"),
        (lambda starts: starts[:0], "does not hold the starts"),
        (lambda starts: starts[:-1], "6 samples, the manifest says 7.*data.skip_shards"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, change, message):
    manifest = write_values(tmp_path)
    path = tmp_path / "train-000000.index.npy"
    np.save(path, change(np.load(path)))
    with pytest.raises(DataError, match=message):
        LatentDataset([manifest], "train")[0]


def member(name: str, content: bytes = b"", **fields) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


JSON = member("k.json", b'{"label": 0}')
NPY = io.BytesIO()
np.save(NPY, np.zeros(SHAPE, dtype=np.float32))
LATENT = member("k.latent.npy", NPY.getvalue())


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (member("../k.json"), "not part of the format"),
        (member("/etc/k.json"), "not part of the format"),
        (member("k.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "not part of the format"),
        (member("k.json", type=tarfile.FIFOTYPE), "not part of the format"),
        (JSON + JSON, "not part of the format"),
        (JSON, "the manifest says"),
        (JSON + LATENT + member("k.pickle"), "the manifest says"),
        (JSON + LATENT.replace(b"k.", b"l.", 1), "bad checksum"),
        (JSON + member("l.latent.npy", NPY.getvalue()), r"of keys k, l"),
        (JSON + LATENT[:512], "of which 0 are there"),
        (member("k.json", size=-512) + LATENT, "-512 bytes"),
        (b"x" * 512, "damaged"),
        (bytes(512), "end of file header"),
    ],
)
def test_unsafe_or_odd_members_are_refused(tmp_path, sample, message):
    manifest = write_values(tmp_path)
    (tmp_path / "x.tar").write_bytes(sample)
    np.save(tmp_path / "x.index.npy", np.array([0, len(sample)]))
    with pytest.raises(DataError, match=message):
        ShardReader(tmp_path / "x.tar", manifest, SHAPE).read(0)


def test_members_as_they_should_be(tmp_path):
    manifest = write_values(tmp_path)
    (tmp_path / "x.tar").write_bytes(JSON + LATENT)
    np.save(tmp_path / "x.index.npy", np.array([0, len(JSON + LATENT)]))
    assert ShardReader(tmp_path / "x.tar", manifest, SHAPE).read(0).key == "k"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_std_and_text_come_back(tmp_path, dtype):
    manifest = replace(write_values(tmp_path), dtype=dtype, store="mean+std", text=Text("org/encoder", None, 5, 7, ""))
    kind = getattr(torch, dtype)
    latent, std, text = torch.randn(SHAPE).to(kind), torch.rand(SHAPE).to(kind), torch.randn(3, 5).bfloat16()
    with ShardWriter(tmp_path / "x.tar") as shard:
        shard.write("k", {"label": None, "caption": "an ant"}, latent=latent, std=std, text=text)
        shard.write("m", {"label": None}, latent=latent, std=std, text=torch.zeros(8, 5).bfloat16())
    reader = ShardReader(tmp_path / "x.tar", manifest, SHAPE)
    sample = reader.read(0)
    assert (sample.key, sample.meta) == ("k", {"label": None, "caption": "an ant"})
    for name, tensor in dict(latent=latent, std=std, text=text).items():
        assert torch.equal(sample.tensors[name], tensor) and sample.tensors[name].dtype == tensor.dtype
    with pytest.raises(DataError, match=r"text has shape \[8, 5\]"):
        reader.read(1)
    if dtype == "bfloat16":
        with pytest.raises(DataError, match=r"latent has shape \[2, 3, 4\], not the manifest's"):
            ShardReader(tmp_path / "x.tar", manifest, (2, 4, 3)).read(0)
    plain = next(iter(webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)))
    assert plain["__key__"] == "k" and torch.equal(safetensors.torch.load(plain["text.safetensors"])["text"], text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\x93NUMPY", b"\x93NUMPX"),
        (b"'shape': (2, 3, 4)", b"'shape': (2, 3, 9)"),
        (b"'shape': (2, 3, 4)", b"'shape': (2, 3, 4("),
        (b"'descr': '<f4'", b"'descr': '|O8'"),
        (b'"label": 0', b'"label": 9'),
        (b'"label": 0', b'"label": x'),
        (b'"label": 0', b'"lebal": 0'),
    ],
)
def test_a_damaged_sample_is_refused(tmp_path, old, new):
    manifest = write_values(tmp_path)
    path = tmp_path / "train-000000.tar"
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new, 1))
    with pytest.raises(DataError, match=r"train-000000\.tar"):
        LatentDataset([manifest], "train")[0]
    with pytest.raises(DataError, match="sha256"):
        manifest.verify(manifest.shards()[0])
