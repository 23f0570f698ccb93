"""A form for settings of a recipe or of the app: the label and value of each, and help for the selected
setting.

The form does not change settings itself. It posts :class:`SettingEdited`, the screen makes the change, and
:meth:`SettingsForm.show` shows the new values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
from msgspec import Struct
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.events import Click, Key
from textual.geometry import Region, Size
from textual.message import Message
from textual.strip import Strip
from textual.widgets import Input, Static

from qlora_tui.formatting import abbreviate_home, format_number, truncate_middle
from qlora_tui.recipe.conflicts import find_conflicts
from qlora_tui.recipe.fields import Field, format_value, get_setting
from qlora_tui.recipe.layering import parse_override
from qlora_tui.recipe.schema import Recipe
from qlora_tui.recipe.validation import InvalidRecipeError
from qlora_tui.tui.render.labels import SEPARATOR
from qlora_tui.tui.setting_stepper import step_value
from qlora_tui.tui.widgets.controls import LIST_KEYS, LineView, TextField, cursor_row, render_line

_LETTERS = "asdfghjklqwertyuiopzxcvbnmASDFGHJKLQWERTYUIOPZXCVBNM"
"""Letters for labeling the lines of the list, in the order in which they are used: home row first."""
_SEPARATORS = {"lora.target_modules": ", ", "quantization.skip": ", ", "model_folders": ":"}
_WIDE_CELLS = 50
"""Minimum width of the list, in cells, at which a folded group shows its values next to its title."""
_COLUMN_CELLS = 60
"""Minimum width of each of two columns of groups, in cells."""
_HELP_ROWS = 5
"""Rows that are reserved for the help below the list, including the empty row above the help."""
_NUMBER_CELLS = 14
"""Width of the field for typing a number, in cells."""
_TEXT_SEPARATOR = " | "
"""Separates the items of a setting that is a list of strings, while the user edits it."""


@dataclass
class SettingEdited(Message):
    """Posted when the user has selected or typed a new value for a setting. The value is within bounds."""

    path: str
    value: Any


@dataclass
class SettingPicked(Message):
    """Posted when the user presses Enter on a setting whose values the screen lists.

    ``value`` is the current value.
    """

    field: Field
    value: Any


@dataclass(frozen=True)
class SettingGroup:
    """Settings under a title. The user can open and fold the group. A group without a title is
    always open.
    """

    title: str
    fields: tuple[Field, ...]
    is_open: bool = True
    """Whether the group is open at first. Below the title of a folded group, only changed settings are
    listed.
    """
    applies: Callable[[Struct], bool] = lambda values: True
    """Returns whether the group is shown for the given values of all settings."""


class SettingList(LineView):
    """The settings in their groups, with a cursor. On a setting, Left and Right step its value; on the title
    of a group, they fold and unfold the group. A wide list has two columns.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        *LIST_KEYS,
        Binding("left,h", "step(-1)", show=False),
        Binding("right,l", "step(1)", show=False),
        Binding("enter,space", "choose", show=False),
        Binding("backspace", "reset", show=False),
        Binding("apostrophe", "jump", show=False),
    ]

    class Moved(Message):
        """Posted when the cursor has moved to another setting or group."""

    class Typing(Message):
        """Posted when the user wants to type the value of the setting under the cursor."""

    def __init__(self, groups: Sequence[SettingGroup], base_name: str, picked: Collection[str] = ()) -> None:
        """Create the list.

        Args:
            groups: The settings, in groups.
            base_name: What the settings are compared with, ``preset`` or ``default``.
            picked: Paths of settings whose values the screen lists when Enter is pressed.
        """
        super().__init__()
        self.cursor = 0
        """Index of the line that the cursor is on."""
        self.typed_cells = 0
        """Width of the field for typing the value under the cursor, in cells; 0 if no value is being
        typed.
        """
        self._groups = groups
        self._open = {group.title for group in groups if group.is_open}
        self._is_arranged = False
        """Whether the user has opened or folded a group."""
        self._base_name = base_name
        self._picked = picked
        self._group_of = {field.path: group for group in groups for field in group.fields}
        self._letters: dict[str, int] = {}
        """Index of the line that each letter jumps to; empty while no letters are shown."""
        self._values: Struct | None = None
        self._base: Struct | None = None
        self._notes: Mapping[str, str] = {}
        self._label_cells = max(len(field.label) for group in groups for field in group.fields)
        self._lines = self._shown_lines()
        self._has_two_columns = False
        self._places = [(0, row) for row in range(len(self._lines))]
        """(column, row) of each line."""
        self._rows = 0
        """Number of rows that the list may take without scrolling."""

    @property
    def current(self) -> Field | SettingGroup:
        """The setting or the group under the cursor."""
        return self._lines[self.cursor]

    @property
    def field(self) -> Field | None:
        """The setting under the cursor; None on the title of a group."""
        return self.current if isinstance(self.current, Field) else None

    @property
    def group(self) -> SettingGroup:
        """The group that the cursor is on or in."""
        lines = self._lines[self.cursor :: -1]
        return next((line for line in lines if isinstance(line, SettingGroup)), self._groups[0])

    @property
    def groups_from_cursor(self) -> tuple[SettingGroup, ...]:
        """The group that the cursor is on or in, and the groups below it that apply to the current values."""
        below = self._groups[self._groups.index(self.group) + 1 :]
        return (self.group, *(each for each in below if self._values is None or each.applies(self._values)))

    @property
    def value(self) -> Any:
        """The value of the setting under the cursor; None on the title of a group."""
        if self._values is None or self.field is None:
            return None
        return get_setting(self._values, self.field.path)

    @property
    def value_region(self) -> Region:
        """The area of the value under the cursor, in cells from the upper left corner of the list."""
        column, row = self._place(self.cursor)
        before = self._label_cells + 4
        return Region(column * self._cells + before, row - round(self.scroll_y), self._cells - before, 1)

    @property
    def _cells(self) -> int:
        """Width of a column, in cells."""
        return self.scrollable_content_region.width // (1 + self._has_two_columns)

    def _place(self, line: int) -> tuple[int, int]:
        """Return (column, row) of a line."""
        return self._places[line]

    def _line_at(self, column: int, row: int) -> int | None:
        """Return the index of the line in a column and row; None if there is none."""
        return self._places.index((column, row)) if (column, row) in self._places else None

    def _arrange(self, width: int) -> int:
        """Divide the lines among the columns for this width, and return the number of rows. If there is room,
        an empty row is above each group that is not the first of its column.
        """
        count = len(self._lines)
        titles = [at for at, line in enumerate(self._lines) if isinstance(line, SettingGroup)]
        self._has_two_columns = width >= 2 * _COLUMN_CELLS and bool(titles)
        second = min(titles, key=lambda at: max(at, count - at)) if self._has_two_columns else count
        columns = (range(second), range(second, count))
        rows = 0
        for gap in (1, 0):
            self._places = [
                (column, at - lines[0] + gap * sum(lines[0] < title <= at for title in titles))
                for column, lines in enumerate(columns)
                for at in lines
            ]
            rows = 1 + max((row for _, row in self._places), default=-1)
            if rows <= self._rows:
                break
        return rows

    def on_mount(self) -> None:
        self.virtual_size = Size(1, len(self._lines))

    def on_resize(self) -> None:
        self.virtual_size = Size(1, self._arrange(self.scrollable_content_region.width))

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return self._arrange(width)

    def show(self, values: Struct, base: Struct, notes: Mapping[str, str] | None = None) -> None:
        """Show ``values``, and mark those that differ from ``base``. ``notes``: a remark to show next to a
        value, by the setting's path.
        """
        state = (values, base, notes or {})
        if state != (self._values, self._base, self._notes):
            self._values, self._base, self._notes = state
            self._show_lines()

    def _show_lines(self) -> None:
        """Show the lines for the current values and open groups. The cursor stays on its setting if the
        setting is still shown.
        """
        before, lines = self.current, self._shown_lines()
        rows = self.virtual_size.height
        self._lines = lines
        self.cursor = lines.index(before) if before in lines else min(self.cursor, len(lines) - 1)
        self.virtual_size = Size(1, self._arrange(self.scrollable_content_region.width))
        self.refresh(layout=self.virtual_size.height != rows)

    def _shown_lines(self) -> list[Field | SettingGroup]:
        lines: list[Field | SettingGroup] = []
        for group in self._groups:
            if self._values is None or group.applies(self._values):
                lines += [group] if group.title else []
                is_open = group.title in self._open
                lines += [field for field in group.fields if is_open or self._is_changed(field)]
        return lines

    def _is_changed(self, field: Field) -> bool:
        if self._values is None or self._base is None:
            return False
        return bool(get_setting(self._values, field.path) != get_setting(self._base, field.path))

    def go_to(self, line: int) -> None:
        before, self.cursor = self.cursor, min(max(line, 0), len(self._lines) - 1)
        if self.cursor == before:
            return
        self.scroll_to_region(Region(0, self._place(self.cursor)[1], 1, 1), animate=False, force=True)
        for moved in (before, self.cursor):
            self.refresh_setting(moved)
        self.post_message(self.Moved())

    def refresh_setting(self, line: int | None = None) -> None:
        """Repaint a line. If ``line`` is None, repaint the line under the cursor."""
        self.refresh_line(self._place(self.cursor if line is None else line)[1])

    def action_move(self, places: int) -> None:
        """Move the cursor by this number of lines. It stops at the first and last line."""
        self.go_to(self.cursor + places)

    def action_jump(self) -> None:
        """Label each visible line with a letter.

        Pressing a letter moves the cursor to its line; any other key only removes the letters.
        """
        top = round(self.scroll_y)
        rows = range(top, top + self.scrollable_content_region.height)
        visible = [line for line in range(len(self._lines)) if self._place(line)[1] in rows]
        self._letters = dict(zip(_LETTERS, visible, strict=False))
        self.refresh()

    def on_key(self, event: Key) -> None:
        """If letters label the lines (:meth:`action_jump`), remove them. If the key is one of these letters,
        move the cursor to the line that had the letter.
        """
        if not self._letters:
            return
        event.stop()
        event.prevent_default()
        line = self._letters.get(event.character or "", self.cursor)
        self._letters = {}
        self.refresh()
        self.go_to(line)

    def action_step(self, direction: int) -> None:
        """Step the setting under the cursor to its next value up (``direction`` 1) or down (-1). If the
        setting is text or has no value, start typing instead.

        On the title of a group, open (1) or fold (-1) the group.
        """
        field = self.field
        if field is None:
            self._set_open(direction > 0)
        elif field.kind not in ("bool", "choice", "int", "float") or self.value is None:
            self.post_message(self.Typing())
        elif (after := step_value(field, self.value, direction)) != self.value:
            self.post_message(SettingEdited(field.path, after))

    def action_choose(self) -> None:
        """Change the setting under the cursor. If it has a few choices, step it to the next one; otherwise,
        let the user pick or type a value. On the title of a group, open or fold the group.
        """
        field = self.field
        if field is None:
            self._set_open(self.group.title not in self._open)
        elif field.path in self._picked:
            self.post_message(SettingPicked(field, self.value))
        elif field.kind in ("bool", "choice"):
            self.action_step(1)
        else:
            self.post_message(self.Typing())

    def open_what_fits(self, rows: int) -> None:
        """If the list has two columns, open all groups; otherwise, open as many of the first groups as fit in
        ``rows``. Leave the groups as they are if the user has opened or folded a group.
        """
        self._rows = rows
        if not self._is_arranged:
            self._open = {group.title for group in self._groups if group.is_open or self._has_two_columns}
            for group in self._groups:
                before, self._open = self._open, self._open | {group.title}
                if not self._has_two_columns and len(self._shown_lines()) > rows:
                    self._open = before
                    break
        self._show_lines()

    def _set_open(self, is_open: bool) -> None:
        self._is_arranged = True
        self._open = self._open | {self.group.title} if is_open else self._open - {self.group.title}
        self._show_lines()
        # Scroll the opened group into view, with its title at the top.
        last = min(self.cursor + len(self.group.fields), len(self._lines) - 1) if is_open else self.cursor
        row = self._place(self.cursor)[1]
        shown = Region(0, row, 1, min(last - self.cursor + 1, self.size.height))
        self.call_after_refresh(self.scroll_to_region, shown, animate=False, force=True)
        self.post_message(self.Moved())

    def action_reset(self) -> None:
        """Reset the setting under the cursor to its base value: the preset's value or the default."""
        if self._base is not None and self.field is not None:
            path = self.field.path
            self.post_message(SettingEdited(path, get_setting(self._base, path)))

    def on_click(self, event: Click) -> None:
        column = min(1, event.x // max(1, self._cells))
        line = self._line_at(column, event.y + round(self.scroll_y))
        if line is not None:
            # The first click on a setting moves the cursor to the setting, and the next click changes it. A
            # click on a group opens or folds the group at once.
            is_chosen = line == self.cursor or isinstance(self._lines[line], SettingGroup)
            self.go_to(line)
            if is_chosen:
                self.action_choose()

    def on_focus(self) -> None:
        self.refresh_setting()

    def on_blur(self) -> None:
        self._letters = {}
        self.refresh()

    def render_line(self, y: int) -> Strip:
        row, cells = y + round(self.scroll_y), self._cells
        if not self._has_two_columns:
            return self._render_setting(self._line_at(0, row), cells)
        parts = [self._render_setting(self._line_at(column, row), cells - 1) for column in (0, 1)]
        return Strip.join([parts[0], Strip.blank(1, self.rich_style), parts[1]])

    def _render_setting(self, line: int | None, width: int) -> Strip:
        if line is None:
            return Strip.blank(width, self.rich_style)
        shown = self._lines[line]
        here = line == self.cursor
        letter = next((letter for letter, at in self._letters.items() if at == line), "")
        row = (
            self._title(shown, letter) if isinstance(shown, SettingGroup) else self._row(shown, letter, here)
        )
        if here and self.has_focus:
            row = cursor_row(self, row, width)
        return render_line(self, row, width)

    def _title(self, group: SettingGroup, letter: str) -> Content:
        """Return the title of a group, such as ``+ LoRA 10 settings``. A folded group in a wide list shows
        its values instead of their number.
        """
        is_open, remark = group.title in self._open, f"{len(group.fields)} settings"
        if self._values is not None and self._cells >= _WIDE_CELLS:
            values = [(field, get_setting(self._values, field.path)) for field in group.fields]
            room = self._cells - len(group.title) - 4
            texts = []
            for field, value in values:
                # The end of a path names the model.
                cells = room - len(f"{field.label} {SEPARATOR}…")
                words = truncate_middle(abbreviate_home(field.describe(value)), cells)
                texts.append(f"{field.label} {words}")
            while len(texts) > 1 and len(SEPARATOR.join([*texts, "…"])) > room:
                texts.pop()
            more = ["…"] if len(texts) < len(values) else []
            remark = SEPARATOR.join([*texts, *more])
        return Content.assemble(
            (letter, "bold reverse $key") if letter else ("−" if is_open else "+", "$primary"),
            (f" {group.title}", "bold $primary"),
            ("" if is_open else f"  {remark}", "dim"),
        )

    def _row(self, field: Field, letter: str, here: bool) -> Content:
        if self._values is None or self._base is None:
            return Content(f"  {field.label}")
        value, usual = get_setting(self._values, field.path), get_setting(self._base, field.path)
        changed, group = value != usual, self._group_of[field.path]
        remark = self._notes.get(field.path)
        head = Content.assemble(
            (letter, "bold reverse $key")
            if letter
            else "›"
            if here
            else ("●" if changed else " ", "$primary"),
            (
                f" {field.label:<{self._label_cells}}  ",
                "bold" if here else "$text-muted" if group.title else "",
            ),
        )
        if here and self.typed_cells:
            return head + Content.styled(f"{'':<{self.typed_cells}}  {_expected(field)}", "dim")
        return Content.assemble(
            head,
            (field.describe(value), "bold $primary" if changed else _style_of(field, value, group)),
            (f"  {self._base_name}: {field.describe(usual)}" if changed else "", "dim"),
            (f"  {remark}" if remark else "", "dim"),
        )


def _style_of(field: Field, value: Any, group: SettingGroup) -> str:
    """Return the style of a value that is the same as in the preset or the defaults that the form compares
    with.

    In a group that is open at first, a value is bold if it is not the setting's default, or if the group has
    no title because it contains the main settings. A default value in a group with a title is muted if it
    turns something off, if it lets the program decide, or if the group is folded at first.
    """
    if value != field.default or not group.title:
        return "bold" if group.is_open else ""
    return "$text-muted" if not group.is_open or not value or value in ("auto", "none") else ""


class SettingsForm(Vertical):
    """A list of settings, and below it the help for the setting under the cursor.

    Values are typed in the row of their setting.
    """

    DEFAULT_CSS = """
    SettingsForm {
        height: 1fr;
        layers: list field;
    }
    SettingsForm > SettingList {
        height: auto;
    }
    SettingsForm > #setting-help {
        height: auto;
        max-height: 7;
        margin-top: 1;
        padding: 0 2;
        color: $text-muted;
    }
    SettingsForm > Input {
        display: none;
        layer: field;
    }
    SettingsForm.-editing > Input {
        display: block;
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave_field", show=False)]

    def __init__(
        self,
        groups: Sequence[SettingGroup],
        base_name: str = "preset",
        *,
        validate: Callable[[str, Any], str] = lambda path, value: "",
        picked: Collection[str] = (),
        id: str | None = None,
    ) -> None:
        """Create an empty form.

        Args:
            groups: The settings, in groups.
            base_name: What the settings are compared with: ``preset`` or ``default``.
            validate: Returns the error in a value that the user has typed for the setting with this path;
                empty if the value is valid.
            picked: Paths of settings whose values the screen lists when Enter is pressed.
        """
        super().__init__(id=id)
        self.list = SettingList(groups, base_name, picked)
        self._validate = validate
        self._values: Struct | None = None
        self._wrong = ""
        """The error in the value being typed; empty if the value is valid."""

    def compose(self) -> ComposeResult:
        yield self.list
        yield Static(id="setting-help", markup=False)
        yield TextField(compact=True)

    def focus(self, scroll_visible: bool = True) -> SettingsForm:
        self.list.focus(scroll_visible)
        return self

    def show(self, values: Struct, base: Struct, notes: Mapping[str, str] | None = None) -> None:
        """Show ``values``, and mark those that differ from ``base``. ``notes`` has remarks to show next to
        values, by path.
        """
        is_first, self._values = self._values is None, values
        self.list.show(values, base, notes)
        if is_first:
            self.on_resize()
        self._show_help()

    def on_resize(self) -> None:
        """Open the folded groups that fit above the help, unless the user has opened or folded a group."""
        help_ = self.query_one("#setting-help")
        self.list.open_what_fits(self.size.height - (_HELP_ROWS if help_.display else 0))

    @property
    def field(self) -> Field | None:
        """The setting under the cursor; None on the title of a group."""
        return self.list.field

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return self.has_class("-editing") if action == "leave_field" else True

    def on_setting_list_moved(self) -> None:
        self._show_help()

    def on_setting_list_typing(self) -> None:
        field = self.field
        if field is None:
            return
        box, list_ = self.query_one(Input), self.list
        box.value = _as_text(field, list_.value)
        place = list_.value_region
        cells = _NUMBER_CELLS if field.kind in ("int", "float") else place.width
        list_.typed_cells = min(cells, place.width)
        box.styles.width = list_.typed_cells
        box.styles.offset = place.offset
        self.add_class("-editing")
        list_.refresh_setting()
        box.focus()
        box.action_end()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        field = self.field
        if field is None:
            return
        try:
            value = _parsed(field, event.value.strip())
            wrong = self._validate(field.path, value)
        except (InvalidRecipeError, ValueError) as problem:
            wrong = f"{_problem(field, problem)}."
        if wrong:
            self._wrong = wrong
            self._show_help()
            return
        self.action_leave_field()
        self.post_message(SettingEdited(field.path, value))

    def action_leave_field(self) -> None:
        """Stop typing without changing the value."""
        self.remove_class("-editing")
        self.list.typed_cells, self._wrong = 0, ""
        self.list.refresh_setting()
        self._show_help()
        self.focus()

    def _show_help(self) -> None:
        field, group = self.field, self.list.group
        if self._wrong:
            lines = [f"✗ {self._wrong}"]
        elif field is None:
            names = ", ".join(each.label for each in group.fields)
            lines = [f"Enter opens and folds the group: {names}."]
        else:
            lines = [f"{field.label}: {field.full_help}"]
        if isinstance(self._values, Recipe) and field is not None:
            for conflict in find_conflicts(self._values):
                if field.path in conflict.paths:
                    lines.append(f"✗ {conflict.what}: {conflict.fix}.")
        text = "\n".join(lines)
        box = self.query_one("#setting-help", Static)
        if str(box.content) != text:
            box.update(text)


def _expected(field: Field) -> str:
    """Return text that describes the values that a setting accepts, followed by two keys: ``a whole number
    from 1 to 1,024 · Enter apply · Esc cancel``. The words ``in quotes`` are removed, because quotes are
    needed only in files.
    """
    return f"{field.expected.replace(' in quotes', '')} · Enter apply · Esc cancel"


def _separator(field: Field) -> str:
    return _SEPARATORS.get(field.path, _TEXT_SEPARATOR)


def _as_text(field: Field, value: Any) -> str:
    if value is None:
        return ""
    if field.kind == "texts":
        return _separator(field).join(value)
    if field.kind == "numbers":
        return ", ".join(f"{pattern}={format_number(number)}" for pattern, number in value.items())
    return str(value) if field.kind == "text" else format_value(value).replace(",", "")


def _parsed(field: Field, typed: str) -> Any:
    """Return the typed text as a value of the setting.

    Raises InvalidRecipeError or ValueError if the text is not such a value.
    """
    if field.kind == "texts" and field.path != "lora.target_modules":
        return tuple(part.strip() for part in typed.split(_separator(field).strip()) if part.strip())
    if field.kind == "text":
        return typed
    if not typed and field.default is None:
        return None
    if field.kind in ("int", "float"):
        return msgspec.convert(typed.replace(",", ""), field.type, strict=False)
    layer = parse_override(f"{field.path}={typed}")
    value = layer[field.section][field.key] if field.section else layer[field.key]
    return msgspec.convert(value, field.type)


def _problem(field: Field, problem: Exception) -> str:
    """Return the error in a typed value, without a final period, and with the setting's label instead of its
    path.
    """
    if isinstance(problem, InvalidRecipeError):
        return "; ".join(issue.message.replace(issue.path, field.label, 1) for issue in problem.issues)
    return f"{field.label} must be {field.expected}"
