"""Base class of the app, which decides what is sent to the terminal, and when.

Textual sends the whole screen whenever a screen opens, closes or is laid out again. A page of help on a
160×50 terminal is 100 kB, which takes two seconds on a slow link, and most of it is unchanged. In each line,
this class sends only the cells that have changed. It removes control characters and, if NO_COLOR is set,
colors.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.control import Control
from rich.segment import Segment
from textual.await_complete import AwaitComplete
from textual.events import Resize
from textual.filter import LineFilter
from textual.screen import Screen
from textual.strip import Strip

from qlora_tui.tui import process
from qlora_tui.tui.line_filters import MonochromeFilter, VisibleTextFilter, fallback_glyphs
from qlora_tui.tui.textual_compat import (
    CachedStylesheet,
    ChopsUpdate,
    CompositorUpdate,
    HookedApp,
    LayoutUpdate,
    clear_style_caches,
    full_update,
)

_VISIBLE_TEXT = VisibleTextFilter()
_MONOCHROME_FILTERS = (_VISIBLE_TEXT, MonochromeFilter())
_RESIZES_AT_START = 2
"""Number of resize events that Textual and its driver send at startup. They need no repaint: up to that
point, nothing but the app has written to the terminal.
"""


class TerminalApp(HookedApp):
    """An app for slow links: no animation, each style sheet parsed once, each cell sent only when it
    changes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stylesheet = CachedStylesheet(variables=self.get_css_variables())
        # Over a slow link, an animation would only cause delay.
        self.animation_level = "none"
        self.shown = asyncio.Event()
        """Set once the first frame has been written. Work that would delay the first frame waits for this
        event.
        """
        self._resizes = 0
        self._terminal_contents = TerminalContents(fallback_glyphs(os.environ.get("TERM", "")))

    def on_resize(self, event: Resize) -> None:
        """Send the whole screen. The app also receives this event when it resumes after Ctrl+Z. By then, the
        terminal shows something else. Ignore the events at startup.
        """
        self._resizes += 1
        if self._resizes > _RESIZES_AT_START:
            self.action_repaint()

    def action_repaint(self) -> None:
        """Send the whole screen, regardless of what the terminal shows."""
        self._terminal_contents.invalidate()
        self.refresh()

    def intercept_update(self, screen: Screen[Any], update: CompositorUpdate) -> CompositorUpdate:
        if isinstance(update, ChopsUpdate) and self._terminal_contents.is_unknown:
            # While updates were batched, Textual laid out the whole screen. It now sends only later changes,
            # so render everything.
            update = full_update(screen)
        return ScreenDiff(update, self._terminal_contents)

    def frame_written(self) -> None:
        if not self.shown.is_set():
            # Work that was deferred until the first frame starts now.
            self.shown.set()
            process.enable_gc()

    def style_context(self) -> object:
        """Return everything that is not part of a screen but affects the styles of its widgets: the parsed
        style sheets, and the app's classes and pseudo-classes, which include its theme. Results can be
        compared with ``==``.
        """
        return self.stylesheet.rules, self.classes, self.pseudo_classes

    def get_line_filters(self) -> Sequence[LineFilter]:
        """Return the filters that each line passes through before it is painted."""
        return _MONOCHROME_FILTERS if self.no_color else (_VISIBLE_TEXT, *super().get_line_filters())

    def pop_screen(self) -> AwaitComplete:
        gone = super().pop_screen()
        clear_style_caches()
        return gone


class TerminalContents:
    """The lines that the terminal shows now. Updates are compared with these lines, so that only what differs
    is sent.
    """

    def __init__(self, fallback_glyphs: Mapping[int, str]) -> None:
        self._lines: list[Strip] = []
        self._fallback_glyphs = fallback_glyphs
        """Substitutes for characters that the terminal's font lacks, for ``str.translate``."""

    def invalidate(self) -> None:
        """Forget the lines, because the terminal may show something else. The next update is then sent in
        full.
        """
        self._lines = []

    @property
    def is_unknown(self) -> bool:
        """Whether the lines that the terminal shows are unknown."""
        return not self._lines

    def diff(self, update: CompositorUpdate, console: Console) -> str:
        """Return the escape sequences that apply ``update``, and record its lines as sent."""
        text = self._diff(update, console)
        return text.translate(self._fallback_glyphs) if self._fallback_glyphs else text

    def _diff(self, update: CompositorUpdate, console: Console) -> str:
        if isinstance(update, LayoutUpdate):
            lines = [_plain(strips) for strips in update.strips]
            if len(lines) != len(self._lines):
                self._lines = lines
                return update.render_segments(console)
            return self._send(dict(enumerate(lines)), console)
        if isinstance(update, ChopsUpdate) and self._lines:
            return self._send(self._full_lines(update), console)
        self.invalidate()
        return update.render_segments(console)

    def _full_lines(self, update: ChopsUpdate) -> dict[int, Strip]:
        """Return the complete new line of each row that a partial update changes, by row."""
        lines: dict[int, Strip] = {}
        for y, x1, x2 in update.spans:
            line = lines.get(y, self._lines[y])
            for end, (x, strip) in zip(update.chop_ends[y], update.chops[y].items(), strict=False):
                if strip is None or x > x2 or end <= x1:
                    continue
                end = end if x2 > x >= x1 and end <= x2 else min(end, x2)
                line = Strip.join([line.crop(0, x), strip.crop(0, end - x), line.crop(end)])
            lines[y] = line
        return {y: _plain([line]) for y, line in lines.items()}

    def _send(self, lines: dict[int, Strip], console: Console) -> str:
        sent = []
        for y, line in lines.items():
            start, end = changed_cells(self._lines[y], line)
            if end > start:
                sent.append(Control.move_to(start, y).segment.text + line.crop(start, end).render(console))
            self._lines[y] = line
        return "".join(sent)


class ScreenDiff(CompositorUpdate):
    """An update that sends only cells that differ from what the terminal shows.

    The differences are computed when the update is written, since some updates are never written.
    """

    def __init__(self, update: CompositorUpdate, terminal_contents: TerminalContents) -> None:
        self._update = update
        self._terminal_contents = terminal_contents

    def render_segments(self, console: Console) -> str:
        return self._terminal_contents.diff(self._update, console)


def _plain(strips: Iterable[Strip]) -> Strip:
    """Return the line without metadata such as click actions, so that lines compare by appearance."""
    return Strip.join(strips).discard_meta().simplify()


def changed_cells(old: Strip, new: Strip) -> tuple[int, int]:
    """Return the range [first, end) of cells that differ; an empty range if none do."""
    before, after = list(old), list(new)
    if before == after:
        return 0, 0
    if old.cell_length != new.cell_length:
        return 0, max(old.cell_length, new.cell_length)
    same_left = _same_cells(before, after)
    same_right = _same_cells(before[::-1], after[::-1], from_right=True)
    return same_left, max(same_left, new.cell_length - same_right)


def _same_cells(one: list[Segment], other: list[Segment], *, from_right: bool = False) -> int:
    cells = 0
    for a, b in zip(one, other, strict=False):
        if a == b:
            cells += a.cell_length
            continue
        # Compare two different segments by character if they have the same style and all characters are one
        # cell wide.
        if a.style == b.style and a.cell_length == len(a.text) and b.cell_length == len(b.text):
            pairs = zip(a.text[::-1], b.text[::-1]) if from_right else zip(a.text, b.text)  # noqa: B905
            for x, y in pairs:
                if x != y:
                    break
                cells += 1
        break
    return cells
