"""What is wrong with nodes, by what is known about them."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

CLOCK_SECONDS = 1.0
TMP_GB = 1.0
NOFILE = 65536


@dataclass
class Node:
    """What is known of one node; None is unknown."""

    host: str
    slots: int
    """Processes that training will have there."""
    facts: dict[str, Any] | None = None
    """See ``facts.facts``."""
    clock: float | None = None
    """Seconds ahead of the first node."""
    clock_margin: float = 0.0
    """Seconds by which ``clock`` may be wrong: half the time that the question and its answer took."""
    reads_run_dir: bool | None = None
    """Whether it reads what the first node wrote there."""
    all_reduce: float | None = None
    """GB/s, over the world; of the node's slowest rank."""
    all_to_all: float | None = None
    """GB/s, within the expert-parallel group; of the node's slowest rank."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one node, and what to do about it."""

    host: str
    text: str
    fix: str
    warning: bool = False
    """Whether training may work all the same."""

    def __str__(self) -> str:
        return f"{self.host}: {self.text}. Fix: {self.fix}"


_EQUAL = {
    "python": ("Python", "use the same environment on all nodes"),
    "torch": ("torch", "there: pip install torch=={}"),
    "deepspeed": ("deepspeed", "there: pip install deepspeed=={}"),
    "ditmoe_ds": ("ditmoe_ds", "install the same version of this package there"),
    "nccl": ("NCCL", "install the same build of torch there: NCCL comes with it"),
    "driver": ("GPU driver", "install driver {} there, or leave the node out"),
    "gpus": ("GPUs", "compare nvidia-smi on the nodes; leave the node out if it lacks one"),
}
_MAY_DIFFER = ("driver", "gpus")
"""Training works all the same, at the speed of the slowest."""


def compare(nodes: list[Node], min_free_gb: float) -> list[Problem]:
    """All problems that appear from the nodes' facts and from what was measured between them."""
    found: list[Problem] = []
    first = next((node.host for node in nodes if node.facts), "")
    for key, (name, fix) in _EQUAL.items():
        values = {node.host: in_words(node.facts[key]) for node in nodes if node.facts}
        for host, value in values.items():
            usual = Counter(values.values()).most_common(1)[0][0]  # the first node's, where none is in the majority
            if value != usual:
                found.append(Problem(host, f"{name} {value}; elsewhere {usual}", fix.format(usual), warning=key in _MAY_DIFFER))
    for node in nodes:
        if node.facts:
            found += _of_one(node, node.facts, min_free_gb)
        if node.reads_run_dir is False:
            text = f"does not see in the run directory what {first} has just written there"
            found.append(Problem(node.host, text, "put the run directory on a file system that all nodes mount at the same path"))
        if node.clock is not None and abs(node.clock) > CLOCK_SECONDS + node.clock_margin:
            text = f"its clock is {abs(node.clock):.1f} s {'ahead of' if node.clock > 0 else 'behind'} that of {first}"
            found.append(Problem(node.host, text, "start its time service: timedatectl set-ntp true, or chronyc makestep"))
    return found


def _of_one(node: Node, facts: dict[str, Any], min_free_gb: float) -> list[Problem]:
    found: list[tuple[str, str]] = []
    devices, kind = (len(facts["gpus"]), "GPUs") if facts["gpus"] else (facts["cores"], "CPU cores")
    if node.slots > devices:
        found.append((f"{node.slots} slots (processes), but {devices} {kind}", f"give it {devices}, by slots= or by --ntasks-per-node"))
    if facts["driver"] and not facts["gpus"]:
        found.append(("has a GPU driver, but torch sees no GPU", "install a CUDA build of torch that this driver can run"))
    for place, key, least in ((facts["run_dir"], "run_dir_gb", min_free_gb), ("/tmp", "tmp_gb", min(TMP_GB, min_free_gb))):
        if facts[key] < least:
            found.append((f"{facts[key]:.1f} GB free in {place}, less than {least:g}", "make room, or use another disk"))
    if not facts["writable"]:
        found.append((f"cannot write in {facts['run_dir']}", "mount it for writing and give this user the right to write"))
    use = "with which DeepSpeed compiles an optimizer that is kept on the host"
    if not facts["ninja"]:
        found.append((f"no ninja on the PATH, {use}", "there: pip install ninja"))
    if facts["not_compiled"]:
        text = f"the C++ compiler, {use}, does not compile #include <Python.h>: {facts['not_compiled']}"
        found.append((text, "install g++ and Python's headers (python3-dev) there, or set CXX to a compiler that works"))
    if not facts["extensions_writable"]:
        text = f"cannot write compiled extensions in {facts['extensions']}"
        found.append((text, "set TORCH_EXTENSIONS_DIR to a folder that can be written"))
    for lock in facts["locks"]:
        found.append((f"{lock} is left from a build that was killed: the next start waits for it forever", f"there: rm {lock}"))

    warnings: list[tuple[str, str]] = []
    if facts["nofile"] is not None and facts["nofile"] < NOFILE:
        text = f"a process may open {facts['nofile']} files; connections of many ranks and loader workers need more"
        warnings.append((text, f"raise nofile to {NOFILE} in /etc/security/limits.conf"))
    if facts["gpus"] and facts["memlock"] is not None:
        text = f"a process may lock {facts['memlock'] / 1e6:.3g} MB of memory; NCCL over InfiniBand needs more"
        warnings.append((text, "set memlock to unlimited in /etc/security/limits.conf"))
    return [Problem(node.host, *one) for one in found] + [Problem(node.host, *one, warning=True) for one in warnings]


def in_words(value: Any) -> str:
    """A fact in words: equal GPUs are counted, and what is not there is none."""
    if isinstance(value, list):
        return ", ".join(f"{count} x {name}" for name, count in Counter(value).items()) or "none"
    return "none" if value is None else str(value)
