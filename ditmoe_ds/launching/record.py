"""``RUN_DIR/launch``: what was started, by which command, from which code."""

import json
import shutil
import sys
import time
from pathlib import Path

from ditmoe_ds.errors import ConfigError
from ditmoe_ds.source import source


def prepare(run_dir: Path, recipe: str) -> Path:
    """Make ``RUN_DIR/launch`` with a copy of the recipe, so that the user may edit the recipe while the job waits in the queue.

    Returns:
        The copy.

    Raises:
        ConfigError: ``run_dir`` cannot be written.
    """
    folder = run_dir / "launch"
    copy = folder / "recipe.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if Path(recipe).resolve() != copy.resolve():
            shutil.copyfile(recipe, copy)
    except OSError as error:
        raise ConfigError("run_dir", str(run_dir), f"cannot be written ({error.strerror}); name another") from None
    about = dict(**source(), command=sys.argv, time=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    (folder / "launch.json").write_text(json.dumps(about, indent=1) + "\n")
    return copy
