"""Every benchmark still runs, at its smallest: time on a GPU is short, and none of it should go to a benchmark that fails."""

import os
import re
import subprocess
import sys

import pytest
from processes import ROOT

sys.path.append(str(ROOT))

from benchmarks.run_all import ON_CPU, ON_GPU, main

CASES = {
    "train_step": ("--models DiT-MoE-Tiny/2-8E2A EC-DIT-Tiny-8E --depth 2 --images 2 --rounds 1 --steps 1", 2 + 4 + 4 + 2 * 6),
    "moe_layer": ("--sizes S --experts 8 --tokens 256 --repeats 1", 2 + 2),
    "expert_parallel": ("--worlds 2 --images 2 --steps 1", 4),
    "sampling": ("--batches 1 --steps 5 --rounds 1", 1),
    "scaling": ("--width 32 --images 16 --more 2 --rounds 1", 4 * 4 + 3 + 3),
    "expert_choice": ("--width 64 --repeats 1", 3),
}
"""Arguments, and the least rows of figures. ``benchmarks.run_all`` runs these on a GPU."""
SLOW = {
    "loader": ("--seconds 0.2 --folder {}", 6),
    "checkpoint": ("--model DiT-MoE-Tiny/2-8E2A --repeats 1 --folder {}", 6),
    "gradient_copies": ("--stages 0 2", 4),
    "zero3_host": ("--ranks 8 --rounds 1", 1),
    "encode": ("--images 10 --size 32 --batch 5 --repeats 1", 1),
}


def test_those_of_a_gpu_are_here(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_all", "--only", "moe_layers"])
    with pytest.raises(SystemExit):
        main()
    assert "choose from train_step, " in capsys.readouterr().err.replace("'", "")
    assert {benchmark.name for benchmark in ON_GPU} | {benchmark.name for benchmark in ON_CPU} == CASES.keys()


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_it_runs(name, tmp_path):
    arguments, rows = (CASES | SLOW)[name]
    command = [sys.executable, f"benchmarks/{name}.py", *arguments.format(tmp_path / "new").split()]
    environment = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    figures = [line for line in done.stdout.splitlines() if re.match(r"\| .*\d", line)]
    assert len(figures) >= rows and not any(re.search(r"\bnan\b", line) for line in figures), done.stdout
