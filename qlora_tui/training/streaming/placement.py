"""Places a loaded model, with the frozen weights of some layers in host memory and all else on the device.

A streamed layer waits for its weights before it computes, in the forward and in the backward. The layer must
be recomputed in the backward pass. Otherwise autograd would keep references to weights in a slot, and the
slot holds another layer by the time of the backward. So the forward raises an error if gradients are needed
but the layer is not checkpointed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_tui.errors import UserError
from qlora_tui.memory.weights import streamed_indices
from qlora_tui.training.model_class import decoder_layers
from qlora_tui.training.streaming.host_memory import HostMemory
from qlora_tui.training.streaming.slots import (
    Copies,
    Extent,
    LayerSlots,
    LayerTensors,
    Pass,
    all_tensors,
    bytes_of,
    extent_of,
    lay_out,
    movable_tensors,
    point_to,
)


class StreamedLayerError(RuntimeError):
    """Raised if a streamed layer would compute wrong gradients, because its checkpointing is off or does not
    fetch its weights.
    """


class StreamedCheckpoint:
    """A layer's checkpoint function that fetches the weights before the forward and before the backward."""

    def __init__(self, checkpoint: Callable[..., Any], enter: Callable[[Pass], None]) -> None:
        self._checkpoint = checkpoint
        self._enter = enter

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run ``function`` as torch's ``checkpoint`` does, which calls it again in the backward."""
        self._enter("forward")
        outputs = self._checkpoint(function, *args)
        # The recomputation cannot fetch the weights, because it starts only when a saved tensor is needed: a
        # function that saved none, such as the last projection of an MLP, has read its weight by then.
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            if torch.is_tensor(output) and output.requires_grad:
                output.register_hook(self._before_backward)  # type: ignore[no-untyped-call]  # torch's own
        return outputs

    def _before_backward(self, gradient: Tensor) -> None:
        """Fetch the weights. Called with the gradient of the layer's output, after the backward pass of all
        later layers.
        """
        self._enter("backward")


def stream_forward(layer: Any, enter: Callable[[Pass], None]) -> None:
    """Make the layer fetch its weights when it runs without checkpointing, in evaluations and generation."""
    original_forward = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        # transformers uses the same condition.
        if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
            if not isinstance(layer._gradient_checkpointing_func, StreamedCheckpoint):
                raise StreamedLayerError("the layer's checkpoint function does not fetch its weights")
        elif _needs_gradient(layer, args, kwargs):
            raise StreamedLayerError("a streamed layer needs gradient checkpointing")
        else:
            enter("no gradient")
        return original_forward(*args, **kwargs)

    vars(layer)["forward"] = forward


def _needs_gradient(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if not torch.is_grad_enabled():
        return False
    inputs = (*args, *kwargs.values())
    return any(torch.is_tensor(value) and value.requires_grad for value in inputs) or any(
        parameter.requires_grad for parameter in layer.parameters()
    )


class StreamedLayers:
    """The streamed layers of a model after its placement."""

    def __init__(self, layers: Sequence[Any], slots: LayerSlots, host_bytes: int, not_pinned: str) -> None:
        self._layers = layers
        self._slots = slots
        self.not_pinned = not_pinned
        """Why the layers' memory could not be pinned; empty if it was pinned, or need not be."""
        self.host_bytes = host_bytes
        """Bytes of host memory that hold the layers."""
        for place, layer in enumerate(layers):
            stream_forward(layer, partial(slots.enter, place))

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def slot_bytes(self) -> int:
        """Size of the device buffers that layers are copied to, in bytes."""
        return self._slots.size_bytes

    def use_checkpoints(self) -> None:
        """Fetch weights in the backward too. Call this once gradient checkpointing is turned on."""
        for place, layer in enumerate(self._layers):
            checkpoint = layer._gradient_checkpointing_func
            if not isinstance(checkpoint, StreamedCheckpoint):
                enter = partial(self._slots.enter, place)
                layer._gradient_checkpointing_func = StreamedCheckpoint(checkpoint, enter)


def place_streamed(
    model: Any,
    count: int,
    device: torch.device,
    copies: Copies | None = None,
) -> StreamedLayers:
    """Move the frozen weights of ``count`` layers to host memory, and everything else to the device.

    The model is loaded on the CPU, so the device never holds more than its permanent tensors and two layers.

    Args:
        copies: how layers are copied to the device; the default depends on its kind.

    Raises:
        UserError: the layers of this model cannot be streamed.
    """
    every_layer = movable_layers(model)
    layers = [every_layer[index] for index in streamed_indices(len(every_layer), count)]
    laid_out = [lay_out(tensors) for tensors in _moving_tensors(model, layers)]
    slots = LayerSlots([layer.size_bytes for layer in laid_out], copies or Copies(device))
    host_memory = HostMemory(device)
    for place, layer in enumerate(laid_out):
        buffer = host_memory.allocate(layer.size_bytes)
        layer.write_to(buffer)
        # This frees the layer's own memory before the next layer is copied.
        slots.add(place, layer, buffer)
    _require_copies(slots, host_memory, (0, len(laid_out) - 1))
    _move_rest(model, device, laid_out)
    # accelerate compares this attribute with the device that trains.
    model.hf_device_map = {"": device}
    return StreamedLayers(layers, slots, sum(layer.size_bytes for layer in laid_out), host_memory.refused)


def _require_copies(slots: LayerSlots, host_memory: HostMemory, places: Sequence[int]) -> None:
    """Compare layers after a copy to the device; unpin the memory if the copies do not arrive.

    On WSL2 copies from pinned memory may do nothing, without an error (FreeToken issue 291).

    Raises:
        UserError: copies from unpinned memory do not arrive either.
    """

    def arrive() -> bool:
        return all(slots.receives(place) for place in places)

    if not host_memory.is_pinned or arrive():
        return
    host_memory.unpin("a layer that was copied from it did not arrive on the GPU")
    if not arrive():
        raise UserError(
            "Layers do not arrive on the GPU intact",
            what="A layer that was copied to the GPU differs from the original in host memory.",
            why="The driver reports no error. Training would use wrong weights.",
            fix="Update the GPU driver (under WSL2, the Windows driver), and restart the machine.",
        )


def movable_layers(model: Any, setting: str = "quantization.streamed_layers") -> list[nn.Module]:
    """Return the decoder layers in the order of the forward.

    Raises UserError, naming ``setting``, if the model has no list of layers.
    """
    layers: list[nn.Module] = decoder_layers(model)
    if not layers:
        raise UserError(
            "The layers of this model cannot be moved one by one",
            what=f"{setting} handles decoder layers one by one, but {model.config.model_type} has no "
            "list of them.",
            fix=f"Reset {setting}, or choose another model.",
        )
    return layers


def _moving_tensors(model: nn.Module, layers: Sequence[nn.Module]) -> list[list[Tensor]]:
    """Return the tensors to stream for each layer. Memory that other modules also read is not streamed."""
    candidates = [movable_tensors(layer) for layer in layers]
    in_layers = [{extent_of(tensor) for tensor in tensors} for tensors in candidates]
    ids = {id(tensor) for tensors in candidates for tensor in tensors}
    users: Counter[Extent] = Counter()
    for extents in in_layers:
        users.update(extents)
    users.update({extent_of(t) for t in all_tensors(model) if id(t) not in ids and t.numel()})
    return [[tensor for tensor in tensors if users[extent_of(tensor)] == 1] for tensors in candidates]


def _move_rest(model: nn.Module, device: torch.device, moved: Sequence[LayerTensors]) -> None:
    """Move every other tensor to the device in place. References stay valid, shared memory stays shared."""
    ids = {id(tensor) for layer in moved for tensor in layer.tensors}
    placed: dict[Extent, Tensor] = {}
    for tensor in all_tensors(model):
        if id(tensor) in ids or not tensor.numel() or tensor.device == device:
            continue
        extent = extent_of(tensor)
        if extent not in placed:
            placed[extent] = bytes_of(tensor).to(device)
        point_to(tensor, placed[extent])
