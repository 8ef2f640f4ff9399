"""``ditmoe launch hostfile``: DeepSpeed's per-node launcher on every host of a hostfile, started by ssh, watched, started again.

Not through pdsh, which pastes a recipe's overrides unquoted into a shell line, hides which host failed, and leaves the others running.
"""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from ditmoe_ds.errors import ConfigError, UserError
from ditmoe_ds.launching.doctor import ask
from ditmoe_ds.launching.facts import LOOPBACK
from ditmoe_ds.launching.hosts import start
from ditmoe_ds.launching.problems import Node, compare
from ditmoe_ds.launching.record import prepare
from ditmoe_ds.launching.restarts import MISTAKE, should_restart
from ditmoe_ds.training.interruption import MARKER
from ditmoe_ds.training.output import outlive_readers
from ditmoe_ds.training.plan import read_plan

OTHERS = 50.0
"""Seconds that the other hosts have to end by themselves when one has failed (a lookout needs 42 at most)."""
UNREACHABLE = 255
"""Exit code of ssh itself."""


@dataclass
class Job:
    """Training a recipe on some hosts, from the first start to the end, restarts included."""

    recipe: str
    overrides: list[str]
    slots: dict[str, int]
    """Processes by host."""
    environment: dict[str, str]
    """Set on every host."""
    master_addr: str | None
    master_port: int
    bind_cores: bool
    max_restarts: int
    min_nodes: int
    received: int | None = field(default=None, init=False)
    """The first signal that asked this launcher to stop."""

    def run(self) -> int:
        """Returns the exit code: 0 when the run is done, 2 for a user's mistake, 128 + N after signal N, else that of the failed host.

        Raises:
            UserError: a host that cannot be used, or a recipe that does not fit; before anything is started.
        """
        plan = read_plan([self.recipe, *self.overrides], sum(self.slots.values()))
        run_dir = Path(plan.recipe.run_dir).absolute()
        nodes, faults = survey(self.slots, run_dir, self.environment)
        if faults:
            raise UserError(faults)
        recipe = prepare(run_dir, self.recipe)
        outlive_readers()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)
        job = f"{socket.gethostname()}-{os.getpid()}-{time.time():.0f}"
        while True:
            assert nodes[0].facts
            used, master = {node.host: node.slots for node in nodes}, self.master_addr or nodes[0].facts["address"]
            if len(used) > 1 and master == LOOPBACK:
                raise ConfigError("--master-addr", master, f"each would meet itself; give an address of {nodes[0].host} for the others")
            said = ", ".join(f"{key}={value}" for key, value in self.environment.items())
            print(
                f"{sum(used.values())} processes on {', '.join(used)}; rendezvous {master}:{self.master_port}; environment {said}",
                flush=True,
            )
            code = self._start(used, master, recipe)
            if self.received:
                return 128 + self.received if code or (run_dir / MARKER).is_file() else 0
            again, why = should_restart(run_dir, job, code, self.max_restarts) if self.max_restarts else (False, "")
            if why:
                print(why, flush=True)
            if not again:
                return code
            nodes, faults = survey(self.slots, run_dir, self.environment)
            if len(nodes) < self.min_nodes:
                raise UserError(f"{len(nodes)} hosts are left, --min-nodes is {self.min_nodes}; {faults}")
            if faults:
                print(f"without the lost ones: {faults}", flush=True)
            read_plan([str(recipe), *self.overrides], sum(node.slots for node in nodes), share=slice(0))  # ranks look for shards

    def _start(self, used: dict[str, int], master: str, recipe: Path) -> int:
        """Run once, to the end of every host's part. Returns the code of the first that failed, or 0."""
        world = base64.urlsafe_b64encode(json.dumps({host: list(range(count)) for host, count in used.items()}).encode()).decode()
        processes, pumps = {}, []
        for rank, host in enumerate(used):
            command = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--node_rank={rank}"]
            command += [f"--master_addr={master}", f"--master_port={self.master_port}", "--log_level=warning"]
            command += ["--bind_cores_to_rank"] * self.bind_cores
            command += ["--module", "ditmoe_ds.train", str(recipe), *self.overrides]
            processes[host] = start(host, command, self.environment)
            pumps.append(threading.Thread(target=_relay, args=(host, processes[host]), daemon=True))
            pumps[-1].start()
        first: tuple[str, int] | None = None
        limit, asked = float("inf"), False
        while any(process.poll() is None for process in processes.values()):
            failed = [(host, process.returncode) for host, process in processes.items() if process.returncode]
            if failed and first is None:
                first, limit = failed[0], time.monotonic() + OTHERS
            if not asked and (self.received or time.monotonic() > limit):
                asked = True
                for process in processes.values():
                    assert process.stdin
                    process.stdin.close()  # by which ``node`` learns that it is to end
            time.sleep(0.1)
        for pump in pumps:
            pump.join(5)
        failed = [(host, process.returncode) for host, process in processes.items() if process.returncode]
        if not failed:
            return 0
        host, code = first or failed[0]
        meaning = " (ssh: the host or the way to it was lost)" if code == UNREACHABLE else ""
        print(f"{host} ended first, with {code}{meaning}", flush=True)
        return MISTAKE if any(code == MISTAKE for _, code in failed) else code

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number


def survey(slots: dict[str, int], run_dir: Path, environment: dict[str, str]) -> tuple[list[Node], str]:
    """The hosts that can be used, and in one line what is wrong with the others."""
    nodes, problems = ask(slots, str(run_dir), environment)
    problems += [problem for problem in compare(nodes, min_free_gb=0.0) if not problem.warning]
    faulty = {problem.host for problem in problems}
    return [node for node in nodes if node.host not in faulty], "; ".join(f"host {problem}" for problem in problems)


def _relay(host: str, process: "subprocess.Popen[str]") -> None:
    assert process.stdout
    for line in process.stdout:  # to its end: a host whose output nobody reads stands still
        print(f"{host}: {line}", end="", flush=True)
