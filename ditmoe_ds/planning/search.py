"""Ways to train a job on a cluster, and the best of them."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Literal, get_args

from ditmoe_ds.models.dit import Recompute
from ditmoe_ds.planning.job import Assumptions, Cluster, Job, Shape
from ditmoe_ds.planning.plan import Plan

Objective = Literal["time", "memory", "gpus"]


def shapes(job: Job, cluster: Cluster, stages: Iterable[Shape]) -> Iterator[Shape]:
    """Every EP, micro-batch and recomputation that divides, of ``stages``, which say the rest."""
    experts = job.model.experts if job.model.routing != "dense" else 1
    images = job.global_batch // cluster.world if job.global_batch % cluster.world == 0 else 0
    for stage in stages:
        for ep in (n for n in range(1, cluster.world + 1) if cluster.world % n == 0 and max(experts, 1) % n == 0):
            for micro in (n for n in range(1, images + 1) if images % n == 0):
                for recompute in get_args(Recompute):
                    yield replace(stage, ep=ep, micro=micro, recompute=recompute)


def clusters(cluster: Cluster) -> list[Cluster]:
    """It and its halves and quarters and so on: fewer nodes, then fewer GPUs of one."""
    found = [cluster]
    while found[-1].world > 1:
        last = found[-1]
        found.append(replace(last, nodes=last.nodes // 2) if last.nodes > 1 else replace(last, per_node=last.per_node // 2))
    return found


def search(job: Job, cluster: Cluster, stages: Iterable[Shape], assumptions: Assumptions, objective: Objective) -> list[Plan]:
    """Every plan; with the objective "gpus" also on parts of the cluster."""
    stages = list(stages)
    places = clusters(cluster) if objective == "gpus" else [cluster]
    return [Plan(job, place, shape, assumptions) for place in places for shape in shapes(job, place, stages)]


def best(plans: Iterable[Plan], objective: Objective) -> Plan | None:
    """Of those that fit: the fastest, the one with the least memory, or the fastest on the fewest GPUs. None if none fits."""
    orders = {
        "time": lambda plan: (plan.step_seconds, plan.peak),
        "memory": lambda plan: (plan.peak, plan.step_seconds),
        "gpus": lambda plan: (plan.cluster.world, plan.step_seconds, plan.peak),
    }
    return min((plan for plan in plans if plan.fits), key=orders[objective], default=None)


def pareto(plans: Iterable[Plan], objective: Objective) -> list[Plan]:
    """Those that no other beats in both time and memory (with "gpus": in both time and number of GPUs); the fastest first."""
    front: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.step_seconds, plan.peak)):
        if not front or cost(plan, objective) < cost(front[-1], objective):
            front.append(plan)
    return front


def cost(plan: Plan, objective: Objective) -> float:
    """What is traded for time."""
    return plan.cluster.world if objective == "gpus" else plan.peak
