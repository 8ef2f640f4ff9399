"""``ditmoe-data inspect``: what is in a folder or shard."""

from __future__ import annotations

from pathlib import Path

from data_prep.verify import decoded, spread
from ditmoe_ds.errors import DataError, visible
from ditmoe_ds.latents.images import save_grid
from ditmoe_ds.latents.manifest import Manifest
from ditmoe_ds.latents.tars import captions_of

COLUMNS, ROWS = 8, 4


def show(path: str, *, sheet: str | None = None) -> None:
    """Print a table of a finished folder and of its classes, or of one shard in it, with its first samples.

    Args:
        sheet: a picture of decoded latents to write.

    Raises:
        DataError: there is no finished folder, or no such shard in it.
    """
    shard_name = Path(path).name if Path(path).suffix == ".tar" else None
    manifest = Manifest.load(Path(path).parent if shard_name else path, "SHARD_OR_DIR")
    shards = tuple(shard for shard in manifest.shards() if shard_name in (None, shard.name))
    if not shards:
        raise DataError(f"{path}: is not in the manifest beside it")
    shapes = sorted({shard.shape for shard in shards})
    lines: list[tuple[str, object]] = [
        ("samples", sum(shard.samples for shard in shards)),
        ("bytes", f"{sum(shard.bytes for shard in shards):,} in {len(shards)} shards"),
        ("latent", f"{', '.join(map(str, shapes))} {manifest.dtype}, {manifest.store}"),
        ("images", f"{', '.join(f'{h * manifest.downsample}x{w * manifest.downsample}' for _, h, w in shapes)} pixels, {manifest.source}"),
        ("vae", manifest.vae),
        (
            "text",
            f"{manifest.text.width} x at most {manifest.text.max_tokens} tokens, {manifest.text.encoder}" if manifest.text else "none",
        ),
    ]
    if not shard_name:
        counts = manifest.class_histogram
        classes = f"{manifest.num_classes}, of {min(counts)} to {max(counts)} training samples" if counts else "none"
        lines[1:1] = [("train, val", f"{manifest.splits.train.samples}, {manifest.splits.val.samples}")]
        lines += [("classes", classes), ("rejected", manifest.rejected)]
        lines += [("mean, std", "  ".join(f"{mean:.3f}, {std:.3f}" for mean, std in zip(manifest.mean, manifest.std)))]
    print("\n".join(visible(f"{name:<12}{value}") for name, value in lines))
    reader = manifest.open(shards[0])
    for i in range(min(5, len(reader))):
        key, meta, _ = reader.read(i)
        print(visible(f"  {key}  {meta['label']}  {meta.get('class') or '-'}  {' | '.join(captions_of(meta)) or '-'}"))
    if not shard_name and manifest.class_names:
        print("class  training samples  name")
        for number, (name, count) in enumerate(zip(manifest.class_names, manifest.class_histogram)):
            print(f"{number:>5}{count:>18}  {visible(name)}")
    if sheet:
        save_grid(decoded(manifest, spread(manifest, shards, COLUMNS * ROWS)), Path(sheet), COLUMNS)
        print(sheet)
