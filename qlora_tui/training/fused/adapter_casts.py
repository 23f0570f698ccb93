"""Copies of the adapter's weights in the compute dtype, made once per forward of the model.

The weights are fp32, because small updates would vanish in 16 bits, and their products are in 16 bits.
Without the copies a step casts each of them three times (forward, recomputation, backward), in kernels that
take a GPU longer to launch than to run: 42 of some 300 launches per layer (``bench/launches.py``). Here one
call casts all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class AdapterCasts:
    """16-bit copies of some parameters. They are valid from a refresh until a parameter changes."""

    def __init__(self) -> None:
        self._parameters: list[nn.Parameter] = []
        self._copies: list[Tensor] = []
        self._by_parameter: dict[int, tuple[Tensor, int]] = {}
        """The copy of each parameter, by its id, and the parameter's version when it was made."""

    def refresh_in(self, decoder: nn.Module, parameters: list[nn.Parameter]) -> None:
        """Refresh the copies of ``parameters`` before each forward of ``decoder``.

        No part of a model with an adapter runs before its decoder, whichever way the model is called.
        """
        self._parameters = parameters
        decoder.register_forward_pre_hook(self._before_forward)

    def cast(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """``parameter`` in ``dtype``: its copy where that is valid."""
        copy, version = self._by_parameter.get(id(parameter), (None, -1))
        if copy is None or copy.dtype != dtype or version != parameter._version:
            return parameter.to(dtype)
        return copy

    @torch.no_grad()
    def _before_forward(self, decoder: nn.Module, args: Any) -> None:
        parameters = self._parameters
        dtype = _compute_dtype(decoder)
        if not parameters or dtype.itemsize >= parameters[0].element_size():
            self._copies, self._by_parameter = [], {}
            return
        if not self._copies or self._copies[0].dtype != dtype:
            self._copies = [torch.empty_like(parameter, dtype=dtype) for parameter in parameters]
        torch._foreach_copy_(self._copies, list[Tensor](parameters))
        self._by_parameter = {
            id(parameter): (copy, parameter._version)
            for parameter, copy in zip(parameters, self._copies, strict=True)
        }


def _compute_dtype(decoder: nn.Module) -> torch.dtype:
    """Dtype of the adapter's products: autocast's, or that of the frozen weights that are not quantized."""
    frozen = next(p for p in decoder.parameters() if p.is_floating_point() and not p.requires_grad)
    device = frozen.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return frozen.dtype
