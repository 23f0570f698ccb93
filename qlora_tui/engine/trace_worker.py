"""A training step run on torch's ``meta`` device with every storage counted: a reference for the estimate.

Nothing is computed and no weight is read, but the code is the real one: transformers' model, peft's adapter,
bitsandbytes' 4-bit product, this project's loss and attention. A dispatch mode sees each tensor created, and
a weak reference reports when its storage is freed, so the peak follows from actual lifetimes.

Where torch chooses an implementation by device, ``meta`` would take a slower path than a GPU.
:class:`_DeviceKernels` makes the GPU's choices instead (fused attention, fused dropout, one-pass softmax).

:func:`trace` is a job, which :mod:`qlora_tui.engine.trace_client` starts.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.engine.meta_model import build, inputs
from qlora_tui.engine.trace_client import TraceRequest
from qlora_tui.errors import UserError
from qlora_tui.gpu.library_imports import faster_imports
from qlora_tui.memory.execution import LOSS_BLOCK_ROWS
from qlora_tui.memory.step import StepTrace


def trace(request: TraceRequest) -> StepTrace:
    """Do the job. Raises UserError for a model that the libraries cannot build."""
    try:
        with faster_imports():
            import peft  # noqa: F401
        return trace_request(request)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise UserError(
            "The step could not be traced",
            what=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            why=f"transformers {version('transformers')} cannot run this model without its weights.",
            fix="The estimate without a trace is still valid.",
        ) from error


def trace_request(request: TraceRequest) -> StepTrace:
    """Build the model on ``meta``, run one forward and backward, and count its memory."""
    architecture = parse_architecture(request.config)
    dtype = getattr(torch, request.dtype)
    model, padding_free = build(request, architecture, dtype)
    frozen = sum(_size(p.untyped_storage()) for p in model.parameters() if not p.requires_grad)
    frozen += _scale_bytes(model)
    adapter = sum(_size(p.untyped_storage()) for p in model.parameters() if p.requires_grad)
    batch = inputs(request, padding_free=padding_free)
    model.train()
    with _DeviceKernels(request), StorageCounter() as storages:
        if request.recipe.training.gradient_accumulation > 1:
            model(**batch).loss.sum().backward()
            storages.restart()
        chunked_loss = model(**batch).loss.sum()
        forward, kept_bytes = storages.peak_bytes, storages.live_bytes
        storages.restart()
        chunked_loss.backward()
        backward = storages.peak_bytes
    # In float32, gradients that were computed together are the rows of one tensor.
    storages = (p.grad.untyped_storage() for p in model.parameters() if p.grad is not None)
    gradients = sum({storage._cdata: _size(storage) for storage in storages}.values())
    return StepTrace(
        parameter_bytes=frozen,
        adapter_bytes=adapter,
        forward_bytes=forward,
        backward_bytes=backward,
        gradient_bytes=gradients,
        kept_bytes=kept_bytes,
    )


def _scale_bytes(model: nn.Module) -> int:
    from qlora_tui.training.experts.routing import experts_4bit

    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            for tensor in (state.absmax, state.code, getattr(state, "offset", None)):
                total += _size(tensor.untyped_storage()) if isinstance(tensor, Tensor) else 0
            state = getattr(state, "state2", None)
    scales = (buffer for _, experts in experts_4bit(model) for buffer in experts.buffers())
    return total + sum(_size(buffer.untyped_storage()) for buffer in scales)


def _size(storage: torch.UntypedStorage) -> int:
    return -(-storage.nbytes() // 512) * 512


class StorageCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Counts storages created under this mode until they are freed; earlier ones do not count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, int] = {}

    def restart(self) -> None:
        """Reset the peak to the bytes that are allocated now."""
        gc.collect()
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in tree_iter((args, kwargs)):
            if isinstance(given, Tensor) and given.untyped_storage()._cdata not in self._known:
                self._watch(given, 0)
        workspace = self._workspace(func, args)
        result = func(*args, **(kwargs or {}))
        for output in tree_iter(result):
            if isinstance(output, Tensor) and output.untyped_storage()._cdata not in self._known:
                self._watch(output, _size(output.untyped_storage()))
        del workspace
        return result

    def _workspace(self, func: Any, args: Any) -> Tensor | None:
        """Return the workspace that a device's kernel allocates and the meta kernel does not.

        A 4-bit product dequantizes the weight; ``logsumexp`` takes the exponentials of all its input
        (``logsumexp_out_impl`` in aten/src/ATen/native/ReduceOps.cpp); a GPU's softmax backward multiplies
        gradient and result first (``softmax_backward_cuda_out`` in aten/src/ATen/native/cuda/SoftMax.cu).
        """
        name = str(func)
        if name.startswith("bitsandbytes.gemm_4bit"):
            workspace = torch.empty(args[2], dtype=args[0].dtype, device="meta")
        elif name.startswith(("aten.logsumexp", "aten._softmax_backward_data")):
            workspace = torch.empty(args[0].shape, dtype=args[0].dtype, device="meta")
        else:
            return None
        self._watch(workspace, _size(workspace.untyped_storage()))
        return workspace

    def _watch(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = size
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._on_freed, storage._cdata)

    def _on_freed(self, key: int) -> None:
        self.live_bytes -= self._known.pop(key, 0)


class _FusedAttention(torch.autograd.Function):
    """Memory of FlashAttention: saves q, k, v, its output and one number per row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((query.shape[0], query.shape[2], query.shape[1], value.shape[-1])).transpose(
            1, 2
        )
        row_sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, row_sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, row_sums = ctx.saved_tensors
        delta = torch.empty_like(row_sums)
        sums = query.new_empty(query.shape, dtype=torch.float32) if query.element_size() == 2 else None
        gradients = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
        if query.shape[1] != key.shape[1]:
            spread = torch.empty_like(query), query.new_empty((*query.shape[:3], value.shape[-1]))
            del spread
        del delta, sums
        return gradients


class _DeviceKernels:
    """Makes torch's device-dependent choices those of the request's device while the trace runs."""

    def __init__(self, request: TraceRequest) -> None:
        self._device = request.device
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        self._replace(functional, "scaled_dot_product_attention", _attention)
        from qlora_tui.training import loss, packed_attention

        self._replace(torch, "autocast", _no_autocast)
        self._replace(loss, "block_rows", lambda device: LOSS_BLOCK_ROWS[self._device])
        if self._device == "cuda":
            self._replace(functional, "dropout", _dropout)
            self._replace(packed_attention, "supports", lambda query, value, samples: True)
            self._replace(packed_attention, "attend", _varlen_attention)
        else:
            self._replace(
                packed_attention, "prefers_row_attention", lambda query: query.dtype == torch.bfloat16
            )

    def __exit__(self, *exc: object) -> None:
        for undo in self._undo:
            undo()

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        before = getattr(owner, name)
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, before))


_unfused_attention = functional.scaled_dot_product_attention
"""torch's own, which on ``meta`` is decomposed as in its fallback on a GPU."""


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if query.shape[1] != key.shape[1] and not kwargs.get("enable_gqa"):
        return _unfused_attention(query, key, value, *args, **kwargs)  # no fused kernel broadcasts heads
    attended: Tensor = _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]  # torch's own
    return attended


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Tensor:
    attended: Tensor = _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]  # torch's own
    return attended.transpose(1, 2)


def _no_autocast(*args: Any, **kwargs: Any) -> contextlib.nullcontext[None]:
    """Replace autocast: the meta device has none, and the traced path uses none."""
    return contextlib.nullcontext()


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not p:
        return input
    return torch.native_dropout(input, p, True)[0]
