"""The base of the app: what is sent to the terminal, and when.

Of each line only the part that differs is sent, without control characters, and without colors if NO_COLOR
is set.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from textual.await_complete import AwaitComplete
from textual.events import Resize
from textual.filter import LineFilter
from textual.screen import Screen

from qlora_tui.tui import gc_tuning
from qlora_tui.tui.glyph_fallback import fallback_glyphs
from qlora_tui.tui.monochrome import MonochromeFilter
from qlora_tui.tui.screen_diff import ScreenDiff, TerminalContents
from qlora_tui.tui.textual_compat import (
    CachedStylesheet,
    ChopsUpdate,
    CompositorUpdate,
    HookedApp,
    clear_style_caches,
    full_update,
)
from qlora_tui.tui.visible_lines import VisibleTextFilter

_VISIBLE_TEXT = VisibleTextFilter()
_MONOCHROME_FILTERS = (_VISIBLE_TEXT, MonochromeFilter())
_RESIZES_AT_START = 2
"""Sent by the app itself and by its driver at startup, before anything can have happened to the terminal."""


class TerminalApp(HookedApp):
    """An app for slow links: no animation, each style sheet parsed once, each cell sent once."""

    def __init__(self) -> None:
        super().__init__()
        self.stylesheet = CachedStylesheet(variables=self.get_css_variables())
        # Over a slow link an animation is only a delay.
        self.animation_level = "none"
        self.shown = asyncio.Event()
        """Set once the first frame has been written. Work that the frame need not wait for waits for this."""
        self._resizes = 0
        self._terminal_contents = TerminalContents(fallback_glyphs(os.environ.get("TERM", "")))

    def on_resize(self, event: Resize) -> None:
        """Also sent when the app comes back from ctrl+z: the terminal may show anything."""
        self._resizes += 1
        if self._resizes > _RESIZES_AT_START:
            self.action_repaint()

    def action_repaint(self) -> None:
        """Send the whole screen, whatever the terminal showed."""
        self._terminal_contents.invalidate()
        self.refresh()

    def intercept_update(self, screen: Screen[Any], update: CompositorUpdate) -> CompositorUpdate:
        if isinstance(update, ChopsUpdate) and self._terminal_contents.is_unknown:
            # Textual laid out the whole screen while updates were batched, and now sends only later changes.
            update = full_update(screen)
        return ScreenDiff(update, self._terminal_contents)

    def frame_written(self) -> None:
        if not self.shown.is_set():
            # Work that was deferred until the first frame starts now.
            self.shown.set()
            gc_tuning.enable_gc()

    def get_line_filters(self) -> Sequence[LineFilter]:
        """The filters that each line passes before it is painted."""
        return _MONOCHROME_FILTERS if self.no_color else (_VISIBLE_TEXT, *super().get_line_filters())

    def pop_screen(self) -> AwaitComplete:
        gone = super().pop_screen()
        clear_style_caches()
        return gone
