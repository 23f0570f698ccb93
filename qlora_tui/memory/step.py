"""One training step: each kind of layer is replayed once, then the peak is searched over the whole step.

In layer ``l`` the bytes alive are those that earlier layers keep, the gradients of later layers, and the
layer's own. The first two are sums over layers, so one replay of each kind is enough. A step traced on the
meta device (``engine/trace_worker.py``) can take the place of the replayed one.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from qlora_tui.memory.allocator import Recording, build_phase, without_input_gradient
from qlora_tui.memory.autograd import (
    ActivationCheckpoint,
    AllocationMeter,
    Grads,
    Node,
    Storage,
    Tensor,
    backward,
)
from qlora_tui.memory.execution import (
    ADAPTER_ITEMSIZE,
    LOSS_BLOCK_ROWS,
    LOSS_CHUNK_ROWS,
    ExecutionConfig,
    liger_rows,
)
from qlora_tui.memory.layers import DecoderLayer, Layout, norm, run_block
from qlora_tui.memory.ops import FLOAT, Ops
from qlora_tui.memory.static_memory import adapter_bytes, optimizer_step_bytes
from qlora_tui.memory.weights import round_to_block

ANSWER_TOKENS = 48
"""Most tokens of an answer to a general prompt, for the forgetting curve."""
PROMPT_TOKENS = 64
"""Tokens that the longest general prompt takes at most, with what most chat templates put around it."""

Items = dict[str, int]


@dataclass
class PartProfile:
    """Memory of one part of the step."""

    retained: Items = field(default_factory=dict)
    """Bytes between its forward and its backward."""
    forward: Items = field(default_factory=dict)
    """Bytes at the peak of its forward, including its input."""
    backward: Items = field(default_factory=dict)
    """Bytes at the peak of its backward, including its input."""
    held: Items = field(default_factory=dict)
    """Bytes still alive after its backward, because the caller or a node of the graph refers to them."""
    keeps_input: bool = True
    """Whether an operation in it saves its input."""
    gradient_bytes: int = 0
    """Gradient bytes of its parameters, after its backward."""
    recording: Recording = field(default_factory=Recording)


@dataclass(frozen=True)
class StepProfile:
    """The parts of a step, each replayed once."""

    layers: tuple[PartProfile, ...]
    """Layers in order; equal layers are the same object."""
    head: PartProfile
    """Final norm, output head and loss."""


Phase = Literal["loading", "forward", "loss", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("loading", "forward", "loss", "backward", "optimizer")


@dataclass(frozen=True)
class Moment:
    """Memory at one time: in a step, of what is not there all the time, or of the whole process."""

    phase: Phase
    name: str
    """``forward of layer 0``, ``loss forward``, ``loss backward``, ``backward of layer 31``,
    ``backward of the embedding``, ``optimizer step``, ``loading``."""
    items: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.items.values())


def step_moments(step_profile: StepProfile, layout: Layout, *, every_layer: bool = False) -> list[Moment]:
    """Return the moments that may be the peak, in order of time, without what is there all the time.

    With ``every_layer`` there is one for the forward of each layer, not only of the first and the last.
    """
    moments = peak_candidates(step_profile, layout, every_layer=every_layer)
    # Accumulated gradients are there all the time.
    optimizer = {
        "gradients": 0 if layout.execution.accumulates else adapter_bytes(layout),
        "optimizer_step": optimizer_step_bytes(layout),
    }
    return [*moments, Moment("optimizer", "optimizer step", optimizer)]


def answers_moment(layout: Layout) -> Moment:
    """Return the moment when all general prompts are being answered, for the forgetting curve.

    They are answered together, between two steps and without gradients, so what counts are their keys and
    values. Comparing the answers takes less than a step of the same tokens.
    """
    execution = layout.execution
    tokens = execution.general_prompts * (PROMPT_TOKENS + ANSWER_TOKENS)
    widths = (b.heads.kv_heads * (b.heads.head_dim + b.heads.value_dim) for b in layout.blocks)
    items = {"kv_cache": tokens * sum(widths) * execution.compute_itemsize}
    return Moment("optimizer", "answers to general prompts", items)


def peak_candidates(step_profile: StepProfile, layout: Layout, *, every_layer: bool = False) -> list[Moment]:
    """Return every moment of forward and backward that may be the peak, in order of time."""
    execution = layout.execution
    order, head, last = step_profile.layers, step_profile.head, len(step_profile.layers) - 1
    persistent = Counter(
        adapter=sum(adapter_copies(layout)),
        # One more than that of the layer at work: on its way to or from the host.
        checkpoints=layer_input_bytes(layout) if execution.offloads_inputs else 0,
    )
    cast = _autocast_copies(layout)
    before = Counter(persistent)
    candidates: list[Moment] = []
    below: list[Counter[str]] = []
    for index, profile in enumerate(order):
        below.append(Counter(before))
        if every_layer or index in (0, last):
            items = before + cast + Counter(profile.forward)
            candidates.append(Moment("forward", f"forward of layer {index}", dict(items)))
        before.update(profile.retained)
        if not index:
            # The embedding's output requires gradients, so the graph holds it as a leaf even where the first
            # layer does not; where something is added to it, it is always separate.
            if layout.modifies_embedding or not profile.keeps_input:
                before["activations"] += _embedded_bytes(layout)
            before["activations"] += layout.tokens * layout.token_rows  # trained row index of each token
    candidates.append(Moment("loss", "loss forward", dict(before + cast + Counter(head.forward))))
    candidates.append(Moment("loss", "loss backward", dict(before + Counter(head.backward))))
    held = Counter(head.held)
    gradients = 0 if execution.accumulates else layout.token_rows * layout.hidden * ADAPTER_ITEMSIZE
    for index in range(last, -1, -1):
        profile = order[index]
        items = below[index] + held + Counter(profile.backward) + Counter(gradients=gradients)
        candidates.append(Moment("backward", f"backward of layer {index}", dict(items)))
        gradients += profile.gradient_bytes
        held.update(profile.held)
    if layout.trained_matrix:
        items = persistent + held + Counter(gradients=gradients) + _embedding_gradient(layout)
        candidates.append(Moment("backward", "backward of the embedding", dict(items)))
    return candidates


def _embedding_gradient(layout: Layout) -> Counter[str]:
    """Return the bytes of the backward of a trained embedding (``training/embeddings.py``): the
    gradients of the rows as looked up, in fp32, sorted and summed, and a matrix where there is none yet."""
    execution = layout.execution
    looked_up = layout.tokens * layout.hidden * (execution.compute_itemsize + 3 * ADAPTER_ITEMSIZE)
    is_first = layout.own_head and not execution.accumulates
    matrix = layout.trained_matrix * ADAPTER_ITEMSIZE if is_first else 0
    return Counter(activations=looked_up, gradients=matrix)


def _autocast_copies(layout: Layout) -> Counter[str]:
    """Return the bytes of autocast's copies of trained float32 weights, kept until the loss is computed.

    A LoRA projection fused into one function casts separately and keeps nothing.
    """
    execution = layout.execution
    casts = execution.autocast and execution.compute_itemsize != ADAPTER_ITEMSIZE
    if not casts or execution.own_fused:
        return Counter()
    return Counter(adapter=layout.adapter_parameters * execution.compute_itemsize)


def _embedded_bytes(layout: Layout) -> int:
    """Return the bytes of the embedding's output, and of the mask of GPT-2's dropout on it."""
    execution = layout.execution
    numel, itemsize = layout.tokens * layout.hidden, execution.residual_itemsize
    mask = numel * (1 if execution.device == "cuda" else itemsize) if layout.embedding_dropout else 0
    return numel * itemsize + mask


def layer_input_bytes(layout: Layout) -> int:
    """Return the bytes of the hidden states between two layers."""
    execution = layout.execution
    return layout.tokens * layout.hidden * execution.residual_itemsize


def adapter_copies(layout: Layout) -> list[int]:
    """Return the bytes of each of our copies of the LoRA weights in the compute dtype
    (``training/fused/lora.py``)."""
    execution = layout.execution
    if not execution.own_fused or execution.compute_itemsize >= ADAPTER_ITEMSIZE:
        return []
    return [round_to_block(count * execution.compute_itemsize) for count in layout.lora_tensors]


ForwardFn = Callable[[Ops, list[Tensor]], tuple[Tensor, list[Tensor]]]
"""Forward of a part. Its input comes in a list, so that the part itself can drop it."""


def profile_step(layout: Layout) -> StepProfile:
    """Replay each kind of layer once, and the head."""
    execution = layout.execution
    profiles: dict[tuple[int, bool], PartProfile] = {}
    layers = []
    first_kept = len(layout.blocks) - execution.kept_layers
    for index, block in enumerate(layout.blocks):
        checkpointed = execution.checkpointing and index < first_kept
        key = (id(block), checkpointed)
        if key not in profiles:
            run = partial(_layer, block=block)
            profiles[key] = _profile(layout, run, checkpointed=checkpointed)
        layers.append(profiles[key])
    tail = partial(_tail, layout=layout)
    return StepProfile(tuple(layers), _profile(layout, tail, checkpointed=False))


def _layer(ops: Ops, inputs: list[Tensor], *, block: DecoderLayer) -> tuple[Tensor, list[Tensor]]:
    return run_block(ops, block, inputs[0]), []


def _tail(ops: Ops, inputs: list[Tensor], *, layout: Layout) -> tuple[Tensor, list[Tensor]]:
    """Replay final norm, head and loss. The last layer's output is freed after the norm."""
    normed = norm(ops, layout.blocks[-1], inputs[0])
    inputs.clear()
    return _head_and_loss(ops, layout, normed)


def _profile(layout: Layout, run: ForwardFn, *, checkpointed: bool) -> PartProfile:
    """Replay one part."""
    execution = layout.execution
    meter = AllocationMeter()
    ops = Ops(meter, execution, tokens=layout.tokens, dropout=layout.recipe.lora.dropout)
    profile = PartProfile()
    upstream = Node(0, "upstream", (), lambda grad, saved: ())
    x = ops.new(layout.tokens * layout.hidden, ops.residual, "checkpoints" if checkpointed else None)
    x.node = upstream
    input_storage = weakref.ref(x.storage)
    recording = profile.recording
    recording.enters, begins = x.storage.number, len(meter.events)
    meter.restart()
    inputs = [x]
    if checkpointed:
        ops.tape.mode = ("first", ActivationCheckpoint(partial(_recompute, run, ops, x)))
        if execution.reentrant:
            inputs = [x.view(upstream)]
    del x
    result, held = run(ops, inputs)
    ops.tape.mode = ("keep", None)
    profile.forward = dict(meter.peak_items)
    node, numel, itemsize = result.node, result.numel, result.itemsize
    assert node is not None
    recording.leaves = result.storage.number
    del result
    if checkpointed and execution.reentrant:
        del node
        recording.forward = build_phase(meter.events[begins:], recording.leaves)
        _reentrant_backward(ops, run, inputs, profile, numel, itemsize, execution)
        return profile
    inputs.clear()
    recording.forward = build_phase(meter.events[begins:], recording.leaves)
    profile.retained = {item: size for item, size in meter.live_items.items() if size}
    if checkpointed and execution.offloads_inputs:
        profile.retained.pop("checkpoints", None)
    profile.keeps_input = input_storage() is not None
    meter.restart()
    seed = [ops.new(numel, itemsize)]
    recording.seed, begins = seed[0].storage.number, len(meter.events)
    retained: list[Storage] = []
    backward(ops.tape, node, seed.pop(), None if execution.accumulates else retained)
    recording.gradient = without_input_gradient(meter.events)
    recording.backward = build_phase(meter.events[begins:], recording.gradient)
    profile.backward = dict(meter.peak_items)
    profile.gradient_bytes = sum(storage.size for storage in set(retained))
    retained.clear()
    profile.held = {item: size for item, size in meter.live_items.items() if size}
    del held
    return profile


def _reentrant_backward(
    ops: Ops,
    run: ForwardFn,
    inputs: list[Tensor],
    profile: PartProfile,
    numel: int,
    itemsize: int,
    execution: ExecutionConfig,
) -> None:
    """Replay ``CheckpointFunction.backward``: the whole layer with its graph, then its backward.

    Its locals hold the incoming gradient and the layer's output until it returns.
    """
    x = inputs[0]
    profile.retained = {x.storage.item: x.storage.size}
    ops.meter.restart()
    gradient = ops.new(numel, itemsize)
    profile.recording.seed, begins = gradient.storage.number, len(ops.meter.events)
    result, held = run(ops, [x])
    retained: list[Storage] = []
    assert result.node is not None
    backward(ops.tape, result.node, gradient, None if execution.accumulates else retained)
    profile.backward = dict(ops.meter.peak_items)
    profile.gradient_bytes = sum(storage.size for storage in set(retained))
    input_gradient = without_input_gradient(ops.meter.events)
    del held, result, gradient, x
    inputs.clear()
    profile.recording.gradient = input_gradient
    profile.recording.backward = build_phase(ops.meter.events[begins:], input_gradient)


def _recompute(run: ForwardFn, ops: Ops, x: Tensor) -> Tensor:
    return run(ops, [x])[0]


def _head_and_loss(ops: Ops, layout: Layout, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Replay head and loss; return the scalar loss, and what is held after its backward: logits that the
    caller refers to, and the gradient of a trained head."""
    execution = layout.execution
    if execution.loss == "chunked":
        return _chunked(ops, layout, hidden)
    if execution.loss == "liger":
        return _liger(ops, layout, hidden), []
    logits = _logits(ops, layout, hidden)
    with ops.meter.attribute_to("logits"):
        wide = ops.cast(logits, FLOAT)
        if execution.loss_code == "rebound":
            logits = wide
        if execution.loss_code == "padded":
            source = wide
        else:  # logits[..., :-1, :].contiguous()
            source = ops.copy(ops.slice(wide, wide.numel - layout.rows * layout.vocabulary))
        # log-softmax, which both steps save, and the gradients of both: three tensors at the peak.
        likely = ops.apply(source, numel=source.numel, itemsize=source.itemsize, saves_result=True)
        loss = ops.apply(likely, numel=1, itemsize=FLOAT, save=(likely,))
    return loss, [logits] if execution.logits_alive_in_backward else []


def _logits(ops: Ops, layout: Layout, hidden: Tensor) -> Tensor:
    """Replay ``lm_head(hidden)`` and the family's operations on the logits."""
    weight = None
    if ops.autocast:
        if ops.residual != ops.compute:  # a weight in float32, which the product saves in autocast's dtype
            weight = ops.new(layout.vocabulary * layout.hidden, ops.compute, "head")
        hidden = ops.cast(hidden, ops.compute)
    numel, itemsize = layout.tokens * layout.vocabulary, hidden.itemsize
    with ops.meter.attribute_to("logits"):
        logits = ops.apply(hidden, numel=numel, itemsize=itemsize, save=(weight,))
        if layout.logit_scale:
            logits = ops.times_number(logits)
        if layout.softcap:
            logits = ops.times_number(logits)
            logits = ops.activation(logits, "tanh")
            logits = ops.times_number(logits)
    return logits


def _chunked(ops: Ops, layout: Layout, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Replay our loss (``training/loss.py``), with every token in the loss: the worst case.

    The positions in the loss are copied out; their gradient is computed one chunk of logits at a time, in
    place. The gradient of a trained head is held after the backward unless it is added to that of earlier
    micro-steps.
    """
    execution = layout.execution
    itemsize, numel, item = ops.residual, hidden.numel, "hidden_gradient"
    rows = min(LOSS_CHUNK_ROWS, layout.tokens)
    gradient_itemsize = FLOAT if execution.float16 else itemsize

    def scaled(grad: Tensor, saved: list[Tensor | None]) -> Grads:
        gradient = ops.new(numel, gradient_itemsize)
        return (ops.cast_gradient(gradient, itemsize),)

    with ops.meter.attribute_to(item):
        states = _states_in_loss(ops, hidden)
        hidden_gradient = ops.new(numel, gradient_itemsize)
        row_gradients = ops.new(layout.token_rows * layout.hidden, FLOAT)
    with ops.meter.attribute_to("gradients"):
        matrix_gradient = ops.new(layout.trained_matrix, FLOAT)
    with ops.meter.attribute_to("logits"):
        narrow = ops.new(layout.trained_matrix, itemsize) if itemsize != FLOAT else None
        values = ops.new(layout.token_rows * layout.hidden, itemsize) if itemsize != FLOAT else None
        logits = ops.new(rows * layout.vocabulary, itemsize)
        own = ops.new(rows * layout.token_rows, FLOAT)
        block = min(LOSS_BLOCK_ROWS[execution.device], rows) * layout.vocabulary
        _logits_gradient(ops, layout, block, itemsize)
        product = ops.new(rows * layout.hidden, itemsize)
        del product, own, logits, values, narrow
    with ops.meter.attribute_to(item):
        node = ops.tape.node((states,), scaled, (hidden_gradient, row_gradients, matrix_gradient))
    loss = ops.new(1, FLOAT)
    loss.node = node
    return loss, [matrix_gradient] if layout.trained_matrix and not execution.accumulates else []


def _states_in_loss(ops: Ops, hidden: Tensor) -> Tensor:
    """Replay the selection of the hidden states at the positions in the loss, as a copy; the gradient of a
    masked index is a full tensor of zeros with the rows filled in."""
    return ops.linear_map(ops.slice(hidden, hidden.numel), hidden.numel)


def _logits_gradient(ops: Ops, layout: Layout, numel: int, itemsize: int) -> None:
    """Replay the gradient of a block of logits, in float32 like all intermediate values."""
    logits, capped = ops.new(numel, FLOAT) if itemsize != FLOAT else None, None
    if layout.logit_scale:
        logits = ops.new(numel, FLOAT)
    if layout.softcap:
        capped = ops.new(numel, FLOAT)
        logits = ops.new(numel, FLOAT)
    likely = ops.new(numel, FLOAT)
    del logits, capped, likely


def _liger(ops: Ops, layout: Layout, hidden: Tensor) -> Tensor:
    """Replay Liger's fused linear cross-entropy: chunks of ``tokens / ceil(vocabulary / hidden)`` rows.

    Our trainer passes it the positions in the loss: in the worst case, all of them.
    """
    rows = liger_rows(layout.tokens, layout.hidden, layout.vocabulary)
    with ops.meter.attribute_to("hidden_gradient"):
        states = _states_in_loss(ops, hidden)
        if layout.logit_scale:
            states = ops.times_number(states)
        hidden_gradient = ops.new(hidden.numel, ops.residual)
    with ops.meter.attribute_to("logits"):
        logits = ops.new(rows * layout.vocabulary, ops.residual)
        del logits
    # Multiplied by the gradient of the loss in place (element_mul_kernel).
    return ops.apply(
        states, numel=1, itemsize=FLOAT, backward=lambda grad, saved: (saved[0],), save=(hidden_gradient,)
    )
