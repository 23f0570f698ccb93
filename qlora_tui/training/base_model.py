"""The base model before LoRA is added: loaded, with loss and attention verified on the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tui.memory.execution import AttentionPath, Loss
from qlora_tui.recipe.schema import Recipe
from qlora_tui.training import chunked_loss, equivalence_checks, head_chunks, model_loading
from qlora_tui.training.compute_device import ComputeDevice
from qlora_tui.training.fused.kernel_choice import allow_kernels, verify_kernels
from qlora_tui.training.length_scaled_rope import scale_each_sample
from qlora_tui.training.liger import verified_liger_loss
from qlora_tui.training.packed_attention import PackedAttention, pass_sample_lengths
from qlora_tui.training.streaming.placement import StreamedLayers, place_streamed

_FALLBACKS: dict[AttentionPath, tuple[PackedAttention, ...]] = {
    "varlen": ("varlen", "segments"),
    "segments": ("segments",),
    "eager": (),
}
"""Implementations of packed attention to try for each path, in order; none means padded sequences."""
_DESCRIPTIONS: dict[PackedAttention, str] = {
    "varlen": "flash, all samples in one call",
    "segments": "SDPA, one call per sample",
}
_NOT_WEIGHTED = "this data has token weights, which Liger does not support"


@dataclass(frozen=True)
class PreparedBase:
    """The frozen base model, and which loss and attention it uses."""

    model: Any
    folder: Path
    attention: str
    """Description of the attention, for the run's events."""
    loss: Loss
    packed: PackedAttention | None
    """What keeps the samples of a sequence apart; None where each has a padded sequence of its own."""
    reference_attention: str
    """The implementation in transformers for a single sample: ``sdpa`` or ``eager``."""
    loss_reason: str = ""
    """Why another loss than the expected one is used; empty where it is that one."""
    replaced: tuple[str, ...] = ()
    """Fast paths that are not used, because they differ from the library on this model."""
    router_loss_off: bool = False
    """Whether the model would have added a loss that balances its experts, which a run does not train on."""
    streamed: StreamedLayers | None = None
    """The layers that wait in host memory; None where the whole model is on the device."""

    @property
    def padding_free(self) -> bool:
        """Whether a micro-batch is one sequence of isolated samples, with ``data.packing`` off too."""
        return self.packed is not None

    @property
    def loss_description(self) -> str:
        """The loss, and the reason where it is not the expected one, for the run's events."""
        return ": ".join(filter(None, (self.loss, self.loss_reason)))


def prepare_base(
    folder: Path,
    recipe: Recipe,
    device: ComputeDevice,
    attention_path: AttentionPath,
    expected_loss: Loss,
    *,
    weighted: bool,
    on_progress: model_loading.ProgressCallback | None = None,
) -> PreparedBase:
    """Load the base model, with the expected loss where that is verified to be exact, else with another.

    Args:
        expected_loss: the loss that the memory estimate assumes.
        weighted: whether tokens of the data have loss weights.
        on_progress: called with the number of tensors loaded, and of all.

    Raises:
        UserError: the model cannot be loaded.
    """
    allow_kernels(recipe.model.kernels == "auto")
    verify_kernels(device.torch_device, device.dtype)
    model, streamed = _load(folder, recipe, device, attention_path, on_progress)
    router_loss_off = _switch_off_router_loss(model)
    head = chunked_loss.find_head(model)
    if not isinstance(head, str) and not equivalence_checks.head_matches_model(
        model, head, device.torch_device
    ):
        head = "its computation between head and loss is not supported"
    reference_attention = model.config._attn_implementation
    loss, loss_reason = _use_loss(model, head, device, expected_loss, weighted)
    pass_sample_lengths(model)
    scale_each_sample(model)
    packed = _use_packed_attention(model, attention_path, device)
    if packed is None:
        # Padded sequences do not need our attention, and the check of the first step needs the library's.
        model_loading.set_attention(model, reference_attention)
    return PreparedBase(
        model=model,
        folder=folder,
        attention=_DESCRIPTIONS[packed]
        if packed
        else f"{reference_attention.replace('sdpa', 'SDPA')}, padded sequences",
        loss=loss,
        loss_reason=loss_reason,
        packed=packed,
        reference_attention=reference_attention,
        router_loss_off=router_loss_off,
        streamed=streamed,
    )


def _load(
    folder: Path,
    recipe: Recipe,
    device: ComputeDevice,
    attention_path: AttentionPath,
    on_progress: model_loading.ProgressCallback | None,
) -> tuple[Any, StreamedLayers | None]:
    """The model on the device, but for the layers that the recipe streams, which are in host memory."""
    count = recipe.quantization.streamed_layers
    model = model_loading.load_base(folder, recipe, device, attention_path, on_progress, to_host=count > 0)
    return model, place_streamed(model, count, device.torch_device) if count else None


def _switch_off_router_loss(model: Any) -> bool:
    """Leave the loss that balances experts out of the model's loss; whether there was one.

    It is a mean over tokens, and a micro-batch's loss is a sum, so it would be lost next to that.
    """
    config = model.config.get_text_config()
    was_on = bool(getattr(config, "output_router_logits", False))
    if was_on:
        config.output_router_logits = False
    return was_on


def _use_packed_attention(
    model: Any, attention_path: AttentionPath, device: ComputeDevice
) -> PackedAttention | None:
    """Use the first kind of packed attention that passes its check on this model; None where none does."""
    for kind in _FALLBACKS[attention_path]:
        if model_loading.use_packed_attention(model, kind) and equivalence_checks.packing_is_isolated(
            model, device.torch_device
        ):
            return kind
    return None


def _use_loss(
    model: Any,
    head: head_chunks.ChunkedHead | str,
    device: ComputeDevice,
    expected_loss: Loss,
    weighted: bool,
) -> tuple[Loss, str]:
    """Install the loss in the model; return it, and why it is not the expected one."""
    if isinstance(head, str):
        chunked_loss.use_weighted_loss(model)
        return "stock", head
    kernel: chunked_loss.LossSumFn | str | None = None
    if expected_loss == "liger":
        kernel = _NOT_WEIGHTED if weighted else verified_liger_loss(head, device.torch_device)
    if isinstance(kernel, str):
        chunked_loss.use_chunked_loss(model, head)
        return "chunked", kernel
    chunked_loss.use_chunked_loss(model, head, kernel)
    return expected_loss, ""
