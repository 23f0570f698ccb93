"""The list of runs, and the preview of one."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from qlora_tui.cli import main
from qlora_tui.formatting import format_float
from qlora_tui.runs import actions, run_queue
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.run_summary import SummaryCache, summarize
from qlora_tui.runs.status import State, read_status, write_status
from qlora_tui.runs.view import RunView
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.render.charts import downsample
from qlora_tui.tui.render.labels import result_label
from qlora_tui.tui.render.loss import summary_plot
from qlora_tui.tui.screens.runs.run_preview import RunFiles, run_keys
from qlora_tui.tui.screens.runs.screen import ORDERS, in_order
from qlora_tui.tui.system_monitor import SystemMonitor
from tests.tui import fake_runs
from tests.tui.fake_runs import BEGAN, FakeRun, write_fake_run
from tests.tui.screen_assertions import text_of, wait_for_text
from tests.tui.workstation import open_runs


def test_a_summary_says_what_a_line_needs(three_runs: list[RunDir]) -> None:
    summary = summarize(three_runs[1])
    assert summary.model == "Qwen2.5-7B-Instruct"
    assert summary.settings == "nf4 r64 2,048×2×8"
    assert summary.best is not None and summary.best[1] == 120
    assert summary.seconds == pytest.approx(120 * 1.5, rel=0.02)
    assert len(summary.losses) == 120


def test_a_summary_is_read_again_only_when_a_file_changed(three_runs: list[RunDir]) -> None:
    summaries = SummaryCache()
    first = summaries.get(three_runs[0])
    assert summaries.get(three_runs[0]) is first
    write_fake_run(FakeRun(name="tickets-a", state="stopped", steps=10, total=300))
    assert summaries.get(three_runs[0]).status.state == "stopped"


@pytest.mark.slow
def test_hundreds_of_runs_are_listed_at_once_and_read_gradually() -> None:
    for number in range(300):
        write_fake_run(
            FakeRun(name=f"run-{number:03}", state="finished", steps=5, total=5, began=BEGAN + number)
        )
    summaries = SummaryCache()
    listing = summaries.read_all(0.0)
    assert len(listing.summaries) == 300
    in_pieces = not listing.complete
    assert in_pieces
    assert listing.summaries[0].id == "run-299"
    while not listing.complete:
        listing = summaries.read_all(0.2)
    assert all(summary.losses for summary in listing.summaries)


@pytest.mark.parametrize("state", ["paused", "lost"])
async def test_a_runs_last_loss_and_step_are_the_same_everywhere(
    capsys: pytest.CaptureFixture[str], state: State
) -> None:
    run = write_fake_run(FakeRun(name="owls", steps=60, state=state))
    # As of a heartbeat before the last step.
    write_status(run, structs.replace(read_status(run), step=59, loss=9.9))
    view = RunView(run)
    view.refresh()
    loss = format_float(view.series.loss[-1], 3)
    app = QloraApp()
    async with app.run_test(size=(150, 40)) as pilot:
        await wait_for_text(pilot, f"loss {loss}", "step 60 of 3,000")
        await pilot.press("6")
        await wait_for_text(pilot, f"{loss}*", "60/3,000")
        await pilot.press("enter")
        await wait_for_text(pilot, f"loss {loss}", "step 60/3,000")
    assert main(["runs"]) == 0
    shown = capsys.readouterr().out
    assert loss in shown and "60/3,000" in shown


@pytest.mark.parametrize(
    ("nan", "before", "label"),
    [(range(0), 2.71, "✓ finished"), (range(90, 301), 2.71, "! NaN loss"), (range(0), 1.1, "! worse")],
)
def test_a_finished_run_without_a_usable_result_is_marked(
    nan: range, before: float, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_runs, "BEFORE_TRAINING", before)
    run = write_fake_run(FakeRun(name="a", state="finished", steps=300, total=300, nan=nan, health=True))
    summary = summarize(run)
    sign, word, _ = result_label(summary.status.state, summary.defect)
    assert f"{sign} {word}" == label
    if nan:
        assert summary.defect is not None
        assert summary.defect.sentence == "The loss is not a number since step 90."


def test_a_decimated_curve_marks_nan_and_leaves_gaps() -> None:
    assert downsample([4.0, 2.0], 4) == [4.0, 2.0, None, None]
    means = downsample([1.0, 3.0, float("nan"), 1.0], 2)
    assert means[0] == 2.0
    assert means[1] is not None and math.isnan(means[1])


async def test_the_filter_cuts_the_list_down(three_runs: list[RunDir]) -> None:
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "tickets-a", "poems-c")
        await pilot.press("slash", *"poems")
        await pilot.pause()
        assert "tickets-a" not in text_of(app)
        await pilot.press("enter", "escape")
        await wait_for_text(pilot, "tickets-a")
        await pilot.press("slash", *"nothing")
        await wait_for_text(pilot, "No run matches")


def test_a_second_poll_stats_each_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        write_fake_run(
            FakeRun(name=f"run-{number:02}", state="finished", steps=5, total=5, began=BEGAN + number)
        )
    summaries, monitor = SummaryCache(), SystemMonitor()
    while not summaries.read_all(5.0).complete:
        pass
    monitor.poll_and_recover()
    stat, calls = os.stat, []

    def counted(path: Any, **how: Any) -> os.stat_result:
        calls.extend([path] if "/runs/run-" in str(path) else [])
        return stat(path, **how)

    monkeypatch.setattr(os, "stat", counted)
    for look in (lambda: summaries.read_all(5.0), monitor.poll_and_recover):
        calls.clear()
        look()
        assert len(calls) == 40


def test_a_run_renamed_or_queued_elsewhere_is_seen_next_poll(three_runs: list[RunDir]) -> None:
    summaries = SummaryCache()
    assert "again" not in [summary.name for summary in summaries.read_all(5.0).summaries]
    actions.rename(three_runs[0], "again")
    assert "again" in [summary.name for summary in summaries.read_all(5.0).summaries]
    run_queue.requeue(three_runs[1])
    listing = summaries.read_all(5.0)
    assert listing.waiting == (three_runs[1].id,)
    assert listing.summaries[0].status.state == "queued"


async def test_sorting_keeps_the_cursor_on_its_run(three_runs: list[RunDir]) -> None:
    def order() -> list[str]:
        return sorted(("tickets-a", "tickets-b", "poems-c"), key=text_of(app).index)

    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await open_runs(app)
        await wait_for_text(pilot, "3 runs, newest first", "poems-c")
        assert order() == ["tickets-a", "tickets-b", "poems-c"]
        await pilot.press("j", "o", "o")
        await wait_for_text(pilot, "3 runs, by name")
        assert order() == ["poems-c", "tickets-a", "tickets-b"]
        assert screen.current is not None and screen.current.name == "tickets-b"


def test_the_active_run_and_the_queue_stay_above_sorted_runs(three_runs: list[RunDir]) -> None:
    write_fake_run(FakeRun(name="next-one", state="queued", steps=0, began=BEGAN + 9))
    write_fake_run(FakeRun(name="at-work", state="running", steps=5, began=BEGAN - 9000))
    listing = SummaryCache().read_all(5.0)
    for order in ORDERS:
        names = [row.name for row in in_order(listing.summaries, listing.waiting, order)]
        assert names[:2] == ["at-work", "next-one"], order.label
    assert names[2:] == ["tickets-a", "tickets-b", "poems-c"]


def test_a_run_that_saved_nothing_offers_no_export() -> None:
    summary = summarize(write_fake_run(FakeRun(state="failed", steps=0)))
    assert [verb for _, verb in run_keys(summary, RunFiles.read(summary))] == ["open"]
    assert summary_plot(summary).empty == "The run ended before its first step."
    queued = replace(summary, status=structs.replace(summary.status, state="queued"))
    assert summary_plot(queued).empty == "No steps yet."


def test_chat_and_export_of_a_running_run_name_their_checkpoint() -> None:
    run = write_fake_run(FakeRun(steps=300))
    (run.checkpoints_dir / "step-200").mkdir(parents=True)
    (run.checkpoints_dir / "step-200" / "complete").touch()
    summary = summarize(run)
    words = [verb for _, verb in run_keys(summary, RunFiles.read(summary))]
    assert words == ["open", "chat with step 200", "export step 200"]
