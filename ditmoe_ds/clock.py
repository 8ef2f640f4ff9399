"""Where a step's time goes, measured on the device without waiting for it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Adds up the time from ``start`` to ``stop``, by part. Parts may be nested; each shows in a profiler's trace."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, Any, Any]] | None = None

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if self._spans is None:
            yield
            return
        with torch.profiler.record_function(part):
            start = _now()
            yield
            self._spans.append((part, start, _now()))

    def start(self) -> None:
        self._spans = []

    def stop(self) -> dict[str, float]:
        """Seconds by part. Waits for the device."""
        assert self._spans is not None
        spans, self._spans = self._spans, None
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for part, start, end in spans:
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
