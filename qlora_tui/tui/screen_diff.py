"""What the terminal shows, so that only differences are sent.

Textual sends the whole screen whenever a screen opens, closes or is laid out again: a page of help over a
terminal of 160×50 is 100 kB, two seconds on a slow link, and most of it is unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.control import Control
from textual.strip import Strip

from qlora_tui.tui.textual_compat import ChopsUpdate, CompositorUpdate, LayoutUpdate
from qlora_tui.tui.widgets.line_widgets import changed_cells


class TerminalContents:
    """The lines that were sent to the terminal."""

    def __init__(self, fallback_glyphs: Mapping[int, str]) -> None:
        self._lines: list[Strip] = []
        self._fallback_glyphs = fallback_glyphs
        """Substitutes for characters that the terminal's font lacks, for ``str.translate``."""

    def invalidate(self) -> None:
        """The terminal may show anything: the next update is sent whole."""
        self._lines = []

    @property
    def is_unknown(self) -> bool:
        """Whether the terminal may show anything."""
        return not self._lines

    def diff(self, update: CompositorUpdate, console: Console) -> str:
        """Return the escape sequences that apply ``update``, and assume that they are sent."""
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
        """Each line that an update of parts touches, whole."""
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
    """An update that sends only differences, computed when it is written: some updates never are."""

    def __init__(self, update: CompositorUpdate, terminal_contents: TerminalContents) -> None:
        self._update = update
        self._terminal_contents = terminal_contents

    def render_segments(self, console: Console) -> str:
        return self._terminal_contents.diff(self._update, console)


def _plain(strips: Iterable[Strip]) -> Strip:
    """A line without metadata such as click actions, so that lines are compared by looks."""
    return Strip.join(strips).discard_meta().simplify()
