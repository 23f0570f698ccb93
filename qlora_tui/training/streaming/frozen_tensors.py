"""Finds the tensors of a decoder layer that move between host and device: frozen weights and their scales.

Norms and biases stay on the device: they are small, and other parts of the trainer read them outside of the
layer's forward. Everything else that is frozen moves, however it is stored: as parameters, as buffers, or in
the state objects of quantized weights (bitsandbytes' ``QuantState``, with the nested one of double
quantization, and ``MatmulLtState``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_STATE_PACKAGES = ("bitsandbytes", "qlora_tui")
"""Packages whose objects may hold tensors of a quantized weight."""
_MIN_DIMENSIONS = 2
"""Dimensions from which a plain parameter or buffer moves: norms and biases have one."""

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
"""Attributes of every module: parameters, buffers, submodules, hooks."""


def movable_tensors(layer: nn.Module) -> list[Tensor]:
    """Every tensor object of a layer that moves. Several objects may share memory."""
    by_id: dict[int, Tensor] = {}
    for module in layer.modules():
        for tensor in _owned_tensors(module):
            if tensor.dim() >= _MIN_DIMENSIONS and not tensor.requires_grad:
                by_id[id(tensor)] = tensor
        for tensor in _state_tensors(module):
            by_id[id(tensor)] = tensor
    return [tensor for tensor in by_id.values() if tensor.numel()]


def all_tensors(model: nn.Module) -> list[Tensor]:
    """Every tensor object of a model: parameters, buffers, attributes of modules, quantization states."""
    by_id: dict[int, Tensor] = {}
    for module in model.modules():
        for tensor in (*_owned_tensors(module), *_state_tensors(module)):
            by_id[id(tensor)] = tensor
    return list(by_id.values())


@dataclass(frozen=True)
class Extent:
    """The memory that a tensor reads."""

    address: int
    size_bytes: int


def extent_of(tensor: Tensor) -> Extent:
    """The memory from the first to the last element of a tensor, which is not empty."""
    return Extent(tensor.data_ptr(), _span(tensor) * tensor.element_size())


def bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a tensor as a uint8 vector that shares it, gaps between strides included."""
    return tensor.data.as_strided((_span(tensor),), (1,)).view(torch.uint8)


def point_to(tensor: Tensor, buffer: Tensor) -> None:
    """Let a tensor read its values from ``buffer``, a uint8 vector of the size of its extent.

    The object stays the same, so everything that refers to it sees the values in the buffer.
    """
    tensor.data = buffer.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last of a tensor."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _owned_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of the module itself, and tensors among its attributes."""
    for values in (module._parameters, module._buffers, vars(module)):
        for value in values.values():
            if isinstance(value, Tensor):
                yield value


def _state_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Tensors in the state objects of quantized weights of the module itself."""
    seen: set[int] = set()
    for parameter in module._parameters.values():
        if parameter is not None and not parameter.requires_grad:
            for value in vars(parameter).values():
                yield from _tensors_in(value, seen)
    for name, value in vars(module).items():
        if name not in _MODULE_ATTRIBUTES and not isinstance(value, Tensor):
            yield from _tensors_in(value, seen)


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item, seen)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item, seen)
    elif _is_state(value):
        for item in vars(value).values():
            yield from _tensors_in(item, seen)


def _is_state(value: Any) -> bool:
    """Whether an object holds the state of a quantized weight. Modules are visited by themselves."""
    package = type(value).__module__.partition(".")[0]
    return package in _STATE_PACKAGES and hasattr(value, "__dict__") and not isinstance(value, nn.Module)
