"""Every use of Textual's private API in this app, and nothing else.

Written against Textual 8.2; the source files named here are in ``src/textual/`` of
https://github.com/Textualize/textual. ``tests/tui/test_textual_compat.py`` fails if a later version of
Textual differs, and says what to do.
"""

from __future__ import annotations

import os
import selectors
from collections.abc import Iterable, Sequence
from functools import partial
from time import monotonic
from types import SimpleNamespace
from typing import Any, TypeAlias

from textual._border import BORDER_CHARS, BORDER_LABEL_LOCATIONS, BORDER_LOCATIONS
from textual._compositor import ChopsUpdate, CompositorUpdate, LayoutUpdate
from textual._context import active_app
from textual._styles_cache import StylesCache
from textual._xterm_parser import XTermParser
from textual.app import App
from textual.binding import Binding
from textual.cache import LRUCache
from textual.css.constants import VALID_BORDER, VALID_LAYOUT
from textual.css.stylesheet import Stylesheet
from textual.driver import Driver
from textual.drivers import linux_driver
from textual.drivers.linux_driver import LinuxDriver
from textual.events import MouseEvent
from textual.layout import Layout
from textual.layouts.factory import LAYOUT_MAP
from textual.message import Message
from textual.screen import Screen
from textual.widget import Widget

from qlora_tui.tui.color_query import QUERY, ReplyReader, can_answer

__all__ = [
    "CachedStylesheet",
    "ChopsUpdate",
    "CompositorUpdate",
    "HookedApp",
    "LayoutUpdate",
    "PromptDriver",
    "active_app",
    "add_border",
    "add_layout",
    "add_size_classes",
    "bindings_of_widget",
    "clear_style_caches",
    "follow_end",
    "full_update",
]

_SHEETS = 1024
"""Number of parsed style sheets to cache. The app has fewer style sheets.

Textual caches 64 sheets and parses all sheets in the same order each time, so with more than 64 sheets every
lookup would miss.
"""


_BorderRow: TypeAlias = tuple[str, str, str]
_BorderRows: TypeAlias = tuple[_BorderRow, _BorderRow, _BorderRow]


def add_border(name: str, glyphs: _BorderRows, *, on_parent: tuple[str, ...]) -> None:
    """Add a border type that style sheets can refer to (``_border.py``, ``css/constants.py``).

    Args:
        name: The name, as in ``border: NAME $color``.
        glyphs: (left, middle, right) for the top, middle and bottom rows.
        on_parent: Glyphs, or whole rows such as ``"bottom"``, that are drawn on the parent's background.
    """
    rows = zip(("top", "middle", "bottom"), glyphs, strict=True)
    places = tuple(tuple(int(row in on_parent or glyph in on_parent) for glyph in line) for row, line in rows)
    borders: Any = (BORDER_CHARS, BORDER_LOCATIONS, BORDER_LABEL_LOCATIONS)
    for table, entry in zip(borders, (glyphs, places, (places[0][1], places[2][1])), strict=True):
        table[name] = entry
    VALID_BORDER.add(name)


def add_layout(layout: type[Layout]) -> None:
    """Add a layout that style sheets can refer to, as in ``layout: NAME``.

    Textual keeps its layouts in ``layouts/factory.py``, and their names in ``css/constants.py``.
    """
    LAYOUT_MAP[layout.name] = layout
    names: Any = VALID_LAYOUT
    names.add(layout.name)


class HookedApp(App[None]):
    """An app with hooks for its output, its errors and its notifications. Textual's ``App`` has no such
    hooks.
    """

    def get_driver_class(self) -> type[Driver]:
        driver = super().get_driver_class()
        return PromptDriver if driver is LinuxDriver else driver

    def intercept_update(self, screen: Screen[Any], update: CompositorUpdate) -> CompositorUpdate:
        """Hook that returns the update to write to the terminal in place of ``update``."""
        return update

    def frame_written(self) -> None:
        """Hook that is called after each frame."""

    def intercept_error(self, error: Exception) -> bool:
        """Hook that returns whether it has handled the error. If it has not, Textual ends the app."""
        return False

    def write_escape(self, sequence: str) -> None:
        """Send an escape sequence to the terminal, for example to set its title or to show a notification."""
        if self._driver is not None:
            self._driver.write(sequence)

    def ask_terminal_colors(self) -> None:
        """Ask the terminal for its colors. Replies, if any, arrive as ``TerminalColor`` messages."""
        if isinstance(self._driver, PromptDriver):
            self._driver.ask_colors()

    def wants_terminal_colors(self) -> bool:
        """Hook that returns whether to ask the terminal for its colors before the first frame."""
        return False

    def remember_copied(self, text: str) -> None:
        """Set the text that is inserted when the user pastes inside the app, without writing to the
        terminal.
        """
        self._clipboard = text

    def dismiss_information(self) -> None:
        """Remove all notifications except warnings and errors.

        The display is not refreshed, since the caller shows another notification.
        """
        for notification in [note for note in self._notifications if note.severity == "information"]:
            self._unnotify(notification, refresh=False)

    def _display(self, screen: Screen[Any], renderable: Any) -> None:
        # While updates are batched (PR 1832), Textual drops this update, so it must not be recorded as
        # written.
        if self._batch_count:
            super()._display(screen, renderable)
            return
        if isinstance(renderable, CompositorUpdate):
            renderable = self.intercept_update(screen, renderable)
        super()._display(screen, renderable)
        if renderable is not None:
            self.frame_written()

    def _handle_exception(self, error: Exception) -> None:
        if not self.intercept_error(error):
            super()._handle_exception(error)


_REPORTS_S = 0.3
"""Seconds after a mouse event or a color query during which the terminal's reports may still arrive over a
slow link.
"""


class PromptDriver(LinuxDriver):
    """A driver that recognizes the terminal's replies, and whose reader thread ends promptly.

    Textual's reader thread checks only every tenth of a second whether it should end, then waits another
    tenth (``drivers/linux_driver.py``). Meanwhile, the closed app stays on the screen. The reader thread of
    this driver ends at once, unless the mouse has just moved. In that case it waits, because unread mouse
    reports would be typed into the shell.
    """

    def __init__(self, app: App[Any], **options: Any) -> None:
        super().__init__(app, **options)
        self._wake_fd = os.eventfd(0)
        """File descriptor that becomes readable when the reader thread should end."""
        self._report_at = 0.0
        """Monotonic time of the last mouse report or color query, in seconds."""
        self._replies = ReplyReader()

    def start_application_mode(self) -> None:
        super().start_application_mode()  # type: ignore[no-untyped-call]  # untyped in Textual
        if isinstance(self._app, HookedApp) and self._app.wants_terminal_colors():
            self.ask_colors()

    def ask_colors(self) -> None:
        """Ask the terminal for its colors, if it is safe to send the query to this terminal."""
        if self.input_tty and can_answer():
            self._replies.expect(monotonic())
            self._report_at = monotonic()
            self.write(QUERY)

    def process_message(self, message: Message) -> None:
        if isinstance(message, MouseEvent):
            self._report_at = monotonic()
        super().process_message(message)

    def disable_input(self) -> None:
        os.eventfd_write(self._wake_fd, int(monotonic() - self._report_at > _REPORTS_S))
        super().disable_input()
        os.eventfd_write(self._wake_fd, 1)  # otherwise the next line could block
        os.eventfd_read(self._wake_fd)

    def run_input_thread(self) -> None:
        # Textual's reader thread creates a selector and a parser from these names, which nothing else in its
        # module uses.
        make = partial(_WokenSelector, self._wake_fd)
        vars(linux_driver)["selectors"] = SimpleNamespace(
            SelectSelector=make, EVENT_READ=selectors.EVENT_READ
        )
        vars(linux_driver)["XTermParser"] = partial(_ReplyParser, self._replies)
        super().run_input_thread()


class _ReplyParser(XTermParser):
    """Parses keys after removing the terminal's replies from the input (``_xterm_parser.py``)."""

    def __init__(self, replies: ReplyReader, debug: bool = False) -> None:
        super().__init__(debug)
        self._replies = replies

    def feed(self, data: str) -> Iterable[Message]:
        typed, replies = self._replies.read(data, monotonic())
        yield from replies
        if typed or not data:  # empty data is the end of the input
            yield from super().feed(typed)

    def tick(self) -> Iterable[Message]:
        if late := self._replies.overdue(monotonic()):
            yield from super().feed(late)
        yield from super().tick()


class _WokenSelector(selectors.SelectSelector):
    """A selector that also returns, without an event, when ``wake_fd`` becomes readable."""

    def __init__(self, wake_fd: int) -> None:
        super().__init__()
        self._wake_fd = wake_fd
        self.register(wake_fd, selectors.EVENT_READ)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return [ready for ready in super().select(timeout) if ready[0].fd != self._wake_fd]


def add_size_classes(screen: Screen[Any]) -> None:
    """Give a new screen the classes of the window's size, such as ``-narrow``, before its widgets are
    mounted.

    Textual adds these classes only after the first layout (``screen.py``), and then applies the style sheets
    to the whole screen again.
    """
    (width, height), app = screen.app.size, screen.app
    for cells, breakpoints in ((width, app.HORIZONTAL_BREAKPOINTS), (height, app.VERTICAL_BREAKPOINTS)):
        classes = screen._get_breakpoint_classes(cells, breakpoints or [])
        screen.update_classes(dict.fromkeys(classes, True), animate=False)


def full_update(screen: Screen[Any]) -> CompositorUpdate:
    """Render the whole screen, regardless of what has changed (``_compositor.py``)."""
    return screen._compositor.render_full_update()


def clear_style_caches() -> None:
    """Clear Textual's cache of colors (``_styles_cache.py``), which keeps widgets in memory after they are
    removed.

    It keeps up to a thousand widgets and everything that they have painted. A page of help takes 160 kB.
    """
    clear = getattr(getattr(StylesCache, "get_inner_outer", None), "cache_clear", None)
    if clear is not None:
        clear()


class CachedStylesheet(Stylesheet):
    """A stylesheet that parses each source once, and again only after a color has changed.

    Textual parses all of the app's style sheets again whenever a screen adds its own (PR 2744). This delays
    the response to the first key press on that screen. Textual also clears its cache of parsed sheets (PR
    3575) each time the variables are set, even to the same values.
    """

    def __init__(self, *, variables: dict[str, str] | None = None) -> None:
        super().__init__(variables=variables)
        self._parse_cache = LRUCache(_SHEETS)

    def set_variables(self, variables: dict[str, str]) -> None:
        if variables != self._variables:
            super().set_variables(variables)

    def reparse(self) -> None:
        self.parse()


def bindings_of_widget(widget: Widget, key: str) -> Sequence[Binding]:
    """Return the bindings of the widget itself for a key (``_bindings``, declared in ``dom.py``)."""
    return widget._bindings.key_to_bindings.get(key, ())


def follow_end(widget: Widget) -> None:
    """Make an anchored widget stick to its end again once the user scrolls back to the end (Textual's
    ``widget.py``).

    Textual does this for containers, but not for a scroll view without children.
    """
    widget._check_anchor()
