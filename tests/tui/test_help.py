"""Help shows the keys that do something now, and the words of the state in front."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.commands import SCREENS, by_group, screen_commands
from qlora_tui.tui.screens.modals import help as help_module
from qlora_tui.tui.widgets.controls import ViScroll
from tests.tui.fake_runs import FakeRun, write_fake_run
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until

WORDS: dict[str, Any] = tomllib.loads(Path(help_module.__file__).with_suffix(".toml").read_text("utf-8"))


@pytest.mark.slow
async def test_help_follows_the_state_of_the_run_and_needs_no_scrolling_at_120_by_40() -> None:
    app = QloraApp()
    async with app.run_test(size=(120, 40)) as pilot:
        await pilot.press("5", "question_mark")
        before = await wait_for_text(pilot, "Launch a run with this recipe", "Enter edits")
        assert "Save a checkpoint now" not in before and "validation loss" not in before.casefold()
        await pilot.press("escape")
        write_fake_run(FakeRun(name="tickets", steps=50))
        await wait_for_text(pilot, "step 50 of 3,000")
        await pilot.press("question_mark")
        running = await wait_for_text(
            pilot, "Help: Train, while a run trains", "Save a checkpoint now", "Validation loss"
        )
        assert "Launch a run" not in running
        for key in "01234567":
            await pilot.press("escape", key)
            await wait_until(pilot, lambda: len(app.screen_stack) == 1)
            await pilot.press("question_mark")
            await wait_for_text(pilot, "Help: ", "Everywhere")
            assert app.screen.query_one(ViScroll).max_scroll_y == 0, text_of(app)
            await wait_until(pilot, lambda: "↓ more" not in text_of(app))
            await pilot.press("escape")
        await pilot.resize_terminal(80, 24)
        for key in "01234567":
            await pilot.press("escape", key)
            await wait_until(pilot, lambda: len(app.screen_stack) == 1)
            await pilot.press("question_mark")
            await wait_until(
                pilot, lambda: app.screen.query(ViScroll) and app.screen.query_one(ViScroll).size.height == 20
            )
            shown = text_of(app)
            *_, last = (line.strip("│ ") for line in shown.splitlines()[:22] if line.strip("│ "))
            assert last.endswith(".") or "  " in last, f"{last} is a heading: {shown}"
        await pilot.press("escape", "5", "question_mark")
        await wait_for_text(pilot, "Help: Train", "↓ more")
        await pilot.press("G")
        shown = await wait_for_text(pilot, "Everywhere", "quit")
        assert "↓ more" not in shown
        await pilot.resize_terminal(80, 4)
        await wait_for_text(pilot, "too small")


def test_each_command_of_a_screen_with_groups_has_one() -> None:
    for entry in SCREENS:
        groups = [group for group, _ in by_group(screen_commands(entry.name))]
        assert "" not in groups or groups == [""], entry.name


def sentences_of(words: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each word with its sentence, in every state."""
    for word, sentence in words.items():
        if isinstance(sentence, dict):
            yield from sentences_of(sentence)
        else:
            yield word, sentence


@pytest.mark.parametrize("screen", WORDS)
def test_each_word_has_one_short_sentence(screen: str) -> None:
    assert screen in {each.name for each in SCREENS}
    for word, sentence in sentences_of(WORDS[screen]):
        assert sentence.endswith(".") and ". " not in sentence and len(sentence) < 100, word
