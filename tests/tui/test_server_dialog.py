"""The dialog of the server, and what other screens say of a running one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from qlora_tui.errors import UserError
from qlora_tui.runs.process import process_identity
from qlora_tui.runs.servers import ServerStatus, state_path
from qlora_tui.tui.screens.chat import server_dialog
from qlora_tui.tui.screens.chat.conversation import Conversation
from qlora_tui.tui.screens.chat.server_dialog import server_lines
from tests.tui.chat_screen import finished
from tests.tui.screen_assertions import text_of, wait_for_text, wait_until
from tests.tui.workstation import open_on

pytestmark = pytest.mark.slow


def write_server(**facts: Any) -> ServerStatus:
    """Write the state file of a server, which is this process."""
    facts = {"state": "ready", "models": ("base", "a", "a:120"), **facts}
    status = ServerStatus(
        process=process_identity(), address="http://127.0.0.1:8000/v1", port=8000, base="Qwen/Qwen", **facts
    )
    state_path(8000).write_bytes(msgspec.json.encode(status))
    return status


async def test_a_key_starts_and_stops_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked = finished("adapter"), []

    def start(arguments: Sequence[str]) -> ServerStatus:
        asked.append(list(arguments))
        if len(asked) == 1:
            raise UserError("The port is in use", what="Another program listens on port 8000.")
        return write_server(requests=1284, answering=4, tokens_per_s=182.4)

    monkeypatch.setattr(server_dialog, "start_in_background", start)
    monkeypatch.setattr(server_dialog, "stop_server", lambda server: state_path(server.port).unlink())
    app = open_on("chat")
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, run.name)
        await pilot.press("w")
        await wait_for_text(pilot, "OpenAI-compatible", "s start")
        await pilot.press("s")
        await wait_for_text(pilot, "Another program listens")
        await pilot.press("escape")
        await wait_for_text(pilot, "s start")
        await pilot.press("s")
        await wait_for_text(pilot, "http://127.0.0.1:8000/v1", "a:120", "1,284", "182 tokens/s", "s stop")
        assert asked == [[run.id, "--all"]] * 2
        # Other screens, and the shell after the app, say that it runs.
        await wait_until(pilot, lambda: bool(app.system_status.servers))
        assert "The server on port 8000 continues." in app.system_status.continues_without_app()
        await pilot.press("y")
        assert app.clipboard == "http://127.0.0.1:8000/v1"
        await pilot.press("s")
        await wait_for_text(pilot, "s start")
        other = write_server(state="loading")
        state_path(8001).write_bytes(msgspec.json.encode(msgspec.structs.replace(other, port=8001)))
        await wait_for_text(pilot, "loading", "Another server runs on port 8001.")
        await pilot.press("escape", "0")
        await wait_for_text(pilot, "127.0.0.1:8000 · loading", "serving")


async def test_a_second_copy_next_to_a_server_is_said_and_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fits(chat: Conversation, status: object, **settings: bool) -> bool:
        return False

    monkeypatch.setattr(Conversation, "_fits_beside", fits)
    finished("adapter")
    app = open_on("chat")
    async with app.run_test(size=(120, 40)) as pilot:
        await wait_for_text(pilot, "not loaded yet")
        write_server(memory_bytes=3 << 30)
        await wait_for_text(pilot, "The server on port 8000 holds its own copy of Qwen (3.0 GiB)")
        await pilot.press("i", *"Hello", "enter")
        await wait_for_text(pilot, "A server holds a model", "(3.0 GiB; [w]")
        await pilot.press("escape")
        await wait_for_text(pilot, "Hello")
        assert not app.screen.query_one(Conversation).turns
        state_path(8000).unlink()
        await wait_until(pilot, lambda: "holds its own copy" not in text_of(app))


@pytest.mark.parametrize("width", [34, 66])
def test_lines_keep_to_their_width_and_say_what_a_server_waits_for(width: int) -> None:
    detail = "tickets-20261123-0212 needs the memory. The model is loaded again after the run."
    models = tuple(f"m{i}" for i in range(12))
    lines = server_lines(write_server(state="yielded", detail=detail, models=models), width)
    assert all(line.cell_length <= width for line in lines)
    text = " ".join(" ".join(line.plain[10:].split()) for line in lines)
    assert detail in text
    assert "m5" in text and "and 6 more" in text
