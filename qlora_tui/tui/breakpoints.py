"""Sizes of the window, in cells: the smallest, and those from which several screens show more."""

from textual.geometry import Size

MIN_SIZE = Size(80, 24)
WIDE_CELLS = 100
VERY_WIDE_CELLS = 160
TALL_CELLS = 30
"""Rows from which panels have borders, in a wide window."""


def is_too_small(size: Size) -> bool:
    """Whether parts of the screens would be cut off."""
    return size.width < MIN_SIZE.width or size.height < MIN_SIZE.height
