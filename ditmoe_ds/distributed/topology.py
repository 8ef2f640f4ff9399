"""Who am I among the processes: start-up from any launcher, errors that reach every rank, expert groups."""

import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from ditmoe_ds.config import changes
from ditmoe_ds.errors import ConfigError, UserError, some

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a collective may take in training, where all ranks compute the same at the same time."""
MANY = 256
"""Ranks that connect to each other at once; where there are more, gloo connects two when they first exchange something."""
_OWN_STEPS = 0xFFFFFFF0
"""SLURM numbers its own steps from here: a batch script, the shell of salloc."""


class AgreedError(UserError):
    """A user's mistake that every rank raises at the same place, so all can still leave together."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is spread over the ranks."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """What ZeRO shards: nothing, optimizer states, + gradients, + weights."""
    expert: int = 1
    """Expert parallelism: ranks that share one set of experts. Divides the experts and the world size."""
    tensor: int = 1
    """Tensor parallelism, by megatron-core: ranks that divide heads and hidden units of every layer among them, and see the same images."""
    deepspeed: str = "ds_configs/zero{zero_stage}.json"
    """DeepSpeed's own settings; a relative path is looked up here and beside the installed package."""


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    local_rank: int

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")


@dataclass(frozen=True)
class ExpertGroup:
    """This rank's place among the ranks that share one set of experts."""

    size: int
    rank: int
    """Which block of E / size experts lives here."""
    replica: int
    """Which copy of that block this is: the rank within the expert-data-parallel group."""


def join(patience: timedelta = PATIENCE) -> World:
    """Start the process group from the environment of deepspeed, torchrun or srun; alone without one. A collective fails after
    ``patience``.

    Raises:
        UserError: on every rank of a host where they see fewer GPUs than there are ranks.
        SystemExit: on rank 0, after one line, if the port is taken. A failure, since a launcher that tries again may find it free.
    """
    env = os.environ
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # rank 0 has several connections to every other; 1024 is usual
    if under_srun():
        take_place_from_srun()
    if "RANK" not in env:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    world = World(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]))
    if world.size > MANY:  # else every rank of a group would connect to every other: 1,024 ask rank 0's store two million times
        env.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    if world.device.type == "cuda":
        beside, seen = int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", 1))), torch.cuda.device_count()  # deepspeed sets the latter
        if beside > seen:
            fix = "start as many as there are GPUs; with srun add --gpu-bind=none, so that each sees all of its host"
            raise UserError(f"{beside} processes on {host_name()}, but each sees {seen} GPUs: {fix}")
        torch.cuda.set_device(world.device)
    if world.rank == 0 and world.size > 1:  # from here on they wait in silence for one that is missing
        print(f"{world.size} processes meet at {env['MASTER_ADDR']}:{env['MASTER_PORT']}", flush=True)
    # no handler of Python's runs while torch waits: a launcher that ends the ranks when one has failed would wait, too
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo", timeout=patience)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        options = "deepspeed --master_port, ditmoe launch hostfile --master-port, else MASTER_PORT"
        sys.exit(f"error: MASTER_PORT={env['MASTER_PORT']}: taken on {host_name()}, perhaps by another run; choose another ({options})")
    signal.signal(signal.SIGTERM, handler)
    if world.size > MANY:
        dist.barrier()  # connects those through whom ``leave`` will go, when rank 0 may end before others have found each other
    return world


def host_name() -> str:
    """This host as the user knows it: under SLURM by the node's name, since several nodes may be one machine."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def under_srun() -> bool:
    """Whether srun started this process as one of several, and no other launcher within it. Not in a batch script, which has no step, nor
    in the shell of salloc, which may be a step of SLURM's own and has the number of tasks of those that srun will start."""
    step = int(os.environ.get("SLURM_STEP_ID", _OWN_STEPS))
    return "RANK" not in os.environ and step < _OWN_STEPS and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def take_place_from_srun() -> None:
    """Set the variables that torch reads from those of SLURM."""
    env = os.environ
    env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=env["SLURM_NTASKS"], LOCAL_RANK=env["SLURM_LOCALID"])
    env["LOCAL_WORLD_SIZE"] = str(int(env["SLURM_NTASKS"]) // int(env.get("SLURM_STEP_NUM_NODES", env["SLURM_NTASKS"])))
    env.setdefault("MASTER_ADDR", env["SLURM_LAUNCH_NODE_IPADDR"])
    env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))


def leave() -> None:
    """End together. Without it a rank now and then aborts in its destructors, which a launcher takes for a failure."""
    dist.barrier()
    dist.destroy_process_group()


def on_all_ranks(work: Callable[[World], None], patience: timedelta = PATIENCE) -> int:
    """Join, do ``work``, leave. Returns the exit code, the same on every rank: 0, or 2 after one line about a user's mistake.

    Args:
        patience: how long a rank waits for the others in a collective.
    """
    code = 0
    try:
        world = join(patience)
    except UserError as error:
        if os.environ["LOCAL_RANK"] == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    try:
        work(world)
    except AgreedError as error:
        code = 2
        if world.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
    leave()
    return code


def agreed(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run ``action`` on every rank (of ``group``); if it raises a user's mistake on any of them, raise the same error on all, naming
    the ranks that met it if these are not all.

    Without it, one rank would leave while the others wait for it in a collective.
    """
    result, error = None, None
    try:
        result = action()
    except UserError as caught:
        error = caught
    errors = gathered(error and (str(error), f"rank {dist.get_rank()} on {host_name()}"), group)
    raised = [found for found in errors if found]
    if raised:
        text, who = raised[0]
        if len(raised) == len(errors) or raised == errors[:1]:  # the first may be the only one that had something to do
            raise AgreedError(text)
        raise AgreedError(f"{text} (only {who if len(raised) == 1 else f'{len(raised)} of {len(errors)} ranks, the first {who}'})")
    return result  # type: ignore[return-value]


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's ``value``, in the order of the ranks (of ``group``)."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, value, group)
    return everyone


def decided(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 alone; every rank gets its result, or its error."""
    result = [agreed(action if dist.get_rank() == 0 else lambda: None)]
    dist.broadcast_object_list(result, src=0)
    return result[0]  # type: ignore[return-value]


def in_turns(world: World, first: Callable[[], T], others: Callable[[], T]) -> T:
    """Run ``first`` on the first rank of each host and then ``others`` on its other ranks, which find there what that one has fetched.
    Raises as ``agreed``. Collective."""
    fetches = world.local_rank == 0
    result = agreed(first if fetches else lambda: None)
    return agreed((lambda: result) if fetches else others)  # type: ignore[arg-type, return-value]


def alike(mine: dict[str, Any]) -> None:
    """Refuse that a rank trains something else than rank 0, as where nodes have recipes, data or code of their own. Collective.

    Args:
        mine: what decides what this rank trains; compared are the keys that both have.

    Raises:
        AgreedError: naming the rank, and what differs.
    """
    theirs = decided(lambda: mine)

    def compare() -> None:
        if changed := changes(theirs, mine):
            raise UserError(f"not what rank 0 trains: {some(changed)}; give all nodes the same recipe, data, starting weights and code")

    agreed(compare)


def check_expert_parallel(expert: int, experts: int, world: int, tensor: int = 1, key: str = "parallel.expert") -> None:
    """Refuse an expert-parallel size that does not divide experts and processes (tensor-parallel groups of them).

    Raises:
        ConfigError: naming ``key`` and sizes that fit.
    """
    ranks = world // tensor
    fits = [n for n in range(1, ranks + 1) if ranks % n == 0 and max(experts, 1) % n == 0]
    if expert not in fits:
        processes = f"{world} processes" if tensor == 1 else f"{ranks} tensor-parallel groups of {tensor} processes"
        raise ConfigError(key, expert, f"must divide the {experts} experts and the {processes}; here one of {fits}")


def check_tensor_parallel(tensor: int, divided: dict[str, int], world: int) -> None:
    """Refuse a tensor-parallel size that does not divide the model and the world.

    Args:
        divided: what of the model it must divide, by what a user calls it.

    Raises:
        ConfigError: naming sizes that fit.
    """
    counts = {"processes": world} | divided
    fits = [n for n in range(1, world + 1) if all(count % n == 0 for count in counts.values())]
    if tensor not in fits:
        listed = ", ".join(f"{count} {what}" for what, count in counts.items())
        raise ConfigError("parallel.tensor", tensor, f"must divide {listed}; here one of {fits}")


def require_tensor_parallel(tensor: int) -> None:
    """Raises ConfigError, with how to install megatron-core, if ``tensor`` needs it and it is not there."""
    if tensor > 1:
        try:
            import ditmoe_ds.distributed.tensor_parallel  # noqa: F401
        except ImportError as error:
            raise ConfigError("parallel.tensor", tensor, f"needs megatron-core: pip install 'ditmoe_ds[tensor]' ({error})") from None


def expert_group(ep_size: int, tensor: int = 1) -> ExpertGroup:
    """Make all groups: tensor-parallel ones of consecutive ranks, and DeepSpeed's expert- and expert-data-parallel ones.

    Those that share a set of experts are consecutive among the ranks that have the same place in their tensor-parallel groups.
    """
    import deepspeed
    from deepspeed.utils import groups

    # its own all-reduce for CPUs serves inference alone: a minute of compiling, and 69 MB of shared memory a rank that outlive it
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    if tensor > 1:
        from ditmoe_ds.distributed.tensor_parallel import join_groups

        groups.mpu = join_groups(tensor)
    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_data_and_model_parallel(ep_size, groups.mpu)
    return ExpertGroup(
        ep_size, dist.get_rank(groups._get_expert_parallel_group(name)), dist.get_rank(groups._get_expert_data_parallel_group(name))
    )


def data_group() -> dist.ProcessGroup:
    """The ranks that see other images than this one, and itself: those with the same place in their tensor-parallel groups."""
    from deepspeed.utils import groups

    return groups._get_data_parallel_group()


def tensor_group() -> dist.ProcessGroup | None:
    """The ranks that see the same images as this one; None without tensor parallelism."""
    from deepspeed.utils import groups

    return groups.mpu and groups.mpu.get_tensor_model_parallel_group()


def tensor_place() -> tuple[int, int]:
    """This rank's place in its tensor-parallel group, and the group's size."""
    from deepspeed.utils import bwc, groups

    return bwc.bwc_tensor_model_parallel_rank(groups.mpu), bwc.bwc_tensor_model_parallel_world_size(groups.mpu)


def describe_placement(hosts: list[str], ep_size: int, tensor: int = 1) -> str:
    """One line: where the ranks are, and whether an EP group's all-to-all, and a TP group's all-reduces, stay inside a host."""
    text = f"{len(hosts)} processes on {len(set(hosts))} host{'s' * (len(set(hosts)) > 1)}"
    if tensor > 1:
        whole = all(len(set(hosts[first : first + tensor])) == 1 for first in range(0, len(hosts), tensor))
        where = "each inside a host" if whole else "over several hosts: every layer's all-reduces cross the network"
        text += f"; TP groups of {tensor} consecutive ranks, {where}"
    if ep_size == 1:
        return f"{text}; no expert parallelism"
    members = ep_size * tensor
    spans = max(len(set(hosts[first : first + members])) for first in range(0, len(hosts), members))
    ranks = f"{ep_size} consecutive ranks" if tensor == 1 else f"{ep_size} ranks, {tensor} apart"
    if spans == 1:
        return f"{text}; EP groups of {ranks}, each inside a host"
    inside = min(hosts.count(host) for host in hosts) // tensor
    return (
        f"{text}; EP groups of {ranks} over {spans} hosts: their all-to-all crosses the network; "
        f"parallel.expert up to {inside} can stay inside a host"
    )
