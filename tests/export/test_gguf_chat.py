"""Exported GGUF files in the chat, computed by llama.cpp, beside the adapter they were written from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest
from msgspec.structs import replace

from qlora_tui.chat.chat_types import GREEDY
from qlora_tui.chat.loading import load_session
from qlora_tui.chat.session import ChatSession
from qlora_tui.data.conversation import Message
from qlora_tui.engine.chat_service import ChatService
from qlora_tui.engine.protocol import Generate, LoadChat, MeasureEffect
from qlora_tui.errors import UserError
from qlora_tui.export.gguf import export_gguf
from qlora_tui.export.gguf_chat import GgufDecoder
from tests.export.export_sources import make_source

pytest.importorskip("llama_cpp_py_sync")
pytestmark = pytest.mark.slow

SHORT = replace(GREEDY, max_new_tokens=12)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatSession]:
    folder = tmp_path_factory.mktemp("chat")
    source = make_source(folder)
    (written,) = export_gguf(source, "adapter", folder / "tiny.gguf", ["F16"]).files
    yield load_session(replace(source, gguf_files={"F16.gguf": written.path}))


@pytest.fixture
def decoder(session: ChatSession) -> Iterator[GgufDecoder]:
    decoder = GgufDecoder(session, session.source.gguf_files["F16.gguf"])
    yield decoder
    decoder.close()


def test_a_file_answers_as_the_adapter_does(session: ChatSession, decoder: GgufDecoder) -> None:
    messages = [Message("user", "Name three colors.")]
    reused = []
    for _ in range(2):
        ours = session.ask(messages, adapter_name="adapter", sampling=SHORT)
        file = decoder.ask("F16.gguf", messages, sampling=SHORT, stop=Event())
        assert "".join(c.text for c in file) == "".join(c.text for c in ours)
        assert ours.outcome is not None and file.outcome is not None
        assert file.outcome.new_tokens == ours.outcome.new_tokens
        assert file.outcome.reused_tokens == ours.outcome.reused_tokens
        messages += [Message("assistant", ours.outcome.text), Message("user", "And why?")]
        reused.append(file.outcome.reused_tokens)
    assert reused[1] > 8


def test_a_process_that_was_killed_is_an_error(decoder: GgufDecoder) -> None:
    decoder.close()
    with pytest.raises(UserError, match="could not run the GGUF file") as failed:
        list(decoder.ask("F16.gguf", [Message("user", "Hello")], sampling=SHORT, stop=Event()))
    assert "SIGKILL" in failed.value.what
    assert "out of memory" in failed.value.why and "Close other programs" in failed.value.fix


def test_a_file_that_is_no_model_is_an_error(session: ChatSession, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="could not run the GGUF file"):
        GgufDecoder(session, str(tmp_path / "x.gguf"))


def test_the_engine_answers_by_file_and_by_adapter(session: ChatSession) -> None:
    service = ChatService()
    ready = service.load(LoadChat(source=session.source), lambda words: None)
    assert ready.adapter_names == ("base", "adapter", "F16.gguf")
    answers = []
    for name in ("adapter", "F16.gguf"):
        messages = (Message("user", "Name three colors."),)
        request = Generate(messages=messages, adapter_name=name, sampling=SHORT)
        answers.append("".join(chunk.text for chunk in service.generate(request, Event())))
    assert answers[0] == answers[1]
    with pytest.raises(UserError, match="cannot be measured"):
        service.measure(MeasureEffect(adapter_name="F16.gguf"), lambda words: None, Event())
    service.unload()
