"""``ditmoe-data encode``: images to latents to shards, and ``ditmoe-data verify``: is it all still there?"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data_prep.sources import Item, Source, open_source
from ditmoe_ds.errors import ConfigError, DataError
from ditmoe_ds.latents.format import FORMAT, VERSION, Manifest, Shard, ShardWriter, Split, Splits, index_shard, read_sample, sha256
from ditmoe_ds.latents.loader import LatentDataset
from ditmoe_ds.latents.vae import encode_mean, load_vae


def encode(source: str, vae: str, out: str, *, size: int, shard_size: int, holdout: float, batch: int, dtype: Any) -> None:
    """Encode all images of ``source`` into the folder ``out``. Complete shards of an earlier, interrupted run are kept.

    Raises:
        ConfigError: ``size`` does not fit the VAE.
        DataError: the source or VAE cannot be read, or ``out`` holds the latents of another request.
    """
    images = open_source(source, size)
    weights = sorted(Path(vae).glob("*.safetensors")) if Path(vae).is_dir() else []
    request: dict[str, Any] = {
        "source": source,
        "items_sha256": hashlib.sha256(json.dumps([(item.key, item.label) for item in images.items]).encode()).hexdigest(),
        "vae": vae,
        "vae_sha256": sha256(*weights) if weights else None,
        "size": size,
        "shard_size": shard_size,
        "holdout": holdout,
        "dtype": dtype,
    }
    root = Path(out)
    _claim(root, request)
    if (root / "manifest.json").is_file():
        Manifest.load(root)
        print(f"{out}: already complete")
        return

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_vae(vae, device)
    downsample = 2 ** (len(model.config.block_out_channels) - 1)
    if size % downsample:
        raise ConfigError("--size", size, f"must be a multiple of {downsample}, the VAE's downsampling")
    shape = (model.config.latent_channels, size // downsample, size // downsample)
    train, heldout = images.split(holdout)
    if not train:
        raise DataError(f"--holdout={holdout}: leaves no sample of {len(images.items)} to learn from; choose a smaller one")
    splits = {}
    with tqdm(total=len(images.items), desc="encode", unit=" images", mininterval=1) as progress:
        for split, items in (("train", train), ("val", heldout)):
            shards = []
            for start in range(0, len(items), shard_size):
                path = root / f"{split}-{start // shard_size:06d}.tar"
                part = items[start : start + shard_size]
                if not path.exists():
                    _write_shard(path, part, images, model, batch, dtype)
                shards.append(Shard(path.name, len(part), path.stat().st_size, sha256(path)))
                progress.update(len(part))
            splits[split] = Split(len(items), tuple(shards))

    mean, std = _statistics([root / shard.name for shard in splits["train"].shards], shape, dtype)
    Manifest(
        root=out,
        format=FORMAT,
        version=VERSION,
        source=source,
        vae=str(Path(vae).resolve()) if weights else vae,
        vae_sha256=request["vae_sha256"],
        scaling_factor=model.config.scaling_factor,
        shift_factor=model.config.shift_factor or 0.0,
        downsample=downsample,
        image_size=size,
        shape=shape,
        dtype=dtype,
        mean=mean,
        std=std,
        num_classes=len(images.class_names),
        class_names=images.class_names,
        splits=Splits(**splits),
    ).save()
    print(f"{out}: {len(train)} training and {len(heldout)} held-out latents of shape {shape}")


def verify(path: str) -> None:
    """Read all of a finished folder: sha256, counts, shapes, labels, and that every value is finite.

    Raises:
        DataError: the first thing that is wrong.
    """
    manifest = Manifest.load(path)
    manifest.verify()
    for name in ("train", "val"):
        if manifest.split(name).samples != sum(shard.samples for shard in manifest.split(name).shards):
            raise DataError(f"{path}: the shards of split {name} do not add up to its number of samples; encode the data again")
        if not manifest.split(name).shards:
            continue
        dataset = LatentDataset(manifest, name)
        for i in tqdm(range(len(dataset)), desc=f"verify {name}", unit=" samples", mininterval=1):
            if not dataset[i][0].isfinite().all():
                raise DataError(f"{path}: split {name}, key {dataset.key(i)!r} has values that are not finite; encode the data again")
    print(f"{path}: intact, {manifest.splits.train.samples} training and {manifest.splits.val.samples} held-out samples")


def _claim(root: Path, request: dict[str, object]) -> None:
    """Note in ``root`` what is being encoded, so that a later run knows whether the shards it finds there are its own."""
    note = root / "request.json"
    if note.is_file():
        earlier = json.loads(note.read_text())
        changed = [key for key in request if earlier.get(key) != request[key]]
        if changed:
            was = ", ".join(f"{key} {earlier.get(key)!r} -> {request[key]!r}" for key in changed)
            raise DataError(f"--out={str(root)!r}: holds the latents of another request ({was}); choose another folder or delete it")
    else:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise DataError(f"--out={str(root)!r}: exists and was not made by ditmoe-data; choose another folder")
        root.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(request, indent=2) + "\n")


def _write_shard(path: Path, items: list[Item], images: Source, vae: torch.nn.Module, batch: int, dtype: str) -> None:
    with ShardWriter(path) as shard:
        for start in range(0, len(items), batch):
            part = items[start : start + batch]
            pixels = torch.from_numpy(np.stack([item.load() for item in part])).permute(0, 3, 1, 2).float() / 127.5 - 1
            for item, latent in zip(part, encode_mean(vae, pixels).cpu().numpy().astype(dtype)):
                shard.write(item.key, latent, {"label": item.label, "class": images.class_names[item.label], "source": item.origin})


def _statistics(paths: list[Path], shape: tuple[int, ...], dtype: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, read back from the shards since some may be of an earlier run."""
    count, total, squares = 0, np.zeros(shape[0]), np.zeros(shape[0])
    for path in paths:
        for span in index_shard(path).spans:
            latent = read_sample(path, span, shape, dtype)[0].astype(np.float64)
            count += latent[0].size
            total += latent.sum(axis=(1, 2))
            squares += np.square(latent).sum(axis=(1, 2))
    mean = total / count
    return tuple(mean.tolist()), tuple(np.sqrt(squares / count - mean**2).tolist())
