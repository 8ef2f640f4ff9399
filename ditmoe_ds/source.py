"""Which code this is."""

import shutil
import subprocess
from pathlib import Path

from ditmoe_ds import __version__

ROOT = Path(__file__).parents[1]


def source() -> dict[str, str | None]:
    """The package's version and, where it lies in a git checkout of its own, the commit, ``-dirty`` if files differ from it."""
    return dict(ditmoe_ds=__version__, commit=_commit())


def _commit() -> str | None:
    if not (ROOT / ".git").exists() or not shutil.which("git"):  # an installed copy may lie in somebody else's checkout
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
