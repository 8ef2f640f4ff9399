"""Runs that are asked to stop, and runs that lose a rank."""

import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from unittest.mock import Mock

import psutil
import pytest
import torch
import torch.distributed as dist
import yaml
from latents import write_latents
from processes import ROOT, Ranks, launch, losses, until_step

from ditmoe_ds.distributed import lookout
from ditmoe_ds.distributed.topology import World, check_expert_parallel, describe_placement, join, on_all_ranks, take_place_from_srun
from ditmoe_ds.errors import ConfigError, UserError
from ditmoe_ds.launching.restarts import should_restart
from ditmoe_ds.training.interruption import MARKER, mark
from ditmoe_ds.training.lock import claim

STEPS = 40
WORKER = ROOT / "tests" / "lookout_worker.py"


def _line(connection):
    with connection.makefile() as file:
        return next(line for line in file if line.strip())  # an empty one answers ours


def test_rank_0_is_told_last(monkeypatch):
    """It ends at once, and everybody's connection with it."""
    monkeypatch.setattr(lookout, "GATHER", 5.0)  # the others have as long to end
    office = lookout._Office(40)
    ranks = [socket.create_connection(("127.0.0.1", office.port)) for _ in range(40)]
    for rank, connection in enumerate(ranks):
        hello = dict(token=office.token, rank=rank, host="here", step=7)
        connection.sendall((json.dumps(hello) + "\n" + json.dumps(dict(step=7)) + "\n").encode())
    while len(office._present) < len(ranks):
        time.sleep(0.01)
    ranks[3].sendall((json.dumps(dict(step=7, error="shard.tar: ends early", code=2)) + "\n").encode())
    told = [_line(connection) for connection in ranks[1:]]
    assert set(told) == {told[0]} and "rank 3 on here failed after step 7: shard.tar: ends early" in told[0]
    ranks[0].setblocking(False)
    assert ranks[0].recv(4096) == b"\n"
    with pytest.raises(BlockingIOError):
        ranks[0].recv(1)
    for connection in ranks[1:]:
        connection.close()
    ranks[0].setblocking(True)
    assert _line(ranks[0]) == told[0]
    ranks[0].close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interruption")
    path = folder / "recipe.yaml"
    content = dict(
        model=dict(name="DiT-MoE-Nano/2-4E2A"),
        data=dict(manifest=write_latents(folder / "latents"), workers=1),
        parallel=dict(expert=2, zero_stage=3),
        train=dict(steps=STEPS, global_batch=16, precision="fp32", validate_every=0, sample_every=0, tensorboard=False),
        checkpoint=dict(every=STEPS),
        run_dir=str(folder / "whole"),
    )
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_signal_to_one_rank_saves_and_the_run_goes_on_exactly(recipe):
    whole, run_dir = recipe.parent / "whole", recipe.parent / "signal"
    output = launch(2, ["-m", "ditmoe_ds.train", recipe])[0][1]
    assert "2 processes meet at 127.0.0.1:" in output
    assert "2 processes on 1 host; EP groups of 2 consecutive ranks, each inside a host\nexperts by one GEMM each" in output
    parts = re.search(r"start-up (\S+) s: import (\S+) s, join (\S+) s, build (\S+) s, first step (\S+) s, first batch (\S+) s", output)
    total, *each = map(float, parts.groups())
    assert total == pytest.approx(sum(each), abs=0.3)
    assert each[0] > 0.5  # importing torch and deepspeed
    command = ["-m", "ditmoe_ds.train", recipe, f"run_dir={run_dir}"]
    ranks = Ranks(2, command)
    until_step(run_dir, 3)
    ranks.processes[1].send_signal(signal.SIGUSR1)
    output = ranks.wait(60)[0][1]
    stopped = json.loads((run_dir / MARKER).read_text())["step"]
    assert 3 <= stopped < STEPS
    assert f"interrupted after step {stopped}; started again, the run goes on from step_{stopped:08d}" in output
    assert len(losses(run_dir)) == stopped
    launch(2, command)
    assert not (run_dir / MARKER).exists()
    assert losses(run_dir) == losses(whole)


def test_ctrl_c_reaches_every_process_and_saves(recipe):
    run_dir = recipe.parent / "ctrl-c"
    ranks = Ranks(2, ["-m", "ditmoe_ds.train", recipe, f"run_dir={run_dir}", "train.steps=100000"])
    until_step(run_dir, 3)
    for rank in ranks.processes:
        for process in [*psutil.Process(rank.pid).children(recursive=True), psutil.Process(rank.pid)]:  # as a terminal does
            process.send_signal(signal.SIGINT)
    output = ranks.wait(60)[0][1]
    stopped = json.loads((run_dir / MARKER).read_text())["step"]
    assert (run_dir / "checkpoints" / f"step_{stopped:08d}").is_dir() and "Traceback" not in output
    output = launch(2, ["-m", "ditmoe_ds.train", recipe, f"run_dir={run_dir}", f"train.steps={stopped}"])[0][1]
    assert f"train.steps={stopped}: nothing is left to do" in output
    assert not (run_dir / MARKER).exists(), "no launcher starts it again"


def test_a_second_ctrl_c_ends_at_once(recipe):
    """And the other rank, which waits for this one, learns it."""
    run_dir = recipe.parent / "twice"
    ranks = Ranks(2, [WORKER, "1", "3", "hang", recipe, f"run_dir={run_dir}", "data.workers=1"])
    until_step(run_dir, 3)
    time.sleep(1)
    for _ in range(2):
        ranks.processes[1].send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert ranks.processes[1].wait(20) == -signal.SIGINT
    assert ranks.processes[0].wait(20) == 1
    assert "rank 1 on " in ranks.wait(check=False)[0][1]


def test_rank_0_is_reached_by_either_internet_protocol():
    office = lookout._Office(2)
    for address in ("127.0.0.1", *(["::1"] if socket.has_dualstack_ipv6() else [])):
        with socket.create_connection((address, office.port), timeout=10) as rank:
            rank.sendall(json.dumps(dict(token=office.token, rank=0, host="here")).encode() + b'\n{"step": 7}\n')
            assert rank.recv(16) == b"\n"


def test_strangers_have_little_room():
    """Silent connections from anywhere would else take all files of rank 0; the ranks have room of their own."""
    office = lookout._Office(2)
    strangers = [socket.create_connection(("127.0.0.1", office.port), timeout=10) for _ in range(80)]  # sooner than ``SILENCE`` ends them
    turned_away = strangers[66:]
    assert [stranger.recv(1) for stranger in turned_away] == [b""] * 14
    for stranger in strangers[:2]:
        stranger.sendall(b"GET / HTTP/1.1\n")
        assert stranger.recv(1) == b""
    with socket.create_connection(("127.0.0.1", office.port), timeout=10) as rank:
        rank.sendall(json.dumps(dict(token=office.token, rank=0, host="here")).encode() + b'\n{"step": 7}\n')
        assert rank.recv(16) == b"\n"
    for stranger in strangers:
        stranger.close()


def test_ranks_may_open_as_many_files_as_the_system_lets_them(monkeypatch):
    """Rank 0 of 512 has some 2,100 connections; 1024 files are usual. Where that is too few, the network is not blamed."""
    for name, value in dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most // 2, most))
    join()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == most
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, most))
    try:
        with pytest.raises(UserError, match=r"Too many open files\); raise nofile in"):
            lookout._connect(0, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@pytest.mark.parametrize("local", ["0", "3"])
def test_tasks_that_see_a_gpu_each_are_told_before_they_wait_for_each_other(monkeypatch, capsys, local):
    """srun --gpus-per-task binds them so; rank N of a host takes its GPU N. Rank 0, whose GPU is there, must not wait for the others."""
    slurm = dict(SLURM_STEP_ID="0", SLURM_STEP_NUM_NODES="2", SLURM_NTASKS="8", SLURM_PROCID=local, SLURM_LOCALID=local, SLURM_JOB_ID="1")
    monkeypatch.setattr(os, "environ", slurm | dict(SLURM_LAUNCH_NODE_IPADDR="127.0.0.1", SLURMD_NODENAME="node1"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert on_all_ranks(lambda _: None) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: 4 processes on node1, but each sees 1 GPUs: ") if local == "0" else not said


def test_the_port_of_any_job_is_one(monkeypatch):
    """Numbers of jobs reach millions, ports 65535."""
    slurm = dict(SLURM_NTASKS="8", SLURM_PROCID="3", SLURM_LOCALID="3", SLURM_JOB_ID="1234567", SLURM_LAUNCH_NODE_IPADDR="10.0.0.1")
    monkeypatch.setattr(os, "environ", slurm)
    take_place_from_srun()
    assert (os.environ["RANK"], os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("3", "10.0.0.1", "34567")


@pytest.mark.parametrize("expert, experts, world, tensor", [(4, 8, 6, 1), (3, 8, 6, 1), (4, 8, 8, 4)])
def test_expert_groups_divide_experts_and_ranks(expert, experts, world, tensor):
    with pytest.raises(ConfigError, match=r"here one of \[1, 2\]"):
        check_expert_parallel(expert, experts, world, tensor)


def test_a_run_directory_holds_one_training_at_a_time(tmp_path, capsys):
    run_dir = tmp_path / "new" / "run"
    keep = (
        "import sys, time, pathlib; from ditmoe_ds.training import lock; k = lock.claim(pathlib.Path(sys.argv[1])); print(); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-uc", keep, run_dir], cwd=ROOT, stdout=subprocess.PIPE)
    holder.stdout.readline()
    who = f"process {holder.pid} on {socket.gethostname()}"
    says = f"{who} is training there; end it, choose another directory, or, if that host is gone for good, delete {run_dir / 'lock'}"
    with pytest.raises(ConfigError, match=re.escape(says)):
        claim(run_dir, patience=0.2)
    assert f"{who} is training there; waiting" in capsys.readouterr().out
    holder.kill()
    holder.wait()
    with claim(run_dir, patience=0.2):
        assert (run_dir / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
        claim(run_dir / "lock" / "run")


def test_placement():
    inside = describe_placement(["a"] * 4 + ["b"] * 4, 4)
    assert inside == "8 processes on 2 hosts; EP groups of 4 consecutive ranks, each inside a host"
    across = describe_placement(["a"] * 4 + ["b"] * 4, 8)
    assert "over 2 hosts" in across
    assert "parallel.expert up to 4" in across
    tensor = describe_placement(["a"] * 4 + ["b"] * 4, 2, tensor=2)
    assert "TP groups of 2 consecutive ranks, each inside a host; EP groups of 2 ranks, 2 apart, each inside a host" in tensor
    wide = describe_placement(["a"] * 4 + ["b"] * 4, 4, tensor=2)
    assert "over 2 hosts" in wide and "parallel.expert up to 2" in wide
    assert "every layer's all-reduces cross the network" in describe_placement(["a", "b"], 1, tensor=2)


def test_a_group_connects_those_who_speak(monkeypatch):
    """If they are many: each of 1,024 ranks would else ask the store of rank 0 for 1,024 addresses, for each of several groups. Those who
    are to leave together have spoken at the beginning: at the end the store may be gone."""
    place = dict(RANK="0", WORLD_SIZE="8", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    for name, value in (place | dict(TORCH_GLOO_LAZY_INIT="")).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCH_GLOO_LAZY_INIT")
    asked, steps = [], []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: steps.append("begin"))
    monkeypatch.setattr(dist, "barrier", lambda: steps.append("barrier"))
    join()
    assert steps == ["begin"] and "TORCH_GLOO_LAZY_INIT" not in os.environ
    monkeypatch.setenv("WORLD_SIZE", "1024")
    join()
    assert steps == ["begin", "begin", "barrier"]

    class Store(dist.Store):
        def set(self, key, value):
            inner.set(key, value)

        def wait(self, keys, *_):
            asked.extend(keys)
            inner.wait(keys)

        def get(self, key):
            return inner.get(key)

    inner, store, groups = dist.HashStore(), Store(), {}

    def sum_up(rank):
        groups[rank] = dist.ProcessGroupGloo(store, rank, 8, timedelta(seconds=30))
        ready.wait()
        quiet = len(asked)
        ready.wait()
        total = torch.ones(1)
        groups[rank].allreduce([total]).wait()
        sums[rank] = quiet, total.item()

    ready, sums = threading.Barrier(8), {}
    threads = [threading.Thread(target=sum_up, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums == dict.fromkeys(range(8), (0, 8.0)) and 8 <= len(asked) < 8 * 7


def test_a_killed_rank_is_named_and_all_end(recipe):
    run_dir = recipe.parent / "killed"
    ranks = Ranks(2, ["-m", "ditmoe_ds.train", recipe, f"run_dir={run_dir}", "train.steps=100000"])
    until_step(run_dir, 5)
    ranks.processes[1].kill()
    (code, output), _ = ranks.wait(check=False)
    assert code == 1
    line = re.search(r"^error: rank 1 on (\S+) ended without a word after step (\d+)", output, re.M)
    assert line[1] == os.uname().nodename
    assert int(line[2]) >= 4
    time.sleep(8)  # a loader's process looks for its parent every 5 seconds
    left = subprocess.run(["pgrep", "-f", str(run_dir)], capture_output=True, text=True, check=False).stdout
    assert not left


def test_rank_0_is_missed_too(recipe):
    """At once, whatever its loader's processes are about; the other rank of its host says so."""
    run_dir = recipe.parent / "killed-0"
    ranks = Ranks(2, ["-m", "ditmoe_ds.train", recipe, f"run_dir={run_dir}", "train.steps=100000"])
    until_step(run_dir, 5)
    loaders = psutil.Process(ranks.processes[0].pid).children(recursive=True)
    for loader in loaders:
        loader.suspend()
    ranks.processes[0].kill()
    try:
        assert ranks.processes[1].wait(30) == 1
    finally:
        for loader in loaders:
            loader.kill()
    _, (_, output) = ranks.wait(check=False)
    assert re.findall(r"^error: rank 0 on \S+ ended without a word, after step \d+", output, re.M), output


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_silent_rank_is_named(recipe, victim):
    run_dir = recipe.parent / f"silent-{victim}"
    ranks = Ranks(2, [WORKER, "none", "none", "none", recipe, f"run_dir={run_dir}", "train.steps=100000"])
    until_step(run_dir, 5)
    ranks.processes[victim].send_signal(signal.SIGSTOP)
    try:
        assert ranks.processes[1 - victim].wait(60) == 1
    finally:
        results = ranks.wait(0, check=False)
    output = results[1 - victim][1]
    assert len(re.findall(rf"^error: rank {victim} on \S+ was not heard for 6 s, after step \d+", output, re.M)) == 1, output


@pytest.mark.slow
def test_a_job_that_is_suspended_goes_on(recipe):
    """For longer than a rank may be silent, as by ``scontrol suspend``."""
    run_dir = recipe.parent / "suspended"
    ranks = Ranks(2, [WORKER, "none", "none", "none", recipe, f"run_dir={run_dir}", "train.steps=200"])
    until_step(run_dir, 5)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in ranks.processes:
            process.send_signal(number)
        time.sleep(10 if number == signal.SIGSTOP else 0)
    ranks.wait()
    assert len(losses(run_dir)) == 200


@pytest.mark.parametrize(
    ("error", "exits", "line"),
    [
        ("failure", 1, "RuntimeError: the card fell off the bus"),
        ("mistake", 2, "shard.tar: ends early"),
        ("long", 2, "members " + "x" * 1992),
    ],
)
def test_a_failing_rank_is_named_with_its_error(error, exits, line, recipe, monkeypatch):
    """And the checkpoint that is being written meanwhile is finished."""
    monkeypatch.setenv("SLOW_DISK", "3")
    command = [WORKER, "1", "3", error, recipe, f"run_dir={recipe.parent / error}", "checkpoint.every=2", "checkpoint.asynchronous=true"]
    (code, output), (failed, its) = Ranks(2, command).wait(check=False)
    assert (code, failed) == (exits, exits), output + its
    assert re.findall(r"^error: (.*)", output, re.M) == [f"rank 1 on {os.uname().nodename} failed after step 3: {line}"]
    assert ("Traceback" in its) == (error == "failure")
    assert "Traceback" not in output
    assert (recipe.parent / error / "checkpoints" / "latest").read_text() == "step_00000002"


def test_ranks_in_a_step_that_does_not_end_say_where(recipe, monkeypatch):
    monkeypatch.setenv("LONG", "4")
    run_dir = recipe.parent / "hanging"
    ranks = Ranks(2, [WORKER, "1", "3", "hang", recipe, f"run_dir={run_dir}"])
    files, deadline = [run_dir / "stacks" / f"rank-{rank}.txt" for rank in range(2)], time.monotonic() + 300
    while not all(file.is_file() and "train.py" in file.read_text() for file in files) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in ranks.processes:
        process.kill()
    output = ranks.wait(check=False)[0][1]
    waiting, sleeping = (file.read_text() for file in files)
    assert waiting.startswith("after step 3, at ") and sleeping.startswith("after step 3, at ")
    assert "lookout_worker.py" in sleeping and ", line" in sleeping and "train_step" in sleeping and "train_step" in waiting
    assert "step 4 takes more than 0 minutes" in output


def test_a_rank_that_fails_because_another_is_gone_is_not_blamed(monkeypatch):
    """The connection of a killed process may close after others have noticed and reported errors of their own."""
    monkeypatch.setattr(lookout, "GATHER", 0.5)
    office = lookout._Office(3)
    ranks = [socket.create_connection(("127.0.0.1", office.port)) for _ in range(3)]
    for rank, connection in enumerate(ranks):
        connection.sendall(json.dumps(dict(token=office.token, rank=rank, host=f"host{rank}")).encode() + b"\n")
    ranks[0].sendall(b'{"step": 7}\n')
    ranks[2].sendall(json.dumps(dict(step=8, error="connection closed by peer", code=1)).encode() + b"\n")
    time.sleep(0.1)
    ranks[1].close()
    verdict = json.loads(_line(ranks[0]))
    assert (verdict["rank"], verdict["code"]) == (1, 1)
    assert verdict["text"].startswith("rank 1 on host1 ended without a word after step 7")


def test_a_rank_that_cannot_say_where_it_is_stays_heard(tmp_path, monkeypatch):
    """A file server that hangs is why the step is long; the folder for stacks lies there, too."""
    monkeypatch.setattr(lookout, "BEAT", 0.05)
    (tmp_path / "stacks").mkdir()
    os.mkfifo(hung := tmp_path / "stacks" / "rank-1.txt")  # whoever opens it waits
    watch, (watch._socket, office) = object.__new__(lookout.Lookout), socket.socketpair()
    watch.world, watch.step, watch.since, watch.stacks = World(1, 2, 1), 3, -math.inf, tmp_path / "stacks"
    watch._closing, watch._sending = True, threading.Lock()
    watch._socket.settimeout(lookout.BEAT)
    office.settimeout(5)
    standing = threading.Thread(target=watch._stand, daemon=True)
    standing.start()
    with office, office.makefile() as reports:
        for _ in range(3):
            assert json.loads(reports.readline()) == dict(step=3)
            office.sendall(b"\n")
    standing.join(5)
    assert hung.read_text().startswith("after step 3, at ")  # once it answers


def test_rank_0_alone_reports_every_step():
    """It reads all reports, in the process that trains: 49 ms for those of a step of 1,000 ranks."""
    for rank, reports in ((0, 3), (1, 0)):
        watch = object.__new__(lookout.Lookout)
        watch.world, watch._send = World(rank, 2, rank), Mock()
        for step in (1, 2, 3):
            watch(None, dict(step=step))
        assert watch.step == 3 and watch._send.call_count == reports


def test_restarts_end_when_nothing_comes_of_them(tmp_path):
    def end(code, job="7"):
        return should_restart(tmp_path, job, code, most=2)

    assert end(0) == (False, "done")
    assert end(2)[0] is False
    assert [end(1)[0], end(137)[0]] == [True, True]
    again, why = end(1)
    assert not again
    assert "3 starts in a row ended at no checkpoint" in why
    assert end(1, job="8")[0]  # another job begins anew
    with (tmp_path / "restarts.jsonl").open("a") as file:
        file.write('{"job": "8", "sav')  # the node ended in the midst of it
    assert end(1, job="8")[0]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_00000100")
    assert end(1) == (True, "started again from step_00000100: ended with 1")
    mark(tmp_path, 100)
    assert end(0) == (True, "started again from step_00000100: interrupted")


def test_a_rank_that_ends_while_gloo_lets_go_of_a_tensor(tmp_path):
    """Python never lets gloo's thread in before it shuts down, where that thread would abort the process (-6). Nothing is lost."""
    worker = tmp_path / "worker.py"
    worker.write_text("""
import atexit, sys, time
import torch
import torch.distributed as dist
from ditmoe_ds.distributed.topology import join
from ditmoe_ds.ending import end
world = join()
group = dist.new_group(backend="gloo")
dist.barrier()
if world.rank == 0:
    sys.setswitchinterval(100)
    dist.all_reduce(torch.ones(4), group=group, async_op=True)
else:
    dist.all_reduce(torch.ones(4), group=group)
atexit.register(print, "left to do", end="")
deadline = time.monotonic() + 2
while time.monotonic() < deadline:
    pass
end(3)
""")
    for code, output in launch(2, [worker], check=False):
        assert code == 3 and output.endswith("left to do")
