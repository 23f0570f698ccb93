"""Window sizes, in cells: the minimum usable size, and the sizes at which screens show more."""

from textual.geometry import Size

MIN_SIZE = Size(80, 24)
WIDE_CELLS = 100
VERY_WIDE_CELLS = 160
TALL_CELLS = 30
"""Minimum height at which panels have borders, if the window is also wide enough."""

AIRY_CELLS = 40
"""Minimum height of the window at which an empty row separates the first panel from the bars above it, if the
window is also wide enough. On screens that do not need many rows, each panel also ends with an empty row.
"""
ROOMY_CELLS = 50
"""Minimum height at which long lines are wrapped instead of cut, and at which screens with many panels show
every panel in full.
"""


def is_too_small(size: Size) -> bool:
    """Return whether a window of this size is too small, so that parts of the screens would be cut off."""
    return size.width < MIN_SIZE.width or size.height < MIN_SIZE.height
