"""Lines that grow at the end: followed as they come, scrolled back, searched, and filtered by level."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.geometry import Size
from textual.strip import Strip

from qlora_tui.formatting import truncate_middle
from qlora_tui.tui.textual_compat import follow_end
from qlora_tui.tui.widgets.line_widgets import LineView, render_line

Level: TypeAlias = Literal["info", "warning", "error"]

SIGNS: dict[Level, tuple[str, str]] = {
    "info": (" ", ""),
    "warning": ("!", "$warning"),
    "error": ("✗", "$error"),
}
"""(sign, color) by level."""


@dataclass(frozen=True)
class LogEntry:
    """One line."""

    at: float | None
    """Unix time, where it is known."""
    level: Level
    text: str


class LogTail(LineView):
    """Follows the end until it is scrolled away from it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "scroll_down", show=False),
        Binding("k", "scroll_up", show=False),
        Binding("g", "scroll_home", show=False),
        Binding("G", "scroll_end", show=False),
        Binding("ctrl+d", "page_down", show=False),
        Binding("ctrl+u", "page_up", show=False),
    ]

    def __init__(self, empty: str, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._empty = empty
        self._entries: Sequence[LogEntry] = ()
        self._shown_count = 0
        """Entries that are in ``_lines`` already."""
        self._lines: list[Content] = []
        self._wrapped_at = 0
        self._search = ""
        self._only: frozenset[Level] = frozenset(SIGNS)

    def show(self, entries: Sequence[LogEntry], empty: str | None = None) -> None:
        """Show these; a sequence that grew at its end costs only what is new.

        ``empty`` replaces the text that is shown if there are none.
        """
        if empty is not None and empty != self._empty:
            self._empty = empty
            self.refresh()
        if isinstance(entries, tuple) and entries == self._entries:
            return
        if entries is not self._entries or len(entries) < self._shown_count:
            self._entries = entries
            self._rebuild()
        elif len(entries) > self._shown_count:
            self._append_new()

    def filter(self, search: str | None = None, only: frozenset[Level] | None = None) -> None:
        """Show only lines with this text in them, or of these levels."""
        self._search = self._search if search is None else search.casefold()
        self._only = self._only if only is None else only
        self._rebuild()

    def on_mount(self) -> None:
        self.anchor()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        follow_end(self)

    def on_resize(self) -> None:
        self._rewrap()

    def _rewrap(self) -> None:
        if self._wrapped_at != self.scrollable_content_region.width:
            self._rebuild()

    def watch_show_vertical_scrollbar(self) -> None:
        # The scrollbar takes a column, and no resize event is sent for it.
        self._rewrap()

    def render_line(self, y: int) -> Strip:
        width = self.scrollable_content_region.width
        line = y + round(self.scroll_y)
        if not self._lines and y == 0:
            nothing = "No line matches." if self._entries else self._empty
            return render_line(self, Content.styled(nothing, "dim"), width)
        if line >= len(self._lines):
            return Strip.blank(width, self.rich_style)
        return render_line(self, self._lines[line], width)

    def notify_style_update(self) -> None:
        self.refresh()
        super().notify_style_update()

    def _rebuild(self) -> None:
        self._lines = []
        self._shown_count = 0
        self._wrapped_at = self.scrollable_content_region.width
        self._append_new()
        self.refresh()

    def _append_new(self) -> None:
        fresh = self._entries[self._shown_count :]
        self._shown_count += len(fresh)
        for entry in fresh:
            if entry.level in self._only and self._search in entry.text.casefold():
                self._lines += self._wrapped(entry)
        # Anchored, it is scrolled to its end by the layout, which alone knows how much is in view.
        self.virtual_size = Size(max(1, self._wrapped_at), len(self._lines))
        self.refresh()

    def _wrapped(self, entry: LogEntry) -> list[Content]:
        sign, style = SIGNS[entry.level]
        clock = "" if entry.at is None else time.strftime("%H:%M:%S ", time.localtime(entry.at))
        indent = len(clock) + (2 if clock else 0)
        text = Content.styled(entry.text, style) if style else Content(entry.text)
        pieces = text.wrap(max(8, self._wrapped_at - indent)) or [Content("")]
        head = Content.assemble((clock, "dim"), (f"{sign} ", style)) if clock else Content("")
        return [
            (head if number == 0 else Content(" " * indent)) + piece for number, piece in enumerate(pieces)
        ]


def tabs_title(
    names: Sequence[str], front: str, notes: Mapping[str, str], *, filters: str, keys: str, width: int
) -> Content:
    """``log │ answers 12 │ health !2``. A click on a name runs ``screen.show_tab('<name>')``.

    Args:
        names: The tabs.
        front: The one that is shown.
        notes: What follows a name.
        filters: What hides lines now. It is shown even where it has to be shortened.
        keys: Hints for keys, where they are not in the border below; left out first.
        width: Cells that there are.
    """
    parts = []
    for name in names:
        text = f" {name}{' ' if notes.get(name) else ''}{notes.get(name, '')} "
        style = "reverse bold" if name == front else "not bold $text-muted"
        parts.append(Content.styled(text, style).stylize(f"@click=screen.show_tab('{name}')"))
    line = Content.styled("│", "not bold $text-muted").join(parts)
    room = width - line.cell_length - 2
    if filters:
        line += Content.styled(f"  {truncate_middle(filters, max(1, room))}", "bold $foreground")
    elif keys and len(keys) <= room:
        line += Content.styled(f"  {keys}", "not bold $text-muted")
    return line
