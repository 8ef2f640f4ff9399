"""GenEval: the detectors and colours on random weights, the command as a whole."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoding import contents, word_tokenizer, write_text_encoder
from geneval import wants, write_prompts
from latents import write_vae
from models import random_weights
from PIL import Image
from processes import launch
from safetensors.torch import load_file

from ditmoe_ds.cli import main
from ditmoe_ds.distributed.weights import open_weights, write_weights
from ditmoe_ds.errors import ConfigError, DataError
from ditmoe_ds.evaluation.extractors import tensors_sha256
from ditmoe_ds.evaluation.geneval.colors import ColorClassifier, crop
from ditmoe_ds.evaluation.geneval.detectors import Instances, _instance, _plain, open_detector
from ditmoe_ds.evaluation.geneval.folder import read_folder, score
from ditmoe_ds.evaluation.geneval.prompts import COLORS
from ditmoe_ds.evaluation.geneval.scorer import Detected, Limits
from ditmoe_ds.latents.manifest import weights_sha256
from ditmoe_ds.models.dit import DiTConfig
from ditmoe_ds.pipelines.run import open_run

CPU = torch.device("cpu")


# the models

LABELS = dict(enumerate(("tvmonitor", "person", "mouse", "dog", "dining table", "N/A")))
WORDS = ["a", "photo", "of", "object", "colored", "-", *COLORS, "person", "tv", "computer", "mouse", "dog", "dining", "table"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models with random weights, in folders: m2f, yolos, owl, clip."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    labels = dict(id2label=LABELS, label2id={label: number for number, label in LABELS.items()})
    swin = transformers.SwinConfig(
        image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, out_features=[f"stage{i}" for i in (1, 2, 3, 4)]
    )
    sizes = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, dim_feedforward=16)
    layers = dict(encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=10)
    m2f = transformers.Mask2FormerForUniversalSegmentation(
        transformers.Mask2FormerConfig(backbone_config=swin, **sizes, **layers, **labels)
    )
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    yolos = transformers.YolosForObjectDetection(
        transformers.YolosConfig(**small, image_size=[64, 64], patch_size=16, num_detection_tokens=8, **labels)
    )
    text = dict(small, vocab_size=len(WORDS) + 3, max_position_embeddings=24, pad_token_id=0, eos_token_id=1)
    both = dict(text_config=text, vision_config=dict(small, image_size=32, patch_size=8), projection_dim=16)
    owl = transformers.Owlv2ForObjectDetection(transformers.Owlv2Config(**both))
    clip = transformers.CLIPModel(transformers.CLIPConfig(**both))
    words, square = word_tokenizer(*WORDS), dict(height=32, width=32)
    processors = dict(
        m2f=transformers.Mask2FormerImageProcessor(size=dict(height=384, width=384)),  # as the hub's
        yolos=transformers.YolosImageProcessor(size=dict(height=64, width=64)),
        owl=transformers.Owlv2Processor(transformers.Owlv2ImageProcessor(size=square), words),
        clip=transformers.CLIPProcessor(transformers.CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=square), words),
    )
    for name, model in dict(m2f=m2f, yolos=yolos, owl=owl, clip=clip).items():
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)  # as initialised, all detections are alike
        model.save_pretrained(root / name)
        processors[name].save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def image():
    """Of 90 x 60."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((90, 60), Image.Resampling.BICUBIC)


NAMES = ["tv", "person", "computer mouse", "dog", "dining table"]


@pytest.mark.parametrize("name", ["m2f", "yolos", "owl"])
def test_detectors(models, image, name):
    detector = open_detector(str(models / name), CPU)
    detector.check(NAMES)
    everything = detector(image, NAMES, 0.0)
    assert list(everything) == NAMES and any(everything.values())
    scores = sorted(one.score for objects in everything.values() for one in objects)
    threshold = scores[len(scores) // 2]
    fewer = detector(image, NAMES, threshold)
    for label, objects in everything.items():
        strong = [one for one in objects if one.score > threshold]
        assert [one[:2] for one in fewer[label]] == [one[:2] for one in strong]
        for one in objects:
            left, top, right, bottom = one.box
            assert 0 <= left <= right <= 90 and 0 <= top <= bottom <= 60 and 0 < one.score < 1
            assert (one.mask is None) == (name != "m2f")
    alone = detector(image, NAMES[3:4], 0.0)  # whatever else is asked
    assert [one[:2] for one in alone[NAMES[3]]] == [one[:2] for one in everything[NAMES[3]]]


def test_masks_are_those_of_transformers(models):
    """Its post-processing makes them of 384 x 384, so only nearly."""
    detector = open_detector(str(models / "m2f"), CPU)
    assert isinstance(detector, Instances) and detector.difference == "a Mask2Former other than that of Swin-S"
    detector.model.config.backbone_config.embed_dim, detector.model.config.backbone_config.depths = 96, [2, 2, 18, 2]
    assert Instances(detector.model, detector.processor).difference == ""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (25, 25, 3), dtype=np.uint8)).resize(
        (800, 800), Image.Resampling.BICUBIC
    )
    found = detector(image, ["tv", "dog"], 0.0)
    inputs = detector.processor(image, size=dict(height=800, width=800), return_tensors="pt")
    with torch.no_grad():
        outputs = detector.model(**inputs)
    [wanted] = detector.processor.post_process_instance_segmentation(outputs, 0.0, target_sizes=[(800, 800)], return_binary_maps=True)
    compared = 0
    for info, mask in zip(wanted["segments_info"], wanted["segmentation"]):
        if LABELS[info["label_id"]] not in ("tvmonitor", "dog"):
            continue
        objects = found[NAMES[info["label_id"]]]
        one = min(objects, key=lambda one: abs(one.score - info["score"]))
        assert one.score == pytest.approx(info["score"], rel=0.02)
        assert (one.mask & mask.bool().numpy()).sum() > 0.9 * (one.mask | mask.bool().numpy()).sum()
        columns, rows = (np.flatnonzero(one.mask.any(axis)) for axis in (0, 1))
        assert one.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        compared += 1
    assert compared >= 3


def test_an_instance():
    logits = torch.full((6, 8), -1.0)
    logits[2:4, 3:7] = 2.0
    logits[2, 3] = 0.5
    found = _instance(torch.tensor(0.8), logits)
    assert found.box == (3, 2, 7, 4) and found.mask.sum() == 8
    assert found.score == pytest.approx(0.8 * (7 / (1 + math.exp(-2)) + 1 / (1 + math.exp(-0.5))) / 8)
    assert _instance(torch.tensor(0.8), torch.full((6, 8), -1.0)) is None


def test_boxes_are_the_models(models, image):
    detector = open_detector(str(models / "yolos"), CPU)
    with torch.no_grad():
        outputs = detector.model(**detector.processor(image, return_tensors="pt"))
    shares = outputs.logits[0].softmax(-1)[:, :-1]
    wanted = {number: [] for number in LABELS}
    for share, (x, y, w, h) in zip(shares, outputs.pred_boxes[0].tolist()):
        corners = ((x - w / 2) * 90, (y - h / 2) * 60, (x + w / 2) * 90, (y + h / 2) * 60)
        wanted[int(share.argmax())].append((*(min(max(0, c), m) for c, m in zip(corners, (90, 60) * 2)), float(share.max())))
    found = detector(image, NAMES, 0.0)
    for label, number in zip(NAMES, LABELS):
        assert [(*one.box, one.score) for one in found[label]] == [pytest.approx(box, abs=1e-3) for box in wanted[number]]


def test_an_open_vocabulary_is_asked_one_class_at_a_time(models, image):
    detector = open_detector(str(models / "owl"), CPU)
    detector.check(["whatever"])
    inputs = detector.processor(images=image, text=[["a tv"]], return_tensors="pt")
    with torch.no_grad():
        logits = detector.model(**inputs).logits
    assert [one.score for one in detector(image, ["tv"], 0.0)["tv"]] == pytest.approx(logits.sigmoid().flatten().tolist(), abs=1e-6)


def test_names_of_classes():
    """Of the prompts, of COCO, and of checkpoints that were converted from Darknet's names."""
    same = ["computer mouse/mouse", "tv remote/remote", "computer keyboard/keyboard", "motorcycle/motorbike", "airplane/aeroplane"]
    same += ["couch/sofa", "tv/tvmonitor", "potted plant/pottedplant", "dining table/diningtable", "hair drier/hair dryer", "Cup/cup"]
    names = [{_plain(name) for name in pair.split("/")} for pair in same]
    assert all(len(pair) == 1 for pair in names) and len(set.union(*names)) == len(same)


def test_detectors_that_cannot_serve(models, tmp_path):
    with pytest.raises(ConfigError, match="does not know cat, zebra; use one that was trained on COCO"):
        open_detector(str(models / "m2f"), CPU).check(["dog", "cat", "zebra"])
    with pytest.raises(ConfigError, match="a clip detects no objects"):
        open_detector(str(models / "clip"), CPU)
    with pytest.raises(DataError, match="--detector=.*neither a folder nor a hub id"):
        open_detector(str(tmp_path), CPU)
    with pytest.raises(DataError, match="--clip=.*neither a folder nor a hub id"):
        ColorClassifier(str(tmp_path), CPU)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_no_pickled_code_is_run(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, more in dict(good={}, bad=dict(more=Bomb())).items():
        shutil.copytree(models / "yolos", name)
        torch.save(load_file(Path(name, "model.safetensors")) | more, Path(name, "pytorch_model.bin"))
        Path(name, "model.safetensors").unlink()
    assert open_detector("good", CPU).numbers["dog"] == 3
    with pytest.raises(DataError, match="--detector='bad'"):
        open_detector("bad", CPU)
    assert not Path("exploded").exists()
    torch.load("bad/pytorch_model.bin", weights_only=False)
    assert Path("exploded").exists()


def test_crops(image):
    mask = np.zeros((60, 90), bool)
    mask[10:20, 30:50] = True
    mask[12, 33] = False
    pixels, cut = np.array(image), np.array(crop(image, Detected((29.6, 9.5, 50.4, 21), 0.9, mask)))
    assert cut.shape == (11, 20, 3)
    inside = mask[10:21, 30:50]
    assert (cut[inside] == pixels[10:21, 30:50][inside]).all() and (cut[~inside] == 0x99).all() and (~inside).sum() == 21
    assert (np.array(crop(image, Detected((30, 10, 50, 21), 0.9))) == pixels[10:21, 30:50]).all()
    assert crop(image, Detected((5, 5, 5.2, 5.2), 0.9)).size == (1, 1)


def test_colors_are_those_of_clip(models, image):
    classifier = ColorClassifier(str(models / "clip"), CPU)
    objects = [Detected((x, y, x + 20, y + 25), 0.9) for x in range(0, 70, 10) for y in range(0, 35, 10)]
    found = classifier(image, "computer mouse", objects)
    model, processor = classifier.model, classifier.processor
    pieces = processor(images=[image.crop(one.box) for one in objects], return_tensors="pt")
    directions = []
    with torch.no_grad():
        for color in COLORS:
            texts = [f"a photo of a {color} computer mouse", f"a photo of a {color}-colored computer mouse", f"a photo of a {color} object"]
            outputs = model(**processor(text=texts, padding=True, return_tensors="pt"), **pieces)
            mean = outputs.text_embeds.mean(0)  # of directions
            directions.append(mean / mean.norm())
    torch.testing.assert_close(classifier._colors_of("computer mouse"), torch.stack(directions))
    wanted = [COLORS[int(number)] for number in (outputs.image_embeds @ torch.stack(directions).T).argmax(1)]
    assert found == wanted and len(set(found)) > 1
    assert classifier(image, "computer mouse", objects[3:4]) == found[3:4]


# the command

ASKED = [
    wants("single_object", ("dog", 1), prompt="a photo of a dog"),
    wants("counting", ("tv", 2), exclude=[("tv", 3)], prompt="a photo of a tv"),
    wants("color_attr", ("dog", 1, "red"), ("person", 1, "blue"), prompt="a photo of a red dog"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, models):
    """A weights folder of a text-to-image model with random weights."""
    root = tmp_path_factory.mktemp("run")
    write_text_encoder(root / "encoder", "bert", WORDS)
    config = DiTConfig(hidden=32, depth=2, heads=4, input_size=8, num_classes=0, text_width=12, experts=4, routing="expert")
    text = dict(encoder=str(root / "encoder"), max_tokens=12)
    latents = dict(vae=write_vae(root / "vae"), scaling_factor=0.9, shape=[4, 8, 8], text=text)
    write_weights(root / "weights", random_weights(config, latents=latents)[1])
    write_prompts(root / "prompts.jsonl", *ASKED)
    return root


def command(run, out, *more):
    prompts = ["--run", str(run / "weights"), "--prompts", str(run / "prompts.jsonl")]
    return ["eval", "geneval", str(out), *prompts, "--images", "2", "--steps", "2", *map(str, more)]


@pytest.fixture(scope="module")
def made(run):
    assert main(command(run, run / "out")) == 0
    return run / "out"


def test_pictures_are_made_in_the_layout(run, made):
    assert sorted(path.relative_to(made).as_posix() for path in made.rglob("*.*")) == [
        *(f"0000{i}/{name}" for i in range(3) for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")),
        "samples.json",
    ]
    assert [json.loads((made / f"0000{i}" / "metadata.jsonl").read_text()) for i in range(3)] == ASKED
    pictures = {path.read_bytes() for path in made.rglob("*.png")}
    assert len(pictures) == 6  # each has noise of its own
    sampled = open_run(run / "weights").sample(["a photo of a red dog"] * 2, steps=2, guidance=5.0, first=2 * 2)
    for i, picture in enumerate(sampled.numpy()):
        assert (np.array(Image.open(made / "00002" / "samples" / f"000{i}.png")) == picture).all()


def test_a_restart_makes_what_is_missing(run, made, capsys):
    before = contents(made)
    times = {path: path.stat().st_mtime_ns for path in made.rglob("*.png")}
    (made / "00001" / "samples" / "0001.png").unlink()
    assert main(command(run, made)) == 0
    said, progress = capsys.readouterr()
    assert f"6 pictures in {made}; to score them: ditmoe eval geneval {made} --detector " in said and "sample: 100% 1/1 " in progress
    assert contents(made) == before
    again = {path.parents[1].name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert again == {"00001"}


@pytest.mark.slow
def test_the_pictures_of_two_processes_are_those_of_one(run, made, models, capsys):
    tools = ["--detector", str(models / "yolos"), "--clip", str(models / "clip"), "--threshold", "0.1"]
    launch(2, ["-m", "ditmoe_ds.cli", *command(run, run / "two", *tools)])
    found = contents(run / "two")
    assert contents(made).items() <= found.items() and found.keys() - contents(made).keys() == {"geneval.json", "geneval.jsonl"}
    capsys.readouterr()
    scored = (run / "two" / "geneval.jsonl").read_bytes()
    assert main(["eval", "geneval", str(run / "two"), *tools]) == 0
    assert (run / "two" / "geneval.jsonl").read_bytes() == scored
    table = capsys.readouterr().out
    assert "single_object" in table and "not the published protocol: not 4 pictures of each prompt" in table


def test_scores_of_a_folder(run, made, models, capsys):
    import transformers

    limits = ["--threshold", "0", "--counting-threshold", "0.99", "--max-overlap", "0.5"]
    assert main(["eval", "geneval", str(made), "--detector", str(models / "m2f"), "--clip", str(models / "clip"), *limits]) == 0
    found = json.loads((made / "geneval.json").read_text())
    assert found["limits"] == dict(threshold=0, counting=0.99, overlap=0.5) and found["made"]["steps"] == 2
    assert found["tasks"]["single_object"]["score"] == 1 and found["tasks"]["counting"]["score"] == 0
    lines = [json.loads(line) for line in (made / "geneval.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in lines[2:4]] == ["expected tv>=2, found 0"] * 2
    said, progress = capsys.readouterr()
    assert "score: 100% 3/3 " in progress
    for difference in (
        "threshold 0.0, counting 0.99, overlap 0.5",
        "a Mask2Former other than that of Swin-S",
        "a CLIP other than ViT-L/14",
    ):
        assert f"not the published protocol: {difference}" in said
    clip = transformers.CLIPModel.from_pretrained(models / "clip")
    assert found["clip_sha256"] == tensors_sha256(clip) != found["detector_sha256"]
    for name in ("geneval.json", "geneval.jsonl"):
        (made / name).unlink()


def test_a_detector_is_asked_for_all_that_may_count(made):
    """Also where counting wants less than the other tasks."""
    asked = set()
    score(made, read_folder(made), lambda image, names, threshold: asked.add(threshold) or {}, list, Limits(0.5, counting=0.2))
    assert asked == {0.2}


def test_large_models_are_made_smaller(run, tmp_path):
    assert main(command(run, tmp_path / "out", "--dtype", "bf16", "--offload-experts")) == 0
    made = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert made["dtype"] == "bf16" and len([*tmp_path.rglob("*.png")]) == 6
    assert made["latents"]["text_sha256"] == weights_sha256(str(run / "encoder"))


def test_another_text_encoder_is_refused(run, tmp_path, capsys):
    """In place of the one whose weights are known."""
    weights = open_weights(run / "weights")
    text = weights.description["latents"]["text"]
    for known in ("0" * 64, weights_sha256(str(run / "encoder"))):
        latents = weights.description["latents"] | dict(text=text | dict(sha256=known))
        write_weights(tmp_path / known, replace(weights, description=weights.description | dict(latents=latents)))
    asked = ["--prompt", "a photo of a dog", "--per-class", "1", "--steps", "1", "--out", str(tmp_path / "x.png")]
    assert main(["sample", str(tmp_path / known), *asked]) == 0
    assert main(["sample", str(tmp_path / ("0" * 64)), *asked]) == 2
    assert "its weights are not those that the captions were encoded with" in capsys.readouterr().err
    assert main(["sample", str(tmp_path / ("0" * 64)), *asked, "--text-encoder", str(run / "encoder")]) == 0


def test_every_line_is_a_prompt(run, tmp_path, capsys):
    (tmp_path / "prompts").write_text("a dog\n\na tv\n")
    assert main(["sample", str(run / "weights"), "--prompts", str(tmp_path / "prompts"), "--out", str(tmp_path / "x.png")]) == 2
    assert "line 2 is empty" in capsys.readouterr().err


def test_mistakes(run, made, models, tmp_path, capsys, monkeypatch):
    def refused(*arguments):
        assert main([*map(str, arguments)]) == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    assert "--run=None: name a run" in refused("eval", "geneval", made)
    assert "--prompts=None" in refused("eval", "geneval", made, "--run", run / "weights")
    assert "begun with steps 2, not 3; repeat its settings or choose another" in refused(*command(run, made, "--steps", 3))
    assert "begun with seed 0, not 1" in refused(*command(run, made, "--seed", 1))
    for option in ("--threshold", "--counting-threshold", "--max-overlap"):
        assert f"{option}=nan: a number from 0 to 1" in refused(*command(run, made, option, "nan"))
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.tex").write_text("")
    assert "is there, but no samples.json" in refused(*command(run, tmp_path / "else"))
    write_prompts(tmp_path / "cats.jsonl", wants("single_object", ("cat", 1)))
    cats = ["--prompts", tmp_path / "cats.jsonl", "--detector", models / "yolos", "--clip", models / "clip"]
    assert "does not know cat" in refused(*command(run, tmp_path / "new", *cats)) and not (tmp_path / "new").exists()
    assert "--clip=" in refused(*command(run, tmp_path / "new", "--detector", models / "yolos", "--clip", tmp_path))
    assert not (tmp_path / "new").exists()
    write_weights(tmp_path / "classes", random_weights()[1])
    assert "takes classes" in refused(*command(run, tmp_path / "new", "--run", tmp_path / "classes"))
    assert Path(made / "samples.json").is_file()
    monkeypatch.setattr(os, "access", lambda path, mode: path != made)  # as on a file system that is mounted read-only
    assert "copy the pictures" in refused("eval", "geneval", made, "--detector", models / "yolos", "--clip", models / "clip")
