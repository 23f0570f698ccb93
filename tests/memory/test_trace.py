"""The closed form against a traced step: transformers, peft and this project's trainer on the meta device.

One family over two batch shapes, with and without checkpointing, chunked and stock loss, targets q and v or
all, dropout 0 and 0.05: each pair of settings. Families with other layers in two cases.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from qlora_tui.errors import UserError
from qlora_tui.memory import Device, trainer_execution
from qlora_tui.memory.estimate import closed_form
from qlora_tui.memory.recording import StepTrace
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.runs.exact_memory import TraceRequest
from qlora_tui.training.description import architecture_of
from tests.memory.step_cases import (
    FAMILIES,
    Case,
    compare,
    cut_config,
    pairs_of_settings,
    recipe_of,
    traced_step,
    two_cases,
)

pytestmark = pytest.mark.slow

TRACED_ELSEWHERE = ("Llama 3", "Mistral", "Mixtral", "Gemma 3")
"""Families that other tests here trace, and whose layers are otherwise those of another family."""
FEW_EXPERTS = 8
"""A trace runs an expert after the other. All of them are in the test of adapters on experts."""


@pytest.mark.parametrize("method", ["nf4", "none"])
def test_each_pair_of_settings_is_counted(method: str) -> None:
    for case in pairs_of_settings("Llama 3", method):
        assert abs(compare(case).error_pct) < 3, case


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in TRACED_ELSEWHERE])
def test_the_layers_of_a_family_are_counted(family: str) -> None:
    """Biases, experts, windows, caps, fused projections, norms, a latent of keys and values, a tied head."""
    for case in two_cases(family):
        result = compare(case, FEW_EXPERTS)
        assert abs(result.error_pct) < 5, result


@pytest.mark.parametrize(("family", "is_4_bit"), [("Mixtral", True), ("Mixtral", False)])
def test_adapters_on_experts_are_counted(family: str, is_4_bit: bool) -> None:
    recipe = recipe_of(Case(family, rows=4))
    recipe = replace_setting(recipe, "quantization.experts", is_4_bit)
    targets = ("q_proj", "experts.gate_up_proj", "experts.down_proj")
    recipe = replace_setting(recipe, "lora.target_modules", targets)
    config = cut_config(family)
    traced = traced_step(config, recipe).figures()
    closed = closed_form(recipe, architecture_of(config), trainer_execution(recipe, Device()))
    assert closed == pytest.approx(traced, rel=0.06)


@pytest.mark.parametrize(("family", "tied"), [("Llama 3", True), ("Mistral", False)])
def test_trained_rows_are_counted_with_their_gradients(family: str, tied: bool) -> None:
    config = cut_config(family)
    architecture = architecture_of(config)
    assert architecture.head.tied == tied
    traced, closed = [], []
    for rows in (0, 200):
        recipe = recipe_of(Case(family, length=512, token_rows=rows))
        traced.append(traced_step(config, recipe).figures())
        closed.append(closed_form(recipe, architecture, trainer_execution(recipe, Device())))
        assert closed[-1] == pytest.approx(traced[-1], rel=0.01)
    added = closed[1]["step"] - closed[0]["step"]
    assert added == pytest.approx(traced[1]["step"] - traced[0]["step"], rel=0.1)


@pytest.mark.parametrize(("family", "tied"), [("Llama 3", True), ("Mistral", False), ("Gemma 3", True)])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_trained_embedding_and_head_are_counted(family: str, tied: bool, accumulation: int) -> None:
    config = cut_config(family)
    architecture = architecture_of(config)
    assert architecture.head.tied == tied
    recipe = recipe_of(Case(family, length=512, embeddings=True))
    recipe = replace_setting(recipe, "training.gradient_accumulation", accumulation)
    traced = traced_step(config, recipe).figures()
    closed = closed_form(recipe, architecture, trainer_execution(recipe, Device()))
    assert closed == pytest.approx(traced, rel=0.01)


def test_earlier_gradients_are_counted_in_the_next_forward() -> None:
    recipe = recipe_of(Case("GPT-2", length=128))
    alone = traced_step(cut_config("GPT-2"), recipe)
    training = msgspec.structs.replace(recipe.training, gradient_accumulation=4)
    accumulating = msgspec.structs.replace(recipe, training=training)
    after = traced_step(cut_config("GPT-2"), accumulating)

    def first_forward(traced: StepTrace) -> int:
        return next(m.total_bytes for m in traced.moments if m.name == "forward of layer 0")

    assert first_forward(after) == first_forward(alone) + alone.figures()["gradients"]
    closed = closed_form(
        accumulating, architecture_of(cut_config("GPT-2")), trainer_execution(accumulating, Device())
    )
    for key, size in after.figures().items():
        assert closed[key] == pytest.approx(size, rel=0.03), key


@pytest.mark.parametrize("checkpointing", [True, False])
def test_both_sides_of_a_pair_are_counted(checkpointing: bool) -> None:
    config = cut_config("Llama 3")
    answers = recipe_of(Case("Llama 3", length=512, checkpointing=checkpointing))
    pairs = replace_setting(answers, "data.preferences", "dpo")
    traced = traced_step(config, pairs)
    closed = closed_form(pairs, architecture_of(config), trainer_execution(pairs, Device()))
    assert closed["step"] == pytest.approx(traced.step_bytes, rel=0.05)
    alone = traced_step(config, answers)
    assert traced.step_bytes > alone.step_bytes


def test_a_tensor_saved_without_need_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers.models.llama import modeling_llama

    class SavesItsInput(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x.clone())
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0]

    config, case = cut_config("Llama 3"), Case("Llama 3", length=512, checkpointing=False)
    before = traced_step(config, recipe_of(case))
    library_forward = modeling_llama.LlamaDecoderLayer.forward

    def forward(self: Any, x: torch.Tensor, **kwargs: Any) -> Any:
        return library_forward(self, SavesItsInput.apply(x), **kwargs)  # type: ignore[no-untyped-call]

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)
    added = traced_step(config, recipe_of(case)).step_bytes - before.step_bytes
    assert added == 2 * 512 * config["hidden_size"] * 2  # in each of two layers, in bfloat16


@pytest.mark.parametrize(("family", "layers"), [("gpt-oss", 13), ("DeepSeek-V2", 9)])
def test_repeated_layers_take_what_all_of_them_take(
    family: str, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_tui.engine import trace_worker

    config, recipe = cut_config(family, layers, FEW_EXPERTS), recipe_of(Case(family, length=256))
    recipe = replace_setting(recipe, "training.gradient_accumulation", 2)
    recorded = trace_worker._record
    built: list[Any] = []

    def record(*args: Any, **settings: Any) -> Any:
        result = recorded(*args, **settings)
        built.append(args[2] if result is not None else "not repeated")
        return result

    monkeypatch.setattr(trace_worker, "_record", record)
    short = traced_step(config, recipe)
    assert built[0].built < layers and len(built) == 1
    monkeypatch.setattr(trace_worker, "find_repetition", lambda kinds: None)
    assert traced_step(config, recipe) == short


def test_a_model_that_cannot_be_built_is_reported() -> None:
    from qlora_tui.engine.trace_worker import trace

    recipe = recipe_of(Case("GPT-2"))
    request = TraceRequest(
        config=cut_config("GPT-2") | {"n_head": 7},
        recipe=recipe,
        execution=trainer_execution(recipe, Device()),
    )
    with pytest.raises(UserError) as caught:
        trace(request)
    assert caught.value.what and caught.value.fix


def test_a_step_of_too_many_operations_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_tui.engine import recorder
    from qlora_tui.engine.trace_worker import trace

    monkeypatch.setattr(recorder, "MOST_OPERATIONS", 100)
    recipe = recipe_of(Case("Llama 3", length=64))
    execution = trainer_execution(recipe, Device())
    with pytest.raises(UserError) as caught:
        trace(TraceRequest(config=cut_config("Llama 3", 9), recipe=recipe, execution=execution))
    assert isinstance(caught.value.__cause__, recorder.TooManyOperations)


@pytest.mark.parametrize("device", [Device(kind="cpu", native_bfloat16=True), Device(varlen=False)])
def test_a_step_is_traced_on_other_devices_too(device: Device) -> None:
    recipe = recipe_of(Case("Llama 3", length=512, rows=3, checkpointing=False))
    config, execution = cut_config("Llama 3"), trainer_execution(recipe, device)
    traced = traced_step(config, recipe, execution)
    closed = closed_form(recipe, architecture_of(config), execution)
    assert closed["step"] == pytest.approx(traced.step_bytes, rel=0.05)
