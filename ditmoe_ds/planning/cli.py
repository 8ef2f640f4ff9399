"""``ditmoe plan``: what a recipe needs on a cluster, and the best way to spread it."""

import argparse
import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ditmoe_ds.distributed.hardware import find
from ditmoe_ds.errors import ConfigError
from ditmoe_ds.pipelines.arguments import add_recipe, check_least

HARDWARE = dict(
    gpu_tflops="TFLOP/s, dense bf16",
    gpu_memory="GB",
    gpu_memory_bandwidth="GB/s",
    node_bandwidth="GB/s to the GPUs of its node, one way",
    network_bandwidth="GB/s to other nodes, one way, for each GPU",
)


def add_commands(commands: Any) -> None:
    """Add ``plan`` to ``ditmoe``'s subparsers."""
    from ditmoe_ds.planning.job import Assumptions

    plan = commands.add_parser("plan", help="plan a recipe on a cluster: memory, traffic, time and the best parallel shape")
    plan.set_defaults(command=_plan)
    add_recipe(plan)
    plan.add_argument("--nodes", type=int, default=1, help="of the cluster")
    plan.add_argument("--gpus-per-node", type=int, default=8, help="of each node")
    plan.add_argument("--gpu", default="h100-80gb", help="a row of ditmoe_ds/distributed/hardware.py")
    for name, unit in HARDWARE.items():
        plan.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=f"{unit}, instead of the GPU's in the table")
    plan.add_argument("--objective", choices=["time", "memory", "gpus"], default="time", help="what to minimise; gpus: how many are needed")
    plan.add_argument("--image-size", type=int, help="pixels, with an f=8 VAE; default: the data's if they are here, else 256")
    plan.add_argument("--text-tokens", type=int, help="tokens of a caption; default: the data's if they are here, else 77")
    for assumed in fields(Assumptions):
        plan.add_argument(f"--{assumed.name}", type=float, default=assumed.default, metavar="SHARE", help="assumption; see docs/scaling.md")
    form = plan.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the same numbers, and more, as JSON")
    form.add_argument("--comment", action="store_true", help="print the lines that the headers of recipes have")


def _plan(arguments: argparse.Namespace) -> int:
    from ditmoe_ds.planning.job import Assumptions, Cluster
    from ditmoe_ds.planning.plan import Plan
    from ditmoe_ds.planning.recipe import own_shape, read_job, stages
    from ditmoe_ds.planning.report import as_comment, as_json, as_text
    from ditmoe_ds.planning.search import search

    check_least(arguments, nodes=1, gpus_per_node=1, text_tokens=1)
    shares = {assumed.name: getattr(arguments, assumed.name) for assumed in fields(Assumptions)}
    for name, share in shares.items():
        if name in ("mfu", "link"):  # divisors
            valid, wanted = 0 < share <= 1, "above 0 and at most 1"
        elif name == "margin":
            valid, wanted = 0 <= share < 1, "from 0 to below 1"
        else:
            valid, wanted = 0 <= share <= 1, "from 0 to 1"
        if not valid:
            raise ConfigError(f"--{name}", share, f"is a share, {wanted}")
    own = {name: getattr(arguments, name) for name in HARDWARE if getattr(arguments, name) is not None}
    for name, value in own.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')}", value, "must be a number above 0")
    gpu = replace(find(arguments.gpu), **{name.removeprefix("gpu_"): value for name, value in own.items()})
    cluster = Cluster(gpu, arguments.nodes, arguments.gpus_per_node)
    recipe, job = read_job([arguments.recipe, *arguments.overrides], arguments.image_size, arguments.text_tokens)
    plan = Plan(job, cluster, own_shape(recipe, job, cluster), Assumptions(**shares))
    plans = search(job, cluster, stages(recipe.parallel), plan.assumptions, arguments.objective)
    if arguments.json:
        print(json.dumps(as_json(plan, plans, arguments.objective), indent=1))
    elif arguments.comment:
        print(as_comment(plan, plans, arguments.objective))
    else:
        checkpoints = recipe.checkpoint.most(recipe.train.steps)
        print(as_text(plan, plans, arguments.objective, f"{Path(arguments.recipe).stem} on {arguments.gpu}", checkpoints))
    return 0
