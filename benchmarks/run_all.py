"""The benchmarks of speed, the most telling first, within a given time. Needs no network.

python -m benchmarks.run_all [--budget 540] [--write] [--only NAME ...]

Each is a process of its own: one that fails or runs out of time costs the others nothing, and its rows so far stand.
--write puts the figures into their pages.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.report import hardware

ROOT = Path(__file__).parents[1]
KEEP_MEMORY = dict(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**34))
"""Makes glibc keep freed memory, as a GPU's allocator does; else the system has to map it again in every step."""


class Benchmark(NamedTuple):
    name: str
    least: int
    """It is skipped with fewer seconds left."""
    most: int
    """It is stopped after so many seconds."""


ON_GPU = [
    Benchmark("train_step", 90, 300),
    Benchmark("moe_layer", 60, 120),
    Benchmark("sampling", 60, 110),
    Benchmark("scaling", 20, 60),
    Benchmark("expert_choice", 20, 30),
    Benchmark("expert_parallel", 40, 120),  # on the CPU where there is one GPU
]
ON_CPU = [
    Benchmark("train_step", 60, 240),
    Benchmark("moe_layer", 60, 240),
    Benchmark("expert_parallel", 60, 240),
    Benchmark("sampling", 30, 120),
    Benchmark("scaling", 30, 120),
    Benchmark("expert_choice", 15, 60),
]


def run(benchmark: Benchmark, seconds: float, write: bool) -> str:
    """Run it. Returns how it ended."""
    command = [sys.executable, f"benchmarks/{benchmark.name}.py", *(["--write"] if write else [])]
    environment = KEEP_MEMORY | os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(seconds)
        return "done" if code == 0 else f"failed with {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "out of time: its last rows are missing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=540, help="seconds")
    parser.add_argument("--only", nargs="+", choices=[benchmark.name for benchmark in ON_GPU], help="names of benchmarks")
    parser.add_argument("--write", action="store_true", help="put the figures into the benchmarks' pages")
    arguments = parser.parse_args()
    end, endings = time.monotonic() + arguments.budget, []
    print(hardware(), flush=True)
    for benchmark in ON_GPU if torch.cuda.is_available() else ON_CPU:
        if arguments.only and benchmark.name not in arguments.only:
            continue
        start = time.monotonic()
        if end - start < benchmark.least:
            ending = f"skipped: {end - start:.0f} s are left"
        else:
            print(f"\n== {benchmark.name}", flush=True)
            ending = run(benchmark, min(benchmark.most, end - start), arguments.write)
        endings.append(f"{benchmark.name}: {ending}, {time.monotonic() - start:.0f} s")
        print(f"== {endings[-1]}", flush=True)
    print("", *endings, sep="\n")


if __name__ == "__main__":
    main()
