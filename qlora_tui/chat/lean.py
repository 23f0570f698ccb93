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

from qlora_tui.memory.processor import this_processor
from qlora_tui.training.token_rows import TokenRows, row_wrappers, rows_of, with_rows

_MANY_TOKENS = 64


class Speaking:
    """Whose adapter the layers add: shared by all, so that a switch costs nothing."""

    def __init__(self, voice: str) -> None:
        self.voice = voice


class LeanForward:
    """Stands in for the ``forward`` of one peft layer. Inference only: it adds in place."""

    def __init__(self, base: nn.Module, speaking: Speaking) -> None:
        self._base = base
        self._speaking = speaking
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    def learn(self, voice: str, layer: Any) -> None:
        """Take the factors of an adapter over from peft."""
        down, up = layer.lora_A[voice].weight.detach(), layer.lora_B[voice].weight.detach()
        down, up = down.T, up.T * layer.scaling[voice]
        if down.device.type == "cpu":
            down, up = down.float().contiguous(), up.float().contiguous()
        self._factors[voice] = (down, up)

    def __call__(self, x: Tensor) -> Tensor:
        output: Tensor = self._base(x)
        factors = self._factors.get(self._speaking.voice)
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


class LeanRows:
    """Stands in for the ``forward`` of peft's module around an embedding or a head."""

    def __init__(self, base: nn.Module, speaking: Speaking) -> None:
        self._base = base
        self._speaking = speaking
        self._rows: dict[str, TokenRows] = {}

    def learn(self, voice: str, wrapper: Any) -> None:
        """Take the rows of an adapter over from peft."""
        self._rows[voice] = rows_of(wrapper, voice)

    def __call__(self, x: Tensor) -> Tensor:
        return with_rows(self._base, x, self._rows.get(self._speaking.voice))


def lean_rows(model: nn.Module, voice: str, speaking: Speaking) -> None:
    """Let embedding and head take the rows that the adapter ``voice`` has of them, if any."""
    for wrapper in row_wrappers(model):
        forward = vars(wrapper).get("forward")
        if forward is None:
            forward = wrapper.forward = LeanRows(wrapper.original_module, speaking)
        if voice in wrapper.token_adapter.trainable_tokens_delta:
            forward.learn(voice, wrapper)


def lean(model: nn.Module, voice: str, speaking: Speaking) -> bool:
    """Let the layers of ``model`` add the adapter ``voice`` in this way; False where it is no plain LoRA."""
    layers = [layer for layer in _layers(model) if _has(layer, voice)]
    if not all(_is_plain(layer, voice) for layer in layers):
        return False
    for layer in layers:
        forward = vars(layer).get("forward")
        if forward is None:
            forward = layer.forward = LeanForward(layer.get_base_layer(), speaking)
        forward.learn(voice, layer)
    return True


def as_peft_does(model: nn.Module) -> None:
    """Undo ``lean``."""
    for layer in _layers(model):
        vars(layer).pop("forward", None)


def _layers(model: nn.Module) -> Iterator[Any]:
    # Here, because peft takes seconds to load and a base alone does without.
    from peft.tuners.lora import LoraLayer

    return (module for module in model.modules() if isinstance(module, LoraLayer))


def _has(layer: Any, voice: str) -> bool:
    return voice in layer.lora_A or voice in layer.lora_embedding_A


def _is_plain(layer: Any, voice: str) -> bool:
    """Whether the update is scale · B·A·x, which DoRA's and an embedding's are not."""
    return (
        voice in layer.lora_A
        and type(layer.lora_A[voice]) is nn.Linear
        and voice not in layer.lora_variant
        and not layer.lora_bias.get(voice, False)
        and not layer.merged
    )
