"""GGUF files of tiny models, and what llama.cpp computes from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_tui.catalog.gguf import FileType
from qlora_tui.catalog.model_validation import weight_files
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.export import gguf_export, gguf_plan, lora_export
from qlora_tui.export.gguf_file.content import gguf_content
from qlora_tui.export.gguf_file.writer import write_gguf
from qlora_tui.export.llama_cpp.bindings import LlamaCpp, LlamaModel
from qlora_tui.export.llama_cpp.stored_answers import Floats, kl_divergence, log_softmax
from qlora_tui.export.merged_weights import MergedWeights
from qlora_tui.recipe.schema import Model, Recipe


def hide_llama_cpp(monkeypatch: pytest.MonkeyPatch, reason: str = "llama.cpp is not installed") -> None:
    """Let exports do without llama.cpp."""
    for module in (gguf_export, gguf_plan, lora_export):
        monkeypatch.setattr(module, "unavailable_because", lambda: reason)


def write_base(folder: Path, file: Path, file_type: FileType = "F16") -> Path:
    """Write the GGUF file of a model without an adapter."""
    weights = MergedWeights(folder, {folder / name: {} for name in weight_files(folder)})
    source = ChatSource(recipe=Recipe(model=Model(id=str(folder))))
    write_gguf(gguf_content(source, ChatTokenizer.from_folder(folder), weights), file, file_type)
    return file


def logits_of(file: Path, ids: list[int], lora: Path | None = None) -> Any:
    """llama.cpp's logits at every position, attention computed in float32."""
    with LlamaCpp().open(str(file), context=len(ids), lora=str(lora or ""), exact=True) as model:
        return logits_at_all(model, ids)


def logits_at_all(model: LlamaModel, ids: list[int]) -> Floats:
    """A model's logits at every position, computed at once."""
    (logits,) = model.logits(ids, range(len(ids)), at_once=len(ids))
    return logits


def divergence(model: Any, logits: Any, ids: list[int]) -> float:
    """Largest KL divergence of llama.cpp's logits from a transformers model's, in nats."""
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([ids])).logits[0].float().numpy()
    vocabulary = ours.shape[-1]
    return float(np.max(kl_divergence(log_softmax(ours), log_softmax(logits[:, :vocabulary]))))
