"""Work on several fresh processes that form one group."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

import torch.multiprocessing

from ditmoe_ds.ending import end

CPU = dict(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
"""Environment of ranks that train on the CPU, also where there is a GPU."""


def on_ranks(world: int, work: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] = {}) -> list[Any]:
    """Call ``work(*arguments)`` in ``world`` new processes, which may ``join`` each other. What they print is dropped.

    Args:
        work: a function of a module, with arguments and a small result that can be pickled.
        environment: variables that a process has from its start on, as ``MALLOC_*`` needs.

    Returns:
        The results by rank.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = dict(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    results, before = multiprocessing.get_context("spawn").SimpleQueue(), dict(os.environ)
    os.environ |= dict(OMP_NUM_THREADS="1") | place | environment  # one thread, as under deepspeed's launcher
    try:
        torch.multiprocessing.spawn(_rank_main, (results, work, arguments), world)
    finally:
        os.environ.clear()
        os.environ.update(before)
    by_rank = dict(results.get() for _ in range(world))
    return [by_rank[rank] for rank in range(world)]


def _rank_main(rank: int, results: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    results.put((rank, work(*arguments)))
    end(0)
