"""LoRA without what training needs: three matrix products a layer and nothing else.

peft's layers convert dtypes, apply dropout, scale and copy at every call, which costs more than the adapter's
arithmetic when one token is read at a time. Here the scale is folded into one factor and the update is added
in place.

On a CPU the factors are kept in fp32: torch answers a thin product in half precision through a library that
takes three times as long to begin, and sets every core to it, which on a busy machine wait for each other.
Where many tokens are read at once that is no matter, and half precision spares the conversion of them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora_tui.memory.cpu import this_processor
from qlora_tui.training.agreement import within_rounding
from qlora_tui.training.fused.patching import temporary_forwards
from qlora_tui.training.trainable_tokens import TokenRows, row_wrappers, rows_of, with_rows

_MANY_TOKENS = 64
_FP32 = 64 * torch.finfo(torch.float32).eps
"""Share of an update by which fp32 products may be wrong."""
_ROUNDINGS = 1.0
"""By which a layer's output may differ from peft's in float64."""


class ActiveAdapter:
    """Whose adapter the layers add: shared by all, so that a switch costs nothing."""

    def __init__(self, adapter_name: str) -> None:
        self.adapter_name = adapter_name


class LoraForward:
    """Stands in for the ``forward`` of one peft layer. Inference only: it adds in place."""

    def __init__(self, base: nn.Module, active: ActiveAdapter) -> None:
        self._base = base
        self._active = active
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    def register(self, adapter_name: str, layer: Any) -> None:
        """Take the factors of an adapter over from peft."""
        down, up = layer.lora_A[adapter_name].weight.detach(), layer.lora_B[adapter_name].weight.detach()
        if down.device.type == "cpu":
            down, up = down.float(), up.float()
        down, up = down.T.contiguous(), up.T.contiguous() * layer.scaling[adapter_name]
        self._factors[adapter_name] = (down, up)

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward_with(self._active.adapter_name, x)

    def forward_with(self, adapter_name: str, x: Tensor) -> Tensor:
        """The layer's output with ``adapter_name``, or the base's where it has none."""
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
    """Whether products in the dtype of x are as quick as in fp32."""
    return x.device.type != "cpu" or (x.dtype == torch.bfloat16 and this_processor().native_bfloat16)


class TokenRowsForward:
    """Stands in for the ``forward`` of peft's module around an embedding or a head."""

    def __init__(self, base: nn.Module, active: ActiveAdapter) -> None:
        self._base = base
        self._active = active
        self._rows: dict[str, TokenRows] = {}

    def register(self, adapter_name: str, wrapper: Any) -> None:
        """Take the rows of an adapter over from peft."""
        self._rows[adapter_name] = rows_of(wrapper, adapter_name)

    def __call__(self, x: Tensor) -> Tensor:
        return with_rows(self._base, x, self._rows.get(self._active.adapter_name))


def fuse_token_rows(model: nn.Module, adapter_name: str, active: ActiveAdapter) -> None:
    """Let embedding and head take the rows that ``adapter_name`` has of them, if any."""
    for wrapper in row_wrappers(model):
        forward = vars(wrapper).get("forward")
        if forward is None:
            forward = wrapper.forward = TokenRowsForward(wrapper.original_module, active)
        if adapter_name in wrapper.token_adapter.trainable_tokens_delta:
            forward.register(adapter_name, wrapper)


def fuse_adapter(model: nn.Module, adapter_name: str, active: ActiveAdapter) -> bool:
    """Add ``adapter_name`` to the layers of ``model`` in this way; False where it is not plain LoRA."""
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
    """Whether ``forward`` adds to the base's output what peft's own forward adds, element by element.

    The base stands aside and gives values of our choice. peft computes in float64, so that what is left is
    the rounding of ``forward``: of its result and, where its factors have 16 bits, of the update's terms.
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
    """Inputs (64, inputs) with massive channels, and a base's outputs (64, outputs), half of them 0."""
    generator = torch.Generator().manual_seed(0)
    x, output = (torch.randn(_MANY_TOKENS, n, generator=generator) for n in (down.shape[1], up.shape[0]))
    x[:, :: max(x.shape[1] // 3, 1)] *= 100
    output[:, ::2] = 0
    return x.to(down.device, down.dtype), output.to(up.device, up.dtype)


def restore_peft(model: nn.Module) -> None:
    """Undo ``lean``."""
    for layer in _layers(model):
        vars(layer).pop("forward", None)


def _layers(model: nn.Module) -> Iterator[Any]:
    # Here, because peft takes seconds to load and a base alone does without.
    from peft.tuners.lora import LoraLayer

    return (module for module in model.modules() if isinstance(module, LoraLayer))


def _has(layer: Any, adapter_name: str) -> bool:
    return adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A


def _is_plain(layer: Any, adapter_name: str) -> bool:
    """Whether the update is scale · B·A·x, which DoRA's and an embedding's are not."""
    return (
        adapter_name in layer.lora_A
        and type(layer.lora_A[adapter_name]) is nn.Linear
        and adapter_name not in layer.lora_variant
        and not layer.lora_bias.get(adapter_name, False)
        and not layer.merged
    )
