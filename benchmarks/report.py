"""What the benchmarks share: the machine in a line, host memory, time, layers' time and memory, and the figures' place in a page."""

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
from torch.autograd import DeviceType


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


def now() -> float:
    """Seconds, once the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def block(step: Callable[[], Any], steps: int) -> tuple[float, Any]:
    """Mean seconds of a step until the device has finished all, and what the last returned."""
    start = now()
    for _ in range(steps):
        result = step()
    return (now() - start) / steps, result


def spent(step: Callable[[], Any], steps: int, kernels: bool = False) -> dict[str, float]:
    """Milliseconds of a step by operator, each one's own, on a GPU those of its kernels; or by kernel."""
    with torch.profiler.profile() as profile:
        block(step, steps)
    own = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    kind = DeviceType.CUDA if kernels else DeviceType.CPU
    events = [event for event in profile.key_averages() if event.device_type == kind and not (kernels and event.is_user_annotation)]
    return {event.key: getattr(event, own) / steps / 1e3 for event in events}


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
    """Prints what is measured as it comes and, with ``write``, puts it into the benchmark's page at once, so that a run cut short leaves
    its rows. They replace what stands under "Measured", or where there is a GPU under "Measured on a GPU".

    Args:
        script: the benchmark's ``__file__``.
        settings: in a few words, what the command does not say.
    """

    def __init__(self, script: str, write: bool, settings: str):
        self.page, self.write, self.lines = Path(script).with_suffix(".md"), write, list[str]()
        self.heading = f"## Measured{' on a GPU' * torch.cuda.is_available()}\n\n"
        self.add(f"`python {' '.join(sys.argv)}`. {hardware()}, {settings}. Load average at the start: {os.getloadavg()[0]:.1f}.")

    def table(self, *columns: str) -> None:
        """Begin a table."""
        self.add("", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|")

    def row(self, *cells: Any) -> None:
        self.add("| " + " | ".join(map(str, cells)) + " |")

    def add(self, *lines: str) -> None:
        print(*lines, sep="\n", flush=True)
        self.lines += lines
        if self.write:
            before, _, after = self.page.read_text().partition(self.heading)
            _, more, others = after.partition("\n## ")
            self.page.write_text(before + self.heading + "\n".join(self.lines) + f"\n{more}{others}")


class Layer(NamedTuple):
    forward: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor]


def measure(layers: dict[str, Layer], x: Tensor, repeats: int) -> dict[str, tuple[float, int]]:
    """Time and memory of each layer's forward and backward.

    Returns:
        By layer: seconds, the median of ``repeats`` in which the layers take turns; the most bytes it takes, gradients included. A GPU is
        waited for after 0.15 s, or as many passes as DiT-MoE-XL has layers, since in training it is waited for once a step. As many run
        before them without being timed, so that its clock, which falls with the power it draws, is that of this layer.
    """
    upward = torch.randn_like(x)

    def once(layer: Layer, passes: int = 1) -> float:
        start = now()
        for _ in range(passes):
            torch.autograd.grad(layer.forward(x), [x, *layer.parameters], upward)
        return (now() - start) / passes

    def sustained(layer: Layer) -> float:
        passes = min(max(round(0.15 / once(layer, 3)), 3), 28)
        once(layer, passes)
        return once(layer, passes)

    memory = {name: peak_bytes(partial(once, layer)) for name, layer in layers.items()}
    timed = sustained if x.is_cuda else once
    rounds = [{name: timed(layer) for name, layer in layers.items()} for _ in range(repeats)]
    return {name: (statistics.median(each[name] for each in rounds), memory[name]) for name in layers}
