"""``ditmoe launch``: start a recipe on a SLURM cluster or on the hosts of a hostfile."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from data_prep.cli import parser as data_parser
from ditmoe_ds.errors import ConfigError
from ditmoe_ds.launching.record import prepare, recipe_copy
from ditmoe_ds.launching.slurm import SCRIPTS, container, fill_in, submit
from ditmoe_ds.pipelines.arguments import add_recipe, check_least


def add_commands(commands: Any) -> None:
    """Add ``launch`` to ``ditmoe``'s subparsers."""
    kinds = commands.add_parser("launch", help="train on many nodes").add_subparsers(required=True)

    slurm = kinds.add_parser("slurm", help="submit a job that saves before its time limit and restarts itself")
    slurm.set_defaults(command=_slurm)
    add_recipe(slurm)
    slurm.add_argument("--nodes", required=True, help="for example 4, or 2-4 for as many as are available at each start")
    slurm.add_argument("--gpus-per-node", type=int, required=True, help="0: train on the CPU")
    slurm.add_argument("--processes-per-node", type=int, help="default: one per GPU, or 1 without GPUs")
    slurm.add_argument("--cpus-per-task", type=int, help="cores of each process; default: the cluster's")
    slurm.add_argument("--time", help="time limit in sbatch's form; shortly before it the run saves and is queued again")
    slurm.add_argument(
        "--signal-seconds", type=int, default=180, help="seconds before the limit at which the run saves; more than a step and a save take"
    )
    slurm.add_argument("--max-restarts", type=int, default=3, help="most restarts in a row without a new checkpoint; 0: none")
    _add_submission(slurm)

    array = kinds.add_parser("slurm-array", help="submit ditmoe-data encode as a job array")
    array.set_defaults(command=_slurm_array)
    array.add_argument("--workers", type=int, required=True, help="tasks of the array, which divide the work")
    array.add_argument("--gpus-per-node", type=int, default=1, help="1, or 0 to encode on the CPU")
    array.add_argument("--cpus-per-task", type=int, help="cores of each worker; default: the cluster's")
    array.add_argument("--time", help="time limit in sbatch's form")
    _add_submission(array)
    array.add_argument("--out", default="launch", help="folder for the script and the workers' logs")
    array.add_argument("encode", nargs=argparse.REMAINDER, help="after --: the arguments of ditmoe-data encode")

    hostfile = kinds.add_parser("hostfile", help="train on the hosts of a hostfile, by ssh from here")
    hostfile.set_defaults(command=_hostfile)
    add_recipe(hostfile)
    hostfile.add_argument("--hostfile", required=True, help="file with lines HOST slots=N")
    hostfile.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help="set on every host; no others are passed on")
    hostfile.add_argument("--master-addr", help="where the processes meet; default: the first host's first address")
    hostfile.add_argument("--master-port", type=int, default=29500, help="where they meet")
    hostfile.add_argument("--bind-cores", action="store_true", help="give each process its own cores (needs numactl)")
    hostfile.add_argument("--max-restarts", type=int, default=0, help="most restarts in a row without a new checkpoint; 0: none")
    hostfile.add_argument("--min-nodes", type=int, help="restart with fewer hosts if at least this many are left; default: all")


def _add_submission(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--account", help="as sbatch takes it")
    parser.add_argument("--partition", help="as sbatch takes it")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="KEY[=VALUE]",
        help="any other option of sbatch, for example qos=high or exclusive",
    )
    parser.add_argument("--container", help="container image: FILE.sif for Apptainer, anything else for pyxis")
    parser.add_argument("--dry-run", action="store_true", help="print the script and submit nothing")


def _options(arguments: argparse.Namespace, **own: str | int) -> dict[str, str | int | None]:
    """Options of sbatch: ours, then those of --sbatch, which win."""
    options: dict[str, str | int | None] = {key.replace("_", "-"): value for key, value in own.items()}
    options |= {key: getattr(arguments, key) for key in ("account", "partition", "time")}
    options |= {"cpus-per-task": arguments.cpus_per_task, "gpus-per-node": arguments.gpus_per_node or None}
    return options | {key.replace("_", "-"): value for key, value in _pairs("--sbatch", arguments.sbatch, flags=True).items()}


def _pairs(option: str, given: list[str], flags: bool = False) -> dict[str, str]:
    """Settings KEY=VALUE by key; with ``flags``, one may be KEY alone, whose value is ""."""
    pairs = [setting.partition("=") for setting in given]
    for setting, (key, sign, _) in zip(given, pairs, strict=True):
        if not (sign or flags) or not key.replace("-", "_").isidentifier():
            raise ConfigError(option, setting, "write KEY=VALUE")
    return {key: value for key, _, value in pairs}


def _python(arguments: argparse.Namespace) -> dict[str, str]:
    image = container(arguments.container)
    return dict(PYTHON="python3" if image else sys.executable, CONTAINER=image)


def _literal(folder: Path) -> str:
    """For sbatch, which puts numbers of the job in place of ``%`` and a letter."""
    return str(folder).replace("%", "%%")


def _slurm(arguments: argparse.Namespace) -> int:
    from ditmoe_ds.training.plan import ask, read_plan
    from ditmoe_ds.training.recipe import read_recipe

    check_least(arguments, gpus_per_node=0, processes_per_node=1, cpus_per_task=1, signal_seconds=1, max_restarts=0)
    processes = arguments.processes_per_node or arguments.gpus_per_node or 1
    sizes = arguments.nodes.split("-")
    if len(sizes) > 2 or not all(size.isdigit() and int(size) for size in sizes) or int(sizes[0]) > int(sizes[-1]):
        raise ConfigError("--nodes", arguments.nodes, "write a number, or the least and the most, for example 2-4")
    if int(sizes[-1]) > int(sizes[0]) * processes:  # where tasks are counted by node, sbatch asks for the tasks of the least
        fix = f"SLURM takes no more nodes than the least has processes, {int(sizes[0]) * processes}; raise the least"
        raise ConfigError("--nodes", arguments.nodes, fix)
    recipe, share = [arguments.recipe, *arguments.overrides], slice(None)
    asked = ask(read_recipe(recipe))
    for size in range(int(sizes[0]), int(sizes[-1]) + 1):
        plan = read_plan(recipe, size * processes, asked, share)  # now, not after a night in the queue
        share = slice(0)  # the shards have been looked for
    run_dir = Path(plan.recipe.run_dir).absolute()
    options = _options(
        arguments,
        job_name=run_dir.name,
        output=f"{_literal(run_dir)}/launch/slurm-%j.log",
        nodes=arguments.nodes,
        ntasks_per_node=processes,
        signal=f"USR1@{arguments.signal_seconds}",
    )
    settings = _python(arguments) | dict(MAX_RESTARTS=str(arguments.max_restarts))
    copy = recipe_copy(run_dir, arguments.recipe)
    overrides = [override for override in arguments.overrides if not override.startswith("run_dir=")]
    text = fill_in((SCRIPTS / "train.sbatch").read_text(), options, settings, [str(copy), str(run_dir), *overrides])
    if arguments.dry_run:
        print(text, end="")
        return 0
    prepare(run_dir, arguments.recipe)
    script = run_dir / "launch" / "train.sbatch"
    script.write_text(text)
    job = submit(script)
    print(f"job {job}: {arguments.nodes} nodes x {processes} processes, script {script}")
    print(f"tail -F {run_dir / 'launch'}/slurm-{job}.log")
    return 0


def _slurm_array(arguments: argparse.Namespace) -> int:
    from data_prep.encode import check

    words = arguments.encode[1:] if arguments.encode[:1] == ["--"] else arguments.encode
    check_least(arguments, workers=1, gpus_per_node=0, cpus_per_task=1)
    if arguments.gpus_per_node > 1:
        raise ConfigError("--gpus-per-node", arguments.gpus_per_node, "a worker uses one GPU; raise --workers instead")
    encode = data_parser().parse_args(["encode", *words])  # now, not after a night in the queue; it ends this program if they are wrong
    if encode.worker is not None:
        raise ConfigError("--worker", "{}/{}".format(*encode.worker), "each task has its own; leave it out")
    check(encode.source, encode.vae, encode.size, encode.store, encode.text, encode.classes)
    folder = Path(arguments.out).absolute()
    options = _options(arguments, array=f"0-{arguments.workers - 1}", output=f"{_literal(folder)}/encode-%A_%a.log")
    settings = _python(arguments) | dict(WORKERS=str(arguments.workers))
    text = fill_in((SCRIPTS / "encode_array.sbatch").read_text(), options, settings, words)
    if arguments.dry_run:
        print(text, end="")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "encode_array.sbatch"
    script.write_text(text)
    print(f"job {submit(script)}: {arguments.workers} workers, script {script}; when all are done: ditmoe-data finalize OUT")
    return 0


def _hostfile(arguments: argparse.Namespace) -> int:
    from ditmoe_ds.launching.hostfile import Job
    from ditmoe_ds.launching.hosts import read_hostfile

    slots = read_hostfile(arguments.hostfile)
    check_least(arguments, max_restarts=0, min_nodes=1)
    if (arguments.min_nodes or 1) > len(slots):
        raise ConfigError("--min-nodes", arguments.min_nodes, f"the hostfile has {len(slots)}")
    environment = _pairs("--env", arguments.env)
    if devices := environment.get("CUDA_VISIBLE_DEVICES"):
        fix = "DeepSpeed's launcher overwrites it: the processes of a host take its first GPUs, as many as it has slots"
        raise ConfigError("--env", f"CUDA_VISIBLE_DEVICES={devices}", fix)
    environment.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    return Job(
        arguments.recipe,
        arguments.overrides,
        slots,
        environment,
        master_addr=arguments.master_addr,
        master_port=arguments.master_port,
        bind_cores=arguments.bind_cores,
        max_restarts=arguments.max_restarts,
        min_nodes=arguments.min_nodes or len(slots),
    ).run()
