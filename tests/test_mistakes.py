"""Bad recipes: one clear line from rank 0, exit code 2 on every rank, before a run directory is there, and no traceback."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
import yaml
from latents import write_latents
from models import SPARSE, random_weights
from processes import ROOT, Ranks, launch

from ditmoe_ds.distributed.settings import read_ds_config
from ditmoe_ds.distributed.topology import AgreedError, ParallelConfig, agreed
from ditmoe_ds.distributed.weights import differently_encoded, write_weights
from ditmoe_ds.errors import CheckpointError, ConfigError, DataError, UserError, in_a_line, some, visible
from ditmoe_ds.latents.condition import Classes
from ditmoe_ds.latents.loader import Batch
from ditmoe_ds.latents.manifest import Manifest
from ditmoe_ds.models.sizes import named_config
from ditmoe_ds.training.plan import read_plan
from ditmoe_ds.training.recipe import BOUNDS, Recipe

OFFLOAD = ["parallel.zero_stage=3", "parallel.deepspeed=ds_configs/zero3_offload.json"]
MISTAKES = {
    "unknown key": (["train.step=3"], ["train.step", "train.steps"]),
    "EP does not divide the world": (["parallel.expert=4"], ["parallel.expert=4", "2 processes", "[1, 2]"]),
    "no data": (["data.manifest=nowhere"], ["data.manifest", "nowhere", "ditmoe-data encode"]),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    path = folder / "recipe.yaml"
    content = dict(
        model=dict(name="DiT-MoE-Nano/2-4E2A"),
        data=dict(manifest=write_latents(folder / "latents", train=8, val=2), workers=0),
        train=dict(steps=2, global_batch=8),
        run_dir=str(folder / "run"),
    )
    path.write_text(yaml.safe_dump(content))
    return path


def check_output(output, words):
    """The message is there once, whole, on one line; nothing else went wrong."""
    lines = [line for line in output.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), output
    assert "Traceback" not in output


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_rank_leaves_with_2(recipe, mistake):
    overrides, words = MISTAKES[mistake]
    (first, output), (second, silent) = launch(2, ["-m", "ditmoe_ds.train", recipe, *overrides], check=False)
    assert (first, second) == (2, 2), output + silent
    check_output(output, words)
    assert "error" not in silent
    assert not (recipe.parent / "run").exists()


def test_a_mistake_that_one_rank_alone_sees_ends_all(recipe):
    """The second rank finds no data: the first must not wait for it, and must say why."""
    worker = f"""
import os
from ditmoe_ds import train
from ditmoe_ds.ending import end
folder = "{recipe.parent / "latents"}" if os.environ["RANK"] == "0" else "elsewhere"
end(train.main(["{recipe}", f"data.manifest={{folder}}"]))
"""
    (first, output), (second, _) = launch(2, ["-c", worker], check=False)
    assert (first, second) == (2, 2)
    check_output(output, ["elsewhere", f"(only rank 1 on {socket.gethostname()})"])


@pytest.mark.parametrize(
    "raising, says",
    [
        (range(4), "no such file"),
        (range(1), "no such file"),  # what rank 0 alone has to do
        ([2], "no such file (only rank 2 on node2)"),
        ([1, 2], "no such file (only 2 of 4 ranks, the first rank 1 on node1)"),
    ],
)
def test_an_error_of_some_ranks_names_them(monkeypatch, raising, says):
    def gather(found, mine, group):
        found[:] = [("no such file", f"rank {rank} on node{rank}") if rank in raising else None for rank in range(4)]

    for name, substitute in dict(get_world_size=lambda _: 4, get_rank=lambda: 3, all_gather_object=gather).items():
        monkeypatch.setattr(torch.distributed, name, substitute)
    with pytest.raises(AgreedError) as caught:
        agreed(lambda: None)
    assert str(caught.value) == says


def test_srun_starts_ranks_too(recipe):
    """One task per GPU under srun: SLURM's variables instead of a launcher's. The mistake proves that the ranks met."""
    worker = f"""
import os
e = os.environ
e.update(SLURM_STEP_ID="0", SLURM_PROCID=e.pop("RANK"), SLURM_NTASKS=e.pop("WORLD_SIZE"), SLURM_LOCALID=e.pop("LOCAL_RANK"))
e.update(SLURM_LAUNCH_NODE_IPADDR=e.pop("MASTER_ADDR"), SLURM_JOB_ID=str(int(e.pop("MASTER_PORT")) % 20000))
from ditmoe_ds import train
from ditmoe_ds.ending import end
end(train.main(["{recipe}", "parallel.expert=4"]))
"""
    (first, output), (second, _) = launch(2, ["-c", worker], check=False)
    assert (first, second) == (2, 2)
    check_output(output, ["2 processes"])


def test_a_port_that_is_taken():
    """Rank 0 says so; the others, which wait in what listens there, end as soon as they are asked, whatever else a run makes of that."""
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        worker = f"""
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: None)
os.environ["MASTER_PORT"] = "{port}"
from ditmoe_ds.distributed.topology import on_all_ranks
sys.exit(on_all_ranks(print))
"""
        ranks = Ranks(2, ["-c", worker])
        try:
            assert ranks.processes[0].wait(60) == 1
            for _ in range(40):  # it may be importing still
                ranks.processes[1].terminate()
                time.sleep(0.5)
                if ranks.processes[1].poll() is not None:
                    break
        finally:
            (_, output), (code, silent) = ranks.wait(0, check=False)
    assert code == -signal.SIGTERM, silent
    check_output(output, [f"MASTER_PORT={port}", "--master_port"])


def test_through_the_deepspeed_launcher(recipe):
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "29731"]
    command += ["--module", "ditmoe_ds.train", str(recipe), "train.step=3"]
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), DS_ACCELERATOR="cpu")
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    check_output("\n".join(line for line in (result.stdout + result.stderr).splitlines() if "[launch.py" not in line), ["train.steps"])


def test_every_number_of_a_recipe_has_bounds():
    """Or is checked with what it must fit; a seed may be any."""

    def numbers(settings, prefix=""):
        for name, hint in get_type_hints(settings).items():
            if is_dataclass(hint):
                yield from numbers(hint, f"{prefix}{name}.")
            elif {int, float} & {hint, *get_args(hint)}:
                yield prefix + name

    elsewhere = {"parallel.expert", "parallel.tensor", "train.fd_samples", "train.sample_steps", "train.seed"}
    elsewhere |= {"model.router.capacity_factor", "model.router.layer_capacity", "ema.decays"}
    assert set(numbers(Recipe)) == {key for *_, keys in BOUNDS for key in keys.split()} | elsewhere


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["train.global_batch=many"], ["train.global_batch", "'many'", "expected int"]),
        (["model.name=DiT-MoE-XXL/2-8E2A"], ["model.name", "DiT-MoE-XXL/2-8E2A", "Nano, Tiny, S"]),
        (["model.name=DiT-MoE-Nano/2-3E2A", "parallel.expert=2"], ["parallel.expert=2", "3 experts", "[1]"]),
        (["train.steps=0"], ["train.steps=0", "at least 1"]),
        (["profile=true"], ["train.steps=2", "profile=true", "at least 6"]),
        (["train.profile=true"], ["train.profile=True", "did you mean profile?"]),
        (["lr=1"], ["lr=1", "did you mean train.optimizer.lr?"]),
        (["train.every=5"], ["train.every=5", "did you mean ema.every or checkpoint.every?"]),
        (["data.prefetch=0"], ["data.prefetch=0", "at least 1"]),
        (["data.workers=-1"], ["data.workers=-1", "at least 0"]),
        (["data.mix=[{{manifest: {odd}}}]"], ["data.mix[0].manifest", "shapes: ((4, 12, 12),) -> ((4, 8, 8),)"]),
        (["data.mix=[{{manifest: {odd}, weight: 0}}]"], ["data.mix[0].weight=0", "at least 1"]),
        (["train.accumulation=3"], ["train.global_batch=8", "3 accumulation"]),
        (["parallel.tensor=3"], ["parallel.tensor=3", "1 processes, 4 heads", "256 hidden units", "[1]"]),
        (["parallel.zero_stage=4"], ["parallel.zero_stage=4", "0, 1, 2, 3"]),
        (["parallel.deepspeed=none.json"], ["parallel.deepspeed", "none.json", "no such file"]),
        (["parallel.deepspeed=ds_configs/zero3.json", "parallel.zero_stage=1"], ["parallel.zero_stage=1", "stage 3"]),
        (["model.name=DiT-MoE-Nano/8-4E2A", "data.manifest={odd}"], ["model.name", "12x12", "patches of 8"]),
        (["model.name=EC-DIT-Nano-4E"], ["data.manifest", "no encoded text", "--text", "data.text_encoder"]),
        (["model.name=EC-DIT-Nano-4E", "data.text_encoder=nowhere"], ["data.text_encoder='nowhere'", "hub id"]),
        (["model.name=EC-DIT-4XL-4E"], ["model.name", "EC-DIT-4XL-4E", "XL, XXL, 3XL, M"]),
        (["model.name=EC-DIT-Nano-1E"], ["model.name", "no choice"]),
        (["model.routing=dense"], ["model.routing='dense'", "EC-DIT"]),
        (["model.routing=experts"], ["model.routing='experts'", "'expert'"]),
        (["model.routing=expert", "model.router.layer_capacity=[1.0]"], ["model.router.layer_capacity=[1.0]", "2 sparse layers"]),
        (["model.router.layer_capacity=[1.0, 2.0]"], ["model.router.layer_capacity", "expert choice"]),
        (["model.routing=expert", "model.router.capacity_factor=0"], ["model.router.capacity_factor", "above 0"]),
        (["model.routing=expert", "model.router.capacity_factor=4.5"], ["model.router.capacity_factor=4.5", "of 4 experts"]),
        (["model.routing=expert", "model.router.layer_capacity=[1, 5]"], ["model.router.layer_capacity=5.0", "of 4 experts"]),
        (["model.routing=expert", "model.router.layer_capacity=[1, 0]"], ["model.router.layer_capacity=0.0", "above 0"]),
        (["model.name=DiT-Nano/2", "model.routing=expert"], ["model.routing='expert'", "DiT-Nano/2 has no experts"]),
        (["model.name=DiT-Nano/2", "model.router.force_balance=true"], ["model.router.force_balance=True", "DiT-Nano/2 has no experts"]),
        (["model.routing=expert", "model.router.force_balance=true"], ["model.router.force_balance=True", "token choice"]),
        (["train.mask_ratio=0.9"], ["train.mask_ratio=0.9", "0.75"]),
        (["train.activation_checkpointing=1"], ["train.activation_checkpointing=1", "choose one of", "'attention'"]),
        (["train.optimizer.warmup_steps=-5"], ["train.optimizer.warmup_steps=-5", "at least 0"]),
        (["train.optimizer.grad_clip=-1"], ["train.optimizer.grad_clip=-1", "does not clip"]),
        (["train.optimizer.lr=.nan"], ["train.optimizer.lr=nan", "finite"]),
        (["train.optimizer.beta1=1.5"], ["train.optimizer.beta1=1.5", "[0, 1)"]),
        (["train.sample_images=0"], ["train.sample_images=0", "at least 1"]),
        (["diffusion.condition_dropout=0"], ["train.guidance=2.0", "nothing is learned of images without their condition"]),
        (["diffusion.condition_dropout=7"], ["diffusion.condition_dropout=7", "[0, 1)"]),
        (["train.sample_every=-1"], ["train.sample_every=-1", "0, which is never"]),
        (["checkpoint.keep_every=-1"], ["checkpoint.keep_every=-1", "at least 0"]),
        (["data.cache_gb=0"], ["data.cache_gb=0", "above 0"]),
        (["data.manifest=https://me:secret@host/latents"], ["data.manifest='...@host/latents'", "~/.netrc"]),
        (["data.mix=[{{manifest: 'ftp://me:secret@host/latents'}}]"], ["data.mix[0].manifest='...@host/latents'", "user and password out"]),
        (["data.cache=/dev/null/cache"], ["data.cache='/dev/null/cache'", "cannot be made"]),
        (["data.cache=/proc"], ["data.cache='/proc'", "or written"]),  # a folder in which not even root makes a file
        (["model.router.balance_alpha=-1"], ["model.router.balance_alpha=-1", "at least 0"]),
        (["data.text_encoder=somewhere"], ["data.text_encoder", "conditioned on classes"]),
        (["diffusion.objective=ddpm", "diffusion.time_shift=2", "train.sample_steps=50"], ["diffusion.time_shift=2", "rectified flow"]),
        (["data.manifest={gone}"], ["data.manifest", "its VAE is not at /somewhere", "train.sample_every=0"]),
        (["data.manifest={whole}"], ["data.manifest", "no sample to validate on", "--holdout"]),
        (["data.manifest={plain}"], ["data.manifest", "have no classes; this model is conditioned on classes"]),
        (["model.name=null", "model.weights={text}", "model.new_classes=true"], ["model.new_classes=True", "of a text-to-image model"]),
        (["train.wandb=true"], ["train.wandb=True", "pip install wandb"]),
        (["ema.decays=[0.9, 0.9]"], ["ema.decays=[0.9, 0.9]", "different decays in [0, 1), at least one"]),
        (["ema.decays=[]"], ["ema.decays=[]", "at least one"]),
        (["ema.decays=[1.0]"], ["ema.decays=[1.0]", "in [0, 1)"]),
        (["data.skip_shards=[train-000000.tar]"], ["data.skip_shards leaves none"]),
        (["run_dir=~/runs/a"], ["run_dir='~/runs/a'", "~ and variables are not replaced"]),
        (["data.cache=$TMPDIR/latents"], ["data.cache='$TMPDIR/latents'", "write the path"]),
        (["run_dir=/dev/null/run"], ["run_dir='/dev/null/run'", "/dev/null is no folder"]),
        ([*OFFLOAD, "train.optimizer.name=rmsprop"], ["train.optimizer.name='rmsprop'", "adamw alone"]),
    ],
)
def test_other_mistakes(recipe, overrides, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    text = recipe.parent / "text"
    if not text.exists():
        write_weights(text, random_weights(named_config("EC-DIT-Nano-4E", text_width=12))[1])
    data = dict(
        text=text,
        plain=write_latents(recipe.parent / "plain", train=1, val=1),
        odd=write_latents(recipe.parent / "odd", train=1, val=1, shape=(4, 12, 12)),
        gone=write_latents(recipe.parent / "gone", train=1, val=1, vae="/somewhere"),
        whole=write_latents(recipe.parent / "whole", train=1, val=0),
    )
    replace(Manifest.load(data["plain"]), num_classes=0, class_names=(), class_histogram=()).save()
    with pytest.raises(UserError) as caught:
        plan = read_plan([str(recipe), *(override.format(**data) for override in overrides)], world=1)
        plan.recipe.data.open(plan.manifests, "train")
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "world, overrides, words",
    [
        (8, ["parallel.tensor=8"], ["parallel.tensor=8", "8 processes, 4 heads", "[1, 2, 4]"]),
        (8, ["parallel.tensor=4", "model.name=EC-DIT-Nano-4E"], ["parallel.tensor=4", "2 heads of k and v", "[1, 2]"]),
        (6, ["parallel.tensor=4"], ["parallel.tensor=4", "6 processes", "[1, 2]"]),
        (8, ["parallel.tensor=4", "parallel.expert=4"], ["parallel.expert=4", "2 tensor-parallel groups of 4", "[1, 2]"]),
        (8, ["parallel.tensor=2", "train.global_batch=6"], ["train.global_batch=6", "4 tensor-parallel groups", "4 does"]),
        (2, ["parallel.tensor=2", "model.weights={biased}", "model.name=null"], ["parallel.tensor=2", "upcycled", "parallel.expert"]),
    ],
)
def test_tensor_parallel_sizes(recipe, world, overrides, words):
    biased = recipe.parent / "biased"
    if not biased.exists():
        write_weights(biased, random_weights(replace(SPARSE, num_classes=10, expert_activation="gelu"))[1], "fp32")
    with pytest.raises(ConfigError) as caught:
        read_plan([str(recipe), *(override.format(biased=biased) for override in overrides)], world)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_without_megatron_core(recipe, monkeypatch):
    monkeypatch.delitem(sys.modules, "ditmoe_ds.distributed.tensor_parallel", raising=False)
    monkeypatch.setitem(sys.modules, "megatron", None)
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    with pytest.raises(ConfigError, match=r"parallel.tensor=2: needs megatron-core: pip install 'ditmoe_ds\[tensor\]'"):
        read_plan([str(recipe), "parallel.tensor=2"], world=2)


@pytest.mark.parametrize(
    "known, words",
    [(dict(scaling_factor=0.5), "scaling_factor: 0.9 -> 0.5"), (dict(vae_sha256="abc"), "vae_sha256: unchecked -> abc"), ({}, None)],
)
def test_weights_that_were_trained_on_another_vae(recipe, tmp_path, known, words):
    _, weights = random_weights(replace(SPARSE, num_classes=10), latents=known)
    write_weights(tmp_path / "weights", weights, "fp32")
    data = write_latents(tmp_path / "latents", train=8, val=2, vae="/somewhere")
    arguments = [str(recipe), "model.name=null", f"model.weights={tmp_path / 'weights'}", f"data.manifest={data}", "train.sample_every=0"]
    if words is None:
        assert read_plan(arguments, world=1).weights
    else:
        with pytest.raises(ConfigError, match=words):
            read_plan(arguments, world=1)


def test_how_data_can_differ_from_what_weights_were_trained_on():
    """Hub ids have no sha256; a folder's is known, wherever it lies, unless the weights are of an earlier release."""
    text = dict(encoder="hub/t5", max_tokens=77, sha256=None)
    ours = dict(vae="hub/ema", vae_sha256=None, scaling_factor=1.0, text=text)
    assert differently_encoded(ours, ours) is None and differently_encoded(ours, {}) is None
    assert differently_encoded(ours, ours | dict(vae="hub/mse")) == "vae: hub/ema -> hub/mse"
    assert differently_encoded(ours, ours | dict(text=text | dict(encoder="hub/flan"))) == "text.encoder: hub/t5 -> hub/flan"
    assert differently_encoded(ours, ours | dict(text=text | dict(max_tokens=16))) == "text.max_tokens: 77 -> 16"
    assert differently_encoded(ours, ours | dict(text=text | dict(encoder="/folder", sha256="abc"), vae="/vae", vae_sha256="d")) is None


def test_sets_of_different_hub_vaes_are_not_mixed(recipe, tmp_path):
    """Of which there is no sha256."""
    for name in ("ema", "mse"):
        folder = write_latents(tmp_path / name, train=8, val=2)
        replace(Manifest.load(folder), vae=f"hub/{name}").save()
    arguments = [str(recipe), f"data.manifest={tmp_path}/ema"]
    assert read_plan([*arguments, f"data.mix=[{{manifest: {tmp_path}/ema}}]"], world=1)
    with pytest.raises(ConfigError, match=r"data.mix\[0\].manifest=.*vae: hub/mse -> hub/ema of data.manifest"):
        read_plan([*arguments, f"data.mix=[{{manifest: {tmp_path}/mse}}]"], world=1)


def test_sets_are_mixed_wherever_their_text_encoder_lies(recipe, tmp_path):
    """It is known by its sha256. Of what differs, that alone is told."""
    texts = [dict(encoder="/here", max_tokens=5), dict(encoder="/there", max_tokens=5), dict(encoder="/here", max_tokens=7)]
    for i, text in enumerate(texts):
        manifest = Manifest.load(write_latents(tmp_path / str(i), train=8, val=2, text=6))
        replace(manifest, text=replace(manifest.text, encoder_sha256="a" * 64, **text)).save()
    arguments = [str(recipe), "model.name=EC-DIT-Nano-4E", f"data.manifest={tmp_path}/0"]
    assert read_plan([*arguments, f"data.mix=[{{manifest: {tmp_path}/1}}]"], world=1)
    with pytest.raises(ConfigError, match=r"data.mix\[0\].manifest='[^']*': text.max_tokens: 7 -> 5 of data.manifest; encode it alike$"):
        read_plan([*arguments, f"data.mix=[{{manifest: {tmp_path}/2}}]"], world=1)


ZERO = dict(stage=1, contiguous_gradients=True, reduce_scatter=True, offload_optimizer=dict(device="none", ratio=1.0))


@pytest.mark.parametrize(
    "content, word",
    [
        ("{", "not valid JSON"),
        (dict(bf16={}), "train.precision"),
        (dict(zero_optimization=ZERO), None),
        (
            dict(zero_optimization=ZERO | dict(round_robin_gradients=True)),
            "zero_optimization.round_robin_gradients=true.* wrong ones are saved",
        ),
        (dict(zero_optimization=ZERO | dict(offload_optimizer=dict(device="cpu", ratio=0.5))), "offload_optimizer.ratio=0.5"),
        (dict(zero_optimization=dict(stage=3, offload_param=dict(device="cpu"))), "offload_param.device=.cpu.*not tried"),
        (dict(zero_optimization=ZERO | dict(reduce_scatter=False)), "zero_optimization.reduce_scatter=false"),
        (dict(zero_optimization=dict(stage=3, zero_quantized_gradients=True)), "zero_quantized_gradients=true.*remove it"),
        (dict(zero_optimization=dict(stage=3, offload_optimizer=dict(device="nvme"))), 'offload_optimizer.device="nvme".*write cpu'),
        (dict(zero_optimization=ZERO, sequence_parallel_size=2), "sequence_parallel_size=2.*remove it"),
        (dict(zero_optimization=ZERO, torch_autocast=dict(enabled=True)), "torch_autocast.enabled=true"),
        (dict(zero_optimization=ZERO, data_types=dict(grad_accum_dtype="fp32")), "data_types.grad_accum_dtype"),
        (dict(zero_optimization=dict(stage=0), data_types=dict(grad_accum_dtype="fp32")), "data_types.grad_accum_dtype"),
        (dict(zero_optimization=dict(stage=1, offload_optimizer=None)), None),
        (dict(zero_optimization=ZERO | dict(reduce_bucket_size="auto")), None),
        (dict(zero_optimization=ZERO | dict(cpu_offload=False)), "'cpu_offload' and replacing parameter"),
        (dict(zero_optimization=ZERO | dict(cpu_offload=True)), "cpu_offload=true: write offload_optimizer"),
        (dict(zero_optimization=ZERO | dict(compute_grad_norm=False)), "compute_grad_norm=false"),
        (dict(zero_optimization=ZERO, managed_gradient_accumulation=False), "managed_gradient_accumulation=false"),
        (dict(zero_optimization=ZERO | dict(zero_quantized_weights=True)), "zero_quantized_weights=true: weights travel as they are"),
        (dict(zero_optimization=ZERO | dict(stage3_allgather_sequential=True)), "stage3_allgather_sequential=true: weights are gathered"),
        (dict(zero_optimization=ZERO | dict(allgather_sequential=True)), "stage3_allgather_sequential=true: weights are gathered"),
        (dict(zero_optimization=ZERO | dict(max_live_parameters=1, stage3_max_live_parameters=2)), "max_live_parameters=1: Extra inputs"),
        (dict(zero_optimization=ZERO | dict(zenflow=dict(topk_ratio=0.1))), "zenflow={.*: its optimizer keeps state"),
        (dict(zero_optimization=ZERO, gradient_allreduce_op="sum"), 'gradient_allreduce_op="sum": .*number of processes'),
        (dict(zero_optimization=ZERO, prescale_gradients=True), "prescale_gradients=true: .*stages 2 and 3"),
        (dict(zero_optimization=ZERO | dict(leaf_module=dict(names=["a"]))), "leaf_module={.*: weights are gathered by layer"),
        (dict(zero_optimization=ZERO | dict(overlap_com=True)), "zero_optimization.overlap_com=true"),
        (dict(zero_optimization=ZERO | dict(offload_optimizer="cpu")), "zero_optimization.offload_optimizer="),
        (dict(zero_optimization=ZERO | dict(reduce_bucket_size="many")), "zero_optimization.reduce_bucket_size="),
        ('{"zero_optimization": true}', "zero_optimization=true: holds settings"),
        ([1], "no JSON object"),
    ],
)
def test_a_bad_deepspeed_file(recipe, tmp_path, content, word):
    (tmp_path / "ds.json").write_text(content if isinstance(content, str) else json.dumps(content))
    stage = content.get("zero_optimization", ZERO)["stage"] if isinstance(content, dict) else 1
    arguments = [str(recipe), f"parallel.deepspeed={tmp_path / 'ds.json'}", f"parallel.zero_stage={stage}"]
    if word is None:
        assert read_plan(arguments, world=1)
    else:
        with pytest.raises(ConfigError, match=word):
            read_plan(arguments, world=1)


def test_the_other_names_of_settings_of_zero(tmp_path):
    """A user's value then takes the place of ours, instead of standing beside it, which DeepSpeed refuses when the model is built."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(dict(zero_optimization=dict(stage=3, max_live_parameters=7, stage3_prefetch_bucket_size=5))))
    read = read_ds_config(ParallelConfig(zero_stage=3, deepspeed=str(file)))
    assert read["zero_optimization"] == dict(stage=3, stage3_max_live_parameters=7, stage3_prefetch_bucket_size=5)


@pytest.mark.parametrize(
    "content, says",
    [
        (dict(train_batch_size=8), "remove 'train_batch_size'; the recipe sets it as train.global_batch"),
        (dict(train_micro_batch_size_per_gpu=8), "train.global_batch"),
        (dict(gradient_accumulation_steps=2), "train.accumulation"),
        (dict(gradient_clipping=0.5), "train.optimizer.grad_clip"),
        (dict(optimizer=dict(type="SGD")), "train.optimizer"),
        (dict(scheduler=dict(type="WarmupLR")), "train.optimizer.warmup_steps"),
        (dict(fp16=dict(enabled=True)), "train.precision"),
        (dict(zero_optimization=ZERO | dict(cpu_offload_param=True)), "were not tried with experts"),
        (dict(zero_optimization=ZERO | dict(stage3_module_granularity_threshold=1000)), "by layer here"),
        (dict(zero_optimization=ZERO | dict(stage3_use_all_reduce_for_fetch_params=True)), "by layer here"),
        (dict(zero_optimization=ZERO | dict(zero_quantized_nontrainable_weights=True)), "as they are here"),
        (dict(zero_optimization=ZERO | dict(zero_hpz_partition_size=2)), "is not saved, nor tried"),
        (dict(zero_optimization=ZERO | dict(contiguous_gradients=False)), "no other way with experts"),
    ],
)
def test_what_a_deepspeed_file_may_not_say(recipe, tmp_path, content, says):
    (tmp_path / "ds.json").write_text(json.dumps(dict(zero_optimization=ZERO) | content))
    with pytest.raises(ConfigError, match=f"parallel.deepspeed=.*{says}(; remove it)?$"):
        read_plan([str(recipe), f"parallel.deepspeed={tmp_path / 'ds.json'}", "parallel.zero_stage=1"], world=1)


def test_another_deepspeed(recipe, monkeypatch):
    monkeypatch.setattr("deepspeed.__version__", "0.20.1")
    with pytest.raises(ConfigError, match=r"deepspeed='0.20.1': .*install 0.19.8 <= deepspeed < 0.20$"):
        read_plan([str(recipe)], world=1)


@pytest.mark.parametrize("depth, words", [(1, r"blocks.1.*the model has shape None"), (3, r"blocks.2.*the weights None")])
def test_starting_weights_that_are_not_the_network_they_name(recipe, tmp_path, depth, words):
    folder = write_weights(tmp_path / "weights", random_weights(replace(SPARSE, num_classes=10))[1], "fp32")
    content = json.loads((folder / "config.json").read_text())
    content["model"]["depth"] = depth
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=words):
        read_plan([str(recipe), "model.name=null", f"model.weights={folder}"], world=1)


def test_samples_without_a_class(recipe, tmp_path):
    """Held-out ones alone may be without: they are told none."""
    data = Path(write_latents(tmp_path / "latents", train=8, val=2))
    content = json.loads((data / "manifest.json").read_text())
    content["class_histogram"][3] -= 1
    (data / "manifest.json").write_text(json.dumps(content))
    for settings in ([f"data.manifest={data}"], [f"data.mix=[{{manifest: {data}}}]"]):
        with pytest.raises(ConfigError, match="1 of 8 training samples have no class"):
            read_plan([str(recipe), *settings], world=1)
    assert Classes(10).of(Batch(torch.zeros(2), torch.tensor([-1, 2]), *[None] * 5)) == [10, 2]


def test_errors_cross_processes():
    """From a loader's to its rank."""
    error = pickle.loads(pickle.dumps(ConfigError("data.cache", "", "name a folder")))
    assert (type(error), str(error), error.fix) == (ConfigError, "data.cache='': name a folder", "name a folder")


def test_what_a_terminal_would_obey_is_escaped():
    """It may stand in the names of files and members that others made."""
    harmful = "a\x1b[2K\r\x9b1A\u202eb\u2066\u2028\nerror: nothing\t\x07\x7f\udce9"
    shown = r"a\x1b[2K\r\x9b1A\u202eb\u2066\u2028\nerror: nothing\t\x07\x7f\udce9"
    error = pickle.loads(pickle.dumps(DataError(harmful)))
    assert (str(error), f"{error}", error.args) == (shown, shown, (harmful,))
    assert (visible(shown), some([harmful]), in_a_line("\x1b\n a")) == (shown, shown, r"\x1b a")
    plain = "Größe 10 µm, 日本語\u3000한국어, \N{WOMAN}\u200d\N{PERSONAL COMPUTER}\ufe0f, C:\\new 'x'"
    assert visible(plain) == str(UserError(plain)) == plain


def test_no_recipe():
    with pytest.raises(ConfigError, match="name a recipe"):
        read_plan([], world=1)


def test_an_old_lock_is_told(tmp_path):
    """DeepSpeed would wait for it for ever, and say nothing."""
    lock = tmp_path / "extensions" / "py_cpu" / "some_op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    command = [sys.executable, "-m", "ditmoe_ds.train", "no/recipe.yaml"]
    environment = os.environ | dict(TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"), DS_ACCELERATOR="cpu")
    start = lambda: subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600).stdout  # noqa: E731
    assert "DeepSpeed waits" not in start()
    os.utime(lock, (0, 0))
    assert f"DeepSpeed waits for {lock}" in start()
