"""Answers of a run's adapter and its base, on Runs."""

from __future__ import annotations

from collections.abc import Callable
from subprocess import Popen

import pytest

from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.task_metrics.task_evaluation import LossChange
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens import answer_measuring
from tests.support.task_evaluations import a_row, put_evaluation
from tests.tui.screen_assertions import wait_for_text, wait_until
from tests.tui.workstation import open_runs

MakeApp = Callable[[], QloraApp]


@pytest.mark.usefixtures("answers_until_stopped")
async def test_a_measures_answers_and_a_second_a_stops(make_app: MakeApp, three_runs: list[RunDir]) -> None:
    app = make_app()
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "─ tickets-a ─", "[a] compares its answers.")
        await pilot.press("a")
        await wait_for_text(pilot, "3 of 14")
        await pilot.press("a")
        await wait_for_text(pilot, "Stopped. Press [a] to continue.")


async def test_two_keys_at_once_start_one_measurement(
    make_app: MakeApp, three_runs: list[RunDir], endless_measurements: list[Popen[bytes]]
) -> None:
    app = make_app()
    async with app.run_test(size=(120, 40)) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "─ tickets-a ─")
        assert isinstance(app.screen, answer_measuring.EvaluationActions)
        app.screen.evaluate(three_runs[0])
        app.screen.evaluate(three_runs[0])
        await wait_until(pilot, lambda: bool(endless_measurements))
        workers = [worker for worker in app.workers if worker.group == "evaluation"]
        assert sum(not worker.is_finished for worker in workers) == 1
    assert len(endless_measurements) == 1


async def test_answers_are_shown_with_their_evidence(make_app: MakeApp, three_runs: list[RunDir]) -> None:
    rows = [
        a_row(
            "late" if number % 2 else "lost",
            "It may be late.",
            "late" if number % 2 else "lost",
            row=number,
            prompt=f"Where is parcel {number}?\x1b[2J",
        )
        for number in range(1, 8)
    ]
    run = next(run for run in three_runs if run.id == "tickets-a")
    put_evaluation(run, rows, LossChange.of([2.0] * 7, [1.0] * 7, [1] * 7))
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
