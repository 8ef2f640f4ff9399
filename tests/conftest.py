"""What several files of tests read and leave alone."""

import os

import pytest


@pytest.fixture(scope="module", autouse=True)
def environment():
    """A process that has joined by itself has a rank in its environment, which the next file's processes must not inherit."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


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
