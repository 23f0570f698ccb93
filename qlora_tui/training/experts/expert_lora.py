"""LoRA on the experts of a layer, in place of peft's ``ParamWrapper``.

peft adapts a fused parameter (``target_parameters``) by adding the update to the whole of it before each
forward, which needs 16-bit weights and their memory again. Here each expert's factors are applied to its own
tokens. peft still creates the factors and saves them; for 4-bit experts it needs to see the shapes of 16-bit
parameters meanwhile (:func:`as_fused_parameters`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from qlora_tui.training.experts.expert_reference import reference_forward
from qlora_tui.training.experts.experts_4bit import (
    PROJECTIONS,
    Experts4bit,
    experts_4bit,
    is_fused_experts,
    routed_layer,
)
from qlora_tui.training.experts.routed_function import ExpertAdapter, RoutedLayer, routed_experts
from qlora_tui.training.fused.patching import patch_forward

ActiveName = Callable[[Any], str | None]
"""Returns the name of the adapter that a peft wrapper uses; None for none."""


@contextmanager
def as_fused_parameters(model: nn.Module) -> Iterator[None]:
    """Show 4-bit experts as float32 parameters of three dimensions, of one element's memory, to peft."""
    packed = {module: dict(module._parameters) for _, module in experts_4bit(model)}
    for module in packed:
        for name in PROJECTIONS:
            layout = module.layout(name)
            shown = torch.empty((), device=module.get_parameter(name).device)
            module._parameters[name] = nn.Parameter(
                shown.expand(layout.experts, layout.rows, layout.columns), requires_grad=False
            )
    try:
        yield
    finally:
        for module, parameters in packed.items():
            module._parameters.update(parameters)


def fuse_experts(model: nn.Module, active: ActiveName | None = None) -> None:
    """Compute experts one after another, with their adapters, in each layer of a ``PeftModel``.

    Args:
        active: which adapter to use; None asks peft.
    """
    inner = {wrapper.base_layer for wrapper in _wrappers(model)}
    outer = [wrapper for wrapper in _wrappers(model) if wrapper not in inner]
    wrapped = {wrapper.get_base_layer() for wrapper in outer}
    for module in [*outer, *(experts for _, experts in experts_4bit(model) if experts not in wrapped)]:
        base = module.get_base_layer() if module in outer else module
        if not isinstance(base, Experts4bit) and not is_fused_experts(base):
            continue
        vars(module).pop("forward", None)  # of an adapter before
        if isinstance(base, Experts4bit):
            vars(module)["forward"] = MethodType(_reference, module)
        patch_forward(module, _routed(active or active_in_peft), "experts")


def _routed(active: ActiveName) -> Callable[..., Tensor]:
    def forward(module: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return routed_experts(x, chosen, weights, _adapted_layer(module, active))

    return forward


def _reference(module: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The reference for 4-bit experts, with their adapters."""
    adapters = {name: a for name, a in _adapters(module, active_in_peft).items() if a is not None}
    return reference_forward(_base(module), (x, chosen, weights), adapters)


def _adapted_layer(module: Any, active: ActiveName) -> RoutedLayer:
    adapters = _adapters(module, active)
    layer = routed_layer(_base(module))
    first, second = (
        replace(projection, adapter=adapters.get(name))
        for name, projection in zip(PROJECTIONS, (layer.first, layer.second), strict=True)
    )
    return replace(layer, first=first, second=second)


def _adapters(module: Any, active: ActiveName) -> dict[str, ExpertAdapter | None]:
    """The active adapter of each adapted projection, by its name, under the outermost wrapper."""
    adapters = {}
    while is_parameter_wrapper(module):
        name = active(module)
        adapters[module.parameter_name] = (
            ExpertAdapter(
                module.lora_A[name].weight,
                module.lora_B[name].weight,
                module.scaling[name],
                module.num_experts,
            )
            if name is not None and name in module.lora_A
            else None
        )
        module = module.base_layer
    return adapters


def active_in_peft(wrapper: Any) -> str | None:
    """The adapter that peft has activated in a wrapper; None where adapters are disabled."""
    names = wrapper.active_adapters
    if len(names) > 1:
        raise NotImplementedError("several adapters at once on the experts of a layer")
    return names[0] if names and not wrapper.disable_adapters else None


def _base(module: Any) -> Any:
    return module.get_base_layer() if is_parameter_wrapper(module) else module


def _wrappers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if is_parameter_wrapper(module)]


def is_parameter_wrapper(module: nn.Module) -> bool:
    """Whether peft adapts one parameter of a module with this. By name: importing peft takes seconds."""
    return type(module).__name__ == "ParamWrapper"
