"""Streamed safetensors files and the weights folder."""

import json
import struct
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from models import random_weights
from safetensors.torch import load_file, save_file

from ditmoe_ds.distributed import tensorfile
from ditmoe_ds.distributed.checkpoint import FORMAT, Reader, Saver
from ditmoe_ds.distributed.tensorfile import CHUNK, Entry, TensorFile, write
from ditmoe_ds.distributed.weights import Weights, open_weights, write_weights
from ditmoe_ds.errors import CheckpointError
from ditmoe_ds.interop.diffusers_folder import export_diffusers
from ditmoe_ds.interop.reference import export_reference
from ditmoe_ds.interop.upcycle import upcycle
from ditmoe_ds.pipelines.run import load_model

TENSORS = {
    "odd.bf16": torch.randn(3, 5, dtype=torch.bfloat16),
    "wide": torch.randn(7, dtype=torch.float64),
    "half": torch.randn(2, 2).half(),
    "plain": torch.randn(4, 3, 2),
    "counts": torch.arange(9),
    "flags": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
}


def test_the_library_reads_what_we_write(tmp_path):
    write(tmp_path / "a.safetensors", [Entry(key, value.dtype, value.shape, lambda value=value: value) for key, value in TENSORS.items()])
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == TENSORS.keys()
    assert all(value.dtype == read[key].dtype and torch.equal(value, read[key]) for key, value in TENSORS.items())
    write(tmp_path / "none.safetensors", [])
    assert load_file(tmp_path / "none.safetensors") == {} == TensorFile(tmp_path / "none.safetensors").shapes


def test_we_read_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    assert file.dtypes == {key: value.dtype for key, value in TENSORS.items()}
    for key, value in TENSORS.items():
        assert file.shapes[key] == tuple(value.shape)
        for dtype in (value.dtype, torch.float32):
            flat = value.reshape(-1).to(dtype)
            for start in range(min(3, flat.numel() + 1)):
                out = torch.full((flat.numel() - start,), 7).to(dtype)
                file.read(key, start, out)
                assert torch.equal(out, flat[start:])


def test_conversion_in_more_than_one_piece(tmp_path):
    value = torch.arange(2 * CHUNK + 5) % 256
    write(tmp_path / "a.safetensors", [Entry("x", torch.bfloat16, value.shape, lambda: value)])
    out = torch.empty(2 * CHUNK + 2)
    TensorFile(tmp_path / "a.safetensors").read("x", 3, out)
    assert torch.equal(out, value[3:].float())


def damage(path, how):
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    if how in ("cut", "text", "short"):
        path.write_bytes({"cut": whole[:-1], "text": b"not a tensor file at all", "short": b"abc"}[how])
        return
    if how == "long header":
        path.write_bytes(struct.pack("<Q", 1 << 40) + whole[8:])
        return
    changes = {
        "dtype": dict(dtype="F31"),
        "outside": dict(data_offsets=[10**6, 10**6 + 16]),
        "negative": dict(data_offsets=[-16, 0]),
        "size": dict(shape=[5]),
        "no offsets": dict(data_offsets=None),
        "float": dict(shape=[4.0]),
    }
    header["x"] |= changes[how]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])


@pytest.mark.parametrize("how", ["cut", "text", "short", "long header", "dtype", "outside", "negative", "size", "no offsets", "float"])
def test_a_bad_file_is_refused(tmp_path, how):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(4)}, path)
    damage(path, how)
    with pytest.raises(CheckpointError, match="no safetensors file that can be read"):
        TensorFile(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        TensorFile(tmp_path / "nothing")


def test_a_header_of_any_length_is_not_read(tmp_path, monkeypatch):
    save_file({"x": torch.ones(4)}, tmp_path / "a.safetensors")
    monkeypatch.setattr(tensorfile, "MAX_HEADER", 50)
    with pytest.raises(CheckpointError, match="a header of"):
        TensorFile(tmp_path / "a.safetensors")


def test_a_file_cut_while_open_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(1000)}, path)
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="cut"):
        file.read("x", 0, torch.empty(1000))


@pytest.mark.parametrize("dtype, torch_dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_folder(tmp_path, dtype, torch_dtype):
    parameters, weights = random_weights()
    write_weights(tmp_path / "out", weights, dtype, shard_bytes=100_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    held = {file: [name for name in parameters if index["weight_map"][name] == file] for file in files}
    sizes = [[parameters[name].numel() * torch_dtype.itemsize for name in names] for names in held.values()]
    assert all(sum(each) <= 100_000 or len(each) == 1 for each in sizes)
    assert all(sum(each) + then[0] > 100_000 for each, then in pairwise(sizes)), "a file has what there is room for"
    by_library = {name: value for file in files for name, value in load_file(tmp_path / "out" / file).items()}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in by_library.values())
    opened = open_weights(tmp_path / "out")
    assert list(opened.shapes) == list(parameters) and by_library.keys() == parameters.keys()
    assert opened.description == json.loads(json.dumps(weights.description | dict(dtype=dtype)))
    for name, value in parameters.items():
        assert torch.equal(by_library[name], value.to(torch_dtype))
        assert torch.equal(opened.tensor(name), value.to(torch_dtype).float())
        part = torch.empty(3)
        opened.read(name, 2, part)
        assert torch.equal(part, value.view(-1)[2:5].to(torch_dtype).float())
    assert not list(tmp_path.glob("*.partial"))


def test_a_digest_is_of_names_shapes_and_values():
    def digest(name, shape, first):
        return Weights({name: shape}, lambda name, start, out: out.copy_(torch.arange(first, first + 6)), {}).sha256()

    found = [digest("a", (2, 3), 0.0), digest("b", (2, 3), 0.0), digest("a", (3, 2), 0.0), digest("a", (2, 3), 1.0)]
    assert len(set(found)) == 4 and digest("a", (2, 3), 0.0) == found[0]


def test_what_is_no_weights_is_named(tmp_path):
    _, weights = random_weights()
    full = write_weights(tmp_path / "full", weights)
    with pytest.raises(CheckpointError, match="already"):
        write_weights(full, weights)
    (tmp_path / "stranger").mkdir()
    with pytest.raises(CheckpointError, match="it holds nothing"):
        open_weights(tmp_path / "stranger")
    (tmp_path / "stranger" / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="it holds notes.txt"):
        open_weights(tmp_path / "stranger")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_weights(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="it is a file"):
        open_weights(tmp_path / "stranger" / "notes.txt")
    (tmp_path / "stranger" / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    with pytest.raises(CheckpointError, match="format None"):
        open_weights(tmp_path / "stranger")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "index.json").write_text('{"format": "ditmoe-checkpoint/3"}')
    with pytest.raises(CheckpointError, match="ditmoe-checkpoint/3.*go on with the one that wrote it"):
        open_weights(tmp_path / "old")
    (full / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00001-of-00001"):
        open_weights(full)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda index: [], "holds no mapping"),
        (lambda index: None, "no readable index.json .maximum recursion"),
        (lambda index: index | {"files": {"rank_00000.safetensors": 1}}, "missing or not of its 1 bytes"),
        (lambda index: index | {"pieces": {"w": [[7, 4, 0], [0, 7, 0]]}}, "w has 11 of 12 elements"),
        (lambda index: index | {"pieces": {"w": [[0, 7, 0], [7, 4, 0], [12, 1, 0]]}}, "w has 11 of 12 elements"),
        (lambda index: index | {"pieces": {"w": [[0, 6, 0], [0, 6, 0]]}}, "w has 6 of 12 elements"),
        (lambda index: index | {"pieces": {}}, "index.json is damaged .KeyError: 'w'"),
        (lambda index: index | {"pieces": {"w": [[0, "12", 0]]}}, "index.json is damaged .TypeError"),
        (lambda index: index | {"shapes": {"w": [4, "3"]}}, "index.json is damaged"),
        (lambda index: index | {"cuts": {"w": [0, [1], 10**9]}}, "ValueError: w: 1000000000 parts of 4 rows"),
        (lambda index: index | {"cuts": {"w": [7, [1], 2]}}, "IndexError"),
    ],
)
def test_an_index_that_makes_no_sense_is_one_error(tmp_path, change, words):
    sound = dict(format=FORMAT, files={}, shapes={"w": [4, 3]}, cuts={}, pieces={"w": [[0, 12, 0]]})
    (tmp_path / "index.json").write_text(json.dumps(sound))
    Reader(tmp_path).verify()
    changed = change(sound)
    (tmp_path / "index.json").write_text("[" * 100_000 if changed is None else json.dumps(changed))
    with pytest.raises(CheckpointError, match=words):
        Reader(tmp_path).verify()


def test_a_file_of_another_checkpoint_is_refused(tmp_path):
    """Though it is as long."""
    save_file({"master/w@0": torch.ones(12)}, tmp_path / "rank_00000.safetensors")
    index = dict(format=FORMAT, files={}, shapes={"w": [12]}, cuts={}, pieces={"w": [[0, 5, 0], [5, 7, 0]]})
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors: no master/w@5, which index.json says is there"):
        Reader(tmp_path).read("master", "w", 2, torch.empty(10))


def test_a_checkpoint_that_is_not_what_was_written_gets_no_name(tmp_path):
    unfinished = tmp_path / "step_00000001.partial"
    unfinished.mkdir()
    (unfinished / "rank_00000.safetensors").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="rank_00000.safetensors: 3 bytes, its rank wrote 4"):
        Saver._publish(SimpleNamespace(folder=tmp_path), unfinished, {}, [(4, [])])
    assert list(tmp_path.iterdir()) == [unfinished]


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("config.json", "{", "no readable config.json .Expecting"),
        ("config.json", "[]", "no readable config.json"),
        ("config.json", "[" * 100_000, "no readable config.json .maximum recursion"),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"x": "../x"}}',
            "does not fit the files beside it .'../x' lies outside the folder",
        ),
        ("model.safetensors.index.json", '{"weight_map": {"x": "model-00001-of-00001.safetensors"}}', "beside it .'x'"),
        ("model.safetensors.index.json", "[" * 100_000, "beside it .maximum recursion"),
    ],
)
def test_a_weights_folder_that_makes_no_sense_is_one_error(tmp_path, file, content, words):
    folder = write_weights(tmp_path / "weights", random_weights()[1])
    (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_weights(folder)
    assert str(folder) in str(caught.value)


def test_a_description_of_too_many_layers_is_refused_at_once(tmp_path, monkeypatch):
    _, weights = random_weights()
    weights.description["model"]["depth"] = 10**6
    for user in ("pipelines.run", "interop.upcycle", "interop.reference", "interop.diffusers_folder"):
        monkeypatch.setattr(f"ditmoe_ds.{user}.parameter_shapes", lambda _: pytest.fail("the model was built"))
    export = tmp_path / "new", "fp32", 10**9
    for use in (load_model, lambda w: upcycle(w, 4, 2), lambda w: export_reference(w, *export), lambda w: export_diffusers(w, *export)):
        with pytest.raises(CheckpointError, match="the model has 1000000 layers, the weights [0-9]+ tensors"):
            use(weights)


def test_a_value_too_large_for_fp16_is_refused(tmp_path):
    parameters, weights = random_weights()
    parameters["final.linear.bias"][0] = 1e5
    with pytest.raises(CheckpointError, match="final.linear.bias.*1e\\+05.*bf16"):
        write_weights(tmp_path / "out", weights, "fp16")
    assert not list(tmp_path.iterdir())
    write_weights(tmp_path / "out", weights, "bf16")


def test_a_folder_by_any_name(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    write_weights(tmp_path / "link", random_weights()[1])
    assert (tmp_path / "here" / "config.json").is_file() and (tmp_path / "link").is_symlink()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    write_weights(".", random_weights()[1])
    assert open_weights(tmp_path / "empty").shapes


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"[" * 200_000, "no safetensors file"),
        (b'{"x": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}', "x has dtype F8_E4M3; "),
    ],
)
def test_headers_that_cannot_be_read(tmp_path, header, says):
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(CheckpointError, match=says):
        TensorFile(tmp_path / "x.safetensors")
