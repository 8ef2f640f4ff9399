"""Data sets behind a URL: webdataset's URL handlers download their files into a local folder of bounded size."""

from __future__ import annotations

import contextlib
import fcntl
import io
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ditmoe_ds.errors import ConfigError, DataError, visible

READ = 1 << 29
"""Most bytes of a file that is read into memory: a manifest of a million shards has fewer."""

ATTEMPTS = 6
"""Attempts to read a file, with pauses of 1, 2, 4, 8 and 16 seconds."""

LASTING = 10
"""Attempts where a training may depend on it, which nobody watches at night: pauses of 8.5 minutes in all, as for a server's restart."""

_OURS = re.compile(r"[0-9a-f]{32}\.(tar|index\.npy)")
"""Names of the files that a cache makes and may delete; its folder may hold others."""

T = TypeVar("T")


def is_url(root: str) -> bool:
    """Whether ``root`` is a URL (https://, s3://, ...). ``pipe:`` is not: it would run a shell command."""
    return re.match(r"(?!pipe:)[a-z][a-z0-9]*://", root) is not None


def refuse_unknown(key: str, value: str, url: str) -> None:
    """Refuse a URL of a kind that nothing opens, which no further attempt would change.

    Args:
        key, value: setting that has the URL, for the error.

    Raises:
        ConfigError: it is.
    """
    from webdataset.gopen import rewrite_url

    kind = re.match("[a-z][a-z0-9]*(?=:)", rewrite_url(url))  # rewritten as $GOPEN_REWRITE says
    known = {"file", *_openers()}
    if kind and kind[0] not in known:
        listed = ", ".join(f"{name}://" for name in sorted(known - {"__default__", "pipe"}))
        raise ConfigError(key, value, f"nothing opens {kind[0]}: URLs; choose a local path or one of {listed}")


def read(url: str) -> bytes:
    """The content of a file of at most ``READ`` bytes.

    Raises:
        DataError: it cannot be read, not even after several attempts.
    """
    stream = io.BytesIO()
    fetch(url, stream, READ)
    return stream.getvalue()


def fetch(url: str, out: BinaryIO, most: float = math.inf) -> None:
    """Write the content of a file of at most ``most`` bytes into ``out``, which is emptied before each attempt.

    Raises:
        DataError: it cannot be read, not even after several attempts.
    """

    def attempt() -> None:
        out.seek(0)
        out.truncate()
        _copy(url, out, most)

    persist(url, attempt)


class Cache:
    """A folder of downloaded files, shared by all processes of a machine; the least recently used make room for new ones.

    Args:
        folder: made if it is not there.
        limit: bytes; what was asked for last is kept even if it is larger.

    Raises:
        OSError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # one that is there may be read-only, which ``file`` would take for the server's failure
            pass

    def file(self, url: str, name: str, size: int, check: Callable[[Path], None], beside: str = "") -> Path:
        """The local copy, downloaded unless it is there. Another process may delete it, to make room, before it is opened.

        Args:
            name: 32 hexadecimal digits and .tar or .index.npy.
            size: its bytes; of more, no more are taken.
            check: raises OSError if a downloaded file is damaged.
            beside: name of a file that is not deleted to make room for this one.

        Raises:
            DataError: no whole copy could be fetched, not even after several attempts.
        """
        path = self.folder / name
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
            return path

        def attempt() -> Path:
            with open(self.folder / f"{name}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.is_file():
                    partial = path.with_name(f"{name}.partial")
                    with open(partial, "wb") as file:
                        _copy(url, file, size)
                    check(partial)
                    self._make_room(partial.stat().st_size, beside)
                    partial.replace(path)
            return path

        return persist(url, attempt, LASTING)

    def _make_room(self, size: int, beside: str) -> None:
        ages, total = [], size
        for path in self.folder.iterdir():
            if _OURS.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):  # another process is making room too
                    stat = path.stat()
                    total += stat.st_size
                    if path.name != beside:
                        ages.append((stat.st_mtime, path, stat.st_size))
        for _, path, freed in sorted(ages):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= freed


def _copy(url: str, out: BinaryIO, most: float) -> None:
    from webdataset.gopen import gopen

    _openers()
    try:
        with gopen(url, "rb") as stream:
            while out.tell() <= most and (block := stream.read(1 << 20)):
                out.write(block)
    except FileNotFoundError as error:
        raise DataError(f"{url}: cannot be read: no file or program {error.filename}") from None
    finally:
        if out.tell() > most:  # also where the program fails of which no more is read
            raise ValueError(f"more than {most} bytes")


def _openers() -> dict[str, Any]:
    """webdataset's table of what opens a URL, by its scheme, with s3, which it lacks."""
    from webdataset.gopen import Pipe, gopen_schemes

    def s3(url: str, mode: str, bufsize: int) -> Pipe:
        return Pipe(["aws", "s3", "cp", url, "-"], mode=mode, bufsize=bufsize)

    gopen_schemes.setdefault("s3", s3)  # $USE_AIS_FOR may have set another
    return gopen_schemes


def persist(name: str, action: Callable[[], T], attempts: int = ATTEMPTS) -> T:
    """What ``action`` returns, in the first attempt that raises neither OSError nor ValueError.

    Raises:
        DataError: no attempt did.
    """
    for number in range(1, attempts + 1):
        try:
            return action()
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            reason = re.sub(r"^\(\(\W*(\w+).*\): exit (\d+) .*", r"\1 ended with \2", reason)[:200]  # a pipe lists how it was opened
        if number < attempts:
            print(visible(f"{name}: {reason}; trying again"), file=sys.stderr, flush=True)
            time.sleep(2 ** (number - 1))
    raise DataError(f"{name}: cannot be read in {attempts} attempts ({reason})")
