"""Models of unlike structure through a whole run, each compared with transformers and peft.

``make check-models`` does it with every type (:mod:`bench.model_types`), whose tiny models these are.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.model_types.processes import describe_here
from bench.model_types.walk import walk
from qlora_tui.catalog import described
from qlora_tui.chat import generation
from qlora_tui.training import attempt
from tests.support.every_model import taken, walks_over_models

pytestmark = pytest.mark.slow

TRAINED = {
    "gpt2": "fast",  # transposed matrices, learned positions
    "gemma4": "fast",  # images and text, inputs for each layer
    "emu3": "fast",  # images and text, a text class that does not find its weights
    "qwen3_next": "padded",  # linear attention, experts
    "zamba": "padded, not merged: its layers share weights",
}
"""By type: how it is computed."""


@walks_over_models
@pytest.mark.parametrize("model_type", taken(TRAINED, ("gemma4", "qwen3_next")))
def test_a_type_is_trained_resumed_asked_and_merged_as_the_libraries_do(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(described, "_describe", describe_here)
    monkeypatch.setattr(attempt, "lower_priority", lambda: None)
    monkeypatch.setattr(generation, "PREFILL_CHUNK_TOKENS", generation.PREFILL_CHUNK_TOKENS)  # the walk's own
    walked = walk(model_type, tmp_path)
    assert (walked.verdict, walked.reason) == ("trained", "")
    assert walked.how == TRAINED[model_type]
