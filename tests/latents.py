"""Small folders of latents for tests, without images: classes that differ, and values that are known; a VAE with random weights."""

import itertools

import torch

from data_prep.units import write_text
from ditmoe_ds.latents.manifest import EMPTY_TEXT, FORMAT, VERSION, Manifest, Shard, Split, Splits, Text, sha256, weights_sha256
from ditmoe_ds.latents.tars import ShardWriter


def write_latents(folder, train=96, val=24, shape=(4, 8, 8), classes=10, vae="none", per_shard=1000, text=0, turned=False):
    """Write a finished folder and return its path as a string. Sample i has class i % classes; with ``text``, the width of its
    tokens, its class has tokens, of which it has one to five. ``turned`` swaps height and width in every second shard."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(7)
    centres = torch.randn(classes, *shape, generator=generator)
    words, splits = torch.randn(classes, 5, max(text, 1), generator=generator).bfloat16(), {}
    for split, count in (("train", train), ("val", val)):
        shards = []
        for first in range(0, count, per_shard):
            path = folder / f"{split}-{len(shards):06d}.tar"
            rows, turn = range(first, min(first + per_shard, count)), turned and len(shards) % 2
            with ShardWriter(path) as writer:
                for i in rows:
                    latent = centres[i % classes] + 0.5 * torch.randn(shape, generator=generator)
                    latent = latent.transpose(1, 2).contiguous() if turn else latent
                    meta = {
                        "label": i % classes,
                        "class": str(i % classes),
                        "caption": " ".join("ab"[i % 2] * (1 + i % 4)),
                        "source": "test",
                    }
                    told = {"text": words[i % classes, : 1 + i % 5]} if text else {}
                    writer.write(f"{split}{i:06d}", meta, latent=latent, **told)
            shards.append(Shard(path.name, len(rows), path.stat().st_size, sha256(path), (shape[0], shape[2], shape[1]) if turn else shape))
        splits[split] = Split(count, tuple(shards))
    if text:
        write_text(folder / EMPTY_TEXT, words[0, :1])
    Manifest(
        root=str(folder),
        format=FORMAT,
        version=VERSION,
        source="test",
        vae=vae,
        vae_sha256=None if vae == "none" else weights_sha256(vae) or "unchecked",
        scaling_factor=0.9,
        shift_factor=0.0,
        downsample=4,
        dtype="float32",
        store="mean",
        text=Text("none", None, text, 5, sha256(folder / EMPTY_TEXT)) if text else None,
        mean=(0.0,) * shape[0],
        std=(1.0,) * shape[0],
        num_classes=classes,
        class_names=tuple(map(str, range(classes))),
        class_histogram=tuple(len(range(c, train, classes)) for c in range(classes)),
        rejected=0,
        splits=Splits(**splits),
    ).save()
    return str(folder)


SHAPE = (2, 3, 4)


def value(i):
    return i + torch.arange(24.0).view(SHAPE) / 100


def write_values(root, sizes=(7, 6)):
    """Training shards of the given sizes, of which it returns the manifest; sample i is ``value(i)`` with label i % 3."""
    shards, samples = [], iter(range(sum(sizes)))
    for number, size in enumerate(sizes):
        path = root / f"train-{number:06d}.tar"
        with ShardWriter(path) as shard:
            for i in itertools.islice(samples, size):
                meta = {"label": i % 3, "class": "abc"[i % 3], "source": str(i)}
                shard.write(f"k{i}", meta, latent=value(i))
        shards.append(Shard(path.name, size, path.stat().st_size, sha256(path), SHAPE))
    Manifest(
        root=str(root), format=FORMAT, version=VERSION, source="test", vae="org/vae", vae_sha256=None, scaling_factor=2.0,
        shift_factor=0.5, downsample=4, dtype="float32", store="mean", text=None,
        mean=(0.0, 0.0), std=(1.0, 1.0), num_classes=3, class_names=("a", "b", "c"), class_histogram=(5, 4, 4), rejected=0,
        splits=Splits(train=Split(sum(sizes), tuple(shards)), val=Split(0, ())),
    ).save()  # fmt: skip
    return Manifest.load(root)


def write_vae(folder, channels=4, factor=4):
    """A diffusers folder with a tiny random VAE; returns its path as a string."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    levels = factor.bit_length()
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(4,) * levels,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
    ).save_pretrained(folder)
    return str(folder)
