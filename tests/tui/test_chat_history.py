"""Chat with a fake engine: loops, saved conversations, token counts, copies, earlier system prompts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import msgspec
import pytest
from textual.widgets import TextArea

from qlora_tui.chat.chat_types import ADAPTER, BASE
from qlora_tui.data.thought_splitter import TextChunk
from qlora_tui.engine.client import EngineClient
from qlora_tui.engine.protocol import ChatReady, CountTokens, Generate, GenerationDone, Text, TokensCounted
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.chat.chat_turn import ChatTurn
from qlora_tui.tui.screens.chat.saved_conversations import (
    SavedAnswer,
    SavedConversation,
    SavedTurn,
    list_conversations,
    new_conversation_path,
)
from qlora_tui.tui.screens.chat.screen import ChatScreen
from qlora_tui.tui.screens.chat.transcript import transcript_path
from qlora_tui.tui.ui_state import recent
from tests.tui.chat_screen import OUTCOME, chat_of, finished, rest
from tests.tui.screen_assertions import wait_for_text
from tests.tui.workstation import open_on


class FakeReplies(AsyncIterator[Any]):
    """Repeats a text until it is stopped."""

    def __init__(self, text: str, most: int) -> None:
        self._text = text
        self._left = most
        self._is_over = False
        self.written = ""
        self.stopped = False

    async def __anext__(self) -> Any:
        if self._is_over:
            raise StopAsyncIteration
        if self.stopped or not self._left:
            self._is_over = True
            ending: Any = "stopped" if self.stopped else "turn end"
            return GenerationDone(
                outcome=msgspec.structs.replace(OUTCOME, text=self.written, ending=ending, new_tokens=40)
            )
        self._left -= 1
        self.written += self._text
        return Text(chunk=TextChunk(self._text))

    def stop(self) -> None:
        self.stopped = True


class FakeEngine:
    """An engine whose adapter repeats itself and whose base does not."""

    pid = 1

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def ask(self, request: Any) -> Any:
        self.asked.append(request)
        if isinstance(request, CountTokens):
            return FakeCount(len(request.text.split()))
        assert isinstance(request, Generate)
        return (
            FakeReplies("The light turns. ", 500)
            if request.adapter_name == ADAPTER
            else FakeReplies("A calm day. ", 1)
        )

    async def close(self) -> None:
        self.asked.clear()


class FakeCount(AsyncIterator[Any]):
    def __init__(self, tokens: int) -> None:
        self._replies = [TokensCounted(tokens=tokens)]

    async def __anext__(self) -> Any:
        if not self._replies:
            raise StopAsyncIteration
        return self._replies.pop()


READY = ChatReady(
    adapter_names=(BASE, ADAPTER),
    device="a CPU",
    dtype="bfloat16",
    context_tokens=8192,
    seconds=1.0,
    memory_bytes=300 << 20,
)


def with_fake_engine(screen: ChatScreen) -> FakeEngine:
    """Replace the engine of a screen by one that has loaded a model."""
    engine = FakeEngine()
    screen.engine = cast(EngineClient, engine)
    screen.ready = READY
    return engine


async def test_search_shows_only_exchanges_with_the_text() -> None:
    run = finished(ADAPTER)
    said = (("Where is it?", "In Oslo."), ("And when?", "On Monday."), ("In oslo too?", "No."))
    path = new_conversation_path(run)
    path.parent.mkdir()
    turns = tuple(SavedTurn(prompt, {ADAPTER: SavedAnswer(answer)}) for prompt, answer in said)
    path.write_bytes(msgspec.json.encode(SavedConversation(at=0.0, turns=turns)))
    app = open_on("chat")
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, run.name)
        await pilot.press("escape", "h")
        await wait_for_text(pilot, "Saved conversations", "/ filter")
        await pilot.press("slash", *"nowhere")
        await wait_for_text(pilot, "No line matches")
        await pilot.press(*["backspace"] * 7, *"monday", "enter", "enter")
        await wait_for_text(pilot, "On Monday.", "In Oslo.")
        await pilot.press("escape", "slash")
        await wait_for_text(pilot, "Show only exchanges with this text")
        await pilot.press(*"oslo", "enter")
        shown = await wait_for_text(pilot, "/oslo in 2 of 3", "In Oslo.", "In oslo too?")
        assert "On Monday." not in shown
        await pilot.press("slash", *["backspace"] * 4, "enter")
        await wait_for_text(pilot, "On Monday.")


async def test_an_answer_that_repeats_itself_is_stopped_with_a_word() -> None:
    finished(ADAPTER)
    app = open_on("chat")
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "not loaded yet")
        screen = chat_of(app)
        with_fake_engine(screen)
        await pilot.press(*"Hello", "enter")
        await rest(pilot, screen)
        await wait_for_text(pilot, "A calm day.", "kept repeating", "[r]")
        answers = screen.turns[0].answers
        assert answers[ADAPTER].loop == "The light turns."
        assert answers[ADAPTER].text.count("The light turns.") == 3
        assert not answers[BASE].loop


async def test_a_saved_conversation_is_opened_and_continued() -> None:
    run = finished(ADAPTER)
    app = open_on("chat")
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "not loaded yet", "continues a saved conversation")
        screen = chat_of(app)
        engine = with_fake_engine(screen)
        await pilot.press(*"Hello", "enter")
        await rest(pilot, screen)
        await pilot.press("escape", "x", "h")
        await wait_for_text(pilot, "Saved conversations", "Hello")
        assert not screen.turns
        await pilot.press("enter")
        await wait_for_text(pilot, "▸ Hello", "base · saved", "A calm day.")
        await pilot.press(*"Again", "enter")
        await rest(pilot, screen)
        requests = [each for each in engine.asked if isinstance(each, Generate) and each.adapter_name == BASE]
        assert [message.content for message in requests[-1].messages] == ["Hello", "A calm day. ", "Again"]
        ((_, saved),) = list_conversations(run)
        assert [turn.prompt for turn in saved.turns] == ["Hello", "Again"]


def test_an_unreadable_conversation_is_left_out() -> None:
    run = finished(ADAPTER)
    folder = transcript_path(run).parent
    folder.mkdir()
    (folder / "20261123-021320.json").write_text('{"at": 1')
    assert list_conversations(run) == []


async def test_tokens_of_a_prompt_are_estimated_then_counted() -> None:
    finished(ADAPTER)
    app = open_on("chat")
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "not loaded yet")
        screen = chat_of(app)
        await pilot.press(*"one two three")
        await wait_for_text(pilot, "Message · about 3 tokens")
        with_fake_engine(screen)
        await pilot.press("space", *"four")
        await wait_for_text(pilot, "Message · 4 tokens")


@pytest.mark.parametrize(("key", "text"), [("y", "The light turns."), ("Y", "A calm day.")])
async def test_one_key_copies_the_last_answer(key: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(ADAPTER)
    copied: list[str] = []
    monkeypatch.setattr(QloraApp, "copy_to_clipboard", lambda app, text: copied.append(text))
    app = open_on("chat")
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await wait_for_text(pilot, "not loaded yet")
        screen = chat_of(app)
        with_fake_engine(screen)
        await pilot.press("escape", key)
        await wait_for_text(pilot, "There is no answer of")
        await pilot.press("i", *"Hello", "enter")
        await rest(pilot, screen)
        await pilot.press("escape", key)
        assert len(copied) == 1 and copied[0].startswith(text)


async def test_system_prompts_are_offered_again_in_another_session() -> None:
    finished(ADAPTER)
    for remembered in ("", "Be kind."):
        app = open_on("chat")
        async with app.run_test(size=(80, 24)) as pilot:
            await wait_for_text(pilot, "not loaded yet")
            await pilot.press("escape", "o")
            shown = await wait_for_text(pilot, "Sampling")
            assert ("Ctrl+R earlier prompt" in shown) == bool(remembered)
            await pilot.press("ctrl+r")
            field = app.screen.query_one(TextArea)
            assert field.text == remembered
            field.text = remembered or "Be kind."
            await pilot.press("enter")
            await wait_for_text(pilot, "system: Be ki")
    assert recent("system_prompts") == ("Be kind.",)


def saved_turn(prompt: str) -> ChatTurn:
    turn = ChatTurn(prompt, (ADAPTER,))
    turn.answers[ADAPTER].text = "Yes."
    return turn
