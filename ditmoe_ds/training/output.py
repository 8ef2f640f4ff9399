"""What a run prints, on which it does not depend."""

import sys
from contextlib import suppress
from typing import Any, TextIO


class _Dispensable:
    """A stream whose text is lost where it cannot be written."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers() -> None:
    """From here on a full disk, or a reader that has gone (``| tee`` that was killed), costs lines and not the process."""
    sys.stdout, sys.stderr = _Dispensable(sys.stdout), _Dispensable(sys.stderr)  # type: ignore[assignment]
