"""The shard format against whatever may be in a file: the exact sample comes back, or one error says that it is damaged."""

import functools
import io
import json
import struct
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ditmoe_ds.errors import DataError
from ditmoe_ds.latents.manifest import FORMAT, VERSION, Manifest, Split, Splits, Text
from ditmoe_ds.latents.tars import SAMPLE_LIMIT, ShardReader, ShardWriter, index_path

SHAPE, WIDTH, COUNT = (2, 3, 4), 5, 3
BLOCK = 512


def manifest(dtype: str) -> Manifest:
    nothing = Split(0, ())
    return Manifest(
        root="",
        format=FORMAT,
        version=VERSION,
        source="test",
        vae="none",
        vae_sha256=None,
        scaling_factor=1.0,
        shift_factor=0.0,
        downsample=4,
        dtype=dtype,
        store="mean+std",
        text=Text("none", None, WIDTH, 9, ""),
        mean=(0.0, 0.0),
        std=(1.0, 1.0),
        num_classes=3,
        class_names=("a", "b", "c"),
        class_histogram=(1, 1, 1),
        rejected=0,
        splits=Splits(nothing, nothing),
    )


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def whole(request, tmp_path_factory):
    """A sound shard: (its manifest, tar, index, samples), and a place for damaged copies."""
    folder = tmp_path_factory.mktemp("shard")
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    dtype = getattr(torch, request.param)
    with ShardWriter(folder / "whole.tar") as writer:
        for i in range(COUNT):
            tensors = dict(latent=draw(SHAPE).to(dtype), std=draw(SHAPE).to(dtype), text=draw(i + 1, WIDTH).to(torch.bfloat16))
            caption = None
            if i == 1:
                tensors["text1"], caption = draw(4, WIDTH).to(torch.bfloat16), ["one", "two"]
            writer.write(f"key-{i}", {"label": i, "class": "abc"[i], "caption": caption, "source": "test"}, **tensors)
    reader = ShardReader(folder / "whole.tar", manifest(request.param), SHAPE)
    samples = [reader.read(i) for i in range(COUNT)]
    return reader.manifest, (folder / "whole.tar").read_bytes(), index_path(folder / "whole.tar").read_bytes(), samples, folder / "copy.tar"


def outcome(whole, tar: bytes, index: bytes) -> list:
    """What reading gives, sample by sample: the sample, or None for a DataError. Any other exception is a failure."""
    description, _, _, _, path = whole
    path.write_bytes(tar)
    index_path(path).write_bytes(index)
    try:
        reader = ShardReader(path, description, SHAPE)
    except DataError:
        return []
    found = []
    for i in range(min(len(reader), 2 * COUNT)):
        try:
            found.append(reader.read(i))
        except DataError as error:
            assert path.name in str(error)
            found.append(None)
    return found


def equal(one, other) -> bool:
    if (one.key, one.meta, one.tensors.keys()) != (other.key, other.meta, other.tensors.keys()):
        return False
    return all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def members(tar: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        return opened.getmembers()


fuzz = functools.partial(settings, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


@fuzz()
@given(data=st.data())
def test_a_tar_cut_anywhere(whole, data):
    _, tar, index, samples, _ = whole
    cut = data.draw(st.integers(0, len(tar) - 1))
    for i, found in enumerate(outcome(whole, tar[:cut], index)):
        assert found is None or equal(found, samples[i])


@fuzz()
@given(data=st.data())
def test_an_index_cut_or_changed_anywhere(whole, data):
    _, tar, index, samples, _ = whole
    cut = data.draw(st.integers(0, len(index)))
    changed = bytearray(index[:cut])
    for place in data.draw(st.lists(st.integers(0, max(cut - 1, 0)), max_size=4)) if cut else []:
        changed[place] = data.draw(st.integers(0, 255))
    for found in outcome(whole, tar, bytes(changed)):
        assert found is None or any(equal(found, sample) for sample in samples)


@fuzz(max_examples=150)
@given(data=st.data())
def test_headers_with_flipped_bits(whole, data):
    """A header's checksum covers it, so nothing but the sample or an error can come back."""
    _, tar, index, samples, _ = whole
    headers = [member.offset for member in members(tar)]
    changed = bytearray(tar)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.sampled_from(headers)) + data.draw(st.integers(0, BLOCK - 1))] ^= 1 << data.draw(st.integers(0, 7))
    for i, found in enumerate(outcome(whole, bytes(changed), index)):
        assert found is None or equal(found, samples[i])


@fuzz(max_examples=150)
@given(data=st.data())
def test_contents_with_changed_bytes(whole, data):
    """Values may differ, which the manifest's sha256 finds; what comes back still is a sample as the manifest describes it."""
    description, tar, index, _, _ = whole
    changed = bytearray(tar)
    for _ in range(data.draw(st.integers(1, 6))):
        changed[data.draw(st.integers(0, len(tar) - 1))] = data.draw(st.integers(0, 255))
    for found in outcome(whole, bytes(changed), index):
        if found is not None:
            assert found.tensors["latent"].shape == found.tensors["std"].shape == SHAPE
            assert found.tensors["latent"].dtype == getattr(torch, description.dtype)
            assert found.tensors["text"].shape[1] == WIDTH and isinstance(found.meta, dict)


names = st.one_of(
    st.sampled_from(["../x.json", "/x.json", "key-0/../../x.json", "key-0.latent.npy", "key-0.json", "key-1.json", ".json", "", "key-0."]),
    st.text(max_size=90),
)
sizes = st.one_of(st.sampled_from([-1, -BLOCK, -(1 << 62), 0, 1, 10**6, 1 << 40, (1 << 62) + 1]), st.integers(-(1 << 63), 1 << 63))
kinds = st.sampled_from([*(bytes([i]) for i in b"\x000123456789xgLKSX")])


def forged_header(name: str, size: int, kind: bytes) -> bytes:
    """A header with a right checksum, whatever it says."""
    header = bytearray(BLOCK)
    header[:100] = name.encode(errors="surrogatepass")[:100].ljust(100, b"\0")
    header[124:136] = (
        f"{size:011o}\0".encode() if 0 <= size < 8**11 else b"\xff" * 4 + struct.pack(">q", max(min(size, 2**63 - 1), -(2**63)))
    )
    header[148:156] = b" " * 8
    header[156:157] = kind
    header[257:265] = b"ustar\00000"
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


@fuzz(max_examples=200)
@given(name=names, size=sizes, kind=kinds, member=st.integers(0, 4 * COUNT))
def test_forged_headers(whole, name, size, kind, member):
    _, tar, index, samples, _ = whole
    found = members(tar)[member]
    changed = bytearray(tar)
    changed[found.offset : found.offset + BLOCK] = forged_header(name, size, kind)
    honest = name == found.name and size == found.size and kind in (b"0", b"\0")
    for i, sample in enumerate(outcome(whole, bytes(changed), index)):
        if samples[i].key != found.name.partition(".")[0]:
            assert sample is not None and equal(sample, samples[i])
        elif sample is not None and not honest:
            # A member may be longer or shorter than it was where its content allows that, never of another name or kind.
            assert name.partition(".")[2] == found.name.partition(".")[2]


def test_an_index_that_asks_for_the_world(whole, monkeypatch):
    _, tar, index, _, path = whole
    for starts in ([0, SAMPLE_LIMIT + 1], [0, 2**62], [-5, 10], [4, 4], [7, 3], [[0, 1]], [0.0, 512.0], []):
        stream = io.BytesIO()
        np.save(stream, np.array(starts, dtype=None if starts else np.int64))
        assert not any(outcome(whole, tar, stream.getvalue()))
    monkeypatch.setattr("ditmoe_ds.latents.tars.SAMPLE_LIMIT", 1000)  # no sample is so small
    assert not any(outcome(whole, tar, index))
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, dict(descr="<i8", fortran_order=False, shape=(1 << 60,)))
    assert outcome(whole, tar, huge.getvalue()) == []
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert outcome(whole, tar, pickled.getvalue()) == []
    index_path(path).unlink()
    with pytest.raises(DataError, match="is not there"):
        ShardReader(path, whole[0], SHAPE)


def read_odd(whole, folder, parts):
    """The sample of a shard that has these parts and no others."""
    with webdataset.TarWriter(str(folder / "odd.tar"), encoder=False, mtime=0) as writer:  # else headers that are refused themselves
        writer.write({"__key__": "key-0", **parts})
        end = writer.tarstream.offset
    np.save(index_path(folder / "odd.tar"), np.array([0, end]))
    return ShardReader(folder / "odd.tar", whole[0], SHAPE).read(0)


def sound_parts(tar):
    return {m.name.partition(".")[2]: tar[m.offset_data : m.offset_data + m.size] for m in members(tar)[:4]}


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"label": 1e999}',
        b'{"label": true}',
        b'{"label": ' + b"9" * 5000 + b"}",
        b"\xff\xfe",
        b"",
        b'{"label": 0, "caption": []}',
        b'{"label": 0, "caption": ["a", 2]}',
        b'{"label": 0, "caption": ["a", "b"]}',  # of which only one has a text
    ],
)
def test_jsons_that_are_none(whole, tmp_path, content):
    with pytest.raises(DataError, match="damaged"):
        read_odd(whole, tmp_path, sound_parts(whole[1]) | {"json": content})


def test_members_without_number_are_one_short_line(whole, tmp_path):
    """All ranks are told it."""
    with pytest.raises(DataError, match=r"x, \.\.\. of keys key-0, the manifest says latent") as caught:
        read_odd(whole, tmp_path, {"json": b'{"label": 0}'} | {f"{i}{'x' * 60}": b"" for i in range(1500)})
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "C64", "U64"])
def test_tensors_of_odd_types(whole, tmp_path, dtype):
    header = json.dumps({"text": {"dtype": dtype, "shape": [2, WIDTH], "data_offsets": [0, 10 * 8]}}).encode()
    text = struct.pack("<Q", len(header)) + header + bytes(10 * 8)
    with pytest.raises(DataError, match="damaged"):
        read_odd(whole, tmp_path, sound_parts(whole[1]) | {"text.safetensors": text})


def test_keys_are_short_plain_words(tmp_path):
    latent = torch.zeros(SHAPE)
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.write("x" * 80, {"label": None}, latent=latent, text=latent[0].bfloat16())
    for key in ("x" * 81, "a.b", "a/b", "..", "", "\u00e9", "a\n"):
        with pytest.raises(AssertionError), ShardWriter(tmp_path / "b.tar") as writer:
            writer.write(key, {"label": None}, latent=latent)
    assert not (tmp_path / "b.tar").exists()
