"""The closed form against a traced step: transformers, peft and this project's trainer on the meta device.

``bench/trace.py`` runs the whole grid; here each way of building a layer is tried once.
"""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import msgspec
import pytest

from bench.trace import Case, Compared, compare, cut_config, recipe_of
from qlora_tui.catalog.architecture import read_architecture
from qlora_tui.engine.protocol import Failure
from qlora_tui.engine.tracing import Request, trace_step
from qlora_tui.errors import Problem
from qlora_tui.memory import Device, our_path
from qlora_tui.memory.traced import Traced, closed_form
from qlora_tui.recipe.fields import with_value

CASES = [
    Case("Llama 3", rows=2, length=512),
    Case("Llama 3", checkpointing=False, loss="stock", dropout=0.05),
    Case("Mistral", rows=3, length=256, wide=False, method="none"),
    Case("Mixtral", length=512),
    Case("Qwen 1.5 MoE", checkpointing=False, loss="stock", wide=False),
    Case("DeepSeek-V2", rows=3, length=512),
    Case("DeepSeek-V2", rows=3, length=512, checkpointing=False),
    Case("Falcon", rows=2, length=256),
    Case("Gemma 2", rows=2, length=512),
    Case("Gemma 3", checkpointing=False, loss="stock"),
    Case("Phi-2", checkpointing=False, loss="stock", dropout=0.05),
    Case("Phi-3", length=512),
    Case("GPT-2", rows=2, length=256, checkpointing=False),
    Case("GPT-NeoX", length=1024, wide=False),
    Case("OLMo-2", length=1024, wide=False),
    Case("OPT", loss="stock"),
    Case("Cohere", length=256, checkpointing=False),
    Case("OLMo-2", length=512, checkpointing=False, loss="stock"),
    Case("gpt-oss", length=512, checkpointing=False, loss="stock"),
    Case("gpt-oss", rows=3, length=512, checkpointing=False),
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
@pytest.mark.parametrize(("family", "tied"), [("Llama 3", True), ("Mistral", False)])
def test_trained_rows_are_counted_with_their_gradients(family: str, tied: bool) -> None:
    from qlora_tui.engine.trace import trace

    config = cut_config(family)
    architecture = read_architecture(config)
    assert architecture.head.tied == tied
    traced, closed = [], []
    for rows in (0, 200):
        recipe = recipe_of(Case(family, length=512, token_rows=rows))
        traced.append(trace(Request(config=config, recipe=recipe)).figures())
        closed.append(closed_form(recipe, architecture, our_path(recipe, Device())))
        assert closed[-1] == pytest.approx(traced[-1], rel=0.01)
    added = closed[1]["step"] - closed[0]["step"]
    assert added == pytest.approx(traced[1]["step"] - traced[0]["step"], rel=0.1)


@pytest.mark.slow
def test_gradients_of_an_earlier_micro_step_are_there_in_the_forward() -> None:
    from qlora_tui.engine.trace import trace

    recipe = recipe_of(Case("GPT-2", length=128))
    alone = trace(Request(config=cut_config("GPT-2"), recipe=recipe))
    training = msgspec.structs.replace(recipe.training, gradient_accumulation=4)
    accumulating = msgspec.structs.replace(recipe, training=training)
    after = trace(Request(config=cut_config("GPT-2"), recipe=accumulating))
    assert after.forward_bytes == alone.forward_bytes + alone.gradient_bytes
    closed = closed_form(
        accumulating, read_architecture(cut_config("GPT-2")), our_path(accumulating, Device())
    )
    for key, size in after.figures().items():
        assert closed[key] == pytest.approx(size, rel=0.03), key


@pytest.mark.slow
def test_a_model_that_cannot_be_built_is_a_failure_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_tui.engine import trace

    request = Request(config=cut_config("GPT-2") | {"n_head": 7}, recipe=recipe_of(Case("GPT-2")))
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(msgspec.json.encode(request))))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=out))
    trace.main()
    answer = msgspec.json.decode(out.getvalue(), type=Traced | Failure)
    assert isinstance(answer, Failure) and answer.what and answer.fix


@pytest.mark.parametrize("key, value", [("method", "int8"), ("compute_dtype", "float16")])
async def test_what_cannot_be_traced_is_refused(key: str, value: str) -> None:
    recipe = with_value(recipe_of(Case("GPT-2")), f"quantization.{key}", value)
    with pytest.raises(Problem, match="cannot be traced"):
        await trace_step(cut_config("GPT-2"), recipe, Device())
