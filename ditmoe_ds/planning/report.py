"""A plan and the results of a search as text, as a recipe's comment and as JSON: the same numbers."""

from dataclasses import asdict, replace
from typing import Any

from ditmoe_ds.models.dit import Recompute
from ditmoe_ds.models.sizes import describe
from ditmoe_ds.planning.plan import Plan
from ditmoe_ds.planning.search import Objective, best, pareto

RECOMPUTED: dict[Recompute, str] = {False: "nothing", "attention": "attention", True: "blocks"}


def overrides(plan: Plan, tensor: int = 1) -> str:
    """Overrides with which a recipe trains in this shape, without ``parallel.tensor`` if that is 1 here and in the recipe (``tensor``)."""
    shape = plan.shape
    cut = f"parallel.tensor={shape.tensor} " if {shape.tensor, tensor} != {1} else ""
    return (
        f"parallel.zero_stage={shape.stage} {cut}parallel.expert={shape.ep} train.accumulation={plan.accumulation} "
        f"train.activation_checkpointing={str(shape.recompute).lower()}"
    )


def _short(value: float, places: int) -> str:
    """With this many decimal places, or with two significant digits where a value other than 0 would read as 0."""
    return f"{value:,.{places}f}" if value >= 10**-places or not value else f"{value:.2g}"


def as_json(plan: Plan, plans: list[Plan], objective: Objective) -> dict[str, Any]:
    """The recipe's own plan, the Pareto front of those that fit, and the best of them. In bytes, seconds, or the unit in the name."""
    chosen, fitting = best(plans, objective), [other for other in plans if other.fits]
    return dict(
        cluster=asdict(plan.cluster),
        assumptions=asdict(plan.assumptions),
        job=asdict(plan.job) | {key: describe(plan.job.model, plan.job.text)[key] for key in ("total", "active")},
        recipe=_numbers(plan, plan),
        searched=len(plans),
        fitting=len(fitting),
        pareto=[_numbers(other, plan) for other in pareto(fitting, objective)],
        best=chosen and _numbers(chosen, plan),
    )


def _numbers(plan: Plan, own: Plan) -> dict[str, Any]:
    keys = ("accumulation", "peak", "usable", "fits", "when", "memory", "flops", "recompute_flops", "empty_flops", "alike_flops", "seconds")
    numbers: dict[str, Any] = dict(asdict(plan.shape), gpus=plan.cluster.world, overrides=overrides(plan, own.shape.tensor))
    numbers |= {key: getattr(plan, key) for key in (*keys, "step_seconds", "mfu", "images_per_second", "days", "gpu_hours")}
    return numbers | dict(activations=plan.activations.parts, traffic=[asdict(flow) for flow in plan.traffic])


def as_text(plan: Plan, plans: list[Plan], objective: Objective, title: str, checkpoints: int) -> str:
    """About 50 lines to read.

    Args:
        checkpoints: how many are on disk at once, at most.
    """
    job, cluster, gpu = plan.job, plan.cluster, plan.cluster.gpu
    size = describe(job.model, job.text)
    text = f" and {job.text} of text" if job.text else ""
    lines = [
        f"{title}: {size['total'] / 1e9:.3g}B parameters, {size['active'] / 1e9:.3g}B active; {job.patches} tokens an image{text}; "
        f"{job.precision}, {job.global_batch} images a step",
        f"{cluster.nodes} x {cluster.per_node} GPUs of {gpu.memory:g} GB and {gpu.tflops:g} TFLOP/s; "
        f"{gpu.node_bandwidth:g} GB/s in a node, {gpu.network_bandwidth:g} GB/s across nodes",
        "",
        f"As the recipe says: {overrides(plan)}, micro-batch {plan.shape.micro}",
        "",
        *_memory(plan),
        "",
        *_traffic(plan),
        "",
        *_time(plan),
        _disk(size["total"] * 4 * (3 + job.averages), checkpoints),
        "",
        *_assumed(plan),
        "",
        *_search(plan, plans, objective),
    ]
    return "\n".join(lines)


def as_comment(plan: Plan, plans: list[Plan], objective: Objective) -> str:
    """For a recipe's header: one line to three."""
    fit = "" if plan.fits else "; DOES NOT FIT"
    words = [
        f"{plan.peak / 1e9:.1f} GB of {plan.usable / 1e9:.1f} per GPU{fit}; {_short(plan.step_seconds, 3)} s per step, "
        f"{plan.images_per_second:,.0f} images/s, MFU {plan.mfu:.0%}; "
        f"{plan.job.steps:,} steps in {_short(plan.days, 1)} days, {_short(plan.gpu_hours, 0)} GPU-hours"
    ]
    if plan.host_seconds > plan.step_seconds:
        words.append(f"not counted: ZeRO-3's hooks in Python, {plan.host_seconds:.2f} s per step where measured (docs/scaling.md)")
    chosen = best(plans, objective)
    if chosen and chosen.step_seconds < 0.99 * plan.step_seconds:
        words.append(f"the search found a faster way, {_short(chosen.step_seconds, 3)} s: {overrides(chosen, plan.shape.tensor)}")
    return "\n".join(f"#   {line}" for line in words)


def _memory(plan: Plan) -> list[str]:
    lines = [f"{'GB on a GPU, ' + plan.when:<42}{'':>8}"]
    lines += [f"  {name:<40}{amount / 1e9:>8.2f}" for name, amount in plan.memory.items() if amount]
    margin = plan.cluster.gpu.memory * plan.assumptions.margin
    verdict = "fits" if plan.fits else f"DOES NOT FIT: {(plan.peak - plan.usable) / 1e9:.2f} GB too much"
    lines.append(f"  {'peak':<40}{plan.peak / 1e9:>8.2f}  of {plan.usable / 1e9:.1f} (less {margin:.1f} of margin): {verdict}")
    for recompute, words in RECOMPUTED.items():
        if recompute != plan.shape.recompute:
            other = replace(plan, shape=replace(plan.shape, recompute=recompute))
            lines.append(f"  {f'activations, recomputing {words}':<40}{other.activations.peak / 1e9:>8.2f}")
    return lines


def _traffic(plan: Plan) -> list[str]:
    lines = [f"{'GB that a GPU sends in a step':<42}{'in node':>8}{'across':>8}  beside"]
    for flow in plan.traffic:
        lines.append(f"  {flow.kind:<40}{flow.in_node / 1e9:>8.2f}{flow.across / 1e9:>8.2f}  {flow.phase}")
    return lines


def _time(plan: Plan) -> list[str]:
    job, names = plan.job, dict(exchange="exchange of tokens", sums="sums of tokens", zero="ZeRO's traffic, not hidden")
    names["gradients"] = "copies and sums of gradients"
    names["alike"] = "what the ranks of a TP group do alike"
    shown = {name: seconds for name, seconds in plan.seconds.items() if name not in ("alike", "sums") or plan.shape.tensor > 1}
    lines = [f"{'seconds of a step':<42}{'':>8}"]
    lines += [f"  {names.get(name, name):<40}{_short(seconds, 3):>8}" for name, seconds in shown.items()]
    lines.append(f"  {'step':<40}{_short(plan.step_seconds, 3):>8}  {plan.images_per_second:,.0f} img/s, MFU {plan.mfu:.1%}")
    again = f" and {_short(plan.recompute_flops / 1e12, 1)} again" if plan.recompute_flops else ""
    again += f" and {_short(plan.empty_flops / 1e12, 1)} for places that no token takes" if plan.empty_flops else ""
    again += f" and {_short(plan.alike_flops / 1e12, 1)} as others do" if plan.alike_flops else ""
    lines.append(
        f"  {_short(plan.flops / 1e12, 1)} TFLOP a GPU{again}; {job.steps:,} steps: "
        f"{_short(plan.days, 1)} days, {_short(plan.gpu_hours, 0)} GPU-hours"
    )
    return lines


def _disk(size: int, checkpoints: int) -> str:
    """Of fp32 masters, two moments and the averages."""
    return f"  {_short(size / 1e9, 1)} GB a checkpoint, at most {checkpoints} of them on disk: {_short(checkpoints * size / 1e12, 1)} TB"


def _assumed(plan: Plan) -> list[str]:
    assumed = plan.assumptions
    encoded = ["Not counted: a text encoder that runs in training (data.text_encoder), 2 bytes a parameter on every GPU."]
    cut = ["Tensor parallelism: sums of tokens hidden beside nothing, narrower matrices multiplied at the same rate."]
    host = [f"Not counted: ZeRO-3's hooks in Python, {plan.host_seconds:.2f} s of one core where they were measured (docs/scaling.md)."]
    return [
        f"Assumed: arithmetic at {assumed.mfu:.0%} of peak (--mfu), links and memory at {assumed.link:.0%} of their rate (--link),",
        f"ZeRO's traffic hidden beside {assumed.overlap:.0%} of the arithmetic it can run beside (--overlap), an even load of experts.",
        *(cut if plan.shape.tensor > 1 else []),
        *(host if plan.host_seconds > plan.step_seconds else []),
        *(encoded if plan.job.text else []),
    ]


def _search(plan: Plan, plans: list[Plan], objective: Objective) -> list[str]:
    fitting = [other for other in plans if other.fits]
    goods = "GPUs" if objective == "gpus" else "memory"
    columns = {"stage": 5, "TP": 4, "EP": 5, "micro": 7, "accum.": 8, "recompute": 11, "GPUs": 6, "GB": 8, "step s": 9, "img/s": 12}
    lines = [f"Of {len(plans)} ways to train it {len(fitting)} fit. The fastest, and what less {goods} costs:"]
    lines.append("  " + "".join(f"{name:>{width}}" for name, width in columns.items()) + f"{'GPU-hours':>13}")
    for other in pareto(fitting, objective):
        shape = other.shape
        row = f"  {shape.stage:>5}{shape.tensor:>4}{shape.ep:>5}{shape.micro:>7}{other.accumulation:>8}{RECOMPUTED[shape.recompute]:>11}"
        row += f"{other.cluster.world:>6}{other.peak / 1e9:>8.1f}{_short(other.step_seconds, 3):>9}{other.images_per_second:>12,.0f}"
        lines.append(row + f"{_short(other.gpu_hours, 0):>13}")
    if chosen := best(plans, objective):
        words = {
            "time": "The fastest",
            "memory": "With the least memory",
            "gpus": f"The fastest on the fewest GPUs, {chosen.cluster.world}",
        }
        told = f"{words[objective]}: {overrides(chosen, plan.shape.tensor)}"
        return [*lines, "", told, *([] if plan.fits else ["With it, the recipe fits."])]
    if not plans:
        return [f"Nothing to search: train.global_batch={plan.job.global_batch} does not divide by {plan.cluster.world} GPUs."]
    least = min(plans, key=lambda other: other.peak)
    return [
        f"Nothing fits. The least is {least.peak / 1e9:.1f} GB of {least.usable / 1e9:.1f}, with {overrides(least, plan.shape.tensor)}:",
        "take more nodes, GPUs with more memory, or a smaller model.",
    ]
