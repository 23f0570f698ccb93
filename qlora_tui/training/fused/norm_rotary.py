"""RMSNorm and rotary positions, as one autograd function each.

transformers computes a norm in several operations and saves an fp32 copy of its input; here the input is
saved unchanged, with one number per row. Queries and keys are rotated by one Triton kernel in each direction:
transformers' attention modules call a function ``apply_rotary_pos_emb`` of their own file. Families differ:
most rotate the halves of a head, some its even and odd columns, some only a part of its columns. So each
family's function is compared with the kernel, in both directions, before the kernel replaces it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from qlora_tui.training.checks.rounding import (
    equal_up_to_rounding,
    outputs_and_gradients,
    within_rounding,
)
from qlora_tui.training.fused.kernel_choice import find_kernels
from qlora_tui.training.fused.patching import patch_forward


@dataclass(frozen=True)
class RmsNormVariant:
    """How a model family multiplies by the weight of its norms."""

    offset: float = 0.0
    """Value that is added to the weight: 1 in Gemma, else 0."""
    multiply_in_fp32: bool = False
    """Whether the product is in fp32 and cast last (Gemma, OLMo-2); in Llama the input is cast first."""


_VARIANTS = (
    RmsNormVariant(),
    RmsNormVariant(multiply_in_fp32=True),
    RmsNormVariant(offset=1.0, multiply_in_fp32=True),
)


def fuse_rms_norm(model: nn.Module) -> None:
    """Fuse every frozen RMSNorm that computes a known variant."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and (variant := _find_variant(module)):
            _fuse_norm(module, variant)


def _fuse_norm(norm: Any, variant: RmsNormVariant) -> None:
    original_forward, eps = norm.forward, _eps_of(norm)

    def forward(self: Any, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return original_forward(x)  # type: ignore[no-any-return]
        output: Tensor = _FusedRmsNorm.apply(x, self.weight, eps, variant)  # type: ignore[no-untyped-call]
        return output

    patch_forward(norm, forward, "norms")


def _eps_of(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


@torch.no_grad()
def _find_variant(norm: Any) -> RmsNormVariant | None:
    """Return the variant that computes the same as the module; None if none or several do.

    Trained weights may hide the difference (Gemma's reach 1,656, where adding 1 is below the resolution of
    bfloat16), so the module is also run with weights between -3 and 3.
    """
    weight, eps = getattr(norm, "weight", None), _eps_of(norm)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if weight.requires_grad or sum(1 for _ in norm.parameters()) != 1:
        return None
    if weight.is_meta:  # the saved tensors are the same for every variant
        return _VARIANTS[0]
    x = _example_rows(len(weight), eps).to(weight.device, weight.dtype)
    matching = set(_distinguishable_variants(weight.dtype))
    for values in (torch.linspace(-3, 3, len(weight)).to(weight), weight):
        expected = functional_call(norm, {"weight": values}, (x,))
        matching = {
            variant
            for variant in matching
            if equal_up_to_rounding(_rms_norm(x, values, eps, variant)[0], expected)
        }
    return matching.pop() if len(matching) == 1 else None


def _distinguishable_variants(dtype: torch.dtype) -> tuple[RmsNormVariant, ...]:
    """Return the variants whose results differ in ``dtype``. In float32 the first two do not differ, because
    no cast rounds.
    """
    return _VARIANTS[1:] if dtype == torch.float32 else _VARIANTS


def _example_rows(width: int, eps: float) -> Tensor:
    """Return inputs (4, width) that distinguish variants.

    One row has typical values, one has a few very large channels, one has a mean far from 0, and one is so
    small that epsilon is half of the value under the root.
    """
    rows = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    rows[0] *= 3
    rows[1, :: max(width // 3, 1)] *= 1000
    rows[2] += 2
    rows[3] *= max(eps, 1e-9) ** 0.5
    return rows


def _rms_norm(x: Tensor, weight: Tensor, eps: float, variant: RmsNormVariant) -> tuple[Tensor, Tensor]:
    """Return the output, and 1 / root mean square of each row in fp32, computed by torch."""
    # Not vector_norm: it sums in sequence, so its error grows with the row, while mean sums pairwise.
    squares = x.to(torch.float32, copy=True).square_()
    inv_rms = squares.mean(-1, keepdim=True).add_(eps).rsqrt_()
    del squares
    wide = x.to(torch.float32, copy=True).mul_(inv_rms)
    if variant.multiply_in_fp32:
        return wide.mul_(_factor(weight, variant)).to(x.dtype), inv_rms
    narrow = wide.to(x.dtype)
    # If the weight has more bits than the input, so has the output.
    return narrow.mul_(weight) if weight.dtype == x.dtype else narrow * weight, inv_rms


def _factor(weight: Tensor, variant: RmsNormVariant) -> Tensor:
    return weight.float() + variant.offset


def _kernels_for(x: Tensor) -> ModuleType | None:
    """Return Triton's kernels for rows of this width; None if torch must compute the norm."""
    kernels = find_kernels(x.device, x.dtype)
    return kernels if kernels is not None and kernels.fits_row(x.shape[-1]) else None


class _FusedRmsNorm(torch.autograd.Function):
    """weight · x / rms(x) over the last dimension; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, variant: RmsNormVariant) -> Tensor:
        kernels = _kernels_for(x)
        if kernels is None:
            out, inv_rms = _rms_norm(x, weight, eps, variant)
        else:
            out, inv_rms = kernels.rms_norm(
                x, weight, eps, offset=variant.offset, in_fp32=variant.multiply_in_fp32
            )
        ctx.save_for_backward(x, inv_rms)
        ctx.weight, ctx.variant = weight, variant
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, inv_rms = ctx.saved_tensors
        kernels = _kernels_for(x)
        if kernels is not None:
            grad_x: Tensor = kernels.rms_norm_backward(
                grad_outputs[0], x, ctx.weight, inv_rms, offset=ctx.variant.offset
            )
            return grad_x, None, None, None
        grad_normed = grad_outputs[0].to(torch.float32, copy=True).mul_(_factor(ctx.weight, ctx.variant))
        normed = x.to(torch.float32, copy=True).mul_(inv_rms)
        projection = (grad_normed * normed).sum(-1, keepdim=True).div_(-x.shape[-1])
        return grad_normed.addcmul_(normed, projection).mul_(inv_rms).to(x.dtype), None, None, None


RotaryFunction: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
CallKind: TypeAlias = tuple[bool, torch.dtype]
"""Whether all columns of a head rotate, and the dtype of cos and sin."""
_NAME = "apply_rotary_pos_emb"
_TOKENS = 5
"""Number of tokens of the check."""
_ROUNDINGS = 2.0
"""Maximum difference of an element, in rounding errors at the size of its terms: two products and their sum
are rounded.
"""


def fuse_rotary(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Use the kernel in every attention module whose rotary function computes the same."""
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
            _fuse_attention(module, function, kinds[function, width], kernels)


def _rotary_function(module: nn.Module) -> RotaryFunction | None:
    """Return the ``apply_rotary_pos_emb`` function that the module's forward calls; None if it calls none."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None or _NAME not in code.co_names:
        return None
    return _namespace(module).get(_NAME)


def _head_width(module: nn.Module) -> int | None:
    width = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    return width if isinstance(width, int) else None


def _namespace(module: nn.Module) -> dict[str, Any]:
    """Return the global names that the module's forward sees."""
    namespace: dict[str, Any] = inspect.unwrap(type(module).forward).__globals__
    return namespace


def _fuse_attention(
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
    """Return whether the kernel can replace a call of the family's function: shapes, dtypes and kind fit."""
    return (
        q.dtype == k.dtype
        and cos.dtype == sin.dtype
        and q.dim() == k.dim() == 4
        and cos.dim() == 3
        and q.shape[-1] == k.shape[-1] >= cos.shape[-1]
        and (q.shape[-1] == cos.shape[-1], cos.dtype) in kinds
    )


class _Rotary(torch.autograd.Function):
    """Rotates queries and keys (batch, heads, tokens, width), and saves only cos and sin."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kernels: ModuleType
    ) -> tuple[Tensor, Tensor]:
        # Saved as attributes, because all layers share them.
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
    """Return the kinds of calls for which a family's function agrees with the kernel."""
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
    """Return whether a family's function and its gradient agree with the kernel.

    cos and sin are chosen values that differ in every column, so that no symmetry hides a difference.

    Args:
        heads: number of query heads, and of key heads.
        columns: number of columns of a head, and of those that rotate.
        dtypes: of queries and keys, and of cos and sin.
    """
    generator = torch.Generator().manual_seed(0)
    (width, rotary), (dtype, table_dtype) = columns, dtypes

    def values(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    given, grads = ([values(1, _TOKENS, n, width).transpose(1, 2) for n in heads] for _ in range(2))
    cos, sin = (values(1, _TOKENS, rotary, dtype=table_dtype) for _ in range(2))
    try:
        expected = outputs_and_gradients(lambda q, k: function(q, k, cos, sin), given, grads)
        computed = [*kernels.rotate(*given, cos, sin), *kernels.rotate(*grads, cos, sin, backward=True)]
    except Exception:  # another kind of function, or Triton's compiler, may raise anything
        return False
    sizes = [_sizes(x, cos, sin, backward=False) for x in given]
    sizes += [_sizes(x, cos, sin, backward=True) for x in grads]
    return all(
        actual.dtype == wanted.dtype and within_rounding(actual, wanted, size, _ROUNDINGS)
        for actual, wanted, size in zip(computed, expected, sizes, strict=True)
    )


def _sizes(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> Tensor:
    """Return the summed magnitudes of each result element's terms; 0 for elements that are only copied."""
    rotary = cos.shape[-1]
    turned, cos, sin = x[..., :rotary].abs(), cos[:, None].abs(), sin[:, None].abs()
    half = rotary // 2
    across = (turned * sin).roll(half, -1) if backward else turned.roll(half, -1) * sin
    return functional.pad(turned * cos + across, (0, x.shape[-1] - rotary))
