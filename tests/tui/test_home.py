from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from textual.drivers.headless_driver import HeadlessDriver

from qlora_tui import paths, worker
from qlora_tui.data.formats import detect
from qlora_tui.data.row import Row
from qlora_tui.demo.conversations import CONVERSATIONS
from qlora_tui.formatting import format_duration
from qlora_tui.memory.budget import budget_for
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Data, Model, Recipe, Source
from qlora_tui.runs import actions, doctor, run_queue
from qlora_tui.runs.data_checks import RunLength
from qlora_tui.runs.doctor import Check, CheckKind
from qlora_tui.runs.events import Failed
from qlora_tui.runs.expected_time import Forecast
from qlora_tui.runs.process import ensure_runner
from qlora_tui.runs.run_summary import RunVerdict, next_evaluation, summarize
from qlora_tui.runs.status import State
from qlora_tui.tui import desktop, system_monitor
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.home import reader as home_reader
from qlora_tui.tui.screens.home.first_lines import ROW_SHAPES
from qlora_tui.tui.screens.home.next_step import DEMO, HomeState, next_step, other_steps
from qlora_tui.tui.screens.home.panel_lines import (
    HomeLayout,
    numbers_lines,
    recent_lines,
    recipe_lines,
    run_lines,
)
from qlora_tui.tui.screens.home.reader import HomeReader
from qlora_tui.tui.screens.home.screen import HomeScreen
from qlora_tui.tui.screens.models import downloads
from qlora_tui.tui.screens.train.screen import TrainScreen
from qlora_tui.tui.system_status import SystemStatus
from qlora_tui.tui.workbench import Workbench
from tests.support.nvml_stub import install_nvml_stub, install_torch
from tests.support.step_events import a_data_set
from tests.tui.chat_screen import with_adapters
from tests.tui.fake_runs import BEGAN, FakeRun, write_fake_run
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until
from tests.tui.workstation import config_folder

READY = Recipe(model=Model(id="m"), data=Data(sources=(Source(path=str(CONVERSATIONS)),)))


def _ready(home: Path) -> Recipe:
    """A recipe whose model is on this machine."""
    return replace_setting(READY, "model.id", str(config_folder(home, "HuggingFaceTB__SmolLM2-135M")))


def after(state: State, **how: Any) -> HomeState:
    """A run of that state was the last; the recipe is complete and fits."""
    return HomeState(READY, 1, verdict="fits", last_run="a", last_state=state, **how)


def test_a_download_that_ends_during_a_reading_leaves_its_count(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = HomeReader(0.0, 0.0)
    monkeypatch.setattr(
        home_reader, "list_local_models", lambda: [SimpleNamespace(refusal=None, architecture=None)]
    )

    def queue_lines(_waiting: object) -> list[object]:
        reader.invalidate_models()
        return []

    monkeypatch.setattr(home_reader, "queue_lines", queue_lines)
    layout = HomeLayout(80, 40, 40, is_compact=False)
    facts = reader.read(Workbench(), (budget_for(None),) * 2, SystemStatus(), 0.0, layout)
    assert facts.steps[0].why == "1 model is on this machine"


@pytest.mark.parametrize(
    ("step", "evaluated", "following"), [(70, 60, 70), (70, 70, 80), (71, 70, 80), (81, 80, 81), (81, 81, 0)]
)
def test_the_next_evaluation_is_that_of_the_last_step_until_it_is_done(
    step: int, evaluated: int, following: int
) -> None:
    recipe = replace_setting(Recipe(), "training.eval_every", 10)
    data = a_data_set(steps_per_epoch=54, total_steps=81)
    assert next_evaluation(recipe, data, step, evaluated) == following


def test_a_run_is_a_card_with_its_progress_its_figures_and_what_is_next() -> None:
    summary = summarize(write_fake_run(FakeRun(steps=1240)))
    layout = HomeLayout(100, 60, 40, is_compact=False)
    head, progress, figures = (line.plain for line in run_lines(summary, False, BEGAN, layout, ["next-one"]))
    assert summary.name in head and "training" in head
    assert len(progress) == 60 and progress.endswith("41%  step 1,240 of 3,000")
    left = format_duration(summary.seconds_left)
    assert re.match(rf"smoothed loss \d\.\d{{3}}   {left} left   next evaluation at 1,500", figures)
    wide = run_lines(summary, False, BEGAN, replace(layout, left=100), ["next-one"])[-1].plain
    compact = run_lines(summary, False, BEGAN, replace(layout, left=120, is_compact=True))
    assert len(compact) == 2 and f"{left} left" in compact[0].plain and "smoothed" not in compact[0].plain
    assert wide.endswith("then next-one")
    large = run_lines(summary, False, BEGAN, replace(layout, left=100, is_large=True))
    assert len(large) == 6 and large[3].plain[0] in "█▀▄" and "min left" in large[-1].plain


def test_an_ended_run_says_what_it_achieved_in_one_line_of_whole_facts() -> None:
    events = FakeRun(state="finished", steps=3000)
    ended = replace(summarize(write_fake_run(events)), evaluations=((0, 5.0), (1000, 2.5)), best=(2.5, 1000))
    plain = RunVerdict("unclear", "Validation loss fell from 5.000 to 2.500.", has_only_losses=True)
    layout = HomeLayout(100, 70, 40, is_compact=False)
    trained = f"trained {format_duration(ended.seconds)}"

    def lines(left: int, verdict: RunVerdict = plain) -> list[str]:
        shown = run_lines(replace(ended, verdict=verdict), False, BEGAN, replace(layout, left=left))
        return [line.plain for line in shown]

    assert lines(70)[-1] == f"best validation loss 2.500   -50% from 5.000   {trained}"
    assert lines(50)[-1] == "best validation loss 2.500   -50% from 5.000"
    learned = replace(plain, sentence="Learned: validation loss fell by 2.500.", has_only_losses=False)
    assert lines(70, learned)[-1] == learned.sentence
    # Among the earlier runs, the reason of a failure takes the place of a loss.
    crowded = Failed(at=BEGAN + 500, title="Out of memory", what="The step needs 13 GiB.")
    failed = summarize(write_fake_run(FakeRun(name="owls", state="failed", failed=crowded)))
    earlier = [line.plain for line in recent_lines((failed, ended), BEGAN + 600, 77, 2)]
    assert (
        "✗ owls" in earlier[0] and "  Out of memory  " in earlier[0] and "  best val. 2.500  " in earlier[1]
    )


def test_next_to_an_active_run_the_next_one_warns_in_two_lines() -> None:
    expected = Forecast(RunLength(3, 6, 6, 1e4, is_exact=True), None)
    draw = partial(recipe_lines, Workbench(), budget_for(None), None, expected, 30)
    loud, quiet = draw(is_compact=True), draw(is_compact=True, is_quiet=True)
    assert len(quiet) == 2 < len(loud)
    for is_quiet in (False, True):
        line = draw(is_compact=False, is_quiet=is_quiet)[-2]
        assert line.plain.startswith("! only 6 steps") and is_quiet == ("$warning" not in str(line.spans))


def test_validations_are_newest_first_with_bars_of_one_scale_and_only_a_notable_rise_is_a_warning() -> None:
    losses = (4.0, 2.0, 1.9, 1.908, 1.908, 1.958)
    summary = replace(summarize(write_fake_run(FakeRun())), evaluations=tuple(enumerate(losses, 1)))
    _, *lines = numbers_lines(summary, False, 46, 10)
    assert [line.plain.split()[0] for line in lines] == ["6", "5", "4", "3", "2", "1"]
    assert ["$warning" in str(line.spans) for line in lines] == [True, False, False, False, False, False]
    bars = [line.plain[26:].strip() for line in lines]
    # The first change does not set the scale, so that later ones can be compared.
    assert bars == ["▲" + "▄" * 9, "", "▲▖", "▄" * 20, "▄" * 19 + "▶", ""]
    # Lines that do not fit do not set the scale.
    cut = [line.plain[26:].strip() for line in numbers_lines(summary, False, 46, 6)[1:]]
    assert cut[:4] == ["▲" + "▄" * 9, "", "▲▖", "▄" * 20]
    # In a large window, the settings have a line each while all validations have room.
    texts = ["\n".join(line.plain for line in numbers_lines(summary, True, 55, rows)) for rows in (40, 16)]
    assert ["· batch" in text for text in texts] == [False, True]
    assert all("Validation" in text and "1.958" in text for text in texts)
    almost_even = replace(summary, evaluations=((1, 4.0), (2, 3.0), (3, 2.4)))
    assert [line.plain.count("▄") for line in numbers_lines(almost_even, False, 46, 10)] == [0, 12, 20, 0]


@pytest.mark.parametrize(
    ("now", "action", "instead"),
    [
        (HomeState(Recipe(), 0), "demo", "app.go('models')"),
        (HomeState(Recipe(), 3), "app.go('models')", ""),
        (HomeState(Recipe(model=Model(id="m")), 1), "app.go('data')", ""),
        (HomeState(READY, 1, verdict="does not fit"), "app.go('memory')", ""),
        (HomeState(READY, 1, verdict="fits"), "prepare", ""),
        (HomeState(READY, 1, verdict="fits", data_error="cannot train: not UTF-8"), "app.go('data')", ""),
        (HomeState(READY, 1, verdict="fits", model_error="cannot train: no weights"), "app.go('models')", ""),
        (after("running"), "watch", ""),
        (after("finished", last_is_news=True), "chat", "export prepare"),
        (after("finished"), "chat", "export prepare"),
        (after("finished", last_is_news=True, edited_since=True), "chat", "export prepare"),
        (after("finished", edited_since=True), "prepare", ""),
        (after("paused", last_checkpoint=60), "resume", "prepare"),
        (after("paused", last_checkpoint=60, edited_since=True), "resume", "prepare"),
        (after("paused"), "resume", "prepare"),
        (after("stopped", last_checkpoint=60), "resume", "prepare"),
        (after("stopped", last_checkpoint=60, edited_since=True), "prepare", "resume"),
        (after("stopped"), "prepare", ""),
        (after("lost", last_checkpoint=60, last_is_news=True), "resume", "prepare"),
        (after("lost", last_checkpoint=60, edited_since=True), "prepare", "resume"),
        (after("lost"), "watch", "prepare"),
        (after("failed", last_checkpoint=60, last_is_news=True), "watch", "resume prepare"),
        (after("failed", last_checkpoint=60), "watch", "resume prepare"),
        (after("failed"), "watch", "prepare"),
        (after("failed", last_is_news=True, edited_since=True), "prepare", ""),
        (HomeState(Recipe(), 1, last_run="a", last_state="failed", edited_since=True), "watch", ""),
    ],
)
def test_the_next_step_is_the_sensible_one(now: HomeState, action: str, instead: str) -> None:
    step = next_step(now)
    assert step.action == action
    assert [other.action for other in other_steps(now, step)] == instead.split()


async def test_enter_resumes_a_stopped_run_until_another_recipe_is_edited(
    monkeypatch: pytest.MonkeyPatch, private_home: Path
) -> None:
    monkeypatch.setattr(actions, "ensure_runner", lambda: None)
    run = write_fake_run(FakeRun(name="owls", state="stopped", steps=60, total=300, began=time.time()))
    checkpoint = run.checkpoints_dir / "step-40"
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete").touch()
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "Resume the run", "owls was stopped; it resumes from the checkpoint")
        app.workbench.replace(_ready(private_home))
        app.recipe_edited()
        os.utime(paths.state_dir() / "draft.toml", (time.time() + 3600,) * 2)
        await wait_for_text(pilot, "▸ Enter  Check the recipe", "[r]    Resume the run")
        await pilot.press("r")
        await wait_until(pilot, lambda: run_queue.waiting() == [run.id])
        await wait_for_text(pilot, "owls", "queued")
        assert isinstance(app.screen, TrainScreen)


async def test_a_first_model_is_downloaded_from_home(monkeypatch: pytest.MonkeyPatch) -> None:
    began = []

    def start(model_id: str) -> downloads.Download:
        began.append(model_id)
        child = subprocess.Popen(["sleep", "0"], stdout=subprocess.PIPE)
        return downloads.Download(model_id, model_id, child)

    monkeypatch.setattr(downloads, "start", start)
    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(
            pilot, "▸ Enter", "Tab to choose one", "Good first models", "none yet  [1]", "none yet  [2]"
        )
        assert "Queue" not in text_of(app) and "No runs" not in text_of(app)
        await pilot.press("tab", "down")
        # Only one thing says that Enter does it.
        text = await wait_for_text(pilot, "Enter to download it", f"[d]  {DEMO.text}")
        assert "▸ Enter" not in text
        await pilot.press("enter")
        await wait_until(pilot, lambda: began)
        assert app.current_mode == "models" and began == ["LiquidAI/LFM2.5-1.2B-Instruct"]


async def test_home_says_how_long_the_next_run_takes(private_home: Path) -> None:
    app = QloraApp()
    app.workbench.replace(_ready(private_home))
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "Check the recipe", "time    unknown: no run here yet")


async def test_a_new_user_downloads_the_demo_once_and_keeps_the_screen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    began = []
    says = msgspec.json.encode(worker.Progress(text="Fetching")).decode()
    path = base64.b64encode(os.fsencode(tmp_path / "model")).decode()
    done = msgspec.json.encode(worker.Result(msgspec.Raw(f'"{path}"'))).decode()
    script = f"echo '{says}'; until [ -e go ]; do sleep 0.05; done; echo '{done}'"

    def start() -> downloads.Download:
        began.append(1)
        child = subprocess.Popen(["sh", "-c", script], cwd=tmp_path, stdout=subprocess.PIPE)
        return downloads.Download(downloads.DEMO, "demo", child)

    monkeypatch.setattr(downloads, "start_demo", start)
    app = QloraApp()
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await wait_for_text(pilot, DEMO.text, "Search the Hub", "Good first models", "[1]")
        await pilot.press("enter")
        await wait_for_text(pilot, "(89 MiB; 260", "only when you launch it")
        await pilot.press("n")
        assert isinstance(app.screen, HomeScreen) and not began
        await pilot.press("enter", "enter")
        await wait_for_text(pilot, "Fetching…")
        await pilot.press("enter", "d")
        assert isinstance(app.screen, HomeScreen)
        await pilot.press("1")
        (tmp_path / "go").touch()
        await wait_for_text(pilot, "Downloaded the demo model")
        assert app.current_mode == "models"
        assert app.workbench.recipe.model.id == str(tmp_path / "model")
    assert began == [1]


async def test_a_run_that_ends_notifies_on_other_screens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMUX", raising=False)
    written: list[str] = []
    monkeypatch.setattr(HeadlessDriver, "write", lambda driver, data: written.append(data))
    write_fake_run(FakeRun(name="owls", steps=200, total=300))
    app = QloraApp()
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "owls", "training")
        failed = Failed(at=BEGAN + 500, title="The disk is full", what="No room for step 300.")
        write_fake_run(FakeRun(name="owls", steps=300, total=300, state="failed", failed=failed))
        await wait_for_text(pilot, "owls failed: The disk is full.")
        await pilot.press("6")
        await pilot.pause(0.3)
    said = "".join(written)
    assert said.count("\x1b]9;owls failed: The disk is full.\a") == 1
    assert "\x1b]2;owls failed: The disk is full.\a" in said
    assert said.index(desktop.PUSH_TITLE) < said.index("\x1b]2;") < said.index(desktop.POP_TITLE)


async def test_before_the_first_poll_no_runs_or_steps_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with_adapters(write_fake_run(FakeRun(name="owls", state="finished", steps=1200, total=1200)), "step-640")
    looking = threading.Event()
    look = system_monitor.SystemMonitor.poll_and_recover
    monkeypatch.setattr(
        system_monitor.SystemMonitor, "poll_and_recover", lambda self: looking.wait(30) and look(self)
    )
    async with QloraApp().run_test() as pilot:
        said = await wait_for_text(pilot, "looking…")
        await pilot.press("enter")
        assert "▸ Enter" not in said and isinstance(pilot.app.screen, HomeScreen)
        looking.set()
        await wait_for_text(pilot, "owls", "step 640 (best) and base", "step 640 (best) as GGUF")


async def test_a_stopped_queue_is_started_from_any_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_monitor, "STALLED_S", 0.0)
    started = list[bool]()

    def once() -> None:
        if not started:
            started.append(True)
            ensure_runner()

    # Without any time to start, the app would start another with each look.
    monkeypatch.setattr(system_monitor, "ensure_runner", once)
    run = write_fake_run(FakeRun(name="owls", state="queued", steps=0))
    run_queue.enqueue(run)
    # A runner passes over what it cannot train, which takes no torch.
    run.recipe_path.unlink()
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("4")
        await wait_until(pilot, lambda: run_queue.waiting() == [])


def test_a_runner_that_cannot_be_started_ends_no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_monitor, "STALLED_S", 0.0)
    monkeypatch.setattr(system_monitor, "ensure_runner", ensure_runner)
    run = write_fake_run(FakeRun(name="owls", state="queued", steps=0))
    run_queue.enqueue(run)
    (paths.state_dir() / "runner.log").mkdir()
    look = system_monitor.SystemMonitor()
    look.poll_and_recover()
    assert look.poll_and_recover().waiting_ids == (run.id,)
    look.close()


def test_a_sweep_that_was_killed_between_its_runs_goes_on_once_the_app_is_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[bool] = []
    monkeypatch.setattr(system_monitor, "STALLED_S", 0.0)
    monkeypatch.setattr(system_monitor, "ensure_runner", lambda: started.append(True))
    (sweep := paths.sweeps_dir() / "rates").mkdir()
    (sweep / "active").touch()
    look = system_monitor.SystemMonitor()
    for _ in range(4):
        look.poll_and_recover()
    look.close()
    assert started == [True]


@pytest.mark.parametrize("is_on_cluster", [True, False])
def test_a_run_in_training_does_not_keep_the_queue_from_its_runner(
    monkeypatch: pytest.MonkeyPatch, is_on_cluster: bool
) -> None:
    started = list[bool]()
    monkeypatch.setattr(system_monitor, "STALLED_S", 0.0)
    monkeypatch.setattr(system_monitor, "ensure_runner", lambda: started.append(True))
    training = write_fake_run(FakeRun(name="crows", steps=200, total=300))
    if is_on_cluster:
        training.slurm_path.write_text('{"target": "gpus", "job": "12"}')
    run_queue.enqueue(write_fake_run(FakeRun(name="owls", state="failed", steps=0)))
    look = system_monitor.SystemMonitor()
    look.poll_and_recover()
    status = look.poll_and_recover()
    assert started == [True] and status.active == training
    assert status.has_free_device == is_on_cluster
    look.close()


def test_the_run_that_changed_last_is_the_one_shown() -> None:
    older = FakeRun(name="owls", steps=200, total=300)
    write_fake_run(FakeRun(name="crows", state="finished", steps=300, total=300, began=BEGAN + 100))
    run = write_fake_run(older)
    look = system_monitor.SystemMonitor()
    assert look.poll_and_recover().active_or_last == run
    write_fake_run(replace(older, state="finished", steps=300, seconds_a_step=5.0))
    assert look.poll_and_recover().active_or_last == run
    look.close()


async def test_the_machine_is_checked_in_the_app(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor,
        "check_libraries",
        lambda: [Check(CheckKind.LIBRARY, "error", "It is broken.", "Install it again.", name="torch")],
    )
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("ctrl+p")
        await pilot.press(*"check this machine")
        await wait_for_text(pilot, "Check this machine ", " F4 ")
        await pilot.press("enter")
        await wait_for_text(pilot, "Can this machine train?", "Not ready to train")
        shown = await wait_for_text(pilot, "▸ Install it again.")
        order = [shown.index(text) for text in ("Not ready", "torch: It is broken.", "GPU: No GPU")]
        assert order == sorted(order)


async def test_while_a_run_trains_the_footer_has_its_keys() -> None:
    write_fake_run(FakeRun(steps=50))
    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "z Pause", "Z Stop and save")
        await pilot.press("z")
        await wait_for_text(pilot, "Pause the run?")


async def test_two_runs_and_their_gpus_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvml_stub(monkeypatch, "two_gpus")
    install_torch(monkeypatch, "12.4")
    write_fake_run(FakeRun(name="crows", steps=36, total=300))
    write_fake_run(FakeRun(name="owls", steps=200, total=300, began=BEGAN + 100))
    async with QloraApp().run_test(size=(80, 24)) as pilot:
        for size, top in (((80, 24), "● 67% 12%"), ((120, 40), "● 67% · ● 12%   RTX 4090 ")):
            await pilot.resize_terminal(*size)
            shown = await wait_for_text(pilot, "step 200 of 300", top, "RTX 3060", "of 12.0 GiB")
            assert "● crows  training  12%  step 36 of 300" in shown and "Earlier runs" not in shown


def test_each_row_that_home_shows_is_recognized_as_its_format() -> None:
    for name, row in ROW_SHAPES.items():
        value = json.loads(row.replace("…", "one or two words"))
        assert detect([Row(1, value)], "rows.jsonl").layout.format == name


async def test_home_may_be_closed_before_its_rows_are_divided(
    private_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        home = app.screen
        assert isinstance(home, HomeScreen)
        await wait_until(pilot, lambda: home.suggestion)
        monkeypatch.setattr(home, "_show_facts", lambda facts: None)
        await home.remove_children()
        home.on_resize()
        await pilot.pause()
