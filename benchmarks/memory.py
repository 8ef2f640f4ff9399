"""Memory of a training rank, measured, beside the formula of ``ditmoe_ds.distributed.memory``.

python benchmarks/memory.py [--accumulation 2]     every ZeRO stage x EP 1, 2, 4 on 4 processes
python benchmarks/memory.py --gather               what ZeRO-3 holds gathered, by its settings

Each shape is a fresh group of processes on the CPU, so that host memory is all their memory. A small model trains first, so that
libraries and connections are not counted; then a large one with small activations. Needs 8 GB.
"""

import argparse
import json
import re
from functools import partial
from typing import Any

from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from planner import case, rehearse
from ranks import CPU, on_ranks
from report import forget_peak, host_bytes

from ditmoe_ds.distributed.memory import training_memory
from ditmoe_ds.distributed.topology import join, leave
from ditmoe_ds.planning.counting import Count

WORLD = 4
MODEL, SMALL, LARGE = "DiT-MoE-Nano/2-4E2A", dict(input_size=4), dict(input_size=4, hidden=256, depth=12)
BUCKET = 2_000_000
"""reduce_bucket_size, as small against this model as 50M is against a large one."""
GATHER = {
    "what build sets": (False, {}),
    "the same, activations recomputed": (True, {}),
    "DeepSpeed's defaults": (False, dict(prefetch_bucket_size=50_000_000, max_live_parameters=10**9, max_reuse_distance=10**9)),
    "a small bucket alone": (False, dict(prefetch_bucket_size=1, max_live_parameters=10**9, max_reuse_distance=0)),
}
"""Whether to recompute activations, and ZeRO-3's settings."""
ENVIRONMENT = CPU | dict(MALLOC_MMAP_THRESHOLD_="65536")  # large freed tensors go back to the system at once


class Gathered:
    """Watches what ZeRO-3's coordinator holds whole, each time a module asks for its weights."""

    def __init__(self, engine: Any):
        self.most = self.ahead = 0
        names = {module: name for name, module in engine.module.named_modules()}
        parameters = [(name, p) for name, p in engine.module.named_parameters() if not p.ds_persist]
        coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        fetch = coordinator.fetch_sub_module

        def watched(module: Any, forward: bool) -> None:
            fetch(module, forward)
            whole = [(name, p) for name, p in parameters if p.ds_status != ZeroParamStatus.NOT_AVAILABLE]
            self.most = max(self.most, sum(p.ds_numel for _, p in whole))
            here = layer(names[module])
            if here is not None:
                experts = [layer(name) - here for name, p in whole if is_moe_param(p)]
                self.ahead = max([self.ahead, *experts] if forward else [self.ahead, *(-distance for distance in experts)])

        coordinator.fetch_sub_module = watched


def layer(name: str) -> Any:
    """The block that a module or parameter is in; None outside."""
    found = re.match(r"blocks\.(\d+)", name)
    return int(found[1]) if found else None


def work(stage: int, **shape: Any) -> dict[str, Any]:
    """Train on this rank and report. ``shape``: the rest of a ``planner.case``."""
    join()
    of = partial(case, model=MODEL, world=WORLD, micro=1, bucket=BUCKET, stage=stage, **shape)
    run = rehearse(of(fields=SMALL), Count(WORLD))
    run.step()
    del run
    forget_peak()
    before = host_bytes("VmRSS")
    run = rehearse(of(fields=LARGE), Count(WORLD))
    for _ in range(3):  # ZeRO-3 learns the order of the modules before it prefetches
        run.step()
    forget_peak()
    kept = host_bytes("VmRSS") - before
    watch = Gathered(run.engine) if stage == 3 else None
    run.step()
    report: dict[str, Any] = dict(kept=kept, peak=host_bytes("VmHWM") - before)
    whole = {name: p.ds_numel if stage == 3 else p.numel() for name, p in run.engine.module.named_parameters()}
    expert = {name for name, p in run.engine.module.named_parameters() if is_moe_param(p)}
    for part, names in (("expert", expert), ("dense", whole.keys() - expert)):
        report[f"local_{part}"] = sum(whole[name] for name in names)
        report[f"sharded_{part}"] = sum(shard.master.numel() for shard in run.shards if shard.name in names)
    if watch:
        block = sum(count for name, count in whole.items() if layer(name) == 0)
        groups = {p.ds_process_group.size() for name, p in run.engine.module.named_parameters() if name in expert}
        report |= dict(gathered_layers=watch.most / block, experts_ahead=watch.ahead, expert_gather_group=sorted(groups))
    leave()
    return report


def check_shards(stage: int, ep: int, reports: list[dict[str, Any]]) -> None:
    """From stage 1 on, every element of the optimizer's state lives on one rank: experts are sharded over their replicas."""
    for part, copies in (("expert", WORLD // ep), ("dense", WORLD)):
        local = reports[0][f"local_{part}"]
        for report in reports:
            part_of_it = local if stage == 0 else local / copies
            assert abs(report[f"sharded_{part}"] - part_of_it) < 0.01 * local, (stage, ep, part, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--expert", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--gather", action="store_true", help="vary ZeRO-3's settings at EP 2 instead")
    arguments = parser.parse_args()
    common = dict(precision=arguments.precision, accumulation=arguments.accumulation)
    if arguments.gather:
        for name, (recompute, values) in GATHER.items():
            zero = {f"stage3_{key}": value for key, value in values.items()}
            varied = partial(work, stage=3, ep=2, **common, zero=zero, recompute=recompute)
            report, *_ = on_ranks(WORLD, varied, environment=ENVIRONMENT)
            print(json.dumps(dict(settings=name) | report), flush=True)
    else:
        for stage in arguments.stages:
            for ep in arguments.expert:
                reports = on_ranks(WORLD, partial(work, stage=stage, ep=ep, **common), environment=ENVIRONMENT)
                check_shards(stage, ep, reports)
                dense, experts = reports[0]["local_dense"], reports[0]["local_expert"] * ep
                formula = training_memory(dense, experts, stage, ep, WORLD, **common, bucket=BUCKET)
                row = dict(stage=stage, ep=ep, dense=dense, experts=experts)
                for key in ("kept", "peak"):
                    measured = [report[key] for report in reports]
                    mib = [round(value / 2**20) for value in (min(measured), max(measured), getattr(formula, key))]
                    row |= {key: mib, f"{key}_off": round(max(abs(value / getattr(formula, key) - 1) for value in measured), 3)}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
