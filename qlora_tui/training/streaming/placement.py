"""Places a loaded model: the frozen weights of some layers in host memory, everything else on the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_tui.errors import UserError
from qlora_tui.memory.weights import streamed_indices
from qlora_tui.training.streaming.copy_devices import CopyDevice, copies_for
from qlora_tui.training.streaming.frozen_tensors import (
    Extent,
    all_tensors,
    bytes_of,
    extent_of,
    movable_tensors,
    point_to,
)
from qlora_tui.training.streaming.host_layer import LayerTensors, lay_out
from qlora_tui.training.streaming.host_memory import HostMemory
from qlora_tui.training.streaming.layer_entry import stream_checkpoint, stream_forward
from qlora_tui.training.streaming.layer_slots import LayerSlots, Pass


class StreamedLayers:
    """The streamed layers of a model that was placed."""

    def __init__(
        self, layers: Sequence[nn.Module], slots: LayerSlots, host_bytes: int, not_pinned: str
    ) -> None:
        self._layers = layers
        self._slots = slots
        self.not_pinned = not_pinned
        """Why their memory could not be pinned; empty where it was, or need not be."""
        self.host_bytes = host_bytes
        """Bytes of host memory that hold the layers."""
        for place, layer in enumerate(layers):
            stream_forward(layer, self._entry_of(place))

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def slot_bytes(self) -> int:
        """Bytes of the device through which the layers pass."""
        return self._slots.size_bytes

    def use_checkpoints(self) -> None:
        """Fetch weights in the backward too. Call it once gradient checkpointing is turned on."""
        for place, layer in enumerate(self._layers):
            stream_checkpoint(layer, self._entry_of(place))

    def _entry_of(self, place: int) -> Callable[[Pass], None]:
        return partial(self._slots.enter, place)


def place_streamed(
    model: Any,
    count: int,
    device: torch.device,
    copies: CopyDevice | None = None,
) -> StreamedLayers:
    """Move the frozen weights of ``count`` layers to host memory, and everything else to the device.

    The model is loaded on the CPU, so the device never holds more than what stays there and two layers.

    Args:
        copies: how layers reach the device; by default as its kind does.

    Raises:
        UserError: the layers of this model cannot be streamed.
    """
    every_layer = decoder_layers(model)
    layers = [every_layer[index] for index in streamed_indices(len(every_layer), count)]
    laid_out = [lay_out(tensors) for tensors in _moving_tensors(model, layers)]
    slots = LayerSlots([layer.size_bytes for layer in laid_out], copies or copies_for(device))
    host_memory = HostMemory(device)
    for place, layer in enumerate(laid_out):
        buffer = host_memory.allocate(layer.size_bytes)
        layer.write_to(buffer)
        # This frees the layer's own memory, before the next layer is copied.
        slots.add(place, layer, buffer)
    _require_copies(slots, host_memory, (0, len(laid_out) - 1))
    _move_rest(model, device, laid_out)
    # accelerate compares it with the device that trains.
    model.hf_device_map = {"": device}
    return StreamedLayers(layers, slots, sum(layer.size_bytes for layer in laid_out), host_memory.refused)


def _require_copies(slots: LayerSlots, host_memory: HostMemory, places: Sequence[int]) -> None:
    """Compare layers that were copied to the device; unpin the memory where they did not arrive.

    On WSL2 copies from pinned memory may do nothing, without an error (FreeToken issue 291).

    Raises:
        UserError: they do not arrive from other memory either.
    """

    def arrive() -> bool:
        return all(slots.receives(place) for place in places)

    if not host_memory.is_pinned or arrive():
        return
    host_memory.unpin("a layer that was copied from it did not arrive on the GPU")
    if not arrive():
        raise UserError(
            "Layers do not arrive on the GPU",
            what="A layer that was copied to the GPU differs there from the one in host memory.",
            why="The driver reports no error. Training would use wrong weights.",
            fix="Update the driver of the GPU, under WSL2 that of Windows, and restart the machine.",
        )


def decoder_layers(model: Any, setting: str = "quantization.streamed_layers") -> list[nn.Module]:
    """The decoder layers in the order of the forward. Raises UserError without a list, naming ``setting``."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[nn.Module] = [
        m for m in model.get_decoder().modules() if isinstance(m, GradientCheckpointingLayer)
    ]
    if len(layers) != model.config.get_text_config().num_hidden_layers:
        raise UserError(
            "The layers of this model cannot be moved one by one",
            what=f"{setting} is set for it, and {model.config.model_type} has no list of decoder "
            "layers that can be recomputed one by one.",
            fix=f"Reset {setting}, or choose another model.",
        )
    return layers


def _moving_tensors(model: nn.Module, layers: Sequence[nn.Module]) -> list[list[Tensor]]:
    """The tensors of each layer that move; memory that something else reads too stays."""
    candidates = [movable_tensors(layer) for layer in layers]
    in_layers = [{extent_of(tensor) for tensor in tensors} for tensors in candidates]
    ids = {id(tensor) for tensors in candidates for tensor in tensors}
    users: Counter[Extent] = Counter()
    for extents in in_layers:
        users.update(extents)
    users.update({extent_of(t) for t in all_tensors(model) if id(t) not in ids and t.numel()})
    return [[tensor for tensor in tensors if users[extent_of(tensor)] == 1] for tensors in candidates]


def _move_rest(model: nn.Module, device: torch.device, moved: Sequence[LayerTensors]) -> None:
    """Move every other tensor to the device, as the same object; memory that is shared stays shared."""
    ids = {id(tensor) for layer in moved for tensor in layer.tensors}
    placed: dict[Extent, Tensor] = {}
    for tensor in all_tensors(model):
        if id(tensor) in ids or not tensor.numel() or tensor.device == device:
            continue
        extent = extent_of(tensor)
        if extent not in placed:
            placed[extent] = bytes_of(tensor).to(device)
        point_to(tensor, placed[extent])
