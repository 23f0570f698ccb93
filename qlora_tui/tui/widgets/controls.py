"""Panels, lists, scrolling text, text fields, and drawings that repaint only what changed.

Lists and text accept arrow keys and vi keys. Every screen is built from one kind of frame, the panel
(``docs/design.md``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, TypeAlias

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.geometry import Region, Size
from textual.screen import Screen
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.style import Style as VisualStyle
from textual.visual import Visual
from textual.widget import Widget
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from qlora_tui.errors import UserError
from qlora_tui.tui.key_names import bare_key, command_key, keys_in, pressable
from qlora_tui.tui.textual_compat import add_border, bindings_of_widget
from qlora_tui.tui.themes import lacks_shades

HEADING = "heading:"
_PAGE_ROWS = 10
_ALL_ROWS = 100_000
"""A number of rows that is larger than any list, for moving the cursor to the first or last row."""
ROW_KEYS = (
    Binding("up,k", "move(-1)", show=False),
    Binding("down,j", "move(1)", show=False),
    Binding("pageup,ctrl+u", f"move({-_PAGE_ROWS})", show=False),
    Binding("pagedown,ctrl+d", f"move({_PAGE_ROWS})", show=False),
    Binding("g", f"move({-_ALL_ROWS})", show=False),
    Binding("G", f"move({_ALL_ROWS})", show=False),
)
"""Keys that move a widget's cursor from row to row. Home and End are not included, because some widgets use
them for something else.

The widget must have an ``action_move``, which takes a number of rows and stops at the first and last row.
"""
LIST_KEYS = (
    *ROW_KEYS,
    Binding("home", f"move({-_ALL_ROWS})", show=False),
    Binding("end", f"move({_ALL_ROWS})", show=False),
)
"""Keys that move a list's cursor: :data:`ROW_KEYS`, Home and End."""
SCROLL_KEYS = (
    Binding("j", "scroll_down", show=False),
    Binding("k", "scroll_up", show=False),
    Binding("g", "scroll_home", show=False),
    Binding("G", "scroll_end", show=False),
    Binding("ctrl+d", "page_down", show=False),
    Binding("ctrl+u", "page_up", show=False),
)
"""Keys for scrolling text, in addition to the keys that Textual binds."""


WriteList: TypeAlias = Callable[[int], Sequence[tuple[str, Content]]]
"""A function that takes a width in cells and returns the (id, line) pairs of a list for that width."""


class ReversingList(OptionList):
    """A list whose cursor is drawn in reverse video if the theme has at most 16 colors."""

    def get_visual_style(self, *component_classes: str, partial: bool = False) -> VisualStyle:
        """Return the style of the list's lines for these component classes, including ``reverse``.

        On terminals with few colors, ``reverse`` marks the cursor, but Textual omits it.
        """
        style = super().get_visual_style(*component_classes, partial=partial)
        is_reversed = any(self.get_component_styles(name).text_style.reverse for name in component_classes)
        return style + VisualStyle(reverse=True) if is_reversed else style

    def render_line(self, y: int) -> Strip:
        """Return a line of the list. In the line under the cursor of a focused list, no text is dim or
        muted. If this line is reversed, it has only two colors, because ``reverse`` would turn each color of
        its text into a background color.
        """
        strip = super().render_line(y)
        if all(style and style.reverse for _, style, _ in strip):
            return Strip([Segment(text, _two_colors(style)) for text, style, _ in strip], strip.cell_length)
        if not self.has_focus:
            return strip
        cursor = self.get_visual_style("option-list--option-highlighted").rich_style
        if any(not style or style.bgcolor != cursor.bgcolor for _, style, _ in strip):
            return strip
        muted = self.get_visual_style("option-list--option-disabled").rich_style.color
        plain = Style(color=cursor.color, dim=False)
        return Strip(
            [
                Segment(text, style + (plain if style.color == muted else Style(dim=False)))
                for text, style, _ in strip
                if style
            ],
            strip.cell_length,
        )


class ViList(ReversingList):
    """A compact list without a border. The cursor stays on its option when other lines change."""

    DEFAULT_CSS = """
    ViList, ViList:focus {
        border: none;
        padding: 0;
        background: transparent;
        background-tint: transparent;
        scrollbar-size: 0 1;
    }
    ViList > .option-list--option-disabled {
        color: $text-muted;
    }
    /* Another widget has the focus at first. A second cursor in this list would look like a selection. */
    ViList.quiet:blur > .option-list--option-highlighted {
        background: transparent;
        text-style: none;
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

    _write: WriteList | None = None

    def on_resize(self) -> None:
        if self._write is not None:
            self._show(self._write(self.scrollable_content_region.width))
        # If the list has become shorter, the cursor may be out of view.
        self.call_after_refresh(self.scroll_to_highlight)

    def scroll_to_highlight(self, top: bool = False) -> None:
        super().scroll_to_highlight(top)
        # At the first option, scroll to the top, so that a heading above the option is visible too.
        if self.highlighted is not None and all(
            option.disabled for option in self.options[: self.highlighted]
        ):
            self.scroll_home(animate=False)

    @property
    def current(self) -> str | None:
        """Id of the option under the cursor; None if the list is empty."""
        return None if self.highlighted is None else self.options[self.highlighted].id

    def show(self, lines: Sequence[tuple[str, Content]] | WriteList, select: str | None = None) -> None:
        """Show these (id, line) pairs. If ``lines`` is a function, it is called now, and again when the width
        changes.

        The cursor moves to the option ``select``. Without ``select``, the cursor stays on its option, or on
        its row if the option is gone. The cursor skips lines whose id begins with ``HEADING``.
        """
        self._write = lines if callable(lines) else None
        self._show(lines(self.scrollable_content_region.width) if callable(lines) else lines, select)

    def _show(self, lines: Sequence[tuple[str, Content]], select: str | None = None) -> None:
        wanted = select or self.current
        place = self.highlighted or 0
        ids = [id_ for id_, _ in lines]
        if ids == [option.id for option in self.options]:
            is_changed = False
            for index, (_, line) in enumerate(lines):
                if self.options[index].prompt != line:
                    self.replace_option_prompt_at_index(index, line)
                    is_changed = True
            if is_changed and isinstance(self.parent, Widget):
                # Lines may wrap to another number of rows. Textual keeps the height of the list's parent.
                self.refresh(layout=True)
                self.parent.refresh(layout=True)
        elif ids:
            self.set_options(Option(line, id_, disabled=id_.startswith(HEADING)) for id_, line in lines)
            # If the order of the options has changed, the option under the cursor may be out of view.
            self.call_after_refresh(self.scroll_to_highlight)
        else:
            self.clear_options()
        choices = [index for index, id_ in enumerate(ids) if not id_.startswith(HEADING)]
        if wanted in ids:
            self.highlighted = ids.index(wanted)
        elif choices:
            self.highlighted = next((index for index in choices if index >= place), choices[-1])


class ViScroll(VerticalScroll):
    """A container for text that scrolls vertically, also with vi keys."""

    DEFAULT_CSS = """
    ViScroll {
        scrollbar-size-vertical: 1;
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [*SCROLL_KEYS]


class OwnKeysFirst:
    """Mixin for a text field that handles all keys in the order in which they arrive.

    Textual inserts a letter at once, but lets Backspace and Enter bubble up to the app, which runs their
    bindings later. If keys arrive together, as over a slow link, letters overtake these keys: Backspace would
    delete a letter that was typed after it. https://github.com/Textualize/textual/issues/6605
    """

    async def on_key(self, event: events.Key) -> None:
        assert isinstance(self, Widget)
        for binding in bindings_of_widget(self, event.key):
            if await self.app.run_action(binding.action, self):
                event.stop()
                event.prevent_default()
                return


class TextField(OwnKeysFirst, Input):
    """A single-line text field.

    The field's cursor does not blink, so that nothing is sent over a slow link while the text stays the same.
    """

    def on_mount(self) -> None:
        self.cursor_blink = False


_PLACE = "offset"


Draw: TypeAlias = Callable[[int, int], Sequence[Content]]
"""A function that takes a width and a height in cells and returns lines. Lines beyond the height are not
shown.
"""
_UNLIMITED_ROWS = 10_000
"""A number of rows that is larger than any drawing, for drawings whose height depends on their lines."""


class Drawing(Widget):
    """A widget that gets its lines from a function of its width and height. Only changed lines are repainted.

    The widget fills its container or, with ``height: auto``, has one row for each line.
    """

    DEFAULT_CSS = """
    Drawing {
        height: 1fr;
        text-wrap: nowrap;
        text-overflow: ellipsis;
        &.graph {
            min-height: 4;
        }
    }
    """

    def __init__(
        self, draw: Draw = lambda width, height: (), *, id: str | None = None, classes: str | None = None
    ) -> None:
        super().__init__(id=id, classes=classes)
        self._draw = draw
        self._row_count = 0
        """Number of lines at the last layout; only used with ``height: auto``."""
        self._strips: list[Strip] = []
        self._drawn_for: object = None

    def show(self, draw: Draw) -> None:
        """Draw with the function ``draw``. Do nothing if the function and its arguments
        (``functools.partial``) equal the current function and arguments.
        """
        if _parts(draw) != _parts(self._draw):
            self._draw = draw
            self.redraw()

    def redraw(self) -> None:
        """Draw again, and repaint only the lines that differ. This costs half as much as repainting
        everything.
        """
        if not self.is_mounted:
            return
        height, width = self.styles.height, self.size.width
        is_as_high_as_lines = height is not None and height.is_auto and width
        if is_as_high_as_lines and len(self._draw(width, _UNLIMITED_ROWS)) != self._row_count:
            self.refresh(layout=True)
        if self._drawn_for != self._conditions():
            # If the widget was never drawn, or its size or theme has changed, everything is painted anyway.
            self.refresh()
            return
        before, self._strips = self._strips, self._drawn()
        lines = enumerate(zip(before, self._strips, strict=True))
        if changed := [Region(0, y, self.size.width, 1) for y, (old, new) in lines if old != new]:
            self.refresh(*changed)

    @property
    def named_keys(self) -> set[str]:
        """The keys that occur in the lines, in Textual's notation."""
        if self.has_class("graph") or not self.size:
            return set()
        return set[str]().union(*map(keys_in, self._draw(*self.size)))

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        self._row_count = len(self._draw(width, _UNLIMITED_ROWS))
        return self._row_count

    def render_line(self, y: int) -> Strip:
        conditions = self._conditions()
        if self._drawn_for != conditions:
            self._strips = self._drawn()
            self._drawn_for = conditions
        return self._strips[y] if y < len(self._strips) else Strip.blank(self.size.width)

    def notify_style_update(self) -> None:
        self._drawn_for = None
        super().notify_style_update()

    def _conditions(self) -> object:
        return (self.size, self.app.theme, self.visual_style)

    def _drawn(self) -> list[Strip]:
        width, height = self.size
        if not width or not height:
            return []
        lines = list(self._draw(width, height))
        while lines and not lines[-1]:
            lines.pop()
        hidden = len(lines) - height
        lines = lines[:height] + [Content("")] * -hidden
        strips = render_strips(self, Content("\n").join(lines), width, height)
        if hidden > 0 and height > 1:
            strips[-1] = _with_hidden(self, strips[-1], hidden, width)
        return strips


def _parts(draw: Draw) -> object:
    """Return the function and its arguments. If they are equal for two drawings, the drawings
    look the same.
    """
    return (draw.func, draw.args, draw.keywords) if isinstance(draw, partial) else draw


def _with_hidden(widget: Widget, row: Strip, hidden: int, width: int) -> Strip:
    """Return the last visible row of a text with the number of hidden rows at its end: ``3 more ↓``. If the
    row has no room for the number, the number takes the place of the row, which is then hidden too.
    """
    note = Content.styled(f"  {hidden:,} more ↓", "dim")
    room = width - note.cell_length
    if row.crop(room).text.strip():
        return render_line(widget, Content.styled(f"  {hidden + 1:,} more ↓", "dim"), width)
    return Strip.join([row.crop(0, room), render_line(widget, note, note.cell_length)])


def wrapped(lines: Sequence[Content], width: int, height: int) -> list[Content]:
    """Wrap lines to ``width`` cells, and indent continuation lines by two cells. If there are more than
    ``height`` lines, the last line that fits is replaced by a note that says where to find the rest.
    """
    shown: list[Content] = []
    for line in lines:
        first, *rest = line.wrap(max(1, width - 2)) or [Content("")]
        shown += [first, *(Content("  ") + piece for piece in rest)]
    if len(shown) > height > 0:
        shown[height - 1] = Content.styled("… the rest is in the tabs", "dim")
    return shown


class LineView(ScrollView, can_focus=True):
    """A widget of lines that are cut at the right edge and scroll vertically. Subclasses render the lines."""

    DEFAULT_CSS = """
    LineView {
        height: 1fr;
        overflow-x: hidden;
        scrollbar-size-vertical: 1;
        text-wrap: nowrap;
        text-overflow: ellipsis;
    }
    """


Write: TypeAlias = Callable[[int], Content | Sequence[Content]]
"""A function that takes a width in cells and returns a text, or its lines, for that width."""


class Lines(Static):
    """A widget whose text may depend on its width. Unchanged text is not repainted, and the widget is laid
    out again only if the height of a line has changed. If not all rows of the text fit, the last visible row
    ends with the number of hidden rows.
    """

    _write: Write | None = None

    @property
    def named_keys(self) -> set[str]:
        """The keys that occur in the text, in Textual's notation."""
        return keys_in(self.content) if isinstance(self.content, Content) else set()

    def show(self, text: Content | Sequence[Content] | Write) -> None:
        """Show a text or its lines. If ``text`` is a function, it is called now, and again when the width
        changes.
        """
        self._write = text if callable(text) else None
        if not callable(text):
            self._show(text)
        elif self.content_size.width:
            self._show(text(self.content_size.width))

    def render_line(self, y: int) -> Strip:
        if y == self.size.height - 1 > 0 and isinstance(self.content, Content):
            hidden = sum(_lines(self.content, self.size.width)) - self.size.height
            if hidden > 0:
                return _with_hidden(self, super().render_line(y), hidden, self.size.width)
        return super().render_line(y)

    def on_resize(self) -> None:
        if self._write is not None and self.content_size.width:
            self._show(self._write(self.content_size.width))

    def _show(self, text: Content | Sequence[Content]) -> None:
        before, content = self.content, text if isinstance(text, Content) else Content("\n").join(text)
        # Contents that compare equal can differ in their colors, so ``is_same`` is used.
        if isinstance(before, Content) and before.is_same(content):
            return
        width = self.content_size.width  # 0 while the widget is hidden
        same_height = (
            width > 0 and isinstance(before, Content) and _lines(before, width) == _lines(content, width)
        )
        self.update(content, layout=not same_height)


def render_strips(widget: Widget, content: Content, width: int, height: int) -> list[Strip]:
    """Render content as lines in the widget's style, each ``width`` cells wide.

    Textual adds an offset to the style of each segment, for selection with the mouse. The offset is removed
    here: otherwise the same text one cell further right would have another style, and Textual's style caches
    would keep growing.
    """
    strips = Visual.to_strips(
        widget, content, width, height, widget.visual_style, pad=True, apply_selection=False
    )
    return [
        Strip([Segment(text, _placeless(style)) for text, style, _ in strip], strip.cell_length)
        for strip in strips
    ]


def render_line(widget: Widget, content: Content, width: int) -> Strip:
    """Render content as one line in the widget's style, ``width`` cells wide."""
    strips = render_strips(widget, content, width, 1)
    return strips[0] if strips else Strip.blank(width, widget.rich_style)


def cursor_row(widget: Widget, row: Content, width: int) -> Content:
    """Return the row in the style that ``ViList`` gives the row under its cursor, padded to ``width``
    cells.
    """
    row = row.pad_right(max(0, width - row.cell_length))
    style = cursor_style(widget)
    return Content(row.plain).stylize(style) if style == "reverse" else row.stylize_before(style)


def cursor_style(widget: Widget) -> str:
    """Return the style of a cell under a cursor: the theme's cursor colors, or ``reverse`` if the app or its
    theme uses at most 16 colors.
    """
    if lacks_shades(widget.app):
        return "reverse"
    return "bold $block-cursor-foreground on $block-cursor-background"


def _two_colors(style: Style | None) -> Style:
    style = style or Style()
    return Style(underline=style.underline, reverse=True, meta=style.meta)


def _placeless(style: Style | None) -> Style | None:
    meta = {} if style is None else style.meta
    if style is None or _PLACE not in meta:
        return style
    del meta[_PLACE]
    plain = style.clear_meta_and_links()
    return plain + Style(meta=meta or None, link=style.link) if meta or style.link else plain


def _lines(content: Content, width: int) -> list[int]:
    """Return how many rows each line of ``content`` takes at this width in cells; empty if the width is 0."""
    lines = content.split("\n") if width else []
    return [len(line.wrap(width)) if line.cell_length > width else 1 for line in lines]


_MIN_FRAME = 3
"""Minimum width of a frame, in cells: two corners and one cell between them."""
_ARROWS = {"Left": "←", "Right": "→", "Up": "↑", "Down": "↓"}


add_border("surface", (("▐", " ", "▌"), ("▐", " ", "▌"), (" ", " ", " ")), on_parent=("▐", "▌", "bottom"))
add_border("surface-keys", (("▐", " ", "▌"),) * 3, on_parent=("▐", "▌"))
add_border("rule", ((" ", "─", " "), (" ", " ", " "), (" ", " ", " ")), on_parent=())


def is_covered(screen: Screen[Any]) -> bool:
    """Return whether the screen is behind a dialog. Such a screen is visible, but its keys do nothing."""
    return screen.is_current and not screen.is_active


def holds_focus(widget: Widget) -> bool:
    """Return whether the screen's focused widget is this widget or one of its descendants, even if a dialog
    covers the screen.
    """
    focused = widget.screen.focused
    return focused is not None and widget in focused.ancestors_with_self


class Panel(Vertical):
    """A part of a screen, with its title in the first row and its keys in the last.

    Only the panel with the focus has a frame, which is double on terminals without color. While a dialog
    covers the screen, no panel has a frame. Other panels are tinted surfaces or, with at most 16 colors, have
    a rule at the top (``app.tcss``). The contents of a panel take the same cells with and without the focus.
    In windows with fewer than 100 columns or 30 rows (``breakpoints``), a panel has only a rule at the top,
    and its keys are in the footer. A panel that is ``empty`` takes one line.
    """

    DEFAULT_CSS = """
    Panel {
        height: auto;
        padding: 0 1;
        border: rule $border-blurred;
        border-title-color: $primary;
        border-title-style: bold;
        border-subtitle-color: $text-muted;
        &:focus-within {
            border: round $border;
        }
        &:nocolor:focus-within {
            border: double $border;
        }
    }
    """

    def __init__(
        self,
        title: str | Content,
        *children: Widget,
        keys: Sequence[tuple[str, str]] = (),
        id: str | None = None,
        classes: str | None = None,
    ) -> None:
        """Create the panel.

        ``keys``: (command id, label) pairs for the lower border, which shows key and label: ``x other run``.
        """
        super().__init__(*children, id=id, classes=classes)
        self._keys: tuple[tuple[str, str], ...] = ()
        self._keys_cells = 0
        self._title = Content()
        self._empty: str | Content = ""
        self._is_covered = False
        self.show_title(title)
        self.show_keys(keys)

    def show_title(self, title: str | Content) -> None:
        """Change the title. A string is plain text: brackets in it are not markup."""
        content = title if isinstance(title, Content) else Content(title)
        if not content.is_same(self._title):  # contents that compare equal can differ in their styles
            self._title = content
            self._show_title()

    @property
    def empty(self) -> str | Content:
        """Why the panel has nothing to show; empty if it has something. With a reason, the panel shrinks to
        one line, such as ``Queue: empty``.
        """
        return self._empty

    @empty.setter
    def empty(self, reason: str | Content) -> None:
        if reason != self._empty:
            self._empty = reason
            self.set_class(bool(reason), "-empty")
            self._show_title()

    def _show_title(self) -> None:
        reason = Content.assemble(": ", self._empty).stylize_before("not bold $text-muted")
        self.border_title = self._title + reason if self._empty else self._title

    def render_lines(self, crop: Region) -> list[Strip]:
        """Return the rendered lines. Title and keys are aligned with the contents, one cell further out than
        Textual draws them.
        """
        width, height = self.outer_size
        if not self.styles.border_left[0] or width < _MIN_FRAME or not crop.height:
            return super().render_lines(crop)
        lines = super().render_lines(Region(0, crop.y, width, crop.height))
        if crop.y == 0:
            lines[0] = _joined(lines[0], (0, 1), (2, width - 1), (width - 2, width))
        if crop.bottom == height > 1:
            lines[-1] = _joined(lines[-1], (0, 2), (1, width - 2), (width - 1, width))
        return [line.crop(crop.x, crop.right) for line in lines]

    def show_keys(self, keys: Sequence[tuple[str, str]]) -> None:
        """Change the keys in the lower border to these (command id, label) pairs."""
        if tuple(keys) != self._keys:
            self._keys = tuple(keys)
            self.set_class(bool(keys), "-keys")
            if self.is_attached:
                self._show_subtitle()

    def on_mount(self) -> None:
        self._show_subtitle()
        self.watch(self.screen, "stack_updates", self._show_covered, init=False)

    @property
    def has_focus_within(self) -> bool:
        """Whether the panel or a descendant has the focus. False while a dialog covers the screen."""
        return not self._is_covered and super().has_focus_within

    def _show_covered(self) -> None:
        """Remove the focus frame when a dialog covers the screen, and restore it when the dialog closes."""
        covered = is_covered(self.screen)
        if covered != self._is_covered:
            self._is_covered = covered
            if holds_focus(self):
                self.update_node_styles(animate=False)

    def _show_subtitle(self) -> None:
        # Called once the panel is mounted, since the user's keymap is read from the running app.
        hints = [
            hint.stylize("$key bold", 0, hint.plain.index(" "))
            for hint in (_hint(command, verb) for command, verb in self._keys)
        ]
        shown = Content("  ").join(hints)
        self._keys_cells = shown.cell_length
        self.border_subtitle = shown if hints else None

    @property
    def named_commands(self) -> set[str]:
        """Ids of the commands whose keys the lower border shows; empty if the border has no room for all of
        them.
        """
        is_shown = self.styles.border_bottom[0] and all(node.display for node in self.ancestors_with_self)
        has_room = self._keys_cells <= self.outer_size.width - _MIN_FRAME - 1
        return {id_ for id_, _ in self._keys} if is_shown and has_room and not self._empty else set()

    @property
    def named_keys(self) -> set[str]:
        """The keys in the title, in Textual's notation; empty if the title is not visible as a whole."""
        is_whole = bool(self.size) and self._title.cell_length <= self.outer_size.width - _MIN_FRAME
        return keys_in(self._title) if is_whole else set()


def _joined(line: Strip, *parts: tuple[int, int]) -> Strip:
    return Strip.join([line.crop(*part) for part in parts])


def _hint(command: str, verb: str) -> Content:
    """Return a command's key and verb, such as ``x other run``. A click on them presses the key."""
    shown = bare_key(command)
    return pressable(f"{_ARROWS.get(shown, shown)} {verb}", command_key(command))


class ModelProblem(Static):
    """The problem with the recipe's model, shown in place of a screen's content. Hidden if there is no
    problem.
    """

    DEFAULT_CSS = """
    ModelProblem {
        height: auto;
        padding: 1 2;
        color: $text-muted;
    }
    """

    def __init__(self) -> None:
        super().__init__(markup=False)

    def show(self, problem: UserError | None) -> None:
        """Show a problem; None hides the widget."""
        self.display = problem is not None
        if problem is not None:
            self.update("\n".join(filter(None, (problem.what, problem.why, f"▸ {problem.fix}"))))
