"""The pictures of the docs can be drawn again."""

import os
import subprocess
import sys

import pytest
from PIL import Image
from processes import ROOT, launch


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


def assert_drawn(folder, pictures):
    assert sorted(path.name for path in folder.iterdir()) == pictures
    for name in pictures:
        assert Image.open(folder / name).size == Image.open(ROOT / "docs" / "images" / name).size
