"""Answers of a run's adapter and its base, on Runs."""

from __future__ import annotations

from collections.abc import Callable
from subprocess import Popen
from threading import Event
from typing import Any

import pytest

from qlora_tui.files import private_dir
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.measuring import MeasuringStoppedError, StopSwitch
from qlora_tui.runs.task_metrics.answer_metrics import TaskRow, measure_answers
from qlora_tui.runs.task_metrics.task_evaluation import LossChange, TaskEvaluation, write_task_evaluation
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.runs import evaluation_actions
from tests.tui.screen_assertions import wait_for_text, wait_until
from tests.tui.workstation import open_runs

MakeApp = Callable[[], QloraApp]


def put_evaluation(run: RunDir) -> TaskEvaluation:
    """An evaluation of the run's adapter, on seven prompts."""
    private_dir(run.adapter_dir)
    (run.adapter_dir / "adapter_model.safetensors").write_bytes(b"weights")
    rows = tuple(
        TaskRow(
            source=0,
            row=number,
            prompt=f"Where is parcel {number}?\x1b[2J",
            reference="late" if number % 2 else "lost",
            base="It may be late.",
            adapter="late" if number % 2 else "lost",
            base_ended=True,
            adapter_ended=True,
        )
        for number in range(1, 8)
    )
    metrics, labels = measure_answers(rows)
    evaluation = TaskEvaluation(
        run=run.id,
        adapter="7 bytes",
        max_new_tokens=32,
        validation_rows=7,
        metrics=metrics,
        labels=labels,
        loss=LossChange.of([2.0] * 7, [1.0] * 7, [1] * 7),
        rows=rows,
    )
    write_task_evaluation(run, evaluation)
    return evaluation


async def test_a_measures_answers_and_a_second_a_stops(
    make_app: MakeApp, three_runs: list[RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = Event()

    def evaluate(run: RunDir, progress: Any, switch: StopSwitch) -> TaskEvaluation:
        progress(3, 14)
        monkeypatch.setattr(switch, "stop", stopped.set)
        assert stopped.wait(10)
        raise MeasuringStoppedError

    monkeypatch.setattr(evaluation_actions, "evaluate_task", evaluate)
    app = make_app()
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "─ tickets-a ─", "[a] compares its answers.")
        await pilot.press("a")
        await wait_for_text(pilot, "3 of 14")
        await pilot.press("a")
        await wait_for_text(pilot, "Stopped. Press [a] to continue.")


async def test_answers_are_shown_with_their_evidence(make_app: MakeApp, three_runs: list[RunDir]) -> None:
    put_evaluation(next(run for run in three_runs if run.id == "tickets-a"))
    app = make_app()
    async with app.run_test(size=(120, 40)) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "answers better:")
        await pilot.press("a")
        await wait_for_text(
            pilot, "7 validation prompts of tickets-a", "Where is parcel 1?", "It may be late."
        )
        await pilot.press("escape")


async def test_leaving_the_app_ends_the_evaluation(
    make_app: MakeApp, three_runs: list[RunDir], endless_measurements: list[Popen[bytes]]
) -> None:
    """Otherwise the app waits for it, without a terminal."""
    app = make_app()
    async with app.run_test(size=(120, 40)) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "─ tickets-a ─")
        await pilot.press("a")
        await wait_until(pilot, lambda: len(endless_measurements) == 1)
    assert endless_measurements[0].wait(60)
