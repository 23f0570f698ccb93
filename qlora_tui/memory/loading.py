"""Replays the allocations of loading a base on a GPU, which leave free blocks for the step.

With quantization transformers first allocates one tensor of the size of the whole model and frees it, so that
the weights are split from one segment (``caching_allocator_warmup`` in modeling_utils.py). It then reads them
in the natural order of their names, and quantizes each before it reads the next
(``convert_and_load_state_dict_in_model`` in core_model_loading.py).

In versions 5.0 to 5.3, four threads read weights (``GLOBAL_WORKERS``). They read far ahead if the first
weight is a large embedding: while one thread reads the embedding, three read the layers. Packed weights then
lie between weights that are freed later. peft before 0.20 kept these segments; since 0.20,
``prepare_model_for_kbit_training`` releases them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapreplace

from qlora_tui.memory.allocator import CachingAllocator, MemoryBlock
from qlora_tui.memory.execution import ADAPTER_ITEMSIZE, ExecutionConfig

READ_BYTES = 2
"""Bytes per weight as read from the file."""
READERS = 4
"""Number of threads that read weights, in versions that read in threads."""
QUANTIZING_BYTES = 16 * 1024
"""Bytes that one thread reads while a weight is quantized.

At 1 GB/s, reading them takes 16 µs, about the time of a kernel launch. With any value from 10 to 100 KiB, the
estimates in ``docs/measured.md`` stay within 5 %.
"""
_NUMBERS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class LoadedWeight:
    """A frozen weight, with its sizes as read and as stored."""

    name: str
    count: int
    """Number of elements."""
    packed: tuple[int, ...] = ()
    """Bytes of each tensor of the quantized weight; empty if the weight is not quantized."""
    matrices: int = 1
    """Number of parts that are read and quantized in turn in the same memory.

    See training/experts/loading.py.
    """

    @property
    def read_bytes(self) -> int:
        """Return the bytes that are read at a time."""
        return self.count // self.matrices * READ_BYTES

    @property
    def announced_bytes(self) -> int:
        """Return the bytes that transformers counts for this weight in its first allocation.

        A 4-bit weight counts half a byte per element, without scales.
        """
        if not self.packed:
            return self.count * READ_BYTES
        return self.count if self.count in self.packed else self.count // 2


def load(
    allocator: CachingAllocator,
    weights: Sequence[LoadedWeight],
    slot_sizes: Sequence[int],
    execution: ExecutionConfig,
) -> None:
    """Load and quantize weights, given in the model's order, and cast those that are not quantized."""
    if slot_sizes:  # streamed layers are loaded to host memory
        allocator.keep(slot_sizes)
        for weight in weights:
            allocator.keep(weight.packed or (weight.count * execution.compute_itemsize,))
        return
    if not any(weight.packed for weight in weights):
        allocator.keep(weight.count * execution.compute_itemsize for weight in weights)
        return
    allocator.free(allocator.malloc(sum(weight.announced_bytes for weight in weights)))
    as_read: dict[str, MemoryBlock] = {}
    for weight, is_read in _reading_order(weights, in_threads=execution.reads_in_threads):
        if not is_read:
            as_read[weight.name] = allocator.malloc(weight.read_bytes)
        elif weight.packed:
            allocator.keep(weight.packed)
            allocator.free(as_read.pop(weight.name))
    if execution.cast_to_float32 or execution.compute_itemsize != READ_BYTES:
        for weight in weights:  # one after another
            if weight.name in as_read:
                allocator.malloc(weight.count * ADAPTER_ITEMSIZE)
                allocator.free(as_read[weight.name])
    if execution.cast_to_float32 and not execution.reads_in_threads:
        allocator.empty_cache()  # as in peft/utils/other.py, after its casts


def _reading_order(
    weights: Sequence[LoadedWeight], *, in_threads: bool
) -> Iterator[tuple[LoadedWeight, bool]]:
    """Yield each weight twice: when its read begins, and when it has been read and would be quantized."""
    ordered = sorted(weights, key=_natural)
    moments: list[tuple[int, bool, int]] = []
    readers, now = [0] * (READERS if in_threads else 1), 0
    for place, weight in enumerate(ordered):
        begin = readers[0] if in_threads else now
        end = begin + weight.read_bytes
        heapreplace(readers, end)
        now = max(now, end) + (QUANTIZING_BYTES if weight.packed else 0)
        moments += [(begin, False, place), (now, True, place)]
    # One thread reads on until another's weight is quantized; a single thread waits.
    for _, is_read, place in sorted(moments) if in_threads else moments:
        yield ordered[place], is_read


def _natural(weight: LoadedWeight) -> list[int | str]:
    """Return a sort key for the natural order of names, which compares digits as numbers: ``layers.2`` before
    ``layers.10``.
    """
    parts: list[int | str] = [*_NUMBERS.split(weight.name)]
    parts[1::2] = map(int, parts[1::2])
    return parts
