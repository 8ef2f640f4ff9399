"""The demo's recipe on a real SLURM of two nodes: submitted, disturbed, and back by itself."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from latents import write_latents
from processes import ROOT, demo_on, launch, losses, until_step
from slurm import cluster, missing, state

from data_prep.units import worker_from_environment
from ditmoe_ds.cli import main
from ditmoe_ds.distributed.topology import under_srun
from ditmoe_ds.errors import ConfigError
from ditmoe_ds.launching.slurm import SCRIPTS, container, fill_in

STEPS = 24
real_cluster = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    latents = write_latents(tmp_path_factory.mktemp("data") / "latents", train=512)
    return [*demo_on(latents, STEPS), "parallel.expert=2", "parallel.zero_stage=3", "checkpoint.every=4"]


def ditmoe(environment, *arguments):
    command = [sys.executable, "-m", "ditmoe_ds.cli", *map(str, arguments)]
    return subprocess.run(command, env=environment | dict(DS_ACCELERATOR="cpu"), cwd=ROOT, capture_output=True, text=True, check=False)


def submit(environment, run_dir, *overrides):
    options = ["--nodes", "2", "--gpus-per-node", "0", "--time", "10", "--max-restarts", "2"]
    done = ditmoe(environment, "launch", "slurm", "recipes/digits.yaml", *options, *overrides, f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return re.search(r"^job (\d+): 2 nodes", done.stdout)[1]


def wait_for(job, environment, *states, timeout=400):
    deadline = time.monotonic() + timeout
    while (now := state(job, environment)) not in states:
        assert time.monotonic() < deadline, f"job {job} is {now}"
        time.sleep(0.2)


def processes_of(run_dir):
    """The ranks (and their loaders) of a run that are alive."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if f"run_dir={run_dir}" in words and "ditmoe_ds.train" in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@real_cluster
def test_a_job_that_is_disturbed_twice_ends_as_an_undisturbed_one(slurm, overrides, tmp_path):
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    launch(2, ["-m", "ditmoe_ds.train", "recipes/digits.yaml", *overrides, f"run_dir={whole}"])
    job = submit(slurm, run_dir, *overrides)
    until_step(run_dir, 4)
    subprocess.run(["scancel", "--signal=USR1", job], env=slurm, check=True)  # as SLURM sends it before the time limit
    wait_for(job, slurm, "PENDING")
    stopped = len(losses(run_dir))
    assert 4 <= stopped < STEPS
    wait_for(job, slurm, "RUNNING")
    until_step(run_dir, stopped + 5)
    killed = next(process for process in processes_of(run_dir) if process.environ().get("SLURM_PROCID") == "1")
    killed.send_signal(signal.SIGKILL)
    wait_for(job, slurm, "PENDING")
    wait_for(job, slurm, "RUNNING")
    wait_for(job, slurm, "COMPLETED")
    log = (run_dir / "launch" / f"slurm-{job}.log").read_text()
    assert f"interrupted after step {stopped}; started again, the run goes on from step_{stopped:08d}" in log
    assert f"resumed at step {stopped} " in log
    assert re.search(r"^error: rank 1 on node[12] ended without a word after step \d+", log, re.M), log
    assert re.search(r"^ditmoe: started again from step_\d+: ended with ", log, re.M), log
    assert log.rstrip().endswith("ditmoe: done")
    assert losses(run_dir) == losses(whole)
    about = json.loads((run_dir / "launch" / "launch.json").read_text())
    assert about["ditmoe_ds"]
    [copy] = (run_dir / "launch").glob("recipe-*.yaml")
    assert copy.read_text() == (ROOT / "recipes" / "digits.yaml").read_text()


@real_cluster
def test_scancel_saves_and_leaves_nothing_behind(slurm, overrides, tmp_path):
    run_dir = tmp_path / "run"
    job = submit(slurm, run_dir, *overrides, "train.steps=100000")
    until_step(run_dir, 3)
    assert processes_of(run_dir)
    subprocess.run(["scancel", job], env=slurm, check=True)
    wait_for(job, slurm, "CANCELLED")
    deadline = time.monotonic() + 40
    while processes_of(run_dir):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert state(job, slurm) == "CANCELLED"
    assert "interrupted after step" in (run_dir / "launch" / f"slurm-{job}.log").read_text()  # SIGTERM, to the loaders too


@real_cluster
def test_a_mistake_is_not_submitted(slurm, overrides, tmp_path):
    command = ["launch", "slurm", "recipes/digits.yaml", "--nodes", "2", "--gpus-per-node", "0", *overrides, f"run_dir={tmp_path}"]
    mistakes = {"train.global_batch=7": "train.global_batch=7", "--partition=nowhere": "invalid partition specified: nowhere"}
    for mistake, says in mistakes.items():
        done = ditmoe(slurm, *command, mistake)
        assert done.returncode == 2
        assert says in done.stderr


@real_cluster
@pytest.mark.slow
def test_an_array_encodes_and_can_be_finalized(slurm, inputs, tmp_path):
    out = tmp_path / "latents"
    words = ["--source", f"folder:{inputs / 'images'}", "--vae", inputs / "vae", "--size", "32", "--shard-size", "4", "--out", out]
    command = ["launch", "slurm-array", "--workers", "2", "--gpus-per-node", "0", "--out", tmp_path / "scripts", "--", *words]
    done = ditmoe(slurm, *command)
    assert done.returncode == 0, done.stderr
    job = re.search(r"^job (\d+): 2 workers", done.stdout)[1]
    for task in (0, 1):
        wait_for(f"{job}_{task}", slurm, "COMPLETED")
    before = sorted(path.name for path in (out / "units").iterdir())
    (out / "manifest.json").unlink(missing_ok=True)
    lost = before[1]  # of the second worker, which alone is submitted again
    (out / "units" / lost).unlink()
    command = ["sbatch", "--parsable", "--array=1", str(tmp_path / "scripts" / "encode_array.sbatch")]
    job = subprocess.run(command, env=slurm, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    wait_for(f"{job}_1", slurm, "COMPLETED")
    assert sorted(path.name for path in (out / "units").iterdir()) == before
    assert "worker 1 of 2" in (tmp_path / "scripts" / f"encode-{job}_1.log").read_text()
    finalized = subprocess.run(
        [sys.executable, "-m", "data_prep.cli", "finalize", str(out)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finalized.returncode == 0, finalized.stderr
    assert (out / "manifest.json").is_file()


def test_a_filled_in_script_is_the_plain_one_with_its_arguments():
    plain = (SCRIPTS / "train.sbatch").read_text()
    text = fill_in(plain, {"nodes": 4, "signal": "USR1@60", "account": None}, {"IN": "sif $x"}, ["a recipe.yaml", "run; rm -rf /"])
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert "#SBATCH --nodes=4" in lines
    assert [line for line in lines if "--signal" in line] == ["#SBATCH --signal=USR1@60"]
    assert "export IN='sif $x'" in lines
    assert "set -- 'a recipe.yaml' 'run; rm -rf /'" in lines
    first_command = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])
    assert text.endswith(plain[plain.index("set -uo pipefail") :])
    assert "#SBATCH --constraint=a100|h100" in fill_in(plain, {"constraint": "a100|h100"}, {}, []).splitlines()
    for bad in ("x\n#SBATCH --wrap=evil", "two words", 'a"', "a#b"):
        with pytest.raises(ConfigError, match="--account"):
            fill_in(plain, {"account": bad}, {}, [])


def test_numbers_and_words_that_cannot_be(tmp_path, capsys):
    train = ["launch", "slurm", "recipes/digits.yaml", "--nodes", "1"]
    encode = ["--source", "folder:a", "--vae", "b", "--out", "c"]
    for arguments, says in (
        ([*train, "--gpus-per-node", "-2"], "--gpus-per-node=-2: at least 0"),
        ([*train, "--gpus-per-node", "1", "--signal-seconds", "-5"], "--signal-seconds=-5: at least 1"),
        (["launch", "slurm-array", "--workers", "0", "--", "--source"], "--workers=0: at least 1"),
        (["launch", "slurm-array", "--workers", "2", "--gpus-per-node", "8", "--", *encode], "one GPU; raise --workers"),
        (["launch", "slurm-array", "--workers", "2", "--", *encode, "--worker", "0/2"], "--worker='0/2': each task has its own"),
    ):
        assert main(arguments) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["launch", "slurm-array", "--workers", "2", "--out", str(tmp_path / "x"), "--", "--sourc", "folder:a", "--vea", "b"])
    assert "--vae" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_shards_are_looked_for_once_whatever_the_number_of_nodes(overrides, tmp_path, capsys, monkeypatch):
    asked, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: asked.append(str(path)) or stat(path, **options))
    options = ["--nodes", "1-2", "--gpus-per-node", "0", "--processes-per-node", "2", "--dry-run"]
    assert main(["launch", "slurm", str(ROOT / "recipes" / "digits.yaml"), *options, *overrides, f"run_dir={tmp_path / 'run'}"]) == 0
    tars = [name for name in asked if name.endswith(".tar")]
    assert tars and len(tars) == len(set(tars))


@pytest.mark.parametrize(
    "mistake, says",
    [
        (["--source", "folder:/no/images"], "--source='folder:/no/images': no such folder"),
        (["--vae", "/no/vae"], "vae='/no/vae': no such folder"),
        (["--size", "33"], "--size='33x33': must be multiples of 2"),
        (["--text", "x"], "none of 40 images has a caption"),
        (["--source", "sample:shapes", "--text", "/no/text"], "--text='/no/text': neither a folder nor"),
        (["--source", "sample:shapes", "--text", "VAE"], "of a transformers model"),
    ],
)
def test_an_encoding_that_cannot_be_is_not_submitted(inputs, tmp_path, capsys, monkeypatch, mistake, says):
    monkeypatch.setattr("ditmoe_ds.launching.cli.submit", lambda script: pytest.fail("submitted"))
    vae = str(inputs / "vae")
    right = ["--source", f"folder:{inputs / 'images'}", "--vae", vae, "--out", "latents", "--size", "32"]
    wrong = [*right, *(vae if word == "VAE" else word for word in mistake)]
    for options in ([], ["--dry-run"]):
        assert main(["launch", "slurm-array", "--workers", "2", "--out", str(tmp_path / "x"), *options, "--", *wrong]) == 2
        captured = capsys.readouterr()
        assert says in captured.err and not captured.out
    assert not (tmp_path / "x").exists()


def test_hub_ids_are_left_to_the_workers(inputs, capsys):
    """Where an array is submitted, there may be no network."""
    for vae, text in (("owner/vae", "owner/text"), (str(inputs / "vae"), "text")):
        words = ["--source", "sample:shapes", "--vae", vae, "--text", text, "--out", "latents"]
        assert main(["launch", "slurm-array", "--workers", "2", "--dry-run", "--", *words]) == 0
        assert f"--vae {vae} --text {text} " in capsys.readouterr().out


def test_a_rendezvous_of_another_launcher_is_forgotten(tmp_path):
    """What called sbatch may have had ranks of its own; a user's MASTER_ADDR stays."""
    (tmp_path / "srun").write_text('#!/bin/bash\necho "rank ${RANK:-none} of ${MASTER_ADDR:-none}"\n')
    (tmp_path / "srun").chmod(0o755)
    plain = {key: value for key, value in os.environ.items() if key not in ("RANK", "MASTER_ADDR")}
    environment = plain | dict(PATH=f"{tmp_path}:{os.environ['PATH']}", MASTER_ADDR="node7", SLURM_JOB_ID="1")
    for more, said in (({}, "rank none of node7"), (dict(RANK="3", WORLD_SIZE="4"), "rank none of none")):
        done = subprocess.run(["bash", SCRIPTS / "train.sbatch", "recipe", "run"], env=environment | more, capture_output=True, text=True)
        assert done.stdout.splitlines()[0] == said, done.stderr


@pytest.mark.parametrize(
    "verdict, requeue, code, says",
    [(0, 0, 0, "started again from step_7"), (0, 1, 75, "refused to queue it again"), (1, 0, 75, "could not be found out")],
)
def test_a_run_that_cannot_be_queued_again_is_no_success(tmp_path, verdict, requeue, code, says):
    asks = f'[[ $* != *restarts* ]] || {{ echo "ditmoe: started again from step_7: interrupted"; exit {verdict}; }}'
    for name, command in (("srun", asks), ("scontrol", f"exit {requeue}")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{command}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="1")
    done = subprocess.run(["bash", SCRIPTS / "train.sbatch", "recipe", "run"], env=environment, capture_output=True, text=True)
    assert done.returncode == code and says in done.stdout.splitlines()[-1], done


@pytest.mark.parametrize("step, ranks", [("0", (3, 8)), ("4294967290", (0, 1))])
def test_the_shell_of_salloc_is_no_rank(monkeypatch, step, ranks):
    """It may be a step of SLURM's own, and has the number of tasks of those that srun will start."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in dict(STEP_ID=step, NTASKS="8", PROCID="3", LOCALID="3").items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert under_srun() == (step == "0")
    assert worker_from_environment() == ranks


def test_containers(tmp_path, monkeypatch):
    assert container("image.sif") == "apptainer exec --nv image.sif"
    here = os.getcwd()  # pyxis would start in the image's own folder, where paths of the recipe lead nowhere
    assert container("team/image:1") == f"--container-image=team/image:1 --container-mounts={here} --container-workdir={here}"
    with pytest.raises(ConfigError, match="'my image.sif' has ' ' in it; link to it"):
        container("my image.sif")
    (tmp_path / "my project").mkdir()
    monkeypatch.chdir(tmp_path / "my project")
    with pytest.raises(ConfigError, match="my project' has ' ' in it"):
        container("image.sif")
    (tmp_path / "c,etc:mnt").mkdir()
    monkeypatch.chdir(tmp_path / "c,etc:mnt")
    assert container("image.sif") == "apptainer exec --nv image.sif"
    with pytest.raises(ConfigError, match="c,etc:mnt' has ',' in it"):  # between pyxis' mounts
        container("team/image:1")


def test_a_dry_run_prints_the_script_and_writes_nothing(overrides, tmp_path):
    options = [
        "--nodes",
        "1-2",
        "--gpus-per-node",
        "0",
        "--processes-per-node",
        "2",
        "--account",
        "me",
        "--sbatch",
        "qos=high",
        "--sbatch",
        "exclusive",
        "--sbatch",
        "mem_per_cpu=4G",
        "--dry-run",
    ]
    done = ditmoe(dict(os.environ), "launch", "slurm", "recipes/digits.yaml", *options, *overrides, f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=1-2" in done.stdout
    assert "#SBATCH --ntasks-per-node=2" in done.stdout
    assert "#SBATCH --qos=high\n#SBATCH --exclusive\n#SBATCH --mem-per-cpu=4G\n" in done.stdout
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0
    assert not (tmp_path / "run").exists()
    named = ditmoe(dict(os.environ), "launch", "slurm", "recipes/digits.yaml", *options, *overrides, f"run_dir={tmp_path / '50%j'}")
    assert f"#SBATCH --output={tmp_path}/50%%j/launch/slurm-%j.log\n" in named.stdout
    options[1] = "1-4"  # SLURM would never take more nodes than the least has tasks
    refused = ditmoe(dict(os.environ), "launch", "slurm", "recipes/digits.yaml", *options, *overrides, f"run_dir={tmp_path / 'run'}")
    assert refused.returncode == 2 and "--nodes='1-4'" in refused.stderr and "raise the least" in refused.stderr
