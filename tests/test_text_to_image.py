"""Text to image as a whole: the shapes benchmark, a run on stored and on online text, prompts, maps of compute."""

import json
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from encoding import write_text_encoder
from latents import write_latents, write_vae
from PIL import Image
from processes import metrics, train
from safetensors.torch import load_file, save_file

from data_prep.shapes import CATEGORIES, COLORS, SHAPES, draw, sample, scenes, side
from data_prep.sources import open_source
from ditmoe_ds.analysis import adaptive
from ditmoe_ds.analysis.adaptive import on_objects, sample_with_takers
from ditmoe_ds.cli import main
from ditmoe_ds.errors import ConfigError
from ditmoe_ds.evaluation.detector import detect, shows
from ditmoe_ds.evaluation.metrics import wilson
from ditmoe_ds.evaluation.shapes import evaluate, prompts
from ditmoe_ds.pipelines.run import Run, open_run
from ditmoe_ds.rng import keyed_generator

# the benchmark


@pytest.fixture(scope="module")
def rendered():
    """Of each category 60 scenes of training and 60 new ones: (scene, what is detected in its picture)."""
    found = []
    for number, category in enumerate(CATEGORIES):
        for unseen in (False, True):
            choices = scenes(category, unseen)
            for i in range(60):
                scene = choices[i % len(choices)]
                found.append((scene, detect(draw(scene, np.random.default_rng([number, unseen, i])))))
    return found


def test_the_detector_is_right_about_every_rendering(rendered):
    assert all(shows(found, scene) for scene, found in rendered)


def test_the_detector_is_not_fooled_by_the_captions_of_others(rendered):
    order = np.random.default_rng(0).permutation(len(rendered))
    right = sum(shows(found, rendered[other][0]) for (_, found), other in zip(rendered, order, strict=True))
    assert right < 0.2 * len(rendered)
    for category in CATEGORIES[3:]:  # also where the captions are of the same kind
        same = [pair for pair in rendered if pair[0].category == category]
        assert sum(shows(found, same[i - 7][0]) for i, (_, found) in enumerate(same)) < 0.2 * len(same)


def test_the_detector_wants_no_more_and_no_less():
    scene = scenes("color attribution", unseen=False)[17]
    picture = draw(scene, np.random.default_rng(0))
    assert {(found.shape, found.color) for found in detect(picture)} == {(thing.shape, thing.color) for thing in scene.things}
    empty = np.full_like(picture, 255)
    assert detect(empty) == [] and not shows([], scene)
    half = picture.copy()
    half[(picture == COLORS[scene.things[1].color]).all(-1)] = 255
    assert not shows(detect(half), scene)
    noise = np.random.default_rng(0).integers(0, 256, picture.shape, dtype=np.uint8)
    assert not shows(detect(noise), scene)
    blob = empty.copy()
    blob[10:20, 10:14] = blob[10:14, 10:20] = COLORS["red"]  # an L
    assert [found.shape for found in detect(blob)] == [None]


def test_new_compositions_never_occur_in_training():
    new = {category: {scene.caption for scene in scenes(category, unseen=True)} for category in CATEGORIES[1:]}
    known = {category: {scene.caption for scene in scenes(category, unseen=False)} for category in CATEGORIES[1:]}
    for category in CATEGORIES[1:]:
        assert new[category] and not new[category] & known[category]
        assert 0.1 < len(new[category]) / len(new[category] | known[category]) < 0.3
    pairs, counts, colors = Counter(), Counter(), Counter()
    for number in range(1200):
        scene, picture = sample(number)
        found = detect(picture)
        assert shows(found, scene) and not scene.held_out
        shapes = sorted(one.shape for one in found)
        pairs[tuple(sorted(set(shapes)))] += 1
        counts[len(shapes), shapes[0]] += len(set(shapes)) == 1
        for one in found:
            colors[one.color, one.shape] += 1
    for scene in scenes("two objects", True):
        assert not pairs[tuple(sorted(thing.shape for thing in scene.things))]
    for scene in scenes("counting", True):
        assert not counts[len(scene.things), scene.things[0].shape]
    for scene in scenes("colors", True):
        assert not colors[scene.things[0].color, scene.things[0].shape]
    assert len(colors) == len(COLORS) * len(SHAPES) - len(scenes("colors", True))
    assert {side((0, 0), (1, 0)), side((0, 0), (0, 1)), side((0, 0), (1, 1))} == {"left of", "above", None}


def test_the_source_is_the_samples():
    source = open_source("sample:shapes", 50)
    assert (source.images, source.units, source.class_names) == (12_000, 240, CATEGORIES)
    items = list(source.unit(3))
    assert [item.key for item in items] == [f"shapes-{i:05d}" for i in range(150, 200)]
    scene, picture = sample(157)
    assert items[7].caption == scene.caption and (items[7].image == picture).all()


def test_guidance_is_a_number(tmp_path, capsys):
    for command in (
        ["shapes", "nowhere", "--out", tmp_path / "x"],
        ["geneval", tmp_path / "x", "--run", "nowhere", "--prompts", "nowhere"],
    ):
        assert main([*map(str, ["eval", *command]), "--guidance", "nan"]) == 2
        assert "--guidance=nan: a number" in capsys.readouterr().err


class Painter(Run):
    """Draws what it is told, but gets every third wrong."""

    def __init__(self):
        self.model, self.step = None, 7

    def sample(self, asked, *, steps, guidance, seed, first):
        scenes_of = {scene.caption: scene for category in CATEGORIES for unseen in (False, True) for scene in scenes(category, unseen)}
        pictures = [draw(scenes_of[caption], np.random.default_rng(first + i)) for i, caption in enumerate(asked)]
        return torch.from_numpy(np.stack([p if (first + i) % 3 else 255 - p * 0 for i, p in enumerate(pictures)]))


@pytest.mark.parametrize("seen", [False, True])
def test_scores(tmp_path, seen):
    report = evaluate(Painter(), tmp_path, images=3, steps=1, guidance=1.0, batch=5, seen=seen)
    assert report == json.loads((tmp_path / "shapes.json").read_text())
    for numbers in report["categories"].values():
        assert numbers["score"] == pytest.approx(2 / 3) and numbers["ci95"][0] < 2 / 3 < numbers["ci95"][1]
    assert report["mean"] == pytest.approx(2 / 3)
    assert sum(numbers["images"] for numbers in report["categories"].values()) == 3 * len(prompts(not seen))
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1 and wilson(5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)


def test_where_nothing_can_be_written_nothing_is_sampled():
    with pytest.raises(ConfigError, match="--out='/dev/null/out': cannot be written: Not a directory"):
        evaluate(None, Path("/dev/null/out"), images=1, steps=1, guidance=1.0)


def test_scoring_needs_scipy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ConfigError, match="eval='shapes': needs package scipy: pip install scipy"):
        evaluate(Painter(), tmp_path, images=1, steps=1, guidance=1.0)


# a run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module")
def recipe(folder):
    """Two processes, ZeRO-3, EP 2, rmsprop, masks; text is encoded as it is needed."""
    write_text_encoder(folder / "encoder", "bert", ("a", "b"))
    latents = write_latents(folder / "latents", train=44, val=7, vae=write_vae(folder / "vae"), shape=(4, 8, 4), text=6)
    tree = dict(
        model=dict(name="EC-DIT-Nano-4E"),
        data=dict(manifest=latents, workers=1, text_encoder=str(folder / "encoder"), text_max_tokens=8),
        parallel=dict(zero_stage=3, expert=2),
        diffusion=dict(time_shift=2.0),
        train=dict(steps=6, global_batch=8, precision="fp32", mask_ratio=0.5, validate_every=3, validate_samples=7, sample_every=6)
        | dict(sample_images=3, sample_steps=2, tensorboard=False, optimizer=dict(name="rmsprop", lr=1e-3, beta2=0.99)),
        ema=dict(decays=[0.9]),
        checkpoint=dict(every=3, keep=9),
        run_dir=str(folder / "online"),
    )
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def online(folder, recipe):
    train(recipe, 2)
    return folder / "online"


def test_a_run_on_captions(online):
    records = metrics(online)
    assert records[-1]["loss"] < records[0]["loss"] and "val_loss" in records[-1]
    assert len(records[0]["router"]["untaken"]) == 2 and records[0]["router"]["cv"] == [0, 0]
    assert records[-1]["balance_loss"] == 0
    assert Image.open(online / "samples" / "step_00000006.png").size == (3 * 16 + 2 * 2, 32)


@pytest.mark.parametrize("stage,expert,world", [(3, 2, 2), pytest.param(1, 1, 1, marks=pytest.mark.slow)])
def test_it_resumes(online, recipe, folder, stage, expert, world):
    """RMSprop's state, masks, captions: exactly in the same shape, within rounding in another."""
    run = folder / f"resumed-{stage}"
    shutil.copytree(online / "checkpoints" / "step_00000003", run / "checkpoints" / "step_00000003")
    (run / "checkpoints" / "latest").write_text("step_00000003")
    shape = [f"parallel.zero_stage={stage}", f"parallel.expert={expert}"]
    train(recipe, world, f"run_dir={run}", "train.sample_every=0", *shape)
    wanted, found = metrics(online)[3:], metrics(run)
    assert [record["step"] for record in found] == [4, 5, 6]
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in found] == pytest.approx([record[key] for record in wanted], rel=0 if stage == 3 else 1e-5), key


def test_another_text_encoder_cannot_go_on(online, recipe, tmp_path):
    """Even one of the same width; the same in another folder can."""
    shutil.copytree(online.parent / "encoder", tmp_path / "moved")
    shutil.copytree(online.parent / "encoder", tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    for folder, code in (("other", 2), ("moved", 0)):
        [(found, output)] = train(recipe, 1, "parallel.expert=1", f"data.text_encoder={tmp_path / folder}", check=False)
        assert found == code, output
        assert (f"data.text_encoder='{tmp_path / 'other'}': text.sha256: " in output) == bool(code)


def test_another_optimizer_cannot_go_on(online, recipe):
    [(code, output), *_] = train(recipe, 1, "parallel.expert=1", "train.optimizer.name=adamw", check=False)
    assert code == 2 and "train.optimizer.name='adamw'" in output and "was trained with rmsprop" in output


def test_a_run_on_stored_text_and_latents_of_two_shapes(recipe, folder):
    run, data = folder / "stored", write_latents(folder / "turned", 66, 14, (4, 8, 4), per_shard=11, text=6, turned=True)
    overrides = [f"run_dir={run}", f"data.manifest={data}", "data.text_encoder=''", "data.log_samples=true", "train.sample_every=0"]
    train(recipe, 2, *overrides)
    records = metrics(run)
    turned = [{int(key.removeprefix("train")) // 11 % 2 for key in record["samples"]} for record in records]
    assert all(len(step) == 1 for step in turned) and len(set.union(*turned)) == 2
    validated = {record["step"]: record["val_loss"] for record in records if "val_loss" in record}
    assert validated.keys() == {3, 6} and all(1.9 < loss < 2.3 for loss in validated.values()), "nothing can be learned from noise"
    opened = open_run(run)
    assert opened.latents["text"] == dict(encoder="none", max_tokens=5, sha256=None) and opened.shape == (4, 8, 4)


def test_sampling_by_prompt(online, tmp_path, capsys):
    out = tmp_path / "grid.png"
    arguments = ["sample", str(online), "--steps", "2", "--per-class", "2", "--out", str(out)]
    assert main([*arguments, "--prompt", "a b", "--prompt", "b"]) == 0
    assert Image.open(out).size == (2 * 16 + 2, 2 * 32 + 2)
    run = open_run(online)
    both = run.sample(["a b", "b"], steps=2, guidance=2.0)
    assert not torch.equal(both[0], both[1])
    torch.testing.assert_close(run.sample(["b"], steps=2, guidance=2.0, first=1)[0].float(), both[1].float(), atol=1, rtol=0)
    capsys.readouterr()
    for options, words in (
        ([], "--prompt=None: this model takes prompts: --prompt, or --prompts FILE"),
        (["--classes", "0"], "--classes='0': this model takes prompts: --prompt"),
        (["--prompts", "nowhere"], "--prompts='nowhere': not a readable text file ([Errno 2] No such file"),
    ):
        assert main([*arguments, *options]) == 2 and words in capsys.readouterr().err
    assert main(["eval", "shapes", str(online), "--out", str(tmp_path)]) == 2
    assert "is for pictures of 64 pixels" in capsys.readouterr().err
    for kind in (["shapes", str(online), "--out", str(tmp_path)], ["geneval", str(tmp_path), "--run", str(online), "--prompts", "none"]):
        assert main(["eval", *kind, "--images", "0"]) == 2
        assert "--images=0: at least 1" in capsys.readouterr().err
    other = open_run(online, text_encoder=str(online.parent / "encoder"))
    other.model.config = replace(other.model.config, text_width=13)
    with pytest.raises(ConfigError, match="tokens are 12 wide, the model was trained with 13"):
        other.sample(["b"], steps=1, guidance=1.0)


def test_maps_of_compute(online, tmp_path, monkeypatch):
    assert main(["analyze", str(online), "--prompt", "a", "--prompt", "a b b", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "adaptive.json").read_text())
    assert report["layers"] == [1, 3] and report["experts_per_token"] == 2.0 and np.shape(report["takers"]) == (2, 2, 4, 2)
    assert np.mean(report["takers"]) == 2.0 and len(report["untaken"]) == 2 and len(report["untaken"][0]) == 25
    assert Image.open(tmp_path / "adaptive_time.png").size == (4 * 16 + 3 * 2, 2 * 32 + 2)
    _, takers = sample_with_takers(open_run(online), ["a", "b"], steps=3, guidance=2.0)
    assert takers.shape == (2, 3, 2, 4, 2) and (takers.sum((3, 4)) == 16).all()
    _, unguided = sample_with_takers(open_run(online), ["a", "b"], steps=3, guidance=1.0)
    assert torch.equal(takers[:, 0], unguided[:, 0]), "of the images that were asked for, not of those of nothing"
    always_told, asked = open_run(online), []
    always_told.diffusion = replace(always_told.diffusion, condition_dropout=0.0)
    seen = lambda *args, guidance, **how: asked.append(guidance) or sample_with_takers(*args, guidance=guidance, **how)  # noqa: E731
    monkeypatch.setattr(adaptive, "sample_with_takers", seen)
    for run in (always_told, open_run(online)):
        adaptive.adaptive(run, ["a", "b"], tmp_path)
    assert asked == [1.0, 3.0]
    assert main(["analyze", str(online), "--out", str(tmp_path)]) == 0
    shares = json.loads((tmp_path / "routing.json").read_text())["share"]
    assert shares.keys() == {"timestep", "position"} and np.allclose(shares["timestep"], 0.25)


def test_experts_on_objects():
    images = torch.full((6, 16, 16, 3), 255, dtype=torch.uint8)
    images[:5, 4:12, 4:12] = 0  # four of 4 x 4 tokens; the last image is empty
    takers = torch.randint(0, 3, (2, 3, 6, 4, 4), generator=keyed_generator("takers"))
    takers[..., 1:3, 1:3] += 2
    found = on_objects(images, takers)
    outside = torch.ones(4, 4, dtype=torch.bool)
    outside[1:3, 1:3] = False
    inner, outer = takers[:, :, :5, 1:3, 1:3].double().mean().item(), takers[:, :, :5, outside].double().mean().item()
    assert (found["images"], found["objects"], found["background"]) == (5, pytest.approx(inner), pytest.approx(outer))
    assert found["ratio"] == pytest.approx(inner / outer) and found["ci95"][0] < found["ratio"] < found["ci95"][1]
    assert len(found["ratio_by_layer"]) == 2 and len(found["ratio_by_step"]) == 3
