"""``ditmoe doctor``: what is wrong with the nodes, before a training job finds out."""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from ditmoe_ds.errors import ConfigError, some
from ditmoe_ds.launching.facts import heard
from ditmoe_ds.launching.hosts import read_hostfile, start
from ditmoe_ds.launching.network import COLLECTIVES, CONNECT, NOTE, RENDEZVOUS, Unreachable, leave, measure
from ditmoe_ds.launching.problems import Node, Problem, compare, in_words

FACTS_SECONDS = RENDEZVOUS  # a host may import torch for them
MEASURE_SECONDS = 2 * RENDEZVOUS + 2 * COLLECTIVES
LATER_SECONDS = 10.0
"""Seconds that the others get once a process has failed: they wait for it in vain, but may have a failure of their own to report."""
LOGINS, LOGIN_SECONDS = 8, 0.5
"""How many logins start on a host at once, and seconds until the next ones: of more than 10 that are unfinished, sshd drops some."""

_SSH_FIXES = {
    "Could not resolve hostname": "correct its name in the hostfile, or add it to DNS or /etc/hosts",
    "Permission denied": "let this user in by key: ssh-copy-id {}",
    "Host key verification failed": "accept its key once: ssh {}",
    "": "see that it is up, that sshd runs there and that no firewall is in between: ssh {} true",
}
_RENDEZVOUS_FIXES = {
    "EADDRINUSE": "end what listens on that port there, or set MASTER_PORT to another",
    "Name or service not known": "add that name to DNS or /etc/hosts there, or write addresses in the hostfile",
    "Temporary failure in name resolution": "add that name to DNS or /etc/hosts there, or write addresses in the hostfile",
    "": "see that MASTER_ADDR is the first node's address and that routes and firewalls let TCP through between all nodes",
}
_EXCHANGE_FIX = (
    "let all TCP ports through between the nodes; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that connects them"
)
_ARITHMETIC_FIX = (
    "leave the GPU out and test it (dcgmi diag -r 3); if others of its kind say the same, this package's kernels do not suit "
    "that kind of GPU or the versions of torch and Triton there"
)


def add_command(commands: Any) -> None:
    """Add ``doctor`` to ``ditmoe``'s subparsers."""
    doctor = commands.add_parser("doctor", help="find what is wrong with the nodes before training (also: srun ditmoe doctor)")
    doctor.set_defaults(command=_doctor)
    doctor.add_argument("--hostfile", help="file with lines HOST slots=N; default: the nodes of srun, or this machine alone")
    doctor.add_argument("--run-dir", default=".", help="where the run will write; all nodes must see the same folder")
    doctor.add_argument("--ep", type=int, default=0, help="parallel.expert: ranks that exchange tokens; default: all ranks of a node")
    doctor.add_argument("--min-free-gb", type=float, default=10.0, help="free space that the run directory's disk needs")
    doctor.add_argument("--json", action="store_true", help="print the same as JSON")


def _doctor(arguments: argparse.Namespace) -> int:
    run_dir = str(Path(arguments.run_dir).absolute())
    if arguments.hostfile:
        slots = read_hostfile(arguments.hostfile)
        _check_ep(arguments.ep, sum(slots.values()))
        return _report(arguments, *_over_ssh(slots, run_dir, arguments.ep))

    from ditmoe_ds.distributed.topology import take_place_from_srun, under_srun

    if under_srun():
        take_place_from_srun()
        _check_ep(arguments.ep, int(os.environ["WORLD_SIZE"]))
        leave(_report(arguments, *_within_srun(run_dir, arguments.ep)))

    return _report(arguments, *_here(run_dir, arguments.ep))


def _check_ep(ep: int, world: int) -> None:
    if ep < 0 or (ep and world % ep):
        raise ConfigError("--ep", ep, f"must divide the {world} processes")


def ask(slots: dict[str, int], run_dir: str, environment: dict[str, str]) -> tuple[list[Node], list[Problem]]:
    """Ask all hosts of a hostfile at once for their facts, in this environment. Returns them, and why some do not answer."""
    nodes = [Node(host, count) for host, count in slots.items()]
    problems = []
    command = _python("facts", run_dir)
    ends = _run([(node.host, command, environment) for node in nodes], FACTS_SECONDS, FACTS_SECONDS)
    for node, (code, output) in zip(nodes, ends, strict=True):
        node.facts = heard(output) or None
        if not node.facts:
            problems.append(_silent(node.host, code, output))
    return nodes, problems


def _over_ssh(slots: dict[str, int], run_dir: str, ep: int) -> tuple[list[Node], list[Problem]]:
    nodes, problems = ask(slots, run_dir, {})
    there = [node for node in nodes if node.facts]
    if there:
        assert there[0].facts
        address = os.environ.get("MASTER_ADDR", there[0].facts["address"])
        problems += _measure(there, [node.host for node in there], address, run_dir, ep)
    return nodes, problems


def _here(run_dir: str, ep: int) -> tuple[list[Node], list[Problem]]:
    (code, output), *_ = _run([(None, _python("facts", run_dir), {})], FACTS_SECONDS, FACTS_SECONDS)
    facts = heard(output)
    node = Node(socket.gethostname(), len(facts.get("gpus", [])) or 1, facts or None)
    _check_ep(ep, node.slots)
    if not facts:
        return [node], [_silent(node.host, code, output)]
    return [node], _measure([node], [None], "127.0.0.1", run_dir, ep)


def _within_srun(run_dir: str, ep: int) -> tuple[list[Node], list[Problem]]:
    """Returns on rank 0 only. The others exit with 0, so that srun does not end rank 0 before it has reported."""
    from ditmoe_ds.distributed.topology import host_name

    host = host_name()
    rank = int(os.environ["RANK"])
    try:
        found = measure(host, run_dir, ep)
    except Unreachable as error:
        problem = _unreachable(host, str(error))
        if rank:
            print(_line(problem), file=sys.stderr)
            leave(0)
        return [Node(host, 1)], [problem]
    if not found:
        leave(0)
    hosts = list(found["ranks"].values())
    nodes = [Node(host, hosts.count(host), facts) for host, facts in found["facts"].items()]
    problems = []
    if found["missing"]:
        names = [name for name in _srun_nodes() if name not in hosts] or [f"of rank {rank}" for rank in found["missing"]]
        problems = [_absent(name) for name in names]
    return nodes, problems + _take_over(nodes, found)


def _srun_nodes() -> list[str]:
    try:
        listed = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", ""))
        command = ["scontrol", "show", "hostnames", listed]
        return subprocess.run(command, capture_output=True, text=True, timeout=CONNECT).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return []


def _measure(nodes: list[Node], targets: list[Any], address: str, run_dir: str, ep: int) -> list[Problem]:
    """Start a process for every GPU that training will use (where there are none, for every CPU core), and collect what they find."""
    port = os.environ.get("MASTER_PORT", "29500")
    passed = {key: value for key, value in os.environ.items() if key.startswith(("NCCL_", "GLOO_"))}
    places = []
    for node, target in zip(nodes, targets, strict=True):
        assert node.facts
        places += [(node, target, local) for local in range(min(node.slots, len(node.facts["gpus"]) or node.facts["cores"]))]
    jobs = []
    for rank, (node, target, local) in enumerate(places):
        place = dict(RANK=rank, WORLD_SIZE=len(places), LOCAL_RANK=local, MASTER_ADDR=address, MASTER_PORT=port)
        environment = passed | {key: str(value) for key, value in place.items()}
        jobs.append((target, _python("network", node.host, run_dir, str(ep)), environment))
    ends = _run(jobs, MEASURE_SECONDS, LATER_SECONDS)
    said = [heard(output) for _, output in ends]
    problems: dict[str, Problem] = {}
    for (node, _, _), words, (code, output) in zip(places, said, ends, strict=True):
        if "unreachable" in words:
            problems.setdefault(node.host, _unreachable(node.host, words["unreachable"]))
        elif code:
            text = f"its measuring process ended with code {code}: {_last_line(output)}"
            problems.setdefault(node.host, Problem(node.host, text, "see whether memory is free there and nvidia-smi shows sound GPUs"))
    if "ranks" in said[0]:
        for rank in said[0]["missing"]:
            host = places[rank][0].host
            problems.setdefault(host, _absent(host))
        return list(problems.values()) + _take_over(nodes, said[0])
    late = Problem(nodes[0].host, f"the measurement was not done within {MEASURE_SECONDS:.0f} s", _RENDEZVOUS_FIXES[""])
    return list(problems.values()) or [late]


def _take_over(nodes: list[Node], found: dict[str, Any]) -> list[Problem]:
    """Write into ``nodes`` what rank 0 has gathered (see ``network.measure``). Returns the problems that this shows by itself."""
    ranks = {int(rank): host for rank, host in found["ranks"].items()}
    results = {int(rank): result for rank, result in found["results"].items()}
    problems = []
    if found["unwritten"]:
        text = f"cannot write in the run directory: {found['unwritten']}"
        problems.append(Problem(ranks[0], text, "make room there, or give this user the right to write"))
    for node in nodes:
        mine = [results.get(rank, {"error": "its process ended without a word"}) for rank, host in ranks.items() if host == node.host]
        if not mine:
            continue  # none of its processes came
        node.clock, node.clock_margin = (0.0, 0.0) if node.host == ranks[0] else found["clock"][node.host] or (None, 0.0)
        node.reads_run_dir = mine[0].get("reads")
        node.all_reduce = min((one["all_reduce"] for one in mine if "all_reduce" in one), default=None)
        node.all_to_all = min((one["all_to_all"] for one in mine if "all_to_all" in one), default=None)
        errors = [one["error"] for one in mine if "error" in one]
        if errors:
            problems.append(Problem(node.host, f"all-reduce and all-to-all fail: {errors[0]}", _EXCHANGE_FIX))
        problems += [Problem(node.host, one["wrong"], _ARITHMETIC_FIX) for one in mine if one.get("wrong")]
    return problems


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"ditmoe_ds.launching.{module}", *arguments]


def _run(jobs: list[tuple[Any, list[str], dict[str, str]]], seconds: float, later: float) -> list[tuple[int | None, str]]:
    """Run jobs (host, command, environment) at the same time. After ``seconds``, or ``later`` after one has failed, the rest is ended.
    Every ``NOTE`` seconds the hosts are printed of which a job has not yet said a word.

    Returns:
        Of each job its exit code, or None if it was ended, and its output.
    """
    with contextlib.ExitStack() as stack:
        # files, since a pipe that nobody reads would block its process
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in jobs]
        begun: Counter[Any] = Counter()
        waves: dict[int, list[int]] = {}
        for i, (host, *_) in enumerate(jobs):
            waves.setdefault(begun[host] // LOGINS if host else 0, []).append(i)
            begun[host] += 1
        started: dict[int, subprocess.Popen[str]] = {}
        for number, wave in waves.items():
            time.sleep(LOGIN_SECONDS if number else 0)
            started |= {i: stack.enter_context(_ended(start(*jobs[i], outputs[i]))) for i in wave}
        processes = [started[i] for i in range(len(jobs))]
        beginning = told = time.monotonic()
        deadline = beginning + seconds
        while any(process.poll() is None for process in processes) and (now := time.monotonic()) < deadline:
            if any(process.poll() for process in processes):
                deadline = min(deadline, now + later)
            if now > told + NOTE:
                told = now
                silent = [i for i, process in enumerate(processes) if process.poll() is None and not _heard(outputs[i])]
                if hosts := list(dict.fromkeys(jobs[i][0] or "this machine" for i in silent)):
                    print(f"after {now - beginning:.0f} s still waiting for {some(hosts)}", file=sys.stderr, flush=True)
            time.sleep(0.05)
        ends = []
        for process, output in zip(processes, outputs, strict=True):
            output.seek(0)
            ends.append((process.poll(), output.read()))
        return ends


def _heard(output: IO[str]) -> dict[str, Any]:
    """What a job has said so far, in whole lines. Without ``seek``: the job writes where this file stands."""
    size = os.fstat(output.fileno()).st_size
    return heard(os.pread(output.fileno(), size, 0).decode(errors="replace").rpartition("\n")[0])


@contextlib.contextmanager
def _ended(process: "subprocess.Popen[str]") -> Any:
    try:
        yield process
    finally:
        assert process.stdin
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # node.py ends what it has started
        try:
            process.wait(LATER_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _silent(host: str, code: int | None, output: str) -> Problem:
    last = _last_line(output)
    if code == 255:
        return Problem(host, f"ssh cannot reach it: {last}", _fix(_SSH_FIXES, last).format(host))
    if code is None:
        return Problem(host, f"did not answer within {FACTS_SECONDS:.0f} s", _SSH_FIXES[""].format(host))
    fix = f"{Path.cwd()}, {sys.executable} and the packages must be at the same paths on every node"
    return Problem(host, f"its process ended with code {code}: {last}", fix)


def _last_line(output: str) -> str:
    return (output.strip().splitlines() or ["no word"])[-1].strip()


def _absent(host: str) -> Problem:
    return Problem(host, f"none or not all of its processes reached the rendezvous within {RENDEZVOUS:.0f} s", _RENDEZVOUS_FIXES[""])


def _unreachable(host: str, reason: str) -> Problem:
    return Problem(host, f"cannot reach the rendezvous: {reason}", _fix(_RENDEZVOUS_FIXES, reason))


def _fix(fixes: dict[str, str], text: str) -> str:
    return next(fix for fragment, fix in fixes.items() if fragment in text)


def _report(arguments: argparse.Namespace, nodes: list[Node], problems: list[Problem]) -> int:
    problems = problems + compare(nodes, arguments.min_free_gb)
    healthy = all(problem.warning for problem in problems)
    if arguments.json:
        print(json.dumps(dict(healthy=healthy, nodes=[asdict(node) for node in nodes], problems=[asdict(one) for one in problems])))
    else:
        print(_table(nodes))
        alike: dict[Problem, list[str]] = {}  # a problem that many nodes have takes one line
        for problem in sorted(problems, key=lambda one: one.warning):
            alike.setdefault(replace(problem, host=""), []).append(problem.host)
        for problem, hosts in alike.items():
            print(_line(replace(problem, host=", ".join(hosts))))
        count = sum(not problem.warning for problem in alike)
        print("healthy" if healthy else f"{count} problem{'s' * (count > 1)}")
    return 0 if healthy else 1


def _line(problem: Problem) -> str:
    return f"{'warning' if problem.warning else 'PROBLEM'}  {problem}"


def _table(nodes: list[Node]) -> str:
    rows = [["node", "slots", "Python", "torch", "deepspeed", "ditmoe_ds", "NCCL", "driver", "GPUs", "run-dir GB", "/tmp GB"]]
    rows[0] += ["clock s", "all-reduce GB/s", "all-to-all GB/s"]
    for node in nodes:
        facts = node.facts or {}
        words = [in_words(facts[key]) if facts else "-" for key in ("python", "torch", "deepspeed", "ditmoe_ds", "nccl", "driver", "gpus")]
        numbers = [facts.get("run_dir_gb"), facts.get("tmp_gb"), node.clock, node.all_reduce, node.all_to_all]
        forms = ["{:.0f}", "{:.0f}", "{:+.3f}", "{:.2f}", "{:.2f}"]
        figures = ["-" if number is None else form.format(number) for form, number in zip(forms, numbers, strict=True)]
        rows.append([node.host, str(node.slots), *words, *figures])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
