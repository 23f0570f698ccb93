"""4-bit weights on CPUs with AVX512-BF16: bitsandbytes' own layout, and direct calls of its kernel.

bitsandbytes inspects its layer at every call, in Python and through torch's dispatcher: 25 µs, where the
kernel itself takes 3 to 15 for a product of a small model. Here one token's product goes directly to the
kernel; everything else, including the change of layout, is left to bitsandbytes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor, nn

from qlora_tui.training.checks.compare import bitwise_equal, within_rounding

_SUPPORTED = re.compile(r"0\.(49|50)\.")
"""Versions of bitsandbytes with a matching kernel signature; with others the layer's own forward runs."""
_CHUNK_ROWS = 1024
"""Rows of a weight that are in fp32 at a time."""
_ROUNDINGS = 4.0
"""Rounding steps by which a product may differ from the exact one."""
_ROWS = 32
"""Outputs that the layout groups together."""


def use_cpu_layout(model: nn.Module) -> None:
    """Convert 4-bit layers to the layout that is fastest on this CPU, if any. Inference only."""
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
        # The layout changes with the first product: do it now, so that the first question does not wait.
        layer(torch.zeros(1, layer.in_features, dtype=layer.compute_dtype))
        layer._save_to_state_dict = _save_nothing
        if is_supported and (product := _direct_kernel(layer)) and _matches_layer(product, layer):
            layer.forward = SingleTokenForward(layer.forward, product)


def _has_the_shape(layer: Any) -> bool:
    """Return whether the layout supports the layer's shape; bitsandbytes checks it only while converting."""
    outputs, inputs, blocksize = layer.out_features, layer.in_features, layer.weight.quant_state.blocksize
    return not (outputs % _ROWS or inputs % blocksize)


@torch.no_grad()
def layout_agrees(layer: Any) -> bool:
    """Return whether the layout gives the products of the stored weights, tested on a copy of the layer.

    The rounding of a product is bounded by the root of its squared terms and of its squared block sums, whose
    scales are rounded too. Each output must be within that, so neither a wrong row nor a wrong block passes.
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
    # One token and several use different kernels.
    return all(
        within_rounding(copied(x[:count]), exact[:count], size[:count], _ROUNDINGS) for count in (1, len(x))
    )


@torch.no_grad()
def _matches_layer(product: Callable[[Tensor], Tensor], layer: Any) -> bool:
    """Return whether the kernel, called directly, gives bit-identical results to the layer."""
    x = _example_tokens(layer)[:1]
    return bitwise_equal(product(x), layer(x))


def _example_tokens(layer: Any) -> Tensor:
    """Return inputs (3, inputs) of the layer, with a few massive channels."""
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    x[:, :: max(layer.in_features // 3, 1)] *= 100
    return x.to(layer.compute_dtype)


def _save_nothing(*args: Any, **kwargs: Any) -> None:
    """Save nothing of a layer. bitsandbytes would convert its weights back for saving, permanently, and round
    their scales a second time; peft requests them when it loads an adapter, and does not need them."""


class SingleTokenForward:
    """Replacement of the ``forward`` of one ``Linear4bit``."""

    def __init__(
        self, original_forward: Callable[[Tensor], Tensor], product: Callable[[Tensor], Tensor]
    ) -> None:
        self._original_forward = original_forward
        self._product = product

    def __call__(self, x: Tensor) -> Tensor:
        is_one = x.numel() == x.shape[-1] and x.dtype == torch.bfloat16 and x.is_contiguous()
        return self._product(x) if is_one else self._original_forward(x)


def _direct_kernel(layer: Any) -> Callable[[Tensor], Tensor] | None:
    """Return a function from one token's inputs (…, inputs) to its outputs; None for another layout."""
    from bitsandbytes.cextension import lib

    weight, state, bias = layer.weight.data, layer.weight.quant_state, layer.bias
    if not getattr(state, "packing_format_for_cpu", False) or layer.compute_dtype != torch.bfloat16:
        return None
    kernel = getattr(lib, f"gemv_4bit_inference_cpu_{state.quant_type}_bf16")
    absmax = state.absmax
    outputs, inputs = state.shape
    sizes = c_int64(1), c_int64(outputs), c_int64(inputs)
    strides = c_int64(state.blocksize), c_int64(inputs), c_int64(outputs)
    addresses = c_void_p(weight.data_ptr()), c_void_p(absmax.data_ptr())

    def product(x: Tensor, owners: object = (weight, absmax)) -> Tensor:
        out = x.new_empty((*x.shape[:-1], outputs))
        kernel(*sizes, c_void_p(x.data_ptr()), *addresses, c_void_p(out.data_ptr()), *strides)
        return out if bias is None else out.add_(bias)

    return product
