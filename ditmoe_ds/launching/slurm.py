"""``ditmoe launch slurm`` and ``slurm-array``: fill in a script of launchers/slurm, keep it with the run, submit it."""

import re
import shlex
import subprocess
from pathlib import Path

import ditmoe_ds
from ditmoe_ds.errors import ConfigError, UserError

SCRIPTS = Path(ditmoe_ds.__file__).parents[1] / "launchers" / "slurm"


def fill_in(script: str, options: dict[str, str | int | None], settings: dict[str, str], arguments: list[str]) -> str:
    """A script of ours with options, variables and arguments written into it.

    Args:
        options: of sbatch, by name without dashes. None keeps the script's own; "" is for an option without a value.
        settings: environment variables that the script reads.
        arguments: the script's command line.

    Raises:
        ConfigError: an option's value that cannot stand on an #SBATCH line.
    """
    lines = script.splitlines()
    body = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    given = {key: str(value) for key, value in options.items() if value is not None}
    for key, value in given.items():
        if re.search(r"[\s\"'#\\]", value):
            raise ConfigError(f"--{key}", value, "an option of sbatch has no spaces, quotes, # or backslashes")
    head = [line for line in lines[:body] if line.partition("=")[0].removeprefix("#SBATCH --") not in given]
    head += [f"#SBATCH --{key}={value}" if value else f"#SBATCH --{key}" for key, value in given.items()]
    head += [f"export {key}={shlex.quote(value)}" for key, value in settings.items()]
    return "\n".join([*head, f"set -- {shlex.join(arguments)}", *lines[body:]]) + "\n"


def container(image: str | None) -> str:
    """How srun starts a command inside ``image``: Apptainer for a .sif file, else pyxis (an .sqsh file or a name for enroot)."""
    if not image:
        return ""
    apptainer = image.endswith(".sif")
    for path, parted_by in ((image, r"\s"), (str(Path.cwd()), r"\s" if apptainer else r"[\s,:]")):
        if found := re.search(parted_by, path):
            raise ConfigError("--container", image, f"{path!r} has {found[0]!r} in it; link to it by a name without")
    if apptainer:
        return f"apptainer exec --nv {image}"
    return f"--container-image={image} --container-mounts={Path.cwd()} --container-workdir={Path.cwd()}"


def submit(script: Path) -> str:
    """Hand a script to sbatch. Returns the job's number.

    Raises:
        UserError: there is no SLURM here, or it refuses; in its own words.
    """
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("sbatch: not found; run this on a login node of the cluster, or look at the script with --dry-run") from None
    if done.returncode:
        raise UserError(f"sbatch refused {script}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]
