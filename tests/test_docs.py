"""The pictures of the docs can be drawn again; help tells defaults."""

import os
import subprocess
import sys

import pytest
from PIL import Image
from processes import ROOT, launch

from data_prep import cli as data_prep
from ditmoe_ds import cli


def test_routers(tmp_path):
    command = [sys.executable, ROOT / "docs" / "routers.py", "--out", tmp_path / "routers.png"]
    subprocess.run(command, env=os.environ | dict(PYTHONPATH=str(ROOT)), check=True)
    assert_drawn(tmp_path, ["routers.png"])


@pytest.mark.slow
def test_groups(tmp_path):
    launch(8, [ROOT / "docs" / "groups.py", "--out", tmp_path / "groups.png"])
    assert_drawn(tmp_path, ["groups.png"])


@pytest.mark.slow
def test_scaling(tmp_path):
    command = [sys.executable, ROOT / "docs" / "scaling.py", "--out", tmp_path]
    subprocess.run(command, cwd=ROOT, env=os.environ | dict(PYTHONPATH=str(ROOT)), check=True)
    assert_drawn(tmp_path, ["scaling_measured.png", "scaling_speed.png", "scaling_traffic.png"])


@pytest.mark.parametrize(
    ("main", "words", "told"),
    [
        (cli.main, "sample", ["(default: 50)", "(default: 0)", "default: euler or"]),
        (cli.main, "launch slurm", ["(default: 180)", "default: one per GPU"]),
        (data_prep.main, "encode", ["(default: mean)", "default: by SLURM array"]),
    ],
)
def test_help_tells_defaults(main, words, told, capsys):
    """Once each, and none of what is not given."""
    with pytest.raises(SystemExit, match="0"):
        main([*words.split(), "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(one in text for one in told)
    assert not any(f"(default: {nothing})" in text for nothing in (None, False, [])) and text.count("default: by SLURM") < 2


def assert_drawn(folder, pictures):
    assert sorted(path.name for path in folder.iterdir()) == pictures
    for name in pictures:
        assert Image.open(folder / name).size == Image.open(ROOT / "docs" / "images" / name).size
