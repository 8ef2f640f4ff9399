"""Shards, the order of samples, and the loader."""

import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ditmoe_ds.errors import ConfigError, DataError
from ditmoe_ds.latents.format import FORMAT, MEMBER_LIMIT, VERSION, Manifest, Shard, ShardWriter, Split, Splits, index_shard, sha256
from ditmoe_ds.latents.loader import Batch, LatentDataset, LatentLoader
from ditmoe_ds.latents.order import batch_indices, epoch_order

torch.set_num_threads(1)
SHAPE = (2, 3, 4)


def value(i: int) -> np.ndarray:
    return np.full(SHAPE, i, dtype=np.float32) + np.arange(24, dtype=np.float32).reshape(SHAPE) / 100


def write_data(root: Path, sizes: tuple[int, ...] = (7, 6)) -> Manifest:
    """Training shards of the given sizes; sample i is ``value(i)`` with label i % 3."""
    shards, samples = [], iter(range(sum(sizes)))
    for number, size in enumerate(sizes):
        path = root / f"train-{number:06d}.tar"
        with ShardWriter(path) as shard:
            for i in itertools.islice(samples, size):
                shard.write(f"k{i}", value(i), {"label": i % 3, "class": "abc"[i % 3], "source": str(i)})
        shards.append(Shard(path.name, size, path.stat().st_size, sha256(path)))
    Manifest(
        root=str(root), format=FORMAT, version=VERSION, source="test", vae="org/vae", vae_sha256=None, scaling_factor=2.0,
        shift_factor=0.5, downsample=4, image_size=16, shape=SHAPE, dtype="float32", mean=(0.0, 0.0), std=(1.0, 1.0), num_classes=3,
        class_names=("a", "b", "c"), splits=Splits(train=Split(sum(sizes), tuple(shards)), val=Split(0, ())),
    ).save()  # fmt: skip
    return Manifest.load(root)


@pytest.fixture
def dataset(tmp_path) -> LatentDataset:
    return LatentDataset(write_data(tmp_path), "train")


# the format


def test_samples_come_back_scaled(dataset):
    assert len(dataset) == 13
    for i in (0, 6, 7, 12):  # both sides of the border between shards
        latent, label = dataset[i]
        assert torch.equal(latent, (torch.from_numpy(value(i)) - 0.5) * 2.0)
        assert (label, dataset.key(i)) == (i % 3, f"k{i}")


def test_the_manifest_comes_back(tmp_path):
    manifest = write_data(tmp_path)
    assert Manifest.load(tmp_path / "manifest.json") == manifest
    manifest.verify()
    with pytest.raises(DataError, match="choose train or val"):
        manifest.split("test")
    with pytest.raises(DataError, match="val has no samples"):
        LatentDataset(manifest, "val")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "manifest.json").unlink(), "no readable manifest"),
        (lambda root: (root / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda root: edit(root, version=2), "reads"),
        (lambda root: edit(root, dtype="float8"), "dtype='float8'"),
        (lambda root: edit(root, splits={"train": {"samples": 0, "shards": []}}), "splits.val.samples"),
        (lambda root: (root / "train-000001.tar").unlink(), r"train-000001\.tar: missing"),
        (lambda root: (root / "train-000000.tar").write_bytes(b"short"), "5 bytes, the manifest says"),
    ],
)
def test_a_damaged_folder_does_not_load(tmp_path, damage, message):
    write_data(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        Manifest.load(tmp_path)


def edit(root: Path, **changes) -> None:
    tree = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**tree, **changes}))


def test_a_shard_outside_the_folder_does_not_load(tmp_path):
    (tmp_path / "data").mkdir()
    manifest = write_data(tmp_path / "data")
    shard = {"name": "../x.tar", "samples": 1, "bytes": 1, "sha256": ""}
    edit(Path(manifest.root), splits={"train": {"samples": 1, "shards": [shard]}, "val": {"samples": 0, "shards": []}})
    (tmp_path / "x.tar").write_bytes(b"x")
    with pytest.raises(DataError, match="outside the folder"):
        Manifest.load(manifest.root)


def test_a_writer_that_fails_leaves_no_shard(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "x.tar") as shard:
        shard.write("k", value(0), {"label": 0})
        raise RuntimeError
    assert not (tmp_path / "x.tar").exists()


def member(name: str, size: int = 0, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for field, content in fields.items():
        setattr(info, field, content)
    return info


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (member("../k.json"), "points outside"),
        (member("a/../../k.json"), "points outside"),
        (member("/etc/k.json"), "points outside"),
        (member("k.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "no regular file"),
        (member("k.json", type=tarfile.LNKTYPE, linkname="x"), "no regular file"),
        (member("k.json", type=tarfile.FIFOTYPE), "no regular file"),
        (member("k.latent.npy", MEMBER_LIMIT + 1), "more than"),
        (member("k.pickle"), "not part of the format"),
        (member("k.json"), "lacks its"),
    ],
)
def test_unsafe_or_odd_members_are_refused(tmp_path, info, message):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    with pytest.raises(DataError, match=message):
        index_shard(path)


def test_a_file_that_is_no_tar_is_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"x" * 2048)
    with pytest.raises(DataError, match="not a readable tar"):
        index_shard(tmp_path / "x.tar")


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
    manifest = write_data(tmp_path)
    path = tmp_path / "train-000000.tar"
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new, 1))
    with pytest.raises(DataError, match=r"train-000000\.tar"):
        LatentDataset(manifest, "train")[0]
    with pytest.raises(DataError, match="sha256"):
        manifest.verify()


# the order


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_only():
    order = epoch_order(1, 2, 50).clone()
    assert sorted(order.tolist()) == list(range(50))
    for other in (epoch_order(1, 3, 50), epoch_order(2, 2, 50), epoch_order(2, 1, 50)):
        assert not torch.equal(order, other)
    torch.manual_seed(123)
    epoch_order.cache_clear()
    assert torch.equal(order, epoch_order(1, 2, 50))
    assert epoch_order(0, 0, 8).tolist() == [4, 1, 6, 2, 3, 7, 0, 5]  # a saved run must find the same order in a later release


def test_batches_run_across_epochs():
    epochs, samples = batch_indices(seed=0, consumed=8, count=25, n=10)
    assert epochs.tolist() == [0] * 2 + [1] * 10 + [2] * 10 + [3] * 3
    whole = torch.cat([epoch_order(0, epoch, 10) for epoch in range(4)])
    assert torch.equal(samples, whole[8:33])


# the loader


def take(dataset, count: int, **changes) -> list[Batch]:
    settings = {"seed": 5, "global_batch": 8, "accumulation": 1, "rank": 0, "world": 1, **changes}
    loader = LatentLoader(dataset, **settings)
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


def visits(batches: list[Batch]) -> list[tuple[int, int]]:
    return [pair for batch in batches for pair in zip(batch.epochs.tolist(), batch.samples.tolist())]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_step_sees_the_same_samples_on_any_number_of_ranks(dataset, world, accumulation):
    steps = 4  # 32 visits of 13 samples: crosses two epochs
    ranks = [take(dataset, steps * accumulation, rank=rank, world=world, accumulation=accumulation) for rank in range(world)]
    seen = [pair for micro in zip(*ranks) for pair in visits(list(micro))]
    epochs, samples = batch_indices(5, 0, 8 * steps, 13)
    assert seen == list(zip(epochs.tolist(), samples.tolist()))
    for batch in ranks[0]:
        assert batch.latents.shape == (8 // accumulation // world, *SHAPE)
        for latent, label, i in zip(batch.latents, batch.labels, batch.samples.tolist()):
            assert torch.equal(latent, dataset[i][0]) and label == i % 3


def test_a_resumed_loader_continues_exactly(dataset):
    whole = take(dataset, 10, accumulation=2, rank=1, world=2)
    resumed = take(dataset, 4, accumulation=2, rank=1, world=2, consumed=3 * 8)
    assert visits(resumed) == visits(whole[6:])
    # also on another number of ranks
    assert visits(take(dataset, 2, consumed=3 * 8)) == visits(take(dataset, 5))[24:]


def test_the_loader_draws_no_random_numbers(dataset):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    take(dataset, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_prepare_runs_on_each_batch(dataset):
    assert take(dataset, 2, prepare=lambda batch: batch.samples.sum().item()) == [b.samples.sum().item() for b in take(dataset, 2)]


def test_an_error_in_the_thread_reaches_the_consumer(dataset):
    def fail(batch: Batch) -> None:
        raise ZeroDivisionError("in prepare")

    loader = LatentLoader(dataset, seed=0, global_batch=2, accumulation=1, rank=0, world=1, prepare=fail)
    with pytest.raises(ZeroDivisionError, match="in prepare"):
        next(loader)
    assert list(loader) == []


def test_close_stops_the_thread(dataset):
    loader = LatentLoader(dataset, seed=0, global_batch=2, accumulation=1, rank=0, world=1)
    next(loader)
    loader.close()
    assert not loader._thread.is_alive()
    assert list(loader) == []


def test_batches_that_do_not_divide_are_refused(dataset):
    with pytest.raises(ConfigError, match="global_batch=6"):
        take(dataset, 1, global_batch=6, accumulation=2, world=2)
