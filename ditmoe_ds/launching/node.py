"""Runs one command on this host for someone at the other end of ssh: ``python -m ditmoe_ds.launching.node``.

The first line of standard input is JSON: the command as a list, the variables to set and the folder to run in, so that none of
them passes through a shell. Standard input then stays open as long as the other end lives; when it closes, the command is asked to
end (SIGTERM), and after ``GRACE`` seconds it and all that it started are killed. Exits with the command's code.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil

GRACE = 300.0
"""Seconds, enough for a rank to end its step and save."""


def main() -> int:
    request = json.loads(sys.stdin.readline())
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"  # as activated: ninja, for one, lies beside python
    environment = os.environ | dict(PATH=path) | request["environment"]
    try:
        os.chdir(request["folder"])
        process = subprocess.Popen(request["command"], env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        print(f"cannot start in {request['folder']}: {error}", file=sys.stderr)
        return 2
    threading.Thread(target=_end_with_input, args=(process,), daemon=True).start()
    code = process.wait()
    _kill_all(process)  # what its end left behind
    return code if code >= 0 else 128 - code


def _end_with_input(process: "subprocess.Popen[bytes]") -> None:
    while sys.stdin.readline():
        pass
    # The ranks themselves, not DeepSpeed's launcher above them, which would leave them 30 seconds.
    with contextlib.suppress(psutil.NoSuchProcess):
        for asked in psutil.Process(process.pid).children() or [psutil.Process(process.pid)]:
            asked.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        _kill_all(process)


def _kill_all(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
