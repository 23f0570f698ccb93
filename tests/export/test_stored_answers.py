"""Stored answers: every trained position, computed again from the output layer's inputs and matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qlora_tui.chat.output_head import ModelHead
from qlora_tui.chat.session import load_session
from qlora_tui.errors import UserError
from qlora_tui.export import answer_files
from qlora_tui.export.journal import Journal
from qlora_tui.export.llama_cpp import stored_answers
from qlora_tui.export.llama_cpp.bindings import LlamaCpp
from qlora_tui.export.llama_cpp.jobs import StoredAnswers
from qlora_tui.export.llama_cpp.stored_answers import AnswerReader, kl_divergence, log_softmax
from qlora_tui.export.reference import reference_answers, reference_bytes
from qlora_tui.runs.exports import COMPARED_TOKENS
from tests.export.export_sources import make_source
from tests.export.gguf_files import logits_at_all, write_base

pytestmark = pytest.mark.slow


class Model(nn.Module):
    """An output layer in a model."""

    def __init__(self, dtype: torch.dtype, **config: float) -> None:
        super().__init__()
        self.head = nn.Linear(32, 700, bias=False, dtype=dtype)
        self.config: Any = type("Config", (), {**config, "get_text_config": lambda self: self})()

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize(
    "config", [{}, {"final_logit_softcapping": 2.0}, {"logits_scaling": 8.0}, {"logit_scale": 0.25}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_answers_are_computed_again_from_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, config: Any, in_parts: bool
) -> None:
    if in_parts:
        monkeypatch.setattr(stored_answers, "_MATRIX_BYTES", 0)
        monkeypatch.setattr(stored_answers, "_LOGITS", 3000)
    torch.manual_seed(3)
    head = ModelHead(Model(dtype, **config))
    inputs = 8 * torch.randn(40, 32, dtype=dtype)
    name = answer_files._DTYPES[dtype]
    files = {"inputs": [inputs], "matrix": list(head.matrix(inputs))}
    for file, parts in files.items():
        (tmp_path / file).write_bytes(b"".join(map(answer_files._bytes, parts)))
    answers = StoredAnswers(
        inputs=str(tmp_path / "inputs"), matrix=str(tmp_path / "matrix"), dtype=name, width=32,
        vocabulary=700, scale=head.scale, softcap=head.softcap,
    )  # fmt: skip
    expected = head.logits(inputs).log_softmax(-1).numpy()
    actual = AnswerReader(answers).log_probabilities(7, 40)
    # A layer of 16 bits rounds its logits; the stored answers do not.
    assert np.abs(actual - expected[7:]).max() < (1e-4 if dtype == torch.float32 else 0.3)
    assert kl_divergence(expected[7:], actual).max() < 1e-3


@pytest.mark.parametrize("adapter", [{}, {"target_modules": ["q_proj", "lm_head"]}])
def test_every_trained_position_of_every_row_is_stored(tmp_path: Path, adapter: dict[str, Any]) -> None:
    source = make_source(tmp_path, rows=8, adapter=adapter)
    session = load_session(source)
    session.ensure_loaded("adapter")
    with reference_answers(source, "adapter", Journal(tmp_path), lambda words: None) as reference:
        assert all(row.positions for row in reference.rows)
        reader = AnswerReader(reference.answers)
        start = 0
        for row in reference.rows:
            logits = session.logits_at("adapter", list(row.computed_ids), list(row.positions))
            stored = reader.log_probabilities(start, start + len(logits))
            assert np.allclose(stored, logits.log_softmax(-1).numpy(), atol=1e-4)
            start += len(logits)
        assert start == reference.trained
        files = [Path(reference.answers.inputs), Path(reference.answers.matrix)]
        # 4 bytes for each of 64 numbers of a position, where logits would take thousands.
        assert files[0].stat().st_size == 4 * reference.answers.width * reference.trained
        assert sum(file.stat().st_size for file in files) <= reference_bytes(source, COMPARED_TOKENS)
    assert not any(file.exists() for file in files)


def test_a_model_that_computes_logits_otherwise_is_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path, model_type="granite", logits_scaling=8.0)
    with reference_answers(source, "adapter", Journal(tmp_path), lambda words: None) as reference:
        assert reference.answers.scale == 1 / 8
    whole = ModelHead.__init__

    def without_scale(head: ModelHead, model: Any) -> None:
        whole(head, model)
        head.scale = 1.0

    monkeypatch.setattr(ModelHead, "__init__", without_scale)
    with (
        pytest.raises(UserError, match="cannot be compared"),
        reference_answers(source, "adapter", Journal(tmp_path), lambda words: None),
    ):
        pass


@pytest.mark.parametrize("at_once", [1, 7, 64])
def test_llama_cpp_computes_a_row_in_parts(tmp_path: Path, at_once: int) -> None:
    pytest.importorskip("llama_cpp_py_sync")
    file = write_base(Path(make_source(tmp_path).recipe.model.id), tmp_path / "base.gguf")
    ids, positions = list(range(5, 55)), [3, 4, *range(20, 50)]
    with LlamaCpp().open(str(file), context=len(ids), exact=True) as model:
        whole = logits_at_all(model, ids)[positions]
        parts = list(model.logits(ids, positions, at_once))
    assert max(map(len, parts)) <= at_once
    # Its kernels for one token round otherwise.
    assert kl_divergence(log_softmax(whole), log_softmax(np.concatenate(parts))).max() < 1e-5
