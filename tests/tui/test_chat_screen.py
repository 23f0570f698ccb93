"""The Chat screen: whom it offers, and real answers of a tiny model through a real engine."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from qlora_tui.catalog.config_parser import parse_architecture
from qlora_tui.chat.chat_types import ADAPTER, BASE, ChatSource, Sampling
from qlora_tui.engine.client import EngineClosedError
from qlora_tui.engine.protocol import ChatReady
from qlora_tui.recipe.schema import Data, Model, Recipe, Source
from qlora_tui.recipe.training_settings import Training
from qlora_tui.runs.chat_choices import ChoiceKind
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.status import read_status, write_status
from qlora_tui.runs.task_metrics.answer_metrics import TaskRow
from qlora_tui.runs.task_metrics.task_evaluation import (
    LossChange,
    TaskEvaluation,
    adapter_hash,
    write_task_evaluation,
)
from qlora_tui.tui.screens.chat import conversation, turn
from qlora_tui.tui.screens.chat.conversation import AdapterPair, Conversation
from qlora_tui.tui.screens.chat.prompt_box import PromptBox
from qlora_tui.tui.screens.chat.recorded_answers import RecordedAnswers, recorded_lines
from qlora_tui.tui.screens.chat.saved import append_exchange, transcript_path
from qlora_tui.tui.screens.chat.screen import ChatScreen, show_chat
from qlora_tui.tui.screens.chat.start import (
    HEADING_ROWS,
    Starters,
)
from qlora_tui.tui.screens.chat.turn import GROWTH_ROWS, ChatTurn
from qlora_tui.worker import run_job
from tests.chat.adapters import MODEL_WITH_ADAPTER
from tests.support.deciders import put_decider
from tests.support.nvml_stub import install_nvml_stub, install_torch
from tests.support.trainer_processes import Trainers
from tests.tui.chat_screen import chat_of, finished, rest, with_adapters
from tests.tui.fake_runs import BEGAN, FakeRun, write_fake_run
from tests.tui.sample_data import tickets
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until
from tests.tui.workstation import config_folder, config_of, open_on


def ask_prompt(screen: ChatScreen) -> list[str]:
    return list(screen.conversation.pair.active)


def test_pairs_of_adapters_switch_and_change() -> None:
    pair = AdapterPair.of((BASE, ADAPTER, "step-20", "step-10"), ADAPTER)
    assert pair.active == (BASE, ADAPTER)
    assert pair.next_answers().active == (ADAPTER,)
    assert pair.next_answers().next_answers().active == (BASE,)
    assert pair.next_answers().next_answers().next_answers() == pair
    assert AdapterPair.of((BASE,)).next_answers().active == (BASE,)
    assert pair.next("right").active == (BASE, "step-20")
    assert pair.next("left").active == ("step-20", ADAPTER)
    assert pair.next("left").next("right").active == ("step-20", "step-10")


def test_the_transcript_has_the_answers_and_the_sampling(set_clock: Callable[[float], None]) -> None:
    run = finished(ADAPTER)
    sampling = Sampling(seed=2_400_670_123, temperature=0)
    path = append_exchange(run, "Where?\nNow.", {BASE: "Here.", ADAPTER: "There."}, sampling, "Be kind.")
    assert path == transcript_path(run) == run.path / "chats" / "20261123.md"
    text = path.read_text()
    answers = ("**base**\n\nHere.", "**adapter**\n\nThere.")
    for part in ("> Where?\n> Now.", *answers, "seed 2400670123", "Be kind."):
        assert part in text
    assert append_exchange(None, "?", {BASE: "!"}, sampling).parent.parent.name == "qlora-tui"


async def test_a_runs_adapters_are_shown_and_selected_by_key() -> None:
    finished(ADAPTER, "step-800", "step-640", "step-400")
    app = open_on("chat")
    async with app.run_test(size=(80, 24)) as pilot:
        # The first adapter has the weights that Export proposes.
        at_first = ("● base  ● step 640 (best)  not loaded yet", "weights  step 640 (best)")
        text = await wait_for_text(pilot, *at_first, "a Answers: both  m Model", "[i] Type a message")
        assert "esc" not in text.splitlines()[-1]
        screen = chat_of(app)
        assert not isinstance(screen.focused, PromptBox), "digits go to other screens"
        assert ask_prompt(screen) == [BASE, "step-640"]
        await pilot.press("ctrl+t")
        assert ask_prompt(screen) == ["step-640"]
        await wait_for_text(pilot, "○ base  ● step 640 (best)", "a Answers: step 640")
        await pilot.press("v", "v", "a", "a")
        assert ask_prompt(screen) == [BASE, ADAPTER]
        await wait_for_text(pilot, "● base  ● adapter", "weights  step 1,200 (last)")
        await pilot.press("V")
        assert ask_prompt(screen) == ["step-800", ADAPTER]


async def test_another_run_or_the_bare_model_can_be_chosen() -> None:
    with_adapters(write_fake_run(FakeRun(name="older-run", state="stopped", steps=9)), "step-9")
    finished(ADAPTER)
    app = open_on("chat", model="org/some-model")
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "not loaded yet")
        await pilot.press("escape", "m")
        await wait_for_text(
            pilot, "older-run", "stopped at step 9", "1 checkpoint", "some-model", "without an adapter"
        )
        await pilot.press("G", "enter")
        await wait_for_text(pilot, "some-model")
        assert chat_of(app).conversation.pair.active == (BASE,)


async def test_a_deleted_run_gives_way_to_the_next_or_none() -> None:
    older = with_adapters(
        write_fake_run(FakeRun(name="older-run", state="stopped", steps=9, began=BEGAN - 999)), "step-9"
    )
    newest = finished(ADAPTER)
    app = open_on("chat")
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await wait_for_text(pilot, newest.id, "not loaded yet")
        for run, then in ((newest, ("older-run", "step 9")), (older, ("Nothing to chat with yet.",))):
            await pilot.press("6")
            shutil.rmtree(run.path)
            await pilot.press("7")
            await wait_for_text(pilot, f"{run.id} was deleted.", *then)


def test_chatting_with_a_deleted_run_creates_no_folder() -> None:
    run = finished(ADAPTER)
    shutil.rmtree(run.path)
    assert append_exchange(run, "Hello?", {BASE: "Hello."}, Sampling()).exists()
    assert not run.path.exists()


async def test_settings_are_checked_before_they_are_taken() -> None:
    finished(ADAPTER)
    app = open_on("chat")
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "temp 0.7", "≤ 512 tokens")
        await pilot.press("escape", "o")
        await wait_for_text(pilot, "Sampling", "0: only the most likely token")
        field = app.screen.query_one(Input)
        field.value = "9"
        await pilot.press("enter")
        await wait_for_text(pilot, "temperature: expected")
        field.value = "hot"
        await pilot.press("enter")
        await wait_for_text(pilot, "temperature must be a number.")
        field.value = "0"
        await pilot.press("enter")
        await wait_for_text(pilot, "greedy")
        assert chat_of(app).conversation.sampling.temperature == 0
        await pilot.press("o")
        await wait_for_text(pilot, "Sampling")
        list(app.screen.query(Input))[-1].value = "2400670123"
        await pilot.press("enter")
        await wait_for_text(pilot, "seed 2400670123")
        await pilot.press("o", "enter")
        await wait_for_text(pilot, "seed 2400670123")


def busy_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RunDir, bool]]:
    """Runs, each in one phase with or without memory for a chat beside it: the run, and whether both fit."""
    files = SimpleNamespace(architecture=parse_architecture(config_of("HuggingFaceTB__SmolLM2-135M")))
    monkeypatch.setattr("qlora_tui.catalog.local_models.resolve_model", lambda model_id: files)
    for phase, free_gib in (("training", 16), ("training", 1), ("loading", 16), ("loading", 1)):
        free = SimpleNamespace(available=free_gib << 30)
        monkeypatch.setattr(conversation, "psutil", SimpleNamespace(virtual_memory=lambda f=free: f))
        run = write_fake_run(FakeRun(name=f"{phase}-with-{free_gib}", state="running"))
        status = msgspec.structs.replace(read_status(run), phase=cast(Any, phase))
        write_status(run, status)
        yield run, free_gib > 1
        write_status(run, msgspec.structs.replace(status, state="finished", process=None))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that a chat, whose engine never starts, loads a model for."""
    prompts: list[str] = []

    async def load(chat: Conversation) -> None:
        prompts.append(chat.turns[-1].prompt)
        raise EngineClosedError

    monkeypatch.setattr(Conversation, "_load", load)
    return prompts


async def test_loading_asks_only_where_memory_may_run_out(
    sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(ADAPTER)
    app = open_on("chat")
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "not loaded yet")
        for run, fits in busy_machine(monkeypatch):
            await wait_until(pilot, lambda: app.system_status.active == run)  # noqa: B023
            sent.clear()
            await pilot.press("i", "ctrl+u", *"Hello", "enter")
            await wait_until(pilot, lambda: bool(sent) or "A run is training" in text_of(app))
            assert sent == (["Hello"] if fits else []), run.id
            await rest(pilot, chat_of(app)) if fits else await pilot.press("escape")


async def test_a_run_that_begins_gets_the_memory_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    finished(ADAPTER)
    app = open_on("chat")
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "not loaded yet")
        chat = chat_of(app).conversation
        loaded = ChatReady(
            adapter_names=(BASE,), device="CPU", dtype="bf16", context_tokens=99, seconds=1, memory_bytes=1
        )
        for run, fits in busy_machine(monkeypatch):
            await wait_until(pilot, lambda: app.system_status.active == run)  # noqa: B023
            chat.ready = loaded
            app.system_status_changed.publish(app.system_status)
            await app.workers.wait_for_complete()
            has_memory = read_status(run).phase == "training"
            assert (chat.ready is loaded) == (fits or has_memory), run.id
        await wait_for_text(pilot, f"■ Unloaded: {run.id} started and needed the memory.")


async def test_a_pasted_prompt_keeps_lines_and_up_recalls_the_last() -> None:
    finished(ADAPTER)
    app = open_on("chat")
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "not loaded yet")
        screen = chat_of(app)
        chat, field = screen.conversation, screen.query_one(PromptBox)
        turn = ChatTurn("one\ntwo", (BASE,))
        chat.turns.append(turn)
        await chat.mount(turn)
        screen.show_header()
        await wait_for_text(pilot, "❯ one")

        # Turns begin at the top. Their end stays in view, after a resize too, unless the user scrolls.
        assert field.region.bottom == screen.size.height - 1
        starters = screen.query_one(Starters)
        await wait_until(pilot, lambda: turn.region.bottom == starters.region.y < 12)
        long = ChatTurn("three\n" * 40, (BASE,))
        await chat.mount(long)
        await wait_until(pilot, lambda: 0 < chat.scroll_y == chat.max_scroll_y and chat.size.height > 12)
        await pilot.resize_terminal(90, 24)
        await wait_until(pilot, lambda: long.region.bottom == starters.region.y)
        scrolled = chat.scroll_y - 6
        screen.action_scroll_conversation(-2)
        await wait_until(pilot, lambda: chat.scroll_y == scrolled)
        await pilot.resize_terminal(90, 25)
        await wait_until(pilot, lambda: field.region.bottom == 24)
        assert chat.scroll_y == scrolled
        await long.remove()

        await pilot.press("i", "up")
        await wait_until(pilot, lambda: not chat.turns)
        assert field.text == "one\ntwo"


async def test_the_conversation_has_rows_for_an_answer_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    finished(ADAPTER)
    app = open_on("chat")
    async with app.run_test(size=(100, 60)) as pilot:
        await wait_for_text(pilot, "not loaded yet")
        chat, turn = chat_of(app).conversation, ChatTurn("one", (BASE,))
        monkeypatch.setattr(Conversation, "busy", True)
        chat.turns.append(turn)
        await chat.mount(turn)
        bars: list[bool] = []
        app.screen.watch(chat, "show_vertical_scrollbar", lambda is_shown: bars.append(is_shown), init=False)
        for height in (7, 13, 19, 25, 4):
            turn.styles.height = height
            await wait_until(pilot, lambda: turn.size.height == height)  # noqa: B023
            await wait_until(pilot, lambda: chat.size.height == turn.virtual_region.bottom + GROWTH_ROWS)
            if height == 7:
                bars.clear()
        assert not any(bars)


async def test_a_prompt_to_begin_with_is_asked_with_enter(private_home: Path, sent: list[str]) -> None:
    rows = private_home / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Where is\nmy parcel?", "completion": "On the road."}) + "\n")
    recipe = Recipe(
        model=Model(id="org/model"),
        data=Data(sources=(Source(path=str(rows)),)),
        training=Training(sample_prompts=("What is red?",)),
    )
    with_adapters(write_fake_run(FakeRun(state="finished", steps=9, total=9, recipe=recipe)), ADAPTER)
    app = open_on("chat")
    async with app.run_test(size=(80, 24)) as pilot:
        await wait_for_text(pilot, "What is red?", "sample prompt", "Where is my parcel?", "unrelated")
        screen = chat_of(app)
        await wait_until(pilot, lambda: isinstance(screen.focused, Starters))
        await wait_for_text(pilot, "Enter asks the selected message")
        await pilot.press("i")
        await wait_for_text(pilot, "Enter sends  ^J starts a new line  Esc selects a suggestion")
        await pilot.press("up", "down", "enter")
        await wait_until(pilot, lambda: sent == ["Where is\nmy parcel?"])
        await rest(pilot, screen)
        # Prompts that were not asked are below the answers, and Enter asks the first. Default settings have
        # no row.
        starters = screen.query_one(Starters)
        await wait_for_text(pilot, "Suggested messages", "  What is red?", "  How do I boil an egg?")
        assert starters.region.y == screen.conversation.region.bottom
        assert screen.conversation.turns[-1].region.bottom == starters.region.y
        assert "temp 0.7" not in text_of(app)
        assert isinstance(screen.focused, Starters)
        await pilot.press("enter")
        await wait_until(pilot, lambda: sent[1:] == ["What is red?"])


async def test_before_the_first_message_the_runs_validation_questions_and_their_answers_are_shown(
    private_home: Path, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first poll finds the GPU when the screen is already open.
    install_nvml_stub(monkeypatch, "one_gpu")
    install_torch(monkeypatch, "12.4")
    rows = tickets(private_home / "tickets.jsonl", 23)
    model = config_folder(private_home, "Qwen__Qwen2.5-7B")
    recipe = Recipe(model=Model(id=str(model)), data=Data(sources=(Source(path=str(rows)),)))
    run = write_fake_run(FakeRun(state="finished", steps=300, total=300, recipe=recipe))
    with_adapters(run, ADAPTER)
    app = open_on("chat")
    async with app.run_test(size=(200, 60)) as pilot:
        await wait_for_text(pilot, "Recorded answers", "steps 20 to 300: I am sorry", "from the data")
        # The suggested messages are directly below the recorded answers, in rows that nothing else needs.
        starters, chat = chat_of(app).query_one(Starters), chat_of(app).conversation
        await wait_until(pilot, lambda: starters.option_count == HEADING_ROWS + 24)
        await wait_until(pilot, lambda: starters.region.y == chat.region.bottom < 12)
        assert "  Parcel 10 is on its way." in text_of(app)
        # The cursor stays on its message when the list becomes shorter.
        await pilot.press("j", "j")
        await pilot.resize_terminal(200, 30)
        await wait_until(pilot, lambda: starters.option_count < HEADING_ROWS + 24)
        assert starters.selected_prompt == "Where is parcel 3?"
        await pilot.resize_terminal(200, 60)
        await wait_until(pilot, lambda: starters.option_count == HEADING_ROWS + 24)
        await wait_until(pilot, lambda: starters.region.height == HEADING_ROWS + 24)
        field = chat_of(app).query_one(PromptBox)
        before = (field.region.bottom, starters.region)
        await pilot.press("i", *"two", "ctrl+j", *"lines")
        await wait_until(pilot, lambda: field.region.height == 2)
        assert (field.region.bottom, starters.region) == before
        field.text = ""
        await wait_for_text(
            pilot,
            "Qwen2.5-7B (NF4) · loading takes about 19 s and needs up to 7.",
            "weights   step 300 (last)",
            "It learned",
        )
        await app.switch_mode("home")
        answered = TaskRow(
            source=0,
            row=3,
            prompt="…",
            reference="In Bergen.",
            base="I cannot know. " * 20 + "Ask the carrier.",
            adapter="In Oslo.",
            base_ended=True,
            adapter_ended=True,
        )
        evaluation = TaskEvaluation(
            run=run.id,
            adapter=adapter_hash(run),
            max_new_tokens=64,
            validation_rows=1,
            metrics=(),
            loss=LossChange(rows=0, before=0.0, after=0.0, interval=None),
            rows=(answered, msgspec.structs.replace(answered, row=4, reference="In Oslo!")),
        )
        write_task_evaluation(run, evaluation)
        await show_chat(app, with_adapters(run, "step-200"))
        await wait_for_text(pilot, "base: I cannot know.", "✗ adapter: In Oslo.", "expected: In Bergen.")
        await wait_for_text(pilot, "validation question", "✓ adapter: In Oslo.")
        assert "In Oslo!" not in text_of(app)
        # Answers are whole if there are rows for them.
        assert "Ask the carrier." in text_of(app)
        await pilot.resize_terminal(80, 24)
        await wait_until(pilot, lambda: "Ask the carrier." not in text_of(app))
        await pilot.resize_terminal(200, 60)
        await wait_for_text(pilot, "Ask the carrier.", "alpha 32  all-linear")
        await pilot.press("escape", "enter")
        await wait_until(pilot, lambda: sent == ["Where is parcel 3?"])


def test_rows_that_remain_are_for_the_answer_of_the_base() -> None:
    recorded = RecordedAnswers("Why?", (("base", "word " * 100), ("adapter", "In Oslo.")))
    lines = recorded_lines((recorded,), "", 80, 9)
    assert len(lines) == 9 and lines[-1].plain.rstrip().endswith("…")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, trainers: Trainers) -> tuple[Path, Path]:
    """A tiny model and an adapter on it."""
    folder = tmp_path_factory.mktemp("tiny")
    # Rotary positions have no limit: an answer can continue until it is stopped.
    config = {"max_position_embeddings": 1 << 20}
    with pytest.MonkeyPatch.context() as patch:
        trainers.server.serve([MODEL_WITH_ADAPTER], patch)
        run_job(MODEL_WITH_ADAPTER, folder, config, result=NoneType, title="No model", subject="Who makes it")
    return folder / "model", folder / "adapter"


async def test_the_chosen_run_answers_although_the_newest_is_still_being_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    older = with_adapters(write_fake_run(FakeRun(name="older-run", began=BEGAN - 999)), "step-9")
    finished(ADAPTER)
    opened, go_on, open_now = threading.Event(), threading.Event(), list[int]()

    def count(source: ChatSource) -> dict[ChoiceKind, int]:
        open_now.append(open_now[-1] + 1 if open_now else 1)
        if not opened.is_set():
            opened.set()
            go_on.wait(10)
        open_now.append(open_now[-1] - 1)
        return {}

    monkeypatch.setattr(conversation, "_choice_counts", count)
    app = open_on("home")
    async with app.run_test(size=(100, 40)) as pilot:
        await app.switch_mode("chat")
        await asyncio.to_thread(opened.wait)
        chat = chat_of(app)
        choice = asyncio.create_task(chat.chat_with(older))
        for _ in range(20):
            await asyncio.sleep(0)
        go_on.set()
        await choice
        await pilot.pause()
        assert max(open_now) == 1
        assert (chat.conversation.run_dir, chat.source_name) == (older, "older-run")


@asynccontextmanager
async def talking(tiny: tuple[Path, Path], most: int = 12) -> AsyncIterator[tuple[Pilot[Any], ChatScreen]]:
    """The chat on a run of the tiny model."""
    model, adapter = tiny
    rows = tickets(adapter.parent / "tickets.jsonl")
    data = Data(sources=(Source(path=str(rows)),), validation_fraction=0.2)
    recipe = Recipe(name="tale", model=Model(id=str(model)), data=data)
    run = write_fake_run(FakeRun(name="tale", state="finished", steps=40, total=40, recipe=recipe))
    with_adapters(run, ADAPTER, "step-20", copy_of=adapter)
    app = open_on("home")
    async with app.run_test(size=(100, 40)) as pilot:
        await show_chat(app, run)
        screen = chat_of(app)
        screen.conversation.sampling = Sampling(max_new_tokens=most, temperature=1.0)
        yield pilot, screen


@pytest.mark.usefixtures("quick_trainers")
async def test_base_and_adapter_answer_side_by_side(
    tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # With some seeds the adapter ends its turn at once, and there is nothing to choose.
    monkeypatch.setattr(conversation, "random", SimpleNamespace(randrange=lambda stop: 1))
    async with talking(tiny) as (pilot, screen):
        await pilot.press(*"what is red", "enter")
        await wait_for_text(pilot, "❯ what is red")
        await rest(pilot, screen)
        answers = screen.conversation.turns[0].answers
        assert list(answers) == [BASE, ADAPTER]
        assert all(a.outcome is not None and a.outcome.new_tokens for a in answers.values())
        await wait_for_text(pilot, "tok", ", wait", "saved in", "Which answer is better? Esc, then [<]")
        assert screen.conversation.run_dir is not None
        saved = transcript_path(screen.conversation.run_dir).read_text()
        assert saved.count("> what is red") == 1
        assert "seed" in saved

        # The verdict: one sentence, kept in view.
        await pilot.press("escape", "f")
        await rest(pilot, screen)
        shown = await wait_for_text(pilot, "The adapter ", "held-out conversations")
        shown = " ".join(re.sub("[│▐▌]", " ", shown).split())
        assert re.search(
            r"changes( the model:)? [\d.]+% of next-token choices on \d+ held-out conversations; ", shown
        )
        assert re.search(r"it fits them (better|worse) \(loss [\d.]+ → [\d.]+\) (and|but) ends", shown)
        await pilot.press("i")

        # The base forgets nothing the adapter did not hear: each keeps its own conversation.
        screen.conversation.sampling = Sampling(max_new_tokens=8, temperature=0)
        await pilot.press("ctrl+t", *"and blue", "enter")
        await rest(pilot, screen)
        assert list(screen.conversation.turns[1].answers) == [ADAPTER]
        # Its answer was drawn at random, and may have ended at once: of a silent turn nothing is kept.
        heard = screen.conversation.messages(screen.conversation.turns[1], ADAPTER)
        assert len(heard) == (3 if answers[ADAPTER].text else 1)

        first = screen.conversation.turns[1].answers[ADAPTER].text
        await pilot.press("escape", "r")
        await rest(pilot, screen)
        assert screen.conversation.turns[1].answers[ADAPTER].text == first

        await pilot.press("b")
        await pilot.press(*"!", "enter")
        await rest(pilot, screen)
        assert [turn.prompt for turn in screen.conversation.turns] == ["what is red", "and blue!"]

        # Escape stops an answer in the middle; what was said stays. Always the likeliest token, this model
        # says the same for ever; drawn at random, the end of its turn would come by itself.
        screen.conversation.sampling = Sampling(max_new_tokens=1 << 19, temperature=0)
        monkeypatch.setattr(turn, "find_loop", lambda text: "")
        await pilot.press(*"on", "enter")
        while not any(a.text for a in screen.conversation.turns[-1].answers.values()):
            await pilot.pause(0.05)
        await pilot.press("escape")
        await rest(pilot, screen)
        (answer,) = screen.conversation.turns[-1].answers.values()
        assert answer.outcome is not None
        assert answer.outcome.ending == "stopped"
        await wait_for_text(pilot, "■ Stopped.")

        # A run that begins gets the memory.
        assert screen.conversation.ready is not None
        run = write_fake_run(FakeRun(name="next-run", state="running"))
        write_status(run, msgspec.structs.replace(read_status(run), phase="loading"))
        await wait_for_text(pilot, "not loaded yet")
        await wait_until(pilot, lambda: screen.conversation.engine.pid is None)


@pytest.mark.usefixtures("quick_trainers")
async def test_a_run_of_decisions_shows_how_probable_each_label_is(tiny: tuple[Path, Path]) -> None:
    async with talking(tiny) as (pilot, screen):
        assert screen.conversation.run_dir is not None
        put_decider(tiny[0], screen.conversation.run_dir.adapter_dir, "red", "blue")
        await pilot.press(*"what is the fox", "enter")
        await wait_for_text(pilot, "❯ what is the fox")
        await rest(pilot, screen)

        def bars() -> list[tuple[str, str]]:
            return re.findall(r"(red|blue) +[▄▖▁]+ +(\d+)%", text_of(pilot.app))

        await wait_until(pilot, lambda: len(bars()) == 4)
        assert sorted(label for label, _ in bars()) == ["blue", "blue", "red", "red"]
        assert sum(int(percent) for _, percent in bars()) in range(198, 203)
        # The base has no calibration of its own.
        assert text_of(pilot.app).count("not calibrated") == 1
