"""The peak of each precision as a bar against the limit."""

from __future__ import annotations

from collections.abc import Mapping

from textual.content import Content
from textual.widgets import Static

from qlora_tui.memory import Estimate
from qlora_tui.memory.estimate import Precision, why_int8_is_larger
from qlora_tui.tui.breakpoints import WIDE_CELLS
from qlora_tui.tui.screens.memory.stacked_bar import legend, precision_bars
from qlora_tui.tui.screens.memory.text import levels_line
from qlora_tui.tui.widgets.line_widgets import update_if_changed
from qlora_tui.tui.widgets.panel import Panel

_FRAME = 4
"""Cells of a panel's border and padding."""


class PeakPanel(Panel):
    """Bars, their legend, the peak of the marked one in numbers, and why int8 takes more than 16 bits."""

    def __init__(self) -> None:
        self._bars = Static(id="bars")
        keys = (("memory.next", "next precision"), ("memory.use", "train in this"))
        super().__init__("Peak", self._bars, keys=keys, id="peak-panel")

    def show(
        self,
        heading: tuple[str, str],
        compared: Mapping[Precision, Estimate],
        marked: Precision,
        of_recipe: Precision,
        limit_bytes: int,
        width: int,
        *,
        layers: int,
        can_train: bool,
    ) -> None:
        """Show these estimates under a heading, whose second part is less important."""
        self.show_title(Content.assemble(heading[0], (heading[1], "$text-muted not bold")))
        reason = why_int8_is_larger(compared["int8"], compared["fp16"])
        lines = [
            *precision_bars(compared, marked, of_recipe, limit_bytes, width, can_train=can_train),
            legend(),
            Content.styled(
                levels_line(compared[marked], layers, short=width < WIDE_CELLS - _FRAME), "$text-muted"
            ),
            *([Content.styled(reason, "$text-muted")] if reason else []),
        ]
        update_if_changed(self._bars, Content("\n").join(lines))
