"""Widths of the window, in cells, from which screens show more."""

WIDE_CELLS = 100
VERY_WIDE_CELLS = 160
