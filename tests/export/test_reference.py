"""The trained model's answers, computed again from the output layer's inputs and matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_tui.chat.loading import load_session
from qlora_tui.chat.logits import ModelHead
from qlora_tui.errors import UserError
from qlora_tui.export import reference as reference_module
from qlora_tui.export.reference import Answers, kl_divergence, reference_answers
from tests.export.export_sources import make_source

pytestmark = pytest.mark.slow


class Model(nn.Module):
    """An output layer in a model."""

    def __init__(self, dtype: torch.dtype, **config: float) -> None:
        super().__init__()
        self.head = nn.Linear(32, 700, bias=False, dtype=dtype)
        self.config: Any = type("Config", (), {**config, "get_text_config": lambda self: self})()

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.mark.parametrize("logits_at_once", [1 << 25, 3000])
@pytest.mark.parametrize(
    "config", [{}, {"final_logit_softcapping": 2.0}, {"logits_scaling": 8.0}, {"logit_scale": 0.25}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_answers_are_computed_again(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, config: Any, logits_at_once: int
) -> None:
    monkeypatch.setattr(reference_module, "_LOGITS", logits_at_once)
    torch.manual_seed(3)
    head = ModelHead(Model(dtype, **config))
    inputs = 8 * torch.randn(40, 32, dtype=dtype)
    answers = Answers((inputs,), torch.cat(list(head.matrix(inputs))), head.scale, head.softcap)
    expected = head.logits(inputs).log_softmax(-1)
    parts = list(answers.log_probabilities(0))
    assert max(map(len, parts)) <= max(1, logits_at_once // 700)
    actual = torch.cat(parts)
    # A layer of 16 bits rounds its logits; the stored answers do not.
    assert (actual - expected).abs().max() < (1e-4 if dtype == torch.float32 else 0.3)
    assert kl_divergence(expected, actual).max() < 1e-3


@pytest.mark.parametrize("adapter", [{}, {"target_modules": ["q_proj", "lm_head"]}])
def test_every_trained_position_of_every_row_is_answered(tmp_path: Path, adapter: dict[str, Any]) -> None:
    source = make_source(tmp_path, rows=8, adapter=adapter)
    session = load_session(source)
    session.ensure_loaded("adapter")
    reference = reference_answers(source, "adapter", lambda words: None, 1 << 20)
    assert all(row.positions for row in reference.rows)
    for number, row in enumerate(reference.rows):
        logits = session.logits_at("adapter", list(row.computed_ids), list(row.positions))
        answers = torch.cat(list(reference.answers.log_probabilities(number)))
        torch.testing.assert_close(answers, logits.log_softmax(-1), atol=1e-4, rtol=1e-4)
    assert sum(len(row.positions) for row in reference.rows) == reference.trained


def test_a_model_that_computes_logits_otherwise_is_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path, model_type="granite", logits_scaling=8.0)
    assert reference_answers(source, "adapter", lambda words: None).answers.scale == 1 / 8
    whole = ModelHead.__init__

    def without_scale(head: ModelHead, model: Any) -> None:
        whole(head, model)
        head.scale = 1.0

    monkeypatch.setattr(ModelHead, "__init__", without_scale)
    with pytest.raises(UserError, match="cannot be compared"):
        reference_answers(source, "adapter", lambda words: None)
