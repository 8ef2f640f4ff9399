"""The Fréchet distance in a run's records."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
import yaml
from latents import write_latents, write_vae
from processes import ROOT, launch, metrics

from ditmoe_ds.evaluation import during_training
from ditmoe_ds.evaluation.extractors import load_extractor
from ditmoe_ds.evaluation.moments import Moments, frechet_distance
from ditmoe_ds.latents.loader import LatentDataset
from ditmoe_ds.latents.manifest import Manifest
from ditmoe_ds.latents.vae import decode
from ditmoe_ds.pipelines.run import open_run
from ditmoe_ds.training import callbacks
from ditmoe_ds.training.callbacks import Progress, Validation
from ditmoe_ds.training.plan import read_plan

SAMPLES = 7


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fd")
    latents = write_latents(folder / "latents", val=SAMPLES, vae=write_vae(folder / "vae"))
    train = dict(steps=2, global_batch=8, precision="fp32", validate_every=0, sample_every=0, tensorboard=False)
    fd = dict(fd_every=2, fd_samples=SAMPLES, sample_steps=3, guidance=1.5, optimizer=dict(lr=0.03, warmup_steps=0))
    path = folder / "recipe.yaml"
    data = dict(manifest=latents, workers=0)
    path.write_text(yaml.safe_dump(dict(model=dict(name="DiT-MoE-Nano/2-4E2A"), data=data, train=train | fd, run_dir=str(folder / "run"))))
    return path


def test_it_is_the_distance_of_the_images_whoever_makes_them(recipe):
    run = recipe.parent / "run"
    launch(1, ["-m", "ditmoe_ds.train", recipe])
    launch(2, ["-m", "ditmoe_ds.train", recipe, f"run_dir={run}-2", "parallel.expert=2", "parallel.zero_stage=3"])
    extractor = load_extractor("efficientnet-lite0")

    def distance(opened):
        made, real = Moments(1280), Moments(1280)
        vae, scaling, heldout = opened.pipeline.vae, opened.latents["scaling_factor"], _heldout(opened.latents["manifest"])
        made.add(extractor.features(opened.sample(heldout.labels.tolist(), steps=3, guidance=1.5))["pool"])
        real.add(extractor.features(decode(vae, heldout.latents, scaling, opened.latents["shift_factor"]))["pool"])
        return frechet_distance(made.gaussian(), real.gaussian())

    expected = distance(open_run(run))
    assert expected > 0 and distance(open_run(run, "master")) != pytest.approx(expected, rel=1e-2), "the raw weights are not EMA's"
    assert metrics(run)[-1]["fd"] == pytest.approx(expected, rel=1e-3)
    assert metrics(recipe.parent / "run-2")[-1]["fd"] == pytest.approx(expected, rel=1e-3)


def test_training_goes_on_in_its_mode_with_its_own_weights(monkeypatch):
    seen = []

    @contextmanager
    def applied(engine):
        seen.append("EMA's")
        yield
        seen.append("its own")

    monkeypatch.setattr(during_training, "read_heldout", lambda *_: [])
    callback = object.__new__(during_training.FrechetDistance)
    callback.real, callback.dataset, callback.samples = None, None, []
    callback._gaussian = lambda trainer, parts: seen.append(parts)
    callback._sampled, callback._real = lambda trainer, shown: "sample", lambda trainer, shown: "held out"
    engine = SimpleNamespace(eval=lambda: seen.append("eval"), train=lambda: seen.append("train"))
    settings = SimpleNamespace(fd_every=1, fd_samples=2, steps=1)
    plan = SimpleNamespace(recipe=SimpleNamespace(train=settings))
    callback(SimpleNamespace(plan=plan, step=1, engine=engine, ema=SimpleNamespace(applied=applied)), {})
    assert seen == ["eval", "EMA's", "sample", "its own", "train", "held out"]


def test_a_rank_decodes_its_own_pictures_and_hands_them_to_rank_0(monkeypatch):
    """The last of 1,024 ranks, say, samples a picture that another has, since sampling is collective; all of those would fill memory."""
    decoded, handed = [], []

    def decode_one(vae, latents, *_):
        decoded.append(latents.item())
        return torch.zeros(1, 8, 8, 3, dtype=torch.uint8)

    monkeypatch.setattr(callbacks, "decode", decode_one)
    monkeypatch.setattr(callbacks, "sample_latents", lambda trainer, items, conditions: torch.tensor(items))
    monkeypatch.setattr(callbacks, "data_group", lambda: None)
    monkeypatch.setattr(callbacks, "tensor_place", lambda: (0, 1))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 4)
    monkeypatch.setattr(torch.distributed, "gather_object", lambda mine, everyone, **_: handed.append((len(mine), everyone)))
    grid = object.__new__(callbacks.SampleGrid)
    grid.conditions, grid.vae = list(range(6)), None
    engine = SimpleNamespace(eval=lambda: None, train=lambda: None)
    settings = SimpleNamespace(sample_every=1, steps=1, sample_images=6)
    plan = SimpleNamespace(recipe=SimpleNamespace(train=settings), manifest=SimpleNamespace(scaling_factor=1, shift_factor=0))
    trainer = SimpleNamespace(plan=plan, step=1, engine=engine, ema=SimpleNamespace(applied=lambda engine: nullcontext()))
    for rank in (1, 3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None, rank=rank: rank)
        grid(trainer, {})
    assert decoded == [1, 5, 3] and handed == [(2, None), (1, None)]


def test_a_rank_without_a_picture_of_its_own_loads_no_vae(monkeypatch):
    loaded = []
    monkeypatch.setattr(callbacks, "load_vae", lambda *_: loaded.append(1))
    settings, manifest = SimpleNamespace(sample_images=6), SimpleNamespace(vae="vae", vae_sha256=None)
    plan = SimpleNamespace(recipe=SimpleNamespace(train=settings), manifest=manifest)
    monkeypatch.setattr(callbacks, "data_group", lambda: None)
    monkeypatch.setattr(callbacks, "tensor_place", lambda: (0, 1))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 1024)
    for rank in (5, 6, 1023):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        callbacks.SampleGrid(plan, list(range(6)), torch.device("cpu"))
    assert len(loaded) == 1


def test_what_was_measured_is_printed_whatever_log_every_is(monkeypatch, capsys):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    trainer = SimpleNamespace(plan=SimpleNamespace(recipe=SimpleNamespace(train=SimpleNamespace(steps=99, log_every=50))))
    progress = Progress(0)
    for trainer.step, measured in ((2, dict(val_loss=0.25)), (3, {}), (4, dict(fd=7.5)), (5, dict(val_loss=0.5, fd=8))):
        progress(trainer, dict(loss=1.0, grad_norm=1.0, images_per_s=1.0, **measured))
    lines = [line.split("  ")[:4] for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["step 2/99", "step 4/99", "step 5/99"]
    assert lines[0][2] == "val_loss 0.2500" and lines[1][2] == "fd 7.5000" and lines[2][2:] == ["val_loss 0.5000", "fd 8.0000"]


def test_a_validation_loss_is_of_samples_from_everywhere(recipe):
    plan = read_plan([str(recipe), "train.validate_samples=3"], 1)
    assert Validation(plan).samples == plan.open_heldout().spread(3)


def _heldout(manifest):
    dataset = LatentDataset([Manifest.load(manifest)], "val")
    return dataset.batch(dataset.spread(SAMPLES))


def test_the_extractor_is_asked_on_its_device(recipe, monkeypatch):
    class Extractor:
        def features(self, images):
            assert images.device.type == "meta"
            return {"pool": torch.zeros(1, 7)}

    monkeypatch.setattr(during_training, "load_extractor", lambda name, device, key: Extractor())
    monkeypatch.setattr(during_training, "load_vae", lambda name, device, sha256: None)
    assert during_training.FrechetDistance(read_plan([str(recipe)], 1), torch.device("meta")).width == 7


def test_a_rank_that_cannot_does_not_stop_the_run(recipe):
    run = recipe.parent / "failing"
    pictures = ["train.sample_every=2", "train.sample_images=3"]
    (_, output), _ = launch(2, [ROOT / "tests" / "fd_worker.py", "1", "decode", recipe, f"run_dir={run}", *pictures])
    for what in ("Fréchet distance", "sample grid"):
        assert f"no {what} of step 2: MemoryError: no memory left" in output
    assert not (run / "samples").exists()
    assert metrics(run)[-1]["step"] == 2
    assert "fd" not in metrics(run)[-1]


def test_a_rank_that_cannot_read_a_held_out_sample_does_not_stop_the_run(recipe):
    run = recipe.parent / "reading"
    settings = [f"run_dir={run}", "train.validate_every=1", "parallel.zero_stage=3"]
    (_, output), _ = launch(2, [ROOT / "tests" / "fd_worker.py", "1", "read", recipe, *settings])
    for what in ("val_loss of step 1", "val_loss of step 2", "Fréchet distance of step 2"):
        assert f"no {what}: val-000003.tar: cannot be read" in output
    assert [record["step"] for record in metrics(run)] == [1, 2]
    assert not metrics(run)[-1].keys() & {"fd", "val_loss", "val_loss_at_t"}


def test_a_rank_that_cannot_validate_is_named(recipe):
    """While the others compute with EMA's weights, which all gather together: it must not try to give them back."""
    settings = [f"run_dir={recipe.parent / 'losing'}", "train.fd_every=0", "train.validate_every=2", "parallel.zero_stage=3"]
    (code, output), (other, _) = launch(2, [ROOT / "tests" / "fd_worker.py", "1", "loss", recipe, *settings], timeout=120, check=False)
    assert (code, other) == (2, 2), output
    assert "failed after step 1: val-000003.tar: cannot be read" in output


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.fd_samples=1", "at least 2; held out are 7"),
        ("train.fd_extractor=resnet", "train.fd_extractor='resnet': choose one of inception"),
        ("train.sample_steps=0", "train.sample_steps=0: from 1"),
    ],
)
def test_what_cannot_be_measured_is_said_before_the_first_step(recipe, override, words):
    run = recipe.parent / override.replace("=", "-")
    [(code, output)] = launch(1, ["-m", "ditmoe_ds.train", recipe, override, f"run_dir={run}"], check=False)
    assert code == 2
    assert words in output
    assert not (run / "metrics.jsonl").exists()
