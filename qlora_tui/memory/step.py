"""One training step: each kind of layer is replayed once, then the peak is searched over the whole step.

In layer ``l`` the bytes alive are those that earlier layers keep, the gradients of later layers, and the
layer's own. The first two are sums over layers, so one replay of each kind is enough.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from qlora_tui.memory.allocation_trace import Recording, build_phase, without_input_gradient
from qlora_tui.memory.autograd import ActivationCheckpoint, AllocationMeter, Node, Storage, Tensor, backward
from qlora_tui.memory.decoder_layer import DecoderLayer, norm, run_block
from qlora_tui.memory.execution import ExecutionConfig
from qlora_tui.memory.layout import Layout
from qlora_tui.memory.loss import head_and_loss
from qlora_tui.memory.ops import Ops
from qlora_tui.memory.parameter_memory import round_to_block

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


@dataclass(frozen=True)
class Peak:
    """Peak of the step, beyond the static memory."""

    phase: str
    """Phase of the peak: ``forward of layer 0``, ``loss forward``, ``loss backward``,
    ``backward of layer 31``, ``backward of the embedding``, ``optimizer step``, ``loading``."""
    items: Items

    @property
    def total_bytes(self) -> int:
        return sum(self.items.values())


def make_ops(meter: AllocationMeter, layout: Layout, execution: ExecutionConfig, dropout: float) -> Ops:
    """Create the operations as this trainer code runs them."""
    return Ops(
        meter,
        compute=execution.compute_itemsize,
        weight=execution.compute_itemsize,
        adapter=execution.adapter_itemsize,
        device=execution.device,
        dropout=dropout,
        autocast=execution.autocast,
        tokens=layout.tokens,
        own_fused=execution.own_fused,
        triton=execution.triton,
        float16=execution.float16,
    )


def residual_itemsize(execution: ExecutionConfig) -> int:
    """Return the bytes per element of the residual stream: float32 once embeddings and norms were cast."""
    return 4 if execution.cast_to_float32 else execution.compute_itemsize


def profile_step(layout: Layout, execution: ExecutionConfig, dropout: float) -> StepProfile:
    """Replay each kind of layer once, and the head."""
    profiles: dict[tuple[int, bool], PartProfile] = {}
    layers = []
    itemsize = residual_itemsize(execution)
    first_kept = len(layout.blocks) - execution.kept_layers
    for index, block in enumerate(layout.blocks):
        checkpointed = execution.checkpointing and index < first_kept
        key = (id(block), checkpointed)
        if key not in profiles:
            run = partial(_layer, block=block)
            profiles[key] = _profile(layout, execution, dropout, run, itemsize, checkpointed=checkpointed)
        layers.append(profiles[key])
    tail = partial(_tail, layout=layout, execution=execution)
    return StepProfile(
        tuple(layers), _profile(layout, execution, dropout, tail, itemsize, checkpointed=False)
    )


def peak_candidates(
    step_profile: StepProfile, layout: Layout, execution: ExecutionConfig, *, every_layer: bool = False
) -> list[Peak]:
    """Return every candidate for the step's peak, in order of time; or ``every_layer``'s forward too."""
    embedded = _embedded(layout, execution)
    token_row_bytes = Counter(
        activations=layout.tokens * layout.token_rows
    )  # trained row index of each token
    if not execution.accumulates:
        token_row_bytes["gradients"] = layout.token_rows * layout.hidden * execution.adapter_itemsize
    return _candidates(
        step_profile,
        _autocast_copies(layout, execution),
        embedded,
        token_row_bytes,
        Counter(
            adapter=sum(adapter_copies(layout, execution)),
            # One more than that of the layer at work: on its way to or from the host.
            checkpoints=layer_input_bytes(layout, execution) if execution.offloads_inputs else 0,
        ),
        embedding_is_separate=layout.modifies_embedding,
        every_layer=every_layer,
        embedding_gradient=_embedding_gradient(layout, execution),
    )


def _embedding_gradient(layout: Layout, execution: ExecutionConfig) -> Items:
    """Return the bytes of the backward of a trained embedding (``training/trained_embeddings.py``): the
    gradients of the rows as looked up, in fp32, sorted and summed, and a matrix where there is none yet."""
    if not layout.trained_matrix:
        return {}
    looked_up = layout.tokens * layout.hidden * (execution.compute_itemsize + 3 * execution.adapter_itemsize)
    is_first = layout.own_head and not execution.accumulates
    matrix = layout.trained_matrix * execution.adapter_itemsize if is_first else 0
    return {"activations": looked_up, "gradients": matrix}


def layer_input_bytes(layout: Layout, execution: ExecutionConfig) -> int:
    """Return the bytes of the hidden states between two layers."""
    return layout.tokens * layout.hidden * residual_itemsize(execution)


def adapter_copies(layout: Layout, execution: ExecutionConfig) -> list[int]:
    """Return the bytes of each of our copies of the LoRA weights in the compute dtype
    (``training/fused/adapter_casts.py``)."""
    if not execution.own_fused or execution.compute_itemsize >= execution.adapter_itemsize:
        return []
    return [round_to_block(count * execution.compute_itemsize) for count in layout.lora_tensors]


def _embedded(layout: Layout, execution: ExecutionConfig) -> Items:
    """Return the bytes of the embedding's output, and of the mask of GPT-2's dropout on it."""
    numel = layout.tokens * layout.hidden
    itemsize = residual_itemsize(execution)
    mask = numel * (1 if execution.device == "cuda" else itemsize) if layout.embedding_dropout else 0
    return {"activations": numel * itemsize + mask}


ForwardFn = Callable[[Ops, list[Tensor]], tuple[Tensor, list[Tensor]]]
"""Forward of a part. Its input comes in a list, so that the part itself can drop it."""


def _layer(ops: Ops, inputs: list[Tensor], *, block: DecoderLayer) -> tuple[Tensor, list[Tensor]]:
    return run_block(ops, block, inputs[0]), []


def _tail(
    ops: Ops, inputs: list[Tensor], *, layout: Layout, execution: ExecutionConfig
) -> tuple[Tensor, list[Tensor]]:
    """Replay final norm, head and loss. The last layer's output is freed after the norm."""
    normed = norm(ops, layout.blocks[-1], inputs[0])
    inputs.clear()
    return head_and_loss(ops, layout, execution, normed, residual_itemsize(execution))


def _profile(
    layout: Layout,
    execution: ExecutionConfig,
    dropout: float,
    run: ForwardFn,
    itemsize: int,
    *,
    checkpointed: bool,
) -> PartProfile:
    """Replay one part; ``itemsize`` is that of its input."""
    meter = AllocationMeter()
    ops = make_ops(meter, layout, execution, dropout)
    profile = PartProfile()
    upstream = Node(0, "upstream", (), _no_gradients)
    x = ops.new(layout.tokens * layout.hidden, itemsize, "checkpoints" if checkpointed else None)
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


def _no_gradients(grad: Tensor, saved: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    return ()


def _autocast_copies(layout: Layout, execution: ExecutionConfig) -> Items:
    """Return the bytes of autocast's copies of trained float32 weights, kept until the loss is computed.

    A LoRA projection fused into one function casts separately and keeps nothing.
    """
    if (
        not execution.autocast
        or execution.own_fused
        or execution.adapter_itemsize == execution.compute_itemsize
    ):
        return {}
    return {"adapter": layout.adapter_parameters * execution.compute_itemsize}


def _candidates(
    step_profile: StepProfile,
    autocast_copies: Items,
    embedded: Items,
    token_row_bytes: Items,
    persistent: Counter[str],
    *,
    embedding_is_separate: bool,
    every_layer: bool,
    embedding_gradient: Items,
) -> list[Peak]:
    """Return every phase that may be the peak. ``persistent`` is there in all of them.

    ``embedded`` is the embedding's output: it requires gradients, so the graph holds it as a leaf even where
    the first layer does not. Where something is added to it, it is always separate. ``token_row_bytes`` are
    the bytes that trained rows of embedding and head keep from the start, and as gradients after the loss;
    ``embedding_gradient`` what the backward of a trained embedding takes.
    """
    order, head, last = step_profile.layers, step_profile.head, len(step_profile.layers) - 1
    before = Counter(persistent)
    cast = Counter(autocast_copies)
    candidates: list[Peak] = []
    below: list[Counter[str]] = []
    for index, profile in enumerate(order):
        below.append(Counter(before))
        if every_layer or index in (0, last):
            candidates.append(
                Peak(f"forward of layer {index}", dict(before + cast + Counter(profile.forward)))
            )
        before.update(profile.retained)
        if not index and (embedding_is_separate or not profile.keeps_input):
            before.update(embedded)
        if not index:
            before["activations"] += token_row_bytes["activations"]
    candidates.append(Peak("loss forward", dict(before + cast + Counter(head.forward))))
    candidates.append(Peak("loss backward", dict(before + Counter(head.backward))))
    held = Counter(head.held)
    gradients = token_row_bytes["gradients"]
    for index in range(last, -1, -1):
        profile = order[index]
        items = below[index] + held + Counter(profile.backward) + Counter(gradients=gradients)
        candidates.append(Peak(f"backward of layer {index}", dict(items)))
        gradients += profile.gradient_bytes
        held.update(profile.held)
    if embedding_gradient:
        items = Counter(persistent) + held + Counter(gradients=gradients) + Counter(embedding_gradient)
        candidates.append(Peak("backward of the embedding", dict(items)))
    return candidates
