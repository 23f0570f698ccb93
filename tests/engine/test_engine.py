"""A real engine: one child for the module, and children that are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil
import pytest
import pytest_asyncio

from qlora_tui.chat.chat_types import GREEDY, ChatSource, GenerationResult
from qlora_tui.chat.completion_types import Completion, CompletionPart, CompletionResult
from qlora_tui.data.conversation import Message
from qlora_tui.data.thought_splitter import TextChunk
from qlora_tui.engine.client import EngineClient, EngineClosedError
from qlora_tui.engine.protocol import (
    ChatReady,
    Complete,
    CountTokens,
    Generate,
    LoadChat,
    MeasureEffect,
    RequestEnvelope,
    Stop,
    Unload,
    log_path,
)
from qlora_tui.errors import UserError
from qlora_tui.recipe.schema import Model, Recipe
from qlora_tui.worker import Progress
from tests.support.quick_starts import TRAINING_MODULES
from tests.support.trainer_processes import Trainers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
]

QUESTION = (Message("user", "what is the colour of the fox"),)
SHORT = Generate(
    messages=QUESTION, adapter_name="adapter", sampling=msgspec.structs.replace(GREEDY, max_new_tokens=8)
)
LONG = Generate(
    messages=QUESTION, adapter_name="adapter", sampling=msgspec.structs.replace(GREEDY, max_new_tokens=200)
)
"""Not ended before a second request is read."""
ENDLESS = Generate(
    messages=QUESTION, adapter_name="adapter", sampling=msgspec.structs.replace(GREEDY, max_new_tokens=2000)
)


@pytest.fixture(scope="module", autouse=True)
def quick_engines(trainers: Trainers) -> Iterator[None]:
    """Engines start with torch imported."""
    with pytest.MonkeyPatch.context() as patch:
        trainers.server.serve(TRAINING_MODULES, patch)
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tiny_source: ChatSource) -> AsyncIterator[EngineClient]:
    """An engine that has loaded the tiny model."""
    async with EngineClient() as client:
        replies = [reply async for reply in client.ask(LoadChat(source=tiny_source))]
        *statuses, ready = replies
        assert isinstance(ready, ChatReady)
        assert len(statuses) >= 2 and all(isinstance(status, Progress) for status in statuses)
        yield client


async def answer(engine: EngineClient, question: Generate) -> GenerationResult:
    replies = [reply async for reply in engine.ask(question)]
    *pieces, done = replies
    assert isinstance(done, GenerationResult)
    assert all(isinstance(piece, TextChunk) for piece in pieces)
    assert "".join(p.text for p in pieces if isinstance(p, TextChunk)) == done.text
    return done


async def test_an_answer_streams_in_pieces_and_ends_with_its_figures(engine: EngineClient) -> None:
    outcome = await answer(engine, SHORT)
    assert (outcome.new_tokens, outcome.ending) == (8, "most tokens")


async def test_two_voices_asked_together_grow_side_by_side(engine: EngineClient) -> None:
    order: list[str] = []

    async def listen(adapter_name: str) -> str:
        text = ""
        async for reply in engine.ask(msgspec.structs.replace(LONG, adapter_name=adapter_name)):
            if isinstance(reply, TextChunk):
                order.append(adapter_name)
                text += reply.text
        return text

    adapter, base = await asyncio.gather(listen("adapter"), listen("base"))
    assert adapter == (await answer(engine, LONG)).text
    assert base == (await answer(engine, msgspec.structs.replace(LONG, adapter_name="base"))).text
    assert order != sorted(order)
    assert order != sorted(order, reverse=True)


async def test_programs_are_answered_side_by_side_by_one_adapter(engine: EngineClient) -> None:
    order: list[int] = []

    async def listen(number: int, tokens: int) -> tuple[str, CompletionResult]:
        sampling = msgspec.structs.replace(GREEDY, max_new_tokens=tokens)
        asked = Completion(adapter_name="adapter", messages=QUESTION, sampling=sampling)
        text = ""
        async for reply in engine.ask(Complete(completion=asked)):
            if isinstance(reply, CompletionPart):
                order.append(number)
                text += reply.text
        assert isinstance(reply, CompletionResult)
        return text, reply

    expected = (await answer(engine, LONG)).text
    told = await asyncio.gather(*(listen(number, 200) for number in range(3)))
    assert [(text, result.new_tokens) for text, result in told] == [(expected, 200)] * 3
    assert order != sorted(order)


async def test_stop_ends_an_answer_in_the_middle(engine: EngineClient) -> None:
    replies = engine.ask(ENDLESS)
    last = None
    async for reply in replies:
        if last is None:
            replies.stop()
        last = reply
    assert isinstance(last, GenerationResult)
    assert last.ending == "stopped"
    assert last.new_tokens < 200


async def test_cancelling_the_waiting_task_stops_the_engine_too(
    engine: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = asyncio.Event()
    written: list[RequestEnvelope] = []
    write = engine._write

    def record(envelope: RequestEnvelope) -> None:
        written.append(envelope)
        write(envelope)

    monkeypatch.setattr(engine, "_write", record)

    async def listen() -> None:
        async for _ in engine.ask(ENDLESS):
            first.set()

    task = asyncio.create_task(listen())
    await first.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    request, stop = written
    assert stop.request == Stop(request_number=request.number)
    await answer(engine, msgspec.structs.replace(SHORT, adapter_name="base"))


async def test_an_error_in_the_engine_is_raised_in_the_client(engine: EngineClient) -> None:
    with pytest.raises(UserError, match="No such adapter") as raised:
        await answer(engine, msgspec.structs.replace(SHORT, adapter_name="step-9"))
    assert raised.value.exit_code == 2
    assert raised.value.fix


async def test_tokens_are_counted_while_an_answer_is_generated(engine: EngineClient) -> None:
    async def count(text: str) -> int:
        return await engine.ask(CountTokens(text=text)).result()

    endless = engine.ask(ENDLESS)
    await anext(endless)
    one, two = await count("red"), await count("red red red")
    assert 0 < one < two
    endless.stop()
    assert (await endless.result()).ending == "stopped"


async def test_an_effect_needs_held_out_data(engine: EngineClient) -> None:
    with pytest.raises(UserError, match="No data"):
        async for _ in engine.ask(MeasureEffect(adapter_name="adapter")):
            pass


async def test_a_missing_model_is_an_error_and_the_engine_continues(engine: EngineClient) -> None:
    pid = engine.pid
    with pytest.raises(UserError, match="not on this machine"):
        async for _ in engine.ask(LoadChat(source=ChatSource(recipe=Recipe(model=Model(id="no/such"))))):
            pass
    with pytest.raises(UserError, match="No model is loaded"):
        await answer(engine, SHORT)
    assert engine.pid == pid


async def test_a_killed_engine_is_reported_and_restarted_when_asked(
    engine: EngineClient, tiny_source: ChatSource
) -> None:
    async for _ in engine.ask(LoadChat(source=tiny_source)):
        pass
    before = engine.pid
    assert before is not None
    with pytest.raises(UserError) as raised:
        async for _ in engine.ask(ENDLESS):
            with suppress(ProcessLookupError):  # replies of before its end
                os.kill(before, signal.SIGKILL)
    assert "SIGKILL" in raised.value.what and "out of memory" in raised.value.why
    assert "engine.log" in raised.value.fix
    await engine.ask(Unload()).result()
    assert engine.pid not in (None, before)


async def test_library_output_goes_to_a_log_of_bounded_size(engine: EngineClient) -> None:
    log_path().write_bytes(b"x" * (1 << 20) + b"x")
    await engine.close()
    async for _ in engine.ask(Unload()):
        pass
    assert log_path().stat().st_size < 1 << 20


async def test_closing_it_is_no_failure_to_those_who_wait(
    engine: EngineClient, tiny_source: ChatSource
) -> None:
    with pytest.raises(EngineClosedError):
        async for _ in engine.ask(LoadChat(source=tiny_source)):
            await engine.close()
    assert engine.pid is None


PARENT = """
import asyncio, sys, msgspec
from qlora_tui.engine.client import EngineClient
from qlora_tui.engine.protocol import LoadChat, Generate
from tests.engine.test_engine import ENDLESS
from qlora_tui.chat.chat_types import ChatSource

async def main():
    source = msgspec.json.decode(sys.argv[1], type=ChatSource)
    async with EngineClient() as engine:
        async for _ in engine.ask(LoadChat(source=source)):
            pass
        async for _ in engine.ask(msgspec.structs.replace(ENDLESS, adapter_name="base")):
            print(engine.pid, flush=True)

asyncio.run(main())
"""


async def test_a_request_during_closing_starts_the_next_child_after_it() -> None:
    engine = EngineClient()
    await engine.start()
    before, closing = engine.pid, asyncio.create_task(engine.close())
    await asyncio.sleep(0)
    await engine.start()
    try:
        assert closing.done() and engine.pid not in (before, None)
    finally:
        await engine.close()
        await closing


async def test_a_killed_engine_is_gone() -> None:
    engine = EngineClient()
    await engine.start()
    child = psutil.Process(engine.pid)
    os.kill(child.pid, signal.SIGSTOP)  # as busy as can be
    await engine.kill()
    assert engine.pid is None
    assert not psutil.wait_procs([child], timeout=60)[1]


async def test_an_engine_that_is_answering_ends_with_its_parent(tiny_source: ChatSource) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, msgspec.json.encode(tiny_source).decode()],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    child.wait(timeout=60)
