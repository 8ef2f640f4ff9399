"""Checkpoints and exports in MB/s, beside plain files and torch.save / torch.load of as many bytes.

python benchmarks/checkpoint.py [--model NAME] [--repeats 3] [--folder build/checkpoint] [--write]

The training state is that of a bf16 run with one average, all of it random numbers: nothing is trained. Takes up to 64 bytes
per parameter on the folder's disk (four files of a checkpoint's size) and 36 of memory. --write puts the tables under "Measured"
in checkpoint.md.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from ranks import on_ranks
from report import Page, forget_peak, host_bytes

from ditmoe_ds import cli
from ditmoe_ds.diffusion.objectives import DiffusionConfig
from ditmoe_ds.distributed import checkpoint, shards
from ditmoe_ds.distributed.ema import EMA, EMAConfig
from ditmoe_ds.distributed.engine import BatchShape, OptimizerConfig, build
from ditmoe_ds.distributed.settings import read_ds_config
from ditmoe_ds.distributed.topology import ParallelConfig, expert_group, join, leave
from ditmoe_ds.distributed.weights import open_weights
from ditmoe_ds.models.dit import DiT
from ditmoe_ds.models.sizes import named_config

SAVED = (4, ParallelConfig(zero_stage=3, expert=2))
LOADED = (SAVED, (2, ParallelConfig(zero_stage=1)), (1, ParallelConfig(zero_stage=1)))
"""Shapes of runs: processes, and how the model is spread over them. All load what the first saves."""
CHUNK = os.urandom(1 << 24)
"""What plain files consist of."""

Times = dict[str, list[float]]
"""Seconds of each repeat, by what was done."""


# -- plain files: the peers ----------------------------------------------------------------------------------------------------


def write_plainly(path: Path, count: int) -> None:
    with open(path, "wb", buffering=0) as file:
        for start in range(0, count, len(CHUNK)):
            file.write(CHUNK[: count - start])
        os.fsync(file.fileno())


def read_plainly(path: Path) -> None:
    buffer = bytearray(len(CHUNK))
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def torch_save(content: Any, path: Path) -> None:
    torch.save(content, path)
    sync(path)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def forget(*paths: Path) -> None:
    """Drop the files in ``paths`` (or below them) from the page cache, so that a read goes to the disk."""
    for path in paths:
        for file in [path] if path.is_file() else filter(Path.is_file, path.rglob("*")):
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


# -- one run, on its ranks -----------------------------------------------------------------------------------------------------


def timed(action: Callable[[], Any]) -> float:
    """Seconds until the last rank is done. Collective."""
    os.sync()  # what was written and deleted before is not this action's
    dist.barrier()
    start = time.monotonic()
    action()
    dist.barrier()
    return time.monotonic() - start


def measure_run(name: str, parallel: ParallelConfig, folder: Path, repeats: int, saves: bool) -> tuple[int, int, Times]:
    """Build a run's state; save it (or not), load a checkpoint, and do as much with plain files. On every rank.

    Returns:
        bytes of the state on all ranks, bytes of DeepSpeed's own checkpoint, seconds.
    """
    world = join()
    group = expert_group(parallel.expert)
    config = named_config(name)
    with torch.device("meta"):
        model = DiT(config, ep_size=group.size)
    batch = BatchShape(world.size, 1, 1)
    engine = build(model, parallel, OptimizerConfig(), batch, "bf16", read_ds_config(parallel), world.device)
    parts = shards.collect(engine, group)
    shards.fill(engine, parts, lambda name, start, out: out.normal_())
    ema = EMA(parts, EMAConfig())
    averages = [tensor for average in ema.averages.values() for tensor in average]
    tensors = [tensor for part in parts for tensor in (part.master, *part.moments.values())] + averages
    for tensor in tensors:
        tensor.normal_()
    mine = sum(tensor.nbytes for tensor in tensors)
    total = torch.tensor(mine, device=world.device)
    dist.all_reduce(total)

    times: Times = defaultdict(list)
    description = dict(model=asdict(config), diffusion=asdict(DiffusionConfig()), latents={})
    savers = {
        kind: checkpoint.Saver(folder / kind, checkpoint.CheckpointConfig(asynchronous=kind == "async")) for kind in ("sync", "async")
    }
    plain, pickled, deepspeeds = folder / f"plain_{world.rank}", folder / f"torch_{world.rank}", folder / "deepspeed"

    def save(kind: str) -> None:
        savers[kind].save(1, parts, ema, 1, description)

    def save_in_background() -> None:
        start = time.monotonic()
        save("async")
        dist.barrier()
        times["stall"].append(time.monotonic() - start)
        savers["async"].finish()

    def load() -> None:
        reader = checkpoint.Reader(folder / "sync" / "step_00000001")
        reader.verify()
        checkpoint.load(reader, engine, parts, ema)

    def save_deepspeeds_way() -> None:
        engine.save_checkpoint(str(deepspeeds), tag="1")
        for file in sorted((deepspeeds / "1").glob("*.pt"))[world.rank :: world.size]:
            sync(file)

    def on_rank_0(action: Callable[[], Any]) -> None:
        if world.rank == 0:
            action()
        dist.barrier()

    deepspeed_bytes = 0
    for _ in range(repeats):
        times["plain write"].append(timed(lambda: write_plainly(plain, mine)))
        times["torch.save"].append(timed(lambda: torch_save(tensors, pickled)))
        if saves:
            on_rank_0(lambda: shutil.rmtree(folder / "sync", ignore_errors=True))
            times["save"].append(timed(lambda: save("sync")))
            times["async"].append(timed(save_in_background))
            on_rank_0(lambda: shutil.rmtree(folder / "async"))
            times["deepspeed"].append(timed(save_deepspeeds_way))
            deepspeed_bytes = sum(file.stat().st_size for file in deepspeeds.rglob("*.pt"))
            dist.barrier()
            on_rank_0(lambda: shutil.rmtree(deepspeeds))
        for what, path, read in (
            ("plain read", plain, lambda: read_plainly(plain)),
            ("torch.load", pickled, lambda: torch.load(pickled, weights_only=True)),
            ("load", folder / "sync", load),
        ):
            forget(path)
            times[what].append(timed(read))
        plain.unlink()
        pickled.unlink()
    leave()
    return int(total), deepspeed_bytes, times


# -- exports, in one process ---------------------------------------------------------------------------------------------------


def measure_exports(folder: Path, repeats: int) -> dict[str, tuple[int, list[float], int]]:
    """Export the average of the checkpoint as bf16.

    Returns:
        by target: bytes written, seconds, and the largest memory of a repeat beyond what the process held before.
    """
    source, averages, out = folder / "sync" / "step_00000001", folder / "averages.pt", folder / "exported"
    weights = open_weights(source)
    torch_save({name: weights.tensor(name) for name in weights.shapes}, averages)

    def by_torch() -> None:
        out.mkdir()
        loaded = torch.load(averages, weights_only=True)
        torch_save({name: tensor.bfloat16() for name, tensor in loaded.items()}, out / "bf16.pt")

    def by_us(target: str) -> None:
        assert cli.main(["export", str(source), "--to", target, "--dtype", "bf16", "--out", str(out)]) == 0

    results = {}
    for target in ("torch", "safetensors", "diffusers", "reference"):
        seconds, peaks = [], []
        for _ in range(repeats + 1):  # one more: the first has the imports in it
            os.sync()
            forget(source, averages)
            forget_peak()
            before, start = host_bytes("VmRSS"), time.monotonic()
            by_torch() if target == "torch" else by_us(target)
            seconds.append(time.monotonic() - start)
            peaks.append(host_bytes("VmHWM") - before)
            size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
            shutil.rmtree(out)
        results[target] = size, seconds[1:], max(peaks[1:])
    seconds = []
    for _ in range(repeats):
        os.sync()
        start = time.monotonic()
        write_plainly(out, size)
        seconds.append(time.monotonic() - start)
        out.unlink()
    return {"plain": (size, seconds, len(CHUNK))} | results


# -- the page ------------------------------------------------------------------------------------------------------------------


def cells(size: int, seconds: list[float], peer: list[float]) -> tuple[str, str, str]:
    """Seconds, MB/s, and the speed as a share of the plain file's; ``peer``: seconds of a plain file of as many bytes."""
    middle = statistics.median(seconds)
    spread = f"{middle:.2f} ({min(seconds):.2f}-{max(seconds):.2f})"
    return spread, f"{size / middle / 1e6:,.0f}", f"{statistics.median(peer) / middle:.2f}"


def add_run(page: Page, world: int, parallel: ParallelConfig, size: int, deepspeed_bytes: int, times: Times) -> None:
    same = (world, parallel) == SAVED
    write, read = times["plain write"], times["plain read"]
    processes = "process" if world == 1 else "processes"
    page.add("", f"**{world} {processes}, ZeRO-{parallel.zero_stage}, EP {parallel.expert}; {size / 1e6:,.0f} MB**")
    page.table("", "s: median (range)", "MB/s", "of plain")
    page.row("plain write, fsync", *cells(size, write, write))
    page.row("`torch.save`, fsync", *cells(size, times["torch.save"], write))
    if same:
        name = f"DeepSpeed's `save_checkpoint`, fsync ({deepspeed_bytes / 1e6:,.0f} MB)"
        page.row(name, *cells(deepspeed_bytes, times["deepspeed"], [seconds * deepspeed_bytes / size for seconds in write]))
        page.row("**save**", *cells(size, times["save"], write))
        page.row("**asynchronous save**, until on disk", *cells(size, times["async"], write))
        page.row("**asynchronous save**, until training goes on", *cells(size, times["stall"], write))
        first = times["stall"][0]
        page.row("the first of these, which allocates", f"{first:.2f}", f"{size / first / 1e6:,.0f}", "")
    page.row("plain read", *cells(size, read, read))
    page.row("`torch.load`", *cells(size, times["torch.load"], read))
    page.row("**load**" if same else "**reshard**: load what the first shape saved", *cells(size, times["load"], read))


def add_exports(page: Page, results: dict[str, tuple[int, list[float], int]]) -> None:
    names = dict(plain="plain write, fsync", torch="`torch.load`, `.bfloat16()`, `torch.save`, fsync")
    page.add("", "**Export of the average as bf16, one process**")
    page.table("", "s: median (range)", "MB/s written", "of plain", "peak memory, MB")
    for target, (size, seconds, peak) in results.items():
        page.row(names.get(target, f"**{target}**"), *cells(size, seconds, results["plain"][1]), f"{peak / 1e6:,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="DiT-MoE-S/2-8E2A")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("build/checkpoint"), help="a new folder, deleted at the end")
    parser.add_argument("--write", action="store_true", help="put the figures into checkpoint.md")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True)
    try:
        disk = subprocess.check_output(["df", "--output=fstype,source", folder], text=True).splitlines()[-1]
        settings = f"deepspeed {deepspeed.__version__}; {' on '.join(disk.split())}; {arguments.model}, {arguments.repeats} repeats"
        page = Page(__file__, arguments.write, settings)
        for world, parallel in LOADED:
            saves = (world, parallel) == SAVED
            found, *_ = on_ranks(world, measure_run, arguments.model, parallel, folder, arguments.repeats, saves)
            add_run(page, world, parallel, *found)
        add_exports(page, *on_ranks(1, measure_exports, folder, arguments.repeats))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
