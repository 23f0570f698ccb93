"""Chat with an engine that is not there: saved conversations, thoughts, choices between answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec
import pytest
from msgspec.structs import replace
from textual import events
from textual.pilot import Pilot

from qlora_tui.chat.chat_types import ADAPTER, BASE, GenerationResult, Sampling, ThinkingSupport
from qlora_tui.data.thought_splitter import TextChunk
from qlora_tui.engine.client import EngineClient
from qlora_tui.engine.protocol import ChatReady, CountTokens, Generate, LoadChat
from qlora_tui.recipe.schema import Recipe
from qlora_tui.runs import chat_choices
from qlora_tui.runs.chat_choices import ChoiceKind, choices_path
from qlora_tui.tui.app import QloraApp
from qlora_tui.tui.screens.chat.prompt_box import PromptBox
from qlora_tui.tui.screens.chat.saved import (
    SavedAnswer,
    SavedConversation,
    SavedTurn,
    append_exchange,
    list_conversations,
    new_conversation_path,
    transcript_path,
)
from qlora_tui.tui.screens.chat.screen import ChatScreen
from qlora_tui.tui.screens.chat.turn import ChatTurn
from qlora_tui.tui.screens.train.screen import TrainScreen
from tests.tui.chat_screen import OUTCOME, chat_of, finished, rest, with_adapters
from tests.tui.fake_runs import BEGAN, FakeRun, write_fake_run
from tests.tui.screen_assertions import wait_for_text, wait_until
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
            return msgspec.structs.replace(OUTCOME, text=self.written, ending=ending, new_tokens=40)
        self._left -= 1
        self.written += self._text
        return TextChunk(self._text)

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

    async def kill(self) -> None:
        pass


class FakeCount:
    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    async def result(self) -> int:
        return self._tokens


class HeldReplies(FakeReplies):
    """One reply, which arrives once ``gate`` is set or the request is stopped."""

    def __init__(self, gate: asyncio.Event, reply: object) -> None:
        super().__init__("", 1)
        self._gate = gate
        self._reply = reply

    async def __anext__(self) -> Any:
        if self._is_over:
            raise StopAsyncIteration
        await self._gate.wait()
        self._is_over = True
        return self._reply

    def stop(self) -> None:
        self._gate.set()


class HeldEngine(FakeEngine):
    """An engine that replies once ``gate`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.closed = False

    def ask(self, request: Any) -> Any:
        if isinstance(request, CountTokens):
            return super().ask(request)
        self.asked.append(request)
        return HeldReplies(self.gate, READY if isinstance(request, LoadChat) else OUTCOME)

    async def close(self) -> None:
        self.closed = True


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
    screen.conversation.engine = cast(EngineClient, engine)
    screen.conversation.ready = READY
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
        await wait_for_text(pilot, "Show only exchanges that contain this text")
        await pilot.press(*"oslo", "enter")
        shown = await wait_for_text(pilot, "/oslo in 2 of 3", "In Oslo.", "In oslo too?")
        assert "On Monday." not in shown
        await pilot.press("slash", *["backspace"] * 4, "enter")
        await wait_for_text(pilot, "On Monday.")


async def test_a_saved_conversation_is_opened_and_continued() -> None:
    run = finished(ADAPTER)
    app = open_on("chat")
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "not loaded yet", "Enter asks the selected message")
        screen = chat_of(app)
        engine = with_fake_engine(screen)
        await pilot.press("i", *"Hello", "enter")
        await rest(pilot, screen)
        await pilot.press("escape", "n", "h")
        await wait_for_text(pilot, "Saved conversations", "Hello")
        assert not screen.conversation.turns
        await pilot.press("enter")
        await wait_for_text(pilot, "❯ Hello", "base · saved", "A calm day.")
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


async def test_tokens_of_a_prompt_are_estimated_and_counted_once_the_model_is_loaded() -> None:
    async with chatting() as (pilot, screen):
        engine = with_fake_engine(screen)
        await pilot.press("i", *"one two three")
        screen.conversation.ready = None
        await wait_for_text(pilot, "Message · about 3 tokens")
        assert not engine.asked
        screen.conversation.ready = READY
        await pilot.press("space", *"four")
        await wait_for_text(pilot, "Message · 4 tokens")


async def test_an_answer_that_repeats_itself_is_stopped_and_a_key_each_copies_the_last_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finished(ADAPTER)
    copied: list[str] = []
    monkeypatch.setattr(QloraApp, "copy_to_clipboard", lambda app, text: copied.append(text))
    app = open_on("chat")
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await wait_for_text(pilot, "not loaded yet")
        screen = chat_of(app)
        with_fake_engine(screen)
        await pilot.press("escape", "y", "Y")
        await wait_for_text(pilot, "has no answer to copy yet")
        assert not copied
        app.clear_notifications()
        await pilot.press("i", *"Hello", "enter")
        await rest(pilot, screen)
        await wait_for_text(pilot, "A calm day.", "kept repeating", "[r]")
        answers = screen.conversation.turns[0].answers
        assert answers[ADAPTER].loop == "The light turns."
        assert answers[ADAPTER].text.count("The light turns.") == 3
        assert not answers[BASE].loop
        await pilot.press("escape", "y", "Y")
        assert [text.partition(".")[0] for text in copied] == ["The light turns", "A calm day"]


WHY = "I look at the ticket:\n\n1. It was sorted on Sunday.\n2. It left **Oslo** on Monday."
THOUGHT = msgspec.structs.replace(OUTCOME, thought=WHY, thought_tokens=340, thought_s=12.3)
SWITCH = ThinkingSupport(kind="switch", variable="enable_thinking", default="on")


def ready(thinking: ThinkingSupport) -> ChatReady:
    """A model that is loaded."""
    return ChatReady(
        adapter_names=(BASE, ADAPTER),
        device="NVIDIA GeForce RTX 4090",
        dtype="bfloat16",
        context_tokens=32768,
        seconds=1.0,
        memory_bytes=5 << 30,
        thinking=thinking,
    )


@asynccontextmanager
async def chatting(
    thinking: ThinkingSupport | None = None, recipe: Recipe | None = None
) -> AsyncIterator[tuple[Pilot[Any], ChatScreen]]:
    """The chat on a finished run, its model loaded if ``thinking`` says what it makes of that."""
    if recipe is None:
        finished(ADAPTER)
    else:
        with_adapters(
            write_fake_run(FakeRun(name="set", state="finished", steps=9, total=9, recipe=recipe)), ADAPTER
        )
    app = open_on("chat")
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "not loaded yet")
        screen = chat_of(app)
        if thinking is not None:
            screen.conversation.ready = ready(thinking)
            screen.show_header()
        yield pilot, screen


async def exchange(
    screen: ChatScreen, *pieces: TextChunk, outcome: GenerationResult | None = None
) -> ChatTurn:
    """A prompt, and what the adapter says to it."""
    turn = ChatTurn("Where is my parcel?", (ADAPTER,), unfolded=screen.conversation.unfolded)
    screen.conversation.turns.append(turn)
    await screen.query_one("#conversation").mount(turn)
    for piece in pieces:
        await turn.answers[ADAPTER].append_text(piece)
    if outcome is not None:
        await turn.answers[ADAPTER].end(outcome)
    return turn


async def test_a_prompt_typed_while_the_first_is_taken_stays_in_the_field() -> None:
    async with chatting(SWITCH) as (pilot, screen):
        engine = screen.conversation.engine = cast(Any, HeldEngine())
        await pilot.press("i")
        # As when both are read from the terminal at once.
        for key, character in (("a", "a"), ("enter", "\r"), ("b", "b"), ("enter", "\r")):
            pilot.app.post_message(events.Key(key, character))
        field = screen.query_one(PromptBox)
        await wait_until(pilot, lambda: len(engine.asked) >= 2 and field.text == "b")
        await pilot.pause()
        assert [turn.prompt for turn in screen.conversation.turns] == ["a"]
        assert field.text == "b"
        assert [request.adapter_name for request in engine.asked] == [BASE, ADAPTER]


@pytest.mark.parametrize("thinking", [None, SWITCH], ids=["loading", "answering"])
async def test_a_new_conversation_ends_what_is_under_way(thinking: ThinkingSupport | None) -> None:
    async with chatting(thinking) as (pilot, screen):
        engine = screen.conversation.engine = cast(Any, HeldEngine())
        await pilot.press("i", *"Hello", "enter")
        await wait_until(pilot, lambda: engine.asked and screen.conversation.turns)
        asked = list(engine.asked)
        await screen.action_clear()
        engine.gate.set()
        await pilot.pause()
        assert not screen.conversation.turns and not screen.conversation.busy
        # A model that is loading holds memory that nobody would give back.
        assert engine.asked == asked and engine.closed == (thinking is None)
        await pilot.press(*"Again", "enter")
        await rest(pilot, screen)
        assert [answer.text for answer in screen.conversation.turns[0].answers.values()] == [OUTCOME.text] * 2


async def test_a_run_chosen_while_another_loads_is_loaded_itself() -> None:
    loading = write_fake_run(FakeRun(name="loading", state="finished", steps=9, total=9, began=BEGAN - 999))
    with_adapters(loading, ADAPTER)
    async with chatting() as (pilot, screen):
        chosen = screen.conversation.run_dir
        assert chosen is not None
        await screen.chat_with(loading)
        engine = screen.conversation.engine = cast(Any, HeldEngine())
        await pilot.press(*"Hello", "enter")
        await wait_until(pilot, lambda: engine.asked)
        await screen.chat_with(chosen)
        engine.gate.set()
        await pilot.pause()
        await pilot.press(*"Hi", "enter")
        await rest(pilot, screen)
        loaded = [request.source.adapters for request in engine.asked if isinstance(request, LoadChat)]
        assert [str(run.adapter_dir) for run in (loading, chosen)] == [
            str(adapters[ADAPTER]) for adapters in loaded
        ]


async def test_thoughts_are_sent_back_beside_the_answers_they_led_to() -> None:
    async with chatting(SWITCH) as (_, screen):
        await exchange(screen, TextChunk(WHY, True, 340), TextChunk("On the road."), outcome=THOUGHT)
        following = ChatTurn("And now?", (ADAPTER,))
        screen.conversation.turns.append(following)
        prompt, answered, _ = screen.conversation.messages(following, ADAPTER)
        assert (prompt.content, answered.content, answered.reasoning) == (
            "Where is my parcel?",
            THOUGHT.text,
            WHY,
        )


NO_SWITCH = (
    (ThinkingSupport(kind="none"), "has no switch", "auto"),
    (ThinkingSupport(kind="always"), "always opens a thinking block", "auto"),
    (
        ThinkingSupport(kind="effort", variable="reasoning_effort", off="low", default="on"),
        "reasoning_effort = low",
        "off",
    ),
)
"""What a model makes of thinking, what the key says of that, and the setting afterwards."""


async def test_one_key_turns_thinking_off_and_on_or_says_that_the_model_has_no_such_switch() -> None:
    async with chatting(SWITCH) as (pilot, screen):
        await wait_for_text(pilot, "thinking on")
        await pilot.press("ctrl+g")
        await wait_for_text(pilot, "thinking off")
        await pilot.press("escape", "t")
        await wait_for_text(pilot, "thinking on")
        assert screen.conversation.thinking == "on"
        for thinking, says, then in NO_SWITCH:
            screen.conversation.thinking = "auto"
            screen.conversation.ready = ready(thinking)
            await pilot.press("ctrl+g")
            await wait_until(pilot, lambda: any(says in note.message for note in pilot.app._notifications))  # noqa: B023
            assert screen.conversation.thinking == then


def test_thoughts_are_kept_in_the_transcript_apart_from_answers() -> None:
    run = finished(ADAPTER)
    path = append_exchange(run, "Where?", {ADAPTER: "There."}, Sampling(), thoughts={ADAPTER: "Hm."})
    assert "<details><summary>Thought</summary>\n\nHm.\n\n</details>\n\nThere." in path.read_text()


BASE_MODEL = "Qwen/Qwen2.5-7B-Instruct"


def rows(kind: ChoiceKind) -> list[dict[str, Any]]:
    return [json.loads(line) for line in choices_path(BASE_MODEL, kind).read_text().splitlines()]


async def answered(pilot: Pilot[Any], screen: ChatScreen, base: str, adapter: str) -> ChatTurn:
    """A turn in which base and adapter have answered, out of the prompt field."""
    turn = ChatTurn("Where is my parcel?", (BASE, ADAPTER))
    screen.conversation.turns.append(turn)
    await screen.query_one("#conversation").mount(turn)
    for name, text in ((BASE, base), (ADAPTER, adapter)):
        await turn.answers[name].end(replace(OUTCOME, text=text))
    await pilot.press("escape")
    return turn


async def test_a_key_says_which_answer_is_better_unless_it_was_cut_off() -> None:
    run = finished(ADAPTER)
    app = open_on("chat")
    async with app.run_test(size=(100, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "not loaded yet")
        turn = await answered(pilot, chat_of(app), "It is late.", "In Oslo, which")
        await turn.answers[ADAPTER].end(replace(OUTCOME, text="In Oslo, which", ending="most tokens"))
        await pilot.press("greater_than_sign")
        await wait_for_text(pilot, "The better answer was cut off")
        assert not choices_path(BASE_MODEL, "pairs").exists()
        await turn.answers[ADAPTER].end(replace(OUTCOME, text="In Oslo."))
        await pilot.press("greater_than_sign")
        await wait_for_text(pilot, "Saved: adapter is better (1 of the 20 needed", "adapter · ✓ better")
        await wait_for_text(pilot, "1 of 20 choices")
        await turn.answers[ADAPTER].end(replace(OUTCOME, text="In Oslo.", ending="most tokens"))
        await pilot.press("less_than_sign")
        await wait_for_text(pilot, "base · ✓ better")
        (row,) = rows("pairs")
        assert row["prompt"] == [{"role": "user", "content": "Where is my parcel?"}]
        assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("It is late.", "In Oslo.")
        assert row["provenance"]["answers"] == {"chosen": "base", "rejected": "adapter"}
        assert row["provenance"]["run"] == run.id and row["provenance"]["sampling"]["temperature"] == 0.7
        await answered(pilot, chat_of(app), "The same.", "The same.")
        await pilot.press("greater_than_sign")
        await wait_for_text(pilot, "The answers are identical")
        assert len(rows("pairs")) == 1


async def test_twenty_choices_become_a_run_from_the_same_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished(ADAPTER)
    app = open_on("chat")
    async with app.run_test(size=(100, 40), notifications=True) as pilot:
        await wait_for_text(pilot, "not loaded yet")
        await pilot.press("escape", "C")
        await wait_for_text(pilot, "0 choices, 0 edits so far; training needs 20 choices or 20 edits")
        monkeypatch.setattr("qlora_tui.tui.screens.chat.screen.ENOUGH", 1)
        await answered(pilot, chat_of(app), "It is late.", "In Oslo.")
        await pilot.press("greater_than_sign")
        await wait_for_text(pilot, "Press [C] to train on 1 choice.")
        await pilot.press("C")
        await wait_until(pilot, lambda: isinstance(app.screen, TrainScreen))
        recipe = app.workbench.recipe
        assert recipe.lora.init_from == run.id
        assert [source.path for source in recipe.data.sources] == [
            str(chat_choices.choices_path(BASE_MODEL, "pairs"))
        ]
