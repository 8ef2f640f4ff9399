"""What several files of tests read and leave alone."""

import os

import pytest
import torch
import torch.distributed as dist

torch.set_num_threads(1)  # as in the processes that tests start: another number rounds differently

LONGEST = (
    "safety",
    "run",
    "shapes",
    "moe",
    "slurm",
    "interruption",
    "during_training",
    "dry_run",
    "hostfile",
    "recompute",
    "telemetry",
    "sampling",
    "benchmarks",
)


def pytest_collection_modifyitems(items):
    """Files that take minutes begin first, so that none of them is left alone at the end."""
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="module", autouse=True)
def environment():
    """A process that has joined by itself has a rank in its environment, which the next file's processes must not inherit."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """``vae/`` and ``images/``, see ``encoding.write_inputs``."""
    from encoding import write_inputs  # torch and diffusers, which not every run of tests needs

    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def encoded(inputs, tmp_path_factory):
    """A finished folder of their latents."""
    from encoding import run_encode

    return run_encode(inputs, tmp_path_factory.mktemp("encoded") / "out")
