"""A run on the Train screen: shown from its files, followed, controlled by keys, and fixed by one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs
from textual.content import Content

from qlora_tui.recipe.fields import get_setting, replace_setting
from qlora_tui.runs import actions, run_queue, status
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import (
    Evaluated,
    Failed,
    MemoryMeasured,
    Paused,
    Phase,
    PhaseChanged,
    Progress,
    Queued,
    RequestReceived,
    SampleGenerated,
    Started,
)
from qlora_tui.runs.holds import Hold
from qlora_tui.runs.memory_retry import RetryPlan
from qlora_tui.runs.run_summary import RunEvidence, judge_run
from qlora_tui.runs.status import State, read_status, write_heartbeat, write_status
from qlora_tui.runs.suggested_fix import SuggestedFix, suggest_fix
from qlora_tui.runs.task_metrics.task_evaluation import LossChange
from qlora_tui.runs.telemetry import Reading, encode
from qlora_tui.settings import save_setting
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.render.labels import verdict_style
from qlora_tui.tui.render.plot import LEAST_CHART
from qlora_tui.tui.screens.modals import dialogs
from qlora_tui.tui.screens.train import screen as train_screen
from qlora_tui.tui.screens.train.outcome import outcome_lines, outcome_text
from qlora_tui.tui.screens.train.run_follower import RunFollower
from qlora_tui.tui.screens.train.run_panels import (
    facts,
    finding_line,
    header_lines,
    health_lines,
    key_figures,
    other_warnings,
    sample_lines,
    state_line,
)
from qlora_tui.tui.screens.train.screen import TrainScreen, show_run
from tests.support.task_evaluations import a_row, put_evaluation
from tests.tui.fake_runs import BEGAN, TICKETS, FakeRun, last_at, write_fake_run
from tests.tui.run_events import health_event, step_event
from tests.tui.screen_assertions import style_of, text_of, wait_for_text, wait_until

SetClock = Callable[[float], None]


def requests(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in sorted(run.control_dir.glob("*.json"))]


def ask_key(run: RunDir) -> list[str]:
    return [request["kind"] for request in requests(run)]


async def watching(app: QloraApp, run: RunDir) -> TrainScreen:
    await show_run(app, run)
    assert isinstance(app.screen, TrainScreen)
    return app.screen


async def test_an_active_run_is_shown_from_its_files_and_followed(set_clock: SetClock) -> None:
    run = write_fake_run(FakeRun(steps=100))
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("5")
        await wait_for_text(
            pilot, run.id, "training", "step 100 of 3,000", "loss", "lr ", "grad ", "tok/s", "util 9"
        )
        with EventWriter(run.events_path) as log:
            log.append(step_event(101))
            log.append(Evaluated(at=BEGAN + 191, step=101, loss=0.5, best=True))
        await wait_for_text(pilot, "step 101 of 3,000", "★ best 0.500 at 101", "○ validation")


async def test_answers_of_an_ended_run_are_shown() -> None:
    run = write_fake_run(FakeRun(state="finished", steps=60, total=60))
    rows = [a_row("red", "green", "red", row=number) for number in range(1, 9)]
    put_evaluation(run, rows, LossChange.of([2.0] * 8, [1.0] * 8, [1] * 8))
    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        screen = await watching(app, run)
        await wait_for_text(pilot, "finished")
        assert screen.check_action("answers", ())
        await pilot.press("a")
        await wait_for_text(
            pilot, "Answers of adapter and base", "8 validation prompts", "Loss of the references"
        )


@pytest.mark.usefixtures("answers_until_stopped")
async def test_a_measurement_of_answers_shows_its_progress() -> None:
    run = write_fake_run(FakeRun(state="finished", steps=60, total=60))
    app = QloraApp()
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await watching(app, run)
        await wait_for_text(pilot, "finished")
        await pilot.press("a")
        await wait_for_text(pilot, "Comparing answers: 3 of 14.   [a] stop")
        await pilot.press("a")
        await wait_for_text(pilot, "Stopped. Press [a] to continue.")


async def test_a_preference_run_shows_margin_and_share_preferred() -> None:
    recipe = replace_setting(TICKETS, "data.preferences", "dpo")
    run = write_fake_run(FakeRun(steps=300, total=300, state="finished", recipe=recipe))
    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        await watching(app, run)
        await wait_for_text(pilot, "margin  ", "90% right, margin 0.8", "90% right", "method  DPO")


async def test_a_resumed_attempt_replaces_what_was_drawn() -> None:
    run = write_fake_run(FakeRun(steps=100, state="lost"))
    follower = RunFollower(run)
    assert follower.poll().step == 100
    with EventWriter(run.events_path) as log:
        log.append(health_event("plateau", "seen before"))
        log.append(Started(at=BEGAN + 500, attempt=2, pid=1, resumed_from_step=50))
        log.append(step_event(51, loss=9.0))
    picture = follower.poll()
    assert picture.step == 51
    assert picture.envelopes.loss.high == 9.0
    assert len(picture.envelopes.loss.xs) == 51
    # Its beginning was read a second time and is told once, and nothing was passed over.
    texts = [entry.text for entry in picture.entries]
    assert len(texts) == len(set(texts))
    assert texts[-1] == "attempt 2, continuing from step 50" and "seen before" in texts[-2]
    assert len(follower.poll().entries) == len(texts)


async def test_keys_ask_the_trainer_and_to_pause_or_stop_the_user_first() -> None:
    training = structs.replace(TICKETS.training, sample_prompts=("Where is it?",))
    run = write_fake_run(FakeRun(steps=50, recipe=structs.replace(TICKETS, training=training)))
    app = QloraApp()
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await watching(app, run)
        await wait_for_text(pilot, "step 50 of 3,000")
        await pilot.press("tab")
        shown = await wait_for_text(pilot, "No answers yet")
        assert "Press [A] to answer them now." in " ".join(shown.split())
        await pilot.press(*"KEAF")
        assert ask_key(run) == ["checkpoint", "evaluate", "sample", "finish_epoch"]

        await pilot.press("L")
        await wait_for_text(pilot, "Learning rate")
        await pilot.press("ctrl+u", *"fast", "enter")
        await wait_for_text(pilot, "Enter a number")
        await pilot.press("ctrl+u", *"5e-5", "enter")
        assert requests(run)[-1] == {"kind": "set_learning_rate", "value": 5e-5}

        await pilot.press("z")
        await wait_for_text(pilot, "Pause the run?", "free its memory", "[r] resumes it")
        await pilot.press("enter", "y")
        assert ask_key(run)[-1] == "pause"
        await pilot.press("Z")
        await wait_for_text(pilot, "Stop the run?", "a checkpoint and the adapter of")
        await pilot.press("n")
        assert "stop" not in ask_key(run)
        await pilot.press("Z", "y")
        assert ask_key(run)[-1] == "stop"
        await wait_for_text(pilot, "Stopping after this step  [Z] now")
        await pilot.press("Z")
        await wait_for_text(pilot, "The run is stopping now", "training  Stopping now")
        assert ask_key(run)[-2:] == ["stop", "stop_now"]


async def test_stopping_before_the_first_step_promises_no_checkpoint() -> None:
    run = write_fake_run(FakeRun(steps=0))
    with EventWriter(run.events_path) as log:
        log.append(PhaseChanged(at=BEGAN, phase="loading"))
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await watching(app, run)
        await wait_for_text(pilot, "loading")
        await pilot.press("Z")
        shown = await wait_for_text(pilot, "Stop the run?", "so nothing is", "from step 0")
        assert "save a checkpoint" not in shown


async def test_the_stop_question_and_the_keys_of_a_run_go_when_it_finishes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dialogs, "CHECK_INTERVAL_S", 0.1)
    run = write_fake_run(FakeRun(steps=50))
    app = QloraApp()
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await watching(app, run)
        await wait_for_text(pilot, "step 50 of 3,000")
        await pilot.press("Z")
        await wait_for_text(pilot, "Stop the run?")
        write_status(run, structs.replace(read_status(run), state="finished", process=None))
        await wait_until(pilot, lambda: "Stop the run?" not in text_of(app))
        shown = await wait_for_text(pilot, "✓", "[c] chat, [e] export step")
        assert not {"Stop", "Chat", "Export"} & set(shown.splitlines()[-1].split())
        await pilot.press("Z", "K", "z", "r")
        assert ask_key(run) == []
        assert app.screen.is_current


async def test_an_outdated_question_closes_itself_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialogs, "CHECK_INTERVAL_S", 1e6)
    run = write_fake_run(FakeRun(steps=50))
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await watching(app, run)
        await wait_for_text(pilot, "step 50 of 3,000")
        await pilot.press("Z")
        await wait_for_text(pilot, "Stop the run?")
        question = app.screen
        assert isinstance(question, dialogs.ConfirmScreen)
        await app.push_screen(dialogs.ConfirmScreen("Above", "", harmless=True))
        write_status(run, structs.replace(read_status(run), state="finished", process=None))
        await question._check_outdated().wait()
        assert "Above" in text_of(app)
        await pilot.press("escape")
        question._check_outdated()
        await wait_until(pilot, lambda: app.screen is screen)


async def test_an_answer_goes_to_the_run_that_was_asked_about() -> None:
    run, other = (write_fake_run(FakeRun(name=name, steps=50)) for name in ("asked", "other"))
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await watching(app, run)
        for keys, question, answer in (
            ("L", "The new peak", ["ctrl+u", *"1e-5", "enter"]),
            ("Z", "Stop the run?", ["y"]),
        ):
            await wait_for_text(pilot, "step 50 of 3,000")
            for _ in range(200):
                # A key does nothing until the run is read again.
                await pilot.press(keys)
                if question in text_of(app):
                    break
                await pilot.pause(0.05)
            screen.attach(other)
            await pilot.press(*answer)
            screen.attach(run)
    assert ask_key(run) == ["set_learning_rate", "stop"] and not ask_key(other)


async def test_a_paused_run_is_queued_again_with_r(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actions, "ensure_runner", lambda: None)
    run = write_fake_run(FakeRun(state="paused", steps=60))
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await watching(app, run)
        await wait_for_text(pilot, "‖ paused", "step 60 of 3,000", "resume from step")
        await pilot.press("r")
        await wait_for_text(pilot, "waiting in the queue")
        assert run_queue.waiting() == [run.id]
        assert "x Withdraw" in await wait_for_text(pilot, "waiting in the queue")
        await pilot.press("x")
        await wait_for_text(pilot, "Removed from the queue")


async def test_tab_switches_log_tabs_and_slash_searches() -> None:
    run = write_fake_run(FakeRun(state="finished", steps=450, nan=range(300, 303), health=True))
    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        await watching(app, run)
        await wait_for_text(pilot, "validation loss", "× not a number")
        await pilot.press("tab")
        await wait_for_text(pilot, "── step 400 ──", "Please send me your order number")
        assert style_of(app, " answers ").reverse and not style_of(app, " log ").reverse
        await pilot.press("tab")
        await wait_for_text(pilot, "steps 300 to 302", "times) ▸ Lower Learning rate")
        await pilot.press("tab")
        await wait_for_text(pilot, "Map: 100%")
        await pilot.press("shift+tab", "shift+tab", "shift+tab", "slash")
        await wait_for_text(pilot, "Show only lines that contain this text")
        await pilot.press(*"checkpoint", "enter")
        shown = await wait_for_text(pilot, "/checkpoint", "checkpoint at step 400")
        assert "step 200: validation" not in shown
        await pilot.press("v")
        await wait_for_text(pilot, "warnings only", "No line matches")


def steps_on_axis(app: QloraApp) -> list[str]:
    """The labels below the charts."""
    axis = re.search(r"((?:[\d,]+ +)+)step ([\d,]+)", text_of(app))
    return [*axis[1].split(), axis[2]] if axis else []


async def test_the_graph_is_zoomed_to_the_end_of_the_run() -> None:
    run = write_fake_run(FakeRun(steps=1240))
    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        await watching(app, run)
        await wait_until(pilot, lambda: steps_on_axis(app) == ["0", "500", "1,240"])
        await pilot.press("plus")
        await wait_until(pilot, lambda: steps_on_axis(app) == ["600", "800", "1,000", "1,240"])
        await pilot.press("minus")
        await wait_until(pilot, lambda: steps_on_axis(app) == ["0", "500", "1,240"])


async def test_another_run_is_chosen_from_a_list() -> None:
    run = write_fake_run(FakeRun(steps=50))
    write_fake_run(FakeRun(name="older-run", state="failed", steps=20, began=BEGAN - 9000))
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await watching(app, run)
        await pilot.press("o")
        await wait_for_text(pilot, "Watch another run", "failed", "older-run")
        await pilot.press("enter")
        await wait_for_text(pilot, "Out of GPU memory", "Another program held", "▸ [r] resume from step 0")
        await wait_for_text(pilot, "  [m] prepare a run with micro-batch size 1", "health ✗1")


def test_a_resumed_run_forgets_the_request_that_ended_it() -> None:
    run = write_fake_run(FakeRun(steps=60, state="paused"))
    with EventWriter(run.events_path) as log:
        log.append(RequestReceived(at=BEGAN + 400, request="pause"))
        log.append(Paused(at=BEGAN + 401, step=60))
        log.append(Queued(at=BEGAN + 500))
    write_status(run, structs.replace(read_status(run), state="starting"))
    snapshot = RunFollower(run).poll()
    assert snapshot.ending_request == "" and "Pausing" not in state_line(snapshot).plain


async def test_a_run_queued_behind_another_leaves_the_active_one_on_the_screen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    active = write_fake_run(FakeRun(steps=50))
    waits = write_fake_run(FakeRun(name="waits", state="queued", steps=0))

    async def launched(*_: object) -> RunDir:
        return waits

    monkeypatch.setattr(train_screen, "launch", launched)
    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.press("5")
        await wait_for_text(pilot, "step 50 of 3,000")
        await pilot.press("n")
        assert isinstance(app.screen, TrainScreen)
        await app.screen.action_launch().wait()
        assert app.screen.run == active


def test_other_programs_that_take_the_processor_are_a_warning() -> None:
    run = write_fake_run(FakeRun(steps=50, has_gpu=False))
    cores = os.cpu_count() or 1
    idle = Reading(at=BEGAN + 900, rss_bytes=1, cpu_percent=3.0 * cores, machine_cpu_percent=10.0 * cores)
    with run.telemetry_path.open("ab") as file:
        file.write(encode(idle))
    follower = RunFollower(run)
    assert not other_warnings(follower.poll())
    with run.telemetry_path.open("ab") as file:
        file.write(encode(structs.replace(idle, machine_cpu_percent=95.0 * cores)))
    others = "Other programs use 92% of the CPU, and this run gets 3%."
    assert others in "\n".join(line.plain for line in health_lines(follower.poll()))


def test_loss_and_time_left_are_large_in_a_large_window(set_clock: SetClock) -> None:
    running = FakeRun(steps=1240)
    set_clock(last_at(running) + 1)
    snapshot = RunFollower(write_fake_run(running)).poll()
    small, large = (header_lines(snapshot, BEGAN + 2000, 150, rows) for rows in (2, 3))
    loss, left = key_figures(snapshot)
    assert f"{loss.value}   {left.value} left" in small[1].plain
    assert len(large) == 3 and large[0].plain[2] in "█▀▄" and loss.value not in large[1].plain
    ended = RunFollower(write_fake_run(FakeRun(state="finished", steps=600, total=600))).poll()
    assert "best validation loss     at step" in header_lines(ended, BEGAN + 2000, 150, 3)[-1].plain
    failed = RunFollower(write_fake_run(FakeRun(state="failed", steps=640))).poll()
    assert not key_figures(failed), "its cause comes first"
    assert "best validation loss" in header_lines(failed, BEGAN + 2000, 150, 4)[1].plain


def test_a_low_panel_of_answers_has_the_beginning_of_an_answer() -> None:
    snapshot = RunFollower(write_fake_run(FakeRun(steps=700))).poll()
    question, answer = sample_lines(snapshot, 30, 2)
    assert question.plain.startswith("❯ ") and len(answer.plain) > 10 and answer.plain.endswith("…")


def test_an_improvement_that_may_be_chance_has_no_color_and_names_the_key_that_compares_rows() -> None:
    snapshot = RunFollower(write_fake_run(FakeRun(state="finished", steps=60, total=60))).poll()
    for losses, style in (((2.5, 1.5), ""), ((2.5, 2.5), "$warning")):
        verdict = judge_run(RunEvidence(losses=losses))
        text = outcome_text(replace(snapshot, verdict=verdict))
        assert verdict_style(verdict) == style
        assert text is not None and "[a] compare rows" in text.plain


def test_the_keys_of_chat_and_export_name_the_step_of_the_weights() -> None:
    for steps, says in (
        (60, "[c] chat, [e] export step 60 (last)"),
        (3000, "[c] chat, [e] export step 1,400 (best)"),
    ):
        run = write_fake_run(FakeRun(name=f"to-{steps}", state="finished", steps=steps, total=steps))
        outcome = outcome_text(RunFollower(run).poll())
        assert outcome is not None and says in outcome.plain


async def test_the_machine_of_a_run_that_ended_well_gives_its_rows_to_the_others() -> None:
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        for size in ((80, 24), (120, 40)):
            await pilot.resize_terminal(*size)
            states: tuple[tuple[State, bool], ...] = (("finished", False), ("failed", True))
            for state, is_shown in states:
                run = write_fake_run(FakeRun(name=state, state=state, steps=60, total=60))
                screen = await watching(app, run)
                await wait_for_text(pilot, run.id, "Loss and pace")
                assert bool(screen.query_one("#gpu-panel").region) is is_shown, (size, state)


def test_the_last_answer_comes_before_the_start_of_the_first_one() -> None:
    snapshot = RunFollower(write_fake_run(FakeRun(steps=60))).poll()
    samples = tuple(
        SampleGenerated(at=BEGAN, step=step, prompt="Where is it?", answer=f"{word} " * 40)
        for step, word in ((0, "before"), (50, "now"))
    )

    def drawn(height: int) -> list[str]:
        return [line.plain for line in sample_lines(replace(snapshot, samples=samples), 40, height)]

    whole, cut = drawn(24), drawn(9)
    assert max(map(len, whole)) <= 40 and len(cut) == 9
    first = next(number for number, line in enumerate(whole) if "at step 0: before" in line)
    assert whole[1].startswith("  now") and " ".join(whole[first:]).split().count("before") == 40
    assert "at step 0: before" in cut[first] and cut[-1].endswith("…")


async def test_the_last_run_is_shown_until_the_recipe_is_edited() -> None:
    run = write_fake_run(FakeRun(state="finished", steps=60, total=60))
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("5")
        await wait_for_text(pilot, run.id, "finished", "[c] chat, [e] export step", "[n] new run")
        await pilot.press("4")
        app.edit("lora.rank", 32)
        await pilot.press("5")
        await wait_for_text(pilot, "Gradient accumulation", "Cannot train")


async def test_a_run_that_loads_shows_stages_with_progress_and_time(set_clock: SetClock) -> None:
    run = write_fake_run(FakeRun(steps=0))
    run.events_path.unlink()
    with EventWriter(run.events_path) as log:
        log.append(Started(at=BEGAN, attempt=1, pid=1))
        log.append(PhaseChanged(at=BEGAN, phase="loading", detail="libraries"))
        log.append(PhaseChanged(at=BEGAN + 4, phase="loading", detail="Qwen2.5-7B"))
        log.append(Progress(at=BEGAN + 14, phase="loading", done=100, total=400))
    set_clock(BEGAN + 14)
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await watching(app, run)
        shown = await wait_for_text(
            pilot, "Starting", "✓ loading    libraries", "▸ loading    Qwen2.5-7B", "about 30 s left"
        )
        assert "100 of 400" in shown and "· tokenizing" in shown and "· evaluating" in shown
        assert "tok/s" not in shown
        with EventWriter(run.events_path) as log:
            log.append(PhaseChanged(at=BEGAN + 60, phase="training"))
            log.append(step_event(1))
        await wait_for_text(pilot, "Loss and pace", "tok/s")


async def test_a_silent_trainer_is_shown_as_not_responding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "SILENT_S", 30.0)
    write_fake_run(FakeRun(name="tickets", state="running", steps=60, total=300))
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        for mode in ("train", "runs"):
            await app.switch_mode(mode)
            await wait_for_text(pilot, "Not responding")


def test_a_queued_run_says_its_runner_is_suspended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "describe_runner", lambda: "The runner is suspended.")
    run = write_fake_run(FakeRun(name="tickets", state="queued"))
    snapshot = RunFollower(run).poll()
    assert "The runner is suspended." in state_line(snapshot).plain


async def test_m_halves_the_learning_rate_where_the_gradient_explodes() -> None:
    run = write_fake_run(FakeRun(steps=50))
    with EventWriter(run.events_path) as log:
        log.append(health_event("exploding_gradient", "Lower Learning rate."))
    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        await watching(app, run)
        await wait_for_text(pilot, "health !1", "q leave; it trains on")
        await pilot.press("tab", "tab")
        await wait_for_text(pilot, "▸ [m] halve the learning rate of this run, to 0.0001")
        await pilot.press("m", "enter")
        assert requests(run) == [{"kind": "set_learning_rate", "value": 1e-4}]


async def test_a_small_window_names_the_warning_that_the_key_for_a_fix_is_for() -> None:
    run = write_fake_run(FakeRun(steps=50, total=50, state="finished"))
    with EventWriter(run.events_path) as log:
        log.append(health_event("few_steps", "Train more steps."))
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await watching(app, run)
        named = "! It is odd. ▸ [m] gradient accumulation 4"
        shown = await wait_for_text(pilot, named)
        assert "Apply fix" not in shown.splitlines()[-1]
        await pilot.resize_terminal(120, 40)
        await wait_for_text(pilot, "Health", "instead of 8")
        await wait_until(pilot, lambda: named not in text_of(app))


async def test_m_prepares_a_smaller_run_after_out_of_memory() -> None:
    run = write_fake_run(FakeRun(steps=250, state="failed"))
    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        before = app.workbench.recipe
        await watching(app, run)
        text = await wait_for_text(pilot, "  [m] prepare", "Out of GPU memory. Another", "requested 1.5 GiB")
        assert text.count("prepare a run with micro-batch") == 1
        assert "2.710" in text.partition("Validation")[2]
        assert "change" in text.partition("Validation")[2] and "Health" not in text
        first, other = text.index("▸ [r] resume from step 200"), text.index("[m] prepare")
        assert first < other < text.index("requested"), "closing the other program is enough"
        await pilot.press("m")
        await wait_for_text(pilot, "Prepare a run with micro-batch size 1 instead of 2")
        await pilot.press("n")
        assert app.workbench.recipe == before
        # In a small window, the log has the rows of a chart that would be too low.
        await pilot.resize_terminal(80, 24)
        await wait_for_text(pilot, "train 2.", "failed: Out of GPU memory")
        await wait_until(pilot, lambda: app.screen.query_one("#loss-graph").size.height == 2)
        await pilot.resize_terminal(120, 40)
        await wait_until(pilot, lambda: app.screen.query_one("#loss-graph").size.height > LEAST_CHART)
        await pilot.press("m", "y")
        await wait_for_text(pilot, "Gradient accumulation")
        training = app.workbench.recipe.training
        assert (training.micro_batch_size, training.gradient_accumulation) == (1, 16)
        await pilot.press("u")
        assert app.workbench.recipe == before


def test_the_fix_comes_first_if_no_other_program_is_to_blame() -> None:
    ending = Failed(at=1.0, title="Out of memory", what="It is.", kind="out_of_memory", phase="training")
    run = write_fake_run(FakeRun(steps=50, state="failed", failed=ending))
    outcome = outcome_text(RunFollower(run).poll())
    assert outcome is not None and "▸ [m] prepare" in outcome.plain and "  [r] resume" in outcome.plain


def test_a_line_with_a_key_continues_below_its_text() -> None:
    outcome = Content("It failed.\n▸ [r] resume\n  [m] prepare a run with less memory")
    lines = [line.plain for line in outcome_lines(outcome, 24)]
    assert lines[2:] == ["  [m] prepare a run with", "      less memory"]


def test_each_warning_is_counted_and_a_warning_with_a_fix_is_on_one_line() -> None:
    snapshot = RunFollower(write_fake_run(FakeRun(state="finished", steps=60, total=60))).poll()
    evidence = "General answers no longer end. Forgetting 1.4 of 2, by a measure whose explanation is long."
    forgot = structs.replace(health_event("forgetting", ""), evidence=evidence)
    snapshot.view.memory = MemoryMeasured(at=1.0, when="end", measured_bytes=2 << 30, estimated_bytes=1 << 30)
    verdict = judge_run(RunEvidence(losses=(2.5, 1.5), forgetting=1.4, turn_ends=0.0, forgot_much=True))
    fix = SuggestedFix("prepare a run", evidence=forgot.evidence, kind="forgetting")
    ended = replace(snapshot, health=(forgot,), verdict=verdict, fix=fix)
    assert "! 2 warnings" in state_line(ended).plain
    assert sum("! " in line.plain for line in health_lines(ended)) == 2
    warning = "! General answers no longer end. ▸ [m] prepare a run"
    for shown, line in ((ended, "▸ [m] prepare a run"), (replace(ended, verdict=None), warning)):
        assert [line.plain for line in finding_line(shown, 78, 1)] == [line]
    outcome = outcome_text(ended)
    assert outcome is not None and "fell from 2.500 to 1.500; general answers no longer end." in outcome.plain


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


async def test_a_held_run_says_what_it_waits_for_and_trains_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actions, "ensure_runner", lambda: None)
    save_setting("price_per_kwh", "0.30 EUR")
    run = write_fake_run(FakeRun(steps=60, state="queued"))
    run_queue.hold(run, Hold(cause="program", program="ollama", pid=4242))
    app = QloraApp()
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await watching(app, run)
        await wait_for_text(pilot, "‖ paused for ollama (pid 4242)", "N Train now", "z Pause")
        await app.switch_mode("runs")
        await wait_for_text(pilot, "Paused for ollama (pid 4242).", "◌ queue 1", "‖ paused")
        await app.switch_mode("home")
        await wait_for_text(pilot, "paused for ollama (pid 4242)")
        await app.switch_mode("train")
        await pilot.press("N")
        await wait_until(pilot, lambda: run.trains_now)
        run_queue.hold(run, None)
        await wait_for_text(pilot, "waiting in the queue")


def test_a_resting_run_says_so_and_what_it_costs() -> None:
    save_setting("price_per_kwh", "0.30 EUR")
    save_setting("hours", "0:00-0:01")
    run = write_fake_run(FakeRun(steps=600))
    status = read_status(run)
    write_heartbeat(run, structs.replace(status, hold=Hold(cause="temperature", reading=84, bound=80)))
    snapshot = RunFollower(run).poll()
    assert "resting at 84 °C (at most 80)" in state_line(snapshot).plain
    assert "0.08 kWh, 0.02 EUR" in [fact.plain for fact in facts(snapshot, BEGAN + 1000)]
    assert [figure.label for figure in key_figures(snapshot)][-1] == "done"
