"""Captions that lie beside the images of a folder, as ditmoe-data encode --text takes them."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from encoding import assert_one_line, contents, png, run_encode, samples, write_tar, write_text_encoder

from data_prep import captions
from data_prep.cli import main
from data_prep.finalize import finalize
from data_prep.sources import is_heldout, open_source
from ditmoe_ds.errors import ConfigError, DataError
from ditmoe_ds.latents import tars
from ditmoe_ds.latents.loader import DataConfig, LatentLoader
from ditmoe_ds.latents.manifest import Manifest
from ditmoe_ds.latents.tars import captions_of, text_names
from ditmoe_ds.latents.text import load_text_encoder, text_width

TEXTS = [f"{'a ' * (i % 4)}red square" for i in range(24)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "bert"
    write_text_encoder(folder, "bert")
    return str(folder)


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def pictures(count: int = 24) -> dict[str, bytes]:
    """A third of them in no sub-folder."""
    return {f"{('', 'b/', 'c/deep/')[i % 3]}{i}.png": png(i) for i in range(count)}


def beside() -> dict[str, str]:
    return {f"{Path(name).with_suffix('.txt')}": f" {text}\r\n" for name, text in zip(pictures(), TEXTS)}


def jsonl(column: str = "text") -> dict[str, str]:
    """Of the folders a file each, and of the sub-folder of one a path."""
    lines: dict[str, list[str]] = {}
    for name, text in zip(pictures(), TEXTS):
        folder, _, rest = ("", "", name) if "/" not in name else name.partition("/")
        lines.setdefault(f"{folder}/metadata.jsonl".lstrip("/"), []).append(json.dumps({"file_name": rest, column: text, "width": 24}))
    return {name: "\n".join(found) + "\n\n" for name, found in lines.items()}


def table() -> dict[str, str]:
    return {"metadata.csv": "\ufefffile_name,text\r\n" + "".join(f'./{name},"{text}"\r\n' for name, text in zip(pictures(), TEXTS))}


def all_samples(out: Path) -> dict[str, object]:
    return {sample.meta["source"]: sample for split in ("train", "val") for sample in samples(out, split)}


def test_an_encoder_brings_no_code_of_its_own(encoder, tmp_path, monkeypatch):
    """transformers would ask whether to run it, and whoever is asked by a program that was started in good faith says yes."""
    theirs = shutil.copytree(encoder, tmp_path / "theirs")
    settings = json.loads((theirs / "config.json").read_text())
    code = {"AutoConfig": "theirs.Config", "AutoModelForTextEncoding": "theirs.Model", "AutoTokenizer": [None, "theirs.Tokenizer"]}
    (theirs / "config.json").write_text(json.dumps(settings | {"model_type": "theirs", "auto_map": code}))
    (theirs / "theirs.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    with pytest.raises(DataError, match="contains custom code"):
        load_text_encoder(str(theirs), 8, "cpu")
    with pytest.raises(DataError, match="contains custom code"):
        text_width(str(theirs), "data.text_encoder")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("layout", [beside, jsonl, table])
def test_captions_of_each_layout(inputs, encoder, tmp_path, layout, capsys):
    root = write(tmp_path / "in", pictures() | layout())
    out = run_encode(inputs, tmp_path / "out", f"folder:{root}", text=encoder, text_max_tokens=8)
    assert capsys.readouterr().err.count("--source") == 0
    found, reference = all_samples(out), load_text_encoder(encoder, 8, "cpu")
    assert {name: sample.meta["caption"] for name, sample in found.items()} == dict(zip(pictures(), TEXTS))
    for sample in found.values():
        torch.testing.assert_close(sample.tensors["text"], reference([sample.meta["caption"]])[0], atol=2e-2, rtol=2e-2)
    manifest = Manifest.load(out)
    assert (manifest.class_names, manifest.rejected) == (("b", "c"), 0)
    assert all(sample.meta["class"] == (name[0] if "/" in name else None) for name, sample in found.items())
    assert main(["verify", str(out), "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert main(["inspect", str(out)]) == 0
    assert "red square" in capsys.readouterr().out


SEVERAL = [["red square", "a red", "square"], ["a"], [], ["a red square", ""]]


@pytest.fixture(scope="module", params=["folder", "tar", "hf"])
def several(request, inputs, encoder, tmp_path_factory):
    """24 pictures, picture i with the captions ``SEVERAL[i % 4]``, from each kind of source."""
    root = tmp_path_factory.mktemp("several")
    told = [SEVERAL[i % 4] for i in range(24)]
    if request.param == "folder":
        lines = [json.dumps({"file_name": f"{i}.png", "captions": captions}) for i, captions in enumerate(told)]
        source = f"folder:{write(root / 'in', {f'{i}.png': png(i) for i in range(24)} | {'metadata.jsonl': chr(10).join(lines)})}"
    elif request.param == "tar":
        rows = [{"__key__": f"{i}", "png": png(i), "json": json.dumps({"caption": captions}).encode()} for i, captions in enumerate(told)]
        write_tar(root / "in.tar", rows)
        source = f"wds:{root / 'in.tar'}"
    else:
        features = datasets.Features({"image": datasets.Image(), "captions": datasets.Sequence(datasets.Value("string"))})
        rows = {"image": [{"bytes": png(i), "path": None} for i in range(24)], "captions": told}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(root / "in")
        source = f"hf:{root / 'in'}"
    return run_encode(inputs, root / "out", source, text=encoder, text_max_tokens=8, batch=5, flip_copies=True)


def stored(captions: list[str]) -> str | list[str] | None:
    return captions if len(captions) > 1 else captions[0] if captions else None


def test_several_captions_are_stored_with_the_tokens_of_each(several, encoder, tmp_path, capsys):
    reference = load_text_encoder(encoder, 8, "cpu")
    found = [sample for split in ("train", "val") for sample in samples(several, split)]
    assert sorted(str(sample.meta["caption"]) for sample in found) == sorted([str(stored(captions)) for captions in SEVERAL] * 12)
    for sample in found:
        captions = captions_of(sample.meta)
        assert sample.tensors.keys() == {"latent", *("text", "text1", "text2")[: len(captions)]}
        for name, caption in zip(text_names(len(captions)), captions):
            torch.testing.assert_close(sample.tensors[name], reference([caption])[0], atol=2e-2, rtol=2e-2)
    assert main(["verify", str(several)]) == 0
    assert main(["inspect", str(several)]) == 0
    assert "red square | a red | square\n" in capsys.readouterr().out
    assert main(["subset", str(several), "--fraction", "0.9", "--out", str(tmp_path / "subset")]) == 0
    copies = {sample.key: sample for split in ("train", "val") for sample in samples(tmp_path / "subset", split)}
    assert len(copies) > 36
    for sample in (sample for sample in found if sample.key in copies):
        assert (copies[sample.key].meta, copies[sample.key].tensors.keys()) == (sample.meta, sample.tensors.keys())


def test_each_visit_takes_one_of_the_captions(several):
    dataset = DataConfig("").open([Manifest.load(several)], "train")
    settings = dict(seed=3, global_batch=len(dataset), accumulation=1, rank=0, world=1)
    loader = LatentLoader(dataset, DataConfig("", workers=0), **settings)
    visits: dict[int, list[str]] = {}
    for _ in range(60):
        batch = next(loader)
        for i, caption, text in zip(batch.samples.tolist(), batch.captions, batch.text.split(batch.lengths)):
            visits.setdefault(i, []).append(caption)
            assert torch.equal(text, dataset[i].texts[dataset[i].captions.index(caption)])
    for i, seen in visits.items():
        captions = dataset[i].captions
        assert len(seen) == 60 and set(seen) == set(captions)
        assert all(abs(seen.count(caption) - 60 / len(captions)) < 4 * (60 / len(captions)) ** 0.5 for caption in captions)
    assert len({tuple(dataset[i].captions.index(c) for c in seen) for i, seen in visits.items() if len(dataset[i].captions) == 3}) > 1
    again = LatentLoader(dataset, DataConfig("", workers=2), **settings, consumed=59 * len(dataset))
    assert next(again).captions == batch.captions
    again.close()
    assert dataset.batch(range(len(dataset))).captions == [dataset[i].captions[0] for i in range(len(dataset))]


def test_captions_too_large_for_a_sample_are_a_reason(inputs, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "SAMPLE_LIMIT", 6000)
    told = {2: ["a"] * 20, 5: ["a" * 6000]}
    lines = [json.dumps({"file_name": f"{i}.png", "text": told.get(i, ["a"] * 2)}) for i in range(9)]
    root = write(tmp_path / "in", {f"{i}.png": png(i) for i in range(9)} | {"metadata.jsonl": "\n".join(lines)})
    settings = dict(text=encoder, text_max_tokens=8, flip_copies=True, max_rejected=0.5)
    out = run_encode(inputs, tmp_path / "out", f"folder:{root}", **settings)
    rejected = {line["source"]: line["reason"] for line in map(json.loads, (out / "rejected.jsonl").read_text().splitlines())}
    assert rejected.keys() == {"2.png", "5.png"} and all(reason.endswith("bytes, more than 6000") for reason in rejected.values())
    assert len(all_samples(out)) == 7 and main(["verify", str(out)]) == 0


def test_a_shard_without_a_sample_is_none(inputs, tmp_path, monkeypatch):
    """Of a split whose every sample is too large."""
    monkeypatch.setattr(tars, "SAMPLE_LIMIT", 6000)
    entries = [{"__key__": f"k{i}", "png": png(i), "txt": b"a" * (6000 if is_heldout(f"k{i}", 0.3) else 1)} for i in range(9)]
    write_tar(tmp_path / "in.tar", entries)
    out = run_encode(inputs, tmp_path / "out", f"wds:{tmp_path / 'in.tar'}", max_rejected=0.9)
    assert 0 < Manifest.load(out).rejected < 9
    assert [path.name for path in out.glob("*.tar")] == ["train-000000.tar"]


def test_workers_and_decoders_write_the_same_and_texts_are_part_of_the_request(inputs, encoder, tmp_path):
    root = write(tmp_path / "in", pictures() | beside())
    settings = dict(text=encoder, text_max_tokens=8, shard_size=5)
    whole = run_encode(inputs, tmp_path / "whole", f"folder:{root}", **settings)
    out = tmp_path / "out"
    run_encode(inputs, out, f"folder:{root}", worker=(1, 2), decoders=1, **settings)
    (root / "0.txt").rename(tmp_path / "0.txt")
    with pytest.raises(DataError, match="another request .source_sha256"):
        run_encode(inputs, out, f"folder:{root}", **settings)
    (tmp_path / "0.txt").rename(root / "0.txt")
    with pytest.raises(DataError, match="units 3 are missing") as caught:
        finalize(str(out))
    assert main([*str(caught.value).partition("; run ditmoe-data ")[2].split(), "--decoders", "0", "--worker", "0/1"]) == 0
    assert contents(out) == contents(whole)


def test_metadata_is_part_of_the_request_and_texts_are_not_opened_before_their_images(tmp_path, monkeypatch):
    root = write(tmp_path / "in", pictures() | table())
    before = open_source(f"folder:{root}", wanted="captions").sha256
    write(root, {"metadata.csv": table()["metadata.csv"].replace("red", "blue", 1)})
    assert open_source(f"folder:{root}", wanted="captions").sha256 != before
    (root / "metadata.csv").unlink()
    write(root, beside())
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read"):
        captions.read(root / "gone.txt", root)
    monkeypatch.setattr(captions, "read", lambda path, root: pytest.fail(f"{path} is read"))
    source = open_source(f"folder:{root}", wanted="captions")
    assert all(item.caption is None and item.caption_file[0].suffix == ".txt" for item in source.items())


def test_without_text_they_are_left_out_and_nothing_changes(inputs, encoded, tmp_path, capsys):
    """Also in a folder whose pictures were encoded before their captions came."""
    shutil.copytree(inputs / "images", tmp_path / "in")
    before = open_source(f"folder:{tmp_path / 'in'}").sha256
    write(tmp_path / "in", {f"{kind}/{i}.txt": b"\xff" for i in range(40) for kind in ["ant", "cat"][i % 2 :][:1]})
    write(tmp_path / "in", {"metadata.jsonl": "{", "cat/metadata.csv": "", "cat/notes.txt": ""})
    capsys.readouterr()
    assert open_source(f"folder:{tmp_path / 'in'}").sha256 == before
    assert "1 files are no images" in capsys.readouterr().err
    out = run_encode(inputs, tmp_path / "out", f"folder:{tmp_path / 'in'}")
    assert {path.name: contents(out)[path.name] for path in out.glob("*.tar")} == {
        path.name: contents(encoded)[path.name] for path in encoded.glob("*.tar")
    }


def test_a_picture_without_a_caption_has_the_empty_one_as_in_a_tar(inputs, encoder, tmp_path, capsys):
    files = beside() | {"3.txt": " \n"}
    del files["b/1.txt"]
    root = write(tmp_path / "in", pictures() | files)
    out = run_encode(inputs, tmp_path / "out", f"folder:{root}", text=encoder, text_max_tokens=8)
    assert "1 of 24 images have no caption; theirs is empty" in capsys.readouterr().err
    found, empty = all_samples(out), Manifest.load(out).empty_text()
    assert (found["b/1.png"].meta["caption"], found["3.png"].meta["caption"]) == (None, "")
    write_tar(tmp_path / "in.tar", [{"__key__": f"k{i}", "png": png(i)} for i in range(9)])
    of_tar = samples(run_encode(inputs, tmp_path / "tar", f"wds:{tmp_path / 'in.tar'}", text=encoder, text_max_tokens=8), "train")[0]
    assert of_tar.meta["caption"] is None
    for sample in (found["b/1.png"], found["3.png"], of_tar):
        torch.testing.assert_close(sample.tensors["text"], empty, atol=2e-2, rtol=2e-2)


def test_a_bad_text_is_a_reason(inputs, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(captions, "LIMIT", 100)
    names = list(pictures())
    bad = {"1.txt": "caf\u00e9".encode("latin-1"), "4.txt": "x" * 101}
    lines = {"file_name": "3.png", "caption": ["one", None]}, {"file_name": "0.png", "text": None, "caption": "red \ud83d"}
    files = {f"b/{name}": content for name, content in bad.items()}
    files |= {name: content for name, content in beside().items() if name not in (*files, "0.txt", "3.txt")}
    root = write(tmp_path / "in", pictures() | files | {"metadata.jsonl": "\n".join(map(json.dumps, lines))})
    settings = dict(text=encoder, text_max_tokens=8)
    with pytest.raises(ConfigError, match="--max-rejected=0.01: 3 of 24 images could not be encoded"):
        run_encode(inputs, tmp_path / "out", f"folder:{root}", **settings)
    out = run_encode(inputs, tmp_path / "out", f"folder:{root}", max_rejected=0.5, **settings)
    rejected = {line["source"]: line["reason"] for line in map(json.loads, (out / "rejected.jsonl").read_text().splitlines())}
    assert rejected == {
        "b/1.png": "1.txt: 'utf-8' codec can't decode byte 0xe9 in position 3: unexpected end of data",
        "b/4.png": "4.txt has more than 100 bytes",
        "3.png": "a caption of type NoneType; a caption is a text, several are a list of texts",
    }
    found = all_samples(out)
    assert found.keys() == set(names) - rejected.keys() and found["0.png"].meta["caption"] == "red \ud83d"


def test_a_text_of_elsewhere_is_not_published(inputs, encoder, tmp_path, capsys):
    """Not what a link in a received folder leads to; links within the folder, linked images and a folder that is itself a link are fine."""
    elsewhere = write(tmp_path / "home", {"secret.txt": "secret", "a/8.png": png(8), "a/8.txt": "secret", "metadata.jsonl": "secret"})
    root = write(tmp_path / "in", pictures(7) | {"texts/shared.txt": "shared", "6.txt": "plain"})
    (tmp_path / "in" / "a").symlink_to(elsewhere / "a")
    for link, target in {"0.txt": "texts/shared.txt", "b/1.txt": root / "texts/shared.txt", "3.txt": "../home/secret.txt"}.items():
        (root / link).symlink_to(target)
    (root / "c/deep/2.txt").symlink_to(elsewhere / "secret.txt")
    (root / "b/4.png").unlink()
    (root / "b/4.png").symlink_to(elsewhere / "a" / "8.png")
    (root / "c/deep/5.txt").mkdir()  # or a pipe, which would be waited for
    (tmp_path / "link").symlink_to(root)
    settings = dict(text=encoder, text_max_tokens=8, max_rejected=0.9)
    out = run_encode(inputs, tmp_path / "out", f"folder:{tmp_path / 'link'}", **settings)
    found = {name: sample.meta["caption"] for name, sample in all_samples(out).items()}
    assert found == {"0.png": "shared", "b/1.png": "shared", "b/4.png": None, "6.png": "plain"}
    rejected = {line["source"]: line["reason"] for line in map(json.loads, (out / "rejected.jsonl").read_text().splitlines())}
    assert rejected.pop("c/deep/5.png") == "5.txt is no regular file"
    assert rejected == {
        f"{name}.png": f"{name[-1]}.txt leads out of the source's folder; copy the text there" for name in ("3", "c/deep/2", "a/8")
    }
    (root / "b/metadata.jsonl").symlink_to(elsewhere / "metadata.jsonl")
    with pytest.raises(DataError, match=f"^--source='folder:{root}': {root}/b/metadata.jsonl leads out of this folder; copy it there$"):
        open_source(f"folder:{root}", wanted="captions")
    (root / "b/metadata.jsonl").unlink()
    write(root, {"texts/of_b": '{"file_name": "4.png", "text": "told"}'})
    (root / "b/metadata.jsonl").symlink_to("../texts/of_b")
    assert "told" in [item.caption for item in open_source(f"folder:{root}", wanted="captions").items()]


@pytest.mark.parametrize(
    "files, words",
    [
        ({}, ["none of 24 images has a caption", "put x.txt beside x.png", "leave --text out"]),
        (beside() | {"b/metadata.jsonl": '{"file_name": "1.png", "text": "a"}'}, ["b/1.png has a caption", "/b/1.txt", "jsonl, line 1"]),
        (table() | jsonl(), ["b/1.png has a caption in", "/b/metadata.jsonl, line 1 and one in", "metadata.csv, line 3"]),
        ({"metadata.csv": "file_name,text\n0.png,a\n0.png,red\n"}, ["0.png has a caption in", "line 2 and one in", "line 3"]),
        ({"metadata.csv": "file_name,text\n0.png,a red, a square\n"}, ["metadata.csv, line 2", "quote what has commas"]),
        ({"metadata.csv": "file_name;text\n0.png;a\n"}, ["metadata.csv, line 2: no file_name"]),
        ({"metadata.csv": f"file_name,text\n0.png,{'a' * 200_000}\n"}, ["metadata.csv, line 2", "field larger than"]),
        ({"metadata.csv": 'file_name,text\n0.png,"a\n'}, ["metadata.csv, line 2: unexpected end"]),
        ({"metadata.jsonl": '{"file_name": "0.png", "text": "a"}\n{"file_name": '}, ["metadata.jsonl, line 2: Expecting value"]),
        ({"metadata.jsonl": '["0.png", "a"]'}, ["metadata.jsonl, line 1: no file_name"]),
        ({"metadata.jsonl": '{"file_name": 7}'}, ["metadata.jsonl, line 1: no file_name"]),
        ({"metadata.jsonl": "[" * 200_000}, ["metadata.jsonl, line 1", "recursion"]),
        ({"metadata.jsonl": " " * 3_000_000}, ["metadata.jsonl, line 1: more than 1048576 characters"]),
        ({"metadata.jsonl": '{"file_name": "0.png", "text": "caf\u00e9"}'.encode("latin-1")}, ["metadata.jsonl: 'utf-8' codec"]),
    ],
)
def test_captions_that_cannot_be_used_are_one_error(inputs, encoder, tmp_path, capsys, files, words):
    root = write(tmp_path / "in", pictures() | files)
    arguments = ["encode", "--source", f"folder:{root}", "--vae", str(inputs / "vae"), "--size", "16", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--text", encoder]) == 2
    assert_one_line(capsys.readouterr().err, *words)
    assert not (tmp_path / "out").exists()


def test_lines_without_their_image_are_counted(tmp_path, capsys):
    names = ["0.png", "gone.png", "../in/0.png", "../../etc/passwd"]
    root = write(tmp_path / "in", pictures() | {"b/metadata.jsonl": "\n".join(json.dumps({"file_name": n, "text": "a"}) for n in names)})
    with pytest.raises(DataError, match="none of 24 images has a caption"):
        open_source(f"folder:{root}", wanted="captions")
    said = capsys.readouterr().err
    assert f"4 lines of metadata name no image that is there, first {root}/b/metadata.jsonl, line 1: '0.png'; left out" in said


def test_a_vae_is_fitted_to_pictures_in_no_sub_folder_too(tmp_path, capsys):
    root = write(tmp_path / "in", {f"{i}.png": png(i) for i in range(40)} | {f"{i}.txt": "a" for i in range(40)})
    arguments = ["fit-vae", "--source", f"folder:{root}", "--out", str(tmp_path / "v"), "--size", "16", "--steps", "1", "--batch", "2"]
    assert main(arguments) == 0
    assert "--source" not in capsys.readouterr().err
    with pytest.raises(DataError, match="put one folder per class there"):
        open_source(f"folder:{root}")
