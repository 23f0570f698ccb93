"""Copies of the adapter's weights in the compute dtype, made once per forward of the model.

The weights are fp32, because small updates would vanish in 16 bits, and their products are in 16 bits.
Without the copies a step casts each of them three times (forward, recomputation, backward), in kernels that
take a GPU longer to launch than to run: 42 of some 300 launches per layer. Here one call casts all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Stack: TypeAlias = tuple[nn.Parameter, ...]
"""Parameters of the same width that are multiplied together."""


class AdapterCasts:
    """16-bit copies of some parameters. They are valid from a refresh until a parameter changes.

    Parameters of one stack, of equal width, have their copies in the rows of one tensor.
    """

    def __init__(self) -> None:
        self._stacks: list[Stack] = []
        self._stacked_copies: list[Tensor] = []
        """One tensor for each stack."""
        self._copies: list[Tensor] = []
        """Views of them, one for each parameter."""
        self._by_parameter: dict[int, tuple[Tensor, int]] = {}
        """The copy of each parameter, by its id, and the parameter's version when it was made."""
        self._by_stack: dict[tuple[int, ...], Tensor] = {}
        """The copies of each stack, by the ids of its parameters."""

    def refresh_in(self, decoder: nn.Module, stacks: list[Stack]) -> None:
        """Refresh the copies of these parameters before each forward of ``decoder``.

        No part of a model with an adapter runs before its decoder, whichever way the model is called.
        """
        self._stacks = stacks
        decoder.register_forward_pre_hook(self._before_forward)

    def cast(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """``parameter`` in ``dtype``: its copy where that is valid."""
        copy = self._valid_copy(parameter, dtype)
        return parameter.to(dtype) if copy is None else copy

    def cast_stack(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The rows of all parameters in ``dtype``: their copies where those are of one stack and valid."""
        stacked = self._by_stack.get(tuple(map(id, parameters)))
        if stacked is None or any(self._valid_copy(parameter, dtype) is None for parameter in parameters):
            return torch.cat([parameter.to(dtype) for parameter in parameters])
        return stacked

    def _valid_copy(self, parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
        copy, version = self._by_parameter.get(id(parameter), (None, -1))
        return copy if copy is not None and copy.dtype == dtype and version == parameter._version else None

    @torch.no_grad()
    def _before_forward(self, decoder: nn.Module, args: Any) -> None:
        parameters = [parameter for stack in self._stacks for parameter in stack]
        dtype = _compute_dtype(decoder)
        if not parameters or dtype.itemsize >= parameters[0].element_size():
            self._stacked_copies, self._copies, self._by_parameter, self._by_stack = [], [], {}, {}
            return
        if not self._copies or self._copies[0].dtype != dtype:
            self._allocate(dtype)
        torch._foreach_copy_(self._copies, list[Tensor](parameters))
        self._by_parameter = {
            id(parameter): (copy, parameter._version)
            for parameter, copy in zip(parameters, self._copies, strict=True)
        }

    def _allocate(self, dtype: torch.dtype) -> None:
        rows = [[len(parameter) for parameter in stack] for stack in self._stacks]
        self._stacked_copies = [
            stack[0].new_empty((sum(each), stack[0].shape[1]), dtype=dtype)
            for stack, each in zip(self._stacks, rows, strict=True)
        ]
        self._copies = [
            copy
            for stacked, each in zip(self._stacked_copies, rows, strict=True)
            for copy in torch.split(stacked, each)
        ]
        self._by_stack = {
            tuple(map(id, stack)): stacked
            for stack, stacked in zip(self._stacks, self._stacked_copies, strict=True)
        }


def _compute_dtype(decoder: nn.Module) -> torch.dtype:
    """Dtype of the adapter's products: autocast's, or that of the frozen weights that are not quantized."""
    frozen = next(p for p in decoder.parameters() if p.is_floating_point() and not p.requires_grad)
    device = frozen.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return frozen.dtype
