"""The fix that one key applies to the latest warning or failure of a run."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec import structs

from qlora_tui.recipe.fields import get_setting, replace_setting
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import Failed, Phase
from qlora_tui.runs.retry import RetryPlan
from qlora_tui.runs.status import State
from qlora_tui.runs.suggested_fix import suggest_fix
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.train.screen import TrainScreen, show_run
from tests.tui.fake_runs import TICKETS, FakeRun, write_fake_run
from tests.tui.run_events import health_event
from tests.tui.screen_assertions import wait_for_text


async def watching(app: QloraApp, run: RunDir) -> TrainScreen:
    await show_run(app, run)
    assert isinstance(app.screen, TrainScreen)
    return app.screen


async def test_m_halves_the_learning_rate_where_the_gradient_explodes() -> None:
    run = write_fake_run(FakeRun(steps=50))
    with EventWriter(run.events_path) as log:
        log.append(health_event("exploding_gradient", "Lower training.learning_rate."))
    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        await watching(app, run)
        await wait_for_text(pilot, "m Apply fix")
        await pilot.press("tab", "tab")
        await wait_for_text(pilot, "▸ [m] halve the learning rate of this run, to 0.0001")
        await pilot.press("m", "enter")
        request = json.loads(next(run.control_dir.glob("*.json")).read_bytes())
        assert request == {"kind": "set_learning_rate", "value": 1e-4}


async def test_m_prepares_a_smaller_run_after_out_of_memory() -> None:
    run = write_fake_run(FakeRun(steps=50, state="failed"))
    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        before = app.workbench.recipe
        await watching(app, run)
        await wait_for_text(pilot, "m Apply fix", "Out of GPU memory")
        await pilot.press("m")
        await wait_for_text(pilot, "Prepare a run with micro-batch size 1 instead of 2")
        await pilot.press("n")
        assert app.workbench.recipe == before
        await pilot.press("m", "y")
        await wait_for_text(pilot, "Micro-batch")
        training = app.workbench.recipe.training
        assert (training.micro_batch_size, training.gradient_accumulation) == (1, 16)
        await pilot.press("u")
        assert app.workbench.recipe == before


@pytest.mark.parametrize(
    ("kind", "state", "says"),
    [
        ("plateau", "running", "stop this run"),
        ("nan_loss", "stopped", "prepare a run with learning rate 0.0001 instead of 0.0002"),
        ("gradients_overflow", "failed", "compute dtype float32 instead of auto"),
        ("few_steps", "finished", "gradient accumulation 4 instead of 8"),
        ("worse_than_before", "running", "stop this run"),
        ("worse_than_before", "finished", "prepare a run with learning rate 2e-5 instead of 0.0002"),
        ("throttled", "running", ""),
    ],
)
def test_a_fix_suits_the_warning_and_the_runs_state(kind: str, state: State, says: str) -> None:
    suggestion = suggest_fix(state, [health_event(kind, "")], None, TICKETS, RetryPlan())
    assert (says in suggestion.label) if suggestion else not says


@pytest.mark.parametrize(
    ("method", "phase", "says"),
    [
        ("int8", "loading", "method nf4 instead of int8"),
        ("nf4", "loading", ""),
        ("nf4", "training", "micro-batch size 1 instead of 2"),
    ],
)
def test_the_fix_for_memory_suits_the_phase(method: str, phase: Phase, says: str) -> None:
    ending = Failed(at=1.0, title="Out of memory", what="It is.", kind="out_of_memory", phase=phase)
    suggestion = suggest_fix(
        "failed", [], ending, replace_setting(TICKETS, "quantization.method", method), RetryPlan()
    )
    assert (says in suggestion.label) if suggestion else not says


def next_after_out_of_memory(plan: RetryPlan | None = None, **training: Any) -> dict[str, Any]:
    recipe = structs.replace(TICKETS, training=structs.replace(TICKETS.training, **training))
    ending = Failed(at=1.0, title="Out of memory", what="It is.", kind="out_of_memory", phase="training")
    suggestion = suggest_fix("failed", [], ending, recipe, plan or RetryPlan())
    assert suggestion is not None
    return {path: value for path, value in suggestion.changes.items() if value != get_setting(recipe, path)}


def test_a_memory_fix_keeps_the_effective_batch_of_odd_sizes() -> None:
    changes = next_after_out_of_memory(micro_batch_size=3, gradient_accumulation=4)
    assert changes == {"training.micro_batch_size": 1, "training.gradient_accumulation": 12}


def test_the_fix_for_memory_checkpoints_before_it_shortens_samples() -> None:
    changes = next_after_out_of_memory(micro_batch_size=1, gradient_checkpointing="off")
    assert changes == {"training.gradient_checkpointing": "on"}
    changes = next_after_out_of_memory(micro_batch_size=1, gradient_checkpointing="on")
    assert changes == {"data.max_length": TICKETS.data.max_length // 2}


def test_the_fix_for_memory_goes_beyond_what_retries_tried() -> None:
    tried = RetryPlan(micro_batch_size=1, gradient_accumulation=16, gradient_checkpointing="on")
    changes = next_after_out_of_memory(tried, micro_batch_size=2, gradient_checkpointing="off")
    assert changes == {
        "training.micro_batch_size": 1,
        "training.gradient_accumulation": 16,
        "training.gradient_checkpointing": "on",
        "data.max_length": TICKETS.data.max_length // 2,
    }


def test_the_fix_for_few_steps_removes_a_low_step_limit() -> None:
    limited = replace_setting(TICKETS, "training.max_steps", 5)
    suggestion = suggest_fix("finished", [health_event("few_steps", "")], None, limited, RetryPlan())
    assert suggestion is not None
    assert suggestion.label == "prepare a run with max steps 0 instead of 5"
