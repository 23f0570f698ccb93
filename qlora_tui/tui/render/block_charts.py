"""Bars and small charts made of block characters, in eighths of a cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from qlora_tui.tui.render.axis import Axis, column_of, rounded
from qlora_tui.tui.render.series import Envelope

NOT_A_NUMBER = "×"
"""Drawn at the foot of a chart where a value was NaN or infinite."""
_BAR_EIGHTHS = " ▏▎▍▌▋▊▉"
_COLUMN_EIGHTHS = " ▁▂▃▄▅▆▇█"
_BROKEN = -1


def bar(part: float, width: int) -> str:
    """``part`` (0 to 1, more is cut) of ``width`` cells: full blocks, an eighth, then dots."""
    eighths = round(min(max(part, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    text = "█" * full + (_BAR_EIGHTHS[rest] if rest else "")
    return text + "░" * (width - len(text))


def over_axis(envelope: Envelope, x: Axis, columns: int) -> list[float | None]:
    """The highest value of each column; one between two samples holds the earlier, NaN where one broke."""
    values: list[float | None] = [None] * columns
    if not columns:
        return values
    before: int | None = None
    for place, high, broken in zip(envelope.xs, envelope.highs, envelope.broken, strict=True):
        if not x.low <= place <= x.high:
            continue
        column = column_of(place, x, columns)
        if before is not None:
            values[before + 1 : column] = [values[before]] * (column - before - 1)
        known = values[column] if column == before else None
        if broken or (known is not None and math.isnan(known)):
            values[column] = math.nan
        else:
            values[column] = high if known is None else max(known, high)
        before = column
    return values


def blocks(values: Sequence[float | None], low: float, high: float, height: int) -> list[str]:
    """Rows of block characters from the top; None is an empty column, the lowest value still a line."""
    levels = height * 8
    rows = []
    filled = [_level(value, low, high, levels) for value in values]
    for row in range(height - 1, -1, -1):
        line = ""
        for level in filled:
            if level == _BROKEN:
                line += NOT_A_NUMBER if row == 0 else " "
            else:
                line += _COLUMN_EIGHTHS[min(max(level - row * 8, 0), 8)]
        rows.append(line)
    return rows


def _level(value: float | None, low: float, high: float, levels: int) -> int:
    if value is None:
        return 0
    if not math.isfinite(value):
        return _BROKEN
    share = (value - low) / (high - low) if high > low else 0.0
    return max(1, round(min(max(share, 0.0), 1.0) * levels))


def downsample(values: Sequence[float], columns: int) -> list[float | None]:
    """One mean per column, from first to last; NaN where any was not a number, None where there are fewer."""
    if not values:
        return [None] * columns
    count = min(columns, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means: list[float | None] = []
    for start, end in pairwise(edges):
        part = values[start:end]
        means.append(sum(part) / len(part) if all(map(math.isfinite, part)) else math.nan)
    return means + [None] * (columns - count)


def sparkline(losses: tuple[float, ...], width: int) -> str:
    """Draw losses as a sparkline, scaled from the lowest to the highest of this run."""
    means = downsample(losses, width)
    finite = [mean for mean in means if mean is not None and mean == mean]
    if not finite:
        return blocks(means, 0.0, 1.0, 1)[0]
    axis = rounded(min(finite), max(finite))
    return blocks(means, axis.low, axis.high, 1)[0]
