"""Runs one command on this host for someone at the other end of ssh: ``python -m ditmoe_ds.launching.node``.

The first line of standard input is JSON: the command as a list, the variables to set and the folder to stand in, so that nothing of
them passes through a shell. Standard input then stays open as long as the other end lives; when it closes, the command and all that
it started are ended: SIGTERM first, so that training can save, SIGKILL after ``GRACE`` seconds. Exits with the command's code.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

GRACE = 60.0


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
    _signal_all(process, signal.SIGKILL)  # what its end left behind
    return code if code >= 0 else 128 - code


def _end_with_input(process: "subprocess.Popen[bytes]") -> None:
    while sys.stdin.readline():
        pass
    _signal_all(process, signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        _signal_all(process, signal.SIGKILL)


def _signal_all(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


if __name__ == "__main__":
    sys.exit(main())
