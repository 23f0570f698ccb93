"""Lists, scrolled text and text fields, with arrow keys and the keys of vi."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Input, OptionList
from textual.widgets.option_list import Option

from qlora_tui.tui.textual_compat import bindings_of_widget

HEADING = "heading:"
_PAGE_ROWS = 10
_ALL_ROWS = 100_000
"""More rows than there are in any list."""
ROW_KEYS = (
    Binding("up,k", "move(-1)", show=False),
    Binding("down,j", "move(1)", show=False),
    Binding("pageup,ctrl+u", f"move({-_PAGE_ROWS})", show=False),
    Binding("pagedown,ctrl+d", f"move({_PAGE_ROWS})", show=False),
    Binding("g", f"move({-_ALL_ROWS})", show=False),
    Binding("G", f"move({_ALL_ROWS})", show=False),
)
"""Keys from row to row, if Home and End have another meaning, of widgets that move a cursor themselves.

Such a widget has an ``action_move`` that takes a number of rows and stops at both ends.
"""
LIST_KEYS = (
    *ROW_KEYS,
    Binding("home", f"move({-_ALL_ROWS})", show=False),
    Binding("end", f"move({_ALL_ROWS})", show=False),
)
"""Keys of a list with one item per row."""
SCROLL_KEYS = (
    Binding("j", "scroll_down", show=False),
    Binding("k", "scroll_up", show=False),
    Binding("g", "scroll_home", show=False),
    Binding("G", "scroll_end", show=False),
    Binding("ctrl+d", "page_down", show=False),
    Binding("ctrl+u", "page_up", show=False),
)
"""Keys of text that scrolls, in addition to Textual's own."""


class ViList(OptionList):
    """Compact, without a border; the cursor stays on its option while the lines around it change."""

    DEFAULT_CSS = """
    ViList, ViList:focus {
        border: none;
        padding: 0;
        background: $background;
        background-tint: transparent;
        scrollbar-size-vertical: 1;
    }
    ViList > .option-list--option-disabled {
        color: $text-muted;
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "cursor_down", show=False),
        Binding("k", "cursor_up", show=False),
        Binding("g", "first", show=False),
        Binding("G", "last", show=False),
        Binding("ctrl+d", "page_down", show=False),
        Binding("ctrl+u", "page_up", show=False),
    ]

    class Resized(Message):
        """The width has changed, so lines have to be rendered again."""

    def on_resize(self) -> None:
        self.post_message(self.Resized())
        # With fewer lines, or another scroll, the cursor may be out of view.
        self.call_after_refresh(self.scroll_to_highlight)

    def scroll_to_highlight(self, top: bool = False) -> None:
        super().scroll_to_highlight(top)
        # A heading over the first option belongs to it.
        if self.highlighted is not None and all(
            option.disabled for option in self.options[: self.highlighted]
        ):
            self.scroll_home(animate=False)

    @property
    def current(self) -> str | None:
        """Id of the option under the cursor."""
        return None if self.highlighted is None else self.options[self.highlighted].id

    def show(self, lines: Sequence[tuple[str, Content]], select: str | None = None) -> None:
        """Show these (id, line). The cursor goes to ``select``, or stays with its option or its place.

        An id that begins with HEADING is a line the cursor passes over.
        """
        wanted = select or self.current
        place = self.highlighted or 0
        ids = [id_ for id_, _ in lines]
        if ids == [option.id for option in self.options]:
            for index, (_, line) in enumerate(lines):
                if self.options[index].prompt != line:
                    self.replace_option_prompt_at_index(index, line)
        elif ids:
            self.set_options(Option(line, id_, disabled=id_.startswith(HEADING)) for id_, line in lines)
            # In another order the same option may be out of view.
            self.call_after_refresh(self.scroll_to_highlight)
        else:
            self.clear_options()
        choices = [index for index, id_ in enumerate(ids) if not id_.startswith(HEADING)]
        if wanted in ids:
            self.highlighted = ids.index(wanted)
        elif choices:
            self.highlighted = next((index for index in choices if index >= place), choices[-1])


class ViScroll(VerticalScroll):
    """Text longer than its window."""

    BINDINGS: ClassVar[list[BindingType]] = [*SCROLL_KEYS]


class OwnKeysFirst:
    """Runs a field's own key bindings in the order of the keys.

    Textual inserts a letter at once, but lets backspace and enter bubble up to the app and back as bindings.
    Of keys that arrive together, as over a slow link, letters would overtake them: what was typed after a
    backspace would be deleted by it. https://github.com/Textualize/textual/issues/6605
    """

    async def on_key(self, event: events.Key) -> None:
        assert isinstance(self, Widget)
        for binding in bindings_of_widget(self, event.key):
            if await self.app.run_action(binding.action, self):
                event.stop()
                event.prevent_default()
                return


class TextField(OwnKeysFirst, Input):
    """A line of text. Its cursor does not blink: nothing is sent over a slow link while nothing changes."""

    def on_mount(self) -> None:
        self.cursor_blink = False
