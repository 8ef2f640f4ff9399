"""What the benchmarks share: the machine in a line, host memory, and the figures' place in a page."""

import ctypes
import gc
import os
import platform
from pathlib import Path

import torch


def hardware() -> str:
    """Cores, memory, GPU and versions."""
    named = (line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    gpu = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no GPU"
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    return f"{os.cpu_count()} cores of {next(named, platform.machine())}, {memory:.0f} GB, {gpu}; {versions}"


def host_bytes(which: str) -> int:
    """``VmRSS`` now, ``VmHWM`` at the peak since ``forget_peak``."""
    return 1024 * next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))


def forget_peak() -> None:
    """The peak starts anew; what was freed before goes back to the system, so that it does not hide what is taken next."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def publish(script: str, figures: str) -> None:
    """Replace what stands under "Measured" in the page of the benchmark ``script``."""
    page = Path(script).with_suffix(".md")
    before, heading, _ = page.read_text().partition("## Measured\n\n")
    page.write_text(f"{before}{heading}{figures}\n")
