"""How the app starts and ends: its first frame, signals, a closed terminal, full disks, damaged files."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from textual import events, work
from textual.app import App, ComposeResult
from textual.css import stylesheet
from textual.css.parse import parse
from textual.css.query import NoMatches
from textual.dom import DOMNode
from textual.pilot import Pilot, WaitForScreenTimeout
from textual.widget import Widget

from bench.terminal import Terminal
from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.draft import Draft, open_workbench
from qlora_tui.tui.process import screen_on
from qlora_tui.tui.screens.base import WorkScreen
from qlora_tui.tui.screens.chat.prompt_box import PromptBox
from qlora_tui.tui.screens.home.screen import HomeScreen
from qlora_tui.tui.widgets.controls import TextField
from tests.runs.damage import FILES, damaged
from tests.tui.fake_runs import TICKETS
from tests.tui.screen_assertions import wait_for_text, wait_until
from tests.tui.terminal_emulator import DEADLINE_S, see
from tests.tui.workstation import open_on, settle

pytestmark = pytest.mark.slow

APP = [sys.executable, "-m", "qlora_tui"]
LATER = ("qlora_tui.recipe", "qlora_tui.catalog", "qlora_tui.memory", "qlora_tui.runs", "psutil", "pynvml")
UNTIL_SHOWN = """
import asyncio, gc, sys
gc.disable()  # as the command line does
from qlora_tui.tui import process
from qlora_tui.tui.app import QloraApp

async def main():
    app = QloraApp()
    set_, loaded = app.shown.set, []
    app.shown.set = lambda: (loaded.extend(sys.modules), set_())
    async with app.run_test() as pilot:
        await app.shown.wait()
        frozen = gc.get_freeze_count()
        kept = [[] for _ in range(1000)]
        process.freeze_objects()
        assert gc.isenabled() and 0 < frozen < gc.get_freeze_count() - 900
    print(*loaded)

asyncio.run(main())
"""


def test_the_first_frame_waits_only_for_what_it_shows() -> None:
    done = subprocess.run([sys.executable, "-c", UNTIL_SHOWN], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "qlora_tui.tui.screens.home.screen" in loaded
    assert not [name for name in loaded if name.startswith(LATER)]


def test_the_first_frame_is_whole_and_painted_once() -> None:
    with Terminal(APP) as terminal:
        see(terminal, "Train", "Next", "Help")
        painted = bytes(terminal.painted)
    assert painted.count(b"5 Train") == 1
    # Every line has the screen's own background, also where nothing stands.
    assert painted[: painted.index(b"Help")].count(b" " * 40) >= 15


async def test_a_stylesheet_is_parsed_once_for_all_screens_and_applied_once_to_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[str] = []
    styled: list[object] = []
    update_styles = QloraApp.update_styles

    def counted(scope: str, css: str, read_from: Any, **more: Any) -> object:
        read.append(f"{read_from} {more['tie_breaker']}")
        return parse(scope, css, read_from, **more)

    def recorded(app: QloraApp, node: DOMNode, animate: bool = True) -> None:
        styled.append(node)
        update_styles(app, node, animate)

    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "Next")
        monkeypatch.setattr(stylesheet, "parse", counted)
        monkeypatch.setattr(QloraApp, "update_styles", recorded)
        for key, text in (
            ("1", "Good first models"),
            ("5", "Cannot train"),
            ("?", "Help: Train"),
            ("q", "Cannot train"),
            ("6", "No runs yet"),
            ("1", "Good first models"),
        ):
            await pilot.press(key)
            await wait_for_text(pilot, text)
        styled.clear()
        await pilot.press("6")
        await wait_for_text(pilot, "No runs yet")
        assert app.screen not in styled
        await pilot.resize_terminal(80, 24)
        await wait_until(pilot, lambda: app.screen in styled)
    assert any("train.tcss" in one for one in read)
    assert not any("app.tcss" in one for one in read)
    assert len(read) == len(set(read))


async def test_a_draft_is_there_for_whoever_asks_first(private_home: Path) -> None:
    (paths.state_dir() / "draft.toml").write_text('# began as paper\n[model]\nid = "org/model"\n')
    async with QloraApp().run_test(size=(120, 40)) as pilot:
        await pilot.press("3")
        await wait_for_text(pilot, "paper", "no data")


LEFT = b"\x1b[?1049l"
"""The terminal's own screen is back."""


def log() -> str:
    return paths.log_path().read_text()


def edit_the_recipe(terminal: Terminal) -> None:
    see(terminal, "Train", "Next")
    terminal.press("4")
    see(terminal, "R rank")
    terminal.press("r")
    see(terminal, "R rank        32")


def test_it_ends_when_the_terminal_goes_away_without_a_signal() -> None:
    with Terminal(APP) as terminal:
        edit_the_recipe(terminal)
        terminal.hang_up()
        assert terminal.program.wait(DEADLINE_S) == 128 + signal.SIGHUP
    assert open_workbench(Draft()).recipe.lora.rank == 32
    assert not log()


def test_it_ends_when_its_output_pipe_has_no_reader() -> None:
    piped = f"{{ {sys.executable} -m qlora_tui 2>&1 >&3 | head -c 1000; }} 3>&1"
    with Terminal(["sh", "-c", piped]) as terminal:
        assert terminal.program.wait(DEADLINE_S) == 0
    assert not log()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_it_ends_in_order_when_told_to_by_a_signal(number: signal.Signals) -> None:
    with Terminal(APP) as terminal:
        edit_the_recipe(terminal)
        os.kill(terminal.program.pid, number)
        assert terminal.program.wait(DEADLINE_S) == 128 + number
        while terminal.read(0):
            pass
        assert LEFT in terminal.painted
        assert b"mistake" not in terminal.painted
    assert open_workbench(Draft()).recipe.lora.rank == 32
    assert not log()


@pytest.mark.parametrize("more", ["?", "1o"])
def test_keys_after_quitting_have_no_effect(more: str) -> None:
    with Terminal(APP) as terminal:
        edit_the_recipe(terminal)
        terminal.press(f"q{more}")
        assert terminal.program.wait(DEADLINE_S) == 0
    assert not log()


def test_a_thread_that_hangs_does_not_keep_the_process() -> None:
    hangs = """
import threading
from qlora_tui.cli.main import end_process
from qlora_tui.tui.process import AppThreads
AppThreads().submit(threading.Event().wait)
end_process(3)
"""
    assert subprocess.run([sys.executable, "-c", hangs], timeout=DEADLINE_S, check=False).returncode == 3


def test_output_for_a_closed_terminal_is_dropped() -> None:
    master, side = os.openpty()
    with screen_on(side) as screen:
        print("here", file=screen, flush=True)
        assert os.read(master, 100) == b"here\r\n"
        os.close(master)
        for _ in range(3):
            print("gone" * 10_000, file=screen, flush=True)


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "/state/file")


async def full_in_worker() -> None:
    full()


async def test_a_worker_that_cannot_write_is_reported_once() -> None:
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "Next step")
        for _ in range(3):
            app.run_worker(full_in_worker())
            await pilot.pause()
        await wait_until(pilot, lambda: bool(app._notifications))
        (note,) = app._notifications
        assert note.message.startswith("No space left on the disk: /state/file")
        assert app.is_running
    assert app.disk_faults.ended_by is None


async def test_a_full_disk_in_a_callback_ends_the_app() -> None:
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "Next step")
        app.call_later(full)
        with suppress(WaitForScreenTimeout, NoMatches):
            await pilot._wait_for_screen(timeout=0.2)
    assert app.return_code == 1
    assert app.disk_faults.ended_by is not None
    assert app.disk_faults.ended_by.title == "No space left on the disk"


async def test_any_other_error_still_ends_the_app() -> None:
    app = QloraApp()

    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with app.run_test(size=(80, 24)) as pilot:
            await wait_for_text(pilot, "Next step")
            app.call_later(broken)
            await pilot.pause()


class _Last(Widget):
    """A widget that says when the widgets of its screen are going."""

    def __init__(self) -> None:
        super().__init__()
        self.going = asyncio.Event()

    async def on_unmount(self) -> None:
        self.going.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_events_during_quitting_query_no_widget() -> None:
    app = open_on("data")
    looked = False
    async with app.run_test() as pilot:
        await pilot.pause()
        screen = app.screen
        assert isinstance(screen, WorkScreen)
        last = _Last()
        await screen.query_one("#data-body").mount(last)

        async def late_report() -> None:
            nonlocal looked
            await last.going.wait()
            looked = True
            screen.query_one("#data-body")

        screen.run_worker(late_report())
        await pilot.pause()
    assert last.going.is_set()
    assert not looked


async def test_replaced_work_leaves_no_coroutine() -> None:
    done: list[int] = []

    class Numbers(Widget):
        @work(exclusive=True)
        async def number(self, number: int) -> None:
            done.append(number)

    with warnings.catch_warnings(record=True) as warnings_seen:
        warnings.simplefilter("always")
        async with open_on("data").run_test() as pilot:
            numbers = Numbers()
            await pilot.app.screen.query_one("#data-body").mount(numbers)
            for number in range(3):
                numbers.number(number)
            await pilot.pause()
            gc.collect()
    assert done == [2]
    assert not [warning for warning in warnings_seen if "never awaited" in str(warning.message)]


class Entries(App[None]):
    sent: str | None = None

    def compose(self) -> ComposeResult:
        yield TextField(id="line")
        yield PromptBox(id="prompt")

    def on_input_submitted(self, event: TextField.Submitted) -> None:
        self.sent = event.value

    def on_prompt_box_sent(self, event: PromptBox.Sent) -> None:
        self.sent = event.text


def arrive(pilot: Pilot[None], *keys: str) -> None:
    for key in keys:
        pilot.app.post_message(events.Key(key, key if len(key) == 1 else None))


async def test_no_cursor_blinks() -> None:
    app = Entries()
    async with app.run_test():
        assert not app.query_one(TextField).cursor_blink
        assert not app.query_one(PromptBox).cursor_blink


async def test_keys_that_arrive_together_act_in_their_order() -> None:
    app = Entries()
    async with app.run_test() as pilot:
        for name in ("line", "prompt"):
            app.sent = None
            app.query_one(f"#{name}").focus()
            await pilot.pause()
            arrive(pilot, *"abc", "backspace", "backspace", *"78", "left", "9", "enter")
            await wait_until(pilot, lambda: app.sent is not None)
            assert app.sent == "a798"


async def test_one_bad_byte_in_any_file_leaves_the_app_open() -> None:
    for file in FILES:
        damaged(TICKETS, "running", file, "bad UTF-8")
        damaged(TICKETS, "finished", file, "deep nesting")
        damaged(TICKETS, "finished", file, "a pipe")
    app = QloraApp()
    async with app.run_test(size=(80, 24)) as pilot:
        await app.switch_mode("runs")
        await wait_for_text(pilot, "? lost", "✓ finished")
        for _ in range(3 * len(FILES)):
            await pilot.press("down")
            await pilot.pause()
        await app.switch_mode("train")
        await settle(pilot)
        await app.switch_mode("home")
        await settle(pilot)
    assert app.return_code in (0, None)


async def test_an_error_of_an_action_or_of_a_worker_is_shown(
    private_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise UserError("It did not work", what="Something is missing.")

    monkeypatch.setattr(HomeScreen, "action_prepare", fail)
    app = QloraApp()
    async with app.run_test() as pilot:
        await settle(pilot)
        for by_worker in (False, True):
            if by_worker:
                app.run_worker(fail())
            else:
                await app.run_action("screen.prepare")
            await wait_for_text(pilot, "It did not work", "Something is missing.")
            await pilot.press("escape")
            await wait_until(pilot, lambda: isinstance(app.screen, HomeScreen))
