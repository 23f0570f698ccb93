"""The list of runs, the preview and comparison of some, and the keys that act on one."""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from subprocess import Popen
from threading import Event
from typing import Any

import pytest
from msgspec import structs

from qlora_tui import paths
from qlora_tui.cli import main
from qlora_tui.formatting import format_loss
from qlora_tui.locks import hold_folder
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.presets import find_preset
from qlora_tui.runs import actions, run_queue
from qlora_tui.runs.directory import RunDir, all_runs, find_run
from qlora_tui.runs.run_summary import RunSummary, SummaryCache, summarize
from qlora_tui.runs.status import State, read_status, write_status
from qlora_tui.runs.view import RunView
from qlora_tui.tui import desktop
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.render.labels import result_label
from qlora_tui.tui.render.loss import changes_of_loss, lowest_losses, shapes_of_loss, summary_plot
from qlora_tui.tui.render.meters import downsample
from qlora_tui.tui.screens import runs_and_train_commands
from qlora_tui.tui.screens.runs.compare import Outcome, comparison_table, differing, read
from qlora_tui.tui.screens.runs.run_list import (
    RunFiles,
    ending,
    log_lines,
    reason,
    run_keys,
    short_name,
    when,
)
from qlora_tui.tui.screens.runs.screen import ORDERS, RunsScreen, in_order
from qlora_tui.tui.system_monitor import SystemMonitor
from tests.tui import fake_runs
from tests.tui.fake_runs import BEGAN, TICKETS, FakeRun, write_fake_run
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until
from tests.tui.workstation import open_on, open_runs


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


@pytest.mark.parametrize("width", range(10, 32, 3))
def test_names_that_differ_in_their_time_stay_distinct(width: int) -> None:
    names = [f"smollm2-135m-demo-20261130-{time}" for time in ("0752", "0635", "0635-2")]
    cut = {short_name(name, width) for name in names}
    assert len(cut) == 3 and max(map(len, cut)) <= width


@pytest.mark.parametrize("state", ["paused", "lost"])
async def test_a_runs_last_loss_and_step_are_the_same_everywhere(
    capsys: pytest.CaptureFixture[str], state: State
) -> None:
    run = write_fake_run(FakeRun(name="owls", steps=60, state=state))
    # As of a heartbeat before the last step.
    write_status(run, structs.replace(read_status(run), step=59, loss=9.9))
    view = RunView(run)
    view.refresh()
    loss = format_loss(view.series.loss[-1])
    app = open_on("home")
    async with app.run_test(size=(150, 40)) as pilot:
        await wait_for_text(pilot, f"loss {loss}", "step 60 of 3,000")
        await pilot.press("6")
        await wait_for_text(pilot, f"{loss}*", "60 of 3,000")
        await pilot.press("enter")
        await wait_for_text(pilot, f"loss {loss}", "step 60 of 3,000")
    assert main(["runs"]) == 0
    shown = capsys.readouterr().out
    assert loss in shown and "60 of 3,000" in shown


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
    sign, word, _ = result_label(summary.status, summary.defect)
    assert f"{sign} {word}" == label
    if nan:
        assert summary.defect is not None
        assert summary.defect.sentence == "The loss is not a number (first at step 90)."


def test_a_decimated_curve_marks_nan_and_leaves_gaps() -> None:
    assert downsample([4.0, 2.0], 4) == [4.0, 2.0, None, None]
    means = downsample([1.0, 3.0, float("nan"), 1.0], 2)
    assert means[0] == 2.0
    assert means[1] is not None and math.isnan(means[1])


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


async def test_sorting_keeps_the_cursor_on_its_run_and_a_new_name_is_shown(three_runs: list[RunDir]) -> None:
    def order() -> list[str]:
        return sorted(("tickets-a", "tickets-b", "poems-c"), key=text_of(app).index)

    app = open_on("runs")
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await open_runs(app)
        await wait_for_text(pilot, "3 runs, newest first", "poems-c")
        assert order() == ["tickets-a", "tickets-b", "poems-c"]
        await pilot.press("j", "o", "o")
        await wait_for_text(pilot, "3 runs, by name")
        assert order() == ["poems-c", "tickets-a", "tickets-b"]
        assert screen.current is not None and screen.current.name == "tickets-b"
        await pilot.press("f2", *(["backspace"] * 20), "enter")
        await wait_for_text(pilot, "Rename the run", "✗ A name must be a single, non-empty line")
        await pilot.press(*"owls", "enter")
        await wait_for_text(pilot, "owls  (tickets-b)")
    assert three_runs[1].path.exists()
    assert find_run("owls") == three_runs[1]


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


@pytest.mark.parametrize(("days", "form"), [(0, "%H:%M"), (3, "%a %H:%M"), (7, "%d %b"), (-1, "%d %b")])
def test_a_run_of_this_week_has_the_day_of_the_week(days: int, form: str) -> None:
    summary = replace(summarize(write_fake_run(FakeRun())), queued_at=BEGAN)
    assert when(summary, BEGAN + days * 86400) == time.strftime(form, time.localtime(BEGAN))


def test_a_row_has_its_change_with_a_bar_only_if_bars_differ_and_no_reason_that_repeats_its_state() -> None:
    summary = summarize(write_fake_run(FakeRun(name="halted", state="stopped", steps=60)))
    assert reason(summary).plain == "at step 60"

    def changes(**best: float) -> list[str]:
        rows = [
            replace(summary, run=RunDir(Path(name)), evaluations=((0, 2.0), (9, loss)), best=(loss, 9))
            for name, loss in best.items()
        ]
        return [change.plain for change in changes_of_loss(rows).values()]

    assert changes(a=1.0, b=1.6, c=2.2) == ["-50% ▄▄▄▄▄▄▄▄", "-20% ▄▄▄▁▁▁▁▁", "+10% ▁▁▁▁▁▁▁▁"]
    assert changes(a=1.0, b=1.1) == ["-50%", "-45%"]


def test_the_lowest_loss_of_comparable_runs_is_marked_and_graphs_have_one_scale() -> None:
    summary = replace(summarize(write_fake_run(FakeRun(name="a", steps=60))), total_steps=100)
    half, whole, other = (
        replace(
            summary, run=RunDir(Path(name)), step=step, evaluations=losses, best=losses[-1][::-1], data=data
        )
        for name, step, losses, data in (
            ("half", 50, ((0, 3.0), (50, 2.0)), "x"),
            ("whole", 100, ((0, 3.0), (50, 1.9), (100, 1.0)), "x"),
            ("other", 100, ((30, 2.0), (100, 0.9)), "y"),
        )
    )
    assert lowest_losses([half, whole]) == {"whole"}
    assert not lowest_losses([half]) and not lowest_losses([half, whole, other])
    assert shapes_of_loss([half, whole, other], 4) == {"half": "▇▄", "whole": "▇▃▃▁", "other": " ▄▄▁"}


@pytest.mark.parametrize(("state", "says"), [("running", ""), ("paused", "[r] resumes it from step 200.")])
def test_keys_of_a_run_name_its_last_checkpoint(state: State, says: str) -> None:
    run = write_fake_run(FakeRun(steps=300, state=state))
    (run.checkpoints_dir / "step-200").mkdir(parents=True)
    (run.checkpoints_dir / "step-200" / "complete").touch()
    summary = summarize(run)
    words = [verb for _, verb in run_keys(summary, RunFiles.read(summary))]
    step = "" if says else " step 200"
    assert words == ["open", "chat with step 200" if step else "chat", f"export{step}"]
    assert says in [*(line.plain for line in ending(summary, RunFiles.read(summary))), ""]


async def test_a_slow_reading_of_files_is_awaited(
    three_runs: list[RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, begun, read_files = Event(), [], RunFiles.read

    def held(summary: RunSummary) -> RunFiles:
        begun.append(summary.id)
        gate.wait()
        return read_files(summary)

    monkeypatch.setattr(RunFiles, "read", held)
    app = open_on("runs")
    async with app.run_test(size=(160, 50)) as pilot:
        screen = await open_runs(app)
        await wait_until(pilot, lambda: begun)
        for _ in range(3):
            screen.show_listing()
            await pilot.pause()
        gate.set()
        await wait_until(pilot, lambda: screen._files is not None)
        assert begun == [three_runs[0].id]


async def test_two_marked_runs_are_compared_with_only_what_differs(three_runs: list[RunDir]) -> None:
    app = open_on("runs")
    async with app.run_test(size=(120, 40)) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "tickets-a")
        await pilot.press("space", "space", "v")
        shown = await wait_for_text(
            pilot, "2 runs compared", "A tickets-a", "B tickets-b", "Learning rate", "tokens"
        )
        assert "0.0001" in shown and "0.0002" in shown
        assert "Gradient accumulation" not in shown
        await pilot.press("escape")
        assert isinstance(app.screen, RunsScreen)


def test_the_better_value_of_a_row_is_marked_where_it_says_something(three_runs: list[RunDir]) -> None:
    def row(name: str, *values: float, of_data: bool = True, sources: tuple[str, ...] = ("a", "a")) -> str:
        compared = [
            replace(
                read(three_runs[0]),
                name=f"run {number}",
                outcome={name: Outcome(f"{value:g}", value, "lower", of_data)},
                recipe=replace_setting(TICKETS, "data.validation_path", source),
            )
            for number, (value, source) in enumerate(zip(values, sources, strict=True))
        ]
        lines = comparison_table(compared, 80).plain.splitlines()
        return next(line for line in lines if line.startswith(name))

    assert row("loss", 2.0, 1.0).split() == ["loss", "2", "1", "✓"]
    assert "✓" not in row("loss", 1.0, 1.0) and "✓" not in row("loss", 1.0, math.nan)
    assert "✓" not in row("loss", 2.0, 1.0, sources=("a", "b"))
    assert row("speed", 1.0, 2.0, of_data=False, sources=("a", "b")).split() == ["speed", "1", "✓", "2"]


def test_a_model_by_name_and_by_path_is_no_difference(three_runs: list[RunDir]) -> None:
    by_name, by_path = (
        replace(read(three_runs[0]), recipe=replace_setting(TICKETS, "model.id", model_id))
        for model_id in ("SmolLM2-135M-fa7256748bd9", "/models/converted/SmolLM2-135M-fa7256748bd9")
    )
    assert differing([by_name, by_path]) == []


async def test_a_run_that_waits_in_slurm_says_why_and_is_withdrawn(
    three_runs: list[RunDir], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, body in (("squeue", "exit 1"), ("scancel", f"echo $1 > {tmp_path}/cancelled"), ("sbatch", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    run = write_fake_run(FakeRun(name="elsewhere", state="queued", steps=0))
    run.slurm_path.write_text('{"target": "gpus", "job": "12"}')
    run.squeue_path.write_text('{"at": 1.0, "states": ["PENDING"], "reason": "Priority"}')
    app = open_on("runs")
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "Waiting in Slurm (Priority) as job 12.")
        await pilot.press("g", "enter")
        await wait_for_text(pilot, "▸ waiting", "Waiting in Slurm (Priority) as job 12.")
        await pilot.press("6", "x")
        await wait_for_text(pilot, "Removed from the queue.")
    assert (tmp_path / "cancelled").read_text() == "12\n" and read_status(run).state == "stopped"


async def test_waiting_runs_stand_on_top_and_are_moved_and_withdrawn(
    three_runs: list[RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "ensure_runner", lambda: None)
    for name in ("first", "second"):
        run_queue.enqueue(write_fake_run(FakeRun(name=name, state="queued", steps=0, began=BEGAN - 5000)))
    app = open_on("runs")
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await open_runs(app)
        shown = await wait_for_text(pilot, "queue 1", "queue 2", "x Withdraw")
        assert shown.index("first") < shown.index("second") < shown.index("tickets-a")
        await pilot.press("J")
        assert run_queue.waiting() == ["second", "first"]
        await pilot.pause()
        await pilot.press("x")
        await wait_for_text(pilot, "■ stopped", "Removed from the queue. Press [r] to queue it again.")
        assert run_queue.waiting() == ["second"]
        await pilot.press("r")
        await wait_for_text(pilot, "queue 2", "Queued. Press [x] to remove it from the queue.")
        assert run_queue.waiting() == ["second", "first"]


DIFFERENCES = (("training.learning_rate", 1e-5), ("lora.rank", 64))


def _are_left(number: int) -> bool:
    return len(all_runs()) == number


async def test_deleting_a_run_in_use_asks_first(three_runs: list[RunDir]) -> None:
    handle = hold_folder(three_runs[0].path)
    assert handle is not None
    app = open_on("runs")
    async with app.run_test(size=(80, 24)) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "tickets-a")
        for key, left in (("n", 3), ("y", 2)):
            await pilot.press("D")
            await wait_for_text(pilot, "Delete the run?", "tickets-a is in use", "loaded for a chat")
            await pilot.press(key)
            await wait_until(pilot, partial(_are_left, left))
    os.close(handle)


async def test_u_restores_a_deleted_run_and_quitting_keeps_it_without_asking(
    three_runs: list[RunDir],
) -> None:
    app = open_on("runs")
    actions.rename(three_runs[0], "tickets [/a]")
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "tickets [/a]")
        await pilot.press("D")
        await wait_for_text(
            pilot, "tickets [/a] stays in the trash for 7 days. The trash takes", "[u] to restore the run."
        )
        assert [run.id for run in all_runs()] == ["tickets-b", "poems-c"]
        await pilot.press("D", "u", "u")
        assert "is deleted" not in await wait_for_text(pilot, "Restored tickets [/a]", "✓ finished")
        await pilot.press("escape")
        await wait_until(pilot, lambda: "Restored" not in text_of(app))
        assert len(all_runs()) == 3
        assert three_runs[0].recipe().lora.rank == 16
        await pilot.press("g", "D", "q")
        await wait_until(pilot, lambda: not app.is_running)
    assert [run.id for run in all_runs()] == ["tickets-b", "poems-c"]
    assert [each.run.id for each in actions.trashed_runs()] == ["tickets-a"]


async def test_a_deleted_run_leaves_the_list_before_the_next_reading(three_runs: list[RunDir]) -> None:
    app = open_on("runs")
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await open_runs(app)
        await wait_for_text(pilot, "tickets-a")
        earlier = screen.listing
        screen.action_delete()
        screen.listing = earlier
        screen.show_listing()
        screen.action_delete()
        assert [run.id for run in all_runs()] == ["poems-c"]
        assert app.screen is screen


async def test_a_run_that_is_not_over_is_not_deleted() -> None:
    states: tuple[State, ...] = ("running", "queued")
    runs = [write_fake_run(FakeRun(name=state, steps=20, state=state)) for state in states]
    app = open_on("runs")
    async with app.run_test(size=(80, 24)) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "● running", "◌ queue 1")
        for run, state in zip(runs, states, strict=True):
            await pilot.press("D")
            await wait_for_text(pilot, "The run has not ended")
            assert read_status(run).state == state
            await pilot.press("escape", "j")


async def test_a_runs_folder_opens_or_its_path_is_copied(
    three_runs: list[RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, opened = tmp_path / "xdg-open", tmp_path / "opened"
    tool.write_text(f'#!/bin/sh\nprintf %s "$1" > {opened}.part && mv {opened}.part {opened}\n')
    tool.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("DISPLAY", ":0")
    for variable in ("TMUX", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(variable, raising=False)
    app = open_on("runs")
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "tickets-a")
        await pilot.press("O")
        await wait_until(pilot, opened.exists)
        assert opened.read_text() == str(three_runs[0].path)
        opened.unlink()
        monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 22")
        await pilot.press("O")
        await wait_for_text(pilot, "Sent to the terminal (OSC 52)", "cd ")
        assert app.clipboard == f"cd {three_runs[0].path}" and not opened.exists()


def test_inside_tmux_the_request_is_sent_raw_and_wrapped() -> None:
    raw = "\x1b]52;c;b3dscw==\a"
    assert desktop.set_clipboard("owls", {}) == raw
    assert desktop.set_clipboard("owls", {"TMUX": "x"}) == f"{raw}\x1bPtmux;\x1b{raw}\x1b\\"


async def test_a_runs_recipe_is_used_again_trained_further_and_saved(three_runs: list[RunDir]) -> None:
    run = find_run("tickets-b")
    app = open_on("runs")
    before = app.workbench.recipe
    async with app.run_test(size=(80, 24)) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "tickets-a")
        await pilot.press("j", "R")
        await wait_for_text(pilot, "Gradient accumulation")
        assert app.workbench.recipe.lora.rank == 64
        await pilot.press("u")
        assert app.workbench.recipe == before

        await pilot.press("6", "T")
        await wait_for_text(pilot, "No adapter to start from")
        run.adapter_dir.mkdir(exist_ok=True)
        (run.adapter_dir / "adapter_config.json").write_text("{}")
        await pilot.press("escape", "T")
        await wait_for_text(pilot, "Gradient accumulation")
        lora = app.workbench.recipe.lora
        assert (lora.init_from, lora.rank) == (run.id, 64)

        await pilot.press("6", "S", *"wide", "enter")
        await pilot.pause()
        assert find_preset("wide").settings()["lora"]["rank"] == 64
        assert (paths.user_presets_dir() / "wide.toml").exists()
        await pilot.press("S", *"wide", "enter")
        await wait_for_text(pilot, "You already have a preset named wide")
        await pilot.press("n")
        assert find_preset("wide").settings()["lora"]["rank"] == 64


@pytest.mark.usefixtures("answers_until_stopped")
async def test_a_measures_answers_and_a_second_a_stops(three_runs: list[RunDir]) -> None:
    app = open_on("runs")
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "[a] compares answers")
        await pilot.press("a")
        await wait_for_text(pilot, "3 of 14")
        await pilot.press("a")
        await wait_for_text(pilot, "Stopped. Press [a] to continue.")


async def test_two_keys_at_once_start_one_measurement_which_ends_with_the_app(
    three_runs: list[RunDir], endless_measurements: list[Popen[bytes]]
) -> None:
    """Otherwise the app waits for it, without a terminal."""
    app = open_on("runs")
    async with app.run_test(size=(120, 40)) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "[a] compares answers")
        assert isinstance(app.screen, runs_and_train_commands.RunCommands)
        app.screen.evaluate(three_runs[0])
        app.screen.evaluate(three_runs[0])
        await wait_until(pilot, lambda: bool(endless_measurements))
        workers = [worker for worker in app.workers if worker.group == "evaluation"]
        assert sum(not worker.is_finished for worker in workers) == 1
    (measurement,) = endless_measurements
    assert measurement.wait(60)


async def test_reasons_and_the_settings_that_differ_are_in_the_list_at_80_columns_too() -> None:
    slow, wide = (replace_setting(TICKETS, *each) for each in DIFFERENCES)
    write_fake_run(FakeRun(name="tickets-20261123-0212", state="failed", steps=50, recipe=slow))
    for name, recipe in (("b", wide), ("c", TICKETS)):
        write_fake_run(FakeRun(name=name, state="finished", steps=300, total=300, recipe=recipe))
    app = open_on("runs")
    async with app.run_test(size=(80, 24)) as pilot:
        await open_runs(app)
        text = await wait_for_text(pilot, "reason")
        (line,) = (line for line in text.splitlines() if "✗ failed" in line)
        assert "Out of GPU memory" in line and " 1e-5 " in line
        assert all(f" {rate} " in text for rate in ("1e-5", "2e-4")), "one notation for all rates"
        titles = text.splitlines()[2].split()
        assert "lr" in titles and not {"model", "precision"} & set(titles), "they are the same"


async def test_a_run_that_saved_nothing_offers_no_chat() -> None:
    write_fake_run(FakeRun(name="a", state="failed", steps=0))
    app = open_on("runs")
    async with app.run_test(size=(120, 40)) as pilot:
        await open_runs(app)
        await wait_for_text(pilot, "0 checkpoints")
        await wait_until(pilot, lambda: not ({"runs.chat", "runs.export"} & _offered(app)))
        assert "runs.delete" in _offered(app)


def _offered(app: QloraApp) -> set[str | None]:
    return {active.binding.id for active in app.screen.active_bindings.values() if active.enabled}


def test_the_log_ends_with_the_newest_event() -> None:
    newest_first = ((3.0, "step 3"), (2.0, "step 2"), (1.0, "step 1"))
    assert [line.plain[-6:] for line in log_lines(newest_first, 40, 2)] == ["step 2", "step 3"]


async def test_without_runs_no_key_that_needs_one_is_offered() -> None:
    app = open_on("runs")
    async with app.run_test(size=(120, 40)) as pilot:
        await open_runs(app)
        shown = await wait_for_text(pilot, "No runs yet", "Palette")
        assert not any(key in shown for key in ("Enter Open", "Space Mark", "D Delete", "o sort"))
