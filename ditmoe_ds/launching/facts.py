"""What one node reports about itself, without the network: ``python -m ditmoe_ds.launching.facts RUN_DIR``."""

import json
import os
import platform
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from importlib.metadata import PackageNotFoundError, version
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil

from ditmoe_ds.errors import in_a_line

LOCK_SECONDS = 300.0
"""DeepSpeed's extensions seldom take longer to build, so an older lock is probably one that a killed build left behind."""

LOOPBACK = "127.0.0.1"
"""Address of a host that has no other."""

_MARK = "ditmoe doctor: "


def say(what: dict[str, Any]) -> None:
    """Print ``what`` so that ``heard`` finds it among what libraries print."""
    print(_MARK + json.dumps(what), flush=True)


def heard(output: str) -> dict[str, Any]:
    """All that ``say`` printed into this output, as one dictionary."""
    found: dict[str, Any] = {}
    for line in output.splitlines():
        _, mark, text = line.partition(_MARK)
        if mark:
            found |= json.loads(text)
    return found


def facts(run_dir: str) -> dict[str, Any]:
    """Versions, GPUs, disks, limits and what compiling needs. Sizes are GB; None is "not there" or, of a limit, "unlimited"."""
    folder = _existing(Path(run_dir).absolute())
    driver = _driver()
    extensions = _extensions()
    _, nofile = resource.getrlimit(resource.RLIMIT_NOFILE)  # the hard limit, to which ranks raise theirs
    memlock, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "deepspeed", "ditmoe_ds")},
        "driver": driver,
        **(_gpus() if driver else dict(nccl=None, gpus=[])),
        "cores": len(os.sched_getaffinity(0)),
        "address": _address(),
        "run_dir": str(folder),
        "writable": os.access(folder, os.W_OK),
        "run_dir_gb": shutil.disk_usage(folder).free / 1e9,
        "tmp_gb": shutil.disk_usage("/tmp").free / 1e9,
        "nofile": None if nofile == resource.RLIM_INFINITY else nofile,
        "memlock": None if memlock == resource.RLIM_INFINITY else memlock,
        "ninja": shutil.which("ninja"),
        "not_compiled": _compile(),
        "extensions": str(extensions),
        "extensions_writable": os.access(_existing(extensions), os.W_OK),
        "locks": old_locks(),
    }


def old_locks() -> list[str]:
    """Files that make every later build of a DeepSpeed extension, and so the start of training, wait silently."""
    return [str(lock) for lock in sorted(_extensions().glob("**/lock")) if _age(lock) > LOCK_SECONDS]


def _address() -> str:
    """The first address by which another host may reach this one: IPv4 if there is one, else IPv6; neither loopback nor link-local."""
    entries = [entry for interface in psutil.net_if_addrs().values() for entry in interface]
    texts = [entry.address for family in (socket.AF_INET, socket.AF_INET6) for entry in entries if entry.family == family]
    return next((text for text in texts if not ((it := ip_address(text)).is_loopback or it.is_link_local)), LOOPBACK)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"\d{3,}\.\d+(\.\d+)?", text)
    return match[0] if match else "unknown"


def _gpus() -> dict[str, Any]:
    import torch  # only here: it takes seconds

    count = torch.cuda.device_count()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if count else None
    return dict(nccl=nccl, gpus=[torch.cuda.get_device_name(i) for i in range(count)])


def _compile() -> str | None:
    """Why a file that includes what every extension does is not compiled as torch compiles; None if it is."""
    headers = sysconfig.get_path("include", "posix_prefix")
    command = [*shlex.split(os.environ.get("CXX", "c++")), "-x", "c++", "-fsyntax-only", f"-I{headers}", "-"]
    try:
        end = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True, errors="replace")
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    said = in_a_line(end.stderr) or f"exit code {end.returncode}"  # not its last line alone: GCC's is "compilation terminated."
    return f"{command[0]}: {said}" if end.returncode else None


def _extensions() -> Path:
    """Where torch keeps compiled extensions; DeepSpeed's are among them."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", cache / "torch_extensions"))


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # its build has just ended


if __name__ == "__main__":
    say(facts(sys.argv[1]))
