"""Whether a run that ended should be started again; launchers/slurm/train.sbatch asks by ``python -m ditmoe_ds.launching.restarts``."""

import argparse
import contextlib
import json
import time
from itertools import takewhile
from pathlib import Path

from ditmoe_ds.training.interruption import MARKER

DONE, MISTAKE = 0, 2


def should_restart(run_dir: Path, job: str, code: int, most: int) -> tuple[bool, str]:
    """Decide, and note the end in ``restarts.jsonl``.

    Args:
        job: whose restarts count; those of other jobs do not.
        code: exit code of the run. Done and a user's mistake are final, unless the run was interrupted.
        most: how many restarts in a row may bring no new checkpoint.

    Returns:
        The decision, and one line that gives the reason.
    """
    history, latest = run_dir / "restarts.jsonl", run_dir / "checkpoints" / "latest"
    saved = latest.read_text().strip() if latest.is_file() else "no checkpoint"
    interrupted = code == DONE and (run_dir / MARKER).is_file()
    if code == DONE and not interrupted:
        return False, "done"
    if code == MISTAKE:
        return False, "not started again: the error above would come again"
    ends = []
    for line in history.read_text().splitlines() if history.is_file() else ():
        with contextlib.suppress(ValueError):  # a node or a disk may fail in the middle of a line
            ends.append(json.loads(line))
    own = [end["saved"] for end in reversed(ends) if end["job"] == job]
    fruitless = len(list(takewhile(lambda before: before == saved, own)))
    if fruitless >= most:
        return False, f"not started again: {fruitless + 1} starts in a row ended at {saved} (--max-restarts {most}), this one with {code}"
    run_dir.mkdir(parents=True, exist_ok=True)
    with history.open("a") as file:
        file.write(json.dumps(dict(job=job, saved=saved, code=code, time=time.strftime("%Y-%m-%dT%H:%M:%S%z"))) + "\n")
    return True, f"started again from {saved}: {'interrupted' if interrupted else f'ended with {code}'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--job", required=True)
    parser.add_argument("--exit-code", type=int, required=True)
    parser.add_argument("--max-restarts", type=int, required=True)
    arguments = parser.parse_args()
    print("ditmoe:", should_restart(arguments.run_dir, arguments.job, arguments.exit_code, arguments.max_restarts)[1])


if __name__ == "__main__":
    main()
