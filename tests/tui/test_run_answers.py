"""Answers of a run's adapter and its base, on Runs."""

from __future__ import annotations

from subprocess import Popen

import pytest

from qlora_tui.runs.directory import RunDir
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens import answer_measuring
from tests.tui.screen_assertions import wait_for_text, wait_until
from tests.tui.workstation import open_runs


@pytest.mark.usefixtures("answers_until_stopped")
async def test_a_measures_answers_and_a_second_a_stops(three_runs: list[RunDir]) -> None:
    app = QloraApp()
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "─ tickets-a ─", "[a] compares its answers.")
        await pilot.press("a")
        await wait_for_text(pilot, "3 of 14")
        await pilot.press("a")
        await wait_for_text(pilot, "Stopped. Press [a] to continue.")


async def test_two_keys_at_once_start_one_measurement(
    three_runs: list[RunDir], endless_measurements: list[Popen[bytes]]
) -> None:
    app = QloraApp()
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


async def test_leaving_the_app_ends_the_evaluation(
    three_runs: list[RunDir], endless_measurements: list[Popen[bytes]]
) -> None:
    """Otherwise the app waits for it, without a terminal."""
    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "─ tickets-a ─")
        await pilot.press("a")
        await wait_until(pilot, lambda: len(endless_measurements) == 1)
    assert endless_measurements[0].wait(60)
