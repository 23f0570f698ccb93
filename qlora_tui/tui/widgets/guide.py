"""Two lines that lead a new user through the five steps to a first run."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from textual import work
from textual.events import Resize
from textual.widgets import Static

from qlora_tui.tui.first_steps import FirstSteps, guide_lines, is_guide_hidden, read_first_steps

if TYPE_CHECKING:
    from qlora_tui.tui.app import QloraApp


class Guide(Static):
    """Shown on the screens of the steps until there is a run, unless the user hides it."""

    DEFAULT_CSS = """
    Guide {
        display: none;
        height: 2;
        padding: 0 1;
        background: $surface;
    }
    """

    def __init__(self, mode: str) -> None:
        """``mode``: the screen that it is on."""
        super().__init__()
        self._mode = mode
        self._steps: FirstSteps | None = None

    def show_or_hide(self) -> None:
        """Follow the runs of this machine and the user's wish."""
        app = cast("QloraApp", self.app)
        is_wanted = app.system_status.has_no_runs and not is_guide_hidden()
        if is_wanted != self.display:
            self.display = is_wanted
            self.show_progress()

    def show_progress(self) -> None:
        """Show which steps are done, after the recipe changed."""
        if self.display:
            self._read_and_draw()

    def on_resize(self, event: Resize) -> None:
        self._draw()

    @work(group="guide", exclusive=True)
    async def _read_and_draw(self) -> None:
        app = cast("QloraApp", self.app)
        self._steps = await asyncio.to_thread(read_first_steps, app.workbench, app.memory_budget)
        self._draw()

    def _draw(self) -> None:
        if self._steps is not None:
            self.update(guide_lines(self._steps, self._mode, self.content_size.width))
