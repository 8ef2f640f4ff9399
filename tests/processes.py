"""Start a group of real processes on this machine and wait for it."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launch(world, arguments, timeout=600, check=True):
    """Run ``python ARGUMENTS`` as ``world`` ranks; returns [(exit code, output)] by rank. Kills all if one hangs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | dict(
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}",
        DS_ACCELERATOR="cpu",
    )
    # files, since a pipe that nobody reads would block its rank
    outputs = [tempfile.TemporaryFile("w+") for _ in range(world)]  # noqa: SIM115
    ranks = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=environment | dict(RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=outputs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]
    deadline = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
            if any(process.poll() for process in ranks):  # as a launcher does: one failed, the others would wait for it
                deadline = min(deadline, time.monotonic() + 10)
            time.sleep(0.05)
    finally:
        for process in ranks:
            process.kill()
    results = []
    for process, output in zip(ranks, outputs, strict=True):
        output.seek(0)
        results.append((process.wait(), output.read()))
    for rank, (code, output) in enumerate(results):
        assert not check or code == 0, f"rank {rank} ended with {code}:\n{output[-6000:]}"
    return results
