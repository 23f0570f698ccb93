"""Comparison of a merged model with its 16-bit base plus adapter, as peft computes it.

Both read the same prompt, one after the other, so that one model is in memory at a time. Merging rounds each
changed weight once more; next-token logits may differ by as much as rounding changes peft's own.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from msgspec import Struct, structs
from torch import Tensor

from qlora_tui.adapters.base_weights import model_folder
from qlora_tui.catalog.model_validation import weight_files
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.data.conversation import Message
from qlora_tui.data.render import prompt_ids
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.formatting import format_bytes
from qlora_tui.training.adapter import exact_target_names
from qlora_tui.training.checks.step import FACTOR, rounding_error_of, rounding_errors
from qlora_tui.training.clean_files import adapter_view
from qlora_tui.training.compute_device import ComputeDevice
from qlora_tui.training.model import load_base

_PROMPT = "Name three colors of autumn leaves, and explain in one sentence why they change."
_DRAWS = 3
_SPARE_BYTES = 1 << 30


class MergeCheck(Struct, frozen=True, kw_only=True):
    """Next-token logits of the merged model compared with those of base and adapter."""

    tokens: int
    """Number of positions compared."""
    difference: float
    """Difference relative to the logits' spread: root mean square over positions and vocabulary."""
    noise: float
    """Relative change of the logits of base and adapter due to rounding in the stored dtype."""
    same_choices: int
    """Number of positions at which both rank the same token first."""
    agrees: bool
    """Whether rounding explains the difference."""

    @property
    def sentence(self) -> str:
        """Describe the result for users."""
        return (
            f"its logits differ from those of base and adapter by {self.difference:.2g} of their standard "
            f"deviation, where rounding accounts for about {self.noise:.2g}; the most likely token is the "
            f"same at {self.same_choices} of {self.tokens} positions"
        )


def verify_merge(
    source: ChatSource,
    adapter_name: str,
    merged: Path,
    on_status: Callable[[str], None] = lambda words: None,
    requantize: Callable[[str, Tensor], Tensor] | None = None,
) -> MergeCheck | str:
    """Compare a merged model with its base and the adapter ``adapter_name``, on the CPU.

    Args:
        source: The base and its adapters.
        adapter_name: The adapter that was merged.
        merged: The folder that :func:`qlora_tui.export.merge.merge` wrote.
        on_status: Called with the current activity.
        requantize: Rounds the base's weights, by name, where they were rounded before merging.

    Returns:
        The comparison, or why nothing was compared.
    """
    base = model_folder(source.recipe)
    needed = sum((base / name).stat().st_size for name in weight_files(base)) + _SPARE_BYTES
    free = psutil.virtual_memory().available
    if needed > free:
        return f"it needs {format_bytes(needed)} of memory, and {format_bytes(free)} are free"
    tokenizer = ChatTokenizer.from_folder(merged)
    prompt = source.recipe.training.sample_prompts[:1] or (_PROMPT,)
    ids = torch.tensor([prompt_ids([Message("user", prompt[0])], tokenizer)])
    on_status("Comparing the merged model with base and adapter")
    model = _load(source, base)
    if requantize is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(requantize(name, parameter.data))
    adapted = _with_adapter(model, Path(source.adapters[adapter_name]))
    expected = _logits(adapted, ids)
    spread = float((expected - expected.mean(-1, keepdim=True)).norm())
    noise = 0.0
    dtype = next(adapted.parameters()).dtype
    for draw in range(_DRAWS):
        with rounding_errors(adapted, rounding_error_of(dtype), seed=draw):
            noise = max(noise, float((_logits(adapted, ids) - expected).norm()) / spread)
    del adapted, model
    gc.collect()
    logits = _logits(_load(source, merged), ids)
    difference = float((logits - expected).norm()) / spread
    return MergeCheck(
        tokens=len(logits),
        difference=difference,
        noise=noise,
        same_choices=int((logits.argmax(-1) == expected.argmax(-1)).sum()),
        agrees=difference <= FACTOR * noise,
    )


def _load(source: ChatSource, folder: Path) -> Any:
    """Load the model of a folder in the dtype it is stored in."""
    quantization = structs.replace(source.recipe.quantization, method="none")
    recipe = structs.replace(source.recipe, quantization=quantization)
    device = ComputeDevice(torch.device("cpu"), "CPU", 0, _stored_dtype(folder))
    return load_base(folder, recipe, device, "segments").eval()


def _stored_dtype(folder: Path) -> torch.dtype:
    from safetensors import safe_open

    with safe_open(folder / weight_files(folder)[0], framework="pt") as weights:
        dtype: torch.dtype = weights.get_tensor(next(iter(weights.keys()))).dtype
    return dtype


def _with_adapter(model: Any, folder: Path) -> Any:
    from peft import PeftConfig, PeftModel

    with adapter_view(folder) as view:
        targets = PeftConfig.from_pretrained(str(view)).target_modules or ""
        with exact_target_names(model, targets):
            return PeftModel.from_pretrained(model, str(view)).eval()


@torch.inference_mode()
def _logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits, (tokens, vocabulary), fp32."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
    return logits
