"""Real hosts on one machine: a network namespace each, with an address, a name and an sshd of its own. Needs root.

The machine itself is the head: it reaches the hosts by ``ssh NAME`` once ``environment`` is used.
"""

import itertools
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NEEDED = ("ip", "unshare", "sshd", "ssh-keygen")
NETWORK = f"10.77.{os.environ.get('PYTEST_XDIST_WORKER', 'gw0')[2:]}"
"""Tests that run at the same time have hosts of their own."""
_count = itertools.count()


def missing():
    """Why there can be no hosts here, or None."""
    if os.geteuid():
        return "network namespaces need root"
    absent = [tool for tool in NEEDED if not shutil.which(tool)]
    return f"not installed: {', '.join(absent)}" if absent else None


@dataclass
class Host:
    name: str
    address: str
    namespace: str
    pid: int
    """Of sshd, whose namespaces are the host's."""

    def enter(self, *command):
        """Run a command inside the host, not through ssh."""
        arguments = ["nsenter", "-t", str(self.pid), "-n", "-m", "-u", *map(str, command)]
        return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout


def pids_in(namespace):
    return [*map(int, subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True).stdout.split())]


@contextmanager
def hosts(folder, names=("host1", "host2"), settings=None):
    """Start them and stop them.

    Args:
        folder: keys, configurations and sshd's logs go here.
        settings: name -> environment that this host's logins get (an older package on PYTHONPATH, a preloaded false clock).

    Yields:
        (hosts by name, environment with which ``ssh NAME`` works)
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bin").mkdir()
    for key in ("host_key", "user_key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    Path("/run/sshd").mkdir(exist_ok=True)
    tag = f"dm{os.getpid() % 100000}x{next(_count)}"  # an interface's name has 15 letters at most
    bridge = f"{tag}b"
    found, daemons, namespaces = {}, [], []
    entries = []
    try:
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{NETWORK}.254/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        table = "127.0.0.1 localhost\n" + "".join(f"{NETWORK}.{i} {name}\n" for i, name in enumerate(names, 1))
        (folder / "hosts").write_text(table)
        for i, name in enumerate(names, 1):
            namespace, address = f"{tag}n{i}", f"{NETWORK}.{i}"
            _run("ip", "netns", "add", namespace)
            namespaces.append(namespace)
            _run("ip", "link", "add", f"{tag}v{i}", "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _run("ip", "link", "set", f"{tag}v{i}", "master", bridge, "up")
            _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", namespace, "link", "set", device, "up")
            extra = " ".join(f'"{key}={value}"' for key, value in (settings or {}).get(name, {}).items())
            (folder / f"sshd_{name}").write_text(
                f"ListenAddress {address}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\n"
                f"PidFile {folder}/{name}.pid\nPermitRootLogin yes\nStrictModes no\nUsePAM no\nMaxStartups 100\n"
                + (f"SetEnv {extra}\n" if extra else "")
            )
            inside = f"mount --make-rprivate / && mount --bind {folder}/hosts /etc/hosts && hostname {name} && "
            inside += f"exec {shutil.which('sshd')} -D -e -f {folder}/sshd_{name}"
            with open(folder / f"{name}.log", "w") as log:
                command = ["ip", "netns", "exec", namespace, "unshare", "-m", "-u", "sh", "-c", inside]
                daemon = subprocess.Popen(command, stdout=log, stderr=log)
            daemons.append(daemon)
            found[name] = Host(name, address, namespace, daemon.pid)
            entries.append(f"Host {name}\n  HostName {address}\n")
        common = f"Host *\n  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n"
        common += "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n  User root\n"
        (folder / "ssh_config").write_text("".join(entries) + common)
        wrapper = folder / "bin" / "ssh"  # OpenSSH looks for its settings in the password file's home alone
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)
        environment = os.environ | dict(PATH=f"{folder / 'bin'}:{os.environ['PATH']}")
        for name in names:
            _until_it_answers(name, environment, folder)
        yield found, environment
    finally:
        for namespace in namespaces:
            for pid in pids_in(namespace):
                subprocess.run(["kill", "-9", str(pid)], check=False)
        for daemon in daemons:
            daemon.wait()
        for namespace in namespaces:
            subprocess.run(["ip", "netns", "del", namespace], check=True)
        subprocess.run(["ip", "link", "del", bridge], check=False)


def _until_it_answers(name, environment, folder):
    for _ in range(50):
        if subprocess.run(["ssh", "-o", "ConnectTimeout=2", name, "true"], env=environment, capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    raise AssertionError(f"{name} does not answer: {(folder / f'{name}.log').read_text()}")


def _run(*command):
    subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
