"""Runs in which the free memory decides how many layers keep their activations."""

from __future__ import annotations

import pytest

from qlora_tui.memory.execution import LEAN_OPTIMIZER
from qlora_tui.runs import actions
from qlora_tui.runs.directory import create_run
from qlora_tui.runs.events import Environment, Failed, LayersKept, MemoryMeasured, Started, StepChosen
from qlora_tui.runs.memory_retry import RetryPlan, last_plan, reduce_memory
from qlora_tui.runs.status import read_status
from tests.support.polling import wait_for
from tests.support.trainer_processes import Trainers
from tests.training.conftest import MakeRecipe
from tests.training.event_helpers import events_of, losses
from tests.training.test_faults import WIDE, inject_fault

pytestmark = pytest.mark.slow

LEFT_OPEN = {"training.optimizer": "auto", "training.gradient_accumulation": 4}
AUTO = {"training.gradient_checkpointing": "auto"}


def test_kept_layers_do_not_change_what_is_learned(recipe: MakeRecipe, trainers: Trainers) -> None:
    runs = {}
    for limit in (0, 1, None):
        run = create_run(recipe({**AUTO, "training.max_steps": 4}))
        assert trainers.run(run, RetryPlan(kept_layers=limit)) == 0
        (event,) = events_of(run, LayersKept)
        assert event.kept_layers == (event.layers if limit is None else limit)
        runs[limit] = run
    assert losses(runs[0]) == losses(runs[1]) == losses(runs[None])
    recomputed, partly = (events_of(runs[limit], LayersKept)[0].estimated_bytes for limit in (0, 1))
    assert recomputed < partly == events_of(runs[1], MemoryMeasured)[-1].estimated_bytes


@pytest.mark.usefixtures("quick_trainers")
def test_a_run_out_of_memory_keeps_fewer_layers(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    inject_fault(monkeypatch, "inject_oom_with_kept_layers()")
    run = actions.submit(recipe({**WIDE, **AUTO}))
    wait_for(lambda: read_status(run).state == "finished", seconds=120, saying="the end")
    first, second = events_of(run, LayersKept)
    assert first.kept_layers == first.layers and second.kept_layers == 0
    assert all(ending.kind == "out_of_memory" for ending in events_of(run, Failed))
    attempts = events_of(run, Started)
    assert [(a.micro_batch_size, a.gradient_checkpointing) for a in attempts] == [(4, "auto"), (4, "auto")]


def test_the_last_resort_is_one_row_without_kept_layers(recipe: MakeRecipe) -> None:
    wide = recipe({**AUTO, "training.micro_batch_size": 2})
    plans = [RetryPlan(kept_layers=8)]
    while plan := reduce_memory(wide, plans[-1]):
        plans.append(plan)
    assert [(plan.kept_layers, plan.micro_batch_size) for plan in plans[1:]] == [(2, 2), (0, 2), (0, 1)]


def test_a_retry_takes_the_least_memory(
    recipe: MakeRecipe, trainers: Trainers, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject_fault(monkeypatch, "choose_for_memory(2, 'adamw')")
    short = recipe({**LEFT_OPEN, "training.max_steps": 2})
    run = create_run(short)
    assert trainers.run(run) == 0
    assert last_plan(run).micro_batch_size == 2
    retry = create_run(short)
    assert trainers.run(retry, RetryPlan(micro_batch_size=1, gradient_accumulation=4)) == 0
    (chosen,) = events_of(retry, StepChosen)
    assert (chosen.micro_batch_size, chosen.optimizer) == (1, LEAN_OPTIMIZER)


@pytest.mark.usefixtures("quick_trainers")
def test_out_of_memory_after_a_checkpoint_halves_chosen_rows(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject_fault(monkeypatch, "choose_for_memory(4, 'adamw'); inject_oom({3: 2})")
    run = actions.submit(recipe({**LEFT_OPEN, "training.checkpoint_every": 1}))
    wait_for(lambda: read_status(run).state == "finished", seconds=120, saying="the end")
    assert [attempt.resumed_from_step for attempt in events_of(run, Started)] == [0, 2]
    assert last_plan(run).micro_batch_size == 2
    assert {event.optimizer for event in events_of(run, Environment)} == {"adamw"}
