"""What several files of tests read and leave alone."""

import pytest


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
