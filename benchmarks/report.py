"""What the benchmarks share: the machine in a line, host memory, layers' time and memory, and the figures' place in a page."""

import ctypes
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


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


def peak_bytes(run: Callable[[], Any]) -> int:
    """Bytes that ``run`` takes at most, on top of what is held before: of the GPU, or of the host if there is none."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    forget_peak()
    before = host_bytes("VmRSS")
    run()
    return host_bytes("VmHWM") - before


class Page:
    """What is measured: printed as it comes and, with ``write``, at once into the page, so that a run cut short leaves its rows.

    Args:
        script: the benchmark's ``__file__``.
        settings: in a few words, what the command does not say.
    """

    def __init__(self, script: str, write: bool, settings: str):
        self.script, self.write, self.lines = script, write, list[str]()
        self.add(f"`python {' '.join(sys.argv)}`. {hardware()}, {settings}. Load average at the start: {os.getloadavg()[0]:.1f}.")

    def table(self, *columns: str) -> None:
        """Begin one."""
        self.add("", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|")

    def row(self, *cells: Any) -> None:
        self.add("| " + " | ".join(map(str, cells)) + " |")

    def add(self, *lines: str) -> None:
        print(*lines, sep="\n", flush=True)
        self.lines += lines
        if self.write:
            publish(self.script, "\n".join(self.lines))


class Layer(NamedTuple):
    forward: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor]


def measure(layers: dict[str, Layer], x: Tensor, repeats: int) -> dict[str, tuple[float, int]]:
    """Seconds of each layer's forward and backward, median of ``repeats`` in which the layers take turns, and the bytes, gradients of
    input and weights among them, that it takes at most. A GPU is waited for after every fifth, as it is only after many layers in training.
    """
    upward, queued = torch.randn_like(x), 5 if x.is_cuda else 1

    def once(layer: Layer) -> float:
        start = time.perf_counter()
        for _ in range(queued):
            torch.autograd.grad(layer.forward(x), [x, *layer.parameters], upward)
        if x.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / queued

    memory = {name: peak_bytes(partial(once, layer)) for name, layer in layers.items()}
    rounds = [{name: once(layer) for name, layer in layers.items()} for _ in range(repeats)]
    return {name: (statistics.median(each[name] for each in rounds), memory[name]) for name in layers}


def publish(script: str, figures: str) -> None:
    """Replace what stands under "Measured", or where there is a GPU under "Measured on a GPU", in the page of the benchmark ``script``."""
    page = Path(script).with_suffix(".md")
    heading = f"## Measured{' on a GPU' * torch.cuda.is_available()}\n\n"
    before, _, after = page.read_text().partition(heading)
    _, more, others = after.partition("\n## ")
    page.write_text(f"{before}{heading}{figures}\n{more}{others}")
