"""``ditmoe launch hostfile`` on real hosts: two network namespaces with an sshd each."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hosts import NETWORK, hosts, missing, pids_in
from latents import write_latents
from processes import ROOT, demo_on, losses, until_step

from ditmoe_ds.cli import main
from ditmoe_ds.errors import ConfigError
from ditmoe_ds.launching import hostfile
from ditmoe_ds.launching import hosts as hosts_of_launching
from ditmoe_ds.launching.hostfile import _relay
from ditmoe_ds.launching.hosts import read_hostfile
from ditmoe_ds.launching.problems import Node
from ditmoe_ds.launching.record import prepare

STEPS = 30
real_hosts = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture
def two(tmp_path):
    """Fresh hosts for a test, since some tests lose them."""
    with hosts(tmp_path / "hosts") as (found, environment):
        (tmp_path / "hostfile").write_text("host1 slots=1\nhost2 slots=1  # the second\n")
        yield found, environment | dict(DS_ACCELERATOR="cpu")


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    latents = write_latents(tmp_path_factory.mktemp("data") / "latents", train=512)
    return [*demo_on(latents, STEPS), "parallel.expert=1", "checkpoint.every=5"]


@pytest.fixture
def start(two, tmp_path):
    """Starts a job; none outlives its test."""
    jobs = []

    def begin(run_dir, *words):
        command = ["launch", "hostfile", "recipes/digits.yaml", "--hostfile", tmp_path / "hostfile", "--env", "DS_ACCELERATOR=cpu"]
        command = [sys.executable, "-m", "ditmoe_ds.cli", *map(str, command), *words, f"run_dir={run_dir}"]
        jobs.append(subprocess.Popen(command, cwd=ROOT, env=two[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()
        job.wait()


def ranks_of(host):
    """Processes of training in a host's network, by rank; a rank's loaders are not counted."""
    found = {}
    for pid in pids_in(host.namespace):
        process = psutil.Process(pid)
        environment = process.environ() if "ditmoe_ds.train" in process.cmdline() else {}
        if "RANK" in environment and "RANK" not in process.parent().environ():
            found[int(environment["RANK"])] = process
    return found


def nobody_left(found):
    """Whether only the hosts' sshd are left, after the seconds that a loader's process needs to miss its parent."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        pids = [pid for host in found.values() for pid in pids_in(host.namespace)]
        names = {psutil.Process(pid).name() for pid in pids if psutil.pid_exists(pid)}
        if names <= {"sshd"}:
            return True
        time.sleep(0.2)
    return False


@real_hosts
def test_a_killed_rank_is_named_and_ends_the_job_everywhere(two, start, overrides, tmp_path):
    found, _ = two
    job = start(tmp_path / "run", *overrides, "parallel.expert=2", "train.steps=100000")
    until_step(tmp_path / "run", 5, job)
    assert (list(ranks_of(found["host1"])), list(ranks_of(found["host2"]))) == ([0], [1])
    ranks_of(found["host2"])[1].kill()
    killed = time.monotonic()
    output, _ = job.communicate(timeout=300)
    assert time.monotonic() - killed < 60, output
    assert job.returncode not in (0, 2), output
    assert "EP groups of 2 consecutive ranks over 2 hosts" in output
    assert re.search(r"^host1: error: rank 1 on host2 ended without a word after step \d+", output, re.M), output
    assert nobody_left(found)


@real_hosts
def test_the_launcher_is_asked_to_stop(two, start, overrides, tmp_path):
    found, _ = two
    job = start(tmp_path / "run", *overrides, "train.steps=100000")
    until_step(tmp_path / "run", 5, job)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 128 + signal.SIGTERM, output
    assert re.search(r"^host1: interrupted after step (\d+); started again, the run goes on from step_0*\1$", output, re.M), output
    assert nobody_left(found)


@real_hosts
@pytest.mark.slow
def test_a_killed_launcher_leaves_nothing_behind(two, start, overrides, tmp_path):
    found, _ = two
    job = start(tmp_path / "run", *overrides, "train.steps=100000")
    until_step(tmp_path / "run", 5, job)
    job.kill()
    job.communicate()
    deadline = time.monotonic() + 120
    while any(ranks_of(host) for host in found.values()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert nobody_left(found)


@real_hosts
@pytest.mark.slow
def test_a_lost_host_is_done_without(two, start, overrides, tmp_path):
    found, _ = two
    run_dir = tmp_path / "run"
    job = start(run_dir, "--max-restarts", "1", "--min-nodes", "1", *overrides)
    until_step(run_dir, 12, job)
    for pid in pids_in(found["host2"].namespace):
        os.kill(pid, signal.SIGKILL)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    assert f"without the lost ones: host host2: ssh cannot reach it: ssh: connect to host {NETWORK}.2" in output
    assert "started again from step_00000010" in output
    assert "1 processes on host1" in output
    assert len(losses(run_dir)) == STEPS


@real_hosts
def test_hosts_that_cannot_be_used_are_told(start, overrides, tmp_path):
    (tmp_path / "hostfile").write_text(f"host1 slots=9999\nhots2 slots=1\n{NETWORK}.99 slots=1\n")
    job = start(tmp_path / "run", *overrides, "train.global_batch=10001")
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 2, output
    assert len([line for line in output.splitlines() if line.startswith("error")]) == 1
    assert f"host host1: 9999 slots (processes), but {os.cpu_count()} CPU cores. Fix: give it {os.cpu_count()}" in output
    assert "host hots2: ssh cannot reach it: ssh: Could not resolve hostname hots2" in output
    assert f"host {NETWORK}.99: ssh cannot reach it: ssh: connect to host {NETWORK}.99 port 22" in output
    assert not (tmp_path / "run").exists()
    (tmp_path / "hostfile").write_text("host1 slots=1\n")
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    job = start(tmp_path / "run", "--env", f"TORCH_EXTENSIONS_DIR={tmp_path / 'extensions'}", *overrides)
    output, _ = job.communicate(timeout=300)  # what a host says of itself is of the environment that it will have
    assert job.returncode == 2 and f"host1: {lock} is left" in output, output


def test_any_output_of_a_host_is_read_to_its_end(capsys):
    """Its processes would stand still otherwise."""
    worker = "import sys; sys.stdout.buffer.write(b'caf\\xe9\\n' + b'x' * 300_000 + b'\\nend\\n')"
    process = hosts_of_launching.start(None, [sys.executable, "-c", worker], {})
    _relay("here", process)
    assert process.wait(30) == 0
    said = capsys.readouterr().out.splitlines()
    assert (said[0], said[-1]) == ("here: caf\ufffd", "here: end")


@pytest.fixture
def command(tmp_path, monkeypatch, overrides):
    """To launch on a host that nobody asks: what it would do is up to ``Job._start``."""
    (tmp_path / "hostfile").write_text("host1 slots=1\n")
    monkeypatch.setattr(hostfile, "survey", lambda *_: ([Node("host1", 1, dict(address="host1"))], ""))
    monkeypatch.setattr(hostfile.signal, "signal", lambda *_: None)
    recipe = shutil.copy(ROOT / "recipes" / "digits.yaml", tmp_path)
    options = ["--hostfile", str(tmp_path / "hostfile"), "--max-restarts", "1"]
    return ["launch", "hostfile", recipe, *options, *overrides, f"run_dir={tmp_path / 'run'}"]


def test_a_log_that_cannot_be_written_stops_neither_hosts_nor_restarts(monkeypatch, command):
    """Its disk may be another than the run's."""
    ends = iter([1, 0])

    class Full:
        def write(self, *_):
            raise OSError(errno.ENOSPC, "No space left on device")

        flush = write

    def end(self, used, master, recipe):
        code = next(ends)
        process = hosts_of_launching.start(None, [sys.executable, "-c", f"print('x' * 300_000); raise SystemExit({code})"], {})
        _relay("here", process)
        return process.wait(30)

    monkeypatch.setattr(hostfile.Job, "_start", end)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Full())
    assert main(command) == 0
    assert not list(ends)


def test_a_recipe_edited_while_it_runs_stops_no_restart(monkeypatch, command):
    """Nor does the edited one, launched on the same run directory, change what that starts from."""
    ends, started = iter([1, 0]), []

    def edited(self, used, master, recipe):
        started.append(Path(recipe).read_text())
        edit = Path(command[2])
        edit.write_text(f"{started[0]}# edited")
        prepare(recipe.parent.parent, str(edit))
        edit.write_text("model: {name: another")
        return next(ends)

    monkeypatch.setattr(hostfile.Job, "_start", edited)
    assert main(command) == 0
    assert not list(ends) and started == [(ROOT / "recipes" / "digits.yaml").read_text()] * 2


def test_a_launch_that_cannot_be(tmp_path, capsys):
    (tmp_path / "hostfile").write_text("host1 slots=1\n")
    command = ["launch", "hostfile", "recipes/digits.yaml", "--hostfile", str(tmp_path / "hostfile")]
    for arguments, says in (
        (["--min-nodes", "2"], "--min-nodes=2: the hostfile has 1"),
        (["--env", "CUDA_VISIBLE_DEVICES=2"], "first GPUs"),
    ):
        assert main([*command, *arguments]) == 2
        assert says in capsys.readouterr().err


def test_hosts_do_not_meet_at_the_loopback(tmp_path, monkeypatch, capsys, overrides):
    (tmp_path / "hostfile").write_text("host1 slots=1\nhost2 slots=1\n")
    alone = [Node(host, 1, dict(address="127.0.0.1")) for host in ("host1", "host2")]
    monkeypatch.setattr(hostfile, "survey", lambda *_: (alone, ""))
    monkeypatch.setattr(hostfile.signal, "signal", lambda *_: None)
    command = ["launch", "hostfile", "recipes/digits.yaml", "--hostfile", str(tmp_path / "hostfile"), *overrides]
    assert main([*command, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "--master-addr='127.0.0.1': each would meet itself; give an address of host1" in capsys.readouterr().err


def test_a_command_that_does_not_end_when_asked_is_killed(tmp_path):
    """When the launcher is gone, after the seconds that a rank has for saving."""
    worker = "from ditmoe_ds.launching import node; node.GRACE = 1.0; raise SystemExit(node.main())"
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True)); print('here', flush=True)"
    stubborn += "\nwhile True: time.sleep(60)"
    request = dict(command=[sys.executable, "-c", stubborn], environment={}, folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", worker], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == "here\n"
    process.stdin.close()
    assert process.stdout.readline() == "asked\n"
    assert process.wait(30) == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node1 slots=8\nnode1 slots=8\n", "line 2: host node1 is there twice"),
        ("node1\n", "line 1, 'node1': write HOST slots=N"),
        ("node1 slots=0\n", "at least 1 slot"),
        ("-oProxyCommand=evil slots=1\n", "line 1"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_hostfile_of_another_form(tmp_path, text, words):
    (tmp_path / "hostfile").write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_hostfile(str(tmp_path / "hostfile"))
