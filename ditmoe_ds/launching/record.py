"""``RUN_DIR/launch``: what was started, by which command, from which code."""

import hashlib
import json
import sys
import time
from pathlib import Path

from ditmoe_ds.errors import ConfigError
from ditmoe_ds.source import source


def recipe_copy(run_dir: Path, recipe: str) -> Path:
    """Where the copy of a recipe lies: another content has another name, so that no launch changes what a running job restarts from."""
    return run_dir / "launch" / f"recipe-{hashlib.sha256(Path(recipe).read_bytes()).hexdigest()[:8]}.yaml"


def prepare(run_dir: Path, recipe: str) -> Path:
    """Make ``RUN_DIR/launch`` with a copy of the recipe, so that the user may edit the recipe while the job waits in the queue.

    Returns:
        The copy, see ``recipe_copy``.

    Raises:
        ConfigError: ``run_dir`` cannot be written.
    """
    folder = run_dir / "launch"
    copy, content = recipe_copy(run_dir, recipe), Path(recipe).read_bytes()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not copy.is_file() or copy.read_bytes() != content:
            copy.write_bytes(content)
    except OSError as error:
        raise ConfigError("run_dir", str(run_dir), f"cannot be written ({error.strerror}); name another") from None
    about = dict(**source(), command=sys.argv, time=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    (folder / "launch.json").write_text(json.dumps(about, indent=1) + "\n")
    return copy
