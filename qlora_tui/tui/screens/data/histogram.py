"""Histogram of sample lengths with the sequence length marked on the axis."""

from __future__ import annotations

from itertools import pairwise

from textual.content import Content

from qlora_tui.data.length_stats import Bin, Lengths

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_MAX_WIDTH = 72
"""Columns beyond which bars only get fatter."""


def histogram(lengths: Lengths, cut_at: int | None, width: int, height: int) -> Content:
    """``height`` lines of bars and one of an axis.

    Bars beyond ``cut_at`` are hatched; the axis labels it in its place, or has an arrow if all
    samples are shorter. Without ``cut_at`` nothing is marked.
    """
    bins = lengths.histogram
    if not bins or width < 8:
        return Content("")
    width = min(width, _MAX_WIDTH)
    edges = _edges(bins)
    cut = width if cut_at is None else _column(edges, cut_at, width)
    tops = [_top(bins, int(column * len(bins) / width), height) for column in range(width)]
    lines = [_line(tops, height - 1 - row, cut) for row in range(height)]
    return Content("\n").join([*lines, _axis(edges, cut_at, cut, width)])


def _edges(bins: tuple[Bin, ...]) -> list[int]:
    return [0, *(bin_.up_to for bin_ in bins)]


def _column(edges: list[int], length: int, width: int) -> int:
    """Column of a length on the axis, ``width`` if it is beyond the end. All bins are equally wide."""
    for number, (low, high) in enumerate(pairwise(edges)):
        if length < high:
            return round((number + (length - low) / (high - low)) * width / (len(edges) - 1))
    return width


def _top(bins: tuple[Bin, ...], number: int, height: int) -> int:
    """Height of a bar in eighths of a line; where there is anything, at least one."""
    most = max(bin_.count for bin_ in bins) or 1
    count = bins[number].count
    return max(1 if count else 0, round(count / most * height * 8))


def _line(tops: list[int], row: int, cut: int) -> Content:
    """One line of the bars, ``row`` lines above the axis."""
    within, beyond = "", ""
    for column, top in enumerate(tops):
        eighths = min(8, max(0, top - row * 8))
        if column < cut:
            within += _EIGHTHS[eighths]
        else:
            beyond += "▒" if eighths >= 4 else _EIGHTHS[eighths]
    return Content.assemble((within, "$primary"), (beyond, "$warning"))


def _axis(edges: list[int], cut_at: int | None, cut: int, width: int) -> Content:
    """``0───────✂ 1,024────2,300``."""
    tail = len(edges) > 2 and edges[-1] - edges[-2] > edges[1]
    end = f"{'⋯ ' if tail else ''}{edges[-1]:,}"
    if cut_at is None:
        return Content.styled("0" + "─" * (width - 2 - len(end)) + f" {end}", "dim")
    if cut >= width:
        mark = f"✂ max {cut_at:,} →"
        line = "─" * max(1, width - len(end) - len(mark) - 3)
        return Content.assemble((f"0{line} {end} ", "dim"), mark)
    mark = f"✂ {cut_at:,}"
    place = min(max(1, cut), width - len(mark))
    width_right = width - place - len(mark)
    right = "─" * (width_right - len(end) - 1) + f" {end}" if width_right > len(end) else "─" * width_right
    return Content.assemble(("0" + "─" * (place - 1), "dim"), (mark, "$warning bold"), (right, "dim"))
