"""Keys of the chat that judge answers, and the run they prepare."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace
from textual.pilot import Pilot

from qlora_tui.chat.chat_types import ADAPTER, BASE
from qlora_tui.runs import chat_choices
from qlora_tui.runs.chat_choices import ChoiceKind, choices_path
from qlora_tui.tui.screens.chat.answer_editor import AnswerArea
from qlora_tui.tui.screens.chat.chat_turn import ChatTurn
from qlora_tui.tui.screens.chat.screen import ChatScreen
from qlora_tui.tui.screens.train.screen import TrainScreen
from tests.tui.chat_screen import OUTCOME, chat_of, finished
from tests.tui.screen_assertions import wait_for_text, wait_until
from tests.tui.workstation import open_on

BASE_MODEL = "Qwen/Qwen2.5-7B-Instruct"


def rows(kind: ChoiceKind) -> list[dict[str, Any]]:
    return [json.loads(line) for line in choices_path(BASE_MODEL, kind).read_text().splitlines()]


async def answered(pilot: Pilot[Any], screen: ChatScreen, base: str, adapter: str) -> ChatTurn:
    """A turn in which base and adapter have answered, out of the prompt field."""
    turn = ChatTurn("Where is my parcel?", (BASE, ADAPTER))
    screen.turns.append(turn)
    await screen.query_one("#conversation").mount(turn)
    for name, text in ((BASE, base), (ADAPTER, adapter)):
        await turn.answers[name].end(replace(OUTCOME, text=text))
    await pilot.press("escape")
    return turn


async def test_a_key_says_which_answer_is_better() -> None:
    run = finished(ADAPTER)
    app = open_on("chat")
    async with app.run_test(size=(100, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "not loaded yet")
        await answered(pilot, chat_of(app), "It is late.", "In Oslo.")
        await pilot.press("greater_than_sign")
        await wait_for_text(pilot, "The answer of adapter is better: 1 choice, of 20", "adapter · ✓ better")
        await pilot.press("less_than_sign")
        await wait_for_text(pilot, "base · ✓ better")
        (row,) = rows("pairs")
        assert row["prompt"] == [{"role": "user", "content": "Where is my parcel?"}]
        assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("It is late.", "In Oslo.")
        assert row["provenance"]["answers"] == {"chosen": "base", "rejected": "adapter"}
        assert row["provenance"]["run"] == run.id and row["provenance"]["sampling"]["temperature"] == 0.7
        await answered(pilot, chat_of(app), "The same.", "The same.")
        await pilot.press("greater_than_sign")
        await wait_for_text(pilot, "Both answers are the same")
        assert len(rows("pairs")) == 1


async def test_an_answer_cut_off_is_not_recorded_as_better() -> None:
    finished(ADAPTER)
    app = open_on("chat")
    async with app.run_test(size=(100, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "not loaded yet")
        turn = await answered(pilot, chat_of(app), "It is late.", "In Oslo, which")
        await turn.answers[ADAPTER].end(replace(OUTCOME, text="In Oslo, which", ending="most tokens"))
        await pilot.press("greater_than_sign")
        await wait_for_text(pilot, "The better answer was cut off")
        assert not choices_path(BASE_MODEL, "pairs").exists()
        await pilot.press("less_than_sign")
        await wait_for_text(pilot, "base · ✓ better")
        assert len(rows("pairs")) == 1


async def test_an_answer_is_edited_over_several_lines() -> None:
    finished(ADAPTER)
    app = open_on("chat")
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await wait_for_text(pilot, "not loaded yet")
        await answered(pilot, chat_of(app), "It is late.", "In Oslo.")
        await pilot.press("E")
        await wait_until(pilot, lambda: isinstance(app.focused, AnswerArea))
        await pilot.press("enter", *"Ask.", "ctrl+s")
        await wait_for_text(pilot, "The edited answer is kept: 1 edit, of 20")
        (row,) = rows("edits")
        assert row["completion"][0]["content"] == "In Oslo.\nAsk."
        assert row["provenance"]["original"] == "In Oslo."
        await pilot.press("E")
        await wait_until(pilot, lambda: isinstance(app.focused, AnswerArea))
        await pilot.press("escape")
        assert len(rows("edits")) == 1


async def test_twenty_choices_become_a_run_from_the_same_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(ADAPTER)
    app = open_on("chat")
    async with app.run_test(size=(100, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "not loaded yet")
        await pilot.press("escape", "C")
        await wait_for_text(pilot, "0 choices, 0 edits so far; 20 of a kind are enough")
        monkeypatch.setattr("qlora_tui.tui.screens.chat.choice_actions.ENOUGH", 1)
        await answered(pilot, chat_of(app), "It is late.", "In Oslo.")
        await pilot.press("greater_than_sign")
        await wait_for_text(pilot, "1 choice. Press [C] to train on them.")
        await pilot.press("C")
        await wait_until(pilot, lambda: isinstance(app.screen, TrainScreen))
        recipe = app.workbench.recipe
        assert recipe.lora.init_from == run.id
        assert [source.path for source in recipe.data.sources] == [
            str(chat_choices.choices_path(BASE_MODEL, "pairs"))
        ]
