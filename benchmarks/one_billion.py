"""A model of a billion parameters trains on this machine's CPU, with ZeRO-3 on 2 processes: planned against measured host memory.

python benchmarks/one_billion.py [--experts 10] [--steps 3] [--write]

Needs nearly 23 GB with 10 experts (0.97B parameters), 19 GB with 8 (0.80B): nothing else may run. It stops before anything is allocated
if that is not free.
"""

import argparse
import sys
import time
from typing import Any

import psutil
from planner import case, case_model, plan_of, rehearse
from ranks import CPU, on_ranks
from report import Page, forget_peak, host_bytes

from ditmoe_ds.distributed.topology import join, leave
from ditmoe_ds.models.sizes import describe
from ditmoe_ds.planning.counting import Count

WORLD = 2
SMALL = case(model="DiT-MoE-Nano/2-4E2A", stage=3, ep=WORLD)
"""Trains first, so that libraries, threads and connections are not counted."""
GIVE_BACK = dict(MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_=str(2**16))
"""glibc gives what is freed back to the system at once, so that what is resident is what somebody holds."""


def large(experts: int) -> dict[str, Any]:
    fields = dict(input_size=32)
    return case(
        model=f"DiT-MoE-B/2-{experts}E2A", stage=3, ep=WORLD, world=WORLD, micro=1, precision="bf16", bucket=10_000_000, fields=fields
    )


def work(experts: int, steps: int) -> dict[str, Any]:
    """On this rank: bytes before the model, between steps and at the peak; seconds of each step."""
    join()
    rehearse(SMALL, Count(WORLD)).step()
    forget_peak()
    before, run, seconds = host_bytes("VmRSS"), rehearse(large(experts), Count(WORLD)), []
    built = host_bytes("VmHWM")
    forget_peak()
    for _ in range(steps):
        start = time.monotonic()
        run.step()
        seconds.append(time.monotonic() - start)
    report = dict(before=before, built=built, resident=host_bytes("VmRSS"), peak=host_bytes("VmHWM"), seconds=seconds)
    leave()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="into the page")
    arguments = parser.parse_args()
    point = large(arguments.experts)
    plan, parameters = plan_of(point), describe(case_model(point))["total"]
    planned = f"{parameters / 1e9:.2f}B parameters; planned: {plan.peak / 1e9:.2f} GB a process ({plan.when})"
    if (needed := WORLD * (plan.peak + 0.6e9)) > (free := psutil.virtual_memory().available):
        sys.exit(f"{planned}; {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free: end other work, or take fewer --experts")
    page = Page(__file__, arguments.write, planned)
    reports = on_ranks(WORLD, work, arguments.experts, arguments.steps, environment=CPU | GIVE_BACK)
    page.table("process", "planned peak GB", "measured", "off", "between steps", "while built", "before", "seconds of the steps")
    for rank, report in enumerate(reports):
        peak, resident, built = ((report[key] - report["before"]) / 1e9 for key in ("peak", "resident", "built"))
        measured = f"{peak:.2f}", f"{plan.peak / 1e9 / peak - 1:+.1%}", f"{resident:.2f}", f"{built:.2f}", f"{report['before'] / 1e9:.2f}"
        page.row(rank, f"{plan.peak / 1e9:.2f}", *measured, ", ".join(f"{second:.0f}" for second in report["seconds"]))
    page.add("", f"Both processes: {sum(report['peak'] for report in reports) / 1e9:.1f} GB.")


if __name__ == "__main__":
    main()
