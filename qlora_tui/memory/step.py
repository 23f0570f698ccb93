"""One training step: each kind of layer walked once, then the peak found among all moments of the step.

What is alive in layer ``l`` is what the layers before it keep, what the layers after it left as
gradients, and the layer's own. The first two are sums over layers, so one walk a kind is enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from qlora_tui.memory.blocks import Block, run_block
from qlora_tui.memory.codepath import CodePath
from qlora_tui.memory.layout import Layout
from qlora_tui.memory.loss import head_and_loss
from qlora_tui.memory.ops import Ops
from qlora_tui.memory.tape import Checkpoint, Meter, Node, Storage, Tensor, backward

Items = dict[str, int]


@dataclass
class Profile:
    """What one part of the step costs by itself."""

    kept: Items = field(default_factory=dict)
    """After its forward, until its backward."""
    forward: Items = field(default_factory=dict)
    """At the peak of its forward, its input included."""
    backward: Items = field(default_factory=dict)
    """At the peak of its backward, its input included."""
    gradient_bytes: int = 0
    """Of the parameters in it, after its backward."""

    @property
    def kept_bytes(self) -> int:
        return sum(self.kept.values())


@dataclass(frozen=True)
class Peak:
    """The fullest moment of the step, beyond what is resident."""

    phase: str
    """Where it is: ``forward``, ``loss``, ``backward of layer 31``, ``optimizer step``."""
    items: Items

    @property
    def total_bytes(self) -> int:
        return sum(self.items.values())


def make_ops(meter: Meter, layout: Layout, path: CodePath, dropout: float) -> Ops:
    """Operations of this path."""
    return Ops(
        meter,
        compute=path.compute_bytes,
        weight=path.compute_bytes,
        adapter=path.adapter_bytes,
        device=path.device,
        dropout=dropout,
        autocast=path.autocast,
        tokens=layout.tokens,
    )


def stream_bytes(path: CodePath) -> int:
    """Width of the residual stream: float32 once embeddings or norms were cast."""
    return 4 if path.cast_to_float32 or path.norms_float32 else path.compute_bytes


def peaks(layout: Layout, path: CodePath, dropout: float) -> list[Peak]:
    """Every candidate for the step's peak, in order of time."""
    profiles: dict[int, Profile] = {}
    for block in layout.blocks:
        if id(block) not in profiles:
            profiles[id(block)] = _profile(
                layout, path, dropout, partial(_layer, block=block), checkpointed=path.checkpointing
            )
    head = _profile(layout, path, dropout, partial(_tail, layout=layout, path=path), checkpointed=False)
    order = [profiles[id(block)] for block in layout.blocks]
    return list(_candidates(order, head, path))


def _layer(ops: Ops, x: Tensor, *, block: Block) -> tuple[Tensor, list[Tensor]]:
    return run_block(ops, block, x), []


def _tail(ops: Ops, x: Tensor, *, layout: Layout, path: CodePath) -> tuple[Tensor, list[Tensor]]:
    """Final norm, head, loss."""
    block = layout.blocks[-1]
    if block.norm == "layer":
        normed = ops.layer_norm(x, weight=block.norm_width)
    else:
        normed = ops.rms_norm(x, weight=block.norm_width, scale_in_float=block.norm == "gemma")
    del x
    width = 4 if path.cast_to_float32 else path.compute_bytes
    return head_and_loss(ops, layout, path, normed, width)


def _profile(
    layout: Layout,
    path: CodePath,
    dropout: float,
    run: Callable[[Ops, Tensor], tuple[Tensor, list[Tensor]]],
    *,
    checkpointed: bool,
) -> Profile:
    meter = Meter()
    ops = make_ops(meter, layout, path, dropout)
    tape = ops.tape
    made = Profile()
    upstream = Node(0, "upstream", (), _nothing)
    x = ops.new(layout.tokens * layout.hidden, stream_bytes(path), "checkpoints" if checkpointed else None)
    x.node = upstream
    meter.restart()
    if checkpointed:
        tape.mode = ("first", Checkpoint(partial(_again, run, ops, x)))
    result, held = run(ops, x)
    tape.mode = ("keep", None)
    made.forward = dict(meter.peak_items)
    node, numel, width = result.node, result.numel, result.width
    assert node is not None
    del x, result
    made.kept = {item: size for item, size in meter.live_items.items() if size}
    meter.restart()
    seed = [ops.new(numel, width)]
    kept: list[Storage] = []
    backward(tape, node, seed.pop(), None if path.accumulates else kept)
    made.backward = dict(meter.peak_items)
    made.gradient_bytes = sum(storage.size for storage in kept)
    del held
    return made


def _again(run: Callable[[Ops, Tensor], tuple[Tensor, list[Tensor]]], ops: Ops, x: Tensor) -> Tensor:
    return run(ops, x)[0]


def _nothing(grad: Tensor, saved: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    return ()


def _candidates(order: list[Profile], head: Profile, path: CodePath) -> list[Peak]:
    last = len(order) - 1
    before: Counter[str] = Counter()
    found: list[Peak] = []
    below: list[Counter[str]] = []
    for index, profile in enumerate(order):
        below.append(Counter(before))
        if index in (0, last):
            found.append(Peak(f"forward of layer {index}", dict(before + Counter(profile.forward))))
        before.update(profile.kept)
    found.append(Peak("loss forward", dict(before + Counter(head.forward))))
    found.append(Peak("loss backward", dict(before + Counter(head.backward))))
    gradients = 0
    for index in range(last, -1, -1):
        profile = order[index]
        items = below[index] + Counter(profile.backward) + Counter(gradients=gradients)
        found.append(Peak(f"backward of layer {index}", dict(items)))
        gradients += profile.gradient_bytes
    return found
