"""Hostfiles, and commands on their hosts over ssh."""

import contextlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from ditmoe_ds.errors import ConfigError

_LINE = re.compile(r"(?P<host>[\w.@:-]+)\s+slots\s*=\s*(?P<slots>\d+)")


def read_hostfile(path: str) -> dict[str, int]:
    """Host -> slots (processes), in the order of the file. Lines are ``host slots=8``; ``#`` starts a comment.

    Raises:
        ConfigError: no file, a line of another form, a host twice, no slots, no hosts.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise ConfigError("--hostfile", path, f"no readable file there ({error.strerror})") from None
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if not match or text.startswith("-"):
            raise ConfigError("--hostfile", path, f"line {number}, {text!r}: write HOST slots=N, for example node1 slots=8")
        if match["host"] in found:
            raise ConfigError("--hostfile", path, f"line {number}: host {match['host']} is there twice; give it all its slots in one line")
        if int(match["slots"]) < 1:
            raise ConfigError("--hostfile", path, f"line {number}: {match['host']} needs at least 1 slot; comment it out to leave it out")
        found[match["host"]] = int(match["slots"])
    if not found:
        raise ConfigError("--hostfile", path, "names no host; write one HOST slots=N per line")
    return found


def start(
    host: str | None, command: list[str], environment: dict[str, str], output: int | IO[Any] = subprocess.PIPE
) -> "subprocess.Popen[str]":
    """Run ``command`` on ``host`` in this folder, with this Python on its path, until it ends or its standard input is closed.

    A ``host`` of None is this machine, without ssh. ssh never asks for a password; for an unreachable host it ends with code 255 after at
    most 15 seconds.
    """
    options = ["BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=10", "ServerAliveCountMax=3"]
    there = [sys.executable, "-P", "-m", "ditmoe_ds.launching.node"]  # -P: else it would import what lies in the folder first
    ssh = ["ssh", "-T", *[word for option in options for word in ("-o", option)], "--", str(host), shlex.join(there)]
    process = subprocess.Popen(
        ssh if host else there,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",  # a banner or a library may write anything
        start_new_session=True,  # Ctrl-C is for the launcher, which ends them in order
    )
    assert process.stdin
    request = dict(command=command, environment=dict(PYTHONSAFEPATH="1") | environment, folder=str(Path.cwd()))
    with contextlib.suppress(BrokenPipeError):  # ssh has ended already; its output and code say why
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    return process
