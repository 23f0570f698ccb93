"""Arrow keys and the keys of vi, for widgets that move a cursor themselves.

Such a widget has an ``action_move`` that takes a number of rows and stops at both ends.
"""

from __future__ import annotations

from textual.binding import Binding

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
"""Keys from row to row, where Home and End have another meaning."""

LIST_KEYS = (
    *ROW_KEYS,
    Binding("home", f"move({-_ALL_ROWS})", show=False),
    Binding("end", f"move({_ALL_ROWS})", show=False),
)
"""Keys of a list with one item per row."""
