"""The base model before LoRA is added: loaded, with loss and attention verified on the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tui.memory.execution import Loss
from qlora_tui.recipe.schema import Recipe
from qlora_tui.training import chunked_loss, equivalence_checks, model_loading
from qlora_tui.training.compute_device import AttentionPath, ComputeDevice
from qlora_tui.training.liger import verified_liger_loss

_NAMES: dict[AttentionPath, str] = {"segments": "SDPA", "flash": "flash", "eager": "eager"}
_NOT_WEIGHTED = "this data has token weights, which Liger does not support"


@dataclass(frozen=True)
class PreparedBase:
    """The frozen base model, and which loss and attention it uses."""

    model: Any
    folder: Path
    attention: str
    """Description of the attention, for the run's events."""
    loss: str
    """The loss that the memory estimate assumes, or another one with the reason."""
    packing_isolated: bool
    """Whether several samples may share a row."""
    attention_path: AttentionPath
    """The attention path that was tried first."""
    library_attention: str
    """The implementation in transformers for a single sample: ``sdpa`` or ``eager``."""
    replaced: tuple[str, ...] = ()
    """Fast paths that are not used, because they differ from the library on this model."""


def prepare_base(
    folder: Path,
    recipe: Recipe,
    device: ComputeDevice,
    attention_path: AttentionPath,
    expected_loss: Loss,
    *,
    weighted: bool,
) -> PreparedBase:
    """Load the base model, with the expected loss where that is verified to be exact, else with another.

    Args:
        expected_loss: the loss that the memory estimate assumes.
        weighted: whether tokens of the data have loss weights.

    Raises:
        UserError: the model cannot be loaded.
    """
    model = model_loading.load_base(folder, recipe, device, attention_path)
    head = chunked_loss.find_head(model)
    if not isinstance(head, str) and not equivalence_checks.head_matches_model(
        model, head, device.torch_device
    ):
        head = "its computation between head and loss is not supported"
    library_attention = _library_attention(model, attention_path)
    packing_isolated = attention_path == "flash" or (
        attention_path == "segments" and model_loading.use_segment_attention(model)
    )
    loss_name = _use_loss(model, head, device, expected_loss, weighted)
    chunked_loss.use_segments(model, by_mask=attention_path == "segments")
    if packing_isolated and not equivalence_checks.packing_is_isolated(model, device.torch_device):
        packing_isolated = False
        if attention_path == "segments":
            # Padded rows do not need our attention, and the check of the first step needs the library's.
            model_loading.set_attention(model, library_attention)
    return PreparedBase(
        model=model,
        folder=folder,
        attention=f"{_NAMES[attention_path]}, {'sample by sample' if packing_isolated else 'padded rows'}",
        loss=loss_name,
        packing_isolated=packing_isolated,
        attention_path=attention_path,
        library_attention=library_attention,
    )


def _library_attention(model: Any, attention_path: AttentionPath) -> str:
    """The reference for packed attention: SDPA, or eager for families without SDPA; never a flash kernel."""
    loaded: str = model.config._attn_implementation
    if attention_path != "flash":
        return loaded
    reference = "sdpa" if model_loading.set_attention(model, "sdpa") else "eager"
    model_loading.set_attention(model, loaded)
    return reference


def _use_loss(
    model: Any,
    head: chunked_loss.ChunkedHead | str,
    device: ComputeDevice,
    expected_loss: Loss,
    weighted: bool,
) -> str:
    """Install the loss in the model; returns its description for the run's events."""
    if isinstance(head, str):
        chunked_loss.use_weighted_loss(model)
        return f"stock: {head}"
    kernel: chunked_loss.LossSumFn | str | None = None
    if expected_loss == "liger":
        kernel = _NOT_WEIGHTED if weighted else verified_liger_loss(head, device.torch_device)
    if isinstance(kernel, str):
        chunked_loss.use_chunked_loss(model, head)
        return f"chunked: {kernel}"
    chunked_loss.use_chunked_loss(model, head, kernel)
    return expected_loss
