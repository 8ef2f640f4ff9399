"""Progress of a long loop: a bar on a terminal, a line every half minute in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

PAUSE = 30  # seconds between lines


class Progress:
    """Counts ``unit``s. With a ``total``, which may be set or changed later, it estimates the time left. A ``note`` is shown behind.

    Args:
        shown: of many ranks one shows its own.
    """

    def __init__(self, name: str, unit: str, total: int | None = None, shown: bool = True):
        self.name, self.unit, self.total, self.shown, self.done, self.note = name, unit, total, shown, 0, ""
        self.bar = tqdm(total=total, desc=name, unit=f" {unit}", mininterval=1) if shown and sys.stderr.isatty() else None
        self.began = self.said = time.monotonic()

    def update(self, count: int = 1) -> None:
        """``count`` more are done."""
        self.done += count
        if self.bar is not None:
            self.bar.total = self.total
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(count)
        elif time.monotonic() - self.said > PAUSE:
            self._say()

    def over(self, things: Iterable[T]) -> Iterator[T]:
        """The things, each of which is done when the next is asked for."""
        for thing in things:
            yield thing
            self.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        else:
            self._say()

    def _say(self) -> None:
        if not self.shown:
            return
        self.said = time.monotonic()
        line = tqdm.format_meter(
            self.done, self.total, self.said - self.began, prefix=self.name, unit=f" {self.unit}", ncols=0, postfix=self.note or None
        )
        print(line, file=sys.stderr, flush=True)
