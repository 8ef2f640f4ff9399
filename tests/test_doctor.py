"""``ditmoe doctor`` against faults planted on real hosts, under srun's variables, and what it makes of a list of facts."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import hosts
import psutil
import pytest
import torch
import torch.distributed as dist
from processes import ROOT, free_port

from ditmoe_ds.cli import main
from ditmoe_ds.launching import arithmetic, facts, network
from ditmoe_ds.launching import doctor as doctor_of_launching
from ditmoe_ds.launching.doctor import _take_over
from ditmoe_ds.launching.hosts import start
from ditmoe_ds.launching.problems import Node, compare

OLD = "0.19.7"

FACTS = dict(
    python="3.11.7", torch="2.13.0", deepspeed="0.19.8", ditmoe_ds="0.1.0", driver="550.54.15", nccl="2.27.3", gpus=["H100", "H100"],
    cores=8, run_dir="/run", writable=True, run_dir_gb=500.0, tmp_gb=50.0, nofile=65536, memlock=None,
    ninja="/bin/ninja", not_compiled=None, extensions="/ext", extensions_writable=True, locks=[],
)  # fmt: skip


def nodes(**changes):
    """Three equal nodes, of which the last one's facts are changed."""
    return [Node(f"host{i}", 2, FACTS | (changes if i == 3 else {})) for i in (1, 2, 3)]


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(python="3.10.1"), "Python 3.10.1; elsewhere 3.11.7"),
        (dict(torch="2.12.0"), "torch 2.12.0; elsewhere 2.13.0. Fix: there: pip install torch==2.13.0"),
        (dict(deepspeed=None), "deepspeed none; elsewhere 0.19.8. Fix: there: pip install deepspeed==0.19.8"),
        (dict(ditmoe_ds="0.2.0"), "ditmoe_ds 0.2.0; elsewhere 0.1.0"),
        (dict(nccl="2.20.0"), "NCCL 2.20.0; elsewhere 2.27.3"),
        (dict(gpus=["H100"]), "2 slots (processes), but 1 GPUs"),
        (dict(gpus=[]), "torch sees no GPU"),
        (dict(run_dir_gb=3.0), "3.0 GB free in /run, less than 10"),
        (dict(tmp_gb=0.1), "0.1 GB free in /tmp, less than 1"),
        (dict(writable=False), "cannot write in /run"),
        (dict(ninja=None), "no ninja on the PATH"),
        (dict(not_compiled="c++: no Python.h"), "does not compile #include <Python.h>: c++: no Python.h"),
        (dict(extensions_writable=False), "cannot write compiled extensions in /ext"),
        (dict(locks=["/ext/py311/shm/lock"]), "Fix: there: rm /ext/py311/shm/lock"),
    ],
)
def test_a_node_that_differs_is_named(changes, says):
    found = compare(nodes(**changes), 10.0)
    assert any(says in f"{one.text}. Fix: {one.fix}" and not one.warning for one in found), found
    assert {one.host for one in found} == {"host3"}


def test_other_gpus_and_drivers_are_warnings():
    """Of which no host is refused: 4 GPUs for 4 slots, among hosts of 8, are in order."""
    found = compare(nodes(driver="550.90", gpus=["H100", "H100", "A100"]), 10.0)
    assert [(one.host, one.text, one.warning) for one in found] == [
        ("host3", "GPU driver 550.90; elsewhere 550.54.15", True),
        ("host3", "GPUs 2 x H100, 1 x A100; elsewhere 2 x H100", True),
    ]


def test_limits_are_warnings():
    found = compare(nodes(nofile=1024, memlock=1 << 26), 10.0)
    assert [(one.host, one.warning) for one in found] == [("host3", True)] * 2
    assert not compare(nodes(nofile=None, memlock=1 << 26, gpus=[], driver=None, nccl=None)[2:], 10.0)  # unlimited; no GPU to lock for


def test_equal_nodes_are_healthy_and_unknown_ones_say_nothing():
    assert not compare([*nodes(), Node("host4", 2)], 10.0)


def test_the_clock_may_be_off_by_what_its_reading_took():
    def off(clock, margin):
        return bool(compare([Node("host1", 2, FACTS), Node("host2", 2, FACTS, clock=clock, clock_margin=margin)], 10.0))

    assert off(1.5, 0.1) and off(-1.5, 0.1) and not off(1.5, 0.6) and not off(-0.9, 0.0)


def test_what_rank_0_gathered_is_told_by_node():
    two = [Node("host1", 2, FACTS), Node("host2", 2, FACTS), Node("host3", 2, FACTS)]  # nothing came from the last
    results = {
        "0": dict(reads=True, all_reduce=3.0, wrong=None),
        "1": dict(all_reduce=2.0, wrong="GPU 1: RoPE fails"),
        "2": dict(error="hung"),
    }
    ranks = {"0": "host1", "1": "host1", "2": "host2", "3": "host2"}
    problems = _take_over(two, dict(ranks=ranks, results=results, clock=dict(host2=None), unwritten="No space left on device"))
    assert (two[0].clock, two[0].reads_run_dir, two[0].all_reduce, two[0].all_to_all) == (0.0, True, 2.0, None)
    assert (two[1].clock, two[1].reads_run_dir, two[1].all_reduce) == (None, None, None)
    assert [(one.host, one.text) for one in problems] == [
        ("host1", "cannot write in the run directory: No space left on device"),
        ("host1", "GPU 1: RoPE fails"),
        ("host2", "all-reduce and all-to-all fail: hung"),
    ]


@pytest.mark.parametrize("name", ["all_reduce", "all_to_all_single"])
def test_wrong_numbers_are_no_success(monkeypatch, name):
    sound = getattr(dist, name)

    def wrong(tensor, *others, **options):
        sound(tensor, *others, **options)
        tensor[-1] += 1

    monkeypatch.setattr(dist, name, wrong)
    with pytest.raises(RuntimeError, match="gives wrong"):
        try:
            network._exchange(dist.HashStore(), 0, [[0]], "gloo")
        finally:
            dist.destroy_process_group()


def test_what_hangs_is_left_behind():
    with pytest.raises(TimeoutError, match="not done within 0 seconds"):
        network._within(0.1, lambda: time.sleep(5) or {})
    with pytest.raises(ValueError, match="invalid literal"):  # and what fails is not said to hang
        network._within(60, lambda: int("x"))


@pytest.mark.parametrize("wrong, told", [(None, None), ("RoPE fails", "GPU 3: RoPE fails")])
def test_each_process_asks_its_gpu(monkeypatch, wrong, told):
    asked = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(arithmetic, "wrong_on", lambda device: (asked.append(device), wrong)[1])
    plan = dict(speakers=[], file=None, exchange=False, backend="nccl")
    assert network._take_part(dist.HashStore(), 0, plan) == dict(wrong=told)
    assert asked == [3, torch.device("cuda", 3)]


def test_groups_are_consecutive_ranks():
    ranks = {0: "a", 1: "a", 2: "b"}
    assert network._groups(ranks, 0) == [[0, 1], [2]] and network._groups(ranks, 2) == [[0, 1], [2]]
    assert network._groups(ranks, 3) == [[0, 1, 2]]


def test_alone_with_the_port_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "psutil.py").write_text("raise SystemExit('what lies in the folder was run')")
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert main(["doctor", "--run-dir", str(tmp_path / "new"), "--min-free-gb", "0.1", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (problem,) = [one for one in report["problems"] if not one["warning"]]
    assert "cannot reach the rendezvous" in problem["text"] and "set MASTER_PORT" in problem["fix"]
    assert report["nodes"][0]["facts"]["run_dir"] == str(tmp_path)


def test_the_compiler_is_tried(tmp_path, monkeypatch):
    """Being on the PATH is not enough."""
    monkeypatch.delenv("CXX", raising=False)
    assert facts._compile() is None
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'stub: broken' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert facts._compile() == "c++: stub: broken" == facts.facts(str(tmp_path))["not_compiled"]
    monkeypatch.setenv("CXX", f"{tmp_path}/none -O1")
    assert facts._compile() == f"{tmp_path}/none: No such file or directory"
    monkeypatch.setenv("CXX", "g++ -O1")
    assert facts._compile() is None
    monkeypatch.setattr(facts.sysconfig, "get_path", lambda *_: str(tmp_path))
    assert "Python.h: No such file" in facts._compile()


@pytest.mark.parametrize(
    "addresses, first",
    [
        (["127.0.0.1", "169.254.3.4", "fe80::1%eth0", "fd00::7", "10.0.0.7"], "10.0.0.7"),
        (["127.0.0.1", "::1", "169.254.3.4", "fe80::1%eth0", "fd00::7"], "fd00::7"),
        (["127.0.0.1", "::1"], "127.0.0.1"),
    ],
)
def test_a_host_is_known_by_an_address_that_others_reach(monkeypatch, addresses, first):
    family = {True: socket.AF_INET6, False: socket.AF_INET}
    entries = [SimpleNamespace(address=address, family=family[":" in address]) for address in addresses]
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: dict(all=entries))
    assert facts._address() == first


def test_an_sshd_is_not_asked_by_all_at_once(monkeypatch):
    """Of more than ten that it has not let in yet it drops some."""
    happened = []

    def begin(host, *_):
        happened.append(host)
        return subprocess.Popen(["true"], stdin=subprocess.PIPE)

    monkeypatch.setattr(doctor_of_launching, "start", begin)
    monkeypatch.setattr(doctor_of_launching, "LOGIN_SECONDS", 0.2)
    monkeypatch.setattr(doctor_of_launching.time, "sleep", lambda seconds: happened.append("later") if seconds == 0.2 else None)
    jobs = [(host, [], {}) for host, slots in (("a", 20), ("b", 3)) for _ in range(slots)]
    assert doctor_of_launching._run(jobs, 30.0, 1.0) == [(0, "")] * 23
    assert happened == ["a"] * 8 + ["b"] * 3 + ["later"] + ["a"] * 8 + ["later"] + ["a"] * 4


def test_who_is_late_is_told_early(monkeypatch, capsys):
    """A thousand processes may take minutes to load torch; one that never comes should not stay unnamed for as long."""
    monkeypatch.setattr(doctor_of_launching, "NOTE", 1.0)

    def begin(host, command, environment, output):
        return subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE, stdout=output)

    monkeypatch.setattr(doctor_of_launching, "start", begin)
    came = """echo 'ditmoe doctor: {"came": true}'; printf 'ditmoe doctor: {"ranks'; sleep 4; echo '": {}}'"""
    jobs = [("a", came, {}), ("b", "sleep 4", {}), ("b", "sleep 4", {}), ("c", "true", {})]
    ends = doctor_of_launching._run(jobs, 30.0, 1.0)
    assert [code for code, _ in ends] == [0] * 4 and ends[0][1].startswith("ditmoe doctor") and len(ends[0][1].splitlines()) == 2
    assert re.fullmatch(r"after \d s still waiting for b", capsys.readouterr().err.splitlines()[-1])


def test_who_is_missing_at_the_rendezvous_is_told_early(monkeypatch, capsys):
    store = dist.HashStore()
    store.set("came/0", "1")
    monkeypatch.setattr(network, "NOTE", 0.2)
    assert network._gather(store, "came", range(3), 0.6) == {0: 1}
    assert re.match(r"after \d s still waiting for ranks 1, 2\n", capsys.readouterr().err)


def test_a_slow_start_is_no_failure():
    """Hundreds of nodes that load torch from one file server at once take minutes."""
    assert min(network.RENDEZVOUS, doctor_of_launching.FACTS_SECONDS) >= 300 > network.CONNECT


def test_nodes_outside_the_step_are_not_missed(monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command[-1])
        raise subprocess.TimeoutExpired(command, 60)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-4]")
    assert doctor_of_launching._srun_nodes() == []
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n[1-2]")
    assert doctor_of_launching._srun_nodes() == [] and asked == ["n[1-4]", "n[1-2]"]


def test_commands_find_what_lies_beside_this_python(monkeypatch):
    """ninja, for one: a login over ssh activates no environment."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    process = start(None, ["sh", "-c", "command -v python3"], {})
    assert process.stdout.read().strip() == str(Path(sys.executable).parent / "python3")
    process.stdin.close()
    assert process.wait(10) == 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """host1 and host2 are sound. host3 has an older deepspeed, a false clock, and a build that was killed."""
    if hosts.missing():
        pytest.skip(hosts.missing())
    clock = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if not clock:
        pytest.skip("not installed: libfaketime")
    folder = tmp_path_factory.mktemp("cluster")
    stub = folder / "older" / f"deepspeed-{OLD}.dist-info" / "METADATA"
    stub.parent.mkdir(parents=True)
    stub.write_text(f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {OLD}\n")
    for name in ("extensions", "broken"):
        (folder / name / "shm").mkdir(parents=True)
    for name, age in (("extensions", 60), ("broken", 3600)):
        lock = folder / name / "shm" / "lock"
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
    (folder / "run").mkdir()
    sound = dict(PYTHONPATH=str(ROOT), TORCH_EXTENSIONS_DIR=str(folder / "extensions"), OMP_NUM_THREADS="1")
    false = dict(LD_PRELOAD=str(clock), FAKETIME="+120s")
    unsound = sound | false | dict(PYTHONPATH=f"{ROOT}:{folder / 'older'}", TORCH_EXTENSIONS_DIR=str(folder / "broken"))
    names = ("host1", "host2", "host3")
    with hosts.hosts(folder / "hosts", names, dict(zip(names, (sound, sound, unsound)))) as (found, environment):
        yield found, environment, folder


def doctor(cluster, hostfile, *arguments):
    """Returns (exit code, output)."""
    _, environment, folder = cluster
    (folder / "hostfile").write_text(hostfile)
    words = ["--hostfile", folder / "hostfile", "--run-dir", folder / "run", "--min-free-gb", "0.5", *arguments]
    end = subprocess.run(
        [sys.executable, "-m", "ditmoe_ds.cli", "doctor", *map(str, words)],
        env=environment | dict(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    print(end.stdout, end.stderr)
    return end.returncode, end.stdout


def test_two_sound_hosts(cluster):
    code, output = doctor(cluster, "host1 slots=1\nhost2 slots=1\n", "--ep", "2")
    header, *rows = [re.split(r"  +", line) for line in output.splitlines()[:3]]
    assert code == 0 and "PROBLEM" not in output and output.endswith("healthy\n")
    assert [row[0] for row in rows] == ["host1", "host2"]
    for row in rows:
        figures = dict(zip(header, row, strict=True))
        assert float(figures["all-reduce GB/s"]) > 0 and float(figures["all-to-all GB/s"]) > 0
    assert not list((cluster[2] / "run").iterdir())


def test_faults_of_one_host(cluster):
    """Versions, disk, shared file system, clock and lock at once; the sound host is not blamed."""
    found, _, folder = cluster
    found["host3"].enter("mount", "-t", "tmpfs", "-o", "size=1m", "none", folder / "run")
    try:
        code, output = doctor(cluster, "host1 slots=1\nhost3 slots=1\n", "--json")
    finally:
        found["host3"].enter("umount", folder / "run")
    report = json.loads(output)
    problems = [one for one in report["problems"] if not one["warning"]]
    assert code == 1 and not report["healthy"]
    assert {one["host"] for one in problems} == {"host3"}
    texts = [one["text"] for one in problems]
    wanted = [
        f"deepspeed {OLD}; elsewhere ",
        f"0.0 GB free in {folder / 'run'}, less than 0.5",
        f"{folder / 'broken' / 'shm' / 'lock'} is left from a build",
        "does not see in the run directory what host1 has just written",
        r"its clock is 1(19|20)\.\d s ahead of that of host1",
    ]
    assert len(texts) == len(wanted)
    for one in wanted:
        assert any(re.match(one, text) for text in texts), (one, texts)
    assert all(node["all_reduce"] > 0 for node in report["nodes"])


def test_hosts_that_cannot_meet(cluster):
    """A wrong name, too many slots, and no way from host2 to the rendezvous although ssh reaches it."""
    found, *_ = cluster
    found["host2"].enter("ip", "route", "add", "prohibit", found["host1"].address)
    try:
        code, output = doctor(cluster, "host1 slots=1\nhost2 slots=999\nhost9 slots=1\n")
    finally:
        found["host2"].enter("ip", "route", "del", "prohibit", found["host1"].address)
    left = hosts.pids_in(found["host1"].namespace)
    assert not [pid for pid in left if b"launching" in Path(f"/proc/{pid}/cmdline").read_bytes()]  # host1 was told to stop waiting
    assert code == 1
    problems = [line for line in output.splitlines() if line.startswith("PROBLEM")]
    wanted = [
        r"host9: ssh cannot reach it: .*resolve hostname host9.*Fix: correct its name in the hostfile",
        rf"host2: cannot reach the rendezvous: {hosts.NETWORK}.1:29500: \[Errno 13\] Permission denied",
        rf"host2: 999 slots \(processes\), but {len(os.sched_getaffinity(0))} CPU cores",
    ]
    assert len(problems) == len(wanted)
    for text in wanted:
        assert any(re.search(text, line) for line in problems), (text, problems)


@pytest.mark.parametrize("tasks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_within_srun(tmp_path, tasks):
    """Two tasks of two, and of three: the third node's never comes, and the first names it."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\nprintf 'n%s\\n' {' '.join(map(str, range(1, tasks + 1)))}\n")
    scontrol.chmod(0o755)
    slurm = dict(SLURM_NTASKS=tasks, SLURM_LOCALID=0, SLURM_LAUNCH_NODE_IPADDR="127.0.0.1", SLURM_JOB_ID=7, SLURM_JOB_NODELIST="n[1-3]")
    environment = os.environ | dict(PYTHONPATH=str(ROOT), PATH=f"{tmp_path}:{os.environ['PATH']}", MASTER_PORT=str(free_port()))
    patience = 60 if tasks == 2 else 10
    program = f"from ditmoe_ds.launching import network; network.RENDEZVOUS = {patience}.0; network.NOTE = 4.0; "
    program += "from ditmoe_ds.cli import run; run()"
    command = [sys.executable, "-c", program, "doctor", "--run-dir", str(tmp_path), "--min-free-gb", "0.5", "--ep", str(tasks)]
    environment |= {key: str(value) for key, value in slurm.items()}
    places = [dict(SLURM_STEP_ID="0", SLURM_PROCID=str(rank), SLURMD_NODENAME=f"n{rank + 1}") for rank in range(2)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started = [subprocess.Popen(command, env=environment | place, **pipes) for place in places]
    try:
        (first, _), (second, _) = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    print(first, second)
    codes = [process.returncode for process in started]
    rows = [line.split() for line in first.splitlines() if line.startswith("n")][1:]
    assert [row[0] for row in rows] == ["n1", "n2"]
    if tasks == 2:
        assert codes == [0, 0] and not second and "healthy" in first and all(float(row[-1]) > 0 and float(row[-2]) > 0 for row in rows)
    else:
        assert codes == [1, 0] and "PROBLEM  n3: none or not all of its processes reached the rendezvous within 10 s" in first
        assert first.count("PROBLEM") == 1 and " s still waiting for ranks 2\n" in first


@pytest.mark.parametrize(
    "words, says",
    [
        (["--hostfile", "nowhere"], "--hostfile='nowhere': no readable file there"),
        (["--hostfile", "hostfile", "--ep", "2"], "--ep=2: must divide the 3 processes"),
    ],
)
def test_mistakes_of_the_user(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    Path("hostfile").write_text("host1 slots=3\n")
    assert main(["doctor", *words]) == 2
    assert says in capsys.readouterr().err
