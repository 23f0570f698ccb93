"""The terminal's own colors: its answers are found among keys, and a theme of them is legible."""

from __future__ import annotations

import random
import sys

import pytest
from textual.color import Color

from bench.terminal import Terminal
from qlora_tui import paths
from qlora_tui.tui.color_query import (
    QUERY,
    ReplyReader,
    TerminalColor,
    can_answer,
    is_light_by_environment,
)
from tests.support.polling import wait_for
from tests.tui.terminal_emulator import screen_of, see

APP = [sys.executable, "-m", "qlora_tui"]
SOLARIZED = "\x1b]10;rgb:8383/9494/9696\x1b\\", "\x1b]11;rgb:00/2b/36\x07"


def test_replies_are_taken_out_however_they_are_cut() -> None:
    draw = random.Random(0)
    for _ in range(300):
        keys = ["1", "\x1b[A", "]", "7", "ü", "\x1b[<35;10;5M", "11;"]
        typed = draw.choices(keys, k=4)
        whole = "".join([*typed[:2], SOLARIZED[0], *typed[2:], SOLARIZED[1], "5"])
        reader, passed, now = ReplyReader(), "", 100.0
        colors: list[TerminalColor] = []
        reader.expect(now)
        while whole:
            size = draw.randint(1, 12)
            text, replies = reader.read(whole[:size], now)
            whole, passed, colors = whole[size:], passed + text, [*colors, *replies]
            # As long as it takes over a slow link, but for the characters that a person may have typed.
            now += 0.05
            passed += reader.overdue(now)
        assert passed == "".join([*typed, "5"])
        assert [(each.is_background, each.color) for each in colors] == [
            (False, Color(131, 148, 150)),
            (True, Color(0, 43, 54)),
        ]


def test_escape_waits_a_moment_for_a_reply_and_no_longer() -> None:
    reader = ReplyReader()
    assert reader.read("\x1b", 0.0) == ("\x1b", [])
    reader.expect(0.0)
    assert reader.read("\x1b", 0.0) == ("", [])
    assert (reader.overdue(0.05), reader.overdue(0.11)) == ("", "\x1b")
    assert reader.read("\x1b", 10.0) == ("\x1b", [])
    assert reader.read("\x1b]11;rgb:0/", 10.0) == ("", [])
    assert reader.read("0/0\x07q", 20.0)[0] == "q"


def test_only_terminals_that_read_the_question_are_asked() -> None:
    asked = {name: can_answer({"TERM": name}) for name in ("xterm-256color", "screen", "linux", "vt100")}
    assert asked == {"xterm-256color": True, "screen": True, "linux": False, "vt100": False}
    assert [
        is_light_by_environment({"COLORFGBG": value}) for value in ("15;0", "0;default;15", "0;7", "")
    ] == [False, True, True, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "theme", "answers", "background"),
    [
        ({"TERM": "screen"}, "", (), "default"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "terminal", SOLARIZED, "002b36"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "terminal", (), "default"),
        ({"TERM": "screen"}, "paper", (), "brightwhite"),
    ],
    ids=["16 colors", "answers", "is silent", "chosen"],
)
def test_a_terminal_gets_its_own_colors(
    how: dict[str, str], theme: str, answers: tuple[str, ...], background: str
) -> None:
    if theme:
        (paths.config_dir() / "config.toml").write_text(f'theme = "{theme}"\n')
    with Terminal(APP, env=how) as terminal:
        see(terminal, "Next step")
        if answers:
            assert QUERY.encode() in terminal.painted
            terminal.press("".join(answers))
        see(terminal, "Next step", "Palette")

        def grounds() -> set[str]:
            terminal.read(0)
            screen = screen_of(terminal)
            return {screen.style_of(text).bg for text in ("Next step", "Next run")}

        wait_for(lambda: grounds() == {background})
        # No answer is taken for keys: this is still Home.
        terminal.press("6")
        see(terminal, "No runs yet")
