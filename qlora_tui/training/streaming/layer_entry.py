"""Makes a decoder layer wait for its weights before it computes, in the forward and in the backward.

A streamed layer must be recomputed in the backward pass: what it saved otherwise would be the weights in a
slot, which hold another layer by then. Its forward raises an error where it would save them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_tui.training.streaming.layer_slots import Pass


class StreamedLayerError(RuntimeError):
    """A streamed layer ran with gradients and without gradient checkpointing, which would make them wrong."""


class StreamedCheckpoint:
    """A layer's checkpoint function that fetches the weights before the forward and before the backward."""

    def __init__(self, checkpoint: Callable[..., Any], enter: Callable[[Pass], None]) -> None:
        self._checkpoint = checkpoint
        self._enter = enter

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run ``function`` as torch's ``checkpoint`` does, which calls it again in the backward."""
        self._enter("forward")
        outputs = self._checkpoint(function, *args)
        # Not with the recomputation, which starts when a saved tensor is needed first: a function that saved
        # none, such as the last projection of an MLP, has read its weight by then.
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            if torch.is_tensor(output) and output.requires_grad:
                output.register_hook(self._before_backward)  # type: ignore[no-untyped-call]  # torch's own
        return outputs

    def _before_backward(self, gradient: Tensor) -> None:
        """Called with the gradient of the layer's output, when the layers after it are done."""
        self._enter("backward")


def stream_forward(layer: Any, enter: Callable[[Pass], None]) -> None:
    """Let the layer fetch its weights when it runs without checkpointing: in evaluations and generation."""
    original_forward = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if is_checkpointed(layer):
            if not isinstance(layer._gradient_checkpointing_func, StreamedCheckpoint):
                raise StreamedLayerError("the layer's checkpoint function does not fetch its weights")
        elif _needs_gradient(layer, args, kwargs):
            raise StreamedLayerError("a streamed layer needs gradient checkpointing")
        else:
            enter("no gradient")
        return original_forward(*args, **kwargs)

    vars(layer)["forward"] = forward


def stream_checkpoint(layer: Any, enter: Callable[[Pass], None]) -> None:
    """Let the layer fetch its weights when it is checkpointed. Call it after checkpointing was turned on."""
    if not isinstance(layer._gradient_checkpointing_func, StreamedCheckpoint):
        layer._gradient_checkpointing_func = StreamedCheckpoint(layer._gradient_checkpointing_func, enter)


def is_checkpointed(layer: Any) -> bool:
    """Whether the layer is recomputed in the backward of this forward; the condition is transformers'."""
    return bool(layer.gradient_checkpointing and layer.training and torch.is_grad_enabled())


def _needs_gradient(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if not torch.is_grad_enabled():
        return False
    inputs = (*args, *kwargs.values())
    return any(torch.is_tensor(value) and value.requires_grad for value in inputs) or any(
        parameter.requires_grad for parameter in layer.parameters()
    )
