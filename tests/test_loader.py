"""The order of samples, the data set, and the loader."""

import errno
import multiprocessing
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from latents import SHAPE, value, write_latents, write_values

from ditmoe_ds.errors import ConfigError, DataError
from ditmoe_ds.latents import remote, tars
from ditmoe_ds.latents.loader import Batch, DataConfig, LatentDataset, LatentLoader, MixConfig
from ditmoe_ds.latents.manifest import Manifest, Shard, Split, Splits, sha256
from ditmoe_ds.latents.order import BucketOrder, Order
from ditmoe_ds.latents.tars import ShardWriter

HERE = DataConfig("unused", workers=0)


@pytest.fixture
def dataset(tmp_path) -> LatentDataset:
    return LatentDataset([write_values(tmp_path)], "train")


# the order


def at(order, first, count):
    epochs, samples = order.at(first, count)
    return list(zip(epochs.tolist(), samples.tolist()))


@pytest.mark.parametrize("window", [1, 7, 64, 1000])
def test_an_epoch_is_a_permutation_whatever_the_window(window):
    sizes = [10, 3, 20, 0, 17]
    visits = at(Order([sizes], [1], 5, window), 0, 150)
    for epoch in range(3):
        assert sorted(visits[50 * epoch : 50 * (epoch + 1)]) == [(epoch, i) for i in range(50)]
    assert [i for _, i in visits[:50]] != [i for _, i in visits[50:100]]
    assert at(Order([sizes], [1], 6, window), 0, 50) != visits[:50]


def test_the_order_is_the_one_saved_runs_have():
    torch.manual_seed(123)
    assert [i for _, i in at(Order([[3, 3, 2]], [1], 0, 16), 0, 8)] == [3, 4, 7, 6, 1, 0, 2, 5]
    assert [i for _, i in at(Order([[3, 3, 2]], [1], 0, 4), 0, 8)] == [3, 6, 5, 4, 7, 0, 2, 1]
    mix = Order([[3, 3], [3, 3]], [1, 2], 0, 16)
    assert [i for _, i in at(mix, 0, 9)] == [0, 7, 10, 11, 1, 8, 2, 9, 6]
    buckets = BucketOrder([mix, Order([[4], [2]], [1, 2], 0, 16)], 2, 0)
    steps = (0, 1, 2, 3, 10_000, 10_001, 10_002, 10_003)  # of two blocks
    assert [i for step in steps for _, i in at(buckets, 2 * step, 2)] == [0, 7, 10, 11, 1, 8, 12, 16, 6, 10, 5, 7, 11, 8, 5, 6]


def test_a_window_spans_few_shards():
    order = Order([[100] * 50], [1], 0, 300)
    for window in range(16):
        shards = {i // 100 for _, i in at(order, 300 * window, 300)}
        assert len(shards) == 3


@pytest.mark.parametrize("sets, weights", [([[7, 6]], [1]), ([[7, 6], [4, 4, 3]], [1, 5])])
def test_the_order_is_a_function_of_the_position(sets, weights):
    order = Order(sets, weights, 3, 5)
    whole = at(order, 0, 200)
    for first in (0, 1, 12, 13, 97):
        for count in (1, 6, 40):
            assert at(order, first, count) == whole[first : first + count]


def test_a_mix_keeps_its_weights_and_its_epochs():
    visits = at(Order([[7, 6], [4, 4, 3]], [1, 5], 3, 5), 0, 6 * 26)
    for block in range(26):
        assert sum(i < 13 for _, i in visits[6 * block : 6 * block + 6]) == 1
    first = [visit for visit in visits if visit[1] < 13]
    assert sorted(first) == [(epoch, i) for epoch in range(2) for i in range(13)]
    second = [visit for visit in visits if visit[1] >= 13]
    assert sorted(second[:110]) == [(epoch, 13 + i) for epoch in range(10) for i in range(11)]
    places = {[i < 13 for _, i in visits[6 * block : 6 * block + 6]].index(True) for block in range(26)}
    assert len(places) > 3, "the place in a block is not drawn"


# the data set and the loader


def test_samples_come_back_scaled(dataset):
    assert len(dataset) == 13
    for i in (0, 6, 7, 12):  # both sides of the border between shards
        sample = dataset[i]
        assert torch.equal(sample.latent, (value(i) - 0.5) * 2.0) and sample.std is None
        assert (sample.label, dataset.key(i)) == (i % 3, f"k{i}")


def test_a_shard_is_opened_once_for_all_its_samples_in_a_window(tmp_path, monkeypatch):
    """And again after an error: a file server that was restarted does not know it any more."""
    dataset, opened, real = LatentDataset([write_values(tmp_path)], "train"), [], os.pread

    def count(path, *mode, **options):
        opened.append(path.name)
        return open(path, *mode, **options)

    def stale(*arguments):
        monkeypatch.setattr(os, "pread", real)
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(tars, "open", count, raising=False)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    for i in (*range(13), 0, 12, 3):
        assert torch.equal(dataset[i].latent, (value(i) - 0.5) * 2.0)
    assert opened == ["train-000000.tar", "train-000001.tar"]
    monkeypatch.setattr(os, "pread", stale)
    assert dataset.key(4) == "k4" and opened[2:] == ["train-000000.tar"]


def test_no_more_shards_stay_open_than_a_process_may_hold(tmp_path):
    dataset = LatentDataset([write_values(tmp_path, [1] * 80)], "train")
    assert [dataset.key(i) for i in range(80)] == [f"k{i}" for i in range(80)]
    held = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{number}")]
    assert 0 < sum(str(tmp_path) in path for path in held) <= 64


def test_a_few_samples_are_from_everywhere(tmp_path):
    """Shards of a folder of images are sorted by class."""
    few = (dataset := LatentDataset([write_values(tmp_path, (60, 40))], "train")).spread(10)
    assert sum(i < 50 for i in few) in range(3, 8) and dataset.spread(100)[:10] == few and sorted(dataset.spread(200)) == list(range(100))


def test_a_few_of_very_many_samples_take_no_memory_for_the_rest():
    class Many:
        def __len__(self):
            return 10**15  # a permutation of which no machine holds

    few = LatentDataset.spread(Many(), 1000)
    assert len(set(few)) == 1000 and min(few) < 10**13 and max(few) > 99 * 10**13


def take(dataset, count: int, config=HERE, **changes) -> list[Batch]:
    settings = {"seed": 5, "global_batch": 8, "accumulation": 1, "rank": 0, "world": 1, **changes}
    loader = LatentLoader(dataset, config, **settings)
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
    assert seen == at(Order(dataset.sets[SHAPE], [1], 5, 16384), 0, 8 * steps)
    for batch in ranks[0]:
        assert batch.latents.shape == (8 // accumulation // world, *SHAPE)
        for latent, label, i in zip(batch.latents, batch.labels, batch.samples.tolist()):
            assert torch.equal(latent, dataset[i].latent) and label == i % 3


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_resumed_loader_continues_exactly(dataset, workers):
    config = DataConfig("unused", workers=workers, prefetch=2)
    whole = take(dataset, 10, accumulation=2, rank=1, world=2)
    resumed = take(dataset, 4, config, accumulation=2, rank=1, world=2, consumed=3 * 8)
    assert visits(resumed) == visits(whole[6:])
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(resumed, whole[6:]))
    # also on another number of ranks
    assert visits(take(dataset, 2, config, consumed=3 * 8)) == visits(take(dataset, 5))[24:]


def test_the_loader_draws_no_random_numbers(dataset):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    take(dataset, 3, DataConfig("unused", workers=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_prepare_runs_on_each_batch(dataset):
    assert take(dataset, 2, prepare=lambda batch: batch.samples.sum().item()) == [b.samples.sum().item() for b in take(dataset, 2)]


def test_the_posterior_is_sampled_anew_at_each_visit(tmp_path):
    manifest = write_values(tmp_path, sizes=(4,))
    with ShardWriter(tmp_path / "train-000000.tar") as shard:
        for i in range(4):
            shard.write(f"k{i}", {"label": 0}, latent=value(i), std=torch.full(SHAPE, 0.1))
    dataset = LatentDataset([replace(manifest, store="mean+std")], "train")
    first, second = take(dataset, 2, global_batch=4)
    scaled = {i: (value(i) - 0.5) * 2.0 for i in range(4)}
    noise = {}
    for batch in (first, second):
        for latent, epoch, i in zip(batch.latents, batch.epochs.tolist(), batch.samples.tolist()):
            noise[epoch, i] = (latent - scaled[i]) / 0.2
    assert len(noise) == 8 and 0.8 < torch.stack(list(noise.values())).std() < 1.2
    assert not torch.equal(noise[0, 0], noise[1, 0])
    again = take(dataset, 1, global_batch=4, consumed=4)[0]
    assert torch.equal(again.latents, second.latents)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_reaches_the_consumer_as_one_line(dataset, workers):
    path = Path(dataset.manifests[0].root, "train-000001.tar")
    path.write_bytes(bytes(path.stat().st_size))
    loader = LatentLoader(dataset, DataConfig("unused", workers=workers), seed=0, global_batch=13, accumulation=1, rank=0, world=1)
    with pytest.raises(DataError, match=r"train-000001\.tar: sample \d at byte \d+ is damaged") as caught:
        next(loader)
    assert "\n" not in str(caught.value)
    assert list(loader) == []


def test_shared_memory_that_is_full_is_told(dataset, monkeypatch):
    """The queue's thread would print a traceback and drop the micro-batch, for which the rank would wait for ever."""

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    loader = LatentLoader(dataset, DataConfig("unused", workers=1), seed=0, global_batch=2, accumulation=1, rank=0, world=1)
    with pytest.raises(ConfigError, match=r"data.workers=1: .*--shm-size.*No space left"):
        next(loader)


def test_a_damaged_shard_can_be_left_out(dataset):
    manifest = dataset.manifests[0]
    config = DataConfig("unused", workers=0, skip_shards=("train-000000.tar",))
    rest = config.open([manifest], "train")
    assert len(rest) == 6 and rest.key(0) == "k7"
    assert sorted(visits(take(rest, 3, config, global_batch=2))) == [(0, i) for i in range(6)]
    with pytest.raises(ConfigError, match=r"data.skip_shards='train-9.tar'"):
        DataConfig("unused", skip_shards=("train-9.tar",)).open([manifest], "train")


def test_what_is_left_out_is_of_the_training_samples(tmp_path):
    manifest = Manifest.load(write_latents(tmp_path, train=8, val=3, per_shard=4))
    config = DataConfig("unused", skip_shards=("train-000001.tar",))
    assert (len(config.open([manifest], "train")), len(config.open([manifest], "val"))) == (4, 3)


def test_a_shard_to_skip_by_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    write_values(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    assert len(LatentDataset([Manifest.load("here")], "train", skip=["here/train-000001.tar"])) == 7


def test_a_window_of_many_shards_reads_each_index_once(tmp_path):
    (tmp_path / "latents").mkdir()
    dataset = LatentDataset([write_values(tmp_path / "latents", (1,) * 300)], "train")
    keys = [dataset.key(i) for _ in range(2) for i in range(300)]
    assert len(set(keys)) == 300 and dataset._reader.cache_info().misses == 300


def test_a_mix_reads_from_both(tmp_path):
    manifests = []
    for name, sizes in (("real", (4,)), ("made", (5, 6))):
        (tmp_path / name).mkdir()
        manifests.append(write_values(tmp_path / name, sizes))
    config = DataConfig("unused", workers=0, weight=1, mix=(MixConfig("unused", 3),))
    mixed = config.open(manifests, "train")
    assert len(mixed) == 15 and (mixed.key(3), mixed.key(4), mixed.key(14)) == ("k3", "k0", "k10")
    seen = [i for batch in take(mixed, 11, config, global_batch=4) for i in batch.samples.tolist()]
    assert sum(i < 4 for i in seen) == 11 and set(seen) == set(range(15))


def write_shapes(root: Path, shapes: dict[tuple[int, ...], tuple[int, ...]]) -> Manifest:
    """A folder with shards of several shapes: {shape: sizes}; the labels are the sample's number within its shape."""
    root.mkdir()
    manifest, shards = write_values(root, (1,)), []
    for shape, sizes in shapes.items():
        first = 0
        for size in sizes:
            path = root / f"train-{len(shards):06d}-x.tar"
            with ShardWriter(path) as shard:
                for i in range(first, first + size):
                    shard.write(f"{shape[1]}x{shape[2]}-{i}", {"label": None}, latent=torch.full(shape, float(i)))
            first += size
            shards.append(Shard(path.name, size, path.stat().st_size, sha256(path), shape))
    replace(manifest, splits=Splits(Split(sum(shard.samples for shard in shards), tuple(shards)), Split(0, ()))).save()
    return Manifest.load(root)


def test_a_step_has_one_shape_and_each_shape_its_share(tmp_path):
    manifest = write_shapes(tmp_path / "a", {(2, 3, 4): (11, 13), (2, 4, 3): (5, 3), (2, 2, 6): (16,)})
    assert manifest.shapes == ((2, 2, 6), (2, 3, 4), (2, 4, 3))
    dataset = LatentDataset([manifest], "train")
    assert [dataset.key(i) for i in (0, 16, 39, 40)] == ["2x6-0", "3x4-0", "3x4-23", "4x3-0"]
    one = LatentDataset([manifest], "train", shape=(2, 4, 3))
    assert len(one) == 8 and one.batch(range(8)).latents.shape == (8, 2, 4, 3)
    steps = 600
    whole = take(dataset, steps, global_batch=4)
    count = Counter(tuple(batch.latents.shape[1:]) for batch in whole)
    for shape, share in {(2, 2, 6): 1 / 3, (2, 3, 4): 1 / 2, (2, 4, 3): 1 / 6}.items():
        assert abs(count[shape] / steps - share) < 4 * (share * (1 - share) / steps) ** 0.5
    for shape, first, total in (((2, 2, 6), 0, 16), ((2, 3, 4), 16, 24), ((2, 4, 3), 40, 8)):
        seen = [pair for batch in whole if tuple(batch.latents.shape[1:]) == shape for pair in visits([batch])]
        assert sorted(seen[:total]) == [(0, first + i) for i in range(total)]
        assert {epoch for epoch, _ in seen} == set(range(-(-len(seen) // total)))
        values = [float(batch.latents[0, 0, 0, 0]) for batch in whole if tuple(batch.latents.shape[1:]) == shape]
        assert values == [((i - first) - 0.5) * 2 for _, i in seen[::4]]
    # whatever the ranks and micro-steps, and from any step on
    ranks = [take(dataset, 40, global_batch=4, accumulation=2, rank=rank, world=2, consumed=4 * 580) for rank in range(2)]
    assert [pair for micro in zip(*ranks) for pair in visits(list(micro))] == visits(whole[580:])


def test_blocks_hold_the_exact_share_of_each_shape():
    orders = [Order([[size]], [1], 0, 100) for size in (30, 60, 1)]
    order = BucketOrder(orders, 2, 0)
    assert order.shares == [3297, 6593, 110]
    assert BucketOrder([Order([[size]], [1], 0, 100) for size in (10**6, 1)], 2, 0).shares == [10_000, 1], "at least one batch"
    visited = set()
    for block in range(2):
        found = [order.at(2 * step, 2) for step in range(10_000 * block, 10_000 * (block + 1))]
        seen = [int(samples[0]) for _, samples in found]
        assert [sum(low <= i < high for i in seen) for low, high in ((0, 30), (30, 90), (90, 91))] == order.shares
        visited |= {pair for visit in found for pair in zip(*(part.tolist() for part in visit))}
    assert len(visited) == 2 * 20_000  # a block goes on where the last one ended: nobody is seen twice in an epoch


def test_a_mix_visits_the_shapes_of_a_set_alike():
    """The first has as many of each shape, and five times the weight of the second, nearly all of whose are of one."""
    sets = ((500, 99_000), (500, 1_000))
    order = BucketOrder([Order([[size] for size in sizes], [5, 1], 0, 100) for sizes in sets], 2, 0)
    square, wide = order.shares
    assert square / wide == pytest.approx((5 * 0.5 + 0.99) / (5 * 0.5 + 0.01), rel=1e-3)
    assert BucketOrder([Order([[size]], [3], 0, 100) for size in (99_500, 1_500)], 2, 0).shares == [9851, 149]


def test_what_is_mixed_must_have_all_shapes(tmp_path):
    both, one = write_shapes(tmp_path / "both", {(2, 3, 4): (5,), (2, 4, 3): (5,)}), write_shapes(tmp_path / "one", {(2, 3, 4): (5,)})
    with pytest.raises(DataError, match=r"one: split train has no latents of shape \(2, 4, 3\)"):
        LatentDataset([both, one], "train")


def test_workers_leave_signals_to_their_rank(dataset):
    """By which SLURM or a terminal asks all processes of a job to stop."""
    loader = LatentLoader(dataset, DataConfig("unused", workers=1), seed=0, global_batch=2, accumulation=1, rank=0, world=1)
    next(loader)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, number)
    assert len([next(loader) for _ in range(10)]) == 10  # more than were loaded ahead
    loader.close()


def test_close_ends_the_workers(dataset):
    loader = LatentLoader(dataset, DataConfig("unused", workers=2), seed=0, global_batch=2, accumulation=1, rank=0, world=1)
    next(loader)
    processes = multiprocessing.active_children()
    assert len(processes) >= 2
    loader.close()
    assert list(loader) == [] and not any(process.is_alive() for process in processes)
