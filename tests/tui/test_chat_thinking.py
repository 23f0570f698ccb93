"""The Chat screen and a model that thinks: thoughts are folded, and thinking is turned on and off."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from textual.pilot import Pilot

from qlora_tui.chat.chat_types import ADAPTER, BASE, GenerationResult, Sampling, ThinkingSupport
from qlora_tui.data.thought_splitter import TextChunk
from qlora_tui.engine.protocol import ChatReady
from qlora_tui.recipe.schema import Recipe
from qlora_tui.tui.screens.chat.chat_turn import ChatTurn
from qlora_tui.tui.screens.chat.screen import ChatScreen
from qlora_tui.tui.screens.chat.transcript import append_exchange
from tests.tui.chat_screen import OUTCOME, chat_of, finished, with_adapters
from tests.tui.fake_runs import FakeRun, write_fake_run
from tests.tui.screen_assertions import wait_for_text, wait_until
from tests.tui.workstation import open_on

WHY = "I look at the ticket:\n\n1. It was sorted on Sunday.\n2. It left **Oslo** on Monday."
THOUGHT = msgspec.structs.replace(OUTCOME, thought=WHY, thought_tokens=340, thought_s=12.3)
CUT = msgspec.structs.replace(
    OUTCOME, text="", thought="Okay, the", thought_tokens=512, thought_s=20.1, thought_ended=False,
    ending="most tokens",
)  # fmt: skip
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
            screen.ready = ready(thinking)
            screen.show_header()
        yield pilot, screen


async def exchange(
    screen: ChatScreen, *pieces: TextChunk, outcome: GenerationResult | None = None
) -> ChatTurn:
    """A prompt, and what the adapter says to it."""
    turn = ChatTurn("Where is my parcel?", (ADAPTER,), unfolded=screen.unfolded)
    screen.turns.append(turn)
    await screen.query_one("#conversation").mount(turn)
    for piece in pieces:
        await turn.answers[ADAPTER].append_text(piece)
    if outcome is not None:
        await turn.answers[ADAPTER].end(outcome)
    return turn


async def test_thoughts_are_sent_back_beside_the_answers_they_led_to() -> None:
    async with chatting(SWITCH) as (_, screen):
        await exchange(screen, TextChunk(WHY, True, 340), TextChunk("On the road."), outcome=THOUGHT)
        following = ChatTurn("And now?", (ADAPTER,))
        screen.turns.append(following)
        prompt, answered, _ = screen._conversation(following, ADAPTER)
        assert (prompt.content, answered.content, answered.reasoning) == (
            "Where is my parcel?",
            THOUGHT.text,
            WHY,
        )


async def test_one_key_turns_thinking_off_and_on() -> None:
    async with chatting(SWITCH) as (pilot, screen):
        await wait_for_text(pilot, "thinking on")
        await pilot.press("ctrl+g")
        await wait_for_text(pilot, "thinking off")
        await pilot.press("escape", "t")
        await wait_for_text(pilot, "thinking on")
        assert screen.thinking == "on"


@pytest.mark.parametrize(
    ("thinking", "says", "then"),
    [
        (ThinkingSupport(kind="none"), "has no switch", "auto"),
        (ThinkingSupport(kind="always"), "always opens a thought", "auto"),
        (
            ThinkingSupport(kind="effort", variable="reasoning_effort", off="low", default="on"),
            "reasoning_effort = low",
            "off",
        ),
    ],
)
async def test_a_model_without_such_a_switch_says_so(thinking: ThinkingSupport, says: str, then: str) -> None:
    async with chatting(thinking) as (pilot, screen):
        await pilot.press("ctrl+g")
        await wait_until(pilot, lambda: any(says in note.message for note in pilot.app._notifications))
        assert screen.thinking == then


def test_thoughts_are_kept_in_the_transcript_apart_from_answers() -> None:
    run = finished(ADAPTER)
    path = append_exchange(run, "Where?", {ADAPTER: "There."}, Sampling(), thoughts={ADAPTER: "Hm."})
    assert "<details><summary>Thought</summary>\n\nHm.\n\n</details>\n\nThere." in path.read_text()
