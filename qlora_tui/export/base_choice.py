"""The base weights to merge an adapter into: the original 16-bit weights, or the 4-bit weights of training.

An adapter trained on 4-bit weights also learned to compensate for their rounding errors. On the 16-bit
weights, it answers differently, for better or worse. Both variants are measured, and the one closer to the
trained model is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

import psutil
from msgspec import Struct
from msgspec.structs import replace

from qlora_tui.adapters.base_weights import model_folder
from qlora_tui.adapters.merged_weights import Requantizer, requantizer
from qlora_tui.catalog.local_models import resolve_model
from qlora_tui.catalog.model_validation import weight_files
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.chat.loading import load_session
from qlora_tui.errors import UserError
from qlora_tui.export.reference import Reference, reason_of, reference_or_reason
from qlora_tui.formatting import format_bytes, format_nats
from qlora_tui.gpu.cuda_errors import is_out_of_memory
from qlora_tui.runs.exports import COMPARED_TOKENS
from qlora_tui.training.host import release_gpu_memory

_SPARE_BYTES = 1 << 30


class BaseChoice(Struct, frozen=True, kw_only=True):
    """The base weights that an adapter is merged into."""

    chosen: Literal["original", "dequantized"]
    """Kind of base weights. ``dequantized``: quantized to 4 bits and dequantized."""
    original_divergence: float | None = None
    """Mean KL divergence, in nats, of the adapter on the original weights from the trained model; None if not
    measured.
    """
    dequantized_divergence: float | None = None
    """Mean KL divergence, in nats, of the adapter on the dequantized weights from the trained model; None if
    not measured.
    """
    unmeasured_because: str = ""

    @property
    def sentence(self) -> str:
        """Description of the choice; empty if there was none."""
        if self.unmeasured_because:
            return (
                "Merged into the dequantized 4-bit base weights used in training. Not compared with the "
                f"original 16-bit weights: {self.unmeasured_because}."
            )
        if self.original_divergence is None or self.dequantized_divergence is None:
            return ""
        dequantized, original = (
            format_nats(self.dequantized_divergence),
            format_nats(self.original_divergence),
        )
        if self.chosen == "dequantized":
            return (
                "Merged into the dequantized 4-bit base weights used in training. KL divergence from the "
                f"trained model: {dequantized}, against {original} on the original 16-bit weights."
            )
        return (
            "Merged into the original 16-bit base weights. KL divergence from the trained model: "
            f"{original}, against {dequantized} on the 4-bit weights."
        )


BaseName: TypeAlias = Literal["best", "original", "dequantized"]


def choice_named(
    name: BaseName,
    source: ChatSource,
    adapter_name: str,
    on_status: Callable[[str], None] = lambda words: None,
    compared_tokens: int = COMPARED_TOKENS,
) -> BaseChoice:
    """Return the base weights that ``name`` selects. Raises UserError.

    For ``best``, the adapter on both kinds of base weights is compared with the trained model, at up to
    ``compared_tokens`` trained tokens.
    """
    if name != "best":
        return BaseChoice(chosen=name)
    if requantizer(resolve_model(source.recipe.model.id).architecture, source.recipe.quantization) is None:
        return BaseChoice(chosen="original")
    reference = reference_or_reason(source, adapter_name, on_status, compared_tokens)
    return choose_base(source, adapter_name, reference, on_status)


def unquantized(source: ChatSource) -> ChatSource:
    """Return a source whose base is loaded as stored, without quantization."""
    settings = replace(source.recipe.quantization, method="none")
    return replace(source, recipe=replace(source.recipe, quantization=settings))


def choose_base(
    source: ChatSource,
    adapter_name: str,
    reference: Reference | str,
    on_status: Callable[[str], None] = lambda words: None,
) -> BaseChoice:
    """Compare the adapter on both kinds of base weights with the trained model, and choose the closer kind.

    ``reference`` is the reference, or a text that says why there is none. If there is none, or the 16-bit
    base cannot be loaded or run, nothing is compared, and the choice says why. Raises UserError for a model
    that is not on this machine.
    """
    recipe = source.recipe
    requantize = requantizer(resolve_model(recipe.model.id).architecture, recipe.quantization)
    if requantize is None:
        return BaseChoice(chosen="original")
    if isinstance(reference, str):
        return BaseChoice(chosen="dequantized", unmeasured_because=reference)
    if lacking := lacking_memory(model_folder(recipe)):
        return BaseChoice(chosen="dequantized", unmeasured_because=lacking)
    words = "Comparing the adapter on {} base weights with the trained model"
    try:
        session = load_session(unquantized(source), on_status)
        session.ensure_loaded(adapter_name)
        stored = reference.divergence(session, adapter_name, on_status, words.format("16-bit"))
        session.change_base(requantize)
        trained = reference.divergence(session, adapter_name, on_status, words.format("dequantized 4-bit"))
        del session
        release_gpu_memory()
    except UserError as error:
        return BaseChoice(chosen="dequantized", unmeasured_because=reason_of(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        why = "the GPU's memory is too small for the 16-bit weights"
        return BaseChoice(chosen="dequantized", unmeasured_because=why)
    return BaseChoice(
        chosen="dequantized" if trained < stored else "original",
        original_divergence=stored,
        dequantized_divergence=trained,
    )


def lacking_memory(folder: Path) -> str:
    """Return why the weights in a model folder cannot be loaded on the CPU; empty if they can."""
    needed = sum((folder / name).stat().st_size for name in weight_files(folder)) + _SPARE_BYTES
    free = psutil.virtual_memory().available
    if needed <= free:
        return ""
    return f"it needs {format_bytes(needed)} of memory, but only {format_bytes(free)} is free"


def base_requantizer(source: ChatSource, choice: BaseChoice) -> Requantizer | None:
    """Return a function that rounds the base weights as chosen; None if they stay as stored."""
    if choice.chosen == "original":
        return None
    return requantizer(resolve_model(source.recipe.model.id).architecture, source.recipe.quantization)
