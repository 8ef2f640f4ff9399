"""Where a step's time goes, measured on the device without waiting for it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Adds up the time between ``start`` and ``stop``, by part. Parts may be nested; each shows in a profiler's trace."""

    def __init__(self) -> None:
        self._running, self._spans = False, list[tuple[str, Any, Any]]()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if not self._running:
            yield
            return
        with torch.profiler.record_function(part):
            start = _now()
            yield
            self._spans.append((part, start, _now()))

    def start(self) -> None:
        self._running = True

    def stop(self) -> dict[str, float]:
        """Seconds of each part, as far as the device has finished it. What it still works on counts at the next ``stop``."""
        spans, self._spans, self._running = self._spans, [], False
        cuda, seconds = torch.cuda.is_available(), dict[str, float]()
        for part, start, end in spans:
            if cuda and not end.query():
                self._spans.append((part, start, end))
            else:
                seconds[part] = seconds.get(part, 0.0) + (start.elapsed_time(end) / 1e3 if cuda else end - start)
        return seconds


def _now() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


clock = Clock()
"""The clock of this process, global so that layers deep inside a model can time their exchanges."""
