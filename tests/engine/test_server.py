"""The engine's side of the protocol, in this process and without torch."""

from __future__ import annotations

import io
import os
import queue
import threading

import msgspec
import pytest

from qlora_tui.chat.chat_types import ChatSource
from qlora_tui.engine.protocol import (
    Generate,
    LoadChat,
    ReplyEnvelope,
    RequestEnvelope,
    Unload,
    decode_reply,
    encode,
)
from qlora_tui.engine.server import Server
from qlora_tui.recipe.schema import Recipe
from qlora_tui.worker import Failure, Result

LOAD = LoadChat(source=ChatSource(recipe=Recipe()))


class Broken(Server):
    """A server whose libraries raise an unexpected error."""

    def _with_torch(self, on_status: object) -> object:  # type: ignore[override]  # it never returns
        raise RuntimeError("segment 7")


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set where the server would end this process."""
    event = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: event.set())
    return event


def served(server: type[Server], *requests: RequestEnvelope | bytes) -> list[ReplyEnvelope]:
    """What a server replies to these lines."""
    lines = b"".join(line if isinstance(line, bytes) else encode(line) for line in requests)
    questions, written = os.pipe()
    replies, to_write = os.pipe()
    os.write(written, lines)
    wanted = sum(isinstance(line, RequestEnvelope) for line in requests)
    with os.fdopen(questions, "rb") as reading, os.fdopen(to_write, "wb") as writing:
        threading.Thread(target=server(reading, writing).run, daemon=True).start()
        with os.fdopen(replies, "rb") as heard:
            said = [decode_reply(heard.readline()) for _ in range(wanted)]
        os.close(written)
    return said


def test_an_unexpected_error_is_reported_and_the_engine_continues(ended: threading.Event) -> None:
    first, second = served(Broken, RequestEnvelope(1, LOAD), RequestEnvelope(2, Unload()))
    assert isinstance(first.reply, Failure)
    problem = first.reply.error()
    assert (problem.title, problem.what) == ("Internal error", "RuntimeError: segment 7")
    assert "engine.log" in problem.fix
    assert (second.number, second.reply) == (2, Result(msgspec.Raw(b"null")))


def test_an_engine_whose_gpu_fails_says_so_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: queue.SimpleQueue[int] = queue.SimpleQueue()
    monkeypatch.setattr(os, "_exit", codes.put)

    def fail(server: Server, on_status: object) -> object:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(Broken, "_with_torch", fail)
    (reply,) = served(Broken, RequestEnvelope(1, LOAD))
    assert isinstance(reply.reply, Failure) and reply.reply.title == "The GPU stopped computing"
    # In either order: 0 because stdin closed, 1 because of the GPU.
    assert {codes.get(timeout=60), codes.get(timeout=60)} == {0, 1}


def test_nonsense_on_stdin_ends_the_engine(ended: threading.Event) -> None:
    questions = io.BytesIO(b"not json\n")
    threading.Thread(target=Server(questions, io.BytesIO()).run, daemon=True).start()
    assert ended.wait(5)


def test_a_message_survives_the_way_there_and_back() -> None:
    answered = ReplyEnvelope(7, Failure(title="t", what="w", why="y", fix="f", exit_code=2))
    assert decode_reply(encode(answered)) == answered
    assert b"\n" not in encode(RequestEnvelope(1, Generate(messages=(), adapter_name="a\nb")))[:-1]
