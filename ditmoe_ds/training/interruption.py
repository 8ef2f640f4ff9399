"""Requests to stop: on SIGUSR1 (a time limit is near), SIGTERM (pre-emption) or Ctrl-C a run ends its step, saves, and exits with code 0.

``interrupted.json`` in the run directory then tells whoever started the run that it is not finished and can be continued.
"""

import json
import signal
import time
from pathlib import Path
from types import FrameType

MARKER = "interrupted.json"


class Interruption:
    """Listens from its construction on. Main thread only, before other processes are forked, so that they ignore the signals too."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if number == signal.SIGINT:  # a second one ends at once; as an exception it would wait for loaders, which ignore signals
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def mark(run_dir: Path, step: int) -> None:
    """Write into ``interrupted.json`` that the run can be continued from ``step``."""
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    (run_dir / MARKER).write_text(json.dumps(dict(step=step, time=when)) + "\n")


def clear(run_dir: Path) -> None:
    (run_dir / MARKER).unlink(missing_ok=True)
