"""GGUF files of tiny models, and what llama.cpp computes from them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_tui.adapters.merged_weights import MergedWeights
from qlora_tui.catalog.model_validation import weight_files
from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.data.tokenizer import ChatTokenizer
from qlora_tui.export import gguf
from qlora_tui.export.gguf_file.content import gguf_content
from qlora_tui.export.gguf_file.writer import FileContent, write_gguf
from qlora_tui.export.llama_cpp.bindings import LlamaCpp, LlamaModel
from qlora_tui.export.llama_cpp.client import LlamaFile
from qlora_tui.export.reference import kl_divergence
from qlora_tui.recipe.schema import Model, Recipe
from qlora_tui.training.gguf_weights import convert
from tests.export.tiny_models import make_model


def hide_llama_cpp(monkeypatch: pytest.MonkeyPatch, reason: str = "llama.cpp is not installed") -> None:
    """Let exports do without llama.cpp."""
    for module in (gguf, gguf):
        monkeypatch.setattr(module, "unavailable_because", lambda: reason)


def base_content(folder: Path) -> FileContent:
    """The content of a model's file without an adapter."""
    weights = MergedWeights(folder, {folder / name: {} for name in weight_files(folder)})
    source = ChatSource(recipe=Recipe(model=Model(id=str(folder))))
    return gguf_content(source, ChatTokenizer.from_folder(folder), weights)


def write_base(folder: Path, file: Path, file_type: str = "F16") -> Path:
    """Write the GGUF file of a model without an adapter."""
    write_gguf(base_content(folder), file, file_type)
    return file


def logits_of(file: Path, ids: list[int]) -> Any:
    """llama.cpp's logits at every position, computed in a process of its own, attention in float32."""
    llama = LlamaFile(str(file), len(ids), exact=True)
    try:
        return llama.extend(ids, start=0, positions=range(len(ids)))
    finally:
        llama.close()


def logits_at_all(model: LlamaModel, ids: list[int]) -> Any:
    """A model's logits at every position, computed at once."""
    return model.compute(ids, range(len(ids)), 0)


def divergences(model: Any, logits: Any, ids: list[int]) -> torch.Tensor:
    """KL divergence of llama.cpp's logits from a transformers model's at each position, in nats."""
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([ids])).logits[0].float()
    theirs = torch.from_numpy(logits[:, : ours.shape[-1]].copy())
    return kl_divergence(ours.log_softmax(-1), theirs.log_softmax(-1))


def divergence(model: Any, logits: Any, ids: list[int]) -> float:
    """Largest KL divergence of llama.cpp's logits from a transformers model's, in nats."""
    return float(divergences(model, logits, ids).max())


def token_ids(count: int) -> list[int]:
    return random.Random(0).choices(range(2, 384), k=count)


def read_back(folder: Path, file: Path) -> Any:
    """Convert a file; return transformers' model of it in float32."""
    convert(file, folder)
    config = AutoConfig.from_pretrained(str(folder))
    if config.model_type == "gpt_oss" and config.rope_parameters["rope_type"] == "yarn":
        # The published model does not round the borders of YaRN's ramp; llama.cpp does, and the model here.
        assert config.rope_parameters.pop("truncate") is False
    return AutoModelForCausalLM.from_pretrained(
        str(folder), config=config, dtype=torch.float32, attn_implementation="eager"
    )


def made(folder: Path, model_type: str, **settings: Any) -> tuple[Any, Path]:
    """Make a model whose weights bfloat16 holds exactly, and its file."""
    model = make_model(folder / "model", model_type, **settings)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16().float())
    model.save_pretrained(folder / "model")
    return model, write_base(folder / "model", folder / "packed.gguf", "BF16")


def llama_logits(file: Path, ids: list[int]) -> Any:
    with LlamaCpp().open(str(file), context=len(ids), exact=True) as llama:
        return logits_at_all(llama, ids)
