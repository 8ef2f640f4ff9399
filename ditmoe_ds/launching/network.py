"""What can only be found out by a process on every node: ``python -m ditmoe_ds.launching.network HOST RUN_DIR EP``.

The processes know their places by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as in training. They meet in torch's
key-value store at rank 0, which tells them what to do and gathers what they found. Every wait has a time limit.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ditmoe_ds.errors import some
from ditmoe_ds.launching.facts import facts, say

if TYPE_CHECKING:
    from torch.distributed import Store

CONNECT = 30.0
"""Seconds in which a host must answer that is up."""
RENDEZVOUS = 300.0
"""Seconds in which every process must have reached the rendezvous: a file system takes minutes to hand torch to a thousand at once."""
NOTE = 30.0
"""Seconds after which those that are still waited for are named, and again."""
COLLECTIVES = 60.0
"""Seconds for starting the process group and all exchanges together."""
_MARGIN = 10.0
_TENSOR_BYTES = {"gloo": 1 << 24, "nccl": 1 << 28}
_REPEATS = 3


class Unreachable(Exception):
    """This process cannot take part in the rendezvous; says why."""


def main() -> None:
    host, run_dir, ep = sys.argv[1:]
    code = 0
    try:
        found = measure(host, run_dir, int(ep), lambda: say(dict(came=True)))
        if found:
            say(found)
    except Unreachable as error:
        say(dict(unreachable=str(error)))
        code = 1
    leave(code)


def leave(code: int) -> NoReturn:
    """End at once: a collective that hangs in another thread would hold up Python's own end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def measure(host: str, run_dir: str, ep: int, met: Callable[[], None] = lambda: None) -> dict[str, Any] | None:
    """Meet the others and measure with them.

    Args:
        host: this node's name, the same on all its ranks.
        run_dir: where rank 0 writes a file for all to read.
        ep: ranks of one expert-parallel group; 0 is all of a node.
        met: called when this process has reached the rendezvous.

    Returns:
        On rank 0, what all found; None on the others.
        ``ranks``: rank -> host, of those that came, and ``facts``: host -> facts;
        ``missing``: ranks that did not come; then nothing was exchanged;
        ``unwritten``: why rank 0 could not write in the run directory, or None;
        ``clock``: host -> [seconds ahead of rank 0, seconds by which that may be wrong];
        ``results``: rank -> what it found (``wrong``, of its GPU; ``reads``, ``all_reduce``, ``all_to_all``, ``error``).

    Raises:
        Unreachable: the rendezvous, from here.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _open_store(rank, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    try:
        store.set(f"came/{rank}", json.dumps(dict(host=host, facts=facts(run_dir))))
        met()
        if rank == 0:
            return _lead(store, size, run_dir, ep)
        store.wait(["plan"], timedelta(seconds=RENDEZVOUS + _MARGIN))
        result = _take_part(store, rank, json.loads(store.get("plan")))
        store.set(f"result/{rank}", json.dumps(result))
        store.wait(["end"], timedelta(seconds=COLLECTIVES + 2 * _MARGIN))  # nobody leaves while another still exchanges with it
        store.set(f"left/{rank}", "0")
        return None
    except RuntimeError as error:
        raise Unreachable(f"the rendezvous ended: {_short(error)}") from error


def _open_store(rank: int, address: str, port: int) -> "Store":
    from torch.distributed import TCPStore

    try:
        if rank:
            _knock(address, port)
        return TCPStore(address, port, None, rank == 0, timedelta(seconds=RENDEZVOUS), wait_for_workers=False)
    except (OSError, RuntimeError) as error:
        raise Unreachable(f"{address}:{port}: {_short(error)}") from error


def _knock(address: str, port: int) -> None:
    """Wait until something listens there. Where there is no route, a plain socket fails at once, TCPStore only after all of the time."""
    deadline = time.monotonic() + RENDEZVOUS
    while True:
        try:
            socket.create_connection((address, port), CONNECT).close()
            return
        except ConnectionRefusedError:  # rank 0 has not started yet, or never will
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _lead(store: "Store", size: int, run_dir: str, ep: int) -> dict[str, Any]:
    came = _gather(store, "came", range(size), RENDEZVOUS)
    ranks = {rank: arrival["host"] for rank, arrival in came.items()}
    missing = [rank for rank in range(size) if rank not in came]
    speakers = {host: min(rank for rank, at in ranks.items() if at == host) for host in dict.fromkeys(ranks.values())}
    token = secrets.token_hex(8)
    file = Path(came[0]["facts"]["run_dir"]) / f".ditmoe-doctor-{token}"
    try:
        unwritten = None
        try:
            file.write_text(token)
        except OSError as error:
            unwritten = _short(error)
        plan = dict(
            file=None if unwritten else str(file),
            token=token,
            speakers=list(speakers.values()),
            groups=_groups(ranks, ep),
            backend="nccl" if all(arrival["facts"]["gpus"] for arrival in came.values()) else "gloo",
            exchange=not missing,
        )
        store.set("plan", json.dumps(plan))
        clock = {host: _offset(store, rank) for host, rank in speakers.items() if rank}
        results = {0: _take_part(store, 0, plan)}
        results |= _gather(store, "result", [rank for rank in ranks if rank], COLLECTIVES + _MARGIN)
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
    store.set("end", "")
    _gather(store, "left", [rank for rank in results if rank], _MARGIN)  # the store ends with this process
    found = {host: came[rank]["facts"] for host, rank in speakers.items()}
    return dict(ranks=ranks, facts=found, missing=missing, unwritten=unwritten, clock=clock, results=results)


def _gather(store: "Store", what: str, ranks: "range | list[int]", seconds: float) -> dict[int, Any]:
    """What each rank has stored under ``what`` within ``seconds``; without those that stored nothing."""
    begun = told = time.monotonic()
    while not store.check([f"{what}/{rank}" for rank in ranks]) and (now := time.monotonic()) < begun + seconds:
        if now > told + NOTE:
            told = now
            absent = some([str(rank) for rank in ranks if not store.check([f"{what}/{rank}"])])
            print(f"after {now - begun:.0f} s still waiting for ranks {absent}", file=sys.stderr, flush=True)
        time.sleep(0.05)
    return {rank: json.loads(store.get(f"{what}/{rank}")) for rank in ranks if store.check([f"{what}/{rank}"])}


def _groups(ranks: dict[int, str], ep: int) -> list[list[int]]:
    """Consecutive ranks, as training groups them."""
    if ep:
        return [list(range(first, min(first + ep, len(ranks)))) for first in range(0, len(ranks), ep)]
    return [[rank for rank, at in ranks.items() if at == host] for host in dict.fromkeys(ranks.values())]


def _offset(store: "Store", rank: int) -> tuple[float, float] | None:
    """How far that rank's clock is ahead of this one and by how much that may be wrong, in seconds; None if it says nothing."""
    before = time.time()
    store.set(f"ping/{rank}", "")
    try:
        store.wait([f"pong/{rank}"], timedelta(seconds=_MARGIN))
    except RuntimeError:
        return None
    after = time.time()
    return float(store.get(f"pong/{rank}")) - (before + after) / 2, (after - before) / 2


def _take_part(store: "Store", rank: int, plan: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if rank in plan["speakers"]:
        if rank:
            store.wait([f"ping/{rank}"], timedelta(seconds=COLLECTIVES))
            store.set(f"pong/{rank}", repr(time.time()))
        if plan["file"]:
            try:
                result["reads"] = Path(plan["file"]).read_text() == plan["token"]
            except OSError:
                result["reads"] = False
    if plan["exchange"]:
        try:
            result |= _within(COLLECTIVES, lambda: _exchange(store, rank, plan["groups"], plan["backend"]))
        except Exception as error:  # libraries and drivers each fail in their own ways
            result["error"] = _short(error)
    if plan["backend"] == "nccl":
        result["wrong"] = _wrong(int(os.environ["LOCAL_RANK"]))
    return result


def _wrong(gpu: int) -> str | None:
    import torch

    from ditmoe_ds.launching.arithmetic import wrong_on

    torch.cuda.set_device(gpu)
    wrong = wrong_on(torch.device("cuda", gpu))
    return wrong and f"GPU {gpu}: {wrong}"


def _within(seconds: float, action: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The result of ``action``, which runs in a thread, since time-outs within gloo and NCCL do not cover all that can hang.

    Raises:
        TimeoutError: it takes longer.
    """
    done: Future[dict[str, float]] = Future()

    def run() -> None:
        try:
            done.set_result(action())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # no executor, whose thread would hold up the end of this process
    try:
        return done.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"not done within {seconds:.0f} seconds") from None


def _exchange(store: "Store", rank: int, groups: list[list[int]], backend: str) -> dict[str, float]:
    """All-reduce over the world and all-to-all in this rank's group: both checked, then timed.

    Returns:
        GB/s that pass a rank's link (what nccl-tests call bus bandwidth), so that sizes of groups compare; nothing for a group of one.

    Raises:
        RuntimeError: wrong numbers, or the library's own.
    """
    import torch
    import torch.distributed as dist

    size = sum(map(len, groups))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=dist.PrefixStore("world", store), rank=rank, world_size=size)
    handles = [dist.new_group(members) for members in groups]
    group, members = next((handle, members) for handle, members in zip(handles, groups, strict=True) if rank in members)
    count = _TENSOR_BYTES[backend] // 4

    def gigabytes_per_second(action: Callable[[], Any]) -> float:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(_REPEATS):
            action()
        if backend == "nccl":
            torch.cuda.synchronize()
        return _REPEATS * 4 * count / (time.perf_counter() - start) / 1e9

    pattern = torch.arange(count, device=device) % 128 + 0.0
    summed = pattern + rank
    dist.all_reduce(summed)
    if not torch.equal(summed, pattern * size + size * (size - 1) / 2):
        raise RuntimeError("all-reduce gives wrong sums")
    reduced = gigabytes_per_second(lambda: dist.all_reduce(summed))

    n, me = len(members), members.index(rank)
    parts = torch.arange(n, device=device).repeat_interleave(count // n) + 0.0  # part j goes to the group's j-th rank
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts + me * n, group=group)
    if not torch.equal(received, parts * n + me):
        raise RuntimeError("all-to-all gives wrong parts")
    exchanged = gigabytes_per_second(lambda: dist.all_to_all_single(received, parts, group=group))
    factors = dict(all_reduce=(reduced, 2 * (size - 1) / size), all_to_all=(exchanged, (n - 1) / n))
    return {name: speed * factor for name, (speed, factor) in factors.items() if factor}


def _short(error: Exception) -> str:
    """Its first line: torch's go on with a stack."""
    return str(error).strip().split("\n")[0][:200]


if __name__ == "__main__":
    main()
