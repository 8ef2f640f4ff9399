"""A real SLURM cluster on this machine: its controller, two slurmd and a munged of its own, in one folder. Needs root."""

import os
import re
import shutil
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

from processes import free_port

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
NODES = ("node1", "node2")


def missing():
    """Why there can be no cluster here, or None."""
    if os.geteuid():
        return "SLURM's daemons need root here"
    absent = [tool for tool in NEEDED if not shutil.which(tool)]
    return f"not installed: {', '.join(absent)}" if absent else None


@contextmanager
def cluster(folder):
    """Start it and stop it. Yields the environment in which sbatch and the others reach it."""
    folder = Path(folder)
    for name in ("", "state", "munge"):
        (folder / name).mkdir(parents=True, exist_ok=True, mode=0o755)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    host = socket.gethostname().split(".")[0]
    ports = [free_port() for _ in range(3)]
    nodes = "".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=2000\n"
        for node, port in zip(NODES, ports[1:], strict=True)
    )
    (folder / "slurm.conf").write_text(
        f"ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={ports[0]}\nSlurmUser=root\n"
        # cred_expire is also how long a job that was queued again has to wait; below 5 s SLURM takes 120
        f"AuthType=auth/munge\nAuthInfo=socket={folder}/munge/socket,cred_expire=6\nCredType=cred/munge\nMpiDefault=none\n"
        f"ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nSelectType=select/cons_tres\nSelectTypeParameters=CR_Core\n"
        f"ReturnToService=2\nSlurmdParameters=config_overrides\nSchedulerParameters=sched_interval=2,sched_min_interval=100000\n"
        f"KillWait=30\nInactiveLimit=0\nStateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/%n\n"
        f"SlurmctldPidFile={folder}/ctld.pid\nSlurmdPidFile={folder}/%n.pid\nSlurmctldLogFile={folder}/ctld.log\n"
        f"SlurmdLogFile={folder}/%n.log\n{nodes}PartitionName=all Nodes={','.join(NODES)} Default=YES MaxTime=60 State=UP\n"
    )
    environment = os.environ | dict(SLURM_CONF=str(folder / "slurm.conf"))
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge/socket", f"--key-file={key}"]
    munge += [f"--{name}-file={folder}/munge/{name}" for name in ("pid", "log", "seed")]
    with ExitStack() as daemons:

        def start(*command):
            with open(folder / "daemons.log", "a") as log:
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            daemons.callback(process.wait, 20)
            daemons.callback(process.terminate)

        start(*munge)
        _wait(lambda: (folder / "munge" / "socket").exists(), folder)
        start("slurmctld", "-D", "-c")
        for node in NODES:
            (folder / node).mkdir()
            start("slurmd", "-D", "-N", node)
        _wait(lambda: _run("sinfo", "-h", "-o", "%t %D", environment=environment).strip() == "idle 2", folder)
        try:
            yield environment
        finally:
            _run("scancel", "--user=root", environment=environment)
            _wait(lambda: not _run("squeue", "-h", environment=environment).strip(), folder)


def state(job, environment):
    """A job's state in SLURM's word: PENDING, RUNNING, COMPLETED, CANCELLED..."""
    return re.search(r"JobState=(\w+)", _run("scontrol", "show", "job", job, environment=environment))[1]


def _run(*command, environment):
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout


def _wait(condition, folder):
    deadline = time.monotonic() + 45
    while not condition():
        logs = [path.read_text()[-2000:] for path in folder.glob("*.log")]
        assert time.monotonic() < deadline, "\n".join(logs)
        time.sleep(0.2)
