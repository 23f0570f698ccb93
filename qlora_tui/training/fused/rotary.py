"""Rotary positions of queries and keys as one Triton kernel in each direction.

transformers' attention modules call a function ``apply_rotary_pos_emb`` of their own file. Families differ:
most rotate the halves of a head, some its even and odd columns, some a part of its columns. So each family's
function is compared with the kernel, in both directions, before the kernel takes its place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlora_tui.training.agreement import within_rounding
from qlora_tui.training.fused.kernel_choice import find_kernels
from qlora_tui.training.fused.patching import patch_forward

RotaryFunction: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
CallKind: TypeAlias = tuple[bool, torch.dtype]
"""Whether all columns of a head rotate, and the dtype of cos and sin."""
_NAME = "apply_rotary_pos_emb"
_TOKENS = 5
"""Tokens of the check."""
_ROUNDINGS = 2.0
"""Roundings of the terms of a sum by which an element may differ: of both products and the sum."""


def fuse_rotary(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Use the kernel in every attention module whose rotary function computes what the kernel computes."""
    kernels = find_kernels(device, dtype)
    if kernels is None:
        return
    config = model.config.get_text_config()
    heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    kinds: dict[tuple[RotaryFunction, int], frozenset[CallKind]] = {}
    for module in model.modules():
        function, width = _rotary_function(module), _head_width(module)
        if function is None or width is None:
            continue
        if (function, width) not in kinds:
            kinds[function, width] = _same_kinds(kernels, function, heads, width, device, dtype)
            if not kinds[function, width]:
                name = type(module).__name__
                print(f"torch computes the rotary positions of {name}: the kernel's differ", flush=True)
        if kinds[function, width]:
            _patch_forward(module, function, kinds[function, width], kernels)


def _rotary_function(module: nn.Module) -> RotaryFunction | None:
    """The function that the module's forward calls by name; None where it calls none."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None or _NAME not in code.co_names:
        return None
    return _namespace(module).get(_NAME)


def _head_width(module: nn.Module) -> int | None:
    width = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    return width if isinstance(width, int) else None


def _namespace(module: nn.Module) -> dict[str, Any]:
    """The global names that the module's forward sees."""
    namespace: dict[str, Any] = inspect.unwrap(type(module).forward).__globals__
    return namespace


def _patch_forward(
    module: nn.Module, function: RotaryFunction, kinds: frozenset[CallKind], kernels: ModuleType
) -> None:
    original_forward, namespace = module.forward, _namespace(module)

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not _supports(q, k, cos, sin, kinds):
            return function(q, k, cos, sin, *args, **kwargs)
        return _Rotary.apply(q, k, cos, sin, kernels)  # type: ignore[no-untyped-call]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original_forward(*args, **kwargs)
        namespace[_NAME] = rotate
        try:
            return original_forward(*args, **kwargs)
        finally:
            namespace[_NAME] = function

    patch_forward(module, forward, "rotary")


def _supports(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kinds: frozenset[CallKind]) -> bool:
    """Whether the kernel computes a call of the family's function: one of a kind that was compared."""
    return (
        q.dtype == k.dtype
        and cos.dtype == sin.dtype
        and q.dim() == k.dim() == 4
        and cos.dim() == 3
        and q.shape[-1] == k.shape[-1] >= cos.shape[-1]
        and (q.shape[-1] == cos.shape[-1], cos.dtype) in kinds
    )


class _Rotary(torch.autograd.Function):
    """Rotates queries and keys, (batch, heads, tokens, width). Saves nothing but cos and sin."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kernels: ModuleType
    ) -> tuple[Tensor, Tensor]:
        # Attributes: all layers share them.
        ctx.cos, ctx.sin, ctx.kernels = cos, sin, kernels
        rotated_pair: tuple[Tensor, Tensor] = kernels.rotate(q, k, cos, sin)
        return rotated_pair

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.kernels.rotate(*grad_outputs, ctx.cos, ctx.sin, backward=True), None, None, None


def _same_kinds(
    kernels: ModuleType,
    function: RotaryFunction,
    heads: tuple[int, int],
    width: int,
    device: torch.device,
    dtype: torch.dtype,
) -> frozenset[CallKind]:
    """The kinds of calls of which a family's function is what the kernel computes."""
    columns = {True: width, False: width // 4 * 2}
    return frozenset(
        (whole, table_dtype)
        for whole, rotary in columns.items()
        for table_dtype in {dtype, torch.float32}
        if _computes_same(kernels, function, heads, (width, rotary), device, (dtype, table_dtype))
    )


def _computes_same(
    kernels: ModuleType,
    function: RotaryFunction,
    heads: tuple[int, int],
    columns: tuple[int, int],
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> bool:
    """Whether a family's function and its gradient are those of the kernel.

    cos and sin are chosen values that differ in every column, so that no symmetry hides a difference.

    Args:
        heads: of queries, and of keys.
        columns: of a head, and those that rotate.
        dtypes: of queries and keys, and of cos and sin.
    """
    generator = torch.Generator().manual_seed(0)
    (width, rotary), (dtype, table_dtype) = columns, dtypes

    def values(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    given, grads = ([values(1, _TOKENS, n, width).transpose(1, 2) for n in heads] for _ in range(2))
    cos, sin = (values(1, _TOKENS, rotary, dtype=table_dtype) for _ in range(2))
    leaves = [x.clone().requires_grad_() for x in given]
    try:
        with torch.enable_grad():
            outputs = function(*leaves, cos, sin)
        expected = [*outputs, *torch.autograd.grad(outputs, leaves, grads)]
        computed = [*kernels.rotate(*given, cos, sin), *kernels.rotate(*grads, cos, sin, backward=True)]
    except Exception:  # a function of another kind; Triton compiles for this shape, and may raise anything
        return False
    sizes = [_sizes(x, cos, sin, backward=False) for x in given]
    sizes += [_sizes(x, cos, sin, backward=True) for x in grads]
    return all(
        actual.dtype == wanted.dtype and within_rounding(actual, wanted.detach(), size, _ROUNDINGS)
        for actual, wanted, size in zip(computed, expected, sizes, strict=True)
    )


def _sizes(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> Tensor:
    """For each element of the result, the magnitude of the terms of its sum; 0 where x is passed on."""
    rotary = cos.shape[-1]
    turned, cos, sin = x[..., :rotary].abs(), cos[:, None].abs(), sin[:, None].abs()
    half = rotary // 2
    across = (turned * sin).roll(half, -1) if backward else turned.roll(half, -1) * sin
    return functional.pad(turned * cos + across, (0, x.shape[-1] - rotary))
