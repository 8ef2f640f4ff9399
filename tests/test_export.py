"""Weights out and in: the reference's layout, diffusers' folders, and the memory it takes."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from latents import write_vae
from models import DENSE, SPARSE, random_weights
from PIL import Image
from processes import ROOT
from safetensors.torch import load_file

from ditmoe_ds.cli import main
from ditmoe_ds.diffusion.objectives import DiffusionConfig
from ditmoe_ds.diffusion.sampling import Guidance, guided, make_scheduler, sample
from ditmoe_ds.distributed import checkpoint
from ditmoe_ds.distributed.weights import open_weights, write_weights
from ditmoe_ds.errors import CheckpointError
from ditmoe_ds.interop import reference
from ditmoe_ds.interop.diffusers_folder import diffusers_weights
from ditmoe_ds.interop.reference import load_reference
from ditmoe_ds.latents.manifest import weights_sha256
from ditmoe_ds.latents.vae import latent_space
from ditmoe_ds.moe.routing import RouterConfig
from ditmoe_ds.pipelines.run import load_model, open_run

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ["dit_moe_reference_tiny", "dit_moe_reference_tiny_qknorm"]
FLOW_01 = DiffusionConfig(time_scale=1.0)
DDPM = DiffusionConfig(objective="ddpm")


def shards(folder, stem="model"):
    """All tensors of a folder of shards, by the safetensors library."""
    index = json.loads((folder / f"{stem}.safetensors.index.json").read_text())
    tensors = {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}
    assert tensors.keys() == index["weight_map"].keys()
    return tensors


def flags(arguments, objective="rectified_flow"):
    named = dict(zip(("top_k", "num_heads", "num_classes", "input_size"), ("top-k", "heads", "classes", "input-size")))
    values = [text for key, name in named.items() for text in (f"--{name}", str(arguments[key]))]
    return [*values, "--objective", objective]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Both fixtures as weights folders, by the command."""
    folder = tmp_path_factory.mktemp("imported")
    for name in NAMES:
        fixture = torch.load(FIXTURES / f"{name}.pt", weights_only=True)
        torch.save(fixture["checkpoint"], folder / f"{name}.pt")
        assert main(["import", "reference", str(folder / f"{name}.pt"), *flags(fixture["arguments"]), "--out", str(folder / name)]) == 0
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_reference_weights_come_out_as_they_went_in(name, imported, tmp_path):
    fixture = torch.load(FIXTURES / f"{name}.pt", weights_only=True)
    checkpoint = fixture["checkpoint"]
    original = next((checkpoint[key] for key in ("ema", "module") if key in checkpoint), checkpoint)
    original = {key.removeprefix("module."): value for key, value in original.items()}
    export = ["export", str(imported / name), "--to", "reference", "--out"]
    assert main([*export, str(tmp_path / "shards"), "--shard-size", "500KB"]) == 0
    assert main([*export, str(tmp_path / "one.pt")]) == 0
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for ours in (shards(tmp_path / "shards"), torch.load(tmp_path / "one.pt", weights_only=True)):
        assert ours.keys() == original.keys()
        torch.testing.assert_close(ours.pop("pos_embed"), original["pos_embed"], rtol=0, atol=1e-6)
        assert all(value.dtype == torch.float32 and torch.equal(value, original[key]) for key, value in ours.items())
    arguments, model = fixture["arguments"], load_model(open_weights(imported / name))
    inputs = fixture["x"], fixture["t"], fixture["y"]
    for path in (tmp_path / "shards", tmp_path / "one.pt", imported / f"{name}.pt"):
        assert torch.equal(load_reference(path, **arguments)(*inputs), model(*inputs))
    diffusion = open_weights(imported / name).description["diffusion"]
    assert diffusion["time_scale"] == 1.0 and diffusion["objective"] == "rectified_flow"


def test_our_time_scale_is_told_and_comes_back(imported, tmp_path, capsys):
    weights = open_weights(imported / NAMES[0])
    weights.description["diffusion"]["time_scale"] = 1000.0
    write_weights(tmp_path / "ours", weights)
    assert main(["export", str(tmp_path / "ours"), "--to", "reference", "--out", str(tmp_path / "ours.pt")]) == 0
    said = capsys.readouterr().out
    assert "call it with t * 1000" in said
    option = said.split("import it with ")[1].split()
    arguments = flags(torch.load(FIXTURES / f"{NAMES[0]}.pt", weights_only=True)["arguments"])
    assert main(["import", "reference", str(tmp_path / "ours.pt"), *arguments, *option, "--out", str(tmp_path / "back")]) == 0
    assert open_weights(tmp_path / "back").description["diffusion"]["time_scale"] == 1000.0


@pytest.mark.parametrize(
    "changed, word",
    [
        ({"top_k": 9}, "--top-k"),
        ({"top_k": 0}, "--top-k"),
        ({"num_heads": 5}, "--heads"),
        ({"num_heads": -4}, "--heads"),
        ({"input_size": -8}, "--input-size"),
        ({"input_size": 16}, "is for 8"),
        ({"num_classes": 9}, "shape"),
        ({"time_scale": "nan"}, "--time-scale"),
        ({"balance_alpha": -1}, "--balance-alpha=-1.0: a number, at least 0"),
        ({"time_scale": 1000, "objective": "ddpm"}, "--time-scale"),
    ],
)
def test_settings_that_contradict_the_reference_weights(changed, word, imported, tmp_path, capsys):
    arguments = torch.load(FIXTURES / f"{NAMES[0]}.pt", weights_only=True)["arguments"] | changed
    told = flags(arguments, arguments.pop("objective", "rectified_flow"))
    told += ["--time-scale", str(arguments.get("time_scale", 1.0)), "--balance-alpha", str(arguments.get("balance_alpha", 0.005))]
    assert main(["import", "reference", str(imported / f"{NAMES[0]}.pt"), *told, "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1 and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "target, config, word",
    [
        ("reference", DENSE, "sparse"),
        ("reference", replace(SPARSE, shared=0), "shared"),
        ("reference", replace(SPARSE, router=RouterConfig(renormalise=True)), "router.renormalise"),
        ("reference", replace(SPARSE, expert_activation="gelu"), "expert_activation"),
        ("diffusers", replace(SPARSE, router=RouterConfig(capacity_factor=1.0)), "router.capacity_factor"),
        ("diffusers", replace(SPARSE, num_classes=0, text_width=16, kv_heads=2, routing="expert"), "no layout for text to image"),
    ],
)
def test_what_a_target_cannot_represent_is_refused(target, config, word, tmp_path, capsys):
    write_weights(tmp_path / "weights", random_weights(config)[1])
    assert main(["export", str(tmp_path / "weights"), "--to", target, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_commands_say_what_is_wrong(tmp_path, capsys):
    weights = str(write_weights(tmp_path / "weights", random_weights()[1]))
    wide = str(write_weights(tmp_path / "wide", random_weights(latents=dict(shape=[4, 8, 12]))[1]))
    for name, content in (
        ("bare", dict(_class_name="DiTMoETransformer2DModel", hidden=32, depth=2, heads=4)),
        ("list", []),
        ("lacking", dict(format="ditmoe-weights/1")),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    (tmp_path / "mine.pt").touch()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "config.json").write_text("[" * 100_000)
    (tmp_path / "step_1").mkdir()
    (tmp_path / "step_1" / "index.json").write_text(
        json.dumps(dict(format=checkpoint.FORMAT, files={}, shapes={}, ema=dict(kinds=["ema_0.9"])))
    )
    settings = flags(dict(top_k=1, num_heads=1, num_classes=1, input_size=8))
    for arguments, word in (
        (["export", weights, "--out", weights], "already"),
        (["export", weights, "--out", str(tmp_path / "o"), "--shard-size", "5"], "--shard-size"),
        (["export", str(tmp_path), "--out", str(tmp_path / "o")], "it holds bare, deep, lacking, list, mine.pt, step_1, weights, wide"),
        (["import", "diffusers", weights, "--out", str(tmp_path / "o")], "neither"),
        (
            ["import", "reference", str(tmp_path / "no.pt"), *settings, "--out", "o"],
            "no.pt",
        ),
        (["sample", weights, "--steps", "1"], "--vae"),
        (["sample", weights, "--weights", "master"], "ema weights alone"),
        (
            ["sample", str(tmp_path / "step_1"), "--weights", "ema_0.99"],
            "--weights='ema_0.99': choose ema_0.9, ema (the first of these) or master",
        ),
        (["export", wide, "--to", "reference", "--out", str(tmp_path / "o")], "8x12"),
        (["export", weights, "--to", "reference", "--out", str(tmp_path / "mine.pt")], "mine.pt: exists already; choose another name"),
        (["import", "diffusers", str(tmp_path), "--out", str(tmp_path / "o")], f"{tmp_path}/config.json: not readable"),
        (["import", "diffusers", str(tmp_path / "deep"), "--out", str(tmp_path / "o")], "deep/config.json: not readable"),
        (["import", "diffusers", str(tmp_path / "bare"), "--out", str(tmp_path / "o")], "'diffusion' is missing"),
        (["import", "diffusers", str(tmp_path / "list"), "--out", str(tmp_path / "o")], "not a JSON object"),
        (["export", str(tmp_path / "lacking"), "--out", str(tmp_path / "o")], "lacks 'diffusion'"),
        (["info", "DiT-S/2", "--image-size", "8"], "a multiple of 16"),
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert word in error and error.count("\n") == 1


def test_a_weights_folder_is_sampled_from(tmp_path):
    write_weights(tmp_path / "weights", random_weights()[1], "bf16")
    vae = write_vae(tmp_path / "vae")
    command = ["sample", str(tmp_path / "weights"), "--classes", "0,2", "--per-class", "1", "--steps", "1", "--vae", vae]
    assert main([*command, "--out", str(tmp_path / "grid.png")]) == 0
    assert Image.open(tmp_path / "grid.png").size == (32, 66)


GELU = replace(SPARSE, shared=0, expert_activation="gelu", expert_hidden=48, router=RouterConfig(renormalise=True, route_scale=2.0))
PIPELINES = {  # each another part of the shipped code
    "flow": (SPARSE, DiffusionConfig()),
    "flow in 0..1": (replace(SPARSE, qk_norm=True), FLOW_01),
    "ddpm": (SPARSE, DDPM),
    "gelu": (GELU, DDPM),
    "dense": (replace(DENSE, learn_variance=False, frequency_shift=1), DiffusionConfig()),
    "wide": (SPARSE, DiffusionConfig()),
}
LATENTS = {"flow": dict(scaling_factor=0.9, shift_factor=0.1, class_names=["a", "b", "c"]), "wide": dict(shape=[4, 8, 12])}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Exported folders, and what they sampled in a process that knows only torch and diffusers."""
    root = tmp_path_factory.mktemp("pipelines")
    vae = write_vae(root / "vae")
    for name, (config, diffusion) in PIPELINES.items():
        latents = LATENTS.get(name, {}) | (dict(vae=vae) if name == "flow" else {})
        write_weights(root / "weights" / name, random_weights(config, diffusion, latents=latents)[1])
        command = ["export", str(root / "weights" / name), "--to", "diffusers", "--out", str(root / "pipelines" / name)]
        assert main([*command, "--shard-size", "100KB"]) == 0
    folders = json.dumps({name: str(root / "pipelines" / name) for name in PIPELINES})
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= dict(HF_HOME=str(root / "hf"), HF_MODULES_CACHE=str(root / "hf" / "modules"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "diffusers_worker.py", folders, str(root / "out.pt")],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "not expected" not in done.stderr  # diffusers of a config that has more than its class
    return root, torch.load(root / "out.pt", weights_only=True)


@pytest.mark.parametrize("name", PIPELINES)
def test_diffusers_samples_what_we_sample(name, pipelines):
    root, results = pipelines
    run = open_run(root / "weights" / name)
    noise = torch.randn(3, *run.shape, generator=torch.Generator().manual_seed(1))
    for scale in (1.0, 2.5):
        predict = guided(run.model, dict(y=torch.tensor([0, 1, 2, 3, 3, 3])), Guidance(scale), run.diffusion)
        ours = sample(predict, noise, make_scheduler(run.diffusion), run.diffusion, 4)
        theirs = results[f"{name}/{scale}"]
        assert (ours - theirs).norm() <= 1e-5 * ours.norm()
        assert (ours - noise).norm() > 0.1 * noise.norm()
    assert len(list((root / "pipelines" / name / "transformer").glob("*.safetensors"))) > 1


def test_diffusers_decodes_what_we_decode(pipelines):
    root, results = pipelines
    run = open_run(root / "weights" / "flow")
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    ours = run.pipeline([0, 1, 2], num_inference_steps=4, guidance_scale=2.5, latents=noise, output_type="np").images
    assert (torch.from_numpy(ours) - results["image"]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["flow", "gelu", "dense"])
def test_weights_that_come_when_a_module_is_called(name, pipelines):
    """As accelerate brings them, for a model that is larger than its GPU."""

    def lend(module, own):
        def bring(*_):
            module._parameters.update(own)

        def take(*_):
            module._parameters.update({key: torch.nn.Parameter(value.to("meta")) for key, value in own.items()})

        module.register_forward_pre_hook(bring)
        module.register_forward_hook(take)
        take()

    path = pipelines[0] / "pipelines" / name / "transformer"
    spec = importlib.util.spec_from_file_location("exported", path / "transformer_ditmoe.py")
    exported = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(exported)
    model = exported.DiTMoETransformer2DModel.from_pretrained(path)
    x, told = torch.randn(3, 4, 8, 8), (torch.tensor([900.0, 500.0, 20.0]), torch.tensor([0, 1, 2]))
    with torch.no_grad():
        wanted = model(x, *told).sample
        for module in model.modules():
            lend(module, {key: value for key, value in module._parameters.items() if value is not None})
        assert torch.equal(model(x, *told).sample, wanted)


@pytest.mark.parametrize("name", PIPELINES)
def test_our_pipeline_is_read_back(name, pipelines, tmp_path):
    root, _ = pipelines
    assert main(["import", "diffusers", str(root / "pipelines" / name), "--out", str(tmp_path / "back")]) == 0
    before, after = open_weights(root / "weights" / name), open_weights(tmp_path / "back")
    for part in ("model", "diffusion", "step"):
        assert after.description[part] == before.description[part]
    wanted = before.description["latents"]
    assert after.description["latents"] == wanted | ({"vae": str(root / "pipelines" / name / "vae")} if "vae" in wanted else {})
    assert before.shapes == after.shapes
    assert all(torch.equal(before.tensor(key), after.tensor(key)) for key in before.shapes)


def test_an_unknown_step_is_not_told(pipelines, tmp_path, capsys):
    """And a pipeline is not sampled from as it is."""
    pipeline = tmp_path / "pipeline"
    shutil.copytree(pipelines[0] / "pipelines" / "flow", pipeline)
    assert main(["sample", str(pipeline)]) == 2
    assert f"make a weights folder of it by ditmoe import diffusers {pipeline}" in capsys.readouterr().err
    settings = json.loads((pipeline / "transformer" / "config.json").read_text())
    for step, words in ((741, "diffusers weights of step 741 in"), (None, "diffusers weights in")):
        told = {key: value for key, value in settings.items() if key != "_step"} | (dict(_step=step) if step else {})
        (pipeline / "transformer" / "config.json").write_text(json.dumps(told))
        back, out = tmp_path / f"back-{step}", tmp_path / f"out-{step}"
        assert main(["import", "diffusers", str(pipeline), "--out", str(back)]) == 0
        assert main(["export", str(back), "--out", str(out)]) == 0
        assert words in capsys.readouterr().out
    assert main(["sample", str(back), "--per-class", "1", "--steps", "1", "--out", str(tmp_path / "x.png")]) == 0
    assert capsys.readouterr().out.startswith("1 images in ")


def test_a_small_vae_is_called_by_its_name(tmp_path):
    from diffusers import AutoencoderTiny

    AutoencoderTiny().save_pretrained(tmp_path / "vae")
    latents = dict(vae=str(tmp_path / "vae"), scaling_factor=1.0)
    weights = write_weights(tmp_path / "weights", random_weights(replace(SPARSE, num_classes=3), latents=latents)[1])
    assert main(["export", str(weights), "--to", "diffusers", "--out", str(tmp_path / "pipeline")]) == 0
    assert json.loads((tmp_path / "pipeline" / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderTiny"]
    assert diffusers_weights(tmp_path / "pipeline").description["latents"]["scaling_factor"] == 1.0


def test_a_vae_may_be_named_for_an_export(tmp_path, capsys):
    """Also of weights that say nothing of it."""
    vae = write_vae(tmp_path / "vae")
    weights = str(write_weights(tmp_path / "weights", random_weights(replace(SPARSE, num_classes=3))[1]))
    export = ["export", weights, "--to", "diffusers", "--out"]
    assert main([*export, str(tmp_path / "without")]) == 0
    assert "give it by --vae" in capsys.readouterr().out
    for path in Path(vae).iterdir():
        path.chmod(0o600)
    (tmp_path / "secret").write_text("private")
    Path(vae, "notes.txt").symlink_to(tmp_path / "secret")
    before = os.umask(0o027)
    assert main([*export, str(tmp_path / "with"), "--vae", vae]) == 0
    os.umask(before)
    assert sorted(path.name for path in (tmp_path / "with" / "vae").iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert weights_sha256(str(tmp_path / "with" / "vae")) == weights_sha256(vae)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "with").rglob("*") if path.is_file()} == {0o640}
    found = diffusers_weights(tmp_path / "with").description["latents"]
    assert found["vae"] == str(tmp_path / "with" / "vae") and found["scaling_factor"] == latent_space(vae).scaling_factor
    narrow = str(write_weights(tmp_path / "narrow", random_weights(replace(SPARSE, in_channels=3))[1]))
    for arguments, word in (
        ([*export, str(tmp_path / "o"), "--vae", "org/vae"], "--vae='org/vae': no such folder"),
        (["export", narrow, "--to", "diffusers", "--out", str(tmp_path / "o"), "--vae", vae], "the model makes 3"),
        (["export", weights, "--to", "reference", "--out", str(tmp_path / "o"), "--vae", vae], "leave it out"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert word in error and error.count("\n") == 1 and not (tmp_path / "o").exists()


def test_a_vae_that_has_changed_is_not_exported(tmp_path, capsys):
    """Unless it is named: then the user knows."""
    vae = write_vae(tmp_path / "vae")
    told = dict(vae=vae, vae_sha256="0" * 64, scaling_factor=0.9)
    export = ["export", str(write_weights(tmp_path / "weights", random_weights(latents=told)[1])), "--to", "diffusers", "--out"]
    assert main([*export, str(tmp_path / "out")]) == 2
    assert "its weights are not those that the latents were made with" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    assert main([*export, str(tmp_path / "out"), "--vae", vae]) == 0
    assert weights_sha256(str(tmp_path / "out" / "vae")) == weights_sha256(vae)


def test_what_the_references_layout_does_not_hold_is_told(tmp_path, capsys):
    diffusion = DiffusionConfig(time_scale=1.0, time_shift=2.5, condition_dropout=0.0)
    for name, made, says in (
        ("usual", FLOW_01, f"ema weights of step 5 in {tmp_path}/usual.pt\n"),
        ("other", diffusion, "without time_shift=2.5 and condition_dropout=0"),
    ):
        weights = str(write_weights(tmp_path / name, random_weights(diffusion=made)[1]))
        assert main(["export", weights, "--to", "reference", "--out", str(tmp_path / f"{name}.pt")]) == 0
        assert says in capsys.readouterr().out


def test_a_file_that_does_not_fit_on_the_disk(tmp_path):
    """As for a user whose files may not be larger."""
    weights = write_weights(tmp_path / "weights", random_weights()[1])
    script = f"""
import resource, signal, sys
from ditmoe_ds.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(main(["export", {str(weights)!r}, "--to", "reference", "--out", "one.pt"]))
"""
    environment = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "error: one.pt: cannot be written; is the disk full?" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("one.pt*"))


def test_where_nothing_can_be_written_no_checkpoint_is_read(imported, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reference, "_load", lambda path: pytest.fail("it was read"))
    command = ["import", "reference", str(imported / f"{NAMES[0]}.pt"), *flags(dict(top_k=1, num_heads=1, num_classes=1, input_size=8))]
    for options, word in (
        (["--out", str(imported)], "something is there already"),
        (["--out", str(tmp_path / "new"), "--shard-size", "5G"], "--shard-size='5G'"),
    ):
        assert main([*command, *options]) == 2
        assert word in capsys.readouterr().err


def test_a_vae_elsewhere_keeps_its_scaling(tmp_path):
    """As of a VAE on a hub, which no export brings along."""
    known = dict(vae="org/vae", scaling_factor=0.5, shift_factor=0.25, class_names=["a", "b", "c"], shape=[4, 8, 8])
    weights = write_weights(tmp_path / "weights", random_weights(replace(SPARSE, num_classes=3), latents=known)[1])
    assert main(["export", str(weights), "--to", "diffusers", "--out", str(tmp_path / "pipeline")]) == 0
    assert main(["import", "diffusers", str(tmp_path / "pipeline"), "--out", str(tmp_path / "back")]) == 0
    assert open_weights(tmp_path / "back").description["latents"] == {key: value for key, value in known.items() if key != "vae"}


def stock_dit(folder, equal=True, **settings):
    """diffusers' dense DiT with random weights."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    known = dict(num_attention_heads=4, attention_head_dim=8, num_layers=3, out_channels=8, sample_size=8, num_embeds_ada_norm=3)
    model = DiTTransformer2DModel(**known | settings).eval()
    if equal:
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    model.save_pretrained(folder / "transformer", safe_serialization=True)
    return model


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, dict(norm_eps=1e-6), dict(out_channels=None, patch_size=4, sample_size=16)])
def test_the_stock_dit_computes_the_same(settings, tmp_path):
    theirs = stock_dit(tmp_path / "stock", **settings)
    assert main(["import", "diffusers", str(tmp_path / "stock"), "--out", str(tmp_path / "weights")]) == 0
    run = open_run(tmp_path / "weights")
    assert run.diffusion.objective == "ddpm"
    side = run.model.config.input_size
    x, t, y = torch.randn(5, 4, side, side), torch.tensor([0, 1, 37, 500, 999]), torch.tensor([0, 1, 2, 3, 3])
    wanted = theirs(x, timestep=t, class_labels=y).sample
    assert (run.model(x, t.float(), y) - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_stock_dit_that_is_not_ours_is_refused(tmp_path):
    stock_dit(tmp_path / "unequal", equal=False)
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.1\.norm1\.emb.*differs"):
        diffusers_weights(tmp_path / "unequal")
    stock_dit(tmp_path / "other", activation_fn="gelu")
    with pytest.raises(CheckpointError, match="activation_fn='gelu'"):
        diffusers_weights(tmp_path / "other" / "transformer")
    stock_dit(tmp_path / "wide", out_channels=6)
    with pytest.raises(CheckpointError, match="wide/transformer: out_channels=6 is neither in_channels=4 nor twice that"):
        diffusers_weights(tmp_path / "wide")
    stock_dit(tmp_path / "scheduled")
    (tmp_path / "scheduled" / "scheduler").mkdir()
    for settings, says in ((dict(prediction_type="v_prediction"), "prediction_type='v_prediction'"), (dict(beta_end=0.02), None)):
        (tmp_path / "scheduled" / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
        if says:
            with pytest.raises(CheckpointError, match=says):
                diffusers_weights(tmp_path / "scheduled")
        else:
            assert diffusers_weights(tmp_path / "scheduled").shapes


@pytest.mark.parametrize("hidden, depth", [pytest.param(256, 8, id="60M"), pytest.param(768, 6, id="0.4B", marks=pytest.mark.slow)])
def test_an_export_holds_one_tensor(hidden, depth, tmp_path):
    environment = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, ROOT / "tests" / "memory_worker.py", str(tmp_path), str(hidden), str(depth)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    for target, peak in result["peaks"].items():
        assert peak < 1.5 * result["largest"] + 64 * 2**20 < 0.4 * result["total"], (target, result)
