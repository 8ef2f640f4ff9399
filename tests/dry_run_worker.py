"""Counts steps of a rank, really trained or in a dry run: python dry_run_worker.py real|dry FOLDER CASES, a JSON {name: arguments}."""

import gc
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from ditmoe_ds.distributed import shards
from ditmoe_ds.distributed.settings import read_ds_config
from ditmoe_ds.distributed.topology import join, leave
from ditmoe_ds.ending import end
from ditmoe_ds.planning.counting import Count, CountOnMeta
from ditmoe_ds.planning.recipe import read_job
from ditmoe_ds.planning.rehearsal import Rehearsal


def peak_of_last_step(profile):
    """By the tensor allocator's own events."""
    events = profile.profiler.kineto_results.events()
    begin = max(event.start_ns() for event in events if event.name() == "last step")
    now = peak = 0
    for moment, amount in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += amount
        peak = max(peak, now) if moment >= begin else 0
    return peak


def count(arguments, real):
    recipe, job = read_job(arguments, None, 12)
    counted = Count(1) if real else CountOnMeta(1)
    with torch.profiler.profile(profile_memory=True) if real else nullcontext() as profile:
        rehearsal = Rehearsal(recipe, job, read_ds_config(recipe.parallel), counted)
        if real:
            shards.fill(rehearsal.engine, rehearsal.shards, lambda name, start, out: out.normal_(std=0.02))
        else:
            balance(rehearsal.engine.module)
        for last in (False, True):
            gc.collect()
            counted.start()
            sent.clear()
            with torch.profiler.record_function("last step") if last else nullcontext():
                rehearsal.step()
    found = dict(peak=counted.peak, when=counted.when, at_peak={kind: size for kind, size in counted.at_peak.items() if size})
    found["sent"] = {" ".join(pair): amount for pair, amount in counted.sent.items() if amount}
    return found | (dict(allocator=peak_of_last_step(profile), passed_on=dict(sent)) if real else {})


mode, folder, cases = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
rank, world = int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", 1))
sent = {}
torch.manual_seed(rank)
if mode == "real":
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    from planner import Sent

    join()
    sent = Sent().bytes
    found = {name: count(arguments, real=True) for name, arguments in cases.items()}
else:
    from ditmoe_ds.planning.fake_world import balance, fake_world

    with fake_world(0, 2):
        found = {name: count(arguments, real=False) for name, arguments in cases.items()}
(folder / f"{mode}{rank}.json").write_text(json.dumps(found))
if mode == "real":
    leave()
    end(0)
