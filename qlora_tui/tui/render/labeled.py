"""Lines of a panel of facts: a dim label in a column of its width, then the value, with a bar or without."""

from __future__ import annotations

from textual.content import Content

from qlora_tui.tui.render.block_charts import bar

_MIN_BAR = 6
"""Cells below which a bar is left out: it could not be read."""


def labeled(label: str, value: str | Content, cells: int) -> Content:
    """``model   SmolLM2-135M``: the label is padded to ``cells``."""
    return Content.assemble((f"{label:<{cells}}", "dim"), value)


def meter(label: str, share: float, value: str, cells: int, width: int) -> Content:
    """``memory  ████░░░░ 18.2 of 24.0 GiB``: the bar takes what label and value leave of ``width``."""
    of_bar = width - cells - len(value) - 1
    drawn = f"{bar(share, of_bar)} " if of_bar >= _MIN_BAR else ""
    return labeled(label, Content.assemble((drawn, "$secondary"), value), cells)
