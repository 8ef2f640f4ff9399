"""ditmoe-data synthesize, with a tiny random Stable Diffusion and a tiny random CLIP."""

import json
import shutil

import pytest
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from encoding import contents, word_tokenizer
from PIL import Image

from data_prep import synthesize
from data_prep.cli import main
from data_prep.sources import open_source

TEXT = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8, max_position_embeddings=12)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("synthesize")
    torch.manual_seed(0)
    tokenizer = word_tokenizer("a", "photo", "of", "fish", "cat")
    StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, eos_token_id=1, pad_token_id=0)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(4,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            norm_num_groups=2,
            cross_attention_dim=8,
            attention_head_dim=2,
        ),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(root / "pipeline")
    vision = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    config = transformers.CLIPConfig(text_config=TEXT | dict(eos_token_id=1, pad_token_id=0), vision_config=vision, projection_dim=4)
    transformers.CLIPModel(config).save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    size = dict(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    transformers.CLIPImageProcessor(**size).save_pretrained(root / "clip")
    (root / "names.txt").write_text("n01\tfish\nn02\tcat\n")
    return root


def arguments(inputs, out, *more):
    made = ["synthesize", "--pipeline", inputs / "pipeline", "--classes", inputs / "names.txt", "--out", out, "--clip", inputs / "clip"]
    return [str(part) for part in [*made, "--per-class", 2, "--keep", 0.5, "--size", 8, "--steps", 2, "--batch", 3, *more]]


def test_the_best_are_kept_and_a_stopped_run_goes_on(inputs, tmp_path, capsys):
    assert main(arguments(inputs, tmp_path / "a")) == 0
    records = {name: [json.loads(line) for line in (tmp_path / "a" / f"{name}.jsonl").read_text().splitlines()] for name in ("n01", "n02")}
    assert all(record["prompt"] == "a photo of a fish" and record["pipeline"] for record in records["n01"])
    source = open_source(f"folder:{tmp_path / 'a'}")
    assert source.class_names == ("n01", "n02")
    assert sorted(item.origin for item in source.items()) == sorted(r["file"] for found in records.values() for r in found)
    assert all(Image.open(item.image).size == (8, 8) for item in source.items())

    everything = [str(part) for part in (tmp_path / "all", "--keep", 1, "--per-class", 4)]
    assert main([*arguments(inputs, everything[0]), *everything[1:]]) == 0
    scores = {r["file"]: r["score"] for line in ("n01", "n02") for r in map(json.loads, (tmp_path / "all" / f"{line}.jsonl").open())}
    assert len(set(scores.values())) == 8, "the scores do not differ"
    for name, found in records.items():
        best = sorted((score for file, score in scores.items() if file.startswith(name)), reverse=True)[:2]
        assert sorted((r["score"] for r in found), reverse=True) == pytest.approx(best)
        for record in found:
            assert (tmp_path / "all" / record["file"]).read_bytes() == (tmp_path / "a" / record["file"]).read_bytes()

    # as two workers, the second of which was killed before its record was written
    assert main(arguments(inputs, tmp_path / "b", "--worker", "0/2")) == 0
    assert main(arguments(inputs, tmp_path / "b", "--worker", "1/2")) == 0
    (tmp_path / "b" / "n02.jsonl").unlink()
    shutil.rmtree(tmp_path / "b" / "n02")
    (tmp_path / "b" / ".n02.partial").mkdir()
    assert main(arguments(inputs, tmp_path / "b")) == 0
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    capsys.readouterr()
    assert main(arguments(inputs, tmp_path / "b")) == 0
    assert "already complete" in capsys.readouterr().out
    assert main([*arguments(inputs, tmp_path / "c"), "--prompt", "a {} in {place}"]) == 0
    record = json.loads(next((tmp_path / "c").glob("*.jsonl")).read_text().splitlines()[0])
    assert record["prompt"].endswith(" in {place}")


def test_a_class_that_was_stopped_is_not_made_anew(inputs, tmp_path, monkeypatch):
    """Two classes of four candidates, in batches of three and one; stopped after the third batch, which then loses an image."""
    made, load = [], synthesize._load_pipeline

    def counting(path, device):
        pipeline = load(path, device)

        def generate(prompts, **options):
            if len(made) == stop:
                raise KeyboardInterrupt
            made.append((prompts[0], len(prompts)))
            return pipeline(prompts, **options)

        return generate

    monkeypatch.setattr(synthesize, "_load_pipeline", counting)
    fish, cat = "a photo of a fish", "a photo of a cat"
    stop = None
    assert main(arguments(inputs, tmp_path / "whole")) == 0
    assert made == [(fish, 3), (fish, 1), (cat, 3), (cat, 1)]
    made.clear()
    stop, out = 3, tmp_path / "out"
    assert main(arguments(inputs, out)) == 130
    partial = out / ".n02.partial"
    assert sorted(path.name for path in partial.iterdir()) == ["000000.png", "000001.png", "000002.png"]
    made.clear()
    stop = 1
    (partial / ".host-1").write_bytes(b"half an image")  # of a process that was killed as it saved
    (partial / "000001.png").unlink()
    assert main(arguments(inputs, out)) == 130
    assert made == [(cat, 3)], "not the whole batch, in which images round as in the first run"
    made.clear()
    stop = None
    assert main(arguments(inputs, out)) == 0
    assert made == [(cat, 1)]
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "changes, words",
    [
        (["--keep", "0"], ["--keep=0.0", "(0, 1]"]),
        (["--prompt", "a photo"], ["--prompt", "{}"]),
        (["--classes", "nowhere"], ["--classes", "nowhere"]),
        (["--classes", "LATIN"], ["--classes", "no readable file"]),
        (["--classes", "/dev/null"], ["--classes='/dev/null'", "is empty; write a class a line"]),
        (["--pipeline", "nowhere/at-all/x"], ["--pipeline", "nowhere/at-all/x"]),
        (["--clip", "nowhere/at-all/x"], ["--clip", "nowhere/at-all/x"]),
    ],
)
def test_mistakes(inputs, tmp_path, capsys, changes, words):
    (tmp_path / "latin").write_bytes("café\n".encode("latin-1"))
    changes = [str(tmp_path / "latin") if word == "LATIN" else word for word in changes]
    assert main([*arguments(inputs, tmp_path / "out"), *changes]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("ditmoe-data: error: ") and all(word in error for word in words)
    assert not (tmp_path / "out" / "request.json").exists()


def test_what_a_pipeline_cannot_make_is_told(inputs, tmp_path, capsys):
    assert main([*arguments(inputs, tmp_path / "out"), "--size", "9"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("ditmoe-data: error: --pipeline=") and "9 pixels" in error
    with pytest.raises(SystemExit):
        main([*arguments(inputs, tmp_path / "out"), "--guidance", "nan"])


def test_more_workers_than_classes(inputs, tmp_path, capsys):
    assert main([*arguments(inputs, tmp_path / "out"), "--worker", "2/3"]) == 0
    assert "nothing to do for worker 2 of 3, of 2 classes" in capsys.readouterr().out


def test_a_class_that_is_no_folder_is_refused(inputs, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("../x\tfish\n")
    assert main([*arguments(inputs, tmp_path / "out"), "--classes", str(tmp_path / "names.txt")]) == 2
    assert "no name for a folder" in capsys.readouterr().err and not (tmp_path / "out").exists()
