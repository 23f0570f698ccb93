"""The app without its terminal: it exits cleanly, with or without a signal."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from bench.terminal import Terminal
from qlora_tui import paths
from qlora_tui.tui.draft import Draft, open_workbench
from qlora_tui.tui.process import screen_on
from tests.tui.terminal_emulator import DEADLINE_S, see

pytestmark = pytest.mark.slow

APP = [sys.executable, "-m", "qlora_tui"]
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


def test_output_for_a_closed_terminal_is_dropped() -> None:
    master, side = os.openpty()
    with screen_on(side) as screen:
        print("here", file=screen, flush=True)
        assert os.read(master, 100) == b"here\r\n"
        os.close(master)
        for _ in range(3):
            print("gone" * 10_000, file=screen, flush=True)
