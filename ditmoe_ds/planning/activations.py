"""What a rank's forward keeps for its backward, tensor by tensor, of the computation in ``models.dit`` and ``moe`` with fused attention."""

from dataclasses import dataclass, field

from ditmoe_ds.models.dit import DiTConfig, Recompute
from ditmoe_ds.moe.routing import expert_choice_capacity, token_choice_capacity


@dataclass(frozen=True)
class MicroBatch:
    """What a rank computes at once."""

    model: DiTConfig
    images: int
    patches: int
    """Patches of an image that the network sees."""
    text: int
    """Tokens of a caption; 0 for models without."""
    ep: int
    size: int
    """Bytes of an activation's element: 2 in bf16, 4 in fp32."""
    cuda: bool = True
    """Whether it is a GPU, which multiplies the rows of all experts at once, and on which kernels of our own keep less than torch's
    operators."""
    tensor: int = 1
    """Ranks that divide heads and hidden units by tensor parallelism; each has their inputs and outputs whole."""

    @property
    def tokens(self) -> int:
        return self.images * self.patches

    def rows(self, layer: int) -> int:
        """Takings (one expert, one token) of this rank's tokens in a layer with experts. Evenly loaded, its experts process as many."""
        model, capacity = self.model, self.model.capacity(layer)
        if model.routing == "expert":
            pools, pool = (1, self.tokens) if model.router.pool == "microbatch" else (self.images, self.patches)
            return pools * model.experts * expert_choice_capacity(pool, model.experts, capacity.as_integer_ratio())
        if model.router.capacity_factor is not None:
            return model.experts * token_choice_capacity(self.tokens, model.experts, capacity * model.router.capacity_factor)
        return round(self.tokens * capacity)


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank."""

    kept: float
    """From forward to backward."""
    recomputed: float
    """What the one block that backward is computing again keeps; 0 without recomputation."""
    working: float
    """The most that backward's gradients and temporaries take beside these."""
    exchange: float
    """The part of ``working`` that the all-to-all sends and receives."""
    parts: dict[str, float] = field(default_factory=dict)
    """``kept`` and ``recomputed`` by part of the network."""

    @property
    def peak(self) -> float:
        return self.kept + self.recomputed + self.working


def activations(batch: MicroBatch, recompute: Recompute) -> Activations:
    """Of one micro-batch. Of what is recomputed only each block's input is kept, and one block at a time is whole again."""
    model = batch.model
    layers = [block(batch, layer) for layer in range(model.depth)]
    outside = _outside(batch)
    names = ("attention", "text", "norm", "shared", "experts", "feed-forward")
    again = names if recompute is True else ("attention", "text", "norm") if recompute else ()
    parts = {name: sum(layer.get(name, 0) for layer in layers) for name in names if name not in again}
    recomputed, inputs = 0.0, batch.size * batch.tokens * model.hidden
    if again:
        parts["inputs of blocks"] = float(model.depth * inputs)
        fullest = max(([layer.get(name, 0) for name in again] for layer in layers), key=sum)
        whole = {f"one block's {name}": amount for name, amount in zip(again, fullest, strict=True)}
        whole["one block's attention"] -= inputs
        recomputed = sum(whole.values())
    kept = sum(parts.values())
    if again:
        parts |= whole
    parts = {name: amount for name, amount in parts.items() if amount} | {"outside of blocks": outside}
    working = _working(batch)
    if recompute == "attention":  # after the feed-forward's backward; it has gradients of q, k, v and qkv
        working = max(working - recomputed, 7.0 * inputs)
    exchange = 2 * batch.size * model.hidden * max(map(batch.rows, model.routed_layers), default=0) if batch.ep > 1 else 0
    return Activations(kept + outside, recomputed, working, exchange, parts)


def block(batch: MicroBatch, layer: int) -> dict[str, float]:
    """Bytes that one block keeps, by part: terms with ``size`` are in the activations' dtype, plain numbers of bytes are fp32."""
    model, size, tensor = batch.model, batch.size, batch.tensor
    D, head = model.hidden, model.hidden // model.heads
    kv = head * (model.kv_heads or model.heads)
    made = model.qk_norm or model.positions == "rope"  # q and k are tensors of their own
    # of heads: qkv, q and k, attention's output; x, qkv's input, the projection's output are whole, and so is the norm on a CPU
    heads = size * ((D + 2 * kv) + made * (D + kv) + D) + 4 * model.heads
    moments = 0 if batch.cuda else 8 * model.qk_norm  # mean and deviation of a head
    heads += moments * (model.heads + kv // head)
    attention = size * (3 if batch.cuda else 4) * D + 8 + heads / tensor
    parts: dict[str, float] = {"attention": batch.tokens * attention + size * batch.images * (8 * D + model.condition_width)}
    if batch.text:
        # of heads: q, q normed, the output; k and v, k normed; x and its norm are whole
        per_patch = size * (2 + model.qk_norm) * D + 4 * model.heads + moments * model.heads
        per_text = size * (2 + model.qk_norm) * D + moments * model.heads
        parts["text"] = batch.tokens * (size * 2 * D + 8 + per_patch / tensor) + batch.images * batch.text * per_text / tensor
    decoupled = model.router.input == "decoupled" and layer in model.routed_layers
    normed = not (batch.cuda or decoupled)  # the norm before the feed-forward is kept beside x; where a router sees it, it is counted there
    parts["norm"] = batch.tokens * (size * (1 + normed) * D + 8)
    gated = size * (1 + decoupled) * D  # what the gate multiplies; that norm
    if layer not in model.routed_layers:
        return parts | {"feed-forward": batch.tokens * (gated + size * (D + 2 * model.mlp_width(layer) / tensor))}
    seen = D + decoupled * model.condition_width
    router = size * seen + (4 if batch.cuda else 8) * model.experts + 8  # its input; logits or scores in fp32, on a CPU both
    parts["feed-forward"] = batch.tokens * (gated + router)
    if model.shared:
        own_input = decoupled * D  # else the router keeps the same tensor
        within = (3 if batch.cuda else 4) * model.shared * D  # the first product, the second one's input; on a CPU silu(gate), too
        parts["shared"] = size * batch.tokens * (own_input + within / tensor)
    hidden = (2 if model.expert_activation == "swiglu" else 1) * model.expert_width / tensor
    # its row, first product, output; token, order, choice and weight
    taking = size * (2 * D + hidden) + 28
    if batch.ep > 1:
        taking += 16  # the order in which rows arrive and leave
    parts["experts"] = batch.rows(layer) * taking
    return parts


def _outside(batch: MicroBatch) -> float:
    """Embeddings, the final layer and the loss."""
    model, size = batch.model, batch.size
    pixels = batch.images * model.input_size**2
    loss = 4 * pixels * (4 * model.in_channels + 2 * model.out_channels)
    final = size * batch.tokens * (3 * model.hidden + model.patch**2 * model.out_channels)
    text = size * batch.images * batch.text * (model.text_width + 3 * model.hidden)
    rotation = 4 * model.hidden // model.heads * batch.patches * (model.positions == "rope")  # cosines and sines, for all blocks
    return loss + final + text + rotation + size * batch.images * 4 * model.condition_width


def _working(batch: MicroBatch) -> float:
    """The most that one block's backward takes beyond what was kept, which it frees as it goes."""
    model, size, D = batch.model, batch.size, batch.model.hidden
    width = max([4 * D, *map(model.mlp_width, range(model.depth))]) / batch.tensor
    hidden: float = size * batch.tokens * width
    edge = size * batch.tokens * D
    moments = [size * D * width + edge + hidden]  # of a dense feed-forward: the gradient of w2, and of what it multiplied
    if routed := model.routed_layers:
        rows, gated, experts = max(map(batch.rows, routed)), model.expert_activation == "swiglu", model.experts // batch.ep
        width = model.expert_width / batch.tensor
        matrix, edge = size * D * experts * width, size * rows * D
        hidden = size * rows * width / (1 if batch.cuda else experts)  # of what is computed at once
        # the gradient of outputs, weighted, on a CPU in fp32 and twice; on a CPU the activation again and its backward, with every step of
        # SwiGLU's; that activation with the gradient of w2; then, without it, those of both matrices and of the rows, when the outputs are
        # gone
        combined = edge if batch.cuda else 8 * rows * D + 4 * batch.tokens * D
        activation = 0 if batch.cuda else (6 if gated else 3) * hidden + (2 + gated) * matrix
        second = matrix + (2 + gated) * hidden
        both = (2 + gated) * matrix + edge + (1 + gated) * hidden
        moments = [combined, activation, second, both]
    return 3 * size * batch.tokens * D + max(moments)  # gradients of the residual stream and of two branches
