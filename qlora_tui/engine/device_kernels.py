"""Makes torch and this project choose on the meta device what they would choose on a GPU or CPU.

Nothing is computed on ``meta``, so every operation takes its fallback path, and some operations have none.
With the replacements in this module, attention, dropout, fused kernels and autocast allocate and save the
same tensors as on the device of the run. Workspaces inside kernels are handled in
:meth:`.recorder.StorageRecorder`.

Not imitated: cuDNN's attention and convolutions, whose workspaces depend on its measurements, and kernels of
``flash-linear-attention`` and ``mamba-ssm``. Layers that use one of these two packages run transformers' own
code in a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from bitsandbytes.autograd import _functions as bitsandbytes_products
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import masking_utils
from transformers.integrations import moe, sdpa_attention

from qlora_tui.memory.execution import (
    BFLOAT16_CAPABILITY,
    LOSS_BLOCK_ROWS,
    SAMPLE_PADDING_ROWS,
    ExecutionConfig,
    accumulator_width,
    flash_trains,
    liger_rows,
)
from qlora_tui.training import loss, packed_attention

WIDEST_FLASH = 256
"""Maximum head size of FlashAttention (``check_head_dim_size_flash`` in aten's ``sdp_utils.cpp``)."""
DTYPES = {(2, False): torch.bfloat16, (2, True): torch.float16}
"""Compute dtypes, by their size in bytes and whether they are float16. Others are float32."""


def compute_dtype(execution: ExecutionConfig) -> torch.dtype:
    """Return the dtype in which matrix products are computed."""
    return DTYPES.get((execution.compute_itemsize, execution.float16), torch.float32)


@contextmanager
def kernels_of(execution: ExecutionConfig) -> Iterator[None]:
    """Inside the block, make torch and this project choose the kernels that they would choose on the run's
    device.
    """
    on_gpu = execution.device == "cuda"
    attention = _Attention(execution)
    autocast = _Autocast(compute_dtype(execution) if execution.autocast else None)
    replacements: list[tuple[Any, str, Any]] = [
        (functional, "scaled_dot_product_attention", attention),
        (torch, "autocast", autocast.context),
        (torch.amp, "autocast", autocast.context),
        (torch.amp, "is_autocast_available", lambda device: True),
        (torch, "is_autocast_enabled", autocast.is_enabled),
        (torch, "get_autocast_dtype", lambda device: autocast.dtype or torch.float32),
        (loss, "block_rows", lambda _: LOSS_BLOCK_ROWS[execution.device]),
        # A mask on ``meta`` has no values, so treat it as hiding nothing.
        (masking_utils, "fast_all", lambda mask: True),
        (moe, "_grouped_mm", _grouped_product(execution)),
    ]
    if on_gpu:
        replacements += [
            (functional, "dropout", _dropout),
            (packed_attention, "supports", attention.supports_varlen),
            (packed_attention, "attend", attention.varlen),
            (packed_attention, "supports_grouped_heads", attention.supports_grouped_heads),
            (sdpa_attention, "use_gqa_in_sdpa", attention.groups_heads),
        ]
        if execution.float16:
            replacements += [(owner, "softmax", _softmax) for owner in (functional, torch, Tensor)]
    else:
        replacements += [
            (packed_attention, "prefers_row_attention", lambda q: q.dtype == torch.bfloat16),
            (bitsandbytes_products, "MatMul8bitLt", bitsandbytes_products.MatMul8bitFp),
        ]
    with ExitStack() as undo:
        for owner, name, value in replacements:
            if name in vars(owner):
                undo.callback(setattr, owner, name, getattr(owner, name))
            else:  # inherited
                undo.callback(delattr, owner, name)
            setattr(owner, name, value)
        yield


class _Attention:
    """SDPA, and FlashAttention for packed samples, with the kernel that the run's device would use."""

    def __init__(self, execution: ExecutionConfig) -> None:
        self._execution = execution
        self._unfused = functional.scaled_dot_product_attention

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Replace ``scaled_dot_product_attention``, which on ``meta`` takes a GPU's fallback path."""
        if self._execution.autocast and torch.is_autocast_enabled("cuda"):
            dtype = compute_dtype(self._execution)
            query, key, value = (x.to(dtype) for x in (query, key, value))
        mask = self._mask(kwargs.get("attn_mask", args[0] if args else None))
        if self._execution.device == "cpu":
            grouped = kwargs.get("enable_gqa", False) or query.shape[1] == key.shape[1]
            is_fused = grouped and query.shape[-1] == value.shape[-1]  # check_head_dim_size_cpp
        elif self._runs_flash(query, key, value) and mask is None:
            return _fused(query, key, value, spreads=query.shape[1] != key.shape[1])
        else:
            is_fused = query.shape[1] == key.shape[1] and self._execution.attention != "math"
        if not is_fused:
            return self._unfused(query, key, value, *args, **kwargs)
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.new_empty(mask.shape, dtype=query.dtype)  # convert_boolean_attn_mask in aten
        return _fused(query, key, value, mask=mask)

    def _mask(self, mask: Tensor | None) -> Tensor | None:
        """Return the mask that SDPA receives. It is None for trainers other than ours, because the
        FlashAttention library needs no mask for a sliding window.
        """
        return mask if self._execution.own_fused else None

    def _runs_flash(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        execution = self._execution
        width = query.shape[-1]
        return (
            execution.attention == "flash"
            and query.element_size() == 2
            and value.shape[-1] == width <= WIDEST_FLASH
            and flash_trains(execution.capability, width)
        )

    def supports_varlen(self, query: Tensor, value: Tensor, *, samples: int) -> bool:
        """Replace :func:`.training.packed_attention.supports`."""
        return self._execution.varlen and self._runs_flash(query, query, value)

    def supports_grouped_heads(self, query: Tensor, masked: bool) -> bool:
        """Replace :func:`.training.packed_attention.supports_grouped_heads`."""
        return not masked and self._runs_flash(query, query, query)

    def groups_heads(self, mask: Tensor | None, key: Tensor, value: Tensor) -> bool:
        """Replace transformers' ``use_gqa_in_sdpa``."""
        return self._mask(mask) is None and self._runs_flash(key, key, value)

    def varlen(self, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *args: Any) -> Tensor:
        """Drop-in replacement for :func:`.training.packed_attention.attend`."""
        samples = self._execution.samples or starts.shape[-1] - 1
        attended = _fused(query, key, value, spreads=query.shape[1] != key.shape[1], samples=samples)
        return attended.transpose(1, 2)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    spreads: bool = False,
    samples: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    attended: Tensor = _FusedAttention.apply(query, key, value, mask, spreads, samples)  # type: ignore[no-untyped-call]
    return attended


class _FusedAttention(torch.autograd.Function):
    """A kernel that saves q, k, v, the mask, its output and one number per row instead of the scores."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        spreads: bool,
        samples: int,
    ) -> Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)
        row_sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, row_sums, mask)
        ctx.spreads, ctx.samples = spreads, samples
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, _, row_sums, _ = ctx.saved_tensors
        rows = row_sums.numel() + SAMPLE_PADDING_ROWS * ctx.samples * query.shape[1]
        delta = row_sums.new_empty(rows)
        # The gradient of q is summed over key blocks in float32 (dq_accum in flash_api.cpp, workspace_gq in
        # the CUTLASS kernel), unless all tensors are float32 already.
        summed = rows * accumulator_width(query.shape[-1]) if ctx.samples else query.numel()
        sums = row_sums.new_empty(summed) if query.element_size() == 2 else None
        gradients = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
        if ctx.spreads:  # flash computes dk and dv for every query head, then sums over the groups
            spread = torch.empty_like(query), query.new_empty((*query.shape[:3], value.shape[-1]))
            del spread
        del delta, sums
        return *gradients, None, None, None


class _Autocast(TorchFunctionMode):
    """``torch.autocast`` of a GPU, for the meta device, which has no autocast.

    Casts the same operations as torch (``AT_FORALL_LOWER_PRECISION_FP`` and ``AT_FORALL_FP32`` in
    aten/src/ATen/autocast_mode.h), and keeps the copies of trained weights until the forward ends
    (``cached_cast`` in autocast_mode.cpp).
    """

    NARROW = frozenset(
        (
            functional.linear,
            torch.matmul,
            Tensor.matmul,
            Tensor.__matmul__,
            Tensor.__rmatmul__,
            torch.mm,
            Tensor.mm,
            torch.bmm,
            Tensor.bmm,
            torch.addmm,
            torch.baddbmm,
            torch.einsum,
            functional.conv1d,
            torch.conv1d,
            functional.conv2d,
        )
    )
    WIDE = frozenset(
        (
            functional.softmax,
            torch.softmax,
            Tensor.softmax,
            functional.log_softmax,
            torch.log_softmax,
            Tensor.log_softmax,
            functional.layer_norm,
            functional.cross_entropy,
            functional.nll_loss,
            functional.softplus,
            torch.rsqrt,
            Tensor.rsqrt,
            torch.pow,
            Tensor.pow,
            Tensor.__pow__,
            torch.exp,
            Tensor.exp,
            torch.log,
            Tensor.log,
            torch.sum,
            Tensor.sum,
            torch.cumsum,
            Tensor.cumsum,
        )
    )

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        self._enabled = False
        self._depth = 0
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def is_enabled(self, device: str = "cuda") -> bool:
        """Replace ``torch.is_autocast_enabled``."""
        return self._enabled and device != "cpu"

    @contextmanager
    def context(
        self, device_type: str = "cuda", *args: Any, enabled: bool = True, **kwargs: Any
    ) -> Iterator[None]:
        """Replace ``torch.autocast``."""
        if device_type == "cpu" or self.dtype is None:
            yield
            return
        before, self._enabled = self._enabled, enabled
        self._depth += 1
        try:
            # Entered here because autograd ignores function modes that were entered before the backward.
            with self if self._depth == 1 else nullcontext():
                yield
        finally:
            self._enabled = before
            self._depth -= 1
            if not self._depth:
                self._copies.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._enabled and self.dtype is not None:
            if func in self.NARROW:
                args = [self._narrow(value) for value in args]
            elif func in self.WIDE:
                args = [_wide(value) for value in args]
        return func(*args, **kwargs)

    def _narrow(self, value: Any) -> Any:
        assert self.dtype is not None
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == self.dtype:
            return value
        if not (value.requires_grad and value.is_leaf and value.dtype == torch.float32):
            return value.to(self.dtype)
        if id(value) not in self._copies:
            self._copies[id(value)] = value, value.to(self.dtype)
        return self._copies[id(value)][1]


def _wide(value: Any) -> Any:
    is_narrow = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_narrow else value


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or not p:
        return input
    return torch.native_dropout(input, p, True)[0]


def _grouped_product(execution: ExecutionConfig) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the function that computes the grouped product of all experts. On Ampere and newer GPUs, torch
    has its own kernel for this product.
    """
    if execution.device == "cuda" and execution.capability < BFLOAT16_CAPABILITY:
        # This fallback also allocates gradients of the frozen weights.
        return lambda rows, weights, offs: torch.ops.transformers.grouped_mm_fallback(rows, weights, offs)

    def product(rows: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
        return _GroupedProduct.apply(rows.to(weights.dtype), weights)  # type: ignore[no-any-return, no-untyped-call]

    return product


class _GroupedProduct(torch.autograd.Function):
    """``torch.nn.functional.grouped_mm`` in any dtype. On ``meta``, the original supports only bfloat16."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights)
        return rows.new_empty((rows.shape[0], weights.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights = ctx.saved_tensors
        of_rows = weights.new_empty((grads[0].shape[0], weights.shape[-2]))
        return of_rows, None if rows is None else torch.empty_like(weights)


_library_softmax = torch.softmax


def _softmax(
    input: Tensor, dim: int = -1, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any
) -> Tensor:
    """Compute softmax like a GPU, which widens float16 inside the kernel
    (aten/src/ATen/native/SoftMax.cpp)."""
    if input.dtype == torch.float16 and dtype == torch.float32:
        return torch._softmax(input, dim, True)
    return _library_softmax(input, dim, dtype=dtype)


def liger_loss(head: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a stand-in for Liger's loss with this head. It makes the same allocations as the original."""

    def summed(states: Tensor, targets: Tensor) -> Tensor:
        scaled = states if head.multiplier == 1.0 else states * head.multiplier
        total: Tensor = _LigerLoss.apply(scaled, head.projection.weight)  # type: ignore[no-untyped-call]
        return total

    return summed


class _LigerLoss(torch.autograd.Function):
    """Allocates the gradient and the logits like Liger's fused linear cross-entropy (its
    ``fused_linear_cross_entropy.py``).
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        gradient = torch.empty_like(states)
        rows = liger_rows(states.shape[0], states.shape[1], weight.shape[0])
        logits = states.new_empty(rows, weight.shape[0])
        del logits
        ctx.save_for_backward(gradient)
        return states.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Liger multiplies it by the gradient of the loss in place (element_mul_kernel).
        return ctx.saved_tensors[0], None
