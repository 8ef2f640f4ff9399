"""How one of several processes ends."""

import atexit
import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn


def end(code: int) -> NoReturn:
    """End this process with this exit code, bypassing Python's own shutdown.

    During that shutdown a thread of gloo that is releasing a tensor sometimes aborts the process, and SIGTERM, which a launcher may send
    when another rank has ended, kills it. Either hides the exit code.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's loader would raise an error for each that ends
    for child in multiprocessing.active_children():  # a loader's processes ignore the SIGTERM by which multiprocessing would end them
        child.kill()
    atexit._run_exitfuncs()  # what libraries have left to do (Weights & Biases)
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):  # `| head` has seen enough
            stream.flush()
    os._exit(code)
