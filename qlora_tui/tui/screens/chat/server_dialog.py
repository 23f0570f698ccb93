"""The dialog that starts and stops a server for other programs, and shows the server's address and
activity.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.binding import Binding, BindingType
from textual.content import Content

from qlora_tui.errors import UserError
from qlora_tui.formatting import abbreviate_home
from qlora_tui.runs.directory import RunDir
from qlora_tui.runs.servers import ServerStatus, running_servers, start_in_background, stop_server
from qlora_tui.tui.key_names import dialog_keys
from qlora_tui.tui.render.columns import Fact, fact_lines
from qlora_tui.tui.screens.base import OnQloraApp
from qlora_tui.tui.screens.modals.dialogs import TextDialog
from qlora_tui.tui.widgets.controls import Lines

if TYPE_CHECKING:
    from qlora_tui.tui.screens.chat.conversation import Conversation
    from qlora_tui.tui.system_status import SystemStatus

_TOGGLE = Binding("s", "start_or_stop", "Start")
_COPY = Binding("y", "copy", "Copy address")
_CLOSE = Binding("escape,q", "dismiss", "Close")
_NARROW_CELLS = 66
_NAMES = 6
"""Maximum number of models that are listed by name. If there are more, only their number is shown."""
_WHAT = (
    "A server lets other programs, such as scripts, editors and Open WebUI, use the base model, runs and "
    "checkpoints through an OpenAI-compatible API. The server continues after this app exits, and frees the "
    "GPU for each run that starts."
)
_NOTHING = "No run has an adapter to serve yet."


class ServerScreen(TextDialog[None], OnQloraApp):
    """Shows the running server or, if no server is running, offers to start a server for all runs that have
    the same base model as the chat.
    """

    BINDINGS: ClassVar[list[BindingType]] = [_TOGGLE, _COPY, _CLOSE]

    def __init__(self, conversation: Conversation) -> None:
        super().__init__("Server", Lines(id="server-status"))
        self._conversation = conversation
        self._server: ServerStatus | None = None
        self._others: Sequence[ServerStatus] = ()
        """Other running servers. The dialog lists only their ports."""
        self._doing = ""

    def on_mount(self) -> None:
        self.app.system_status_changed.subscribe(self, self._system_status_changed, immediate=True)
        self._system_status_changed(self.app.system_status)

    def _system_status_changed(self, system_status: SystemStatus) -> None:
        self._show_servers(system_status.servers)

    def _show_servers(self, servers: Sequence[ServerStatus]) -> None:
        self._server, self._others = next(iter(servers), None), servers[1:]
        self._show()

    def _show(self) -> None:
        self.query_one(".dialog").border_subtitle = dialog_keys([*self._keys, _CLOSE])
        self.query_one("#server-status", Lines).show(self._lines())

    @property
    def _keys(self) -> list[Binding]:
        """Keys that are available now, without the key that closes the dialog."""
        if self._doing:
            return []
        if self._server is not None:
            return [replace(_TOGGLE, description="Stop"), _COPY]
        return [_TOGGLE] if self._conversation.run_dir is not None else []

    def _lines(self) -> list[Content]:
        if self._server is not None:
            lines = server_lines(self._server, self._width)
            lines += [Content(f"Another server runs on port {each.port}.") for each in self._others]
        elif self._conversation.run_dir is not None:
            lines = [Content(_WHAT)]
        else:
            lines = [Content(_WHAT), Content(""), Content(_NOTHING)]
        return [*lines, Content(""), Content.styled(self._doing, "$primary")] if self._doing else lines

    @property
    def _width(self) -> int:
        """Width of a line in cells; before the first layout, the width of a narrow dialog."""
        return self.query_one("#server-status", Lines).content_size.width or _NARROW_CELLS

    def action_start_or_stop(self) -> None:
        """Stop the server if one is running. Otherwise, start a server if the chat has a run."""
        run, server = self._conversation.run_dir, self._server
        if server is not None:
            self._do("Stopping…", partial(asyncio.to_thread, stop_server, server))
        elif run is not None:
            self._do("Starting…", partial(self._start, run))

    async def _start(self, run: RunDir) -> None:
        # Free the chat's memory, which the server needs.
        await self._conversation.unload()
        await asyncio.to_thread(start_in_background, [run.id, "--all"])

    @work(exclusive=True)
    async def _do(self, doing: str, work: Callable[[], Awaitable[object]]) -> None:
        """Await ``work``. Show ``doing`` in the meantime, and the running servers afterwards."""
        self._doing = doing
        self._show()
        try:
            await work()
        except UserError as problem:
            self.app.show_error(problem)
        self._doing = ""
        self._show_servers(await asyncio.to_thread(running_servers))

    def action_copy(self) -> None:
        """Copy the server's address."""
        if self._server is not None:
            self.app.copy_to_clipboard(self._server.address)


def server_lines(server: ServerStatus, width: int) -> list[Content]:
    """Return a server's state as labeled facts, in lines of at most ``width`` cells."""
    names, more = server.models[:_NAMES], len(server.models) - _NAMES
    speed = f" · {server.tokens_per_s:,.0f} tokens/s" if server.tokens_per_s else ""
    states = {"ready": "ready", "loading": "loading", "unloaded": "unloaded: the next request loads it"}
    styles = {"ready": "$success", "failed": "$error"}
    state = server.detail or states.get(server.state, "")
    facts: list[Fact] = [
        ("address", Content.styled(server.address, "bold")),
        ("models", "\n".join((*names, f"and {more} more") if more > 0 else names)),
        ("base", abbreviate_home(server.base)),
        ("state", Content.styled(state, styles.get(server.state, "$warning"))),
        (
            "requests",
            f"{server.requests:,} · {server.answering} being answered · {server.waiting} waiting{speed}",
        ),
        ("key", abbreviate_home(server.key_file) or "none needed on this machine"),
    ]
    return fact_lines(facts, width)
