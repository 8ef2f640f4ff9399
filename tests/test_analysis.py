"""Expert specialisation: counts, information, relations of experts, and the report in a browser."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, browser
from latents import write_latents
from matplotlib.axes import Axes
from models import DENSE, SPARSE, random_weights
from torch import nn

from ditmoe_ds.analysis import summary as summary_of
from ditmoe_ds.analysis.analyze import analyze
from ditmoe_ds.analysis.experts import answers_alike, experts_of, lift, weights_alike
from ditmoe_ds.analysis.information import Information, entropy, information, informations, mutual_information
from ditmoe_ds.analysis.plots import plot_shares
from ditmoe_ds.analysis.routing import Takings, count_takings, noised, watched
from ditmoe_ds.analysis.sections import dependence, pairs
from ditmoe_ds.analysis.summary import read_metrics, spread, training
from ditmoe_ds.cli import main
from ditmoe_ds.diffusion.objectives import DiffusionConfig
from ditmoe_ds.distributed.weights import write_weights
from ditmoe_ds.errors import ConfigError, DataError
from ditmoe_ds.latents.loader import LatentDataset
from ditmoe_ds.latents.manifest import Manifest, Split, sha256
from ditmoe_ds.latents.tars import ShardWriter
from ditmoe_ds.moe.layer import Router
from ditmoe_ds.moe.routing import RouterConfig
from ditmoe_ds.pipelines.run import Run, load_model
from ditmoe_ds.training.step import router_metrics

CLASSES, TIMES, PERMUTATIONS = 3, 4, 99
TOKEN = replace(SPARSE, learn_variance=False)
EXPERT = replace(TOKEN, routing="expert", sparse_first=1, shared=0)
LOSSY = replace(TOKEN, router=RouterConfig(capacity_factor=0.7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("analysis")


@pytest.fixture(scope="module")
def latents(folder):
    path = write_latents(folder / "latents", train=8, val=30, shape=(4, 8, 8), classes=CLASSES)
    replace(Manifest.load(path), class_names=("a", "<b>", "c")).save()
    return path


def opened(network, **latents):
    weights = random_weights(network)[1]
    return Run(load_model(weights), DiffusionConfig(), 5, latents, weights)


def batch(latents, count=30):
    data = LatentDataset([Manifest.load(latents)], "val")
    return data.batch(range(count))


@pytest.mark.parametrize("network", [TOKEN, EXPERT, LOSSY], ids=["token", "expert", "capacity"])
def test_counts_are_those_of_a_loop(network, latents):
    run, samples = opened(network), batch(latents, 5)
    layers, positions, experts = len(network.sparse_layers), 16, 4
    by_time = torch.zeros(5, TIMES, layers, experts)
    by_position = torch.zeros(5, positions, layers, experts)
    takers, together = torch.zeros(TIMES, layers, experts + 1), torch.zeros(layers, experts, experts)
    seen = []
    for module in run.model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    counted = count_takings(run, samples, TIMES)
    takings, at = iter(seen), lambda time, image: (time + image * network.images_compete) % TIMES  # those that compete have different times
    for time in range(TIMES):  # all samples fit into one forward
        for layer in range(layers):
            assignment, who = next(takings), {}
            expert_of = [e for e, count in enumerate(assignment.counts.tolist()) for _ in range(count)]
            for token, expert, weight in zip(assignment.tokens.tolist(), expert_of, assignment.weights.tolist(), strict=True):
                if weight == 0:
                    continue  # a place that nobody took
                image, position = divmod(token, positions)
                by_time[image, at(time, image), layer, expert] += 1
                by_position[image, position, layer, expert] += 1
                who.setdefault(token, set()).add(expert)
            for token in range(5 * positions):
                group = who.get(token, set())
                takers[at(time, token // positions), layer, len(group)] += 1
                for one in group:
                    for other in group:
                        together[layer, one, other] += 1
    for ours, theirs in ((counted.by_time, by_time), (counted.by_position, by_position), (counted.takers, takers)):
        assert torch.equal(ours.float(), theirs)
    assert torch.equal(counted.together.float(), together) and by_time.sum() > 0


def test_a_long_run_is_thinned(tmp_path, monkeypatch):
    monkeypatch.setattr(summary_of, "RECORDS", 50)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(2, 250)))
    steps = [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    validated = [record["step"] for record in records(2, 250) if "val_loss" in record]
    assert len(steps) < 60 and {*validated, 1} <= {*steps} and steps == sorted(steps)


def test_few_samples_of_a_class_hide_what_it_says():
    """Each of 50 classes has an expert that it prefers. Of one sample each permuted labels still tell images apart."""
    found = {}
    for each in (1, 20):
        labels = torch.arange(50).repeat_interleave(each)
        units = torch.full((len(labels), 1, 4), 10.0)
        units[torch.arange(len(labels)), 0, labels % 4] = 70.0
        shuffle = lambda generator, labels=labels: labels[torch.randperm(len(labels), generator=generator)]  # noqa: E731
        found[each] = information(units, labels, 50, shuffle, 50).report()["share"][0]
    assert found[1] < 0.01 and found[20] > 0.25
    numbers = dict(
        layers=[0],
        information={
            axis: {key: [0.04, 0.04] for key in ("bits", "baseline", "baseline_high", "experts", "share", "p", "z")}
            for axis in ("position", "class")
        },
    )
    numbers |= dict(fixed=[], permutations=99, classes=50)
    assert "at least 4.00 %, of so few samples (50) of 50 classes" in dependence(numbers | dict(samples=50))
    assert "at least" not in dependence(numbers | dict(samples=500))


def test_layers_are_called_by_their_numbers(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda self, title, **_: titles.append(title))
    plot_shares(torch.full((2, 3, 4), 0.25), "class", [1, 3], tmp_path / "share.png")
    assert titles == ["layer 1", "layer 3"]


def test_a_sample_is_noised_alike_in_any_company(latents):
    run = opened(TOKEN)
    every, some = count_takings(run, batch(latents), TIMES), count_takings(run, batch(latents, 7), TIMES)
    assert torch.equal(every.by_time[:7], some.by_time)
    seen = []
    run.model.t_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0][0].item()))
    with watched(run.model) as taken:
        first, times = list(noised(run, batch(latents, 7), TIMES, size=3))[-1]
        assert (first, times.tolist()) == (6, [TIMES - 1])
    assert seen[:TIMES] == [125.0, 375.0, 625.0, 875.0]  # the middle of each of four parts
    assert torch.equal(taken[2].view(3, 16, -1).sum(1), every.by_time[:3, 1, 0])


@pytest.mark.parametrize("choice", ["token", "expert"])
def test_counting_needs_no_value_on_the_host(choice):
    """Tensors without values: whatever reads one, or makes a shape of one, fails."""
    with torch.device("meta"):
        routers = nn.ModuleList([Router(8, 4, choice, 2, RouterConfig()) for _ in range(3)])
        counted = Takings.none(6, TIMES, 3, 16, 4, "meta")
        with watched(routers) as taken:
            for router in routers:
                router(torch.empty(5, 16, 8))
        counted.add(taken, 1, torch.full((5,), 2))
    assert counted.by_position.is_meta and taken[0].shape == (80, 4)
    with pytest.raises(NotImplementedError):
        counted.on_cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("choice", ["token", "expert"])
def test_counting_does_not_wait_for_the_gpu(choice):
    router = Router(8, 4, choice, 2, RouterConfig()).cuda()
    nn.init.normal_(router.weight)
    x, counted = torch.randn(5, 16, 8, device="cuda"), Takings.none(5, TIMES, 1, 16, 4, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with watched(router) as taken:
            router(x)
        counted.add(taken, 0, torch.ones(len(counted.by_time), dtype=torch.long, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counted.on_cpu().by_time.sum() == 5 * 16 * 2


def test_information_in_closed_form():
    def binary(p):
        return -(p * math.log2(p) + (1 - p) * math.log2(1 - p))

    known = [  # a table of (rows, experts), and its information
        (torch.eye(4) * 9, 2.0),
        (torch.outer(torch.tensor([1, 5, 2]), torch.tensor([3, 0, 4])), 0.0),
        (torch.tensor([[90, 10], [10, 90]]), 1 - binary(0.1)),
        (torch.tensor([[8, 0], [4, 4]]), binary(0.75) - 0.5),
        (torch.zeros(2, 2), 0.0),
    ]
    for table, bits in known:
        assert mutual_information(table[:, None].expand(-1, 3, -1)).tolist() == pytest.approx([bits] * 3, abs=1e-12)
    assert entropy(torch.tensor([[1, 1, 2], [0, 5, 0]])).tolist() == [1.5, 0.0]


def planted(samples=24, side=4, experts=4, axis=None, strength=3.0, alike=0.0, seed=0):
    """Takings of one layer in which a token's expert depends on one axis, or on its image alone, or on nothing."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    labels = torch.arange(samples) % CLASSES
    effect = dict(
        timestep=draw(1, TIMES, 1, experts).expand(samples, TIMES, side**2, experts),
        position=draw(1, 1, side**2, experts).expand(samples, TIMES, side**2, experts),
        **{"class": draw(CLASSES, experts)[labels][:, None, None].expand(samples, TIMES, side**2, experts)},
    )
    logits = alike * draw(samples, 1, 1, experts) + (strength * effect[axis] if axis else 0)
    logits = logits.expand(samples, TIMES, side**2, experts)
    chosen = logits.softmax(-1).flatten(0, 2).multinomial(1, generator=generator).view(samples, TIMES, side**2)
    hits = nn.functional.one_hot(chosen, experts).int()
    counted = Takings.none(samples, TIMES, 1, side**2, experts, "cpu")
    counted.by_time += hits.sum(2)[:, :, None]
    counted.by_position += hits.sum(1)[:, :, None]
    return counted, labels


def found(counted, labels, permutations=PERMUTATIONS, side=4):
    return {axis: one.report() for axis, one in informations(counted, (side, side), labels, CLASSES, permutations).items()}


@pytest.mark.parametrize("axis", ["timestep", "position", "class"])
def test_permutations_find_what_was_planted_and_nothing_else(axis):
    told = found(*planted(axis=axis))
    for other, report in told.items():
        if other == axis:
            assert report["p"] == [1 / (PERMUTATIONS + 1)] * 2 and report["z"][0] > 10
            assert report["bits"][0] > 2 * report["baseline_high"][0] and 0.1 < report["share"][0] <= 1
        else:
            assert report["p"][0] > 0.05, (axis, other, report)


@pytest.mark.parametrize("sides", [(2, 8), (8, 2)])
def test_grids_need_not_be_square(sides):
    counted, labels = planted(axis="position")
    square, told = (informations(counted, of, labels, CLASSES, PERMUTATIONS)["position"].report() for of in ((4, 4), sides))
    assert told["bits"] == square["bits"] and told["p"] == square["p"]
    assert told["baseline"] == pytest.approx(square["baseline"], rel=0.3)


def test_permutations_are_calibrated_though_images_differ():
    """Tokens of an image prefer its experts. Who permutes tokens finds classes that are none; p of ours is uniform."""
    many = [planted(alike=1.5, seed=seed) for seed in range(40)]
    reports = [found(*one, permutations=39) for one in many]
    for axis in ("timestep", "position", "class"):
        p = torch.tensor([report[axis]["p"][0] for report in reports])
        assert (p <= 0.1).float().mean() <= 0.2 and 0.35 < p.mean() < 0.65, (axis, p)

    def naive(counted, labels):
        units = counted.by_time.sum(1)[:, 0]  # (S, E)
        tokens, of = units.flatten().tolist(), torch.arange(4).repeat(len(units))
        expert, label = of.repeat_interleave(torch.tensor(tokens)), labels.repeat_interleave(units.sum(1))
        shuffle = lambda generator: label[torch.randperm(len(label), generator=generator)]  # noqa: E731
        return information(nn.functional.one_hot(expert, 4)[:, None], label, CLASSES, shuffle, 39).report()["p"][0]

    assert sum(naive(*one) < 0.05 for one in many[:10]) == 10


def test_a_statistic_that_cannot_vary():
    report = Information(torch.zeros(2), torch.zeros(9, 2), torch.ones(2)).report()
    assert report["z"] == [None] * 3 and report["p"] == [1.0] * 3 and report["share"] == [0.0] * 3


def test_a_network_depends_on_what_it_is_told(latents):
    """Random weights: positions and times reach the router; the class does not once its embedding is empty."""
    run, samples = opened(TOKEN), batch(latents)
    samples = samples._replace(latents=torch.randn(samples.latents.shape, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        run.model.y_embed.table.weight.mul_(10)
    told = found(count_takings(run, samples, TIMES), samples.labels)
    assert told["timestep"]["p"][-1] == told["position"]["p"][-1] == told["class"]["p"][-1] == 1 / (PERMUTATIONS + 1)
    nn.init.zeros_(run.model.y_embed.table.weight)
    assert found(count_takings(run, samples, TIMES), samples.labels)["class"]["p"][-1] > 0.05
    expert = found(count_takings(opened(EXPERT), samples, TIMES), samples.labels)
    assert expert["timestep"]["bits"][-1] == expert["class"]["bits"][-1] == pytest.approx(0, abs=1e-12)
    assert expert["class"]["p"][-1] == 1 and expert["position"]["p"][-1] == 1 / (PERMUTATIONS + 1)


def test_lift():
    load = torch.tensor([5.0, 3.0, 2.0, 1.0])
    independent = 100 * load[:, None] * load
    off = ~torch.eye(4, dtype=torch.bool)
    for distinct, tokens in ((True, 0), (False, 10000)):
        together = independent.clone()
        together.fill_diagonal_(0)
        together += torch.diag(together.sum(1) if distinct else 1000 * load)
        plain = lift(together[None], tokens, distinct)[0]
        torch.testing.assert_close(plain[off], torch.ones(12))
        assert plain.diagonal().isnan().all()
    both = torch.tensor([[0, 9, 1, 1], [9, 0, 1, 1], [1, 1, 0, 9], [1, 1, 9, 0]]).double()
    found = lift((both + torch.diag(both.sum(1)))[None], 0, distinct=True)[0]
    assert found[0, 1].item() == pytest.approx(27 / 11) and found[0, 2].item() == pytest.approx(3 / 11)
    alone = lift(torch.diag(load)[None], 0, distinct=True)
    assert alone.isnan().all() and pairs(dict(lift=alone)) == ""  # top 1 has no pairs


def test_spread_of_compute():
    numbers = torch.tensor([0, 0, 1, 2, 2, 2, 4])
    told = spread(numbers.bincount(minlength=5)[None])
    apart = (numbers[:, None] - numbers).abs().double().mean() / (2 * numbers.double().mean())
    assert told["gini"].item() == pytest.approx(apart.item()) and told["untaken"].item() == pytest.approx(2 / 7)
    assert told["std"].item() == pytest.approx(numbers.double().std(correction=0).item())
    assert spread(torch.tensor([[0, 0, 7]]))["gini"].item() == 0


def test_likeness_of_experts(latents):
    run, samples = opened(TOKEN), batch(latents, 8)
    first = experts_of(run.model)[0].experts.deepspeed_experts[0]
    with torch.no_grad():
        first.w1[1], first.w2[1] = first.w1[0], -first.w2[0]
        order = torch.randperm(first.w2.shape[2], generator=torch.Generator().manual_seed(0))  # of hidden units
        gate, up = first.w1[0].chunk(2)
        first.w1[2], first.w2[2] = torch.cat([gate[order], up[order]]), first.w2[0][:, order]
    w1, w2, answers = weights_alike(run, "w1")[0], weights_alike(run, "w2")[0], answers_alike(run, samples, 2)[0]
    assert w1[0, 1].item() == pytest.approx(1) and w2[0, 1].item() == pytest.approx(-1) and answers[0, 1].item() == pytest.approx(-1)
    assert abs(w2[0, 2]) < 0.1 and answers[0, 2].item() == pytest.approx(1)
    torch.testing.assert_close(answers.diagonal(), torch.ones(4))
    assert abs(answers[0, 3]) < 0.9


def records(layers, steps=250):
    """As a trainer writes them."""
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        selections = torch.randint(50, 90, (layers, 4), generator=generator)
        yield dict(step=step, loss=2 / step, router=router_metrics(selections, torch.tensor([[0, 0, 9, 0, 0]] * layers)))


@pytest.fixture(scope="module")
def runs(folder, latents):
    """A weights folder of each router, with records of a training."""
    made = {}
    for name, network in (("token", TOKEN), ("expert", EXPERT), ("dense", replace(DENSE, learn_variance=False))):
        told = dict(manifest=latents, class_names=["a", "<b>", "c"], scaling_factor=0.9, shift_factor=0.0, shape=[4, 8, 8])
        told["vae_sha256"] = "a" * 64
        write_weights(folder / name, random_weights(network, latents=told)[1])
        lines = [json.dumps(record) for record in records(len(network.sparse_layers) or 1)]
        (folder / name / "metrics.jsonl").write_text("\n".join(lines))
        made[name] = folder / name
    return made


@pytest.fixture(scope="module")
def reports(runs, folder):
    for name in ("token", "expert"):
        out = folder / f"report-{name}"
        assert main(["analyze", str(runs[name]), "--samples", "20", "--out", str(out)]) == 0
    return {name: folder / f"report-{name}" for name in ("token", "expert")}


def test_numbers(reports):
    token, expert = (json.loads((reports[name] / "routing.json").read_text()) for name in ("token", "expert"))
    shares = {axis: torch.tensor(share) for axis, share in token["share"].items()}
    assert {axis: tuple(share.shape) for axis, share in shares.items()} == dict(
        timestep=(2, 10, 4), position=(2, 16, 4), **{"class": (2, 3, 4)}
    )
    torch.testing.assert_close(shares["timestep"].mean(1), torch.tensor(token["load"]))
    assert token["layers"] == [0, 1] and expert["layers"] == [1] and token["samples"] == 20
    torch.testing.assert_close(torch.tensor(token["entropy"]), torch.special.entr(shares["timestep"]).sum(-1) / math.log(2))
    assert token["fixed"] == [] and expert["fixed"] == ["timestep", "class"]
    assert all(len(values) == 3 for values in token["information"]["class"].values())  # two layers and their mean
    assert token["takers"]["std"] == [[0.0] * 10] * 2 and max(expert["takers"]["std"][0]) > 0
    assert token["experts_per_token"] == expert["experts_per_token"] == 2.0
    maps = torch.tensor(expert["takers_by_position"])
    assert maps.shape == (1, 16) and maps.mean().item() == pytest.approx(2)


@pytest.mark.parametrize("network", [TOKEN, EXPERT], ids=["token", "expert"])
def test_pairs_are_expected_as_the_router_makes_them(network, latents):
    run, samples = opened(network), batch(latents, 5)
    counted = count_takings(run, samples, TIMES)
    told = summary_of.summary(run, counted, (4, 4), samples.labels, 2)["lift"]
    torch.testing.assert_close(told, lift(counted.together, 5 * TIMES * 16, distinct=network is TOKEN), equal_nan=True)


def test_in_less_memory(runs, reports, folder):
    out = folder / "report-bf16"
    assert main(["analyze", str(runs["token"]), "--samples", "20", "--dtype", "bf16", "--offload-experts", "--out", str(out)]) == 0
    bf16, fp32 = (json.loads((path / "routing.json").read_text()) for path in (out, reports["token"]))
    for key, tolerance in dict(w1=1e-3, w2=1e-3, outputs=1e-2).items():
        off = [torch.tensor(numbers["similarity"][key], dtype=torch.float) for numbers in (bf16, fp32)]
        torch.testing.assert_close(*off, atol=tolerance, rtol=0, equal_nan=True)
    torch.testing.assert_close(torch.tensor(bf16["load"]), torch.tensor(fp32["load"]), atol=0.01, rtol=0)
    assert bf16["load"] != fp32["load"]


def test_heldout_samples_without_a_class(runs, folder):
    """Count in all but what is told by class."""
    path = Path(write_latents(folder / "some", train=4, val=30, classes=CLASSES))
    manifest = Manifest.load(path)
    samples = [manifest.open(shard).read(i) for shard in manifest.split("val").shards for i in range(30)]
    [shard] = manifest.split("val").shards
    for name, unlabelled in (("some", range(0, 30, 4)), ("none", range(30))):
        with ShardWriter(path / shard.name) as writer:
            for i, sample in enumerate(samples):
                writer.write(sample.key, sample.meta | (dict(label=None) if i in unlabelled else {}), **sample.tensors)
        file = path / shard.name
        changed = replace(shard, bytes=file.stat().st_size, sha256=sha256(file))
        splits = replace(manifest.splits, val=Split(30, (changed,)))
        replace(manifest, splits=splits, class_names=("a", "<b>", "c")).save()
        out = folder / f"report-{name}"
        assert main(["analyze", str(runs["token"]), "--dataset", str(path), "--samples", "30", "--out", str(out)]) == 0
        numbers = json.loads((out / "routing.json").read_text())
        assert ("class" in numbers["share"]) == ("class" in numbers["information"]) == (name == "some")
        assert numbers["samples"] == 30 and numbers["classes"] == (3 if name == "some" else 0)


def test_a_stretch_of_a_thinned_run_is_told_in_steps():
    thinned = [record for record in records(2, 1000) if record["step"] % 5 == 1]
    assert training(thinned)["every"] == 6  # two of them, five steps apart


def test_records_of_training_become_curves(runs):
    told = training(read_metrics(runs["token"] / "metrics.jsonl"))
    every = list(records(2))
    assert told["every"] == 3 and len(told["steps"]) == 84 and told["steps"][-1] == 250
    assert told["loss"][0].item() == pytest.approx(sum(r["loss"] for r in every[:3]) / 3)
    mean = sum(r["router"]["max_over_mean"][1] for r in every[3:6]) / 3
    assert told["router"]["max_over_mean"][1, 1].item() == pytest.approx(mean) and told["router"]["cv"].shape == (2, 84)


def test_records_are_read_whatever_became_of_the_run(tmp_path):
    """Skipped steps have no loss; the last line of a run that goes on, or was killed, may not be whole."""
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file) == []
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null, "skipped": 1}\n{"step": 3, "loss": 1.5}\n')
    for cut in ('{"step": 4, "lo', '{"step": 4, "loss": 1.5, "router": {}'):
        with file.open("a") as end:
            end.write(cut + "\n")
        assert [record["step"] for record in read_metrics(file)] == [1, 3]


@pytest.mark.skipif(not CHROMIUM, reason="no chromium (apt install chromium)")
def test_the_report_in_a_browser(reports):
    with browser() as page:
        for name, out in reports.items():
            file = out / "report.html"
            for width in (1280, 390):
                page.open(file, width, dark=width == 390)
                assert page.value("innerWidth") == width
                assert page.value("document.documentElement.scrollWidth") <= width, (name, width)
                assert page.value("document.images.length") >= 10
                broken = (
                    "[...document.images].filter(i => !(i.complete && i.naturalWidth > 0 && i.getBoundingClientRect().width > 8)).length"
                )
                assert page.value(f"document.querySelectorAll('details').forEach(d => d.open = true), {broken}") == 0
                assert page.value("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")
                assert [url for url in page.requests() if not url.startswith("data:")] == [file.resolve().as_uri()]
                assert page.complaints() == []
            text = page.value("document.body.innerText")
            assert ("Compute over tokens" in text) == (name == "expert") and "nan" not in text
            assert ("By noise level" in text and "<b>" in text) == (name == "token")
        page.value("document.body.append(Object.assign(new Image(), {src: 'https://example.org/a.png'}))")
        page.value("new Promise(done => setTimeout(done, 200))")
        assert page.complaints(), "the page's own policy let a request out"


@pytest.mark.parametrize(
    "which, options, message",
    [
        ("dense", [], "dense"),
        ("token", ["--dataset", "nowhere"], "--dataset='nowhere': no readable manifest"),
        ("token", ["--dataset", "SHAPE"], "shape ((4, 4, 4),), the model was trained with (4, 8, 8)"),
        ("token", ["--dataset", "CLASSES"], "num_classes: 5, the model was trained with 3"),
        ("token", ["--dataset", "NAMES"], "class_names: ['0', '1', '2'], the model was trained with ['a', '<b>', 'c']"),
        ("token", ["--dataset", "SHIFT"], "not encoded as what the model was trained on: shift_factor: 0.0 -> 0.5; encode it alike"),
        ("token", ["--dataset", "VAE"], f"vae_sha256: {'a' * 64} -> {'b' * 64}"),
        ("token", ["--samples", "1"], "--samples=1"),
        ("token", ["--dataset", "URL"], "is behind a URL; copy the folder here"),
        ("token", ["--prompt", "a"], "takes classes"),
    ],
)
def test_mistakes(runs, folder, which, options, message, capsys):
    other = dict(SHAPE=dict(shape=(4, 4, 4), classes=3), CLASSES=dict(classes=5)) | {
        word: dict(classes=3) for word in ("NAMES", "SHIFT", "VAE")
    }
    options = [write_latents(folder / word, train=4, val=4, **other[word]) if word in other else word for word in options]
    options = [Path(write_latents(folder / word, train=4, val=4)).as_uri() if word == "URL" else word for word in options]
    for word, change in dict(SHIFT=dict(shift_factor=0.5), VAE=dict(vae_sha256="b" * 64)).items():
        if (folder / word).exists():
            replace(Manifest.load(folder / word), **change).save()
    assert main(["analyze", str(runs[which]), "--out", str(folder / "none"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (folder / "none").exists()


def test_a_run_of_others_sends_no_request(folder):
    with pytest.raises(ConfigError, match="'http://127.0.0.1:1/latents': is behind a URL"):
        analyze(opened(TOKEN, manifest="http://127.0.0.1:1/latents"), folder, folder / "none")


def test_other_data(folder, latents, capsys, monkeypatch):
    moved = random_weights(TOKEN, latents=dict(class_names=["a", "<b>", "c"]))[1]
    write_weights(folder / "moved", moved)
    assert main(["analyze", str(folder / "moved"), "--out", str(folder / "given")]) == 2
    assert "--dataset=None" in capsys.readouterr().err
    assert main(["analyze", str(folder / "moved"), "--dataset", latents, "--out", "/dev/null/out"]) == 2
    assert "--out='/dev/null/out': cannot be written: Not a directory" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)  # as of another user's folder
        assert main(["analyze", str(folder / "moved"), "--dataset", latents, "--out", str(folder / "given")]) == 2
        assert "given': cannot be written by this user" in capsys.readouterr().err and not list((folder / "given").iterdir())
    assert main(["analyze", str(folder / "moved"), "--dataset", latents, "--samples", "4", "--out", str(folder / "given")]) == 0
    assert "routing.json" in capsys.readouterr().out
    with pytest.raises(DataError):
        analyze(opened(TOKEN, manifest=str(folder / "gone")), folder, folder / "none")
