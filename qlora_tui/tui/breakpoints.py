"""Sizes of the window, in cells, from which several screens show more.

Widths of one list are beside its columns; the smallest window is in ``screens/modals/too_small``.
"""

WIDE_CELLS = 100
VERY_WIDE_CELLS = 160
TALL_CELLS = 30
"""Rows from which panels have borders, in a wide window."""
