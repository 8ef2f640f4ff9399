"""The last thing that a process of several does."""

import atexit
import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn


def end(code: int) -> NoReturn:
    """End this process with this exit code, but not through Python's own shutdown.

    In that, a thread of gloo's that just then lets go of a tensor aborts the process, now and then, and SIGTERM, which a launcher may send
    when another rank has ended, kills it. Either hides the exit code.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's loader would raise an error for each
    for child in multiprocessing.active_children():  # a loader's processes ignore the SIGTERM by which multiprocessing would end them
        child.kill()
    atexit._run_exitfuncs()  # what libraries have left to do (Weights & Biases)
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):  # `| head` has seen enough
            stream.flush()
    os._exit(code)
