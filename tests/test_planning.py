"""The planner: what autograd saves, what ranks send, and what ``ditmoe plan`` says. ``benchmarks/planner.md`` has larger points."""

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from encoding import write_text_encoder
from latents import write_latents
from megatron.core import parallel_state
from models import DENSE, SPARSE, random_weights
from processes import ROOT
from torch.testing._internal.distributed import fake_pg  # noqa: F401, registers the backend

from ditmoe_ds.cli import main
from ditmoe_ds.distributed import tensor_parallel
from ditmoe_ds.distributed.checkpoint import FORMAT
from ditmoe_ds.distributed.hardware import GPUS, peak_tflops
from ditmoe_ds.distributed.weights import write_weights
from ditmoe_ds.latents.text import load_text_encoder
from ditmoe_ds.models.dit import DiT
from ditmoe_ds.models.sizes import macs, named_config, uncut_macs
from ditmoe_ds.models.tensor_plan import tensor_plan
from ditmoe_ds.planning.activations import MicroBatch, activations
from ditmoe_ds.planning.job import Assumptions, Cluster, Job, Shape, layers
from ditmoe_ds.planning.plan import Plan
from ditmoe_ds.planning.recipe import read_job
from ditmoe_ds.planning.search import best, clusters, pareto, search, tensor_sizes
from ditmoe_ds.planning.traffic import crossing, exchange_shares, step_traffic, summed
from ditmoe_ds.training.plan import read_plan
from ditmoe_ds.training.recipe import read_recipe

sys.path += [str(ROOT / "benchmarks"), str(ROOT / "docs")]
import planner
from plan_recipes import renewed
from ranks import CPU, on_ranks

G = "recipes/dit_moe_g2_16e2a_256.yaml"
DEMOS = ("digits", "emoji", "shapes")
EC = named_config("EC-DIT-Nano-4E", input_size=16, text_width=24)
MODELS = {
    "DiT-MoE, shared experts": replace(SPARSE, hidden=64, input_size=16),
    "DiT-MoE, qk norm, one shared": replace(SPARSE, hidden=64, input_size=16, qk_norm=True, shared=1, top_k=1),
    "upcycled: GELU experts with biases": replace(SPARSE, hidden=64, input_size=16, expert_activation="gelu", shared=0),
    "EC-DIT with text": EC,
    "EC-DIT, decoupled router": replace(EC, router=replace(EC.router, input="decoupled")),
    "EC-DIT's dense twin": replace(EC, routing="dense"),
    "dense": replace(DENSE, hidden=64, input_size=16),
}


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_what_autograd_keeps(name, dtype, micro):
    model = MODELS[name]
    batch = MicroBatch(model, micro, model.tokens, 7 if model.text_width else 0, 1, dtype.itemsize, cuda=False)
    assert kept(batch, dtype, recompute=False) == pytest.approx(activations(batch, False).kept, rel=0.07 if micro > 1 else 0.1)


@pytest.mark.parametrize("name", ["DiT-MoE, shared experts", "EC-DIT with text"])
def test_what_checkpointing_keeps(name):
    model = replace(MODELS[name], depth=20)
    batch = MicroBatch(model, 4, model.tokens, 7 if model.text_width else 0, 1, 4, cuda=False)
    planned = activations(batch, recompute=True)
    # the random state that each block keeps, 5 kB, is not planned; nor what the loss adds, which this has not
    assert kept(batch, torch.float32, recompute=True) == pytest.approx(planned.kept, rel=0.1)
    # the block that is recomputed is the largest
    one = replace(model, depth=1 + model.sparse_first, sparse_every=1)
    extra = (
        activations(replace(batch, model=one), False).kept
        - activations(replace(batch, model=replace(one, depth=one.depth - 1)), False).kept
    )
    assert planned.recomputed == pytest.approx(extra - 4 * batch.tokens * model.hidden, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["DiT-MoE, shared experts", "EC-DIT with text"])
def test_what_checkpointing_attention_keeps(name, dtype):
    model = replace(MODELS[name], depth=20)
    batch = MicroBatch(model, 4, model.tokens, 7 if model.text_width else 0, 1, dtype.itemsize, cuda=False)
    planned = activations(batch, recompute="attention")
    assert kept(batch, dtype, recompute="attention") == pytest.approx(planned.kept, rel=0.1)
    whole = activations(batch, recompute=False)
    attention = whole.parts["attention"] + whole.parts.get("text", 0) + whole.parts["norm"]
    assert planned.kept == pytest.approx(whole.kept - attention + model.depth * batch.size * batch.tokens * model.hidden)


@pytest.fixture
def one_of_two():
    """This process in a tensor-parallel group with one that is not there, whose part of a sum is missing."""
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
    tensor_parallel.join_groups(2)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in MODELS if "biases" not in name])
def test_what_tensor_parallelism_spares(one_of_two, name, dtype):
    """Of what one rank would keep: half of what lies behind a cut matrix, to 2 % of that."""
    model = MODELS[name]
    whole = MicroBatch(model, 3, model.tokens, 7 if model.text_width else 0, 1, dtype.itemsize, cuda=False)
    part = replace(whole, tensor=2)
    planned = activations(whole, False).kept - activations(part, False).kept
    assert kept(whole, dtype, recompute=False) - kept(part, dtype, recompute=False) == pytest.approx(planned, rel=0.02)
    assert planned > 0.15 * activations(whole, False).kept
    assert kept(part, dtype, recompute=False) == pytest.approx(activations(part, False).kept, rel=0.1)


def kept(batch, dtype, recompute):
    """Bytes of the different tensors that a forward saves, without the parameters."""
    model, images = batch.model, batch.images
    with torch.device("meta"):
        net = DiT(model)
    if batch.tensor > 1:
        tensor_parallel.cut(net, *tensor_plan(net))
    net = net.to_empty(device="cpu").to(dtype).train()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    net.checkpoint_activations = recompute
    told = dict(y=torch.zeros(images, dtype=torch.long))
    if batch.text:
        told = dict(text=torch.randn(images, batch.text, model.text_width), mask=torch.ones(images, batch.text, dtype=torch.bool))
    own, found, alive = {parameter.data_ptr() for parameter in net.parameters()}, {}, []

    def pack(tensor):
        alive.append(tensor)  # else its address might be used again
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    latents = torch.randn(images, 4, model.input_size, model.input_size)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net(latents, torch.rand(images), **told)
        loss = (out - latents.repeat(1, out.shape[1] // 4, 1, 1)).square().mean()
    assert loss.requires_grad
    return sum(found.values())


CASES = {
    "stage 2, EP 2, text": dict(model="EC-DIT-Nano-4E", stage=2, ep=2, fields=dict(hidden=96, depth=8)),
    "stage 3, EP 2, recomputing": dict(model="DiT-MoE-Nano/2-4E2A", stage=3, ep=2, recompute=True, fields=dict(hidden=96, depth=4)),
    "stage 1, TP 2": dict(model="DiT-MoE-Nano/2-4E2A", stage=1, ep=1, tensor=2, accumulation=2, fields=dict(hidden=96, depth=4)),
}
SLOW_CASES = ("stage 2, EP 2, text", "stage 1, TP 2")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_CASES else name for name in CASES])
def test_a_real_step_sends_and_holds_what_was_planned(name):
    """Collectives to 5 %, allocated memory to 10 %, on 2 processes."""
    case = planner.case(**CASES[name])
    row = planner.compare(case, on_ranks(2, planner.work, case, environment=CPU))
    for kind, (planned, counted) in row["sent"].items():
        assert counted == pytest.approx(planned, rel=0.05, abs=1000), kind
    assert (row["sent"]["gradients"][1] > 1000) == (case["tensor"] == 1)
    assert (row["sent"]["all_to_all"][1] > 0) == (case["ep"] > 1)
    assert (row["sent"]["sums"][1] > 0) == (case["tensor"] > 1)
    planned, measured = row["peak"]
    assert measured == pytest.approx(planned, rel=0.1)


def test_links():
    """Two nodes of four: rings and exchanges by hand."""
    assert crossing(range(8), range(1), 4) == 2 / 8
    assert crossing(range(0, 8, 2), range(2), 4) == 2 / 4  # replicas of experts at EP 2: two hops of four leave
    assert crossing(range(0, 8, 4), range(4), 4) == 1
    assert crossing(range(0, 8, 8), range(8), 4) == 0  # alone
    assert crossing(range(2), range(0, 8, 2), 4) == 0  # tensor-parallel pairs,
    assert crossing(range(4), range(0, 8, 4), 2) == 2 / 4  # and fours over two nodes of two each
    assert exchange_shares(8, 2, 4) == (1 / 2, 0)
    assert exchange_shares(8, 8, 4) == pytest.approx((3 / 8, 4 / 8))
    assert exchange_shares(12, 3, 4) == pytest.approx(((2 + 2 / 3 + 2 / 3 + 2) / 12, (0 + 4 / 3 + 4 / 3 + 0) / 12))
    assert exchange_shares(8, 2, 4, tensor=2) == (1 / 2, 0)
    assert exchange_shares(8, 4, 4, tensor=2) == (1 / 4, 1 / 2)  # ranks 0, 2, 4, 6
    assert exchange_shares(8, 2, 4, tensor=4) == (0, 1 / 2)  # ranks 0, 4


def test_traffic_by_hand():
    """100 dense elements and 400 of experts in fp32, EP 2 on 2 nodes of 2; one image of 16 tokens, 2 experts each, width 32, 2 layers."""
    batch = MicroBatch(SPARSE, 1, 16, 0, 2, 4)
    found = {stage: step_traffic(batch, 3, False, stage, 4, 2, dict(dense=100, experts=400, whole=25)) for stage in range(4)}
    sums = [{kind: sum(f.in_node + f.across for f in found[s] if f.kind == kind) for kind in {f.kind for f in found[s]}} for s in range(4)]
    dense, experts = 400 * 3 / 4, 800 / 2  # bytes to gather them once
    assert sums[0] == pytest.approx({"reduce gradients, dense": 2 * dense, "reduce gradients, experts": 2 * experts} | tokens(3))
    assert sums[1] == pytest.approx(sums[0] | {"gather weights, dense": dense, "gather weights, experts": experts})
    assert sums[2]["reduce gradients, dense"] == pytest.approx(3 * 2 * dense)
    assert sums[3]["reduce gradients, experts"] == pytest.approx(3 * experts)
    assert sums[3]["gather weights, experts"] == pytest.approx(3 * experts)  # both layers are still whole from forward
    assert sums[3]["gather weights, dense"] == pytest.approx(dense * (3 * 0.75 + 0.25))
    exchange = next(flow for flow in found[2] if flow.kind == "exchange tokens")
    assert (exchange.in_node, exchange.across) == (tokens(3)["exchange tokens"], 0)
    again = step_traffic(batch, 3, True, 2, 4, 2, dict(dense=100, experts=400, whole=25))
    assert again[-1].in_node == 1.5 * exchange.in_node
    attention = step_traffic(batch, 3, "attention", 2, 4, 2, dict(dense=100, experts=400, whole=25))
    assert attention[-1] == exchange, "no token is sent twice"


def test_traffic_of_tensor_parallelism_by_hand():
    """The same at TP 2 and EP 2 on 2 nodes of 4: of dense weights 4 ranks have the same part, of an expert 2, one in each node."""
    batch = MicroBatch(SPARSE, 1, 16, 0, 2, 4, tensor=2)
    found = {flow.kind: flow for flow in step_traffic(batch, 3, False, 1, 8, 4, dict(dense=100, experts=400, whole=25))}
    sent = {kind: (flow.in_node, flow.across) for kind, flow in found.items()}
    ring = 400 * 3 / 4  # ranks 0, 2, 4, 6 or 1, 3, 5, 7: every second hop leaves the node
    assert sent.pop("gather weights, dense") == pytest.approx((ring / 2, ring / 2))
    assert sent.pop("reduce gradients, dense") == pytest.approx((ring, ring))
    assert sent.pop("gather weights, experts") == pytest.approx((0, 800 / 2))
    assert sent.pop("reduce gradients, experts") == pytest.approx((0, 800))
    assert sent.pop("exchange tokens") == (tokens(3)["exchange tokens"], 0)
    # two sums of 16 tokens in forward and two in backward, and one of 32 takings' weights: of each ring of two a rank sends the whole
    assert sent.pop("sum tokens") == pytest.approx((3 * 2 * (4 * 16 * 32 + 32) * 4, 0))
    assert not sent
    assert step_traffic(batch, 3, False, 1, 8, 1, dict(dense=100, experts=400, whole=25))[-1].across == found["sum tokens"].in_node
    # what is computed again sums again, and so do attention to text and norms of heads
    once = 16 * 32 * 4
    assert summed(batch, True) - summed(batch, False) == 2 * 2 * once
    assert summed(batch, "attention") - summed(batch, False) == 2 * once
    assert summed(replace(batch, model=replace(SPARSE, qk_norm=True)), False) - summed(batch, False) == 2 * 4 * 8 * 4
    text = MicroBatch(EC, 2, 64, 7, 1, 2, tensor=2)
    tokens_, captions, norms = 2 * 64 * 64 * 2, 2 * 7 * 64 * 2, 2 * 4 * 16 * 2
    taken = 4 * 2 * 4 * 32 * 2  # fp32, images, experts, places, layers
    assert summed(text, False) == EC.depth * (6 * tokens_ + captions + norms) + taken
    assert summed(text, True) - summed(text, False) == EC.depth * 3 * tokens_
    assert summed(text, "attention") - summed(text, False) == EC.depth * 2 * tokens_


def tokens(accumulation):
    return {"exchange tokens": accumulation * 4 * 2 * (16 * 2) * 32 * 4 / 2}


def test_time_by_hand():
    gpu = replace(GPUS["h100-80gb"], tflops=100, network_bandwidth=1, node_bandwidth=10, memory_bandwidth=1000)
    job = Job(SPARSE, 16, 0, "bf16", global_batch=8, steps=86400, averages=1)
    plan = Plan(job, Cluster(gpu, 2, 2), Shape(2, 2, 2, False), Assumptions(mfu=0.5, overlap=0.5, link=0.5))
    assert plan.seconds["arithmetic"] == pytest.approx(plan.flops / 50e12)
    assert replace(plan, job=replace(job, precision="fp32")).seconds["arithmetic"] == pytest.approx(plan.flops / 25e12)
    flows = {flow.kind: flow for flow in plan.traffic}
    assert plan.seconds["exchange"] == pytest.approx(flows["exchange tokens"].in_node / 5e9)
    waits = [max(f.in_node / 5e9, f.across / 0.5e9) for f in plan.traffic if f.kind != "exchange tokens"]
    reducing, gathering = waits[0] + waits[2], waits[1] + waits[3]
    assert plan.seconds["zero"] == pytest.approx(gathering + max(0, reducing - 0.5 * plan.flops * 2 / 3 / 50e12))
    later = replace(plan, shape=replace(plan.shape, stage=1, micro=1))  # two micro-batches, gradients travel beside the second
    assert later.seconds["zero"] == pytest.approx(gathering + reducing - 0.5 * plan.flops * 2 / 3 / 50e12 / 2)
    unsharded = replace(plan, shape=replace(plan.shape, stage=0))  # whose gradients nothing hides
    waits = [max(f.in_node / 5e9, f.across / 0.5e9) for f in unsharded.traffic if f.kind != "exchange tokens"]
    assert unsharded.seconds["zero"] == pytest.approx(sum(waits))
    hooked = replace(plan, shape=replace(plan.shape, stage=3, micro=1))
    assert (plan.host_seconds, hooked.host_seconds) == (0, pytest.approx(0.003 * SPARSE.depth * 2))  # of two micro-batches
    found = layers(SPARSE)
    assert plan.seconds["optimizer"] == pytest.approx((found.dense + found.experts) / 4 * (2 + 6 + 8 + 28 + 12 + 6) / 500e9)
    for optimizer, touched in (("adamw", 2 + 28 + 8), ("rmsprop", 2 + 6 + 8 + 28 + 12 + 6)):
        alone = replace(plan, job=replace(job, optimizer=optimizer), shape=replace(plan.shape, stage=0))
        assert alone.seconds["optimizer"] == pytest.approx((found.dense + found.experts / 2) * touched / 500e9)
    copied = {
        0: (3 + 6, 3 + 6),
        1: (3 + 6 + 1.5, 3 + 6 + 3),
        2: (12 + 3.25, 12 + 6.5),
        3: (12 + 2.25, 12 + 4.5),
    }  # in two micro-batches of dense, experts
    for stage, (dense, experts) in copied.items():
        twice = replace(plan, shape=replace(plan.shape, stage=stage, micro=1))
        assert twice.seconds["gradients"] == pytest.approx(2 * (found.dense * dense + found.experts / 2 * experts) / 500e9)
    assert plan.days == pytest.approx(plan.step_seconds)
    assert plan.gpu_hours == pytest.approx(plan.step_seconds * 24 * 4)


def test_places_that_no_token_takes():
    """Under a capacity factor experts compute as many rows as it says, taken or not."""

    def plan(factor):
        model = replace(SPARSE, router=replace(SPARSE.router, capacity_factor=factor))
        job = Job(model, 16, 0, "bf16", global_batch=8, steps=1, averages=1)
        return Plan(job, Cluster(GPUS["h100-80gb"], 1, 4), Shape(2, 2, 2, True), Assumptions())

    free, tight, even, wide = map(plan, (None, 0.5, 1.0, 1.5))
    experts = 2 * 16 * 2 * SPARSE.top_k * 3 * 32 * 128  # of two images and two layers, in multiply-accumulates
    assert (free.flops, free.empty_flops) == (even.flops, even.empty_flops) == (wide.flops, 0)
    assert free.flops - tight.flops == pytest.approx(6 * experts / 2) and tight.empty_flops == 0
    assert wide.empty_flops == pytest.approx(8 * experts / 2)
    assert plan(2.0).empty_flops == plan(8.0).empty_flops  # an expert cannot take more than all tokens
    assert wide.seconds["arithmetic"] / free.seconds["arithmetic"] == pytest.approx(1 + wide.empty_flops / (free.flops * 4 / 3))


def test_the_data_say_the_tokens(tmp_path):
    """Of the largest image, whatever its sides; and of a caption, if the recipe does not."""
    wide = write_latents(tmp_path / "wide", train=8, val=2, shape=(4, 8, 12))
    _, job = read_job(["recipes/digits.yaml", f"data.manifest={wide}", "model.name=DiT-MoE-S/2-8E2A"], None, None)
    assert (job.patches, job.sides) == (24, (8, 12))
    write_text_encoder(tmp_path / "encoder", "bert")
    arguments = ["recipes/ec_dit_xl_8e.yaml", f"data.text_encoder={tmp_path}/encoder", "data.text_max_tokens=200"]
    assert read_job(arguments, None, None)[1].text == 200 and read_job(arguments, None, 50)[1].text == 50
    stored = f"data.manifest={write_latents(tmp_path / 'stored', train=8, val=2, text=6)}"
    assert read_job([*arguments[:1], stored], None, None)[1].text == 5 and read_job([*arguments[:1], stored], None, 50)[1].text == 50
    assert read_plan(["recipes/digits.yaml", f"data.manifest={wide}", f"run_dir={tmp_path}/run"], 2).model.input_size == 8


@pytest.mark.parametrize("kind", ["clip", "bert", "t5"])
def test_a_text_encoder_in_training_takes_memory(kind, capsys, tmp_path):
    """Its weights, in bf16, on every rank."""
    write_text_encoder(tmp_path, kind)
    held = 2 * sum(parameter.numel() for parameter in load_text_encoder(str(tmp_path), 8, "cpu").model.parameters())
    settings = ["recipes/ec_dit_xl_8e.yaml", "--nodes", "4", "--text-tokens", "77"]
    alone, both = (plan_json(capsys, *settings, *more)["recipe"] for more in ([], [f"data.text_encoder={tmp_path}"]))
    assert both["memory"]["text encoder"] == held > 0 == alone["memory"]["text encoder"]
    assert both["peak"] - alone["peak"] == held


def test_a_rank_of_a_tensor_parallel_group():
    """Its weights, images and arithmetic by hand."""
    gpu = replace(GPUS["h100-80gb"], tflops=100, network_bandwidth=1, node_bandwidth=10)
    model = replace(SPARSE, qk_norm=True)
    job = Job(model, 16, 0, "bf16", global_batch=8, steps=1, averages=1)
    whole = Plan(job, Cluster(gpu, 1, 4), Shape(3, 2, 2, True, persistent=100), Assumptions(mfu=0.5, link=0.5))
    plan = replace(whole, shape=replace(whole.shape, tensor=2))
    assert (whole.accumulation, plan.accumulation) == (1, 2)
    D, one, part = 32, layers(model), layers(model, 2)
    cut = 2 * (3 * D * D + 3 * D + D * D + 3 * 2 * D * D)  # of two layers: qkv with its bias, proj, the shared experts
    assert (one.dense - part.dense, one.experts) == (cut / 2, 2 * part.experts)
    assert (sum(part.dense_layer), sum(part.expert_layer)) == (sum(one.dense_layer) - cut / 4, sum(one.expert_layer) / 2)
    small = [size for size in part.dense_tensors if size <= 100]
    layer = sum(size for size in part.dense_layer if size > 100) + sum(part.expert_layer) / 2
    assert plan.memory["ZeRO-3 live layers"] == 2 * (sum(small) + 2 * layer)
    assert one.dense_tensors.count(3 * D) == part.dense_tensors.count(3 * D // 2) == 2  # the biases of qkv
    assert plan.memory["weights"] == 2 * (part.dense + part.experts) / 2
    assert plan.flops == whole.flops == 6 * sum(macs(model, 16, 0)) * 2
    assert (whole.alike_flops, plan.alike_flops) == (0, 8 * uncut_macs(model, 16, 0) * 2)
    assert plan.seconds["arithmetic"] == whole.seconds["arithmetic"] == pytest.approx(plan.flops * 4 / 3 / 50e12)
    beyond = activations(plan.batch, False).kept - activations(whole.batch, False).kept / 2  # of two images each
    assert whole.seconds["alike"] == 0 < beyond
    assert plan.seconds["alike"] == pytest.approx(plan.alike_flops / 50e12 + 2 * 7 * beyond / (3350e9 * 0.5))
    assert plan.mfu == pytest.approx(plan.flops / plan.step_seconds / 100e12)
    assert whole.seconds["sums"] == 0 < plan.traffic[-1].in_node / 5e9 == pytest.approx(plan.seconds["sums"])
    assert uncut_macs(model, 16, 0) == 16 * (2 * 4 * D + 4 * D * 12) + 2 * 6 * D * D + 2 * D * D + 256 * D + D * D


def test_search_finds_what_trying_everything_finds():
    job = Job(replace(SPARSE, hidden=256), 16, 0, "bf16", global_batch=16, steps=1, averages=1)
    cluster = Cluster(replace(GPUS["h100-80gb"], memory=0.1), 1, 4)
    stages = [Shape(stage, 1, 1, False, 1000, 1000) for stage in range(4)]
    plans = search(job, cluster, stages, Assumptions(), "time")
    # stages and recomputing; TP 1 with EP 1, 2, 4 and micro-batches 1, 2, 4; TP 2 with EP 1, 2 and up to 8; TP 4 with EP 1 and up to 16
    assert len(plans) == 4 * 3 * (3 * 3 + 2 * 4 + 1 * 5)
    assert {plan.shape.tensor for plan in plans} == {1, 2, 4}
    fitting = [plan for plan in plans if plan.fits]
    assert 0 < len(fitting) < len(plans)
    assert best(plans, "time").step_seconds == min(plan.step_seconds for plan in fitting)
    assert best(plans, "time").shape.micro == max(
        p.shape.micro for p in fitting if p.step_seconds < best(plans, "time").step_seconds + 1e-6
    )
    single = Cluster(replace(cluster.gpu, memory=1.0), 1, 1)
    alone = search(job, single, stages[:1], Assumptions(), "time")  # where time does not depend on it
    assert {p.shape.micro for p in alone if p.fits} > {1} and best(alone, "time").shape.micro == max(p.shape.micro for p in alone if p.fits)
    assert best(plans, "memory").peak == min(plan.peak for plan in fitting)
    beaten = [p for p in fitting if any((o.step_seconds, o.peak) < (p.step_seconds, p.peak) and o.peak <= p.peak for o in fitting)]
    rest = [plan for plan in fitting if plan not in beaten]
    assert {(plan.step_seconds, plan.peak) for plan in pareto(fitting, "time")} == {(plan.step_seconds, plan.peak) for plan in rest}
    fewer = search(job, replace(cluster, gpu=replace(cluster.gpu, memory=1.0, tflops=1.0)), stages, Assumptions(), "gpus")
    assert best(fewer, "gpus").cluster.world == min(plan.cluster.world for plan in fewer if plan.fits) < best(fewer, "time").cluster.world
    front = pareto([plan for plan in fewer if plan.fits], "gpus")
    assert front[-1].cluster.world == best(fewer, "gpus").cluster.world
    assert [(p.step_seconds, -p.cluster.world) for p in front] == sorted({(p.step_seconds, -p.cluster.world) for p in front})
    assert [place.world for place in clusters(Cluster(cluster.gpu, 4, 8))] == [32, 16, 8, 4, 2, 1]


def test_of_equally_good_plans_the_better_is_taken():
    """Equally fast ones may differ by rounding."""

    def plan(step_seconds, peak, micro, world, fits=True):
        shape, cluster = SimpleNamespace(micro=micro), SimpleNamespace(world=world)
        return SimpleNamespace(step_seconds=step_seconds, peak=peak, shape=shape, cluster=cluster, fits=fits)

    plans = [plan(1, 5, 2, 4), large := plan(1 + 1e-9, 6, 4, 4), plan(3, 7, 2, 2), few := plan(3, 8, 8, 2)]
    plans += [plan(9, 1, 1, 8), small := plan(8, 1, 1, 8), plan(0.1, 0, 9, 1, fits=False)]
    assert [best(plans, objective) for objective in ("time", "memory", "gpus")] == [large, small, few]
    assert best(plans[-1:], "time") is None


def test_the_fullest_moment_of_a_step():
    """Before the first bucket is full nothing is freed; without ZeRO gradients are there twice while they travel."""
    job, one = Job(SPARSE, 16, 0, "bf16", global_batch=1024, steps=1, averages=1), Cluster(GPUS["h100-80gb"], 1, 2)
    plan = Plan(job, one, Shape(2, 1, 512, False, bucket=300_000))
    assert plan.when == "in backward" and plan.memory["activations"] == plan.activations.kept
    alone = Plan(replace(job, global_batch=2), one, Shape(0, 1, 1, False))
    assert alone.when == "as gradients travel" and alone.memory["gradients"] > 1.5 * alone.memory["weights"]


def test_tensor_sizes_that_are_tried():
    """They divide the heads of k and v, and stay inside a node; experts with biases are not cut."""
    gpu = GPUS["h100-80gb"]
    assert tensor_sizes(named_config("EC-DIT-M-64E"), Cluster(gpu, 64, 8)) == [1, 2, 4]
    assert tensor_sizes(named_config("DiT-MoE-G/2-16E2A"), Cluster(gpu, 8, 8)) == [1, 2, 4, 8]
    assert tensor_sizes(named_config("DiT-MoE-G/2-16E2A"), Cluster(gpu, 8, 6)) == [1, 2]
    assert tensor_sizes(MODELS["upcycled: GELU experts with biases"], Cluster(gpu, 1, 8)) == [1]


def plan_json(capsys, *arguments):
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_recipe_of_16_billion(capsys):
    said = plan_json(capsys, G, "--nodes", "8")
    own = said["recipe"]
    assert 16.4e9 < said["job"]["total"] < 16.6e9
    assert (own["stage"], own["ep"], own["micro"], own["recompute"], own["gpus"]) == (3, 16, 16, False, 64)
    assert own["peak"] == pytest.approx(sum(own["memory"].values()))
    assert own["memory"]["weights"] == pytest.approx(2 * said["job"]["total"] / 64, rel=0.01)
    assert own["step_seconds"] == pytest.approx(sum(own["seconds"].values()))
    assert own["gpu_hours"] == pytest.approx(own["step_seconds"] * 7_000_000 * 64 / 3600)
    assert said["best"]["step_seconds"] == min(plan["step_seconds"] for plan in said["pareto"])
    assert main(["plan", G, "--nodes", "8"]) == 0
    text = capsys.readouterr().out
    assert f"{own['peak'] / 1e9:.2f}  of 72.0" in text
    # every 5,000th step, the newest three and every 100,000th; fp32 masters, two moments, one average
    assert f"{said['job']['total'] * 16 / 1e9:.1f} GB a checkpoint, at most 73 of them on disk: 19.3 TB" in text
    assert said["best"]["overrides"] in text
    assert own == said["best"], "the recipe is what its plan says is the best"
    # followed, the advice is what was promised
    other = plan_json(capsys, G, "parallel.expert=4", "train.accumulation=4", "--nodes", "8")
    assert other["best"] == own and other["recipe"]["step_seconds"] > own["step_seconds"]
    assert plan_json(capsys, G, *other["best"]["overrides"].split(), "--nodes", "8")["recipe"] == own
    # also from a recipe that is cut
    cut = plan_json(capsys, G, "parallel.tensor=2", "--nodes", "8")
    assert (cut["recipe"]["tensor"], cut["recipe"]["micro"], cut["best"]["tensor"]) == (2, 32, 1)
    assert "parallel.tensor=2" in cut["recipe"]["overrides"] and "parallel.tensor" not in own["overrides"]
    assert plan_json(capsys, G, "parallel.tensor=2", *cut["best"]["overrides"].split(), "--nodes", "8")["recipe"]["peak"] == own["peak"]


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_load_and_say_what_their_plan_says(recipe):
    """docs/plan_recipes.py renews headers that are out of date."""
    text = recipe.read_text()
    if recipe.stem in DEMOS:
        assert main(["plan", str(recipe), "--gpus-per-node", "2", "--comment"]) == 0
        return
    assert f"# ditmoe plan recipes/{recipe.name} " in text and "DOES NOT FIT" not in text
    assert text == renewed(text.replace("GB of", "of")) == renewed(text)


def test_a_plan_of_a_small_model_is_legible(capsys):
    """Millions of images a second, in steps of less than a millisecond."""
    assert main(["plan", str(ROOT / "recipes" / "digits.yaml"), "--nodes", "16", "train.global_batch=4096"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.split()[:1] == ["stage"])
    rows = [line.split() for line in lines[header + 1 : lines.index("", header)]]
    assert max(float(row[9].replace(",", "")) for row in rows) >= 1e6, "of seven digits"
    assert {len(row) for row in rows} == {11} and all(float(row[8]) > 0 and float(row[10].replace(",", "")) > 0 for row in rows)
    assert not [line for line in lines if " 0.0 TFLOP" in line or " 0.0 days" in line or " 0 GPU-hours" in line]


def test_what_does_not_fit_is_told_with_what_would(capsys):
    assert main(["plan", G, "parallel.zero_stage=0", "parallel.expert=8", "--nodes", "1"]) == 0
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text
    assert "parallel.zero_stage=1" in text.splitlines()[-2]
    assert text.endswith("With it, the recipe fits.\n")
    assert main(["plan", G, "parallel.expert=8", "--nodes", "1", "--gpu-memory", "8"]) == 0
    assert "Nothing fits." in capsys.readouterr().out
    across = ["parallel.tensor=2", "parallel.expert=1", "train.global_batch=3", "--nodes", "2", "--gpus-per-node", "1"]
    assert main(["plan", "recipes/digits.yaml", *across]) == 0
    assert capsys.readouterr().out.endswith("Nothing to search: train.global_batch=3 does not divide by 2 GPUs.\n")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpu", "h1000"], "--gpu='h1000': choose one of a100-40gb"),
        (["--nodes", "3", "parallel.expert=8"], "train.global_batch=1024: must divide by 24 processes x 1"),
        (["--nodes", "0"], "--nodes=0"),
        (["--mfu", "40"], "--mfu=40.0: is a share, above 0 and at most 1"),
        (["--margin", "1"], "--margin=1.0: is a share, from 0 to below 1"),
        (["--gpu-memory", "nan"], "--gpu-memory=nan: must be a number above 0"),
        (["--gpu-memory", "inf"], "--gpu-memory=inf: must be a number above 0"),
        (["--gpu-memory", "-1"], "--gpu-memory=-1.0: must be a number above 0"),
        (["parallel.expert=3"], "parallel.expert=3: must divide the 16 experts"),
        (["parallel.tensor=3"], "parallel.tensor=3: must divide 8 processes, 16 heads"),
        (["parallel.tensor=2", "parallel.expert=8"], "parallel.expert=8: must divide the 16 experts and the 4 tensor-parallel groups"),
        (
            ["parallel.tensor=4", "parallel.expert=2", "train.global_batch=3"],
            "train.global_batch=3: must divide by 2 tensor-parallel groups",
        ),
        (["model.name=DiT-MoE-Q/2-4E2A"], "model.name="),
        (["--image-size", "100"], "--image-size=100: must divide by 16"),
        (["parallel.deepspeed=ds_configs/zero3_offload.json"], "parallel.deepspeed="),
        (["train.mask_ratio=0.9"], "train.mask_ratio=0.9"),
    ],
)
def test_mistakes(capsys, arguments, told):
    assert main(["plan", G, *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")


def test_latents_that_are_here_decide(capsys, tmp_path):
    data = write_latents(tmp_path / "latents", train=8)
    said = plan_json(capsys, "recipes/digits.yaml", f"data.manifest={data}", "--gpus-per-node", "2")
    shape = json.loads(Path(data, "manifest.json").read_text())
    assert said["job"]["model"]["num_classes"] == len(shape["class_names"])
    shutil.rmtree(data)
    assert plan_json(capsys, "recipes/digits.yaml", f"data.manifest={data}", "--gpus-per-node", "2")["job"]["patches"] == 256


def test_data_that_the_trainer_refuses_are_not_planned(capsys, tmp_path):
    odd = write_latents(tmp_path / "odd", train=8, shape=(4, 9, 9))
    for command in (["plan", "recipes/digits.yaml", f"data.manifest={odd}"], ["plan", "recipes/emoji.yaml", f"data.manifest={odd}"]):
        assert main([*command, "--gpus-per-node", "2"]) == 2
    said = capsys.readouterr().err
    assert "latents of 9x9, the model patches of 2" in said and said.count("error:") == 2


def test_starting_weights_are_planned_as_the_network_that_they_are(capsys, tmp_path):
    gelu = replace(SPARSE, shared=0, expert_activation="gelu", expert_hidden=48)
    weights = write_weights(tmp_path / "weights", random_weights(gelu)[1])
    settings = ["model.name=null", f"model.weights={weights}", "data.manifest=none", f"run_dir={tmp_path}/run"]
    said = plan_json(capsys, "recipes/digits.yaml", *settings, "--gpus-per-node", "2")
    assert said["job"]["model"]["expert_hidden"] == 48


def test_a_run_that_goes_on_is_planned_on_other_processes(capsys, tmp_path):
    """As the trainer cuts the batch then."""
    recipe = read_recipe(["recipes/digits.yaml", "train.global_batch=32", "train.accumulation=4", f"run_dir={tmp_path}"])
    index = dict(format=FORMAT, recipe=json.loads(json.dumps(asdict(recipe))), processes=8)
    checkpoint = tmp_path / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "index.json").write_text(json.dumps(index))
    (checkpoint.parent / "latest").write_text(checkpoint.name)
    settings = ["train.global_batch=32", "train.accumulation=4", "parallel.expert=1", f"run_dir={tmp_path}"]
    for gpus, micro in ((16, 1), (4, 1), (8, 1)):
        own = plan_json(capsys, "recipes/digits.yaml", *settings, "--gpus-per-node", str(gpus))["recipe"]
        assert own["micro"] == micro
    alone = plan_json(capsys, "recipes/digits.yaml", *settings[:-1], f"run_dir={tmp_path}/new", "--gpus-per-node", "4")
    assert alone["recipe"]["micro"] == 2


def test_other_stages_may_be_without_settings(capsys, tmp_path):
    (tmp_path / "zero3.json").write_text((ROOT / "ds_configs" / "zero3.json").read_text())
    settings = [f"parallel.deepspeed={tmp_path}/zero{{zero_stage}}.json", "parallel.zero_stage=3"]
    assert main(["plan", "recipes/digits.yaml", *settings, "--gpus-per-node", "2"]) == 0
    assert main(["plan", "recipes/digits.yaml", *settings[:1], "parallel.zero_stage=1", "--gpus-per-node", "2"]) == 2
    assert "zero1.json" in capsys.readouterr().err


def test_devices_by_their_drivers_name():
    names = ["NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "Tesla T4"]
    assert [peak_tflops(name) for name in names] == [756, 989, 312, None]
