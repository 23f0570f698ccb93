"""Records when each storage of a step is allocated and freed, and what it contains.

A dispatch mode sees each new tensor, and a weak reference reports when its storage is freed. Allocations and
frees are therefore recorded in the order in which the step makes them on a device.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qlora_tui.memory.allocator import Event
from qlora_tui.memory.recording import Mark
from qlora_tui.memory.step import Phase
from qlora_tui.memory.weights import round_to_block

ACTIVATIONS = "activations"
MOST_OPERATIONS = 250_000
"""Maximum number of operations of one micro-step, which take about 30 s of CPU time.

Layers of many experts need 100,000. Layers that compute one token after another need a hundred per token
(RWKV).
"""


class TooManyOperations(Exception):
    """A step has more than ``MOST_OPERATIONS`` operations."""


class StorageRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Records storages that are created under this mode, until they are freed. Storages created earlier are
    ignored.
    """

    def __init__(self, vocabulary: int = 0, tokens: int = 0, *, device: str = "meta") -> None:
        """Record tensors on ``device``.

        ``vocabulary`` and ``tokens`` (per sequence) identify logits and attention scores by their shapes.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.items: list[str] = [""]
        """Content of each storage, by its number."""
        self.marks: list[Mark] = []
        self.copied_from: dict[int, int] = {}
        """Id of the tensor from which a multi-tensor copy last filled a storage, by the storage's number."""
        self.live_bytes = 0
        self.peak_bytes = 0
        self._vocabulary, self._tokens, self._device = vocabulary, tokens, device
        self._item = ""
        self._operations = 0
        self._known: dict[int, tuple[int, int]] = {}
        """(number, bytes) of each live storage, by address. The number is 0 if the storage is older than the
        recording.
        """

    def restart(self) -> None:
        """Reset the peak to the bytes that are currently allocated."""
        gc.collect()
        self.peak_bytes = self.live_bytes

    def mark(self, phase: Phase, name: str) -> None:
        """Record that a part of the step begins here."""
        self.marks.append(Mark(phase, name, len(self.events)))

    @contextmanager
    def attribute_to(self, item: str) -> Iterator[None]:
        """Record allocations inside the block under this item."""
        before, self._item = self._item, item
        try:
            yield
        finally:
            self._item = before

    def relabel(self, tensor: Tensor, item: str) -> None:
        """Change the recorded item of an existing tensor."""
        number, _ = self._known.get(tensor.untyped_storage()._cdata, (0, 0))
        if number:
            self.items[number] = item

    def number_of(self, tensor: Tensor) -> int:
        """Return the number of a tensor's storage; 0 if the storage is older than the recording."""
        return self._known.get(tensor.untyped_storage()._cdata, (0, 0))[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._operations += 1
        if self._operations > MOST_OPERATIONS:
            raise TooManyOperations
        for given in self._unknown((args, kwargs)):
            self._watch(given, 0, "")
        name = str(func)
        if name.startswith("aten._foreach_copy_"):
            for target, source in zip(args[0], args[1], strict=True):
                self.copied_from[self.number_of(target)] = id(source)
        workspace = self._workspace(name, args, kwargs)
        result = func(*args, **(kwargs or {}))
        for output in self._unknown(result):
            self._watch(output, round_to_block(output.untyped_storage().nbytes()), self._kind(name, output))
        del workspace
        return result

    def _unknown(self, values: Any) -> Iterator[Tensor]:
        """Yield the tensors on the device whose storage was not seen yet."""
        for value in tree_iter(values):
            is_there = isinstance(value, Tensor) and value.device.type == self._device
            if is_there and value.untyped_storage()._cdata not in self._known:
                yield value

    def _workspace(self, name: str, args: Any, kwargs: Any) -> list[Tensor]:
        """Return the workspaces that a kernel of the device allocates but the meta kernel does not.

        A 4-bit product dequantizes the weight. An 8-bit product is summed in int32 and scaled to float16
        before it is converted to its dtype (``int8_mm_dequant`` in bitsandbytes). ``logsumexp`` computes the
        exponentials of its whole input (``logsumexp_out_impl`` in aten/src/ATen/native/ReduceOps.cpp). A
        GPU's softmax backward first multiplies gradient and result (``softmax_backward_cuda_out`` in
        aten/src/ATen/native/cuda/SoftMax.cu).
        """
        if name.startswith("bitsandbytes.gemm_4bit"):
            kinds = [(args[2], args[0].dtype)]
        elif name.startswith("bitsandbytes.int8_scaled_mm"):
            shape = (*args[0].shape[:-1], args[1].shape[0])
            kinds = [(shape, torch.int32)]
            kinds += (
                [(shape, torch.float16)]
                if (kwargs or {}).get("dtype", torch.float16) != torch.float16
                else []
            )
        elif name.startswith(("aten.logsumexp", "aten._softmax_backward_data")):
            kinds = [(args[0].shape, args[0].dtype)]
        else:
            return []
        made = []
        for shape, dtype in kinds:
            made.append(torch.empty(shape, dtype=dtype, device="meta"))
            size = round_to_block(made[-1].untyped_storage().nbytes())
            self._watch(made[-1], size, self._kind(name, made[-1]))
        return made

    def _kind(self, name: str, tensor: Tensor) -> str:
        """Return the item of a tensor that an operation has created."""
        if self._item:
            return self._item
        if name.startswith(("bitsandbytes.dequantize", "bitsandbytes.gemm")) and tensor.dim() == 2:
            is_weight = name.startswith("bitsandbytes.dequantize") or tensor.shape[0] != self._tokens
            return "dequantized" if is_weight else ACTIVATIONS
        if tensor.dtype in (torch.bool, torch.uint8) and tensor.dim() > 1:
            return "dropout"
        shape = tensor.shape
        if self._vocabulary and len(shape) > 1 and shape[-1] == self._vocabulary:
            return "logits"
        if self._tokens and len(shape) > 3 and min(shape[-2:]) >= self._tokens:
            return "scores"
        return ACTIVATIONS

    def _watch(self, tensor: Tensor, size: int, item: str) -> None:
        storage = tensor.untyped_storage()
        number = 0
        if size:
            number = len(self.items)
            self.items.append(item)
            self.events.append((number, size))
        self._known[storage._cdata] = number, size
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._on_freed, storage._cdata)

    def _on_freed(self, key: int) -> None:
        number, size = self._known.pop(key, (0, 0))
        if size:
            self.events.append((number, -size))
            self.live_bytes -= size
