from __future__ import annotations

import pytest
from msgspec import structs

from qlora_tui.errors import UserError
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventWriter, last_event
from qlora_tui.runs.events import Failed, Health, LayersStreamed, Phase, Started
from qlora_tui.runs.memory_retry import (
    RetryPlan,
    describe_plan,
    last_plan,
    parse_plan,
    plan_resume,
    plan_retry,
    reduce_memory,
)

OUT_OF_MEMORY = Failed(at=1.0, title="Out of GPU memory", what="It asked for 2 GiB.", kind="out_of_memory")


def test_the_micro_batch_is_halved_and_the_effective_batch_stays(recipe: Recipe) -> None:
    recipe = replace_setting(recipe, "training.micro_batch_size", 6)
    plan: RetryPlan | None = RetryPlan()
    products = []
    while plan is not None:
        plan = reduce_memory(recipe, plan)
        if plan is not None:
            assert plan.micro_batch_size is not None and plan.gradient_accumulation is not None
            products.append((plan.micro_batch_size, plan.micro_batch_size * plan.gradient_accumulation))
    assert products == [(3, 48), (1, 48)]


def test_checkpointing_comes_last_and_then_there_is_nothing(recipe: Recipe) -> None:
    recipe = replace_setting(recipe, "training.gradient_checkpointing", "off")
    plan = reduce_memory(recipe, RetryPlan())
    assert plan == RetryPlan(micro_batch_size=1, gradient_accumulation=8, gradient_checkpointing="on")
    assert reduce_memory(recipe, plan) is None


def test_more_layers_are_streamed_before_the_micro_batch_shrinks(recipe: Recipe, run: RunDir) -> None:
    recipe = replace_setting(recipe, "quantization.streamed_layers", 9)
    recipe = replace_setting(recipe, "training.micro_batch_size", 2)
    with EventWriter(run.events_path) as log:
        log.append(LayersStreamed(at=0.0, streamed_layers=9, layers=12, host_bytes=9, slot_bytes=2))
    plan = last_plan(run)
    counts = []
    while (following := reduce_memory(recipe, plan)) is not None:
        plan = following
        counts.append((plan.apply_to(recipe).quantization.streamed_layers, plan.micro_batch_size))
    assert counts == [(11, 2), (12, 2), (12, 1)]
    assert "streaming the weights of 12 layers" in describe_plan(plan)


def test_the_next_attempt_starts_from_what_the_last_one_used(run: RunDir) -> None:
    with EventWriter(run.events_path) as log:
        log.append(Started(at=0.0, attempt=1, pid=1, micro_batch_size=2, gradient_accumulation=4))
        log.append(OUT_OF_MEMORY)
    assert last_plan(run).micro_batch_size == 2
    plan = plan_retry(run, OUT_OF_MEMORY)
    assert plan is not None and (plan.micro_batch_size, plan.gradient_accumulation) == (1, 8)
    event = last_event(run.events_path)
    assert isinstance(event, Health) and "micro-batch 1 × accumulation 8" in event.remedy


def test_a_resumed_run_keeps_retry_settings_else_its_recipe(run: RunDir) -> None:
    with EventWriter(run.events_path) as log:
        log.append(Started(at=0.0, attempt=1, pid=1, micro_batch_size=2, gradient_accumulation=4))
        assert plan_resume(run) == RetryPlan()
        log.append(OUT_OF_MEMORY)
        log.append(Started(at=2.0, attempt=2, pid=2, micro_batch_size=1, gradient_accumulation=8))
    plan = plan_resume(run)
    assert plan.apply_to(run.recipe()).effective_batch == run.recipe().effective_batch
    assert plan.micro_batch_size == 1


@pytest.mark.parametrize("phase", ["loading", "converting", "tokenizing"])
def test_out_of_memory_before_the_first_batch_is_not_retried(run: RunDir, phase: Phase) -> None:
    with EventWriter(run.events_path) as log:
        log.append(Started(at=0.0, attempt=1, pid=1, micro_batch_size=2, gradient_accumulation=4))
    assert plan_retry(run, structs.replace(OUT_OF_MEMORY, phase=phase)) is None
    assert plan_retry(run, structs.replace(OUT_OF_MEMORY, phase="probing")) is not None


def test_a_plan_is_one_json_argument_of_the_trainer() -> None:
    plan = RetryPlan(micro_batch_size=1, gradient_accumulation=8, gradient_checkpointing="off")
    option, argument = plan.to_arguments()
    assert option == "--plan"
    assert argument == '{"micro_batch_size":1,"gradient_accumulation":8,"gradient_checkpointing":"off"}'
    assert parse_plan(argument) == plan
    assert RetryPlan().to_arguments() == [] and parse_plan("{}") == RetryPlan()


@pytest.mark.parametrize(
    "argument", ["", "1", "[]", '{"micro_batch_size":"2"}', '{"rank":8}', "\udcff", "[" * 9999]
)
def test_what_is_no_plan_is_a_wrong_call(argument: str) -> None:
    with pytest.raises(UserError, match="Invalid --plan") as refused:
        parse_plan(argument)
    assert refused.value.exit_code == 2
