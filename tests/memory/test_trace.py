"""The closed form against a traced step: transformers, peft and this project's trainer on the meta device.

``bench/trace.py`` runs the whole grid; here each way of building a layer is tried once.
"""

from __future__ import annotations

import json
import subprocess
import sys

import msgspec
import pytest

from bench.trace import Case, Compared, compare, cut_config, recipe_of
from qlora_tui.engine.trace import Answer, Request

CASES = [
    Case("Llama 3", rows=2, length=512),
    Case("Llama 3", checkpointing=False, loss="stock", dropout=0.05),
    Case("Mistral", rows=3, length=256, wide=False, method="none"),
    Case("Mixtral", length=512),
    Case("Qwen 1.5 MoE", checkpointing=False, loss="stock", wide=False),
    Case("DeepSeek-V2", length=512, wide=False),
    Case("Falcon", rows=2, length=256),
    Case("Gemma 2", rows=2, length=512),
    Case("Gemma 3", checkpointing=False, loss="stock"),
    Case("Phi-2", checkpointing=False, loss="stock", dropout=0.05),
    Case("Phi-3", length=512),
    Case("GPT-2", rows=2, length=256, checkpointing=False),
    Case("OPT", loss="stock"),
    Case("OLMo-2", length=512, checkpointing=False, loss="stock"),
    Case("gpt-oss", length=512, checkpointing=False, loss="stock"),
]


@pytest.fixture(scope="module")
def compared() -> list[Compared]:
    return [compare(case) for case in CASES]


@pytest.mark.slow
def test_the_closed_form_is_within_one_percent_on_average_and_three_at_worst(
    compared: list[Compared],
) -> None:
    errors = [made.error_pct for made in compared]
    assert sum(map(abs, errors)) / len(errors) < 1
    for made in compared:
        assert abs(made.error_pct) < 3, made


@pytest.mark.slow
def test_the_trace_runs_as_a_child_process() -> None:
    case = Case("GPT-2", length=128)
    request = Request(config=cut_config("GPT-2"), recipe=recipe_of(case))
    done = subprocess.run(
        [sys.executable, "-m", "qlora_tui.engine.trace"],
        input=msgspec.json.encode(request),
        capture_output=True,
        check=True,
    )
    answer = msgspec.convert(json.loads(done.stdout), Answer)
    assert answer.step_bytes > answer.gradient_bytes > 0
    assert answer.parameter_bytes > answer.adapter_bytes > 0
