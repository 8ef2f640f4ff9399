"""The diffusers pipelines: what diffusers' users do with a pipeline, on models with random weights."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from encoding import write_text_encoder
from latents import write_vae
from models import SPARSE, random_weights
from processes import ROOT

from ditmoe_ds.diffusion.objectives import DiffusionConfig
from ditmoe_ds.diffusion.sampling import SCHEDULERS, Guidance, fitted, guided, make_scheduler, scheduled
from ditmoe_ds.distributed.weights import write_weights
from ditmoe_ds.errors import ConfigError
from ditmoe_ds.interop.diffusers_folder import diffusers_weights
from ditmoe_ds.models.sizes import named_config
from ditmoe_ds.moe.routing import RouterConfig
from ditmoe_ds.pipelines.run import load_model, open_run

FLOW, DDPM = DiffusionConfig(time_shift=1.7), DiffusionConfig("ddpm")
TEXT = named_config("EC-DIT-Nano-4E", input_size=8, text_width=12)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="module")
def runs(folder):
    """Open runs by name, made as they are asked for."""
    write_text_encoder(folder / "encoder", "bert", ("a", "b"))
    latents = dict(vae=write_vae(folder / "vae"), scaling_factor=0.9, shift_factor=0.1)
    latents["text"] = dict(encoder=str(folder / "encoder"), max_tokens=8)
    kinds = dict(flow=(SPARSE, FLOW), ddpm=(SPARSE, DDPM), text=(TEXT, FLOW))

    def opened(kind):
        path = folder / kind
        if not path.exists():
            write_weights(path, random_weights(*kinds[kind], latents=latents)[1])
        return open_run(path)

    return opened


ASKED = dict(flow=[0, 1, 2], ddpm=[2, 1, 0], text=["a b", "", "b a a"])


def test_that_captions_are_cut_is_said_once(runs, capsys):
    pipe = runs("text").pipeline
    for _ in range(3):
        pipe(["a b " * 10], num_inference_steps=1, output_type="latent")
    assert capsys.readouterr().out.count("is cut, and so are others") == 1


def test_saved_and_loaded_in_a_fresh_process(runs, folder):
    classes = {kind: type(runs(kind).pipeline).__name__ for kind in ASKED}
    assert classes == dict(flow="DiTMoEPipeline", ddpm="DiTMoEPipeline", text="ECDiTPipeline")
    script = f"""
import torch
from ditmoe_ds.pipelines import pipeline
for kind, asked in {ASKED!r}.items():
    pipe = getattr(pipeline, {classes!r}[kind]).from_pretrained("saved-" + kind)
    pipe.set_progress_bar_config(disable=True)
    random = [torch.Generator().manual_seed(i) for i in range(3)]
    torch.save(pipe(asked, num_inference_steps=4, generator=random, output_type="pt").images, "out-" + kind)
"""
    for kind in ASKED:
        runs(kind).pipeline.save_pretrained(folder / f"saved-{kind}", max_shard_size="50KB")
        assert len(list((folder / f"saved-{kind}" / "transformer").glob("*.safetensors"))) > 1
    assert not list(folder.rglob("*.bin"))
    told = diffusers_weights(folder / "saved-text").description["latents"]["text"]
    assert (told["encoder"], told["max_tokens"]) == (None, runs("text").pipeline.config.max_tokens)
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "not expected" not in done.stderr  # diffusers, of a config that does not fit its class
    for kind, asked in ASKED.items():
        ours = runs(kind).pipeline(asked, num_inference_steps=4, generator=generators(0, 1, 2), output_type="pt").images
        theirs = torch.load(folder / f"out-{kind}", weights_only=True)
        assert ours.shape == (3, 3, 32, 32) and 0 <= ours.min() < ours.max() <= 1
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
        assert (ours[0] - ours[1]).abs().max() > 0.01


def test_outputs(runs):
    pipe = runs("flow").pipeline
    out = {
        kind: pipe([1, 2], num_inference_steps=2, generator=generators(3, 4), output_type=kind).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert out["latent"].shape == (2, 4, 8, 8) and out["pil"][1].size == (32, 32)
    np.testing.assert_array_equal(out["np"], out["pt"].permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(out["pil"][1]), (out["np"][1] * 255).round().astype("uint8"))
    decoded = pipe.vae.decode(out["latent"] / 0.9 + 0.1).sample
    torch.testing.assert_close(out["pt"], (decoded / 2 + 0.5).clamp(0, 1))
    pipe.vae.register_to_config(shift_factor=0.7)
    torch.testing.assert_close(pipe.decoded(out["latent"], "pt"), out["pt"])
    pipe.register_to_config(shift_factor=0.0)  # of training, which counts, though it is none
    torch.testing.assert_close(pipe.decoded(out["latent"], "pt"), (pipe.vae.decode(out["latent"] / 0.9).sample / 2 + 0.5).clamp(0, 1))
    (tuple_out,) = pipe([1, 2], num_inference_steps=2, generator=generators(3, 4), output_type="latent", return_dict=False)
    assert torch.equal(tuple_out, out["latent"])
    for labels in (np.array([1, 2]), torch.tensor([1, 2])):
        again = pipe(labels, num_inference_steps=2, generator=generators(3, 4), output_type="latent").images
        assert torch.equal(again, out["latent"])
    with pytest.raises(ConfigError, match="as many as images: 2"):
        pipe([1, 2], generator=generators(3))
    for labels in ([3], [0.5], -1, np.int64(3)):
        with pytest.raises(ConfigError, match=r"class_labels=.*0\.\.2"):
            pipe(labels)


@pytest.mark.parametrize("kind", ["flow", "text"])
def test_sizes(runs, kind):
    pipe, asked = runs(kind).pipeline, ASKED[kind][:1]
    settings = dict(num_inference_steps=2, output_type="pt")
    wide = pipe(asked, height=16, width=48, generator=generators(3), **settings).images
    noise = torch.randn(1, 4, 4, 12, generator=generators(3)[0])
    assert wide.shape == (1, 3, 16, 48) and torch.equal(wide, pipe(asked, latents=noise, **settings).images)
    usual = pipe(asked, generator=generators(3), **settings).images
    assert torch.equal(usual, pipe(asked, height=32, width=32, generator=generators(3), **settings).images)
    for wrong in (dict(height=32), dict(height=32, width=36), dict(height=0, width=32), dict(height=32, width=-8)):
        with pytest.raises(ConfigError, match="height, width=.*multiples of 8: a patch of the model is 2 latent pixels of 4 pixels each"):
            pipe(asked, **wrong)
    vae, pipe.vae = pipe.vae, None
    with pytest.raises(ConfigError, match="no VAE"):
        pipe(asked, height=32, width=32, output_type="latent")
    pipe.vae = vae


@pytest.mark.parametrize("kind,sampler", [("flow", "euler"), ("ddpm", "ddpm"), ("text", "unipc")])
def test_an_image_depends_on_its_own_generator(runs, kind, sampler):
    pipe = runs(kind).pipeline
    pipe.scheduler = make_scheduler(pipe.transformer.diffusion, sampler)
    how = dict(num_inference_steps=4, output_type="latent")
    together = pipe(ASKED[kind], generator=generators(5, 6, 7), **how).images
    for i, one in enumerate(ASKED[kind]):
        alone = pipe([one], generator=generators(5 + i), **how).images[0]
        torch.testing.assert_close(alone, together[i], rtol=1e-3, atol=1e-4)
    noise = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators(5, 6, 7)])
    if sampler != "ddpm":  # all randomness is the noise
        torch.testing.assert_close(pipe(ASKED[kind], latents=noise, **how).images, together)
    one = pipe(ASKED[kind], generator=torch.Generator().manual_seed(5), **how).images
    assert not torch.allclose(one[1], together[1])


@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_schedulers_are_swapped_as_diffusers_does_it(runs, kind):
    """With steps enough, all that solve the equation end at one image; the ancestral sampler does not."""
    pipe = runs(kind).pipeline
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    known = SCHEDULERS[pipe.transformer.diffusion.objective]
    ends = {}
    for sampler, name in known.items():
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        ends[sampler] = pipe([1], num_inference_steps=40, guidance_scale=1.5, latents=noise, output_type="latent").images
    first = next(iter(ends.values()))
    moved = (first - noise).norm()
    for sampler, end in ends.items():
        error = (end - first).norm() / moved
        assert error > 0.1 if sampler == "ddpm" else error < 0.05, (sampler, error)


def test_what_training_fixed_is_not_a_schedulers_to_change():
    flow = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True, use_dynamic_shifting=True)
    assert torch.equal(scheduled(flow, FLOW, 4).sigmas, scheduled(make_scheduler(FLOW), FLOW, 4).sigmas)
    ddim = fitted(diffusers.DDIMScheduler(rescale_betas_zero_snr=True), DDPM)
    assert torch.equal(ddim.alphas_cumprod, make_scheduler(DDPM, "ddim").alphas_cumprod)


def test_a_scheduler_of_another_kind_is_refused(runs):
    pipe = runs("flow").pipeline
    for wrong in (diffusers.DDIMScheduler(), diffusers.EulerDiscreteScheduler()):
        pipe.scheduler = wrong
        with pytest.raises(ConfigError, match="rectified_flow: use FlowMatchEuler"):
            pipe([1], num_inference_steps=1)
    with pytest.raises(ConfigError, match="ddim, ddpm"):
        make_scheduler(DDPM, "euler")
    kept = fitted(diffusers.DPMSolverMultistepScheduler(solver_order=3, flow_shift=9.0), FLOW)
    assert (kept.config.solver_order, kept.config.flow_shift, kept.config.prediction_type) == (3, 1.7, "flow_prediction")


def test_callbacks_and_the_progress_bar(runs, capfd):
    pipe = runs("flow").pipeline
    how = dict(num_inference_steps=5, generator=generators(0), output_type="latent")
    seen = []

    def watch(p, step, t, kwargs):
        seen.append((step, float(t), kwargs["latents"].clone()))
        return kwargs

    plain = pipe([1], callback_on_step_end=watch, **how).images
    assert [step for step, *_ in seen] == [0, 1, 2, 3, 4] and seen[0][1] == 1000 and torch.equal(seen[-1][2], plain)

    def stop(p, step, t, kwargs):
        p._interrupt = step == 2
        return {}

    how["generator"] = generators(0)
    assert torch.equal(pipe([1], callback_on_step_end=stop, **how).images, seen[2][2])
    how["generator"] = generators(0)
    zero = pipe([1], callback_on_step_end=lambda p, i, t, k: dict(latents=k["latents"] * (i < 4)), **how).images
    assert zero.abs().max() == 0
    how["generator"] = generators(0)
    assert torch.equal(pipe([1], **how).images, plain)  # the interruption is over
    pipe.scheduler = make_scheduler(FLOW, "heun")
    pipe.set_progress_bar_config(disable=False)
    capfd.readouterr()
    pipe([1], **how)
    assert "9/9" in capfd.readouterr().err


def test_dtypes(runs):
    pipe = runs("text").pipeline
    how = dict(num_inference_steps=2, output_type="np")
    whole = pipe(["a"], generator=generators(0), **how).images
    pipe.to(torch.bfloat16)
    assert {p.dtype for p in pipe.transformer.parameters()} == {pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    half = pipe(["a"], generator=generators(0), **how).images
    assert half.dtype == np.float32 and 0 < np.abs(half - whole).mean() < 0.1
    pipe.to(torch.float32)
    assert np.abs(pipe(["a"], generator=generators(0), **how).images - whole).mean() < 0.1


# guidance


@pytest.mark.parametrize(
    "config",
    [
        SPARSE,
        replace(SPARSE, router=RouterConfig(capacity_factor=0.5)),
        replace(SPARSE, routing="expert"),
        replace(SPARSE, routing="expert", router=RouterConfig(pool="microbatch")),
    ],
    ids=["dropless", "capacity", "image", "microbatch"],
)
def test_the_halves_do_not_compete(config):
    model = load_model(random_weights(config)[1])
    z, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((3,), 500.0)
    y, null = torch.tensor([0, 1, 2]), torch.full((3,), 3)
    with torch.no_grad():
        out = guided(model, dict(y=torch.cat([y, null])), Guidance(2.5), FLOW, apart=config.images_compete)(z, t)
        cond, uncond = model(z, t, y), model(z, t, null)
        joint = model(torch.cat([z, z]), torch.cat([t, t]), torch.cat([y, null]))[:3]
    torch.testing.assert_close(out[:, :4], uncond[:, :4] + 2.5 * (cond - uncond)[:, :4], rtol=1e-4, atol=1e-4)
    assert torch.equal(out[:, 4:], cond[:, 4:]) or torch.allclose(out[:, 4:], cond[:, 4:], atol=1e-5)
    assert config.images_compete == ((joint - cond).abs().max() > 1e-2)


@pytest.mark.parametrize("channels", [None, 2])
def test_guidance_within_an_interval(runs, channels):
    """By hand: Euler steps, of which those with 0.5 <= t <= 0.8 are guided, in all channels or the first two."""
    pipe = runs("flow").pipeline
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    where = dict(guidance_interval=(0.5, 0.8), guided_channels=channels)
    out = pipe([0, 1], num_inference_steps=5, guidance_scale=4.0, **where, latents=z, output_type="latent").images
    times = torch.linspace(1, 0, 6)
    times = 1.7 * times / (1 + 0.7 * times)
    inside = 0
    with torch.no_grad():
        for now, then in pairwise(times):
            scale = 4.0 if 0.5 <= now <= 0.8 else 1.0
            inside += scale == 4.0
            cond, none = (pipe.transformer(z, (now * 1000).expand(2), y=torch.tensor(y))[:, :4] for y in ([0, 1], [3, 3]))
            cond[:, :channels] = (none + scale * (cond - none))[:, :channels]
            z = z + (then - now) * cond
    assert 0 < inside < 5
    torch.testing.assert_close(out, z, rtol=1e-3, atol=1e-4)


def test_autoguidance(runs):
    """Away from itself is nowhere; from a worse model it is w * good + (1 - w) * bad."""
    run = runs("flow")
    how = dict(num_inference_steps=1, output_type="latent", latents=torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    plain = run.pipeline([0, 1], guidance_scale=1.0, **how).images
    torch.testing.assert_close(run.pipeline([0, 1], guidance_scale=3.0, weak_transformer=run.model, **how).images, plain)
    weak = load_model(random_weights(replace(SPARSE, depth=1, hidden=16))[1])
    bad = how["latents"] - weak(how["latents"], torch.full((2,), 1000.0), torch.tensor([0, 1]))[:, :4]
    away = run.pipeline([0, 1], guidance_scale=3.0, weak_transformer=weak, **how).images
    torch.testing.assert_close(away, 3 * plain - 2 * bad, rtol=1e-3, atol=1e-4)
