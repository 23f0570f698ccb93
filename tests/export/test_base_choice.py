"""Which base weights an adapter is merged into: those whose answers are nearer to its training."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.chat.loading import load_session
from qlora_tui.chat.session import ChatSession
from qlora_tui.export.base_choice import base_requantizer
from qlora_tui.export.gguf import export_gguf
from qlora_tui.export.merge import MergeCheck, merge, verify_merge
from qlora_tui.recipe.schema import Recipe
from qlora_tui.training.model import load_base
from tests.export.export_sources import make_source

pytestmark = pytest.mark.slow

IDS = list(range(5, 69))


@pytest.fixture
def inflated(tmp_path: Path) -> ChatSource:
    """A source whose norms are as large as those of real models, so that rounding errors grow."""
    source = make_source(tmp_path, quantization="nf4")
    file = Path(source.recipe.model.id) / "model.safetensors"
    weights = load_file(file)
    save_file({k: v * 4 if "layernorm" in k else v for k, v in weights.items()}, file, {"format": "pt"})
    return source


def logits_of_folder(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits[0].log_softmax(-1)


def test_the_weights_of_the_training_win_over_16_bits(inflated: ChatSource, tmp_path: Path) -> None:
    merged = merge(inflated, "adapter", tmp_path / "merged")
    choice = merged.base
    assert choice.chosen == "dequantized"
    assert choice.original_divergence is not None and choice.dequantized_divergence is not None
    assert choice.original_divergence > 0.1 > 0.001 > choice.dequantized_divergence
    assert "dequantized 4-bit base weights used in training" in choice.sentence
    trained = load_session(inflated)
    trained.ensure_loaded("adapter")
    expected = trained.logits_at("adapter", IDS, list(range(len(IDS)))).log_softmax(-1)
    actual = logits_of_folder(merged.folder)
    assert float((expected.exp() * (expected - actual)).sum(-1).mean()) < 0.001
    check = verify_merge(
        inflated, "adapter", tmp_path / "merged", requantize=base_requantizer(inflated, choice)
    )
    assert isinstance(check, MergeCheck) and check.agrees
    assert isinstance(wrong := verify_merge(inflated, "adapter", tmp_path / "merged"), MergeCheck)
    assert not wrong.agrees


@pytest.mark.parametrize("name, chosen", [("original", "original"), ("dequantized", "dequantized")])
def test_named_weights_are_not_measured(inflated: ChatSource, tmp_path: Path, name: Any, chosen: str) -> None:
    said: list[str] = []
    merged = merge(inflated, "adapter", tmp_path / "merged", said.append, base_name=name)
    assert merged.base.chosen == chosen and merged.base.sentence == ""
    assert said[0] == "Merging model.safetensors (1 of 1)"


def test_models_are_freed_before_the_file_is_written(
    inflated: ChatSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[int] = []

    def count_sessions() -> None:
        sessions.append(sum(isinstance(each, ChatSession) for each in gc.get_objects()))

    monkeypatch.setattr(torch.cuda, "empty_cache", count_sessions)
    merge(inflated, "adapter", tmp_path / "merged")
    assert sessions == [0, 0]


def test_without_data_the_weights_of_the_training_are_taken(inflated: ChatSource, tmp_path: Path) -> None:
    (Path(inflated.recipe.model.id).parent / "rows.jsonl").unlink()
    choice = merge(inflated, "adapter", tmp_path / "merged").base
    assert (
        choice.chosen == "dequantized" and "Not compared with the original 16-bit weights" in choice.sentence
    )


@pytest.mark.parametrize("failing", ["loading", "computing"])
def test_a_gpu_too_small_for_16_bits_measures_nothing(
    inflated: ChatSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    compute = ChatSession.head_inputs

    def load(folder: Path, recipe: Recipe, *arguments: Any, **settings: Any) -> Any:
        if failing == "loading" and recipe.quantization.method == "none":
            raise torch.OutOfMemoryError
        return load_base(folder, recipe, *arguments, **settings)

    def head_inputs(self: ChatSession, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if failing == "computing" and self.source.recipe.quantization.method == "none":
            raise torch.OutOfMemoryError
        return compute(self, *arguments)

    monkeypatch.setattr("qlora_tui.chat.loading.load_base", load)
    monkeypatch.setattr(ChatSession, "head_inputs", head_inputs)
    choice = merge(inflated, "adapter", tmp_path / "merged", base_name="best").base
    assert choice.chosen == "dequantized" and "Out of memory" in choice.sentence


def test_memory_too_small_for_the_reference_leaves_files_unchecked(
    inflated: ChatSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def head_inputs(self: ChatSession, *arguments: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(ChatSession, "head_inputs", head_inputs)
    result = export_gguf(inflated, "adapter", tmp_path / "out", ["F16"])
    assert result.files[0].proof is None and "Out of memory" in result.unchecked_because


def test_16_bit_runs_have_no_choice(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    choice = merge(source, "adapter", tmp_path / "merged").base
    assert choice.chosen == "original" and not choice.sentence


def test_a_gguf_file_has_the_weights_of_the_training(inflated: ChatSource, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp_py_sync")
    result = export_gguf(inflated, "adapter", tmp_path / "out", ["F16"])
    assert result.base.chosen == "dequantized"
    assert result.files[0].proof is not None and result.files[0].proof.divergence < 0.004
