"""The server dialog: starts and stops the server, and shows its address and activity."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from textwrap import wrap
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.binding import Binding, BindingType
from textual.content import Content

from qlora_tui.errors import UserError
from qlora_tui.formatting import abbreviate_home
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.servers import ServerStatus, running_servers, start_in_background, stop_server
from qlora_tui.serving.model_names import runs_with_base_of
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.screens.base import OnQloraApp
from qlora_tui.tui.screens.modals.dialogs import TextDialog
from qlora_tui.tui.widgets.controls import Lines

if TYPE_CHECKING:
    from qlora_tui.tui.screens.chat.conversation import Conversation

_READ_INTERVAL_S = 1.0
_TOGGLE = Binding("s", "start_or_stop", "Start")
_COPY = Binding("y", "copy", "Copy address")
_CLOSE = Binding("escape,q", "dismiss", "Close")
_LABEL_CELLS, _NARROW_CELLS = 10, 66
_NAMES = 6
"""Maximum number of models to name; the rest are counted."""
_WHAT = (
    "A server lets other programs use base, runs and checkpoints through an OpenAI-compatible API: scripts, "
    "editors, Open WebUI. It outlives this app, and gives the GPU to each run that starts."
)
_NOTHING = "No run has an adapter to serve yet."


class ServerScreen(TextDialog[None], OnQloraApp):
    """Shows the running server, or offers to start one for the runs with the same base as the chat."""

    BINDINGS: ClassVar[list[BindingType]] = [_TOGGLE, _COPY, _CLOSE]

    def __init__(self, conversation: Conversation) -> None:
        super().__init__("Server", Lines(id="server-status"))
        self._conversation = conversation
        self._server: ServerStatus | None = None
        self._doing = ""

    def on_mount(self) -> None:
        self._show()
        self.set_interval(_READ_INTERVAL_S, self._show)

    def _show(self) -> None:
        self._server = next(iter(running_servers()), None)
        if self._server is not None:
            keys, lines = (
                [replace(_TOGGLE, description="Stop"), _COPY],
                server_lines(self._server, self._width),
            )
        elif self._conversation.run_dir is not None:
            keys, lines = [_TOGGLE], [Content(_WHAT)]
        else:
            keys, lines = [], [Content(_WHAT), Content(""), Content(_NOTHING)]
        if self._doing:
            keys, lines = [], [*lines, Content(""), Content.styled(self._doing, "$primary")]
        self.query_one(".dialog").border_subtitle = dialog_keys([*keys, _CLOSE])
        self.query_one("#server-status", Lines).show(lines)

    @property
    def _width(self) -> int:
        """Width of a line in cells; before the first layout, that of a narrow dialog."""
        return self.query_one("#server-status", Lines).content_size.width or _NARROW_CELLS

    def action_start_or_stop(self) -> None:
        """Start or stop the server."""
        run, server = self._conversation.run_dir, self._server
        if server is not None:
            self._do("Stopping…", partial(stop_server, server))
        elif run is not None:
            self._do("Starting…", partial(_start, run))

    @work(exclusive=True)
    async def _do(self, doing: str, work: Callable[[], object]) -> None:
        """Run ``work`` in a thread, and show ``doing`` meanwhile."""
        self._doing = doing
        self._show()
        try:
            if self._server is None:
                # Leave the chat's memory to the server.
                await self._conversation.unload()
            await asyncio.to_thread(work)
        except UserError as problem:
            self.app.show_error(problem)
        self._doing = ""
        self._show()

    def action_copy(self) -> None:
        """Copy the server's address."""
        if self._server is not None:
            self.app.copy_to_clipboard(self._server.address)


def _start(run: RunDir) -> None:
    start_in_background([each.id for each in runs_with_base_of(run)])


def server_lines(server: ServerStatus, width: int) -> list[Content]:
    """Return a server's state as labeled facts, in lines of ``width`` cells."""
    names, more = server.models[:_NAMES], len(server.models) - _NAMES
    speed = f" · {server.tokens_per_s:,.0f} tokens/s" if server.tokens_per_s else ""
    states = {"ready": "ready", "loading": "loading", "unloaded": "unloaded: the next request loads it"}
    styles = {"ready": "$success", "failed": "$error"}
    facts = (
        ("address", (server.address,), "bold"),
        ("models", (*names, f"and {more} more") if more > 0 else names, ""),
        ("base", (abbreviate_home(server.base),), ""),
        ("state", (server.detail or states.get(server.state, ""),), styles.get(server.state, "$warning")),
        (
            "requests",
            (f"{server.requests:,} · {server.answering} being answered · {server.waiting} waiting{speed}",),
            "",
        ),
        ("key", (abbreviate_home(server.key_file) or "none needed on this machine",), ""),
    )
    lines = []
    for label, texts, style in facts:
        for text in texts:
            for line in wrap(text, max(width - _LABEL_CELLS, 1), break_on_hyphens=False):
                lines.append(Content.assemble((f"{label:<{_LABEL_CELLS}}", "dim"), (line, style)))
                label = ""
    return lines
