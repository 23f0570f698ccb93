"""The routed experts of a layer with 4-bit weights, in place of a family's module of fused parameters.

The classes of transformers share an interface (``use_experts_implementation`` in ``integrations/moe.py``):
``gate_up_proj`` and ``down_proj`` are parameters of three dimensions, biases have the suffix ``_bias``, and
``_apply_gate`` is the activation between them. bitsandbytes quantizes none of these, as they are no linear
modules. :class:`Experts4bit` holds the same weights under the same names, packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_tui.training.experts.expert_storage import PACKED, ExpertLayout, dequantize
from qlora_tui.training.experts.routed_function import Projection, RoutedLayer, routed_experts

PROJECTIONS = ("gate_up_proj", "down_proj")
"""Names of the parameters, in the order in which they are computed."""
_KINDS = 3


class Experts4bit(nn.Module):
    """Experts whose two projections are stacks of 4-bit matrices.

    Every tensor is a parameter or a buffer of this module: ``gate_up_proj`` and ``down_proj``, (experts,
    bytes) of uint8, their scales with suffixes (:mod:`.expert_storage`), and the family's biases if any.
    """

    def __init__(self, family: Any, method: str, *, nested: bool) -> None:
        """Take the shapes and the activation of ``family``, the module to replace; values come later.

        Args:
            family: a module for which :func:`is_fused_experts` is true, on any device.
            method: ``nf4`` or ``fp4``.
            nested: whether scales are quantized too.
        """
        super().__init__()
        self.num_experts = int(family.gate_up_proj.shape[0])
        self.is_transposed = bool(family.is_transposed)
        self._layouts = {}
        for name in PROJECTIONS:
            experts, rows, columns = getattr(family, name).shape
            self._layouts[name] = ExpertLayout(experts, rows, columns, method, nested)
        for name, layout in self._layouts.items():
            for suffix, tensor in layout.empty_tensors(getattr(family, name).device).items():
                if suffix == PACKED:
                    self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
                else:
                    self.register_buffer(name + suffix, tensor)
            if family.has_bias:
                self.register_parameter(f"{name}_bias", getattr(family, f"{name}_bias"))
        # The family's own function, with what it reads of the module: its activation and its limits. It is
        # kept out of the modules of this one, as it has parameters under the same names.
        self._family = [_without_parameters(family)]

    def layout(self, name: str) -> ExpertLayout:
        """Shape and quantization of ``gate_up_proj`` or ``down_proj``."""
        return self._layouts[name]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a projection by suffix."""
        return {suffix: getattr(self, name + suffix) for suffix in self._layouts[name].suffixes}

    def matrix(self, name: str, expert: int, dtype: torch.dtype, memory: Tensor | None = None) -> Tensor:
        """One expert's matrix of a projection, dequantized; (rows, columns) as the family stores it."""
        return dequantize(self.tensors(name), expert, self._layouts[name], dtype, memory)

    def bias(self, name: str) -> Tensor | None:
        """The biases (experts, outputs) of a projection; None where the family has none."""
        return self._parameters.get(f"{name}_bias")

    def apply_gate(self, both: Tensor) -> Tensor:
        """The activation: gate and up projections (n, 2 · width) to (n, width)."""
        out: Tensor = self._family[0]._apply_gate(both)
        return out

    @property
    def family(self) -> Any:
        """The module that this one replaces, without weights."""
        return self._family[0]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sums (tokens, hidden) of the experts of each token."""
        return routed_experts(hidden_states, top_k_index, top_k_weights, routed_layer(self))


def routed_layer(experts: Any) -> RoutedLayer:
    """What a layer's experts compute, without an adapter; for 4-bit experts and for a family's own module."""
    first, second = (_projection(experts, name) for name in PROJECTIONS)
    gate = experts.apply_gate if isinstance(experts, Experts4bit) else experts._apply_gate
    return RoutedLayer(first, second, gate, int(experts.num_experts), isinstance(experts, Experts4bit))


def _projection(experts: Any, name: str) -> Projection:
    if isinstance(experts, Experts4bit):
        layout = experts.layout(name)
        rows, columns, read, bias = (
            layout.rows,
            layout.columns,
            partial(experts.matrix, name),
            experts.bias(name),
        )
    else:
        _, rows, columns = getattr(experts, name).shape
        read, bias = partial(_stored_matrix, experts, name), getattr(experts, f"{name}_bias", None)
    transposed = bool(experts.is_transposed)
    outputs, inputs = (columns, rows) if transposed else (rows, columns)
    return Projection(read, transposed, inputs, outputs, bias)


def _stored_matrix(
    experts: nn.Module, name: str, expert: int, dtype: torch.dtype, memory: Tensor | None = None
) -> Tensor:
    stored: Tensor = getattr(experts, name)[expert]
    return stored.to(dtype)


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module has its experts in two fused parameters, each matrix of which is used by itself."""
    return (
        hasattr(module, "is_transposed")
        and getattr(module, "has_gate", False)
        and not getattr(module, "has_post_expert_norm", False)
        and all(
            isinstance(parameter := module._parameters.get(name), nn.Parameter)
            and parameter.dim() == _KINDS
            and parameter.is_floating_point()
            for name in PROJECTIONS
        )
    )


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model with fused experts in 16 or 32 bits, by name."""
    return ((name, module) for name, module in model.named_modules() if is_fused_experts(module))


def experts_4bit(model: nn.Module) -> Iterator[tuple[str, Experts4bit]]:
    """The modules of a model with 4-bit experts, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Experts4bit))


def replace_experts(model: nn.Module, method: str, *, nested: bool) -> None:
    """Replace every module of fused experts by one for 4-bit weights, still without values."""
    for name, module in list(fused_experts(model)):
        model.set_submodule(name, Experts4bit(module, method, nested=nested))


def _without_parameters(family: Any) -> Any:
    """A shallow copy of a module that keeps its settings and submodules, and no parameters."""
    copy = object.__new__(type(family))
    copy.__dict__.update({**family.__dict__, "_parameters": {}, "_buffers": dict(family._buffers)})
    return copy
