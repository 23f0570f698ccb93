"""4-bit weights dequantized once, where that is faster than dequantizing them for every token.

A CPU without AVX512-BF16 has no 4-bit product: bitsandbytes dequantizes each layer's weights at every token.
Doing it once gives the same numbers in half the time, for eight times the memory in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qlora_tui.training.compute_device import ComputeDevice, free_host_bytes

_SHARE_OF_FREE_MEMORY = 0.25


def dequantize_on_cpu(model: Any, device: ComputeDevice) -> bool:
    """Dequantize the 4-bit weights if this CPU has no fast product and enough memory; return whether done."""
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
