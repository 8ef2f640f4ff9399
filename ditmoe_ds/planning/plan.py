"""One way to train on one cluster: its memory, traffic and time on a rank."""

from dataclasses import dataclass, field, replace
from functools import cached_property

from ditmoe_ds.distributed.memory import EXPERT_GROUP, Memory, touched, training_memory
from ditmoe_ds.models.sizes import expert_macs, macs, recomputed_macs, uncut_macs
from ditmoe_ds.planning.activations import Activations, MicroBatch, activations
from ditmoe_ds.planning.job import Assumptions, Cluster, Job, Layers, Shape, layers
from ditmoe_ds.planning.traffic import Traffic, step_traffic

ZERO3_HOOKS = 0.003
"""Seconds that a core needs for a layer's forward and backward (benchmarks/zero3_host.md)."""


@dataclass(frozen=True)
class Plan:
    """Its numbers are computed on demand, since a search asks for few of them."""

    job: Job
    cluster: Cluster
    shape: Shape
    assumptions: Assumptions = field(default_factory=Assumptions)
    cuda: bool = True

    @property
    def groups(self) -> int:
        """Number of tensor-parallel groups. Each has its own images, and over so many ranks ZeRO shards the state of a weight, or of a
        tensor-parallel part of it."""
        return self.cluster.world // self.shape.tensor

    @property
    def accumulation(self) -> int:
        return self.job.global_batch // (self.groups * self.shape.micro)

    @cached_property
    def _layers(self) -> Layers:
        return layers(self.job.model, self.shape.tensor)

    @property
    def batch(self) -> MicroBatch:
        job, shape, size = self.job, self.shape, 2 if self.job.precision == "bf16" else 4
        return MicroBatch(job.model, shape.micro, job.patches, job.text, shape.ep, size, self.cuda, shape.tensor)

    @cached_property
    def activations(self) -> Activations:
        return activations(self.batch, self.shape.recompute)

    @cached_property
    def _state(self) -> Memory:
        found, shape = self._layers, self.shape
        return training_memory(
            found.dense,
            found.experts,
            shape.stage,
            shape.ep,
            self.groups,
            self.job.precision,
            averages=self.job.averages,
            accumulation=self.accumulation,
            bucket=shape.bucket,
            whole=max(self.gradients) if shape.stage in (1, 2) else None,
            one_kernel=self._one_kernel,
        )

    @property
    def _one_kernel(self) -> bool:
        """Whether one kernel makes the optimizer's step (``distributed.adamw``)."""
        return self.cuda and self.shape.stage == 0 and self.job.precision == "bf16" and self.job.optimizer == "adamw"

    @cached_property
    def gradients(self) -> list[int]:
        """Elements that each of ``groups`` keeps whole at stages 1 and 2."""
        found, ep = self._layers, self.shape.ep
        experts = touched(tuple(size // ep for size in found.expert_tensors), self.groups // ep, EXPERT_GROUP)
        dense = touched(found.dense_tensors, self.groups)
        return [size + experts[rank // ep] for rank, size in enumerate(dense)]

    @cached_property
    def _peak(self) -> tuple[str, float, float, float, float]:
        """The fullest moment of a step, with its gradients, activations, temporaries, and what ZeRO-3 holds whole."""
        state, acts = self._state, self.activations
        everything = acts.kept + acts.recomputed
        always, layers = self._whole if self.shape.stage == 3 else (0.0, 0.0)
        moments = [("in the optimizer's step", state.step, 0.0, 0.0, always)]
        if self.shape.stage:
            # when the first bucket is full it is copied to be sent, and at stages 1 and 2 the rank that owns the last weights allocates its
            # part
            own = max(self.gradients) if self.shape.stage < 3 else 0
            sent = self.batch.size * (own + self.shape.bucket)
            moments.append(("in backward", state.backward - sent, everything, acts.working, always + layers))
            moments.append(("in backward", state.backward, everything - acts.kept * self._first_bucket, acts.working, always + layers))
        else:  # gradients, as large as the weights, appear as activations are freed, and are then copied to be all-reduced
            whole = state.weights
            moments.append(("in backward", whole if self.accumulation > 1 else 0.0, everything, acts.working, 0.0))
            moments.append(("in backward", whole, acts.recomputed or acts.kept / self.job.model.depth, acts.working, 0.0))
            moments.append(("as gradients travel", state.backward, 0.0, 0.0, 0.0))
        return max(moments, key=lambda moment: sum(moment[1:]))

    @property
    def _first_bucket(self) -> float:
        """Share of a rank's gradients that one bucket holds, which is sent before it is full if a tensor is larger."""
        found, ep = self._layers, self.shape.ep
        larger = max(*found.dense_layer, *(size / ep for size in found.expert_layer)) > self.shape.bucket
        return 0.0 if larger else min(self.shape.bucket / (found.dense + found.experts / ep), 1.0)

    @property
    def when(self) -> str:
        """The moment of the peak."""
        return self._peak[0]

    @cached_property
    def memory(self) -> dict[str, float]:
        """Bytes on a rank at the peak of a step, by part; they add up to ``peak``."""
        state, (when, gradients, activated, working, whole) = self._state, self._peak
        stepping, exchange = when == "in the optimizer's step", min(self.activations.exchange, working)
        return {
            "weights": state.weights,
            "gradients": state.gradients + (0 if stepping else gradients),
            "optimizer": state.master + state.moments + (gradients if stepping else 0),
            "EMA": state.averages,
            "ZeRO-3 live layers": whole,
            "text encoder": self.job.encoder,
            "activations": activated,
            "all-to-all buffers": exchange,
            "backward's temporaries": working - exchange,
        }

    @property
    def _whole(self) -> tuple[float, float]:
        """Bytes of what ZeRO-3 never shards; and of two layers, which it holds whole in forward and backward, as ``engine.build`` sets it
        up."""
        found, shape = self._layers, self.shape
        layer = sum(size for size in found.dense_layer if size > shape.persistent) + sum(found.expert_layer) / shape.ep
        return self.batch.size * self._persistent, self.batch.size * 2 * layer

    @property
    def _persistent(self) -> int:
        return sum(size for size in self._layers.dense_tensors if size <= self.shape.persistent)

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def usable(self) -> float:
        """Bytes of the GPU without the margin."""
        return self.cluster.gpu.memory * 1e9 * (1 - self.assumptions.margin)

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable

    @cached_property
    def traffic(self) -> list[Traffic]:
        found, shape, world = self._layers, self.shape, self.cluster.world
        weights: dict[str, float] = dict(dense=found.dense, experts=found.experts, whole=self._persistent)
        return step_traffic(self.batch, self.accumulation, shape.recompute, shape.stage, world, self.cluster.per_node, weights)

    @property
    def _images(self) -> float:
        """Images of a step, divided by the ranks."""
        return self.job.global_batch / self.cluster.world

    @property
    def flops(self) -> float:
        """A rank's share of a step, forward and backward, which is twice forward; 2 per multiply-accumulate."""
        return 6.0 * sum(macs(self.job.model, self.job.patches, self.job.text)) * self._images

    @property
    def recompute_flops(self) -> float:
        job = self.job
        return 2.0 * recomputed_macs(job.model, job.patches, job.text, self.shape.recompute) * self._images

    @property
    def empty_flops(self) -> float:
        """FLOPs of a rank's experts on empty places, under token choice with a capacity factor above 1; they do not count as progress."""
        model, layers = self.job.model, self.job.model.sparse_layers
        if model.routing != "token" or not layers:
            return 0.0
        filled = sum(map(self.batch.rows, layers)) / (self.batch.tokens * sum(map(model.capacity, layers)))
        times = 8.0 if self.shape.recompute is True else 6.0
        return times * expert_macs(model, self.job.patches) * max(filled - 1, 0.0) * self._images

    @property
    def alike_flops(self) -> float:
        """FLOPs beyond a rank's share for what tensor parallelism does not cut, so that every rank of a group computes it all; they do not
        count as progress."""
        job, times = self.job, 8.0 if self.shape.recompute is True else 6.0
        return times * uncut_macs(job.model, job.patches, job.text) * self._images * (self.shape.tensor - 1)

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Of one step, by part; they add up to ``step_seconds``."""
        gpu, assumed = self.cluster.gpu, self.assumptions
        peak = gpu.tflops * 1e12 * assumed.mfu * (1 if self.job.precision == "bf16" else 0.5)
        forward, compute = self.flops / 3 / peak, (self.flops + self.recompute_flops + self.empty_flops) / peak
        window = {"forward": forward, "backward": compute - forward, "last backward": (compute - forward) / self.accumulation, "alone": 0.0}
        waits = dict.fromkeys(window, 0.0)
        tokens = {"exchange tokens": 0.0, "sum tokens": 0.0}
        for flow in self.traffic:
            seconds = max(flow.in_node / gpu.node_bandwidth, flow.across / gpu.network_bandwidth) / 1e9 / assumed.link
            if flow.kind in tokens:
                tokens[flow.kind] += seconds
            else:
                waits[flow.phase] += seconds
        exposed = sum(max(0.0, waits[phase] - assumed.overlap * window[phase]) for phase in window)
        exchange, sums = tokens.values()
        alike = self.alike_flops / peak + self._alike_memory_seconds
        copies, optimizer = self._gradient_seconds, self._optimizer_seconds
        return dict(arithmetic=compute, alike=alike, exchange=exchange, sums=sums, zero=exposed, gradients=copies, optimizer=optimizer)

    @property
    def _memory_rate(self) -> float:
        """Bytes per second."""
        return self.cluster.gpu.memory_bandwidth * 1e9 * self.assumptions.link

    @property
    def _alike_memory_seconds(self) -> float:
        """An estimate for norms, gates and the like, which tensor parallelism does not cut, beyond the rank's share, which ``mfu`` covers.
        What they keep is written and read in forward and read in backward, and its gradient is written and read."""
        batch, tensor = self.batch, self.shape.tensor
        if tensor == 1:
            return 0.0
        kept = activations(batch, False).kept - activations(replace(batch, tensor=1), False).kept / tensor
        touched = 7 if self.shape.recompute is True else 5
        return touched * kept * self.accumulation / self._memory_rate

    @property
    def _gradient_seconds(self) -> float:
        """Time of the memory's traffic between a gradient's GEMM and the optimizer: gradients are added up over micro-batches, copied into
        a bucket, divided, and copied from there. The bytes are those of DeepSpeed's operators (``benchmarks/gradient_copies.md``)."""
        found, shape, again = self._layers, self.shape, self.accumulation - 1
        touched = 0.0
        for elements, ranks in ((found.dense, self.groups), (found.experts / shape.ep, self.groups / shape.ep)):
            times = {
                0: 3 * again + (6 if ranks > 1 else 0),
                1: 3 * again + 6 + 6 / ranks,
                2: (6 + 7 / ranks) * again + 6 + 6 / ranks,
                3: (6 + 5 / ranks) * again + 6 + 4 / ranks,
            }
            touched += times[shape.stage] * elements
        return touched * self.batch.size / self._memory_rate

    @property
    def _optimizer_seconds(self) -> float:
        """Time of the memory's traffic: gradients are read for their norm, made fp32 and clipped; masters, moments and averages are read
        and written; masters are copied to the weights. At stage 0 one kernel does all but the norm (``distributed.adamw``)."""
        found, shape, size = self._layers, self.shape, self.batch.size
        local = found.dense + found.experts / shape.ep if shape.stage == 0 else (found.dense + found.experts) / self.groups
        step, average = (28, 8) if self._one_kernel else ((size + 4) + 8 + 28 + (4 + size), 12)
        return local * (size + step + average * self.job.averages) / self._memory_rate

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def host_seconds(self) -> float:
        """Seconds of a step in ZeRO-3's Python hooks, on one core of the machine where they were measured; not in ``step_seconds``."""
        return ZERO3_HOOKS * self.job.model.depth * self.accumulation if self.shape.stage == 3 else 0.0

    @property
    def mfu(self) -> float:
        """MFU of the whole step; recomputing does not count as progress."""
        return self.flops / self.step_seconds / (self.cluster.gpu.tflops * 1e12)

    @property
    def images_per_second(self) -> float:
        return self.job.global_batch / self.step_seconds

    @property
    def days(self) -> float:
        return self.step_seconds * self.job.steps / 86400

    @property
    def gpu_hours(self) -> float:
        return self.days * 24 * self.cluster.world
