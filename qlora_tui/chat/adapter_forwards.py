"""LoRA for inference only: three matrix products per layer and nothing else.

peft's layers convert dtypes, apply dropout, scale and copy at every call, which costs more than the adapter's
arithmetic at one token per step. Here the scale is folded into one factor and the update is added in place.

On a CPU the factors are in fp32: torch computes a thin product in half precision through a library with three
times the overhead, on all cores, which wait for each other on a busy machine. With many tokens at once that
does not matter, and half precision saves their conversion.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora_tui.memory.budget import this_processor
from qlora_tui.training.checks.compare import within_rounding
from qlora_tui.training.embeddings import TokenRows, row_wrappers, rows_of, with_rows
from qlora_tui.training.experts.lora import is_parameter_wrapper
from qlora_tui.training.fused.patching import temporary_forwards

_MANY_TOKENS = 64
_FP32 = 64 * torch.finfo(torch.float32).eps
"""Relative error of an update allowed for fp32 products."""
_ROUNDINGS = 1.0
"""Rounding steps by which a layer's output may differ from peft's in float64."""


class ActiveAdapter:
    """Name of the active adapter, shared by all layers, so that switching is free."""

    def __init__(self, adapter_name: str) -> None:
        self.adapter_name = adapter_name


class LoraForward:
    """Replacement of the ``forward`` of one peft layer. Inference only: it adds in place."""

    def __init__(self, base: nn.Module, active: ActiveAdapter) -> None:
        self._base = base
        self._active = active
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    def register(self, adapter_name: str, layer: Any) -> None:
        """Copy the factors of an adapter from peft."""
        down, up = layer.lora_A[adapter_name].weight.detach(), layer.lora_B[adapter_name].weight.detach()
        if down.device.type == "cpu":
            down, up = down.float(), up.float()
        down, up = down.T.contiguous(), up.T.contiguous() * layer.scaling[adapter_name]
        self._factors[adapter_name] = (down, up)

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward_with(self._active.adapter_name, x)

    def forward_with(self, adapter_name: str, x: Tensor) -> Tensor:
        """Compute the layer's output with ``adapter_name``, or the base's without such an adapter."""
        output: Tensor = self._base(x)
        factors = self._factors.get(adapter_name)
        if factors is not None:
            down, up = factors
            rows, inputs = output.view(-1, output.shape[-1]), x.reshape(-1, x.shape[-1])
            if len(rows) >= _MANY_TOKENS and _is_quick(x):
                down, up = down.to(x.dtype), up.to(x.dtype)
            inner = inputs.to(down.dtype) @ down
            if rows.dtype == up.dtype:
                rows.addmm_(inner, up)
            else:
                rows.add_(inner @ up)
        return output


def _is_quick(x: Tensor) -> bool:
    """Return whether products in the dtype of x are as fast as in fp32."""
    return x.device.type != "cpu" or (x.dtype == torch.bfloat16 and this_processor().native_bfloat16)


class TokenRowsForward:
    """Replacement of the ``forward`` of peft's module around an embedding or a head."""

    def __init__(self, base: nn.Module, active: ActiveAdapter) -> None:
        self._base = base
        self._active = active
        self._rows: dict[str, TokenRows] = {}

    def register(self, adapter_name: str, wrapper: Any) -> None:
        """Copy the rows of an adapter from peft."""
        self._rows[adapter_name] = rows_of(wrapper, adapter_name)

    def __call__(self, x: Tensor) -> Tensor:
        return with_rows(self._base, x, self._rows.get(self._active.adapter_name))


class WholeModuleForward:
    """Replacement of the ``forward`` of peft's module around one that adapters train in whole."""

    def __init__(self, wrapper: Any, active: ActiveAdapter) -> None:
        self._base = wrapper.original_module
        self._copies = wrapper.modules_to_save
        self._active = active

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self._active.adapter_name
        if name not in self._copies:
            return self._base(*args, **kwargs)
        return self._copies[name](*args, **kwargs)


def fuse_whole_modules(model: nn.Module, active: ActiveAdapter) -> None:
    """Make modules that adapters train in whole follow ``active``, not peft's own active adapter."""
    from peft.utils.other import ModulesToSaveWrapper

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            vars(wrapper)["forward"] = WholeModuleForward(wrapper, active)


def fuse_token_rows(model: nn.Module, adapter_name: str, active: ActiveAdapter) -> None:
    """Make embedding and head use the token rows of ``adapter_name``, if any."""
    for wrapper in row_wrappers(model):
        forward = vars(wrapper).get("forward")
        if forward is None:
            forward = wrapper.forward = TokenRowsForward(wrapper.original_module, active)
        if adapter_name in wrapper.token_adapter.trainable_tokens_delta:
            forward.register(adapter_name, wrapper)


def fuse_adapter(model: nn.Module, adapter_name: str, active: ActiveAdapter) -> bool:
    """Add ``adapter_name`` to ``model`` with fused forwards; False where it is not plain LoRA."""
    layers = [layer for layer in _layers(model) if _has(layer, adapter_name)]
    if not all(_is_plain(layer, adapter_name) for layer in layers):
        return False
    for layer in layers:
        forward = vars(layer).get("forward")
        if forward is None:
            forward = LoraForward(layer.get_base_layer(), active)
        forward.register(adapter_name, layer)
        if not matches_peft(layer, adapter_name, forward):
            return False
        layer.forward = forward
    return True


@torch.inference_mode()
def matches_peft(layer: Any, adapter_name: str, forward: LoraForward) -> bool:
    """Return whether ``forward`` adds the same update as peft's own forward, element by element.

    The base is replaced by fixed values. peft computes in float64, so the difference is the rounding of
    ``forward``: of its result and, with 16-bit factors, of the update's terms.
    """
    down, up = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    x, output = _example_tokens(down, up)
    factors = down.data, up.data
    active, own = layer.active_adapters, vars(layer).pop("forward", None)
    try:
        layer.set_adapter(adapter_name, inference_mode=True)
        down.data, up.data = down.data.double(), up.data.double()
        with temporary_forwards({layer.get_base_layer(): lambda given: output[: len(given)].double()}):
            expected = layer(x.double())
    finally:
        down.data, up.data = factors
        layer.set_adapter(active, inference_mode=True)
        if own is not None:
            layer.forward = own
    inner = x.double().square() @ down.double().square().t()
    update = (inner @ up.double().square().t()).sqrt() * abs(layer.scaling[adapter_name])
    with temporary_forwards({layer.get_base_layer(): lambda given: output[: len(given)].clone()}):
        results = [forward.forward_with(adapter_name, x[:count]) for count in (1, len(x))]
    for result in results:
        wanted = expected[: len(result)]
        is_wide = x.dtype == torch.float32 or (x.device.type == "cpu" and len(result) == 1)
        share = _FP32 / torch.finfo(result.dtype).eps if is_wide else 2.0
        if not within_rounding(result, wanted, wanted.abs() + share * update[: len(result)], _ROUNDINGS):
            return False
    return True


def _example_tokens(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs (64, inputs) with massive channels, and base outputs (64, outputs), half of them 0."""
    generator = torch.Generator().manual_seed(0)
    x, output = (torch.randn(_MANY_TOKENS, n, generator=generator) for n in (down.shape[1], up.shape[0]))
    x[:, :: max(x.shape[1] // 3, 1)] *= 100
    output[:, ::2] = 0
    return x.to(down.device, down.dtype), output.to(up.device, up.dtype)


def restore_peft(model: nn.Module) -> None:
    """Restore peft's own forwards."""
    for layer in _layers(model):
        vars(layer).pop("forward", None)


def _layers(model: nn.Module) -> Iterator[Any]:
    # Imported here because peft takes seconds to load and a base alone does not need it.
    from peft.tuners.lora import LoraLayer

    # The experts' wrappers have other forwards (training/experts/lora.py).
    return (
        module
        for module in model.modules()
        if isinstance(module, LoraLayer) and not is_parameter_wrapper(module)
    )


def _has(layer: Any, adapter_name: str) -> bool:
    return adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A


def _is_plain(layer: Any, adapter_name: str) -> bool:
    """Return whether the update is scale · B·A·x, unlike DoRA's and an embedding's."""
    return (
        adapter_name in layer.lora_A
        and type(layer.lora_A[adapter_name]) is nn.Linear
        and adapter_name not in layer.lora_variant
        and not layer.lora_bias.get(adapter_name, False)
        and not layer.merged
    )
