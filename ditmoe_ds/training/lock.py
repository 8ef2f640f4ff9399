"""One training at a time in a run directory: a second one would cut the first one's records and delete what it is writing."""

import fcntl
import os
import socket
import time
from contextlib import suppress
from io import FileIO
from pathlib import Path

from ditmoe_ds.errors import ConfigError


def claim(run_dir: Path, patience: float = 180.0) -> FileIO:
    """Reserve ``run_dir`` for this process for as long as it lives. The kernel holds the lock or, on a network file system, the server, so
    that it ends with the process, however that ends; on a file system without locks nothing is reserved.

    Args:
        patience: seconds to wait: a file server may take a minute or two to notice that a host died.

    Raises:
        ConfigError: somebody else still trains there, or the directory cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / "lock", "a+b", buffering=0)  # noqa: SIM115, for life
    except OSError as error:
        raise ConfigError("run_dir", str(run_dir), f"cannot be written: {error.strerror}") from None
    end, told = time.monotonic() + patience, False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "another process"
            if time.monotonic() > end:
                gone = f"if that host is gone for good, delete {run_dir / 'lock'}"
                fix = f"{holder} is training there; end it, choose another directory, or, {gone}"
                raise ConfigError("run_dir", str(run_dir), fix) from None
            if not told:
                print(f"run_dir={str(run_dir)!r}: {holder} is training there; waiting for its end for {patience:.0f} s", flush=True)
                told = True
            time.sleep(min(1.0, patience / 2))
        except OSError:  # a file system without locks
            return file
    with suppress(OSError):  # a full disk: the lock is held all the same
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file


def check_shared(run_dir: Path, patience: float = 60.0) -> None:
    """Look for the lock of another process.

    Args:
        patience: seconds to look again: a file server's client may remember that it was not there.

    Raises:
        ConfigError: it is not there, as in a directory of this host's own.
    """
    end = time.monotonic() + patience
    while not (run_dir / "lock").exists():
        if time.monotonic() > end:
            raise ConfigError("run_dir", str(run_dir), "is not the directory that rank 0 sees there; name one that all nodes share")
        time.sleep(0.5)
