"""Start a group of real processes on this machine and wait for it."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
import pytest
import torch

from ditmoe_ds.distributed.checkpoint import Reader

ROOT = Path(__file__).parents[1]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Ranks:
    """``python ARGUMENTS`` as ``world`` ranks; with ``gpu`` each is alone on a host whose first GPU it takes."""

    def __init__(self, world, arguments, gpu=False):
        environment = os.environ | dict(
            WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
            OMP_NUM_THREADS="1",
            PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}",
            PYTHONFAULTHANDLER="1",
        )
        if gpu:
            environment |= dict(LOCAL_WORLD_SIZE="1", NCCL_SOCKET_IFNAME="lo")
        else:
            environment["DS_ACCELERATOR"] = "cpu"
            # what is not compiled needs no compiler, which DeepSpeed imports with its Muon, a second of every rank
            environment["TORCHDYNAMO_DISABLE"] = str(int("train.compile=true" not in arguments))
        places = [dict(RANK=str(rank), LOCAL_RANK=str(0 if gpu else rank), NCCL_HOSTID=str(rank)) for rank in range(world)]
        # files, since a pipe that nobody reads would block its rank
        self.outputs = [tempfile.TemporaryFile("w+") for _ in range(world)]  # noqa: SIM115
        self.processes = [
            subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                cwd=ROOT,
                env=environment | place,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            for place, output in zip(places, self.outputs, strict=True)
        ]

    def wait(self, timeout=600, patience=60, check=True):
        """[(exit code, output)] by rank. All are ended after ``timeout`` seconds, or ``patience`` after one has failed, and then say where
        they and their loaders are."""
        deadline = time.monotonic() + timeout
        try:
            while any(process.poll() is None for process in self.processes) and time.monotonic() < deadline:
                if any(process.poll() for process in self.processes):  # as a launcher does: the others would wait for it
                    deadline = min(deadline, time.monotonic() + patience)
                time.sleep(0.05)
            hung = [process for process in self.processes if process.poll() is None]
            for process in hung:
                rank = psutil.Process(process.pid)
                for one in [*rank.children(recursive=True), rank]:
                    one.send_signal(signal.SIGABRT)
            for process in hung:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(3)
        finally:
            for process in self.processes:
                process.kill()
        results = []
        for process, output in zip(self.processes, self.outputs, strict=True):
            output.seek(0)
            results.append((process.wait(), output.read()))
        failed = [f"rank {rank} ended with {code}:\n{output[-6000:]}" for rank, (code, output) in enumerate(results) if code]
        assert not check or not failed, "\n\n".join(failed)
        return results


def launch(world, arguments, timeout=600, check=True, gpu=False):
    """Run ``python ARGUMENTS`` as ``world`` ranks; returns [(exit code, output)] by rank. Kills all if one hangs."""
    return Ranks(world, arguments, gpu).wait(timeout, check=check)


def train(recipe, world, *overrides, **options):
    return launch(world, ["-m", "ditmoe_ds.train", recipe, *overrides], **options)


def train_cases(world, cases, folder, gpu=False):
    """Have so many ranks of ``shapes_worker`` train cases one after the other. Returns {name: what it recorded}, and rank 0's output."""
    (folder / "cases.json").write_text(json.dumps(cases))
    ended = launch(world, [ROOT / "tests" / "shapes_worker.py", folder / "cases.json", folder / "results.json"], timeout=1800, gpu=gpu)
    return json.loads((folder / "results.json").read_text()), ended[0][1]


def until_step(run_dir, step, job=None, timeout=400):
    """Wait until a run has written so many steps. The timeout is for two busy cores; a ``job`` (Popen) that ended is told at once."""
    file, deadline = Path(run_dir) / "metrics.jsonl", time.monotonic() + timeout
    while not file.is_file() or file.read_text().count("\n") < step:
        if (job and job.poll() is not None) or time.monotonic() > deadline:
            output = ""
            if job:
                job.kill()
                output = job.communicate()[0]
            pytest.fail(f"no step {step} in {file}\n{output}")
        time.sleep(0.02)


def metrics(run_dir):
    """Of each step that a run has written."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir):
    return [record["loss"] for record in metrics(run_dir)]


@cache
def state(run, step):
    """All tensors of a checkpoint, assembled."""
    reader = Reader(run / "checkpoints" / f"step_{step:08d}")
    out = {}
    for name, shape in reader.index["shapes"].items():
        for kind in ("master", "exp_avg", "exp_avg_sq", *reader.index["ema"]["kinds"]):
            out[kind, name] = torch.empty(torch.Size(shape).numel())
            reader.read(kind, name, 0, out[kind, name])
    return out


def demo_on(latents, steps):
    """Overrides of recipes/digits.yaml for a short run on these latents."""
    train = dict(steps=steps, global_batch=32, validate_every=0, sample_every=0, tensorboard="false")
    return [f"data.manifest={latents}", "data.workers=1", *(f"train.{key}={value}" for key, value in train.items())]
