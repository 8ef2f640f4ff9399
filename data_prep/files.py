"""Files of a source that may come from anyone: a link in it may lead to any file of this machine, and not every file has an end.

Also used in the decoding processes, so nothing heavy is imported here.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ditmoe_ds.errors import DataError

MEMBER_LIMIT = 256 << 20
"""Most bytes of an image, and of a text in a tar."""


def inside(path: Path, root: Path) -> bool:
    """Whether ``path`` lies below the folder ``root`` once all links are followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def content(path: Path, limit: int) -> bytes:
    """What is in a file of at most ``limit`` bytes.

    Raises:
        ValueError: it is larger, or a device or pipe.
        DataError: it cannot be read at all.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path.name} is no regular file")
        if found.st_size > limit:
            raise ValueError(f"{path.name} has more than {limit} bytes")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); repair or remove it") from None
