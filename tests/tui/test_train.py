from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from bench.support.recorded_runs import recorded_run
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Data, Model, Recipe, Source
from qlora_tui.runs import actions, run_queue
from qlora_tui.runs.directory import RunDir, all_runs
from qlora_tui.runs.event_log import EventWriter
from qlora_tui.runs.events import Evaluated, Failed, Health, Phase, Progress, Started, Step
from qlora_tui.runs.machine_checks import Check, CheckKind
from qlora_tui.runs.status import State
from qlora_tui.runs.suggested_fix import suggest_fix
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.train import run_follower
from qlora_tui.tui.screens.train import screen as train_module
from qlora_tui.tui.screens.train.output_tail import strip_escapes
from qlora_tui.tui.screens.train.run_follower import RunFollower
from qlora_tui.tui.screens.train.run_header import facts
from qlora_tui.tui.screens.train.screen import TrainScreen, show_run
from qlora_tui.tui.screens.train.settings_form import SettingsForm
from tests.tui.fake_runs import BEGAN, TICKETS, FakeRun, write_fake_run
from tests.tui.sample_data import readable_model
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until

MakeApp = Callable[[], QloraApp]
SetClock = Callable[[float], None]


def ask_key(run: RunDir) -> list[str]:
    return [json.loads(path.read_bytes())["kind"] for path in sorted(run.control_dir.glob("*.json"))]


async def watching(app: QloraApp, run: RunDir) -> TrainScreen:
    await show_run(app, run)
    assert isinstance(app.screen, TrainScreen)
    return app.screen


async def test_an_active_run_is_shown_from_its_files_and_followed(
    make_app: MakeApp, set_clock: SetClock
) -> None:
    run = write_fake_run(FakeRun(steps=100))
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("5")
        await wait_for_text(
            pilot, run.id, "training", "step 100/3,000", "loss", "lr ", "grad ", "tok/s", "util 9"
        )
        with EventWriter(run.events_path) as log:
            log.append(_step(101))
            log.append(Evaluated(at=BEGAN + 191, step=101, loss=0.5, best=True))
        await wait_for_text(pilot, "step 101/3,000", "★ best 0.5 at 101")


async def test_exact_answers_have_room_beside_best_and_last_loss(make_app: MakeApp) -> None:
    run = write_fake_run(FakeRun(steps=2640, exact=(0.12, 0.97)))
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await watching(app, run)
        await wait_for_text(pilot, "★ best 1.", "◆ 1.", "exact 86%, base 12%")


async def test_a_resumed_attempt_replaces_what_was_drawn(make_app: MakeApp) -> None:
    run = write_fake_run(FakeRun(steps=100, state="lost"))
    follower = RunFollower(run)
    assert follower.poll().step == 100
    with EventWriter(run.events_path) as log:
        log.append(_health("plateau", "seen before"))
        log.append(Started(at=BEGAN + 500, attempt=2, pid=1, resumed_from_step=50))
        log.append(_step(51, loss=9.0))
    picture = follower.poll()
    assert picture.step == 51
    assert picture.curves.loss.high == 9.0
    assert len(picture.curves.loss.xs) == 51
    # Its beginning was read a second time and is told once, and nothing was passed over.
    texts = [entry.text for entry in picture.entries]
    assert len(texts) == len(set(texts))
    assert texts[-1] == "attempt 2, continuing from step 50" and "seen before" in texts[-2]
    assert len(follower.poll().entries) == len(texts)


def test_a_resumed_run_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_fake_run(FakeRun(steps=100, state="paused"))
    follower = RunFollower(run)
    follower.poll()
    monkeypatch.setattr(RunFollower, "_open", lambda self: pytest.fail("it was read again"))
    with EventWriter(run.events_path) as log:
        log.append(Started(at=BEGAN + 500, attempt=2, pid=1, resumed_from_step=100))
        log.append(_step(101))
    assert len(follower.poll().curves.loss.xs) == 101


def test_a_followed_long_run_is_drawn_like_an_opened_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_follower, "LONG_BYTES", 1 << 20)
    monkeypatch.setattr(run_follower, "_SAMPLE_STEPS", 100)
    run = write_fake_run(FakeRun(steps=10, total=200_000))
    follower = RunFollower(run)
    with EventWriter(run.events_path) as log:
        for step in range(11, 20_001):
            log.append(_step(step))
        assert follower.poll().step_stride > 50
        for step in range(20_001, 24_001):
            log.append(_step(step))
            if step % 100 == 0:
                if step == 22_000:
                    log.append(_health("plateau", "seen on the way"))
                picture = follower.poll()
                xs = picture.curves.loss.xs
                assert picture.step == step
                assert 0 <= step - xs[-1] < picture.step_stride
                assert 0.4 < len([x for x in xs if x < step / 2]) / len(xs) < 0.6
    texts = [entry.text for entry in picture.entries]
    assert len(texts) == len(set(texts)) and sum("seen on the way" in text for text in texts) == 1


async def test_keys_ask_the_trainer_and_stop_asks_the_user_first(make_app: MakeApp) -> None:
    training = structs.replace(TICKETS.training, sample_prompts=("Where is it?",))
    run = write_fake_run(FakeRun(steps=50, recipe=structs.replace(TICKETS, training=training)))
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await watching(app, run)
        await wait_for_text(pilot, "step 50/3,000")
        for key in "kegfz":
            await pilot.press(key)
        assert ask_key(run) == ["checkpoint", "evaluate", "sample", "finish_epoch", "pause"]
        await pilot.press("s")
        await wait_for_text(pilot, "Stop the run?")
        await pilot.press("n")
        assert "stop" not in ask_key(run)
        await pilot.press("s", "y")
        assert ask_key(run)[-1] == "stop"


async def test_a_learning_rate_is_checked_before_it_is_sent(make_app: MakeApp) -> None:
    run = write_fake_run(FakeRun(steps=50))
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await watching(app, run)
        await wait_for_text(pilot, "step 50/3,000")
        await pilot.press("L")
        await wait_for_text(pilot, "Learning rate")
        await pilot.press("ctrl+u", *"fast", "enter")
        await wait_for_text(pilot, "Enter a number")
        await pilot.press("ctrl+u", *"5e-5", "enter")
        request = json.loads(next(run.control_dir.glob("*.json")).read_bytes())
        assert request == {"kind": "set_learning_rate", "value": 5e-5}


async def test_unavailable_keys_do_nothing(make_app: MakeApp) -> None:
    run = write_fake_run(FakeRun(state="finished", steps=60, total=60))
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await watching(app, run)
        shown = await wait_for_text(pilot, "finished", "[c] chat with it")
        assert "Stop" not in shown.splitlines()[-1]
        await pilot.press("s", "k", "z", "r")
        assert ask_key(run) == []
        assert app.screen.is_current


async def test_a_paused_run_is_queued_again_with_r(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "ensure_runner", lambda: None)
    run = write_fake_run(FakeRun(state="paused", steps=60))
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await watching(app, run)
        await wait_for_text(pilot, "paused", "Paused at step 60")
        await pilot.press("r")
        await wait_for_text(pilot, "waiting in the queue")
        assert run_queue.waiting() == [run.id]
        await pilot.press("s", "y")
        await wait_for_text(pilot, "Taken out of the queue")


async def test_tab_switches_log_tabs_and_slash_searches(make_app: MakeApp) -> None:
    run = write_fake_run(FakeRun(steps=450, nan=range(300, 303), health=True))
    app = make_app()
    async with app.run_test(size=(120, 40)) as pilot:
        await watching(app, run)
        await wait_for_text(pilot, "validation loss", "× not a number")
        await pilot.press("tab")
        await wait_for_text(pilot, "── step 400 ──", "Please send me your order number")
        await pilot.press("tab")
        await wait_for_text(pilot, "steps 300 to 302", "(3 times)", "Lower training.learning_rate")
        await pilot.press("tab")
        await wait_for_text(pilot, "Map: 100%")
        await pilot.press("shift+tab", "shift+tab", "shift+tab", "slash")
        await wait_for_text(pilot, "Show only lines with this text")
        await pilot.press(*"checkpoint", "enter")
        shown = await wait_for_text(pilot, "/checkpoint", "checkpoint at step 400")
        assert "validation loss 2" not in shown
        await pilot.press("v")
        await wait_for_text(pilot, "warnings only", "No line matches")


async def test_omitted_log_lines_are_reported_in_a_narrow_window_too(make_app: MakeApp) -> None:
    run = write_fake_run(FakeRun(steps=450, health=True))
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await watching(app, run)
        await wait_for_text(pilot, "Tab next · / search · v level")
        await pilot.press("slash", *"checkpoint", "enter", "v")
        await wait_for_text(pilot, "/checkpoint warnings only")
        await pilot.press("slash", *" of the hundredth step and all after it", "enter")
        await wait_for_text(pilot, "…")


async def test_the_log_of_another_run_is_shown_whole(make_app: MakeApp) -> None:
    first, second = (
        write_fake_run(FakeRun(steps=50)),
        write_fake_run(FakeRun(name="second", steps=450, began=BEGAN - 9000)),
    )
    app = make_app()
    async with app.run_test(size=(120, 40)) as pilot:
        screen = await watching(app, first)
        await wait_for_text(pilot, "step 50/3,000")
        await pilot.press("v", "slash", *"checkpoint", "enter")
        await wait_for_text(pilot, "/checkpoint", "warnings only")
        screen.attach(second)
        shown = await wait_for_text(pilot, "second", "checkpoint at step 400", "validation loss")
        assert "warnings only" not in shown and "/checkpoint" not in shown


async def test_the_graph_is_zoomed_to_the_end_of_the_run(make_app: MakeApp) -> None:
    run = write_fake_run(FakeRun(steps=1240))
    app = make_app()
    async with app.run_test(size=(120, 40)) as pilot:
        await watching(app, run)
        await wait_for_text(pilot, "└0 ")
        await pilot.press("plus")
        shown = await wait_for_text(pilot, "600")
        await pilot.pause(0.2)
        assert "└0 " not in text_of(app), shown
        await pilot.press("minus")
        await wait_for_text(pilot, "└0 ")


async def test_another_run_is_chosen_from_a_list(make_app: MakeApp) -> None:
    run = write_fake_run(FakeRun(steps=50))
    write_fake_run(FakeRun(name="older-run", state="failed", steps=20, began=BEGAN - 9000))
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await watching(app, run)
        await pilot.press("x")
        await wait_for_text(pilot, "Watch another run", "failed", "older-run")
        await pilot.press("enter")
        await wait_for_text(pilot, "Out of GPU memory", "Another program took", "[r] start again")


async def test_the_last_of_many_runs_is_visible_under_the_cursor(make_app: MakeApp) -> None:
    run = write_fake_run(FakeRun(steps=50))
    for number in range(29):
        write_fake_run(
            FakeRun(name=f"older-{number:02}", state="finished", steps=3, began=BEGAN - 9000 - 60 * number)
        )
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await watching(app, run)
        await pilot.press("x")
        await wait_for_text(pilot, "Watch another run", "older-00")
        await pilot.press("G")
        await wait_for_text(pilot, "older-28")


async def test_a_run_that_failed_early_is_not_shown_as_complete(make_app: MakeApp) -> None:
    run = write_fake_run(FakeRun(state="failed", steps=0))
    with EventWriter(run.events_path) as log:
        log.append(Progress(at=BEGAN, phase="tokenizing", done=100, total=100))
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await watching(app, run)
        shown = await wait_for_text(pilot, "[r] start again")
        assert "███" not in shown.splitlines()[2]


async def test_deleting_a_watched_run_is_reported_and_others_are_offered(make_app: MakeApp) -> None:
    run = write_fake_run(FakeRun(name="owls", state="stopped", steps=50))
    app = make_app()
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await watching(app, run)
        await wait_for_text(pilot, "stopped")
        shutil.rmtree(run.path)
        await wait_for_text(pilot, "gone", "The run was deleted", "[x] show other runs")
        await pilot.press("6", "5")
        await wait_for_text(pilot, f"{run.id} was deleted.", "Micro-batch")


async def test_after_a_deletion_key_5_shows_the_active_run(make_app: MakeApp) -> None:
    old = write_fake_run(FakeRun(name="old", state="stopped", steps=50, began=BEGAN - 9000))
    at_work = write_fake_run(FakeRun(steps=60))
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await watching(app, old)
        await wait_for_text(pilot, "stopped")
        await pilot.press("6")
        shutil.rmtree(old.path)
        await pilot.press("5")
        await wait_for_text(pilot, at_work.id, "step 60/3,000")


async def test_the_form_edits_the_recipe_and_checks_what_is_typed(make_app: MakeApp) -> None:
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("5")
        await wait_for_text(pilot, "Micro-batch", "Name of the run in lists")
        await pilot.press("j")
        await wait_for_text(pilot, "Rows in one forward pass", "Activations grow in proportion")
        await pilot.press("l", "l")
        assert app.workbench.recipe.training.micro_batch_size == 4
        await wait_for_text(pilot, "* preset: 1")
        await pilot.press("backspace")
        assert app.workbench.recipe.training.micro_batch_size == 1
        await pilot.press("enter", "ctrl+u", *"many", "enter")
        await wait_for_text(pilot, "✗", "a whole number from 1 to 4,096")
        await pilot.press("escape", "l", "h")
        assert app.workbench.recipe.training.micro_batch_size == 1
        await pilot.press("enter", "ctrl+u", *"6", "enter")
        await pilot.pause()
        assert app.workbench.recipe.training.micro_batch_size == 6
        await pilot.press("u")
        assert app.workbench.recipe.training.micro_batch_size == 1


async def test_a_letter_jumps_to_a_visible_setting_and_nothing_else(make_app: MakeApp) -> None:
    app = make_app()
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.press("5")
        await wait_for_text(pilot, "▸ Name")
        await pilot.press("apostrophe")
        await wait_for_text(pilot, "a Name", "s Micro-batch", "d Gradient accumulation")
        await pilot.press("d")
        shown = await wait_for_text(pilot, "▸ Gradient accumulation")
        assert "s Micro-batch" not in shown
        await pilot.press("apostrophe", "1")
        await wait_for_text(pilot, "▸ Gradient accumulation", "  Micro-batch")
        assert app.current_mode == "train"


async def test_every_setting_of_the_form_can_be_stepped_both_ways(make_app: MakeApp) -> None:
    app = make_app()
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.press("5")
        form = app.screen.query_one(SettingsForm)
        seen = set()
        while form.field.path not in seen:
            seen.add(form.field.path)
            if form.field.kind in ("int", "float", "bool", "choice"):
                await pilot.press("l", "h")
            await pilot.press("j")
        assert len(seen) > 30
        assert len(app.screen_stack) == 1


async def test_without_a_model_nothing_is_launched_and_the_fix_named(make_app: MakeApp) -> None:
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("5")
        await wait_for_text(pilot, "✗ error", "No model selected.", "Not ready: model, data")
        await pilot.press("t")
        await wait_for_text(pilot, "Not ready to run")
        assert all_runs() == []


async def test_a_recipe_that_is_ready_is_queued_and_then_watched(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(actions, "ensure_runner", lambda: None)
    fine = (Check(CheckKind.MODEL, "ok", "there"), Check(CheckKind.DATA, "ok", "there"))
    monkeypatch.setattr(train_module, "preflight", lambda *_, **__: fine)
    app = make_app()
    app.workbench.replace(
        Recipe(model=Model(id=str(tmp_path)), data=Data(sources=(Source(path="tickets.jsonl"),)))
    )
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("5")
        await wait_for_text(pilot, "Ready. Press [t] to launch it")
        await pilot.press("t")
        await wait_for_text(pilot, "queued", "waiting in the queue")
        assert len(run_queue.waiting()) == 1


async def test_a_failed_check_is_confirmed_before_launch(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(actions, "ensure_runner", lambda: None)
    doubt = (Check(CheckKind.MEMORY, "error", "does not fit: 30.0 of 24.0 GiB."),)
    monkeypatch.setattr(train_module, "preflight", lambda *_, **__: doubt)
    app = make_app()
    app.workbench.replace(
        Recipe(model=Model(id=str(tmp_path)), data=Data(sources=(Source(path="tickets.jsonl"),)))
    )
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("5", "t")
        await wait_for_text(pilot, "Launch anyway?", "30.0 of 24.0 GiB")
        await pilot.press("n")
        await pilot.pause()
        assert all_runs() == []


async def test_a_row_that_blocks_a_run_is_reported_before_launch(make_app: MakeApp, tmp_path: Path) -> None:
    rows = tmp_path / "tickets.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n' * 2 + "{bad\n")
    app = make_app()
    model = readable_model(tmp_path)
    app.workbench.replace(Recipe(model=Model(id=model), data=Data(sources=(Source(path=str(rows)),))))
    async with app.run_test(size=(80, 60)) as pilot:
        await pilot.press("5")
        await wait_for_text(pilot, "Not ready: data")
        # The path before it decides where its lines break.
        await wait_until(pilot, lambda: "Line 3 is not valid JSON" in " ".join(text_of(app).split()))
        await wait_until(pilot, lambda: "Correct or remove the line" in " ".join(text_of(app).split()))
        await pilot.press("t")
        await wait_for_text(pilot, "Not valid JSON")
        await pilot.pause()
        assert all_runs() == []
        await pilot.press("escape")
        rows.write_text('{"instruction": "a", "output": "b"}\n' * 20)
        await pilot.press("f5")
        await wait_until(pilot, lambda: "Line 3" not in text_of(app))
        await wait_for_text(pilot, "✓ ok      data")
        rows.write_text("{bad\n")
        await pilot.press("6", "5")
        await wait_for_text(pilot, "Not ready: data")


def test_a_progress_bar_is_shown_in_its_last_state() -> None:
    assert strip_escapes("Map: 1%\rMap: 100%\r") == "Map: 100%"
    assert strip_escapes("\x1b[31mred\x1b[0m \x1b]0;title\x07text\x00") == "red text"


async def test_the_log_is_at_its_end_when_reopened(make_app: MakeApp) -> None:
    run = write_fake_run(FakeRun(steps=2))
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await watching(app, run)
        await wait_for_text(pilot, "step 2/3,000")
        await pilot.press("0")
        with EventWriter(run.events_path) as log:
            for step in range(3, 30):
                log.append(Evaluated(at=BEGAN + 191, step=step, loss=9 - 0.1 * step, best=True))
        await pilot.press("5")
        await wait_for_text(pilot, "step 29: validation loss 6.1")


def test_hundreds_of_thousands_of_steps_are_held_as_a_sample() -> None:
    run = write_fake_run(FakeRun(steps=10, total=200_000))
    with EventWriter(run.events_path) as log:
        for step in range(11, 60_001):
            log.append(_step(step, loss=None if step == 30_000 else 2.0))
        log.append(Health(at=BEGAN, kind="nan_loss", severity="error", evidence="NaN.", remedy="Stop."))
    follower = RunFollower(run)
    picture = follower.poll()
    assert picture.step == 60_000
    assert picture.step_stride > 1
    assert any(picture.curves.loss.broken)
    assert len(picture.health) == 1
    with EventWriter(run.events_path) as log:
        log.append(_step(60_001))
    assert follower.poll().step == 60_001


def test_a_run_watched_for_weeks_is_complete_in_little_memory() -> None:
    run = write_fake_run(FakeRun(steps=10, total=200_000))
    follower = RunFollower(run)
    with EventWriter(run.events_path) as log:
        for step in range(11, 12_001):
            log.append(_step(step, loss=None if step == 20 else 90.0 if step == 700 else 2.0))
            if step % 500 == 0:
                picture = follower.poll()
                assert picture.step == step
                assert len(picture.view.series) <= 100
    loss = picture.curves.loss
    assert picture.step_stride == 1
    assert len(loss.xs) <= 641
    assert loss.high == 90.0 and 690 < loss.xs[loss.highs.index(90.0)] < 720
    assert any(loss.broken)
    assert loss.xs[-1] == 12_000
    follower.from_step = 11_900.0
    assert follower.poll().curves.loss.xs == tuple(range(11_900, 12_001))


async def test_m_halves_the_learning_rate_where_the_gradient_explodes(make_app: MakeApp) -> None:
    run = write_fake_run(FakeRun(steps=50))
    with EventWriter(run.events_path) as log:
        log.append(_health("exploding_gradient", "Lower training.learning_rate."))
    app = make_app()
    async with app.run_test(size=(120, 40)) as pilot:
        await watching(app, run)
        await wait_for_text(pilot, "m Fix")
        await pilot.press("tab", "tab")
        await wait_for_text(pilot, "▸ [m] halve the learning rate of this run, to 0.0001")
        await pilot.press("m", "enter")
        request = json.loads(next(run.control_dir.glob("*.json")).read_bytes())
        assert request == {"kind": "set_learning_rate", "value": 1e-4}


async def test_m_prepares_a_smaller_run_after_out_of_memory(make_app: MakeApp) -> None:
    run = write_fake_run(FakeRun(steps=50, state="failed"))
    app = make_app()
    async with app.run_test(size=(120, 40)) as pilot:
        before = app.workbench.recipe
        await watching(app, run)
        await wait_for_text(pilot, "m Fix", "Out of GPU memory")
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
        ("few_steps", "finished", "gradient accumulation 4 instead of 8"),
        ("worse_than_before", "running", "stop this run"),
        ("worse_than_before", "finished", "prepare a run with learning rate 2e-5 instead of 0.0002"),
        ("throttled", "running", ""),
    ],
)
def test_a_fix_suits_the_warning_and_the_runs_state(kind: str, state: State, says: str) -> None:
    suggestion = suggest_fix(state, [_health(kind, "")], None, TICKETS)
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
    suggestion = suggest_fix("failed", [], ending, replace_setting(TICKETS, "quantization.method", method))
    assert (says in suggestion.label) if suggestion else not says


def test_the_fix_for_few_steps_removes_a_low_step_limit() -> None:
    limited = replace_setting(TICKETS, "training.max_steps", 5)
    suggestion = suggest_fix("finished", [_health("few_steps", "")], None, limited)
    assert suggestion is not None
    assert suggestion.label == "prepare a run with max steps 0 instead of 5"


def _health(kind: str, remedy: str) -> Health:
    return Health(at=BEGAN, kind=kind, severity="warning", evidence="It is odd.", remedy=remedy, step=50)


async def test_unknown_events_are_reported_and_skipped(make_app: MakeApp) -> None:
    run = write_fake_run(FakeRun(steps=50))
    with run.events_path.open("ab") as file:
        file.write(b'{"event":"teleported","at":1}\n')
    app = make_app()
    async with app.run_test(size=(120, 40)) as pilot:
        await watching(app, run)
        await wait_for_text(pilot, "! 1 line is not shown: another version")


def _step(number: int, loss: float | None = 1.5) -> Step:
    return Step(
        at=BEGAN + 40 + number * 1.5,
        step=number,
        epoch=number / 1500,
        loss=loss,
        learning_rate=1e-4,
        grad_norm=0.5,
        tokens=number * 3500,
        tokens_per_s=2310.0,
    )


def test_every_step_of_a_recorded_real_run_is_there_once() -> None:
    picture = RunFollower(recorded_run()).poll()
    assert picture.status.state == "finished"
    assert list(picture.curves.loss.xs) == list(range(1, 82))
    assert picture.best is not None and picture.best.step in {e.step for e in picture.evaluations}
    assert picture.samples and picture.entries and picture.output and picture.telemetry


@pytest.mark.parametrize(
    ("total", "now", "says"),
    [(57, 0.0, "epoch 0/0.057"), (57, 0.01234, "epoch 0.012/0.057"), (2000, 1.3333, "epoch 1.33/2")],
)
def test_epochs_are_shown_with_two_or_three_digits(total: int, now: float, says: str) -> None:
    picture = RunFollower(write_fake_run(FakeRun(steps=2))).poll()
    assert picture.view.data is not None
    picture.view.data = structs.replace(picture.view.data, steps_per_epoch=1000, total_steps=total)
    assert says in facts(replace(picture, epoch=now), BEGAN + 60)


async def test_the_last_run_is_shown_until_the_recipe_is_edited(make_app: MakeApp) -> None:
    run = write_fake_run(FakeRun(state="finished", steps=60, total=60))
    app = make_app()
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("5")
        await wait_for_text(pilot, run.id, "finished", "[c] chat with it", "[n] prepare another run")
        await pilot.press("4")
        app.edit("lora.rank", 32)
        await pilot.press("5")
        await wait_for_text(pilot, "Micro-batch", "Not ready")
