"""Replay of torch's allocations without torch: storages that count their bytes, and a small autograd.

A training step's peak depends on *when* each tensor dies, not only on how large it is. So the estimate
replays one layer of each kind in the order of the library's own ``forward``. A :class:`Tensor` holds a
:class:`Storage`; a storage adds its bytes to the :class:`AllocationMeter` when it is created and subtracts
them when CPython drops the last reference to it, which is when torch frees its memory too. Operations that
need gradients leave a :class:`Node`, and :func:`backward` runs the nodes in autograd's order (highest
sequence number first) and frees what they saved along the way.

``ops.py`` has the operations, ``layers.py`` the layers, ``step.py`` the whole step.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ALLOCATION_BYTES = 512
"""Granularity to which the CUDA caching allocator rounds blocks up (``kMinBlockSize``)."""


class AllocationMeter:
    """Bytes alive now and at the peak, by item, and every allocation and free."""

    __slots__ = ("events", "item", "live_bytes", "live_items", "made", "peak_bytes", "peak_items")

    def __init__(self) -> None:
        self.item = "activations"
        self.live_bytes = 0
        self.peak_bytes = 0
        self.live_items: dict[str, int] = {}
        self.peak_items: dict[str, int] = {}
        self.made = 0
        """Storages so far; each is known by its number."""
        self.events: list[tuple[int, int]] = []
        """Number of a storage and its bytes, negative for a free."""

    @contextmanager
    def attribute_to(self, item: str) -> Iterator[None]:
        """Count allocations inside the block under ``item``."""
        before, self.item = self.item, item
        try:
            yield
        finally:
            self.item = before

    def restart(self) -> None:
        """Reset the peak to the bytes alive now."""
        self.peak_bytes = self.live_bytes
        self.peak_items = dict(self.live_items)

    def add(self, number: int, size: int, item: str) -> None:
        """Add ``size`` bytes (negative for a free) to the storage with that number."""
        self.events.append((number, size))
        self.live_items[item] = self.live_items.get(item, 0) + size
        self.live_bytes += size
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self.peak_items = dict(self.live_items)


class Storage:
    """Bytes that are alive as long as an object refers to them."""

    __slots__ = ("__weakref__", "item", "meter", "number", "size")

    def __init__(self, meter: AllocationMeter, size: int, item: str | None = None) -> None:
        self.meter = meter
        self.size = -(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES
        self.item = item or meter.item
        meter.made += 1
        self.number = meter.made
        meter.add(self.number, self.size, self.item)

    def __del__(self) -> None:
        self.meter.add(self.number, -self.size, self.item)

    def reattribute(self, item: str) -> None:
        """Count the bytes under another item without a new allocation."""
        self.meter.live_items[self.item] -= self.size
        self.meter.live_items[item] = self.meter.live_items.get(item, 0) + self.size
        self.item = item


class Tensor:
    """A number of elements of ``itemsize`` bytes in a storage; tensors that share a storage are views."""

    __slots__ = ("itemsize", "node", "numel", "storage")

    def __init__(self, storage: Storage, numel: int, itemsize: int, node: Node | None = None) -> None:
        self.storage = storage
        self.numel = numel
        self.itemsize = itemsize
        self.node = node

    @property
    def needs_grad(self) -> bool:
        """Return whether a gradient will flow back through the tensor."""
        return self.node is not None

    def view(self, node: Node | None) -> Tensor:
        """Return a view of the storage with another node."""
        return Tensor(self.storage, self.numel, self.itemsize, node)


Grads = tuple[Tensor | None, ...]
BackwardFn = Callable[[Tensor, list[Tensor | None]], Grads]


class StopRecomputing(Exception):
    """Raised when all tensors that a checkpointed layer saves exist again; its rerun can end."""


class ActivationCheckpoint:
    """One layer under ``torch.utils.checkpoint`` (non-reentrant).

    The first forward saves only its input. When the backward needs the first saved tensor, the layer runs
    again, and everything it saves is kept until the node that saved it has run.
    """

    __slots__ = ("forward", "packed", "ready", "recomputed")

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        self.forward = forward
        self.packed = 0
        self.ready = False
        self.recomputed: dict[int, Tensor | None] = {}

    def take(self, slot: int, tape: Tape) -> Tensor | None:
        """Return the tensor saved in slot ``slot``, recomputing the layer if that has not been done."""
        if not self.ready:
            self.ready = True
            outer, tape.mode = tape.mode, ("recompute", self)
            wanted, self.packed = self.packed, 0
            tape.stop_after = wanted
            try:
                self.forward()
            except StopRecomputing:
                pass
            finally:
                tape.mode = outer
        return self.recomputed.pop(slot, None)


class Node:
    """One differentiable operation: saved tensors, and the nodes that receive its gradients."""

    __slots__ = ("checkpoint", "fn", "inputs", "item", "pinned", "saved", "sequence", "slots")

    def __init__(self, sequence: int, item: str, inputs: tuple[Node | None, ...], fn: BackwardFn) -> None:
        self.sequence = sequence
        self.item = item
        self.inputs = inputs
        self.fn = fn
        self.saved: list[Tensor | None] = []
        self.checkpoint: ActivationCheckpoint | None = None
        self.slots: list[int] = []
        self.pinned: tuple[Tensor, ...] = ()
        """Tensors that a Python autograd function stores as attributes, which a checkpoint cannot drop."""

    def __lt__(self, other: Node) -> bool:
        return self.sequence > other.sequence


class Tape:
    """Creates nodes, and decides whether their saved tensors are kept, dropped or recomputed."""

    __slots__ = ("meter", "mode", "sequence", "stop_after")

    def __init__(self, meter: AllocationMeter) -> None:
        self.meter = meter
        self.sequence = 0
        self.stop_after = 0
        self.mode: tuple[str, ActivationCheckpoint | None] = ("keep", None)

    def node(
        self, inputs: tuple[Tensor | None, ...], fn: BackwardFn, save: tuple[Tensor | None, ...] = ()
    ) -> Node | None:
        """Create a node for an operation on ``inputs`` that saves ``save`` (None is a parameter).

        Returns None when no input needs a gradient: nothing is saved then.
        """
        parents = tuple(None if tensor is None else tensor.node for tensor in inputs)
        if not any(parents):
            return None
        self.sequence += 1
        node = Node(self.sequence, self.meter.item, parents, fn)
        kind, checkpoint = self.mode
        if checkpoint is None:
            node.saved = [None if tensor is None else tensor.view(None) for tensor in save]
            return node
        node.checkpoint = checkpoint
        for tensor in save:
            slot = checkpoint.packed
            checkpoint.packed += 1
            node.slots.append(slot)
            if kind == "recompute":
                checkpoint.recomputed[slot] = None if tensor is None else tensor.view(None)
                if checkpoint.packed == self.stop_after:
                    raise StopRecomputing
        return node

    def leaf(self) -> Node:
        """Create a node that accumulates a parameter's gradient, counted under gradients."""
        self.sequence += 1
        return Node(self.sequence, "gradients", (), _keep)

    def saved(self, node: Node) -> list[Tensor | None]:
        """Return the saved tensors of ``node``, recomputed if its layer was checkpointed."""
        if node.checkpoint is None:
            return list(node.saved)
        return [node.checkpoint.take(slot, self) for slot in node.slots]


def _keep(grad: Tensor, saved: list[Tensor | None]) -> Grads:
    return ()


def _counts(tensor: Tensor) -> tuple[int, int]:
    """Return the reference counts of ``tensor`` and of its storage inside this function."""
    return sys.getrefcount(tensor), sys.getrefcount(tensor.storage)


def _unshared_counts() -> tuple[int, int]:
    """Return the result of :func:`_counts` when only a buffer and one name refer to the tensor."""
    buffers = {0: Tensor(Storage(AllocationMeter(), 1), 1, 1)}
    there = buffers.get(0)
    assert there is not None
    return _counts(there)


_UNSHARED_COUNTS = _unshared_counts()
"""Reference counts of a tensor with one owner; measured, because CPython versions differ."""


def _shared(counts: tuple[int, int]) -> bool:
    return counts[0] > _UNSHARED_COUNTS[0] or counts[1] > _UNSHARED_COUNTS[1]


def backward(tape: Tape, root: Node, seed: Tensor, retained: list[Storage] | None) -> None:
    """Run the backward from ``root``, freeing tensors like autograd.

    Gradients of leaves are counted under gradients and added to ``retained``; with None they are dropped, as
    when they are added to the gradients of an earlier micro-step.
    """
    meter = tape.meter
    buffers: dict[int, Tensor] = {root.sequence: seed}
    del seed
    heap = [root]
    while heap:
        node = heapq.heappop(heap)
        grad = buffers.pop(node.sequence)
        if not node.inputs:
            if retained is not None and node.item == "gradients":
                grad.storage.reattribute("gradients")
                retained.append(grad.storage)
            del grad
            continue
        before, meter.item = meter.item, node.item
        outputs = list(node.fn(grad, tape.saved(node)))
        node.saved, node.slots, node.checkpoint = [], [], None
        del grad
        outputs.reverse()
        for parent in node.inputs:
            output = outputs.pop()
            if parent is None or output is None:
                continue
            there = buffers.get(parent.sequence)
            if there is None:
                buffers[parent.sequence] = output
                heapq.heappush(heap, parent)
            elif _shared(_counts(there)):  # in place only if there is no other reference (input_buffer.cpp)
                buffers[parent.sequence] = Tensor(
                    Storage(meter, there.numel * there.itemsize), there.numel, there.itemsize
                )
            del output, there
        meter.item = before
