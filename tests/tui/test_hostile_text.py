"""In the app too the terminal obeys only this program, whatever rows, models, runs and answers hold."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rich.segment import Segment
from rich.style import Style
from textual.color import Color

from bench.terminal import Terminal
from qlora_tui.chat.chat_types import BASE
from qlora_tui.data.thought_splitter import TextChunk
from qlora_tui.recipe.fields import replace_setting
from qlora_tui.recipe.schema import Source
from qlora_tui.runs.status import State
from qlora_tui.tui.draft import Draft
from qlora_tui.tui.line_filters import VisibleTextFilter
from qlora_tui.tui.screens.chat.turn import ChatTurn
from qlora_tui.tui.workbench import Workbench
from tests.support.hostile import FOR_FILE_NAMES, POISON, poison_run, poisoned, raw
from tests.tui.fake_runs import FakeRun, write_fake_run
from tests.tui.sample_data import readable_model, ticket, write_rows
from tests.tui.screen_assertions import text_of, wait_for_text
from tests.tui.terminal_emulator import see
from tests.tui.workstation import open_on

CONTINUATION_BYTES = bytes(range(0x80, 0xC0))
"""All but the first of a character in UTF-8."""


def _shown(*texts: str) -> str:
    """A line of these segments after the text layer."""
    line = [Segment(text) for text in texts]
    return "|".join(segment.text for segment in VisibleTextFilter().apply(line, Color(0, 0, 0)))


def test_a_sanitized_line_keeps_its_width_and_alignment() -> None:
    assert _shown("a\x1b[2Jb      ", "│") == "a␛[2Jb     |│"
    assert _shown("\x1b\x1b\x1b", "a  ", "   ") == "␛␛␛|a | "
    assert _shown("full\x1b") == "full"
    assert _shown("tab\there    ") == "tab here   "


def test_a_line_without_control_characters_is_unchanged() -> None:
    line = [Segment("ok ▁▂ é", Style(bold=True))]
    assert VisibleTextFilter().apply(line, Color(0, 0, 0)) is line


def test_a_link_of_others_is_not_sent() -> None:
    (segment,) = VisibleTextFilter().apply([Segment("x", Style(link="http://e\x1b\\"))], Color(0, 0, 0))
    assert "\x1b" not in (segment.style.link or "" if segment.style else "")


async def test_an_answer_in_the_chat_is_painted_with_symbols() -> None:
    app = open_on("chat")
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "Nothing to chat with")
        turn = ChatTurn("Hi" + POISON, (BASE,))
        await app.screen.query_one("#conversation").mount(turn)
        turn.answers[BASE].display = True
        await turn.answers[BASE].append_text(
            TextChunk(f"{POISON}\n\n`code{POISON}`\n\n[link{POISON}](http://x{POISON})")
        )
        await wait_for_text(pilot, "␛]52;c;", "code␛]52")
        assert not raw(text_of(app))


@pytest.mark.slow
def test_nothing_foreign_leaves_the_app_raw_on_any_screen(private_home: Path) -> None:
    model = Path(readable_model(private_home))
    hostile_model = model.rename(model.parent / f"model{FOR_FILE_NAMES}")
    hub = private_home / "huggingface" / "hub" / f"models--org--tiny{FOR_FILE_NAMES}" / "snapshots" / "0"
    hub.mkdir(parents=True)
    chats = [ticket(number)["messages"] for number in (1, 2, 3)]
    rows = write_rows(
        private_home / f"rows{FOR_FILE_NAMES}.jsonl",
        [{"messages": [{**turn, "content": poisoned(turn["content"])} for turn in chat]} for chat in chats]
        + [poisoned(ticket(4))],
    )
    workbench = Workbench()
    workbench.replace(replace_setting(workbench.recipe, "model.id", str(hostile_model)))
    workbench.replace(replace_setting(workbench.recipe, "data.sources", (Source(path=str(rows)),)))
    Draft().save(workbench, replace=True)
    states: tuple[State, ...] = ("finished", "failed", "running")
    for state in states:
        poison_run(
            write_fake_run(
                FakeRun(name=f"run-{state}", state=state, steps=40, total=40, nan={3}, health=True)
            )
        )
    size = (160, 50)
    with Terminal([sys.executable, "-m", "qlora_tui"], columns=size[0], rows=size[1]) as terminal:
        see(terminal, "Next", "␛]52;c;", size=size)
        for key, text in [
            ("2", "␛]52;c;"),
            ("1", "On this machine"),
            ("3", "base weights"),
            ("4", "Target modules"),
            ("6", "␛]52;c;"),
            ("\r", "␛"),
            ("7", "to chat with"),
            ("?", "Esc close"),
            ("q", "to chat with"),
            ("0", "Next run"),
        ]:
            before = len(terminal.painted)
            terminal.press(key)
            see(terminal, text, size=size)
            terminal.watch(0.3)
            # It may begin inside a character.
            since = bytes(terminal.painted[before:]).lstrip(CONTINUATION_BYTES)
            assert not raw(since), key
        terminal.press("q")
        while terminal.program.poll() is None or terminal.read(0):
            terminal.read(0.1)
        assert not raw(bytes(terminal.painted).replace(b"\r\n", b"\n"))
