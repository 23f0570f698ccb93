"""Faster answers on a CPU: attention of one new token, and products with 4-bit weights.

torch's attention computes one query head at a time, as a product with a single row. If several query heads
share a key head, it reads the keys again for each of them. Here the query heads of one key head are the rows
of one product. This makes attention 4 to 13 times as fast, with the same results.

On a CPU with AVX512-BF16, bitsandbytes has its own layout of 4-bit weights. Each of its calls inspects the
layer, in Python and through torch's dispatcher: 25 to 40 µs, while the kernel itself takes 3 to 60 µs for one
to eight tokens of a small model. Here products call the kernel directly; bitsandbytes still converts the
layout.

Without AVX512-BF16 there is no 4-bit product: bitsandbytes dequantizes each layer's weights at every token.
Dequantizing once gives the same numbers in half the time, for eight times the memory in fp32.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_int64, c_void_p
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_tui.training.checks.attention import attention_matches
from qlora_tui.training.checks.rounding import bitwise_equal, example_rows, within_rounding
from qlora_tui.training.compute_device import ComputeDevice, free_host_bytes

_verified: dict[tuple[object, ...], bool] = {}
"""Whether grouped heads give the same results, by shapes, dtype and settings; tested on the first call."""


@contextmanager
def grouped_heads() -> Iterator[None]:
    """Compute attention with grouped heads inside the block, in models that use SDPA.

    The implementation keeps the name of SDPA, because some models decide by this name which keys their mask
    hides.
    """
    AttentionInterface.register("sdpa", attend)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention of query (batch, heads, tokens, width); return (batch, tokens, heads, width)."""
    settings = {name: value for name, value in kwargs.items() if value is not None}

    def by_library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output: Tensor = sdpa_attention_forward(module, q, k, v, attention_mask, scaling=scaling, **kwargs)[0]
        return output

    _, heads, tokens, width = query.shape
    shared = key.shape[1]
    # A mask that only hides padding is the same for all heads.
    masks_heads = attention_mask is not None and (
        attention_mask.dtype != torch.bool or attention_mask.shape[1:3] != (1, 1)
    )
    if tokens > 1 or heads == shared or masks_heads or "position_bias" in settings:
        return by_library(query, key, value), None
    in_groups = partial(_in_groups, scaling, attention_mask)
    shapes = (heads, key.shape[1::2], value.shape[-1], width, query.dtype, attention_mask is None)
    case = (type(module), *shapes, scaling, *settings)
    if case not in _verified and key.shape[2] > 1:  # a single key gets all the weight, grouped or not
        _verified[case] = attention_matches(in_groups, by_library, query, key, value, scaling)
    attention = in_groups if _verified.get(case, False) else by_library
    return attention(query, key, value), None


def _in_groups(
    scaling: float | None, mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Compute attention with the query heads of each key head as rows; return (batch, 1, heads, width)."""
    batch, heads, _, width = query.shape
    rows = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    output = functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(batch, 1, heads, value.shape[-1])


_SUPPORTED = re.compile(r"0\.(49|50)\.")
"""Versions of bitsandbytes whose kernel has the signature that :func:`_direct_kernel` uses.

With other versions, the layer's own forward runs.
"""
_CHUNK_ROWS = 1024
"""Number of rows of a weight that are converted to fp32 at a time."""
_ROUNDINGS = 4.0
"""Number of rounding steps by which a product may differ from the exact result."""
_ROWS = 32
"""Number of outputs that the layout stores as a group."""


def use_cpu_layout(model: nn.Module) -> None:
    """Convert 4-bit layers to bitsandbytes' layout for AVX512-BF16, if this CPU has it. For inference only.

    Layers stay unchanged if the layout would change their results. Converted layers call the kernel directly
    if this gives the same results.
    """
    layers: list[Any] = [each for each in model.modules() if hasattr(each, "support_avx512bf16_for_cpu")]
    if not layers:
        return
    # Imported here: it takes a second to load and a 16-bit model does not need it.
    import bitsandbytes
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        return
    is_supported = _SUPPORTED.match(bitsandbytes.__version__)
    verified: dict[tuple[object, ...], bool] = {}
    for layer in filter(_has_the_shape, layers):
        state = layer.weight.quant_state
        case = (*state.shape, state.blocksize, state.quant_type, state.nested, layer.bias is None)
        if case not in verified:
            verified[case] = layout_agrees(layer)
        if not verified[case]:
            continue
        layer.support_avx512bf16_for_cpu = True
        # The layout is converted at the first product. Convert it now, so that the first question does not
        # wait.
        layer(torch.zeros(1, layer.in_features, dtype=layer.compute_dtype))
        layer._save_to_state_dict = _save_nothing
        product = _direct_kernel(layer) if is_supported else None
        x = _example_tokens(layer)
        with torch.no_grad():
            is_same = product is not None and all(
                bitwise_equal(product(each), layer(each)) for each in (x[:1], x)
            )
        if product is not None and is_same:
            layer.forward = DirectForward(layer.forward, product)


def _has_the_shape(layer: Any) -> bool:
    """Return whether the layout supports the layer's shape. bitsandbytes checks it only while converting."""
    outputs, inputs, blocksize = layer.out_features, layer.in_features, layer.weight.quant_state.blocksize
    return not (outputs % _ROWS or inputs % blocksize)


@torch.no_grad()
def layout_agrees(layer: Any) -> bool:
    """Return whether the layout gives the products of the stored weights, tested on a copy of the layer.

    The allowed rounding error of a product is proportional to the root of a sum of squares: the squares of
    its terms and, because block scales are rounded too, the squares of its block sums. Each output must be
    within this bound, so neither a wrong row nor a wrong block passes.
    """
    from bitsandbytes.functional import dequantize_4bit

    state = layer.weight.quant_state
    weights = dequantize_4bit(layer.weight.data.reshape(-1, 1), state).view(state.shape)
    copied = copy.deepcopy(layer).eval()
    copied.support_avx512bf16_for_cpu = True
    x = _example_tokens(layer)
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.float()
    expected, scale = [], []
    for weight in weights.split(_CHUNK_ROWS):
        terms = (y.float().view(len(y), -1, state.blocksize) for y in (x, weight))
        blocks = torch.einsum("tbi,obi->tob", *terms)
        expected.append(blocks.sum(-1))
        scale.append(x.float().square() @ weight.float().square().t() + blocks.square().sum(-1))
    exact = torch.cat(expected, dim=1) + bias
    size = (torch.cat(scale, dim=1) + bias.square()).sqrt()
    # One token and several tokens use different kernels.
    return all(
        within_rounding(copied(x[:count]), exact[:count], size[:count], _ROUNDINGS) for count in (1, len(x))
    )


def _example_tokens(layer: Any) -> Tensor:
    """Return example inputs (3, inputs) of the layer, a few channels of which are very large."""
    return example_rows(3, layer.in_features, outlier=100).to(layer.compute_dtype)


def _save_nothing(*args: Any, **kwargs: Any) -> None:
    """Save nothing of a layer when its state is requested.

    To save a layer, bitsandbytes would convert its weights back permanently and round their scales a second
    time. peft requests the state when it loads an adapter, but does not need it.
    """


class DirectForward:
    """Replacement of the ``forward`` of one ``Linear4bit``."""

    def __init__(
        self, original_forward: Callable[[Tensor], Tensor], product: Callable[[Tensor], Tensor]
    ) -> None:
        self._original_forward = original_forward
        self._product = product

    def __call__(self, x: Tensor) -> Tensor:
        fits = x.dtype == torch.bfloat16 and x.is_contiguous()
        return self._product(x) if fits else self._original_forward(x)


def _direct_kernel(layer: Any) -> Callable[[Tensor], Tensor] | None:
    """Return a function from inputs (…, inputs) to outputs (…, outputs).

    Returns None if the weights have another layout, or if the layer does not compute in bfloat16.
    """
    from bitsandbytes.cextension import lib

    weight, state, bias = layer.weight.data, layer.weight.quant_state, layer.bias
    if not getattr(state, "packing_format_for_cpu", False) or layer.compute_dtype != torch.bfloat16:
        return None
    kernel = getattr(lib, f"gemv_4bit_inference_cpu_{state.quant_type}_bf16")
    absmax = state.absmax
    outputs, inputs = state.shape
    sizes = c_int64(outputs), c_int64(inputs)
    strides = c_int64(state.blocksize), c_int64(inputs), c_int64(outputs)
    addresses = c_void_p(weight.data_ptr()), c_void_p(absmax.data_ptr())

    def product(x: Tensor, owners: object = (weight, absmax)) -> Tensor:
        out = x.new_empty((*x.shape[:-1], outputs))
        rows = c_int64(x.numel() // inputs)
        kernel(rows, *sizes, c_void_p(x.data_ptr()), *addresses, c_void_p(out.data_ptr()), *strides)
        return out if bias is None else out.add_(bias)

    return product


_SHARE_OF_FREE_MEMORY = 0.25


def dequantize_on_cpu(model: Any, device: ComputeDevice) -> bool:
    """Dequantize 4-bit weights if the CPU has no fast product for them, and if there is enough free memory.

    Return whether they were dequantized.
    """
    if not any(hasattr(each, "quant_state") for each in model.modules()):
        return False
    # Imported here: it takes a second to load.
    from bitsandbytes.functional import has_avx512bf16
    from bitsandbytes.nn import Linear4bit

    packed = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, Linear4bit)
    ]
    wanted_bytes = (
        sum(layer.in_features * layer.out_features for _, _, layer in packed) * device.dtype.itemsize
    )
    free_bytes = free_host_bytes()
    if not packed or has_avx512bf16() or wanted_bytes > free_bytes * _SHARE_OF_FREE_MEMORY:
        return False
    for parent, name, layer in packed:
        setattr(parent, name, _dequantized(layer, device.dtype))
    return True


def _dequantized(layer: Any, dtype: torch.dtype) -> nn.Linear:
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = layer.bias
    return plain
