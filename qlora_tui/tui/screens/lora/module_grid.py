"""A model's linear modules as a table, and a widget in which modules can be selected. The table has a row for
each kind of module, such as ``q_proj``, and a column for each layer.

The widget does not change the recipe: it posts :class:`ModuleGrid.Chosen` with the new selection, and shows
the selection that the screen passes to :meth:`ModuleGrid.show`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log2
from typing import ClassVar

from textual.app import RenderResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Click
from textual.geometry import Size
from textual.message import Message
from textual.widget import Widget

from qlora_tui.catalog.adapters import adapter_parameters
from qlora_tui.catalog.architecture_types import Architecture, LinearModule
from qlora_tui.errors import UserError
from qlora_tui.formatting import format_count, format_percent, shorten_name
from qlora_tui.recipe.schema import Lora
from qlora_tui.recipe.targets import alpha_of, match_modules, rank_of
from qlora_tui.tui.breakpoints import WIDE_CELLS
from qlora_tui.tui.render.canvas import join_cells
from qlora_tui.tui.render.meters import bar
from qlora_tui.tui.widgets.controls import ROW_KEYS, cursor_row, cursor_style

ALL, SOME, NONE = "all", "some", "none"


def has_custom_rank(modules: Iterable[LinearModule], lora: Lora) -> bool:
    """Return whether a pattern gives any of these modules a rank or alpha that differs from the recipe's."""
    if not (lora.rank_pattern or lora.alpha_pattern):
        return False
    return any((rank_of(lora, m), alpha_of(lora, m)) != (lora.rank, lora.alpha) for m in modules)


@dataclass(frozen=True)
class ModuleRow:
    """A row of the table: the modules of one kind, such as ``q_proj``, or of all kinds. The modules are
    grouped by column.
    """

    name: str
    cells: tuple[tuple[LinearModule, ...], ...]

    @property
    def modules(self) -> list[LinearModule]:
        """All modules of the row, in the model's order."""
        return [module for cell in self.cells for module in cell]

    @property
    def shape(self) -> str:
        """Shape of the first module as in→out, such as ``3584→512``; empty for the row of all kinds."""
        if self.name == "every kind":
            return ""
        first = self.modules[0]
        return f"{first.in_features}→{first.out_features}"


class ModuleTable:
    """The linear modules of a language model, by kind and layer.

    The modules of a vision tower are left out, since training on text gives them no gradient.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.modules: Sequence[LinearModule] = [m for m in architecture.targets if m.part != "vision"]
        layers = sorted({m.layer for m in self.modules if m.layer is not None})
        outside = [None] if any(m.layer is None for m in self.modules) else []
        self.columns: tuple[int | None, ...] = (*layers, *outside)
        """Layer number of each column. If there are modules outside layers, their column is the last, with
        None instead of a number.
        """
        kinds = dict.fromkeys(module.kind for module in self.modules)
        # As in all-linear, experts are left out here. They are selected by name.
        every = self._row("every kind", [m for m in self.modules if m.part != "expert"])
        self.rows = (every, *(self._row(k, [m for m in self.modules if m.kind == k]) for k in kinds))

    def _row(self, name: str, modules: Sequence[LinearModule]) -> ModuleRow:
        by_layer: dict[int | None, list[LinearModule]] = {column: [] for column in self.columns}
        for module in modules:
            by_layer[module.layer].append(module)
        return ModuleRow(name, tuple(tuple(by_layer[column]) for column in self.columns))

    def chosen(self, patterns: tuple[str, ...]) -> frozenset[str]:
        """Return the names of the modules that these patterns select. If any pattern selects no module, the
        set is empty.
        """
        try:
            return frozenset(module.name for module in match_modules(patterns, self.modules))
        except UserError:
            return frozenset()

    def within(self, rows: tuple[int, int], columns: tuple[int, int] | None) -> list[LinearModule]:
        """Return the modules in a range of rows and a range of columns. Both ends of a range are included and
        may be in any order. ``columns``: None for all columns.
        """
        top, bottom = sorted(rows)
        first, last = sorted(columns) if columns else (0, len(self.columns) - 1)
        chosen = {
            module.name: module
            for row in self.rows[top : bottom + 1]
            for cell in row.cells[first : last + 1]
            for module in cell
        }
        return list(chosen.values())


def state(modules: Sequence[LinearModule], chosen: frozenset[str]) -> str:
    """Return whether all, some or none of these modules are selected."""
    count = sum(module.name in chosen for module in modules)
    return ALL if count == len(modules) else SOME if count else NONE


def toggled(modules: Sequence[LinearModule], chosen: frozenset[str]) -> frozenset[str]:
    """Return ``chosen`` without these modules if all of them are in it; otherwise, ``chosen`` with these
    modules.
    """
    names = frozenset(module.name for module in modules)
    return chosen - names if state(modules, chosen) == ALL else chosen | names


BOXES = {ALL: "[x]", SOME: "[-]", NONE: "[ ]"}
CELLS = {ALL: "━", SOME: "╌", NONE: "·"}
CUSTOM = "◆"
"""Marks a selected module whose rank or alpha differs from the recipe's."""
HEAD = -1
"""Cursor column that selects the name of a kind instead of a layer. The name stands for all modules of the
kind.
"""
LONGEST_KIND = 18
_BOX_CELLS = 4
"""Width of ``[x] `` before a kind's name, in cells."""
_TRAINED_CELLS = 7
"""Width, in cells, of the trained-parameter count that is shown after a module kind's shape."""
_SHARE_CELLS, _BAR_CELLS, _LONGEST_BAR = 6, 16, 48
"""Widths, in cells. ``_SHARE_CELLS``: a kind's share of the trained parameters. ``_BAR_CELLS``: the bar that
shows this share in a wide window. ``_LONGEST_BAR``: maximum width of this bar if the layers are not drawn.
"""
_GAP_CELLS = 7
"""Width of the gap before the layers, in cells. In the header line, the gap contains the word ``layer``."""
_LEAST_APART = 3
"""Minimum width of a layer's column at which its last character is left blank, to separate the layers."""
_PALEST, _BRIGHTEST_RANK = 40, 256
"""``_PALEST``: strength of the color for rank 1, in percent. ``_BRIGHTEST_RANK``: lowest rank that is shown
in the full color.
"""


def rank_style(rank: int) -> str:
    """Return the color for this rank. Each doubling of the rank makes the color stronger, up to a maximum."""
    share = min(1.0, log2(rank) / log2(_BRIGHTEST_RANK))
    return f"$primary {_PALEST + (100 - _PALEST) * share:.0f}%"


class ModuleGrid(Widget, can_focus=True):
    """The grid of modules. Arrow keys or h j k l move the cursor. The screen has commands that toggle modules
    and mark blocks.
    """

    DEFAULT_CSS = """
    ModuleGrid {
        height: 1fr;
        padding: 0 1;
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        *ROW_KEYS,
        Binding("left,h", "move(0, -1)", show=False),
        Binding("right,l", "move(0, 1)", show=False),
        Binding("home,circumflex_accent", "move(0, -9999)", show=False),
        Binding("end,dollar_sign", "move(0, 9999)", show=False),
        Binding("escape", "clear_block", show=False),
    ]

    @dataclass
    class Chosen(Message):
        """Posted when the user has changed the selection. ``names``: the modules that are now selected."""

        names: frozenset[str]

    class Moved(Message):
        """Posted when the cursor has moved, or when a block was started or canceled."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._table: ModuleTable | None = None
        self._chosen: frozenset[str] = frozenset()
        self._lora = Lora()
        self._trained: Sequence[int] = ()
        """Trained parameters by row; empty until they have been counted."""
        self._row = 0
        self._column = HEAD
        self._block_from: tuple[int, int] | None = None
        self._first_column = 0
        self._is_uniform = False
        """True if the cursor is not in a layer, and all modules are selected with the recipe's rank and
        alpha. In this case, no layers are drawn, and the first row has the text ``all 32 layers``.
        """
        self._starts: Sequence[int] = ()
        """Left edge of each visible layer, in cells, counted from the first visible layer. The last number is
        the right edge of the last visible layer.
        """

    def show(self, table: ModuleTable, chosen: frozenset[str], lora: Lora) -> None:
        """Show the modules of a model. ``chosen``: names of the selected modules. ``lora``: settings with the
        ranks of the modules.
        """
        if table is not self._table:
            self._row, self._column, self._block_from = 0, HEAD, None
            self.styles.max_height = len(table.rows) + 1
            self.refresh(layout=True)
        if (table, chosen, lora) != (self._table, self._chosen, self._lora):
            self._table, self._chosen, self._lora, self._trained = table, chosen, lora, ()
            self.refresh()

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return len(self._table.rows) + 1 if self._table else 1

    @property
    def under_cursor(self) -> Sequence[LinearModule]:
        """The modules that the toggle key would select or deselect. These are the modules in one cell, of one
        kind, of one layer, or in the block being marked.
        """
        if self._table is None:
            return ()
        row, column = self._block_from or (self._row, self._column)
        whole = HEAD in (column, self._column)
        return self._table.within((row, self._row), None if whole else (column, self._column))

    def action_move(self, rows: int, columns: int = 0) -> None:
        """Move the cursor down by ``rows`` and to the right by ``columns``. Negative numbers move it up and
        to the left. The cursor stops at the edges.
        """
        if self._table is None:
            return
        self._row = min(max(self._row + rows, 0), len(self._table.rows) - 1)
        self._column = min(max(self._column + columns, HEAD), len(self._table.columns) - 1)
        self.refresh()
        self.post_message(self.Moved())

    def toggle(self) -> None:
        """Deselect the modules under the cursor if all of them are selected; otherwise, select all of them.
        Then stop marking a block.
        """
        self.post_message(self.Chosen(toggled(self.under_cursor, self._chosen)))
        self._block_from = None

    def toggle_block_selection(self) -> None:
        """If a block is being marked, toggle its modules; otherwise, begin a block at the cursor."""
        if self._block_from is not None:
            self.toggle()
            return
        self._block_from = (self._row, max(self._column, 0))
        self._column = max(self._column, 0)
        self.refresh()
        self.post_message(self.Moved())

    @property
    def has_block(self) -> bool:
        """Whether a block is being marked."""
        return self._block_from is not None

    def action_clear_block(self) -> None:
        """Stop marking a block, and leave its modules as they are."""
        self._block_from = None
        self.refresh()
        self.post_message(self.Moved())

    def on_click(self, event: Click) -> None:
        """Move the cursor to the clicked cell.

        If the cursor was already in this cell, or if the check box of a kind was clicked, toggle the modules.
        """
        if self._table is None:
            return
        place = event.get_content_offset(self)
        row = self._first_row() + (place.y - 1 if place else -1)
        if place is None or not 0 <= row < len(self._table.rows):
            return
        at = place.x - self._head_width
        is_on_layer = self._starts and 0 <= at < self._starts[-1]
        column = self._first_column + bisect_right(self._starts, at) - 1 if is_on_layer else HEAD
        before, now = (self._row, self._column), (row, column)
        self._row, self._column = now
        self.refresh()
        if before == now or place.x < _BOX_CELLS:
            self.toggle()
        self.post_message(self.Moved())

    def render(self) -> RenderResult:
        table = self._table
        if table is None:
            return Content("")
        height, first = self.content_size.height - 1, self._first_row()
        rows = range(first, min(first + height, len(table.rows)))
        scrolls = len(rows) < len(table.rows)
        self._is_uniform = self._column == HEAD and all(map(self._is_whole, table.rows))
        width_left = max(1, self.content_size.width - self._head_width - 2 * scrolls)
        # Scroll horizontally, just far enough to keep the cursor's column in view.
        column, last = max(self._column, 0), max(0, len(table.columns) - width_left)
        self._first_column = min(max(min(self._first_column, column), column - width_left + 1), last)
        shown = range(self._first_column, min(self._first_column + width_left, len(table.columns)))
        self._starts = [place * width_left // len(shown) for place in range(len(shown) + 1)]
        lines = [self._axis(shown), *(self._line(row, shown) for row in rows)]
        if scrolls:
            thumb = range(first * height // len(table.rows), -(-rows.stop * height // len(table.rows)))
            for number in range(len(rows)):
                bar = Content.styled(" ", "on $scrollbar" if number in thumb else "on $scrollbar-background")
                lines[number + 1] += Content(" ") + bar
        return Content("\n").join(lines)

    @property
    def _head_width(self) -> int:
        return self._left_width + self._bar_cells + _GAP_CELLS

    @property
    def _left_width(self) -> int:
        """Width of the columns to the left of the bars, in cells."""
        assert self._table is not None
        names = max(len(row.name) for row in self._table.rows)
        shapes = max(len(row.shape) for row in self._table.rows)
        return _BOX_CELLS + min(names, LONGEST_KIND) + 1 + shapes + 1 + _TRAINED_CELLS + _SHARE_CELLS

    @property
    def _bar_cells(self) -> int:
        if self._is_uniform:
            room = self.content_size.width - self._left_width - _GAP_CELLS - 2
            return max(0, min(room, _LONGEST_BAR))
        return _BAR_CELLS if self.app.size.width >= WIDE_CELLS else 0

    def _first_row(self) -> int:
        """Return the index of the first visible row. The cursor's row is always in view."""
        return max(0, self._row - max(1, self.content_size.height - 1) + 1)

    def _axis(self, shown: range) -> Content:
        """Return the header line. It has the number of every fifth layer, and arrows toward layers that are
        out of view. ``shown``: the visible columns.
        """
        assert self._table is not None
        text = ""
        for place, column in enumerate(shown):
            layer, start = self._table.columns[column], self._starts[place]
            if start >= len(text) and layer is not None and layer % 5 == 0:
                text = text.ljust(start) + str(layer) + " "
        if shown.stop < len(self._table.columns):
            text = f"{text[: len(shown) - 1]:<{len(shown) - 1}}→"
        if shown.start:
            text = f"←{text[1:]}"
        share, gap = f"{'share':>{_SHARE_CELLS}}{'':<{self._bar_cells}}", " layer"
        if self._is_uniform:
            gap, text = "", ""
        elif all(self._alike(row) for row in self._table.rows):
            gap, text = "", "layers"
        trained = f" {'trains':>{_TRAINED_CELLS}}{share}{gap:<{_GAP_CELLS}}"
        label = f"{'module':<{self._head_width - len(trained)}}{trained}"
        return Content.styled(label + text, "dim")

    def _line(self, index: int, shown: range) -> Content:
        assert self._table is not None
        row = self._table.rows[index]
        here = index == self._row
        pieces: list[tuple[str, str]] = [
            (self._head(index), "bold" if here else ""),
            (self._share_bar(index), "$secondary" if index else ""),
            (" " * _GAP_CELLS, ""),
        ]
        if self._is_uniform:
            pieces.append((" " * self._starts[-1], ""))
        elif alike := self._alike(row):
            pieces.append((alike, ""))
        else:
            for place, column in enumerate(shown):
                width = self._starts[place + 1] - self._starts[place]
                pieces.append(self._cell(row.cells[column], index, column, width))
        line = join_cells(pieces)
        is_under_cursor = here and self._column == HEAD and self.has_focus
        return cursor_row(self, line, self._head_width + self._starts[-1]) if is_under_cursor else line

    def _alike(self, row: ModuleRow) -> str:
        """Return text such as ``all 28 layers`` if all modules of the row are selected and have the recipe's
        rank and alpha. Return an empty string for any other row, if there is no room for the text, and while
        the cursor is on a layer.
        """
        assert self._table is not None
        text = self._all_layers
        has_room = self._column == HEAD and len(text) <= self._starts[-1]
        return text if has_room and self._is_whole(row) else ""

    @property
    def _all_layers(self) -> str:
        return f"all {self._layers} layers"

    @property
    def _layers(self) -> int:
        assert self._table is not None
        return sum(layer is not None for layer in self._table.columns)

    def _is_whole(self, row: ModuleRow) -> bool:
        """Return whether the row has modules in every layer, and all modules of the row are selected and have
        the recipe's rank and alpha.
        """
        in_layers, outside = row.cells[: self._layers], row.cells[self._layers :]
        return (
            bool(in_layers)
            and all(cell and state(cell, self._chosen) == ALL for cell in in_layers)
            and all(state(cell, self._chosen) == ALL for cell in outside)
            and not has_custom_rank(row.modules, self._lora)
        )

    def _head(self, index: int) -> str:
        """Return the beginning of a row: check box, kind, shape, trained parameters, and their share of all
        trained parameters.
        """
        assert self._table is not None
        row, trained = self._table.rows[index], self._trained_by_row()
        names = min(max(len(row.name) for row in self._table.rows), LONGEST_KIND)
        name = shorten_name(row.name, names)
        shapes = max(len(row.shape) for row in self._table.rows)
        box = BOXES[state(row.modules, self._chosen)]
        count, share = "–", ""
        if trained[index]:
            count, share = format_count(trained[index]), format_percent(trained[index] / sum(trained[1:]))
        return f"{box} {name:<{names}} {row.shape:>{shapes}} {count:>{_TRAINED_CELLS}}{share:>{_SHARE_CELLS}}"

    def _share_bar(self, index: int) -> str:
        """Return a bar for a kind's share of all trained parameters. The first row, which is for all kinds,
        has no bar. If the grid is uniform (``_is_uniform``), the first row has a text such as ``all 28
        layers`` in place of a bar.
        """
        if self._is_uniform and not index:
            return f" {self._all_layers}".ljust(self._bar_cells)[: self._bar_cells]
        _, *of_kinds = trained = self._trained_by_row()
        total, cells = sum(of_kinds), max(0, self._bar_cells - 1)
        drawn = bar(trained[index] / total, cells) if total and index else ""
        return f" {drawn:<{cells}}"[: self._bar_cells]

    def _trained_by_row(self) -> Sequence[int]:
        if not self._trained and self._table is not None:
            self._trained = [
                adapter_parameters((m for m in row.modules if m.name in self._chosen), self._lora)
                for row in self._table.rows
            ]
        return self._trained

    def _cell(self, cell: tuple[LinearModule, ...], row: int, column: int, width: int) -> tuple[str, str]:
        """Return (text, style) of a cell, which stands for the modules of one kind in one layer.

        The text shows whether the modules are selected. If all of them are, it has a mark for a rank or alpha
        that differs from the recipe's. The style is the color of the highest rank, or muted if no module is
        selected; under the cursor, it is the cursor's style.
        """
        text, style = " " * width, ""
        if cell:
            mark = state(cell, self._chosen)
            # Separate the layers if they are wide enough.
            gap = " " if width >= _LEAST_APART else ""
            text, style = CELLS[mark] * (width - len(gap)) + gap, "$text-muted"
            if mark != NONE:
                style = rank_style(max(rank_of(self._lora, module) for module in cell))
            if mark == ALL and has_custom_rank(cell, self._lora):
                text = CUSTOM + text[1:]
        return text, self._cursor_style(row, column) or style

    def _cursor_style(self, row: int, column: int) -> str:
        if not self.has_focus or self._column == HEAD:
            return ""
        from_row, from_column = self._block_from or (self._row, self._column)
        top, bottom = sorted((from_row, self._row))
        first, last = sorted((from_column, self._column))
        return cursor_style(self) if top <= row <= bottom and first <= column <= last else ""
