"""The app on a real pseudo-terminal: what arrives there, whatever the terminal and whatever happens to it."""

from __future__ import annotations

import codecs
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from bench.terminal import Terminal
from qlora_tui import paths
from qlora_tui.errors import UserError
from qlora_tui.tui.app import QloraApp
from tests.support.polling import wait_for
from tests.tui.fake_runs import FakeRun, write_fake_run
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until
from tests.tui.terminal_emulator import DEADLINE_S, screen_of, see

pytestmark = pytest.mark.slow

APP = [sys.executable, "-m", "qlora_tui"]
CODE_PAGE_437 = set(bytes(range(256)).decode("cp437")) | set("♦•○►◄▲▼↑↓→←§\x1b")
VISITED = [
    ("6", "Compare"),
    ("5", "[c] chat"),
    ("n", "Cannot train"),
    ("o", "Watch another run"),
    ("\r", "[c] chat"),
    ("?", "Help: Train"),
    ("q", "[c] chat"),
    ("\t", "I am sorry to hear that."),
]
"""Keys, and what is waited for after each."""


def test_incremental_output_equals_a_full_repaint() -> None:
    run = write_fake_run(FakeRun(state="finished", steps=300, total=300))
    with Terminal(APP, columns=100, rows=30) as terminal:
        size = (100, 30)
        see(terminal, run.id, "Next", size=size)
        for key, text in VISITED:
            terminal.press(key)
            see(terminal, text, size=size)
        before = len(terminal.painted)
        # Whole screens at each step would be 200 kB.
        assert before < 120_000
        terminal.press("\x0c")
        deadline = time.monotonic() + DEADLINE_S
        while True:
            terminal.read(0.2)
            pieces = screen_of(terminal, size=size)
            whole = screen_of(terminal, before, size)
            if pieces == whole:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{pieces.text}\n\n{whole.text}")
        assert "I am sorry to hear that." in whole.text


@pytest.mark.parametrize("words", [[], ["--log"]])
def test_attach_opens_the_app_unless_told_to_print(words: list[str]) -> None:
    run = write_fake_run(FakeRun(state="finished", steps=300, total=300))
    with Terminal([*APP, "attach", *words]) as terminal:
        if words:
            see(terminal, "step 300 of 300", "finished at step 300")
        else:
            see(terminal, run.name, "Loss and pace", "[c] chat")
            terminal.press("q")
        assert terminal.program.wait(DEADLINE_S) == 0


def left(terminal: Terminal) -> bytes:
    """Quit; what was sent to the terminal after its own screen was back, with its cursor."""
    terminal.press("q")
    assert terminal.program.wait(DEADLINE_S) == 0
    while terminal.read(0):
        pass
    _, its_own_screen, since = bytes(terminal.painted).rpartition(b"\x1b[?1049l")
    assert its_own_screen and b"\x1b[?25h" in terminal.painted
    return since


@pytest.mark.parametrize("name", ["xterm", "screen"])
def test_every_terminal_is_painted_and_left_as_it_was(name: str) -> None:
    with Terminal(APP, env={"TERM": name}) as terminal:
        see(terminal, "Train", "Help")
        left(terminal)


def test_after_ctrl_z_and_a_librarys_output_the_screen_is_whole_and_the_shell_names_the_active_run() -> None:
    run = write_fake_run(FakeRun(name="tickets", state="running", steps=300, total=3000))
    with Terminal(APP, env={"TERM": "tmux-256color"}) as terminal:
        see(terminal, "300 of 3,000")
        terminal.press("\x1a")
        program = psutil.Process(terminal.program.pid)
        wait_for(lambda: terminal.read(0) == b"" and program.status() == psutil.STATUS_STOPPED)
        stopped_at = len(terminal.painted)
        os.kill(terminal.program.pid, signal.SIGCONT)
        see(terminal, "Train", "Next", since=stopped_at)

        with Path(f"/proc/{terminal.program.pid}/fd/2").open("a") as descriptor:
            descriptor.write("NVRM: a native warning\n")
        terminal.press("6")
        assert "native warning" not in see(terminal, "Compare")
        assert "native warning" in (paths.state_dir() / "qlora-tui.log").read_text()

        in_the_shell = left(terminal).decode()
        assert f"{run.id} continues." in in_the_shell
        assert f"Come back: qlora-tui attach {run.id}" in in_the_shell


def test_the_linux_console_is_sent_only_what_its_font_has() -> None:
    run = write_fake_run(FakeRun(state="finished", steps=300, total=300))
    with Terminal(APP, env={"TERM": "linux"}) as terminal:
        see(terminal, run.id)
        for key, text in [
            *VISITED[:2],
            ("1", "No models"),
            ("2", "No data yet"),
            ("4", "has no model"),
            ("p", "Enter open"),
            ("\x1b", "has no model"),
            ("\x10", "Search for"),
            ("redo", "Redo the last undone change"),
            ("\r", "has no model"),
            ("3", "has no model"),
            ("5", "[c] chat"),
            *VISITED[2:5],
        ]:
            terminal.press(key)
            see(terminal, text)
        shown = see(terminal, run.id, "√ finished", "▀", "▄")
        # What was read may end in the middle of a character.
        painted = codecs.getincrementaldecoder("utf-8")().decode(terminal.painted)
        lacking = set(painted) - CODE_PAGE_437
        assert not lacking, shown
        left(terminal)


async def test_a_too_small_window_says_so_until_it_grows_whatever_is_over_it() -> None:
    app = QloraApp()
    async with app.run_test(size=(60, 20)) as pilot:
        await wait_for_text(pilot, "This window is too small", "The window is 60×20", "need 80×24")
        await pilot.resize_terminal(80, 24)
        await wait_until(pilot, lambda: "too small" not in text_of(app))
        await pilot.resize_terminal(79, 24)
        await wait_for_text(pilot, "The window is 79×24")
        await pilot.press("enter")
        assert "too small" not in await wait_for_text(pilot, "Next")

        await pilot.resize_terminal(80, 24)
        await pilot.resize_terminal(60, 20)
        await wait_for_text(pilot, "This window is too small")
        app.show_error(UserError("No such file", what="It is gone."))
        await wait_for_text(pilot, "No such file")
        await pilot.resize_terminal(80, 24)
        await pilot.press("escape")
        assert "too small" not in await wait_for_text(pilot, "Next")
        await pilot.resize_terminal(60, 20)
        await wait_for_text(pilot, "This window is too small")
        await app.switch_mode("runs")
        await pilot.resize_terminal(80, 24)
        await pilot.press("0")
        assert "too small" not in await wait_for_text(pilot, "Next")
