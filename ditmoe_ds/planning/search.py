"""Ways to train a job on a cluster, and the best of them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import gcd
from typing import Literal, get_args

from ditmoe_ds.models.dit import DiTConfig, Recompute
from ditmoe_ds.models.tensor_plan import divided, has_biased_experts
from ditmoe_ds.planning.job import Assumptions, Cluster, Job, Shape
from ditmoe_ds.planning.plan import Plan

Objective = Literal["time", "memory", "gpus"]


def shapes(job: Job, cluster: Cluster, stages: Iterable[Shape]) -> Iterator[Shape]:
    """Each of ``stages`` with every TP, EP and micro-batch that divides the job and the cluster, and every kind of recomputation."""
    experts = job.model.experts if job.model.routed_layers else 1
    for stage in stages:
        for tensor in tensor_sizes(job.model, cluster):
            groups = cluster.world // tensor
            for ep in divisors(gcd(experts, groups)):
                for micro in divisors(job.global_batch // groups) if job.global_batch % groups == 0 else ():
                    for recompute in get_args(Recompute):
                        yield replace(stage, tensor=tensor, ep=ep, micro=micro, recompute=recompute)


def tensor_sizes(model: DiTConfig, cluster: Cluster) -> list[int]:
    """Tensor-parallel sizes that divide the model and fit inside a node: between nodes the network is too slow for a layer's sums."""
    return [1] if has_biased_experts(model) else divisors(gcd(cluster.per_node, *divided(model).values()))


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def clusters(cluster: Cluster) -> list[Cluster]:
    """The cluster, half of it, a quarter and so on: first fewer nodes, then fewer GPUs of one node."""
    found = [cluster]
    while found[-1].world > 1:
        last = found[-1]
        found.append(replace(last, nodes=last.nodes // 2) if last.nodes > 1 else replace(last, per_node=last.per_node // 2))
    return found


def search(job: Job, cluster: Cluster, stages: Sequence[Shape], assumptions: Assumptions, objective: Objective) -> list[Plan]:
    """Every plan; with the objective "gpus" also on parts of the cluster."""
    places = clusters(cluster) if objective == "gpus" else [cluster]
    return [Plan(job, place, shape, assumptions) for place in places for shape in shapes(job, place, stages)]


def best(plans: Iterable[Plan], objective: Objective) -> Plan | None:
    """The best of those that fit: the fastest, the one with the least memory, or the fastest on the fewest GPUs. None if none fits.

    Of equally fast ones, that with the largest micro-batch: small ones are slower on a GPU, which a plan does not know.
    """
    orders = {
        "time": lambda plan: (round(plan.step_seconds, 6), -plan.shape.micro, plan.peak),
        "memory": lambda plan: (plan.peak, plan.step_seconds),
        "gpus": lambda plan: (plan.cluster.world, round(plan.step_seconds, 6), -plan.shape.micro, plan.peak),
    }
    return min((plan for plan in plans if plan.fits), key=orders[objective], default=None)


def pareto(plans: Iterable[Plan], objective: Objective) -> list[Plan]:
    """The plans that no other beats in both time and memory (with "gpus": time and number of GPUs), the fastest first."""
    front: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.step_seconds, plan.peak)):
        if not front or cost(plan, objective) < cost(front[-1], objective):
            front.append(plan)
    return front


def cost(plan: Plan, objective: Objective) -> float:
    """What is traded against time."""
    return plan.cluster.world if objective == "gpus" else plan.peak
