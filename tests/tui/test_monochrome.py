"""Without colors: the terminal's default two, and attributes that distinguish elements."""

from __future__ import annotations

import re
import sys

import pytest
from pyte.screens import Char

from bench.terminal import Terminal
from qlora_tui import paths
from tests.support.polling import wait_for
from tests.tui.fake_runs import BEGAN, FakeRun, write_fake_run
from tests.tui.terminal_emulator import screen_of, see

pytestmark = pytest.mark.slow

APP = [sys.executable, "-m", "qlora_tui"]
BOLD, DIM, UNDERLINE, REVERSE = "1", "2", "4", "7"
ATTRIBUTES = {"0", BOLD, DIM, "3", UNDERLINE, REVERSE, "9"}
VISITED = [
    ("0", "Next"),
    ("1", "Good first models"),
    ("2", "No data yet"),
    ("3", "has no model"),
    ("4", "r R rank"),
    ("5", "o Other run"),
    ("6", "v Compare"),
    ("?", "Help: Runs"),
    ("q", "v Compare"),
    ("p", "Enter open"),
    ("\x1b", "v Compare"),
    ("\x10", "Search for commands"),
]
"""Keys, and what is waited for after each."""


def wait_until_gone(terminal: Terminal, text: str) -> None:
    def is_gone() -> bool:
        terminal.read(0)
        return text not in screen_of(terminal).text

    wait_for(is_gone)


@pytest.mark.parametrize("how", [{"NO_COLOR": "1"}, {"TERM": "vt100"}], ids=["NO_COLOR", "vt100"])
def test_no_color_is_sent_from_any_screen(how: dict[str, str]) -> None:
    write_fake_run(FakeRun(state="failed", steps=120, total=300))
    (paths.config_dir() / "config.toml").write_text('theme = "paper"\n')
    with Terminal(APP, env=how) as terminal:
        for key, shown in VISITED if "NO_COLOR" in how else VISITED[:1]:
            terminal.press(key)
            see(terminal, shown)
            if key == "\x1b":
                # What is behind a dialog is in view before the dialog closes.
                wait_until_gone(terminal, "Enter open")
        assert "▌".encode() not in terminal.painted, "a bar whose only meaning is its color"
        sent = re.findall(rb"\x1b\[([\d;]*)m", terminal.painted)
        assert {code for codes in sent for code in codes.decode().split(";")} <= ATTRIBUTES


def test_cursor_selection_and_fields_differ_by_attributes_and_a_click_finds_its_tab() -> None:
    write_fake_run(FakeRun(name="owls", state="failed", steps=120, total=300, began=BEGAN - 1000))
    write_fake_run(FakeRun(name="bees", state="finished", steps=300, total=300))
    with Terminal(APP, env={"NO_COLOR": "1"}) as terminal:

        def style_of(text: str) -> Char:
            terminal.read(0)
            return screen_of(terminal).style_of(text)

        see(terminal, "Next")
        # A click on the tab "1 Model", in the first line.
        terminal.press("\x1b[<0;14;1M\x1b[<0;14;1m")
        see(terminal, "No models on this machine")
        terminal.press("6")
        wait_for(lambda: style_of("6 Runs").reverse and not style_of("0 Home").reverse)
        wait_for(lambda: style_of("bees").reverse and not style_of("owls").reverse)
        terminal.press("j")
        wait_for(lambda: style_of("owls").reverse and not style_of("bees").reverse)
        terminal.press("p")
        see(terminal, "Enter open")
        wait_for(lambda: style_of("balanced").reverse and not style_of("cpu-demo").reverse)
        terminal.press("\x1b")
        wait_until_gone(terminal, "Enter open")
        terminal.press("7o")
        see(terminal, "Sampling", "empty: a random seed")
        # The second field is the seed, which is empty.
        wait_for(lambda: style_of("0.95").underscore and style_of("    empty: a random seed").underscore)
